//! Workers, with real threads, on a simulated controller.

use std::sync::atomic::AtomicBool;

use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig};

use super::*;
use crate::blk::disk::Disk;
use crate::blk::request::{IOERR, OK};
use crate::datapath::lane::testing::{CLIENT_BYTES, DATA, DEADLINE, Machine, TestClient, count, event, pattern, until};
use crate::virtio::memory::DmaScope;
use crate::virtio::ring::model::{Guest, Random, readable, writable};

mod events;
mod fold;

fn config() -> Config {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() };
    Config { namespaces: vec![namespace], ..Config::default() }
}

/// A worker, and a slot on it with a queue pair of 64 entries.
fn one_worker(machine: &Machine) -> (WorkerPool, QueueSlotId) {
    let pool = WorkerPool::start(&[]).unwrap();
    let (pair, bounce) = machine.pair(64);
    let slot = pool.add_queue_pair(0, QueueResources { pair, pool: bounce });
    (pool, slot)
}

/// A guest's driver that kicks when it is asked to.
struct RunningLane {
    client: TestClient,
    handle: Option<LaneHandle>,
}

impl RunningLane {
    fn start(pool: &WorkerPool, pair: QueueSlotId, guest: &Guest, client: TestClient, disk: &Arc<Disk>) -> RunningLane {
        let handle = pool.start_lane(pair, client.lane(guest, disk));
        RunningLane { client, handle: Some(handle) }
    }

    fn send(
        &mut self,
        guest: &Guest,
        kind: u32,
        sector: u64,
        data: &[crate::virtio::ring::model::Piece],
    ) -> Option<u16> {
        let id = self.client.send(guest, kind, sector, data)?;
        if self.client.driver.kick_wanted(guest) {
            rustix::io::write(&self.client.kick, &1u64.to_ne_bytes()).unwrap();
        }
        Some(id)
    }

    fn run(&mut self, guest: &Guest, kind: u32, sector: u64, data: &[crate::virtio::ring::model::Piece]) -> (u8, u32) {
        let id = self.send(guest, kind, sector, data).expect("room in the ring");
        let answer = until("an answer", || self.client.answer(guest));
        assert_eq!(answer.0, id);
        (answer.1, answer.2)
    }

    fn handle(&self) -> &LaneHandle {
        self.handle.as_ref().unwrap()
    }

    /// Sleeping lanes want to be kicked.
    fn asleep(&self, guest: &Guest) -> bool {
        let setup = &self.client.driver.setup;
        match setup.packed {
            true => guest.read_u16(setup.device + 2) == 0,
            false => {
                // avail_event is what is available next.
                let event = guest.read_u16(setup.device + 4 + 8 * u64::from(setup.size));
                event == guest.read_u16(setup.driver + 2)
            }
        }
    }
}

#[test]
fn requests_go_through_a_worker_and_the_queue_pair_comes_back() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    let data = pattern(1, 4096);
    guest.write(DATA, &data);
    assert_eq!(running.run(guest, 1, 8, &[readable(DATA, 4096)]), (OK, 1));
    assert_eq!(running.run(guest, 0, 8, &[writable(DATA + 8192, 4096)]), (OK, 4097));
    assert!(guest.read(DATA + 8192, 4096) == data);
    assert!(matches!(pool.take_queue_pair(pair), Err(WorkerError::InUse)));
    let stopped = running.handle.take().unwrap().stop(DEADLINE).unwrap();
    assert_eq!((stopped.base, stopped.broken), (2, false));
    let pair = pool.take_queue_pair(pair).expect("nobody uses it").expect("it is there");
    machine.controller.delete_queue_pair(pair).unwrap();
    pool.shutdown(DEADLINE).unwrap();
    assert!(matches!(
        pool.detach_drive(QueueSlotId { worker: 0, index: 0, number: 0 }),
        Err(WorkerError::Gone { worker: 0 })
    ));
}

