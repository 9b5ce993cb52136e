//! Everything one program serves: controllers, workers, exports, and the thread that listens to the workers.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nvme_driver::Options;

use crate::bell::Bell;
use crate::config::Settings;
use crate::counters::Tally;
use crate::drive::{Drive, Keeper};
use crate::export::{Export, Server};
use crate::listener;
use crate::service_manager::Handed;
use crate::worker::{WorkerEvent, WorkerPool};

/// A running target. Dropping it stops serving: rings are drained, controllers shut down, sockets removed.
pub struct Target {
    // In this order they are dropped: nothing that is used goes first.
    servers: Vec<Server>,
    watch: Option<Watch>,
    keepers: Vec<Keeper>,
    drives: Vec<Arc<Drive>>,
    _pool: Arc<WorkerPool>,
    ended: Arc<Bell>,
    fatal: Arc<OnceLock<String>>,
}

/// Time between two looks at what the workers tell.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

impl Target {
    /// Opens every controller once, binds every socket and starts to serve. The error is one line.
    pub fn start(settings: &Settings) -> Result<Target, String> {
        Target::start_on(settings, Vec::new())
    }

    /// The same, with sockets that the service manager hands over.
    pub fn start_on(settings: &Settings, handed: Vec<Handed>) -> Result<Target, String> {
        let options = Options { io_timeout: settings.patience.io_timeout, ..Options::default() };
        Target::run(settings, &options, handed)
    }

    /// The same, with the controllers opened in another way: other deadlines, say. What `options` says about the time for a
    /// command counts.
    pub fn start_with(settings: &Settings, options: &Options) -> Result<Target, String> {
        Target::run(settings, options, Vec::new())
    }

    fn run(settings: &Settings, options: &Options, handed: Vec<Handed>) -> Result<Target, String> {
        // The cheap and likely errors first: sockets before drives.
        let listeners = listener::open_all(&settings.exports, handed)?;
        let pool = WorkerPool::start(&settings.cpus).map_err(|error| format!("cannot start the workers: {error}"))?;
        let pool = Arc::new(pool);
        let mut drives: Vec<Arc<Drive>> = Vec::new();
        let mut exports = Vec::new();
        for (number, export) in settings.exports.iter().enumerate() {
            let drive = match drives.iter().find(|drive| *drive.address() == export.device) {
                Some(drive) => drive.clone(),
                None => {
                    let drive = Arc::new(Drive::open(&export.device, options, settings.patience.hold, pool.clone())?);
                    drives.push(drive.clone());
                    drive
                }
            };
            exports.push(Arc::new(Export::new(export, drive, number, pool.len())?));
        }
        let ended = Bell::new().map_err(|error| format!("cannot start: {error}"))?;
        let ended = Arc::new(ended);
        let left = Arc::new(AtomicUsize::new(exports.len()));
        let mut servers = Vec::new();
        for (export, listener) in exports.into_iter().zip(listeners) {
            let (ended, left) = (ended.clone(), left.clone());
            let at_end = move || {
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    ended.ring();
                }
            };
            servers.push(Server::start(export, listener, at_end)?);
        }
        let fatal = Arc::new(OnceLock::new());
        let report = {
            let (ended, fatal) = (ended.clone(), fatal.clone());
            move |why| {
                let _ = fatal.set(why);
                ended.ring();
            }
        };
        let watch = Watch::start(drives.clone(), pool.clone(), report)?;
        let keepers = drives.iter().cloned().map(Keeper::start).collect::<Result<_, _>>()?;
        Ok(Target { servers, watch: Some(watch), keepers, drives, _pool: pool, ended, fatal })
    }

    /// Readable when there is nothing more to serve: every export's front-end was inherited connected and is gone, or a
    /// defect of this program ended it.
    pub fn ended(&self) -> &Bell {
        &self.ended
    }

    /// Stops serving, and logs the counters at the end of it all. The error is why serving had ended before.
    pub fn stop(mut self) -> Result<(), String> {
        let exports = self.halt();
        exports.iter().for_each(|export| export.log_counters());
        self.fatal.get().cloned().map_or(Ok(()), Err)
    }

    /// Ends every session, then the controllers.
    fn halt(&mut self) -> Vec<Arc<Export>> {
        // All of them at once: each may have requests to wait for.
        self.servers.iter().for_each(Server::ask_to_stop);
        let exports = self.servers.drain(..).map(|server| server.export().clone()).collect();
        self.watch = None;
        self.keepers.clear();
        self.drives.drain(..).for_each(|drive| drive.shutdown());
        exports
    }

    /// The counters of all rings together, since the start: of those that have stopped, too.
    pub fn totals(&self) -> Tally {
        let mut sum = Tally::default();
        self.servers.iter().for_each(|server| sum += server.export().totals());
        sum
    }

    /// Logs the counters of every ring.
    pub fn log_counters(&self) {
        self.servers.iter().for_each(|server| server.export().log_counters());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.halt();
    }
}

/// The thread that hears what workers tell.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    fn start(
        drives: Vec<Arc<Drive>>,
        pool: Arc<WorkerPool>,
        mut fatal: impl FnMut(String) + Send + 'static,
    ) -> Result<Watch, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            // Relaxed: the flag guards nothing but this loop.
            while !stopped.load(Ordering::Relaxed) {
                for event in pool.events() {
                    match event {
                        WorkerEvent::Expired { pair, count, at } => {
                            if let Some(drive) = drives.iter().find(|drive| drive.owns(pair)) {
                                drive.report_expired(count, at);
                            }
                        }
                        WorkerEvent::Broken { name, reason } => {
                            // The worker has logged it; what is left to do comes from the front-end.
                            log::debug!("{name} is broken: {reason}");
                        }
                        WorkerEvent::WorkerDied { worker, message } => {
                            fatal(format!("worker {worker} died: {message}"))
                        }
                    }
                }
                std::thread::park_timeout(WATCH_INTERVAL);
            }
        };
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(run)
            .map_err(|error| format!("cannot start the watch: {error}"))?;
        Ok(Watch { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
