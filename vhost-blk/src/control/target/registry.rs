//! What is served: drives, disks and the threads that belong to them; and how serving ends.
//!
//! The registry owns every server and every drive that is open. Drives that are pending join it when they are there. It never
//! waits for a drive or a front-end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::datapath::worker::{Cpus, WorkerEvent, WorkerPool};
use crate::drive::{Drive, Supervisor};
use crate::event::EventFd;
use crate::fault_point::fault_point;
use crate::vhost_user::Server;
use crate::vhost_user::export::Export;
use crate::vhost_user::listener::Listener;

/// What is served, and how that ends. A drive that is waited for joins it later.
pub(super) struct Registry {
    /// Exports, those that are waited for or refused included.
    pub(super) total: usize,
    pub(super) served: Mutex<Served>,
    pub(super) termination: Arc<Termination>,
    pub(super) pool: Arc<WorkerPool>,
}

#[derive(Default)]
pub(super) struct Served {
    /// Nothing joins any more.
    pub(super) stopping: bool,
    pub(super) servers: Vec<Server>,
    pub(super) supervisors: Vec<Supervisor>,
    pub(super) drives: Vec<Arc<Drive>>,
}

/// The end of serving.
pub(super) struct Termination {
    pub(super) event: EventFd,
    /// Exports that have, or may still get, a front-end.
    pub(super) left: AtomicUsize,
    pub(super) fatal: OnceLock<String>,
}

impl Termination {
    /// It ends because of a defect; the first one counts. What is broken could not be mended here, and may stay unnoticed by
    /// those it serves; a program that is started again goes on where this one was.
    pub(super) fn fatal(&self, why: String) {
        let _ = self.fatal.set(format!("{why}; it is safe to start the program again: guests go on where they were"));
        self.event.notify();
    }
}

impl Registry {
    pub(super) fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks after a drive from now on. The error is one line.
    pub(super) fn add_drive(&self, drive: Arc<Drive>) -> Result<(), String> {
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
        let mut served = self.served();
        if !served.stopping {
            served.supervisors.push(Supervisor::start(drive.clone()).map_err(|error| error.to_string())?);
            served.drives.push(drive);
        }
        Ok(())
    }

    /// Something that a worker has told.
    pub(super) fn handle(&self, event: WorkerEvent) {
        match event {
            WorkerEvent::Expired { slot, count, at } => {
                self.served().drives.iter().for_each(|drive| drive.report_expired(slot, count, at));
            }
            WorkerEvent::WorkerDied { worker, message } => {
                self.termination.fatal(format!("worker {worker} died: {message}"));
            }
        }
    }

    /// Notices a drive whose supervisor has died: it would never be back.
    pub(super) fn check_keepers(&self) {
        let served = self.served();
        if let Some(drive) = served.supervisors.iter().find_map(Supervisor::bereft) {
            self.termination.fatal(format!("the supervisor of {drive} died (see the panic above)"));
        }
        for _drive in &served.drives {
            fault_point!("control loop panics", _drive);
        }
    }

    /// Serves an export from now on. The error is one line.
    pub(super) fn add_disk(&self, export: Arc<Export>, listener: Listener) -> Result<(), String> {
        let mut served = self.served();
        if !served.stopping {
            let termination = self.termination.clone();
            let at_end = move |result: Result<(), String>| {
                if let Err(why) = result {
                    termination.fatal(why);
                }
                if termination.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    termination.event.notify();
                }
            };
            served.servers.push(Server::start(export, listener, at_end)?);
        }
        Ok(())
    }
}
