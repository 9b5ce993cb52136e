//! Bounce: requests whose data is copied, because no data pointer of the drive can say where it lies. The last resort.
//!
//! The data goes through a buffer of the pool in pieces, one at a time, so that any pool serves any request. Lanes that share a
//! pool take turns, and so do the requests of a lane, short ones and long ones in their own order: after each piece a request
//! goes to the end of its queue. Nothing is done for a request that waits, however many there are.

use std::collections::VecDeque;
use std::time::Instant;

use nvme_driver::{Bounce, BouncePool, QueuePair, Status, SubmitError, Work};

use super::record::{ALONE, Details, Record};
use super::retry::{Paused, Wait};
use super::slots::UsedLength;
use super::{Lane, count, flush};
use crate::blk::request::{self, Operation, Request};
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::memory::OutsideMemory;
use crate::virtio::ring::Head;

/// Most bytes that are copied at once, and about as many as a lane copies in one turn, each way: bounds what it can take from the
/// other lanes. A multiple of any block size.
const PIECE: u64 = 64 << 10;

/// A request that is being copied through the pool. It has a slot, which is in the state
/// [`SlotState::Bounced`](super::slots::SlotState::Bounced).
struct BouncedRequest {
    slot: u16,
    head: Head,
    details: Box<Details>,
    /// How many bytes are done.
    done: u64,
    /// Where the next piece begins: a buffer, and an offset in it.
    at: (usize, u64),
    /// The piece that comes after the bytes that are done, if it has a buffer.
    piece: Option<BouncePiece>,
    /// The drive had this piece before, and is to be given it once more.
    reissued: bool,
}

/// A part of the data, in a buffer.
struct BouncePiece {
    bounce: Bounce,
    bytes: u64,
    /// Where the next piece begins.
    end: (usize, u64),
    /// The drive's answer to the piece.
    status: Option<Status>,
    /// The drive was given the piece.
    out: bool,
}

/// The requests of a lane whose data is copied; nearly always none. Each one whose piece is not with the drive is in one of the
/// queues, by its slot.
#[derive(Default)]
pub(super) struct BouncedRequests {
    all: Vec<BouncedRequest>,
    /// How many of them change the disk.
    changes: usize,
    /// Requests whose piece the drive has answered.
    back: VecDeque<u16>,
    /// Requests with a buffer that is ready for the drive.
    filled: VecDeque<u16>,
    /// Requests that wait for a buffer, and need only one.
    short: VecDeque<u16>,
    /// Requests that wait for a buffer, and need several, one after the other.
    long: VecDeque<u16>,
    /// The next buffer is for the queue `long`, if both queues have a request.
    long_first: bool,
    /// Requests that the drive wants to be tried again later.
    paused: Paused,
    /// The lane waits for a buffer.
    in_line: bool,
    /// How many requests [`Lane::bounce_policy`] ended when they were last ended for it, see [`Lane::sweep`].
    swept: u8,
}

/// How a request ended.
enum BounceEnd {
    /// The drive has done all of it.
    Done,
    /// The drive has answered with this status.
    Refused(Status),
    /// It failed for another reason than the drive's answer.
    Failed(String),
    /// It gets no answer, see [`StopPolicy::LeaveInLog`].
    LeftInLog,
}

impl BouncedRequests {
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The slots of all bounced requests.
    pub(super) fn slots(&self) -> impl Iterator<Item = u16> {
        self.all.iter().map(|bounced| bounced.slot)
    }

    /// Does any bounced request change the disk?
    pub(super) fn any_changes(&self) -> bool {
        self.changes != 0
    }

    /// The request at this index, if it has this slot.
    fn get_mut(&mut self, index: u16, slot: u16) -> Option<&mut BouncedRequest> {
        self.all.get_mut(usize::from(index)).filter(|bounced| bounced.slot == slot)
    }

    /// The request in this slot waits for a buffer from now on.
    fn wait(&mut self, slot: u16, is_long: bool) {
        if is_long { &mut self.long } else { &mut self.short }.push_back(slot);
    }

    /// The request in this slot does not wait for a buffer any longer. Cheap for the first of its queue.
    fn waits_no_longer(&mut self, slot: u16, is_long: bool) {
        let queue = if is_long { &mut self.long } else { &mut self.short };
        if let Some(at) = queue.iter().position(|waiting| *waiting == slot) {
            queue.remove(at);
        }
    }

