//! Stopping a controller that does not work any more, by whatever still does.

use super::hardware::Hardware;
use super::{Controller, lock};
use crate::Error;
use crate::error::Doing;

impl Controller {
    /// Stops the controller, also one that has failed: when this has succeeded it touches no memory, its queue pairs are of no
    /// use, and nothing is sent to it until [`Controller::reset`].
    ///
    /// Tried in this order: clearing CC.EN, a reset of the function, clearing Bus Master Enable (PCI Local Bus 3.0, 6.2.2). A
    /// device that is gone counts as stopped.
    pub fn disable(&self) -> Result<(), Error> {
        let inner = &*self.inner;
        let claim = inner.hardware.standing.claim();
        let mut queues = lock(&inner.queues);
        let _admin = lock(&inner.admin);
        inner.hardware.standing.stop("it was disabled");
        drop(claim);
        inner.hardware.stop()?;
        queues.forget();
        Ok(())
    }
}

impl Hardware {
    /// What [`Controller::disable`] does to the device.
    pub(super) fn stop(&self) -> Result<(), Error> {
        let gone = self.csts_or_ones() == u32::MAX;
        let Err(error) = self.disable() else { return Ok(()) };
        if !gone {
            log::warn!("{}: stopping the whole function: {error}", self.name);
        }
        let stopped = self.device.reset().or_else(|_| {
            let space = self.device.config_space();
            let command = space.read_u16(vfio::COMMAND)?;
            space.write_u16(vfio::COMMAND, command & !vfio::COMMAND_BUS_MASTER)
        });
        match stopped.doing("stop the function") {
            // All ones: it has left the bus, or its server is gone.
            Err(error) if gone => {
                log::debug!("{}: it is gone, and counts as stopped: {error}", self.name);
                Ok(())
            }
            stopped => stopped,
        }
    }

    /// Stops the controller, and logs it if that fails, for callers who can tell nobody. False: it may still write to its
    /// memory.
    pub(super) fn stop_or_warn(&self) -> bool {
        let stopped = self.stop();
        if let Err(error) = &stopped {
            log::error!(
                "{}: the controller cannot be stopped, and its queues' memory is not used again: {error}",
                self.name
            );
        }
        stopped.is_ok()
    }
}
