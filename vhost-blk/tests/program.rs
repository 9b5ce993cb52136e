//! The program as its users meet it: what it prints, how it ends, signals, inherited sockets.

mod common;
#[path = "common/program.rs"]
mod program;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::PoisonError;

use common::*;
use program::*;
use rustix::process::Signal;

/// Runs it to its end.
fn run(args: &[&str]) -> Output {
    let _one = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
    command(args).output().unwrap()
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    (folder, socket)
}

/// A front-end that has done some I/O and goes on.
fn check_disk(front: &Front) {
    front.negotiate();
    let region = Region::new(0, 1 << 20);
    let mut ring = Ring::first(front, &region);
    ring.check_io(8);
    ring.stop(front);
}

#[test]
fn capabilities() {
    let output = run(&["--print-capabilities", "--fd", "nonsense", "--nonsense"]);
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value, serde_json::json!({"type": "block", "features": ["read-only"]}));
    assert!(output.stderr.is_empty());
}

#[test]
fn what_is_wrong_is_one_line_and_a_status() {
    let (folder, socket) = folder();
    let socket = socket.to_str().unwrap();
    let config = folder.path().join("c.toml");
    std::fs::write(&config, "[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueus = 1\n").unwrap();
    let config = config.to_str().unwrap();
    let busy = folder.path().join("busy");
    let _listener = UnixListener::bind(&busy).unwrap();
    let busy = busy.to_str().unwrap();
    let cases: Vec<(Vec<&str>, i32, String)> = vec![
        (vec![], 2, "vhost-blk: no device to serve: use --device ADDRESS with --socket-path PATH, or --config FILE (vhost-blk --help tells more)".into()),
        (vec!["--sped"], 2, "vhost-blk: unexpected argument '--sped' found (vhost-blk --help tells more)".into()),
        (vec!["--config", config], 2, format!("vhost-blk: {config}, line 4: unknown field `queus`, expected one of")),
        (vec!["--device", "sim:64M", "--socket-path", busy], 1, format!("vhost-blk: cannot listen on {busy}: another process does already; stop it or choose another path")),
        (vec!["--device", "sim:64M", "--socket-path", "/nowhere/s"], 1, "vhost-blk: cannot listen on /nowhere/s: its directory does not exist; create it first".into()),
        (vec!["--device", "sim:64M", "--namespace", "9", "--socket-path", socket], 2, "vhost-blk: sim:64M has no namespace 9: use 1 to 1".into()),
        (vec!["--device", "sim:64M", "--cpus", "8191", "--socket-path", socket], 1, "vhost-blk: cannot start the workers: cannot pin a worker to CPU 8191".into()),
        (vec!["--device", "sim:64M,file=/nowhere/disk", "--socket-path", socket], 1, "vhost-blk: cannot start the embedded controller: ".into()),
        (vec!["--device", "sim:64M", "--fd", "77"], 1, "vhost-blk: --fd 77 cannot be used: ".into()),
    ];
    for (args, status, line) in cases {
        let output = run(&args);
        let text = String::from_utf8(output.stderr).unwrap();
        // What the log says on the way is not the message.
        let message: Vec<&str> = text.lines().filter(|line| !line.starts_with('[')).collect();
        assert_eq!(message.len(), 1, "{args:?}: {text}");
        assert!(message[0].starts_with(&line), "{args:?}: {text}");
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        assert!(!Path::new(socket).exists(), "{args:?} leaves no socket");
    }
}

#[test]
fn an_address_without_a_drive_is_told_and_waited_for() {
    for device in ["vfio-user:/nowhere/n", "ffff:ff:1f.7"] {
        let (_folder, socket) = folder();
        let mut program = Program::start(&["--device", device, "--socket-path", socket.to_str().unwrap()], None);
        // It cannot be told from one whose drive is away, whose guests wait for it.
        program.wait_for(&format!(" ERROR vhost_blk::control::target::pending] cannot open {device}: "));
        program.wait_for(&format!("no disk is served on {}", socket.display()));
        assert!(!socket.exists());
        program.signal(Signal::TERM);
        assert_eq!(program.wait().code(), Some(0));
    }
}

