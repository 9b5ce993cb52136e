//! Workers: threads that poll lanes, one per CPU they are given.
//!
//! A worker owns queue pairs and the lanes that submit to them. Control threads hand both over by value and get them back
//! the same way, by mail. While there is work a worker makes no system call; with nothing in flight for a while it asks the
//! drivers for notifications and sleeps.

mod handle;
mod mailbox;
mod placement;
mod thread;

use super::poll_group::{DetachedQueue, PollGroup, QueueResources};
use super::trial::{Seat, Suspicion};

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvme_driver::{Namespace, QueuePair};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::datapath::lane::Lane;
use crate::event;
use handle::{Address, Homes};
use mailbox::{InUse, Mail, Mailbox};
use thread::Worker;

pub use handle::{LaneHandle, StoppedLane, StoppingLane};
pub use placement::{Cpus, Placement, RingWorkers};

/// How long a worker may take to read its mail. It polls, so this passes only when it has stopped working.
const MAIL_DEADLINE: Duration = Duration::from_secs(10);

/// A queue slot: where a worker keeps a poll group and its queue pair. It has no queue pair while the drive is detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueSlotId {
    worker: usize,
    /// The slot's index on its worker. It is used again when the slot was removed, so that the worker has no more of them to look
    /// at than are in use.
    index: usize,
    /// Never used twice.
    number: u64,
}

impl QueueSlotId {
    #[cfg(test)]
    pub(crate) fn made_up(worker: usize, number: usize) -> QueueSlotId {
        QueueSlotId { worker, index: number, number: number as u64 }
    }

    /// The worker it is on.
    pub fn worker(&self) -> usize {
        self.worker
    }
}

/// Names a lane of a worker, whichever has it; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaneId(u64);

/// What a worker reports on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerEvent {
    /// The controller has not answered requests within the command timeout. They stay unanswered, for it may still write to
    /// their memory: stop the controller, then call [`WorkerPool::detach_drive`].
    Expired {
        /// The queue slot whose queue pair they were given to.
        slot: QueueSlotId,
        /// How many have just expired.
        count: usize,
        /// When that was noticed.
        at: Instant,
    },
    /// A worker has panicked; its lanes are not served any more. A defect of this program.
    WorkerDied {
        /// The worker.
        worker: usize,
        /// What the panic said.
        message: String,
    },
}

/// What goes wrong between control threads and workers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// A worker cannot run on the CPU it was given.
    #[error(
        "cannot pin a worker to CPU {cpu}: {source}; see /proc/self/status, Cpus_allowed_list, for the CPUs this process may use"
    )]
    Pin {
        /// Number of the CPU.
        cpu: usize,
        /// What the system says.
        source: io::Error,
    },
    /// A thread or its means to wake others and be woken could not be made.
    #[error("cannot start worker {worker}: {source}")]
    Start {
        /// Number of the worker.
        worker: usize,
        /// What the system says.
        source: io::Error,
    },
    /// The worker does not answer: it has panicked, or the pool was shut down.
    #[error("worker {worker} does not answer: it has died (see the lines before), or the program is ending")]
    Gone {
        /// Number of the worker.
        worker: usize,
    },
    /// Lanes use the queue slot.
    #[error("a queue slot is still in use")]
    InUse,
    /// The new memory table lacks a region of the present one, into which requests may point.
    #[error("the new memory table lacks a region that the running ring may use; stop the ring first")]
    NotSuperset,
    /// Workers ended with requests the drive had not answered.
    #[error("{requests} requests were still with the drive when the workers had to end")]
    Undrained {
        /// How many.
        requests: usize,
    },
}

/// The drive has not answered what is in flight within the deadline. The lane is still on its worker, takes nothing more and
/// can be asked for again.
#[derive(Debug, thiserror::Error)]
#[error("{name}: the drive has not answered all requests within the deadline")]
pub struct StillBusy {
    /// The lane's name.
    pub name: String,
    /// To ask again.
    pub lane: StoppingLane,
}

/// Why a lane did not come back.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The drive has not answered all requests within the deadline; the lane can be asked for again.
    #[error(transparent)]
    StillBusy(StillBusy),
    /// The worker has died with the lane.
    #[error("{name}: the worker that served it is gone")]
    Gone {
        /// The lane's name.
        name: String,
    },
}

/// The indexes of a worker's slots.
#[derive(Default)]
struct Indexes {
    /// All indexes below were used.
    next: usize,
    free: Vec<usize>,
}

struct Thread {
    mailbox: Arc<Mailbox>,
    slots: Mutex<Indexes>,
    join: Mutex<Option<JoinHandle<usize>>>,
}

