//! The controller's one data thread: it owns the queues and the namespaces, and does all their work.
//!
//! It polls the doorbells. When nothing runs it first yields the processor at every look, then, after
//! 2 ms, sleeps in naps that grow from 20 µs to 1 ms: an idle controller costs about a thousand short wake-ups a
//! second, and the first command after a pause waits for up to 1 ms (plus what the system takes to wake a thread).

mod idle;
mod lifecycle;
mod posting;
mod shutdown;
mod stray;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use fastrand::Rng;

use crate::command::{ALL_NAMESPACES, Command, Completion};
use crate::data_pointer::Pointers;
use crate::dma::{DmaFault, DmaView};
use crate::error::Error;
use crate::events::Events;
use crate::faults::{Decision, FaultState};
use crate::features::Features;
use crate::identify;
use crate::interrupts::Signals;
use crate::namespace::Namespace;
use crate::offers::{self, Offers};
use crate::patch::IdentifyPatch;
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::registers::CSTS_FATAL;
use crate::shared::{Counters, Shared};
use crate::status::Status;
use idle::Idle;
use stray::Stray;

/// Commands fetched from one queue before the next queue has its turn; their completions are posted together.
const BURST: u32 = 16;

/// Where the controller is between off and ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Disabled,
    /// Enabled; ready from then on.
    Starting(Instant),
    Ready,
    /// A shutdown was completed: only a reset leads on.
    ShutDown,
    /// CSTS.CFS is set: only a reset leads on.
    Failed,
}

/// Shadow doorbells and EventIdx in host memory (NVMe Base 2.0, 5.8).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shadow {
    pub doorbells: u64,
    pub event_idx: u64,
}

/// A command that a fault holds back.
pub(crate) struct Held {
    pub due: Instant,
    pub sq: u16,
    pub command: Command,
    decision: Decision,
}

/// What became of a command.
pub(crate) enum Outcome {
    /// The command completes, with this in dword 0.
    Done(u32),
    /// The command completes later.
    Later,
}

pub(crate) struct Controller {
    pub shared: Arc<Shared>,
    pub view: DmaView,
    pub pointers: Pointers,
    /// By identifier minus one.
    pub namespaces: Vec<Option<Namespace>>,
    /// By identifier; 0 is the admin queue.
    pub sqs: Vec<Option<SubmissionQueue>>,
    pub cqs: Vec<Option<CompletionQueue>>,
    /// The identifiers of the submission queues there are.
    pub live: Vec<u16>,
    pub shadow: Option<Shadow>,
    pub events: Events,
    pub features: Features,
    pub held: Vec<Held>,
    strays: Vec<Stray>,
    /// Completions whose queue was full.
    late: VecDeque<Completion>,
    batch: Vec<Completion>,
    pub faults: FaultState,
    /// What Identify says otherwise.
    pub patches: Vec<IdentifyPatch>,
    /// What the controller says it can do.
    pub offers: Offers,
    signals: Signals,
    state: State,
    /// A reset that the `never_reset` fault holds back.
    reset_waits: bool,
    power_random: Rng,
    refusals: u64,
    pub started: Instant,
    /// Submission queue tails, by queue, that the host has told since CC.SHN was set.
    after_shutdown: Option<Vec<u32>>,
}

impl Controller {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Controller, Error> {
        let config = &shared.config;
        let namespaces = (1..)
            .zip(&config.namespaces)
            .map(|(id, namespace)| Namespace::new(id, namespace, config).map(Some))
            .collect::<Result<Vec<_>, _>>()?;
        let queues = usize::from(config.max_queue_pairs) + 1;
        let mut controller = Controller {
            view: DmaView::new(shared.dma.clone()),
            pointers: Pointers::new(),
            namespaces,
            sqs: vec![None; queues],
            cqs: vec![None; queues],
            live: Vec::with_capacity(queues),
            shadow: None,
            events: Events::new(),
            features: Features::new(config),
            held: Vec::new(),
            strays: Vec::new(),
            late: VecDeque::new(),
            batch: Vec::with_capacity(BURST as usize),
            faults: FaultState::new(),
            patches: config.identify.clone(),
            offers: Offers::default(),
            signals: Signals::new(shared.interrupts.clone()),
            state: State::Disabled,
            reset_waits: false,
            power_random: Rng::with_seed(config.faults.seed ^ 0x706f_7765_7263_7574),
            refusals: 0,
            started: Instant::now(),
            after_shutdown: None,
            shared,
        };
        controller.refresh_offers();
        Ok(controller)
    }

