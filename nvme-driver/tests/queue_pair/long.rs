//! Requests of many commands: they share the queue pair, and can be given up.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nvme_driver::controller::Options;
use nvme_driver::{Completed, LbaRange, OWNER_SHIFT, QueuePair, Segment, Status, SubmitError, Work};
use nvme_sim::{FaultAction, FaultMatch, FaultRule};
use vfio::DmaBuffer;

use crate::setup::{DEADLINE, Random, Rig, carry_out, config, rig, segment, wait};

const MIB: usize = 1 << 20;
/// Bytes of one command.
const COMMAND: usize = 8192;

/// A controller that takes small commands only.
fn small_commands() -> Rig {
    let mut config = config(512);
    config.max_transfer = Some(COMMAND as u32);
    rig(config, &Options { io_timeout: Duration::from_secs(20), ..Default::default() })
}

fn token(owner: u64, number: u64) -> u64 {
    owner << OWNER_SHIFT | number
}

fn read<'a>(lba: u64, segments: &'a [Segment]) -> Work<'a> {
    Work::Read { lba, segments }
}

fn stop(rig: &Rig, stopped: bool) {
    rig.simulator.faults().change(|plan| plan.stopped = stopped);
}

/// Reaps until `enough`; what completed.
fn reap_until(pair: &mut QueuePair, mut enough: impl FnMut(&QueuePair, &[Completed]) -> bool) -> Vec<Completed> {
    let mut all = Vec::new();
    let start = Instant::now();
    while !enough(pair, &all) {
        assert!(start.elapsed() < DEADLINE, "{pair:?}, {} completed", all.len());
        if pair.reap(|completed| all.push(completed)) == 0 {
            std::thread::yield_now();
        }
    }
    all
}

#[test]
fn others_go_on_beside_a_long_request_and_behind_few_of_its_commands() {
    let rig = small_commands();
    let mut pair = rig.pair(64);
    let buffer = rig.buffer(8 * MIB);
    let long = [segment(&buffer, 0, 8 * MIB)];
    let small = [segment(&buffer, 0, 512)];
    let medium = [segment(&buffer, 0, 4 * COMMAND)];
    stop(&rig, true);
    for number in 0..4 {
        pair.submit(&rig.namespace, read(0, &long), number).unwrap();
    }
    assert_eq!(pair.outstanding(), 31, "half of the slots");
    for number in 100..110 {
        pair.submit(&rig.namespace, read(number, &small), number).unwrap();
    }
    pair.submit(&rig.namespace, read(0, &medium), 110).unwrap();
    pair.submit(&rig.namespace, Work::Flush, 111).unwrap();
    pair.submit(&rig.namespace, Work::Discard { ranges: &[LbaRange { lba: 0, blocks: 8 }] }, 112).unwrap();
    assert_eq!(pair.outstanding(), 31 + 10 + 4 + 2);
    pair.ring();
    stop(&rig, false);
    let first = reap_until(&mut pair, |pair, all| {
        assert!(pair.outstanding() <= 47);
        all.len() >= 13
    });
    assert!(first.iter().all(|completed| completed.token >= 100 && completed.status.is_success()), "{first:?}");
    assert!(pair.counters().commands < 200, "of 4096 commands: {:?}", pair.counters());
    // And so it goes on.
    for number in 200..220 {
        pair.submit(&rig.namespace, read(number, &small), number).unwrap();
        pair.ring();
        let before = pair.counters().commands;
        assert_eq!(wait(&mut pair, 1)[0].token, number);
        assert!(pair.counters().commands - before < 100);
    }
    let mut tokens: Vec<u64> = wait(&mut pair, 4).iter().map(|completed| completed.token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, [0, 1, 2, 3]);
    assert_eq!((pair.outstanding(), pair.counters().staged), (0, 4));
}

