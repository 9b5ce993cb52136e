//! One NVMe controller: bring-up, admin commands, reset and shutdown.

mod admin;
mod admin_commands;
mod events;
mod hardware;
mod queues;
mod stop;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio::{Device, EventFd};
use zerocopy::FromBytes;

use crate::spec::command::admin as opcode;
use crate::spec::features::{self, EventConfiguration, Feature, NumberOfQueues};
use crate::spec::identify::{self, CommandLimits, ControllerIdentity, RawController, RawNvmController, cns};
use crate::spec::registers::Version;
use crate::{Command, Error};
use admin::{Admin, Loss, Patience};
use hardware::Hardware;
use queues::{Queues, Shadow};

pub use admin_commands::{Erase, FormatOptions};
pub use events::Event;
pub use queues::QueuePairOptions;

/// How a controller is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Entries of each queue of a queue pair, unless [`QueuePairOptions`] says otherwise: 2 to 4096. A queue pair takes about
    /// 4 KiB of memory per entry.
    pub queue_entries: u16,
    /// Queue pairs to ask the controller for, at least 1. It may grant fewer. Those that are not created cost next to nothing.
    pub max_queue_pairs: u16,
    /// Use shadow doorbells (Doorbell Buffer Config) if the controller offers them.
    pub shadow_doorbells: bool,
    /// Give the device eventfds for its interrupt vectors, for up to 64 queue pairs. Without, only polling works.
    pub interrupts: bool,
    /// Deadline of an admin command, after which the controller counts as failed. (Format has a deadline of its own, and so has
    /// what is asked by [`Controller::monitor`].)
    pub admin_timeout: Duration,
    /// Age at which `QueuePair::tick` reports a command of a queue pair.
    pub io_timeout: Duration,
    /// The longest wait for a shutdown. Within it, a controller has twice the time that it says it needs (RTD3E), and no less
    /// than 5 seconds.
    pub shutdown_timeout: Duration,
    /// The longest wait for the controller to become ready, or not ready; `None`: half as much again as it asks for (CAP.TO,
    /// CRTO), but from 10 seconds to 5 minutes.
    pub ready_timeout: Option<Duration>,
    /// How long CSTS is not read after CC.EN was cleared; `None`: not at all, unless [`crate::quirks`] has the drive.
    pub rest_after_disable: Option<Duration>,
    /// Whether to use scatter gather lists where the drive has them; `None`: unless [`crate::quirks`] says otherwise.
    pub sgl: Option<bool>,
    /// Whether to use Dataset Management (discard) where the drive has it; `None`: unless [`crate::quirks`] says otherwise.
    pub discard: Option<bool>,
    /// Whether to use Write Zeroes where the drive has it; `None`: unless [`crate::quirks`] says otherwise.
    pub write_zeroes: Option<bool>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            queue_entries: 512,
            max_queue_pairs: 1024,
            shadow_doorbells: true,
            interrupts: true,
            admin_timeout: Duration::from_secs(10),
            io_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(60),
            ready_timeout: None,
            rest_after_disable: None,
            sgl: None,
            discard: None,
            write_zeroes: None,
        }
    }
}

impl Options {
    /// For commands without whose answer nothing goes on.
    fn needed(&self) -> Patience {
        Patience::needed(self.admin_timeout)
    }
}

/// A controller in operation. Clones are the same controller.
///
/// Its functions send admin commands one after the other, and may block for as long as their deadlines: they are for control
/// threads. Data goes over [`crate::QueuePair`]s. When the last clone is dropped, the controller is shut down; its queue pairs
/// are of no use then.
#[derive(Clone)]
pub struct Controller {
    inner: Arc<Inner>,
    /// The deadline of questions whose loss is borne; `None`: none is.
    monitor: Option<Duration>,
}

