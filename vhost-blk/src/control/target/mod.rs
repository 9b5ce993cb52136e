//! Everything one program serves: controllers, workers, exports, and the thread that listens to the workers.

mod unserved;
mod waiting;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nvme_driver::Options;

use crate::control::config::{Configuration, RefusedExport, Settings};
use crate::control::service_manager;
use crate::datapath::counters::Tally;
use crate::datapath::worker::{Cpus, WorkerEvent, WorkerPool, panic_message};
use crate::drive::{Drive, Keeper, Presence};
use crate::event::EventFd;
use crate::fault_point::fault_point;
use crate::vhost_user::Server;
use crate::vhost_user::export::Export;
use crate::vhost_user::listener::{self, Handed, Listener, Sockets};
use crate::virtio::memory::Budget;
use unserved::Unserved;
use waiting::{Means, Waiting};

/// A running target. Dropping it stops serving: rings are drained, controllers shut down, sockets removed.
pub struct Target {
    // In this order they are dropped: nothing that is used goes first.
    running: Arc<Running>,
    watch: Option<Watch>,
    status: Arc<Mutex<Status>>,
    _pool: Arc<WorkerPool>,
}

/// What is served, and how that ends. A drive that is waited for joins it later.
struct Running {
    /// Exports, those that are waited for or refused included.
    total: usize,
    parts: Mutex<Parts>,
    end: Arc<End>,
    pool: Arc<WorkerPool>,
}

#[derive(Default)]
struct Parts {
    /// Nothing joins any more.
    stopping: bool,
    servers: Vec<Server>,
    keepers: Vec<Keeper>,
    drives: Vec<Arc<Drive>>,
}

/// The end of serving.
struct End {
    event: EventFd,
    /// Exports that have, or may still get, a front-end.
    left: AtomicUsize,
    fatal: OnceLock<String>,
}

impl End {
    /// It ends because of a defect; the first one counts. What is broken could not be mended here, and may stay unnoticed by
    /// those it serves; a program that is started again goes on where this one was.
    fn fatal(&self, why: String) {
        let _ = self.fatal.set(format!("{why}; it is safe to start the program again: guests go on where they were"));
        self.event.notify();
    }
}

impl Running {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks after a drive from now on. The error is one line.
    fn keep(&self, drive: Arc<Drive>) -> Result<(), String> {
        if let Some(node) = drive.numa_node() {
            let Cpus { near, far, spared } = self.pool.placement().cpus(node);
            if !far.is_empty() {
                log::warn!(
                    "{drive}: it is on NUMA node {node}, and the workers for its disks run on CPUs of other nodes ({far:?}), which costs \
                     each access between the two: choose CPUs of its node (--cpus)"
                );
            } else if !spared.is_empty() {
                log::info!(
                    "{drive}: it is on NUMA node {node}: the workers there (CPUs {near:?}) serve its disks, those on CPUs {spared:?} do not"
                );
            }
        }
        let mut parts = self.parts();
        if !parts.stopping {
            parts.keepers.push(Keeper::start(drive.clone())?);
            parts.drives.push(drive);
        }
        Ok(())
    }

    /// Something that a worker has told.
    fn hear(&self, event: WorkerEvent) {
        match event {
            WorkerEvent::Expired { pair, count, at } => {
                self.parts().drives.iter().for_each(|drive| drive.report_expired(pair, count, at));
            }
            WorkerEvent::WorkerDied { worker, message } => {
                self.end.fatal(format!("worker {worker} died: {message}"));
            }
        }
    }

    /// Notices a drive whose keeper has died: it would never be back.
    fn look_after_keepers(&self) {
        let parts = self.parts();
        if let Some(drive) = parts.keepers.iter().find_map(Keeper::bereft) {
            self.end.fatal(format!("the keeper of {drive} died (see the panic above)"));
        }
        for _drive in &parts.drives {
            fault_point!("watch panics", _drive);
        }
    }

    /// Serves an export from now on. The error is one line.
    fn serve(&self, export: Arc<Export>, listener: Listener) -> Result<(), String> {
        let mut parts = self.parts();
        if !parts.stopping {
            let end = self.end.clone();
            let at_end = move |result: Result<(), String>| {
                if let Err(why) = result {
                    end.fatal(why);
                }
                if end.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    end.event.notify();
                }
            };
            parts.servers.push(Server::start(export, listener, at_end)?);
        }
        Ok(())
    }
}

/// Time between two looks at what the workers tell, and at how the drives do.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

impl Target {
    /// Opens every controller once, binds every socket and starts to serve. A drive that is not there, or does not come up, is
    /// waited for, and so is a socket that cannot be bound: only those exports are not served yet. A CPU that cannot be had is
    /// done without. The error is one line: what is wrong with the set-up of this machine if nothing can be served for it.
    pub fn start(settings: &Settings) -> Result<Target, String> {
        let options = Options { io_timeout: settings.patience.io_timeout, ..Options::default() };
        Target::start_with(settings, &options)
    }

