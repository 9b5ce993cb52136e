//! A whole comparison in guests, as a user starts it, on whatever accelerator works here.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use compare::{Accelerator, Comparison, Side, Way};

/// On an emulated CPU and a busy machine; a fraction of it otherwise.
const LIMIT: Duration = Duration::from_secs(300);

fn vhost_blk() -> PathBuf {
    let path = std::env::var_os("VHOST_BLK").map_or_else(|| e2e::build_dir().join("release/vhost-blk"), PathBuf::from);
    assert!(path.is_file(), "{} is not there: cargo build --release, or set VHOST_BLK", path.display());
    path
}

/// How the program ended.
struct Run {
    success: bool,
    /// What it wrote on standard error.
    errors: String,
    /// The number its process had.
    id: u32,
}

/// Runs the program to its end.
fn compare(arguments: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("errors");
    let mut child = Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(arguments)
        .env("VHOST_BLK", vhost_blk())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() >= deadline {
            // Its guests end with it.
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let errors = std::fs::read_to_string(&log).unwrap();
    let status = status.unwrap_or_else(|| panic!("compare took longer than {LIMIT:?}: {errors}"));
    Run { success: status.success(), errors, id: child.id() }
}

#[test]
fn both_sides_run_the_same_jobs_and_are_charged() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let run = compare(&[
        "--guest",
        "--job",
        "randwrite-4k-q32",
        "--job",
        "randread-4k-q256-x2",
        "--disks",
        "2",
        "--queues",
        "2",
        "--seconds",
        "1",
        "--repeat",
        "1",
        "--size",
        "32M",
        "--json",
        json.to_str().unwrap(),
    ]);
    assert!(run.success, "{}", run.errors);
    let comparison: Comparison = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(comparison.way, Way::Guest);
    assert!(comparison.is_success());
    assert_eq!(comparison.rows.len(), 2);
    for row in &comparison.rows {
        let sides = row.results.iter().map(|results| results.side).collect::<Vec<_>>();
        assert_eq!(sides, [Side::VhostBlk, Side::DataPlane], "{}", row.job.name);
        for results in &row.results {
            let (name, samples) = (&row.job.name, results.samples().collect::<Vec<_>>());
            let [sample] = samples[..] else { panic!("{name}: {} rounds", samples.len()) };
            assert!(sample.operations > 0 && sample.errors == 0, "{name}: {sample:?}");
            assert!((0.9..10.0).contains(&sample.seconds), "{name}: {sample:?}");
            assert!(sample.cpu_seconds > 0.0, "{name}: {sample:?}");
            assert!(0.0 < sample.p50_us && sample.p50_us <= sample.p99_us && sample.p99_us <= sample.p999_us);
            // Only our side has a drive in software; it did something for these requests.
            let drive = sample.drive_cpu_seconds;
            assert_eq!(drive.is_some(), results.side == Side::VhostBlk, "{name}: {sample:?}");
        }
    }
    let environment = &comparison.environment;
    let note = &comparison.notes[0];
    match environment.accelerator {
        Accelerator::Kvm => assert_eq!(note, "Accelerator: KVM."),
        Accelerator::Emulation => assert!(note.contains("they are not performance"), "{note}"),
        Accelerator::NoGuest => panic!("there were guests"),
    }
    let storage = |side: Side| &environment.sides.iter().find(|info| info.side == side).unwrap().storage;
    assert!(storage(Side::VhostBlk).contains("simulated NVMe drive"), "{}", storage(Side::VhostBlk));
    assert!(storage(Side::DataPlane).contains("/dev/shm") && storage(Side::DataPlane).contains("aio="));
    let files = std::fs::read_dir("/dev/shm").unwrap().flatten().map(|entry| entry.file_name());
    let own = format!("compare-{}-", run.id);
    let left = files.filter(|name| name.to_string_lossy().starts_with(&own)).collect::<Vec<_>>();
    assert!(left.is_empty(), "disks in memory were left behind: {left:?}");
}

#[test]
fn what_is_missing_is_told_at_once() {
    let start = Instant::now();
    let Run { success, errors, .. } = compare(&["--guest", "--kernel", "/no/kernel", "--job", "randread-4k-q1"]);
    assert!(!success);
    assert!(errors.starts_with("compare: ") && errors.contains("/no/kernel"), "{errors}");
    let Run { success, errors, .. } =
        compare(&["--guest", "--device", "0000:01:00.0", "--kernel-device", "/dev/nvme0n1"]);
    assert!(!success && errors.contains("--overwrite"), "{errors}");
    assert!(start.elapsed() < LIMIT / 3);
}
