//! What every block of the disk has to hold.

use std::collections::HashSet;
use std::ops::Range;

use crate::random::mix;

/// What may be found in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    /// The write that was acknowledged last; 0: zeroes.
    version: u32,
    /// Zeroes will do as well: it was discarded since.
    or_zeroes: bool,
}

pub struct Disk {
    seed: u64,
    block_bytes: usize,
    blocks: Vec<Content>,
    /// Blocks that a request in flight touches: no other may.
    busy: HashSet<u64>,
    next_version: u32,
}

/// Pattern words that say whose block it is: everything after them is derived from them.
const LABELS: usize = 2;

impl Disk {
    pub fn new(seed: u64, block_bytes: u32, count: u64) -> Disk {
        let content = Content { version: 0, or_zeroes: false };
        let blocks = vec![content; count as usize];
        Disk { seed, block_bytes: block_bytes as usize, blocks, busy: HashSet::new(), next_version: 1 }
    }

    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    pub fn block_bytes(&self) -> u64 {
        self.block_bytes as u64
    }

    /// Takes up to `most` blocks from `first` on for a request; fewer if another one has them.
    pub fn claim(&mut self, first: u64, most: u64) -> Option<Range<u64>> {
        let end = self.blocks().min(first + most);
        let end = (first..end).find(|block| self.busy.contains(block)).unwrap_or(end);
        self.busy.extend(first..end);
        (first < end).then_some(first..end)
    }

    pub fn release(&mut self, blocks: &Range<u64>) {
        blocks.clone().for_each(|block| _ = self.busy.remove(&block));
    }

    /// A number for a new write.
    pub fn version(&mut self) -> u32 {
        self.next_version += 1;
        self.next_version - 1
    }

    fn word(&self, block: u64, version: u32, index: usize) -> u64 {
        match index {
            0 => block ^ self.seed,
            1 => version.into(),
            _ => mix(self.seed ^ block << 40 ^ u64::from(version) << 8 ^ index as u64),
        }
    }

    /// The data of a write.
    pub fn fill(&self, blocks: Range<u64>, version: u32, data: &mut [u8]) {
        for (block, bytes) in blocks.zip(data.chunks_exact_mut(self.block_bytes)) {
            for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
                chunk.copy_from_slice(&self.word(block, version, index).to_le_bytes());
            }
        }
    }

    fn is(&self, block: u64, version: u32, bytes: &[u8]) -> bool {
        let mut words = bytes.chunks_exact(8).enumerate();
        words.all(|(index, word)| match version {
            0 => word == [0; 8],
            _ => word == self.word(block, version, index).to_le_bytes(),
        })
    }

    pub fn written(&mut self, blocks: Range<u64>, version: u32) {
        self.blocks[blocks.start as usize..blocks.end as usize].fill(Content { version, or_zeroes: false });
    }

    pub fn discarded(&mut self, blocks: Range<u64>) {
        self.blocks[blocks.start as usize..blocks.end as usize].iter_mut().for_each(|content| content.or_zeroes = true);
    }

    /// Compares what was read with what has to be there, and says what is wrong.
    pub fn check(&self, blocks: Range<u64>, data: &[u8]) -> Vec<String> {
        let found = blocks.zip(data.chunks_exact(self.block_bytes));
        found.filter_map(|(block, bytes)| self.check_block(block, bytes)).collect()
    }

    fn check_block(&self, block: u64, bytes: &[u8]) -> Option<String> {
        let Content { version, or_zeroes } = self.blocks[block as usize];
        if self.is(block, version, bytes) || or_zeroes && self.is(block, 0, bytes) {
            return None;
        }
        let word = |at: usize| u64::from_le_bytes(bytes[8 * at..8 * at + 8].try_into().expect("8 bytes"));
        let (whose, older) = (word(0) ^ self.seed, word(LABELS - 1) as u32);
        let what = if bytes.iter().all(|byte| *byte == POISON) {
            "nothing was read".into()
        } else if self.is(block, 0, bytes) {
            "zeroes are there".into()
        } else if whose < self.blocks() && older != 0 && self.is(whose, older, bytes) {
            match whose == block {
                true => format!("write {older} is there"),
                false => format!("write {older} of block {whose} is there"),
            }
        } else {
            "it is torn".into()
        };
        Some(format!("block {block} has to hold write {version}, but {what}"))
    }
}

/// What is in a buffer before it is read into.
pub const POISON: u8 = 0xa5;