struct Inner {
    hardware: Hardware,
    options: Options,
    identity: ControllerIdentity,
    limits: CommandLimits,
    /// Taken before `admin` where both are needed.
    queues: Mutex<Queues>,
    admin: Mutex<Admin>,
    /// Eventfd of each interrupt vector, 0 being the admin queue's.
    vectors: Vec<EventFd>,
    shadow: Option<Shadow>,
    /// Whether the volatile write cache was in use when the controller last said so.
    write_cache: Mutex<Option<bool>>,
    /// It was found to refuse the SGLs that it announces.
    sgl_refused: Arc<AtomicBool>,
}

/// The data under these locks is valid between any two statements: a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controller {
    /// Brings a controller up: reset, admin queue, Identify, number of queues, events, shadow doorbells
    /// (NVMe Base 2.0, 3.5.1).
    ///
    /// Whoever used the controller before must have stopped.
    pub fn open(device: &Device, options: &Options) -> Result<Controller, Error> {
        if options.max_queue_pairs == 0 || options.queue_entries < 2 {
            return Err(Error::Invalid(format!(
                "{} queue pairs of {} entries make no sense; ask for at least 1 and 2",
                options.max_queue_pairs, options.queue_entries
            )));
        }
        let hardware = Hardware::new(device, options)?;
        hardware.disable()?;
        // From the moment it is enabled the controller may write to the admin queues; on any error it is stopped first.
        let mut parts = Unfinished { hardware: &hardware, admin: Some(Admin::new(&hardware)?), shadow: None };
        let (identity, limits, granted, vectors) = parts.bring_up(options)?;
        let (admin, shadow) = parts.finish();
        log::info!(
            "{}: {} {} (firmware {}, NVMe {}), {granted} queue pairs, {} interrupt vectors, shadow doorbells {}",
            hardware.name,
            identity.model,
            identity.serial,
            identity.firmware,
            identity.version,
            vectors.len(),
            if shadow.is_some() { "on" } else { "off" }
        );
        if !identity.quirks.is_empty() {
            log::info!("{}: known of this drive: {}", hardware.name, identity.quirks);
        }
        let queues = Mutex::new(Queues::new(granted, vectors.len()));
        let inner = Inner {
            hardware,
            options: options.clone(),
            identity,
            limits,
            queues,
            admin: Mutex::new(admin),
            vectors,
            shadow,
            write_cache: Mutex::default(),
            sgl_refused: Arc::default(),
        };
        Ok(Controller { inner: Arc::new(inner), monitor: None })
    }

    /// What the controller says of itself.
    pub fn identity(&self) -> &ControllerIdentity {
        &self.inner.identity
    }

    /// The device it was opened on.
    pub fn device(&self) -> &Device {
        &self.inner.hardware.device
    }

    /// The options it was opened with.
    pub fn options(&self) -> &Options {
        &self.inner.options
    }

    /// The longest it may take to become ready, or not ready: what it asks for (CAP.TO, CRTO) and some, or
    /// [`Options::ready_timeout`].
    pub fn ready_timeout(&self) -> Duration {
        self.inner.hardware.ready_timeout
    }

    /// Whether doorbells are shadowed in memory.
    pub fn uses_shadow_doorbells(&self) -> bool {
        self.inner.shadow.is_some()
    }

    /// Looks at CSTS: an error when the device is gone, has reported a fatal status, or is not ready (as it is for a moment
    /// while [`Controller::reset`] runs). One register read, which any thread may do at any time.
    pub fn health(&self) -> Result<(), Error> {
        self.inner.hardware.check()
    }

    /// Has the controller paused its commands, as it may for as long as it activates firmware
    /// ([`ControllerIdentity::activation_time`])? What is not answered meanwhile is not lost. One register read, as
    /// [`Controller::health`].
    pub fn is_paused(&self) -> bool {
        self.inner.hardware.paused()
    }

    /// [`Controller::health`], and an error also when an admin command was not answered: nothing can be asked any more until a
    /// reset. Does not wait for one that is under way.
    pub fn in_operation(&self) -> Result<(), Error> {
        self.health()?;
        self.inner.hardware.in_operation()
    }

    /// A handle to this controller for one who only wants to know how it is: each question (namespaces, features, log pages,
    /// events, abort) has this deadline, and one that is not answered costs nothing but [`Error::Unanswered`]. The controller
    /// goes on; its late answer is dropped. With eight such questions unanswered at a time the controller counts as failed
    /// ([`Controller::in_operation`]).
    ///
    /// Nothing else differs from the original handle: a queue pair that is not created in time is a failure.
    pub fn monitor(&self, timeout: Duration) -> Controller {
        Controller { inner: self.inner.clone(), monitor: Some(timeout) }
    }

    /// For questions: see [`Controller::monitor`].
    fn asking(&self) -> Patience {
        match self.monitor {
            Some(timeout) => Patience { timeout, loss: Loss::Borne },
            None => self.inner.options.needed(),
        }
    }

    /// What CSTS reads, for a message.
    pub(crate) fn csts(&self) -> u32 {
        self.inner.hardware.csts_or_ones()
    }

    /// Keeps memory that the controller may still write to until it has been reset.
    pub(crate) fn quarantine(&self, memory: vfio::DmaBuffer) {
        lock(&self.inner.queues).quarantine(memory);
    }

    /// Resets the controller and brings it up again, also after a command that was never answered or a fatal status.
    ///
    /// The controller forgets its queue pairs and touches no memory of their requests any more. Their owners must not ring
    /// while this runs; afterwards they take out what was outstanding ([`crate::QueuePair::drain_after_reset`]), have the pair
    /// created again ([`Controller::recreate_queue_pair`]) and submit anew. Features are as after power-on, unless saved.
    /// Namespaces may have changed meanwhile, and so may whether their write cache is in use: ask for them again. So may the number of
    /// queue pairs ([`Controller::max_queue_pairs`]): more can be used from then on; with fewer it is an error if a queue pair
    /// exists that is not granted any more, until its owner drops it.
    ///
    /// An admin command that is under way in another thread ends with an error at once; nothing waits for its deadline. So it
    /// is with [`Controller::disable`] and [`Controller::shutdown`].
    pub fn reset(&self) -> Result<(), Error> {
        let inner = &*self.inner;
        let claim = inner.hardware.standing.claim();
        let mut queues = lock(&inner.queues);
        let mut admin = lock(&inner.admin);
        inner.hardware.standing.stop("a reset has failed");
        drop(claim);
        if let Err(error) = inner.hardware.disable() {
            // CC.EN does not help; the function's own reset may.
            log::warn!("{}: resetting the whole function: {error}", inner.hardware.name);
            inner.hardware.device.reset().map_err(|source| {
                log::error!("{}: cannot reset the function: {source}", inner.hardware.name);
                error
            })?;
            inner.hardware.disable()?;
        }
        // A reset of the function, here or in an earlier `disable`, switched them off.
        self.enable_vectors_again()?;
        admin.renew();
        queues.forget();
        *lock(&inner.write_cache) = None;
        admin.enable(&inner.hardware)?;
        let result = self.bring_up_again(&mut admin, &mut queues);
        if result.is_err() {
            inner.hardware.standing.stop("a reset has failed");
            // The next attempt begins with the same; here it only keeps a half-started controller from going on.
            let _ = inner.hardware.disable();
        }
        result
    }

    fn enable_vectors_again(&self) -> Result<(), Error> {
        use crate::error::Doing;
        let inner = &*self.inner;
        if inner.vectors.is_empty() {
            return Ok(());
        }
        let events: Vec<&EventFd> = inner.vectors.iter().collect();
        inner.hardware.device.enable_interrupts(&events).doing("enable MSI-X vectors after a reset")
    }

    fn bring_up_again(&self, admin: &mut Admin, queues: &mut Queues) -> Result<(), Error> {
        let inner = &*self.inner;
        let identity = identify_controller(&inner.hardware, admin, &inner.options)?;
        let same = |of: fn(&ControllerIdentity) -> &String| of(&identity) == of(&inner.identity);
        if !same(|identity| &identity.serial) || !same(|identity| &identity.model) {
            return Err(Error::Untrustworthy(format!(
                "after a reset {} is {} {}, before it was {} {}; open it anew",
                inner.hardware.name, identity.model, identity.serial, inner.identity.model, inner.identity.serial
            )));
        }
        if let Some(what) = identity.broken_promise(&inner.identity) {
            return Err(Error::Untrustworthy(format!(
                "after a reset {} has {what}, for which its queue pairs and namespaces were not made; open it anew",
                inner.hardware.name
            )));
        }
        if command_limits(&inner.hardware, admin, &inner.options, &identity)?.less_than(&inner.limits) {
            return Err(Error::Untrustworthy(format!(
                "after a reset {} takes less in one command than its namespaces were made for; open it anew",
                inner.hardware.name
            )));
        }
        let (before, now) =
            (queues.granted(), negotiate_queues(&inner.hardware, admin, &inner.options, inner.shadow.is_some())?);
        if !queues.regrant(now) {
            return Err(Error::Untrustworthy(format!(
                "after a reset {} grants {now} queue pairs, and granted {before} before; one beyond is still to be created again: \
                 drop it before the reset, or open the controller again",
                inner.hardware.name
            )));
        }
        if now != before {
            log::info!(
                "{}: it grants {now} queue pairs after a reset, and granted {before} before",
                inner.hardware.name
            );
        }
        if let Some(shadow) = &inner.shadow {
            shadow.announce(&inner.hardware, admin, inner.options.needed())?;
        }
        ask_for_events(&inner.hardware, admin, &inner.options, &inner.identity)?;
        ask_for_retry_delays(&inner.hardware, admin, &inner.options, &inner.identity)
    }

    /// Shuts the controller down: its volatile write cache is on its media afterwards. Only [`Controller::reset`] brings it
    /// back.
    ///
    /// Nothing may be outstanding on its queue pairs, and they are of no use afterwards. Dropping the last clone does the same,
    /// but can only log an error.
    pub fn shutdown(&self) -> Result<(), Error> {
        self.inner.shut_down()
    }
}