    /// The queue whose turn it is, if any waits.
    fn next_queue(&mut self) -> Option<&mut VecDeque<u16>> {
        match (self.short.is_empty(), self.long.is_empty()) {
            (true, true) => None,
            (false, false) if self.long_first => Some(&mut self.long),
            (false, _) => Some(&mut self.short),
            (true, false) => Some(&mut self.long),
        }
    }

    /// Empties all queues.
    fn clear_queues(&mut self) {
        *self = BouncedRequests { all: std::mem::take(&mut self.all), changes: self.changes, ..Self::default() };
    }
}

impl Lane {
    /// Takes on the request in the parser, which the queue pair refused with [`SubmitError::NeedsBounce`].
    pub(super) fn bounce(&mut self, head: Head) {
        let request = self.parser.request;
        // It was for this slot that the queue pair was asked.
        let Some(mut slot) = self.slots.reserve() else { return };
        let number = slot.number();
        slot.fill(request.status, UsedLength::NONE, Record::default());
        slot.take(head);
        let details = self.details.keep(request, request::data_buffers(&self.chain, request.operation), &[]);
        self.bounce_in(number, head, details, false);
    }

    /// Has a request be copied that has a slot already. What its record has counted goes on. `reissued`: the drive was given it before.
    pub(super) fn bounce_in(&mut self, slot: u16, head: Head, details: Box<Details>, reissued: bool) {
        self.tally.copies += 1;
        // There are fewer than slots.
        self.slots.set_bounced(slot, self.bounced.all.len() as u16);
        self.bounced.changes += usize::from(flush::changes(details.request.operation));
        self.bounced.wait(slot, u64::from(details.request.bytes) > PIECE);
        self.bounced.all.push(BouncedRequest { slot, head, details, done: 0, at: (0, 0), piece: None, reissued });
    }

    /// The drive is detached: the pieces that it had are done again when it is attached again.
    pub(super) fn hold_bounced(&mut self, pool: &mut BouncePool) {
        self.bounced.clear_queues();
        for index in 0..self.bounced.all.len() {
            let bounced = &mut self.bounced.all[index];
            let (slot, is_long) = (bounced.slot, bounced.is_long());
            if let Some(BouncePiece { bounce, out, .. }) = bounced.piece.take() {
                pool.give_back(bounce);
                bounced.reissued |= out;
            }
            self.bounced.wait(slot, is_long);
        }
        if self.mode.is_broken() {
            self.drop_bounced();
        }
    }

    /// Answers every bounced request with an error; the drive has no piece of any.
    pub(super) fn fail_bounced(&mut self) {
        self.end_bounced(|lane, head, request| {
            lane.give_back(head, request::IOERR, request.status, request.written);
        });
    }

    /// Ends every bounced request without an answer; the drive has no piece of any.
    pub(super) fn drop_bounced(&mut self) {
        self.end_bounced(|_, _, _| {});
    }

    fn end_bounced(&mut self, answer: impl Fn(&mut Lane, Head, &Request)) {
        for BouncedRequest { slot, head, details, .. } in std::mem::take(&mut self.bounced).all {
            self.slots.free_empty(slot);
            answer(self, head, &details.request);
            self.details.release(details);
        }
    }

    /// The drive has answered the piece of the bounced request with this slot, which is at this index.
    pub(super) fn bounced_piece_done(&mut self, index: u16, slot: u16, status: Status) {
        if let Some(BouncedRequest { piece: Some(piece), .. }) = self.bounced.get_mut(index, slot) {
            piece.status = Some(status);
            self.bounced.back.push_back(slot);
        }
    }

    /// Does what there is to do for bounced requests: takes pieces back, fills buffers, and gives them to the drive.
    #[cold]
    #[inline(never)]
    pub(super) fn advance_bounced(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) {
        let mut copied = 0;
        while copied < PIECE
            && let Some(slot) = self.bounced.back.pop_front()
        {
            copied += self.take_back(slot, pair, pool);
        }
        let sweep = self.sweep();
        if sweep > self.bounced.swept {
            self.bounced.swept = sweep;
            self.end_waiting_bounced(pool);
        }
        for _ in 0..self.bounced.filled.len() {
            if pair.is_full() {
                break;
            }
            let Some(slot) = self.bounced.filled.pop_front() else { break };
            self.submit_piece(slot, pair, pool, tag);
        }
        let BouncedRequests { paused, all, short, long, .. } = &mut self.bounced;
        let slots = &self.slots;
        paused.look(|slot| {
            let index = slots.bounced(slot).map_or(usize::MAX, usize::from);
            let is_long = all.get(index).is_some_and(BouncedRequest::is_long);
            if is_long {
                long.push_back(slot)
            } else {
                short.push_back(slot)
            };
        });
        let mut copied = 0;
        while copied < PIECE && self.bounced.next_queue().is_some() {
            if !std::mem::replace(&mut self.bounced.in_line, true) {
                pool.wait(tag);
            }
            if pool.first() != Some(tag) {
                return;
            }
            let Some(bytes) = self.fill_next(pair, pool, tag) else { return };
            copied += bytes;
            // Others first.
            pool.stop_waiting(tag);
            self.bounced.in_line = false;
        }
        self.leave_line(pool, tag);
    }

