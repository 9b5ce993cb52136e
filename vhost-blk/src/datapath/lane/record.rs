//! What a lane keeps of each request while the drive has it: enough to ask again, should the drive not answer.
//!
//! A read or write of data in one place needs two words, which stand in its slot. Any other has lists, and these have a bound:
//! they are the guest's to make long, and what is beyond the bound waits in the ring. Lists that are not needed any more are used
//! again, so that usual requests allocate nothing; but only a few are kept for that.

use nvme_driver::LbaRange;

use super::flush;
use crate::blk::request::{self, Operation, Request};
use crate::virtio::ring::{Buffer, Chain};

/// Most bytes that the lists of a lane's requests take together: [`LONGEST_CHAIN`](crate::blk::config::LONGEST_CHAIN) buffers in
/// each of some thirty requests, or sixteen in each of more than a thousand. One request is always taken, however long.
pub(super) const MOST_BYTES: usize = 512 << 10;

/// Most bytes that a lane keeps for lists to come.
pub(super) const MOST_SPARE: usize = 64 << 10;

/// Lists grow by so many entries, so that those of different requests fit each other.
const STEP: usize = 16;

/// What a slot keeps of a request, besides what its answer takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Record {
    /// What the request is about.
    target: BlockOrFlush,
    /// Guest address of the data.
    pub data: u64,
    /// All else in one word, which is written for each request. Bits 31:0: bytes of the data, which is in one place; 0: there are
    /// [`Details`] of the request. Bit 32: it changes the disk. Bits 36:33: [`LOST`], [`EXPIRED`], [`ALONE`], [`NO_SGL`]. Bits 47:40: how
    /// often it was tried again. Bits 55:48: how often it was with the drive when that failed, as far as it may be the reason.
    word: u64,
}

/// Which block a simple request begins at, or which flush a flush is. One word serves both, as it is written for each request;
/// the request's operation says which it is.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct BlockOrFlush(u64);

impl BlockOrFlush {
    #[inline(always)]
    fn block(lba: u64) -> BlockOrFlush {
        BlockOrFlush(lba)
    }

    fn flush(number: u64) -> BlockOrFlush {
        BlockOrFlush(number)
    }
}

/// The request changes the disk.
const CHANGES: u64 = 1 << 32;
/// The request was with the controller when that was stopped just now.
pub(super) const LOST: u64 = 1 << 33;
/// The controller has not answered the request in time.
pub(super) const EXPIRED: u64 = 1 << 34;
/// Nothing else may be with the drive when it is given this request once more.
pub(super) const ALONE: u64 = 1 << 35;
/// The request is to be described without an SGL: the drive has found a field of it invalid, which may have been that. It has
/// [`Details`].
pub(super) const NO_SGL: u64 = 1 << 36;
/// One in the count of tries, see [`Record::count`].
pub(super) const RETRY: u64 = 1 << 40;
/// One in the count of failures of the drive, see [`Record::count`].
pub(super) const FAILURE: u64 = 1 << 48;

/// How often a request is tried again because the drive's answer allows it; more often only if what it names passes with time.
pub(super) const MOST_RETRIES: u8 = 5;

impl Record {
    /// The record of a read or write of data in one place.
    #[inline(always)]
    pub(super) fn simple(write: bool, lba: u64, data: u64, bytes: u32) -> Record {
        Record { target: BlockOrFlush::block(lba), data, word: if write { CHANGES } else { 0 } | u64::from(bytes) }
    }

    /// The record of any other request, which has [`Details`]. `number`: a flush's, see
    /// [`FlushPromise`](crate::blk::disk::FlushPromise).
    pub(super) fn detailed(operation: Operation, number: u64) -> Record {
        Record {
            target: BlockOrFlush::flush(number),
            data: 0,
            word: if flush::changes(operation) { CHANGES } else { 0 },
        }
    }

    /// What the request asks stands in its [`Details`] from now on.
    pub(super) fn move_to_details(&mut self) {
        self.data = 0;
        self.word &= !u64::from(u32::MAX);
    }

