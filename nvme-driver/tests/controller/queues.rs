//! Queue pairs: made, given back, lost, with interrupts.

use std::time::Instant;

use nvme_driver::spec::command;
use nvme_driver::{Completions, Error, Options, QueuePairOptions, Segment, Status, Work};
use nvme_sim::{Config, FaultAction};

use crate::{DEADLINE, Rig, complete, small, works, write_and_verify};

#[test]
fn all_granted_pairs_work_at_once() {
    let rig = Rig::new(Config { max_queue_pairs: 9, ..small() });
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut pairs: Vec<_> =
        (0..9).map(|_| controller.create_queue_pair(QueuePairOptions::default()).unwrap()).collect();
    for (at, pair) in pairs.iter_mut().enumerate() {
        assert_eq!(usize::from(pair.id()), at + 1);
        write_and_verify(pair, &namespace, &memory, 64 * at as u64, at as u8);
    }
    // Given back in any order, the identifiers are taken again.
    for at in [7, 0, 3] {
        controller.delete_queue_pair(pairs.remove(at)).unwrap();
    }
    let mut again: Vec<u16> = (0..3)
        .map(|_| controller.create_queue_pair(QueuePairOptions::default()).unwrap())
        .map(|pair| pair.id())
        .collect();
    again.sort();
    assert_eq!(again, [1, 5, 8]);
}

/// All queue pairs that the controller grants; interrupts cost a file descriptor each and are made for some.
#[test]
fn more_pairs_than_interrupts() {
    let rig = Rig::new(Config { max_queue_pairs: 150, ..small() });
    let controller = rig.open();
    assert_eq!(controller.max_queue_pairs(), 150);
    let create = |interrupt| controller.create_queue_pair(QueuePairOptions { entries: Some(2), interrupt });
    let mut pairs: Vec<_> = (0..64).map(|_| create(true).unwrap()).collect();
    assert!(matches!(create(true), Err(Error::NoInterruptsLeft { vectors: 64 })));
    pairs.extend((64..80).map(|_| create(false).unwrap()));
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    write_and_verify(pairs.last_mut().expect("there are some"), &namespace, &memory, 8, 1);
}

#[test]
fn dropped_pairs_are_deleted_when_their_place_is_needed() {
    let rig = Rig::new(Config { max_queue_pairs: 2, ..small() });
    let controller = rig.open();
    for round in 0..6 {
        let pair = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: round % 2 == 0 }).unwrap();
        drop(pair);
        works(&controller, 1, round);
    }
}

#[test]
fn a_pair_the_controller_refuses_leaves_no_trace() {
    let rig = Rig::new(Config { max_queue_pairs: 1, ..small() });
    let controller = rig.open();
    let status = nvme_sim::Status::new(1, 0x02);
    for opcode in [command::admin::CREATE_CQ, command::admin::CREATE_SQ] {
        rig.admin_fault(opcode, FaultAction::Fail(status), 1);
        let error = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: true }).unwrap_err();
        assert_eq!(error.status().map(|status| status.name()), Some("Invalid Queue Size"), "{error}");
        assert!(error.to_string().contains("Queue 1 of"), "{error}");
        works(&controller, 1, opcode);
    }
    let pair = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: true }).unwrap();
    assert!(pair.interrupt().is_some(), "the vector was given back");
}

#[test]
fn deleting_a_pair_with_requests_outstanding() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let hour = std::time::Duration::from_secs(3600);
    rig.io_fault(command::io::READ, FaultAction::Delay(hour..=hour), 3);
    let memory = rig.device.dma().allocate(4096).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    for token in 0..3 {
        let segment = [Segment { iova: memory.iova(), bytes: 512 }];
        pair.submit(&namespace, Work::Read { lba: token, segments: &segment }, token).unwrap();
    }
    pair.ring();
    rig.wait_for_faults(3);
    controller.delete_queue_pair(pair).unwrap();
    works(&controller, 1, 1);
}

#[test]
fn an_interrupt_tells_of_completions() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut first = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: true }).unwrap();
    let mut second = controller.create_queue_pair(QueuePairOptions { entries: Some(8), interrupt: true }).unwrap();
    for pair in [&mut first, &mut second] {
        pair.set_completions(Completions::Interrupt);
        assert_eq!(pair.completions(), Completions::Interrupt);
        for token in 0..5 {
            let segment = [Segment { iova: memory.iova(), bytes: 4096 }];
            pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, token).unwrap();
            pair.ring();
            let start = Instant::now();
            // Nothing is reaped before the eventfd has told.
            while pair.interrupt().expect("made with one").read().is_err() {
                assert!(start.elapsed() < DEADLINE, "no interrupt");
                std::thread::yield_now();
            }
            assert_eq!(complete(pair, 1), [(token, Status::SUCCESS)]);
        }
        // Polling again, on the same pair.
        pair.set_completions(Completions::Polling);
        write_and_verify(pair, &namespace, &memory, 0, 9);
    }
}

#[test]
fn no_interrupts_when_they_were_not_wanted() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&Options { interrupts: false, ..Default::default() }).unwrap();
    let error = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: true }).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    works(&controller, 1, 1);
}

/// A controller may grant another number of queue pairs each time that it is reset.
#[test]
fn as_many_pairs_as_are_granted_after_a_reset() {
    let rig = Rig::new(Config { max_queue_pairs: 4, ..small() });
    let controller = rig.open();
    let create = || controller.create_queue_pair(QueuePairOptions::default());
    let mut pairs: Vec<_> = (0..4).map(|_| create().unwrap()).collect();
    rig.simulator.faults().change(|plan| plan.most_queues = Some(2));
    // Whoever has one that is not granted any more could not go on with it.
    let error = controller.reset().unwrap_err();
    assert!(error.to_string().contains("grants 2 queue pairs, and granted 4 before"), "{error}");
    pairs.truncate(2);
    controller.reset().unwrap();
    assert_eq!(controller.max_queue_pairs(), 2);
    pairs.iter_mut().for_each(|pair| controller.recreate_queue_pair(pair).unwrap());
    assert!(matches!(create(), Err(Error::NoQueuePairsLeft { granted: 2 })));
    rig.simulator.faults().change(|plan| plan.most_queues = None);
    controller.reset().unwrap();
    assert_eq!(controller.max_queue_pairs(), 4);
    pairs.iter_mut().for_each(|pair| controller.recreate_queue_pair(pair).unwrap());
    pairs.extend((0..2).map(|_| create().unwrap()));
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    for (pair, seed) in pairs.iter_mut().zip(1..) {
        write_and_verify(pair, &namespace, &memory, 8, seed);
    }
}