impl Inner {
    fn shut_down(&self) -> Result<(), Error> {
        let claim = self.hardware.standing.claim();
        // Nothing is under way when the controller is told.
        let admin = lock(&self.admin);
        self.hardware.standing.stop("it was shut down");
        drop((claim, admin));
        // RTD3E is what a shutdown usually takes; twice that leaves room for the unusual, within the option.
        let usual = self.identity.shutdown_time.map_or(MIN_SHUTDOWN_TIMEOUT, |time| time.saturating_mul(2));
        let timeout = usual.max(MIN_SHUTDOWN_TIMEOUT).min(self.options.shutdown_timeout);
        self.hardware.shut_down(timeout)
    }
}

/// A controller that says nothing of its shutdown (RTD3E 0), or promises wonders, gets this long.
const MIN_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

impl Drop for Inner {
    fn drop(&mut self) {
        // Its queues' memory goes after this: a controller that was disabled is sure to leave it alone.
        if let Err(error) = self.shut_down() {
            log::warn!("{}: the controller was not shut down: {error}", self.hardware.name);
        }
        if !self.hardware.stop_or_warn() {
            let queues = self.queues.get_mut().unwrap_or_else(PoisonError::into_inner);
            let admin = self.admin.get_mut().unwrap_or_else(PoisonError::into_inner);
            queues.abandon();
            admin.abandon();
            self.shadow.iter().for_each(Shadow::abandon);
        }
        if !self.vectors.is_empty()
            && let Err(error) = self.hardware.device.disable_interrupts()
        {
            log::debug!("{}: cannot disable interrupts: {error}", self.hardware.name);
        }
    }
}