#[test]
fn an_owner_with_one_long_request_does_not_wait_for_those_of_another() {
    let rig = small_commands();
    let mut pair = rig.pair(128);
    let buffer = rig.buffer(4 * MIB);
    let long = [segment(&buffer, 0, 4 * MIB)];
    stop(&rig, true);
    let taken = (0..100).take_while(|&number| pair.submit(&rig.namespace, read(0, &long), token(1, number)).is_ok());
    assert_eq!(taken.count(), 16);
    assert!(!pair.admits(token(1, 0), 1) && pair.admits(token(2, 0), 1));
    let refused = pair.submit(&rig.namespace, read(0, &long), token(1, 16));
    assert_eq!(refused, Err(SubmitError::Crowded));
    pair.submit(&rig.namespace, read(0, &long), token(2, 0)).unwrap();
    pair.ring();
    stop(&rig, false);
    let first = wait(&mut pair, 1)[0];
    assert_eq!((first.token, first.status), (token(2, 0), Status::SUCCESS), "of as much as all the others get");
    assert!(wait(&mut pair, 16).iter().all(|completed| completed.status.is_success()));
    assert_eq!(pair.outstanding(), 0);
}

#[test]
fn long_requests_side_by_side_move_the_right_bytes() {
    let rig = small_commands();
    let mut pair = rig.pair(64);
    let buffer = rig.buffer(16 * MIB);
    let mut random = Random::new();
    let data = random.bytes(4 * MIB);
    let part = |number: usize| [segment(&buffer, number * 4 * MIB, 4 * MIB)];
    for number in 0..4 {
        buffer.write(number * 4 * MIB, &data[number * MIB..]).unwrap();
        buffer.write(number * 4 * MIB + (4 - number) * MIB, &data[..number * MIB]).unwrap();
        let lba = (number * 4 * MIB / 512) as u64;
        let work = Work::Write { lba, segments: &part(number), fua: false };
        pair.submit(&rig.namespace, work, token(number as u64, 0)).unwrap();
    }
    pair.ring();
    assert!(wait(&mut pair, 4).iter().all(|completed| completed.status.is_success()));
    buffer.write(0, &vec![0; 16 * MIB]).unwrap();
    // The other way round.
    for number in 0..4 {
        let lba = ((3 - number) * 4 * MIB / 512) as u64;
        pair.submit(&rig.namespace, read(lba, &part(number)), token(number as u64, 0)).unwrap();
    }
    pair.ring();
    assert!(wait(&mut pair, 4).iter().all(|completed| completed.status.is_success()));
    for number in 0..4 {
        let mut back = vec![0; 4 * MIB];
        buffer.read(number * 4 * MIB, &mut back).unwrap();
        back.rotate_right((3 - number) * MIB);
        assert!(back == data, "request {number}");
    }
}

#[test]
fn zeroes_are_written_a_few_at_a_time() {
    let rig = rig(config(512), &Options::default());
    let mut pair = rig.pair(64);
    let ranges = [LbaRange { lba: 0, blocks: rig.namespace.blocks as u32 }; 2];
    stop(&rig, true);
    for number in 0..4 {
        let work = Work::WriteZeroes { ranges: &ranges, deallocate: false, fua: false };
        pair.submit(&rig.namespace, work, number).unwrap();
    }
    assert_eq!(pair.outstanding(), 1, "a command is 32 MiB");
    pair.ring();
    stop(&rig, false);
    assert!(wait(&mut pair, 4).iter().all(|completed| completed.status.is_success()));
    assert_eq!(pair.counters().commands, 4 * 2 * rig.namespace.blocks.div_ceil(65536));
}

#[test]
fn one_slot_is_shared_too() {
    let rig = small_commands();
    let mut pair = rig.pair(2);
    let buffer = rig.buffer(MIB);
    let (long, small) = ([segment(&buffer, 0, MIB)], [segment(&buffer, 0, 512)]);
    pair.submit(&rig.namespace, read(0, &long), 1).unwrap();
    assert_eq!((pair.capacity(), pair.outstanding()), (1, 1));
    let mut small_ones = 0;
    let start = Instant::now();
    let mut done = false;
    while !done {
        assert!(start.elapsed() < DEADLINE);
        if pair.submit(&rig.namespace, read(0, &small), 2).is_ok() {
            small_ones += 1;
        }
        pair.ring();
        pair.reap(|completed| done |= completed.token == 1);
    }
    assert!(small_ones > 50, "{small_ones} beside 128 commands");
    // Whoever was refused goes away: the other goes on.
    while pair.submit(&rig.namespace, read(0, &long), 3).is_err() {
        assert!(start.elapsed() < DEADLINE);
        pair.reap(|_| ());
    }
    let _ = pair.submit(&rig.namespace, read(0, &small), 2);
    pair.ring();
    let mut done = false;
    while !done {
        assert!(start.elapsed() < DEADLINE);
        pair.tick(Instant::now(), |token| panic!("{token} expired"));
        pair.reap(|completed| done |= completed.token == 3);
    }
}

