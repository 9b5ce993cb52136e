//! The controller's registers with deadlines: enable, disable, shut down, see whether it is alive
//! (NVMe Base 2.0, 3.5 and 3.6).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vfio::{Bar, Device};

use super::Options;
use crate::Error;
use crate::error::Doing;
use crate::quirks::{Function, Quirk, Quirks, REST_AFTER_DISABLE, REST_BEFORE_START};
use crate::spec::identify::{CQ_ENTRY_SHIFT, SQ_ENTRY_SHIFT};
use crate::spec::registers::{
    Capabilities, Configuration, ControllerStatus, SHUTDOWN_COMPLETE, SHUTDOWN_NORMAL, Version, admin_queue_attributes,
    cq_doorbell, offset, sq_doorbell,
};

/// CRTO can ask for nine hours; no one waits that long for a drive.
const MAX_READY_TIMEOUT: Duration = Duration::from_secs(300);
/// Drives that promise to be ready within a second are so in general; after a crash, or with new firmware, they are not.
const MIN_READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for a controller that asks for `asked` (CAP.TO, CRTO): half as much again, within bounds.
fn patient(asked: Duration) -> Duration {
    (asked + asked / 2).clamp(MIN_READY_TIMEOUT, MAX_READY_TIMEOUT)
}

/// Base class, subclass and programming interface of an NVMe I/O controller (NVMe over PCIe Transport 1.0, 3.8.1.5).
const CLASS_NVME: u32 = 0x01_08_02;

/// The capabilities, if this driver can work with them; else why not.
fn usable_capabilities(raw: u64) -> Result<Capabilities, String> {
    let capabilities = Capabilities::from_bits(raw);
    if capabilities.page_size_min() > 0 {
        let bytes = 4096u64 << capabilities.page_size_min();
        return Err(format!("its smallest memory page is {bytes} bytes (MPSMIN); this driver uses 4096"));
    }
    if capabilities.command_sets() & 1 == 0 {
        return Err("it does not support the NVM Command Set (CSS)".into());
    }
    Ok(capabilities)
}

/// Whether commands may be sent to a controller. Any thread can look, also while a command is under way.
pub(crate) struct Standing {
    /// Why not; `None` in operation.
    stopped: Mutex<Option<&'static str>>,
    /// Number of threads that are about to stop the controller and wait for the admin queue.
    claims: AtomicU32,
}

/// Somebody is about to stop the controller: what is under way on the admin queue ends at once, until this is dropped.
pub(crate) struct Claim<'a>(&'a Standing);

impl Standing {
    fn new() -> Standing {
        Standing { stopped: Mutex::new(Some("it has not been enabled")), claims: AtomicU32::new(0) }
    }

