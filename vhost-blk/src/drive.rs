//! A controller that exports share, and the queue pairs made on it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use nvme_driver::{BouncePool, Controller, Error, Event, Namespace, Options, QueuePairOptions};

use crate::address::DeviceAddress;
use crate::lane::Lane;
use crate::worker::{LaneHandle, PairId, StopError, StoppedLane, WorkerPool};

/// One NVMe controller in use.
pub struct Drive {
    name: String,
    address: DeviceAddress,
    device: vfio::Device,
    controller: Controller,
    pool: Arc<WorkerPool>,
    pairs: Mutex<Vec<Pair>>,
    /// Why the controller is out of operation.
    failed: OnceLock<String>,
    told_sharing: AtomicBool,
    /// What was last wrong with the drive's reports, so that it is told once and not at every look.
    unreadable: Mutex<Option<String>>,
    /// The controller itself, when it is ours; dropped after all that uses it.
    _embedded: Option<Embedded>,
}

/// A queue pair on a worker.
struct Pair {
    id: PairId,
    worker: usize,
    lanes: usize,
}

impl Drive {
    /// Opens the controller at `address`. The error is one line.
    pub fn open(address: &DeviceAddress, options: &Options, pool: Arc<WorkerPool>) -> Result<Drive, String> {
        let (vfio_address, embedded) = match address {
            DeviceAddress::Vfio(address) => (address.clone(), None),
            DeviceAddress::Sim(sim) => {
                let embedded = Embedded::start(sim)?;
                (embedded.address(), Some(embedded))
            }
        };
        let name = address.to_string();
        let device = vfio::Device::open(&vfio_address).map_err(|error| format!("cannot open {name}: {error}"))?;
        let controller = Controller::open(&device, options)
            .map_err(|error| format!("cannot bring up the controller {name}: {error}"))?;
        Ok(Drive {
            name,
            address: address.clone(),
            device,
            controller,
            pool,
            pairs: Mutex::new(Vec::new()),
            failed: OnceLock::new(),
            told_sharing: AtomicBool::new(false),
            unreadable: Mutex::new(None),
            _embedded: embedded,
        })
    }

    /// Where it was opened.
    pub fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// The DMA address space that guest memory is mapped into.
    pub fn dma(&self) -> &vfio::DmaSpace {
        self.device.dma()
    }

    /// The drive's serial number, for GET_ID.
    pub fn serial(&self) -> &str {
        &self.controller.identity().serial
    }

    /// A namespace; without a number the only one there is. The error is one line.
    pub fn namespace(&self, id: Option<u32>) -> Result<Namespace, String> {
        let id = match id {
            Some(id) => id,
            None => {
                let all = self.controller.namespaces().map_err(|error| format!("{}: {error}", self.name))?;
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
        self.controller.namespace(id).map_err(|error| format!("{}: {error}", self.name))
    }

    fn pairs(&self) -> MutexGuard<'_, Vec<Pair>> {
        self.pairs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A place for one lane: on a queue pair of its own on `worker`, or, when the controller grants no more, on one that
    /// it shares. `ring_size` is in entries.
    pub fn lease(self: &Arc<Self>, worker: usize, ring_size: u16) -> Result<Lease, String> {
        let mut pairs = self.pairs();
        if let Some(why) = self.failed.get() {
            return Err(format!("{} is out of operation: {why}", self.name));
        }
        // A request may need several commands; twice the ring keeps the guest the limit, not the queue.
        let entries = ring_size.saturating_mul(2).clamp(MIN_ENTRIES, MAX_ENTRIES);
        let options = QueuePairOptions { entries: Some(entries), ..QueuePairOptions::default() };
        match self.controller.create_queue_pair(options) {
            Ok(pair) => {
                let bounce = BouncePool::new(self.dma(), BOUNCE_BYTES)
                    .map_err(|error| format!("{}: cannot allocate bounce buffers: {error}", self.name))?;
                let id = self.pool.add_queue_pair(worker, pair, bounce);
                pairs.push(Pair { id, worker, lanes: 1 });
                Ok(Lease { drive: self.clone(), pair: id })
            }
            Err(Error::NoQueuePairsLeft { .. }) => {
                // The one with the fewest lanes, on the wanted worker if there is any.
                let pair = pairs
                    .iter_mut()
                    .min_by_key(|pair| (pair.worker != worker, pair.lanes))
                    .ok_or_else(|| format!("{} grants no queue pair at all", self.name))?;
                pair.lanes += 1;
                if !self.told_sharing.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "{}: all {} queue pairs are in use; further rings share one",
                        self.name,
                        self.controller.max_queue_pairs()
                    );
                }
                Ok(Lease { drive: self.clone(), pair: pair.id })
            }
            Err(error) => Err(format!("{}: cannot create a queue pair: {error}", self.name)),
        }
    }

