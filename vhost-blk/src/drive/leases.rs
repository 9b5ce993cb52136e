//! The places of lanes on a drive's queue pairs: how they are had, moved and given back. Who has which: see `shares`.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme_driver::{BouncePool, Error, QueuePairOptions};

use super::shares::{DiskNumber, LeaseNumber, Shares};
use super::{Cause, Condition, Drive, Present, State};
use crate::lane::Lane;
use crate::log_limit::Kind;
use crate::worker::{self, LaneHandle, PairId, StopError, StoppedLane, StoppingLane, Way};

/// Entries of a queue pair, whatever the ring's size: enough to keep a drive busy, and no more memory than that is worth
/// (a page for every entry).
const MIN_ENTRIES: u16 = 64;
const MAX_ENTRIES: u16 = 1024;

/// Bounce buffers of a queue pair, for buffers the drive cannot reach where they are.
const BOUNCE_BYTES: usize = 128 << 10;

/// How long a worker may take to end what does not depend on the drive.
const ABANDON_TURN: Duration = Duration::from_secs(1);

/// How long a lane that stops goes on with requests of many commands. A guest that is paused does not see an error for a few of
/// them; one that asks for terabytes of zeroes does.
const LONG_PATIENCE: Duration = Duration::from_secs(3);

/// How much longer than a command a lane may take to stop.
pub(super) const STOP_MARGIN: Duration = Duration::from_secs(10);

/// Why there is no queue pair.
pub(super) enum NoWay {
    /// All are in use.
    NoneLeft,
    /// Something else, in one line.
    Error(String),
}

/// A disk's share of a drive's queue pairs; given up when dropped.
pub struct Share {
    drive: Arc<Drive>,
    disk: DiskNumber,
}

