//! Commands that are not answered, fatal status, reset.

use std::time::{Duration, Instant};

use nvme_driver::spec::command;
use nvme_driver::{Controller, Error, Options, QueuePairOptions, Segment, Status, Work};
use nvme_sim::{Config, FaultAction};

use crate::{DEADLINE, PROMPT, Rig, assert_names_register, complete, small, works, write_and_verify};

fn impatient() -> Options {
    Options { admin_timeout: Duration::from_millis(300), ..Default::default() }
}

#[test]
fn an_admin_command_that_is_never_answered() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&impatient()).unwrap();
    rig.admin_fault(command::admin::IDENTIFY, FaultAction::LoseCompletion, 1);
    let start = Instant::now();
    let error = controller.namespaces().unwrap_err();
    let Error::Timeout { csts, .. } = &error else { panic!("{error}") };
    assert_eq!(*csts, 1, "ready, and silent");
    assert!(error.to_string().contains("Identify (active namespaces"), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < PROMPT);
    // Nothing more is sent until the reset: the answer may still come, into memory that is used again.
    assert!(matches!(controller.namespaces(), Err(Error::NotInOperation { .. })));
    controller.health().unwrap();
    controller.reset().unwrap();
    works(&controller, 1, 1);
}

/// Each in a place of its own, so that a late answer spoils nothing.
#[test]
fn a_question_that_is_not_answered_costs_nothing_else() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let short = Duration::from_millis(50);
    let monitor = controller.monitor(short);
    let healthy = controller.health_log().unwrap();
    rig.admin_fault(command::admin::GET_LOG_PAGE, FaultAction::LoseCompletion, 3);
    for _ in 0..3 {
        let start = Instant::now();
        let error = monitor.health_log().unwrap_err();
        assert!(matches!(error, Error::Unanswered { csts: 1, .. }), "{error}");
        assert!(start.elapsed() >= short && start.elapsed() < PROMPT);
        controller.in_operation().unwrap();
        works(&controller, 1, 1);
        assert_eq!(controller.namespaces().unwrap(), [1]);
    }
    assert_eq!(controller.health_log().unwrap().unsafe_shutdowns, healthy.unsafe_shutdowns);

    // Eight at a time are more than a controller that works leaves unanswered.
    rig.admin_fault(command::admin::IDENTIFY, FaultAction::LoseCompletion, 5);
    for lost in 4..=8 {
        controller.in_operation().unwrap();
        let error = monitor.namespaces().unwrap_err();
        assert!(matches!(error, Error::Unanswered { .. }), "{lost}: {error}");
    }
    assert!(matches!(controller.in_operation(), Err(Error::NotInOperation { .. })));
    controller.reset().unwrap();
    monitor.health_log().unwrap();
    works(&controller, 1, 2);
}

#[test]
fn a_late_answer_to_a_question_is_dropped() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let monitor = controller.monitor(Duration::from_millis(20));
    // Far more than may be unanswered at a time; each is answered by and by. An abort may end one earlier.
    let late = Duration::from_millis(100);
    for round in 0..20 {
        rig.admin_fault(command::admin::GET_LOG_PAGE, FaultAction::Delay(late..=late), 1);
        match monitor.health_log() {
            Ok(_) => {}
            Err(Error::Unanswered { .. }) => {}
            Err(error) => assert_eq!(error.status().map(Status::kind), Some(Status::ABORT_REQUESTED), "{error}"),
        }
        // The data of the next answer is its own, whenever the late one comes.
        assert_eq!(controller.namespaces().unwrap(), [1], "{round}");
        let start = Instant::now();
        while round % 4 == 3 && start.elapsed() < late {
            assert!(controller.health_log().unwrap().temperature_kelvins > 0);
        }
        controller.in_operation().unwrap();
    }
    works(&controller, 1, 1);
}

/// Neither a question nor a command that is needed keeps the one who wants to stop the controller waiting.
#[test]
fn a_rescue_does_not_wait_for_an_admin_command() {
    let rig = Rig::new(small());
    let patient = Options { admin_timeout: Duration::from_secs(600), ..Default::default() };
    let controller = rig.try_open(&patient).unwrap();
    let monitor = controller.monitor(Duration::from_secs(600));
    for (round, asking) in [&controller, &monitor].into_iter().enumerate() {
        rig.admin_fault(command::admin::GET_LOG_PAGE, FaultAction::LoseCompletion, 1);
        std::thread::scope(|threads| {
            let asked = threads.spawn(|| asking.health_log().unwrap_err());
            rig.wait_for_faults(round as u64 + 1);
            // Any look in between waits for nothing either.
            controller.in_operation().unwrap();
            let start = Instant::now();
            match round {
                0 => controller.reset().unwrap(),
                _ => controller.disable().unwrap(),
            }
            assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
            let error = asked.join().unwrap();
            assert!(matches!(error, Error::NotInOperation { .. }), "{error}");
        });
        controller.reset().unwrap();
        works(&controller, 1, 1);
    }
}

