//! Requests whose data is copied, because no data pointer of the drive can say where it lies: the last resort.
//!
//! The data goes through a buffer of the pool in pieces, one at a time, so that any pool serves any request.

use std::time::Instant;

use nvme_driver::{Bounce, BouncePool, QueuePair, Status, SubmitError, Work};

use super::again::{Kept, Pause};
use super::{Lane, Mode, count, flush};
use crate::counters::Tally;
use crate::disk::Disk;
use crate::guest_memory::{GuestView, OutsideMemory};
use crate::request::{self, Operation, Request};
use crate::ring::{Buffer, Head};

/// Most bytes that are copied at once: bounds what one request can take from the other lanes in a turn. A multiple of any
/// block size.
const PIECE: u64 = 64 << 10;

/// Most requests of a lane that are copied at the same time.
pub(super) const MOST: usize = 16;

/// A request that is being copied through the pool. It has a slot, whose `written` is 0.
pub(super) struct Bounced {
    slot: u16,
    head: Head,
    request: Request,
    /// Its data in guest memory, in order.
    buffers: Vec<Buffer>,
    /// Bytes done.
    done: u64,
    /// What comes after them, if it has a buffer.
    piece: Option<Piece>,
    /// The drive was given it before, and is to be given it once more after this.
    again: Option<Pause>,
}

/// A part of the data, in a buffer.
struct Piece {
    bounce: Bounce,
    bytes: u64,
    stage: Stage,
}

#[derive(Clone, Copy)]
enum Stage {
    /// Ready for the drive.
    Filled,
    /// With the drive.
    Out,
    /// This was the drive's answer.
    Back(Status),
}

/// How a request ended.
enum End {
    Done,
    /// The drive has failed it.
    Refused(Status),
    /// For another reason.
    Failed(String),
    /// Without an answer.
    LetGo,
}

/// What a turn has for the requests that are copied.
struct Turn<'a> {
    view: &'a mut GuestView,
    pair: &'a mut QueuePair,
    pool: &'a mut BouncePool,
    disk: &'a Disk,
    tally: &'a mut Tally,
    tag: u64,
    /// Nothing more is asked of the drive; true: what is not done fails, else it is let go.
    ends: Option<bool>,
    /// The time, once it had to be read.
    now: &'a mut Option<Instant>,
}

impl Lane {
    /// Takes on a request that the queue pair refused with NeedsBounce.
    pub(super) fn bounce(&mut self, head: Head) {
        let request = self.parser.request;
        // It was for this slot that the queue pair was asked.
        let Some(mut slot) = self.slots.reserve() else { return };
        let number = slot.number();
        slot.fill(request.status, 0, Kept::default());
        slot.take(head);
        let buffers = request::data_buffers(&self.chain, request.operation).collect();
        self.bounce_in(number, head, request, buffers, None);
    }

    /// The same for one that has a slot, whose `written` is 0. What its slot has counted goes on. `again`: the drive was given
    /// it before.
    pub(super) fn bounce_in(
        &mut self,
        slot: u16,
        head: Head,
        request: Request,
        buffers: Vec<Buffer>,
        again: Option<Pause>,
    ) {
        self.tally.copies += 1;
        self.bounced.push(Bounced { slot, head, request, buffers, done: 0, piece: None, again });
    }

    /// The drive is away: the pieces it had are done again when it is back.
    pub(super) fn hold_bounced(&mut self, pool: &mut BouncePool) {
        for bounced in &mut self.bounced {
            let Some(Piece { bounce, stage, .. }) = bounced.piece.take() else { continue };
            pool.give_back(bounce);
            if !matches!(stage, Stage::Filled) {
                bounced.again = Some(Pause::default());
            }
        }
        if self.mode == Mode::Broken {
            self.end_bounced(false);
        }
    }

    /// Ends every bounced request, with an error or without an answer; the drive has no piece of any.
    pub(super) fn end_bounced(&mut self, answer: bool) {
        for Bounced { slot, head, request, .. } in std::mem::take(&mut self.bounced) {
            self.slots.free(slot);
            if answer {
                self.give_back(head, request::IOERR, request.status, request.written);
            }
        }
    }

    /// The drive has answered the piece of the bounced request with this slot.
    pub(super) fn bounced_piece_done(&mut self, slot: u16, status: Status) {
        let again = !status.is_success() && self.may_try_again(slot, status);
        if let Some(bounced) = self.bounced.iter_mut().find(|bounced| bounced.slot == slot) {
            bounced.again = again.then(|| Pause::after(status));
            if let Some(piece) = &mut bounced.piece {
                piece.stage = Stage::Back(status);
            }
        }
    }

    /// Moves every bounced request on as far as it goes now.
    #[cold]
    #[inline(never)]
    pub(super) fn advance_bounced(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) {
        let (mut index, mut now) = (0, None);
        while let Some(bytes) = self.bounced.get(index).map(|bounced| bounced.request.bytes) {
            let ends = self.ends_copied(bytes);
            let Some(bounced) = self.bounced.get_mut(index) else { break };
            let Lane { view, disk, tally, .. } = self;
            let Some(end) = bounced.advance(&mut Turn { view, pair, pool, disk, tally, tag, ends, now: &mut now })
            else {
                index += 1;
                continue;
            };
            let Bounced { slot, head, request, .. } = self.bounced.swap_remove(index);
            self.slots.free(slot);
            if self.mode == Mode::Broken || matches!(end, End::LetGo) {
                continue;
            }
            count(&mut self.tally, &request);
            if flush::changes(request.operation) {
                self.note_change();
            }
            match &end {
                End::Refused(status) => self.warn_of(*status),
                End::Failed(why) => self.warn(&format_args!("a request whose data is copied failed: {why}")),
                End::Done | End::LetGo => {}
            }
            let code = if let End::Done = end { request::OK } else { request::IOERR };
            self.give_back(head, code, request.status, request.written);
        }
    }
}

