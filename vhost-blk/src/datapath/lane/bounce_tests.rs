//! Requests that wait for bounce buffers, or for room: in their turn, and at no cost meanwhile.

use std::time::Instant;

use nvme_sim::{Config, NamespaceConfig};

use super::record::{MOST_BYTES, MOST_SPARE};
use super::testing::{DATA, DEADLINE, Machine, TestClient};
use super::*;
use crate::blk::request::OK;
use crate::virtio::ring::model::{Piece, writable};

const IN: u32 = 0;

/// No PRP may point there: it is copied.
const ODD: u64 = 2;

/// Lanes on one queue pair, whose turns the test makes.
struct BounceBench {
    clients: Vec<TestClient>,
    lanes: Vec<Lane>,
    pair: QueuePair,
    pool: BouncePool,
    machine: Machine,
}

impl BounceBench {
    fn new(lanes: u64) -> BounceBench {
        let namespaces = vec![NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() }];
        let machine = Machine::new(Config { namespaces, sgl: false, ..Config::default() });
        let (pair, pool) = machine.pair(64);
        let disk = Arc::new(machine.disk());
        let clients: Vec<_> = (0..lanes).map(|k| TestClient::new(&machine.guest, k, k % 2 == 1, 64)).collect();
        let lanes = clients.iter().map(|client| client.lane(&machine.guest, &disk)).collect();
        BounceBench { clients, lanes, pair, pool, machine }
    }

    fn read(&mut self, lane: usize, data: &[Piece]) {
        self.clients[lane].send(&self.machine.guest, IN, 0, data).expect("room in the ring");
    }

    /// The drive hears nothing of it.
    fn submit(&mut self) {
        for (tag, lane) in (0u64..).zip(&mut self.lanes) {
            lane.submit(&mut self.pair, &mut self.pool, tag << 32);
        }
    }

    fn turn(&mut self) {
        self.submit();
        self.pair.ring();
        let BounceBench { lanes, pair, .. } = self;
        pair.reap(|done| lanes[(done.token >> 32) as usize].complete(done.token, done.status));
        lanes.iter_mut().for_each(Lane::publish);
    }

    /// Makes turns until a lane has so many answers, all of them good.
    fn answers(&mut self, lane: usize, count: usize) {
        let deadline = Instant::now() + DEADLINE;
        let mut answered = 0;
        while answered < count {
            assert!(Instant::now() < deadline, "{answered} of {count} answers");
            self.turn();
            while let Some((_, status, _)) = self.clients[lane].answer(&self.machine.guest) {
                assert_eq!(status, OK);
                answered += 1;
            }
        }
    }
}

const LONG: u32 = 1 << 20;
const LONG_ONES: usize = 16;
/// Pieces of a long request.
const PIECES: u64 = 16;

fn read_long_ones(bench: &mut BounceBench) {
    for k in 0..LONG_ONES as u64 {
        bench.read(0, &[writable(DATA + ODD + k * u64::from(LONG), LONG)]);
    }
    // Every buffer is taken.
    (0..4).for_each(|_| bench.turn());
}

/// Whoever waits has the next buffer: another lane, or a short request of the same one.
#[test]
fn nobody_waits_for_somebody_elses_long_requests() {
    for lane in [0, 1] {
        let mut bench = BounceBench::new(2);
        read_long_ones(&mut bench);
        let before = bench.pool.counters().loans;
        bench.read(lane, &[writable(DATA + ODD + (20 << 20), 4096)]);
        bench.answers(lane, 1);
        let loans = bench.pool.counters().loans - before;
        // Those of the long ones go on while the drive has it, of which nobody knows how long it takes.
        assert!(loans < LONG_ONES as u64 * PIECES / 2, "{loans} pieces came before it");
        bench.answers(0, LONG_ONES);
        assert_eq!(bench.pool.counters().loans, LONG_ONES as u64 * PIECES + 1, "no piece was copied twice");
    }
}

/// All long requests of a lane get on together.
#[test]
fn requests_of_a_lane_take_turns_for_buffers() {
    let mut bench = BounceBench::new(1);
    read_long_ones(&mut bench);
    let deadline = Instant::now() + DEADLINE;
    while bench.pool.counters().loans < LONG_ONES as u64 * (PIECES - 2) {
        assert!(Instant::now() < deadline && bench.clients[0].answer(&bench.machine.guest).is_none());
        bench.turn();
    }
    bench.answers(0, LONG_ONES);
}

#[test]
fn what_waits_for_room_is_not_looked_at_again_and_its_memory_is_given_back() {
    let mut bench = BounceBench::new(1);
    let scattered: Vec<_> = (0..1022).map(|k| writable(DATA + ODD + 1024 * k, 512)).collect();
    for _ in 0..40 {
        bench.read(0, &scattered);
    }
    (0..10).for_each(|_| bench.submit());
    let (taken, examined) = (bench.lanes[0].in_flight(), bench.pair.counters().needs_bounce);
    assert!((16..40).contains(&taken), "{taken} requests were taken");
    assert_eq!(examined, taken as u64);
    assert!(bench.lanes[0].details.allocated() <= MOST_BYTES);
    let copied = bench.pool.counters().bytes;
    (0..1000).for_each(|_| bench.submit());
    assert_eq!((bench.pair.counters().needs_bounce, bench.pool.counters().bytes), (examined, copied));
    assert_eq!(bench.lanes[0].in_flight(), taken);
    bench.answers(0, 40);
    assert_eq!(bench.pair.counters().needs_bounce, 40);
    assert!(bench.lanes[0].details.allocated() <= MOST_SPARE);
    // The same for such as need no copies.
    let scattered: Vec<_> = (0..60).map(|k| writable(DATA + 8192 * k, 4096)).collect();
    for _ in 0..10 {
        bench.read(0, &scattered);
        bench.answers(0, 1);
    }
    let details = &bench.lanes[0].details;
    assert!(details.allocated() <= MOST_SPARE && details.has_room(1 << 20, 0), "nothing is kept for them");
}