    /// One lane fewer on a queue pair; the last one gives it back to the controller.
    fn release(&self, id: PairId) {
        let mut pairs = self.pairs();
        let Some(at) = pairs.iter().position(|pair| pair.id == id) else { return };
        pairs[at].lanes -= 1;
        if pairs[at].lanes > 0 {
            return;
        }
        pairs.swap_remove(at);
        match self.pool.take_queue_pair(id) {
            Some(pair) if self.failed.get().is_none() => {
                if let Err(error) = self.controller.delete_queue_pair(pair) {
                    log::warn!("{}: cannot delete a queue pair: {error}", self.name);
                }
            }
            // A stopped controller has forgotten its queues.
            Some(_) => {}
            None => log::error!("{}: a queue pair is still in use where no lane should be left", self.name),
        }
    }

    /// Whether a queue pair is one of this controller's.
    pub fn owns(&self, id: PairId) -> bool {
        self.pairs().iter().any(|pair| pair.id == id)
    }

    /// Looks whether the controller still works, and takes it out of operation if not.
    pub fn check(&self) {
        if self.failed.get().is_some() {
            return;
        }
        match self.controller.health().and_then(|()| self.controller.poll_events()) {
            Ok(events) => {
                self.unreadable.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
                events.iter().for_each(|event| self.log_event(event));
            }
            Err(error) => match self.controller.health() {
                // A log page that cannot be read is no reason to stop a drive that works.
                Ok(()) => self.complain(error.to_string()),
                Err(error) => self.fail(&error.to_string()),
            },
        }
    }

    /// Logs why the drive's reports cannot be read, once as long as the reason stays the same.
    fn complain(&self, why: String) {
        let mut last = self.unreadable.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if last.as_ref() != Some(&why) {
            log::warn!("{}: cannot read what the drive reports; I/O goes on: {why}", self.name);
            *last = Some(why);
        }
    }

    /// Makes every write to a namespace that was answered so far durable.
    pub fn flush(&self, namespace: u32) -> Result<(), String> {
        let timeout = self.controller.options().io_timeout;
        let mut blocking = self.controller.blocking(namespace, timeout).map_err(|error| error.to_string())?;
        blocking.flush().map_err(|error| error.to_string())
    }

    /// Logs what the drive tells without being asked.
    fn log_event(&self, event: &Event) {
        let name = &self.name;
        match event {
            Event::Error { information, entries } => {
                log::warn!(
                    "{name}: the drive reports error event {information}; its newest log entry: {:?}",
                    entries.first()
                );
            }
            Event::Health { information, health } => {
                log::warn!("{name}: the drive reports health event {information}: {health:?}");
            }
            Event::NamespacesChanged(changed) => {
                log::warn!(
                    "{name}: namespaces have changed ({changed:?}); exports go on with what they were until a restart"
                );
            }
            Event::FirmwareActivation => log::warn!("{name}: new firmware is being activated; requests may wait"),
            other => log::info!("{name}: the drive reports {other:?}"),
        }
    }

