//! The admin queue: one command at a time, each with a deadline, beside outstanding asynchronous event requests, and beside
//! commands that nobody waits for any more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vfio::{DmaBuffer, DmaSlice};

use super::hardware::Hardware;
use crate::error::Doing;
use crate::queue_pair::{Completed, QueuePair, QueueSettings};
use crate::spec::command::admin;
use crate::{Command, ControllerIdentity, Error, Status};

/// Entries of the admin queues. As many submission entries fill a page, which is what every driver uses, and what some drives
/// were only ever tried with. CAP.MQES bounds I/O queues only; AQA has room for 4096.
const ENTRIES: u16 = 64;
/// Asynchronous event requests kept outstanding, when the controller takes as many.
const EVENT_REQUESTS: u16 = 4;
/// Token of event requests, and of aborts of commands that are overdue; other commands count from 0 on.
const EVENT: u64 = 1 << 63;
const ABORT: u64 = 1 << 62;
/// So many commands may be overdue with nobody waiting for them ([`Loss::Borne`]); one more, and the controller has failed.
const MOST_LOST: usize = 8;
const PAGE: usize = 4096;
/// Pages of data one admin command can move here.
const DATA_PAGES: usize = 4;
/// How long the controller has to act on an abort of an admin command that is overdue.
const ABORT_GRACE: Duration = Duration::from_millis(500);
/// How often CSTS is looked at while waiting, so that a controller that is gone is noticed before the deadline.
const ALIVE_INTERVAL: Duration = Duration::from_millis(20);

/// How long a controller may pause that does not say so (MTFA).
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);

/// Most bytes of one admin command's data.
pub(crate) const MAX_DATA: usize = DATA_PAGES * PAGE;
/// A command's data, then a page for its PRP list.
const DATA_PLACE: usize = MAX_DATA + PAGE;

/// How long a command may take, and what it means if it takes longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub timeout: Duration,
    pub loss: Loss,
}

/// What a command means that is not answered in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Nothing more is sent: what the controller has done is not known, and only a reset ends that.
    Failure,
    /// Nothing but that the answer is not had: other commands go on beside it, and it may be answered later.
    Borne,
}

impl Patience {
    /// For a command without whose answer nothing goes on.
    pub(super) fn needed(timeout: Duration) -> Patience {
        Patience { timeout, loss: Loss::Failure }
    }
}

/// A command that nobody waits for any more, and that the controller may still answer.
struct Lost {
    token: u64,
    /// The place of its data, which the controller may still write to or read.
    place: usize,
}

/// The admin queue pair and what belongs to it.
pub(crate) struct Admin {
    pair: QueuePair,
    /// Places for data: one for the command under way, and one for each that may be lost.
    data: DmaBuffer,
    lost: Vec<Lost>,
    /// Aborts of overdue commands that are out, and how many there may be (ACL).
    aborts: u16,
    abort_limit: u16,
    /// How long a pause of the controller (CSTS.PP) may last.
    longest_pause: Duration,
    next_token: u64,
    answers: Vec<Completed>,
    /// Answered event requests, not looked at yet: the results.
    pub events: VecDeque<u32>,
    event_requests: u16,
    /// How many of them the controller has shown to take.
    event_limit: u16,
    /// Where the submission queue's tail and the completion queue's head are.
    tail: u16,
    head: u16,
    shadow: Option<AdminShadow>,
}

/// The admin queue's own places in the shadow doorbell page.
///
/// The registers are always written too: controllers differ in whether they look at these two.
pub(crate) struct AdminShadow {
    pub tail: DmaSlice<AtomicU32>,
    pub head: DmaSlice<AtomicU32>,
}

impl Admin {
    /// Allocates the queues; the controller is not told yet.
    pub(super) fn new(hardware: &Hardware) -> Result<Admin, Error> {
        let dma = hardware.device.dma();
        let (submission, completion) = hardware.doorbells(0)?;
        let settings = QueueSettings {
            id: 0,
            entries: ENTRIES,
            max_transfer: MAX_DATA as u32,
            sgl: None,
            sgl_refused: Arc::default(),
            timeout: Duration::from_secs(60),
            retry_delays: Default::default(),
            interrupt: None,
            shadow: None,
        };
        Ok(Admin {
            pair: QueuePair::new(dma, settings, submission, completion).doing("allocate the admin queues")?,
            data: dma.allocate((MOST_LOST + 1) * DATA_PLACE).doing("allocate the admin data buffer")?,
            lost: Vec::with_capacity(MOST_LOST),
            aborts: 0,
            abort_limit: 1,
            longest_pause: UNKNOWN_PAUSE,
            next_token: 0,
            answers: Vec::new(),
            events: VecDeque::new(),
            event_requests: 0,
            event_limit: EVENT_REQUESTS,
            tail: 0,
            head: 0,
            shadow: None,
        })
    }

