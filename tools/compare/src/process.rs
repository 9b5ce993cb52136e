//! The programs under test: started, held up while another one is measured, and charged with the CPU time they took.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Error;

/// Between two looks at something that is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long a program has to end after SIGTERM before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a signalled process may take to be seen as stopped.
const HOLD_LIMIT: Duration = Duration::from_secs(10);

/// A program that was started here. It is killed when the value is dropped, or when the thread that started it ends.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` on these CPUs (all that there are if empty); what it writes goes to the file `log`.
    ///
    /// Call it from a thread that lives as long as the program is wanted.
    pub fn start(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        cpus: &[usize],
        log: &Path,
    ) -> Result<Process, Error> {
        let output = File::options().create(true).append(true).open(log);
        let output = output.map_err(Error::system(format!("opening {}", log.display())))?;
        let errors = output.try_clone().map_err(Error::system("duplicating a file descriptor"))?;
        // A program that nobody stops any more must not poll on: the kernel kills it when this thread ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(arguments);
        // In a group of its own: Ctrl-C is for this program, which ends the others in order.
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let spawned = on_cpus(cpus, || command.spawn())?;
        let child = spawned.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                Error::NoProgram { program: "setpriv".into(), advice: "install the package util-linux" }
            }
            _ => Error::System { what: format!("starting {name}"), source },
        })?;
        Ok(Process { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// What the process is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The operating system's number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the process has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Fails if it has ended.
    pub fn check_alive(&mut self) -> Result<(), Error> {
        let looked = self.child.try_wait().map_err(Error::system(format!("looking after {}", self.name)))?;
        match looked {
            None => Ok(()),
            Some(status) => Err(Error::Ended { program: self.name.clone(), status, reason: self.last_line() }),
        }
    }

    /// Waits until `done` says so; fails when the program ends or `limit` has passed.
    pub fn wait_until(&mut self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        while !done() {
            self.check_alive()?;
            if Instant::now() >= deadline {
                let what = format!("{}: {what}", self.name);
                return Err(Error::Timeout { what, limit, reason: self.last_line() });
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Holds all of its threads (SIGSTOP) and waits until they stand still.
    pub fn hold(&mut self) -> Result<(), Error> {
        self.signal(Signal::STOP)?;
        let id = self.id();
        self.wait_until("being held", HOLD_LIMIT, || all_threads_stopped(id))
    }

    /// Lets it go on after [`hold`](Process::hold).
    pub fn resume(&self) -> Result<(), Error> {
        self.signal(Signal::CONT)
    }

    /// CPU time it has taken so far, with all of its threads and descendants.
    pub fn cpu_time(&self) -> Result<Duration, Error> {
        tree_cpu_time(self.id())
    }

    /// Asks it to end, kills it if it does not, and says how it ended.
    pub fn stop(mut self) -> Result<ExitStatus, Error> {
        self.signal(Signal::TERM)?;
        // One that is held would not notice.
        self.resume()?;
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            let looked = self.child.try_wait().map_err(Error::system(format!("looking after {}", self.name)))?;
            if let Some(status) = looked {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                let what = format!("the end of {} after SIGTERM", self.name);
                return Err(Error::Timeout { what, limit: STOP_LIMIT, reason: self.last_line() });
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), Error> {
        // A child that has not been waited for keeps its number, so this cannot meet another process.
        kill_process(Pid::from_child(&self.child), signal)
            .map_err(|error| Error::System { what: format!("sending a signal to {}", self.name), source: error.into() })
    }

    fn last_line(&self) -> String {
        let log = self.log();
        let last = log.lines().rev().map(str::trim).find(|line| !line.is_empty());
        last.map_or_else(|| "it wrote nothing".to_owned(), str::to_owned)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has already ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `work` with this thread, and what it starts, on `cpus` only (no change if empty).
pub fn on_cpus<T>(cpus: &[usize], work: impl FnOnce() -> T) -> Result<T, Error> {
    if cpus.is_empty() {
        return Ok(work());
    }
    let failed = |error: rustix::io::Errno| Error::System {
        what: format!("running on the CPUs {cpus:?}"),
        source: error.into(),
    };
    let before = sched_getaffinity(None).map_err(failed)?;
    let mut wanted = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            return Err(Error::Options(format!("there is no CPU {cpu}")));
        }
        wanted.set(cpu);
    }
    sched_setaffinity(None, &wanted).map_err(failed)?;
    let result = work();
    sched_setaffinity(None, &before).map_err(failed)?;
    Ok(result)
}

/// The CPUs that this thread may use.
pub fn allowed_cpus() -> Result<Vec<usize>, Error> {
    let set = sched_getaffinity(None)
        .map_err(|error| Error::System { what: "asking for the allowed CPUs".into(), source: error.into() })?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// CPU time of the process `id` and everything that it has started, ended threads included: user and system time of
/// `/proc/ID/stat`, which the kernel counts in hundredths of a second.
pub fn tree_cpu_time(id: u32) -> Result<Duration, Error> {
    let all = stats()?;
    let own = all.get(&id).ok_or_else(|| Error::System {
        what: format!("reading the CPU time of process {id}"),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let mut ticks = own.ticks;
    let mut parents = vec![id];
    while let Some(parent) = parents.pop() {
        for (&child, stat) in all.iter().filter(|(_, stat)| stat.parent == parent) {
            ticks += stat.ticks;
            parents.push(child);
        }
    }
    Ok(ticks_to_time(ticks))
}

/// CPU time of the process `id` alone, its ended threads included.
pub fn own_cpu_time(id: u32) -> Result<Duration, Error> {
    let path = format!("/proc/{id}/stat");
    let line = fs::read_to_string(&path).map_err(Error::system(format!("reading {path}")))?;
    let stat = parse_stat(&line).ok_or_else(|| Error::Options(format!("{path} is not what proc(5) says: {line}")))?;
    Ok(ticks_to_time(stat.ticks))
}

fn ticks_to_time(ticks: u64) -> Duration {
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// What is used of a line of `/proc/ID/stat` (proc(5)).
struct Stat {
    state: char,
    parent: u32,
    ticks: u64,
}

/// Reads a line of `/proc/ID/stat`. The second field, the name, is in parentheses and may hold anything, also parentheses.
fn parse_stat(line: &str) -> Option<Stat> {
    let (_, rest) = line.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // The fields after the name: state is the third of all, the parent the fourth, utime and stime the 14th and 15th.
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Stat { state: fields.first()?.chars().next()?, parent: fields.get(1)?.parse().ok()?, ticks })
}

/// The CPU time in a line of `/proc/ID/stat` or `/proc/ID/task/ID/stat`, in the system's clock ticks.
pub(crate) fn ticks_of(line: &str) -> Option<u64> {
    parse_stat(line).map(|stat| stat.ticks)
}

fn stats() -> Result<HashMap<u32, Stat>, Error> {
    let entries = fs::read_dir("/proc").map_err(Error::system("reading /proc"))?;
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // A process that ends while this looks has nothing left to read.
    let stat = |id| Some((id, parse_stat(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?)?));
    Ok(ids.filter_map(stat).collect())
}

fn all_threads_stopped(id: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{id}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).ok();
        // A thread that is gone stands still.
        stat.and_then(|line| parse_stat(&line)).is_none_or(|stat| matches!(stat.state, 'T' | 't' | 'Z' | 'X'))
    })
}

/// Finds a program: a path as it is, a name in `PATH`.
pub fn find_program(name: &Path) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return name.is_file().then(|| name.to_path_buf());
    }
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (Process, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let process =
            Process::start("sh", Path::new("/bin/sh"), ["-c", script], &[], &folder.path().join("log")).unwrap();
        (process, folder)
    }

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let line = "7 (a) b (c)) S 3 7 7 0 -1 4194560 1 2 3 4 250 50 9 9 20 0 1 0 100 1 1";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.state, stat.parent, stat.ticks), ('S', 3, 300));
        assert!(parse_stat("7 (a) S 3").is_none());
    }

    #[test]
    fn a_busy_child_is_charged_to_the_process_and_a_held_one_takes_nothing() {
        // The shell waits for a shell of its own that burns CPU time.
        let (mut process, _folder) = shell("sh -c 'while :; do :; done' & wait");
        let busy = |process: &mut Process, at_least: Duration| {
            let id = process.id();
            let start = tree_cpu_time(id).unwrap();
            process
                .wait_until("CPU time", Duration::from_secs(30), || tree_cpu_time(id).unwrap() >= start + at_least)
                .unwrap();
        };
        busy(&mut process, Duration::from_millis(200));
        // Only the shell itself is held: it does nothing, its child goes on and is still counted.
        process.hold().unwrap();
        busy(&mut process, Duration::from_millis(50));
        process.resume().unwrap();
        let children = stats().unwrap().into_iter().filter(|(_, stat)| stat.parent == process.id());
        let children: Vec<u32> = children.map(|(id, _)| id).collect();
        for child in &children {
            kill_process(Pid::from_raw(*child as i32).unwrap(), Signal::KILL).unwrap();
        }
        assert_eq!(children.len(), 1);
    }

    #[test]
    fn a_held_process_stands_still() {
        let (mut process, _folder) = shell("while :; do :; done");
        process.hold().unwrap();
        let before = process.cpu_time().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(process.cpu_time().unwrap(), before);
        process.resume().unwrap();
        let id = process.id();
        process
            .wait_until("CPU time", Duration::from_secs(30), || {
                tree_cpu_time(id).unwrap() > before + Duration::from_millis(50)
            })
            .unwrap();
    }

    #[test]
    fn an_end_is_told_with_the_last_words() {
        let (mut process, _folder) = shell("echo one; echo two words >&2; exit 3");
        let error = process.wait_until("nothing", Duration::from_secs(30), || false).unwrap_err().to_string();
        assert_eq!(error, "sh ended with exit status: 3: two words");
    }

    #[test]
    fn a_process_stops_when_asked_even_if_held() {
        let (mut process, _folder) = shell("while :; do :; done");
        process.hold().unwrap();
        assert!(!process.stop().unwrap().success());
    }

    #[test]
    fn programs_are_found_by_name_or_path() {
        assert!(find_program(Path::new("sh")).is_some());
        assert!(find_program(Path::new("/bin/sh")).is_some());
        assert_eq!(find_program(Path::new("no-such-program-here")), None);
        assert_eq!(find_program(Path::new("./no/such")), None);
    }

    #[test]
    fn children_inherit_the_cpus() {
        let cpu = allowed_cpus().unwrap()[0];
        let inside = on_cpus(&[cpu], || allowed_cpus().unwrap()).unwrap();
        assert_eq!(inside, [cpu]);
        assert!(allowed_cpus().unwrap().contains(&cpu));
    }
}
