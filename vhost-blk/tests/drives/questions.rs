//! "Could not find out" is not "found something else", and no question is worth a disk.

use std::time::{Duration, Instant};

use nvme_sim::{FaultAction, FaultMatch, FaultRule, NamespaceConfig, Status};

use crate::common::*;
use crate::stand::Stand;
use crate::{MIB, admin, fault, guest};

const INTERNAL_ERROR: Status = Status::new(0, 0x06);
const INVALID_FIELD: Status = Status::new(0, 0x02);

/// More than a look at two namespaces asks, with all its tries.
const MANY: u64 = 40;

/// Has the drive tell that namespaces have changed, so that all are looked at; waits until some of it has met the faults.
fn look(stand: &Stand) {
    let before = stand.drive.faults().fired();
    stand.drive.add_namespace(NamespaceConfig { bytes: MIB, ..NamespaceConfig::default() }).unwrap();
    eventually("the drive is asked", || stand.drive.faults().fired() > before);
}

#[test]
fn answers_that_are_errors_say_nothing() {
    // Whether its cache is in use is one of the questions.
    let stand = Stand::with(|setup| setup.drive.volatile_write_cache = true);
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let refused = INVALID_FIELD.not_to_be_retried();
    for opcode in [admin::IDENTIFY, admin::GET_FEATURES, admin::GET_LOG_PAGE] {
        // One, and as many as there may be.
        for (status, limit) in [(INTERNAL_ERROR, 1), (INTERNAL_ERROR, MANY), (refused, MANY)] {
            fault(&stand, opcode, limit, FaultAction::Fail(status));
            look(&stand);
            (0..20).for_each(|_| ring.check_io(8));
            stand.drive.faults().clear();
        }
    }
    for lost in ["answers with I/O errors", "out of operation", "are lost"] {
        assert_eq!(stand.program.lines_with(lost), 0, "{lost}");
    }
    neighbour.verdict();
}

#[test]
fn questions_that_are_not_answered_cost_nobody_a_reset() {
    let stand = Stand::with(|setup| {
        setup.top = "io-timeout = 5".into();
        setup.more = "[[drive]]\ndevice = \"{device}\"\nadmin-timeout = 1\n".into();
    });
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    fault(&stand, admin::GET_LOG_PAGE, 1, FaultAction::LoseCompletion);
    look(&stand);
    stand.program.wait_for("is not answered within");
    ring.check_io(8);
    assert_eq!(stand.program.lines_with("out of operation"), 0);
    neighbour.verdict();
}

/// A ring that stops does not wait for its queue pair to be deleted.
#[test]
fn queue_pairs_are_deleted_by_and_by() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (front, ring) = guest(&stand, &region);
    fault(
        &stand,
        admin::DELETE_SUBMISSION_QUEUE,
        1,
        FaultAction::Delay(Duration::from_secs(4)..=Duration::from_secs(4)),
    );
    let start = Instant::now();
    ring.stop(&front);
    assert!(start.elapsed() < Duration::from_secs(2), "GET_VRING_BASE took {:?}", start.elapsed());
    eventually("the queue pair is being deleted", || stand.drive.faults().fired() > 0);
    drop(front);
    let (_front, mut ring) = guest(&stand, &region);
    ring.check_io(8);
    neighbour.verdict();
}

/// A drive that fails to answer at start is served all the same, as soon as it says what has to be known, and is not another one when it
/// says the rest.
#[test]
fn a_drive_that_fails_to_answer_at_start() {
    for (cns, feature) in [(Some(0), None), (Some(3), None), (None, Some(6))] {
        let stand = Stand::with(|setup| {
            setup.drive.volatile_write_cache = true;
            let when = FaultMatch { cns, feature, limit: Some(2), ..FaultMatch::default() };
            setup.drive.faults.rules.push(FaultRule { action: FaultAction::Fail(INTERNAL_ERROR), when });
        });
        assert_eq!(stand.drive.faults().fired(), 2);
        let neighbour = stand.neighbour();
        let region = Region::new(0, MIB);
        let (_front, mut ring) = guest(&stand, &region);
        // It is looked at once more.
        fault(&stand, admin::IDENTIFY, 1, FaultAction::Fail(INTERNAL_ERROR));
        look(&stand);
        (0..20).for_each(|_| ring.check_io(8));
        assert_eq!(stand.program.lines_with("answers with I/O errors"), 0);
        neighbour.verdict();
    }
}

/// Whether it has lost its power cannot be asked when it is back: nothing says that it has.
#[test]
fn a_count_of_power_losses_that_is_not_to_be_had() {
    let stand = Stand::with(|setup| {
        setup.top = "io-timeout = 1".into();
        setup.drive.volatile_write_cache = true;
    });
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    ring.store(64, 7);
    fault(&stand, admin::GET_LOG_PAGE, MANY, FaultAction::Fail(INTERNAL_ERROR));
    let when = FaultMatch { opcode: Some(2), namespace: Some(1), limit: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
    assert!(ring.holds(64, 7));
    stand.program.wait_for("the drive is back");
    assert_eq!(ring.flush(), 0);
    stand.drive.faults().clear();
    look_again(&stand);
    assert_eq!(ring.flush(), 0);
    assert_eq!(stand.program.lines_with("are lost"), 0);
    neighbour.verdict_within(Duration::from_secs(5));
}

/// Waits until the drive has been asked something after now.
fn look_again(stand: &Stand) {
    fault(stand, admin::GET_LOG_PAGE, 1, FaultAction::Delay(Duration::ZERO..=Duration::ZERO));
    look(stand);
}