#[test]
fn sigterm_finishes_requests_and_removes_the_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let (_folder, socket) = folder();
        let mut program = Program::serve(&socket, &[]);
        let front = Front::connect(&socket);
        front.negotiate();
        let region = Region::new(0, 1 << 20);
        region.add(&front);
        let mut ring = Ring::new(&region, 0, 0x10000);
        ring.start(&front);
        ring.check_io(0);
        ring.submit(4, 0, (0, 0));
        program.signal(signal);
        assert_eq!(program.wait().code(), Some(0));
        assert!(matches!(ring.poll(), Some(0) | None));
        front.wait_for_end();
        assert!(!socket.exists());
        program.wait_for("ring 0: reads=1 writes=1");
    }
}

#[test]
fn sigterm_in_the_middle_of_a_message() {
    let (_folder, socket) = folder();
    let mut program = Program::serve(&socket, &[]);
    let front = Front::connect(&socket);
    assert_ne!(front.ask_u64(GET_FEATURES), 0);
    // A header without its body.
    front.raw(&[&8u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &8u32.to_ne_bytes()].concat());
    program.wait_for("a front-end connected");
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, Simulator};
    let (folder, socket) = folder();
    let simulator = Simulator::start(Config::default(), &folder.path().join("nvme")).unwrap();
    let device = format!("vfio-user:{}", simulator.socket().display());
    let mut program = Program::start(&["--device", &device, "--socket-path", socket.to_str().unwrap()], None);
    program.wait_for("is ready for a front-end");
    let front = Front::connect(&socket);
    front.negotiate();
    let region = Region::new(0, 1 << 20);
    region.add(&front);
    let mut ring = Ring::new(&region, 0, 0x10000);
    ring.start(&front);
    simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
    ring.submit(0, 0, (ring.data(), 4096));
    eventually("the drive has the command", || simulator.faults().fired() > 0);
    program.signal(Signal::TERM);
    // It waits for a completion that does not come.
    program.wait_for("stopping: requests under way are finished first");
    assert!(program.child.try_wait().unwrap().is_none());
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(128 + 15));
}

#[test]
fn signals_that_mean_nothing_cost_no_disk() {
    let (_folder, socket) = folder();
    let mut program = Program::serve(&socket, &[]);
    let front = Front::connect(&socket);
    front.negotiate();
    let region = Region::new(0, 1 << 20);
    let mut ring = Ring::first(&front, &region);
    for (signal, told) in [(Signal::HUP, "SIGHUP changes nothing: "), (Signal::USR2, "SIGUSR2 changes nothing: ")] {
        for times in 1..=2 {
            program.signal(signal);
            eventually("it is told each time", || program.lines_with(told) == times);
            ring.check_io(8);
        }
    }
    assert!(program.child.try_wait().unwrap().is_none());
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn sigusr1_prints_the_counters() {
    let (_folder, socket) = folder();
    let program = Program::serve(&socket, &[]);
    program.signal(Signal::USR1);
    program.wait_for("no ring has been used yet");
    check_disk(&Front::connect(&socket));
    program.signal(Signal::USR1);
    program.wait_for("ring 0: reads=1 writes=1 flushes=0");
    check_disk(&Front::connect(&socket));
    program.signal(Signal::USR1);
    program.wait_for("ring 0: reads=2 writes=2 flushes=0");
    assert_eq!(program.lines_with("ring 1:"), 0, "rings never used are not printed");
}

#[test]
fn an_inherited_listening_socket() {
    let (_folder, socket) = folder();
    let listener = UnixListener::bind(&socket).unwrap();
    let number = listener.as_raw_fd().to_string();
    let mut program = Program::start(&["--device", "sim:64M", "--fd", &number], Some(&listener));
    drop(listener);
    for _ in 0..2 {
        check_disk(&Front::connect(&socket));
    }
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(socket.exists(), "it is not ours to remove");
}

#[test]
fn an_inherited_connection_is_served_to_its_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let number = theirs.as_raw_fd().to_string();
    let mut program = Program::start(&["--device", "sim:64M", "--fd", &number], Some(&theirs));
    drop(theirs);
    let front = Front::on(ours);
    check_disk(&front);
    drop(front);
    assert_eq!(program.wait().code(), Some(0), "nobody can come any more");
}

