//! The program's way `--frontend`, with real targets on both sides. They must be there: this project's program (`VHOST_BLK`,
//! or built by cargo) and `qemu-storage-daemon`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use compare::{Comparison, Outcome, Sample, Side, Way};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const LIMIT: Duration = Duration::from_secs(180);

/// This project's target: of the environment, or what cargo has built.
fn vhost_blk() -> PathBuf {
    if let Some(path) = std::env::var_os("VHOST_BLK") {
        return path.into();
    }
    let folder = Path::new(env!("CARGO_BIN_EXE_compare")).parent().unwrap().parent().unwrap();
    let built = ["release", "debug"].map(|kind| folder.join(kind).join("vhost-blk"));
    built.into_iter().find(|path| path.is_file()).expect("build vhost-blk first: cargo build --release")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_compare"));
    command.args(arguments).env("VHOST_BLK", vhost_blk()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

struct Ended {
    success: bool,
    stdout: String,
    stderr: String,
}

/// Waits for the end, and kills at the deadline.
fn end(mut child: Child) -> Ended {
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("no end within {LIMIT:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { success: output.status.success(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn run(arguments: &[&str]) -> Ended {
    end(command(arguments).spawn().unwrap())
}

fn read(path: &Path) -> Comparison {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn samples(comparison: &Comparison, job: &str, side: Side) -> Vec<Sample> {
    let row = comparison.rows.iter().find(|row| row.job.name == job).unwrap_or_else(|| panic!("no {job}"));
    row.side(side).unwrap_or_else(|| panic!("no {side}")).samples().cloned().collect()
}

/// What the program says when it gives up: one line.
fn refusal(arguments: &[&str]) -> String {
    let ended = run(arguments);
    assert!(!ended.success && ended.stdout.is_empty(), "{}", ended.stdout);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    ended.stderr.trim().to_owned()
}

#[test]
fn both_sides_are_measured_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("report.json"), folder.path().join("report.html"));
    let jobs = ["randread-4k-q1", "write-1m-q8", "randwrite-4k-q32-x2", "randread-4k-q128-10000iops"];
    let mut arguments =
        vec!["--frontend", "--null", "--seconds", "0.3", "--repeat", "2", "--disks", "2", "--size", "16M"];
    arguments.extend(["--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()]);
    jobs.iter().for_each(|job| arguments.extend(["--job", job]));
    let ended = run(&arguments);
    assert!(ended.success, "{}\n{}", ended.stdout, ended.stderr);

    let report = read(&json);
    assert_eq!((report.way, report.rows.len()), (Way::Frontend, jobs.len()));
    for job in jobs {
        for side in [Side::VhostBlk, Side::DataPlane, Side::DataPlaneNull] {
            let samples = samples(&report, job, side);
            assert_eq!(samples.len(), 2, "{job} on {side}");
            for sample in samples {
                assert!(sample.operations > 0 && sample.errors == 0, "{job} on {side}: {sample:?}");
                assert!(sample.seconds >= 0.3 && sample.mib_per_s > 0.0, "{job} on {side}: {sample:?}");
                let latencies = [sample.p50_us, sample.p99_us, sample.p999_us];
                assert!(sample.mean_us > 0.0 && latencies.is_sorted(), "{job} on {side}: {sample:?}");
                assert_eq!(sample.drive_cpu_seconds.is_some(), side == Side::VhostBlk, "{job} on {side}");
                assert!(sample.cores() < 64.0);
            }
        }
    }
    // Whoever answers takes CPU time; the rounds are too short for each of them to be sure of it.
    let sum = |side, part: fn(&Sample) -> f64| {
        jobs.iter().flat_map(|job| samples(&report, job, side)).map(|sample| part(&sample)).sum::<f64>()
    };
    assert!(sum(Side::VhostBlk, |sample| sample.cpu_seconds) > 0.0);
    assert!(sum(Side::VhostBlk, |sample| sample.drive_cpu_seconds.unwrap()) > 0.0);
    assert!(sum(Side::DataPlane, |sample| sample.cpu_seconds) > 0.0);
    // The open loop starts no more than its rate.
    for side in [Side::VhostBlk, Side::DataPlane] {
        for sample in samples(&report, "randread-4k-q128-10000iops", side) {
            assert!(sample.iops < 10_100.0, "{sample:?}");
        }
    }
    let badly = report.notes.iter().find(|note| note.contains("it was to end: vhost-blk"));
    assert_eq!(badly, None);
    assert!(ended.stdout.contains("4 KiB random write, depth 32, 2 disks"), "{}", ended.stdout);
    assert!(std::fs::read_to_string(&html).unwrap().contains("<svg"));
}

#[test]
fn one_side_at_a_time_can_be_joined() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (socket, disk, ours, base) = (path("drive.sock"), path("disk"), path("ours.json"), path("base.json"));
    std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let serve = [&format!("--serve-drive={socket}"), "--drive-bytes=16777216"];
    let mut drive = command(&serve).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while !Path::new(&socket).exists() {
        assert!(Instant::now() < deadline && drive.try_wait().unwrap().is_none(), "no drive");
        std::thread::sleep(Duration::from_millis(5));
    }
    let common = ["--frontend", "--seconds", "0.1", "--repeat", "1", "--job", "randread-4k-q256", "--json"];
    let device = format!("vfio-user:{socket}");
    let first = run(&[&common[..], &[&ours, "--device", &device]].concat());
    let second = run(&[&common[..], &[&base, "--kernel-device", &disk]].concat());
    kill_process(Pid::from_child(&drive), Signal::TERM).unwrap();
    assert!(end(drive).success);
    assert!(first.success && second.success, "{}{}", first.stderr, second.stderr);
    assert!(first.stdout.contains("One side only"), "{}", first.stdout);
    assert_eq!(samples(&read(Path::new(&ours)), "randread-4k-q256", Side::VhostBlk)[0].drive_cpu_seconds, None);

    let merged = run(&["--merge", &ours, &base, "--json", "-"]);
    let report: Comparison = serde_json::from_str(&merged.stdout).unwrap();
    assert_eq!(report.rows.len(), 1);
    assert_eq!(report.rows[0].results.iter().map(|r| r.side).collect::<Vec<_>>(), [Side::VhostBlk, Side::DataPlane]);
    assert!(refusal(&["--merge", &ours, &ours]).contains("both have randread-4k-q256 on vhost-blk"));
    assert!(refusal(&["--merge", &disk]).contains("is not a report of this program"));
}

#[test]
fn a_target_that_dies_is_a_failed_round() {
    let folder = tempfile::tempdir().unwrap();
    let (script, json) = (folder.path().join("dies"), folder.path().join("report.json"));
    // Dies in the middle of the first round: after it was held once and went on.
    let text = format!(
        "#!/bin/sh\nstopped() {{ kill -0 $$ 2>/dev/null || exit; grep -q '^State:.T' /proc/$$/status; }}\n\
         (until stopped; do sleep 0.01; done; while stopped; do sleep 0.01; done; sleep 0.3; kill -9 $$) &\n\
         exec {} \"$@\"\n",
        vhost_blk().display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut arguments =
        vec!["--frontend", "--seconds", "2", "--repeat", "1", "--size", "8M", "--job", "randread-4k-q256"];
    arguments.extend(["--json", json.to_str().unwrap(), "--vhost-blk", script.to_str().unwrap()]);
    let ended = run(&arguments);
    assert!(!ended.success, "{}", ended.stdout);
    let report = read(&json);
    let [Outcome::Failed(why)] = &report.rows[0].side(Side::VhostBlk).unwrap().rounds[..] else {
        panic!("not failed: {}", ended.stdout);
    };
    assert!(why.contains("vhost-blk ended with signal: 9"), "{why}");
    assert_eq!(samples(&report, "randread-4k-q256", Side::DataPlane).len(), 1);
    assert!(ended.stdout.contains("  vhost-blk  failed: "), "{}", ended.stdout);
}

#[test]
fn what_is_missing_or_wrong_is_one_clear_line() {
    let cases: [(&[&str], &str); 7] = [
        (
            &["--frontend", "--storage-daemon", "/no/such/daemon"],
            "compare: /no/such/daemon was not found; install QEMU's tools",
        ),
        (&["--frontend", "--vhost-blk", "/no/such/target"], "compare: /no/such/target was not found; build it with"),
        (&["--frontend", "--job", "fast"], "compare: there is no job fast; there are: randwrite-4k-q32, "),
        (&["--frontend", "--cpus", "1023"], "compare: CPU 1023 is not there"),
        (&["--frontend", "--depth", "512"], "compare: randread-4k-q512: a queue holds at most 341 requests"),
        (
            &["--frontend", "--size", "64M", "--block-size", "128M"],
            "compare: randread-128m-q32: 134217728 bytes per request",
        ),
        (&["--merge", "/no/such/report"], "compare: reading /no/such/report: "),
    ];
    for (arguments, expected) in cases {
        let said = refusal(arguments);
        assert!(said.starts_with(expected), "{said}");
    }
    // One that ends at once is told with its last words.
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("ends");
    std::fs::write(&script, "#!/bin/sh\necho no luck today\nexit 3\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let said = refusal(&["--frontend", "--size", "8M", "--vhost-blk", script.to_str().unwrap()]);
    assert_eq!(said, "compare: vhost-blk ended with exit status: 3: no luck today");
}

#[test]
fn a_disk_that_holds_something_is_refused_and_left_alone() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let mut content = vec![0; 4 << 20];
    content[1024] = 0x53;
    std::fs::write(disk.path(), &content).unwrap();
    let path = disk.path().to_str().unwrap();
    let said = refusal(&["--frontend", "--kernel-device", path]);
    assert_eq!(
        said,
        format!(
            "compare: {path}: there is data on it, at byte 1024; the jobs write all over it: add --overwrite if what it holds may be lost"
        )
    );
    assert!(std::fs::read(disk.path()).unwrap() == content);
    // Reading destroys nothing.
    let reads = ["--frontend", "--seconds", "0.1", "--repeat", "1", "--job", "randread-4k-q1", "--kernel-device", path];
    let ended = run(&reads);
    assert!(ended.success, "{}", ended.stderr);
    assert!(std::fs::read(disk.path()).unwrap() == content);
    let writes = ["--frontend", "--seconds", "0.3", "--repeat", "1", "--job", "randwrite-4k-q32", "--overwrite"];
    let ended = run(&[&writes[..], &["--kernel-device", path]].concat());
    assert!(ended.success, "{}", ended.stderr);
}

#[test]
fn ctrl_c_ends_it_in_order() {
    let child = command(&["--frontend", "--seconds", "30", "--repeat", "1", "--size", "8M"]).spawn().unwrap();
    let parent = child.id();
    let children = || {
        let stat = |id: u32| std::fs::read_to_string(format!("/proc/{id}/stat")).ok();
        let is_child = |id: &u32| {
            let line = stat(*id).unwrap_or_default();
            let after_name = line.rsplit_once(')').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            after_name.split_ascii_whitespace().nth(1) == Some(&parent.to_string())
        };
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect::<Vec<u32>>()
    };
    let deadline = Instant::now() + LIMIT;
    // The drive, the target, the storage daemon.
    while children().len() < 3 {
        assert!(Instant::now() < deadline, "its programs do not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let started = children();
    kill_process(Pid::from_raw(parent.cast_signed()).unwrap(), Signal::INT).unwrap();
    let ended = end(child);
    assert!(!ended.success);
    assert_eq!(ended.stderr, "compare: interrupted\n");
    for id in started {
        let gone = test_kill_process(Pid::from_raw(id.cast_signed()).unwrap());
        assert!(gone.is_err(), "process {id} is left behind");
    }
}
