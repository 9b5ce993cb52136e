//! Opening and closing controllers of all sorts.

use std::time::{Duration, Instant};

use nvme_driver::spec::command;
use nvme_driver::{Controller, Error, Options, QueuePairOptions};
use nvme_sim::{Config, FaultAction, FaultPlan, PowerLoss};

use crate::{PROMPT, Rig, assert_names_register, disk, small, works, write_and_verify};

#[test]
fn a_controller_says_what_it_is() {
    let rig = Rig::new(Config { serial: "SN 42".into(), max_transfer: Some(128 << 10), ..small() });
    let controller = rig.open();
    let identity = controller.identity();
    assert_eq!(identity.serial, "SN 42");
    assert!(!identity.model.is_empty() && identity.model.is_ascii());
    assert_eq!(identity.max_transfer, Some(128 << 10));
    assert!(identity.supports_discard && identity.supports_write_zeroes && identity.supports_compare);
    assert!(!identity.volatile_write_cache);
    assert_eq!(controller.namespaces().unwrap(), [1]);
    controller.health().unwrap();
    works(&controller, 1, 1);
}

#[test]
fn doorbells_far_apart() {
    for stride in [1, 4] {
        let rig = Rig::new(Config { doorbell_stride: stride, ..small() });
        let controller = rig.open();
        // The second queue pair's doorbells are where the stride shows.
        let first = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
        works(&controller, 1, stride);
        controller.delete_queue_pair(first).unwrap();
        drop(controller);
        let without = rig.try_open(&Options { shadow_doorbells: false, ..Default::default() }).unwrap();
        works(&without, 1, stride + 100);
        // Often enough for the controller to need the completion queue's doorbell.
        let namespace = without.namespace(1).unwrap();
        let mut pair = without.create_queue_pair(QueuePairOptions { entries: Some(4), interrupt: false }).unwrap();
        let memory = rig.device.dma().allocate(16384).unwrap();
        for round in 0..8 {
            write_and_verify(&mut pair, &namespace, &memory, 8, round);
        }
    }
}

#[test]
fn queues_within_what_the_controller_can_do() {
    for entries in [2, 3, 17] {
        let rig = Rig::new(Config { queue_entries: entries, ..small() });
        let controller = rig.open();
        let pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
        assert_eq!(pair.capacity(), entries as usize - 1, "one slot fewer than entries");
        controller.delete_queue_pair(pair).unwrap();
        works(&controller, 1, entries as u8);
    }
}

#[test]
fn no_more_queue_pairs_than_granted() {
    let rig = Rig::new(Config { max_queue_pairs: 2, ..small() });
    let controller = rig.open();
    assert_eq!(controller.max_queue_pairs(), 2);
    let first = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let second = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    assert_eq!((first.id(), second.id()), (1, 2));
    let error = controller.create_queue_pair(QueuePairOptions::default()).unwrap_err();
    assert!(matches!(error, Error::NoQueuePairsLeft { granted: 2 }), "{error}");
    controller.delete_queue_pair(first).unwrap();
    assert_eq!(
        controller.create_queue_pair(QueuePairOptions::default()).unwrap().id(),
        1,
        "identifiers are used again"
    );
    drop(controller);

    let controller = rig.try_open(&Options { max_queue_pairs: 1, ..Default::default() }).unwrap();
    assert_eq!(controller.max_queue_pairs(), 1, "no more than asked for");
}

#[test]
fn never_ready_is_an_error_within_the_deadline() {
    let faults = FaultPlan { never_ready: true, ..Default::default() };
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), faults, ..small() });
    let start = Instant::now();
    let error = rig.try_open(&Options::default()).unwrap_err();
    let waited = start.elapsed();
    assert_names_register(&error, "CSTS", 0);
    assert!(error.to_string().contains("500ms"), "{error}");
    assert!(waited >= Duration::from_millis(500) && waited < PROMPT, "{waited:?}");

    // It is not broken for good.
    rig.simulator.faults().change(|plan| plan.never_ready = false);
    works(&rig.open(), 1, 3);
}

#[test]
fn slow_to_become_ready_is_no_error() {
    let faults = FaultPlan { ready_delay: Duration::from_millis(300), ..Default::default() };
    let rig = Rig::new(Config { ready_timeout: Duration::from_secs(10), faults, ..small() });
    let start = Instant::now();
    let controller = rig.open();
    assert!(start.elapsed() >= Duration::from_millis(300));
    works(&controller, 1, 4);
}

