//! Which request makes a controller fail, when several were with it: the last try of each is made alone.
//!
//! A request that was with the controller in five of its failures is answered with an error: it may well be their reason. But other
//! requests were beside it each time, since all are issued again at the same moment. So a request that is not certainly the reason
//! has its last try while nothing else is with the drive: after the drive is attached again, before anybody else is served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The requests that a controller had of one queue pair when it was stopped.
#[derive(Clone, Copy, Debug)]
pub struct Outstanding {
    /// How many there were.
    pub requests: usize,
    /// How many of them the controller had not answered in time.
    pub expired: usize,
    /// When the controller was last seen to answer a request of this queue pair, roughly; `None`: never.
    pub last_answer: Option<Instant>,
}

/// What a failure of the controller says of the requests that it had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// Nothing: it did not fail, but was taken away.
    Nobody,
    /// Each one that was not answered in time is to blame, for others were answered meanwhile.
    Expired,
    /// There was only one.
    Only,
    /// Each may be the reason.
    Any,
}

impl Suspicion {
    /// Judges by what the controller had at `now`, when it was about to be stopped because it had failed. `timeout`: how long a command
    /// may take.
    pub fn of(outstanding: &[Outstanding], now: Instant, timeout: Duration) -> Suspicion {
        let expired: usize = outstanding.iter().map(|outstanding| outstanding.expired).sum();
        let in_flight: usize = outstanding.iter().map(|outstanding| outstanding.requests).sum();
        // What has expired was out for longer than the timeout: it was there long before this answer.
        let answering = |at: Instant| now.saturating_duration_since(at) < timeout / 2;
        let alive = outstanding.iter().filter_map(|outstanding| outstanding.last_answer).any(answering);
        match (expired, in_flight) {
            (1.., _) if alive => Suspicion::Expired,
            (_, 1) => Suspicion::Only,
            _ => Suspicion::Any,
        }
    }
}

/// The poll groups of a drive take turns to try their requests alone; until all have, none does anything else. Nobody waits for
/// another: each looks in its own turns.
#[derive(Debug, Default)]
pub struct Trial {
    /// A poll group has the drive for itself.
    busy: AtomicBool,
    /// Poll groups that have not had it yet.
    left: AtomicUsize,
}

impl Trial {
    /// A seat for a poll group that may have requests to try. All seats are to be there before the first is used.
    pub fn seat(self: &Arc<Self>) -> Seat {
        // Relaxed: the seat is handed over by a lock.
        self.left.fetch_add(1, Ordering::Relaxed);
        Seat { trial: self.clone(), has_drive: false, done: false }
    }

    /// A seat for a poll group that has none, and waits for the end.
    pub fn onlooker(self: &Arc<Self>) -> Seat {
        Seat { trial: self.clone(), has_drive: false, done: true }
    }

    /// Every poll group is done.
    pub fn is_over(&self) -> bool {
        // Acquire: pairs with the Release in `Seat::finish`.
        self.left.load(Ordering::Acquire) == 0
    }
}

/// The seat of a poll group in a [`Trial`]; given up when dropped.
#[derive(Debug)]
pub struct Seat {
    trial: Arc<Trial>,
    has_drive: bool,
    done: bool,
}

impl Seat {
    /// Has the group the drive for itself now? It may be asked any number of times.
    pub(super) fn has_drive(&mut self) -> bool {
        if !self.done && !self.has_drive {
            // Acquire and Release: what another group's request has done happened before this one's.
            let free = self.trial.busy.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed);
            self.has_drive = free.is_ok();
        }
        self.has_drive
    }

    /// Nothing of this group is with the drive, or is to be tried alone.
    pub(super) fn finish(&mut self) {
        if std::mem::take(&mut self.has_drive) {
            // Release: pairs with the Acquire of the next group's `has_drive`.
            self.trial.busy.store(false, Ordering::Release);
        }
        if !std::mem::replace(&mut self.done, true) {
            // Release: pairs with the Acquire in `is_over`.
            self.trial.left.fetch_sub(1, Ordering::Release);
        }
    }

    /// May everybody be served again?
    pub(super) fn is_over(&self) -> bool {
        self.trial.is_over()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_group_after_the_other_has_the_drive() {
        let trial = Arc::new(Trial::default());
        let [mut first, mut second, third] = [trial.seat(), trial.seat(), trial.seat()];
        let mut onlooker = trial.onlooker();
        assert!(second.has_drive() && !first.has_drive() && second.has_drive() && !onlooker.has_drive());
        second.finish();
        assert!(first.has_drive() && !second.has_drive() && !second.is_over());
        // A group that goes is not waited for.
        drop(third);
        assert!(!trial.is_over());
        drop(first);
        assert!(onlooker.is_over());
    }
}
