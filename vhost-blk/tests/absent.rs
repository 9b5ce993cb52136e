//! Drives that are not there when the target starts, or do not come up: the disks of the others work, and theirs as soon as
//! they are there. Nobody connects to a socket that is not served.

mod common;
#[path = "common/program.rs"]
mod program;

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use nvme_sim::{Config, FaultPlan, NamespaceConfig, Simulator};
use program::*;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

/// How long the program may take to end with nothing to finish: less than what it may wait for here (a drive's 30 seconds or more).
const PROMPT: Duration = Duration::from_secs(15);

/// A folder with the sockets of controllers and exports in it.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Lab {
        Lab(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(namespaces: usize) -> Config {
        let namespace = NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() };
        Config { namespaces: vec![namespace; namespaces], ..Config::default() }
    }

    /// Puts a controller in.
    fn plug(&self, name: &str) -> Simulator {
        Simulator::start(Lab::config(1), &self.path(name)).unwrap()
    }

    /// The program with these exports: the controller's name, the socket's, and more lines.
    fn configure(&self, exports: &[(&str, &str, &str)]) -> String {
        let text: String = exports
            .iter()
            .map(|(device, socket, more)| {
                let (device, socket) = (self.path(device), self.path(socket));
                format!(
                    "[[export]]\ndevice = \"vfio-user:{}\"\nsocket-path = \"{}\"\n{more}\n",
                    device.display(),
                    socket.display()
                )
            })
            .collect();
        std::fs::write(self.path("c.toml"), text).unwrap();
        self.path("c.toml").to_str().unwrap().to_owned()
    }

    fn start(&self, exports: &[(&str, &str, &str)]) -> Program {
        Program::start(&["--config", &self.configure(exports)], None)
    }
}