#[test]
fn a_long_request_can_be_given_up_at_any_point() {
    let rig = small_commands();
    let buffer = rig.buffer(4 * MIB);
    let long = [segment(&buffer, 0, 4 * MIB)];
    for commands in [0, 1, 30, 31, 32, 100, 500, 511] {
        let mut pair = rig.pair(64);
        stop(&rig, true);
        for owner in 1..=2 {
            pair.submit(&rig.namespace, read(0, &long), token(owner, 7)).unwrap();
        }
        pair.ring();
        if commands > 0 {
            stop(&rig, false);
        }
        let mut seen = reap_until(&mut pair, |pair, _| pair.counters().completions >= commands);
        assert!(seen.is_empty(), "half of their commands at most");
        pair.cancel_long(|token| token >> OWNER_SHIFT == 1, |completed| seen.push(completed));
        pair.cancel_long(|token| token == 999, |completed| panic!("{completed:?}"));
        let before = pair.counters().commands;
        stop(&rig, false);
        seen.extend(wait(&mut pair, 2 - seen.len()));
        assert_eq!((seen[0].token, seen[0].status), (token(1, 7), Status::ABORTED_BY_HOST), "after {commands}");
        assert_eq!((seen[1].token, seen[1].status), (token(2, 7), Status::SUCCESS));
        // The rest of the other's.
        assert!(pair.counters().commands - before <= 512, "{commands}: {:?}", pair.counters());
        assert!(pair.counters().commands < 1024, "{commands}: {:?}", pair.counters());
        assert_eq!(pair.outstanding(), 0);
        assert!(carry_out(&mut pair, &rig.namespace, read(0, &long)).status.is_success());
        rig.controller.delete_queue_pair(pair).unwrap();
    }
}

#[test]
fn what_is_given_up_without_a_command_out_ends_at_once_and_an_error_stays_the_first() {
    let rig = small_commands();
    let mut pair = rig.pair(64);
    let buffer = rig.buffer(4 * MIB);
    let long = [segment(&buffer, 0, 4 * MIB)];
    let action = FaultAction::Fail(nvme_sim::Status::new(2, 0x81));
    rig.simulator.faults().add(FaultRule { action, when: FaultMatch { blocks: Some(0..=0), ..Default::default() } });
    stop(&rig, true);
    pair.submit(&rig.namespace, read(0, &long), 1).unwrap();
    pair.submit(&rig.namespace, read(0, &long), 2).unwrap();
    pair.ring();
    let mut ended = Vec::new();
    pair.cancel_long(|token| token == 2, |completed| ended.push((completed.token, completed.status)));
    assert_eq!(ended, [(2, Status::ABORTED_BY_HOST)]);
    stop(&rig, false);
    // Its first command fails; it is over then, but for what is out.
    let mut seen = reap_until(&mut pair, |pair, _| pair.counters().completions > 0);
    pair.cancel_long(|_| true, |completed| panic!("{completed:?}"));
    seen.extend(wait(&mut pair, 1 - seen.len()));
    assert_eq!((seen[0].token, seen[0].status.kind()), (1, Status::UNRECOVERED_READ));
    assert_eq!(pair.counters().commands, 31);
    assert_eq!((pair.outstanding(), pair.reap(|_| ())), (0, 0));
}

#[test]
fn a_reset_gives_every_request_back_once_whether_a_command_of_it_is_out_or_not() {
    let rig = small_commands();
    let mut pair = rig.pair(64);
    let buffer = rig.buffer(4 * MIB);
    let long = [segment(&buffer, 0, 4 * MIB)];
    for round in 0..2 {
        stop(&rig, true);
        for owner in 0..3 {
            for number in 0..3 {
                pair.submit(&rig.namespace, read(0, &long), token(owner, number)).unwrap();
            }
        }
        pair.submit(&rig.namespace, read(0, &[segment(&buffer, 0, 512)]), 77).unwrap();
        pair.ring();
        let mut tokens = Vec::new();
        // One is given up first: it is still given back once.
        pair.cancel_long(|token| token == 1, |completed| tokens.push(completed.token));
        stop(&rig, false);
        rig.controller.reset().unwrap();
        pair.drain_after_reset(|token| tokens.push(token));
        tokens.sort_unstable();
        let mut expected: Vec<u64> = (0..9).map(|at| token(at / 3, at % 3)).chain([77]).collect();
        expected.sort_unstable();
        assert_eq!(tokens, expected, "round {round}");
        rig.controller.recreate_queue_pair(&mut pair).unwrap();
        assert_eq!(pair.outstanding(), 0);
        assert!(carry_out(&mut pair, &rig.namespace, read(0, &long)).status.is_success());
    }
}