impl Share {
    /// A place for one lane: on a queue pair of its own on `worker`, or, when the controller grants no more, on one that it shares
    /// until there is one. `ring_size` is in entries. There is a place also while the drive is away.
    pub fn lease(&self, worker: usize, ring_size: u16) -> Result<Lease, String> {
        let Share { drive, disk } = self;
        // A request may need several commands; twice the ring keeps the guest the limit, not the queue.
        let entries = ring_size.saturating_mul(2).clamp(MIN_ENTRIES, MAX_ENTRIES);
        let mut state = drive.state();
        let made = match &state.condition {
            Condition::Present(present) => match drive.make_way(present, entries) {
                Ok(way) => Some(drive.add_way(&state, worker, way)),
                Err(NoWay::NoneLeft) => None,
                Err(NoWay::Error(error)) => {
                    let health = present.controller.in_operation();
                    drop(state);
                    // It has just failed, and the ring is served as all others are.
                    if let Err(why) = health {
                        drive.leave(Cause::from(&why));
                        return self.lease(worker, ring_size);
                    }
                    if let Some(left_out) = drive.log.admit(Kind::Ring) {
                        log::warn!("{error}; a ring shares another's queue pair{left_out}");
                    }
                    state = drive.state();
                    None
                }
            },
            Condition::Away(away) if drive.shares().places().len() < usize::from(state.granted) => {
                let id = drive.pool.add_place(worker, away.given_up);
                drive.pairs().insert(id);
                Some(id)
            }
            Condition::Away(_) => None,
            Condition::Over => return Err(format!("{drive} is not used any more")),
        };
        let mut shares = drive.shares();
        let number = match made {
            Some(id) => shares.add(*disk, entries, id),
            None => {
                let joined = shares.join(*disk, worker, entries, state.granted);
                let (number, line) = joined.ok_or_else(|| format!("{drive} has no queue pair for a ring"))?;
                line.into_iter().for_each(|line| log::warn!("{line}"));
                // There may be one of its own soon.
                drive.bell.ring();
                number
            }
        };
        Ok(Lease { drive: drive.clone(), number })
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
    pub(super) fn make_way(&self, present: &Present, entries: u16) -> Result<Way, NoWay> {
        let options = QueuePairOptions { entries: Some(entries), ..QueuePairOptions::default() };
        let pair = present.controller.create_queue_pair(options).map_err(|error| match error {
            Error::NoQueuePairsLeft { .. } => NoWay::NoneLeft,
            error => NoWay::Error(format!("{}: cannot create a queue pair: {error}", self.name)),
        })?;
        let pool = BouncePool::new(present.device.dma(), BOUNCE_BYTES)
            .map_err(|error| NoWay::Error(format!("{}: cannot allocate bounce buffers: {error}", self.name)))?;
        Ok(Way { pair, pool })
    }

    /// Puts a queue pair on a worker, in a new place.
    fn add_way(&self, state: &State, worker: usize, way: Way) -> PairId {
        let id = match &state.trial {
            Some(trial) if !trial.is_over() => self.pool.add_on_trial(worker, way, trial.onlooker()),
            _ => self.pool.add_queue_pair(worker, way),
        };
        self.pairs().insert(id);
        id
    }

    /// Gives the queue pair in a place back to the controller; false if there are still lanes.
    fn take_away(&self, state: &State, id: PairId) -> bool {
        match (self.pool.take_queue_pair(id), &state.condition) {
            (Ok(Some(pair)), Condition::Present(present)) => {
                if let Err(error) = present.controller.delete_queue_pair(pair) {
                    // A controller that does not work is reset; that ends its queues, too.
                    let level = match present.controller.in_operation() {
                        Ok(()) => log::Level::Warn,
                        Err(_) => log::Level::Debug,
                    };
                    if let Some(left_out) = self.log.admit(Kind::Ring) {
                        log::log!(level, "{}: cannot delete a queue pair: {error}{left_out}", self.name);
                    }
                }
            }
            (Ok(_), _) => {}
            (Err(worker::Error::InUse), _) => return false,
            (Err(error), _) => log::error!("{}: {error}", self.name),
        }
        self.pairs().remove(&id);
        true
    }

    /// One lane fewer on a queue pair; the last one gives it back to the controller.
    fn release(&self, lease: LeaseNumber) {
        let state = self.state();
        let free = self.shares().remove(lease);
        // A lane may still be on its way to another place: then it goes later.
        if let Some(id) = free
            && self.take_away(&state, id)
        {
            self.shares().forget(id);
        }
        // Others may want it.
        self.bell.ring();
    }

    /// Sees to it that every disk has its share, and every ring a queue pair of its own as long as there are any. True: some lanes
    /// are on their way; look again soon.
    pub(super) fn deal(&self) -> bool {
        let state = self.state();
        let Condition::Present(present) = &state.condition else { return false };
        let leaving = self.shares().leaving();
        for id in leaving {
            if self.take_away(&state, id) {
                self.shares().forget(id);
            }
        }
        loop {
            let Some(gift) = self.shares().next_gift(state.granted) else { break };
            let way = match self.make_way(present, gift.entries) {
                Ok(way) => way,
                Err(NoWay::NoneLeft) => break,
                Err(NoWay::Error(error)) => {
                    log::debug!("{error}");
                    break;
                }
            };
            let id = self.add_way(&state, gift.worker, way);
            let mut shares = self.shares();
            let (lane, line) = shares.give(gift, id);
            line.into_iter().for_each(|line| log::info!("{line}"));
            lane.into_iter().for_each(|lane| self.pool.move_lane(lane, id));
        }
        let mut shares = self.shares();
        while let Some(merger) = shares.next_return() {
            merger.lanes.iter().for_each(|lane| self.pool.move_lane(*lane, merger.into));
        }
        while let Some((merger, line)) = shares.next_merger(state.granted) {
            line.into_iter().for_each(|line| log::info!("{line}"));
            merger.lanes.iter().for_each(|lane| self.pool.move_lane(*lane, merger.into));
        }
        !shares.leaving().is_empty()
    }
}

/// A lane's right to a place on a queue pair; given back when dropped. Which one may change while the lane runs.
pub struct Lease {
    drive: Arc<Drive>,
    number: LeaseNumber,
}

impl Lease {
    /// Puts a lane there.
    pub fn start(&self, lane: Lane) -> LaneHandle {
        let mut shares = self.drive.shares();
        let place = shares.place_of(self.number).expect("a lease has a place until it is dropped");
        let handle = self.drive.pool.start_lane(place, lane);
        shares.set_lane(self.number, Some(handle.number()));
        handle
    }

    /// Asks for a lane back, see [`Lease::finish_stop`]. `forsaken`: the front-end is gone, and nobody needs answers that the
    /// drive has not given; should it be away, it is not waited for.
    pub fn begin_stop(&self, handle: LaneHandle, forsaken: bool) -> StoppingLane {
        // From here on it is not moved any more.
        self.drive.shares().set_lane(self.number, None);
        let mut lane = handle.begin_stop();
        if forsaken {
            lane.abandon(false);
        }
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
        lane.end_long();
        match lane.wait(until(deadline)) {
            Ok(stopped) => Some(stopped),
            Err(StopError::StillBusy(mut busy)) => {
                busy.lane.abandon(true);
                // Requests that only wait to be tried again need no reset to end.
                match busy.lane.wait(ABANDON_TURN) {
                    Err(StopError::StillBusy(busy)) => {
                        self.drive.leave(Cause::Failed(busy.to_string()));
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
