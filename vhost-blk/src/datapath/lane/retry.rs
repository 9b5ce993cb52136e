//! Retry: requests that are given to the drive once more, because the drive said that they may be tried again, or was detached
//! before it answered.
//!
//! What a request asks was kept with its slot when it was found in the guest's memory, and is not read there again. Only where the
//! drive sees the data is looked up anew: a drive that was attached again may see it elsewhere.
//!
//! Requests that were under way when the drive was detached are given to it in no particular order: virtio promises none between
//! requests in flight, and to know theirs would cost each request something.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use nvme_driver::spec::status::Retry;
use nvme_driver::{LbaRange, QueuePair, Segment, Status, SubmitError, Work};

use super::Lane;
use super::mode::DriveAccess;
use super::record::{MOST_RETRIES, NO_SGL, RETRY};
use super::sgls::Sgls;
use crate::blk::config;
use crate::blk::request::{self, Operation, Request};
use crate::datapath::admission::BATCH;
use crate::datapath::stop_policy::StopPolicy;
use crate::log_limit::Kind;
use crate::virtio::memory::GuestView;
use crate::virtio::ring::Buffer;

/// Before the second try of a request that the drive is not ready for; each time twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// When a request is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// After this one of the controller's retry delays (NVMe Base 2.0, figure 94, CRD); 0: at once.
    Drives(u8),
    /// Not before this time.
    Until(Instant),
}

/// A slot whose request is to be given to the drive.
struct ReadyRetry {
    slot: u16,
    /// Which of the controller's retry delays (NVMe Base 2.0, figure 94, CRD) comes first; 0: none.
    delay: u8,
}

/// Requests to be given to the drive once more.
#[derive(Default)]
pub(super) struct Retries {
    /// How long a request is tried that the drive is not ready for.
    hold: Duration,
    /// By slot: until when a request is tried that the drive was not ready for.
    deadlines: HashMap<u16, Instant>,
    /// Answers that allowed another try.
    allowed: u64,
    /// How many requests there are, and one more while SGLs are to be refused.
    count: usize,
    /// Requests to be issued as soon as the drive has room, in their order.
    ready: VecDeque<ReadyRetry>,
    /// Multi-command requests, to be issued when the queue pair has room for one more of these.
    crowded: VecDeque<u16>,
    /// Requests that are not to be issued before a time.
    paused: Paused,
    segments: Vec<Segment>,
    pub sgls: Sgls,
    /// The drive was last heard to refuse writes, and this was logged.
    pub write_protected: bool,
}

impl Retries {
    /// `hold`: how long a request is tried that the drive is not ready for.
    pub(super) fn new(hold: Duration) -> Retries {
        Retries { hold, ..Retries::default() }
    }

    /// Adds a request that is not to be issued before `due`.
    fn push_at(&mut self, slot: u16, due: Instant) {
        self.count += 1;
        self.paused.push(due, slot);
    }

    /// Is there nothing to do?
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The drive has answered an SGL with this: it is not to get any more.
    pub(super) fn refuse_sgls(&mut self, status: Status) {
        // To be looked at, though no request waits.
        self.count += usize::from(self.sgls.refused.replace(status).is_none());
    }

    /// Adds a request. `delay`: which of the controller's retry delays comes first; 0: none.
    pub(super) fn push(&mut self, slot: u16, delay: u8) {
        self.count += 1;
        self.ready.push_back(ReadyRetry { slot, delay });
    }

    /// The requests that wait for nothing but room.
    pub(super) fn ready(&self) -> impl Iterator<Item = u16> {
        self.ready.iter().map(|waiting| waiting.slot)
    }

    /// Takes the first request that waits for nothing but room and is as wanted.
    pub(super) fn take_one(&mut self, mut wanted: impl FnMut(u16) -> bool) -> Option<u16> {
        let at = self.ready.iter().position(|waiting| wanted(waiting.slot))?;
        self.count -= 1;
        self.ready.remove(at).map(|waiting| waiting.slot)
    }

    /// The request in this slot does not wait any longer.
    pub(super) fn forget(&mut self, slot: u16) {
        self.take_one(|waiting| waiting == slot);
    }

    /// Takes all requests.
    fn take_all(&mut self) -> impl Iterator<Item = u16> + use<> {
        self.count = usize::from(self.sgls.refused.is_some());
        let (ready, crowded) = (std::mem::take(&mut self.ready), std::mem::take(&mut self.crowded));
        let paused = std::mem::take(&mut self.paused);
        ready.into_iter().map(|waiting| waiting.slot).chain(crowded).chain(paused.into_slots())
    }
}

