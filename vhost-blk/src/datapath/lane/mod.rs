//! A lane: a guest's virtqueue joined to an NVMe queue pair.
//!
//! The lane takes chains off the ring, turns them into work for the queue pair, and gives them back with a status when the
//! drive has answered. It belongs to one thread at a time and shares nothing it writes: no lock, no allocation and no system
//! call on a request's way, one publication and at most one signal to the guest per batch.
//!
//! A ring with an in-flight log notes what it gives out and takes back. If another process had the ring before, the lane first does
//! the requests that the other process has not answered, in their order.

mod advice;
mod bounce;
mod control;
mod events;
mod flush;
mod mode;
mod multi_command;
mod record;
mod retry;
mod sgls;
mod slots;
mod suspects;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme_driver::{BouncePool, QueuePair, Status, SubmitError};

use advice::Advice;
use bounce::BouncedRequests;
use events::Events;
use flush::Changes;
use mode::{DriveAccess, Mode};
use multi_command::MultiCommand;
use record::{DetailsBySlot, Record};
use retry::{Retries, work};
use slots::{Answer, SlotState, Slots, UsedLength};

use crate::blk::disk::{Disk, Geometry};
use crate::blk::request::{self, Operation, Parsed, Parser, Request};
use crate::datapath::admission::Admission;
use crate::datapath::counters::{LaneCounters, Tally};
use crate::log_limit::{Kind, LogLimit};
use crate::virtio::memory::{GuestMemory, GuestView};
use crate::virtio::ring::{Chain, Head, Ring, SimpleChainRing};

/// What a lane is made from.
pub struct LaneSetup {
    /// For the log: the export and the queue's index.
    pub name: String,
    /// The virtqueue.
    pub ring: Ring,
    /// The guest's memory, in which the addresses of its requests are looked up. It has to hold the ring.
    pub memory: Arc<GuestMemory>,
    /// The disk it serves.
    pub disk: Arc<Disk>,
    /// Signalled by the driver's side when there is work for a sleeping lane; `None`: the lane has to be polled for ever.
    pub kick: Option<File>,
    /// Signalled by the lane when the driver wants to hear of used chains; `None`: the driver polls.
    pub call: Option<File>,
    /// Signalled by the lane when it stops for good (VHOST_USER_SET_VRING_ERR).
    pub error: Option<File>,
    /// Where the lane counts.
    pub counters: Arc<LaneCounters>,
    /// How many lines the lane may write to the log; shared by the lanes of a disk.
    pub log: Arc<LogLimit>,
    /// How long a request waits for a drive that is not ready for it.
    pub hold: Duration,
}

/// What others may know of a lane that a worker owns.
#[derive(Debug, Default)]
pub struct LaneState {
    broken: AtomicBool,
}

impl LaneState {
    /// Did the guest break its ring? The lane does nothing any more, and the device needs a reset.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }
}

/// A virtqueue being served.
pub struct Lane {
    ring: Ring,
    view: GuestView,
    chain: Chain,
    parser: Parser,
    slots: Slots,
    mode: Mode,
    /// Requests that an earlier process has not answered are done first.
    resuming: bool,
    drive: DriveAccess,
    admission: Admission,
    retries: Retries,
    multi_command: MultiCommand,
    details: DetailsBySlot,
    changes: Changes,
    /// The chain of the request that is still in the parser because it found the queue pair full.
    pending: Option<Head>,
    bounced: BouncedRequests,
    tally: Tally,
    disk: Arc<Disk>,
    /// The disk's blocks, as the fast path checks transfers.
    geometry: Geometry,
    events: Events,
    advice: Advice,
    counters: Arc<LaneCounters>,
    log: Arc<LogLimit>,
    state: Arc<LaneState>,
    name: String,
}

impl Lane {
    /// A lane that takes its first request when it is polled.
    pub fn new(setup: LaneSetup) -> Lane {
        let LaneSetup { name, ring, memory, disk, kick, call, error, counters, log, hold } = setup;
        let size = ring.size();
        let resuming = ring.resumed();
        let tally = counters.read();
        Lane {
            advice: Advice::new(&ring, tally.batches),
            ring,
            view: GuestView::new(memory),
            chain: Chain::new(),
            parser: Parser::new(),
            slots: Slots::new(size),
            mode: Mode::Running,
            resuming,
            drive: DriveAccess::Attached,
            admission: Admission::default(),
            retries: Retries::new(hold),
            multi_command: MultiCommand::default(),
            details: DetailsBySlot::default(),
            changes: Changes::default(),
            pending: None,
            bounced: BouncedRequests::default(),
            tally,
            geometry: disk.geometry(),
            disk,
            events: Events::new(kick, call, error),
            counters,
            log,
            state: Arc::default(),
            name,
        }
    }