/// A controller that is being brought up. It is stopped when this is dropped, so that it does not write to memory that is
/// freed.
struct Unfinished<'a> {
    hardware: &'a Hardware,
    /// `None` only when finished.
    admin: Option<Admin>,
    shadow: Option<Shadow>,
}

impl Unfinished<'_> {
    fn bring_up(&mut self, options: &Options) -> Result<(ControllerIdentity, CommandLimits, u16, Vec<EventFd>), Error> {
        let hardware = self.hardware;
        let admin = self.admin.as_mut().expect("it is taken only when finished");
        admin.enable(hardware)?;
        let identity = identify_controller(hardware, admin, options)?;
        let limits = command_limits(hardware, admin, options, &identity)?;
        let use_shadow = options.shadow_doorbells
            && identity.supports_shadow_doorbells
            && Shadow::room(hardware.capabilities.doorbell_stride()) >= 2;
        let granted = negotiate_queues(hardware, admin, options, use_shadow)?;
        let vectors = match options.interrupts.then(|| queues::enable_vectors(hardware, granted)) {
            Some(Ok(vectors)) => vectors,
            // Polling needs none.
            Some(Err(error)) => {
                log::warn!("{}: no interrupts: {error}", hardware.name);
                Vec::new()
            }
            None => Vec::new(),
        };
        if use_shadow {
            let shadow = self.shadow.insert(Shadow::new(hardware)?);
            match shadow.announce(hardware, admin, options.needed()) {
                Ok(()) => {}
                // The registers do as well.
                Err(error @ Error::Command { .. }) => {
                    log::warn!("{}: no shadow doorbells: {error}", hardware.name);
                    self.shadow = None;
                }
                Err(error) => return Err(error),
            }
        }
        ask_for_events(hardware, admin, options, &identity)?;
        ask_for_retry_delays(hardware, admin, options, &identity)?;
        Ok((identity, limits, granted, vectors))
    }

    fn finish(mut self) -> (Admin, Option<Shadow>) {
        let admin = self.admin.take().expect("it is taken only here");
        (admin, self.shadow.take())
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(admin) = &self.admin
            && !self.hardware.stop_or_warn()
        {
            admin.abandon();
            self.shadow.iter().for_each(Shadow::abandon);
        }
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("device", &self.inner.hardware.name)
            .field("model", &self.inner.identity.model)
            .field("serial", &self.inner.identity.serial)
            .finish_non_exhaustive()
    }
}

