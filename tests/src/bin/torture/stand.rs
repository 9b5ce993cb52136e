//! The processes: the drive, which stays, and the target, which does not.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Failure;

/// How long a process may take to say something.
const LIMIT: Duration = Duration::from_secs(30);
/// Signals by number (signal(7)).
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

fn failed(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Failure {
    let doing = doing.into();
    move |error| Failure::Stand(format!("{doing}: {error}"))
}

/// A command that the kernel kills when this program ends, and whose messages are added to `log`.
fn command(program: &Path, log: &Path) -> Result<Command, Failure> {
    let file =
        File::options().create(true).append(true).open(log).map_err(failed(format!("opening {}", log.display())))?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.stderr(file).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

/// The drive: `nvme-sim`, which takes faults while it runs.
pub(crate) struct SimulatedDrive {
    program: PathBuf,
    arguments: Vec<String>,
    socket: PathBuf,
    log: PathBuf,
    running: Running,
}

struct Running {
    child: Child,
    input: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
}

impl SimulatedDrive {
    pub(crate) fn start(program: &Path, folder: &Path, arguments: Vec<String>) -> Result<SimulatedDrive, Failure> {
        let (socket, log) = (folder.join("nvme.sock"), folder.join("drive.log"));
        let running = Self::run(program, &arguments, &socket, &log)?;
        Ok(SimulatedDrive { program: program.into(), arguments, socket, log, running })
    }

    fn run(program: &Path, arguments: &[String], socket: &Path, log: &Path) -> Result<Running, Failure> {
        let mut command = command(program, log)?;
        command.arg("--socket").arg(socket).arg("--control").args(arguments).env("RUST_LOG", "nvme_sim=info");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed("starting the drive"))?;
        let input = child.stdin.take().expect("it was made with a pipe");
        let answers = read_lines(child.stdout.take().expect("it was made with a pipe"));
        let mut running = Running { child, input, answers };
        // It answers once it listens.
        running.tell("fired")?;
        Ok(running)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Gives it a command of its control and returns the answer.
    pub(crate) fn tell(&mut self, line: &str) -> Result<String, Failure> {
        self.running.tell(line)
    }

    /// How often its log says this so far.
    pub(crate) fn times(&self, text: &str) -> usize {
        let log =
            std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// The drive loses its power and its host's connection with it.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.running
            .child
            .kill()
            .and_then(|()| self.running.child.wait())
            .map(drop)
            .map_err(failed("killing the drive"))
    }

    /// It is there again, with what was written to it.
    pub(crate) fn restart(&mut self) -> Result<(), Failure> {
        self.running = Self::run(&self.program, &self.arguments, &self.socket, &self.log)?;
        Ok(())
    }
}

/// The lines that a process says, as they come, so that they can be waited for with a deadline.
fn read_lines(output: ChildStdout) -> Receiver<std::io::Result<String>> {
    let (lines, answers) = channel();
    // Ends with the process, or with the first line that nobody waits for.
    std::thread::spawn(move || BufReader::new(output).lines().try_for_each(|line| lines.send(line)));
    answers
}

impl Running {
    fn tell(&mut self, line: &str) -> Result<String, Failure> {
        writeln!(self.input, "{line}").map_err(failed("talking to the drive"))?;
        match self.answers.recv_timeout(LIMIT) {
            Ok(Ok(answer)) if answer.starts_with("ok") => Ok(answer[2..].trim().into()),
            Ok(Ok(answer)) => Err(Failure::Stand(format!("the drive, told \"{line}\": {answer}"))),
            Ok(Err(error)) => Err(Failure::Stand(format!("the drive, told \"{line}\": {error}"))),
            Err(RecvTimeoutError::Timeout) => {
                Err(Failure::Stand(format!("the drive, told \"{line}\", says nothing for {LIMIT:?}")))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Failure::Stand(format!("the drive ended when it was told \"{line}\"")))
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends SIGTERM. A child that has not been waited for keeps its number, so this cannot meet another process.
fn terminate(child: &Child) -> bool {
    let sent = Command::new("sh").args(["-c", "kill \"$0\"", &child.id().to_string()]).status();
    sent.is_ok_and(|status| status.success())
}

/// How a target is made to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// It has no chance to do anything.
    Kill,
    /// It is asked to: it finishes what it can, and ends with success.
    Terminate,
}

/// The target.
pub(crate) struct TargetProcess {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Arc<Mutex<Child>>,
    /// When the present one was sent a signal, and which.
    killed: Arc<Mutex<Option<(Instant, Signal)>>>,
}

impl TargetProcess {
    pub(crate) fn start(program: &Path, folder: &Path, arguments: Vec<String>) -> Result<TargetProcess, Failure> {
        let log = folder.join("target.log");
        let child = Self::run(program, &arguments, &log)?;
        Ok(TargetProcess {
            program: program.into(),
            arguments,
            log,
            child: Arc::new(Mutex::new(child)),
            killed: Arc::default(),
        })
    }

    fn run(program: &Path, arguments: &[String], log: &Path) -> Result<Child, Failure> {
        command(program, log)?.args(arguments).spawn().map_err(failed("starting the target"))
    }

    /// Sends it a signal in a while, whatever this program is doing then.
    pub(crate) fn kill_after(&self, delay: Duration, signal: Signal) {
        let (child, killed) = (self.child.clone(), self.killed.clone());
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            // A process that has ended by itself takes a signal as long as nobody has waited for it: it was not killed.
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            let now = Instant::now();
            let sent = match signal {
                Signal::Kill => child.kill().is_ok(),
                Signal::Terminate => terminate(&child),
            };
            if sent {
                *killed.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, signal));
            }
        });
    }

    /// When it was sent a signal, if it was.
    pub(crate) fn killed(&self) -> Option<Instant> {
        self.killed.lock().unwrap_or_else(PoisonError::into_inner).map(|(at, _)| at)
    }

    fn status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait().ok().flatten()
    }

    /// Whether it is gone, after it was sent a signal; an error: it did not end as it should have. `ready`: it was there for
    /// front-ends before.
    pub(crate) fn has_ended(&self, ready: bool) -> Result<bool, String> {
        let killed = *self.killed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((at, signal)) = killed else { return Ok(false) };
        match (self.status(), signal) {
            (None, _) if at.elapsed() < LIMIT => Ok(false),
            (None, _) => Err(format!("the target has not ended {LIMIT:?} after the signal {signal:?}")),
            (Some(status), Signal::Kill) if status.signal() == Some(SIGKILL) => Ok(true),
            (Some(status), Signal::Terminate) if status.success() => Ok(true),
            // It had not come far enough to know better.
            (Some(status), Signal::Terminate) if !ready && status.signal() == Some(SIGTERM) => Ok(true),
            (Some(status), _) => Err(format!("the target ended with {status} after the signal {signal:?}")),
        }
    }

    /// Starts it again.
    pub(crate) fn restart(&mut self) -> Result<(), Failure> {
        self.child = Arc::new(Mutex::new(Self::run(&self.program, &self.arguments, &self.log)?));
        self.killed = Arc::default();
        Ok(())
    }

    /// Why it has ended, if it did so by itself.
    pub(crate) fn ended(&self) -> Option<String> {
        // It ended first, is looked at afterwards: the other way round a kill in between would be taken for an end.
        let status = self.status()?;
        self.killed().is_none().then(|| format!("the target has ended by itself: {status}"))
    }

    /// Asks it to end, and says what was wrong with that.
    pub(crate) fn stop(&self) -> Result<(), String> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if !terminate(&child) {
            return Err("the target cannot be told to end".into());
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("the target ended with {status}")),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => return Err(format!("the target does not end within {LIMIT:?}")),
                Err(error) => return Err(format!("waiting for the target's end: {error}")),
            }
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Both fail only when it has already ended.
        let _ = child.kill();
        let _ = child.wait();
    }
}
