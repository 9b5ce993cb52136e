//! The handle of a running controller.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crate::config::{Config, NamespaceConfig};
use crate::config_space::BarLayout;
use crate::controller::Controller;
use crate::dma::SharedBytes;
use crate::error::Error;
use crate::faults::FaultControl;
use crate::patch::{IdentifyPatch, RegisterPatch};
use crate::registers::DOORBELLS;
use crate::server;
use crate::shared::{Counters, PowerLoss, Request, Shared};

/// A running controller: one thread for messages, one for data. It stops, and its socket goes, when this is dropped.
pub struct Simulator {
    shared: Arc<Shared>,
    socket: PathBuf,
    /// The listening socket, in the type that has `shutdown`.
    listener: UnixStream,
    data_thread: Option<JoinHandle<()>>,
}

impl Simulator {
    /// Starts a controller and listens for front-ends on `socket`. A socket left behind by a dead process is replaced.
    ///
    /// # Errors
    /// A setting that cannot be, a file that cannot be used, a socket that somebody listens on already.
    pub fn start(config: Config, socket: &Path) -> Result<Simulator, Error> {
        config.check()?;
        let layout = BarLayout::new(config.max_queue_pairs, config.doorbell_stride);
        let bytes = layout.bytes as usize;
        let memory = |source| Error::Memory { what: "the doorbells", bytes: layout.bytes, source };
        let (file, _) = SharedBytes::memory_file(c"nvme-sim-bar0", bytes).map_err(memory)?;
        let doorbells = SharedBytes::of_file(&file, DOORBELLS, layout.doorbell_bytes as usize, true).map_err(memory)?;
        let shared = Arc::new(Shared::new(config, layout, doorbells));
        let controller = Controller::new(shared.clone())?;
        let listener = listen(socket).map_err(|source| Error::Socket { path: socket.into(), source })?;
        let served = listener.try_clone().map_err(|source| Error::Socket { path: socket.into(), source })?;
        let mut simulator = Simulator {
            shared: shared.clone(),
            socket: socket.into(),
            listener: OwnedFd::from(listener).into(),
            data_thread: None,
        };
        let thread = std::thread::Builder::new().name("nvme-sim".into());
        let data_thread = thread.spawn(move || controller.run()).map_err(Error::Thread)?;
        // The cell was empty: this is the only place that sets it.
        let _ = shared.data_thread.set(data_thread.thread().clone());
        simulator.data_thread = Some(data_thread);
        let thread = std::thread::Builder::new().name("nvme-sim-msg".into());
        let serve = move || server::serve(shared, OwnedFd::from(served), file);
        thread.spawn(serve).map_err(Error::Thread)?;
        log::info!("listening on {}", socket.display());
        Ok(simulator)
    }

    /// The path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Changes the faults while the controller runs.
    pub fn faults(&self) -> &FaultControl {
        &self.shared.faults
    }

    /// What the controller has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Cuts the power: all unflushed writes of the volatile write cache are lost, commands too, and the controller is as after
    /// power-on (CC and CSTS are 0). Returns how many blocks were lost.
    ///
    /// # Errors
    /// The controller's thread is gone.
    pub fn power_cut(&self) -> Result<u64, Error> {
        self.power_cut_losing(PowerLoss::All)
    }

    /// Cuts the power and restores it: all or a random part of the unflushed blocks are lost. Returns how many blocks were
    /// lost.
    ///
    /// # Errors
    /// The controller's thread is gone.
    pub fn power_cut_losing(&self, loss: PowerLoss) -> Result<u64, Error> {
        self.shared.ask(Request::PowerCut(loss))
    }

    /// Pulls the controller out: registers and configuration space read all ones, doorbells do nothing.
    pub fn remove(&self) {
        self.shared.faults.set_removed(true);
    }

    /// Puts a removed controller back, as after power-on: unflushed writes of the volatile write cache are lost.
    ///
    /// # Errors
    /// The controller's thread is gone.
    pub fn reinsert(&self) -> Result<(), Error> {
        self.power_cut()?;
        self.shared.faults.set_removed(false);
        Ok(())
    }

    /// Adds a namespace, tells the host (an asynchronous event, if it wants them) and returns its identifier.
    ///
    /// # Errors
    /// A setting that cannot be, a file that cannot be used, too many namespaces.
    pub fn add_namespace(&self, config: NamespaceConfig) -> Result<u32, Error> {
        self.shared.ask(Request::AddNamespace(config)).map(|id| id as u32)
    }

    /// Takes a namespace away and tells the host. Memory behind it is lost; a file stays.
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn remove_namespace(&self, id: u32) -> Result<(), Error> {
        self.shared.ask(Request::RemoveNamespace(id)).map(drop)
    }

    /// Changes a namespace's size in bytes (whole blocks) and tells the host. What lay beyond a smaller size is lost, except in
    /// a file.
    ///
    /// # Errors
    /// There is no such namespace, or not enough room.
    pub fn resize(&self, id: u32, bytes: u64) -> Result<(), Error> {
        self.shared.ask(Request::Resize(id, bytes)).map(drop)
    }

    /// Write-protects a namespace, or no longer, and tells the host.
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn protect(&self, id: u32, read_only: bool) -> Result<(), Error> {
        self.shared.ask(Request::Protect(id, read_only)).map(drop)
    }

    /// Has Identify say something else from now on: `patches` takes the place of [`Config::identify`]. The host is not told.
    ///
    /// # Errors
    /// Bytes outside of the data structure.
    pub fn patch_identify(&self, patches: Vec<IdentifyPatch>) -> Result<(), Error> {
        patches.iter().try_for_each(IdentifyPatch::check)?;
        self.shared.ask(Request::Identify(patches)).map(drop)
    }

    /// Has registers read otherwise from now on: `patches` takes the place of [`Config::registers`].
    ///
    /// # Errors
    /// Bytes outside of the registers that only the controller writes.
    pub fn patch_registers(&self, patches: Vec<RegisterPatch>) -> Result<(), Error> {
        patches.iter().try_for_each(RegisterPatch::check)?;
        self.shared.registers().patches = patches;
        Ok(())
    }

    /// Entries of the admin submission queue and of the admin completion queue, as the host has set them (AQA); 1 before that.
    pub fn admin_queue_entries(&self) -> (u32, u32) {
        let aqa = self.shared.registers().admin_attributes;
        ((aqa & 0xfff) + 1, (aqa >> 16 & 0xfff) + 1)
    }

    /// Stops the controller and removes its socket, as dropping does.
    ///
    /// A front-end that is still connected finds the registers reading all ones from then on; its connection is served until
    /// it closes it.
    pub fn stop(self) {}
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // Release: pairs with the loads in the two threads; nothing else is published by it.
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        let _ = std::fs::remove_file(&self.socket);
        if let Some(thread) = self.data_thread.take() {
            let _ = thread.join();
        }
        self.shared.dma.clear();
        self.shared.interrupts.disable_all();
        // Ends an accept in the message thread. With a front-end connected the thread ends when that one goes.
        let _ = self.listener.shutdown(Shutdown::Both);
    }
}

/// Listens on `path`; a socket nobody listens on any more is replaced.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return result,
    }
    use std::os::unix::fs::FileTypeExt;
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is not a socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on it")),
    }
}