impl Bounced {
    /// Does it change the disk?
    pub(super) fn changes(&self) -> bool {
        flush::changes(self.request.operation)
    }

    /// Does it have this slot?
    pub(super) fn is(&self, slot: u16) -> bool {
        self.slot == slot
    }

    /// Takes the drive's answer if it is there, gives it the next piece; returns how it went when it ends.
    fn advance(&mut self, turn: &mut Turn<'_>) -> Option<End> {
        match self.piece {
            Some(Piece { stage: Stage::Out, .. }) => return None,
            Some(Piece { stage: Stage::Back(status), .. }) => {
                if let Err(end) = self.take_back(status, turn) {
                    return Some(end);
                }
            }
            _ => {}
        }
        if self.done == u64::from(self.request.bytes) {
            return Some(End::Done);
        }
        if let Some(answer) = turn.ends {
            self.give_back(turn);
            return Some(if answer { End::Failed("nobody waits for it".to_owned()) } else { End::LetGo });
        }
        if self.piece.is_none() {
            if self.again.as_mut().is_some_and(|pause| !pause.is_over(turn.pair, turn.now)) {
                return None;
            }
            if let Err(outside) = self.fill(turn)? {
                return Some(End::Failed(outside.to_string()));
            }
        }
        let piece = self.piece.as_mut()?;
        let lba = self.request.lba + (self.done >> turn.disk.namespace.block_shift);
        let segments = piece.bounce.segments();
        let work = match self.request.operation {
            Operation::Write => Work::Write { lba, segments, fua: turn.disk.force_unit_access() },
            Operation::Read => Work::Read { lba, segments },
            _ => {
                self.give_back(turn);
                return Some(End::Failed("only reads and writes have data".to_owned()));
            }
        };
        match turn.pair.submit(&turn.disk.namespace, work, turn.tag | u64::from(self.slot)) {
            Ok(()) => {
                piece.stage = Stage::Out;
                turn.tally.again += u64::from(self.again.take().is_some());
                None
            }
            // In the next turn, as it is.
            Err(SubmitError::Full | SubmitError::Crowded) => None,
            Err(error) => {
                self.give_back(turn);
                Some(End::Failed(error.to_string()))
            }
        }
    }

    /// Takes the buffer of the next piece, and copies into it what is to be written. `None`: there is no buffer just now.
    fn fill(&mut self, turn: &mut Turn<'_>) -> Option<Result<(), OutsideMemory>> {
        let whole_blocks = turn.pool.capacity() & !u64::from(turn.disk.namespace.block_bytes() - 1);
        let bytes = (u64::from(self.request.bytes) - self.done).min(PIECE).min(whole_blocks);
        // Not enough is left: pieces in flight will give some back.
        let bounce = turn.pool.take(bytes)?;
        if let Operation::Write = self.request.operation
            && let Err(outside) = self.copy_in(turn.view, &bounce, bytes)
        {
            turn.pool.give_back(bounce);
            return Some(Err(outside));
        }
        self.piece = Some(Piece { bounce, bytes, stage: Stage::Filled });
        Some(Ok(()))
    }

    /// The drive is done with the piece, which may be the end of the request.
    fn take_back(&mut self, status: Status, turn: &mut Turn<'_>) -> Result<(), End> {
        let Some(Piece { bounce, bytes, .. }) = self.piece.take() else { return Ok(()) };
        let copied = match self.request.operation {
            Operation::Read if status.is_success() => self.copy_out(turn.view, &bounce, bytes),
            _ => Ok(()),
        };
        turn.pool.give_back(bounce);
        if status.is_success() {
            self.done += bytes;
            return copied.map_err(|outside| End::Failed(outside.to_string()));
        }
        if self.again.is_some() { Ok(()) } else { Err(End::Refused(status)) }
    }

    /// Gives back the buffer of a piece that is not with the drive.
    fn give_back(&mut self, turn: &mut Turn<'_>) {
        self.piece.take().into_iter().for_each(|piece| turn.pool.give_back(piece.bounce));
    }

    fn copy_in(&self, view: &mut GuestView, bounce: &Bounce, bytes: u64) -> Result<(), OutsideMemory> {
        self.stretches(bytes, |address, at, piece| {
            view.read(address, piece)?;
            bounce.write(at, piece).ok_or(OutsideMemory { address, bytes })
        })
    }

    fn copy_out(&self, view: &mut GuestView, bounce: &Bounce, bytes: u64) -> Result<(), OutsideMemory> {
        self.stretches(bytes, |address, at, piece| {
            bounce.read(at, piece).ok_or(OutsideMemory { address, bytes })?;
            view.write(address, piece)
        })
    }

    /// Calls `copy` with each stretch of the data from `self.done` on: its guest address, its place in the piece, and a
    /// space of its length.
    fn stretches(
        &self,
        bytes: u64,
        mut copy: impl FnMut(u64, u64, &mut [u8]) -> Result<(), OutsideMemory>,
    ) -> Result<(), OutsideMemory> {
        let mut space = [0; 4096];
        let (mut skip, mut at) = (self.done, 0);
        for buffer in &self.buffers {
            let length = u64::from(buffer.bytes);
            if skip >= length {
                skip -= length;
                continue;
            }
            let mut offset = std::mem::take(&mut skip);
            while offset < length && at < bytes {
                let piece = (length - offset).min(bytes - at).min(space.len() as u64);
                copy(buffer.address + offset, at, &mut space[..piece as usize])?;
                offset += piece;
                at += piece;
            }
        }
        Ok(())
    }
}