    /// For the log: the export and the queue's index.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many lines the lane may write to the log.
    pub(crate) fn log(&self) -> &LogLimit {
        &self.log
    }

    /// What others may watch while a worker owns the lane.
    pub fn state(&self) -> &Arc<LaneState> {
        &self.state
    }

    /// Requests the drive has not answered yet.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.slots.taken()
    }

    /// Where the ring's next user begins, see [`Ring::base`]; right only when nothing is in flight.
    pub fn base(&self) -> u32 {
        self.ring.base()
    }

    /// Takes what the driver made available, as far as it is admitted, and hands it to `pair`; the caller rings the doorbell. `tag` is
    /// or-ed into each token, whose lower 16 bits are the request's slot. Returns how many chains were taken.
    #[inline]
    pub(crate) fn submit(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> usize {
        let taken = self.submit_batch(pair, pool, tag);
        // What is answered from here on is shown by the next `publish`.
        self.slots.mark();
        taken
    }

    #[inline(always)]
    fn submit_batch(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> usize {
        if !self.bounced.is_empty() {
            self.advance_bounced(pair, pool, tag);
        }
        // Before anything new.
        if !self.retries.is_empty() && !self.issue_retries(pair, tag) {
            return 0;
        }
        if !self.mode.is_running() || self.resuming {
            return self.submit_when_not_running(pair, tag);
        }
        if let Some(head) = self.pending.take()
            && !self.submit_pending(pair, tag, head)
        {
            return 0;
        }
        let mut taken = 0;
        // Without a free slot the guest has more in flight than its ring holds: it has to wait.
        while !self.submit_fast_path(pair, tag, &mut taken) && self.admission.admits(taken) && !self.slots.all_taken() {
            let head = match self.ring.pop(&mut self.view, &mut self.chain) {
                Ok(Some(head)) => head,
                Ok(None) => break,
                Err(error) => {
                    self.break_down(&error);
                    break;
                }
            };
            taken += 1;
            self.note_length();
            match self.parser.parse(&self.chain, &mut self.view, &self.disk) {
                Parsed::Submit => {
                    if !self.submit_parsed(pair, tag, head) {
                        break;
                    }
                }
                Parsed::Answer(code) => {
                    self.note_refused(code);
                    self.answer(head, code);
                }
                Parsed::NoStatus => {
                    self.break_down_without_status(head);
                    break;
                }
            }
        }
        taken
    }

    /// The fast path, which nearly all small requests take: simple chains, without the stores that a chain and its segments need
    /// otherwise. Adds to `taken` how many it took. True: nothing is left; false: what is next is open.
    #[inline(always)]
    fn submit_fast_path(&mut self, pair: &mut QueuePair, tag: u64, taken: &mut usize) -> bool {
        let Lane { ring, view, slots, admission, tally, disk, geometry, .. } = self;
        // Once per format, so that it is not asked for each request.
        let mut fast_path = FastPath { view, slots, admission, tally, disk, geometry, pair, tag };
        match ring {
            Ring::Split(ring) => fast_path.submit(ring, taken),
            Ring::Packed(ring) => fast_path.submit(ring, taken),
        }
    }

    /// Hands the request in the parser to the queue pair; false if there is no room: it is kept for the next time.
    fn submit_parsed(&mut self, pair: &mut QueuePair, tag: u64, head: Head) -> bool {
        let (buffers, ranges) = (self.chain.readable().len() + self.chain.writable().len(), self.parser.ranges.len());
        if self.slots.all_taken() || !self.details.has_room(buffers, ranges) {
            self.pending = Some(head);
            return false;
        }
        let flush = match self.parser.request.operation {
            Operation::Flush => match self.begin_flush() {
                Some(number) => number,
                None => {
                    self.refuse_parsed(head);
                    return true;
                }
            },
            _ => 0,
        };
        let Parser { request, segments, ranges, .. } = &self.parser;
        let work = work(request, segments, ranges, self.disk.force_unit_access());
        let Some(mut slot) = self.slots.reserve() else { return false };
        match pair.submit(&self.disk.namespace, work, tag | u64::from(slot.number())) {
            Ok(()) => {
                self.details.keep_parsed(slot.number(), request, &self.chain, ranges);
                slot.fill(request.status, UsedLength::detailed(), Record::detailed(request.operation, flush));
                slot.take(head);
                count(&mut self.tally, request);
                true
            }
            Err(error) => self.not_submitted(error, head),
        }
    }

    /// What [`Lane::submit_parsed`] returns when the queue pair did not take the request.
    #[cold]
    #[inline(never)]
    fn not_submitted(&mut self, error: SubmitError, head: Head) -> bool {
        match error {
            SubmitError::Full | SubmitError::Crowded => {
                self.multi_command.crowded = error == SubmitError::Crowded;
                self.tally.full += 1;
                self.pending = Some(head);
                return false;
            }
            SubmitError::NeedsBounce => {
                self.bounce(head);
                return true;
            }
            _ => {}
        }
        self.warn(&format_args!("a request cannot be submitted to the drive: {error}"));
        self.refuse_parsed(head);
        true
    }

    /// Answers the request in the parser, which is not for the drive.
    fn answer(&mut self, head: Head, code: u8) {
        self.tally.answered += 1;
        let Request { status, written, .. } = self.parser.request;
        self.give_back(head, code, status, written);
    }

    /// Answers the request in the parser with an error instead of giving it to the drive.
    fn refuse_parsed(&mut self, head: Head) {
        self.answer(head, request::IOERR);
    }

    #[inline(always)]
    fn give_back(&mut self, head: Head, code: u8, status: u64, written: u32) {
        if code != request::OK {
            self.tally.errors += 1;
        }
        // The status byte was found in guest memory when the request was parsed, and no table loses a region meanwhile.
        let _ = self.view.write_byte(status, code);
        self.ring.push_used(head, written);
    }

    /// The drive has answered the request with this token.
    #[inline(always)]
    pub(crate) fn complete(&mut self, token: u64, status: Status) {
        let number = token as u16;
        if !status.is_success() {
            return self.complete_failed(number, status);
        }
        // Also after the guest broke its ring: see `break_down`.
        let Some(Answer { status: address, head, written }) = self.slots.answer(number) else {
            return self.complete_slow_path(number, status);
        };
        self.give_back(head, request::OK, address, written);
    }

    /// The drive has answered what [`Lane::complete`] does not know: a request with details, a piece of a bounced request, or a request
    /// of a guest that has broken its ring since.
    #[cold]
    #[inline(never)]
    fn complete_slow_path(&mut self, number: u16, status: Status) {
        if let Some((request, head)) = self.recorded_request(number) {
            if request.operation == Operation::Flush {
                self.flush_succeeded(number);
            }
            self.succeeds_without_sgl(number);
            self.details.drop_slot(number);
            self.slots.free_held(number);
            return self.give_back(head, request::OK, request.status, request.written);
        }
        match self.slots.state(number) {
            Some(SlotState::Orphaned) => self.slots.free_empty(number),
            Some(SlotState::Bounced(index)) => self.bounced_piece_done(index, number, status),
            _ => {}
        }
    }

    /// Logs a failed request, each doubling of their number: neither a failing drive nor a guest can fill the log.
    fn warn(&mut self, what: &dyn std::fmt::Display) {
        let failed = self.tally.errors + 1;
        if failed.is_power_of_two() {
            log::warn!("{}: {what} ({failed} failed requests so far)", self.name);
        }
    }

    /// Shows the driver everything answered since the last time, and notifies it if it asked for that.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.mode.is_broken() || !self.ring.unpublished() {
            return;
        }
        self.note_changes();
        if self.ring.publish() {
            self.notify();
        }
        self.tally.batches += 1;
        self.counters.write(&self.tally);
    }

    /// A turn of a lane that is resuming, moving, stopping or broken; returns how many chains were taken.
    #[cold]
    #[inline(never)]
    fn submit_when_not_running(&mut self, pair: &mut QueuePair, tag: u64) -> usize {
        self.stop_multi_command(pair, tag);
        if !self.resuming || self.mode == Mode::Moving {
            return 0;
        }
        self.take_all(|lane, head| lane.submit_pending(pair, tag, head))
    }

    /// A turn without a drive: if its hold has expired, takes requests only to answer them with an error. Returns how many.
    #[cold]
    pub(crate) fn refuse(&mut self) -> usize {
        if self.drive != DriveAccess::HoldExpired || !self.takes_requests() {
            return 0;
        }
        self.take_all(|lane, head| {
            lane.refuse_parsed(head);
            true
        })
    }

    /// Does the lane take requests, if only to refuse them?
    fn takes_requests(&self) -> bool {
        match self.mode {
            Mode::Running => true,
            // What an earlier process has taken cannot be left in the ring.
            Mode::Stopping(_) => self.resuming,
            Mode::Moving | Mode::Broken => false,
        }
    }

    /// Takes chains as far as they are admitted, those of an earlier process as long as there are any, and calls `give` with each
    /// request; `give` returns false if it had to keep one for the next turn. Returns how many chains were taken.
    fn take_all(&mut self, mut give: impl FnMut(&mut Lane, Head) -> bool) -> usize {
        if let Some(head) = self.pending.take()
            && !give(self, head)
        {
            return 0;
        }
        let mut taken = 0;
        while self.admission.admits(taken) {
            let popped = match self.resuming {
                true => self.ring.pop_unfinished(&mut self.view, &mut self.chain),
                false => self.ring.pop(&mut self.view, &mut self.chain),
            };
            match popped {
                Ok(Some(head)) => match self.parser.parse(&self.chain, &mut self.view, &self.disk) {
                    Parsed::Submit if give(self, head) => {}
                    Parsed::Submit => return taken + 1,
                    Parsed::Answer(code) => self.answer(head, code),
                    Parsed::NoStatus => {
                        self.break_down_without_status(head);
                        return taken;
                    }
                },
                Ok(None) => {
                    self.resuming = false;
                    return taken;
                }
                Err(error) => {
                    self.break_down(&error);
                    return taken;
                }
            }
            taken += 1;
        }
        taken
    }

    /// The guest broke its ring: the lane shows it what was answered so far, then leaves the ring alone for good.
    #[cold]
    #[inline(never)]
    fn break_down(&mut self, why: &dyn std::fmt::Display) {
        if let Some(more) = self.log.admit(Kind::Broken) {
            log::error!("{}: the guest broke its virtqueue, the device needs a reset: {why}{more}", self.name);
        }
        self.publish();
        self.counters.write(&self.tally);
        self.mode = Mode::Broken;
        self.resuming = false;
        self.pending = None;
        self.forget_waiting();
        self.multi_command.over = true;
        // What the drive still has is waited for, and not answered.
        self.slots.orphan_all();
        self.details.drop_all();
        self.state.set_broken();
        self.events.tell_broken();
    }
}

