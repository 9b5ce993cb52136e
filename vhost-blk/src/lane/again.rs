//! Requests that are given to the drive once more: it said that they may be tried again, or it went away before it answered.
//!
//! What they ask is kept with their slots, as it was found in the guest's memory the first time, and not read there again.
//! Only where the drive sees the data is looked up anew: a drive that has come back may see it elsewhere.
//!
//! Requests that were under way when the drive went are given to it in no particular order: virtio promises none between
//! requests in flight, and to know theirs would cost each request something.

use std::time::Instant;

use nvme_driver::{LbaRange, QueuePair, Segment, Status, SubmitError, Work};

use super::{Drive, Lane, Mode, bounced, flush};
use crate::guest_memory::GuestView;
use crate::request::{self, Operation, Request};
use crate::ring::{Buffer, Chain};

/// How often a request is tried again because the drive's answer allows it (Do Not Retry is clear).
const MOST_RETRIES: u8 = 5;
/// How many failures of its controller a request may be a part of: it may well be their reason.
const MOST_FAILURES: u8 = 5;

/// What a slot keeps of a request, besides what its answer takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Kept {
    /// First logical block.
    pub lba: u64,
    /// Guest address of the data.
    pub data: u64,
    /// In one word, as it is written for each request. Bits 31:0: bytes of the data, which is in one place; 0: the request is
    /// kept as a [`Long`] one. Bit 32: a write, else a read. Bits 47:40: tried again so often. Bits 55:48: with the drive when
    /// that failed, so often.
    word: u64,
}

const WRITE: u64 = 1 << 32;
const RETRY: u64 = 1 << 40;
const FAILURE: u64 = 1 << 48;

impl Kept {
    /// A read or write.
    #[inline(always)]
    pub fn transfer(write: bool, lba: u64, data: u64, bytes: u32) -> Kept {
        Kept { lba, data, word: if write { WRITE } else { 0 } | u64::from(bytes) }
    }

    /// Another request; `number`: of a flush.
    pub fn long(number: u64) -> Kept {
        Kept { lba: number, ..Kept::default() }
    }

    fn bytes(&self) -> u32 {
        self.word as u32
    }

    fn is_write(&self) -> bool {
        self.word & WRITE != 0
    }

    fn count(&mut self, what: u64, most: u8) -> bool {
        let counted = (self.word / what) as u8;
        if counted < most {
            self.word += what;
        }
        counted < most
    }
}

/// A request that is not a read or write of data in one place.
#[derive(Default)]
struct Long {
    request: Option<Request>,
    buffers: Vec<Buffer>,
    ranges: Vec<LbaRange>,
}

/// How long the drive wants a request not to be given to it again.
#[derive(Default)]
pub(super) struct Pause {
    /// Which of the controller's retry delays (NVMe Base 2.0, figure 94, CRD); 0: none.
    delay: u8,
    /// When it is over.
    due: Option<Instant>,
}

impl Pause {
    /// What the drive's answer asks for.
    pub fn after(status: Status) -> Pause {
        Pause { delay: status.retry_delay(), due: None }
    }

    /// `now`: the time, once it had to be read in this turn.
    pub fn is_over(&mut self, pair: &QueuePair, now: &mut Option<Instant>) -> bool {
        if self.delay == 0 {
            return true;
        }
        let now = *now.get_or_insert_with(Instant::now);
        now >= *self.due.get_or_insert_with(|| now + pair.retry_delay(self.delay))
    }
}

/// A slot whose request is to be given to the drive.
struct Waiting {
    slot: u16,
    pause: Pause,
}

/// Requests to be given to the drive once more.
#[derive(Default)]
pub(super) struct Again {
    /// Answers that allowed another try.
    allowed: u64,
    waiting: Vec<Waiting>,
    /// By slot, as far as there were any.
    longs: Vec<Long>,
    segments: Vec<Segment>,
    /// A request was with the drive in too many failures.
    pub worn: bool,
    /// The drive was last heard to refuse writes, and this was logged.
    pub write_protected: bool,
}

