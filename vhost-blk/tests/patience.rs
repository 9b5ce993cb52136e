//! How long requests wait for a drive that fails: as long as was said, whatever the drive does meanwhile, and whatever other
//! drives do.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vhost_blk::control::config::{DriveTimeouts, ExportSettings, Listen, Settings};
use vhost_blk::control::target::Target;
use vhost_blk::drive::DeviceAddress;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;
const IO_TIMEOUT: Duration = Duration::from_millis(300);

/// A target of several drives, with an export each: `0`, `1`, and so on.
struct Bench {
    // Dropped in this order.
    target: Target,
    simulators: Vec<Arc<Simulator>>,
    folder: tempfile::TempDir,
}

impl Bench {
    /// `ready`: how long each drive may say that it needs to start and to stop.
    fn new(ready: &[Duration], hold: Duration) -> Bench {
        let options = Options { io_timeout: IO_TIMEOUT, admin_timeout: Duration::from_secs(1), ..Options::default() };
        Bench::start(ready, hold, &options, false)
    }

    /// One drive, with a volatile write cache.
    fn with_cache(io_timeout: Duration) -> Bench {
        let options = Options { io_timeout, ..Options::default() };
        Bench::start(&[Duration::from_secs(20)], Duration::from_secs(600), &options, true)
    }

    fn start(ready: &[Duration], hold: Duration, options: &Options, volatile_write_cache: bool) -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let (mut simulators, mut exports) = (Vec::new(), Vec::new());
        for (number, &ready_timeout) in ready.iter().enumerate() {
            let namespace = NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() };
            let config =
                Config { namespaces: vec![namespace], ready_timeout, volatile_write_cache, ..Config::default() };
            let simulator = Simulator::start(config, &folder.path().join(format!("nvme{number}"))).unwrap();
            exports.push(ExportSettings {
                device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
                listen: Listen::Path(folder.path().join(number.to_string())),
                namespace: None,
                queues: 1,
                queue_size: 256,
                queue_pairs: None,
                read_only: false,
                serial: None,
            });
            simulators.push(Arc::new(simulator));
        }
        let settings = Settings { timeouts: DriveTimeouts::with(None, Some(hold)), exports, ..Settings::default() };
        let target = Target::start_with(&settings, options).unwrap();
        Bench { target, simulators, folder }
    }

    fn connect(&self, export: usize) -> Front {
        let front = Front::connect(&self.folder.path().join(export.to_string()));
        front.negotiate();
        front
    }

    fn fault(&self, drive: usize, action: FaultAction, when: FaultMatch) {
        self.simulators[drive].faults().add(FaultRule { action, when });
    }
}

#[test]
fn a_request_that_makes_the_drive_disappear_each_time_fails_and_the_disk_lives() {
    let bench = Bench::new(&[Duration::from_secs(1)], Duration::from_secs(600));
    let region = Region::new(0, MIB);
    let front = bench.connect(0);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    bench.fault(0, FaultAction::Remove, FaultMatch { blocks: Some(800..=807), ..FaultMatch::default() });
    // Somebody restarts it whenever it has died.
    let (simulator, done) = (bench.simulators[0].clone(), Arc::new(AtomicBool::new(false)));
    let (healer_done, mut fired) = (done.clone(), 0);
    let healer = std::thread::spawn(move || {
        while !healer_done.load(Ordering::Relaxed) {
            if simulator.faults().fired() > fired {
                fired = simulator.faults().fired();
                simulator.reinsert().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    assert_eq!(ring.read_one(800), IOERR);
    assert_eq!(bench.simulators[0].faults().fired(), 5);
    eventually("the drive is back", || ring.read_one(8) == 0);
    ring.check_io(16);
    done.store(true, Ordering::Relaxed);
    healer.join().unwrap();
    bench.target.stop().unwrap();
}

#[test]
fn requests_wait_no_longer_than_was_said_while_the_controller_does_not_start() {
    let bench = Bench::new(&[Duration::from_secs(20)], Duration::from_millis(700));
    let region = Region::new(0, MIB);
    let front = bench.connect(0);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    bench.simulators[0].faults().change(|plan| plan.never_ready = true);
    bench.fault(0, FaultAction::Fatal, FaultMatch { limit: Some(1), ..FaultMatch::default() });
    let start = Instant::now();
    assert_eq!(ring.read_one(0), IOERR);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    bench.simulators[0].faults().clear();
    eventually("the drive is back", || ring.read_one(0) == 0);
    bench.target.stop().unwrap();
}

#[test]
fn a_drive_that_cannot_be_stopped_delays_no_other() {
    let bench = Bench::new(&[Duration::from_secs(8), Duration::from_secs(1)], Duration::from_secs(600));
    let regions = [Region::new(0, MIB), Region::new(0, MIB)];
    let fronts = [bench.connect(0), bench.connect(1)];
    let [mut stuck, mut other] = [0, 1].map(|index| Ring::first(&fronts[index], &regions[index]));
    stuck.check_io(0);
    other.check_io(0);
    bench.simulators[0].faults().change(|plan| (plan.stopped, plan.never_reset) = (true, true));
    stuck.submit(0, 0, (stuck.data(), 4096));
    // The first drive's reset takes longer than all of this: the second one fails before it and during it.
    for _ in 0..4 {
        bench.fault(1, FaultAction::LoseCompletion, FaultMatch { limit: Some(1), ..FaultMatch::default() });
        let start = Instant::now();
        assert_eq!(other.read_one(0), 0);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(7), "{took:?}");
        bench.simulators[1].faults().clear();
    }
    assert_eq!(stuck.poll(), None);
    bench.simulators[0].faults().clear();
    assert_eq!(stuck.wait(), 0);
    bench.target.stop().unwrap();
}

/// A disk of a drive whose server takes `delay` for a message, for a second, with a write in its cache that was not flushed. The longest
/// that a read took meanwhile, and what the flush said.
fn slow_server(io_timeout: Duration, delay: Duration) -> (Duration, u8) {
    let bench = Bench::with_cache(io_timeout);
    let region = Region::new(0, MIB);
    let front = bench.connect(0);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    bench.simulators[0].faults().change(|plan| plan.answer_delay = delay);
    let (start, mut longest, mut cleared) = (Instant::now(), Duration::ZERO, false);
    // The drive is looked at every half second: one look is under way soon, and is answered that late.
    while start.elapsed() < delay + Duration::from_secs(1) {
        let one = Instant::now();
        assert_eq!(ring.read_one(0), 0);
        longest = longest.max(one.elapsed());
        if start.elapsed() > Duration::from_secs(1) && !std::mem::replace(&mut cleared, true) {
            bench.simulators[0].faults().clear();
        }
    }
    let flushed = ring.request(T_FLUSH, 0, (0, 0));
    ring.check_io(8);
    bench.target.stop().unwrap();
    (longest, flushed)
}

#[test]
fn a_server_may_be_as_slow_as_a_command() {
    let (longest, flushed) = slow_server(Duration::from_secs(30), Duration::from_secs(9));
    assert_eq!(flushed, 0);
    assert!(longest < Duration::from_secs(3), "commands need no messages, and took {longest:?}");
}

#[test]
fn a_server_that_is_given_up_and_lives_has_lost_nothing() {
    // The patience with a server is 5 s then.
    let (longest, flushed) = slow_server(Duration::from_secs(1), Duration::from_secs(6));
    assert_eq!(flushed, 0, "the longest read took {longest:?}");
}
