//! The admin queue: one command at a time, each with a deadline, beside outstanding asynchronous event requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vfio::{DmaBuffer, DmaSlice};

use super::hardware::Hardware;
use crate::command::admin;
use crate::error::Doing;
use crate::queue_pair::{Completed, QueuePair, QueueSettings};
use crate::{Command, Error, Status};

/// Entries of the admin queues: one command, its abort, and the event requests, with room to spare. CAP.MQES bounds I/O
/// queues only; AQA has room for 4096.
const ENTRIES: u16 = 16;
/// Asynchronous event requests kept outstanding, when the controller takes as many.
const EVENT_REQUESTS: u16 = 4;
/// Tokens of event requests; other commands count from 0 on.
const EVENT: u64 = 1 << 63;
const PAGE: usize = 4096;
/// Pages of data one admin command can move here.
const DATA_PAGES: usize = 4;
/// How long the controller has to act on an abort of an admin command that is overdue.
const ABORT_GRACE: Duration = Duration::from_millis(500);
/// How often CSTS is looked at while waiting, so that a controller that is gone is noticed before the deadline.
const ALIVE_INTERVAL: Duration = Duration::from_millis(20);

/// Most bytes of one admin command's data.
pub(crate) const MAX_DATA: usize = DATA_PAGES * PAGE;

