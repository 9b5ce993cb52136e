//! A drive that loses a command is brought up again, in place and without delay.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::common::*;
use crate::stand::Stand;
use crate::{MIB, admin, guest};

fn lose_a_read(stand: &Stand) {
    let when = FaultMatch { opcode: Some(2), namespace: Some(1), limit: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
}

#[test]
fn no_question_delays_it() {
    let stand = Stand::with(|setup| setup.top = "io-timeout = 1".into());
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    // Whatever is asked from now on is answered much later.
    let late = Duration::from_secs(60);
    for when in [
        FaultMatch { admin: true, opcode: Some(admin::GET_LOG_PAGE), ..FaultMatch::default() },
        FaultMatch { cns: Some(0), ..FaultMatch::default() },
    ] {
        stand.drive.faults().add(FaultRule { action: FaultAction::Delay(late..=late), when });
    }
    stand.drive.resize(1, 300 * MIB).unwrap();
    eventually("it is being asked", || stand.drive.faults().fired() > 0);
    lose_a_read(&stand);
    let start = Instant::now();
    ring.check_io(8);
    let pause = start.elapsed();
    stand.program.wait_for("the drive is back");
    assert!(pause < Duration::from_secs(4), "a lost read was answered after {pause:?}");
    neighbour.verdict_within(Duration::from_secs(4));
}

#[test]
fn the_device_stays_open() {
    let stand = Stand::with(|setup| setup.top = "io-timeout = 1".into());
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    for times in 1..=3 {
        lose_a_read(&stand);
        ring.check_io(8);
        eventually("the drive is back", || stand.program.lines_with("the drive is back") == times);
    }
    assert_eq!(stand.drive.counters().front_ends_gone.load(Ordering::Relaxed), 0);
    neighbour.verdict_within(Duration::from_secs(4));
}

/// A drive that activates firmware tells that it pauses. What it does not answer meanwhile is not lost, and it is not reset for that.
#[test]
fn a_pause_is_no_failure() {
    let stand = Stand::with(|setup| setup.top = "io-timeout = 0.5".into());
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    stand.drive.faults().change(|plan| plan.paused = true);
    ring.submit(0, 8, (ring.data(), 4096));
    let start = Instant::now();
    eventually("twice the timeout is over", || start.elapsed() > Duration::from_millis(1200));
    assert_eq!(ring.poll(), None);
    stand.drive.faults().change(|plan| plan.paused = false);
    assert_eq!(ring.wait(), 0);
    ring.check_io(8);
    stand.program.wait_for("it has paused for");
    assert_eq!(stand.program.lines_with("out of operation"), 0);
    // What is lost afterwards is noticed as ever.
    lose_a_read(&stand);
    ring.check_io(8);
    stand.program.wait_for("the drive is back");
    neighbour.verdict_within(Duration::from_secs(4));
}