impl Thread {
    fn slots(&self) -> MutexGuard<'_, Indexes> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The workers of a program.
pub struct WorkerPool {
    threads: Vec<Thread>,
    next_lane: AtomicU64,
    next_slot: AtomicU64,
    events: Mutex<Receiver<WorkerEvent>>,
    unpinned: Vec<WorkerError>,
    placement: Placement,
    homes: Arc<Homes>,
}

impl WorkerPool {
    /// Starts a worker on each of these CPUs; none given: one worker, wherever the scheduler puts it. A CPU that does not exist or
    /// is not allowed to this process is left out.
    ///
    /// # Errors
    /// There is no such CPU at all, or no resources for a thread.
    pub fn start(cpus: &[usize]) -> Result<WorkerPool, WorkerError> {
        let (events, receiver) = mpsc::channel();
        let wanted: Vec<Option<usize>> =
            if cpus.is_empty() { vec![None] } else { cpus.iter().copied().map(Some).collect() };
        // Whoever drives the workers and the drive needs a core, too.
        let crowded = std::thread::available_parallelism().map_or(1, usize::from) < wanted.len() + 2;
        let (next_lane, next_slot) = (AtomicU64::new(1), AtomicU64::new(0));
        let mut pool = WorkerPool {
            threads: Vec::new(),
            next_lane,
            next_slot,
            events: Mutex::new(receiver),
            unpinned: vec![],
            placement: Placement::new(&[], |_| None),
            homes: Arc::default(),
        };
        let mut taken = Vec::new();
        for cpu in wanted {
            match Self::start_thread(pool.threads.len(), cpu, crowded, events.clone()) {
                Ok(thread) => {
                    pool.threads.push(thread);
                    taken.push(cpu);
                }
                Err(error @ WorkerError::Pin { .. }) => pool.unpinned.push(error),
                Err(error) => return Err(error),
            }
        }
        pool.placement = Placement::new(&taken, vfio::numa_node_of_cpu);
        match pool.unpinned.pop_if(|_| pool.threads.is_empty()) {
            Some(error) => Err(error),
            None => Ok(pool),
        }
    }

    /// Why there is no worker on some of the CPUs.
    pub fn unpinned(&self) -> &[WorkerError] {
        &self.unpinned
    }

    fn start_thread(
        number: usize,
        cpu: Option<usize>,
        crowded: bool,
        events: Sender<WorkerEvent>,
    ) -> Result<Thread, WorkerError> {
        let failed = move |source| WorkerError::Start { worker: number, source };
        let mailbox = Arc::new(Mailbox::new().map_err(failed)?);
        let mut worker = Worker::new(number, mailbox.clone(), events.clone(), crowded).map_err(failed)?;
        let (started, start) = mpsc::sync_channel(1);
        let mine = mailbox.clone();
        let body = move || {
            let pinned = cpu.map_or(Ok(()), |cpu| pin(cpu).map_err(|source| WorkerError::Pin { cpu, source }));
            let ready = pinned.and_then(|()| event::prepare().map_err(failed));
            let go = ready.is_ok();
            // The starter waits for this.
            let _ = started.send(ready);
            if !go {
                return 0;
            }
            let result = catch_unwind(AssertUnwindSafe(|| worker.run()));
            mine.close();
            result.unwrap_or_else(|panic| {
                worker.break_lanes();
                let message = panic_message(panic.as_ref());
                log::error!("worker {number} panicked, and the program ends because of it: {message}");
                let _ = events.send(WorkerEvent::WorkerDied { worker: number, message });
                0
            })
        };
        let join = std::thread::Builder::new().name(format!("worker {number}")).spawn(body).map_err(failed)?;
        if let Ok(Err(error)) = start.recv() {
            return Err(error);
        }
        Ok(Thread { mailbox, slots: Mutex::default(), join: Mutex::new(Some(join)) })
    }

