//! What a worker does with a lane besides polling it: starting, sleeping, changing, ending.

use std::sync::Arc;
use std::time::Instant;

use nvme_driver::{BouncePool, Namespace};

use super::Lane;
use super::mode::{DriveAccess, Mode};
use crate::blk::disk::Disk;
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::memory::GuestMemory;

impl Lane {
    /// Begins to run on a worker. Whoever had the ring before may have died between showing an answer and telling of it, with a log or
    /// without, so the driver's side is notified. One notification too many does no harm.
    pub(crate) fn begin(&mut self) {
        self.notify();
        self.awake();
    }

    /// Tells the time, every few milliseconds while the worker is awake.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.admission.tick(now);
    }

    /// Takes no more requests; those with the drive are still answered.
    pub(crate) fn begin_stop(&mut self) {
        if !self.resuming
            && let Some(head) = self.pending.take()
        {
            // Nothing was popped after it: the ring's next user finds it where it was.
            self.ring.unpop(head);
        }
        if let Mode::Running | Mode::Moving = self.mode {
            self.mode = Mode::Stopping(StopPolicy::AnswerAll);
        }
    }

    /// Takes no more requests until [`Lane::end_move`]; false: it will stop anyway.
    pub(crate) fn begin_move(&mut self) -> bool {
        if self.mode == Mode::Running {
            self.mode = Mode::Moving;
        }
        !matches!(self.mode, Mode::Stopping(_))
    }

    /// Is the lane on its way to another queue pair? One whose ring is broken counts as such.
    pub(crate) fn is_moving(&self) -> bool {
        matches!(self.mode, Mode::Moving | Mode::Broken)
    }

    /// May the lane move? The drive has nothing of it, and it has no buffer of its queue pair.
    pub(crate) fn may_move(&self) -> bool {
        self.in_flight() == 0
    }

    /// The lane has moved, or does not have to any more, and goes on.
    pub(crate) fn end_move(&mut self) {
        if self.mode == Mode::Moving {
            self.mode = Mode::Running;
        }
    }

    /// Is nothing left that the drive has to answer? Then a stopped lane can be handed back.
    pub(crate) fn drained(&self) -> bool {
        self.in_flight() == 0 && self.pending.is_none() && !self.resuming
    }

    /// Stops running on a worker: notifications are on again, as in a ring that nobody polls.
    pub(crate) fn end(&mut self) {
        if !self.mode.is_broken() {
            self.publish();
            // Whether there is work already is for the ring's next user to find out.
            let _ = self.ring.enable_notifications();
        }
        self.counters.write(&self.tally);
    }

    /// The drive is detached, and each request it had was named to [`Lane::unanswered`]: they wait until it is attached again.
    pub(crate) fn detach_drive(&mut self, pool: Option<&mut BouncePool>) {
        self.drive = DriveAccess::Held;
        if let Some(pool) = pool {
            self.hold_bounced(pool);
        }
        self.end_held();
    }

    /// What becomes of the requests of a lane that stops. A policy that is further down the list than this one stays in force.
    pub(crate) fn set_stop_policy(&mut self, policy: StopPolicy) {
        if policy == StopPolicy::AnswerAll {
            return;
        }
        if let Mode::Stopping(current) = &mut self.mode {
            *current = policy.max(*current);
        }
        self.multi_command.over = true;
        match self.drive {
            DriveAccess::Attached => self.end_waiting(),
            DriveAccess::Held => self.end_held(),
            DriveAccess::HoldExpired => {}
        }
        self.publish();
    }

    /// Ends what waits for a drive that is detached, as the stop policy says.
    fn end_held(&mut self) {
        match self.mode.stop_policy() {
            StopPolicy::AnswerAll => {}
            StopPolicy::FailWaiting => self.expire_hold(),
            StopPolicy::LeaveInLog => self.leave_in_log(),
        }
    }

    /// The drive is attached again, and sees the guest's memory at addresses of its own choice.
    pub(crate) fn reattach_drive(&mut self) {
        if self.is_out_of_reach() {
            return self.stay_away();
        }
        self.drive = DriveAccess::Attached;
        self.retries.write_protected = false;
        self.view.forget_device();
        self.find_pending();
    }

    /// Is there memory of the lane's guest that the drive cannot reach? Then its session ends.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        self.view.memory().unreachable().is_some()
    }

    /// Gives the drive nothing of the lane any more, whose addresses would mean something else there: what waits is answered with an
    /// error, and nothing more is taken.
    pub(crate) fn stay_away(&mut self) {
        self.drive = DriveAccess::Held;
        self.expire_hold();
        self.begin_stop();
        (self.resuming, self.pending) = (false, None);
    }

    /// Does the lane take what the driver makes available?
    fn runs(&self) -> bool {
        self.mode.is_running() && self.drive != DriveAccess::Held
    }

    /// Uses a memory table with more regions from now on; false if it lacks one of the present ones.
    #[must_use]
    pub(crate) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> bool {
        self.view.extend(memory)
    }

    /// Serves the disk as it is now. A request that waits for the queue pair was checked against the disk as it was: the queue pair
    /// checks it against this one again.
    pub(crate) fn set_disk(&mut self, disk: Arc<Disk>) {
        self.geometry = disk.geometry();
        self.disk = disk;
        self.retries.write_protected = false;
    }

    /// The disk's namespace has changed meanwhile (its size, say), if it is among these. Its front-end hears of it later.
    pub(crate) fn learn(&mut self, namespaces: &[Namespace]) {
        let same = |known: &&Namespace| known.id == self.disk.namespace.id && **known != self.disk.namespace;
        if let Some(known) = namespaces.iter().find(same) {
            self.set_disk(Arc::new(self.disk.on(known.clone())));
        }
    }

    /// Does the lane have to be polled even when nothing is in flight? Nobody would wake it.
    pub(crate) fn needs_polling(&self) -> bool {
        self.kick().is_none() && self.runs()
    }

    /// Asks the driver for notifications. True: there is work already, do not sleep.
    #[must_use]
    pub(crate) fn prepare_sleep(&mut self) -> bool {
        let work = self.drive != DriveAccess::Held && self.resuming || self.runs() && self.ring.enable_notifications();
        if !work && self.runs() {
            self.note_empty();
        }
        work
    }

    /// Tells the driver that its ring is polled (again).
    pub(crate) fn awake(&mut self) {
        if self.mode.is_running() {
            self.ring.disable_notifications();
        }
    }
}