#[test]
fn a_stale_socket_is_replaced() {
    let (_folder, socket) = folder();
    drop(Program::serve(&socket, &[]));
    assert!(socket.exists(), "killed, it leaves its socket");
    let _program = Program::serve(&socket, &[]);
    check_disk(&Front::connect(&socket));
}

#[test]
fn the_folder_of_an_embedded_controller_goes_with_it_or_with_the_next_one() {
    let (folder, socket) = folder();
    let temporary = folder.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let left = || std::fs::read_dir(&temporary).unwrap().count();
    let start = || {
        let mut command = command(&["--device", "sim:64M", "--socket-path", socket.to_str().unwrap()]);
        command.env("TMPDIR", &temporary);
        let program = Program::spawn(command, &[]);
        program.wait_for("is ready for a front-end");
        program
    };
    drop(start());
    assert_eq!(left(), 1, "killed, it leaves its folder");
    let mut program = start();
    assert_eq!(left(), 1, "its own");
    check_disk(&Front::connect(&socket));
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert_eq!(left(), 0);
}

#[test]
fn several_exports_by_a_file() {
    let (folder, _) = folder();
    let file = folder.path().join("c.toml");
    let path = |name: &str| folder.path().join(name);
    let export = |device: &str, name: &str| {
        format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{}\"\n", path(name).display())
    };
    std::fs::write(&file, [export("sim:64M", "a"), export("sim:64M", "b"), export("sim:32M", "c")].concat()).unwrap();
    let mut program = Program::start(&["--config", file.to_str().unwrap()], None);
    eventually("three exports", || program.lines_with("is ready for a front-end") == 3);
    ["a", "b", "c"].iter().for_each(|name| check_disk(&Front::connect(&path(name))));
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(["a", "b", "c"].iter().all(|name| !path(name).exists()));
}

/// A CPU that this process may use.
fn a_cpu() -> usize {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap()
}