#[test]
fn a_lane_sleeps_when_nothing_happens_and_a_kick_wakes_it() {
    for packed in [false, true] {
        let machine = Machine::new(config());
        let guest = &machine.guest;
        let (pool, pair) = one_worker(&machine);
        let disk = Arc::new(machine.disk());
        let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, packed, 16), &disk);
        for round in 1..=20 {
            until("sleep", || running.asleep(guest).then_some(()));
            // It may be on its way: between asking for kicks and the last look. Either way it has to see this.
            assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]), (OK, 4097), "round {round}");
        }
        until("the last sleep", || running.asleep(guest).then_some(()));
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
        let kicks = running.client.counters.read().kicks;
        assert!((1..=20).contains(&kicks), "{kicks} kicks for 20 sleeps");
        assert!(count(&running.client.kick) >= kicks, "they are not read: that could block");
    }
}

#[test]
fn busy_lanes_need_no_kicks() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, true, 64), &disk);
    let mut done = 0;
    until("20000 answers", || {
        for k in 0..32 {
            running.send(guest, 0, 8 * k, &[writable(DATA + 4096 * k, 4096)]);
        }
        while let Some((_, status, _)) = running.client.answer(guest) {
            assert_eq!(status, OK);
            done += 1;
        }
        (done >= 20_000).then_some(())
    });
    until("the rest", || {
        while running.client.answer(guest).is_some() {}
        (running.client.in_flight() == 0).then_some(())
    });
    running.handle.take().unwrap().stop(DEADLINE).unwrap();
    let tally = running.client.counters.read();
    // A preempted test thread may leave the worker idle for long enough to sleep, rarely.
    assert!(tally.kicks < 200, "{} kicks", tally.kicks);
    assert_eq!(tally.calls, 1, "the driver polled: only at the start");
}

#[test]
fn memory_is_added_while_the_ring_runs() {
    let mut machine = Machine::new(config());
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let client = TestClient::new(&machine.guest, 0, false, 16);
    let mut running = RunningLane::start(&pool, pair, &machine.guest, client, &disk);
    let new = 0x1_0000_0000;
    for round in 0..20u64 {
        let at = new + round * 0x10_0000;
        // Not there yet, while another request is in flight.
        running.send(&machine.guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
        let scope = DmaScope::new(machine.device.dma().clone());
        let before = machine.guest.memory.clone();
        machine.guest.add(at, 0x10_0000, Some(&scope));
        running.handle().set_memory(machine.guest.memory.clone()).unwrap();
        let guest = &machine.guest;
        assert_eq!(until("an answer", || running.client.answer(guest)).1, OK);
        assert_eq!(running.run(guest, 0, 0, &[writable(at + 0xf_f000, 4096)]), (OK, 4097));
        assert_eq!(running.run(guest, 0, 0, &[writable(at + 0xf_f000, 8192)]).0, IOERR, "beyond the region");
        assert!(matches!(running.handle().set_memory(before), Err(WorkerError::NotSuperset)));
    }
    running.handle.take().unwrap().stop(DEADLINE).unwrap();
}

#[test]
fn stopping_waits_for_the_drive_and_the_ring_goes_on_from_its_base() {
    for packed in [false, true] {
        let machine = Machine::new(config());
        let guest = &machine.guest;
        let pool = WorkerPool::start(&[]).unwrap();
        let (pair, bounce) = machine.pair(4);
        let pair = pool.add_queue_pair(0, QueueResources { pair, pool: bounce });
        let disk = Arc::new(machine.disk());
        let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, packed, 16), &disk);
        let mut random = Random::new(5);
        let (mut sent, mut done) = (0, 0);
        for round in 0..50 {
            for _ in 0..random.below(12) {
                let k = sent % 64;
                sent += u64::from(running.send(guest, 0, 8 * k, &[writable(DATA + 4096 * k, 4096)]).is_some());
            }
            let stopped = running.handle.take().unwrap().stop(DEADLINE).unwrap();
            // Some were taken and answered, the others are still in the ring; a small pair leaves many.
            while let Some((_, status, _)) = running.client.answer(guest) {
                assert_eq!(status, OK);
                done += 1;
            }
            let lane = running.client.lane_at(guest, &disk, stopped.base);
            running.handle = Some(pool.start_lane(pair, lane));
            if round % 10 == 0 {
                until("everything", || {
                    while running.client.answer(guest).is_some() {
                        done += 1;
                    }
                    (done == sent).then_some(())
                });
            }
        }
        until("everything", || {
            while running.client.answer(guest).is_some() {
                done += 1;
            }
            (done == sent).then_some(())
        });
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
        assert_eq!(running.client.counters.read().reads, sent, "counters go on when a ring restarts");
    }
}

