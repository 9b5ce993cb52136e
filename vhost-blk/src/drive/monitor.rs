//! The monitor: a drive's thread that asks the controller for its health and events, deals out queue pairs, and gives back those that
//! no ring uses. Each of its commands may take as long as commands may; reattaching (`supervisor`) never waits for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Condition, Drive};

/// Time between two looks at what a drive reports.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Time between two looks at lanes that move to another queue pair.
const DEAL_PAUSE: Duration = Duration::from_millis(5);

pub(super) fn run(drive: &Drive, stop: &AtomicBool) {
    let mut next_check = Instant::now() + CHECK_INTERVAL;
    let mut dealing = false;
    // Relaxed: the flag guards nothing but this loop.
    while !stop.load(Ordering::Relaxed) {
        let pause = if dealing { DEAL_PAUSE } else { CHECK_INTERVAL };
        let until = next_check.min(Instant::now() + pause);
        drive.monitor_event.wait(until.saturating_duration_since(Instant::now()));
        if stop.load(Ordering::Relaxed) || matches!(drive.state().condition, Condition::Closed) {
            return;
        }
        dealing = drive.deal();
        if Instant::now() >= next_check {
            drive.log.tell_left_out(&drive.name, false);
            drive.check();
            next_check = Instant::now() + CHECK_INTERVAL;
        }
    }
}