/// Slots whose requests wait for a time to pass. Nothing is done for them before.
#[derive(Default)]
pub(super) struct Paused {
    slots: Vec<(Instant, u16)>,
    /// When the first is due.
    soonest: Option<Instant>,
}

impl Paused {
    /// Has the request in a slot wait until `due`.
    pub(super) fn push(&mut self, due: Instant, slot: u16) {
        self.soonest = Some(self.soonest.map_or(due, |soonest| soonest.min(due)));
        self.slots.push((due, slot));
    }

    /// Calls `over` with each slot whose time has come.
    pub(super) fn look(&mut self, mut over: impl FnMut(u16)) {
        let Some(soonest) = self.soonest else { return };
        let now = Instant::now();
        if now < soonest {
            return;
        }
        self.slots.retain(|&(due, slot)| {
            let waits = now < due;
            if !waits {
                over(slot);
            }
            waits
        });
        self.soonest = self.slots.iter().map(|&(due, _)| due).min();
    }

    /// The slots, whatever the time.
    pub(super) fn into_slots(self) -> impl Iterator<Item = u16> {
        self.slots.into_iter().map(|(_, slot)| slot)
    }
}

impl Lane {
    /// Issues the requests that are due, at most a batch; false if more of them are to be issued before anything else.
    #[cold]
    #[inline(never)]
    pub(super) fn issue_retries(&mut self, pair: &mut QueuePair, tag: u64) -> bool {
        if let Some(status) = self.retries.sgls.refused.take() {
            self.retries.count -= 1;
            self.refuse_sgls(pair, status);
        }
        let Retries { ready, crowded, paused, .. } = &mut self.retries;
        paused.look(|slot| ready.push_back(ReadyRetry { slot, delay: 0 }));
        // One is enough to look at.
        if let Some(&slot) = crowded.front()
            && pair.admits(tag, self.details.entries(slot))
        {
            crowded.pop_front();
            ready.push_front(ReadyRetry { slot, delay: 0 });
        }
        for _ in 0..BATCH {
            // Before anything is done for it: it may wait for long.
            if pair.is_full() {
                break;
            }
            let Some(entry) = self.retries.ready.pop_front() else { return true };
            if entry.delay != 0 {
                self.retries.paused.push(Instant::now() + pair.retry_delay(entry.delay), entry.slot);
            } else if self.retry(pair, tag, entry.slot) {
                self.retries.count -= 1;
            } else {
                self.retries.ready.push_front(entry);
                break;
            }
        }
        self.retries.ready.is_empty()
    }

    /// Gives the drive the request in a slot once more; false if there is no room for it.
    pub(super) fn retry(&mut self, pair: &mut QueuePair, tag: u64, number: u16) -> bool {
        let Some((request, head)) = self.recorded_request(number) else { return true };
        if request.operation == Operation::Flush {
            let begun = self.begin_flush_retry(number);
            match (begun, self.slots.held_mut(number)) {
                (Some(flush), Some(slot)) => slot.record.set_flush_number(flush),
                _ => {
                    self.fail_slot(number);
                    return true;
                }
            }
        }
        let Lane { retries: Retries { segments, sgls, .. }, details, slots, view, disk, .. } = self;
        let kept = slots.held_mut(number).map(|slot| slot.record).unwrap_or_default();
        let lists = details.get(number);
        let one = [Buffer { address: kept.data, bytes: kept.bytes() }];
        let buffers = if kept.bytes() != 0 { &one } else { lists.map_or(&[][..], |lists| &lists.buffers) };
        let ranges = lists.map_or(&[][..], |lists| &lists.ranges);
        let submitted = match find(view, buffers.iter().copied(), segments) {
            Some(()) => {
                let work = work(&request, segments, ranges, disk.force_unit_access());
                match kept.has(NO_SGL) {
                    false => pair.submit(&disk.namespace, work, tag | u64::from(number)),
                    true if pair.describes_by_sgl(&disk.namespace, &work) => {
                        pair.submit_without_sgls(&disk.namespace, work, tag | u64::from(number))
                    }
                    // The field was another: it would be the same command.
                    true => {
                        let status = sgls.doubted;
                        self.warn_of(status);
                        self.fail_slot(number);
                        return true;
                    }
                }
            }
            None => Err(SubmitError::Invalid("guest memory is gone")),
        };
        match submitted {
            Ok(()) => {
                self.tally.again += 1;
            }
            Err(SubmitError::Full) => return false,
            Err(SubmitError::Crowded) => {
                self.retries.crowded.push_back(number);
                self.retries.count += 1;
            }
            Err(SubmitError::NeedsBounce) => {
                let lists = details.take(number).unwrap_or_else(|| details.keep(request, one.into_iter(), &[]));
                self.bounce_in(number, head, lists, true);
            }
            Err(error) => {
                self.warn(&format_args!("a request cannot be submitted to the drive again: {error}"));
                self.fail_slot(number);
            }
        }
        true
    }

