//! How control threads reach a lane that runs on a worker, and that may change workers meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::mailbox::{Mail, Mailbox};
use super::{LaneId, MAIL_DEADLINE, StillBusy, StopError, WorkerError};
use crate::blk::disk::Disk;
use crate::datapath::lane::{Lane, LaneState};
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::memory::GuestMemory;

/// Which worker has which lane: its number and mailbox. Only control threads look here, and no mail for a lane is sent without this
/// lock: so each finds the lane where it was sent, and in its order, also when the lane changes workers.
#[derive(Default)]
pub(super) struct Homes {
    lanes: Mutex<HashMap<LaneId, (usize, Arc<Mailbox>)>>,
}

impl Homes {
    /// All lanes somebody may write to.
    pub(super) fn lanes(&self) -> MutexGuard<'_, HashMap<LaneId, (usize, Arc<Mailbox>)>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How one lane is written to.
pub(super) struct Address {
    id: LaneId,
    homes: Arc<Homes>,
}

impl Address {
    /// The address of a lane that begins on this worker.
    pub(super) fn new(id: LaneId, worker: usize, mailbox: Arc<Mailbox>, homes: Arc<Homes>) -> Address {
        homes.lanes().insert(id, (worker, mailbox));
        Address { id, homes }
    }

    /// Sends mail to the worker that has the lane; returns that worker's number.
    fn send(&self, mail: Mail) -> usize {
        let homes = self.homes.lanes();
        let (worker, mailbox) = homes.get(&self.id).expect("a lane is known as long as it has an address");
        mailbox.send(mail);
        *worker
    }

    fn worker(&self) -> usize {
        self.homes.lanes().get(&self.id).expect("a lane is known as long as it has an address").0
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        self.homes.lanes().remove(&self.id);
    }
}

/// A lane that runs on a worker.
pub struct LaneHandle {
    address: Address,
    name: String,
    state: Arc<LaneState>,
}

impl LaneHandle {
    pub(super) fn new(address: Address, lane: &Lane) -> LaneHandle {
        LaneHandle { address, name: lane.name().to_owned(), state: lane.state().clone() }
    }

    /// Names the lane.
    pub fn id(&self) -> LaneId {
        self.address.id
    }

    /// Takes the lane back: it takes no more requests, and comes when those in flight are answered.
    ///
    /// # Errors
    /// [`StopError::StillBusy`]: not within `deadline`.
    pub fn stop(self, deadline: Duration) -> Result<StoppedLane, StopError> {
        self.begin_stop().wait(deadline)
    }

    /// Asks for the lane back: it takes no more requests, and comes when those in flight are answered.
    pub fn begin_stop(self) -> StoppingLane {
        let (reply, lane) = mpsc::channel();
        self.address.send(Mail::StopLane { id: self.address.id, reply });
        StoppingLane { address: self.address, name: self.name, lane, since: Instant::now() }
    }

    /// Gives the lane a memory table with more regions; its ring goes on meanwhile. In force on return.
    ///
    /// # Errors
    /// The table lacks a present region, or the worker is gone.
    pub fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), WorkerError> {
        let (reply, answer) = mpsc::channel();
        let worker = self.address.send(Mail::SetMemory { id: self.address.id, memory, reply });
        match answer.recv_timeout(MAIL_DEADLINE) {
            Ok(true) => Ok(()),
            Ok(false) => Err(WorkerError::NotSuperset),
            Err(_) => Err(WorkerError::Gone { worker }),
        }
    }

    /// Gives the lane the disk as it is now: with another size, say. In force on return, for requests that the drive has not got
    /// yet.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn set_disk(&self, disk: Arc<Disk>) -> Result<(), WorkerError> {
        let (reply, answer) = mpsc::channel();
        let worker = self.address.send(Mail::SetDisk { id: self.address.id, disk, reply });
        answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker })
    }

    /// Replaces the eventfd that notifies the driver. The new one is signalled once, lest a notification be lost between the two.
    pub fn set_call(&self, call: Option<File>) {
        self.address.send(Mail::SetCall { id: self.address.id, call });
    }

    /// Replaces the eventfd that wakes the lane.
    pub fn set_kick(&self, kick: Option<File>) {
        self.address.send(Mail::SetKick { id: self.address.id, kick });
    }

    /// Replaces the eventfd that says that the lane has stopped for good.
    pub fn set_error(&self, error: Option<File>) {
        self.address.send(Mail::SetError { id: self.address.id, error });
    }

    /// Did the guest break its ring (or a worker die)? Nothing is served any more, the device needs a reset.
    pub fn broken(&self) -> bool {
        self.state.broken()
    }

    /// The worker the lane is on.
    pub fn worker(&self) -> usize {
        self.address.worker()
    }
}

/// A lane that takes no more requests and has to come back from its worker.
pub struct StoppingLane {
    address: Address,
    name: String,
    lane: Receiver<Lane>,
    /// When it was asked for.
    since: Instant,
}

impl std::fmt::Debug for StoppingLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoppingLane").field("name", &self.name).finish_non_exhaustive()
    }
}

impl StoppingLane {
    /// When it was asked for.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Ends the lane's multi-command requests in the middle, with an error, when the drive has answered the commands that it has.
    pub fn end_multi_command(&self) {
        self.address.send(Mail::EndMultiCommand { id: self.address.id });
    }

    /// Says what becomes of the requests that wait for the drive; what the drive has is waited for until the controller has been
    /// stopped. After [`StopPolicy::LeaveInLog`] no other policy has an effect, and after [`StopPolicy::FailWaiting`] only that one.
    pub fn set_policy(&self, policy: StopPolicy) {
        self.address.send(Mail::SetStopPolicy { id: self.address.id, policy });
    }

    /// Waits for the requests in flight.
    ///
    /// # Errors
    /// [`StopError::StillBusy`]: not within `deadline`. [`StopError::Gone`]: the worker has died with the lane.
    pub fn wait(self, deadline: Duration) -> Result<StoppedLane, StopError> {
        match self.lane.recv_timeout(deadline) {
            Ok(lane) => {
                Ok(StoppedLane { base: lane.base(), broken: lane.state().broken(), events: lane.into_events() })
            }
            Err(RecvTimeoutError::Timeout) => {
                Err(StopError::StillBusy(StillBusy { name: self.name.clone(), lane: self }))
            }
            Err(RecvTimeoutError::Disconnected) => Err(StopError::Gone { name: self.name }),
        }
    }
}

/// What is left of a lane that has stopped: nothing in flight, everything answered shown to the driver.
#[derive(Debug)]
pub struct StoppedLane {
    /// Where the ring's next user begins: for GET_VRING_BASE, and [`RingSetup::base`](crate::virtio::ring::RingSetup::base).
    pub base: u32,
    /// The guest had broken the ring.
    pub broken: bool,
    /// The kick, call and error eventfds.
    pub events: [Option<File>; 3],
}
