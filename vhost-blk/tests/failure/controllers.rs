//! Whole controllers that fail, stop, leave, and come back.

use super::*;

/// Two guests at work; the controller fails in the way given, and is mended, unless it recovers by itself. Once with patience,
/// once without.
fn controller_fails(fail: impl Fn(&Bench), mend: Option<&dyn Fn(&Bench)>) {
    requests_wait(&fail, mend);
    requests_fail(&fail, mend);
}

/// Two rings of each of two guests, at work.
fn two_guests<'a>(bench: &Bench, regions: &'a [Region; 2]) -> ([Front; 2], Vec<Ring<'a>>) {
    let fronts = [bench.connect("a"), bench.connect("b")];
    let mut rings = Vec::new();
    for (front, region) in fronts.iter().zip(regions) {
        region.add(front);
        for index in 0..2 {
            let ring = Ring::new(region, index, 0x10000 * (u64::from(index) + 1));
            ring.start(front);
            rings.push(ring);
        }
    }
    rings.iter_mut().for_each(|ring| ring.check_io(8));
    (fronts, rings)
}

/// The guests notice a pause, and nothing else.
fn requests_wait(fail: &dyn Fn(&Bench), mend: Option<&dyn Fn(&Bench)>) {
    let bench = Bench::new();
    let regions = [Region::new(0, MIB), Region::new(0, MIB)];
    let (_fronts, mut rings) = two_guests(&bench, &regions);
    for round in 0..3u8 {
        rings[0].store(64, round);
        fail(&bench);
        rings.iter_mut().for_each(|ring| ring.submit(0, 0, (ring.data(), 4096)));
        if let Some(mend) = mend {
            // Longer than a command may take.
            let until = Instant::now() + Duration::from_millis(600);
            while Instant::now() < until {
                rings.iter_mut().for_each(|ring| assert_eq!(ring.poll(), None, "answered without a drive"));
            }
            mend(&bench);
        }
        rings.iter_mut().for_each(|ring| assert_eq!(ring.wait(), 0));
        assert!(rings[0].holds(64, round), "what was written before is there");
        for (sector, ring) in (8..).step_by(8).zip(&mut rings) {
            ring.check_io(sector);
            assert_eq!(ring.flush(), 0);
        }
    }
    eventually("something had to wait", || bench.target.totals().again > 0);
    assert_eq!(bench.target.totals().errors, 0);
    bench.target.stop().unwrap();
}

fn requests_fail(fail: &dyn Fn(&Bench), mend: Option<&dyn Fn(&Bench)>) {
    let bench = Bench::impatient();
    let regions = [Region::new(0, MIB), Region::new(0, MIB)];
    let (fronts, mut rings) = two_guests(&bench, &regions);
    rings[0].store(64, 0x5a);
    fail(&bench);
    rings.iter_mut().for_each(|ring| ring.submit(0, 0, (ring.data(), 4096)));
    let answers: Vec<u8> = rings.iter_mut().map(Ring::wait).collect();
    assert!(answers.contains(&IOERR), "{answers:?}");
    if let Some(mend) = mend {
        // While it is away every request is answered, and at once.
        eventually("the controller is out of operation", || rings[0].read_one(0) == IOERR);
        for ring in &mut rings {
            assert_eq!(ring.read_one(0), IOERR);
            assert_eq!(ring.write_one(0), IOERR);
        }
        // Front-ends can do everything but I/O: stop, reset, take memory away, leave, and come again.
        for ring in &rings[..2] {
            ring.stop(&fronts[0]);
        }
        let [first, second] = fronts;
        second.accept(RESET_DEVICE, &[], &[]);
        second.accept(REM_MEM_REG, &regions[1].single(), &[]);
        drop((first, second));
        let again = [bench.connect("a"), bench.connect("b")];
        assert_eq!(again[0].config(0, 8), (64 * MIB / 512).to_le_bytes());
        for ((front, region), rings) in again.iter().zip(&regions).zip(rings.chunks_mut(2)) {
            region.add(front);
            for (index, ring) in (0..).zip(rings) {
                *ring = Ring::new(region, index, 0x10000 * (u64::from(index) + 1));
                ring.start(front);
                assert_eq!(ring.read_one(0), IOERR);
            }
        }
        mend(&bench);
        check_rings(&bench, &mut rings);
        drop(again);
    } else {
        check_rings(&bench, &mut rings);
    }
    let start = Instant::now();
    bench.target.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "it stops without waiting for what will not come");
}

/// The drive comes back by itself: nobody but the drive was touched.
fn check_rings(bench: &Bench, rings: &mut [Ring]) {
    bench.works_again(&mut rings[0]);
    assert!(rings[0].holds(64, 0x5a), "what was written before is there");
    for (sector, ring) in (8..).step_by(8).zip(rings) {
        ring.check_io(sector);
        assert_eq!(ring.flush(), 0);
    }
}