    /// The same, with sockets that the service manager hands over. Exports that make no sense are told, and not served.
    pub fn start_on(configuration: &Configuration, handed: Vec<Handed>) -> Result<Target, String> {
        let Configuration { settings, refused } = configuration;
        let options = Options { io_timeout: settings.patience.io_timeout, ..Options::default() };
        Target::run(settings, refused, &options, handed)
    }

    /// The same, with the controllers opened in another way: other deadlines, say. What `options` says about the time for a
    /// command counts.
    pub fn start_with(settings: &Settings, options: &Options) -> Result<Target, String> {
        Target::run(settings, &[], options, Vec::new())
    }

    fn run(
        settings: &Settings,
        refused: &[RefusedExport],
        options: &Options,
        handed: Vec<Handed>,
    ) -> Result<Target, String> {
        // The cheap and likely errors first: sockets before drives.
        let Sockets { listeners, unwanted } =
            listener::open_all(&settings.exports.iter().map(|export| &export.listen).collect::<Vec<_>>(), handed);
        let mut unserved = Unserved::new(refused, unwanted);
        if let Some(Err(why)) = listeners.first().filter(|_| listeners.iter().all(Result::is_err)) {
            listeners[1..].iter().flat_map(|listener| listener.as_ref().err()).for_each(|why| log::error!("{why}"));
            return Err(why.clone());
        }
        let pool = WorkerPool::start(&settings.cpus).map_err(|error| format!("cannot start the workers: {error}"))?;
        let pool = Arc::new(pool);
        unserved.lacks_workers(pool.unpinned());
        let event = EventFd::new().map_err(|error| format!("cannot start: {error}"))?;
        let end = Arc::new(End { event, left: AtomicUsize::new(settings.exports.len()), fatal: OnceLock::new() });
        let total = settings.exports.len() + refused.len();
        let running = Arc::new(Running { total, parts: Mutex::default(), end, pool: pool.clone() });
        let status = Arc::<Mutex<Status>>::default();
        // Whatever fails from here on, what has started is stopped in its order.
        let mut target = Target { running: running.clone(), watch: None, status, _pool: pool.clone() };
        let budget = Budget::new(settings.memory, settings.exports.len());
        let devices = settings.exports.iter().map(|export| &export.device);
        let options = devices.map(|device| (device.clone(), settings.options(device, options))).collect();
        let means = Means { options, hold: settings.patience.hold, pool: pool.clone(), budget };
        settings.drives.iter().for_each(|drive| log::info!("{drive}"));
        // All of them at once: one that is slow keeps nobody waiting.
        let mut waiting = Waiting::all(&settings.exports, listeners, &Arc::new(means));
        loop {
            for drive in &mut waiting {
                drive.step(&running)?;
            }
            if waiting.iter().all(|drive| drive.done() || drive.why().is_some()) {
                break;
            }
            std::thread::park_timeout(WATCH_INTERVAL);
        }
        waiting.retain(|drive| !drive.done());
        // Nothing is served, and nothing can be waited for.
        let nothing = running.parts().servers.is_empty();
        if let Some(why) = waiting.first().filter(|_| nothing).and_then(Waiting::why)
            && waiting.iter().all(Waiting::is_setup)
        {
            waiting[1..].iter().filter_map(Waiting::why).for_each(|why| log::error!("{why}"));
            return Err(why.to_owned());
        }
        waiting.iter_mut().for_each(Waiting::tell);
        if let Some(text) = describe(&running, &waiting, &unserved) {
            target.status.lock().unwrap_or_else(PoisonError::into_inner).update(text);
        }
        target.watch = Some(Watch::start(running, waiting, unserved, pool, target.status.clone())?);
        Ok(target)
    }