/// The admin queue pair and what belongs to it.
pub(crate) struct Admin {
    pair: QueuePair,
    /// Data of the command under way, then a page for its PRP list.
    data: DmaBuffer,
    next_token: u64,
    answers: Vec<Completed>,
    /// Answered event requests, not looked at yet: the results.
    pub events: VecDeque<u32>,
    event_requests: u16,
    /// How many of them the controller has shown to take.
    event_limit: u16,
    /// Why nothing may be sent; `None` in operation.
    stopped: Option<&'static str>,
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
    pub fn new(hardware: &Hardware) -> Result<Admin, Error> {
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
            data: dma.allocate(MAX_DATA + PAGE).doing("allocate the admin data buffer")?,
            next_token: 0,
            answers: Vec::new(),
            events: VecDeque::new(),
            event_requests: 0,
            event_limit: EVENT_REQUESTS,
            stopped: Some("it has not been enabled"),
            tail: 0,
            head: 0,
            shadow: None,
        })
    }

    /// Enables the controller with these queues, which have to be as new.
    pub fn enable(&mut self, hardware: &Hardware) -> Result<(), Error> {
        hardware.enable(self.pair.entries(), self.pair.submission_iova(), self.pair.completion_iova())?;
        self.stopped = None;
        Ok(())
    }

    /// An error when nothing may be sent.
    pub fn check(&self, hardware: &Hardware) -> Result<(), Error> {
        match self.stopped {
            Some(why) => Err(Error::NotInOperation { controller: hardware.name.clone(), why }),
            None => Ok(()),
        }
    }

    /// Nothing may be sent from now on.
    pub fn stop(&mut self, why: &'static str) {
        self.stopped = Some(why);
    }

    /// The controller could not be stopped and may write to its memory for ever: it is not used again.
    pub fn abandon(&self) {
        self.pair.memory().abandon();
        self.data.abandon();
    }

    /// Makes the queues as new, after the controller was disabled.
    pub fn renew(&mut self) {
        self.pair.drain_after_reset(|_| {});
        self.answers.clear();
        self.events.clear();
        (self.event_requests, self.event_limit) = (0, EVENT_REQUESTS);
        (self.tail, self.head) = (0, 0);
        self.shadow = None;
    }

    /// From now on the tail and head are written to these places too.
    pub fn use_shadow(&mut self, shadow: AdminShadow) {
        shadow.publish(self.tail, self.head);
        self.shadow = Some(shadow);
    }

    /// Sends a command without data and waits for its result (completion DW0).
    pub fn execute(
        &mut self,
        hardware: &Hardware,
        command: Command,
        timeout: Duration,
        name: impl FnOnce() -> String,
    ) -> Result<u32, Error> {
        self.check(hardware)?;
        let token = self.next_token;
        self.next_token += 1;
        let id = self.push(command, token).ok_or_else(|| full(hardware))?;
        self.ring();
        let completed = match self.wait(hardware, token, timeout)? {
            Some(completed) => completed,
            None => {
                let name = name();
                let csts = hardware.csts_or_ones();
                log::warn!(
                    "{}: {name} is not answered within {timeout:?} (CSTS {csts:#x}); aborting it",
                    hardware.name
                );
                // Abort (NVMe Base 2.0, 5.1) is only advisory; whether it worked shows in the command itself.
                let abort = Command::new(admin::ABORT, 0).with_cdw10(u32::from(id) << 16);
                let abort_token = self.next_token;
                self.next_token += 1;
                if self.push(abort, abort_token).is_some() {
                    self.ring();
                }
                let Some(completed) = self.wait(hardware, token, ABORT_GRACE.min(timeout))? else {
                    // The controller may still write to the data buffer and the queues: only a reset ends that.
                    self.stopped = Some("an admin command was not answered in time");
                    return Err(Error::Timeout { command: name, waited: timeout, csts });
                };
                return answer(completed, || name);
            }
        };
        answer(completed, name)
    }

    /// Like `execute`, for a command that has the controller write `bytes` (at most [`MAX_DATA`]) to memory.
    pub fn execute_in(
        &mut self,
        hardware: &Hardware,
        command: Command,
        bytes: usize,
        timeout: Duration,
        name: impl FnOnce() -> String,
    ) -> Result<Vec<u8>, Error> {
        debug_assert!(bytes > 0 && bytes <= MAX_DATA);
        if self.stopped.is_none() {
            // What a lazy controller leaves unwritten has to read as zeroes, not as the answer before.
            self.data.write(0, &vec![0; bytes]).expect("the buffer has room for the largest answer");
        }
        let command = self.with_data(command, bytes);
        self.execute(hardware, command, timeout, name)?;
        let mut data = vec![0; bytes];
        self.data.read(0, &mut data).expect("the buffer has room for the largest answer");
        Ok(data)
    }

    /// Like `execute`, for a command that has the controller read `data` (at most [`MAX_DATA`] bytes).
    pub fn execute_out(
        &mut self,
        hardware: &Hardware,
        command: Command,
        data: &[u8],
        timeout: Duration,
        name: impl FnOnce() -> String,
    ) -> Result<u32, Error> {
        debug_assert!(!data.is_empty() && data.len() <= MAX_DATA);
        if self.stopped.is_none() {
            self.data.write(0, data).expect("the buffer has room for the longest data");
        }
        let command = self.with_data(command, data.len());
        self.execute(hardware, command, timeout, name)
    }

    /// The data pointer for the first `bytes` of the data buffer: PRP1 alone, with PRP2, or with a list
    /// (NVMe Base 2.0, 4.1.1).
    fn with_data(&self, command: Command, bytes: usize) -> Command {
        let first = self.data.iova();
        let page = |at: usize| first + (at * PAGE) as u64;
        match bytes.div_ceil(PAGE) {
            0 | 1 => command.with_prps(first, 0),
            2 => command.with_prps(first, page(1)),
            pages => {
                for at in 1..pages {
                    self.data
                        .write(MAX_DATA + 8 * (at - 1), &page(at).to_le_bytes())
                        .expect("the buffer ends with a page for the list");
                }
                command.with_prps(first, page(DATA_PAGES))
            }
        }
    }

    /// Keeps as many event requests outstanding as the controller takes (`limit`), and this driver wants.
    pub fn request_events(&mut self, limit: u16) {
        let wanted = self.event_limit.min(limit);
        while self.stopped.is_none() && self.event_requests < wanted {
            if self.push(Command::new(admin::ASYNC_EVENT_REQUEST, 0), EVENT).is_none() {
                break;
            }
            self.event_requests += 1;
        }
        self.ring();
    }

    /// Takes what the controller has answered; events go to `events`.
    pub fn reap(&mut self, hardware: &Hardware) {
        let answers = &mut self.answers;
        let (events, requests, limit) = (&mut self.events, &mut self.event_requests, &mut self.event_limit);
        let reaped = self.pair.reap(|completed| {
            if completed.token != EVENT {
                answers.push(completed);
                return;
            }
            *requests -= 1;
            if completed.status.is_success() {
                events.push_back(completed.result);
            } else {
                // One fewer from now on, or it would fail again and again.
                *limit = limit.saturating_sub(1);
                log::warn!("{}: an asynchronous event request failed: {}", hardware.name, completed.status);
            }
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
        loop {
            let waited = start.elapsed();
            self.reap(hardware);
            let found = self.answers.iter().position(|completed| completed.token == token);
            let found = found.map(|at| self.answers.swap_remove(at));
            // Answers to commands nobody waits for any more: aborts.
            self.answers.clear();
            if found.is_some() || waited >= timeout {
                return Ok(found);
            }
            if waited >= next_look {
                if let Err(error) = hardware.check() {
                    self.stopped = Some("the controller has failed");
                    return Err(error);
                }
                next_look = waited + ALIVE_INTERVAL;
            }
            // Most commands take microseconds; the others milliseconds to minutes.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(100).min(timeout - waited));
            }
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

fn advance(place: u16, by: usize, entries: u16) -> u16 {
    ((usize::from(place) + by) % usize::from(entries)) as u16
}

fn answer(completed: Completed, name: impl FnOnce() -> String) -> Result<u32, Error> {
    let status: Status = completed.status;
    if status.is_success() { Ok(completed.result) } else { Err(Error::Command { command: name(), status }) }
}

fn full(hardware: &Hardware) -> Error {
    // One command is out at a time: this takes a controller that answered events and left a dozen aborts unanswered.
    Error::NotInOperation { controller: hardware.name.clone(), why: "the admin queue is full" }
}
