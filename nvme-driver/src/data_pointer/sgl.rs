//! Scatter-gather lists (NVMe Base 2.0, 4.1.2).
//!
//! One data block is put into the command itself; more than one go to the slot's page, which the command names by a
//! Last Segment descriptor.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{LIST_WORDS, Position, Runs, SglAlignment};
use crate::Segment;

/// An SGL descriptor: address, then length (31:0) and identifier (63:56) (NVMe Base 2.0, figure 111).
pub(crate) type Descriptor = [u64; 2];

/// Descriptors that fit into a slot's page.
pub(crate) const MAX_DESCRIPTORS: usize = LIST_WORDS / 2;

const _: () = assert!(size_of::<Descriptor>() == 16);

/// Descriptor types, bits 7:4 of the identifier; subtype 0: the address is a memory address (NVMe Base 2.0, figures 112 to 117).
const DATA_BLOCK: u64 = 0x00 << 56;
const LAST_SEGMENT: u64 = 0x30 << 56;

/// The largest multiple of `block` bytes, up to `limit` (one itself), that one command's SGL can describe; 0: not even one.
///
/// Whatever whole blocks of it a command takes can be described as well.
pub(crate) fn reach(segments: &[Segment], position: Position, limit: u64, block: u64, alignment: SglAlignment) -> u64 {
    let mut described = 0;
    for (count, (address, bytes)) in Runs::new(segments, position, limit).enumerate() {
        let dword = alignment == SglAlignment::Dword;
        if count == MAX_DESCRIPTORS || dword && !address.is_multiple_of(4) {
            break;
        }
        described += bytes;
        if dword && !bytes.is_multiple_of(4) {
            break;
        }
    }
    described - described % block
}

/// Describes the next `bytes` bytes, which must be within [`reach`]. `None` if they do not fit into the slot's page.
pub(crate) fn describe(
    segments: &[Segment],
    position: Position,
    bytes: u64,
    list: &[AtomicU64; LIST_WORDS],
    list_iova: u64,
) -> Option<Descriptor> {
    let mut runs = Runs::new(segments, position, bytes);
    let first = runs.next()?;
    let mut written = 0;
    for (address, length) in std::iter::once(first).chain(runs) {
        // Relaxed: ordered before the controller's read by the barrier in `Doorbell::ring`.
        list.get(written)?.store(address, Ordering::Relaxed);
        list.get(written + 1)?.store(length | DATA_BLOCK, Ordering::Relaxed);
        written += 2;
    }
    Some(match written {
        2 => [first.0, first.1 | DATA_BLOCK],
        _ => [list_iova, (written * 8) as u64 | LAST_SEGMENT],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: u64 = 0xabc000;

    fn on(list: &[(u64, u32)], bytes: u64) -> (Option<Descriptor>, Vec<u64>) {
        let segments: Vec<_> = list.iter().map(|&(iova, bytes)| Segment { iova, bytes }).collect();
        let page = [const { AtomicU64::new(0) }; LIST_WORDS];
        let descriptor = describe(&segments, Position::default(), bytes, &page, LIST);
        (descriptor, page.iter().map(|word| word.load(Ordering::Relaxed)).collect())
    }

    #[test]
    fn one_run_lies_in_the_command() {
        assert_eq!(on(&[(0x1001, 500), (0x11f5, 12)], 512).0, Some([0x1001, 512]));
    }

    #[test]
    fn several_runs_lie_in_one_last_segment() {
        let (descriptor, list) = on(&[(0x1001, 500), (0x5000, 12)], 512);
        assert_eq!(descriptor, Some([LIST, 32 | 0x30 << 56]));
        assert_eq!(list[..4], [0x1001, 500, 0x5000, 12]);
    }

    #[test]
    fn the_reach_stops_at_the_first_thing_that_cannot_be_said() {
        let list = [(0x1000, 512), (0x3002, 512), (0x5000, 1024)].map(|(iova, bytes)| Segment { iova, bytes });
        assert_eq!(reach(&list, Position::default(), 2048, 512, SglAlignment::Byte), 2048);
        assert_eq!(reach(&list, Position::default(), 2048, 512, SglAlignment::Dword), 512);
        let odd = [(0x1000, 1026), (0x3000, 1022)].map(|(iova, bytes)| Segment { iova, bytes });
        assert_eq!(reach(&odd, Position::default(), 2048, 512, SglAlignment::Dword), 1024);
        let many: Vec<_> = (0..300).map(|at| Segment { iova: at * 8192, bytes: 510 }).collect();
        assert_eq!(reach(&many, Position::default(), 510 * 300, 512, SglAlignment::Byte), 510 * 256 / 512 * 512);
    }
}
