//! Detaching a drive: the controller is stopped, lanes keep what it has not answered, and the device is kept open or closed.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::{Controller, Error};
use vfio::{Device, DmaAddresses, Notice, ServerIdentity};

use super::shares::LeasedSlot;
use super::{Attached, Condition, Drive, State};
use crate::datapath::trial::{Suspicion, Trial};

/// Between two looks at what a drive has still to answer.
const DRAIN_LOOK: Duration = Duration::from_millis(1);

/// A detached drive.
pub(super) struct Detached {
    pub cause: DetachCause,
    pub since: Instant,
    /// The hold timeout has passed: requests fail.
    pub hold_expired: bool,
    /// The contents of its volatile write cache have to be taken for lost.
    pub cache_lost: bool,
    /// Unsafe shutdowns that the SMART / Health log counted before the drive was detached.
    pub unsafe_shutdowns: Option<u128>,
    /// DMA addresses that the controller may still write to if it ignores resets: they are not used when it is opened again.
    pub addresses: DmaAddresses,
    /// The vfio-user server that served the device. Another server has lost what this one had in memory.
    pub server: ServerIdentity,
    /// The device, if it is still open.
    pub kept: Option<OpenDevice>,
}

/// A device that is kept open while its drive is detached: its function has been reset, and its DMA mappings stay.
pub(super) struct OpenDevice {
    pub controller: Controller,
    pub device: Device,
}

/// Why a drive is detached.
#[derive(Clone, Debug)]
pub enum DetachCause {
    /// The controller has failed.
    Failed(String),
    /// The device is gone.
    Gone(String),
    /// The kernel wants the device back.
    WantedBack,
}

impl From<&Error> for DetachCause {
    fn from(error: &Error) -> DetachCause {
        match error.is_gone() {
            true => DetachCause::Gone(error.to_string()),
            false => DetachCause::Failed(error.to_string()),
        }
    }
}

impl From<Notice> for DetachCause {
    fn from(notice: Notice) -> DetachCause {
        match notice {
            Notice::RemovalRequested => DetachCause::WantedBack,
            Notice::Disconnected => DetachCause::Gone(notice.to_string()),
            _ => DetachCause::Failed(notice.to_string()),
        }
    }
}

impl fmt::Display for DetachCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DetachCause::Failed(why) | DetachCause::Gone(why) => f.write_str(why),
            DetachCause::WantedBack => Notice::RemovalRequested.fmt(f),
        }
    }
}

impl Drive {
    /// Detaches the drive. The controller is stopped first, so that it no longer accesses memory. Requests that it has not answered
    /// wait for the drive to be reattached. A device that is gone or cannot be reset is closed. Does nothing if the drive is
    /// detached already.
    pub fn detach(&self, cause: DetachCause) {
        // With this lock no slot appears that would be missed here.
        let mut state = self.state();
        let since = Instant::now();
        if !matches!(state.condition, Condition::Attached(_)) {
            return;
        }
        let condition = std::mem::replace(&mut state.condition, Condition::Closed);
        let Condition::Attached(Attached { device, controller, unsafe_shutdowns, .. }) = condition else { return };
        let slots = self.shares().slots().to_vec();
        // What disappears has lost its power.
        let mut cache_lost = matches!(cause, DetachCause::Gone(_));
        log::error!("{}: out of operation: {cause}; requests wait for it, {:?} at most", self.name, self.hold);
        // As long as there is this seat, slots that are paused wait.
        let pause = Arc::new(Trial::default());
        let seat = pause.seat();
        if let DetachCause::WantedBack = cause
            && let Err(error) = self.shut_down(&controller, &slots, &pause)
        {
            log::warn!("{}: its cache could not be saved before it is removed: {error}", self.name);
            cache_lost = true;
        }
        let stopped = controller.disable();
        if let Err(error) = &stopped {
            log::error!(
                "{}: the controller cannot be stopped, so that its access to the guests' memory is removed: {error}",
                self.name
            );
            self.memory.detach();
        }
        // A function that was reset has forgotten whatever its controller did not (PCI Express Base 4.0, 6.6.2).
        let is_kept = matches!(cause, DetachCause::Failed(_)) && stopped.is_ok() && self.reset_function(&device);
        // What makes a drive disappear, time and again, is as bad as what makes it fail.
        let failed = !matches!(cause, DetachCause::WantedBack);
        let addresses = device.dma().handed_out();
        let server = device.server();
        let detached =
            Detached { cause, since, hold_expired: false, cache_lost, unsafe_shutdowns, addresses, server, kept: None };
        let mut lost = Vec::new();
        for slot in &slots {
            match self.pool.detach_drive(slot.id) {
                Ok(detached) => lost.extend(detached),
                Err(error) => log::error!("{}: cannot take a queue pair from its worker: {error}", self.name),
            }
        }
        drop(seat);
        let suspicion = match failed {
            true => {
                let outstanding: Vec<_> = lost.iter().map(|lost| lost.outstanding).collect();
                Suspicion::of(&outstanding, since, self.options.io_timeout)
            }
            false => Suspicion::Nobody,
        };
        // All of them are asked.
        let judged = slots.iter().map(|slot| self.pool.judge(slot.id, suspicion));
        state.last_tries = judged.fold(false, |some, last_tries| some | last_tries.unwrap_or(false));
        state.trial = None;
        // The controller's own memory goes when it has been told to leave it alone, and before the device.
        drop(lost);
        let kept = OpenDevice { controller, device };
        state.condition = match is_kept {
            true => Condition::Detached(Detached { kept: Some(kept), ..detached }),
            false => {
                self.close(kept);
                Condition::Detached(detached)
            }
        };
        if self.hold.is_zero() {
            self.expire_hold(&mut state, "requests do not wait for a drive here (--hold 0)");
        }
        self.supervisor_event.notify();
    }