    /// The first logical block of a simple request.
    pub(super) fn first_block(&self) -> u64 {
        self.target.0
    }

    /// The number of a flush.
    pub(super) fn flush_number(&self) -> u64 {
        self.target.0
    }

    /// The flush was given to the drive once more, as one with this number.
    pub(super) fn set_flush_number(&mut self, number: u64) {
        self.target = BlockOrFlush::flush(number);
    }

    /// Bytes of the data, which is in one place; 0: there are [`Details`] of the request.
    pub(super) fn bytes(&self) -> u32 {
        self.word as u32
    }

    /// Does the request change the disk, or did it if it has been answered since?
    pub(super) fn changes(&self) -> bool {
        self.word & CHANGES != 0
    }

    pub(super) fn has(&self, flag: u64) -> bool {
        self.word & flag != 0
    }

    pub(super) fn set(&mut self, flag: u64) {
        self.word |= flag;
    }

    pub(super) fn clear(&mut self, flags: u64) {
        self.word &= !flags;
    }

    /// How often the request was tried again.
    pub(super) fn retries(&self) -> u8 {
        (self.word / RETRY) as u8
    }

    /// In how many failures of the drive the request has had a part.
    pub(super) fn failures(&self) -> u8 {
        (self.word / FAILURE) as u8
    }

    /// The drive has answered the request, which so does not make it fail.
    pub(super) fn acquit(&mut self) {
        self.word &= !(LOST | EXPIRED | ALONE | (u64::from(u8::MAX) * FAILURE));
    }

    /// Counts one more ([`RETRY`], [`FAILURE`]), unless there were so many already: false.
    pub(super) fn count(&mut self, what: u64, most: u8) -> bool {
        let counted = (self.word / what) as u8;
        if counted < most {
            self.word += what;
        }
        counted < most
    }
}

/// What is kept of a request that is not a read or write of data in one place.
pub(super) struct Details {
    pub request: Request,
    /// Where the data of a read or write lies in guest memory, in order.
    pub buffers: Vec<Buffer>,
    /// The blocks of a discard or a write of zeroes.
    pub ranges: Vec<LbaRange>,
}

impl Details {
    fn bytes(&self) -> usize {
        bytes(self.buffers.capacity(), self.ranges.capacity())
    }
}

/// What details with lists of this many entries take, in bytes.
fn bytes(buffers: usize, ranges: usize) -> usize {
    size_of::<Details>() + buffers * size_of::<Buffer>() + ranges * size_of::<LbaRange>()
}

/// The details of a lane's requests.
#[derive(Default)]
pub(super) struct DetailsBySlot {
    /// The details of requests that the drive has, or is to be given, by slot; not longer than the last slot that had any.
    by_slot: Vec<Option<Box<Details>>>,
    /// What all details take that were not released yet, in bytes.
    used: usize,
    /// Details of requests that are done, for others to use: the lists and the boxes.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Details>>,
    /// What the spare details take, in bytes.
    spared: usize,
}

impl DetailsBySlot {
    /// May a request with so many buffers and ranges be kept now?
    pub(super) fn has_room(&self, buffers: usize, ranges: usize) -> bool {
        self.used == 0 || self.used + bytes(grown(buffers), grown(ranges)) <= MOST_BYTES
    }

    /// Keeps lists, for [`DetailsBySlot::put`] or whoever gives them to [`DetailsBySlot::release`] in the end.
    pub(super) fn keep(
        &mut self,
        request: Request,
        buffers: impl Iterator<Item = Buffer>,
        ranges: &[LbaRange],
    ) -> Box<Details> {
        let mut lists = match self.spare.pop() {
            Some(mut lists) => {
                self.spared -= lists.bytes();
                lists.request = request;
                lists
            }
            None => Box::new(Details { request, buffers: Vec::new(), ranges: Vec::new() }),
        };
        lists.buffers.reserve_exact(grown(buffers.size_hint().1.unwrap_or(0)));
        lists.buffers.extend(buffers);
        lists.ranges.reserve_exact(grown(ranges.len()));
        lists.ranges.extend_from_slice(ranges);
        self.used += lists.bytes();
        lists
    }