#[test]
fn an_admin_command_that_is_late_is_aborted() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&impatient()).unwrap();
    let hour = Duration::from_secs(3600);
    rig.admin_fault(command::admin::GET_LOG_PAGE, FaultAction::Delay(hour..=hour), 1);
    let start = Instant::now();
    let result = controller.health_log();
    assert!(start.elapsed() < PROMPT);
    match result {
        // The abort worked: the controller goes on, and was asked again.
        Ok(_) => {}
        // It is only advice.
        Err(Error::Timeout { .. }) => controller.reset().unwrap(),
        Err(error) => panic!("{error}"),
    }
    works(&controller, 1, 1);
}

#[test]
fn an_admin_command_with_a_wrong_identifier_is_not_taken_for_an_answer() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&impatient()).unwrap();
    rig.admin_fault(command::admin::IDENTIFY, FaultAction::WrongCommandId, 1);
    let error = controller.namespaces().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. } | Error::Command { .. }), "{error}");
    controller.reset().unwrap();
    works(&controller, 1, 1);
}

#[test]
fn error_statuses_have_their_names() {
    let rig = Rig::new(small());
    let controller = rig.open();
    // As often as it is asked.
    rig.admin_fault(command::admin::IDENTIFY, FaultAction::Fail(nvme_sim::Status::new(0, 0x06)), 3);
    let error = controller.namespaces().unwrap_err();
    assert_eq!(error.status(), Some(Status::INTERNAL_ERROR));
    assert!(error.to_string().contains("Generic: Internal Error (sct 0, sc 0x06)"), "{error}");
    assert_eq!(controller.namespaces().unwrap(), [1], "one command failed, not the controller");
}

#[test]
fn fatal_status_in_operation() {
    let rig = Rig::new(small());
    let controller = rig.open();
    rig.admin_fault(command::admin::GET_LOG_PAGE, FaultAction::Fatal, 1);
    let start = Instant::now();
    let error = controller.health_log().unwrap_err();
    let Error::Register { register: "CSTS", value, .. } = error else { panic!("{error}") };
    assert!(value & 2 != 0);
    assert!(start.elapsed() < PROMPT, "not by the command's deadline");
    let again = controller.health().unwrap_err();
    assert_names_register(&again, "CSTS", value);
    controller.reset().unwrap();
    controller.health().unwrap();
    works(&controller, 1, 1);
}

#[test]
fn a_reset_with_requests_outstanding() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut first = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let mut second = controller.create_queue_pair(QueuePairOptions { entries: Some(16), interrupt: true }).unwrap();
    write_and_verify(&mut first, &namespace, &memory, 0, 1);
    rig.io_fault(command::io::READ, FaultAction::LoseCompletion, 2);
    for token in [10, 11] {
        let segment = [Segment { iova: memory.iova(), bytes: 512 }];
        first.submit(&namespace, Work::Read { lba: token, segments: &segment }, token).unwrap();
    }
    first.ring();
    rig.wait_for_faults(2);
    // The owner learns which ones are overdue; here it asks with a time far in the future.
    let start = Instant::now();
    let mut expired = Vec::new();
    first.tick(start, |_| {});
    first.tick(start + Duration::from_secs(3600), |token| expired.push(token));
    expired.sort();
    assert_eq!(expired, [10, 11]);

    assert!(controller.recreate_queue_pair(&mut first).is_err(), "there was no reset");
    controller.reset().unwrap();
    assert!(controller.recreate_queue_pair(&mut first).is_err(), "there are requests from before");
    let mut abandoned = Vec::new();
    first.drain_after_reset(|token| abandoned.push(token));
    abandoned.sort();
    assert_eq!(abandoned, [10, 11]);
    second.drain_after_reset(|_| panic!("it had no requests"));
    for pair in [&mut first, &mut second] {
        controller.recreate_queue_pair(pair).unwrap();
        write_and_verify(pair, &namespace, &memory, 64, 2);
    }
    assert!(controller.recreate_queue_pair(&mut first).is_err(), "it exists");

    // One that is refused half-way can be tried again.
    controller.reset().unwrap();
    first.drain_after_reset(|_| panic!("it had no requests"));
    rig.admin_fault(command::admin::CREATE_SQ, FaultAction::Fail(nvme_sim::Status::new(0, 0x06)), 1);
    let error = controller.recreate_queue_pair(&mut first).unwrap_err();
    assert_eq!(error.status(), Some(Status::INTERNAL_ERROR), "{error}");
    controller.recreate_queue_pair(&mut first).unwrap();
    write_and_verify(&mut first, &namespace, &memory, 128, 3);
    assert_eq!((first.id(), second.id()), (1, 2));
    controller.delete_queue_pair(first).unwrap();
    controller.delete_queue_pair(second).unwrap();
}

