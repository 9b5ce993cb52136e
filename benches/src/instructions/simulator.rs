//! The simulated controller in a process of its own, which can be stopped and continued.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nvme_sim::{Config, NamespaceConfig};
use rustix::process::{Pid, Signal, kill_process};

/// A running simulator; ended when dropped.
pub(crate) struct Simulator {
    child: Child,
}

impl Simulator {
    /// Starts this program again as a simulator.
    pub(crate) fn start(socket: &Path) -> std::io::Result<Simulator> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("simulator")
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line)?;
        if line.trim() != "ready" {
            return Err(std::io::Error::other(format!("the simulator said {line:?} instead of being ready")));
        }
        Ok(Simulator { child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // It may have been left stopped by a measurement that failed.
        let _ = kill_process(pid(self.child.id()), Signal::CONT);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the simulator process does: serves until its standard input ends.
pub(crate) fn run(socket: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let config = Config { namespaces: vec![namespace], ..Default::default() };
    let simulator = nvme_sim::Simulator::start(config, socket)?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(simulator);
    Ok(())
}

/// While this lives, no thread of the simulator runs.
pub(crate) struct Paused(u32);

impl Paused {
    pub(crate) fn new(simulator: u32) -> Paused {
        kill_process(pid(simulator), Signal::STOP).expect("the simulator is our orchestrator's child");
        let start = Instant::now();
        while !all_stopped(simulator) {
            assert!(start.elapsed() < Duration::from_secs(20), "the simulator does not stop");
            std::thread::yield_now();
        }
        Paused(simulator)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        kill_process(pid(self.0), Signal::CONT).expect("the simulator is our orchestrator's child");
    }
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(id as i32).expect("a process identifier is not 0")
}

/// Is every thread in the state `T`? It stands after the parenthesised name (proc(5), /proc/pid/stat).
fn all_stopped(process: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("the simulator is running");
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // A thread that has ended meanwhile does not run either.
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'))
    })
}