    /// Reads anew what Identify says it can do.
    pub(crate) fn refresh_offers(&mut self) {
        self.offers = Offers::of(self);
        self.pointers.sgl = self.offers.sgl;
        for n in 0..self.namespaces.len() {
            let Some(namespace) = &self.namespaces[n] else { continue };
            let deallocates = offers::write_zeroes_deallocates(&identify::namespace_data(self, namespace));
            self.namespaces[n].as_mut().expect("it was there").write_zeroes_deallocates = deallocates;
        }
    }

    /// Runs until the simulator stops.
    pub(crate) fn run(mut self) {
        let mut idle = Idle::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let warned = self.faults.plan.critical_warning;
            let changed = self.faults.refresh(&self.shared.faults);
            let appeared = self.faults.plan.critical_warning & !warned;
            if appeared != 0 {
                self.events.critical_warnings(appeared);
                self.deliver_events();
            }
            let mut worked = changed;
            if self.shared.take_attention() || changed {
                self.attend();
                worked = true;
            }
            worked |= !self.strays.is_empty() && self.release_strays();
            worked |= self.after_shutdown.is_some() && self.count_after_shutdown();
            worked |= self.poll();
            if worked {
                idle.reset();
            } else {
                idle.pause(&mut self);
            }
        }
        self.shared.refuse_requests();
    }

    /// One look at everything that may have work; whether there was any.
    fn poll(&mut self) -> bool {
        match self.state {
            State::Ready => {}
            State::Starting(ready) => return self.poll_start(ready),
            State::Disabled | State::ShutDown | State::Failed => return false,
        }
        if !self.reaches_memory() {
            return false;
        }
        if self.faults.plan.fatal {
            self.fail("a fatal status was injected");
            return true;
        }
        if self.faults.plan.stopped || self.faults.plan.paused {
            return false;
        }
        let mut worked = !self.late.is_empty() && self.post_late();
        worked |= !self.held.is_empty() && self.release_held(Instant::now());
        let mut n = 0;
        while let Some(&queue) = self.live.get(n) {
            worked |= self.poll_queue(queue);
            n += 1;
        }
        worked
    }

    /// The tail of a submission queue, as the host tells it.
    #[inline]
    fn submission_tail(&self, id: u16) -> Result<u32, DmaFault> {
        match self.shadow {
            Some(shadow) if id != 0 => {
                self.view.load_u32(shadow.doorbells + self.shared.doorbell_offset(id, false) as u64)
            }
            _ => Ok(self.shared.doorbell(id, false)),
        }
    }

    /// Fetches and carries out what one queue has.
    #[inline]
    fn poll_queue(&mut self, id: u16) -> bool {
        let index = usize::from(id);
        let tail = match self.submission_tail(id) {
            Ok(tail) => tail,
            Err(fault) => return self.fail_dma("reading a shadow doorbell", fault),
        };
        let Some(sq) = &mut self.sqs[index] else { return false };
        if tail != sq.tail && Some(tail) != sq.refused_tail {
            if tail >= sq.size {
                sq.refused_tail = Some(tail);
                let size = sq.size;
                self.invalid_doorbell(id, format!("submission queue tail {tail} of {size} entries"));
                return true;
            }
            sq.tail = tail;
            sq.refused_tail = None;
        }
        let pending = sq.pending();
        if pending == 0 {
            return false;
        }
        // A fault that was asked for before these commands were submitted befalls them, and not only the next.
        if self.faults.is_stale(&self.shared.faults) {
            return true;
        }
        let cq = sq.cq;
        let count = pending.min(BURST);
        let count = count.min(self.room(cq, count));
        if count == 0 {
            return false;
        }
        // What was mapped before the host rang is seen, because the doorbell was loaded before.
        self.view.refresh();
        let mut batch = std::mem::take(&mut self.batch);
        for _ in 0..count {
            let Some(sq) = &mut self.sqs[index] else { break };
            match self.view.fetch(sq.take()) {
                Ok(words) => {
                    let completion = self.begin(id, Command(words), &batch);
                    batch.extend(completion);
                }
                Err(fault) => {
                    self.batch = batch;
                    return self.fail_dma("fetching a command", fault);
                }
            }
            if self.state != State::Ready || self.faults.plan.stopped || self.shared.faults.removed() {
                break;
            }
        }
        if self.faults.plan.reorder {
            self.faults.shuffle(&mut batch);
        }
        if self.state == State::Ready && !self.faults.plan.stopped && !self.shared.faults.removed() {
            for completion in &batch {
                self.post(*completion);
            }
            self.signal(cq);
        }
        batch.clear();
        self.batch = batch;
        true
    }

    /// A fetched command: what a fault makes of it, or what it asks for.
    #[inline]
    fn begin(&mut self, sq: u16, command: Command, batch: &[Completion]) -> Option<Completion> {
        let id = command.id();
        if batch.iter().any(|other| other.id == id && other.sq == sq)
            || !self.held.is_empty() && self.held.iter().any(|held| held.sq == sq && held.command.id() == id)
            || sq == 0 && self.events.is_waiting(id)
        {
            return Some(self.completion(sq, &command, Err(Status::COMMAND_ID_CONFLICT)));
        }
        if !self.faults.any() {
            return self.execute(sq, &command);
        }
        let decision = self.faults.decide(&self.shared.faults, &command, sq == 0);
        if decision.remove {
            log::info!("fault: removed at {}", self.describe(sq, &command));
            self.shared.faults.set_removed(true);
            return None;
        }
        if decision.fatal {
            self.fail("a fatal status was injected at a command");
            return None;
        }
        if decision.stop {
            log::info!("fault: stopped at {}", self.describe(sq, &command));
            self.faults.plan.stopped = true;
            return None;
        }
        if let Some(delay) = decision.delay {
            log::debug!("fault: {} waits {delay:?}", self.describe(sq, &command));
            self.held.push(Held { due: Instant::now() + delay, sq, command, decision });
            return None;
        }
        self.execute_with(sq, &command, &decision)
    }

    fn execute_with(&mut self, sq: u16, command: &Command, decision: &Decision) -> Option<Completion> {
        let mut completion = match decision.fail {
            Some(status) => {
                log::debug!("fault: {} fails with {status:?}", self.describe(sq, command));
                let status = if self.features.retry_delays() { status } else { status.with_retry_delay(0) };
                // To the host it is an error like any other: counted, and in the error log.
                self.completion(sq, command, Err(status))
            }
            None if decision.nothing => self.completion(sq, command, Ok(0)),
            None => self.execute(sq, command)?,
        };
        if decision.lose {
            log::info!("fault: {} loses its completion", self.describe(sq, command));
            return None;
        }
        if decision.wrong_id {
            // Any identifier other than the command's own; the host has most likely none outstanding by that name.
            completion.id ^= 1 + (self.faults.random() % 0xffff) as u16;
            log::debug!("fault: {} completes as {:#x}", self.describe(sq, command), completion.id);
        }
        Some(completion)
    }

    #[inline]
    fn execute(&mut self, sq: u16, command: &Command) -> Option<Completion> {
        let result = if command.fused() != 0 {
            Err(Status::INVALID_FIELD)
        } else if let Some(status) = self.busy(sq, command) {
            Err(status)
        } else if sq == 0 {
            match crate::admin::execute(self, command) {
                Ok(Outcome::Done(result)) => Ok(result),
                Ok(Outcome::Later) => return None,
                Err(status) => Err(status),
            }
        } else {
            crate::io::execute(self, command).map(|()| 0)
        };
        Some(self.completion(sq, command, result))
    }

    /// Why a command cannot be carried out for the time being (NVMe Base 2.0, 8.21.3; figure 95).
    #[inline]
    fn busy(&self, sq: u16, command: &Command) -> Option<Status> {
        let plan = &self.faults.plan;
        let waits = sq != 0 || command.opcode() == crate::command::admin::FORMAT;
        if plan.sanitizing && waits {
            return Some(Status::SANITIZE_IN_PROGRESS);
        }
        let formatted = plan.formatting?;
        let meant = [formatted, command.namespace()];
        (waits && (meant[0] == meant[1] || meant.contains(&ALL_NAMESPACES))).then_some(Status::FORMAT_IN_PROGRESS)
    }

    #[inline]
    fn completion(&mut self, sq: u16, command: &Command, result: Result<u32, Status>) -> Completion {
        if sq != 0 {
            Counters::add(&self.shared.counters.commands, 1);
        }
        let (result, status) = match result {
            Ok(result) => (result, Status::SUCCESS),
            Err(status) => {
                self.refused(sq, command, status);
                (0, status)
            }
        };
        Completion { result, sq, id: command.id(), status }
    }

    fn describe(&self, sq: u16, command: &Command) -> String {
        format!(
            "command {:#x} (opcode {:#04x}, namespace {:#x}) of queue {sq}",
            command.id(),
            command.opcode(),
            command.namespace()
        )
    }

    /// Says in the log, and in the error log page, what was refused and why.
    #[cold]
    fn refused(&mut self, sq: u16, command: &Command, status: Status) {
        if sq != 0 {
            Counters::add(&self.shared.counters.errors, 1);
        }
        self.refusals += 1;
        // A host that sends nothing but nonsense must not be slowed down by the log.
        if self.refusals <= 100 || self.refusals.is_power_of_two() {
            log::warn!(
                "{} refused: {status:?}; dwords 10-12 {:#x} {:#x} {:#x}",
                self.describe(sq, command),
                command.dword(10),
                command.dword(11),
                command.dword(12)
            );
        }
        let lba = if sq != 0 { command.lba() } else { 0 };
        self.events.record_error(sq, command.id(), status, lba, command.namespace());
    }

    /// Whether the controller may access host memory: it is there, and the host lets it.
    #[inline]
    fn reaches_memory(&self) -> bool {
        // Relaxed: when this goes false, a request follows and is answered between two looks.
        self.shared.bus_master.load(Ordering::Relaxed) && !self.shared.faults.removed()
    }

    /// Room in a completion queue; asks the host's doorbell only when less than `wanted` is known of.
    #[inline]
    fn room(&mut self, id: u16, wanted: u32) -> u32 {
        if !self.reaches_memory() {
            return 0;
        }
        let Some(cq) = &self.cqs[usize::from(id)] else { return 0 };
        let room = cq.room();
        if room >= wanted {
            return room;
        }
        self.update_head(id);
        self.cqs[usize::from(id)].as_ref().map_or(0, CompletionQueue::room)
    }

    fn update_head(&mut self, id: u16) {
        let head = match self.shadow {
            Some(shadow) if id != 0 => {
                match self.view.load_u32(shadow.doorbells + self.shared.doorbell_offset(id, true) as u64) {
                    Ok(head) => head,
                    Err(fault) => {
                        self.fail_dma("reading a shadow doorbell", fault);
                        return;
                    }
                }
            }
            _ => self.shared.doorbell(id, true),
        };
        let Some(cq) = &mut self.cqs[usize::from(id)] else { return };
        if head == cq.head || Some(head) == cq.refused_head {
            return;
        }
        if !cq.advance(head) {
            cq.refused_head = Some(head);
            let (size, unread) = (cq.size, cq.unread());
            let text = format!("completion queue head {head} of {size} entries, {unread} unread");
            self.invalid_doorbell(id, text);
        }
    }

    fn invalid_doorbell(&mut self, queue: u16, text: String) {
        log::warn!("queue {queue}: invalid doorbell value: {text}; ignored");
        self.events.invalid_doorbell_value(queue);
        self.deliver_events();
    }

    /// Completes waiting Asynchronous Event Requests with the events there are.
    pub(crate) fn deliver_events(&mut self) {
        while let Some((id, result)) = self.events.next_delivery(&self.features) {
            self.post(Completion { result, sq: 0, id, status: Status::SUCCESS });
        }
        self.signal(0);
    }

    #[cold]
    fn fail_dma(&mut self, doing: &str, fault: DmaFault) -> bool {
        self.fail(&format!("{doing}: {fault}"));
        true
    }

    /// Reports a fatal status (CSTS.CFS) and stops.
    pub(crate) fn fail(&mut self, why: &str) {
        log::error!("controller fatal status: {why}");
        self.state = State::Failed;
        self.shared.registers().status |= CSTS_FATAL;
    }
}
