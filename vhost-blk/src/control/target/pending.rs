//! Pending drives: a drive whose disks are not all served yet is opened again and again until they are. Disks of other drives
//! never wait for it.
//!
//! This module owns what is not served yet: the drive's disks and their sockets. It never waits: an attempt to open a drive, which
//! may take minutes, has a thread of its own.
//!
//! A front-end that connects to a socket which nobody serves stands still (QEMU with its monitor), one that is refused tries
//! again. So a socket is open from the start, lest front-ends be refused while a drive comes up as it should; it is closed when
//! that fails or takes long, and bound again when the drive is there. One that somebody else has opened could not be had again:
//! front-ends are accepted there and disconnected at once, and try again, too.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use nvme_driver::Options;

use super::error::Defect;
use super::registry::Registry;
use super::unserved::leave;
use crate::control::config::ExportSettings;
use crate::datapath::worker::WorkerPool;
use crate::drive::{self, DeviceAddress, Drive, Failure, OpenError, longer};
use crate::vhost_user::export::Export;
use crate::vhost_user::listener::{ListenError, Listener};
use crate::virtio::memory::Budget;

/// How long the sockets of a drive are open while it comes up for the first time, and how long the program's start waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What every attempt to open a drive needs.
pub(super) struct OpenContext {
    /// The controllers' options, each with its own.
    pub options: Vec<(DeviceAddress, Options)>,
    /// How long requests wait for a drive that goes.
    pub hold: Duration,
    /// The workers.
    pub pool: Arc<WorkerPool>,
    /// What front-ends may have mapped.
    pub budget: Arc<Budget>,
}

/// A drive, and those of its disks that are not served yet.
pub(super) struct PendingDrive {
    address: DeviceAddress,
    context: Arc<OpenContext>,
    drive: Option<Arc<Drive>>,
    disks: Vec<PendingDisk>,
    next: Step,
    /// The pause after the last failure; it grows.
    pause: Duration,
    /// Why it is pending, as the log and the service manager are told.
    why: Option<String>,
    /// Only a change of the configuration, or of the set-up of this machine, can help.
    needs_setup: bool,
    /// The log is told when the reason changes. Not before the program has started: until then the reason may be its error.
    tells: bool,
}

/// What is next for a pending drive.
enum Step {
    /// An attempt to open it, at this time.
    AttemptAt(Instant),
    /// An attempt is under way.
    Attempting { began: Instant, result: Receiver<Result<OpenedDrive, OpenError>> },
}

/// A disk that is not served yet.
struct PendingDisk {
    /// Of the export in the whole program.
    number: usize,
    settings: ExportSettings,
    /// Its namespace, if it was found.
    export: Option<Arc<Export>>,
    /// Its socket, if it is bound.
    listener: Option<Listener>,
    /// Why it has no socket.
    unbound: Option<ListenError>,
}

/// What an attempt has opened.
struct OpenedDrive {
    drive: Arc<Drive>,
    disks: Vec<OpenedDisk>,
}

/// What an attempt has opened for one disk.
struct OpenedDisk {
    export: Option<Arc<Export>>,
    /// If it was asked for.
    listener: Option<Listener>,
    /// Why there is no such namespace.
    why: Option<drive::Error>,
    /// Why there is no such socket.
    unbound: Option<ListenError>,
}

impl PendingDrive {
    /// The drives of these exports, each with all that are of it; `listeners` are in the order of the exports.
    pub(super) fn all(
        exports: &[ExportSettings],
        listeners: Vec<Result<Listener, ListenError>>,
        context: &Arc<OpenContext>,
    ) -> Vec<PendingDrive> {
        let mut all: Vec<PendingDrive> = Vec::new();
        for (number, (settings, listener)) in exports.iter().zip(listeners).enumerate() {
            let (listener, unbound) = listener.map_or_else(|why| (None, Some(why)), |listener| (Some(listener), None));
            let disk = PendingDisk { number, settings: settings.clone(), export: None, listener, unbound };
            match all.iter_mut().find(|pending| pending.address == settings.device) {
                Some(pending) => pending.disks.push(disk),
                None => all.push(PendingDrive {
                    address: settings.device.clone(),
                    context: context.clone(),
                    drive: None,
                    disks: vec![disk],
                    next: Step::AttemptAt(Instant::now()),
                    pause: Duration::ZERO,
                    why: None,
                    needs_setup: false,
                    tells: false,
                }),
            }
        }
        all
    }