/// A drive that promises half a second, and takes longer just now.
#[test]
fn slower_than_it_says_is_no_error() {
    let faults = FaultPlan { ready_delay: Duration::from_millis(1500), ..Default::default() };
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), faults, ..small() });
    let controller = Controller::open(&rig.device, &Options::default()).unwrap();
    controller.reset().unwrap();
    works(&controller, 1, 4);
}

#[test]
fn a_drive_is_left_alone_after_it_was_disabled_if_it_has_to_be() {
    let rig = Rig::new(small());
    let rest = Duration::from_millis(400);
    let controller = rig.try_open(&Options { rest_after_disable: Some(rest), ..Default::default() }).unwrap();
    let start = Instant::now();
    controller.reset().unwrap();
    assert!(start.elapsed() >= rest);
    works(&controller, 1, 4);
}

#[test]
fn never_reset_is_an_error_within_the_deadline() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    // A previous user that is gone without a word leaves the controller enabled.
    std::mem::forget(rig.open());
    rig.simulator.faults().change(|plan| plan.never_reset = true);
    let start = Instant::now();
    let error = rig.try_open(&Options::default()).unwrap_err();
    assert_names_register(&error, "CSTS", 1);
    assert!(start.elapsed() < PROMPT);
}

#[test]
fn a_controller_left_enabled_is_taken_over() {
    let rig = Rig::new(small());
    let previous = rig.open();
    let pair = previous.create_queue_pair(QueuePairOptions::default()).unwrap();
    std::mem::forget((previous, pair));
    works(&rig.open(), 1, 5);
}

#[test]
fn bring_up_that_fails_half_way_leaves_nothing_behind() {
    use nvme_driver::spec::command::admin;
    let rig = Rig::new(small());
    for opcode in [admin::IDENTIFY, admin::SET_FEATURES] {
        rig.admin_fault(opcode, FaultAction::Fail(nvme_sim::Status::new(0, 0x06).not_to_be_retried()), 1);
        let error = rig.try_open(&Options::default()).unwrap_err();
        assert_eq!(error.status().map(|status| status.name()), Some("Internal Error"), "{error}");
        works(&rig.open(), 1, opcode);
    }
}

#[test]
fn fatal_while_becoming_ready() {
    let faults = FaultPlan { fatal: true, ..Default::default() };
    let rig = Rig::new(Config { ready_timeout: Duration::from_secs(20), faults, ..small() });
    let start = Instant::now();
    let error = rig.try_open(&Options::default()).unwrap_err();
    let Error::Register { register: "CSTS", value, .. } = error else { panic!("{error}") };
    assert!(value & 2 != 0, "CFS is in the value: {error}");
    assert!(error.to_string().contains("CFS"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10), "not by waiting for the deadline");
}

#[test]
fn a_controller_that_is_gone_reads_all_ones() {
    let rig = Rig::new(small());
    let controller = rig.open();
    rig.simulator.remove();
    assert_names_register(&controller.health().unwrap_err(), "CSTS", 0xffff_ffff);
    // While a command waits it is noticed long before the command's deadline.
    let start = Instant::now();
    let error = controller.namespaces().unwrap_err();
    assert_names_register(&error, "CSTS", 0xffff_ffff);
    assert!(start.elapsed() < PROMPT);
    let error = controller.health_log().unwrap_err();
    assert!(matches!(error, Error::NotInOperation { .. }), "{error}");
    let start = Instant::now();
    drop(controller);
    assert!(start.elapsed() < PROMPT, "closing does not wait for a device that is gone");

    let error = rig.try_open(&Options::default()).unwrap_err();
    let Error::Gone { value, .. } = &error else { panic!("{error}") };
    assert!(value.count_ones() >= 24, "{error}");

    rig.simulator.reinsert().unwrap();
    works(&rig.open(), 1, 6);
}

