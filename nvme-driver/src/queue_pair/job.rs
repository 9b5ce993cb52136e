//! A request as the sequence of commands that carry it out.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::data_pointer::{LIST_WORDS, Position, prp, sgl};
use crate::spec::command::{CDW12_DEAC, CDW12_FUA, io};
use crate::split::{Form, Limits};
use crate::{Command, LbaRange, Namespace, Segment};

/// Most blocks one command can count: NLB is a 16-bit number, zero-based (NVM Command Set 1.0, 3.2).
pub(crate) const MAX_COUNT: u32 = 1 << 16;

/// Most ranges of one Dataset Management command: NR is an 8-bit number, zero-based (NVM Command Set 1.0, 3.2.3).
const MAX_RANGES: u16 = 256;

/// What a request still has to do. Its segments or ranges are kept beside it, so that a request that is issued at once never
/// copies them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    namespace: u32,
    opcode: u8,
    /// CDW12 bits.
    flags: u32,
    progress: Progress,
}

#[derive(Clone, Copy, Debug)]
enum Progress {
    /// Moves data: the next byte's place, its block, and the bytes left.
    Transfer { limits: Limits, position: Position, lba: u64, left: u64 },
    /// One command per stretch of a range (Write Zeroes, Verify).
    Stretches { max_blocks: u32, block_shift: u8, ranges: Ranges },
    /// Many ranges per command (Dataset Management).
    Lists { max_ranges: u16, max_range_blocks: u32, max_blocks: u64, ranges: Ranges },
}

/// A place in a list of ranges.
#[derive(Clone, Copy, Debug, Default)]
struct Ranges {
    index: usize,
    done: u32,
}

impl Ranges {
    /// Takes the next stretch of at most `most` blocks.
    fn take(&mut self, ranges: &[LbaRange], most: u32) -> Option<LbaRange> {
        let range = ranges.get(self.index)?;
        let left = range.blocks - self.done;
        let stretch = LbaRange { lba: range.lba + u64::from(self.done), blocks: left.min(most) };
        if left > most {
            self.done += most;
        } else {
            *self = Ranges { index: self.index + 1, done: 0 };
        }
        Some(stretch)
    }

    /// Takes the ranges of one command, with the limits on their number, on the blocks of each and on all blocks. Returns how
    /// many; `each` gets their index and what they are.
    fn take_list(
        &mut self,
        ranges: &[LbaRange],
        (max_ranges, max_range_blocks, max_blocks): (u16, u32, u64),
        mut each: impl FnMut(usize, LbaRange),
    ) -> u16 {
        let (mut left, mut count) = (max_blocks, 0);
        while count < max_ranges
            && left > 0
            && let Some(stretch) = self.take(ranges, left.min(u64::from(max_range_blocks)) as u32)
        {
            each(usize::from(count), stretch);
            left -= u64::from(stretch.blocks);
            count += 1;
        }
        count
    }
}

impl Job {
    /// Moves `bytes` bytes of segments; the whole of it has been found expressible.
    pub(super) fn transfer(namespace: &Namespace, limits: Limits, opcode: u8, flags: u32, lba: u64, bytes: u64) -> Job {
        let progress = Progress::Transfer { limits, position: Position::default(), lba, left: bytes };
        Job { namespace: namespace.id, opcode, flags, progress }
    }

    pub(super) fn write_zeroes(namespace: &Namespace, deallocate: bool, fua: bool) -> Job {
        // Only where the drive says that it takes the bit, and that the blocks read as zeroes then (DLFEAT).
        let deallocate = deallocate && namespace.write_zeroes_deallocates;
        let flags = if deallocate { CDW12_DEAC } else { 0 } | if fua { CDW12_FUA } else { 0 };
        Job::stretches(namespace, io::WRITE_ZEROES, flags, namespace.max_write_zeroes_blocks)
    }

    pub(super) fn verify(namespace: &Namespace) -> Job {
        Job::stretches(namespace, io::VERIFY, 0, namespace.max_verify_blocks)
    }