    /// The request in a slot that waits for an answer, and its chain.
    pub(super) fn recorded_request(&mut self, number: u16) -> Option<(Request, crate::virtio::ring::Head)> {
        let slot = *self.slots.held_mut(number)?;
        let kept = slot.record;
        if kept.bytes() == 0 {
            return Some((self.details.get(number)?.request, slot.head));
        }
        let operation = if kept.changes() { Operation::Write } else { Operation::Read };
        let (lba, bytes) = (kept.first_block(), kept.bytes());
        Some((Request { operation, lba, bytes, status: slot.status, written: slot.used.bytes() }, slot.head))
    }

    /// Answers the request in a slot with an error.
    pub(super) fn fail_slot(&mut self, number: u16) {
        self.answer_slot(number, request::IOERR);
    }

    fn answer_slot(&mut self, number: u16, code: u8) {
        if let Some((request, head)) = self.recorded_request(number) {
            self.details.drop_slot(number);
            self.slots.free_held(number);
            self.give_back(head, code, request.status, request.written);
        }
    }

    /// The drive has answered with an error.
    #[cold]
    #[inline(never)]
    pub(super) fn complete_failed(&mut self, number: u16, status: Status) {
        if self.slots.held_mut(number).is_none() {
            return self.complete_slow_path(number, status);
        }
        if self.ends_given_up(number, status) {
            return;
        }
        if self.tries_without_sgl(number, status) {
            return;
        }
        if let Some(wait) = self.plan_retry(number, status) {
            match wait {
                Wait::Drives(delay) => self.retries.push(number, delay),
                Wait::Until(due) => self.retries.push_at(number, due),
            }
            return self.end_waiting();
        }
        if self.announced_in_vain(number, status) {
            return self.answer_slot(number, request::UNSUPP);
        }
        self.warn_of(status);
        self.fail_slot(number);
    }

