//! One disk on one socket: front-ends come and go, and the rings of one at a time run.
//!
//! An [`Export`] owns what outlives a front-end: what the disk offers, the order of its front-ends, its share of the drive, and its
//! counters. It knows nothing of messages.

mod settings;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use thiserror::Error;

use crate::blk::config::{self, BlockConfig};
use crate::blk::disk::{Disk, FlushPromise};
use crate::datapath::counters::{LaneCounters, Tally};
use crate::datapath::worker::RingWorkers;
use crate::drive::{self, DeviceAddress, Drive, ExportedNamespace, Known, Lease, Presence, Share};
use crate::event::EventFd;
use crate::log_limit::LogLimit;
use crate::vhost_user::front_end_queue::FrontEndQueue;
use crate::vhost_user::write_cache::{KnownMode, WriteCacheMode};
use crate::virtio::memory::{Account, Budget, DmaScope};
pub use settings::{ExportMistake, ExportSettings};

/// The cache of a drive cannot be flushed.
#[derive(Debug, Error)]
pub enum FlushError {
    /// What was written before is lost: no flush can make it durable.
    #[error("the drive has lost writes that were not flushed")]
    Lost,
    /// The drive does not flush.
    #[error(transparent)]
    Drive(Box<drive::Error>),
}

impl From<drive::Error> for FlushError {
    fn from(error: drive::Error) -> FlushError {
        FlushError::Drive(Box::new(error))
    }
}

/// What the sessions of one export have in common.
pub struct Export {
    /// The export's socket, by which the log names it.
    pub name: String,
    drive: Arc<Drive>,
    /// The disk's part of the controller's queue pairs.
    share: Share,
    /// What its front-ends have mapped, all together.
    pub account: Arc<Account>,
    namespace: Arc<ExportedNamespace>,
    /// The export, or the namespace when it was exported, refuses writes.
    read_only: bool,
    /// The answer to GET_ID.
    serial: [u8; 20],
    /// Virtqueues offered.
    pub queues: u16,
    /// Largest virtqueue accepted, in entries.
    pub queue_size: u16,
    /// Feature bits offered.
    pub features: u64,
    /// The mode of the write cache as its front-ends know it.
    pub(super) write_cache: Arc<KnownMode>,
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
    /// The drive is detached, or has no such namespace.
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
            write_cache: Arc::default(),
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

    /// Whether the drive is there, told without waiting for anything.
    pub fn presence(&self) -> Presence {
        self.drive.presence()
    }

    /// An event that rings when something else is known of the namespace, as long as the caller has it.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn on_change(&self) -> io::Result<Arc<EventFd>> {
        self.namespace.listen()
    }

    /// What is known of the namespace now.
    pub fn known(&self) -> Known {
        self.namespace.known()
    }

    /// The features that are offered now, as bits. More are accepted: a front-end that has lost its connection comes with those that
    /// its guest knows.
    pub fn offered(&self) -> u64 {
        self.features & !self.namespace.refused.features()
    }

    /// Whether a driver may change the mode of the write cache.
    pub fn can_choose_mode(&self) -> bool {
        self.features & config::F_CONFIG_WCE != 0
    }

    /// The configuration space for a driver that has accepted `features`.
    pub fn config(&self, known: &Known, features: u64, mode: WriteCacheMode) -> BlockConfig {
        config::config(&known.namespace, self.offered() | features, self.queues, mode.is_writeback())
    }

    /// What lanes have to know of the disk, for a driver that has accepted `features`. `writeback`: the mode of the write cache.
    pub fn disk(&self, known: &Known, features: u64, writeback: Arc<AtomicBool>) -> Disk {
        Disk {
            namespace: known.usable(),
            offer: known.offer,
            read_only: self.read_only || known.namespace.read_only,
            serial: self.serial,
            features,
            writeback,
            flushes: self.namespace.flushes.clone(),
            refused: self.namespace.refused.clone(),
        }
    }

    /// What flushes of the disk have promised, to whatever front-end.
    pub fn flushes(&self) -> &FlushPromise {
        &self.namespace.flushes
    }

    /// Makes durable what was answered so far.
    ///
    /// # Errors
    /// It is lost: then the guest's next flush has to say so, whatever is said here. Or the drive does not flush.
    pub fn flush(&self) -> Result<(), FlushError> {
        let number = self.flushes().begin_own().ok_or(FlushError::Lost)?;
        self.drive.flush(self.namespace.id)?;
        if self.flushes().succeed(number) { Ok(()) } else { Err(FlushError::Lost) }
    }

    /// Who can reach the guests' memory: the drive, if it is there.
    pub fn dma_scope(&self) -> &DmaScope {
        self.drive.memory()
    }

    /// The hold timeout: how long requests wait for the drive while it is detached.
    pub fn hold(&self) -> Duration {
        self.drive.hold()
    }

    /// A place for a ring's lane.
    ///
    /// # Errors
    /// The drive has no queue pair for it.
    pub fn lease(&self, ring: usize, ring_size: u16) -> Result<Lease, drive::Error> {
        self.share.lease(self.workers.of_ring(ring), ring_size)
    }

    /// The controller.
    pub fn device(&self) -> &DeviceAddress {
        self.drive.address()
    }

    /// Whether writes are refused, by the export or by the namespace as it is now.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.known().namespace.read_only
    }

    /// The workers of its rings.
    pub fn workers(&self) -> &RingWorkers {
        &self.workers
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

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespace = self.known().namespace;
        let (id, drive, blocks, bytes) = (namespace.id, &self.drive, namespace.blocks, namespace.block_bytes());
        write!(f, "namespace {id} of {drive}, {blocks} blocks of {bytes} bytes")?;
        if self.read_only { f.write_str(", read-only") } else { Ok(()) }
    }
}
