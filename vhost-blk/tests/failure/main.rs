//! Controllers that fail under running guests: requests wait until they are back, or fail if they may not wait; nothing hangs,
//! the socket stays.

#[path = "../common/mod.rs"]
mod common;
mod controllers;
mod front_ends;
mod losses;
mod retries;

use std::cell::{Ref, RefCell};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vhost_blk::control::config::{DriveTimeouts, ExportSettings, Listen, Settings};
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
            timeouts: DriveTimeouts::with(None, Some(hold)),
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

/// The first front-end, and a ring that works.
fn one_ring<'a>(bench: &Bench, region: &'a Region) -> (Front, Ring<'a>) {
    let front = bench.connect("a");
    let mut ring = Ring::first(&front, region);
    ring.check_io(0);
    (front, ring)
}

const INTERNAL_ERROR: nvme_sim::Status = nvme_sim::Status::new(0, 6);