    /// Takes the guests' memory from a device and closes it.
    pub(super) fn close(&self, OpenDevice { controller, device }: OpenDevice) {
        self.memory.detach();
        drop(controller);
        if !device.close() {
            log::debug!("{}: it is closed when those who look at it just now are done", self.name);
        }
    }

    /// Resets the device's function. False: the function cannot be reset.
    fn reset_function(&self, device: &Device) -> bool {
        let result = device.reset();
        if let Err(error) = &result {
            log::info!(
                "{}: its function cannot be reset, so that the device is closed and opened again: {error}",
                self.name
            );
        }
        result.is_ok()
    }

    /// Shuts the controller down, so that it saves its cache: submission stops, outstanding commands are waited for, then CC.SHN is
    /// set (NVMe Base 2.0, 3.6.1).
    fn shut_down(&self, controller: &Controller, slots: &[LeasedSlot], pause: &Arc<Trial>) -> Result<(), Error> {
        let deadline = Instant::now() + self.options.io_timeout;
        loop {
            let out = slots.iter().map(|slot| self.pool.pause(slot.id, pause.onlooker()));
            // A worker that is gone gives nothing to the drive either.
            let out: usize = out.map(|out| out.unwrap_or(0)).sum();
            if out == 0 {
                break;
            }
            if Instant::now() >= deadline {
                log::warn!("{}: it is shut down, although {out} commands are not answered", self.name);
                break;
            }
            std::thread::sleep(DRAIN_LOOK);
        }
        controller.shutdown()
    }

    /// Fails what waits for the drive once the hold timeout has passed. To be called often, by a thread that does not wait for drives:
    /// the supervisor may be busy reattaching this one.
    pub fn check_hold(&self) {
        // While it is being stopped, or given its queue pairs, nothing can be given up: later, then.
        let Some(mut state) = self.state_now() else { return };
        if let Condition::Detached(Detached { since, hold_expired: false, .. }) = &state.condition
            && since.elapsed() >= self.hold
        {
            self.expire_hold(&mut state, &format!("it was not back within {:?}", self.hold));
        }
    }

    /// Fails everything that waits for the drive, and everything that comes, until the drive is reattached.
    fn expire_hold(&self, state: &mut State, why: &str) {
        let Condition::Detached(detached @ Detached { hold_expired: false, .. }) = &mut state.condition else { return };
        detached.hold_expired = true;
        log::error!("{}: its disks answer with I/O errors until it is back: {why}", self.name);
        self.shares().slots().iter().for_each(|slot| self.pool.expire_hold(slot.id));
    }
}