/// One Identify data structure (NVMe Base 2.0, 5.17).
fn identify(
    hardware: &Hardware,
    admin: &mut Admin,
    patience: Patience,
    structure: u8,
    namespace: u32,
    name: &str,
) -> Result<Vec<u8>, Error> {
    let command = Command::new(opcode::IDENTIFY, namespace).with_cdw10(structure.into());
    let name = || format!("Identify ({name}, namespace {namespace:#x})");
    ask(|| admin.execute_in(hardware, command, identify::BYTES, patience, name))
}

/// How often a question is asked that the controller fails to answer.
const QUESTIONS: usize = 3;

/// Asks something that changes nothing, again if the controller answers with an error that another try may not meet.
fn ask<T>(mut question: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let mut left = QUESTIONS;
    loop {
        left -= 1;
        match question() {
            Err(Error::Command { command, status }) if left > 0 && !status.do_not_retry() => {
                log::debug!("{command} failed, and is tried again: {status}");
            }
            answer => return answer,
        }
    }
}

fn identify_controller(hardware: &Hardware, admin: &mut Admin, options: &Options) -> Result<ControllerIdentity, Error> {
    let data = identify(hardware, admin, options.needed(), cns::CONTROLLER, 0, "controller")?;
    let raw =
        RawController::ref_from_bytes(&data).map_err(|_| Error::Untrustworthy("Identify data of wrong size".into()))?;
    ControllerIdentity::parse(raw, hardware.capabilities.page_size_min(), hardware.version)
        .map(|identity| identity.restrict(hardware.function, options))
}

/// Bytes of the Host Behavior Support data structure (NVMe Base 2.0, 5.27.1.18).
const HOST_BEHAVIOR_BYTES: usize = 512;