/// Its driver notices nothing.
#[test]
fn a_lane_moves_to_another_queue_pair_while_it_runs() {
    for packed in [false, true] {
        let machine = Machine::new(config());
        let guest = &machine.guest;
        let pool = WorkerPool::start(&[]).unwrap();
        let places = [(); 2].map(|()| {
            let (pair, bounce) = machine.pair(32);
            pool.add_queue_pair(0, QueueResources { pair, pool: bounce })
        });
        let disk = Arc::new(machine.disk());
        let client = TestClient::new(guest, 0, packed, 32);
        let mut running = RunningLane::start(&pool, places[0], guest, client, &disk);
        let lane = running.handle().id();
        let (mut sent, mut done, mut moves) = (0, 0, 0);
        until("200 moves", || {
            for _ in 0..8 {
                sent += u64::from(running.send(guest, 0, 8 * (sent % 64), &[writable(DATA, 4096)]).is_some());
            }
            while let Some((_, status, _)) = running.client.answer(guest) {
                assert_eq!(status, OK);
                done += 1;
            }
            if done > 20 * moves {
                moves += 1;
                // Where it was told last, however soon after another.
                pool.move_lane(lane, places[((moves + 1) % 2) as usize]);
                pool.move_lane(lane, places[(moves % 2) as usize]);
            }
            (moves == 200).then_some(())
        });
        until("the rest", || {
            while running.client.answer(guest).is_some() {
                done += 1;
            }
            (done == sent).then_some(())
        });
        // It is where it was told to go last, and sleeps and wakes there.
        until("the place it left", || pool.take_queue_pair(places[1]).ok());
        until("sleep", || running.asleep(guest).then_some(()));
        assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
        // To a place that is not there any more, and while it stops.
        pool.move_lane(lane, places[1]);
        assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
        pool.move_lane(lane, places[0]);
        assert!(pool.take_queue_pair(places[0]).unwrap().is_some());
    }
}

/// A worker looks at every place in each turn: there must not be more of them than are in use, however many there were.
#[test]
fn a_place_that_was_taken_away_is_used_again() {
    let machine = Machine::new(config());
    let pool = WorkerPool::start(&[]).unwrap();
    let kept = pool.add_empty_slot(0, false);
    let mut earlier = kept;
    for _ in 0..1000 {
        let (pair, bounce) = machine.pair(2);
        let first = pool.add_queue_pair(0, QueueResources { pair, pool: bounce });
        let second = pool.add_empty_slot(0, false);
        assert!(first.index != second.index && kept.index < 3 && first.index < 3 && second.index < 3);
        assert_ne!(first, earlier, "the same index is not the same place");
        earlier = first;
        let pair = pool.take_queue_pair(first).unwrap().expect("it is there");
        machine.controller.delete_queue_pair(pair).unwrap();
        assert!(pool.take_queue_pair(second).unwrap().is_none());
    }
}

#[test]
fn a_slow_drive_keeps_its_lane_until_it_has_answered() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    machine.sim.faults().add(FaultRule {
        action: FaultAction::Delay(Duration::from_millis(300)..=Duration::from_millis(300)),
        when: FaultMatch::default(),
    });
    let (pool, pair) = one_worker(&machine);
    let mut running =
        RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &Arc::new(machine.disk()));
    running.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    until("the drive has it", || (machine.sim.faults().fired() > 0).then_some(()));
    let busy = match running.handle.take().unwrap().stop(Duration::from_millis(20)) {
        Err(StopError::StillBusy(busy)) => busy,
        other => panic!("{other:?}"),
    };
    assert!(running.client.answer(guest).is_none());
    assert_eq!(busy.lane.wait(DEADLINE).unwrap().base, 1);
    assert_eq!(running.client.answer(guest).unwrap().1, OK);
}