#[test]
fn whatever_is_wrong_with_an_export_costs_that_export_only() {
    let (folder, _) = folder();
    let path = |name: &str| folder.path().join(name);
    let export = |device: &str, socket: &Path, more: &str| {
        format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{}\"\n{more}\n", socket.display())
    };
    let rest = 108 - folder.path().as_os_str().len() - 1;
    let too_long = path(&"x".repeat(rest));
    std::fs::write(path("text"), "127.0.0.1 localhost\n").unwrap();
    let in_use = UnixListener::bind(path("in-use")).unwrap();
    let text = format!("sim:64M,file={}", path("text").display());
    let exports = [
        export("sim:64M", &path("good"), ""),
        export("sim:64M", &path("later/s"), "read-only = true"),
        export("sim:64M", &path("in-use"), "read-only = true"),
        export("sim:64M", &too_long, ""),
        export("sim:64M", &path("wrong"), "queues = 0"),
        export("sim:64M", &path("no-namespace"), "namespace = 7"),
        export(&text, &path("on-text"), ""),
        export("sim:32M", &path("twice"), ""),
        export("sim:16M", &path("twice"), ""),
        export("sim:8M", &path("good-too"), ""),
    ];
    std::fs::write(path("c.toml"), format!("cpus = \"8191,{}\"\n", a_cpu()) + &exports.concat()).unwrap();
    let ear = Ear::at(&path("notify"));
    let mut command = command(&["--config", path("c.toml").to_str().unwrap()]);
    command.env("NOTIFY_SOCKET", path("notify"));
    let mut program = Program::spawn(command, &[]);
    // Ready with what there is.
    let first = ear.hears();
    assert!(first.starts_with("READY=1\nSTATUS=serving 2 of 10 sockets; "), "{first}");
    let served = ["good", "good-too"];
    served.iter().for_each(|name| check_disk(&Front::connect(&path(name))));
    for told in [
        "/later/s: its directory does not exist; create it first",
        "/in-use: another process does already",
        " has 108 bytes: use at most 107",
        "0 queues: use 1 to 256",
        "sim:64M has no namespace 7",
        "with 20 bytes instead of",
        "cannot pin a worker to CPU 8191",
    ] {
        eventually(told, || program.lines_with("ERROR") > 0 && program.lines_with(told) == 1);
    }
    eventually("both", || program.lines_with(&format!("two exports use the socket {}", path("twice").display())) == 2);
    // What can be mended while it runs is found.
    drop(in_use);
    check_disk_at(&path("in-use"));
    std::fs::create_dir(path("later")).unwrap();
    check_disk_at(&path("later/s"));
    assert_eq!(std::fs::read(path("text")).unwrap(), b"127.0.0.1 localhost\n");
    std::fs::remove_file(path("text")).unwrap();
    check_disk_at(&path("on-text"));
    served.iter().for_each(|name| check_disk(&Front::connect(&path(name))));
    for name in ["wrong", "no-namespace", "twice"] {
        assert!(!path(name).exists(), "{name}");
    }
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(["in-use", "later/s", "good"].iter().all(|name| !path(name).exists()));
}

/// Checks that the disk on a socket that is served soon works, read-only or not.
fn check_disk_at(path: &Path) {
    let mut stream = None;
    eventually("its socket is served", || {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    let front = Front::on(stream.unwrap());
    front.negotiate();
    let region = Region::new(0, 1 << 20);
    let mut ring = Ring::first(&front, &region);
    assert_eq!(ring.read_one(8), 0);
    ring.stop(&front);
}

/// A small file system; nothing where none can be mounted.
struct SmallFileSystem<'a>(&'a Path);

impl SmallFileSystem<'_> {
    fn mount(at: &Path) -> Option<SmallFileSystem<'_>> {
        std::fs::create_dir(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "vhost-blk-test"]).arg(at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(SmallFileSystem(at))
    }
}

impl Drop for SmallFileSystem<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_file_that_cannot_take_more_is_an_io_error_and_no_more() {
    let (folder, _) = folder();
    let path = |name: &str| folder.path().join(name);
    let mounted = path("small");
    let small = SmallFileSystem::mount(&mounted);
    // Elsewhere a file in memory whose pages nobody may write.
    let sealed = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&sealed, 64 << 20).unwrap();
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::WRITE).unwrap();
    let (file, limit) = match &small {
        Some(_) => (mounted.join("disk"), 256),
        None => (PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), sealed.as_raw_fd())), 0),
    };
    let export = |device: &str, name: &str| {
        format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{}\"\n", path(name).display())
    };
    let device = format!("sim:64M,file={}", file.display());
    std::fs::write(path("c.toml"), export(&device, "full") + &export("sim:64M", "beside")).unwrap();
    let mut program = Program::start(&["--config", path("c.toml").to_str().unwrap()], None);
    eventually("both", || program.lines_with("is ready for a front-end") == 2);
    let (front, beside) = (Front::connect(&path("full")), Front::connect(&path("beside")));
    let (region, other) = (Region::new(0, 1 << 20), Region::new(0, 1 << 20));
    front.negotiate();
    beside.negotiate();
    let (mut ring, mut good) = (Ring::first(&front, &region), Ring::first(&beside, &other));
    // Pages of 4 KiB, in different places.
    let written = (0..1000).take_while(|block| ring.write_one(block * 128) == 0).count();
    assert!(written <= limit, "{written} pages of a file system of {limit}");
    assert!(limit == 0 || written > limit / 2, "{written}");
    assert_eq!(ring.write_one(1 << 16), 1, "an I/O error, and not for once");
    // What was never written can be read there all the same, and nobody else is concerned.
    assert_eq!(ring.read_one(1 << 16), 0);
    good.check_io(8);
    if small.is_some() {
        // What was deallocated makes room.
        std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(0).unwrap();
        std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(64 << 20).unwrap();
        ring.check_io(8);
    }
    assert!(program.child.try_wait().unwrap().is_none());
    program.wait_for("commands for it fail until it can");
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
}