/// What the fast path needs of a lane and its queue pair.
struct FastPath<'a> {
    view: &'a mut GuestView,
    slots: &'a mut Slots,
    admission: &'a mut Admission,
    tally: &'a mut Tally,
    disk: &'a Disk,
    geometry: &'a Geometry,
    pair: &'a mut QueuePair,
    tag: u64,
}

impl FastPath<'_> {
    /// Takes simple chains as long as there are any, and commits to them; returns what [`Lane::submit_fast_path`] does.
    #[inline(always)]
    fn submit(&mut self, ring: &mut impl SimpleChainRing, taken: &mut usize) -> bool {
        let before = *taken;
        let done = self.submit_accepted(ring, taken);
        if *taken != before {
            ring.commit();
        }
        done
    }

    /// Takes simple chains as long as there are any; those that `taken` counts then are still to be committed.
    #[inline(always)]
    fn submit_accepted(&mut self, ring: &mut impl SimpleChainRing, taken: &mut usize) -> bool {
        while self.admission.admits(*taken)
            && let Some(mut slot) = self.slots.reserve()
        {
            let simple = request::peek_simple(ring, self.view, self.disk, self.geometry);
            let Some((chain, request, segment)) = simple else { return ring.is_empty() };
            let Request { operation, lba, bytes, status, written } = request;
            let write = operation == Operation::Write;
            // Now, while all of it is at hand.
            slot.fill(status, UsedLength::simple(written), Record::simple(write, lba, chain.middle.address, bytes));
            let work = work(&request, std::slice::from_ref(&segment), &[], write && self.disk.force_unit_access());
            // Refused, blocks the disk does not have among the reasons: the slow path finds out why.
            if self.pair.submit(&self.disk.namespace, work, self.tag | u64::from(slot.number())).is_err() {
                slot.release();
                return false;
            }
            slot.take(ring.accept(chain.head));
            count(self.tally, &request);
            *taken += 1;
        }
        false
    }
}

#[inline(always)]
fn count(tally: &mut Tally, request: &Request) {
    match request.operation {
        Operation::Read => {
            tally.reads += 1;
            tally.bytes_read += u64::from(request.bytes);
        }
        Operation::Write => {
            tally.writes += 1;
            tally.bytes_written += u64::from(request.bytes);
        }
        Operation::Flush => tally.flushes += 1,
        Operation::Discard => tally.discards += 1,
        Operation::WriteZeroes | Operation::WriteZeroesUnmap => tally.write_zeroes += 1,
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.in_flight() != 0 {
            // The drive may still write to this memory. Unmapped, its DMA addresses could be given to another guest.
            log::error!(
                "{}: dropped with {} requests in flight; its guest memory stays mapped",
                self.name,
                self.in_flight()
            );
            std::mem::forget(self.view.memory().clone());
        }
    }
}

#[cfg(test)]
mod bounce_tests;
#[cfg(test)]
mod multi_command_tests;
#[cfg(test)]
mod retry_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
