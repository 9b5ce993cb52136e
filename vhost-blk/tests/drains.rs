//! Everything that has to wait for requests under way, with a drive that never answers them: it ends within the time that was set,
//! and the target serves whoever comes next.

mod common;

use std::time::{Duration, Instant};

use common::raw::*;
use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vhost_blk::control::config::{DriveTimeouts, ExportSettings, Listen, Settings};
use vhost_blk::control::target::Target;
use vhost_blk::drive::DeviceAddress;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;
const RINGS: u32 = 4;

/// How long a command may take.
const IO_TIMEOUT: Duration = Duration::from_millis(300);
/// How long requests wait for a drive that failed.
const HOLD: Duration = Duration::from_millis(700);
/// How long a controller may take to stop.
const READY_TIMEOUT: Duration = Duration::from_millis(500);
/// All of these, and time for busy machines: less than several rings would take one after the other, and less than the last
/// resort, which is to wait no longer for a ring.
const LIMIT: Duration = Duration::from_secs(9);

/// In what way the drive does not answer.
#[derive(Clone, Copy, Debug)]
enum Stuck {
    /// It lets itself be reset.
    Resettable,
    /// Nor that: it has to be cut off.
    Wholly,
}

struct Bench {
    target: Target,
    simulator: Simulator,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            namespaces: vec![NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() }],
            ready_timeout: READY_TIMEOUT,
            ..Config::default()
        };
        change(&mut config);
        let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let export = ExportSettings {
            device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
            listen: Listen::Path(folder.path().join("s")),
            namespace: None,
            queues: RINGS as u16,
            queue_size: 256,
            queue_pairs: None,
            read_only: false,
            serial: None,
        };
        let timeouts = DriveTimeouts::with(None, Some(HOLD));
        let settings = Settings { timeouts, exports: vec![export], ..Settings::default() };
        let options = Options {
            io_timeout: IO_TIMEOUT,
            admin_timeout: Duration::from_millis(500),
            ready_timeout: Some(READY_TIMEOUT),
            ..Options::default()
        };
        let target = Target::start_with(&settings, &options).unwrap();
        Bench { target, simulator, folder }
    }

    fn connect(&self) -> Front {
        let front = Front::connect(&self.folder.path().join("s"));
        front.negotiate();
        front
    }

    /// Has a request of each ring under way, and no end of it.
    fn stick(&self, stuck: Stuck, rings: &mut [Ring]) {
        self.simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
        rings.iter_mut().for_each(|ring| ring.submit(0, 0, (ring.data(), 4096)));
        eventually("the drive has all of them", || self.simulator.faults().fired() >= RINGS.into());
        self.simulator.faults().change(|plan| {
            plan.stopped = true;
            plan.never_reset = matches!(stuck, Stuck::Wholly);
        });
    }
}

fn rings<'a>(front: &Front, region: &'a Region) -> Vec<Ring<'a>> {
    (0..RINGS)
        .map(|index| {
            let mut ring = Ring::new(region, index, 0x10000 * u64::from(index));
            ring.start(front);
            ring.check_io(u64::from(index) * 8);
            ring
        })
        .collect()
}

/// Has requests stuck on every ring, does `end` to them, and looks who is served afterwards.
fn drains(end: impl Fn(Front, &mut [Ring]) -> Option<Front>) {
    for stuck in [Stuck::Resettable, Stuck::Wholly] {
        let bench = Bench::new();
        let front = bench.connect();
        let (region, other) = (Region::new(0, MIB), Region::new(16 * MIB, MIB));
        region.add(&front);
        other.add(&front);
        let mut rings = rings(&front, &region);
        bench.stick(stuck, &mut rings);
        let start = Instant::now();
        let front = end(front, &mut rings);
        // Whoever is there, or comes now, is heard.
        let front = front.unwrap_or_else(|| bench.connect());
        assert_eq!(front.config(0, 8), (64 * MIB / 512).to_le_bytes());
        let took = start.elapsed();
        assert!(took < LIMIT, "{stuck:?}: it took {took:?}");
        println!("{stuck:?}: {took:?}");
        drop(front);

        bench.simulator.faults().clear();
        let front = bench.connect();
        region.add(&front);
        let mut ring = Ring::new(&region, 0, 0);
        ring.start(&front);
        eventually("the drive is back", || ring.read_one(0) == 0);
        ring.stop(&front);
        self::rings(&front, &region).iter().for_each(|ring| ring.stop(&front));
        bench.target.stop().unwrap();
    }
}

#[test]
fn a_stop_ends_with_a_drive_that_never_answers() {
    drains(|front, rings| {
        // Each answers before it stops, and stops where its guest is.
        rings.iter().for_each(|ring| ring.stop(&front));
        rings.iter_mut().for_each(|ring| assert_eq!(ring.poll(), Some(IOERR)));
        Some(front)
    });
}

