//! Leases of queue slots: how rings get queue pairs of a drive, change them and give them back. `shares` decides which ring has
//! which.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme_driver::{BouncePool, Controller, Error as DriverError, QueuePairOptions};
use vfio::Device;

use super::error::Error;
use super::shares::{DiskNumber, LeaseNumber, Shares};
use super::{Condition, DetachCause, Drive, State};
use crate::datapath::lane::Lane;
use crate::datapath::poll_group::QueueResources;
use crate::datapath::stop_policy::StopPolicy;
use crate::datapath::worker::{self, LaneHandle, QueueSlotId, StopError, StoppedLane, StoppingLane};
use crate::fault_point::fault_point;
use crate::log_limit::Kind;

/// Entries of a queue pair, whatever the ring's size: enough to keep a drive busy, and no more memory than that is worth
/// (a page for every entry).
const MIN_ENTRIES: u16 = 64;
const MAX_ENTRIES: u16 = 1024;

/// Bounce buffers of a queue pair, for buffers the drive cannot reach where they are.
const BOUNCE_BYTES: usize = 128 << 10;

/// How long a worker may take to end what does not depend on the drive.
const FAIL_WAITING_TURN: Duration = Duration::from_secs(1);

/// How long a lane that stops goes on with requests of many commands. A guest that is paused does not see an error for a few of
/// them; one that asks for terabytes of zeroes does.
const LONG_PATIENCE: Duration = Duration::from_secs(3);

/// How much longer than a command a lane may take to stop.
pub(super) const STOP_MARGIN: Duration = Duration::from_secs(10);

/// A disk's share of a drive's queue pairs; given up when dropped.
pub struct Share {
    drive: Arc<Drive>,
    disk: DiskNumber,
}

impl Share {
    /// Leases a queue slot for a lane: one of its own on `worker` or, when the controller grants no more queue pairs, one that it
    /// shares until another is free. `ring_size` is in entries. Works also while the drive is detached.
    ///
    /// # Errors
    /// The program ends, or there is no queue pair at all.
    pub fn lease(&self, worker: usize, ring_size: u16) -> Result<Lease, Error> {
        let Share { drive, disk } = self;
        // A request may need several commands; twice the ring keeps the guest the limit, not the queue.
        let entries = ring_size.saturating_mul(2).clamp(MIN_ENTRIES, MAX_ENTRIES);
        let number = loop {
            let granted = {
                let state = drive.state();
                match &state.condition {
                    Condition::Attached(_) => match drive.shares().reclaim(*disk, worker, entries) {
                        Some(number) => break number,
                        None => state.granted,
                    },
                    Condition::Detached(detached) if drive.shares().slots().len() < usize::from(state.granted) => {
                        let id = drive.pool.add_empty_slot(worker, detached.hold_expired);
                        drive.slot_ids().insert(id);
                        break drive.shares().add(*disk, entries, id);
                    }
                    Condition::Detached(_) => break self.join(worker, entries, state.granted)?,
                    Condition::Closed => return Err(Error::Closed { drive: drive.to_string() }),
                }
            };
            match drive.new_queue(entries) {
                Ok(Some(resources)) => {
                    if let Some(number) =
                        drive.add_queue(worker, resources, |shares, id| shares.add(*disk, entries, id))
                    {
                        break number;
                    }
                }
                // It has just gone, and the ring is served as all others are.
                Ok(None) => {}
                Err(Error::NoQueuePairsLeft { .. }) => break self.join(worker, entries, granted)?,
                Err(error) => {
                    fault_point!(QueueFailed);
                    match drive.controller_works() {
                        // It was detached meanwhile, which may be why it has failed.
                        None => continue,
                        Some(Err(why)) => {
                            drive.detach(DetachCause::from(&why));
                            continue;
                        }
                        Some(Ok(())) => {}
                    }
                    if let Some(left_out) = drive.log.admit(Kind::Ring) {
                        log::warn!("{error}; a ring shares another's queue pair{left_out}");
                    }
                    break self.join(worker, entries, granted)?;
                }
            }
        };
        Ok(Lease { drive: drive.clone(), number })
    }

    /// Leases a queue slot that other rings have, too.
    fn join(&self, worker: usize, entries: u16, granted: u16) -> Result<LeaseNumber, Error> {
        let Share { drive, disk } = self;
        let joined = drive.shares().join(*disk, worker, entries, granted);
        let (number, line) = joined.ok_or_else(|| Error::NoQueuePair { drive: drive.to_string() })?;
        line.into_iter().for_each(|line| log::warn!("{line}"));
        // There may be one of its own soon.
        drive.monitor_event.notify();
        Ok(number)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.drive.shares().remove_disk(self.disk);
    }
}