#[test]
fn sharing_is_told_once_and_wrong_messages_once() {
    let (_folder, socket) = folder();
    let mut program = Program::serve(&socket, &["--queues", "80"]);
    let front = Front::connect(&socket);
    front.negotiate();
    let region = Region::new(0, 80 * 0x10000);
    region.add(&front);
    let mut rings: Vec<Ring> = (0..80).map(|index| Ring::new(&region, index, u64::from(index) * 0x10000)).collect();
    rings.iter().for_each(|ring| ring.start(&front));
    rings.iter_mut().for_each(|ring| ring.check_io(0));
    (0..10).for_each(|_| front.refuse(SEND_RARP, &[0; 8], &[]));
    // Its log is complete when it has ended.
    drop(front);
    program.signal(Signal::TERM);
    program.wait();
    program.wait_for("ring 79: reads=1");
    assert_eq!(program.lines_with("rings share a queue pair: all "), 1);
    assert_eq!(program.lines_with("SEND_RARP refused: it is not offered"), 1);
}

/// The ear of a service manager.
struct Ear(UnixDatagram);

impl Ear {
    fn at(path: &Path) -> Ear {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Ear(socket)
    }

    #[track_caller]
    fn hears(&self) -> String {
        let mut bytes = [0; 512];
        let length = self.0.recv(&mut bytes).expect("the service manager hears nothing");
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }
}

/// The program as a service manager starts it: what it hands over begins at descriptor 3, and its number is the program's own.
fn activated(args: &[&str], sockets: &[&UnixListener], names: &str) -> Command {
    let mut command = Command::new("bash");
    // First out of the way, to where nothing else is, lest one be overwritten before it is in place.
    let numbers = sockets.iter().map(|socket| socket.as_raw_fd());
    let away: String = numbers.zip(500..).map(|(from, to)| format!("exec {to}<&{from}; ")).collect();
    let placed: String =
        (500..).zip(3..).take(sockets.len()).map(|(from, to)| format!("exec {to}<&{from}; ")).collect();
    let script = format!("{away}{placed}LISTEN_PID=$$ exec \"$0\" \"$@\"");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_vhost-blk")]).args(args).stdin(Stdio::null());
    command.env_remove("RUST_LOG").env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names);
    command
}