    /// Whether all is served.
    pub(super) fn done(&self) -> bool {
        self.disks.is_empty()
    }

    /// Why it is pending; `None`: all is served, or the first attempt is still under way.
    pub(super) fn why(&self) -> Option<&str> {
        self.why.as_deref().filter(|_| !self.done())
    }

    /// Whether only a change of the configuration, or of the set-up of this machine, can help, as far as is known.
    pub(super) fn needs_setup(&self) -> bool {
        self.needs_setup && !self.done()
    }

    /// Tells the log why it is pending, now and when that changes.
    pub(super) fn tell(&mut self) {
        self.tells = true;
        if let Some(why) = self.why() {
            let sockets = self.disks.iter().map(|disk| disk.settings.listen.to_string()).collect::<Vec<_>>().join(", ");
            log::error!("{why}; no disk is served on {sockets} until this is corrected; retrying");
        }
    }

    /// Takes a step if there is one to take; waits for nothing. The error is one for which the program has to end.
    /// The thread that calls this is woken when an attempt that it has begun ends.
    pub(super) fn step(&mut self, registry: &Registry) -> Result<(), Defect> {
        if self.done() {
            return Ok(());
        }
        match &self.next {
            Step::AttemptAt(time) if *time <= Instant::now() => {
                if let Err(error) = self.begin() {
                    self.attempt_ended(Err(error), registry)?;
                }
            }
            Step::AttemptAt(_) => {}
            Step::Attempting { began, result } => match result.try_recv() {
                Ok(result) => self.attempt_ended(result, registry)?,
                Err(TryRecvError::Disconnected) => {
                    return Err(Defect::Open { drive: self.address.clone() });
                }
                Err(TryRecvError::Empty) if self.why.is_none() && began.elapsed() >= PATIENCE && !self.is_vital() => {
                    self.pend(format!("{} has not come up within {PATIENCE:?}", self.address))?;
                }
                Err(TryRecvError::Empty) => {}
            },
        }
        if self.why.is_some() {
            self.turn_away();
        }
        Ok(())
    }

    /// Whether the program ends without it: a front-end that was handed over connected cannot come again.
    fn is_vital(&self) -> bool {
        self.disks.iter().any(|disk| matches!(disk.listener, Some(Listener::Connected(_))))
    }

    /// Begins an attempt. It has a thread of its own, as a controller may take minutes.
    fn begin(&mut self) -> Result<(), OpenError> {
        let (address, context, drive) = (self.address.clone(), self.context.clone(), self.drive.clone());
        let wanted = self.disks.iter().map(|disk| {
            let PendingDisk { number, settings, export, listener, .. } = disk;
            DiskRequest {
                number: *number,
                settings: settings.clone(),
                export: export.clone(),
                bind: listener.is_none(),
            }
        });
        let wanted: Vec<DiskRequest> = wanted.collect();
        let (result, receiver) = mpsc::channel();
        let waiter = std::thread::current();
        let run = move || {
            // Nobody hears it any more when the program ends: what was found is closed then.
            let _ = result.send(attempt(&address, &context, drive, wanted));
            waiter.unpark();
        };
        std::thread::Builder::new()
            .name("open-drive".into())
            .spawn(run)
            .map_err(|source| OpenError::Unusable(Failure::Thread { address: self.address.clone(), source }.into()))?;
        self.next = Step::Attempting { began: Instant::now(), result: receiver };
        Ok(())
    }

    fn attempt_ended(&mut self, result: Result<OpenedDrive, OpenError>, registry: &Registry) -> Result<(), Defect> {
        self.needs_setup = matches!(&result, Ok(_) | Err(OpenError::Denied(_)));
        let failed = match result {
            Ok(found) => self.add_opened(found, registry)?.map(|why| (why, longer(&mut self.pause))),
            Err(error) => {
                let (why, pause) = (error.to_string(), error.pause(&mut self.pause));
                let unbound = self.disks.iter().filter_map(|disk| disk.unbound.as_ref()).map(ToString::to_string);
                let reasons: Vec<String> = std::iter::once(why).chain(unbound).collect();
                Some((reasons.join("; "), pause))
            }
        };
        match failed {
            Some((why, pause)) => {
                self.next = Step::AttemptAt(Instant::now() + pause);
                self.pend(why)?;
            }
            // What is left lacks its socket, which was closed meanwhile.
            None => self.next = Step::AttemptAt(Instant::now()),
        }
        if self.done() && self.tells {
            log::warn!("{}: the drive is there; its disks are served now", self.address);
        }
        Ok(())
    }