    fn stretches(namespace: &Namespace, opcode: u8, flags: u32, max_blocks: u32) -> Job {
        let (max_blocks, block_shift) = (max_blocks.clamp(1, MAX_COUNT), namespace.block_shift);
        let progress = Progress::Stretches { max_blocks, block_shift, ranges: Ranges::default() };
        Job { namespace: namespace.id, opcode, flags, progress }
    }

    pub(super) fn discard(namespace: &Namespace) -> Job {
        let progress = Progress::Lists {
            max_ranges: namespace.max_discard_ranges.clamp(1, MAX_RANGES),
            max_range_blocks: namespace.max_discard_range_blocks.max(1),
            max_blocks: namespace.max_discard_blocks.max(1),
            ranges: Ranges::default(),
        };
        Job { namespace: namespace.id, opcode: io::DATASET_MANAGEMENT, flags: 0, progress }
    }

    /// Does it discard?
    pub(super) fn discards(&self) -> bool {
        matches!(self.progress, Progress::Lists { .. })
    }

    /// Has every command been made?
    pub(super) fn is_done(&self, ranges: &[LbaRange]) -> bool {
        match &self.progress {
            Progress::Transfer { left, .. } => *left == 0,
            Progress::Stretches { ranges: at, .. } | Progress::Lists { ranges: at, .. } => at.index >= ranges.len(),
        }
    }

    /// How many commands it takes, counted to `most`; only for one of ranges.
    pub(super) fn count(&self, ranges: &[LbaRange], most: usize) -> usize {
        let mut rest = *self;
        let mut count = 0;
        while count < most && rest.skip(ranges) {
            count += 1;
        }
        count
    }

    /// Passes over the next command; false if there is none.
    fn skip(&mut self, ranges: &[LbaRange]) -> bool {
        match &mut self.progress {
            Progress::Transfer { .. } => false,
            Progress::Stretches { max_blocks, ranges: at, .. } => at.take(ranges, *max_blocks).is_some(),
            Progress::Lists { max_ranges, max_range_blocks, max_blocks, ranges: at } => {
                let limits = (*max_ranges, *max_range_blocks, *max_blocks);
                at.take_list(ranges, limits, |_, _| ()) > 0
            }
        }
    }

