//! Requests whose data is copied, because no data pointer of the drive can say where it lies: the last resort.
//!
//! The data goes through a buffer of the pool in pieces, one at a time, so that any pool serves any request.

use nvme_driver::{Bounce, BouncePool, QueuePair, Status, SubmitError, Work};

use super::{Lane, Mode, count, flush};
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
    /// The piece the drive works on, and its answer when it is there.
    piece: Option<(Bounce, u64)>,
    answer: Option<Status>,
}

impl Lane {
    /// Takes on a request that the queue pair refused with NeedsBounce.
    pub(super) fn bounce(&mut self, head: Head) {
        let request = self.parser.request;
        // It was for this slot that the queue pair was asked.
        let Some(slot) = self.slots.reserve() else { return };
        let number = slot.number();
        slot.take(head);
        let buffers = request::data_buffers(&self.chain, request.operation).collect();
        self.bounce_in(number, head, request, buffers);
    }

    /// The same for one that has a slot, whose `written` is 0.
    pub(super) fn bounce_in(&mut self, slot: u16, head: Head, request: Request, buffers: Vec<Buffer>) {
        self.tally.copies += 1;
        self.bounced.push(Bounced { slot, head, request, buffers, done: 0, piece: None, answer: None });
    }

    /// The drive is away: the pieces it had are done again when it is back.
    pub(super) fn hold_bounced(&mut self, pool: &mut BouncePool) {
        for bounced in &mut self.bounced {
            bounced.piece.take().into_iter().for_each(|(bounce, _)| pool.give_back(bounce));
            bounced.answer = None;
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
        if let Some(bounced) = self.bounced.iter_mut().find(|bounced| bounced.slot == slot) {
            bounced.answer = Some(status);
        }
    }

    /// Moves every bounced request on as far as it goes now.
    #[cold]
    #[inline(never)]
    pub(super) fn advance_bounced(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) {
        let mut index = 0;
        while let Some(bounced) = self.bounced.get_mut(index) {
            let waits = bounced.piece.is_some() && bounced.answer.is_none();
            // Nothing more from a guest that broke its ring.
            let finished = if !waits && self.mode == Mode::Broken {
                bounced.piece.take().into_iter().for_each(|(bounce, _)| pool.give_back(bounce));
                Some(Err("its lane has ended".to_owned()))
            } else {
                let fua = self.disk.force_unit_access();
                bounced.advance(&mut self.view, pair, pool, &self.disk.namespace, tag, fua)
            };
            let Some(result) = finished else {
                index += 1;
                continue;
            };
            let Bounced { slot, head, request, .. } = self.bounced.swap_remove(index);
            self.slots.free(slot);
            if self.mode == Mode::Broken {
                continue;
            }
            count(&mut self.tally, &request);
            if flush::changes(request.operation) {
                self.note_change();
            }
            match result {
                Ok(()) => self.give_back(head, request::OK, request.status, request.written),
                Err(why) => {
                    self.warn(&format_args!("a request whose data is copied failed: {why}"));
                    self.give_back(head, request::IOERR, request.status, request.written);
                }
            }
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

    /// Takes the drive's answer if it is there, gives it the next piece; returns how it went when all is done.
    fn advance(
        &mut self,
        view: &mut GuestView,
        pair: &mut QueuePair,
        pool: &mut BouncePool,
        namespace: &nvme_driver::Namespace,
        tag: u64,
        fua: bool,
    ) -> Option<Result<(), String>> {
        let total = u64::from(self.request.bytes);
        if self.piece.is_some() {
            let status = self.answer.take()?;
            let (bounce, bytes) = self.piece.take()?;
            let copied = match self.request.operation {
                Operation::Read if status.is_success() => self.copy_out(view, &bounce, bytes),
                _ => Ok(()),
            };
            pool.give_back(bounce);
            if !status.is_success() {
                return Some(Err(format!("the drive answered: {status}")));
            }
            if let Err(outside) = copied {
                return Some(Err(outside.to_string()));
            }
            self.done += bytes;
        }
        if self.done == total {
            return Some(Ok(()));
        }
        let bytes = (total - self.done).min(PIECE).min(pool.capacity() & !u64::from(namespace.block_bytes() - 1));
        // Not enough is left: pieces in flight will give some back.
        let bounce = pool.take(bytes)?;
        let lba = self.request.lba + (self.done >> namespace.block_shift);
        let submitted = match self.request.operation {
            Operation::Write => match self.copy_in(view, &bounce, bytes) {
                Ok(()) => {
                    let work = Work::Write { lba, segments: bounce.segments(), fua };
                    pair.submit(namespace, work, tag | u64::from(self.slot))
                }
                Err(_) => Err(SubmitError::Invalid("guest memory is gone")),
            },
            Operation::Read => {
                let work = Work::Read { lba, segments: bounce.segments() };
                pair.submit(namespace, work, tag | u64::from(self.slot))
            }
            _ => Err(SubmitError::Invalid("only reads and writes have data")),
        };
        match submitted {
            Ok(()) => {
                self.piece = Some((bounce, bytes));
                None
            }
            Err(SubmitError::Full) => {
                pool.give_back(bounce);
                None
            }
            Err(error) => {
                pool.give_back(bounce);
                Some(Err(error.to_string()))
            }
        }
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
