//! One disk on one socket: front-ends come and go, and the rings of one at a time run.
//!
//! An [`Export`] owns what outlives a front-end: what the disk offers, the order of its front-ends, its share of the drive, and its
//! counters. It knows nothing of messages.

mod settings;

use std::sync::{Arc, Mutex, PoisonError};

use crate::blk::config;

use super::front_end_queue::FrontEndQueue;
use crate::datapath::counters::{LaneCounters, Tally};
use crate::datapath::worker::RingWorkers;
use crate::drive::{self, Drive, ExportedNamespace, Lease, Share};
use crate::log_limit::LogLimit;
use crate::virtio::memory::{Account, Budget};
pub use settings::{ExportMistake, ExportSettings};

/// What the sessions of one export have in common.
pub struct Export {
    /// Its socket, for the log.
    pub name: String,
    /// The controller.
    pub drive: Arc<Drive>,
    /// Its part of the controller's queue pairs.
    share: Share,
    /// What its front-ends have mapped, all together.
    pub account: Arc<Account>,
    /// The namespace served.
    pub namespace: Arc<ExportedNamespace>,
    /// The export, or the namespace when it was exported, refuses writes.
    pub read_only: bool,
    /// The answer to GET_ID.
    pub serial: [u8; 20],
    /// Virtqueues offered.
    pub queues: u16,
    /// Largest virtqueue accepted, in entries.
    pub queue_size: u16,
    /// Feature bits offered.
    pub features: u64,
    /// The mode of the write cache as its front-ends know it, true for write-back; `None`: this process has not served any yet.
    /// It outlives sessions: a front-end that comes again shows its guest the mode that was set, and does not set it again.
    mode: Mutex<Option<bool>>,
    /// The order of its front-ends.
    pub front_ends: Arc<FrontEndQueue>,
    workers: RingWorkers,
    counters: Vec<Arc<LaneCounters>>,
    /// How many lines its front-ends and guests may cause, over all sessions.
    pub log: Arc<LogLimit>,
}

impl Export {
    /// Looks the namespace up. `number`: of the export in the whole program, so that exports start on different workers.
    ///
    /// # Errors
    /// The drive is away, or has no such namespace.
    pub fn new(
        settings: &ExportSettings,
        drive: Arc<Drive>,
        budget: &Arc<Budget>,
        number: usize,
    ) -> Result<Export, drive::Error> {
        let namespace = drive.namespace(settings.namespace)?;
        let serial = match &settings.serial {
            Some(serial) => serial.to_bytes(),
            None => {
                let mut bytes = [0; 20];
                bytes.iter_mut().zip(drive.serial().bytes()).for_each(|(to, from)| *to = from);
                bytes
            }
        };
        let known = namespace.known().namespace;
        let read_only = settings.read_only || known.read_only;
        let workers = drive.ring_workers(number);
        let mut counters = Vec::new();
        counters.resize_with(settings.queues.into(), Arc::default);
        Ok(Export {
            name: settings.listen.to_string(),
            features: config::features(&known, read_only),
            mode: Mutex::new(None),
            front_ends: Arc::default(),
            share: drive.share(settings.listen.to_string(), settings.queue_pairs),
            drive,
            account: budget.account(),
            namespace,
            read_only,
            serial,
            queues: settings.queues,
            queue_size: settings.queue_size,
            workers,
            counters,
            log: Arc::default(),
        })
    }

    /// See the field.
    pub fn mode(&self) -> Option<bool> {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub fn set_mode(&self, writeback: bool) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = Some(writeback);
    }

    /// A place for a ring's lane.
    ///
    /// # Errors
    /// The drive has no queue pair for it.
    pub fn lease(&self, ring: usize, ring_size: u16) -> Result<Lease, drive::Error> {
        self.share.lease(self.workers.of_ring(ring), ring_size)
    }

    /// The counters of a ring; they go on over all sessions.
    pub fn counters(&self, ring: usize) -> Arc<LaneCounters> {
        self.counters[ring].clone()
    }

    /// The counters of all its rings together.
    pub fn totals(&self) -> Tally {
        let mut sum = Tally::default();
        self.counters.iter().for_each(|counters| sum += counters.read());
        sum
    }

    /// Tells of lines that were not written, see [`LogLimit::tell_left_out`].
    pub fn tell_left_out(&self, end: bool) {
        self.log.tell_left_out(&self.name, end);
    }

    /// Logs the counters of every ring that ever did anything.
    pub fn log_counters(&self) {
        let mut idle = true;
        for (ring, counters) in self.counters.iter().enumerate() {
            let tally = counters.read();
            if tally.fields().all(|(_, value)| value == 0) {
                continue;
            }
            idle = false;
            let fields = tally.fields().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
            log::info!("{} ring {ring}: {fields}", self.name);
        }
        if idle {
            log::info!("{}: no ring has been used yet", self.name);
        }
    }
}
