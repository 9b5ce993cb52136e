//! Requests of many commands beside small ones, and how they end.

use std::time::Instant;

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig};

use super::testing::{DATA, DEADLINE, Machine, TestClient, wait};
use super::*;
use crate::blk::request::{IOERR, OK};
use crate::datapath::poll_group::PollGroup;
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::ring::model::{Piece, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const WRITE_ZEROES: u32 = 13;

/// 2048 commands of 8 KiB.
const LONG: u32 = 16 << 20;

fn long() -> [Piece; 1] {
    [writable(DATA, LONG)]
}

fn machine() -> Machine {
    let namespaces = vec![NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() }];
    Machine::new(Config { namespaces, max_transfer: Some(8192), ..Config::default() })
}

fn commands(group: &PollGroup) -> u64 {
    group.pair().unwrap().counters().commands
}

/// Polls until the lane can be taken out; the answers until then.
fn take_out(machine: &Machine, group: &mut PollGroup, client: &mut TestClient, index: usize) -> (Lane, Vec<u8>) {
    let deadline = Instant::now() + DEADLINE;
    let lane = loop {
        group.poll();
        if let Some(lane) = group.remove_drained(index) {
            break lane;
        }
        assert!(Instant::now() < deadline, "what was in flight never came back");
    };
    let answers = std::iter::from_fn(|| client.answer(&machine.guest)).map(|(_, status, _)| status).collect();
    (lane, answers)
}

#[test]
fn small_requests_wait_for_a_few_commands_of_long_ones_and_not_for_their_end() {
    for packed in [false, true] {
        let machine = machine();
        let guest = &machine.guest;
        let disk = Arc::new(machine.disk());
        let mut group = machine.group(64);
        let (mut busy, mut calm) = (TestClient::new(guest, 0, packed, 128), TestClient::new(guest, 1, packed, 128));
        let lanes = [&busy, &calm].map(|client| group.add(client.lane(guest, &disk)));
        for _ in 0..16 {
            busy.send(guest, IN, 0, &long()).unwrap();
        }
        for round in 0..20 {
            // Through the same ring, and through another one of the same queue pair.
            let mine = busy.send(guest, IN, 0, &[writable(DATA + 0x110_0000, 4096)]).unwrap();
            calm.send(guest, IN, 0, &[writable(DATA + 0x120_0000, 4096)]).unwrap();
            let before = commands(&group);
            assert_eq!(wait(&mut group, || busy.answer(guest)), (mine, OK, 4097), "round {round}");
            assert_eq!(wait(&mut group, || calm.answer(guest)).1, OK);
            // At most as many as may be out when they come, and those that follow until they are seen.
            let meanwhile = commands(&group) - before;
            assert!(meanwhile < 200, "round {round}: {meanwhile} of 32768 commands went first");
        }
        let lane = group.lane_mut(lanes[0]).unwrap();
        lane.begin_stop();
        lane.end_multi_command();
        let before = commands(&group);
        let (_, answers) = take_out(&machine, &mut group, &mut busy, lanes[0]);
        assert!(commands(&group) - before < 100, "nothing more is issued");
        assert_eq!(answers, [IOERR; 16]);
        let read = calm.run(guest, &mut group, IN, 0, &[writable(DATA + 0x120_0000, 4096)]);
        assert_eq!((read, group.pair().unwrap().outstanding()), ((OK, 4097), 0));
    }
}

/// One of several lanes has a long request, the other as many as its ring holds.
#[test]
fn a_lane_with_many_long_requests_leaves_the_others_their_part() {
    let machine = machine();
    let guest = &machine.guest;
    let disk = Arc::new(machine.disk());
    let mut group = machine.group(64);
    let (mut busy, mut calm) = (TestClient::new(guest, 0, false, 128), TestClient::new(guest, 1, true, 128));
    let lanes = [&busy, &calm].map(|client| group.add(client.lane(guest, &disk)));
    while busy.in_flight() < 30 {
        busy.send(guest, IN, 0, &long()).unwrap();
    }
    (0..10).for_each(|_| _ = group.poll());
    calm.send(guest, IN, 0, &long()).unwrap();
    let (_, status, length) = wait(&mut group, || calm.answer(guest));
    assert_eq!((status, length), (OK, LONG + 1));
    assert_eq!(busy.answer(guest), None, "each of them has had a sixteenth of that");
    // It has taken as many as it may; the others are in the ring as they were, for whoever has it next.
    let lane = group.lane_mut(lanes[0]).unwrap();
    assert_eq!(lane.in_flight(), 16);
    lane.begin_stop();
    lane.end_multi_command();
    let (lane, answers) = take_out(&machine, &mut group, &mut busy, lanes[0]);
    assert_eq!((answers, lane.base()), (vec![IOERR; 16], 16));
    group.add(busy.lane_at(guest, &disk, lane.base()));
    for _ in 16..30 {
        assert_eq!(wait(&mut group, || busy.answer(guest)).1, OK);
    }
}

