//! The verified workload: which blocks a queue works on, and what each of them must hold.

use crate::pattern::{Found, Pattern, is_zero};
use crate::plan::{Expected, Kind, MAX_SHIFT, Mismatch, Next, Plan, Request};
use crate::random::Random;

/// Pieces the working window is cut into; the first begins the disk and the last ends it.
const PIECES: u64 = 16;
/// A request that would touch blocks in flight is drawn again this often before waiting.
const DRAWS: usize = 8;

/// The part of the disk that one queue works on: equal pieces spread over the whole disk, so that
/// a terabyte is covered without remembering a terabyte.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    starts: Vec<u64>,
    /// Logical blocks per piece.
    length: u64,
}

impl Window {
    /// The window of queue `queue` out of `queues` when all of them together work on `blocks` of the
    /// `disk_blocks` logical blocks; `None` if that leaves a queue nothing.
    pub(crate) fn new(disk_blocks: u64, blocks: u64, queue: u64, queues: u64) -> Option<Window> {
        let length = blocks.min(disk_blocks) / PIECES / queues;
        if length == 0 {
            return None;
        }
        let spread = disk_blocks - length * queues;
        // In 128 bits: a disk may have 2^64 blocks.
        let start =
            |piece: u64| (u128::from(spread) * u128::from(piece) / u128::from(PIECES - 1)) as u64 + queue * length;
        Some(Window { starts: (0..PIECES).map(start).collect(), length })
    }

    /// Blocks in the window.
    fn blocks(&self) -> u64 {
        PIECES * self.length
    }

    /// The logical block on the disk of block `index` of the window.
    fn lba(&self, index: u64) -> u64 {
        let piece = usize::try_from(index / self.length).expect("an index is below PIECES pieces");
        self.starts[piece] + index % self.length
    }

    /// Blocks from `index` to the end of its piece: a request must not be longer.
    fn room(&self, index: u64) -> u64 {
        self.length - index % self.length
    }
}

/// What is known of a block, in 32 bits: the numbers from `FIRST_VERSION` up are versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content(u32);

impl Content {
    /// Never written in this run, or a failed write may have changed it.
    const UNKNOWN: Content = Content(0);
    const ZEROES: Content = Content(1);
    const DISCARDED: Content = Content(2);
    const FIRST_VERSION: u32 = 3;

    fn expected(self) -> Option<Expected> {
        match self {
            Content::UNKNOWN => None,
            Content::ZEROES => Some(Expected::Zeroes),
            Content::DISCARDED => Some(Expected::Discarded),
            Content(version) => Some(Expected::Version(version)),
        }
    }
}

/// What the blocks of one window must hold.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    window: Window,
    contents: Vec<Content>,
    pattern: Pattern,
}

impl Model {
    /// Nothing is known of `window` yet.
    pub(crate) fn new(window: Window, pattern: Pattern) -> Model {
        let blocks = usize::try_from(window.blocks()).expect("a window is limited to memory size");
        Model { window, contents: vec![Content::UNKNOWN; blocks], pattern }
    }

    fn range(index: u64, blocks: u32) -> std::ops::Range<usize> {
        let start = usize::try_from(index).expect("indices are below the model's length");
        start..start + blocks as usize
    }

    fn set(&mut self, request: &Request, content: Content) {
        self.contents[Self::range(request.index, request.blocks)].fill(content);
    }

    /// Compares what a read returned with what the blocks must hold.
    fn check(&self, request: &Request, buffer: &[u8], wrong: &mut Vec<Mismatch>) {
        let contents = &self.contents[Self::range(request.index, request.blocks)];
        let blocks = buffer.chunks_exact(self.pattern.block_bytes());
        for ((block, content), lba) in blocks.zip(contents).zip(request.lba..) {
            let Some(expected) = content.expected() else {
                continue;
            };
            let good = match expected {
                Expected::Version(version) => self.pattern.is_whole(block, lba, version),
                Expected::Zeroes => is_zero(block),
                Expected::Discarded => match self.pattern.recognise(block) {
                    Found::Whole { lba: other, .. } | Found::Torn { lba: other, .. } => other == lba,
                    Found::Untouched => false,
                    Found::Zeroes | Found::Foreign => true,
                },
            };
            if !good {
                wrong.push(Mismatch { lba, expected, found: self.pattern.recognise(block) });
            }
        }
    }
}

