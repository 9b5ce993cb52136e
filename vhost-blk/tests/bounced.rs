//! Requests whose data is copied, because the drive cannot reach it where it lies, under a drive that misbehaves: they fare like
//! all others.

mod common;

use std::time::{Duration, Instant};

use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator, Status};
use vhost_blk::control::config::{DriveTimeouts, ExportSettings, Listen, Settings};
use vhost_blk::control::target::Target;
use vhost_blk::drive::DeviceAddress;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;
const READ: u32 = 0;
const INTERNAL_ERROR: Status = Status::new(0, 6);

/// No PRP may point there.
const ODD: u64 = 2;

struct Bench {
    target: Target,
    simulator: Simulator,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(retry_delays: [u16; 3]) -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let namespaces = vec![NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() }];
        let config = Config { namespaces, sgl: false, retry_delays, ..Config::default() };
        let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let export = ExportSettings {
            device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
            listen: Listen::Path(folder.path().join("s")),
            namespace: None,
            queues: 1,
            queue_size: 256,
            queue_pairs: None,
            read_only: false,
            serial: None,
        };
        let timeouts = DriveTimeouts::with(None, Some(Duration::from_secs(600)));
        let settings = Settings { timeouts, exports: vec![export], ..Settings::default() };
        let options = Options {
            io_timeout: Duration::from_millis(300),
            admin_timeout: Duration::from_secs(1),
            ..Options::default()
        };
        let target = Target::start_with(&settings, &options).unwrap();
        Bench { target, simulator, folder }
    }

    /// The first front-end, and its ring.
    fn ring<'a>(&self, region: &'a Region) -> (Front, Ring<'a>) {
        let front = Front::connect(&self.folder.path().join("s"));
        front.negotiate();
        let ring = Ring::first(&front, region);
        (front, ring)
    }

    fn fault(&self, action: FaultAction, limit: Option<u64>) {
        self.simulator.faults().add(FaultRule { action, when: FaultMatch { limit, ..FaultMatch::default() } });
    }

    /// Waits until so many requests have failed, so many were tried again, and so many were copied.
    fn counts(&self, errors: u64, again: u64, copies: u64) {
        eventually("the counters", || {
            let totals = self.target.totals();
            assert!((totals.errors, totals.again) <= (errors, again), "{totals:?}");
            (totals.errors, totals.again, totals.copies) == (errors, again, copies)
        });
    }
}

/// Where a request's data is copied.
fn odd(ring: &Ring) -> u64 {
    ring.data() + ODD
}

fn check_copied_io(ring: &mut Ring, sector: u64) {
    ring.check_io_at(sector, odd(ring), odd(ring) + 0x1000);
}

#[test]
fn a_command_that_may_be_tried_again_is() {
    let bench = Bench::new([0; 3]);
    let region = Region::new(0, MIB);
    let (_front, mut ring) = bench.ring(&region);
    check_copied_io(&mut ring, 0);
    bench.counts(0, 0, 2);
    bench.fault(FaultAction::Fail(INTERNAL_ERROR), Some(3));
    check_copied_io(&mut ring, 8);
    bench.counts(0, 3, 4);
    // What may not be tried again is not.
    bench.fault(FaultAction::Fail(INTERNAL_ERROR.not_to_be_retried()), Some(1));
    assert_eq!(ring.request(READ, 0, (odd(&ring), 4096)), IOERR);
    bench.counts(1, 3, 5);
    // Not for ever.
    bench.fault(FaultAction::Fail(INTERNAL_ERROR), None);
    assert_eq!(ring.request(READ, 0, (odd(&ring), 4096)), IOERR);
    bench.counts(2, 3 + 5, 6);
}

/// The data of one request, in several pieces: each piece that failed is asked for again, and no other.
#[test]
fn a_piece_that_may_be_tried_again_is() {
    let bench = Bench::new([0; 3]);
    let region = Region::new(0, MIB);
    let (_front, mut ring) = bench.ring(&region);
    let bytes = 256 << 10;
    let when = FaultMatch { blocks: Some(200..=207), limit: Some(2), ..FaultMatch::default() };
    bench.simulator.faults().add(FaultRule { action: FaultAction::Fail(INTERNAL_ERROR), when });
    assert_eq!(ring.request(READ, 0, (0x40000 + ODD, bytes)), 0);
    bench.counts(0, 2, 1);
    assert_eq!(bench.target.totals().bytes_read, u64::from(bytes));
}

#[test]
fn a_retry_waits_as_long_as_the_drive_wants() {
    let bench = Bench::new([0, 2, 0]);
    let region = Region::new(0, MIB);
    let (_front, mut ring) = bench.ring(&region);
    for (delay, least) in [(1, Duration::ZERO), (2, Duration::from_millis(200))] {
        bench.fault(FaultAction::Fail(INTERNAL_ERROR.with_retry_delay(delay)), Some(1));
        let start = Instant::now();
        assert_eq!(ring.request(READ, 0, (odd(&ring), 4096)), 0);
        assert!(start.elapsed() >= least, "tried again after {:?}", start.elapsed());
    }
    bench.counts(0, 2, 2);
}

#[test]
fn a_request_that_no_reset_helps_fails_and_the_disk_lives() {
    let bench = Bench::new([0; 3]);
    let region = Region::new(0, MIB);
    let (_front, mut ring) = bench.ring(&region);
    check_copied_io(&mut ring, 0);
    // Whoever reads this block waits for ever.
    let poisoned = FaultMatch { blocks: Some(800..=807), ..FaultMatch::default() };
    bench.simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: poisoned });
    assert_eq!(ring.request(READ, 800, (odd(&ring), 4096)), IOERR);
    eventually("the drive is back", || ring.read_one(0) == 0);
    check_copied_io(&mut ring, 8);
    // Five times with the drive: once, and again after each failure but the last.
    eventually("the counters", || bench.target.totals().again == 4);
    assert_eq!(bench.target.totals().copies, 5);
}
