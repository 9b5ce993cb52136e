//! Host CPU time of one side while a guest runs a job.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Error;
use crate::process::ticks_of;

/// Between two looks at the clocks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Threads of the controller in software inside our target: a real drive takes no CPU time of the host.
const DRIVE_THREADS: &str = "nvme-sim";

/// CPU seconds up to a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Charges {
    /// Everything that is charged.
    pub side: f64,
    /// The drive in software.
    pub drive: f64,
}

/// Whose time is counted.
#[derive(Clone, Debug)]
pub(super) struct Clocks {
    processes: Vec<u32>,
    drive_threads: Vec<(u32, u32)>,
}

impl Clocks {
    /// The clocks of these processes, with all their threads.
    pub(super) fn of(processes: &[u32]) -> Clocks {
        let threads = |&process: &u32| {
            let folder = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
            let numbers = folder.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
            let of_drive = |thread: &u32| {
                let name = fs::read_to_string(format!("/proc/{process}/task/{thread}/comm"));
                name.is_ok_and(|name| name.starts_with(DRIVE_THREADS))
            };
            numbers.filter(of_drive).map(|thread| (process, thread)).collect::<Vec<_>>()
        };
        Clocks { processes: processes.to_vec(), drive_threads: processes.iter().flat_map(threads).collect() }
    }

    /// Whether one of the processes has a drive in software.
    pub(super) fn have_drive(&self) -> bool {
        !self.drive_threads.is_empty()
    }

    /// Reads them.
    pub(super) fn read(&self) -> Result<Charges, Error> {
        let whole = self.processes.iter().map(|process| cpu_seconds(&format!("/proc/{process}/stat")));
        let drive = self.drive_threads.iter().map(|(p, t)| cpu_seconds(&format!("/proc/{p}/task/{t}/stat")));
        let (whole, drive) = (whole.sum::<Result<f64, _>>()?, drive.sum::<Result<f64, _>>()?);
        Ok(Charges { side: (whole - drive).max(0.0), drive })
    }
}

fn cpu_seconds(path: &str) -> Result<f64, Error> {
    let text = fs::read_to_string(path).map_err(Error::system(format!("reading {path}")))?;
    let ticks = ticks_of(&text).ok_or_else(|| Error::System {
        what: format!("reading CPU times from {path}"),
        source: std::io::ErrorKind::InvalidData.into(),
    })?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Reads clocks all the time, on a thread of its own.
pub(super) struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<(Instant, Charges)>, Error>>,
}

impl Recorder {
    /// Starts.
    pub(super) fn start(clocks: &Clocks) -> Recorder {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, clocks) = (Arc::clone(&stop), clocks.clone());
        let thread = std::thread::spawn(move || {
            let mut history = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                history.push((Instant::now(), clocks.read()?));
                std::thread::sleep(LOOK_EVERY);
            }
            Ok(history)
        });
        Recorder { stop, thread }
    }

    /// Ends, and tells what was taken during a load of `seconds` that was the last thing to happen but for the load
    /// generator's own end, after it had been started and warmed up for `ramp`.
    ///
    /// Starting and ending the generator are not part of the load: the time is taken over the inner part of the load and
    /// counted up to its whole length.
    pub(super) fn finish(self, seconds: f64, ramp: f64) -> Result<Charges, Error> {
        self.stop.store(true, Ordering::Relaxed);
        let lost = || Error::System { what: "recording CPU times".into(), source: std::io::ErrorKind::Other.into() };
        let history = self.thread.join().map_err(|_| lost())??;
        charges(&history, seconds, ramp).ok_or_else(lost)
    }
}

fn charges(history: &[(Instant, Charges)], seconds: f64, ramp: f64) -> Option<Charges> {
    let (first, last) = (history.first()?.0, history.last()?.0);
    let whole = (last - first).as_secs_f64();
    // How much of what is not load came after it is not known: at most half of it.
    let after = ((whole - ramp - seconds) / 2.0).max(0.0);
    let (from, to) = (whole - after - 0.9 * seconds, whole - after - 0.1 * seconds);
    let at = |wanted: f64| {
        let distance = |entry: &&(Instant, Charges)| ((entry.0 - first).as_secs_f64() - wanted).abs();
        history.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
    };
    let (from, to) = (at(from)?, at(to)?);
    let length = (to.0 - from.0).as_secs_f64();
    let scaled = |taken: f64| taken * seconds / length;
    (length > 0.0).then(|| Charges { side: scaled(to.1.side - from.1.side), drive: scaled(to.1.drive - from.1.drive) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_load_is_charged() {
        // Half a second of start at one CPU, half a second of warming up and two seconds of load at half a CPU and a drive's
        // tenth, then an end of 0.3 s at two CPUs.
        let start = Instant::now();
        let side = |at: f64| at.min(0.5) + (at - 0.5).clamp(0.0, 2.5) * 0.5 + (at - 3.0).max(0.0) * 2.0;
        let entry = |step: u32| {
            let at = f64::from(step) * 0.02;
            (start + Duration::from_secs_f64(at), Charges { side: side(at), drive: at * 0.1 })
        };
        let history: Vec<_> = (0..=165).map(entry).collect();
        let found = charges(&history, 2.0, 0.5).unwrap();
        assert!((found.side - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.drive - 0.2).abs() < 0.01, "{found:?}");
        assert_eq!(charges(&history[..1], 2.0, 0.5), None);
        assert_eq!(charges(&[], 2.0, 0.5), None);
    }

    #[test]
    fn a_drive_in_software_is_counted_apart() {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let burn = move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !stopped.load(Ordering::Relaxed) && Instant::now() < deadline {}
        };
        let thread = std::thread::Builder::new().name("nvme-sim".into()).spawn(burn).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        // The name is set by the thread itself.
        while !Clocks::of(&[std::process::id()]).have_drive() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let clocks = Clocks::of(&[std::process::id()]);
        assert!(clocks.have_drive());
        let before = clocks.read().unwrap();
        while clocks.read().unwrap().drive < before.drive + 0.1 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let after = clocks.read().unwrap();
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        assert!(after.drive >= before.drive + 0.1, "{before:?} {after:?}");
        assert!(after.side >= before.side, "{before:?} {after:?}");
        assert!(Clocks::of(&[u32::MAX]).read().is_err());
    }
}
