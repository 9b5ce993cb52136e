//! How control threads talk to a worker: rarely, and at no cost for the worker while they do not.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme_driver::{Namespace, QueuePair};

use super::{LaneId, QueueSlotId};
use crate::blk::disk::Disk;
use crate::datapath::lane::Lane;
use crate::datapath::poll_group::{DetachedQueue, PollGroup, QueueResources};
use crate::datapath::stop_policy::StopPolicy;
use crate::datapath::trial::{Seat, Suspicion};
use crate::event::EventFd;
use crate::virtio::memory::GuestMemory;

/// A queue slot that lanes use cannot be removed.
pub(super) struct InUse;

/// A lane on its way to another queue slot.
pub(super) struct MovingLane {
    pub id: LaneId,
    pub lane: Lane,
    /// Who waits for the lane to stop.
    pub waiting: Vec<Sender<Lane>>,
}

/// What a control thread has a worker do.
pub(super) enum Mail {
    /// Keep a poll group in a new queue slot.
    AddGroup { id: QueueSlotId, group: PollGroup },
    /// Remove a queue slot without lanes.
    TakeQueuePair {
        slot: usize,
        /// The queue pair, if there is one.
        reply: Sender<Result<Option<QueuePair>, InUse>>,
    },
    /// Poll a lane from now on.
    StartLane { id: LaneId, slot: usize, lane: Box<Lane> },
    /// Take no more of a lane's requests, and give it back when those in flight have ended.
    StopLane { id: LaneId, reply: Sender<Lane> },
    /// Move a lane to another queue slot when its requests have been answered.
    MoveLane { id: LaneId, to_slot: usize },
    /// Move all lanes of a slot without a queue pair to another one.
    FoldLanes {
        slot: usize,
        into_slot: usize,
        /// The mailbox of the worker that has the other slot, if it is another worker.
        elsewhere: Option<Arc<Mailbox>>,
        /// The lanes that have gone.
        reply: Sender<Vec<LaneId>>,
    },
    /// Put lanes into a queue slot that come from another worker.
    ArriveLanes { slot: usize, lanes: Vec<MovingLane> },
    /// Give a lane a memory table with more regions; the reply is false if it lacks a present one.
    SetMemory { id: LaneId, memory: Arc<GuestMemory>, reply: Sender<bool> },
    /// Give a lane the disk as it is now.
    SetDisk { id: LaneId, disk: Arc<Disk>, reply: Sender<()> },
    /// Replace the eventfd that notifies the driver.
    SetCall { id: LaneId, call: Option<File> },
    /// Replace the eventfd that wakes a lane.
    SetKick { id: LaneId, kick: Option<File> },
    /// Replace the eventfd that says that a lane has stopped for good.
    SetError { id: LaneId, error: Option<File> },
    /// Say how long the oldest command has been with the drive.
    OldestCommand { slot: usize, reply: Sender<Option<Duration>> },
    /// Give nothing more to a queue pair; the reply is how many commands it has.
    PauseGroup { slot: usize, seat: Seat, reply: Sender<usize> },
    /// Take the queue pair of a stopped controller out of its slot.
    DetachDrive { slot: usize, reply: Sender<Option<DetachedQueue>> },
    /// Say what a failure means for the requests that the controller had; the reply is true if some are to be tried alone.
    JudgeFailure { slot: usize, suspicion: Suspicion, reply: Sender<bool> },
    /// Answer with an error what waits for the drive.
    ExpireHold { slot: usize },
    /// Say what becomes of the waiting requests of a lane that stops.
    SetStopPolicy { id: LaneId, policy: StopPolicy },
    /// End the multi-command requests of a lane that stops.
    EndMultiCommand { id: LaneId },
    /// Tell a slot's lanes how their namespaces are now.
    UpdateNamespaces { slot: usize, namespaces: Arc<[Namespace]> },
    /// Put a queue pair into a slot that has none.
    ReattachDrive { slot: usize, resources: QueueResources, seat: Option<Seat> },
    /// Stop all lanes, and end when that is done or the deadline has passed.
    Shutdown { deadline: Instant },
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
    event: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Mailbox> {
        Ok(Mailbox { flag: AtomicBool::new(false), letters: Mutex::default(), event: EventFd::new()? })
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
        self.event.notify();
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

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}
