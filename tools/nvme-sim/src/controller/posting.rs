//! Completions on their way to the host, those that are held back, and interrupts.

use std::time::Instant;

use super::Controller;
use crate::command::Completion;
use crate::shared::Counters;
use crate::status::Status;

impl Controller {
    /// Posts a completion, or keeps it until its queue has room.
    #[inline]
    pub(crate) fn post(&mut self, completion: Completion) {
        let Some(sq) = &self.sqs[usize::from(completion.sq)] else { return };
        let (head, cq) = (sq.head, sq.cq);
        if self.room(cq, 1) == 0 {
            self.late.push_back(completion);
            return;
        }
        let Some(queue) = &mut self.cqs[usize::from(cq)] else { return };
        if let Err(fault) = queue.post(&self.view, &completion, head) {
            self.fail_dma("posting a completion", fault);
        }
    }

    /// Interrupts once for what was posted to a queue.
    #[inline]
    pub(crate) fn signal(&mut self, id: u16) {
        if let Some(cq) = &mut self.cqs[usize::from(id)]
            && std::mem::take(&mut cq.signal)
            && let Some(vector) = cq.vector
            && self.signals.send(vector)
        {
            Counters::add(&self.shared.counters.interrupts, 1);
        }
    }

    pub(super) fn signal_all(&mut self) {
        for id in 0..self.cqs.len() as u16 {
            self.signal(id);
        }
    }

    pub(super) fn post_late(&mut self) -> bool {
        let waiting = std::mem::take(&mut self.late);
        let count = waiting.len();
        for completion in waiting {
            self.post(completion);
        }
        self.signal_all();
        self.late.len() < count
    }

    /// Carries out the held commands that are due.
    pub(super) fn release_held(&mut self, now: Instant) -> bool {
        let mut worked = false;
        let mut n = 0;
        while n < self.held.len() {
            if self.held[n].due > now {
                n += 1;
                continue;
            }
            let held = self.held.swap_remove(n);
            if let Some(completion) = self.execute_with(held.sq, &held.command, &held.decision) {
                self.post(completion);
            }
            worked = true;
        }
        if worked {
            self.signal_all();
        }
        worked
    }

    /// Ends held commands of a queue (or one of them) with `status`; how many there were.
    pub(crate) fn end_held(&mut self, sq: u16, id: Option<u16>, status: Status) -> usize {
        let mut ended = 0;
        let mut n = 0;
        while n < self.held.len() {
            let held = &self.held[n];
            if held.sq != sq || id.is_some_and(|id| id != held.command.id()) {
                n += 1;
                continue;
            }
            let held = self.held.swap_remove(n);
            self.post(Completion { result: 0, sq, id: held.command.id(), status });
            ended += 1;
        }
        if ended > 0 {
            self.signal_all();
        }
        ended
    }

    /// Forgets completions of a queue that is deleted.
    pub(crate) fn drop_late(&mut self, sq: u16) {
        self.late.retain(|completion| completion.sq != sq);
    }
}