impl Drive {
    /// A disk will have leases. `wanted`: how many queue pairs it may count on; `None`: an even part of what the controller grants.
    /// `name` is for the log.
    pub fn share(self: &Arc<Self>, name: String, wanted: Option<u16>) -> Share {
        let disk = self.shares().add_disk(name, wanted);
        Share { drive: self.clone(), disk }
    }

    /// Not to be held while anybody is waited for; taken after `state`.
    pub(super) fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue pair on the controller, and what belongs to it.
    pub(super) fn make_queue(
        &self,
        device: &Device,
        controller: &Controller,
        entries: u16,
    ) -> Result<QueueResources, Error> {
        let options = QueuePairOptions { entries: Some(entries), ..QueuePairOptions::default() };
        let pair = controller.create_queue_pair(options).map_err(|error| match error {
            DriverError::NoQueuePairsLeft { .. } => {
                Error::NoQueuePairsLeft { drive: self.name.clone(), granted: controller.max_queue_pairs() }
            }
            source => Error::CreateQueuePair { drive: self.name.clone(), source: source.into() },
        })?;
        let pool = BouncePool::new(device.dma(), BOUNCE_BYTES)
            .map_err(|source| Error::BounceBuffers { drive: self.name.clone(), source: source.into() })?;
        Ok(QueueResources { pair, pool })
    }

    /// Creates a queue pair on the attached controller; `None`: the drive is detached. The controller is asked without a lock: a drive
    /// that does not answer can be taken away meanwhile.
    fn new_queue(&self, entries: u16) -> Result<Option<NewQueue>, Error> {
        let (device, controller, since) = match &self.state().condition {
            Condition::Attached(attached) => (attached.device.clone(), attached.controller.clone(), attached.since),
            _ => return Ok(None),
        };
        Ok(Some(NewQueue { resources: self.make_queue(&device, &controller, entries)?, since }))
    }

    /// Whether the controller takes commands. `None`: the drive is not attached.
    ///
    /// # Errors
    /// It takes none, for this reason.
    fn controller_works(&self) -> Option<Result<(), DriverError>> {
        match &self.state().condition {
            Condition::Attached(attached) => Some(attached.controller.in_operation()),
            _ => None,
        }
    }

    /// Puts a queue pair on a worker, in a new slot, and calls `note` with the slot's id. `None`: the queue pair's controller has been
    /// detached meanwhile.
    fn add_queue<T>(
        &self,
        worker: usize,
        new: NewQueue,
        note: impl FnOnce(&mut Shares, QueueSlotId) -> T,
    ) -> Option<T> {
        let state = self.state();
        let there = matches!(&state.condition, Condition::Attached(attached) if attached.since == new.since);
        if !there {
            return None;
        }
        let id = match &state.trial {
            Some(trial) if !trial.is_over() => self.pool.add_on_trial(worker, new.resources, trial.onlooker()),
            _ => self.pool.add_queue_pair(worker, new.resources),
        };
        self.slot_ids().insert(id);
        Some(note(&mut self.shares(), id))
    }

    /// Deletes the queue pairs of slots that no ring has any more and whose lanes have left.
    pub(super) fn take_away_leaving(&self) {
        let leaving = self.shares().leaving();
        for id in leaving {
            let (pair, controller) = {
                let state = self.state();
                if !self.shares().is_leaving(id) {
                    continue;
                }
                let taken = match self.pool.take_queue_pair(id) {
                    Ok(taken) => taken,
                    Err(worker::WorkerError::InUse) => continue,
                    Err(error) => {
                        log::error!("{}: cannot take an unused queue pair from its worker: {error}", self.name);
                        None
                    }
                };
                self.slot_ids().remove(&id);
                self.shares().forget(id);
                match (taken, &state.condition) {
                    (Some(pair), Condition::Attached(attached)) => (pair, attached.controller.clone()),
                    _ => continue,
                }
            };
            if let Err(error) = controller.delete_queue_pair(pair) {
                // A controller that does not work is reset; that ends its queues, too.
                let level = match controller.in_operation() {
                    Ok(()) => log::Level::Warn,
                    Err(_) => log::Level::Debug,
                };
                if let Some(left_out) = self.log.admit(Kind::Ring) {
                    log::log!(level, "{}: cannot delete a queue pair: {error}{left_out}", self.name);
                }
            }
        }
    }

    /// One lane fewer on a queue pair; the last one gives it back to the controller, for which nobody waits here.
    fn release(&self, lease: LeaseNumber) {
        self.shares().remove(lease);
        // Others may want it.
        self.monitor_event.notify();
    }