#[test]
fn a_fatal_status() {
    controller_fails(|bench| bench.fault(FaultAction::Fatal), None);
}

#[test]
fn a_controller_that_stops() {
    let mend = |bench: &Bench| bench.simulator().faults().change(|plan| plan.stopped = false);
    controller_fails(|bench| bench.fault(FaultAction::Stop), Some(&mend));
}

#[test]
fn a_controller_pulled_out() {
    controller_fails(|bench| bench.simulator().remove(), Some(&|bench| bench.simulator().reinsert().unwrap()));
}

#[test]
fn a_controller_whose_server_dies() {
    let mend = |bench: &Bench| bench.put_back(Bench::config(bench.folder.path()));
    controller_fails(|bench| drop(bench.simulator.take()), Some(&mend));
}

#[test]
fn a_completion_that_never_comes() {
    controller_fails(|bench| bench.fault(FaultAction::LoseCompletion), None);
}

/// The worst of drives: it would carry a command out long after the reset of its controller, data, completion and all. So its
/// function is reset, too, before its memory is used again.
#[test]
fn a_command_that_outlives_its_queue_touches_nothing() {
    // The reset has to be over before it comes; a machine that is busy may need more time for that.
    let times = [1500, 6000, 24_000].map(Duration::from_millis);
    assert!(times.into_iter().any(outlives_its_queue), "this machine is too slow");
}

/// Says whether the command came as late as it should.
fn outlives_its_queue(late: Duration) -> bool {
    let bench = Bench::new();
    let regions = [Region::new(0, MIB), Region::new(0, MIB)];
    let (_fronts, mut rings) = two_guests(&bench, &regions);
    rings.iter_mut().for_each(|ring| ring.store(64, 1));
    bench.fault(FaultAction::Stray(late..=late));
    let start = Instant::now();
    // It is not answered in time, and again by the controller after its reset.
    assert!(rings[0].holds(64, 1));
    let strays = || {
        let simulator = bench.simulator();
        let counters = simulator.counters();
        (counters.strays.load(Ordering::Relaxed), counters.strays_refused.load(Ordering::Relaxed))
    };
    let so_far = strays();
    if start.elapsed() >= late {
        return false;
    }
    assert_eq!(so_far, (0, 0), "it would be still to come");
    // The buffer is the guest's again, and the memory of queues is used again.
    let data = rings[0].data();
    regions[0].memory.write_slice(&[2; 4096], GuestAddress(data)).unwrap();
    while start.elapsed() < late * 2 {
        rings[1..].iter_mut().for_each(|ring| assert_eq!(ring.read_one(0), 0));
    }
    assert_eq!(strays(), (0, 0), "the reset of the function has ended it");
    let mut there = [0; 4096];
    regions[0].memory.read_slice(&mut there, GuestAddress(data)).unwrap();
    assert_eq!(there, [2; 4096]);
    rings.iter_mut().for_each(|ring| ring.check_io(8));
    bench.counts(0, 1);
    true
}

#[test]
fn a_target_stops_while_its_drive_is_away() {
    let bench = Bench::impatient();
    let front = bench.connect("a");
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    drop(bench.simulator.take());
    eventually("the controller is out of operation", || ring.read_one(0) == IOERR);
    let start = Instant::now();
    bench.target.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "it stops without waiting for what will not come");
}

#[test]
fn another_drive_is_not_taken_for_the_one_that_left() {
    let bench = Bench::impatient();
    let front = bench.connect("a");
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    let config = || Bench::config(bench.folder.path());
    let namespace = |change: &dyn Fn(&mut NamespaceConfig)| {
        let mut config = config();
        change(&mut config.namespaces[0]);
        config
    };
    let other = bench.folder.path().join("other");
    let impostors = [
        Config { serial: "ANOTHER".into(), ..config() },
        namespace(&|namespace| (namespace.block_bytes, namespace.file) = (4096, Some(other.clone()))),
    ];
    for impostor in impostors {
        let text = format!("{impostor:?}");
        drop(bench.simulator.take());
        eventually("the controller is out of operation", || ring.read_one(0) == IOERR);
        bench.put_back(impostor);
        // Changes nothing, but is counted.
        let nothing = FaultAction::Delay(Duration::ZERO..=Duration::ZERO);
        let admin = FaultMatch { admin: true, ..FaultMatch::default() };
        bench.simulator().faults().add(FaultRule { action: nothing, when: admin });
        eventually("it is looked at", || bench.simulator().faults().fired() > 0);
        let until = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until {
            assert_eq!(ring.read_one(0), IOERR, "{text}");
            std::thread::yield_now();
        }
    }
    drop(bench.simulator.take());
    bench.put_back(config());
    bench.works_again(&mut ring);
    ring.check_io(0);
    bench.target.stop().unwrap();
}
