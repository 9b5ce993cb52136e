//! Controllers that fail under running guests: what waits is answered with an error, nothing hangs, the socket stays.

mod common;

use std::cell::{Ref, RefCell};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::*;
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vhost_blk::address::DeviceAddress;
use vhost_blk::config::{ExportSettings, Listen, Settings};
use vhost_blk::target::Target;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;

struct Bench {
    target: Target,
    simulator: RefCell<Option<Simulator>>,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let namespace = NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() };
        let config = Config { namespaces: vec![namespace], ..Config::default() };
        let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let export = |name: &str| ExportSettings {
            device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
            listen: Listen::Path(folder.path().join(name)),
            namespace: None,
            queues: 4,
            queue_size: 256,
            read_only: false,
            serial: None,
        };
        let settings = Settings { cpus: vec![], exports: vec![export("a"), export("b")] };
        let options = Options { io_timeout: Duration::from_millis(300), ..Options::default() };
        let target = Target::start_with(&settings, &options).unwrap();
        Bench { target, simulator: RefCell::new(Some(simulator)), folder }
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
}

/// Two guests at work; the controller fails in the way given.
fn controller_fails(fail: impl Fn(&Bench)) {
    let bench = Bench::new();
    let fronts = [bench.connect("a"), bench.connect("b")];
    let regions = [Region::new(0, MIB), Region::new(0, MIB)];
    let mut rings = Vec::new();
    for (front, region) in fronts.iter().zip(&regions) {
        region.add(front);
        for index in 0..2 {
            let mut ring = Ring::new(region, index, 0x10000 * (u64::from(index) + 1));
            ring.start(front);
            ring.check_io(8);
            rings.push(ring);
        }
    }
    fail(&bench);
    rings.iter_mut().for_each(|ring| ring.submit(0, 0, (ring.data(), 4096)));
    let answers: Vec<u8> = rings.iter_mut().map(Ring::wait).collect();
    assert!(answers.contains(&IOERR), "{answers:?}");
    // Once it is out of operation, every request is answered, and at once.
    eventually("the controller is out of operation", || rings[0].read_one(0) == IOERR);
    for ring in &mut rings {
        assert_eq!(ring.read_one(0), IOERR);
        assert_eq!(ring.write_one(0), IOERR);
    }
    // The front-ends can do everything but I/O: stop, reset, take memory away, leave, and come again.
    for ring in &rings[..2] {
        ring.stop(&fronts[0]);
    }
    fronts[1].accept(RESET_DEVICE, &[], &[]);
    fronts[1].accept(REM_MEM_REG, &regions[1].single(), &[]);
    drop(fronts);
    let again = bench.connect("a");
    assert_eq!(again.config(0, 8), (64 * MIB / 512).to_le_bytes());
    // A guest is told that its disk does not work, instead of waiting for it: at its memory already when nobody is left to
    // map that, else at its ring.
    if again.acknowledged(ADD_MEM_REG, &regions[0].single(), &[regions[0].file.as_raw_fd()]) == 0 {
        let ring = Ring::new(&regions[0], 0, 0x10000);
        ring.enable(&again, true);
        again.set_ring(SET_VRING_NUM, 0, 64);
        again.accept(SET_VRING_ADDR, &ring.addresses(), &[]);
        again.refuse(SET_VRING_KICK, &0u64.to_ne_bytes(), &[ring.kick.as_raw_fd()]);
    }
    let start = Instant::now();
    bench.target.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "it stops without waiting for what will not come");
}

#[test]
fn a_fatal_status() {
    controller_fails(|bench| bench.fault(FaultAction::Fatal));
}

#[test]
fn a_controller_that_stops() {
    controller_fails(|bench| bench.fault(FaultAction::Stop));
}

#[test]
fn a_controller_pulled_out() {
    controller_fails(|bench| bench.simulator().remove());
}

#[test]
fn a_controller_whose_server_dies() {
    controller_fails(|bench| drop(bench.simulator.take()));
}

#[test]
fn a_completion_that_never_comes() {
    controller_fails(|bench| bench.fault(FaultAction::LoseCompletion));
}

#[test]
fn one_command_that_fails_concerns_nobody_else() {
    let bench = Bench::new();
    let front = bench.connect("a");
    let region = Region::new(0, MIB);
    region.add(&front);
    let mut ring = Ring::new(&region, 0, 0x10000);
    ring.start(&front);
    bench.fault(FaultAction::Fail(nvme_sim::Status::new(0, 6)));
    assert_eq!(ring.read_one(0), IOERR);
    ring.check_io(0);
    assert_eq!(bench.target.totals().errors, 1);
}

#[test]
fn a_front_end_leaves_while_the_drive_is_slow() {
    let bench = Bench::new();
    for _ in 0..3 {
        let front = bench.connect("a");
        let region = Region::new(0, MIB);
        region.add(&front);
        let mut ring = Ring::new(&region, 0, 0x10000);
        ring.start(&front);
        ring.check_io(0);
        let fired = bench.simulator().faults().fired();
        bench.fault(FaultAction::Delay(Duration::from_millis(100)..=Duration::from_millis(150)));
        ring.submit(0, 0, (ring.data(), 4096));
        eventually("the command is with the drive", || bench.simulator().faults().fired() > fired);
        drop(front);
        // The next one is served only when nothing of the last one is under way any more.
        bench.connect("a");
        assert_eq!(ring.poll(), Some(0));
        bench.simulator().faults().clear();
    }
}
