//! The program as a child of a test, and what it logs.
#![allow(dead_code)] // each test program uses a part of it

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{DEADLINE, eventually};

/// One child is started at a time: a descriptor that one is to inherit must not reach another.
pub(crate) static SPAWN: Mutex<()> = Mutex::new(());

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-blk"));
    command.args(args).env_remove("RUST_LOG").env("RUST_BACKTRACE", "1").stdin(Stdio::null());
    command
}

/// A program that serves. Killed when dropped.
pub(crate) struct Program {
    pub child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Reads what it logs until it has ended.
    reader: Option<JoinHandle<()>>,
}

impl Program {
    pub(crate) fn start(args: &[&str], inherit: Option<&dyn AsFd>) -> Program {
        Program::spawn(command(args), inherit.as_slice())
    }

    pub(crate) fn spawn(mut command: Command, inherit: &[&dyn AsFd]) -> Program {
        let _one = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
        for fd in inherit {
            rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty()).unwrap();
        }
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        for fd in inherit {
            rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::CLOEXEC).unwrap();
        }
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (log.clone(), child.stderr.take().unwrap());
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("program: {line}");
                lines.lock().unwrap().push(line);
            }
        });
        Program { child, log, reader: Some(reader) }
    }

    /// One that serves a small disk on `socket`, and is ready.
    pub(crate) fn serve(socket: &Path, more: &[&str]) -> Program {
        Program::serve_device("sim:64M", socket, more)
    }

    /// One that serves a drive on `socket`, and is ready.
    pub(crate) fn serve_device(device: &str, socket: &Path, more: &[&str]) -> Program {
        let args = [&["--device", device, "--socket-path", socket.to_str().unwrap()], more].concat();
        let mut command = command(&args);
        // The folder of its embedded controller goes with the test's, however it ends.
        command.env("TMPDIR", socket.parent().unwrap());
        let program = Program::spawn(command, &[]);
        program.wait_for("is ready for a front-end");
        program
    }

    pub(crate) fn lines_with(&self, text: &str) -> usize {
        self.lines_with_all(&[text])
    }

    /// How many lines have all of these in them.
    pub(crate) fn lines_with_all(&self, texts: &[&str]) -> usize {
        self.log.lock().unwrap().iter().filter(|line| texts.iter().all(|text| line.contains(text))).count()
    }

    /// Which line of the log says something first.
    #[track_caller]
    pub(crate) fn position(&self, text: &str) -> usize {
        self.log.lock().unwrap().iter().position(|line| line.contains(text)).expect(text)
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        eventually(text, || self.lines_with(text) > 0);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has ended, and everything that it logged can be looked at.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // Nobody else has the other end of its pipe.
                self.reader.take().map(JoinHandle::join);
                return status;
            }
            assert!(Instant::now() < deadline, "the program does not end");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
