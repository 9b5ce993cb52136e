//! Commands that outlive the queue they came from: the fault of a controller that breaks the rule that a reset ends everything.

use std::time::Instant;

use super::Controller;
use crate::command::{Command, Completion};
use crate::shared::Counters;
use crate::status::Status;

/// A command whose queue has ended.
pub(super) struct Stray {
    pub due: Instant,
    command: Command,
    sq: u16,
    sq_head: u16,
    /// Where its completion would have been posted, and with which phase.
    entry: (u64, bool),
}

impl Controller {
    /// Before all queues end: keeps the held commands that outlive them.
    pub(super) fn let_stray(&mut self) {
        for held in self.held.drain(..).filter(|held| held.decision.stray && held.sq != 0) {
            let Some(sq) = &self.sqs[usize::from(held.sq)] else { continue };
            let Some(cq) = &self.cqs[usize::from(sq.cq)] else { continue };
            self.strays.push(Stray {
                due: held.due,
                command: held.command,
                sq: held.sq,
                sq_head: sq.head as u16,
                entry: (cq.next_entry(), cq.phase),
            });
        }
    }

    /// Carries out the strays that are due, in whatever state the controller is; whether there were any.
    pub(super) fn release_strays(&mut self) -> bool {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.strays).into_iter().partition(|stray| stray.due <= now);
        self.strays = later;
        let due: Vec<Stray> = due;
        for Stray { command, sq, sq_head, entry: (at, phase), .. } in &due {
            self.view.refresh();
            let result = crate::io::execute(self, command);
            let status = result.err().unwrap_or(Status::SUCCESS);
            let completion = Completion { result: 0, sq: *sq, id: command.id(), status };
            let posted = self.view.post(*at, completion.encode(*sq_head, *phase));
            log::info!(
                "fault: {} long after the end of its queue: {result:?}, {posted:?}",
                self.describe(*sq, command)
            );
            let refused = u64::from(result.is_err()) + u64::from(posted.is_err());
            Counters::add(&self.shared.counters.strays_refused, refused);
            Counters::add(&self.shared.counters.strays, 1);
        }
        !due.is_empty()
    }
}
