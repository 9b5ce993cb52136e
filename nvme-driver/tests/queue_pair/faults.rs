//! What the controller does wrong reaches the caller as exactly one of: a status, an expiry, an abandoned request.

use std::time::{Duration, Instant};

use nvme_driver::controller::Options;
use nvme_driver::{QueuePair, Status, Work};
use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::setup::{Rig, carry_out, config, rig, segment, wait, wait_expired};

fn impatient() -> Options {
    Options { io_timeout: Duration::from_millis(200), ..Default::default() }
}

fn on_blocks(action: FaultAction, blocks: std::ops::RangeInclusive<u64>) -> FaultRule {
    FaultRule { action, when: FaultMatch { blocks: Some(blocks), ..Default::default() } }
}

fn read_error() -> nvme_sim::Status {
    nvme_sim::Status::new(2, 0x81)
}

/// `count` single-block reads from block 0 on; the token is the block.
fn reads(rig: &Rig, pair: &mut QueuePair, count: u64) -> vfio::DmaBuffer {
    let buffer = rig.buffer(4096);
    for lba in 0..count {
        pair.submit(&rig.namespace, Work::Read { lba, segments: &[segment(&buffer, 0, 512)] }, lba).unwrap();
    }
    pair.ring();
    buffer
}

#[test]
fn an_error_status_reaches_its_own_request_only() {
    let rig = rig(config(512), &impatient());
    let mut pair = rig.pair(32);
    rig.simulator.faults().add(on_blocks(FaultAction::Fail(read_error()), 5..=5));
    reads(&rig, &mut pair, 20);
    for completed in wait(&mut pair, 20) {
        let expected = if completed.token == 5 { Status::UNRECOVERED_READ } else { Status::SUCCESS };
        assert_eq!(completed.status.kind(), expected, "request {}", completed.token);
    }
}

#[test]
fn one_failing_piece_fails_the_whole_request_once() {
    let mut config = config(512);
    config.max_transfer = Some(8192);
    let rig = rig(config, &impatient());
    rig.simulator.faults().add(on_blocks(FaultAction::Fail(read_error()), 100..=100));
    for entries in [3, 64] {
        // With few slots the failing piece is issued later, and the rest of the request is dropped.
        let mut pair = rig.pair(entries);
        let buffer = rig.buffer(1 << 20);
        let all = [segment(&buffer, 0, 1 << 20)];
        let failed = carry_out(&mut pair, &rig.namespace, Work::Read { lba: 0, segments: &all });
        assert_eq!(failed.status.kind(), Status::UNRECOVERED_READ);
        if entries == 3 {
            assert!(pair.counters().commands < 128, "{:?}", pair.counters());
        }
        // The pair is as good as before.
        let fine = carry_out(&mut pair, &rig.namespace, Work::Read { lba: 2048, segments: &all });
        assert!(fine.status.is_success());
        rig.controller.delete_queue_pair(pair).unwrap();
    }
}

#[test]
fn delayed_and_reordered_completions_find_their_requests() {
    let rig = rig(config(512), &Options::default());
    let mut pair = rig.pair(128);
    let range = Duration::ZERO..=Duration::from_millis(20);
    rig.simulator.faults().add(FaultRule { action: FaultAction::Delay(range), when: FaultMatch::default() });
    rig.simulator.faults().change(|plan| plan.reorder = true);
    let mut out_of_order = false;
    for _ in 0..5 {
        reads(&rig, &mut pair, 127);
        let completed = wait(&mut pair, 127);
        assert!(completed.iter().all(|completed| completed.status.is_success()));
        let mut tokens: Vec<u64> = completed.iter().map(|completed| completed.token).collect();
        out_of_order |= !tokens.is_sorted();
        tokens.sort();
        assert_eq!(tokens, (0..127).collect::<Vec<_>>());
    }
    assert!(out_of_order, "the fault did nothing");
    assert_eq!(pair.counters().stale_completions, 0);
}

#[test]
fn a_lost_completion_expires_and_is_given_back_by_the_reset() {
    let rig = rig(config(512), &impatient());
    let mut pair = rig.pair(32);
    rig.simulator.faults().add(on_blocks(FaultAction::LoseCompletion, 7..=8));
    reads(&rig, &mut pair, 20);
    wait(&mut pair, 18);
    assert_eq!(wait_expired(&mut pair, 2), [7, 8]);
    assert_eq!(pair.outstanding(), 2, "expired is not released");
    assert!(pair.oldest().is_some_and(|age| age >= Duration::from_millis(200)));
    pair.tick(Instant::now() + Duration::from_secs(9), |token| panic!("{token} was told twice"));
    rig.controller.reset().unwrap();
    let mut abandoned = Vec::new();
    pair.drain_after_reset(|token| abandoned.push(token));
    abandoned.sort();
    assert_eq!(abandoned, [7, 8]);
    assert_eq!(pair.outstanding(), 0);
}

