//! A drive: an NVMe controller that may fail and come back, and everything that disks share on it.
//!
//! A drive is *attached* while its controller works. When the controller fails or has to be removed, the drive is *detached*
//! (`detach`): the controller and its whole function are stopped, so that they no longer access memory. Sessions, rings and lanes
//! stay; their queue slots have no queue pair meanwhile. If the device is still present, it keeps its DMA mappings and its controller
//! is reset in place. Otherwise the device is closed, and the supervisor tries the address until the same drive answers
//! (`reattach`). Then every slot gets a queue pair, and the lanes submit first what was not answered. If the controller grants fewer
//! queue pairs than before, lanes share them, also with lanes of other workers.
//!
//! Guests see a pause. After the hold timeout (`Drive::expire_hold`) requests fail until the drive is reattached.
//!
//! This room owns controllers, namespaces in use, queue-pair leases and the guests' memory as the controller sees it. It never takes a
//! request off a ring, and none of its threads is waited for by a worker.

mod address;
mod detach;
mod embedded;
mod error;
mod leases;
mod monitor;
mod namespaces;
mod reattach;
mod reports;
mod shares;
mod supervisor;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nvme_driver::{Controller, Error as DriverError, Options};
use vfio::{Device, DmaAddresses, OpenOptions};

use crate::datapath::trial::Trial;
use crate::datapath::worker::{QueueSlotId, RingWorkers, WorkerPool};
use crate::event::EventFd;
use crate::log_limit::LogLimit;
use crate::virtio::memory::DmaScope;
pub use address::{DeviceAddress, socket_path};
pub use detach::DetachCause;
use detach::Detached;
use embedded::Embedded;
pub use error::{AddressError, EmbeddedError, Error, Failure, OpenError, SimError, SocketPathError};
pub use leases::{Lease, Share};
pub use namespaces::{ExportedNamespace, Known};
use reports::Reports;
use shares::Shares;
use supervisor::Expired;
pub use supervisor::Supervisor;
pub(crate) use supervisor::longer;

/// While guests wait, a question that a controller does not answer within this time is put off.
const SOON: Duration = Duration::from_secs(1);
/// The shortest time that a vfio-user server has to answer a register access, however short the time for a command is: the machine
/// may be busy.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// An NVMe controller in use, attached or detached.
pub struct Drive {
    name: String,
    address: DeviceAddress,
    /// Where it is opened.
    device_address: vfio::Address,
    options: Options,
    /// The hold timeout: how long requests wait for the drive while it is detached.
    hold: Duration,
    pool: Arc<WorkerPool>,
    serial: String,
    model: String,
    /// The guests' memory.
    memory: DmaScope,
    /// Taken before anything else that locks.
    state: Mutex<State>,
    /// Which ring has which queue slot. Taken after `state`.
    shares: Mutex<Shares>,
    reports: Mutex<Reports>,
    /// Limits the log lines about queue pairs, which front-ends cause by starting and stopping rings.
    log: LogLimit,
    /// Wakes the supervisor.
    supervisor_event: EventFd,
    /// Wakes whoever deals out queue pairs.
    monitor_event: EventFd,
    /// Ids of the queue slots in use, for those who must not wait for `state`.
    slot_ids: Mutex<HashSet<QueueSlotId>>,
    /// Commands that were not answered in time; the supervisor takes them.
    expired: Mutex<Option<Expired>>,
    /// The controller itself, when it is ours; dropped after all that uses it.
    _embedded: Option<Embedded>,
}

struct State {
    condition: Condition,
    /// Queue pairs the controller has granted.
    granted: u16,
    /// The namespaces in use.
    namespaces: Vec<Arc<ExportedNamespace>>,
    /// When it is back, some requests are tried alone there.
    last_tries: bool,
    /// Just now, or before.
    trial: Option<Arc<Trial>>,
}

enum Condition {
    Attached(Attached),
    Detached(Detached),
    /// The program ends.
    Closed,
}

struct Attached {
    device: Device,
    controller: Controller,
    since: Instant,
    /// Unsafe shutdowns that the SMART / Health log counts; `None`: the controller does not say.
    unsafe_shutdowns: Option<u128>,
    /// The controller did not tell the count when it was reattached: it is the one from before.
    unsure: bool,
    /// A question was not answered soon.
    silent: bool,
}

