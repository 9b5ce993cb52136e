//! The thread that keeps the target going: it hears what workers tell, looks for drives that are pending, and tells the service
//! manager how the target does.
//!
//! It owns the pending drives. It waits for no drive and no front-end: a step of a pending drive that takes long has a thread of
//! its own.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::error::Defect;
use super::pending::PendingDrive;
use super::registry::Registry;
use super::unserved::Unserved;
use crate::control::service_manager;
use crate::datapath::worker::{WorkerPool, panic_message};
use crate::drive::Presence;

/// Time between two looks at what the workers tell, and at how the drives do.
pub(super) const LOOP_INTERVAL: Duration = Duration::from_millis(50);

/// The control loop's thread; dropping this ends it.
pub(super) struct ControlLoop {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ControlLoop {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be made.
    pub(super) fn start(
        registry: Arc<Registry>,
        mut pending: Vec<PendingDrive>,
        unserved: Unserved,
        pool: Arc<WorkerPool>,
        status: Arc<Mutex<Status>>,
    ) -> io::Result<ControlLoop> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let termination = registry.termination.clone();
        let run_loop = move || {
            // Relaxed: the flag guards nothing but this loop.
            while !stopped.load(Ordering::Relaxed) {
                pool.events().into_iter().for_each(|event| registry.handle(event));
                registry.check_supervisors();
                registry.served().drives.iter().for_each(|drive| drive.check_hold());
                registry.served().servers.iter().for_each(|server| server.export().tell_left_out(false));
                for drive in &mut pending {
                    if let Err(defect) = drive.step(&registry) {
                        registry.termination.end(defect);
                    }
                }
                pending.retain(|drive| !drive.done());
                unserved.turn_away();
                if let Some(text) = describe(&registry, &pending, &unserved) {
                    status.lock().unwrap_or_else(PoisonError::into_inner).update(text);
                }
                std::thread::park_timeout(LOOP_INTERVAL);
            }
        };
        let run = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(run_loop)) {
                termination.end(Defect::ControlLoop { message: panic_message(panic.as_ref()) });
            }
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(run)?;
        Ok(ControlLoop { stop, thread: Some(thread) })
    }
}

impl Drop for ControlLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// How the target does, for the service manager.
#[derive(Default)]
pub(super) struct Status {
    pub(super) text: String,
    /// It has been told that all is ready, and is told of changes.
    pub(super) ready: bool,
}

impl Status {
    pub(super) fn update(&mut self, text: String) {
        if self.text != text {
            self.text = text;
            if self.ready {
                service_manager::notify(&[&format!("STATUS={}", self.text)]);
            }
        }
    }
}

/// How the target does, in one line; `None` while a drive is just going or coming.
pub(super) fn describe(registry: &Registry, pending: &[PendingDrive], unserved: &Unserved) -> Option<String> {
    let mut reasons: Vec<String> = pending.iter().filter_map(PendingDrive::why).map(str::to_owned).collect();
    reasons.extend_from_slice(unserved.reasons());
    let served = registry.served();
    for drive in &served.drives {
        match drive.presence() {
            Presence::Attached => {}
            Presence::Detached(why) => reasons.push(why),
            Presence::Changing => return None,
        }
    }
    let total = registry.total;
    let sockets = format!("{total} socket{}", if total == 1 { "" } else { "s" });
    if reasons.is_empty() {
        return Some(format!("ready for front-ends on {sockets}"));
    }
    let served = served.servers.iter().filter(|server| server.export().presence() == Presence::Attached).count();
    Some(format!("serving {served} of {sockets}; {}", reasons.join("; ")))
}
