//! Front-ends that die, and a target that is stopped under load.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blk_perf::{ClientOptions, Workload};
use e2e::{Target, build_dir};

use super::{MIB, alone, folder, options, run, run_clean, seed, verified};

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `probe` is true.
fn wait_for(what: &str, mut probe: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !probe() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client in a process of its own, so that it can be killed; it is when dropped.
struct ClientProcess(Child);

impl ClientProcess {
    fn start(socket: &Path, more: &[&str]) -> ClientProcess {
        let program = match std::env::var_os("BLK_PERF") {
            Some(path) => PathBuf::from(path),
            None => build_dir().join("release/blk-perf"),
        };
        let child = Command::new(&program)
            .arg("--socket")
            .arg(socket)
            .args(["--verify", "--seconds", "600", "--queues", "2"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let advice = "build it with `cargo build --release --package blk-perf`, or name another build in BLK_PERF";
        ClientProcess(child.unwrap_or_else(|error| panic!("{}: {error}; {advice}", program.display())))
    }

    /// Ends it as a crash would, and waits until it is gone.
    fn kill(mut self) {
        self.0.kill().expect("a child can be killed");
        self.0.wait().expect("a child can be waited for");
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        // Both fail only when it has already been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Descriptors the target has open.
fn descriptors(target: &mut Target) -> usize {
    let folder = format!("/proc/{}/fd", target.process().id());
    std::fs::read_dir(folder).expect("the target runs").count()
}

/// Pieces of memory the target has mapped that came from a front-end or controller.
fn shared_mappings(target: &mut Target) -> usize {
    let maps = format!("/proc/{}/maps", target.process().id());
    let maps = std::fs::read_to_string(maps).expect("the target runs");
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

/// Bytes of the disk's file that have been written.
fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(folder.join("disk.img")).map_or(0, |metadata| metadata.blocks() * 512)
}

#[test]
fn a_client_that_dies_is_forgotten_and_the_next_one_is_served() {
    let _alone = alone();
    let folder = folder();
    let mut target = Target::serve_disk(folder.path(), 1024, 512, &[]).expect("the target serves a disk");
    let mut baseline = None;
    for round in 0..6 {
        let before = allocated(folder.path());
        let mode: &[&str] = if round % 2 == 0 { &[] } else { &["--packed", "--interrupts"] };
        // Another seed, so that every round writes blocks no other round has.
        let client = ClientProcess::start(target.socket(), &[mode, &["--seed", &round.to_string()]].concat());
        wait_for("the client's first megabytes", || allocated(folder.path()) > before + (2 << 20));
        client.kill();
        // A client that came before the dead one is forgotten would wait for its turn; this one finds a whole disk.
        run_clean(&options(target.socket(), 2, round % 2 == 0), &verified(2_000));
        match baseline {
            None => {
                // The first round made what stays.
                let quiet = settled(&mut target);
                baseline = Some(quiet);
            }
            Some(expected) => {
                wait_for("everything of the dead client to be given back", || now(&mut target) <= expected);
            }
        }
    }
    target.stop().expect("the target ends cleanly");
}

fn now(target: &mut Target) -> (usize, usize) {
    (descriptors(target), shared_mappings(target))
}

/// The descriptors and mappings when they have not changed for a while.
fn settled(target: &mut Target) -> (usize, usize) {
    let mut last = (now(target), Instant::now());
    wait_for("the target to settle", || {
        let seen = now(target);
        if seen != last.0 {
            last = (seen, Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(300)
    });
    last.0
}

#[test]
fn a_target_stopped_under_load_drains_and_ends() {
    let _alone = alone();
    for packed in [false, true] {
        let folder = folder();
        let target = Target::serve_disk(folder.path(), MIB, 512, &[]).expect("the target serves a disk");
        let before = allocated(folder.path());
        let options = ClientOptions { stall: Duration::from_secs(1), ..options(target.socket(), 2, packed) };
        std::thread::scope(|scope| {
            let client = scope.spawn(move || run(&options, &Workload::verified(seed())));
            wait_for("the client's first megabytes", || allocated(folder.path()) > before + (1 << 20));
            target.stop().expect("the target ends cleanly under load");
            // A guest sees its disk stop answering, and no wrong data before that.
            let result = client.join().expect("the client does not panic");
            assert!(matches!(result, Err(blk_perf::Error::Stalled { .. })), "{result:?}");
        });
    }
}
