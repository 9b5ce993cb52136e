//! Lanes that change places, and workers, while the drive is away.

use super::*;

/// What waits for the drive goes along, what is told to a lane finds it, and a stop that has begun ends.
#[test]
fn lanes_without_a_drive_go_on_at_another_place_of_any_worker() {
    for (to, packed) in [(0, false), (0, true), (1, false), (1, true)] {
        let machine = Machine::new(Config { volatile_write_cache: true, ..config() });
        let guest = &machine.guest;
        let pool = WorkerPool::start(&[0, 1]).unwrap();
        let [mut from, mut into] = [0, to].map(|worker| {
            let (pair, bounce) = machine.pair(32);
            pool.add_queue_pair(worker, QueueResources { pair, pool: bounce })
        });
        let disk = Arc::new(machine.disk());
        let mut lanes: Vec<RunningLane> = (0..3)
            .map(|k| {
                let place = if k < 2 { from } else { into };
                RunningLane::start(&pool, place, guest, TestClient::new(guest, k, packed, 32), &disk)
            })
            .collect();
        for round in 0..3 {
            machine.sim.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
            let lost = machine.sim.faults().fired();
            for (lane, k) in lanes.iter_mut().zip(0..) {
                let data = pattern(10 * round + k, 4096);
                guest.write(DATA + 8192 * k, &data);
                lane.send(guest, 1, 8 * k, &[readable(DATA + 8192 * k, 4096)]).unwrap();
                lane.send(guest, 1, 800, &[readable(DATA, 512), readable(DATA + 4096, 3584)]).unwrap();
                lane.send(guest, 4, 0, &[]).unwrap();
            }
            until("the drive has all", || (machine.sim.faults().fired() == lost + 9).then_some(()));
            machine.sim.faults().clear();
            machine.controller.reset().unwrap();
            let mut ways = [from, into].map(|place| pool.detach_drive(place).unwrap().expect("it was there").resources);
            let stopping = (round == 2).then(|| lanes[1].handle.take().unwrap().begin_stop());
            for lane in &mut lanes {
                // What has come since.
                lane.send(guest, 0, 0, &[writable(DATA + 0x10_0000, 4096)]).unwrap();
            }
            pool.fold(from, into).unwrap();
            assert!(pool.take_queue_pair(from).unwrap().is_none(), "nobody is there any more");
            let homes: Vec<_> = lanes.iter().filter_map(|lane| Some(lane.handle.as_ref()?.worker())).collect();
            assert!(homes.iter().all(|worker| *worker == into.worker), "{homes:?}");
            let call = event();
            lanes[0].handle().set_call(Some(call.try_clone().unwrap()));
            until("the lane has been told", || (count(&call) > 0).then_some(()));
            lanes[0].handle().set_memory(guest.memory.clone()).unwrap();
            assert!(lanes.iter_mut().all(|lane| lane.client.answer(guest).is_none()), "the drive is away");
            ways.iter_mut().for_each(|way| machine.controller.recreate_queue_pair(&mut way.pair).unwrap());
            let [other, way] = ways;
            pool.reattach_drive(into, way);
            for (k, lane) in lanes.iter_mut().enumerate() {
                // A lane that stops takes nothing more.
                let expected = if stopping.is_some() && k == 1 { 3 } else { 4 };
                for _ in 0..expected {
                    assert_eq!(until("an answer", || lane.client.answer(guest)).1, OK);
                }
            }
            if let Some(stopping) = stopping {
                assert!(!stopping.wait(DEADLINE).unwrap().broken);
            }
            for (lane, k) in lanes.iter_mut().zip(0..) {
                if lane.handle.is_some() {
                    until("sleep", || lane.asleep(guest).then_some(()));
                    let read = writable(DATA + 8192 * k + 4096, 4096);
                    assert_eq!(lane.run(guest, 0, 8 * k, &[read]), (OK, 4097));
                    assert!(guest.read(DATA + 8192 * k + 4096, 4096) == pattern(10 * round + k, 4096));
                }
            }
            // And back.
            let empty = pool.add_queue_pair(from.worker, other);
            (from, into) = (into, empty);
        }
        for lane in &mut lanes {
            lane.handle.take().into_iter().for_each(|handle| _ = handle.stop(DEADLINE).unwrap());
        }
        assert!(pool.homes.lanes().is_empty(), "what has stopped is forgotten");
        assert!(pool.take_queue_pair(from).unwrap().is_some() && pool.take_queue_pair(into).unwrap().is_some());
    }
}

/// A lane that was on its way to another place when the drive went is there when it is back.
#[test]
fn a_move_is_done_while_the_drive_is_away() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let pool = WorkerPool::start(&[]).unwrap();
    let [from, into] = [(); 2].map(|()| {
        let (pair, bounce) = machine.pair(32);
        pool.add_queue_pair(0, QueueResources { pair, pool: bounce })
    });
    let mut running =
        RunningLane::start(&pool, from, guest, TestClient::new(guest, 0, false, 16), &Arc::new(machine.disk()));
    machine.sim.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
    running.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    until("the drive has it", || (machine.sim.faults().fired() == 1).then_some(()));
    pool.move_lane(running.handle().id(), into);
    assert!(matches!(pool.take_queue_pair(from), Err(WorkerError::InUse)));
    machine.sim.faults().clear();
    machine.controller.reset().unwrap();
    let [_, mut lost] = [from, into].map(|place| pool.detach_drive(place).unwrap());
    until("the place it left", || pool.take_queue_pair(from).ok());
    let mut way = lost.take().expect("it was there").resources;
    machine.controller.recreate_queue_pair(&mut way.pair).unwrap();
    pool.reattach_drive(into, way);
    assert_eq!(until("an answer", || running.client.answer(guest)).1, OK);
    assert_eq!(running.run(guest, 0, 0, &[writable(DATA, 4096)]).0, OK);
    running.handle.take().unwrap().stop(DEADLINE).unwrap();
}
