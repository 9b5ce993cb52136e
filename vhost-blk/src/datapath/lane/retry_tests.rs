//! Requests that wait to be given to the drive once more, in lanes whose turns the test makes.

use std::time::Instant;

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig};

use std::time::Duration;

use super::testing::{DATA, DEADLINE, Machine, TestClient, log_lines};
use super::*;
use crate::blk::request::{IOERR, OK};
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::ring::InflightMemory;
use crate::virtio::ring::model::{readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;

const INTERNAL_ERROR: nvme_sim::Status = nvme_sim::Status::new(0, 6);
const WRITE_PROTECTED: nvme_sim::Status = nvme_sim::Status::new(0, 0x20);

/// No PRP may point there: it is copied.
const ODD: u64 = 2;

/// A lane whose ring has a log, and its queue pair.
struct RetryBench {
    client: TestClient,
    lane: Lane,
    pair: QueuePair,
    pool: BouncePool,
    log: InflightMemory,
    machine: Machine,
}

impl RetryBench {
    fn new(packed: bool, entries: u16) -> RetryBench {
        let namespace = NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() };
        // Longer than a test may take.
        let retry_delays = [600, 0, 0];
        let machine =
            Machine::new(Config { namespaces: vec![namespace], sgl: false, retry_delays, ..Config::default() });
        let client = TestClient::new(&machine.guest, 0, packed, 64);
        let log = InflightMemory::create(1, 64).unwrap();
        let (pair, pool) = machine.pair(entries);
        let lane = Lane::new(LaneSetup {
            name: "test".into(),
            ring: ring(&machine, &client, &log),
            memory: machine.guest.memory.clone(),
            disk: Arc::new(machine.disk()),
            kick: None,
            call: None,
            error: None,
            counters: client.counters.clone(),
            log: Arc::default(),
            hold: Duration::ZERO,
        });
        RetryBench { client, lane, pair, pool, log, machine }
    }

    fn fault(&self, status: nvme_sim::Status) {
        let action = FaultAction::Fail(status);
        self.machine.sim.faults().add(FaultRule { action, when: FaultMatch::default() });
    }

    fn read(&mut self, address: u64) {
        self.client.send(&self.machine.guest, IN, 0, &[writable(address, 4096)]).unwrap();
    }

    fn submit(&mut self) {
        self.lane.submit(&mut self.pair, &mut self.pool, 0);
        self.pair.ring();
    }

    fn turn(&mut self) {
        self.submit();
        let RetryBench { lane, pair, .. } = self;
        pair.reap(|done| lane.complete(done.token, done.status));
        lane.publish();
    }

    /// Makes turns until this is so.
    fn until(&mut self, what: &str, condition: impl Fn(&RetryBench) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "{what}");
            self.turn();
        }
    }

    /// Makes turns until the drive has answered so many commands.
    fn until_answered(&mut self, commands: u64) {
        self.until("the drive's answers", |bench| {
            bench.machine.sim.faults().fired() == commands && bench.pair.outstanding() == 0
        });
    }

    fn answer(&mut self) -> Option<u8> {
        self.client.answer(&self.machine.guest).map(|(_, status, _)| status)
    }

    /// Requests that a process after this one would find in the log.
    fn unfinished(&self) -> usize {
        let mut ring = ring(&self.machine, &self.client, &self.log);
        let (mut view, mut chain) = (GuestView::new(self.machine.guest.memory.clone()), Chain::new());
        std::iter::from_fn(|| ring.pop_unfinished(&mut view, &mut chain).unwrap()).count()
    }
}

fn ring(machine: &Machine, client: &TestClient, log: &InflightMemory) -> Ring {
    let mut ring = Ring::new(&machine.guest.memory, &client.driver.setup).unwrap();
    ring.set_log(&log.queue(0).unwrap()).unwrap();
    ring
}

