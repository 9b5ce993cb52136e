//! Commands that come after the host has told the controller to shut down.

use super::Controller;
use crate::shared::Counters;

impl Controller {
    /// CC.SHN was set: what the host submits from now on is counted (NVMe Base 2.0, 3.6.1: it has to submit nothing any more).
    pub(super) fn note_shutdown(&mut self) {
        self.view.refresh();
        let tails = |id: u16| self.sqs[usize::from(id)].map_or(0, |sq| self.submission_tail(id).unwrap_or(sq.tail));
        self.after_shutdown = Some((0..self.sqs.len() as u16).map(tails).collect());
    }

    /// Counts what was submitted since the last look; whether there was any.
    pub(super) fn count_after_shutdown(&mut self) -> bool {
        let Some(mut tails) = self.after_shutdown.take() else { return false };
        let mut count = 0;
        for &id in &self.live {
            let Some(sq) = self.sqs[usize::from(id)] else { continue };
            let Ok(tail) = self.submission_tail(id) else { continue };
            let before = std::mem::replace(&mut tails[usize::from(id)], tail);
            if tail != before && tail < sq.size {
                let submitted = (tail + sq.size - before) % sq.size;
                log::warn!("queue {id}: {submitted} commands submitted after CC.SHN was set (NVMe Base 2.0, 3.6.1)");
                count += u64::from(submitted);
            }
        }
        self.after_shutdown = Some(tails);
        Counters::add(&self.shared.counters.commands_after_shutdown, count);
        count > 0
    }
}