    /// Makes the next command, writing what its data pointer needs into the slot's page, and tells how many bytes it moves or
    /// fills (`None`: it discards). `None` when there is none left.
    pub(super) fn next(
        &mut self,
        segments: &[Segment],
        ranges: &[LbaRange],
        list: &[AtomicU64; LIST_WORDS],
        list_iova: u64,
    ) -> Option<(Command, Option<u64>)> {
        match &mut self.progress {
            Progress::Transfer { limits, position, lba, left } => {
                if *left == 0 {
                    return None;
                }
                let piece = limits.next_piece(segments, *position, *lba, *left)?;
                let blocks = piece.bytes >> limits.block_shift;
                let command = Command::blocks(self.opcode, self.namespace, *lba, blocks as u32, self.flags);
                let command = match piece.form {
                    Form::Prp => {
                        let prps = prp::describe(segments, *position, piece.bytes, list, list_iova)?;
                        command.with_prps(prps.prp1, prps.prp2)
                    }
                    Form::Sgl => command.with_sgl(sgl::describe(segments, *position, piece.bytes, list, list_iova)?),
                };
                *position = position.advanced(segments, piece.bytes);
                *lba += blocks;
                *left -= piece.bytes;
                Some((command, Some(piece.bytes)))
            }
            Progress::Stretches { max_blocks, block_shift, ranges: at } => {
                let LbaRange { lba, blocks } = at.take(ranges, *max_blocks)?;
                let command = Command::blocks(self.opcode, self.namespace, lba, blocks, self.flags);
                Some((command, Some(u64::from(blocks) << *block_shift)))
            }
            Progress::Lists { max_ranges, max_range_blocks, max_blocks, ranges: at } => {
                let limits = (*max_ranges, *max_range_blocks, *max_blocks);
                let count = at.take_list(ranges, limits, |index, stretch| {
                    // At most 256, which the page holds.
                    if let Some([first, second]) = list.get(2 * index..2 * index + 2) {
                        // Context attributes 0, length in blocks, starting LBA (NVM Command Set 1.0, figure 44). Relaxed:
                        // ordered before the controller's read by the doorbell.
                        first.store(u64::from(stretch.blocks) << 32, Ordering::Relaxed);
                        second.store(stretch.lba, Ordering::Relaxed);
                    }
                });
                // The page holds the ranges; at most 4 KiB, page aligned: PRP1 alone.
                (count > 0).then(|| (Command::deallocate(self.namespace, count).with_prps(list_iova, 0), None))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::namespace;

    const LIST: u64 = 0xabc000;

    fn commands(mut job: Job, ranges: &[LbaRange]) -> Vec<(Command, Vec<(u64, u64)>)> {
        let list = [const { AtomicU64::new(0) }; LIST_WORDS];
        let mut all = Vec::new();
        let count = job.count(ranges, usize::MAX);
        while let Some((command, _)) = job.next(&[], ranges, &list, LIST) {
            let words: Vec<_> = list.iter().map(|word| word.load(Ordering::Relaxed)).collect();
            all.push((command, words.chunks(2).map(|pair| (pair[1], pair[0] >> 32)).collect()));
        }
        assert!(job.is_done(ranges));
        assert_eq!(all.len(), count);
        all
    }

    #[test]
    fn discards_fill_commands_up_to_each_limit() {
        let mut drive = namespace(9, 1 << 40);
        let ranges: Vec<_> = (0..300).map(|at| LbaRange { lba: at * 1000, blocks: 10 }).collect();
        let all = commands(Job::discard(&drive), &ranges);
        assert_eq!(all.iter().map(|(command, _)| command.dword(10) + 1).collect::<Vec<_>>(), [256, 44]);
        assert_eq!(all[1].1[43], (299_000, 10));
        assert!(all.iter().all(|(command, _)| command.dword(11) == 4 && command.words()[3..5] == [LIST, 0]));

        drive.max_discard_ranges = 2;
        drive.max_discard_range_blocks = 6;
        drive.max_discard_blocks = 9;
        let ranges = [LbaRange { lba: 100, blocks: 10 }, LbaRange { lba: 500, blocks: 3 }];
        let all = commands(Job::discard(&drive), &ranges);
        let seen: Vec<Vec<(u64, u64)>> =
            all.into_iter().map(|(command, list)| list[..command.dword(10) as usize + 1].to_vec()).collect();
        assert_eq!(seen, [vec![(100, 6), (106, 3)], vec![(109, 1), (500, 3)]]);
    }

    #[test]
    fn write_zeroes_is_cut_at_what_a_command_can_count() {
        let drive = namespace(12, 1 << 40);
        let ranges = [LbaRange { lba: 5, blocks: 3 * 65536 + 1 }, LbaRange { lba: 0, blocks: 1 }];
        let all = commands(Job::write_zeroes(&drive, true, true), &ranges);
        let seen: Vec<_> = all.iter().map(|(command, _)| (command.words()[5], command.dword(12))).collect();
        let flags = CDW12_DEAC | CDW12_FUA;
        assert_eq!(
            seen,
            [(5, 0xffff | flags), (65541, 0xffff | flags), (131077, 0xffff | flags), (196613, flags), (0, flags)]
        );
        // A drive that does not take the bit is not sent it, whatever the request would allow.
        let careful = Namespace { write_zeroes_deallocates: false, ..drive.clone() };
        assert!(
            commands(Job::write_zeroes(&careful, true, false), &ranges)
                .iter()
                .all(|(command, _)| { command.dword(12) & CDW12_DEAC == 0 })
        );
        assert_eq!(commands(Job::verify(&drive), &ranges[1..])[0].0, Command::blocks(io::VERIFY, 1, 0, 1, 0));
    }
}