    /// Takes the controller out of operation: it is stopped first, so that it touches no memory any more, and then
    /// everything that waits for it is answered with an I/O error. Nothing happens the second time.
    pub fn fail(&self, why: &str) {
        // With this lock no pair appears that would be missed here.
        let pairs = self.pairs();
        if self.failed.set(why.to_owned()).is_err() {
            return;
        }
        log::error!(
            "{}: the controller is out of operation: {why}; its disks answer with I/O errors until this program is restarted",
            self.name
        );
        if let Err(error) = self.controller.disable() {
            log::error!("{}: it cannot be stopped either: {error}", self.name);
        }
        for pair in pairs.iter() {
            if let Err(error) = self.pool.fail_queue_pair(pair.id) {
                log::error!("{}: {error}", self.name);
            }
        }
    }

    /// Tells the controller that we are leaving, so that it saves what it holds.
    pub fn shutdown(&self) {
        if self.failed.get().is_none()
            && let Err(error) = self.controller.shutdown()
        {
            log::warn!("{}: shutdown notification failed: {error}", self.name);
        }
    }
}

impl fmt::Display for Drive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Entries of a queue pair, whatever the ring's size: enough to keep a drive busy, and no more memory than that is worth
/// (a page for every entry).
const MIN_ENTRIES: u16 = 64;
const MAX_ENTRIES: u16 = 1024;

/// Bounce buffers of a queue pair, for buffers the drive cannot reach where they are.
const BOUNCE_BYTES: usize = 128 << 10;

/// How much longer than a command a lane may take to stop.
const STOP_MARGIN: Duration = Duration::from_secs(10);

/// A lane's place on a queue pair; given back when dropped.
pub struct Lease {
    drive: Arc<Drive>,
    pair: PairId,
}

impl Lease {
    /// Puts a lane there.
    pub fn start(&self, lane: Lane) -> LaneHandle {
        self.drive.pool.start_lane(self.pair, lane)
    }

    /// Takes a lane from there when all its requests have ended; `None` if its worker died with it. A controller that does not let
    /// them end is taken out of operation.
    pub fn stop(&self, handle: LaneHandle) -> Option<StoppedLane> {
        // Every request under way has to end first, and the controller's own deadline is the longest there is.
        let deadline = self.drive.controller.options().io_timeout + STOP_MARGIN;
        match handle.stop(deadline) {
            Ok(stopped) => Some(stopped),
            Err(StopError::StillBusy(busy)) => {
                self.drive.fail(&busy.to_string());
                // Nothing is left to wait for but the worker's turn.
                busy.lane.wait(deadline).inspect_err(|error| log::error!("{error}")).ok()
            }
            Err(error) => {
                log::error!("{error}");
                None
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.drive.release(self.pair);
    }
}

#[cfg(feature = "sim")]
pub use embedded::Embedded;

#[cfg(feature = "sim")]
mod embedded {
    use nvme_sim::{SimAddress, Simulator};
    use tempfile::TempDir;

    /// A controller in software inside this process, behind a socket of its own that nobody else can reach.
    pub struct Embedded {
        simulator: Simulator,
        _directory: TempDir,
    }

    impl Embedded {
        /// Starts it. The error is one line.
        pub fn start(description: &str) -> Result<Embedded, String> {
            let cannot = |error: nvme_sim::Error| format!("cannot start the embedded controller: {error}");
            let address: SimAddress = description.parse().map_err(cannot)?;
            let directory = tempfile::Builder::new()
                .prefix("vhost-blk-")
                .tempdir()
                .map_err(|error| format!("cannot create a directory for the embedded controller's socket: {error}"))?;
            let simulator = Simulator::start(address.config, &directory.path().join("nvme.sock")).map_err(cannot)?;
            Ok(Embedded { simulator, _directory: directory })
        }

        /// Where to open it.
        pub fn address(&self) -> vfio::Address {
            vfio::Address::VfioUser(self.simulator.socket().to_owned())
        }
    }
}

#[cfg(not(feature = "sim"))]
use absent::Embedded;

#[cfg(not(feature = "sim"))]
mod absent {
    /// There is none in this build.
    pub enum Embedded {}

    impl Embedded {
        pub fn start(_description: &str) -> Result<Embedded, String> {
            Err("this program was built without its embedded controller (feature \"sim\"): use another device".into())
        }

        pub fn address(&self) -> vfio::Address {
            match *self {}
        }
    }
}
