//! The target against a front-end that is not ours: the crate `virtio-driver`, split and packed rings.
//!
//! Every test starts the program `vhost-blk` with an embedded controller on a file. Seeds are printed, so that a
//! failure can be repeated.

mod drives;
mod faults;
mod program;
mod raw;
mod requests;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blk_perf::{ClientOptions, Load, Report, Workload};
use e2e::{Target, seed};

/// A controller, a worker and a client poll: one test at a time is enough for a small machine.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // A test that failed while it held the lock says nothing about the next one.
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder of its own for a test.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder can be made")
}

fn options(socket: &Path, queues: usize, packed: bool) -> ClientOptions {
    ClientOptions { queues, packed, depth: 16, ..ClientOptions::new(socket) }
}

/// Verified requests on the whole of a disk of `MIB`.
fn verified(operations: u64) -> Workload {
    let mut workload = Workload::verified(seed()).for_operations(operations);
    if let Load::Verified { window_bytes, .. } = &mut workload.load {
        *window_bytes = MIB << 20;
    }
    workload
}

/// Size of the disks, in MiB.
const MIB: u64 = 64;

fn run(options: &ClientOptions, workload: &Workload) -> Result<Report, blk_perf::Error> {
    blk_perf::run(options, workload, &AtomicBool::new(false), |_| {})
}

/// Runs `workload`, and fails unless all of it was done and right.
fn run_clean(options: &ClientOptions, workload: &Workload) -> Report {
    let report = run(options, workload).unwrap_or_else(|error| panic!("{options:?}: {error}"));
    assert!(report.is_success(), "{:#?}", report);
    if let Some(operations) = workload.operations {
        assert_eq!(report.operations, operations);
    }
    report
}

/// The whole workload on a fresh disk.
fn verified_load(queues: usize, lba: u32, packed: bool) {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, lba, &[]).expect("the target serves a disk");
    let report = run_clean(&options(target.socket(), queues, packed), &verified(20_000));
    assert!(report.blocks_read_back > 1000, "{report:#?}");
    for (kind, count) in [
        ("reads", report.reads),
        ("writes", report.writes),
        ("flushes", report.flushes),
        ("discards", report.discards),
        ("write zeroes", report.write_zeroes),
    ] {
        assert!(count > 100, "only {count} {kind}: does the disk offer them?");
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn split_1_queue_512_byte_blocks() {
    verified_load(1, 512, false);
}

#[test]
fn split_1_queue_4096_byte_blocks() {
    verified_load(1, 4096, false);
}

#[test]
fn split_4_queues_512_byte_blocks() {
    verified_load(4, 512, false);
}

#[test]
fn split_4_queues_4096_byte_blocks() {
    verified_load(4, 4096, false);
}

#[test]
fn packed_1_queue_512_byte_blocks() {
    verified_load(1, 512, true);
}

#[test]
fn packed_1_queue_4096_byte_blocks() {
    verified_load(1, 4096, true);
}

#[test]
fn packed_4_queues_512_byte_blocks() {
    verified_load(4, 512, true);
}

#[test]
fn packed_4_queues_4096_byte_blocks() {
    verified_load(4, 4096, true);
}

/// A client that sleeps until it is notified, with all ways of asking for notifications.
fn interrupts(packed: bool, event_idx: bool) {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
    for depth in [1, 16] {
        let options = ClientOptions {
            interrupts: true,
            event_idx: Some(event_idx),
            depth,
            ..options(target.socket(), 2, packed)
        };
        let report = run_clean(&options, &verified(5_000));
        assert!(report.client_calls > 0, "{report:#?}");
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn interrupts_split() {
    interrupts(false, false);
}

#[test]
fn interrupts_split_event_idx() {
    interrupts(false, true);
}

#[test]
fn interrupts_packed() {
    interrupts(true, false);
}

#[test]
fn interrupts_packed_event_idx() {
    interrupts(true, true);
}

#[test]
fn a_polling_client_is_not_notified() {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
    for packed in [false, true] {
        for event_idx in [false, true] {
            let options = ClientOptions { event_idx: Some(event_idx), ..options(target.socket(), 1, packed) };
            let report = run_clean(&options, &verified(5_000));
            // The first completion may come before the client has said so.
            assert!(report.client_calls <= 2, "packed {packed}, event_idx {event_idx}: {report:#?}");
        }
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn buffers_in_hundreds_of_memory_regions() {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
    let options = ClientOptions { memory_regions: 256, depth: 64, ..options(target.socket(), 4, false) };
    run_clean(&options, &verified(10_000));
    target.stop().expect("the target ends cleanly");
}

#[test]
fn one_client_after_another_of_another_kind() {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
    for (queues, packed, queue_size) in [(1, false, 0), (4, true, 256), (2, false, 1024), (1, true, 64)] {
        let options = ClientOptions { queue_size, ..options(target.socket(), queues, packed) };
        run_clean(&options, &verified(2_000));
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn two_exports_at_once() {
    let _alone = alone();
    let folder = folder();
    let sockets: Vec<PathBuf> = ["a.sock", "b.sock"].map(|name| folder.path().join(name)).to_vec();
    let config = folder.path().join("vhost-blk.toml");
    let exports: String = sockets
        .iter()
        .zip([512, 4096])
        .map(|(socket, lba)| {
            format!("[[export]]\ndevice = \"sim:{MIB}M,lba={lba}\"\nsocket-path = \"{}\"\n", socket.display())
        })
        .collect();
    std::fs::write(&config, exports).expect("the folder is writable");
    let arguments = ["--config", config.to_str().expect("a test's path is UTF-8")];
    let target = Target::vhost_blk(folder.path(), &arguments, sockets).expect("the target serves two disks");
    std::thread::scope(|scope| {
        for (packed, socket) in [false, true].into_iter().zip(target.sockets()) {
            scope.spawn(move || {
                let options = ClientOptions { threads: 1, ..options(socket, 2, packed) };
                run_clean(&options, &verified(10_000))
            });
        }
    });
    target.stop().expect("the target ends cleanly");
}

#[test]
fn plain_load_is_measured() {
    let _alone = alone();
    let folder = folder();
    let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
    let workload = Workload::plain(seed(), 4096, 70).for_operations(20_000);
    let report = run_clean(&options(target.socket(), 2, false), &workload);
    assert_eq!(report.bytes, 20_000 * 4096);
    assert!(report.reads > report.writes && report.writes > 1000, "{report:#?}");
    assert!(0.0 < report.p50_us && report.p50_us <= report.p99_us && report.p99_us <= report.max_us);
    target.stop().expect("the target ends cleanly");
}