    /// The lane does not wait for a buffer if none of its requests does.
    fn leave_line(&mut self, pool: &mut BouncePool, tag: u64) {
        let waits = self.bounced.next_queue().is_some();
        if !waits && std::mem::replace(&mut self.bounced.in_line, false) {
            pool.stop_waiting(tag);
        }
    }

    /// How many requests [`Lane::bounce_policy`] ends: none, the long ones, all.
    fn sweep(&self) -> u8 {
        match (self.bounce_policy(0), self.bounce_policy(u32::MAX)) {
            (StopPolicy::AnswerAll, StopPolicy::AnswerAll) => 0,
            (StopPolicy::AnswerAll, _) => 1,
            _ => 2,
        }
    }

    /// How the request with this slot ends now, if it does: nothing of it is with the drive.
    fn end_of_bounced(&mut self, slot: u16) -> Option<BounceEnd> {
        let bytes = self.bounced_mut(slot)?.details.request.bytes;
        match self.bounce_policy(bytes) {
            StopPolicy::AnswerAll => None,
            StopPolicy::FailWaiting => Some(BounceEnd::Failed("its ring stops".to_owned())),
            StopPolicy::LeaveInLog => Some(BounceEnd::LeftInLog),
        }
    }

    /// Ends what is not with the drive, as far as it has to; what is ends when the drive has answered.
    fn end_waiting_bounced(&mut self, pool: &mut BouncePool) {
        let BouncedRequests { filled, short, long, paused, .. } = &mut self.bounced;
        let paused = std::mem::take(paused).into_slots();
        let all: Vec<u16> = filled.drain(..).chain(short.drain(..)).chain(long.drain(..)).chain(paused).collect();
        for slot in all {
            if let Some(end) = self.end_of_bounced(slot) {
                self.end_one(slot, pool, end);
            } else if let Some(bounced) = self.bounced_mut(slot) {
                // Its pause, if it had one, is cut short.
                let (is_long, has_piece) = (bounced.is_long(), bounced.piece.is_some());
                match has_piece {
                    true => self.bounced.filled.push_back(slot),
                    false => self.bounced.wait(slot, is_long),
                }
            }
        }
    }

    /// The bounced request with this slot.
    fn bounced_mut(&mut self, slot: u16) -> Option<&mut BouncedRequest> {
        let index = self.slots.bounced(slot)?;
        self.bounced.get_mut(index, slot)
    }

