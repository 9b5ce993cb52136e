//! What a drive says of itself, byte by byte: put over what the controller would say by its configuration.

use std::str::FromStr;

use crate::config::parse_number;
use crate::error::{Error, invalid};
use crate::registers::DOORBELLS;

/// Bytes of an Identify data structure (NVMe Base 2.0, 5.17).
const IDENTIFY_BYTES: usize = 4096;

/// Bytes put over an Identify data structure, after everything else is in it.
///
/// ```
/// use nvme_sim::{Config, IdentifyPatch};
///
/// let mut config = Config::default();
/// // DLFEAT of namespace 1: what deallocated blocks read is not told, and Write Zeroes does not deallocate.
/// config.identify.push(IdentifyPatch::new(0x00, 33, [0]).of_namespace(1));
/// // The same as text: CNS, namespace, byte offset, bytes in hexadecimal.
/// assert_eq!("0/1:33:00".parse::<IdentifyPatch>().unwrap(), config.identify[0].clone());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifyPatch {
    /// Which data structure: Controller or Namespace Structure, the CNS field of the command.
    pub cns: u8,
    /// Only what is returned for this namespace identifier (NSID of the command).
    pub namespace: Option<u32>,
    /// Where the bytes begin in the data structure, in bytes.
    pub offset: usize,
    /// The bytes, little-endian as all fields are.
    pub bytes: Vec<u8>,
}

impl IdentifyPatch {
    /// `bytes` at byte `offset` of what CNS `cns` returns.
    pub fn new(cns: u8, offset: usize, bytes: impl Into<Vec<u8>>) -> IdentifyPatch {
        IdentifyPatch { cns, namespace: None, offset, bytes: bytes.into() }
    }

    /// Limits the patch to what is returned for one namespace.
    pub fn of_namespace(mut self, id: u32) -> IdentifyPatch {
        self.namespace = Some(id);
        self
    }

    /// Changes `page`, which is returned for `cns` and `namespace`.
    pub(crate) fn apply(&self, cns: u8, namespace: u32, page: &mut [u8]) {
        if self.cns == cns && self.namespace.is_none_or(|id| id == namespace) {
            page[self.offset..self.offset + self.bytes.len()].copy_from_slice(&self.bytes);
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        inside("an Identify data structure", self.offset as u64, &self.bytes, 0..IDENTIFY_BYTES as u64)
    }
}

/// Bytes put over controller registers (NVMe Base 2.0, 3.1.3) as the host reads them. What the controller does is not changed
/// by it: one whose CAP.MQES is changed takes queues of [`Config::queue_entries`](crate::Config::queue_entries) as before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterPatch {
    /// Where the bytes begin, in bytes from the beginning of BAR0: in CAP and VS (0 to 0xb), or behind the admin queue's
    /// registers (0x38 to 0xfff), such as CMBLOC (0x38) and CRTO (0x68).
    pub offset: u64,
    /// The bytes, little-endian as all registers are.
    pub bytes: Vec<u8>,
}

impl RegisterPatch {
    /// `bytes` at byte `offset` of BAR0.
    pub fn new(offset: u64, bytes: impl Into<Vec<u8>>) -> RegisterPatch {
        RegisterPatch { offset, bytes: bytes.into() }
    }

    /// Changes `dword`, which is read at `offset`.
    pub(crate) fn apply(&self, offset: u64, dword: u32) -> u32 {
        let mut raw = dword.to_le_bytes();
        for (at, byte) in (self.offset..).zip(&self.bytes) {
            if at & !3 == offset {
                raw[(at & 3) as usize] = *byte;
            }
        }
        u32::from_le_bytes(raw)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let range = if self.offset < 0xc { 0..0xc } else { 0x38..DOORBELLS };
        inside("the registers that only the controller writes", self.offset, &self.bytes, range)
    }
}

fn inside(what: &str, offset: u64, bytes: &[u8], range: std::ops::Range<u64>) -> Result<(), Error> {
    let end = offset.saturating_add(bytes.len() as u64);
    if !bytes.is_empty() && range.contains(&offset) && end <= range.end {
        return Ok(());
    }
    Err(invalid(format!(
        "a change of {} bytes at {offset:#x} of {what}: give bytes from {:#x} to {:#x}",
        bytes.len(),
        range.start,
        range.end - 1
    )))
}

/// An even number of hexadecimal digits, the byte of the lowest address first.
fn parse_bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks_exact(2);
    if !digits.remainder().is_empty() {
        return None;
    }
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

impl FromStr for IdentifyPatch {
    type Err = Error;

    /// `CNS[/NSID]:OFFSET:BYTES`, numbers decimal or after `0x`, bytes in hexadecimal: `1:520:9500`, `0/2:33:00`.
    fn from_str(text: &str) -> Result<IdentifyPatch, Error> {
        let parse = || {
            let [structure, offset, bytes] = <[&str; 3]>::try_from(text.split(':').collect::<Vec<_>>()).ok()?;
            let (cns, namespace) = structure.split_once('/').map_or((structure, None), |(cns, id)| (cns, Some(id)));
            Some(IdentifyPatch {
                cns: u8::try_from(parse_number(cns)?).ok()?,
                namespace: namespace
                    .map(|id| u32::try_from(parse_number(id)?).ok())
                    .map_or(Some(None), |id| id.map(Some))?,
                offset: usize::try_from(parse_number(offset)?).ok()?,
                bytes: parse_bytes(bytes)?,
            })
        };
        let patch =
            parse().ok_or_else(|| invalid(format!("{text:?} is not CNS[/NSID]:OFFSET:BYTES, like 1:520:9500")))?;
        patch.check().map(|()| patch)
    }
}

impl FromStr for RegisterPatch {
    type Err = Error;

    /// `OFFSET:BYTES`, the offset decimal or after `0x`, bytes in hexadecimal: `0:0000` is CAP.MQES, 0.
    fn from_str(text: &str) -> Result<RegisterPatch, Error> {
        let parse = || {
            let (offset, bytes) = text.split_once(':')?;
            Some(RegisterPatch { offset: parse_number(offset)?, bytes: parse_bytes(bytes)? })
        };
        let patch = parse().ok_or_else(|| invalid(format!("{text:?} is not OFFSET:BYTES, like 0:0000")))?;
        patch.check().map(|()| patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text() {
        assert_eq!("1:0x208:9500".parse::<IdentifyPatch>().unwrap(), IdentifyPatch::new(1, 520, [0x95, 0]));
        assert_eq!("0/2:33:09".parse::<IdentifyPatch>().unwrap(), IdentifyPatch::new(0, 33, [9]).of_namespace(2));
        assert_eq!("0x68:ff00".parse::<RegisterPatch>().unwrap(), RegisterPatch::new(0x68, [0xff, 0]));
        for text in ["", "1:2", "1:2:3", "1:2:", "1:2:0g", "1/x:2:00", "256:0:00", "1:4095:0000", "1:0:00:00", "1:0:é"]
        {
            assert!(text.parse::<IdentifyPatch>().is_err(), "{text:?}");
        }
        for text in ["", "0", "0:0", "0xb:0000", "0x14:00", "0x1000:00", "0x37:0000"] {
            assert!(text.parse::<RegisterPatch>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_register_change_reaches_its_bytes_only() {
        let patch = RegisterPatch::new(3, [0xaa, 0xbb]);
        assert_eq!(patch.apply(0, 0x1122_3344), 0xaa22_3344);
        assert_eq!(patch.apply(4, 0x1122_3344), 0x1122_33bb);
        assert_eq!(patch.apply(8, 0x1122_3344), 0x1122_3344);
    }
}
