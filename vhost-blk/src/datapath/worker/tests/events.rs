//! Eventfds of front-ends that do as they like.

use super::*;

/// The flags of an eventfd and its counter are the front-end's, at any time.
#[test]
fn an_eventfd_that_blocks_stops_nobody() {
    let machine = Machine::new(config());
    let guest = &machine.guest;
    let (pool, pair) = one_worker(&machine);
    let disk = Arc::new(machine.disk());
    let mut odd = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 0, false, 16), &disk);
    let mut neighbour = RunningLane::start(&pool, pair, guest, TestClient::new(guest, 1, true, 16), &disk);
    until("the start", || (count(&odd.client.call) == 1).then_some(()));
    let flags = rustix::fs::fcntl_getfl(&odd.client.call).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "the front-end's flags are left alone");
    for full in [&odd.client.call, &odd.client.kick, &odd.client.error] {
        rustix::io::write(full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    }
    for sector in 0..50 {
        odd.client.driver.ask_for_calls(guest, true);
        odd.client.send(guest, 0, sector, &[writable(DATA, 4096)]).unwrap();
        // Only the neighbour kicks, and both are on one worker.
        assert_eq!(neighbour.run(guest, 0, sector, &[writable(DATA + 4096, 4096)]).0, OK);
        until("the odd one's answer", || odd.client.answer(guest));
        if sector % 10 == 0 {
            until("sleep", || neighbour.asleep(guest).then_some(()));
        }
    }
    assert!(odd.client.counters.read().calls > 1, "it was signalled");
    // Its error eventfd is full, too.
    guest.write_u16(odd.client.driver.setup.driver + 2, 1000);
    rustix::io::read(&odd.client.kick, &mut [0; 8]).unwrap();
    rustix::io::write(&odd.client.kick, &1u64.to_ne_bytes()).unwrap();
    until("the end of its ring", || odd.handle().broken().then_some(()));
    assert_eq!(neighbour.run(guest, 0, 0, &[writable(DATA + 4096, 4096)]).0, OK);
    for running in [&mut odd, &mut neighbour] {
        running.handle.take().unwrap().stop(DEADLINE).unwrap();
    }
    pool.shutdown(DEADLINE).unwrap();
}

/// Nothing forbids it, and each ring has to see each kick.
#[test]
fn one_kick_may_wake_two_rings() {
    for workers in [&[0][..], &[0, 1]] {
        let machine = Machine::new(config());
        let guest = &machine.guest;
        let pool = WorkerPool::start(workers).unwrap();
        let disk = Arc::new(machine.disk());
        let kick = event();
        let mut rings: Vec<RunningLane> = (0..2)
            .map(|k| {
                let (pair, bounce) = machine.pair(16);
                let pair = pool.add_queue_pair(k % workers.len(), QueueResources { pair, pool: bounce });
                let mut client = TestClient::new(guest, k as u64, k == 1, 16);
                client.kick = kick.try_clone().unwrap();
                RunningLane::start(&pool, pair, guest, client, &disk)
            })
            .collect();
        for round in 0..50 {
            until("sleep", || rings.iter().all(|ring| ring.asleep(guest)).then_some(()));
            // Both have something to do, or one of them.
            let with_work: Vec<usize> = (0..2).filter(|k| round % 3 != k + 1).collect();
            for k in &with_work {
                rings[*k].client.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
            }
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            for k in &with_work {
                assert_eq!(until("an answer", || rings[*k].client.answer(guest)).1, OK, "round {round}");
            }
        }
        for ring in &mut rings {
            ring.handle.take().unwrap().stop(DEADLINE).unwrap();
            assert!(ring.client.counters.read().kicks > 0);
        }
        pool.shutdown(DEADLINE).unwrap();
    }
}