/// 24.9 days are 2^31 milliseconds, 49.7 days 2^32.
#[test]
fn a_command_that_is_lost_after_weeks_of_rest_expires_in_time() {
    let rig = rig(config(512), &impatient());
    rig.simulator.faults().add(on_blocks(FaultAction::LoseCompletion, 1..=9));
    for days in [20, 25, 30, 49, 50, 75, 1000] {
        let mut pair = rig.pair(32);
        let start = Instant::now();
        // Something is out at the first look, so that the pair knows when to look next; then there is nothing for days.
        let buffer = reads(&rig, &mut pair, 1);
        pair.tick(start, |token| panic!("{token} has not expired"));
        wait(&mut pair, 1);
        let later = start + Duration::from_secs(days * 24 * 3600);
        pair.tick(later, |token| panic!("{token} has not expired"));
        pair.submit(&rig.namespace, Work::Read { lba: 1, segments: &[segment(&buffer, 0, 512)] }, 77).unwrap();
        pair.ring();
        let mut expired = Vec::new();
        for tick in 1..=10 {
            pair.tick(later + Duration::from_millis(30) * tick, |token| expired.push(token));
            // It was seen first at 30 ms.
            assert!(tick >= 8 || expired.is_empty(), "too early");
        }
        assert_eq!(expired, [77], "after {days} days");
        assert!(pair.oldest().is_some_and(|age| age >= Duration::from_millis(200)));
    }
}

#[test]
fn a_wrong_command_identifier_completes_nothing() {
    let rig = rig(config(512), &impatient());
    let mut pair = rig.pair(32);
    rig.simulator.faults().add(on_blocks(FaultAction::WrongCommandId, 3..=4));
    reads(&rig, &mut pair, 10);
    let tokens: Vec<u64> = wait(&mut pair, 8).iter().map(|completed| completed.token).collect();
    assert!(!tokens.contains(&3) && !tokens.contains(&4), "{tokens:?}");
    assert_eq!(wait_expired(&mut pair, 2), [3, 4]);
    assert_eq!(pair.counters().stale_completions, 2);
}

#[test]
fn a_stuck_controller_expires_everything_split_requests_once() {
    let mut config = config(512);
    config.max_transfer = Some(8192);
    let rig = rig(config, &impatient());
    let mut pair = rig.pair(64);
    rig.simulator.faults().change(|plan| plan.stopped = true);
    let buffer = rig.buffer(1 << 20);
    pair.submit(&rig.namespace, Work::Read { lba: 0, segments: &[segment(&buffer, 0, 65536)] }, 1000).unwrap();
    reads(&rig, &mut pair, 20);
    // This one does not find slots for all its pieces.
    pair.submit(&rig.namespace, Work::Read { lba: 0, segments: &[segment(&buffer, 0, 1 << 20)] }, 1001).unwrap();
    pair.ring();
    let expected: Vec<u64> = (0..20).chain([1000, 1001]).collect();
    assert_eq!(wait_expired(&mut pair, 22), expected);
    rig.simulator.faults().change(|plan| plan.stopped = false);
    rig.controller.reset().unwrap();
    let mut abandoned = Vec::new();
    pair.drain_after_reset(|token| abandoned.push(token));
    abandoned.sort();
    assert_eq!(abandoned, expected);
    assert_eq!((pair.outstanding(), pair.reap(|_| ())), (0, 0));
}

#[test]
fn a_fatal_status_is_seen_and_the_requests_are_given_back() {
    let rig = rig(config(512), &impatient());
    let mut pair = rig.pair(32);
    rig.controller.health().unwrap();
    rig.simulator.faults().add(on_blocks(FaultAction::Fatal, 5..=5));
    reads(&rig, &mut pair, 10);
    let start = Instant::now();
    while rig.controller.health().is_ok() {
        assert!(start.elapsed() < crate::setup::DEADLINE);
        std::thread::yield_now();
    }
    let mut completed = Vec::new();
    pair.reap(|one| completed.push(one.token));
    rig.simulator.faults().clear();
    rig.controller.reset().unwrap();
    pair.drain_after_reset(|token| completed.push(token));
    completed.sort();
    assert_eq!(completed, (0..10).collect::<Vec<_>>());
}

#[test]
fn a_controller_that_is_pulled_out_leaves_only_expiries() {
    let rig = rig(config(512), &impatient());
    let mut pair = rig.pair(32);
    reads(&rig, &mut pair, 10);
    wait(&mut pair, 10);
    rig.simulator.remove();
    reads(&rig, &mut pair, 10);
    assert_eq!(wait_expired(&mut pair, 10), (0..10).collect::<Vec<_>>());
    let error = rig.controller.health().unwrap_err();
    println!("{error}");
    let mut abandoned = 0;
    pair.drain_after_reset(|_| abandoned += 1);
    assert_eq!(abandoned, 10);
}
