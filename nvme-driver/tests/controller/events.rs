//! What the controller tells without being asked.

use std::time::{Duration, Instant};

use nvme_driver::spec::command;
use nvme_driver::spec::features::TemperatureThreshold;
use nvme_driver::spec::log_page::ChangedNamespaces;
use nvme_driver::{Controller, Event, Options};
use nvme_sim::{Config, FaultAction};

use crate::{DEADLINE, Rig, assert_names_register, disk, small, works};

fn next(controller: &Controller) -> Event {
    let mut events = controller.next_events(DEADLINE).unwrap();
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

#[test]
fn namespaces_come_and_go() {
    for interrupts in [true, false] {
        let rig = Rig::new(small());
        let controller = rig.try_open(&Options { interrupts, ..Default::default() }).unwrap();
        assert!(controller.identity().namespace_events);
        assert_eq!(controller.poll_events().unwrap(), []);

        // More often than there are event requests: each is renewed.
        for round in 0..10 {
            let id = rig.simulator.add_namespace(disk(8 << 20, 4096)).unwrap();
            assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![id])), "round {round}");
            assert_eq!(controller.namespaces().unwrap(), [1, id]);
            works(&controller, id, round);
            rig.simulator.remove_namespace(id).unwrap();
            assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![id])), "round {round}");
            assert_eq!(controller.namespaces().unwrap(), [1]);
        }
        rig.simulator.resize(1, 32 << 20).unwrap();
        assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![1])));
        assert_eq!(controller.namespace(1).unwrap().bytes(), 32 << 20);
    }
}

#[test]
fn events_that_came_during_a_command_are_not_lost() {
    let rig = Rig::new(Config { namespaces: vec![], ..small() });
    let controller = rig.open();
    let id = rig.simulator.add_namespace(disk(8 << 20, 512)).unwrap();
    // Commands reap the admin queue too.
    for _ in 0..20 {
        controller.health_log().unwrap();
    }
    assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![id])));
}

#[test]
fn a_hot_drive_says_so() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let now = controller.health_log().unwrap().temperature_kelvins;
    let threshold = |kelvins| TemperatureThreshold { kelvins, which: Default::default() };
    controller.set_feature(&threshold(now - 10), false).unwrap();
    let Event::Health { information: 1, health } = next(&controller) else { panic!("not about the temperature") };
    assert_eq!(health.critical_warning & 2, 2);
    // The log was read, so it can be told again.
    controller.set_feature(&threshold(now + 10), false).unwrap();
    controller.set_feature(&threshold(now - 10), false).unwrap();
    assert!(matches!(next(&controller), Event::Health { .. }));
}

#[test]
fn a_doorbell_of_no_queue_is_an_error_event() {
    let rig = Rig::new(small());
    let controller = rig.open();
    // Submission queue 3 does not exist. The simulator looks at doorbells of queues it knows, or tells; either way nothing else
    // may be disturbed.
    rig.device.bar(0).unwrap().doorbell(0x1000 + 3 * 8).unwrap().ring(5);
    let events = controller.next_events(Duration::from_millis(500)).unwrap();
    for event in &events {
        assert!(matches!(event, Event::Error { information: 0 | 1, .. }), "{event:?}");
    }
    works(&controller, 1, 1);
}

#[test]
fn waiting_ends_with_the_time_or_the_controller() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let start = Instant::now();
    assert_eq!(controller.next_events(Duration::from_millis(200)).unwrap(), []);
    assert!(start.elapsed() >= Duration::from_millis(200));

    let waiting = controller.clone();
    let waiter = std::thread::spawn(move || {
        let start = Instant::now();
        (waiting.next_events(DEADLINE).unwrap_err(), start.elapsed())
    });
    rig.simulator.remove();
    let (error, waited) = waiter.join().unwrap();
    assert_names_register(&error, "CSTS", 0xffff_ffff);
    assert!(waited < DEADLINE / 2, "noticed before the deadline: {waited:?}");
}

#[test]
fn fewer_event_requests_than_wanted() {
    // Of the four, the controller refuses three: the one that is left is enough, and the others are not tried for ever.
    let rig = Rig::new(small());
    rig.admin_fault(command::admin::ASYNC_EVENT_REQUEST, FaultAction::Fail(nvme_sim::Status::new(1, 0x05)), 3);
    let controller = rig.open();
    for _ in 0..5 {
        let id = rig.simulator.add_namespace(disk(8 << 20, 512)).unwrap();
        assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![id])));
    }
    assert_eq!(rig.simulator.faults().fired(), 3);
}

#[test]
fn a_log_that_cannot_be_had_does_not_hide_the_event() {
    let rig = Rig::new(small());
    let controller = rig.open();
    rig.admin_fault(
        command::admin::GET_LOG_PAGE,
        FaultAction::Fail(nvme_sim::Status::new(0, 0x06).not_to_be_retried()),
        1,
    );
    rig.simulator.add_namespace(disk(8 << 20, 512)).unwrap();
    assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::TooMany));
}

#[test]
fn events_go_on_after_a_reset() {
    let rig = Rig::new(small());
    let controller = rig.open();
    controller.reset().unwrap();
    let id = rig.simulator.add_namespace(disk(8 << 20, 512)).unwrap();
    assert_eq!(next(&controller), Event::NamespacesChanged(ChangedNamespaces::Some(vec![id])));
}
