//! A drive that exports share: the controller at an address while it is there, and the places of lanes on its queue pairs.
//!
//! When the controller fails, or has to go, the drive is *away* (`away`): the controller is stopped, and with it its whole
//! function, so that it touches nothing any more. Sessions, rings and lanes stay; the lanes' places have no queue pair meanwhile.
//! A device that is still there keeps its mappings, and its controller is brought up again in place; any other is closed, and the
//! keeper tries the address until the same drive is there again (`back`). Then every place gets a queue pair on it: lanes go on
//! where they are, with what was not answered first. If it grants fewer, some places are not there any more, and their lanes go on at
//! others, of another worker if need be.
//!
//! Guests see a pause, unless it gets too long (`Drive::give_up`): then everything is answered with an error until the drive is
//! back.

mod address;
mod away;
mod back;
mod embedded;
mod events;
mod keeper;
mod leases;
mod monitor;
mod namespaces;
mod shares;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nvme_driver::{Controller, Error, Options};
use vfio::{Device, DmaAddresses, OpenOptions};

use crate::datapath::trial::Trial;
use crate::datapath::worker::{PairId, RingWorkers, WorkerPool};
use crate::event::EventFd;
use crate::log_limit::LogLimit;
use crate::virtio::memory::Reach;
pub use address::{DeviceAddress, socket_path};
use away::Away;
pub use away::Cause;
pub use back::NotBack;
use embedded::Embedded;
use events::Reports;
use keeper::Expired;
pub use keeper::Keeper;
pub(crate) use keeper::longer;
pub use leases::{Lease, Share};
pub use namespaces::{ExportedNamespace, Known};
use shares::Shares;

/// What a controller does not say within this time while guests wait for it is asked for later.
const SOON: Duration = Duration::from_secs(1);
/// A vfio-user server may take as long to answer a register access as a drive may take for a command, but no less than this: the
/// machine may be busy.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// One NVMe controller in use.
pub struct Drive {
    name: String,
    address: DeviceAddress,
    /// Where it is opened.
    device_address: vfio::Address,
    options: Options,
    /// How long requests wait for the drive when it is away.
    hold: Duration,
    pool: Arc<WorkerPool>,
    serial: String,
    model: String,
    /// The guests' memory.
    memory: Reach,
    /// Taken before anything else that locks.
    state: Mutex<State>,
    /// Who has which place. Taken after `state`.
    shares: Mutex<Shares>,
    reports: Mutex<Reports>,
    /// For lines about its queue pairs, which rings that start and stop cause.
    log: LogLimit,
    /// Wakes the keeper.
    event: EventFd,
    /// Wakes whoever deals out queue pairs.
    chores: EventFd,
    /// The places in use, for whoever must not wait for `state`.
    pairs: Mutex<HashSet<PairId>>,
    /// For the keeper: commands were not answered in time.
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
    Present(Present),
    Away(Away),
    /// The program ends.
    Over,
}

struct Present {
    device: Device,
    controller: Controller,
    since: Instant,
    /// How often it has lost its power without notice (SMART / Health log), if it says so.
    unsafe_shutdowns: Option<u128>,
    /// It did not say so when it came back: this is from before.
    unsure: bool,
    /// A question was not answered soon.
    silent: bool,
}

impl Present {
    /// Opens the controller at `address`. `earlier`: what it could reach when it was open before.
    fn open(address: &vfio::Address, options: &Options, earlier: Option<DmaAddresses>) -> Result<Present, NotOpened> {
        let patience = OpenOptions { request_timeout: options.io_timeout.max(LEAST_PATIENCE) };
        let device = Device::open_with(address, &patience).map_err(NotOpened::Device)?;
        // Nothing that its last user has left may outlive him: the kernel resets a function that it gives out, a server is asked to.
        if let vfio::Address::VfioUser(_) = address
            && let Err(error) = device.reset()
        {
            log::debug!("{address}: it cannot be reset before it is used: {error}");
        }
        if let Some(earlier) = earlier {
            device.dma().keep_clear_of(earlier);
        }
        let controller = Controller::open(&device, options).map_err(NotOpened::Controller)?;
        Ok(Present::of(device, controller))
    }