    /// Gives the request whose turn it is a buffer, and that to the drive; returns how many bytes were copied. `None`: there is no
    /// buffer just now.
    fn fill_next(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> Option<u64> {
        let &slot = self.bounced.next_queue()?.front()?;
        self.fill(slot, pair, pool, tag)
    }

    /// Gives the request in this slot, which waits for a buffer, one, and that to the drive; returns how many bytes were copied. `None`:
    /// there is no buffer just now.
    fn fill(&mut self, slot: u16, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> Option<u64> {
        let index = self.slots.bounced(slot)?;
        let Lane { bounced: requests, view, disk, .. } = self;
        let bounced = requests.get_mut(index, slot)?;
        let request = &bounced.details.request;
        let whole_blocks = pool.capacity() & !u64::from(disk.namespace.block_bytes() - 1);
        let bytes = (u64::from(request.bytes) - bounced.done).min(PIECE).min(whole_blocks);
        // Not enough is left: pieces in flight will give some back.
        let bounce = pool.take(bytes)?;
        let copy = match request.operation {
            Operation::Write => Some(|address, at, piece: &mut [u8]| {
                view.read(address, piece)?;
                bounce.write(at, piece).ok_or(OutsideMemory { address, bytes })
            }),
            _ => None,
        };
        let copied = if copy.is_some() { bytes } else { 0 };
        let walked = bounced.stretches(bytes, copy);
        let is_long = bounced.is_long();
        bounced.piece = Some(BouncePiece { bounce, bytes, end: bounced.at, status: None, out: false });
        requests.waits_no_longer(slot, is_long);
        requests.long_first = !is_long;
        match walked {
            Ok(end) => {
                if let Some(BouncedRequest { piece: Some(piece), .. }) = self.bounced_mut(slot) {
                    piece.end = end;
                }
                self.submit_piece(slot, pair, pool, tag);
            }
            Err(outside) => self.end_one(slot, pool, BounceEnd::Failed(outside.to_string())),
        }
        Some(copied)
    }

    /// Gives a piece that is ready to the drive.
    fn submit_piece(&mut self, slot: u16, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) {
        let Some(index) = self.slots.bounced(slot) else { return };
        let Lane { bounced: requests, disk, tally, .. } = self;
        let Some(bounced) = requests.get_mut(index, slot) else { return };
        let Some(piece) = &mut bounced.piece else { return };
        let request = &bounced.details.request;
        let lba = request.lba + (bounced.done >> disk.namespace.block_shift);
        let segments = piece.bounce.segments();
        let work = match request.operation {
            Operation::Write => Work::Write { lba, segments, fua: disk.force_unit_access() },
            Operation::Read => Work::Read { lba, segments },
            _ => return self.end_one(slot, pool, BounceEnd::Failed("only reads and writes have data".to_owned())),
        };
        match pair.submit(&disk.namespace, work, tag | u64::from(slot)) {
            Ok(()) => {
                piece.out = true;
                tally.again += u64::from(std::mem::take(&mut bounced.reissued));
            }
            // In the next turn, as it is.
            Err(SubmitError::Full | SubmitError::Crowded) => requests.filled.push_back(slot),
            Err(error) => self.end_one(slot, pool, BounceEnd::Failed(error.to_string())),
        }
    }

    /// The drive is done with a piece, which may be the end of the request; returns how many bytes were copied.
    fn take_back(&mut self, slot: u16, pair: &QueuePair, pool: &mut BouncePool) -> u64 {
        let Some(piece) = self.bounced_mut(slot).and_then(|bounced| bounced.piece.take()) else { return 0 };
        let BouncePiece { bounce, bytes, end, status, .. } = piece;
        let status = status.unwrap_or(Status::SUCCESS);
        if !status.is_success() {
            pool.give_back(bounce);
            let Some(wait) = self.plan_retry(slot, status) else {
                self.end_one(slot, pool, BounceEnd::Refused(status));
                return 0;
            };
            let Some(bounced) = self.bounced_mut(slot) else { return 0 };
            bounced.reissued = true;
            let is_long = bounced.is_long();
            if let Some(end) = self.end_of_bounced(slot) {
                self.end_one(slot, pool, end);
                return 0;
            }
            match wait {
                Wait::Drives(0) => self.bounced.wait(slot, is_long),
                Wait::Drives(delay) => self.bounced.paused.push(Instant::now() + pair.retry_delay(delay), slot),
                Wait::Until(due) => self.bounced.paused.push(due, slot),
            }
            return 0;
        }
        let Some(index) = self.slots.bounced(slot) else { return 0 };
        let Lane { bounced: requests, view, .. } = self;
        let Some(bounced) = requests.get_mut(index, slot) else { return 0 };
        let is_read = bounced.details.request.operation == Operation::Read;
        let copied = match is_read {
            true => bounced.stretches(
                bytes,
                Some(|address, at, piece: &mut [u8]| {
                    bounce.read(at, piece).ok_or(OutsideMemory { address, bytes })?;
                    view.write(address, piece)
                }),
            ),
            false => Ok(end),
        };
        pool.give_back(bounce);
        self.slots.record_mut(slot).into_iter().for_each(|kept| kept.acquit());
        bounced.done += bytes;
        bounced.at = end;
        let (done, is_long) = (bounced.done == u64::from(bounced.details.request.bytes), bounced.is_long());
        match copied {
            Err(outside) => self.end_one(slot, pool, BounceEnd::Failed(outside.to_string())),
            Ok(_) if done => self.end_one(slot, pool, BounceEnd::Done),
            // Behind those that wait.
            Ok(_) => match self.end_of_bounced(slot) {
                None => self.bounced.wait(slot, is_long),
                Some(end) => self.end_one(slot, pool, end),
            },
        }
        if is_read { bytes } else { 0 }
    }

    /// What the bounced request in this slot asks for, if there is one.
    pub(super) fn bounced_request(&mut self, slot: u16) -> Option<Request> {
        self.bounced_mut(slot).map(|bounced| bounced.details.request)
    }

    /// Answers the bounced request in this slot with an error, while the drive is detached; false if there is none.
    pub(super) fn end_bounced_one(&mut self, slot: u16) -> bool {
        let Some(is_long) = self.bounced_mut(slot).map(|bounced| bounced.is_long()) else { return false };
        self.bounced.waits_no_longer(slot, is_long);
        if let Some(BouncedRequest { head, details, .. }) = self.remove_bounced(slot) {
            let request = details.request;
            self.details.release(details);
            self.give_back(head, request::IOERR, request.status, request.written);
        }
        true
    }

    /// Gives the drive one piece that has to be alone there; false: the lane has none. The drive must have nothing of the lane.
    pub(super) fn copy_alone(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> bool {
        while let Some(slot) = self.bounced.back.pop_front() {
            self.take_back(slot, pair, pool);
        }
        let slots = &mut self.slots;
        let mut waiting = self.bounced.short.iter().chain(&self.bounced.long).copied();
        let alone = waiting.find(|slot| slots.record_mut(*slot).is_some_and(|kept| kept.has(ALONE)));
        alone.is_some_and(|slot| self.fill(slot, pair, pool, tag).is_some())
    }

    /// Takes a request out that is in no queue; its slot is free then.
    fn remove_bounced(&mut self, slot: u16) -> Option<BouncedRequest> {
        let index = self.slots.bounced(slot)?;
        self.bounced.get_mut(index, slot)?;
        let removed = self.bounced.all.swap_remove(usize::from(index));
        if let Some(moved) = self.bounced.all.get(usize::from(index)) {
            self.slots.set_bounced(moved.slot, index);
        }
        self.slots.free_empty(slot);
        self.bounced.changes -= usize::from(flush::changes(removed.details.request.operation));
        Some(removed)
    }

    /// Ends a request that is in no queue and has no piece with the drive.
    fn end_one(&mut self, slot: u16, pool: &mut BouncePool, end: BounceEnd) {
        if let BounceEnd::Done = end {
            self.succeeds_without_sgl(slot);
        }
        let Some(BouncedRequest { head, details, piece, .. }) = self.remove_bounced(slot) else { return };
        piece.into_iter().for_each(|piece| pool.give_back(piece.bounce));
        let request = details.request;
        self.details.release(details);
        if self.mode.is_broken() || matches!(end, BounceEnd::LeftInLog) {
            return;
        }
        count(&mut self.tally, &request);
        if flush::changes(request.operation) {
            self.note_change();
        }
        match &end {
            BounceEnd::Refused(status) => self.warn_of(*status),
            BounceEnd::Failed(why) => self.warn(&format_args!("a request whose data is copied failed: {why}")),
            BounceEnd::Done | BounceEnd::LeftInLog => {}
        }
        let code = if let BounceEnd::Done = end { request::OK } else { request::IOERR };
        self.give_back(head, code, request.status, request.written);
    }
}

impl BouncedRequest {
    /// Does the request need more than one buffer?
    fn is_long(&self) -> bool {
        u64::from(self.details.request.bytes) > PIECE
    }

    /// Calls `copy` with each stretch of the piece that comes next: its guest address, its place in the piece, and a space of its
    /// length. Returns where the piece after it begins.
    fn stretches(
        &self,
        bytes: u64,
        mut copy: Option<impl FnMut(u64, u64, &mut [u8]) -> Result<(), OutsideMemory>>,
    ) -> Result<(usize, u64), OutsideMemory> {
        let mut space = [0; 4096];
        let ((mut index, mut offset), mut at) = (self.at, 0);
        while at < bytes
            && let Some(buffer) = self.details.buffers.get(index)
        {
            let left = (u64::from(buffer.bytes) - offset).min(bytes - at);
            let piece = if copy.is_some() { left.min(space.len() as u64) } else { left };
            if let Some(copy) = &mut copy {
                copy(buffer.address + offset, at, &mut space[..piece as usize])?;
            }
            offset += piece;
            at += piece;
            if offset == u64::from(buffer.bytes) {
                (index, offset) = (index + 1, 0);
            }
        }
        Ok((index, offset))
    }
}