/// A front-end that comes, does some I/O and goes.
fn check_disk(path: &Path) {
    let mut stream = None;
    eventually("its socket is served", || {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    let front = Front::on(stream.unwrap());
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(8);
    ring.stop(&front);
}

#[track_caller]
fn ends_promptly(mut program: Program) {
    let begin = Instant::now();
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
}

#[test]
fn a_drive_that_is_not_there_costs_its_own_disks_only() {
    let lab = Lab::new();
    let _present = lab.plug("present");
    let program = lab.start(&[("absent", "a", ""), ("present", "p", ""), ("absent", "b", "")]);
    check_disk(&lab.path("p"));
    program.wait_for("no disk is served on ");
    let sockets = format!("{}, {}", lab.path("a").display(), lab.path("b").display());
    assert_eq!(program.lines_with(&sockets), 1, "one line names them");
    assert!(!lab.path("a").exists() && !lab.path("b").exists(), "nobody connects where nobody serves");
    // Both of its disks are there with it.
    let _absent = lab.plug("absent");
    check_disk(&lab.path("a"));
    check_disk(&lab.path("b"));
    check_disk(&lab.path("p"));
    program.wait_for("the drive is there; its disks are served now");
    assert_eq!(program.lines_with("no disk is served on"), 1);
    ends_promptly(program);
    assert!(["a", "b", "p"].iter().all(|name| !lab.path(name).exists()));
}

#[test]
fn a_drive_that_came_late_is_looked_after_like_any_other() {
    let lab = Lab::new();
    let program = lab.start(&[("absent", "a", "")]);
    program.wait_for("no disk is served on");
    let drive = lab.plug("absent");
    check_disk(&lab.path("a"));
    let front = Front::connect(&lab.path("a"));
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    drop(drive);
    program.wait_for("requests wait for it");
    let _drive = lab.plug("absent");
    program.wait_for("the drive is back; its disks work again");
    ring.check_io(16);
}

#[test]
fn all_drives_are_away_and_the_program_can_be_ended() {
    let lab = Lab::new();
    // Of an earlier run that was killed.
    drop(UnixListener::bind(lab.path("b")).unwrap());
    let program = lab.start(&[("one", "a", ""), ("two", "b", "")]);
    eventually("both are waited for", || program.lines_with("no disk is served on") == 2);
    assert!(!lab.path("a").exists() && !lab.path("b").exists());
    ends_promptly(program);
}

#[test]
fn a_controller_that_never_becomes_ready_costs_its_own_disk_only() {
    let lab = Lab::new();
    let _present = lab.plug("present");
    // It may take longer than anybody waits here.
    let config = Config { ready_timeout: Duration::from_secs(100), ..Lab::config(1) };
    let slow = Simulator::start(config, &lab.path("slow")).unwrap();
    slow.faults().set(FaultPlan { never_ready: true, ..FaultPlan::default() });
    let exports = [("slow", "s", ""), ("present", "p", "")];
    let program = lab.start(&exports);
    check_disk(&lab.path("p"));
    // Nobody is kept standing at its socket, which is gone by now if this machine is slow.
    if let Ok(mut early) = UnixStream::connect(lab.path("s")) {
        early.set_read_timeout(Some(DEADLINE)).unwrap();
        assert!(!matches!(early.read(&mut [0]), Ok(1..)));
    }
    program.wait_for("no disk is served on");
    let (ready, given_up) = (program.position("is ready for a front-end"), program.position("has not come up within"));
    assert!(ready < given_up, "the others are served at once");
    eventually("its socket is gone", || !lab.path("s").exists());
    ends_promptly(program);

    // It is served when it is ready.
    let program = lab.start(&exports);
    program.wait_for("has not come up within");
    slow.faults().set(FaultPlan::default());
    check_disk(&lab.path("s"));
    ends_promptly(program);
}

#[test]
fn a_controller_that_does_not_come_up_is_tried_less_and_less_often() {
    let lab = Lab::new();
    let broken = lab.plug("n");
    broken.faults().set(FaultPlan { never_ready: true, ..FaultPlan::default() });
    // Its own time to become ready; without, it would be as long as a socket is kept open for it.
    let patience = format!("[[drive]]\ndevice = \"vfio-user:{}\"\nready-timeout = 0.5\n", lab.path("n").display());
    let program = lab.start(&[("n", "s", &patience)]);
    program.wait_for("cannot bring up the controller");
    program.wait_for("within 500ms");
    assert!(!lab.path("s").exists());
    broken.faults().set(FaultPlan::default());
    check_disk(&lab.path("s"));
    assert_eq!(program.lines_with("no disk is served on"), 1, "it is told once");
}

#[test]
fn a_namespace_that_is_not_there_costs_its_own_disk_only() {
    let lab = Lab::new();
    let drive = lab.plug("n");
    let program = lab.start(&[("n", "a", "namespace = 1"), ("n", "b", "namespace = 2")]);
    check_disk(&lab.path("a"));
    program.wait_for("namespace 2 is not active");
    assert!(!lab.path("b").exists());
    let added = drive.add_namespace(NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() }).unwrap();
    assert_eq!(added, 2);
    check_disk(&lab.path("b"));
    check_disk(&lab.path("a"));
}

#[test]
fn nothing_to_serve_and_nothing_to_wait_for_ends_the_program() {
    let lab = Lab::new();
    let _drive = lab.plug("n");
    let exports = [("n", "a", "namespace = 7"), ("n", "b", "namespace = 9")];
    let mut program = lab.start(&exports);
    assert_eq!(program.wait().code(), Some(1));
    assert_eq!(program.lines_with("vhost-blk: vfio-user:"), 1);
    assert_eq!(program.lines_with("namespace 7 is not active"), 1);
    // A drive that is away may be worth it.
    let program = lab.start(&[exports[0], exports[1], ("away", "c", "")]);
    eventually("all are waited for", || program.lines_with("no disk is served on") == 2);
    ends_promptly(program);
}

#[test]
fn a_path_that_another_process_has_taken_meanwhile_is_left_to_it() {
    let lab = Lab::new();
    let program = lab.start(&[("n", "s", "")]);
    program.wait_for("no disk is served on");
    let other = UnixListener::bind(lab.path("s")).unwrap();
    let _drive = lab.plug("n");
    program.wait_for("another process does already");
    drop(other);
    eventually("its own front-ends", || program.lines_with("is ready for a front-end") == 1);
    check_disk(&lab.path("s"));
}

#[test]
fn a_front_end_on_an_inherited_socket_is_sent_away_until_the_drive_is_there() {
    use std::os::fd::AsRawFd;
    let lab = Lab::new();
    let listener = UnixListener::bind(lab.path("s")).unwrap();
    let device = format!("vfio-user:{}", lab.path("n").display());
    let number = listener.as_raw_fd().to_string();
    // Before the program looks at it.
    let mut early = UnixStream::connect(lab.path("s")).unwrap();
    let program = Program::start(&["--device", &device, "--fd", &number], Some(&listener));
    drop(listener);
    program.wait_for("no disk is served on");
    let mut late = UnixStream::connect(lab.path("s")).unwrap();
    for front in [&mut early, &mut late] {
        front.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(front.read(&mut [0]).unwrap(), 0, "it is to come again");
    }
    let _drive = lab.plug("n");
    program.wait_for("is ready for a front-end");
    check_disk(&lab.path("s"));
    ends_promptly(program);
    assert!(lab.path("s").exists(), "it is not ours to remove");
}

#[test]
fn a_front_end_that_cannot_come_again_is_told_by_the_programs_end() {
    use std::os::fd::AsRawFd;
    let lab = Lab::new();
    let device = format!("vfio-user:{}", lab.path("n").display());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let number = theirs.as_raw_fd().to_string();
    let mut program = Program::start(&["--device", &device, "--fd", &number], Some(&theirs));
    drop(theirs);
    assert_eq!(program.wait().code(), Some(1));
    assert_eq!(program.lines_with("vhost-blk: cannot open vfio-user:"), 1);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}