impl Attached {
    /// Opens the controller at `address`. `name`: the drive's, for errors. `earlier`: what it could reach when it was open before.
    fn open(
        address: &vfio::Address,
        name: &str,
        options: &Options,
        earlier: Option<DmaAddresses>,
    ) -> Result<Attached, OpenError> {
        let patience = OpenOptions { request_timeout: options.io_timeout.max(LEAST_PATIENCE) };
        let device = Device::open_with(address, &patience).map_err(|error| OpenError::device(name, error))?;
        // Nothing that its last user has left may outlive him: the kernel resets a function that it gives out, a server is asked to.
        if let vfio::Address::VfioUser(_) = address
            && let Err(error) = device.reset()
        {
            log::debug!("{address}: it cannot be reset before it is used: {error}");
        }
        if let Some(earlier) = earlier {
            device.dma().keep_clear_of(earlier);
        }
        let controller = Controller::open(&device, options).map_err(|error| OpenError::controller(name, error))?;
        Ok(Attached::of(device, controller))
    }

    /// A controller that works.
    fn of(device: Device, controller: Controller) -> Attached {
        let health = controller.monitor(SOON).health_log();
        let silent = matches!(health, Err(DriverError::Unanswered { .. }));
        let unsafe_shutdowns = health.ok().map(|health| health.unsafe_shutdowns);
        Attached { device, controller, since: Instant::now(), unsafe_shutdowns, unsure: false, silent }
    }

    /// Unsafe shutdowns, in the width that [`FlushPromise`](crate::blk::disk::FlushPromise) compares.
    fn losses(&self) -> Option<u64> {
        self.unsafe_shutdowns.map(|count| count as u64)
    }
}

/// Whether a drive is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The controller works.
    Attached,
    /// The controller does not work, for this reason.
    Detached(String),
    /// The drive is just being detached or reattached.
    Changing,
}

impl Drive {
    /// Opens the controller at `address`. `hold`: how long requests wait for it when it fails or disappears.
    ///
    /// # Errors
    /// There is no controller, it may not be used, or it does not come up.
    pub fn open(
        address: &DeviceAddress,
        options: &Options,
        hold: Duration,
        pool: Arc<WorkerPool>,
    ) -> Result<Drive, OpenError> {
        let (device_address, embedded) = match address {
            DeviceAddress::Vfio(address) => (address.clone(), None),
            DeviceAddress::Sim(sim) => {
                let embedded =
                    Embedded::start(sim).map_err(|error| OpenError::Denied(Failure::Embedded(error).into()))?;
                (embedded.address(), Some(embedded))
            }
        };
        let name = address.to_string();
        let attached = Attached::open(&device_address, &name, options, None)?;
        let identity = attached.controller.identity();
        Ok(Drive {
            name,
            address: address.clone(),
            device_address,
            options: options.clone(),
            hold,
            pool,
            serial: identity.serial.clone(),
            model: identity.model.clone(),
            memory: DmaScope::new(attached.device.dma().clone()),
            state: Mutex::new(State {
                granted: attached.controller.max_queue_pairs(),
                condition: Condition::Attached(attached),
                namespaces: Vec::new(),
                last_tries: false,
                trial: None,
            }),
            shares: Mutex::default(),
            reports: Mutex::default(),
            log: LogLimit::default(),
            supervisor_event: new_event()?,
            monitor_event: new_event()?,
            slot_ids: Mutex::default(),
            expired: Mutex::new(None),
            _embedded: embedded,
        })
    }

    /// The NUMA node that it is on, if the machine tells and it is there.
    pub fn numa_node(&self) -> Option<u32> {
        match &self.state().condition {
            Condition::Attached(attached) => attached.device.numa_node(),
            _ => None,
        }
    }

    /// The workers for the rings of a disk of it, see [`Placement::of_disk`](crate::datapath::worker::Placement::of_disk).
    pub fn ring_workers(&self, number: usize) -> RingWorkers {
        self.pool.placement().of_disk(self.numa_node(), number)
    }

    /// The hold timeout: how long requests wait for a drive that is detached or not ready.
    pub fn hold(&self) -> Duration {
        self.hold
    }

    /// Where it was opened.
    pub fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// The guests' memory, for more of it. A controller that is gone is noticed here, so that a guest's memory does not have to
    /// be refused.
    pub fn memory(&self) -> &DmaScope {
        self.look();
        &self.memory
    }

    /// Whether the drive is attached. Does not block.
    pub fn presence(&self) -> Presence {
        let Some(state) = self.state_now() else { return Presence::Changing };
        match &state.condition {
            Condition::Attached(_) => Presence::Attached,
            Condition::Detached(Detached { cause, .. }) => {
                Presence::Detached(format!("{} is not available: {cause}", self.name))
            }
            Condition::Closed => Presence::Detached(format!("{} is closed: the program is ending", self.name)),
        }
    }