/// Anything at any time: each request completes once, and nobody keeps the others from it.
#[test]
fn every_request_completes_once_whatever_happens() {
    let rig = small_commands();
    let mut random = Random::new();
    let buffer = rig.buffer(4 * MIB);
    let delay = FaultAction::Delay(Duration::ZERO..=Duration::from_micros(300));
    rig.simulator
        .faults()
        .add(FaultRule { action: delay, when: FaultMatch { probability: 0.15, ..Default::default() } });
    let action = FaultAction::Fail(nvme_sim::Status::new(2, 0x81));
    rig.simulator
        .faults()
        .add(FaultRule { action, when: FaultMatch { blocks: Some(5000..=5000), ..Default::default() } });
    rig.simulator.faults().change(|plan| plan.reorder = true);
    for entries in [3, 8, 64] {
        let mut pair = rig.pair(entries);
        let mut out: HashMap<u64, usize> = HashMap::new();
        let (mut next, mut crowded, mut aborted, mut failed) = (0, 0, 0, 0);
        let (start, mut turns) = (Instant::now(), 0);
        let mut sizes = [512, COMMAND, 10 * COMMAND, MIB / 2, 3 * MIB].into_iter().cycle();
        while turns < 1000 || aborted == 0 || failed == 0 {
            assert!(start.elapsed() < DEADLINE);
            turns += 1;
            for _ in 0..random.below(8) {
                let bytes = sizes.next().unwrap_or(512);
                let token = token(random.below(4) as u64, next);
                let lba = random.below(8000) as u64;
                match submit(&mut pair, &rig, &buffer, lba, bytes, token) {
                    Ok(()) => {
                        out.insert(token, bytes);
                        next += 1;
                    }
                    Err(SubmitError::Crowded) => crowded += 1,
                    Err(error) => assert_eq!(error, SubmitError::Full),
                }
            }
            pair.ring();
            let mut done = Vec::new();
            if random.below(20) == 0 {
                let owner = random.below(4) as u64;
                pair.cancel_long(|token| token >> OWNER_SHIFT == owner, |completed| done.push(completed));
            }
            pair.reap(|completed| done.push(completed));
            for Completed { token, status, .. } in done {
                let bytes = out.remove(&token).expect("completes once");
                match status.kind() {
                    Status::SUCCESS => {}
                    Status::ABORTED_BY_HOST => {
                        assert!(bytes > 2 * COMMAND, "not a short one");
                        aborted += 1;
                    }
                    other => {
                        assert_eq!(other, Status::UNRECOVERED_READ);
                        failed += 1;
                    }
                }
            }
            if random.below(300) == 0 {
                rig.controller.reset().unwrap();
                pair.drain_after_reset(|token| assert!(out.remove(&token).is_some(), "{token:#x} twice"));
                assert!(out.is_empty(), "{out:?}");
                rig.controller.recreate_queue_pair(&mut pair).unwrap();
            }
        }
        pair.cancel_long(|_| true, |completed| assert!(out.remove(&completed.token).is_some()));
        let rest = wait(&mut pair, out.len());
        rest.iter().for_each(|completed| assert!(out.remove(&completed.token).is_some()));
        println!("{entries} entries: {next} requests, {crowded} crowded, {aborted} aborted, {failed} failed");
        assert_eq!(pair.outstanding(), 0);
        rig.controller.delete_queue_pair(pair).unwrap();
    }
}

fn submit(
    pair: &mut QueuePair,
    rig: &Rig,
    buffer: &DmaBuffer,
    lba: u64,
    bytes: usize,
    token: u64,
) -> Result<(), SubmitError> {
    pair.submit(&rig.namespace, read(lba, &[segment(buffer, 0, bytes)]), token)
}