#[test]
fn a_dead_drive_is_told_and_waited_for() {
    let options = Options { io_timeout: Duration::from_millis(200), ..Options::default() };
    let machine = Machine::with_options(Config { volatile_write_cache: true, ..config() }, &options);
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
    machine.sim.faults().add(FaultRule {
        action: FaultAction::LoseCompletion,
        when: FaultMatch { limit: Some(3), ..FaultMatch::default() },
    });
    // A plain request, one in two pieces, one without data, as each is kept in another way.
    let data = pattern(5, 8192);
    guest.write(DATA, &data);
    running.send(guest, 1, 8, &[readable(DATA, 4096)]).unwrap();
    running.send(guest, 1, 16, &[readable(DATA + 4096, 512), readable(DATA + 4608, 3584)]).unwrap();
    running.send(guest, 4, 0, &[]).unwrap();
    let mut told = 0;
    until("the expiry", || {
        for event in pool.events() {
            match event {
                WorkerEvent::Expired { slot: which, count, .. } => {
                    assert_eq!(which, pair);
                    told += count;
                }
                other => panic!("{other:?}"),
            }
        }
        (told == 3).then_some(())
    });
    assert!(running.client.answer(guest).is_none(), "nothing is answered while the drive may still write");
    machine.controller.reset().unwrap();
    let mut lost = pool.detach_drive(pair).unwrap().expect("it was there");
    assert!(pool.detach_drive(pair).unwrap().is_none(), "it has been taken");
    // What the guest has said stays said: its buffers' content and place count, not what its ring says now.
    running.send(guest, 0, 8, &[writable(DATA + 8192, 8192)]).unwrap();
    assert!(running.client.answer(guest).is_none(), "nothing is answered while the drive is away");
    machine.controller.recreate_queue_pair(&mut lost.resources.pair).unwrap();
    pool.reattach_drive(pair, lost.resources);
    for _ in 0..4 {
        assert_eq!(until("an answer", || running.client.answer(guest)).1, OK);
    }
    // The last one may have been read before the writes were done: nothing orders them.
    assert_eq!(running.run(guest, 0, 8, &[writable(DATA + 8192, 8192)]), (OK, 8193));
    assert!(guest.read(DATA + 8192, 8192) == data);
    assert_eq!(running.client.counters.read().again, 3);

    // Away once more, and this time for too long.
    machine.controller.reset().unwrap();
    let mut lost = pool.detach_drive(pair).unwrap().expect("it was there");
    running.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    pool.expire_hold(pair);
    assert_eq!(until("an answer", || running.client.answer(guest)).1, IOERR);
    assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]), (IOERR, 4097));
    // The same controller is back, and the lane goes on without having been touched.
    machine.controller.recreate_queue_pair(&mut lost.resources.pair).unwrap();
    pool.reattach_drive(pair, lost.resources);
    until("the drive", || (running.run(guest, 0, 8, &[writable(DATA, 4096)]).0 == OK).then_some(()));
    running.handle.take().unwrap().stop(DEADLINE).unwrap();
    assert!(pool.take_queue_pair(pair).unwrap().is_some());
}

#[test]
fn nothing_of_a_guest_that_the_drive_cannot_reach_goes_to_it() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
    machine.sim.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
    running.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    until("the drive has it", || (machine.sim.faults().fired() > 0).then_some(()));
    machine.controller.reset().unwrap();
    let mut lost = pool.detach_drive(pair).unwrap().expect("it was there");
    running.send(guest, 0, 8, &[writable(DATA + 4096, 4096)]).unwrap();
    machine.sim.faults().clear();
    let commands = machine.sim.counters().commands.load(Ordering::Relaxed);
    guest.memory.refuse();
    machine.controller.recreate_queue_pair(&mut lost.resources.pair).unwrap();
    pool.reattach_drive(pair, lost.resources);
    assert_eq!(until("an answer", || running.client.answer(guest)).1, IOERR);
    // What starts now, before the session has ended, is no better off.
    let mut other = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 1, false, 16), &disk);
    other.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    for running in [&mut running, &mut other] {
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
        assert!(running.client.answer(guest).is_none(), "it is left in the ring");
    }
    assert_eq!(machine.sim.counters().commands.load(Ordering::Relaxed), commands);
}

