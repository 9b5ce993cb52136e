//! Completions by interrupt, by polling, and changing between the two.

use std::time::Instant;

use nvme_driver::controller::{Options, QueuePairOptions};
use nvme_driver::{Completions, QueuePair, Work};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::setup::{DEADLINE, Rig, config, rig, segment};

fn pair(rig: &Rig) -> QueuePair {
    let options = QueuePairOptions { entries: Some(64), interrupt: true };
    rig.controller.create_queue_pair(options).unwrap()
}

struct Waiter(Epoll);

impl Waiter {
    fn new(pair: &QueuePair) -> Waiter {
        let epoll = Epoll::new().unwrap();
        let event = pair.interrupt().expect("made with an interrupt");
        epoll
            .ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(event), EpollEvent::new(EventSet::IN, 0))
            .unwrap();
        Waiter(epoll)
    }

    fn wait(&self) {
        let mut events = [EpollEvent::default()];
        let ready = self.0.wait(DEADLINE.as_millis() as i32, &mut events).unwrap();
        assert_eq!(ready, 1, "no interrupt came");
    }
}

/// Submits `count` reads in batches of `batch` and waits for each batch.
fn run(rig: &Rig, pair: &mut QueuePair, waiter: &Waiter, count: u64, batch: u64) {
    let buffer = rig.buffer(4096);
    let mut done = 0;
    while done < count {
        for lba in 0..batch {
            pair.submit(&rig.namespace, Work::Read { lba, segments: &[segment(&buffer, 0, 512)] }, lba).unwrap();
        }
        pair.ring();
        let mut seen = 0;
        let start = Instant::now();
        while seen < batch {
            assert!(start.elapsed() < DEADLINE);
            match pair.completions() {
                Completions::Interrupt => {
                    waiter.wait();
                    pair.acknowledge_interrupt();
                }
                Completions::Polling => std::thread::yield_now(),
            }
            seen += pair.reap(|completed| assert!(completed.status.is_success())) as u64;
        }
        done += batch;
    }
}

#[test]
fn every_batch_is_announced_by_an_interrupt() {
    let rig = rig(config(512), &Options::default());
    let mut pair = pair(&rig);
    let waiter = Waiter::new(&pair);
    pair.set_completions(Completions::Interrupt);
    run(&rig, &mut pair, &waiter, 500, 1);
    run(&rig, &mut pair, &waiter, 3200, 32);
}

#[test]
fn nothing_is_missed_when_changing_while_commands_are_out() {
    let rig = rig(config(512), &Options::default());
    let mut pair = pair(&rig);
    let waiter = Waiter::new(&pair);
    let buffer = rig.buffer(4096);
    for round in 0..200u64 {
        run(&rig, &mut pair, &waiter, 8, 8);
        for lba in 0..8 {
            pair.submit(&rig.namespace, Work::Read { lba, segments: &[segment(&buffer, 0, 512)] }, lba).unwrap();
        }
        pair.ring();
        // Change at some moment while they complete.
        for _ in 0..round % 50 {
            std::hint::spin_loop();
        }
        let to = if round % 2 == 0 { Completions::Interrupt } else { Completions::Polling };
        let mut ready = pair.set_completions(to);
        assert_eq!(pair.completions(), to);
        let mut seen = 0;
        let start = Instant::now();
        while seen < 8 {
            assert!(start.elapsed() < DEADLINE);
            if to == Completions::Interrupt && !ready {
                waiter.wait();
                pair.acknowledge_interrupt();
            }
            ready = false;
            seen += pair.reap(|completed| assert!(completed.status.is_success()));
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_pair_without_an_interrupt_goes_on_polling() {
    let rig = rig(config(512), &Options::default());
    let mut pair = rig.pair(16);
    assert!(pair.interrupt().is_none());
    pair.set_completions(Completions::Interrupt);
    assert_eq!(pair.completions(), Completions::Polling);
}