    /// Where the workers are.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Number of workers; they are numbered from 0.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there are no workers; there always are some.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// What workers have reported on their own since the last call.
    pub fn events(&self) -> Vec<WorkerEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).try_iter().collect()
    }

    /// Moves a queue pair to a worker, and with it the bounce buffers for data its drive cannot reach where it lies
    /// (64 KiB serve any request; more lets several be copied at a time).
    ///
    /// # Panics
    /// There is no worker of this number.
    pub fn add_queue_pair(&self, worker: usize, resources: QueueResources) -> QueueSlotId {
        self.add(worker, PollGroup::new(resources.pair, resources.pool))
    }

    /// Makes a queue slot without a queue pair while the drive is detached: its lanes wait, or, if its hold has expired, answer
    /// everything with an error until [`WorkerPool::reattach_drive`].
    ///
    /// # Panics
    /// There is no worker of this number.
    pub fn add_empty_slot(&self, worker: usize, hold_expired: bool) -> QueueSlotId {
        self.add(worker, PollGroup::without_drive(hold_expired))
    }

    /// Makes a queue slot whose lanes go on when the trial is over.
    ///
    /// # Panics
    /// There is no worker of this number.
    pub fn add_on_trial(&self, worker: usize, resources: QueueResources, seat: Seat) -> QueueSlotId {
        let mut group = PollGroup::without_drive(false);
        group.reattach_drive(resources, Some(seat));
        self.add(worker, group)
    }

    fn add(&self, worker: usize, group: PollGroup) -> QueueSlotId {
        let thread = &self.threads[worker];
        let index = {
            let mut slots = thread.slots();
            slots.free.pop().unwrap_or_else(|| {
                slots.next += 1;
                slots.next - 1
            })
        };
        // Relaxed: a number, ordered with nothing.
        let id = QueueSlotId { worker, index, number: self.next_slot.fetch_add(1, Ordering::Relaxed) };
        thread.mailbox.send(Mail::AddGroup { id, group });
        id
    }

    /// Moves a lane to the worker that has this queue slot; it is polled from now on.
    pub fn start_lane(&self, slot: QueueSlotId, lane: Lane) -> LaneHandle {
        // Relaxed: a number, ordered with nothing.
        let id = LaneId(self.next_lane.fetch_add(1, Ordering::Relaxed));
        let mailbox = &self.threads[slot.worker].mailbox;
        let address = Address::new(id, slot.worker, mailbox.clone(), self.homes.clone());
        let handle = LaneHandle::new(address, &lane);
        mailbox.send(Mail::StartLane { id, slot: slot.index, lane: Box::new(lane) });
        handle
    }

    /// Moves a lane to another queue slot of its worker. Its driver notices nothing: the lane takes no more requests, and moves when
    /// those that it has are answered. If it is not on that worker any more, or has to stop before, nothing happens.
    pub fn move_lane(&self, lane: LaneId, to: QueueSlotId) {
        self.threads[to.worker].mailbox.send(Mail::MoveLane { id: lane, to_slot: to.index });
    }

    /// Moves all lanes of a queue slot to another one, of any worker, with the requests that wait for the drive: there will be no queue
    /// pair for the first slot. Neither has one now; the lanes' handles go on working. In force on return.
    ///
    /// # Errors
    /// A worker is gone.
    pub fn fold(&self, from: QueueSlotId, into: QueueSlotId) -> Result<(), WorkerError> {
        // Whoever writes to one of the lanes waits, and finds it where it is then.
        let mut homes = self.homes.lanes();
        let mailbox = &self.threads[into.worker].mailbox;
        let elsewhere = (into.worker != from.worker).then(|| mailbox.clone());
        let (reply, answer) = mpsc::channel();
        self.threads[from.worker].mailbox.send(Mail::FoldLanes {
            slot: from.index,
            into_slot: into.index,
            elsewhere,
            reply,
        });
        let lanes = answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker: from.worker })?;
        for lane in lanes {
            if let Some(home) = homes.get_mut(&lane) {
                *home = (into.worker, mailbox.clone());
            }
        }
        Ok(())
    }

    /// Removes a queue slot that no lane uses, and returns its queue pair.
    ///
    /// # Errors
    /// A lane uses it, or the worker is gone.
    pub fn take_queue_pair(&self, slot: QueueSlotId) -> Result<Option<QueuePair>, WorkerError> {
        let (reply, answer) = mpsc::channel();
        let thread = &self.threads[slot.worker];
        thread.mailbox.send(Mail::TakeQueuePair { slot: slot.index, reply });
        match answer.recv_timeout(MAIL_DEADLINE) {
            Ok(Ok(taken)) => {
                thread.slots().free.push(slot.index);
                Ok(taken)
            }
            Ok(Err(InUse)) => Err(WorkerError::InUse),
            Err(_) => Err(WorkerError::Gone { worker: slot.worker }),
        }
    }

    /// How long the drive has had the oldest command of a slot's queue pair, to within a few milliseconds; `None`: there is no command, or
    /// no queue pair.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn oldest(&self, slot: QueueSlotId) -> Result<Option<Duration>, WorkerError> {
        let (reply, answer) = mpsc::channel();
        self.threads[slot.worker].mailbox.send(Mail::OldestCommand { slot: slot.index, reply });
        answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker: slot.worker })
    }

    /// Gives nothing more to the queue pair of a slot until [`WorkerPool::detach_drive`], or until the seat's trial is over.
    /// Returns how many commands the controller still has; what it answers is passed on.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn pause(&self, slot: QueueSlotId, seat: Seat) -> Result<usize, WorkerError> {
        let (reply, answer) = mpsc::channel();
        self.threads[slot.worker].mailbox.send(Mail::PauseGroup { slot: slot.index, seat, reply });
        answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker: slot.worker })
    }

    /// The controller behind this queue pair has been stopped and touches no memory any more. What it had in flight waits with
    /// its lanes until [`WorkerPool::reattach_drive`] or [`WorkerPool::expire_hold`], and they take nothing more. Gives back what
    /// leads to the controller.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn detach_drive(&self, slot: QueueSlotId) -> Result<Option<DetachedQueue>, WorkerError> {
        let (reply, answer) = mpsc::channel();
        self.threads[slot.worker].mailbox.send(Mail::DetachDrive { slot: slot.index, reply });
        answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker: slot.worker })
    }

    /// Judges the requests that the controller had in the failure in which a slot has lost its queue pair: those that had a part in too
    /// many failures are answered with an error. True: some are to be tried alone when the drive is attached again
    /// ([`WorkerPool::reattach_on_trial`]).
    ///
    /// # Errors
    /// The worker is gone.
    pub fn judge(&self, slot: QueueSlotId, suspicion: Suspicion) -> Result<bool, WorkerError> {
        let (reply, answer) = mpsc::channel();
        self.threads[slot.worker].mailbox.send(Mail::JudgeFailure { slot: slot.index, suspicion, reply });
        answer.recv_timeout(MAIL_DEADLINE).map_err(|_| WorkerError::Gone { worker: slot.worker })
    }

    /// The drive's hold has expired: answers everything with an error that waits in a slot without a queue pair, and from then on every
    /// request of its lanes.
    pub fn expire_hold(&self, slot: QueueSlotId) {
        self.threads[slot.worker].mailbox.send(Mail::ExpireHold { slot: slot.index });
    }

    /// Tells the lanes of a slot how their namespaces are now, before they go on with another queue pair.
    pub fn update_namespaces(&self, slot: QueueSlotId, namespaces: Arc<[Namespace]>) {
        self.threads[slot.worker].mailbox.send(Mail::UpdateNamespaces { slot: slot.index, namespaces });
    }

    /// Puts a queue pair into a slot that has none; its lanes go on with it.
    pub fn reattach_drive(&self, slot: QueueSlotId, resources: QueueResources) {
        self.threads[slot.worker].mailbox.send(Mail::ReattachDrive { slot: slot.index, resources, seat: None });
    }

    /// Puts a queue pair into a slot that has none; its lanes go on with it when the trial is over.
    pub fn reattach_on_trial(&self, slot: QueueSlotId, resources: QueueResources, seat: Seat) {
        self.threads[slot.worker].mailbox.send(Mail::ReattachDrive { slot: slot.index, resources, seat: Some(seat) });
    }

    /// Stops all lanes, waits for what is in flight (no longer than `deadline`), ends the threads.
    ///
    /// # Errors
    /// Requests were not answered in time; their guest memory stays mapped until the process ends.
    pub fn shutdown(&self, deadline: Duration) -> Result<(), WorkerError> {
        let deadline = Instant::now() + deadline;
        for thread in &self.threads {
            thread.mailbox.send(Mail::Shutdown { deadline });
        }
        let mut requests = 0;
        for thread in &self.threads {
            let join = thread.join.lock().unwrap_or_else(PoisonError::into_inner).take();
            // A panic of the thread has been reported when it happened.
            requests += join.map_or(0, |join| join.join().unwrap_or(0));
        }
        if requests != 0 { Err(WorkerError::Undrained { requests }) } else { Ok(()) }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown(Duration::from_secs(1)) {
            log::error!("{error}");
        }
    }
}

fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Whether a worker could run on a CPU.
///
/// # Errors
/// The CPU does not exist, or is not allowed to this process.
pub fn try_cpu(cpu: usize) -> Result<(), WorkerError> {
    let tried = std::thread::Builder::new().name("try CPU".into()).spawn(move || pin(cpu));
    let pinned = tried.and_then(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread died"))));
    pinned.map_err(|source| WorkerError::Pin { cpu, source })
}

/// What a thread has panicked with.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests;