    /// A controller that works.
    fn of(device: Device, controller: Controller) -> Present {
        let health = controller.monitor(SOON).health_log();
        let silent = matches!(health, Err(Error::Unanswered { .. }));
        let unsafe_shutdowns = health.ok().map(|health| health.unsafe_shutdowns);
        Present { device, controller, since: Instant::now(), unsafe_shutdowns, unsure: false, silent }
    }

    /// The same, for [`FlushPromise`](crate::blk::disk::FlushPromise).
    fn losses(&self) -> Option<u64> {
        self.unsafe_shutdowns.map(|count| count as u64)
    }
}

/// What a drive could not be opened for.
enum NotOpened {
    /// There is nothing, or nothing that can be had.
    Device(vfio::Error),
    /// The controller does not work.
    Controller(Error),
}

/// Whether a drive is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It works.
    There,
    /// It does not, for this reason.
    Away(String),
    /// It is just now going or coming back.
    Changing,
}

impl Drive {
    /// Opens the controller at `address`. The error is one line.
    ///
    /// `hold`: how long requests wait for it when it fails or disappears.
    pub fn open(
        address: &DeviceAddress,
        options: &Options,
        hold: Duration,
        pool: Arc<WorkerPool>,
    ) -> Result<Drive, NotBack> {
        let (device_address, embedded) = match address {
            DeviceAddress::Vfio(address) => (address.clone(), None),
            DeviceAddress::Sim(sim) => {
                let embedded = Embedded::start(sim).map_err(NotBack::Withheld)?;
                (embedded.address(), Some(embedded))
            }
        };
        let name = address.to_string();
        let present = Present::open(&device_address, options, None).map_err(|error| {
            let what = match &error {
                NotOpened::Device(_) => "open",
                NotOpened::Controller(_) => "bring up the controller",
            };
            NotBack::from(error).told(|why| format!("cannot {what} {name}: {why}"))
        })?;
        let identity = present.controller.identity();
        Ok(Drive {
            name,
            address: address.clone(),
            device_address,
            options: options.clone(),
            hold,
            pool,
            serial: identity.serial.clone(),
            model: identity.model.clone(),
            memory: Reach::new(present.device.dma().clone()),
            state: Mutex::new(State {
                granted: present.controller.max_queue_pairs(),
                condition: Condition::Present(present),
                namespaces: Vec::new(),
                last_tries: false,
                trial: None,
            }),
            shares: Mutex::default(),
            reports: Mutex::default(),
            log: LogLimit::default(),
            event: new_event()?,
            chores: new_event()?,
            pairs: Mutex::default(),
            expired: Mutex::new(None),
            _embedded: embedded,
        })
    }

    /// The NUMA node that it is on, if the machine tells and it is there.
    pub fn numa_node(&self) -> Option<u32> {
        match &self.state().condition {
            Condition::Present(present) => present.device.numa_node(),
            _ => None,
        }
    }

    /// The workers for the rings of a disk of it, see [`Placement::of_disk`](crate::datapath::worker::Placement::of_disk).
    pub fn ring_workers(&self, number: usize) -> RingWorkers {
        self.pool.placement().of_disk(self.numa_node(), number)
    }

    /// How long requests wait for it when it is away, or not ready for them.
    pub fn hold(&self) -> Duration {
        self.hold
    }

    /// Where it was opened.
    pub fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// The guests' memory, for more of it. A controller that is gone is noticed here, so that a guest's memory does not have to
    /// be refused.
    pub fn memory(&self) -> &Reach {
        self.look();
        &self.memory
    }

    /// Whether it is there, told without waiting for anything.
    pub fn presence(&self) -> Presence {
        let Some(state) = self.state_now() else { return Presence::Changing };
        match &state.condition {
            Condition::Present(_) => Presence::There,
            Condition::Away(Away { cause, .. }) => Presence::Away(format!("{} is away: {cause}", self.name)),
            Condition::Over => Presence::Away(format!("{} is not used any more", self.name)),
        }
    }