#[test]
fn a_long_request_ends_at_any_point_as_whoever_ends_it_wants() {
    let machine = machine();
    let guest = &machine.guest;
    let disk = Arc::new(machine.disk());
    let zeroes = DATA + 0x180_0000;
    let range = |lba: u64| [&lba.to_le_bytes()[..], &0x1_0000u32.to_le_bytes(), &[0; 4]].concat();
    guest.write(zeroes, &(0..256).flat_map(|at| range(at % 2 * 0x1_0000)).collect::<Vec<_>>());
    let requests = [(IN, long()), (OUT, [readable(DATA, LONG)]), (WRITE_ZEROES, [readable(zeroes, 4096)])];
    for ((kind, data), turns) in requests.iter().flat_map(|request| [0, 1, 5].map(|turns| (request, turns))) {
        for policy in [Some(StopPolicy::FailWaiting), Some(StopPolicy::LeaveInLog), None] {
            let mut group = machine.group(64);
            let mut client = TestClient::new(guest, 0, false, 8);
            let index = group.add(client.lane(guest, &disk));
            client.send(guest, *kind, 0, data).unwrap();
            client.send(guest, *kind, 0, data).unwrap();
            group.poll();
            for _ in 0..turns {
                let before = commands(&group);
                wait_for_more(&mut group, before);
            }
            let lane = group.lane_mut(index).unwrap();
            lane.begin_stop();
            match policy {
                Some(policy) => lane.set_stop_policy(policy),
                None => lane.end_multi_command(),
            }
            let (lane, answers) = take_out(&machine, &mut group, &mut client, index);
            let expected = if policy == Some(StopPolicy::LeaveInLog) { vec![] } else { vec![IOERR; 2] };
            assert_eq!(answers, expected, "kind {kind}, {turns} turns, {policy:?}");
            assert_eq!((lane.in_flight(), group.pair().unwrap().outstanding()), (0, 0));
            drop(lane);
            machine.controller.delete_queue_pair(group.into_pair().unwrap()).unwrap();
        }
    }
}

fn wait_for_more(group: &mut PollGroup, before: u64) {
    let deadline = Instant::now() + DEADLINE;
    while commands(group) == before {
        assert!(Instant::now() < deadline);
        group.poll();
    }
}

/// A drive's own error is the request's, and what a guest that broke its ring had asked for is not done to its end.
#[test]
fn errors_and_broken_rings_end_long_requests_too() {
    let machine = machine();
    let guest = &machine.guest;
    let disk = Arc::new(machine.disk());
    let mut group = machine.group(64);
    let mut client = TestClient::new(guest, 0, false, 8);
    let index = group.add(client.lane(guest, &disk));
    let action = FaultAction::Fail(nvme_sim::Status::new(2, 0x81).not_to_be_retried());
    let when = FaultMatch { blocks: Some(3000..=3000), limit: Some(1), ..FaultMatch::default() };
    machine.sim.faults().add(FaultRule { action, when });
    let before = commands(&group);
    assert_eq!(client.run(guest, &mut group, IN, 0, &long()), (IOERR, LONG + 1));
    assert!(commands(&group) - before < 1024);
    assert_eq!(client.run(guest, &mut group, IN, 0, &long()), (OK, LONG + 1));
    client.send(guest, OUT, 0, &[readable(DATA, LONG)]).unwrap();
    group.poll();
    let before = commands(&group);
    group.lane_mut(index).unwrap().break_down(&"a test");
    let deadline = Instant::now() + DEADLINE;
    while group.lane_mut(index).unwrap().in_flight() > 0 {
        assert!(Instant::now() < deadline);
        group.poll();
    }
    assert!(commands(&group) - before < 100, "the rest is not written");
    assert_eq!(client.answer(guest), None);
}