    /// Enables the controller with these queues, which have to be as new.
    pub(super) fn enable(&mut self, hardware: &Hardware) -> Result<(), Error> {
        hardware.enable(self.pair.entries(), self.pair.submission_iova(), self.pair.completion_iova())?;
        hardware.standing.begin();
        Ok(())
    }

    /// What the controller says of aborts, and of pauses.
    pub(super) fn set_limits(&mut self, identity: &ControllerIdentity) {
        self.abort_limit = identity.abort_limit;
        self.longest_pause = identity.activation_time.unwrap_or(UNKNOWN_PAUSE);
    }

    /// The controller could not be stopped and may write to its memory for ever: it is not used again.
    pub(super) fn abandon(&self) {
        self.pair.memory().abandon();
        self.data.abandon();
    }

    /// Makes the queues as new, after the controller was disabled.
    pub(super) fn renew(&mut self) {
        self.pair.drain_after_reset(|_| {});
        self.answers.clear();
        self.lost.clear();
        self.aborts = 0;
        self.events.clear();
        (self.event_requests, self.event_limit) = (0, EVENT_REQUESTS);
        (self.tail, self.head) = (0, 0);
        self.shadow = None;
    }

    /// From now on the tail and head are written to these places too.
    pub(super) fn use_shadow(&mut self, shadow: AdminShadow) {
        shadow.publish(self.tail, self.head);
        self.shadow = Some(shadow);
    }

    /// Sends a command without data and waits for its result (completion DW0).
    pub(super) fn execute(
        &mut self,
        hardware: &Hardware,
        command: Command,
        patience: Patience,
        name: impl FnOnce() -> String,
    ) -> Result<u32, Error> {
        hardware.in_operation()?;
        if command.opcode() == admin::ABORT && self.aborts >= self.abort_limit {
            return Err(Error::Unsupported(format!("more than {} Abort commands at once (ACL)", self.abort_limit)));
        }
        let place = free_place(&self.lost);
        let token = self.next_token;
        self.next_token += 1;
        let id = self.push(command, token).ok_or_else(|| full(hardware))?;
        self.ring();
        if let Some(completed) = self.wait(hardware, token, patience.timeout)? {
            return answer(completed, name);
        }
        let (name, waited, csts) = (name(), patience.timeout, hardware.csts_or_ones());
        log::warn!("{}: {name} is not answered within {waited:?} (CSTS {csts:#x}); aborting it", hardware.name);
        // Abort (NVMe Base 2.0, 5.1) is only advisory; whether it worked shows in the command itself.
        if self.aborts < self.abort_limit {
            let abort = Command::new(admin::ABORT, 0).with_cdw10(u32::from(id) << 16);
            if self.push(abort, ABORT).is_some() {
                self.aborts += 1;
                self.ring();
            }
        }
        match patience.loss {
            Loss::Failure => match self.wait(hardware, token, ABORT_GRACE.min(waited))? {
                Some(completed) => answer(completed, || name),
                None => {
                    // The controller may still write to the data buffer and the queues: only a reset ends that.
                    hardware.standing.stop("an admin command was not answered in time");
                    Err(Error::Timeout { command: name, waited, csts })
                }
            },
            Loss::Borne => {
                self.lost.push(Lost { token, place });
                if self.lost.len() >= MOST_LOST {
                    hardware.standing.stop("many admin commands were not answered in time");
                }
                Err(Error::Unanswered { command: name, waited, csts })
            }
        }
    }