    /// The drive's serial number, for GET_ID.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same for whoever must not wait; `None`: it is being changed, which may take as long as a controller's reset.
    fn state_now(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The controller, if it is there. To be dropped soon: while it is held, the device cannot be given back.
    fn controller(&self) -> Result<Controller, String> {
        match &self.state().condition {
            Condition::Present(present) => Ok(present.controller.clone()),
            Condition::Away(Away { cause, .. }) => Err(format!("{} is away: {cause}", self.name)),
            Condition::Over => Err(format!("{} is not used any more", self.name)),
        }
    }

    /// Exports a namespace; without a number the only one there is. The error is one line.
    pub fn namespace(&self, id: Option<u32>) -> Result<Arc<ExportedNamespace>, String> {
        let controller = self.controller()?;
        let id = match id {
            Some(id) => id,
            None => {
                let all = controller.namespaces().map_err(|error| format!("{}: {error}", self.name))?;
                match all[..] {
                    [only] => only,
                    [] => return Err(format!("{} has no active namespace: create and attach one first", self.name)),
                    _ => {
                        let listed = all.iter().take(16).map(u32::to_string).collect::<Vec<_>>().join(", ");
                        return Err(format!("{} has namespaces {listed}: choose one by its number", self.name));
                    }
                }
            }
        };
        let namespace = controller.namespace(id).map_err(|error| format!("{}: {error}", self.name))?;
        let exported = Arc::new(ExportedNamespace::new(namespace));
        let mut state = self.state();
        if let Condition::Present(present) = &state.condition {
            exported.flushes.set_losses(present.losses());
        }
        state.namespaces.push(exported.clone());
        Ok(exported)
    }

    fn pairs(&self) -> MutexGuard<'_, HashSet<PairId>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands of a queue pair were not answered in time. If it is this drive's, its keeper stops the controller: Abort is only
    /// advisory. Waits for nothing.
    pub fn report_expired(&self, pair: PairId, count: usize, at: Instant) {
        if self.pairs().contains(&pair) {
            let why = format!("{count} commands were not answered in time");
            *self.expired.lock().unwrap_or_else(PoisonError::into_inner) = Some(Expired { why, at, paused: None });
            self.event.notify();
        }
    }

    /// Looks whether the controller is alive; if not, the drive goes away.
    fn look(&self) {
        let Ok(controller) = self.controller() else { return };
        let health = controller.health();
        drop(controller);
        if let Err(error) = health {
            self.leave(Cause::from(&error));
        }
    }

    /// Makes every write to a namespace that was answered so far durable.
    pub fn flush(&self, namespace: u32) -> Result<(), String> {
        let timeout = self.options.io_timeout;
        // Rings that were stopped for this have left their queue pairs, which may still be on their way back.
        self.take_away_leaving();
        let until = Instant::now() + SOON;
        let mut blocking = loop {
            match self.controller()?.blocking(namespace, timeout) {
                Err(Error::NoQueuePairsLeft { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                made => break made.map_err(|error| error.to_string())?,
            }
        };
        blocking.flush().map_err(|error| error.to_string())
    }

    /// Tells the controller that we are leaving, so that it saves what it holds. The drive cannot be used afterwards.
    pub fn shutdown(&self) {
        self.log.tell_left_out(&self.name, true);
        let condition = std::mem::replace(&mut self.state().condition, Condition::Over);
        if let Condition::Present(present) = condition
            && let Err(error) = present.controller.shutdown()
        {
            log::warn!("{}: shutdown notification failed: {error}", self.name);
        }
    }
}

fn new_event() -> Result<EventFd, NotBack> {
    EventFd::new().map_err(|error| NotBack::Unfit(format!("cannot make an eventfd: {error}")))
}

impl fmt::Display for Drive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
