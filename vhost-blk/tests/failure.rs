//! Controllers that fail under running guests: requests wait until they are back, or fail if they may not wait; nothing hangs,
//! the socket stays.

mod common;

use std::cell::{Ref, RefCell};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vhost_blk::control::config::{ExportSettings, Listen, Patience, Settings};
use vhost_blk::control::target::Target;
use vhost_blk::drive::DeviceAddress;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;

struct Bench {
    target: Target,
    simulator: RefCell<Option<Simulator>>,
    folder: tempfile::TempDir,
}

impl Bench {
    /// Requests wait for the drive: longer than any test runs.
    fn new() -> Bench {
        Bench::with(Duration::from_secs(600), |_| ())
    }

    /// Nobody waits for a drive that is away.
    fn impatient() -> Bench {
        Bench::with(Duration::ZERO, |_| ())
    }

    fn with(hold: Duration, change: impl Fn(&mut Config)) -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let mut config = Self::config(folder.path());
        change(&mut config);
        let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let export = |name: &str| ExportSettings {
            device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
            listen: Listen::Path(folder.path().join(name)),
            namespace: None,
            queues: 4,
            queue_size: 256,
            queue_pairs: None,
            read_only: false,
            serial: None,
        };
        let settings = Settings {
            patience: Patience::with(None, Some(hold)),
            exports: vec![export("a"), export("b")],
            ..Settings::default()
        };
        let options = Options {
            io_timeout: Duration::from_millis(300),
            // An attempt to get a controller back that does nothing takes this long.
            admin_timeout: Duration::from_secs(1),
            ..Options::default()
        };
        let target = Target::start_with(&settings, &options).unwrap();
        Bench { target, simulator: RefCell::new(Some(simulator)), folder }
    }

    /// A controller whose blocks outlive it.
    fn config(folder: &Path) -> Config {
        let file = Some(folder.join("blocks"));
        let namespace = NamespaceConfig { bytes: 64 * MIB, file, ..NamespaceConfig::default() };
        Config { namespaces: vec![namespace], ..Config::default() }
    }

    /// Starts another controller where the first one was.
    fn put_back(&self, config: Config) {
        *self.simulator.borrow_mut() = Some(Simulator::start(config, &self.folder.path().join("nvme")).unwrap());
    }

    fn connect(&self, name: &str) -> Front {
        let front = Front::connect(&self.folder.path().join(name));
        front.negotiate();
        front
    }

    fn simulator(&self) -> Ref<'_, Simulator> {
        Ref::map(self.simulator.borrow(), |simulator| simulator.as_ref().expect("it has not been taken away"))
    }

    fn fault(&self, action: FaultAction) {
        self.simulator()
            .faults()
            .add(FaultRule { action, when: FaultMatch { limit: Some(1), ..FaultMatch::default() } });
    }

    /// Waits until so many requests have failed, and so many were tried again: they are counted just after they are answered.
    fn counts(&self, errors: u64, again: u64) {
        eventually("the counters", || {
            let totals = self.target.totals();
            assert!((totals.errors, totals.again) <= (errors, again), "{totals:?}");
            (totals.errors, totals.again) == (errors, again)
        });
    }

    /// Waits until a ring's requests are answered with success.
    fn works_again(&self, ring: &mut Ring) {
        eventually("the drive is back", || ring.read_one(0) == 0);
    }
}

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

/// The first front-end, and a ring that works.
fn one_ring<'a>(bench: &Bench, region: &'a Region) -> (Front, Ring<'a>) {
    let front = bench.connect("a");
    let mut ring = Ring::first(&front, region);
    ring.check_io(0);
    (front, ring)
}

const INTERNAL_ERROR: nvme_sim::Status = nvme_sim::Status::new(0, 6);

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

