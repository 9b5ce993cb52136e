//! Controllers that are not as kind as the embedded one: they stand in this process, on a vfio-user socket.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blk_perf::Workload;
use e2e::Target;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultPlan, FaultRule, NamespaceConfig, Simulator, Status};

use super::{MIB, alone, folder, options, run, run_clean, seed, verified};

/// Opcodes of the NVM command set (NVM Command Set 1.0, figure 12).
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
/// Status code type 2 (media and data integrity errors), "Unrecovered Read Error" and "Write Fault" (NVMe Base 2.0, 4.2.3.3).
const UNRECOVERED_READ: Status = Status::new(2, 0x81);
const WRITE_FAULT: Status = Status::new(2, 0x80);

/// A controller as `config` says with one namespace of `MIB`, served by the program.
fn serve(folder: &tempfile::TempDir, config: Config) -> (Simulator, Target) {
    let namespace = NamespaceConfig { bytes: MIB << 20, ..NamespaceConfig::default() };
    let config = Config { namespaces: vec![namespace], volatile_write_cache: true, ..config };
    let simulator = Simulator::start(config, &folder.path().join("nvme.sock")).expect("a controller can be started");
    let device = format!("vfio-user:{}", simulator.socket().display());
    let socket = folder.path().join("disk.sock");
    let arguments = ["--device", &device, "--socket-path", socket.to_str().expect("a test's path is UTF-8")];
    let target = Target::vhost_blk(folder.path(), &arguments, vec![socket.clone()]);
    (simulator, target.expect("the target serves a disk"))
}

fn often(action: FaultAction, opcode: Option<u8>, probability: f64) -> FaultRule {
    FaultRule { action, when: FaultMatch { opcode, probability, ..FaultMatch::default() } }
}

#[test]
fn errors_of_the_drive_are_the_guests_and_nobody_elses() {
    let _alone = alone();
    let folder = folder();
    let (simulator, target) = serve(&folder, Config::default());
    let failing = |read: Status, write: Status| FaultPlan {
        seed: seed(),
        rules: vec![
            often(FaultAction::Fail(read), Some(READ), 0.01),
            often(FaultAction::Fail(write), Some(WRITE), 0.01),
        ],
        ..FaultPlan::default()
    };
    for packed in [false, true] {
        // What may be tried again is, and works then: nobody notices.
        simulator.faults().set(failing(UNRECOVERED_READ, WRITE_FAULT));
        let fired = simulator.faults().fired();
        run_clean(&options(target.socket(), 2, packed), &verified(10_000));
        assert!(simulator.faults().fired() > fired + 20, "nothing failed");
        simulator.faults().set(failing(UNRECOVERED_READ.not_to_be_retried(), WRITE_FAULT.not_to_be_retried()));
        let report = run(&options(target.socket(), 2, packed), &verified(10_000)).expect("the run goes on");
        assert!(report.io_errors > 0, "{report:#?}");
        assert!(!report.is_success(), "{report:#?}");
        assert!(report.failures.iter().any(|failure| failure.contains("the device failed a ")), "{report:#?}");
        // What did not fail is right.
        assert_eq!((report.operations, report.verify_errors), (10_000, 0), "{report:#?}");
        simulator.faults().clear();
        run_clean(&options(target.socket(), 2, packed), &verified(5_000));
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn completions_in_any_order_and_late() {
    let _alone = alone();
    let folder = folder();
    let (simulator, target) = serve(&folder, Config::default());
    let late = Duration::ZERO..=Duration::from_millis(2);
    simulator.faults().set(FaultPlan {
        seed: seed(),
        rules: vec![often(FaultAction::Delay(late), None, 0.1)],
        reorder: true,
        ..FaultPlan::default()
    });
    for packed in [false, true] {
        run_clean(&options(target.socket(), 3, packed), &verified(5_000));
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn small_transfers_boundaries_and_no_sgl() {
    let _alone = alone();
    for (max_transfer, noiob, sgl, shadow_doorbells) in
        [(Some(16 << 10), 0, false, false), (Some(64 << 10), 24, false, true), (None, 32, true, false)]
    {
        let folder = folder();
        let config = Config { max_transfer, noiob, sgl, shadow_doorbells, ..Config::default() };
        let (_simulator, target) = serve(&folder, config);
        run_clean(&options(target.socket(), 2, noiob == 24), &verified(5_000));
        target.stop().expect("the target ends cleanly");
    }
}

#[test]
fn more_queues_than_the_controller_has() {
    let _alone = alone();
    let folder = folder();
    let (_simulator, target) = serve(&folder, Config { max_queue_pairs: 2, ..Config::default() });
    run_clean(&options(target.socket(), 6, false), &verified(10_000));
    assert!(target.log().contains("share"), "the log says that queues share a queue pair");
    target.stop().expect("the target ends cleanly");
}

/// Waits for a condition that somebody else brings about.
fn wait_for(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the present controller has done.
fn requests(simulator: &Option<Simulator>) -> u64 {
    simulator.as_ref().map_or(0, |simulator| simulator.counters().commands.load(Ordering::Relaxed))
}

#[test]
fn a_drive_leaves_under_load_and_comes_back() {
    let _alone = alone();
    // Requests wait for it, or fail at once.
    for (packed, hold) in [(false, "30"), (true, "0")] {
        let folder = folder();
        let file = folder.path().join("blocks.img");
        let config = || Config {
            namespaces: vec![NamespaceConfig {
                bytes: MIB << 20,
                file: Some(file.clone()),
                ..NamespaceConfig::default()
            }],
            ..Config::default()
        };
        let nvme = folder.path().join("nvme.sock");
        let device = format!("vfio-user:{}", nvme.display());
        let socket = folder.path().join("disk.sock");
        let path = socket.to_str().expect("a test's path is UTF-8");
        let arguments = ["--device", &device, "--socket-path", path, "--hold", hold];
        let start = || Simulator::start(config(), &nvme).expect("a controller can be started");
        let mut simulator = Some(start());
        let target = Target::vhost_blk(folder.path(), &arguments, vec![socket.clone()]).expect("it serves a disk");
        let stop = AtomicBool::new(false);
        // The rate leaves the model blocks that no failed write has touched.
        let workload = Workload::verified(seed()).at_rate(1000);
        let options = options(&socket, 2, packed);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| blk_perf::run(&options, &workload, &stop, |_| {}));
            for round in 1..=2 {
                wait_for("requests", || requests(&simulator) > 200);
                drop(simulator.take());
                wait_for("its absence", || target.log().matches("out of operation").count() == round);
                wait_for("an attempt", || target.log().matches("not back yet").count() == round);
                simulator = Some(start());
                wait_for("its return", || target.log().matches("the drive is back").count() == round);
            }
            wait_for("requests", || requests(&simulator) > 200);
            stop.store(true, Ordering::Relaxed);
            let report = client.join().expect("the client does not panic").expect("the run goes on");
            assert_eq!((report.io_errors > 0, report.is_success()), (hold == "0", hold != "0"), "{report:#?}");
            assert!(report.is_right_where_it_worked(), "{report:#?}");
            assert!(report.blocks_read_back > 1000, "{report:#?}");
        });
        run_clean(&self::options(&socket, 2, packed), &verified(2_000));
        target.stop().expect("the target ends cleanly");
    }
}
