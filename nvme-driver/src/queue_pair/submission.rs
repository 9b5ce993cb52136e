//! The submission queue: where commands are written (NVMe Base 2.0, 3.3.1).

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Command;

/// A queue entry in the unit in which it is written.
pub(crate) type SubmissionEntry = [AtomicU64; 8];

const _: () = assert!(size_of::<SubmissionEntry>() == 64);

/// The host's side of a submission queue over memory `M` (DMA memory, or plain memory in tests).
///
/// There is no look at the head: a command needs a slot, and there are fewer slots than entries, so whenever a slot is free
/// the controller has consumed the entry at the tail (a command completes only after its entry was fetched).
pub(crate) struct SubmissionQueue<M> {
    entries: M,
    tail: usize,
    /// Commands written since the last announcement: more than there are entries where a drive answers commands that it was not
    /// told of, and so frees their slots. What it then loses is its own doing.
    unannounced: usize,
}

impl<M: Deref<Target = [SubmissionEntry]>> SubmissionQueue<M> {
    /// An empty queue of `entries.len()` entries.
    pub(super) fn new(entries: M) -> SubmissionQueue<M> {
        SubmissionQueue { entries, tail: 0, unannounced: 0 }
    }

    /// Writes one command at the tail. The controller does not know of it until the doorbell is rung.
    #[inline(always)]
    pub(super) fn write(&mut self, command: &Command) {
        let entries: &[SubmissionEntry] = &self.entries;
        let Some(entry) = entries.get(self.tail) else { return };
        for (word, &value) in entry.iter().zip(command.words()) {
            // Relaxed: ordered before the controller's read by the barrier in `Doorbell::ring` (or the Release of the
            // shadow doorbell).
            word.store(value, Ordering::Relaxed);
        }
        self.unannounced += 1;
        let next = self.tail + 1;
        self.tail = if next == entries.len() { 0 } else { next };
    }

    /// How many commands were written since the last announcement.
    #[inline]
    pub(super) fn unannounced(&self) -> usize {
        self.unannounced
    }

    /// How many commands were written since the last call, and the tail to announce.
    #[inline]
    pub(super) fn announce(&mut self) -> (usize, u16) {
        (std::mem::take(&mut self.unannounced), self.tail as u16)
    }

    /// Empties the queue, as after the controller has been reset.
    pub(super) fn reset(&mut self) {
        self.tail = 0;
        self.unannounced = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(entries: usize) -> Vec<SubmissionEntry> {
        (0..entries).map(|_| SubmissionEntry::default()).collect()
    }

    #[test]
    fn commands_are_written_in_order_and_the_tail_wraps() {
        // Five entries: any size works, not only powers of two.
        let mut queue = SubmissionQueue::new(memory(5));
        assert_eq!(queue.announce(), (0, 0));
        for round in 0..4u16 {
            for at in 0..3 {
                queue.write(&Command::flush(1).with_id(round * 3 + at).with_cdw15(7));
            }
            assert_eq!(queue.unannounced(), 3);
            assert_eq!(queue.announce(), (3, (round + 1) * 3 % 5));
            assert_eq!(queue.announce().0, 0);
        }
        // The twelve commands lie at 0, 1, 2, 3, 4, 0, …: what is there is the last one of each place.
        let ids: Vec<u64> = queue.entries.iter().map(|entry| entry[0].load(Ordering::Relaxed) >> 16 & 0xffff).collect();
        assert_eq!(ids, [10, 11, 7, 8, 9]);
        assert_eq!(queue.entries[0][7].load(Ordering::Relaxed), 7 << 32);
    }

    #[test]
    fn more_commands_than_entries_are_counted() {
        // A drive that answers what it was not told of frees slots for them.
        let mut queue = SubmissionQueue::new(memory(4));
        (0..9).for_each(|id| queue.write(&Command::flush(1).with_id(id)));
        assert_eq!(queue.unannounced(), 9);
        assert_eq!(queue.announce(), (9, 1));
    }
}
