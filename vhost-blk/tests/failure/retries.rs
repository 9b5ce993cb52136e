//! Single commands that fail, and how often and how long they are tried.

use super::*;

#[test]
fn one_command_that_fails_concerns_nobody_else() {
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    bench.fault(FaultAction::Fail(INTERNAL_ERROR.not_to_be_retried()));
    assert_eq!(ring.read_one(0), IOERR);
    ring.check_io(0);
    // What may not be tried again is not.
    bench.counts(1, 0);
}

#[test]
fn a_command_that_may_be_tried_again_is() {
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    let thrice = FaultMatch { limit: Some(3), ..FaultMatch::default() };
    bench.simulator().faults().add(FaultRule { action: FaultAction::Fail(INTERNAL_ERROR), when: thrice });
    ring.check_io(8);
    bench.counts(0, 3);
    // Not for ever.
    bench
        .simulator()
        .faults()
        .add(FaultRule { action: FaultAction::Fail(INTERNAL_ERROR), when: FaultMatch::default() });
    assert_eq!(ring.read_one(0), IOERR);
    bench.counts(1, 3 + 5);
}

#[test]
fn a_retry_waits_as_long_as_the_drive_wants() {
    let bench = Bench::with(Duration::ZERO, |config| config.retry_delays = [0, 2, 0]);
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    for (delay, least) in [(1, Duration::ZERO), (2, Duration::from_millis(200))] {
        bench.fault(FaultAction::Fail(INTERNAL_ERROR.with_retry_delay(delay)));
        let start = Instant::now();
        assert_eq!(ring.read_one(0), 0);
        assert!(start.elapsed() >= least, "tried again after {:?}", start.elapsed());
    }
    bench.counts(0, 2);
}

#[test]
fn a_drive_that_is_not_ready_is_waited_for() {
    const NAMESPACE_NOT_READY: nvme_sim::Status = nvme_sim::Status::new(0, 0x82);
    let fault = |bench: &Bench, limit| {
        let when = FaultMatch { limit, ..FaultMatch::default() };
        bench.simulator().faults().add(FaultRule { action: FaultAction::Fail(NAMESPACE_NOT_READY), when });
    };
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    // More often than any request is tried that fails at once.
    fault(&bench, Some(9));
    let start = Instant::now();
    assert_eq!(ring.read_one(0), 0);
    assert!(start.elapsed() >= Duration::from_millis(1 + 2 + 4 + 8 + 16 + 32 + 64 + 128), "{:?}", start.elapsed());
    bench.counts(0, 9);

    const HOLD: Duration = Duration::from_millis(400);
    let bench = Bench::with(HOLD, |_| ());
    let (_front, mut ring) = one_ring(&bench, &region);
    fault(&bench, None);
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(ring.read_one(0), IOERR);
        assert!((HOLD..DEADLINE).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
    bench.simulator().faults().clear();
    ring.check_io(8);
}

#[test]
fn patience_ends() {
    const HOLD: Duration = Duration::from_millis(400);
    let bench = Bench::with(HOLD, |_| ());
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    let start = Instant::now();
    bench.simulator().remove();
    assert_eq!(ring.read_one(0), IOERR);
    let waited = start.elapsed();
    assert!((HOLD..DEADLINE).contains(&waited), "{waited:?}");
    // From now on nobody waits until it is back.
    let is_prompt = |_| {
        let start = Instant::now();
        assert_eq!(ring.read_one(0), IOERR);
        start.elapsed() < HOLD
    };
    // This machine may be busy, but not each time.
    assert!((0..20).any(is_prompt));
    bench.simulator().reinsert().unwrap();
    bench.works_again(&mut ring);
}

#[test]
fn a_request_that_no_reset_helps_fails_and_the_disk_lives() {
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = one_ring(&bench, &region);
    // Whoever reads this block waits for ever.
    let poisoned = FaultMatch { blocks: Some(800..=807), ..FaultMatch::default() };
    bench.simulator().faults().add(FaultRule { action: FaultAction::LoseCompletion, when: poisoned });
    assert_eq!(ring.read_one(800), IOERR);
    bench.works_again(&mut ring);
    ring.check_io(8);
    // Five times with the drive: once, and again after each failure but the last.
    eventually("the counters", || bench.target.totals().again == 4);
}
