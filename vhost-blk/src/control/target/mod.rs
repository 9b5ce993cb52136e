//! Everything that one run of the program serves: workers, drives, disks, and the control loop.
//!
//! A [`Target`] owns them all and ends them in their order. Disks of one drive never wait for another drive, and nothing here
//! touches a ring or a queue pair.

mod control_loop;
mod error;
mod pending;
pub(in crate::control) mod registry;
mod unserved;

use std::sync::{Arc, Mutex, PoisonError};

use nvme_driver::Options;

use crate::control::config::{Configuration, RefusedExport, Settings};
use crate::control::rpc::{RpcServer, RpcSocket};
use crate::control::service_manager;
use crate::datapath::counters::Tally;
use crate::datapath::worker::WorkerPool;
use crate::event::EventFd;
use crate::vhost_user::Server;
use crate::vhost_user::export::Export;
use crate::vhost_user::listener::{self, Handed, ListenError, Listener, Sockets};
use crate::virtio::memory::Budget;
use control_loop::{ControlLoop, LOOP_INTERVAL, Status, describe};
pub use error::{Defect, Ended, StartError};
use pending::{OpenContext, PendingDrive};
use registry::{Registry, Served, Termination};
use unserved::Unserved;

/// A running target. Dropping it stops serving: rings are drained, controllers shut down, sockets removed.
pub struct Target {
    // In this order they are dropped: nothing that is used goes first.
    rpc: Option<RpcServer>,
    registry: Arc<Registry>,
    control_loop: Option<ControlLoop>,
    status: Arc<Mutex<Status>>,
    _pool: Arc<WorkerPool>,
}

impl Target {
    /// Opens every controller once, binds every socket and starts to serve. A drive that is not there, or does not come up, is
    /// waited for, and so is a socket that cannot be bound: only those exports are not served yet. A CPU that cannot be had is
    /// done without.
    ///
    /// # Errors
    /// Nothing can be served, and nothing can be waited for: what is wrong with the set-up of this machine.
    pub fn start(settings: &Settings) -> Result<Target, StartError> {
        let options = Options { io_timeout: settings.timeouts.io_timeout, ..Options::default() };
        Target::start_with(settings, &options)
    }

    /// Serves a configuration like [`Target::start`], also on sockets that the service manager hands over. Exports that make no
    /// sense are told to the log, and not served.
    pub fn start_on(configuration: &Configuration, handed: Vec<Handed>) -> Result<Target, StartError> {
        let Configuration { settings, refused } = configuration;
        let options = Options { io_timeout: settings.timeouts.io_timeout, ..Options::default() };
        Target::run(settings, refused, &options, handed)
    }

    /// Serves like [`Target::start`], with the controllers opened as `options` say. Their time for a command counts, not that of
    /// the settings.
    pub fn start_with(settings: &Settings, options: &Options) -> Result<Target, StartError> {
        Target::run(settings, &[], options, Vec::new())
    }

    fn run(
        settings: &Settings,
        refused: &[RefusedExport],
        options: &Options,
        handed: Vec<Handed>,
    ) -> Result<Target, StartError> {
        // The cheap and likely errors first: sockets before drives.
        let rpc = settings.rpc_socket.as_deref().map(RpcSocket::bind).transpose()?;
        let Sockets { listeners, unwanted } =
            listener::open_all(&settings.exports.iter().map(|export| &export.listen).collect::<Vec<_>>(), handed);
        let mut unserved = Unserved::new(refused, unwanted);
        let listeners = at_least_one(listeners)?;
        let pool = Arc::new(WorkerPool::start(&settings.cpus).map_err(StartError::Workers)?);
        unserved.lacks_workers(pool.unpinned());
        let termination = Arc::new(Termination::new(settings.exports.len()).map_err(StartError::Event)?);
        let total = settings.exports.len() + refused.len();
        let registry = Arc::new(Registry { total, served: Mutex::default(), termination, pool: pool.clone() });
        let status = Arc::<Mutex<Status>>::default();
        // Whatever fails from here on, what has started is stopped in its order.
        let mut target =
            Target { rpc: None, registry: registry.clone(), control_loop: None, status, _pool: pool.clone() };
        let budget = Budget::new(settings.memory, settings.exports.len());
        let devices = settings.exports.iter().map(|export| &export.device);
        let options = devices.map(|device| (device.clone(), settings.options(device, options))).collect();
        let context = OpenContext { options, hold: settings.timeouts.hold, pool: pool.clone(), budget };
        settings.drives.iter().for_each(|drive| log::info!("{drive}"));
        // All of them at once: one that is slow keeps nobody waiting.
        let mut pending = PendingDrive::all(&settings.exports, listeners, &Arc::new(context));
        loop {
            for drive in &mut pending {
                drive.step(&registry)?;
            }
            if pending.iter().all(|drive| drive.done() || drive.why().is_some()) {
                break;
            }
            std::thread::park_timeout(LOOP_INTERVAL);
        }
        pending.retain(|drive| !drive.done());
        // Nothing is served, and nothing can be waited for.
        let nothing = registry.served().servers.is_empty();
        if let Some(why) = pending.first().filter(|_| nothing).and_then(PendingDrive::why)
            && pending.iter().all(PendingDrive::needs_setup)
        {
            pending[1..].iter().filter_map(PendingDrive::why).for_each(|why| log::error!("{why}"));
            return Err(StartError::NoDisk(why.to_owned()));
        }
        pending.iter_mut().for_each(PendingDrive::tell);
        if let Some(text) = describe(&registry, &pending, &unserved) {
            target.status.lock().unwrap_or_else(PoisonError::into_inner).update(text);
        }
        let control_loop = ControlLoop::start(registry.clone(), pending, unserved, pool, target.status.clone());
        target.control_loop = Some(control_loop.map_err(StartError::ControlLoop)?);
        // Clients that have come meanwhile wait.
        target.rpc = rpc.map(|socket| RpcServer::start(socket, registry)).transpose()?;
        Ok(target)
    }