/// How often each kind of request is drawn, relative to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Flushes.
    pub flush: u32,
    /// Discards.
    pub discard: u32,
    /// Write zeroes.
    pub write_zeroes: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Mix { read: 50, write: 40, flush: 2, discard: 4, write_zeroes: 4 }
    }
}

impl Mix {
    fn draw(&self, random: &mut Random) -> Option<Kind> {
        let weights = [
            (Kind::Read, self.read),
            (Kind::Write, self.write),
            (Kind::Flush, self.flush),
            (Kind::Discard, self.discard),
            (Kind::WriteZeroes, self.write_zeroes),
        ];
        let total = weights.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let mut at = random.below(total);
        for (kind, weight) in weights {
            if at < u64::from(weight) {
                return Some(kind);
            }
            at -= u64::from(weight);
        }
        None
    }
}

/// Limits the disk sets, in logical blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) discard: u32,
    pub(crate) write_zeroes: u32,
}

/// Random verified requests on one queue's window.
pub(crate) struct VerifiedPlan {
    model: Model,
    random: Random,
    mix: Mix,
    limits: Limits,
    /// The version of the next write.
    version: u32,
    /// Window ranges of requests in flight: no two of them may touch the same block.
    in_flight: Vec<(u64, u64)>,
}

impl VerifiedPlan {
    pub(crate) fn new(model: Model, random: Random, mix: Mix, limits: Limits) -> Self {
        VerifiedPlan { model, random, mix, limits, version: Content::FIRST_VERSION, in_flight: Vec::new() }
    }

    pub(crate) fn into_model(self) -> Model {
        self.model
    }

    /// A length in blocks: any order of magnitude up to `most` is as likely as another.
    fn length(&mut self, most: u64) -> u64 {
        let most = most.max(1);
        let magnitude = self.random.below(u64::from(most.ilog2()) + 2);
        let upper = (1 << magnitude).min(most);
        1 + self.random.below(upper)
    }

    /// A place: half of the requests go to the first sixteenth of each piece, so that blocks are met
    /// again while their history is short.
    fn place(&mut self) -> u64 {
        let window = &self.model.window;
        let index = self.random.below(window.blocks());
        let inside = index % window.length;
        if self.random.chance(1, 2) { index - inside + inside / 16 } else { index }
    }

    fn is_busy(&self, start: u64, end: u64) -> bool {
        self.in_flight.iter().any(|&(other_start, other_end)| start < other_end && other_start < end)
    }
}

impl Plan for VerifiedPlan {
    const STAMP_EACH: bool = true;

    fn next(&mut self, capacity: usize) -> Next {
        let Some(kind) = self.mix.draw(&mut self.random) else {
            return Next::Done;
        };
        let mut request = Request { kind, lba: 0, blocks: 0, version: 0, index: 0, unmap: false, shift: 0 };
        let most = match kind {
            Kind::Flush => return Next::Request(request),
            Kind::Read | Kind::Write => {
                if self.random.chance(1, 2) {
                    // NVMe wants multiples of four bytes (NVMe 2.0 base, 4.1.1).
                    request.shift = self.random.below(MAX_SHIFT as u64 / 4) as usize * 4;
                }
                (capacity.saturating_sub(MAX_SHIFT) / self.model.pattern.block_bytes()) as u64
            }
            Kind::Discard => self.limits.discard.into(),
            Kind::WriteZeroes => self.limits.write_zeroes.into(),
        };
        for _ in 0..DRAWS {
            let index = self.place();
            let length = self.length(most).min(self.model.window.room(index));
            if self.is_busy(index, index + length) {
                continue;
            }
            request.index = index;
            request.lba = self.model.window.lba(index);
            request.blocks = u32::try_from(length).expect("every limit is in 32 bits");
            match kind {
                Kind::Write => {
                    request.version = self.version;
                    // After four thousand million writes the numbers begin again; a block that
                    // is stale by exactly that many would be missed.
                    self.version = self.version.checked_add(1).unwrap_or(Content::FIRST_VERSION);
                }
                Kind::WriteZeroes => request.unmap = self.random.chance(1, 2),
                _ => {}
            }
            self.in_flight.push((index, index + length));
            return Next::Request(request);
        }
        Next::Later
    }

