//! Handing out ranges of numbers: DMA addresses of a device, and pieces of a chunk of memory.

use std::collections::BTreeMap;

/// A range of DMA addresses (I/O virtual addresses), both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub last: u64,
}

/// Free ranges; the lowest that fits is taken, from `floor` on if there is one.
pub(crate) struct RangeAllocator {
    /// Start → last (included). Free ranges neither overlap nor touch.
    free: BTreeMap<u64, u64>,
    floor: u64,
    /// The highest address that was ever taken.
    highest: u64,
}

impl RangeAllocator {
    /// Everything in `ranges` is free. Ranges may overlap or touch.
    pub(crate) fn new(ranges: &[IovaRange]) -> RangeAllocator {
        let mut sorted: Vec<_> = ranges.iter().filter(|range| range.start <= range.last).collect();
        sorted.sort_by_key(|range| range.start);
        let mut free: BTreeMap<u64, u64> = BTreeMap::new();
        for range in sorted {
            match free.last_entry() {
                Some(mut before) if range.start <= before.get().saturating_add(1) => {
                    let last = range.last.max(*before.get());
                    before.insert(last);
                }
                _ => _ = free.insert(range.start, range.last),
            }
        }
        RangeAllocator { free, floor: 0, highest: 0 }
    }

    /// Takes `length` addresses that begin at `residue` modulo `modulus` (a power of two); `None` if none are free.
    pub(crate) fn allocate(&mut self, length: u64, modulus: u64, residue: u64) -> Option<u64> {
        self.allocate_below(u64::MAX, length, modulus, residue)
    }

    /// Takes `length` addresses, none of them above `most`, that begin at `residue` modulo `modulus` (a power of two); `None`
    /// if none are free.
    pub(crate) fn allocate_below(&mut self, most: u64, length: u64, modulus: u64, residue: u64) -> Option<u64> {
        debug_assert!(modulus.is_power_of_two() && length > 0);
        let residue = residue & (modulus - 1);
        let above = |floor: u64| {
            self.free.iter().find_map(|(&start, &last)| {
                let from = start.max(floor);
                // The lowest number from there on that is congruent to `residue`.
                let taken = from.checked_add(residue.wrapping_sub(from) & (modulus - 1))?;
                let taken_last = taken.checked_add(length - 1)?;
                (taken_last <= last.min(most)).then_some((start, last, taken))
            })
        };
        let (start, last, taken) = above(self.floor).or_else(|| above(0))?;
        self.highest = self.highest.max(taken + (length - 1));
        self.free.remove(&start);
        if start < taken {
            self.free.insert(start, taken - 1);
        }
        if taken + (length - 1) < last {
            self.free.insert(taken + length, last);
        }
        Some(taken)
    }

    /// The highest address that was ever taken.
    pub(crate) fn highest(&self) -> u64 {
        self.highest
    }

    /// From now on addresses below `floor` are taken only when there are no others.
    pub(crate) fn set_floor(&mut self, floor: u64) {
        self.floor = floor;
    }