    /// Commands may be sent from now on.
    pub(super) fn begin(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Nothing may be sent from now on.
    pub(super) fn stop(&self, why: &'static str) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    /// Has the command that is under way end at once. To be held until the admin queue is had and [`Standing::stop`] was
    /// called.
    pub(super) fn claim(&self) -> Claim<'_> {
        // Relaxed: it guards no data; the admin queue's lock does.
        self.claims.fetch_add(1, Ordering::Relaxed);
        Claim(self)
    }

    /// Why nothing may be sent.
    fn why(&self) -> Option<&'static str> {
        match self.claims.load(Ordering::Relaxed) {
            0 => *self.stopped.lock().unwrap_or_else(PoisonError::into_inner),
            _ => Some("it is just being stopped or reset"),
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.claims.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A controller's registers, after its capabilities were found usable.
pub(crate) struct Hardware {
    pub device: Device,
    pub name: String,
    pub capabilities: Capabilities,
    pub version: Version,
    pub standing: Standing,
    bar: Bar,
    /// The longest the controller may take to become ready or not ready.
    pub ready_timeout: Duration,
    /// The vendor and device that the function says it is, by which quirks are looked up.
    pub function: Function,
    /// How long CSTS is left alone after CC.EN was cleared.
    rest_after_disable: Duration,
    /// The controller does not tell when it has shut down.
    no_shutdown_status: bool,
}

impl Hardware {
    /// Reads the capabilities and refuses a device that is no NVMe controller, or none that this driver can drive.
    pub(super) fn new(device: &Device, options: &Options) -> Result<Hardware, Error> {
        let name = device.address().to_string();
        let register = device.config_space().read_u32(0).doing("read the vendor from configuration space")?;
        let function = Function::from_register(register);
        let quirks = Quirks::of_function(function);
        if quirks.has(Quirk::RestBeforeStart) {
            std::thread::sleep(REST_BEFORE_START);
        }
        let class = device.config_space().read_u32(0x08).doing("read the class code from configuration space")? >> 8;
        if class == 0xff_ffff {
            return Err(Error::Gone { controller: name, register: "class code", value: class.into() });
        }
        if class != CLASS_NVME {
            return Err(Error::Register {
                controller: name,
                register: "class code",
                value: class.into(),
                problem: format!("an NVMe controller has {CLASS_NVME:#08x}; is this the right device?"),
            });
        }
        let bar = device.bar(0).doing("map BAR0")?;
        let raw = bar.read_u64(offset::CAP).doing("read CAP")?;
        if raw == u64::MAX {
            return Err(Error::Gone { controller: name, register: "CAP", value: raw });
        }
        let capabilities = usable_capabilities(raw).map_err(|problem| Error::Register {
            controller: name.clone(),
            register: "CAP",
            value: raw,
            problem,
        })?;
        let version = Version(bar.read_u32(offset::VS).doing("read VS")?);
        let mut ready_timeout = capabilities.ready_timeout();
        if capabilities.ready_modes() & 1 != 0 {
            // CRTO.CRWMT holds what TO has no room for (NVMe Base 2.0, 3.1.3.21).
            let crto = bar.read_u32(offset::CRTO).doing("read CRTO")?;
            ready_timeout = ready_timeout.max(Duration::from_millis(500) * (crto & 0xffff));
        }
        if capabilities.max_queue_entries_minus_one() == 0 {
            log::info!("{name}: it says that queues have one entry (MQES 0); taken for 64");
        }
        let rest = if quirks.has(Quirk::RestAfterDisable) { REST_AFTER_DISABLE } else { Duration::ZERO };
        Ok(Hardware {
            device: device.clone(),
            name,
            capabilities,
            version,
            standing: Standing::new(),
            bar,
            ready_timeout: options.ready_timeout.unwrap_or_else(|| patient(ready_timeout)),
            function,
            rest_after_disable: options.rest_after_disable.unwrap_or(rest),
            no_shutdown_status: quirks.has(Quirk::NoShutdownStatus),
        })
    }

    /// Queue pairs, admin included, whose doorbells lie in BAR0.
    pub(super) fn doorbell_pairs(&self) -> u64 {
        let pair = 2 * (4u64 << self.capabilities.doorbell_stride());
        self.bar.size().saturating_sub(offset::DOORBELLS) / pair
    }

    /// The doorbells of queue pair `id`: submission queue tail, completion queue head.
    pub(super) fn doorbells(&self, id: u16) -> Result<(vfio::Doorbell, vfio::Doorbell), Error> {
        let stride = self.capabilities.doorbell_stride();
        let doorbell = |at| self.bar.doorbell(at).doing("reach a doorbell in BAR0");
        Ok((doorbell(sq_doorbell(id, stride))?, doorbell(cq_doorbell(id, stride))?))
    }

    fn csts(&self) -> Result<ControllerStatus, Error> {
        self.bar.read_u32(offset::CSTS).doing("read CSTS").map(ControllerStatus::from_bits)
    }

    /// Does an enabled controller say that it has paused the processing of commands (CSTS.PP; NVMe Base 2.0, 3.1.3.6)?
    pub(super) fn paused(&self) -> bool {
        self.csts().is_ok_and(|csts| !csts.is_gone() && csts.ready() && csts.processing_paused())
    }

    /// CSTS for a message; all ones when it cannot be read.
    pub(super) fn csts_or_ones(&self) -> u32 {
        self.bar.read_u32(offset::CSTS).unwrap_or(u32::MAX)
    }

    /// An error when nothing may be sent.
    pub(super) fn in_operation(&self) -> Result<(), Error> {
        match self.standing.why() {
            Some(why) => Err(Error::NotInOperation { controller: self.name.clone(), why }),
            None => Ok(()),
        }
    }

    /// An error when an enabled controller is gone, has reported a fatal status, or is not ready.
    pub(super) fn check(&self) -> Result<(), Error> {
        let csts = self.csts()?;
        if csts.is_gone() {
            return Err(self.gone(csts));
        }
        if csts.fatal() {
            return Err(self.status_error(csts, "a fatal status (CFS): reset the controller".into()));
        }
        if !csts.ready() {
            let problem = "not ready: it has lost power, or someone else has reset it; reset the controller";
            return Err(self.status_error(csts, problem.into()));
        }
        Ok(())
    }

    fn gone(&self, csts: ControllerStatus) -> Error {
        Error::Gone { controller: self.name.clone(), register: "CSTS", value: csts.into_bits().into() }
    }

    fn status_error(&self, csts: ControllerStatus, problem: String) -> Error {
        Error::Register { controller: self.name.clone(), register: "CSTS", value: csts.into_bits().into(), problem }
    }

    fn write_cc(&self, cc: Configuration) -> Result<(), Error> {
        self.bar.write_u32(offset::CC, cc.into_bits()).doing("write CC")
    }

    fn cc(&self) -> Result<Configuration, Error> {
        self.bar.read_u32(offset::CC).doing("read CC").map(Configuration::from_bits)
    }

    /// Clears CC.EN and waits until the controller is not ready: after that it touches no memory.
    pub(super) fn disable(&self) -> Result<(), Error> {
        let cc = self.cc()?;
        let csts = self.csts()?;
        if csts.is_gone() {
            return Err(self.gone(csts));
        }
        if cc.enable() && !csts.ready() && !csts.fatal() {
            // It is still becoming ready for someone before us; EN may be cleared only after that (NVMe Base 2.0, 3.1.3.5).
            // One that never gets there is disabled all the same: there is nothing better to do.
            if let Err(error) = self.wait("become ready for its previous user", |csts| csts.ready() || csts.fatal()) {
                log::warn!("{}: disabling it all the same: {error}", self.name);
            }
        }
        self.write_cc(cc.with_enable(false).with_shutdown(0))?;
        if cc.enable() {
            std::thread::sleep(self.rest_after_disable);
        }
        self.wait("become not ready after CC.EN was cleared", |csts| !csts.ready())
    }

    /// Sets the admin queues (each of `entries`) and CC.EN, and waits until the controller is ready.
    pub(super) fn enable(&self, entries: u16, submission: u64, completion: u64) -> Result<(), Error> {
        // `stop` clears Bus Master Enable where nothing else helps; without it no command would ever be fetched.
        let space = self.device.config_space();
        let command = space.read_u16(vfio::COMMAND).doing("read the PCI command register")?;
        if command & vfio::COMMAND_BUS_MASTER == 0 {
            space.write_u16(vfio::COMMAND, command | vfio::COMMAND_BUS_MASTER).doing("enable bus mastering")?;
        }
        self.bar.write_u32(offset::AQA, admin_queue_attributes(entries)).doing("write AQA")?;
        self.bar.write_u64(offset::ASQ, submission).doing("write ASQ")?;
        self.bar.write_u64(offset::ACQ, completion).doing("write ACQ")?;
        // CSS 0: the NVM Command Set; MPS 0: pages of 4096 bytes; AMS 0: round robin.
        let cc = Configuration::new()
            .with_enable(true)
            .with_sq_entry_shift(SQ_ENTRY_SHIFT)
            .with_cq_entry_shift(CQ_ENTRY_SHIFT);
        self.write_cc(cc)?;
        self.wait("become ready after CC.EN was set", |csts| csts.ready())?;
        self.check()
    }

    /// Notifies the controller of a normal shutdown and waits until it has completed, `timeout` at most.
    pub(super) fn shut_down(&self, timeout: Duration) -> Result<(), Error> {
        let csts = self.csts()?;
        if csts.is_gone() {
            return Err(self.gone(csts));
        }
        let cc = self.cc()?;
        // One that is not enabled has nothing to save, and a shutdown of it could only be undone by enabling it.
        if csts.shutdown() == SHUTDOWN_COMPLETE || !cc.enable() {
            return Ok(());
        }
        self.write_cc(cc.with_shutdown(SHUTDOWN_NORMAL))?;
        if self.no_shutdown_status {
            return Ok(());
        }
        self.wait_for("complete the shutdown after CC.SHN was set", timeout, |csts| {
            csts.shutdown() == SHUTDOWN_COMPLETE
        })
    }

    fn wait(&self, what: &str, reached: impl Fn(ControllerStatus) -> bool) -> Result<(), Error> {
        self.wait_for(what, self.ready_timeout, reached)
    }

    fn wait_for(&self, what: &str, timeout: Duration, reached: impl Fn(ControllerStatus) -> bool) -> Result<(), Error> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        loop {
            // The time before the look: a thread that was away for long still looks once after the deadline.
            let waited = start.elapsed();
            let csts = self.csts()?;
            if csts.is_gone() {
                return Err(self.gone(csts));
            }
            if reached(csts) {
                return Ok(());
            }
            if csts.fatal() && csts.shutdown() == 0 && self.cc()?.enable() {
                return Err(self.status_error(csts, format!("a fatal status (CFS) while it was to {what}")));
            }
            if waited >= timeout {
                return Err(self.status_error(
                    csts,
                    format!("the controller did not {what} within {timeout:?}; reset the device, or replace it"),
                ));
            }
            std::thread::sleep(pause.min(timeout - waited));
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_become_ready_has_a_floor_slack_and_an_end() {
        let seconds = Duration::from_secs;
        for (asked, waited) in [(0, 10), (1, 10), (6, 10), (8, 12), (20, 30), (100, 150), (1000, 300)] {
            assert_eq!(patient(seconds(asked)), seconds(waited), "{asked} s");
        }
    }

    #[test]
    fn capabilities_that_cannot_be_worked_with_are_refused() {
        let usable = Capabilities::new().with_max_queue_entries_minus_one(1).with_command_sets(1);
        assert_eq!(usable_capabilities(usable.into_bits()), Ok(usable));
        let wide = usable.with_doorbell_stride(15).with_page_size_max(15).with_timeout(255).with_command_sets(0xff);
        assert_eq!(usable_capabilities(wide.into_bits()), Ok(wide));
        let none = usable.with_max_queue_entries_minus_one(0);
        assert_eq!(usable_capabilities(none.into_bits()), Ok(none), "MQES 0 is 64");
        for (bad, why) in [
            (Capabilities::from_bits(0), "NVM Command Set"),
            (usable.with_page_size_min(1).with_page_size_max(1), "8192 bytes"),
            (usable.with_command_sets(0x80), "NVM Command Set"),
        ] {
            let error = usable_capabilities(bad.into_bits()).unwrap_err();
            assert!(error.contains(why), "{bad:?}: {error}");
        }
    }
}
