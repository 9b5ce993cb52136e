//! What each logical block may hold after a power cut.
//!
//! A block's changes are numbered from 1; 0 is the disk as it was made, zeroes. Only one change of a block is under way at a
//! time, so their order is known. The block's newest *kept* change is the last one that a flush, or writing through, promised
//! to keep; after a cut the block holds that one or a later one, whole, and nothing else.

use std::ops::Range;

/// What a request does to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Data of its own in every block.
    Write,
    /// Write zeroes: promised as a write is.
    Zero,
    /// Discard: gives zeroes on this drive, and promises nothing.
    Discard,
}

#[derive(Clone)]
struct Block {
    /// What the block may hold after a cut: the kept change first, then all later ones.
    changes: Vec<(u32, Change)>,
    /// The number of the last change; not used again when that is lost, so that it cannot come back unnoticed.
    last: u32,
    /// The last change that was answered.
    answered: u32,
    /// A request for it is under way.
    busy: bool,
}

impl Block {
    /// Everything up to this change is to be kept. What a discard leaves is not: the one before it is as good.
    fn keep(&mut self, answered: u32) {
        let promised = |change: &(u32, Change)| change.0 <= answered && change.1 != Change::Discard;
        if let Some(kept) = self.changes.iter().rposition(promised) {
            self.changes.drain(..kept);
        }
    }
}

/// What a flush that begins now promises to keep: the newest answered change of each block.
pub struct Promise(Vec<u32>);

pub struct Model {
    blocks: Vec<Block>,
    block_bytes: usize,
    /// How often a block had lost its newest answered change after a cut.
    went_back: u64,
}

/// Bytes in which a block says what it is: its number, the change, and the place in the block.
const UNIT: usize = 16;

impl Model {
    pub fn new(blocks: usize, block_bytes: usize) -> Model {
        let block = Block { changes: vec![(0, Change::Zero)], last: 0, answered: 0, busy: false };
        Model { blocks: vec![block; blocks], block_bytes, went_back: 0 }
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub fn went_back(&self) -> u64 {
        self.went_back
    }

    pub fn is_busy(&self, blocks: &Range<u64>) -> bool {
        self.of(blocks).any(|block| block.busy)
    }

    fn of(&self, blocks: &Range<u64>) -> impl Iterator<Item = &Block> {
        self.blocks[blocks.start as usize..blocks.end as usize].iter()
    }

    fn of_mut(&mut self, blocks: &Range<u64>) -> impl Iterator<Item = &mut Block> {
        self.blocks[blocks.start as usize..blocks.end as usize].iter_mut()
    }

    /// A read of the blocks is sent.
    pub fn begin_read(&mut self, blocks: &Range<u64>) {
        self.of_mut(blocks).for_each(|block| block.busy = true);
    }

    /// A change of the blocks is sent; returns their new contents.
    pub fn begin_change(&mut self, blocks: &Range<u64>, change: Change) -> Vec<u8> {
        let mut data = Vec::new();
        for number in blocks.clone() {
            let block = &mut self.blocks[number as usize];
            block.last += 1;
            block.changes.push((block.last, change));
            block.busy = true;
            data.extend(contents(number, (block.last, change), self.block_bytes));
        }
        data
    }

    /// The newest change of the blocks was answered; `kept` if it is durable by that.
    pub fn changed(&mut self, blocks: &Range<u64>, kept: bool) {
        for block in self.of_mut(blocks) {
            block.busy = false;
            block.answered = block.last;
            if kept {
                block.keep(block.answered);
            }
        }
    }

    /// A read was answered: it shows the newest contents.
    pub fn was_read(&mut self, blocks: &Range<u64>, data: &[u8]) {
        for (number, data) in blocks.clone().zip(data.chunks(self.block_bytes)) {
            let block = &mut self.blocks[number as usize];
            block.busy = false;
            let newest = *block.changes.last().expect("there is always one");
            let right = data == contents(number, newest, self.block_bytes);
            assert!(right, "block {number} reads as {}, not as {newest:?}", describe(data));
        }
    }

    pub fn promise(&self) -> Promise {
        Promise(self.blocks.iter().map(|block| block.answered).collect())
    }

    /// The promise was given.
    pub fn keep(&mut self, promise: Promise) {
        self.blocks.iter_mut().zip(promise.0).for_each(|(block, answered)| block.keep(answered));
    }

    /// What was under way will not be answered any more.
    pub fn power_cut(&mut self) {
        self.blocks.iter_mut().for_each(|block| block.busy = false);
    }

    /// What blocks hold when the drive is there again: that is what they are from now on.
    pub fn survived(&mut self, blocks: Range<u64>, data: &[u8]) {
        for (number, data) in blocks.zip(data.chunks(self.block_bytes)) {
            let block = &mut self.blocks[number as usize];
            // Where several left zeroes, the newest of them is as good as any.
            let found = block.changes.iter().rev().find(|change| data == contents(number, **change, self.block_bytes));
            let Some(&found) = found else {
                panic!("block {number} holds {}; only these may be there: {:?}", describe(data), block.changes);
            };
            self.went_back += u64::from(found.0 < block.answered);
            block.answered = found.0;
            block.changes = vec![found];
        }
    }
}

/// What a change leaves in a block.
fn contents(number: u64, (version, change): (u32, Change), bytes: usize) -> Vec<u8> {
    match change {
        Change::Zero | Change::Discard => vec![0; bytes],
        Change::Write => (0..(bytes / UNIT) as u32).flat_map(|place| unit(number as u32, version, place)).collect(),
    }
}

/// One unit of a written block. Never zeroes, and nowhere twice on the disk.
fn unit(number: u32, version: u32, place: u32) -> [u8; UNIT] {
    let mut unit = [0; UNIT];
    for (word, value) in unit.chunks_mut(4).zip([!number, number, version, place]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    unit
}

/// Says what is in a block: runs of units that belong together.
fn describe(data: &[u8]) -> String {
    let word = |unit: &[u8], at: usize| u32::from_le_bytes([unit[at], unit[at + 1], unit[at + 2], unit[at + 3]]);
    let mut seen = Vec::new();
    for (place, found) in data.chunks(UNIT).enumerate() {
        let (number, version) = (word(found, 4), word(found, 8));
        let text = match found {
            _ if found.iter().all(|byte| *byte == 0) => "zeroes".to_owned(),
            _ if found == unit(number, version, place as u32) => format!("change {version} of block {number}"),
            _ => "something else".to_owned(),
        };
        if seen.last() != Some(&text) {
            seen.push(text);
        }
    }
    seen.join(", then ")
}
