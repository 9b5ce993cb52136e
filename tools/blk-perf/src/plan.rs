//! What a queue of the client is to do next, and what it makes of the answers.

use std::fmt;

use crate::pattern::Found;
use crate::random::Random;

/// The kinds of request, in the order in which counters are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data from the disk.
    Read,
    /// Data to the disk.
    Write,
    /// What was completed before becomes durable.
    Flush,
    /// The content is given up.
    Discard,
    /// The content becomes zero.
    WriteZeroes,
}

impl Kind {
    /// All kinds, in the order of their counters.
    pub const ALL: [Kind; 5] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard, Kind::WriteZeroes];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Discard => "discard",
            Kind::WriteZeroes => "write zeroes",
        })
    }
}

/// One request, in logical blocks of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// First logical block.
    pub lba: u64,
    /// Number of logical blocks; 0 for a flush.
    pub blocks: u32,
    /// Which write of the queue this is; 0 for anything but a write.
    pub version: u32,
    /// The plan's own index of the first block.
    pub(crate) index: u64,
    /// Write zeroes: the blocks may be deallocated.
    pub unmap: bool,
    /// Where in its buffer the data begins, in bytes: guests do not align to pages.
    pub(crate) shift: usize,
}

/// Room that a buffer has for [`Request::shift`], in bytes.
pub(crate) const MAX_SHIFT: usize = 4096;

/// The answer of a plan that is asked for a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Next {
    /// Send this.
    Request(Request),
    /// Nothing just now: what is in flight has to complete first.
    Later,
    /// Nothing any more.
    Done,
}

/// A source of requests for one queue, and the judge of their results.
pub(crate) trait Plan: Send {
    /// Whether a time stamp per request is worth its clock read: the plan works long on each request.
    const STAMP_EACH: bool;
    /// The next request; reads and writes may be at most `capacity` bytes long.
    fn next(&mut self, capacity: usize) -> Next;
    /// Makes the buffer of `request` (exactly its length) ready before it is sent.
    fn prepare(&mut self, request: &Request, buffer: &mut [u8]);
    /// Takes the result: whether the device reported success, and the buffer as it is now.
    fn complete(&mut self, request: &Request, success: bool, buffer: &[u8], wrong: &mut Vec<Mismatch>);
}

/// What a block should have held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The last write to it.
    Version(u32),
    /// Zeroes: write zeroes was the last to touch it.
    Zeroes,
    /// Anything but a block that was written to another place: it was discarded.
    Discarded,
}

/// A block whose content is not what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The logical block that was read.
    pub lba: u64,
    /// What the block should have held.
    pub expected: Expected,
    /// What the block held.
    pub found: Found,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { lba, expected, found } = self;
        let what = match (expected, found) {
            (Expected::Version(_), Found::Whole { lba: other, .. }) if other == lba => "stale",
            (_, Found::Whole { .. }) => "misplaced",
            (_, Found::Torn { .. }) => "torn",
            (Expected::Version(_), Found::Zeroes) => "lost",
            _ => "wrong",
        };
        write!(f, "block {lba} is {what}: expected ")?;
        match expected {
            Expected::Version(version) => write!(f, "version {version}")?,
            Expected::Zeroes => write!(f, "zeroes")?,
            Expected::Discarded => write!(f, "any content but another block's")?,
        }
        write!(f, ", found {found}")
    }
}

/// Pure load: reads and writes of one size, nothing verified.
pub(crate) struct PlainPlan {
    random: Random,
    /// Requests of this size fit on the disk.
    places: u64,
    blocks: u32,
    read_percent: u64,
    order: Order,
}

/// Where the next request goes.
enum Order {
    Random,
    /// To this place, then to the one after it; after the last place, to the first.
    Next(u64),
}

impl PlainPlan {
    /// Requests of `blocks` logical blocks at multiples of their own size on a disk of `disk_blocks`.
    pub(crate) fn new(random: Random, disk_blocks: u64, blocks: u32, read_percent: u8) -> Self {
        let places = disk_blocks / u64::from(blocks);
        PlainPlan { random, places, blocks, read_percent: read_percent.into(), order: Order::Random }
    }

    /// Takes the places one after the other, as queue `queue` of `queues`, which share the disk evenly.
    pub(crate) fn in_order(mut self, queue: usize, queues: usize) -> Self {
        let first = u128::from(self.places) * queue as u128 / queues as u128;
        // At most `places`, which is 64 bits long.
        self.order = Order::Next(first as u64);
        self
    }
}

impl Plan for PlainPlan {
    const STAMP_EACH: bool = false;

    #[inline]
    fn next(&mut self, _capacity: usize) -> Next {
        let place = match &mut self.order {
            Order::Random => self.random.below(self.places),
            Order::Next(place) => {
                let this = *place;
                *place = if this + 1 < self.places { this + 1 } else { 0 };
                this
            }
        };
        let lba = place * u64::from(self.blocks);
        let read = self.read_percent == 100 || self.random.chance(self.read_percent, 100);
        Next::Request(Request {
            kind: if read { Kind::Read } else { Kind::Write },
            lba,
            blocks: self.blocks,
            version: 0,
            index: 0,
            unmap: false,
            shift: 0,
        })
    }

    #[inline]
    fn prepare(&mut self, _request: &Request, _buffer: &mut [u8]) {}

    #[inline]
    fn complete(&mut self, _: &Request, _: bool, _: &[u8], _: &mut Vec<Mismatch>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(plan: &mut PlainPlan, count: usize) -> Vec<u64> {
        let next = |_| match plan.next(4096) {
            Next::Request(request) => request.lba,
            other => panic!("{other:?}"),
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn queues_in_order_start_apart_and_go_round() {
        // 10 places of 8 blocks, and a rest that no request of this size reaches the end of.
        let plan = || PlainPlan::new(Random::new(1, 0), 83, 8, 100);
        assert_eq!(places(&mut plan().in_order(0, 2), 11), [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 0]);
        assert_eq!(places(&mut plan().in_order(1, 2), 6), [40, 48, 56, 64, 72, 0]);
        let mut random = places(&mut plan(), 1000);
        assert_ne!(random[..3], [0, 8, 16]);
        random.sort_unstable();
        random.dedup();
        assert_eq!(random, [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]);
    }
}