    /// Sees to it that every disk has its share, and every ring a queue pair of its own as long as there are any. True: some lanes
    /// are on their way; look again soon.
    pub(super) fn deal(&self) -> bool {
        self.take_away_leaving();
        loop {
            let granted = match &*self.state() {
                State { condition: Condition::Attached(_), granted, .. } => *granted,
                _ => return false,
            };
            let Some(grant) = self.shares().next_grant(granted) else { break };
            let resources = match self.new_queue(grant.entries) {
                Ok(Some(resources)) => resources,
                Ok(None) => return false,
                Err(Error::NoQueuePairsLeft { .. }) => break,
                Err(error) => {
                    log::debug!("{error}");
                    break;
                }
            };
            let given = self.add_queue(grant.worker, resources, |shares, id| {
                let (lane, line) = shares.give(grant, id);
                line.into_iter().for_each(|line| log::info!("{line}"));
                lane.into_iter().for_each(|lane| self.pool.move_lane(lane, id));
            });
            if given.is_none() {
                return false;
            }
        }
        let state = self.state();
        if !matches!(state.condition, Condition::Attached(_)) {
            return false;
        }
        let mut shares = self.shares();
        while let Some(merge) = shares.next_return() {
            merge.lanes.iter().for_each(|lane| self.pool.move_lane(*lane, merge.into));
        }
        while let Some((merge, line)) = shares.next_merge(state.granted) {
            line.into_iter().for_each(|line| log::info!("{line}"));
            merge.lanes.iter().for_each(|lane| self.pool.move_lane(*lane, merge.into));
        }
        !shares.leaving().is_empty()
    }
}

/// A queue pair that is in no slot yet.
struct NewQueue {
    resources: QueueResources,
    /// Names the controller: since when it is there.
    since: Instant,
}

/// A lane's lease of a queue slot; it ends when this is dropped. The slot may change while the lane runs.
pub struct Lease {
    drive: Arc<Drive>,
    number: LeaseNumber,
}

impl Lease {
    /// Puts a lane there.
    pub fn start(&self, lane: Lane) -> LaneHandle {
        let mut shares = self.drive.shares();
        let slot = shares.slot_of(self.number).expect("a lease has a slot until it ends");
        let handle = self.drive.pool.start_lane(slot, lane);
        shares.set_lane(self.number, Some(handle.id()));
        handle
    }

    /// Asks for a lane back, see [`Lease::finish_stop`]. `policy`: what becomes of its requests that wait
    /// for the drive; [`StopPolicy::LeaveInLog`] when the front-end is gone, and nobody needs answers.
    pub fn begin_stop(&self, handle: LaneHandle, policy: StopPolicy) -> StoppingLane {
        // From here on it is not moved any more.
        self.drive.shares().set_lane(self.number, None);
        let lane = handle.begin_stop();
        lane.set_policy(policy);
        lane
    }

    /// How long [`Lease::finish_stop`] may take in the usual case.
    pub fn stop_deadline(&self) -> Instant {
        // Every request under way has to end first, and the drive may have to be waited for.
        Instant::now() + self.drive.options.io_timeout.max(self.drive.hold) + STOP_MARGIN
    }

    /// Takes a lane when all its requests have ended; `None` if its worker died with it. Requests of many commands end in the middle
    /// after a few seconds. A controller that does not let requests end until `deadline` is reset, and they end with an error.
    pub fn finish_stop(&self, lane: StoppingLane, deadline: Instant) -> Option<StoppedLane> {
        let until = |time: Instant| time.saturating_duration_since(Instant::now());
        let patience = lane.since() + LONG_PATIENCE;
        let lane = match lane.wait(until(patience.min(deadline))) {
            Err(StopError::StillBusy(busy)) => busy.lane,
            stopped => return Self::stopped(stopped),
        };
        lane.end_multi_command();
        match lane.wait(until(deadline)) {
            Ok(stopped) => Some(stopped),
            Err(StopError::StillBusy(busy)) => {
                busy.lane.set_policy(StopPolicy::FailWaiting);
                // Requests that only wait to be tried again need no reset to end.
                match busy.lane.wait(FAIL_WAITING_TURN) {
                    Err(StopError::StillBusy(busy)) => {
                        self.drive.detach(DetachCause::Failed(busy.to_string()));
                        // Nothing is left to wait for but the worker's turn.
                        Self::stopped(busy.lane.wait(STOP_MARGIN))
                    }
                    stopped => Self::stopped(stopped),
                }
            }
            Err(error) => Self::stopped(Err(error)),
        }
    }

    fn stopped(result: Result<StoppedLane, StopError>) -> Option<StoppedLane> {
        result.inspect_err(|error| log::error!("{error}")).ok()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.drive.release(self.number);
    }
}