/// Where nothing was outstanding there is nothing to take out; that the queues begin anew is not the owner's business.
#[test]
fn a_pair_without_requests_is_created_again_empty() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions { entries: Some(16), interrupt: false }).unwrap();
    // Written, then overwritten by another: the first write must not be carried out once more.
    write_and_verify(&mut pair, &namespace, &memory, 0, 1);
    let mut disk = controller.blocking(1, DEADLINE).unwrap();
    disk.write(0, &[0xee; 8192]).unwrap();
    drop(disk);
    controller.reset().unwrap();
    controller.recreate_queue_pair(&mut pair).unwrap();
    write_and_verify(&mut pair, &namespace, &memory, 64, 2);
    let mut found = [0; 8192];
    controller.blocking(1, DEADLINE).unwrap().read(0, &mut found).unwrap();
    assert!(found == [0xee; 8192], "a command from before the reset was carried out again");
    assert_eq!(pair.counters().stale_completions, 0);
}

#[test]
fn pairs_of_before_a_reset_can_be_deleted_or_dropped_after_it() {
    let rig = Rig::new(Config { max_queue_pairs: 2, ..small() });
    let controller = rig.open();
    let first = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let second = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    controller.reset().unwrap();
    // Both places are still taken; the controller knows of neither queue.
    assert!(matches!(
        controller.create_queue_pair(QueuePairOptions::default()),
        Err(Error::NoQueuePairsLeft { granted: 2 })
    ));
    controller.delete_queue_pair(first).unwrap();
    drop(second);
    let pairs: Vec<_> = (0..2).map(|_| controller.create_queue_pair(QueuePairOptions::default()).unwrap()).collect();
    assert_eq!(pairs.len(), 2);
}

#[test]
fn resets_over_and_over() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions { entries: Some(5), interrupt: false }).unwrap();
    for round in 0..20 {
        // So many that the queues have wrapped, at another place each time.
        for _ in 0..round % 4 {
            write_and_verify(&mut pair, &namespace, &memory, round, round as u8);
        }
        controller.reset().unwrap();
        pair.drain_after_reset(|_| panic!("nothing is outstanding"));
        controller.recreate_queue_pair(&mut pair).unwrap();
    }
    write_and_verify(&mut pair, &namespace, &memory, 0, 99);
}

#[test]
fn a_controller_that_ignores_cc_is_reset_as_a_function() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let controller = rig.open();
    rig.simulator.faults().change(|plan| plan.never_reset = true);
    controller.reset().unwrap();
    rig.simulator.faults().change(|plan| plan.never_reset = false);
    works(&controller, 1, 1);
    // The function's reset switched the interrupts off too.
    interrupts_work(&rig, &controller);
}

/// A request of a new pair signals the eventfd of its vector.
pub(crate) fn interrupts_work(rig: &Rig, controller: &Controller) {
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions { entries: None, interrupt: true }).unwrap();
    write_and_verify(&mut pair, &namespace, &memory, 0, 2);
    let start = Instant::now();
    while pair.interrupt().expect("made with one").read().is_err() {
        assert!(start.elapsed() < DEADLINE, "no interrupt");
        std::thread::yield_now();
    }
}

#[test]
fn a_power_cut_behind_our_back_is_noticed() {
    let rig = Rig::new(small());
    let controller = rig.open();
    rig.simulator.power_cut().unwrap();
    assert_names_register(&controller.health().unwrap_err(), "CSTS", 0);
    let start = Instant::now();
    assert_names_register(&controller.namespaces().unwrap_err(), "CSTS", 0);
    assert!(start.elapsed() < PROMPT, "not by the command's deadline");
    controller.reset().unwrap();
    works(&controller, 1, 1);
}