impl Again {
    /// Nothing waits.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Keeps a request from a parser for its slot. Storage grows to what the guest's requests need, once.
    pub fn keep(&mut self, slot: u16, request: &Request, chain: &Chain, ranges: &[LbaRange]) {
        let index = usize::from(slot);
        if self.longs.len() <= index {
            self.longs.resize_with(index + 1, Long::default);
        }
        let long = &mut self.longs[index];
        long.request = Some(*request);
        long.buffers.clear();
        long.ranges.clear();
        match request.operation {
            Operation::Read | Operation::Write => {
                long.buffers.extend(request::data_buffers(chain, request.operation));
            }
            Operation::Flush => {}
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                long.ranges.extend_from_slice(ranges);
            }
        }
    }

    /// Does the request kept for this slot change the disk, or did it if it has been answered since?
    pub fn changes(&self, slot: u16, kept: &Kept) -> bool {
        match kept.bytes() {
            0 => {
                let long = self.longs.get(usize::from(slot)).and_then(|long| long.request);
                long.is_some_and(|request| flush::changes(request.operation))
            }
            _ => kept.is_write(),
        }
    }
}

/// What became of an attempt.
enum Attempt {
    /// It is with the drive, or answered.
    Made,
    /// Not yet.
    Later,
    /// The queue pair has no room.
    Full,
}

impl Lane {
    /// Gives the drive what waits for that; false if there was no room for all of it.
    #[cold]
    #[inline(never)]
    pub(super) fn issue_again(&mut self, pair: &mut QueuePair, tag: u64) -> bool {
        let (mut full, mut now) = (false, None);
        let mut waiting = std::mem::take(&mut self.again.waiting);
        waiting.retain_mut(|entry| {
            full || match self.try_again(pair, tag, entry, &mut now) {
                Attempt::Made => false,
                Attempt::Later => true,
                Attempt::Full => {
                    full = true;
                    true
                }
            }
        });
        self.again.waiting = waiting;
        !full
    }

    fn try_again(&mut self, pair: &mut QueuePair, tag: u64, entry: &mut Waiting, now: &mut Option<Instant>) -> Attempt {
        if !entry.pause.is_over(pair, now) {
            return Attempt::Later;
        }
        entry.pause = Pause::default();
        let number = entry.slot;
        let Some((request, head)) = self.kept_request(number) else { return Attempt::Made };
        if request.operation == Operation::Flush {
            let begun = self.begin_flush_again(number);
            match (begun, self.slots.get_mut(number)) {
                (Some(flush), Some(slot)) => slot.kept.lba = flush,
                _ => {
                    self.fail_slot(number);
                    return Attempt::Made;
                }
            }
        }
        let Lane { again: Again { longs, segments, .. }, slots, view, disk, .. } = self;
        let kept = slots.get_mut(number).map(|slot| slot.kept).unwrap_or_default();
        let long = longs.get(usize::from(number));
        let one = [Buffer { address: kept.data, bytes: kept.bytes() }];
        let buffers = if kept.bytes() != 0 { &one } else { long.map_or(&[][..], |long| &long.buffers) };
        let ranges = long.map_or(&[][..], |long| &long.ranges);
        let submitted = match find(view, buffers.iter().copied(), segments) {
            Some(()) => {
                let work = work(&request, segments, ranges, disk.force_unit_access());
                pair.submit(&disk.namespace, work, tag | u64::from(number))
            }
            None => Err(SubmitError::Invalid("guest memory is gone")),
        };
        match submitted {
            Ok(()) => {
                self.tally.again += 1;
                Attempt::Made
            }
            Err(SubmitError::Full | SubmitError::Crowded) => Attempt::Full,
            Err(SubmitError::NeedsBounce) if self.bounced.len() >= bounced::MOST => Attempt::Later,
            Err(SubmitError::NeedsBounce) => {
                let buffers = buffers.to_vec();
                // Its slot goes on as a bounced request's.
                if let Some(slot) = self.slots.get_mut(number) {
                    slot.written = 0;
                }
                self.bounce_in(number, head, request, buffers, Some(Pause::default()));
                Attempt::Made
            }
            Err(error) => {
                self.warn(&format_args!("the drive cannot be given a request again: {error}"));
                self.fail_slot(number);
                Attempt::Made
            }
        }
    }

