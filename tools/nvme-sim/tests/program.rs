//! The program: it serves, stops when told, and says in one line what is wrong.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::{Host, await_some, pattern};

fn program(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvme-sim"));
    command.arg("--socket").arg(socket).stderr(Stdio::piped());
    command
}

/// A running program; a test that fails does not leave it behind.
struct Running(Child);

impl Running {
    fn start(command: &mut Command, socket: &Path) -> Running {
        let running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        // The file is there a moment before anybody listens.
        await_some("the socket", || UnixStream::connect(socket).ok());
        running
    }

    fn terminate(mut self) {
        let id = self.0.id().to_string();
        // The shell's own: not every machine has the program.
        assert!(Command::new("sh").args(["-c", "kill $0", &id]).status().unwrap().success());
        let status = await_some("the end", || self.0.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn serves_until_it_is_told_to_stop() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nvme.sock");
    let file = directory.path().join("blocks");
    for round in 0..2 {
        let mut command = program(&socket);
        command.args(["--size", "64M", "--lba", "4096", "--namespaces", "2", "--file"]).arg(&file);
        let running = Running::start(&mut command, &socket);
        let mut host = Host::bring_up(&socket);
        host.create_pair(1, 16, None);
        if round == 0 {
            assert_eq!(host.write_blocks(1, 3, 12, &pattern(1, 8192)), 0);
        } else {
            assert_eq!(host.read_blocks(1, 3, 12, 8192).unwrap(), pattern(1, 8192));
        }
        assert!(host.identify(0, 2).unwrap().iter().any(|byte| *byte != 0));
        // A connected front-end does not keep it from stopping.
        running.terminate();
        assert!(!socket.exists());
    }
}

#[test]
fn faults_by_argument() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nvme.sock");
    let mut command = program(&socket);
    command.args([
        "--fault",
        "fail=2:0x81,opcode=read,limit=1",
        "--seed",
        "5",
        "--write-cache",
        "--max-transfer",
        "none",
    ]);
    let running = Running::start(&mut command, &socket);
    let mut host = Host::bring_up(&socket);
    host.create_pair(1, 16, None);
    assert_eq!(host.read_blocks(1, 0, 9, 512), Err(0x281));
    assert_eq!(host.read_blocks(1, 0, 9, 512), Ok(vec![0; 512]));
    assert_eq!(host.identify(1, 0).unwrap()[77], 0, "no MDTS");
    running.terminate();
}

#[test]
fn faults_by_command() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nvme.sock");
    let mut command = program(&socket);
    command.arg("--control").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = Running(command.spawn().unwrap());
    await_some("the socket", || UnixStream::connect(&socket).ok());
    let mut input = running.0.stdin.take().unwrap();
    let mut answers = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let mut tell = |line: &str| {
        writeln!(input, "{line}").unwrap();
        answers.next().unwrap().unwrap()
    };
    let mut host = Host::bring_up(&socket);
    host.create_pair(1, 16, None);
    assert_eq!(tell("fault fail=2:0x81,opcode=read,limit=1"), "ok");
    assert_eq!(host.read_blocks(1, 0, 9, 512), Err(0x281));
    assert_eq!(host.read_blocks(1, 0, 9, 512), Ok(vec![0; 512]));
    assert_eq!(tell("fired"), "ok 1");
    assert_eq!(tell("faults fail=2:0x82,lba=9 fail=2:0x83,lba=10"), "ok");
    assert_eq!(host.read_blocks(1, 10, 9, 512), Err(0x283));
    assert_eq!(tell("faults"), "ok");
    assert_eq!(host.read_blocks(1, 10, 9, 512), Ok(vec![0; 512]));
    for wrong in ["explode", "fault explode", "", "faults lose, explode"] {
        let answer = tell(wrong);
        assert!(answer.starts_with("error: "), "{wrong:?}: {answer}");
    }
    assert_eq!(tell("remove"), "ok");
    assert_eq!(host.status(), u32::MAX);
    assert_eq!(tell("reinsert"), "ok");
    assert_eq!(host.status(), 0);
    // With the control's input still open.
    running.terminate();
    assert!(!socket.exists());
}

#[test]
fn bad_input_is_one_clear_error() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nvme.sock");
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    for (arguments, said) in [
        (vec!["--size", "64Q"], "64Q"),
        (vec!["--lba", "1000"], "1000"),
        (vec!["--namespaces", "9999"], "9999"),
        (vec!["--fault", "explode"], "explode"),
        (vec!["--max-transfer", "5000"], "5000"),
        (vec!["--file", "/nonexistent/blocks"], "/nonexistent/blocks"),
        (vec!["--serial", "a serial number that is too long"], "serial"),
    ] {
        let output = program(&socket).args(&arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(said) && !text.contains("panicked"), "{arguments:?}: {text}");
        assert!(!socket.exists());
    }
    let output = program(&file).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("not a socket"), "{text}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