#[test]
fn a_change_of_memory_ends_with_a_drive_that_never_answers() {
    drains(|front, rings| {
        front.accept(REM_MEM_REG, &Region::new(16 * MIB, MIB).single(), &[]);
        rings.iter_mut().for_each(|ring| assert_eq!(ring.poll(), Some(IOERR)));
        // They go on where they were.
        assert_eq!(rings[0].read_one(0), IOERR);
        Some(front)
    });
}

#[test]
fn a_reset_ends_with_a_drive_that_never_answers() {
    drains(|front, _| {
        front.accept(RESET_DEVICE, &[], &[]);
        Some(front)
    });
}

#[test]
fn a_disconnect_ends_with_a_drive_that_never_answers() {
    drains(|front, rings| {
        drop(front);
        let start = Instant::now();
        // Nobody is there to be answered, and nobody is.
        while start.elapsed() < IO_TIMEOUT {
            rings.iter_mut().for_each(|ring| assert_eq!(ring.poll(), None));
        }
        None
    });
}

#[test]
fn the_end_of_the_program_does_not_wait_for_a_drive_that_never_answers() {
    for stuck in [Stuck::Resettable, Stuck::Wholly] {
        let bench = Bench::new();
        let front = bench.connect();
        let region = Region::new(0, MIB);
        region.add(&front);
        let mut rings = rings(&front, &region);
        bench.stick(stuck, &mut rings);
        let start = Instant::now();
        bench.target.stop().unwrap();
        let took = start.elapsed();
        assert!(took < LIMIT, "{stuck:?}: it took {took:?}");
    }
}

/// Nothing of a guest is under way, so that no request tells that the drive does not answer: an admin command does.
#[test]
fn an_idle_drive_that_never_answers_is_reset() {
    let bench = Bench::new();
    let region = Region::new(0, MIB);
    for _ in 0..2 {
        let front = bench.connect();
        region.add(&front);
        let rings = rings(&front, &region);
        bench.simulator.faults().change(|plan| plan.stopped = true);
        let start = Instant::now();
        // Its queue pairs are to be deleted.
        rings.iter().for_each(|ring| ring.stop(&front));
        drop(front);
        drop(bench.connect());
        let took = start.elapsed();
        assert!(took < LIMIT, "it took {took:?}");
        bench.simulator.faults().clear();
        let front = bench.connect();
        let mut ring = Ring::new(&region, 0, 0);
        region.add(&front);
        ring.start(&front);
        eventually("the drive works", || ring.read_one(0) == 0);
        ring.stop(&front);
    }
    bench.target.stop().unwrap();
}

/// A ring is stopped while a request of it waits for a place with the drive: whoever has the ring next finds it, once.
#[test]
fn a_request_that_waits_for_room_is_there_after_a_stop() {
    // Three commands at a time.
    let bench = Bench::with(|config| config.queue_entries = 4);
    let region = Region::new(0, MIB);
    for format in [Format::Split, Format::Packed] {
        let front = Front::connect(&bench.folder.path().join("s"));
        front.negotiate_without(F_EVENT_IDX | if format == Format::Split { F_RING_PACKED } else { 0 });
        region.add(&front);
        let mut ring = RawRing::new(&region, 0, 0, format, 64);
        ring.start(&front);
        for round in 0..5 {
            let fired = bench.simulator.faults().fired();
            let time = Duration::from_millis(100);
            bench
                .simulator
                .faults()
                .add(FaultRule { action: FaultAction::Delay(time..=time), when: FaultMatch::default() });
            for at in 0..10 {
                let chain = ring.request(0x40000 + 64 * at, 0, 8 * at, &[writable(0x50000 + 0x1000 * at, 4096)]);
                ring.offer(&chain).unwrap();
            }
            ring.kick();
            // The next one is taken from the ring, too, and waits.
            eventually("all places are taken", || bench.simulator.faults().fired() >= fired + 3);
            let stopped_at = front.vring_base(0);
            bench.simulator.faults().clear();
            // What was answered before.
            let mut answered: u32 = std::iter::from_fn(|| ring.used()).map(|_| 1).sum();
            assert!(answered < 10, "{format:?}, round {round}: the ring was stopped too late");
            ring.start_at(&front, stopped_at);
            ring.kick();
            while answered < 10 {
                ring.wait_used();
                answered += 1;
            }
            (0..10).for_each(|at| assert_eq!(ring.status(0x40000 + 64 * at), 0, "{format:?}, round {round}"));
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(ring.used(), None, "{format:?}, round {round}: an answer too many");
        }
    }
    bench.target.stop().unwrap();
}