    /// Keeps a request from a parser for its slot.
    pub(super) fn keep_parsed(&mut self, slot: u16, request: &Request, chain: &Chain, ranges: &[LbaRange]) {
        let lists = match request.operation {
            Operation::Read | Operation::Write => {
                self.keep(*request, request::data_buffers(chain, request.operation), &[])
            }
            Operation::Flush => self.keep(*request, std::iter::empty(), &[]),
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                self.keep(*request, std::iter::empty(), ranges)
            }
        };
        self.put(slot, lists);
    }

    /// Keeps details for a slot that has none.
    pub(super) fn put(&mut self, slot: u16, lists: Box<Details>) {
        let index = usize::from(slot);
        if self.by_slot.len() <= index {
            self.by_slot.resize_with(index + 1, || None);
        }
        self.by_slot[index] = Some(lists);
    }

    /// What is kept for this slot.
    pub(super) fn get(&self, slot: u16) -> Option<&Details> {
        self.by_slot.get(usize::from(slot))?.as_deref()
    }

    /// How many buffers or ranges are kept for this slot; 1 if it has no details.
    pub(super) fn entries(&self, slot: u16) -> usize {
        self.get(slot).map_or(1, |lists| lists.buffers.len().max(lists.ranges.len()))
    }

    /// Takes what is kept for this slot.
    pub(super) fn take(&mut self, slot: u16) -> Option<Box<Details>> {
        self.by_slot.get_mut(usize::from(slot))?.take()
    }

    /// The request in this slot is done.
    pub(super) fn drop_slot(&mut self, slot: u16) {
        if let Some(lists) = self.take(slot) {
            self.release(lists);
        }
    }

    /// None of the requests that have slots is asked again.
    pub(super) fn drop_all(&mut self) {
        for slot in std::mem::take(&mut self.by_slot) {
            slot.into_iter().for_each(|lists| self.release(lists));
        }
    }

    /// Takes lists back.
    pub(super) fn release(&mut self, mut lists: Box<Details>) {
        let bytes = lists.bytes();
        self.used -= bytes;
        if self.spared + bytes <= MOST_SPARE {
            lists.buffers.clear();
            lists.ranges.clear();
            self.spared += bytes;
            self.spare.push(lists);
        }
    }

    /// What is allocated now, in bytes, but for a word per slot.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.used + self.spared
    }
}

/// The capacity for so many entries.
fn grown(entries: usize) -> usize {
    entries.next_multiple_of(STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(details: &mut DetailsBySlot, buffers: usize) -> Box<Details> {
        let request = Request { operation: Operation::Read, lba: 0, bytes: 1, status: 0, written: 1 };
        details.keep(request, (0..buffers as u64).map(|address| Buffer { address, bytes: 1 }), &[])
    }

    #[test]
    fn lists_are_bounded_and_most_of_them_are_given_back() {
        let mut details = DetailsBySlot::default();
        let mut kept = Vec::new();
        while details.has_room(1022, 0) {
            kept.push(keep(&mut details, 1022));
            assert!(kept.last().unwrap().buffers.iter().zip(0..).all(|(buffer, address)| buffer.address == address));
        }
        assert!(details.allocated() <= MOST_BYTES && kept.len() >= 16, "{} requests", kept.len());
        kept.into_iter().for_each(|lists| details.release(lists));
        assert!(details.allocated() <= MOST_SPARE);
        assert_eq!(details.used, 0);
        // However long a request is, it is taken when it is alone.
        assert!(details.has_room(1 << 20, 0));
        // What is kept serves requests that are as usual, without another allocation.
        let kept: Vec<_> = (0..4).map(|_| keep(&mut details, 16)).collect();
        let allocated = details.allocated();
        kept.into_iter().for_each(|lists| details.release(lists));
        let kept: Vec<_> = (0..4).map(|_| keep(&mut details, 16)).collect();
        assert_eq!(details.allocated(), allocated);
        drop(kept);
    }
}
