//! What the data thread does when there is nothing to do.

use std::time::{Duration, Instant};

use super::Controller;
use crate::shared::Counters;

/// How long an idle controller yields before it naps.
const YIELD_TIME: Duration = Duration::from_millis(2);
const SHORTEST_NAP: Duration = Duration::from_micros(20);
const LONGEST_NAP: Duration = Duration::from_millis(1);
/// Looks for work without a pause, before yielding.
const SPINS: u32 = 20;

/// How the idle data thread passes its time.
pub(super) struct Idle {
    looks: u32,
    since: Option<Instant>,
    nap: Duration,
}

impl Idle {
    pub(super) fn new() -> Idle {
        Idle { looks: 0, since: None, nap: SHORTEST_NAP }
    }

    #[inline]
    pub(super) fn reset(&mut self) {
        self.looks = 0;
        self.since = None;
        self.nap = SHORTEST_NAP;
    }

    pub(super) fn pause(&mut self, controller: &mut Controller) {
        self.looks += 1;
        if self.looks < SPINS {
            std::hint::spin_loop();
            return;
        }
        let now = Instant::now();
        if now.duration_since(*self.since.get_or_insert(now)) < YIELD_TIME {
            std::thread::yield_now();
            return;
        }
        controller.before_nap();
        if controller.shadow.is_some() && controller.poll() {
            self.reset();
            return;
        }
        let due =
            controller.held.iter().map(|held| held.due).chain(controller.strays.iter().map(|stray| stray.due)).min();
        Counters::add(&controller.shared.counters.naps, 1);
        std::thread::park_timeout(due.map_or(self.nap, |due| self.nap.min(due.saturating_duration_since(now))));
        self.nap = (self.nap * 2).min(LONGEST_NAP);
    }
}