    /// Like `execute`, for a command that has the controller write `bytes` (at most [`MAX_DATA`]) to memory.
    pub(super) fn execute_in(
        &mut self,
        hardware: &Hardware,
        command: Command,
        bytes: usize,
        patience: Patience,
        name: impl FnOnce() -> String,
    ) -> Result<Vec<u8>, Error> {
        debug_assert!(bytes > 0 && bytes <= MAX_DATA);
        let at = free_place(&self.lost) * DATA_PLACE;
        if hardware.in_operation().is_ok() {
            // What a lazy controller leaves unwritten has to read as zeroes, not as the answer before.
            self.data.write(at, &vec![0; bytes]).expect("a place has room for the largest answer");
        }
        let command = self.with_data(command, at, bytes);
        self.execute(hardware, command, patience, name)?;
        let mut data = vec![0; bytes];
        self.data.read(at, &mut data).expect("a place has room for the largest answer");
        Ok(data)
    }

    /// Like `execute`, for a command that has the controller read `data` (at most [`MAX_DATA`] bytes).
    pub(super) fn execute_out(
        &mut self,
        hardware: &Hardware,
        command: Command,
        data: &[u8],
        patience: Patience,
        name: impl FnOnce() -> String,
    ) -> Result<u32, Error> {
        debug_assert!(!data.is_empty() && data.len() <= MAX_DATA);
        let at = free_place(&self.lost) * DATA_PLACE;
        if hardware.in_operation().is_ok() {
            self.data.write(at, data).expect("a place has room for the longest data");
        }
        let command = self.with_data(command, at, data.len());
        self.execute(hardware, command, patience, name)
    }

    /// The data pointer for the first `bytes` of the place that begins `at` so many bytes into the data buffer: PRP1 alone, with
    /// PRP2, or with a list (NVMe Base 2.0, 4.1.1).
    fn with_data(&self, command: Command, at: usize, bytes: usize) -> Command {
        let page = |number: usize| self.data.iova() + (at + number * PAGE) as u64;
        match bytes.div_ceil(PAGE) {
            0 | 1 => command.with_prps(page(0), 0),
            2 => command.with_prps(page(0), page(1)),
            pages => {
                for number in 1..pages {
                    self.data
                        .write(at + MAX_DATA + 8 * (number - 1), &page(number).to_le_bytes())
                        .expect("a place ends with a page for the list");
                }
                command.with_prps(page(0), page(DATA_PAGES))
            }
        }
    }

    /// Keeps as many event requests outstanding as the controller takes (`limit`), and this driver wants.
    pub(super) fn request_events(&mut self, hardware: &Hardware, limit: u16) {
        let wanted = self.event_limit.min(limit);
        while self.event_requests < wanted && hardware.in_operation().is_ok() {
            if self.push(Command::new(admin::ASYNC_EVENT_REQUEST, 0), EVENT).is_none() {
                break;
            }
            self.event_requests += 1;
        }
        self.ring();
    }

    /// Takes what the controller has answered; events go to `events`.
    pub(super) fn reap(&mut self, hardware: &Hardware) {
        let Admin { pair, answers, lost, aborts, events, event_requests, event_limit, .. } = self;
        let reaped = pair.reap(|completed| match completed.token {
            EVENT => {
                *event_requests -= 1;
                if completed.status.is_success() {
                    events.push_back(completed.result);
                } else {
                    // One fewer from now on, or it would fail again and again.
                    *event_limit = event_limit.saturating_sub(1);
                    log::warn!("{}: an asynchronous event request failed: {}", hardware.name, completed.status);
                }
            }
            ABORT => *aborts -= 1,
            token => match lost.iter().position(|lost| lost.token == token) {
                // Its data is nobody's any more; what matters is that its place is free again.
                Some(at) => {
                    lost.swap_remove(at);
                    log::info!("{}: an overdue admin command is answered: {}", hardware.name, completed.status);
                }
                None => answers.push(completed),
            },
        });
        self.head = advance(self.head, reaped, self.pair.entries());
        if let Some(shadow) = &self.shadow
            && reaped > 0
        {
            shadow.publish(self.tail, self.head);
        }
    }

    fn push(&mut self, command: Command, token: u64) -> Option<u16> {
        let id = self.pair.push(command, token).ok()?;
        self.tail = advance(self.tail, 1, self.pair.entries());
        Some(id.0)
    }

    fn ring(&mut self) {
        if let Some(shadow) = &self.shadow {
            shadow.publish(self.tail, self.head);
        }
        self.pair.ring();
    }