    /// Tells the service manager that everything that can be served is, and from now on whenever that changes.
    pub fn tell_ready(&self) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.ready = true;
        service_manager::notify(&["READY=1", &format!("STATUS={}", status.text)]);
    }

    /// Readable when there is nothing more to serve: every export's front-end was inherited connected and is gone, or a
    /// defect of this program ended it.
    pub fn ended(&self) -> &EventFd {
        &self.registry.termination.event
    }

    /// Stops serving, and logs the counters at the end of it all.
    ///
    /// # Errors
    /// Serving had ended by itself before.
    pub fn stop(mut self) -> Result<(), Ended> {
        let exports = self.halt();
        exports.iter().for_each(|export| export.tell_left_out(true));
        exports.iter().for_each(|export| export.log_counters());
        self.registry.termination.reason()
    }

    /// Ends every session, then the controllers.
    fn halt(&mut self) -> Vec<Arc<Export>> {
        self.rpc = None;
        let servers = {
            let mut served = self.registry.served();
            served.stopping = true;
            std::mem::take(&mut served.servers)
        };
        // All of them at once: each may have requests to wait for.
        servers.iter().for_each(Server::ask_to_stop);
        let exports = servers.into_iter().map(|server| server.export().clone()).collect();
        self.control_loop = None;
        let Served { supervisors, drives, .. } = std::mem::take(&mut *self.registry.served());
        drop(supervisors);
        drives.iter().for_each(|drive| drive.shutdown());
        exports
    }

    /// The counters of all rings together, since the start: of those that have stopped, too.
    pub fn totals(&self) -> Tally {
        let mut sum = Tally::default();
        self.registry.served().servers.iter().for_each(|server| sum += server.export().totals());
        sum
    }

    /// Logs the counters of every ring.
    pub fn log_counters(&self) {
        self.registry.served().servers.iter().for_each(|server| server.export().log_counters());
    }
}

/// The sockets, if there is one at least. If not, the error is why the first one is not there; the log has the others.
fn at_least_one(
    listeners: Vec<Result<Listener, ListenError>>,
) -> Result<Vec<Result<Listener, ListenError>>, ListenError> {
    if listeners.iter().any(Result::is_ok) {
        return Ok(listeners);
    }
    let mut errors = listeners.into_iter().filter_map(Result::err);
    let first = errors.next();
    errors.for_each(|error| log::error!("{error}"));
    first.map_or_else(|| Ok(Vec::new()), Err)
}

impl Drop for Target {
    fn drop(&mut self) {
        self.halt();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nvme_sim::{Config, Simulator};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::control::config::{ExportSettings, Listen};
    use crate::drive::DeviceAddress;

    #[test]
    fn a_thread_that_dies_ends_the_program() {
        for (place, message) in [
            ("server panics", "died: asked to by a test; it is safe"),
            ("supervisor panics", "supervisor panics died (see the panic above); it is safe"),
            ("control loop panics", "the control loop died: asked to by a test; it is safe"),
            ("rpc panics", "the thread of the control socket died: asked to by a test; it is safe"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (nvme, socket) = (folder.path().join(format!("nvme {place}")), folder.path().join(place));
            let _simulator = Simulator::start(Config::default(), &nvme).unwrap();
            let export = ExportSettings {
                device: DeviceAddress::Vfio(vfio::Address::VfioUser(nvme)),
                listen: Listen::Path(socket.clone()),
                namespace: None,
                queues: 1,
                queue_size: 64,
                queue_pairs: None,
                read_only: false,
                serial: None,
            };
            let rpc_socket = folder.path().join(format!("{place}.rpc"));
            let settings =
                Settings { exports: vec![export], rpc_socket: Some(rpc_socket.clone()), ..Settings::default() };
            let target = Target::start(&settings).unwrap();
            let _front_end = UnixStream::connect(&socket).unwrap();
            let _client = UnixStream::connect(&rpc_socket).unwrap();
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            let ends = poll(&mut [PollFd::new(target.ended(), PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(ends, 1, "{place}: nobody notices");
            let error = target.stop().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
