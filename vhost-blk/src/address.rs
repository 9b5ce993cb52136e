//! The address of a controller: a PCI function, a vfio-user socket, or a controller embedded in this program.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// Where the NVMe controller of an export is. Two exports with equal addresses share one controller.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DeviceAddress {
    /// A controller behind VFIO or vfio-user.
    Vfio(vfio::Address),
    /// A controller in software inside this process.
    Sim(SimAddress),
}

/// `sim:SIZE[,lba=512|4096][,file=PATH]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimAddress {
    /// Size of the only namespace in bytes, a multiple of 4096.
    pub bytes: u64,
    /// Bytes per logical block: 512 or 4096.
    pub block_bytes: u32,
    /// File that holds the data and survives restarts; `None`: memory.
    pub file: Option<PathBuf>,
}

/// The form of every address, for error messages.
const FORMS: &str = "use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]";

impl FromStr for DeviceAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err(format!("the device address is empty: {FORMS}"));
        }
        match text.strip_prefix("sim:") {
            Some(rest) => sim(rest).map(DeviceAddress::Sim).map_err(|why| format!("device address \"{text}\": {why}")),
            None => vfio::Address::from_str(text)
                .map(DeviceAddress::Vfio)
                .map_err(|_| format!("device address \"{text}\" is not one: {FORMS}")),
        }
    }
}

impl TryFrom<String> for DeviceAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceAddress::Vfio(address) => address.fmt(f),
            DeviceAddress::Sim(sim) => {
                write!(f, "sim:{}", sim.bytes)?;
                if sim.block_bytes != 512 {
                    write!(f, ",lba={}", sim.block_bytes)?;
                }
                if let Some(file) = &sim.file {
                    write!(f, ",file={}", file.display())?;
                }
                Ok(())
            }
        }
    }
}

fn sim(text: &str) -> Result<SimAddress, String> {
    // A path may hold commas: everything after "file=" belongs to it.
    let (options, file) = match text.split_once(",file=") {
        Some((_, "")) => return Err("file= needs a path".into()),
        Some((options, path)) => (options, Some(PathBuf::from(path))),
        None => (text, None),
    };
    let mut parts = options.split(',');
    let bytes = size(parts.next().unwrap_or_default())?;
    let mut block_bytes = 512;
    for part in parts {
        block_bytes = match part {
            "lba=512" => 512,
            "lba=4096" => 4096,
            _ => return Err(format!("unknown option \"{part}\": use lba=512, lba=4096 or file=PATH (last)")),
        };
    }
    if bytes == 0 || bytes % 4096 != 0 {
        return Err("the size must be a multiple of 4096 bytes and not 0".into());
    }
    Ok(SimAddress { bytes, block_bytes, file })
}

/// Bytes, with an optional binary suffix K, M, G or T.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a size: use bytes or a number with K, M, G or T, such as 1G");
    let (digits, shift) = match text.char_indices().last().ok_or_else(wrong)? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        (at, 't' | 'T') => (&text[..at], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    // The driver's limit: byte offsets fit into 63 bits.
    number.checked_mul(1 << shift).filter(|bytes| *bytes < 1 << 62).ok_or_else(|| format!("the size {text} is too big"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DeviceAddress, String> {
        text.parse()
    }

    fn sim_of(text: &str) -> SimAddress {
        match parse(text) {
            Ok(DeviceAddress::Sim(sim)) => sim,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn sim_addresses() {
        assert_eq!(sim_of("sim:1G"), SimAddress { bytes: 1 << 30, block_bytes: 512, file: None });
        assert_eq!(sim_of("sim:8192"), SimAddress { bytes: 8192, block_bytes: 512, file: None });
        assert_eq!(sim_of("sim:2t,lba=4096").block_bytes, 4096);
        assert_eq!(sim_of("sim:4M,lba=4096,file=/tmp/a,b").file, Some("/tmp/a,b".into()));
        assert_eq!(sim_of("sim:16K,file=disk.img").file, Some("disk.img".into()));
    }

    #[test]
    fn addresses_round_trip() {
        for text in ["sim:4096", "sim:1048576,lba=4096", "sim:8192,file=/d,e", "vfio-user:/run/x.sock", "0000:01:00.0"]
        {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("01:00.0"), parse("0000:01:00.0"), "two spellings are one device");
    }

    #[test]
    fn wrong_addresses_say_what_to_do() {
        for (text, message) in [
            (
                "",
                "the device address is empty: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]",
            ),
            (
                "nvme0",
                "device address \"nvme0\" is not one: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]",
            ),
            (
                "sim:",
                "device address \"sim:\": \"\" is not a size: use bytes or a number with K, M, G or T, such as 1G",
            ),
            (
                "sim:1X",
                "device address \"sim:1X\": \"1X\" is not a size: use bytes or a number with K, M, G or T, such as 1G",
            ),
            (
                "sim:é",
                "device address \"sim:é\": \"é\" is not a size: use bytes or a number with K, M, G or T, such as 1G",
            ),
            ("sim:99999999T", "device address \"sim:99999999T\": the size 99999999T is too big"),
            ("sim:1000", "device address \"sim:1000\": the size must be a multiple of 4096 bytes and not 0"),
            (
                "sim:1G,lba=1024",
                "device address \"sim:1G,lba=1024\": unknown option \"lba=1024\": use lba=512, lba=4096 or file=PATH (last)",
            ),
            ("sim:1G,file=", "device address \"sim:1G,file=\": file= needs a path"),
        ] {
            assert_eq!(parse(text).unwrap_err(), message);
        }
    }
}