    /// Tells the service manager that everything that can be served is, and from now on whenever that changes.
    pub fn tell_ready(&self) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.ready = true;
        service_manager::notify(&["READY=1", &format!("STATUS={}", status.text)]);
    }

    /// Readable when there is nothing more to serve: every export's front-end was inherited connected and is gone, or a
    /// defect of this program ended it.
    pub fn ended(&self) -> &EventFd {
        &self.running.end.event
    }

    /// Stops serving, and logs the counters at the end of it all. The error is why serving had ended before.
    pub fn stop(mut self) -> Result<(), String> {
        let exports = self.halt();
        exports.iter().for_each(|export| export.tell_left_out(true));
        exports.iter().for_each(|export| export.log_counters());
        self.running.end.fatal.get().cloned().map_or(Ok(()), Err)
    }

    /// Ends every session, then the controllers.
    fn halt(&mut self) -> Vec<Arc<Export>> {
        let servers = {
            let mut parts = self.running.parts();
            parts.stopping = true;
            std::mem::take(&mut parts.servers)
        };
        // All of them at once: each may have requests to wait for.
        servers.iter().for_each(Server::ask_to_stop);
        let exports = servers.into_iter().map(|server| server.export().clone()).collect();
        self.watch = None;
        let Parts { keepers, drives, .. } = std::mem::take(&mut *self.running.parts());
        drop(keepers);
        drives.iter().for_each(|drive| drive.shutdown());
        exports
    }

    /// The counters of all rings together, since the start: of those that have stopped, too.
    pub fn totals(&self) -> Tally {
        let mut sum = Tally::default();
        self.running.parts().servers.iter().for_each(|server| sum += server.export().totals());
        sum
    }

    /// Logs the counters of every ring.
    pub fn log_counters(&self) {
        self.running.parts().servers.iter().for_each(|server| server.export().log_counters());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.halt();
    }
}

/// How the target does, for the service manager.
#[derive(Default)]
struct Status {
    text: String,
    /// It has been told that all is ready, and is told of changes.
    ready: bool,
}

impl Status {
    fn update(&mut self, text: String) {
        if self.text != text {
            self.text = text;
            if self.ready {
                service_manager::notify(&[&format!("STATUS={}", self.text)]);
            }
        }
    }
}

/// How the target does, in one line; `None` while a drive is just going or coming.
fn describe(running: &Running, waiting: &[Waiting], unserved: &Unserved) -> Option<String> {
    let mut reasons: Vec<String> = waiting.iter().filter_map(Waiting::why).map(str::to_owned).collect();
    reasons.extend_from_slice(unserved.reasons());
    let parts = running.parts();
    for drive in &parts.drives {
        match drive.presence() {
            Presence::There => {}
            Presence::Away(why) => reasons.push(why),
            Presence::Changing => return None,
        }
    }
    let total = running.total;
    let sockets = format!("{total} socket{}", if total == 1 { "" } else { "s" });
    if reasons.is_empty() {
        return Some(format!("ready for front-ends on {sockets}"));
    }
    let served = parts.servers.iter().filter(|server| server.export().drive.presence() == Presence::There).count();
    Some(format!("serving {served} of {sockets}; {}", reasons.join("; ")))
}

/// The thread that hears what workers tell, and looks for drives that are waited for.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    fn start(
        running: Arc<Running>,
        mut waiting: Vec<Waiting>,
        unserved: Unserved,
        pool: Arc<WorkerPool>,
        status: Arc<Mutex<Status>>,
    ) -> Result<Watch, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let end = running.end.clone();
        let watch = move || {
            // Relaxed: the flag guards nothing but this loop.
            while !stopped.load(Ordering::Relaxed) {
                pool.events().into_iter().for_each(|event| running.hear(event));
                running.look_after_keepers();
                running.parts().drives.iter().for_each(|drive| drive.mind_patience());
                running.parts().servers.iter().for_each(|server| server.export().tell_left_out(false));
                for drive in &mut waiting {
                    if let Err(why) = drive.step(&running) {
                        running.end.fatal(why);
                    }
                }
                waiting.retain(|drive| !drive.done());
                unserved.turn_away();
                if let Some(text) = describe(&running, &waiting, &unserved) {
                    status.lock().unwrap_or_else(PoisonError::into_inner).update(text);
                }
                std::thread::park_timeout(WATCH_INTERVAL);
            }
        };
        let run = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(watch)) {
                end.fatal(format!("the watch died: {}", panic_message(panic.as_ref())));
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nvme_sim::{Config, Simulator};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::control::config::{ExportSettings, Listen};
    use crate::drive::DeviceAddress;

    #[test]
    fn a_thread_that_dies_ends_the_program() {
        for (place, message) in [
            ("server panics", "died: asked to by a test; it is safe"),
            ("keeper panics", "keeper panics died (see the panic above); it is safe"),
            ("watch panics", "the watch died: asked to by a test; it is safe"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (nvme, socket) = (folder.path().join(format!("nvme {place}")), folder.path().join(place));
            let _simulator = Simulator::start(Config::default(), &nvme).unwrap();
            let export = ExportSettings {
                device: DeviceAddress::Vfio(vfio::Address::VfioUser(nvme)),
                listen: Listen::Path(socket.clone()),
                namespace: None,
                queues: 1,
                queue_size: 64,
                queue_pairs: None,
                read_only: false,
                serial: None,
            };
            let settings = Settings { exports: vec![export], ..Settings::default() };
            let target = Target::start(&settings).unwrap();
            let _front_end = UnixStream::connect(&socket).unwrap();
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            let ends = poll(&mut [PollFd::new(target.ended(), PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(ends, 1, "{place}: nobody notices");
            let error = target.stop().unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