#[test]
fn a_reset_that_fails_can_be_tried_again() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let controller = rig.open();
    rig.simulator.faults().change(|plan| plan.never_ready = true);
    assert_names_register(&controller.reset().unwrap_err(), "CSTS", 0);
    assert!(matches!(controller.namespaces(), Err(Error::NotInOperation { .. })));
    assert!(matches!(controller.poll_events(), Err(Error::NotInOperation { .. })));
    rig.simulator.faults().change(|plan| plan.never_ready = false);
    // Half-way: the controller becomes ready and then refuses what bring-up needs.
    rig.admin_fault(command::admin::SET_FEATURES, FaultAction::Fail(nvme_sim::Status::new(0, 0x06)), 1);
    assert_eq!(controller.reset().unwrap_err().status(), Some(Status::INTERNAL_ERROR));
    assert!(matches!(controller.namespaces(), Err(Error::NotInOperation { .. })));
    controller.reset().unwrap();
    works(&controller, 1, 1);
}

#[test]
fn a_disabled_controller_comes_back_by_a_reset() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let controller = rig.open();
    for never_reset in [false, true] {
        rig.simulator.faults().change(|plan| plan.never_reset = never_reset);
        controller.disable().unwrap();
        rig.simulator.faults().change(|plan| plan.never_reset = false);
        assert!(matches!(controller.namespaces(), Err(Error::NotInOperation { .. })));
        controller.reset().unwrap();
        works(&controller, 1, 1);
    }
    rig.simulator.remove();
    controller.disable().unwrap();
}

#[test]
fn interrupts_come_back_after_a_disable_that_reset_the_function() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let controller = rig.open();
    rig.simulator.faults().change(|plan| plan.never_reset = true);
    controller.disable().unwrap();
    rig.simulator.faults().change(|plan| plan.never_reset = false);
    controller.reset().unwrap();
    interrupts_work(&rig, &controller);
}

/// There are two ways to lose a controller: a bring-up that fails, and the last clone that goes.
#[test]
fn a_controller_that_ignores_cc_is_stopped_before_its_memory_is_used_again() {
    const CSTS: u64 = 0x1c;
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let registers = rig.device.bar(0).unwrap();
    let controller = rig.open();
    rig.simulator.faults().change(|plan| plan.never_reset = true);
    drop(controller);
    assert_eq!(registers.read_u32(CSTS).unwrap() & 1, 0, "still ready, with queues in memory that was given back");
    rig.admin_fault(command::admin::SET_FEATURES, FaultAction::Fail(nvme_sim::Status::new(0, 0x06)), 1);
    assert_eq!(rig.try_open(&Options::default()).unwrap_err().status(), Some(Status::INTERNAL_ERROR));
    assert_eq!(registers.read_u32(CSTS).unwrap() & 1, 0, "still ready, with queues in memory that was given back");
    rig.simulator.faults().change(|plan| plan.never_reset = false);
    works(&rig.open(), 1, 1);
}

#[test]
fn bus_master_is_switched_on_again() {
    let rig = Rig::new(small());
    let controller = rig.open();
    // What is left when neither CC.EN nor a reset of the function stops a controller.
    let space = rig.device.config_space();
    let on = space.read_u16(vfio::COMMAND).unwrap();
    space.write_u16(vfio::COMMAND, on & !vfio::COMMAND_BUS_MASTER).unwrap();
    controller.reset().unwrap();
    assert_eq!(space.read_u16(vfio::COMMAND).unwrap(), on);
    works(&controller, 1, 1);
}

#[test]
fn a_stuck_blocking_request_keeps_its_buffer() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&impatient()).unwrap();
    let mut disk = controller.blocking(1, Duration::from_millis(200)).unwrap();
    rig.io_fault(command::io::READ, FaultAction::LoseCompletion, 1);
    let error = disk.read(3, &mut [0; 512]).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("Read of 512 bytes from block 3"), "{error}");
    assert!(matches!(disk.read(3, &mut [0; 512]), Err(Error::NotInOperation { .. })));
    drop(disk);
    works(&controller, 1, 1);
}

#[test]
fn the_controller_dies_under_io() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let memory = rig.device.dma().allocate(16384).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    rig.io_fault(command::io::READ, FaultAction::Fatal, 1);
    let segment = [Segment { iova: memory.iova(), bytes: 512 }];
    pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, 5).unwrap();
    pair.ring();
    let start = Instant::now();
    while controller.health().is_ok() {
        assert!(start.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    controller.reset().unwrap();
    let mut again = Vec::new();
    pair.drain_after_reset(|token| again.push(token));
    assert_eq!(again, [5]);
    controller.recreate_queue_pair(&mut pair).unwrap();
    pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, 5).unwrap();
    pair.ring();
    assert_eq!(complete(&mut pair, 1), [(5, Status::SUCCESS)]);
}