/// Has the controller say how long to wait before a failed command is tried again: only hosts that have told so in Host
/// Behavior Support (NVMe Base 2.0, 5.27.1.18: ACRE) get a retry delay in a status.
fn ask_for_retry_delays(
    hardware: &Hardware,
    admin: &mut Admin,
    options: &Options,
    identity: &ControllerIdentity,
) -> Result<(), Error> {
    if identity.retry_delays.iter().all(Duration::is_zero) {
        return Ok(());
    }
    let mut behavior = [0; HOST_BEHAVIOR_BYTES];
    behavior[0] = 1;
    let command = Command::new(opcode::SET_FEATURES, 0).with_cdw10(features::id::HOST_BEHAVIOR.into());
    let name = || "Set Features (Host Behavior Support)".to_owned();
    match admin.execute_out(hardware, command, &behavior, options.needed(), name) {
        Ok(_) => Ok(()),
        // Then there are no delays.
        Err(error @ Error::Command { .. }) => {
            log::debug!("{}: no delays before commands are tried again: {error}", hardware.name);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// The limits of commands without data transfer, from controllers new enough to know of them.
fn command_limits(
    hardware: &Hardware,
    admin: &mut Admin,
    options: &Options,
    identity: &ControllerIdentity,
) -> Result<CommandLimits, Error> {
    // CNS 06h came with command sets (CAP.CSS bit 6) and 2.0; others would only note an error in their log.
    if identity.version < Version::new(2, 0) && hardware.capabilities.command_sets() & 1 << 6 == 0 {
        return Ok(CommandLimits::NONE);
    }
    match identify(hardware, admin, options.needed(), cns::COMMAND_SET_CONTROLLER, 0, "NVM command set, controller") {
        Ok(data) => {
            let raw = RawNvmController::ref_from_bytes(&data)
                .map_err(|_| Error::Untrustworthy("Identify data of wrong size".into()))?;
            Ok(CommandLimits::parse(raw, hardware.capabilities.page_size_min()))
        }
        Err(Error::Command { status, .. }) => {
            log::debug!("{}: no limits of the NVM command set: {status}", hardware.name);
            Ok(CommandLimits::NONE)
        }
        Err(error) => Err(error),
    }
}

/// Number of Queues (NVMe Base 2.0, 5.27.1.5): how many queue pairs can be used.
fn negotiate_queues(hardware: &Hardware, admin: &mut Admin, options: &Options, shadow: bool) -> Result<u16, Error> {
    // All doorbells have to lie in BAR0, and in the shadow page if there is one; the admin queue takes the first place.
    let mut room = hardware.doorbell_pairs().saturating_sub(1).min(options.max_queue_pairs.into()) as u32;
    if shadow {
        room = room.min(u32::from(Shadow::room(hardware.capabilities.doorbell_stride())) - 1);
    }
    if room == 0 {
        return Err(Error::Untrustworthy("BAR0 has no room for the doorbells of a single I/O queue pair".into()));
    }
    let wanted = NumberOfQueues { submission: room, completion: room };
    let command =
        Command::new(opcode::SET_FEATURES, 0).with_cdw10(NumberOfQueues::ID.into()).with_cdw11(wanted.to_dword());
    let name = || format!("Set Features ({}, {room} pairs)", NumberOfQueues::NAME);
    let granted = NumberOfQueues::from_dword(admin.execute(hardware, command, options.needed(), name)?);
    // It may grant more than was asked for.
    Ok(room.min(granted.submission).min(granted.completion) as u16)
}

/// What every bring-up ends with: the choice of events, and event requests.
fn ask_for_events(
    hardware: &Hardware,
    admin: &mut Admin,
    options: &Options,
    identity: &ControllerIdentity,
) -> Result<(), Error> {
    let events = EventConfiguration {
        critical_warnings: 0x1f,
        namespace_attributes: identity.namespace_events,
        firmware_activation: identity.firmware_events,
    };
    let command =
        Command::new(opcode::SET_FEATURES, 0).with_cdw10(EventConfiguration::ID.into()).with_cdw11(events.to_dword());
    let name = || format!("Set Features ({})", EventConfiguration::NAME);
    match admin.execute(hardware, command, options.needed(), name) {
        Ok(_) => {}
        // The controller reports what it reports; nothing depends on it.
        Err(error @ Error::Command { .. }) => log::warn!("{}: {error}", hardware.name),
        Err(error) => return Err(error),
    }
    admin.set_limits(identity);
    admin.request_events(hardware, identity.event_limit);
    Ok(())
}