#[test]
fn shutdown_saves_the_write_cache() {
    let rig = Rig::new(Config { volatile_write_cache: true, ..small() });
    let write = |controller: &Controller, byte: u8| {
        let mut disk = controller.blocking(1, Duration::from_secs(10)).unwrap();
        disk.write(100, &[byte; 4096]).unwrap();
    };
    let read = || {
        let mut block = [0; 512];
        rig.open().blocking(1, Duration::from_secs(10)).unwrap().read(100, &mut block).unwrap();
        block[0]
    };

    // Without a shutdown the power cut takes what was not flushed: the test can fail.
    let controller = rig.open();
    write(&controller, 1);
    assert!(rig.simulator.power_cut_losing(PowerLoss::All).unwrap() > 0);
    drop(controller);
    assert_eq!(read(), 0);

    let controller = rig.open();
    write(&controller, 2);
    controller.shutdown().unwrap();
    assert_eq!(rig.simulator.power_cut_losing(PowerLoss::All).unwrap(), 0);
    assert!(matches!(controller.namespaces(), Err(Error::NotInOperation { .. })));
    drop(controller);
    assert_eq!(read(), 2);

    // Dropping the last handle does the same.
    let controller = rig.open();
    write(&controller, 3);
    drop(controller.clone());
    controller.health().unwrap();
    drop(controller);
    assert_eq!(rig.simulator.power_cut_losing(PowerLoss::All).unwrap(), 0);
    assert_eq!(read(), 3);
}

#[test]
fn a_shutdown_that_hangs_is_an_error_within_the_deadline() {
    let rig = Rig::new(Config { faults: FaultPlan { shutdown_hangs: true, ..Default::default() }, ..small() });
    let controller =
        rig.try_open(&Options { shutdown_timeout: Duration::from_millis(300), ..Default::default() }).unwrap();
    let start = Instant::now();
    let error = controller.shutdown().unwrap_err();
    let Error::Register { register: "CSTS", value, .. } = error else { panic!("{error}") };
    assert_ne!(value >> 2 & 3, 2, "SHST does not say complete");
    assert!(error.to_string().contains("shutdown"), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < PROMPT);
}

#[test]
fn two_controllers_in_one_process() {
    let first = Rig::new(Config { serial: "ONE".into(), ..small() });
    let second = Rig::new(Config { serial: "TWO".into(), namespaces: vec![disk(16 << 20, 4096)], ..small() });
    let (one, two) = (first.open(), second.open());
    assert_eq!((one.identity().serial.as_str(), two.identity().serial.as_str()), ("ONE", "TWO"));
    works(&one, 1, 7);
    works(&two, 1, 8);

    let pair = one.create_queue_pair(QueuePairOptions::default()).unwrap();
    let error = two.delete_queue_pair(pair).unwrap_err();
    assert!(error.to_string().contains("does not belong"), "{error}");

    drop(one);
    works(&two, 1, 9);
}

#[test]
fn shadow_doorbells_are_used_when_both_sides_want_them() {
    for (offered, wanted) in [(true, true), (true, false), (false, true)] {
        let rig = Rig::new(Config { shadow_doorbells: offered, ..small() });
        let controller = rig.try_open(&Options { shadow_doorbells: wanted, ..Default::default() }).unwrap();
        assert_eq!(controller.uses_shadow_doorbells(), offered && wanted);
        works(&controller, 1, 10);
        // Again after a reset, which makes the controller forget them.
        controller.reset().unwrap();
        works(&controller, 1, 11);
    }
}

#[test]
fn options_that_make_no_sense() {
    let rig = Rig::new(small());
    for options in
        [Options { max_queue_pairs: 0, ..Default::default() }, Options { queue_entries: 1, ..Default::default() }]
    {
        assert!(matches!(rig.try_open(&options), Err(Error::Invalid(_))));
    }
    let controller = rig.open();
    let error = controller.create_queue_pair(QueuePairOptions { entries: Some(1), interrupt: false }).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
}

#[test]
fn shadow_doorbells_that_are_refused_are_done_without() {
    let rig = Rig::new(Config { shadow_doorbells: true, ..small() });
    rig.admin_fault(command::admin::DOORBELL_BUFFER_CONFIG, FaultAction::Fail(nvme_sim::Status::new(0, 0x06)), 1);
    let controller = rig.open();
    assert!(!controller.uses_shadow_doorbells());
    works(&controller, 1, 1);
    controller.reset().unwrap();
    works(&controller, 1, 2);
}