#[test]
fn a_lane_may_start_before_its_drive_is_there() {
    for packed in [false, true] {
        let machine = Machine::new(config());
        let guest = &machine.guest;
        let pool = WorkerPool::start(&[]).unwrap();
        let place = pool.add_empty_slot(0, true);
        let disk = Arc::new(machine.disk());
        let mut running = RunningLane::start(&pool, place, guest, TestClient::new(guest, 0, packed, 16), &disk);
        for _ in 0..3 {
            assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]), (IOERR, 4097));
            // It sleeps and is woken as with a drive.
            until("sleep", || running.asleep(guest).then_some(()));
        }
        assert_eq!(
            running.run(guest, 8, 0, &[writable(DATA, 20)]).0,
            OK,
            "the serial number is known without the drive"
        );
        let (pair, bounce) = machine.pair(64);
        pool.reattach_drive(place, QueueResources { pair, pool: bounce });
        until("the drive", || (running.run(guest, 0, 0, &[writable(DATA, 4096)]).0 == OK).then_some(()));
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
        assert!(pool.take_queue_pair(place).unwrap().is_some());
        let empty = pool.add_empty_slot(0, false);
        assert!(pool.take_queue_pair(empty).unwrap().is_none(), "nothing was put there");
    }
}

#[test]
fn eventfds_can_be_replaced() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let mut running =
        RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &Arc::new(machine.disk()));
    until("the eventfd is signalled at the start", || (count(&running.client.call) == 1).then_some(()));
    let call = event();
    running.handle().set_call(Some(call.try_clone().unwrap()));
    until("the new eventfd is signalled", || (count(&call) != 0).then_some(()));
    running.client.driver.ask_for_calls(guest, true);
    assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
    until("a call", || (count(&call) != 0).then_some(()));
    assert_eq!(count(&running.client.call), 0);
    running.client.kick = event();
    running.handle().set_kick(Some(running.client.kick.try_clone().unwrap()));
    for _ in 0..5 {
        until("sleep", || running.asleep(guest).then_some(()));
        assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
    }
    // Without an eventfd the lane is polled: nobody kicks.
    running.handle().set_kick(None);
    for _ in 0..50 {
        running.client.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
        assert_eq!(until("an answer", || running.client.answer(guest)).1, OK);
    }
}

#[test]
fn broken_rings_are_told() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut running = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    guest.write_u16(running.client.driver.setup.driver + 2, 1000);
    rustix::io::write(&running.client.kick, &1u64.to_ne_bytes()).unwrap();
    until("the error eventfd is written", || (count(&running.client.error) == 1).then_some(()));
    assert!(running.handle().broken());
    assert!(running.handle.take().unwrap().stop(DEADLINE).unwrap().broken);
    // After a reset of the device the ring is served again.
    let mut again = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    assert_eq!(again.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
}

#[test]
fn shutdown_answers_what_is_in_flight() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    machine.sim.faults().add(FaultRule {
        action: FaultAction::Delay(Duration::from_millis(100)..=Duration::from_millis(100)),
        when: FaultMatch::default(),
    });
    let (pool, pair) = one_worker(&machine);
    let mut running =
        RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, true, 16), &Arc::new(machine.disk()));
    running.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    until("the drive has it", || (machine.sim.faults().fired() > 0).then_some(()));
    let handle = running.handle.take().unwrap();
    pool.shutdown(DEADLINE).unwrap();
    assert_eq!(running.client.answer(guest).expect("it was answered").1, OK);
    assert!(matches!(handle.stop(DEADLINE), Err(StopError::Gone { .. })));
}