/// Whoever stops a lane does not wait until a request may be tried again: it fails at once, or, with nobody there to be
/// answered, is left as it is.
#[test]
fn a_lane_that_fails_or_leaves_requests_does_not_wait_for_the_time_of_a_retry() {
    for (packed, address, waits, answer) in [
        (false, DATA, true, false),
        (true, DATA, true, false),
        (false, DATA + ODD, true, false),
        (false, DATA, true, true),
        (false, DATA + ODD, true, true),
        // The drive says so only afterwards.
        (false, DATA, false, false),
        (false, DATA + ODD, false, false),
        (true, DATA, false, true),
        (true, DATA + ODD, false, true),
    ] {
        println!("packed {packed}, address {address:#x}, waits {waits}, answer {answer}");
        let mut bench = RetryBench::new(packed, 64);
        bench.fault(INTERNAL_ERROR.with_retry_delay(1));
        bench.read(address);
        if waits {
            bench.until_answered(1);
            bench.turn();
        } else {
            // One that is copied is taken in the first turn, and given to the drive in the second.
            bench.submit();
            bench.submit();
            assert_eq!(bench.pair.outstanding(), 1);
        }
        assert_eq!((bench.lane.in_flight(), bench.answer()), (1, None));
        bench.lane.begin_stop();
        let policy = if answer { StopPolicy::FailWaiting } else { StopPolicy::LeaveInLog };
        bench.lane.set_stop_policy(policy);
        if waits {
            bench.turn();
            assert!(bench.lane.drained());
        } else {
            bench.until("the end of the lane", |bench| bench.lane.drained());
        }
        assert_eq!(bench.answer(), answer.then_some(IOERR));
        assert_eq!(bench.unfinished(), usize::from(!answer));
        assert_eq!(bench.machine.sim.faults().fired(), 1, "the drive was asked once");
    }
}

#[test]
fn a_piece_that_finds_no_room_is_copied_once() {
    let mut bench = RetryBench::new(false, 4);
    let write = [readable(DATA + ODD, 4096)];
    bench.client.send(&bench.machine.guest, OUT, 0, &write).unwrap();
    // They take the queue pair's three slots.
    (1..4).for_each(|k| bench.read(DATA + 0x1_0000 * k));
    for _ in 0..100 {
        // Not announced: the drive answers none.
        bench.lane.submit(&mut bench.pair, &mut bench.pool, 0);
    }
    assert_eq!(bench.pool.counters().bytes, 4096);
    bench.until("all answers", |bench| bench.lane.in_flight() == 0);
    assert!((0..4).all(|_| bench.answer() == Some(OK)));
    assert_eq!((bench.pool.counters().bytes, bench.client.counters.read().copies), (4096, 1));
}

#[test]
fn a_burst_of_answers_that_allow_another_try_does_not_fill_the_log() {
    let before = log_lines();
    let mut bench = RetryBench::new(true, 64);
    bench.fault(INTERNAL_ERROR.with_retry_delay(1));
    (0..24).for_each(|k| bench.read(DATA + 0x1000 * k));
    bench.until_answered(24);
    assert_eq!(log_lines() - before, 5, "1, 2, 4, 8, 16");
    bench.lane.begin_stop();
    bench.lane.set_stop_policy(StopPolicy::LeaveInLog);
    assert!(bench.lane.drained());
}

#[test]
fn write_protection_is_logged_when_it_begins() {
    let before = log_lines();
    let mut bench = RetryBench::new(false, 64);
    bench.fault(WRITE_PROTECTED.not_to_be_retried());
    let fail = |bench: &mut RetryBench, addresses: &[u64]| {
        for address in addresses {
            bench.client.send(&bench.machine.guest, OUT, 0, &[readable(*address, 4096)]).unwrap();
            bench.turn();
            bench.until("an end", |bench| bench.lane.in_flight() == 0);
            assert_eq!(bench.answer(), Some(IOERR));
        }
    };
    fail(&mut bench, &[DATA, DATA + ODD, DATA, DATA]);
    assert_eq!(log_lines() - before, 1);
    // Something about the disk has changed: it may have been this, and be so again.
    bench.lane.set_disk(Arc::new(bench.machine.disk()));
    fail(&mut bench, &[DATA + ODD, DATA]);
    assert_eq!(log_lines() - before, 2);
}
