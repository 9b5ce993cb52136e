//! How control threads talk to a worker: rarely, and without cost for it while they do not.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme_driver::{Namespace, QueuePair};
use rustix::event::{EventfdFlags, eventfd};

use super::QueueSlotId;
use crate::blk::disk::Disk;
use crate::datapath::lane::Lane;
use crate::datapath::poll_group::{Lost, PollGroup, QueueResources};
use crate::datapath::stop_policy::StopPolicy;
use crate::datapath::trial::{Seat, Suspicion};
use crate::virtio::memory::GuestMemory;

/// Names a lane on its worker; never used twice.
pub(super) type LaneId = u64;

/// A queue slot that lanes use cannot be removed.
pub(super) struct InUse;

/// A lane on its way to another queue slot.
pub(super) struct MovingLane {
    pub id: LaneId,
    pub lane: Lane,
    /// Who waits for it to stop.
    pub waiting: Vec<Sender<Lane>>,
}

pub(super) enum Mail {
    AddGroup {
        id: QueueSlotId,
        group: PollGroup,
    },
    TakeQueuePair {
        slot: usize,
        /// The queue pair, if there is one.
        reply: Sender<Result<Option<QueuePair>, InUse>>,
    },
    StartLane {
        id: LaneId,
        slot: usize,
        lane: Box<Lane>,
    },
    StopLane {
        id: LaneId,
        reply: Sender<Lane>,
    },
    MoveLane {
        id: LaneId,
        to_slot: usize,
    },
    /// All lanes of a slot without a queue pair go on in another one.
    FoldLanes {
        slot: usize,
        into_slot: usize,
        /// The mailbox of the worker that has the other one, if it is not the same.
        elsewhere: Option<Arc<Mailbox>>,
        /// The lanes that have gone.
        reply: Sender<Vec<LaneId>>,
    },
    /// Lanes come from another worker.
    ArriveLanes {
        slot: usize,
        lanes: Vec<MovingLane>,
    },
    SetMemory {
        id: LaneId,
        memory: Arc<GuestMemory>,
        reply: Sender<bool>,
    },
    SetDisk {
        id: LaneId,
        disk: Arc<Disk>,
        reply: Sender<()>,
    },
    SetCall {
        id: LaneId,
        call: Option<File>,
    },
    SetKick {
        id: LaneId,
        kick: Option<File>,
    },
    SetError {
        id: LaneId,
        error: Option<File>,
    },
    OldestCommand {
        slot: usize,
        reply: Sender<Option<Duration>>,
    },
    PauseGroup {
        slot: usize,
        seat: Seat,
        reply: Sender<usize>,
    },
    LoseDrive {
        slot: usize,
        reply: Sender<Option<Lost>>,
    },
    JudgeFailure {
        slot: usize,
        suspicion: Suspicion,
        reply: Sender<bool>,
    },
    GiveUpDrive {
        slot: usize,
    },
    SetStopPolicy {
        id: LaneId,
        policy: StopPolicy,
    },
    EndMultiCommand {
        id: LaneId,
    },
    UpdateNamespaces {
        slot: usize,
        namespaces: Arc<[Namespace]>,
    },
    RegainDrive {
        slot: usize,
        resources: QueueResources,
        seat: Option<Seat>,
    },
    Shutdown {
        deadline: Instant,
    },
}

#[derive(Default)]
struct Letters {
    mail: Vec<Mail>,
    /// The worker is gone: what comes now is dropped, which whoever waits for a reply learns at once.
    closed: bool,
}

pub(super) struct Mailbox {
    /// There may be mail. The letters themselves are ordered by the lock.
    flag: AtomicBool,
    letters: Mutex<Letters>,
    /// Ends the worker's sleep.
    event: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Mailbox> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { flag: AtomicBool::new(false), letters: Mutex::default(), event })
    }

    fn letters(&self) -> MutexGuard<'_, Letters> {
        // A panic while the lock is held is impossible but for one in Vec::push; the letters are whole in any case.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the mail if the worker is gone.
    pub(super) fn send(&self, mail: Mail) {
        let mut letters = self.letters();
        if letters.closed {
            return;
        }
        letters.mail.push(mail);
        drop(letters);
        // Relaxed: the worker takes the lock before it looks.
        self.flag.store(true, Ordering::Relaxed);
        // Only a full counter can refuse, and then the worker is being woken already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    #[inline]
    pub(super) fn has_mail(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Everything that was sent so far.
    pub(super) fn take(&self) -> Vec<Mail> {
        // Cleared before the letters are taken: a letter that comes between sets it again.
        self.flag.store(false, Ordering::Relaxed);
        std::mem::take(&mut self.letters().mail)
    }

    pub(super) fn close(&self) {
        let mut letters = self.letters();
        letters.closed = true;
        // Queue pairs and lanes among them never ran: nothing of theirs is in flight.
        letters.mail.clear();
    }

    pub(super) fn event(&self) -> &OwnedFd {
        &self.event
    }

    pub(super) fn clear_event(&self) {
        // Non-blocking: an error says that it is clear.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
    }
}