#[test]
fn a_panic_is_not_silent() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let mut client = TestClient::new(guest, 0, true, 16);
    client.name = "worker panics";
    let running = RunningLane::start(&pool, pair, guest, client, &Arc::new(machine.disk()));
    running.handle().set_call(None);
    match until("the event", || pool.events().pop()) {
        WorkerEvent::WorkerDied { worker: 0, message } => assert_eq!(message, "asked to by a test"),
        other => panic!("{other:?}"),
    }
    assert!(running.handle().broken());
    assert!(matches!(running.handle().set_memory(guest.memory.clone()), Err(WorkerError::Gone { worker: 0 })));
    assert!(matches!(running.handle.unwrap().stop(DEADLINE), Err(StopError::Gone { .. })));
}

#[test]
fn workers_are_pinned_to_cpus_that_exist() {
    match WorkerPool::start(&[100_000]) {
        Err(WorkerError::Pin { cpu: 100_000, .. }) => {}
        other => panic!("{:?}", other.map(|pool| pool.len())),
    }
    // One that is there does the work of one that is not.
    let pool = WorkerPool::start(&[1000, 0]).unwrap();
    assert_eq!((pool.len(), pool.unpinned().len()), (1, 1));
    // No machine has that node; whether CPU 0 is known to be on another is the machine's.
    let Cpus { near, far, spared } = pool.placement().cpus(u32::MAX);
    assert_eq!(([near, far].concat(), spared), (vec![0], vec![]), "only workers that there are");
    assert!(pool.unpinned()[0].to_string().contains("CPU 1000"));
    assert!(super::try_cpu(0).is_ok() && super::try_cpu(1000).is_err());
    let pool = WorkerPool::start(&[0]).unwrap();
    assert_eq!((pool.len(), pool.unpinned().len()), (1, 0));
}

#[test]
fn many_lanes_on_two_workers() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let pool = WorkerPool::start(&[0, 1]).unwrap();
    let disk = Arc::new(Disk { writeback: Arc::new(AtomicBool::new(true)), ..machine.disk() });
    let pairs: Vec<QueueSlotId> = (0..2)
        .map(|worker| {
            let (pair, bounce) = machine.pair(32);
            pool.add_queue_pair(worker, QueueResources { pair, pool: bounce })
        })
        .collect();
    const { assert!(4 * CLIENT_BYTES <= DATA) };
    let mut lanes: Vec<RunningLane> = (0..4)
        .map(|k| RunningLane::start(&pool, pairs[k as usize % 2], guest, TestClient::new(guest, k, k < 2, 32), &disk))
        .collect();
    for sector in 0..200u64 {
        guest.write(DATA + 512 * sector, &pattern(sector, 512));
    }
    assert_eq!(lanes[0].run(guest, 1, 0, &[readable(DATA, 200 * 512)]).0, OK);
    let mut expected = std::collections::HashMap::new();
    let mut random = Random::new(11);
    // Counted by lane: while one waits for its worker, the others may get far ahead, and its buffers are still in use.
    let (mut sent, mut done) = ([0u64; 4], 0);
    until("4000 answers", || {
        for (k, lane) in lanes.iter_mut().enumerate() {
            let sector = random.below(200);
            let at = DATA + 0x10_0000 * (k as u64 + 1) + 512 * (sent[k] % 1000);
            if let Some(id) = lane.send(guest, 0, sector, &[writable(at, 512)]) {
                expected.insert((k, id), (sector, at));
                sent[k] += 1;
            }
            while let Some((id, status, _)) = lane.client.answer(guest) {
                assert_eq!(status, OK);
                let (sector, at) = expected.remove(&(k, id)).unwrap();
                assert!(guest.read(at, 512) == pattern(sector, 512), "lane {k} got another sector's data");
                done += 1;
            }
        }
        (done >= 4000).then_some(())
    });
    for lane in &mut lanes {
        lane.handle.take().unwrap().stop(DEADLINE).unwrap();
    }
}