#[test]
fn the_service_manager_hears_when_the_disks_are_ready_how_they_do_and_when_it_stops() {
    use nvme_sim::{Config, Simulator};
    let (folder, _) = folder();
    let path = |name: &str| folder.path().join(name);
    let ear = Ear::at(&path("notify"));
    let device = format!("vfio-user:{}", path("nvme").display());
    let export = |device: &str, name: &str| {
        format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{}\"\n", path(name).display())
    };
    let start = |second: &str| {
        std::fs::write(path("c.toml"), [export("sim:64M", "a"), export(second, "b")].concat()).unwrap();
        let mut command = command(&["--config", path("c.toml").to_str().unwrap()]);
        command.env("NOTIFY_SOCKET", path("notify"));
        Program::spawn(command, &[])
    };
    // Nothing can be served: it is not ready, and says no such thing.
    std::fs::write(path("c.toml"), format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"/nowhere/s\"\n"))
        .unwrap();
    let mut nothing = command(&["--config", path("c.toml").to_str().unwrap()]);
    nothing.env("NOTIFY_SOCKET", path("notify"));
    assert_eq!(Program::spawn(nothing, &[]).wait().code(), Some(1));
    let mut program = start(&device);
    // Ready is what can be: one disk waits for its drive.
    let away = format!("serving 1 of 2 sockets; cannot open {device}: ");
    let first = ear.hears();
    assert!(first.starts_with(&format!("READY=1\nSTATUS={away}")), "{first}");
    check_disk(&Front::connect(&path("a")));
    let drive = Simulator::start(Config::default(), &path("nvme")).unwrap();
    assert_eq!(ear.hears(), "STATUS=ready for front-ends on 2 sockets");
    ["a", "b"].iter().for_each(|name| check_disk(&Front::connect(&path(name))));
    // It goes, and comes back.
    drop(drive);
    let gone = ear.hears();
    assert!(gone.starts_with(&format!("STATUS=serving 1 of 2 sockets; {device} is not available: ")), "{gone}");
    let _drive = Simulator::start(Config::default(), &path("nvme")).unwrap();
    assert_eq!(ear.hears(), "STATUS=ready for front-ends on 2 sockets");
    program.signal(Signal::TERM);
    assert_eq!(ear.hears(), "STOPPING=1\nSTATUS=finishing the requests under way");
    assert_eq!(program.wait().code(), Some(0));
}

#[test]
fn sockets_of_the_service_manager_are_used_and_outlive_the_program() {
    let (folder, _) = folder();
    let path = |name: &str| folder.path().join(name);
    let export = |name: &str| format!("[[export]]\ndevice = \"sim:64M\"\nsocket-path = \"{}\"\n", path(name).display());
    std::fs::write(path("c.toml"), [export("a"), export("b"), export("c")].concat()).unwrap();
    let sockets = ["c", "a"].map(|name| UnixListener::bind(path(name)).unwrap());
    // Front-ends may come before the program does.
    let early = Front::connect(&path("a"));
    for _ in 0..2 {
        let config = path("c.toml");
        let command = activated(&["--config", config.to_str().unwrap()], &[&sockets[0], &sockets[1]], "third:first");
        let mut program = Program::spawn(command, &[&sockets[0], &sockets[1]]);
        eventually("three exports", || program.lines_with("is ready for a front-end") == 3);
        assert_eq!(program.lines_with("the service manager hands its socket over"), 2);
        ["b", "c"].iter().for_each(|name| check_disk(&Front::connect(&path(name))));
        program.signal(Signal::TERM);
        assert_eq!(program.wait().code(), Some(0));
        assert!(path("a").exists() && path("c").exists(), "they are not ours to remove");
        assert!(!path("b").exists());
    }
    drop(early);
}

#[test]
fn a_socket_of_the_service_manager_that_no_export_wants_is_told_and_front_ends_there_are_left() {
    let (folder, socket) = folder();
    let other = folder.path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    let args = ["--device", "sim:64M", "--socket-path", socket.to_str().unwrap()];
    let mut program = Program::spawn(activated(&args, &[&listener], "disk9"), &[&listener]);
    let path = other.display();
    program.wait_for(&format!("the service manager hands over the socket {path} (disk9), and no export"));
    check_disk(&Front::connect(&socket));
    Front::connect(&other).wait_for_end();
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(!socket.exists() && other.exists());

    // Meant for another process: nothing of it is used.
    let mut command = activated(&args, &[&listener], "disk9");
    command.env("LISTEN_FDS", "many");
    let mut program = Program::spawn(command, &[&listener]);
    assert_eq!(program.wait().code(), Some(1));
    program.wait_for("vhost-blk: LISTEN_FDS=many is not a number of sockets");
    let mut command = command_for_another(&args);
    command.env("LISTEN_FDS", "1");
    let program = Program::spawn(command, &[&listener]);
    program.wait_for("is ready for a front-end");
    check_disk(&Front::connect(&socket));
}

fn command_for_another(args: &[&str]) -> Command {
    let mut command = command(args);
    command.env("LISTEN_PID", "1");
    command
}
