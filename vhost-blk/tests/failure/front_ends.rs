//! Front-ends that leave while the drive is away, or slow.

use super::*;

#[test]
fn a_front_end_that_leaves_does_not_wait_for_the_drive() {
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    bench.simulator().remove();
    ring.submit(0, 0, (ring.data(), 4096));
    let start = Instant::now();
    drop(front);
    let front = bench.connect("a");
    assert_eq!(front.config(0, 8), (64 * MIB / 512).to_le_bytes());
    // Its requests wait for ten times as long.
    assert!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
    assert_eq!(ring.poll(), None, "nobody has answered");
    bench.simulator().reinsert().unwrap();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    bench.works_again(&mut ring);
}

#[test]
fn a_front_end_leaves_while_the_drive_is_slow() {
    let bench = Bench::new();
    for _ in 0..3 {
        let front = bench.connect("a");
        let region = Region::new(0, MIB);
        let mut ring = Ring::first(&front, &region);
        ring.check_io(0);
        let fired = bench.simulator().faults().fired();
        bench.fault(FaultAction::Delay(Duration::from_millis(100)..=Duration::from_millis(150)));
        ring.submit(0, 0, (ring.data(), 4096));
        eventually("the command is with the drive", || bench.simulator().faults().fired() > fired);
        drop(front);
        // The rings of the next one run only when nothing of the last one is under way any more.
        let next = bench.connect("a");
        let region = Region::new(0, MIB);
        Ring::first(&next, &region).check_io(8);
        assert_eq!(ring.poll(), Some(0));
        bench.simulator().faults().clear();
    }
}
