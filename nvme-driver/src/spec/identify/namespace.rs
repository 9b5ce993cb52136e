//! A namespace: as the drive describes it, and checked.

use std::mem::offset_of;

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{BYTES, CommandLimits, ControllerIdentity, Descriptors};
use crate::quirks::Quirk;
use crate::{Error, Namespace};

/// Identify Namespace, CNS 00h (NVM Command Set 1.0, figure 97).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawNamespace {
    nsze: U64,
    ncap: U64,
    _nuse: U64,
    nsfeat: u8,
    nlbaf: u8,
    flbas: u8,
    _mc: u8,
    _dpc: u8,
    dps: u8,
    _nmic: u8,
    _rescap: u8,
    _fpi: u8,
    dlfeat: u8,
    _nawun: U16,
    nawupf: U16,
    _nacwu: U16,
    _nabsn: U16,
    nabo: U16,
    nabspf: U16,
    noiob: U16,
    _nvmcap: [u8; 16],
    npwg: U16,
    npwa: U16,
    npdg: U16,
    npda: U16,
    nows: U16,
    _mssrl: [u8; 25],
    nsattr: u8,
    _nvmsetid: [u8; 4],
    nguid: [u8; 16],
    eui64: [u8; 8],
    formats: [RawFormat; 64],
    _rest: [u8; 3712],
}

/// An LBA format (NVM Command Set 1.0, 4.1.5.1).
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFormat {
    metadata: U16,
    /// LBADS: a block is `1 << shift` bytes.
    shift: u8,
    performance: u8,
}

const _: () = {
    assert!(size_of::<RawNamespace>() == BYTES);
    assert!(offset_of!(RawNamespace, nsfeat) == 24);
    assert!(offset_of!(RawNamespace, flbas) == 26);
    assert!(offset_of!(RawNamespace, dps) == 29);
    assert!(offset_of!(RawNamespace, dlfeat) == 33);
    assert!(offset_of!(RawNamespace, nawupf) == 36);
    assert!(offset_of!(RawNamespace, nabo) == 42);
    assert!(offset_of!(RawNamespace, nabspf) == 44);
    assert!(offset_of!(RawNamespace, noiob) == 46);
    assert!(offset_of!(RawNamespace, npwg) == 64);
    assert!(offset_of!(RawNamespace, nows) == 72);
    assert!(offset_of!(RawNamespace, nsattr) == 99);
    assert!(offset_of!(RawNamespace, nguid) == 104);
    assert!(offset_of!(RawNamespace, eui64) == 120);
    assert!(offset_of!(RawNamespace, formats) == 128);
};

/// Everything needed besides the namespace's own structure to make a [`Namespace`].
pub(crate) struct NamespaceContext<'a> {
    pub id: u32,
    pub identity: &'a ControllerIdentity,
    pub limits: &'a CommandLimits,
    pub descriptors: &'a Descriptors,
    /// The write cache is there and enabled.
    pub write_cache_enabled: bool,
}

impl Namespace {
    /// Checks what the drive answered; refuses formats that cannot be served.
    pub(crate) fn parse(raw: &RawNamespace, context: &NamespaceContext<'_>) -> Result<Namespace, Error> {
        let &NamespaceContext { id, identity, limits, descriptors, write_cache_enabled } = context;
        let refuse = |reason: String| Error::Format { namespace: id, reason };
        if let Some(set) = descriptors.command_set.filter(|&set| set != 0) {
            return Err(refuse(format!(
                "it belongs to I/O command set {set} (2 is zoned, 1 key value); only the NVM Command Set (0) is served"
            )));
        }
        let blocks = raw.nsze.get();
        if blocks == 0 {
            return Err(refuse("its size (NSZE) is 0: it is not active, or not formatted".into()));
        }
        let block_shift = raw.block_shift().map_err(refuse)?;
        if blocks > (i64::MAX as u64) >> block_shift {
            return Err(refuse(format!(
                "its size (NSZE) of {blocks:#x} blocks of {} bytes overflows",
                1u64 << block_shift
            )));
        }

        // The preferred sizes count logical blocks, zero-based, and are there only with OPTPERF (NSFEAT bit 4).
        let optperf = raw.nsfeat & 1 << 4 != 0;
        let block_bytes = 1u32 << block_shift;
        let bytes_of = |field: U16| (u32::from(field.get()) + 1) * block_bytes;
        let preferred = |field: U16| if optperf { bytes_of(field) } else { block_bytes };
        // What is written without tearing over a power failure: the namespace's own values count where it has some (NSABP, bit 1).
        let own = raw.nsfeat & 1 << 1 != 0;
        let atomic_blocks = match raw.nawupf.get() {
            0 => identity.atomic_write_blocks,
            _ if !own => identity.atomic_write_blocks,
            blocks => u32::from(blocks) + 1,
        };
        let boundary = own.then_some((raw.nabspf.get(), raw.nabo.get()));
        let atomic = untorn(atomic_blocks, boundary).saturating_mul(block_bytes);
        let granularity = preferred(raw.npwg);
        let has = |quirk| identity.quirks.has(quirk);
        // Not in the list of the specification's own boundaries; a drive that has one of those knows better.
        let stripe = identity.max_transfer.filter(|bytes| has(Quirk::Striped) && bytes.is_power_of_two());
        let boundary_blocks = match u32::from(raw.noiob.get()) {
            0 => stripe.map_or(0, |bytes| bytes >> block_shift),
            blocks => blocks,
        };
        let commands_blocks = |bytes: Option<u64>| {
            bytes.map_or(MAX_BLOCKS_PER_COMMAND, |bytes| {
                ((bytes >> block_shift) as u32).clamp(1, MAX_BLOCKS_PER_COMMAND)
            })
        };
        let reads_zeroes = raw.dlfeat & 7 == 1;
        let given = |id: &[u8]| !has(Quirk::UntrueIdentifiers) && id.iter().any(|&byte| byte != 0);
        Ok(Namespace {
            id,
            blocks,
            block_shift,
            boundary_blocks,
            physical_block_bytes: physical_block(atomic, granularity, block_bytes),
            write_granularity_bytes: granularity,
            write_alignment_bytes: preferred(raw.npwa),
            // One block is what drives say that do not care.
            optimal_io_bytes: if optperf && raw.nows.get() != 0 { bytes_of(raw.nows) } else { 0 },
            discard_granularity_bytes: preferred(raw.npdg),
            discard_alignment_bytes: preferred(raw.npda),
            max_discard_ranges: limits.discard_ranges,
            max_discard_range_blocks: limits.discard_range_blocks,
            // More is the same blocks again, and a drive may take its time for each.
            max_discard_blocks: limits.discard_blocks.min(blocks).max(1),
            max_write_zeroes_blocks: commands_blocks(limits.write_zeroes_bytes),
            max_verify_blocks: commands_blocks(limits.verify_bytes),
            volatile_write_cache: write_cache_enabled,
            discard: identity.supports_discard,
            write_zeroes: identity.supports_write_zeroes,
            write_zeroes_deallocates: raw.dlfeat & 1 << 3 != 0 && reads_zeroes && !has(Quirk::NoDeallocatingZeroes),
            discard_reads_zeroes: reads_zeroes,
            compare: identity.supports_compare,
            verify: identity.supports_verify,
            read_only: raw.nsattr & 1 != 0,
            eui64: descriptors.eui64.or(Some(raw.eui64)).filter(|id| given(id)),
            nguid: descriptors.nguid.or(Some(raw.nguid)).filter(|id| given(id)),
            uuid: descriptors.uuid.filter(|id| given(id)),
        })
    }
}

