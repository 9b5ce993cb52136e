//! Physical region pages (NVMe Base 2.0, 4.1.1).
//!
//! PRP1 may point into a page, at a multiple of four bytes; every further entry is a page boundary. So two runs can only be
//! joined where the first ends and the second begins at a page boundary.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{LIST_WORDS, PAGE_BYTES, Position, Runs};
use crate::Segment;

/// The data pointer fields of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prps {
    pub prp1: u64,
    pub prp2: u64,
}

/// How many of the next `limit` bytes one command's PRPs can describe, not rounded to blocks. 0: not even the first byte.
///
/// Whatever part of them a command takes, in multiples of the block size, can be described as well: a joint is a page
/// boundary, so each block of the stretch begins at a multiple of four bytes when the stretch does.
pub(crate) fn reach(segments: &[Segment], position: Position, limit: u64) -> u64 {
    let mut described = 0;
    let mut end = 0u64;
    for (address, bytes) in Runs::new(segments, position, limit) {
        if described == 0 {
            if !address.is_multiple_of(4) {
                return 0;
            }
        } else if !end.is_multiple_of(PAGE_BYTES) || !address.is_multiple_of(PAGE_BYTES) {
            break;
        }
        described += bytes;
        end = address.wrapping_add(bytes);
    }
    described
}

/// Describes exactly the next `bytes` bytes (1 to [`super::MAX_COMMAND_BYTES`]), writing the list page if it takes more than two
/// entries. `None` if PRPs cannot say it; what is in the list page then means nothing.
#[inline]
pub(crate) fn describe(
    segments: &[Segment],
    position: Position,
    bytes: u64,
    list: &[AtomicU64; LIST_WORDS],
    list_iova: u64,
) -> Option<Prps> {
    let mut described = 0;
    let mut prp1 = 0;
    let mut first_listed = 0;
    let mut listed = 0;
    let mut end = 0u64;
    for (address, run) in Runs::new(segments, position, bytes) {
        let mut page = address & !(PAGE_BYTES - 1);
        // Where the run ends, counted from the start of its first page: page numbers cannot overflow then.
        let mut left = run + (address & (PAGE_BYTES - 1));
        if described == 0 {
            if address & 3 != 0 {
                return None;
            }
            prp1 = address;
            left = left.saturating_sub(PAGE_BYTES);
            page = page.wrapping_add(PAGE_BYTES);
        } else if (end | address) & (PAGE_BYTES - 1) != 0 {
            return None;
        }
        while left > 0 {
            // Relaxed: ordered before the controller's read by the barrier in `Doorbell::ring`.
            list.get(listed)?.store(page, Ordering::Relaxed);
            if listed == 0 {
                first_listed = page;
            }
            listed += 1;
            left = left.saturating_sub(PAGE_BYTES);
            page = page.wrapping_add(PAGE_BYTES);
        }
        described += run;
        end = address.wrapping_add(run);
    }
    if described != bytes {
        return None;
    }
    // PRP2 is reserved, the second page, or the list, by how many pages are touched (NVMe Base 2.0, figure 87).
    let prp2 = match listed {
        0 => 0,
        1 => first_listed,
        _ => list_iova,
    };
    Some(Prps { prp1, prp2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: u64 = 0xabc000;

    fn page() -> Box<[AtomicU64; LIST_WORDS]> {
        Box::new([const { AtomicU64::new(0) }; LIST_WORDS])
    }

    fn on(list: &[(u64, u32)], bytes: u64) -> (Option<(u64, u64)>, Vec<u64>) {
        let segments: Vec<_> = list.iter().map(|&(iova, bytes)| Segment { iova, bytes }).collect();
        let page = page();
        let prps = describe(&segments, Position::default(), bytes, &page, LIST).map(|prps| (prps.prp1, prps.prp2));
        (prps, page.iter().map(|entry| entry.load(Ordering::Relaxed)).take_while(|&entry| entry != 0).collect())
    }

    #[test]
    fn one_page_leaves_prp2_zero() {
        assert_eq!(on(&[(0x1000, 4096)], 4096).0, Some((0x1000, 0)));
        assert_eq!(on(&[(0x1e00, 512)], 512).0, Some((0x1e00, 0)));
    }

    #[test]
    fn two_pages_need_no_list() {
        assert_eq!(on(&[(0x1e00, 1024)], 1024).0, Some((0x1e00, 0x2000)));
        assert_eq!(on(&[(0x1000, 4096), (0x8000, 4096)], 8192).0, Some((0x1000, 0x8000)));
    }

    #[test]
    fn more_pages_go_to_the_list() {
        let (prps, list) = on(&[(0x1004, 4092), (0x8000, 8192), (0x4000, 4)], 4092 + 8192 + 4);
        assert_eq!(prps, Some((0x1004, LIST)));
        assert_eq!(list, [0x8000, 0x9000, 0x4000]);
    }

    #[test]
    fn the_longest_command_fills_the_list_exactly() {
        let bytes = u64::from(super::super::MAX_COMMAND_BYTES);
        let (prps, list) = on(&[(0x10_0ffc, bytes as u32)], bytes);
        assert_eq!(prps, Some((0x10_0ffc, LIST)));
        assert_eq!(list.len(), LIST_WORDS);
        assert_eq!(list[LIST_WORDS - 1], 0x10_1000 + 511 * 4096);
        assert_eq!(on(&[(0x10_0ffc, bytes as u32 + 8)], bytes + 8).0, None, "one entry too many");
    }

    #[test]
    fn joints_off_a_page_boundary_and_odd_addresses_are_refused() {
        assert_eq!(on(&[(0x1000, 512), (0x8000, 512)], 1024).0, None);
        assert_eq!(on(&[(0x1000, 4096), (0x8200, 512)], 4608).0, None);
        assert_eq!(on(&[(0x1002, 512)], 512).0, None);
        assert_eq!(on(&[(0x1000, 512)], 1024).0, None, "segments shorter than asked for");
        let joined = [Segment { iova: 0x1000, bytes: 4096 }, Segment { iova: 0x8200, bytes: 512 }];
        assert_eq!(reach(&joined, Position::default(), 4608), 4096);
        assert_eq!(reach(&joined, Position { index: 1, offset: 2 }, 510), 0);
    }

    #[test]
    fn addresses_at_the_end_of_the_address_space_do_not_overflow() {
        assert_eq!(on(&[(u64::MAX - 4095, 4096)], 4096).0, Some((u64::MAX - 4095, 0)));
    }
}