    /// Gives back what [`RangeAllocator::allocate`] returned.
    pub(crate) fn free(&mut self, start: u64, length: u64) {
        let mut merged = (start, start + (length - 1));
        if let Some((&before, &before_last)) = self.free.range(..start).next_back() {
            debug_assert!(before_last < start, "freed twice");
            if before_last + 1 == start {
                self.free.remove(&before);
                merged.0 = before;
            }
        }
        if let Some(next) = merged.1.checked_add(1)
            && let Some(after_last) = self.free.remove(&next)
        {
            merged.1 = after_last;
        }
        self.free.insert(merged.0, merged.1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB_2: u64 = 2 << 20;

    fn free_ranges(allocator: &RangeAllocator) -> Vec<(u64, u64)> {
        allocator.free.iter().map(|(&start, &last)| (start, last)).collect()
    }

    #[test]
    fn the_whole_address_space_can_be_taken_piece_by_piece() {
        let mut allocator = RangeAllocator::new(&[IovaRange { start: 0x1000, last: u64::MAX }]);
        let first = allocator.allocate(0x1000, 4096, 0).unwrap();
        let rest = allocator.allocate(u64::MAX - 0x2000 + 1, 4096, 0).unwrap();
        assert_eq!((first, rest), (0x1000, 0x2000));
        assert_eq!(allocator.allocate(1, 1, 0), None);
        allocator.free(rest, u64::MAX - 0x2000 + 1);
        allocator.free(first, 0x1000);
        assert_eq!(free_ranges(&allocator), [(0x1000, u64::MAX)]);
    }

    #[test]
    fn what_is_kept_back_is_taken_by_nobody_else() {
        let mut allocator = RangeAllocator::new(&[IovaRange { start: 0, last: 0xffff }]);
        assert_eq!(allocator.allocate_below(0x7fff, 0x9000, 4096, 0), None);
        assert_eq!(allocator.allocate_below(0x7fff, 0x8000, 4096, 0), Some(0));
        assert_eq!(allocator.allocate_below(0x7fff, 0x1000, 4096, 0), None);
        assert_eq!(allocator.allocate(0x8000, 4096, 0), Some(0x8000));
    }

    #[test]
    fn nothing_below_the_floor_is_taken_while_there_is_more() {
        let mut allocator = RangeAllocator::new(&[IovaRange { start: 0x1000, last: 0x7fff }]);
        assert_eq!(allocator.allocate(0x2000, 4096, 0), Some(0x1000));
        allocator.free(0x1000, 0x2000);
        assert_eq!(allocator.highest(), 0x2fff);
        allocator.set_floor(allocator.highest() + 1);
        assert_eq!(allocator.allocate(0x2000, 4096, 0), Some(0x3000));
        assert_eq!(free_ranges(&allocator), [(0x1000, 0x2fff), (0x5000, 0x7fff)]);
        assert_eq!(allocator.allocate(0x3000, 4096, 0), Some(0x5000));
        assert_eq!(allocator.allocate(0x1000, 4096, 0), Some(0x1000), "there are no others");
        allocator.free(0x3000, 0x2000);
        allocator.free(0x1000, 0x1000);
        allocator.free(0x5000, 0x3000);
        assert_eq!(free_ranges(&allocator), [(0x1000, 0x7fff)]);
    }

    #[test]
    fn overlapping_and_touching_ranges_are_one() {
        let ranges = [(0x5000, 0x5fff), (0x1000, 0x2fff), (0x2000, 0x3fff), (0x4000, 0x4fff), (9, 3)];
        let ranges: Vec<_> = ranges.iter().map(|&(start, last)| IovaRange { start, last }).collect();
        assert_eq!(free_ranges(&RangeAllocator::new(&ranges)), [(0x1000, 0x5fff)]);
    }

    #[test]
    fn a_hole_between_ranges_is_never_given_out() {
        let ranges = [IovaRange { start: 0, last: 0xfedf_ffff }, IovaRange { start: 0xfef0_0000, last: (1 << 39) - 1 }];
        let mut allocator = RangeAllocator::new(&ranges);
        let taken = allocator.allocate(0xfee0_0000, MIB_2, 0).unwrap();
        assert_eq!(taken, 0);
        assert_eq!(allocator.allocate(0x1000, MIB_2, 0x1000).unwrap(), 0xff00_1000);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take { pages: u64, residue: u64 },
        Free { which: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (1u64..600, 0u64..512).prop_map(|(pages, residue)| Step::Take { pages, residue: residue * 4096 }),
            2 => any::<usize>().prop_map(|which| Step::Free { which }),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        #[test]
        fn what_is_taken_is_free_congruent_and_inside(steps in steps()) {
            let ranges = [
                IovaRange { start: 0x10_0000, last: 0x40f_ffff },
                IovaRange { start: 0x500_0000, last: 0x8ff_ffff },
            ];
            let mut allocator = RangeAllocator::new(&ranges);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Take { pages, residue } => {
                        let length = pages * 4096;
                        let Some(start) = allocator.allocate(length, MIB_2, residue) else { continue };
                        let last = start + length - 1;
                        prop_assert_eq!(start % MIB_2, residue);
                        prop_assert!(ranges.iter().any(|range| range.start <= start && last <= range.last));
                        prop_assert!(taken.iter().all(|&(other, bytes)| last < other || start > other + bytes - 1));
                        taken.push((start, length));
                    }
                    Step::Free { which } if !taken.is_empty() => {
                        let (start, length) = taken.swap_remove(which % taken.len());
                        allocator.free(start, length);
                        // What was given back can be had again, at the same place unless a lower one is free.
                        let again = allocator.allocate(length, MIB_2, start);
                        prop_assert!(again.is_some_and(|again| again <= start));
                        allocator.free(again.unwrap(), length);
                    }
                    Step::Free { .. } => {}
                }
            }
            for (start, length) in taken {
                allocator.free(start, length);
            }
            let all: Vec<_> = ranges.iter().map(|range| (range.start, range.last)).collect();
            prop_assert_eq!(free_ranges(&allocator), all);
        }
    }
}