    /// Serves the disks that can be served. The answer is why that is not all of them.
    fn add_opened(&mut self, found: OpenedDrive, registry: &Registry) -> Result<Option<String>, Defect> {
        if self.drive.is_none() {
            registry.add_drive(found.drive.clone())?;
            self.drive = Some(found.drive);
        }
        let mut reasons: Vec<String> = Vec::new();
        let mut note = |why: String| {
            if !reasons.contains(&why) {
                reasons.push(why);
            }
        };
        for (mut disk, found) in std::mem::take(&mut self.disks).into_iter().zip(found.disks) {
            let unbound = found.unbound.or(disk.unbound.take().filter(|_| found.listener.is_none()));
            unbound.iter().for_each(|error| note(error.to_string()));
            found.why.iter().for_each(|error| note(error.to_string()));
            match (found.export, disk.listener.take().or(found.listener)) {
                (Some(export), Some(listener)) => registry.add_disk(export, listener)?,
                (export, listener) => self.disks.push(PendingDisk { export, listener, unbound, ..disk }),
            }
        }
        Ok((!reasons.is_empty()).then(|| reasons.join("; ")))
    }

    /// Some of its disks cannot be served: they stay pending, without front-ends. A socket that we can bind again is closed.
    fn pend(&mut self, why: String) -> Result<(), Defect> {
        if self.is_vital() {
            return Err(Defect::ConnectedFrontEnd(why));
        }
        for disk in &mut self.disks {
            disk.listener.take_if(|listener| matches!(listener, Listener::Listening(Some(_), _)));
        }
        if self.why.as_ref() != Some(&why) {
            self.why = Some(why);
            if self.tells {
                self.tell();
            }
        }
        Ok(())
    }

    /// Leaves the front-ends that have come to a socket that cannot be closed.
    fn turn_away(&self) {
        for disk in &self.disks {
            let Some(Listener::Listening(None, socket)) = &disk.listener else { continue };
            let left = leave(socket);
            if left > 0 {
                log::debug!("{}: {left} front-ends have to come again: the drive is not there", disk.settings.listen);
            }
        }
    }
}

/// What an attempt is to open for one disk.
struct DiskRequest {
    number: usize,
    settings: ExportSettings,
    /// Known already.
    export: Option<Arc<Export>>,
    /// It needs a socket.
    bind: bool,
}

fn attempt(
    address: &DeviceAddress,
    context: &OpenContext,
    drive: Option<Arc<Drive>>,
    wanted: Vec<DiskRequest>,
) -> Result<OpenedDrive, OpenError> {
    let OpenContext { options, hold, pool, budget } = context;
    let drive = match drive {
        Some(drive) => drive,
        None => {
            let options = options.iter().find(|(of, _)| of == address).map(|(_, options)| options.clone());
            Arc::new(Drive::open(address, &options.unwrap_or_default(), *hold, pool.clone())?)
        }
    };
    let look = |wanted: DiskRequest| {
        let DiskRequest { number, settings, export, bind } = wanted;
        let new = || Export::new(&settings, drive.clone(), budget, number).map(Arc::new);
        let export = export.map_or_else(new, Ok);
        let (export, why) = match export {
            Ok(export) => (Some(export), None),
            Err(why) => (None, Some(why)),
        };
        match (bind && export.is_some()).then(|| Listener::open_now(&settings.listen)) {
            None => OpenedDisk { export, listener: None, why, unbound: None },
            Some(Ok(listener)) => OpenedDisk { export, listener: Some(listener), why, unbound: None },
            Some(Err(unbound)) => OpenedDisk { export, listener: None, why, unbound: Some(unbound) },
        }
    };
    let disks = wanted.into_iter().map(look).collect();
    Ok(OpenedDrive { drive, disks })
}