    /// The request in a slot that waits for an answer, and its chain.
    pub(super) fn kept_request(&mut self, number: u16) -> Option<(Request, crate::ring::Head)> {
        let slot = *self.slots.get_mut(number)?;
        let kept = slot.kept;
        if kept.bytes() == 0 {
            let long = self.again.longs.get(usize::from(number)).and_then(|long| long.request)?;
            return Some((long, slot.head));
        }
        let operation = if kept.is_write() { Operation::Write } else { Operation::Read };
        let (lba, bytes) = (kept.lba, kept.bytes());
        Some((Request { operation, lba, bytes, status: slot.status, written: slot.written }, slot.head))
    }

    /// Answers the request in a slot with an error.
    pub(super) fn fail_slot(&mut self, number: u16) {
        if let Some((request, head)) = self.kept_request(number) {
            self.slots.answer_any(number);
            self.give_back(head, request::IOERR, request.status, request.written);
        }
    }

    /// The drive has answered with an error.
    #[cold]
    #[inline(never)]
    pub(super) fn complete_badly(&mut self, number: u16, status: Status) {
        if self.slots.get_mut(number).is_none() {
            return self.complete_specially(number, status);
        }
        if self.ends_given_up(number, status) {
            return;
        }
        if self.may_try_again(number, status) {
            self.again.waiting.push(Waiting { slot: number, pause: Pause::after(status) });
            return self.end_waiting();
        }
        self.warn_of(status);
        self.fail_slot(number);
    }

    /// Logs why a request fails: the drive's answer to it. Write protection is a state, and told when it begins.
    pub(super) fn warn_of(&mut self, status: Status) {
        if status.kind() != Status::WRITE_PROTECTED {
            self.warn(&format_args!("the drive answered: {status}"));
        } else if !std::mem::replace(&mut self.again.write_protected, true) {
            log::error!("{}: the drive answered: {status}; writes fail, reads go on", self.name);
            self.count_line();
        }
    }

    /// May the request in this slot be given to the drive once more, after this answer? It will be, and is counted.
    pub(super) fn may_try_again(&mut self, number: u16, status: Status) -> bool {
        let kept = self.slots.kept_mut(number);
        if status.do_not_retry() || !kept.is_some_and(|kept| kept.count(RETRY, MOST_RETRIES)) {
            return false;
        }
        self.again.allowed += 1;
        let answers = self.again.allowed;
        // As in `warn`.
        if answers.is_power_of_two() {
            log::warn!("{}: the drive answered: {status}; tried again ({answers} such answers so far)", self.name);
            self.count_line();
        }
        true
    }

    /// The controller was stopped before it answered the request with this token. `failed`: it is to blame, not whoever took
    /// it away.
    pub(crate) fn unanswered(&mut self, token: u64, failed: bool) {
        let number = token as u16;
        if self.slots.get_mut(number).is_some() {
            self.again.waiting.push(Waiting { slot: number, pause: Pause::default() });
        } else if !self.bounced.iter().any(|bounced| bounced.is(number)) {
            return self.complete_specially(number, Status::ABORTED_BY_HOST);
        }
        if failed && let Some(kept) = self.slots.kept_mut(number) {
            self.again.worn |= !kept.count(FAILURE, MOST_FAILURES - 1);
        }
    }

    /// Answers all that waits for the drive with an error, and from now on everything, until it is back.
    pub(crate) fn give_up(&mut self) {
        if self.drive == Drive::Present {
            return;
        }
        self.drive = Drive::Lost;
        self.fail_waiting();
        self.end_bounced(self.mode != Mode::Broken);
    }

    fn fail_waiting(&mut self) {
        for Waiting { slot, .. } in std::mem::take(&mut self.again.waiting) {
            self.fail_slot(slot);
        }
    }

    /// Lets go of all that waits for the drive, without an answer: in the ring, and in its log, it is as before.
    pub(super) fn let_go(&mut self) {
        self.forget_all();
        self.end_bounced(false);
    }

    /// Ends what is not with the drive, which is there, if whoever stops the lane does not wait for that. What is copied ends
    /// in the next turn, which can give its buffer back.
    pub(super) fn end_waiting(&mut self) {
        match self.abandoned {
            Some(true) => self.fail_waiting(),
            Some(false) => self.forget_all(),
            None => {}
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
        for Waiting { slot, .. } in std::mem::take(&mut self.again.waiting) {
            // Given back to nobody: the ring is not touched any more.
            self.slots.answer_any(slot);
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
