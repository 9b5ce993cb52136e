//! The completion queue: where the controller answers (NVMe Base 2.0, 3.3.1).

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Completion;

/// A queue entry in the unit in which it is read.
pub(crate) type CompletionEntry = [AtomicU64; 2];

const _: () = assert!(size_of::<CompletionEntry>() == 16);

/// The host's side of a completion queue over memory `M` (DMA memory, or plain memory in tests).
///
/// It cannot overflow: it has as many entries as the submission queue, more than there are slots.
pub(crate) struct CompletionQueue<M> {
    entries: M,
    head: u16,
    /// The phase tag of entries not seen yet, at bit 48 of the second word as it lies in the entry. The controller inverts
    /// it on each pass; the first pass writes ones over the zeroed memory.
    phase: u64,
}

const PHASE: u64 = 1 << 48;

impl<M: Deref<Target = [CompletionEntry]>> CompletionQueue<M> {
    /// An empty queue over zeroed memory.
    pub(super) fn new(entries: M) -> CompletionQueue<M> {
        CompletionQueue { entries, head: 0, phase: PHASE }
    }

    /// Takes every completion the controller has written, one pass over the queue at most: a controller that writes without
    /// end must not keep the thread here. Returns how many there were.
    #[inline(always)]
    pub(super) fn take_all(&mut self, mut each: impl FnMut(Completion)) -> usize {
        if !self.ready() {
            return 0;
        }
        // In registers for the length of the loop.
        let entries: &[CompletionEntry] = &self.entries;
        let start = usize::from(self.head);
        let (mut from, mut to) = (start, entries.len());
        let mut taken = 0;
        loop {
            let before = from;
            for entry in entries.get(from..to).unwrap_or_default() {
                // Acquire: pairs with the controller's write of the phase tag, which comes after the rest of the entry and
                // after the data. One 64-bit load takes the tag together with everything else in the second half.
                let word = entry[1].load(Ordering::Acquire);
                if (word ^ self.phase) & PHASE != 0 {
                    break;
                }
                from += 1;
                each(Completion::from_words([entry[0].load(Ordering::Relaxed), word]));
            }
            taken += from - before;
            if from != entries.len() {
                break;
            }
            // The end of the queue: the next pass has the other phase, and ends where this one began.
            self.phase ^= PHASE;
            (from, to) = (0, start);
        }
        self.head = from as u16;
        taken
    }

    /// Is there a completion to take?
    #[inline]
    pub(super) fn ready(&self) -> bool {
        // Acquire: as in `take_all`; whoever asks may go on to look at other memory.
        let word = self.entries.get(usize::from(self.head)).map(|entry| entry[1].load(Ordering::Acquire));
        word.is_some_and(|word| (word ^ self.phase) & PHASE == 0)
    }

    /// How many completions are there to take.
    pub(super) fn answered(&self) -> usize {
        let (passed, coming) = self.entries.split_at(usize::from(self.head));
        // Acquire: as in `ready`. Beyond the end of the queue the next pass begins, with the other phase.
        let new = |entry: &CompletionEntry, phase| (entry[1].load(Ordering::Acquire) ^ phase) & PHASE == 0;
        let before_end = coming.iter().take_while(|entry| new(entry, self.phase)).count();
        if before_end < coming.len() {
            return before_end;
        }
        before_end + passed.iter().take_while(|entry| new(entry, self.phase ^ PHASE)).count()
    }

    /// The head to announce: entries before it may be written again.
    #[inline]
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Empties the queue and zeroes it, as after the controller has been reset: it must not be writing any more.
    pub(super) fn reset(&mut self) {
        for word in self.entries.iter().flatten() {
            // Relaxed: ordered before the controller's use by the doorbell that announces the command creating the queue.
            word.store(0, Ordering::Relaxed);
        }
        self.head = 0;
        self.phase = PHASE;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// The controller's side: writes entries with the phase of its pass.
    struct ControllerSide {
        entries: Arc<[CompletionEntry]>,
        written: usize,
    }

    impl ControllerSide {
        fn complete(&mut self, id: u16, result: u32) {
            let entry = &self.entries[self.written % self.entries.len()];
            let phase = u64::from((self.written / self.entries.len()).is_multiple_of(2));
            entry[0].store(result.into(), Ordering::Relaxed);
            // Release: pairs with the Acquire of the phase tag in `take_all`.
            entry[1].store(u64::from(id) << 32 | phase << 48, Ordering::Release);
            self.written += 1;
        }
    }

    /// All there are, in order.
    fn take_all(queue: &mut CompletionQueue<Arc<[CompletionEntry]>>) -> Vec<Completion> {
        let mut all = Vec::new();
        assert_eq!(queue.take_all(|completion| all.push(completion)), all.len());
        all
    }

    fn pair(entries: usize) -> (ControllerSide, CompletionQueue<Arc<[CompletionEntry]>>) {
        let entries: Arc<[CompletionEntry]> = (0..entries).map(|_| CompletionEntry::default()).collect();
        (ControllerSide { entries: entries.clone(), written: 0 }, CompletionQueue::new(entries))
    }

    #[test]
    fn phases_tell_new_entries_over_many_passes() {
        let (mut controller, mut queue) = pair(5);
        assert!(take_all(&mut queue).is_empty());
        let mut next = 0u16;
        for round in 0..50 {
            let batch = round % 5;
            for at in 0..batch {
                controller.complete(next + at, (next + at) as u32 + 1000);
            }
            assert_eq!(queue.ready(), batch > 0);
            assert_eq!(queue.answered(), usize::from(batch));
            let taken = take_all(&mut queue);
            assert_eq!(taken.len(), usize::from(batch));
            for completion in taken {
                assert_eq!((completion.id(), completion.result()), (next, next as u32 + 1000));
                next += 1;
            }
            assert!(take_all(&mut queue).is_empty());
            assert!(!queue.ready());
            assert_eq!(queue.head(), next % 5);
        }
    }

    #[test]
    fn another_thread_sees_the_whole_entry_once_the_phase_has_changed() {
        let (mut controller, mut queue) = pair(64);
        const COUNT: u32 = 20_000;
        let taken = Arc::new(AtomicU64::new(0));
        let seen = taken.clone();
        let writer = std::thread::spawn(move || {
            for at in 0..COUNT {
                // Acquire: pairs with the Release below; an entry is not written over before it was taken.
                while u64::from(at) >= seen.load(Ordering::Acquire) + 64 {
                    std::thread::yield_now();
                }
                controller.complete(at as u16, at);
            }
        });
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut at = 0;
        while at < COUNT {
            assert!(std::time::Instant::now() < deadline, "stopped at {at}");
            let some = queue.take_all(|completion| {
                assert_eq!((completion.id(), completion.result()), (at as u16, at));
                at += 1;
            });
            taken.store(at.into(), Ordering::Release);
            if some == 0 {
                std::thread::yield_now();
            }
        }
        writer.join().unwrap();
    }

    #[test]
    fn a_reset_queue_begins_again_with_phase_one() {
        let (mut controller, mut queue) = pair(2);
        for id in 0..3 {
            controller.complete(id, 0);
            assert_eq!(take_all(&mut queue)[0].id(), id);
        }
        queue.reset();
        controller.written = 0;
        assert!(take_all(&mut queue).is_empty());
        controller.complete(9, 0);
        assert_eq!(take_all(&mut queue)[0].id(), 9);
    }
}