    /// Does the drive refuse what it has announced? Drivers can do without, and the next ones are not offered it.
    fn announced_in_vain(&mut self, number: u16, status: Status) -> bool {
        let operation = self.recorded_request(number).map(|(request, _)| request.operation);
        let (feature, what) = match operation {
            Some(Operation::Discard) => (config::F_DISCARD, "discards"),
            Some(Operation::WriteZeroes | Operation::WriteZeroesUnmap) => (config::F_WRITE_ZEROES, "writes of zeroes"),
            _ => return false,
        };
        if !matches!(status.kind(), Status::INVALID_OPCODE | Status::INVALID_FIELD) {
            return false;
        }
        if self.disk.refused.note(feature)
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::warn!(
                "{}: the drive announces {what} and refuses them ({status}); drivers are told that they are unsupported, and \
                 new front-ends are not offered them{more}",
                self.name
            );
        }
        true
    }

    /// Logs why a request fails: the drive's answer to it. Write protection is a state, and told when it begins.
    pub(super) fn warn_of(&mut self, status: Status) {
        if status.kind() != Status::WRITE_PROTECTED {
            self.warn(&format_args!("the drive answered: {status}"));
        } else if !std::mem::replace(&mut self.retries.write_protected, true)
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::error!("{}: the drive answered: {status}; writes fail, reads go on{more}", self.name);
        }
    }

    /// May the request in this slot be given to the drive once more, after this answer, and when? It will be, and is counted.
    pub(super) fn plan_retry(&mut self, number: u16, status: Status) -> Option<Wait> {
        let kept = self.slots.record_mut(number)?;
        kept.acquit();
        let tries = kept.retries();
        let wait = match status.retry() {
            Retry::Never => return None,
            Retry::AtOnce if tries < MOST_RETRIES => Wait::Drives(0),
            Retry::AtOnce => return None,
            Retry::OverTime => {
                let (now, hold) = (Instant::now(), self.retries.hold);
                // The first of this request; what is left of another that had this slot does not count.
                if tries == 0 {
                    self.retries.deadlines.insert(number, now + hold);
                }
                let over = self.retries.deadlines.get(&number).is_none_or(|deadline| now >= *deadline);
                let pause = FIRST_PAUSE * 2u32.pow(u32::from(tries.clamp(1, 16) - 1));
                match status.retry_delay() {
                    _ if over && tries >= MOST_RETRIES => return None,
                    0 if tries == 0 => Wait::Drives(0),
                    0 => Wait::Until(now + pause.min(LONGEST_PAUSE)),
                    delay => Wait::Drives(delay),
                }
            }
        };
        // Beyond as many they are not counted any more: time is.
        kept.count(RETRY, u8::MAX);
        self.retries.allowed += 1;
        let answers = self.retries.allowed;
        // As in `warn`; but the number is the ring's, which a guest may begin anew.
        if answers.is_power_of_two()
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::warn!(
                "{}: the drive answered: {status}; tried again ({answers} such answers so far){more}",
                self.name
            );
        }
        Some(wait)
    }

    /// Answers all that waits for a detached drive with an error, and from now on everything, until it is attached again.
    pub(crate) fn expire_hold(&mut self) {
        if self.drive == DriveAccess::Attached {
            return;
        }
        self.drive = DriveAccess::HoldExpired;
        self.fail_waiting();
        match self.mode.is_broken() {
            false => self.fail_bounced(),
            true => self.drop_bounced(),
        }
    }

    /// Answers all requests with an error that wait to be issued again.
    fn fail_waiting(&mut self) {
        for slot in self.retries.take_all() {
            self.fail_slot(slot);
        }
    }

    /// Ends all that waits for a drive that is detached, without an answer: in the ring, and in its log, it stays in flight.
    pub(super) fn leave_in_log(&mut self) {
        self.forget_all();
        self.drop_bounced();
    }

    /// Ends what waits for a drive that is attached, as the stop policy says. What is copied ends in the next turn, which can give
    /// its buffer back.
    pub(super) fn end_waiting(&mut self) {
        match self.mode.stop_policy() {
            StopPolicy::AnswerAll => {}
            StopPolicy::FailWaiting => self.fail_waiting(),
            StopPolicy::LeaveInLog => self.forget_all(),
        }
    }

    /// Nothing is asked any more but what is with the drive, or copied.
    fn forget_all(&mut self) {
        self.forget_waiting();
        self.resuming = false;
        self.pending = None;
    }

    /// What waits is not asked again.
    pub(super) fn forget_waiting(&mut self) {
        for slot in self.retries.take_all() {
            self.details.drop_slot(slot);
            // Given back to nobody: the ring is not touched any more.
            self.slots.free_held(slot);
        }
    }

    /// Finds anew where the drive sees the data of the request in the parser.
    pub(super) fn find_pending(&mut self) {
        let operation = self.parser.request.operation;
        if let (Some(_), Operation::Read | Operation::Write) = (&self.pending, operation) {
            let buffers = request::data_buffers(&self.chain, operation);
            // It was in guest memory when it was parsed, and no table loses a region meanwhile.
            let _ = find(&mut self.view, buffers, &mut self.parser.segments);
        }
    }
}

/// Where the device sees the buffers; `None` if it does not.
fn find(view: &mut GuestView, mut buffers: impl Iterator<Item = Buffer>, segments: &mut Vec<Segment>) -> Option<()> {
    segments.clear();
    buffers.try_for_each(|buffer| view.segments(buffer.address, buffer.bytes, |segment| segments.push(segment)).ok())
}

/// What the drive is asked for a request.
#[inline(always)]
pub(super) fn work<'a>(request: &Request, segments: &'a [Segment], ranges: &'a [LbaRange], fua: bool) -> Work<'a> {
    let lba = request.lba;
    match request.operation {
        Operation::Read => Work::Read { lba, segments },
        Operation::Write => Work::Write { lba, segments, fua },
        Operation::Flush => Work::Flush,
        Operation::Discard => Work::Discard { ranges },
        Operation::WriteZeroes => Work::WriteZeroes { ranges, deallocate: false, fua },
        Operation::WriteZeroesUnmap => Work::WriteZeroes { ranges, deallocate: true, fua },
    }
}