#[test]
fn a_flush_fails_when_the_drive_has_lost_what_it_would_make_safe() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    let mut other = Ring::new(&region, 1, 0x20000);
    other.start(&front);
    other.check_io(32);
    // Flushed: nothing to tell. The flush of one ring is for all.
    ring.store(64, 1);
    assert_eq!(ring.flush(), 0);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 1));
    assert_eq!((ring.flush(), other.flush()), (0, 0));
    // Answered, and lost. Told once, to whoever asks first.
    ring.store(64, 2);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    assert!(ring.holds(64, 1));
    assert_eq!(other.flush(), IOERR);
    assert_eq!((ring.flush(), other.flush()), (0, 0));
    // A reset loses nothing.
    ring.store(64, 3);
    bench.fault(FaultAction::Fatal);
    assert!(ring.holds(64, 3));
    assert_eq!(ring.flush(), 0);
    // A flush that waits for the drive is no better than one that comes later.
    ring.store(64, 4);
    bench.simulator().remove();
    ring.submit(T_FLUSH, 0, (0, 0));
    bench.simulator().reinsert().unwrap();
    assert_eq!(ring.wait(), IOERR);
    assert_eq!(ring.flush(), 0);
    // Written through: nothing can be lost.
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    ring.store(64, 5);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 5));
    assert_eq!(ring.flush(), 0);
}

#[test]
fn no_ring_flushes_before_all_know_of_a_loss() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    let mut other = Ring::new(&region, 1, 0x20000);
    other.start(&front);
    // A drive that goes again and again is tried less and less often: more rounds take long.
    for round in 0..4 {
        // Now the one with the writes, now the one with the flush is told first that the drive is back.
        let (writer, flusher) = if round % 2 == 0 { (&mut other, &mut ring) } else { (&mut ring, &mut other) };
        writer.store(64, round);
        drop(bench.simulator.take());
        flusher.submit(T_FLUSH, 0, (0, 0));
        bench.put_back(Config { volatile_write_cache: true, ..Bench::config(bench.folder.path()) });
        assert_eq!(flusher.wait(), IOERR, "round {round}");
        assert_eq!((ring.flush(), other.flush()), (0, 0), "round {round}");
    }
}

#[test]
fn a_ring_that_stops_leaves_behind_what_a_flush_has_to_know() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    // Stopped and started.
    ring.store(64, 1);
    ring.stop(&front);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    ring.start(&front);
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // While the drive is away.
    ring.store(64, 2);
    bench.simulator().remove();
    ring.stop(&front);
    ring.start(&front);
    ring.submit(T_FLUSH, 0, (0, 0));
    bench.simulator().reinsert().unwrap();
    assert_eq!(ring.wait(), IOERR);
    assert_eq!(ring.flush(), 0);
    // Memory that is taken away stops all rings.
    let more = Region::new(16 * MIB, MIB);
    more.add(&front);
    ring.store(64, 3);
    front.accept(REM_MEM_REG, &more.single(), &[]);
    bench.simulator().power_cut().unwrap();
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // The front-end comes again.
    ring.store(64, 4);
    drop(front);
    bench.simulator().power_cut().unwrap();
    let front = bench.connect("a");
    region.add(&front);
    ring.start(&front);
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // Nothing is told twice, and of what was flushed nothing.
    ring.store(64, 5);
    assert_eq!(ring.flush(), 0);
    ring.stop(&front);
    bench.simulator().power_cut().unwrap();
    ring.start(&front);
    assert_eq!(ring.flush(), 0);
}

#[test]
fn the_cache_is_not_said_to_be_written_through_when_it_was_lost() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    ring.store(64, 1);
    assert_eq!(ring.flush(), 0);
    ring.store(64, 2);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    assert!(ring.holds(64, 1));
    for _ in 0..2 {
        front.refuse(SET_CONFIG, &config(32, &[0]), &[]);
        assert_eq!(front.config(32, 1), [1]);
    }
    // The guest has not been told before this.
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    // The switch is a flush: nothing was lost before it that is not told, and nothing can be after it.
    front.accept(SET_CONFIG, &config(32, &[1]), &[]);
    ring.store(64, 3);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 3));
    assert_eq!(ring.flush(), 0);
}

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
