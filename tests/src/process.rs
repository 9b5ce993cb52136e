use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::{Error, poll};

/// A program which was started by a test: its output goes to a file, and it never outlives the value.
///
/// The kernel also kills it when the *thread* that started it ends (so that nothing is left behind when a test run is
/// interrupted): start it from the thread that uses it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `arguments`; standard error, and standard output unless `piped`, go to the file `log`.
    pub(crate) fn start(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        environment: &[(String, String)],
        log: &Path,
        piped: bool,
    ) -> Result<Process, Error> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(Error::doing(format!("opening the log {}", log.display())))?;
        let output = file.try_clone().map_err(Error::doing("duplicating the log's descriptor"))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .stdin(if piped { Stdio::piped() } else { Stdio::null() })
            .stdout(if piped { Stdio::piped() } else { Stdio::from(output) })
            .stderr(file)
            .spawn()
            .map_err(Error::doing(format!("starting {} through setpriv", program.display())))?;
        Ok(Process { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// The operating system's number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the program has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends a signal by its name, for example `TERM`.
    pub fn signal(&self, signal: &str) -> Result<(), Error> {
        // A child that has not been waited for keeps its number, so this cannot meet another process.
        // The shell's own `kill`: the program is not on every machine.
        let status = Command::new("sh")
            .args(["-c", "kill -s \"$1\" \"$2\"", "sh", signal, &self.id().to_string()])
            .status()
            .map_err(Error::doing(format!("sending SIG{signal} to {}", self.name)))?;
        if status.success() {
            Ok(())
        } else {
            Err(Error::Ended { program: format!("kill -s {signal} (on {})", self.name), status, expected: "" })
        }
    }

    /// The exit status, if the program has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().map_err(Error::doing(format!("looking after {}", self.name)))
    }

    /// Waits for the program's end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Error> {
        let waiting_for = format!("the end of {}", self.name);
        poll(limit, &waiting_for, || self.ended())
    }

    /// Fails if the program has ended.
    pub(crate) fn check_alive(&mut self) -> Result<(), Error> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => {
                Err(Error::Ended { program: self.name.clone(), status, expected: ", and should still be running" })
            }
        }
    }

    pub(crate) fn take_pipes(&mut self) -> (ChildStdin, ChildStdout) {
        let input = self.child.stdin.take().expect("started with pipes, taken once");
        let output = self.child.stdout.take().expect("started with pipes, taken once");
        (input, output)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when the program has already ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("==== log of {} ====\n{}\n==== end of the log of {} ====", self.name, self.log(), self.name);
        }
    }
}