impl RawNamespace {
    /// The block size of the format in use, as a power of two, or why it cannot be served.
    fn block_shift(&self) -> Result<u8, String> {
        // The low four bits, and two more when there are over 16 formats (FLBAS; NVM Command Set 1.0, figure 97).
        let high = if self.nlbaf > 15 { self.flbas >> 5 & 3 } else { 0 };
        let index = self.flbas & 0xf | high << 4;
        if index > self.nlbaf {
            return Err(format!(
                "it says that it uses LBA format {index}, and that it has {} formats",
                u16::from(self.nlbaf) + 1
            ));
        }
        let format = &self.formats[usize::from(index)];
        let (shift, metadata, protection) = (format.shift, format.metadata.get(), self.dps & 7);
        let size = if shift < 32 { format!("{} bytes", 1u64 << shift) } else { format!("2^{shift} bytes") };
        let advice = "format it with 512 or 4096 bytes per block, without metadata";
        if metadata != 0 {
            return Err(format!("LBA format {index} has {size} per block and {metadata} bytes of metadata; {advice}"));
        }
        if protection != 0 {
            return Err(format!(
                "LBA format {index} ({size} per block) has protection information type {protection}; {advice}"
            ));
        }
        match shift {
            9 | 12 => Ok(shift),
            0 => Err(format!("LBA format {index} is not available (LBADS 0)")),
            _ => Err(format!("LBA format {index} has {size} per block (LBADS {shift}); {advice}")),
        }
    }

    /// The index of a served format: `1 << shift` bytes, no metadata.
    pub(crate) fn format_with(&self, shift: u8) -> Option<u8> {
        let count = usize::from(self.nlbaf.min(63)) + 1;
        self.formats[..count]
            .iter()
            .position(|format| format.shift == shift && format.metadata.get() == 0)
            .map(|at| at as u8)
    }
}

/// Number of logical blocks is a zero-based 16-bit field in every command that has one.
const MAX_BLOCKS_PER_COMMAND: u32 = 65536;

/// The largest power of two of blocks that is written without tearing wherever a multiple of it begins: `blocks` at a time, and
/// not across the boundaries that the namespace may have, given as NABSPF (zero-based, 0: none) and NABO.
fn untorn(blocks: u32, boundary: Option<(u16, u16)>) -> u32 {
    let largest = 1 << blocks.max(1).ilog2();
    match boundary {
        None | Some((0, _)) => largest,
        // A multiple of it lies on no boundary but its own ones if it divides the distance of two, and the first.
        Some((size, first)) => {
            let divides = |number: u32| 1u32.checked_shl(number.trailing_zeros()).unwrap_or(u32::MAX);
            largest.min(divides(u32::from(size) + 1)).min(divides(first.into()))
        }
    }
}

/// What serves as physical block: what is written without tearing, but no more than 4096 bytes unless the drive also writes in
/// larger units (`granularity`).
fn physical_block(untorn: u32, granularity: u32, block_bytes: u32) -> u32 {
    let unit = (1u32 << granularity.max(1).ilog2()).max(4096);
    untorn.min(unit).max(block_bytes)
}
