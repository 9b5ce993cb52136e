//! Submission and completion queues (NVMe Base 2.0, 3.3.1).

use crate::command::{CQE_BYTES, Completion, SQE_BYTES};
use crate::dma::{DmaFault, DmaView};

/// A submission queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SubmissionQueue {
    pub base: u64,
    pub size: u32,
    /// The next entry to fetch.
    pub head: u32,
    /// The tail the host last told.
    pub tail: u32,
    pub cq: u16,
    /// An invalid tail that was reported already.
    pub refused_tail: Option<u32>,
}

impl SubmissionQueue {
    pub(crate) fn new(base: u64, size: u32, cq: u16) -> SubmissionQueue {
        SubmissionQueue { base, size, head: 0, tail: 0, cq, refused_tail: None }
    }

    /// Entries the host has submitted and the controller has not fetched.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.tail + self.size - self.head }
    }

    /// The address of the next entry; the head moves past it.
    #[inline]
    pub(crate) fn take(&mut self) -> u64 {
        let at = self.base + u64::from(self.head) * SQE_BYTES;
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
        }
        at
    }
}

/// A completion queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CompletionQueue {
    base: u64,
    pub size: u32,
    /// The next entry to write.
    tail: u32,
    /// The head the host last told.
    pub head: u32,
    pub phase: bool,
    /// MSI-X vector, if interrupts are enabled.
    pub vector: Option<u16>,
    /// Entries were posted since the last interrupt.
    pub signal: bool,
    /// Submission queues that complete here.
    pub users: u32,
    /// An invalid head that was reported already.
    pub refused_head: Option<u32>,
}

impl CompletionQueue {
    pub(crate) fn new(base: u64, size: u32, vector: Option<u16>) -> CompletionQueue {
        CompletionQueue {
            base,
            size,
            tail: 0,
            head: 0,
            phase: true,
            vector,
            signal: false,
            users: 0,
            refused_head: None,
        }
    }

    /// Entries the host has not taken yet.
    #[inline]
    pub(crate) fn unread(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.tail + self.size - self.head }
    }

    /// Entries that may be posted. One entry stays empty, or full and empty would look the same (3.3.1.2).
    #[inline]
    pub(crate) fn room(&self) -> u32 {
        self.size - 1 - self.unread()
    }

    /// Takes the host's new head; false if it is no entry between the old head and the tail.
    pub(crate) fn advance(&mut self, head: u32) -> bool {
        let distance = if head >= self.head { head - self.head } else { head + self.size - self.head };
        let valid = head < self.size && distance <= self.unread();
        if valid {
            self.head = head;
        }
        valid
    }

    /// The address of the entry that is posted next.
    pub(crate) fn next_entry(&self) -> u64 {
        self.base + u64::from(self.tail) * CQE_BYTES
    }

    /// Posts a completion. The caller has made sure that there is room.
    #[inline]
    pub(crate) fn post(&mut self, view: &DmaView, completion: &Completion, sq_head: u32) -> Result<(), DmaFault> {
        view.post(self.next_entry(), completion.encode(sq_head as u16, self.phase))?;
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        self.signal = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{DmaTable, SharedBytes};
    use crate::status::Status;
    use std::sync::Arc;

    #[test]
    fn a_completion_queue_fills_wraps_and_turns_its_phase() {
        let (file, memory) = SharedBytes::memory_file(c"queue-test", 4096).unwrap();
        let table = Arc::new(DmaTable::new(None));
        table.map(&file, 0, 0x1000, 4096, true, true).unwrap();
        let view = DmaView::new(table);
        let mut queue = CompletionQueue::new(0x1000, 3, None);
        let mut posted = 0;
        let mut phases = vec![];
        while phases.len() < 12 {
            while queue.room() > 0 {
                let completion = Completion { result: 0, sq: 1, id: posted, status: Status::SUCCESS };
                queue.post(&view, &completion, 5).unwrap();
                posted += 1;
            }
            assert_eq!(queue.unread(), 2);
            let mut entry = [0; 16];
            memory.read(queue.head as usize * 16, &mut entry).unwrap();
            assert_eq!(u16::from_le_bytes([entry[12], entry[13]]), phases.len() as u16);
            phases.push(entry[14] & 1);
            assert!(!queue.advance(3) && !queue.advance(u32::MAX), "no such entry");
            assert!(queue.advance((queue.head + 1) % 3));
        }
        assert_eq!(phases, [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]);
        let beyond = (queue.head + 2) % 3;
        assert!(!queue.advance(beyond), "past the tail");
    }

    #[test]
    fn a_submission_queue_wraps() {
        let mut queue = SubmissionQueue::new(0x1000, 4, 0);
        queue.tail = 3;
        assert_eq!(queue.pending(), 3);
        let taken: Vec<u64> = (0..3).map(|_| queue.take()).collect();
        assert_eq!(taken, [0x1000, 0x1040, 0x1080]);
        queue.tail = 1;
        assert_eq!(queue.pending(), 2);
        assert_eq!((queue.take(), queue.take()), (0x10c0, 0x1000));
        assert_eq!(queue.pending(), 0);
    }
}