    fn prepare(&mut self, request: &Request, buffer: &mut [u8]) {
        match request.kind {
            Kind::Read => self.model.pattern.poison(buffer),
            Kind::Write => self.model.pattern.fill(buffer, request.lba, request.version),
            Kind::Flush | Kind::Discard | Kind::WriteZeroes => {}
        }
    }

    fn complete(&mut self, request: &Request, success: bool, buffer: &[u8], wrong: &mut Vec<Mismatch>) {
        let range = (request.index, request.index + u64::from(request.blocks));
        if let Some(at) = self.in_flight.iter().position(|other| *other == range) {
            self.in_flight.swap_remove(at);
        }
        match (request.kind, success) {
            (Kind::Flush, _) | (Kind::Read, false) => {}
            (Kind::Read, true) => self.model.check(request, buffer, wrong),
            (Kind::Write, true) => self.model.set(request, Content(request.version)),
            (Kind::WriteZeroes, true) => self.model.set(request, Content::ZEROES),
            (Kind::Discard, true) => self.model.set(request, Content::DISCARDED),
            // It may have happened in whole, in part or not at all.
            (_, false) => self.model.set(request, Content::UNKNOWN),
        }
    }
}

/// Reads every block of a model whose content is known, once, in order.
pub(crate) struct ReadBack {
    model: Model,
    cursor: u64,
}

impl ReadBack {
    pub(crate) fn new(model: Model) -> Self {
        ReadBack { model, cursor: 0 }
    }

    /// Blocks that will be compared.
    pub(crate) fn known_blocks(&self) -> u64 {
        let known = |content: &&Content| **content != Content::UNKNOWN;
        self.model.contents.iter().filter(known).count() as u64
    }
}

impl Plan for ReadBack {
    const STAMP_EACH: bool = false;

    fn next(&mut self, capacity: usize) -> Next {
        let contents = &self.model.contents;
        let cursor = usize::try_from(self.cursor).expect("the cursor is at most the model's length");
        let known = |content: &Content| *content != Content::UNKNOWN;
        let Some(skipped) = contents[cursor..].iter().position(known) else {
            return Next::Done;
        };
        let start = cursor + skipped;
        let index = start as u64;
        let most = capacity / self.model.pattern.block_bytes();
        let room = usize::try_from(self.model.window.room(index)).expect("below the model's length");
        let run = contents[start..].iter().take(most.min(room));
        let blocks = run.take_while(|content| known(content)).count();
        self.cursor = index + blocks as u64;
        Next::Request(Request {
            kind: Kind::Read,
            lba: self.model.window.lba(index),
            blocks: u32::try_from(blocks).expect("a buffer is smaller than 2^32 blocks"),
            version: 0,
            index,
            unmap: false,
            shift: 0,
        })
    }

    fn prepare(&mut self, _request: &Request, buffer: &mut [u8]) {
        self.model.pattern.poison(buffer);
    }

    fn complete(&mut self, request: &Request, success: bool, buffer: &[u8], wrong: &mut Vec<Mismatch>) {
        if success {
            self.model.check(request, buffer, wrong);
        }
    }
}

#[cfg(test)]
mod tests;
