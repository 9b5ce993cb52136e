//! What is served: drives, disks and the threads that belong to them; and how serving ends.
//!
//! The registry owns every server and every drive that is open. Drives that are pending join it when they are there. It never
//! waits for a drive or a front-end.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{Defect, Ended};
use crate::datapath::worker::{Cpus, WorkerEvent, WorkerPool};
use crate::drive::{Drive, Supervisor};
use crate::event::EventFd;
use crate::fault_point::fault_point;
use crate::vhost_user::export::Export;
use crate::vhost_user::listener::Listener;
use crate::vhost_user::{Server, ServerError};

/// What is served, and how that ends. Pending drives join it later.
pub(in crate::control) struct Registry {
    /// Exports of the configuration, those of pending drives and those with mistakes included.
    pub(super) total: usize,
    /// What is served now.
    pub(in crate::control) served: Mutex<Served>,
    pub(in crate::control) termination: Arc<Termination>,
    /// The workers, for drives to come.
    pub(in crate::control) pool: Arc<WorkerPool>,
}

/// The disks and drives that are served.
#[derive(Default)]
pub(in crate::control) struct Served {
    /// Nothing joins any more: the program ends.
    pub(super) stopping: bool,
    /// One for each disk.
    pub(in crate::control) servers: Vec<Server>,
    /// One for each drive, which looks after it.
    pub(super) supervisors: Vec<Supervisor>,
    /// Drives that are attached, or were and are detached now.
    pub(super) drives: Vec<Arc<Drive>>,
}

/// The end of serving.
pub(in crate::control) struct Termination {
    /// Rings when there is nothing more to serve.
    pub(super) event: EventFd,
    /// Exports that have, or may still get, a front-end.
    left: AtomicUsize,
    /// Why serving has ended by itself; the first reason counts.
    defect: Mutex<Option<Defect>>,
}

impl Termination {
    /// So many disks are to be served; the event rings when the last one has lost the only front-end that it can have.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub(super) fn new(disks: usize) -> io::Result<Termination> {
        Ok(Termination { event: EventFd::new()?, left: AtomicUsize::new(disks), defect: Mutex::default() })
    }

    /// Ends serving because of a defect.
    pub(in crate::control) fn end(&self, defect: Defect) {
        self.defect().get_or_insert(defect);
        self.event.notify();
    }

    /// Why serving has ended by itself, if it has.
    pub(super) fn reason(&self) -> Result<(), Ended> {
        self.defect().take().map_or(Ok(()), |defect| Err(Ended(defect)))
    }

    fn defect(&self) -> MutexGuard<'_, Option<Defect>> {
        self.defect.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    /// What is served now. To be dropped soon: whoever joins or leaves waits for it.
    pub(in crate::control) fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a drive looked after from now on.
    pub(super) fn add_drive(&self, drive: Arc<Drive>) -> Result<(), Defect> {
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
            served.supervisors.push(Supervisor::start(drive.clone())?);
            served.drives.push(drive);
        }
        Ok(())
    }

    /// Handles what a worker has told.
    pub(super) fn handle(&self, event: WorkerEvent) {
        match event {
            WorkerEvent::Expired { slot, count, at } => {
                self.served().drives.iter().for_each(|drive| drive.report_expired(slot, count, at));
            }
            WorkerEvent::WorkerDied { worker, message } => {
                self.termination.end(Defect::Worker { worker, message });
            }
        }
    }

    /// Notices a drive whose supervisor has died: it would never be back.
    pub(super) fn check_supervisors(&self) {
        let served = self.served();
        if let Some(drive) = served.supervisors.iter().find_map(Supervisor::bereft) {
            self.termination.end(Defect::Supervisor { drive: drive.to_string() });
        }
        for _drive in &served.drives {
            fault_point!("control loop panics", _drive);
        }
    }

    /// Serves an export from now on.
    pub(super) fn add_disk(&self, export: Arc<Export>, listener: Listener) -> Result<(), Defect> {
        let mut served = self.served();
        if !served.stopping {
            let termination = self.termination.clone();
            let at_end = move |result: Result<(), ServerError>| {
                if let Err(error) = result {
                    termination.end(error.into());
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

#[cfg(test)]
pub(in crate::control) mod testing {
    use super::*;

    /// One that serves nothing.
    pub(in crate::control) fn empty() -> Arc<Registry> {
        let pool = Arc::new(WorkerPool::start(&[]).unwrap());
        let termination = Arc::new(Termination::new(0).unwrap());
        Arc::new(Registry { total: 0, served: Mutex::default(), termination, pool })
    }
}