    /// The drive's serial number, for GET_ID.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, without blocking; `None`: another thread changes it, which may take as long as the reset of a controller.
    fn state_now(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The controller, if it is there. To be dropped soon: while it is held, the device cannot be given back.
    fn controller(&self) -> Result<Controller, Error> {
        match &self.state().condition {
            Condition::Attached(attached) => Ok(attached.controller.clone()),
            Condition::Detached(Detached { cause, .. }) => {
                Err(Error::Detached { drive: self.name.clone(), cause: cause.clone() })
            }
            Condition::Closed => Err(Error::Closed { drive: self.name.clone() }),
        }
    }

    /// Exports a namespace; without a number the only one there is.
    ///
    /// # Errors
    /// The drive is detached or does not answer, it has no such namespace, or it has several and none was chosen.
    pub fn namespace(&self, id: Option<u32>) -> Result<Arc<ExportedNamespace>, Error> {
        let controller = self.controller()?;
        let failed = |source| Error::Controller { drive: self.name.clone(), source: Box::new(source) };
        let id = match id {
            Some(id) => id,
            None => {
                let all = controller.namespaces().map_err(failed)?;
                match all[..] {
                    [only] => only,
                    [] => return Err(Error::NoNamespace { drive: self.name.clone() }),
                    _ => {
                        let listed = all.iter().take(16).map(u32::to_string).collect::<Vec<_>>().join(", ");
                        return Err(Error::SeveralNamespaces { drive: self.name.clone(), listed });
                    }
                }
            }
        };
        let namespace = controller.namespace(id).map_err(failed)?;
        let exported = Arc::new(ExportedNamespace::new(namespace));
        let mut state = self.state();
        if let Condition::Attached(attached) = &state.condition {
            exported.flushes.set_losses(attached.losses());
        }
        state.namespaces.push(exported.clone());
        Ok(exported)
    }

    fn slot_ids(&self) -> MutexGuard<'_, HashSet<QueueSlotId>> {
        self.slot_ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands of a queue pair were not answered in time. If it is this drive's, its supervisor stops the controller: Abort is only
    /// advisory. Waits for nothing.
    pub fn report_expired(&self, slot: QueueSlotId, count: usize, at: Instant) {
        if self.slot_ids().contains(&slot) {
            let why = format!("{count} commands were not answered in time");
            *self.expired.lock().unwrap_or_else(PoisonError::into_inner) = Some(Expired { why, at, paused: None });
            self.supervisor_event.notify();
        }
    }

    /// Looks whether the controller is alive; if not, the drive goes away.
    fn look(&self) {
        let Ok(controller) = self.controller() else { return };
        let health = controller.health();
        drop(controller);
        if let Err(error) = health {
            self.detach(DetachCause::from(&error));
        }
    }

    /// Makes every write to a namespace that was answered so far durable.
    ///
    /// # Errors
    /// The drive is detached, has no queue pair left, or has not carried out the flush.
    pub fn flush(&self, namespace: u32) -> Result<(), Error> {
        let failed = |source| Error::Controller { drive: self.name.clone(), source: Box::new(source) };
        let timeout = self.options.io_timeout;
        // Rings that were stopped for this have left their queue pairs, which may still be on their way back.
        self.take_away_leaving();
        let until = Instant::now() + SOON;
        let mut blocking = loop {
            match self.controller()?.blocking(namespace, timeout) {
                Err(DriverError::NoQueuePairsLeft { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                made => break made.map_err(failed)?,
            }
        };
        blocking.flush().map_err(failed)
    }

    /// Tells the controller that we are leaving, so that it saves what it holds. The drive cannot be used afterwards.
    pub fn shutdown(&self) {
        self.log.tell_left_out(&self.name, true);
        let condition = std::mem::replace(&mut self.state().condition, Condition::Closed);
        if let Condition::Attached(attached) = condition
            && let Err(error) = attached.controller.shutdown()
        {
            log::warn!(
                "{}: the controller cannot be shut down; what is in its cache may be lost with the power: {error}",
                self.name
            );
        }
    }
}

fn new_event() -> Result<EventFd, OpenError> {
    EventFd::new().map_err(|error| OpenError::Unusable(Failure::EventFd(error).into()))
}

impl fmt::Display for Drive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