    /// Waits for the answer with `token`; `None` when the time is over.
    fn wait(&mut self, hardware: &Hardware, token: u64, timeout: Duration) -> Result<Option<Completed>, Error> {
        let start = Instant::now();
        let mut next_look = ALIVE_INTERVAL;
        let mut pauses = Pauses { timeout, allowance: self.longest_pause, seen: Duration::ZERO };
        loop {
            let waited = start.elapsed();
            self.reap(hardware);
            let found = self.answers.iter().position(|completed| completed.token == token);
            let found = found.map(|at| self.answers.swap_remove(at));
            self.answers.clear();
            if found.is_some() || waited >= pauses.timeout {
                return Ok(found);
            }
            // Somebody is about to stop the controller: not kept waiting by a command that nobody needs any more.
            hardware.in_operation()?;
            if waited >= next_look {
                if let Err(error) = hardware.check() {
                    hardware.standing.stop("the controller has failed");
                    return Err(error);
                }
                pauses.look(waited, hardware.paused());
                next_look = waited + ALIVE_INTERVAL;
            }
            // Most commands take microseconds; the others milliseconds to minutes.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(100).min(pauses.timeout.saturating_sub(waited)));
            }
        }
    }
}

/// A deadline that moves while the controller has paused its commands: the pause does not count, as long as it may last.
struct Pauses {
    timeout: Duration,
    /// What is left of it.
    allowance: Duration,
    /// When was last looked, since the beginning of the wait.
    seen: Duration,
}

impl Pauses {
    fn look(&mut self, waited: Duration, paused: bool) {
        let since = waited.saturating_sub(std::mem::replace(&mut self.seen, waited));
        if paused {
            let counted = since.min(self.allowance);
            self.allowance -= counted;
            self.timeout += counted;
        }
    }
}

impl AdminShadow {
    fn publish(&self, written: u16, reaped: u16) {
        // Release: pairs with the controller's Acquire of the shadow; it sees the entries written before.
        if let ([tail], [head]) = (&*self.tail, &*self.head) {
            tail.store(written.into(), Ordering::Release);
            head.store(reaped.into(), Ordering::Release);
        }
    }
}

/// The place for the data of the next command: not one that the controller may still use for a command that is lost.
fn free_place(lost: &[Lost]) -> usize {
    // There is one more than can be lost.
    (0..MOST_LOST).find(|&place| lost.iter().all(|lost| lost.place != place)).unwrap_or(MOST_LOST)
}

fn advance(place: u16, by: usize, entries: u16) -> u16 {
    ((usize::from(place) + by) % usize::from(entries)) as u16
}

fn answer(completed: Completed, name: impl FnOnce() -> String) -> Result<u32, Error> {
    let status: Status = completed.status;
    if status.is_success() { Ok(completed.result) } else { Err(Error::Command { command: name(), status }) }
}

fn full(hardware: &Hardware) -> Error {
    // One command is waited for at a time: this takes a controller that answers with wrong identifiers.
    Error::NotInOperation { controller: hardware.name.clone(), why: "the admin queue is full" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_of_a_lost_command_keeps_its_place() {
        let mut lost: Vec<Lost> = Vec::new();
        for token in 0..MOST_LOST as u64 {
            let place = free_place(&lost);
            assert!(lost.iter().all(|lost| lost.place != place), "{place} twice");
            lost.push(Lost { token, place });
        }
        assert_eq!(free_place(&lost), MOST_LOST, "as many as there are");
        lost.retain(|lost| lost.token != 5);
        assert_eq!(free_place(&lost), 5, "answered: free again");
    }

    #[test]
    fn a_pause_of_the_controller_does_not_count_as_long_as_it_may_last() {
        let seconds = Duration::from_secs;
        let mut pauses = Pauses { timeout: seconds(10), allowance: seconds(30), seen: Duration::ZERO };
        pauses.look(seconds(4), false);
        assert_eq!(pauses.timeout, seconds(10));
        for at in 5..=24 {
            pauses.look(seconds(at), true);
        }
        assert_eq!(pauses.timeout, seconds(30), "20 seconds of pause");
        pauses.look(seconds(25), false);
        for at in 26..=60 {
            pauses.look(seconds(at), true);
        }
        assert_eq!(pauses.timeout, seconds(40), "30 at most");
    }
}
