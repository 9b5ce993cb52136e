//! What a written block looks like, and what a wrong one tells.
//!
//! Every block is filled from (seed, LBA, version): a header of four 64-bit little-endian words,
//! then words that count up from a base derived from the header. Any word that is wrong shows, and
//! the header says where a block that is in the wrong place, or too old, came from.

use std::fmt;

/// A hash: every bit of `value` reaches every bit of the result.
#[inline]
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Added from one word of a block to the next; odd, so that 2^64 words pass before one repeats.
const STEP: u64 = 0xd6e8_feb8_6659_fd93;
/// First word of every block that this program wrote, mixed with the seed.
const MAGIC: u64 = 0x626c_6b2d_7065_7266;
/// Words of the header: magic and seed, LBA, version, check.
const HEADER_WORDS: usize = 4;
const HEADER_BYTES: usize = HEADER_WORDS * 8;

/// What a read block holds, as far as it can be recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zero bytes.
    Zeroes,
    /// A block this run wrote, whole.
    Whole {
        /// Where the block was written to, in logical blocks.
        lba: u64,
        /// Which write of its queue it was.
        version: u32,
    },
    /// The header of a block this run wrote over other content.
    Torn {
        /// Where the block was written to, in logical blocks.
        lba: u64,
        /// Which write of its queue it was.
        version: u32,
        /// First byte of the block that does not belong to it.
        at: usize,
    },
    /// The buffer was not touched at all although the read succeeded.
    Untouched,
    /// Nothing this run wrote.
    Foreign,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Zeroes => write!(f, "zeroes"),
            Found::Whole { lba, version } => write!(f, "version {version} of block {lba}"),
            Found::Torn { lba, version, at } => {
                write!(f, "version {version} of block {lba} only up to byte {at}, other data after it")
            }
            Found::Untouched => write!(f, "nothing: the buffer was not written"),
            Found::Foreign => write!(f, "data that this run never wrote"),
        }
    }
}

/// Fills and checks the blocks of one run.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
    block_bytes: usize,
}

impl Pattern {
    /// For blocks of `block_bytes` (512 or more, a multiple of 8) written under `seed`.
    pub fn new(seed: u64, block_bytes: usize) -> Self {
        debug_assert!(block_bytes >= 512 && block_bytes.is_multiple_of(8));
        Pattern { seed: mix(seed), block_bytes }
    }

    /// Bytes per block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// The header and the word the rest counts up from.
    #[inline]
    fn header(&self, lba: u64, version: u32) -> ([u64; HEADER_WORDS], u64) {
        let version = u64::from(version);
        let base = mix(self.seed ^ mix(lba.wrapping_mul(STEP) ^ mix(version)));
        ([MAGIC ^ self.seed, lba, version, base], !base)
    }

    /// Fills `buffer`, a whole number of blocks, as written to `lba` and onwards by write `version`.
    pub fn fill(&self, buffer: &mut [u8], lba: u64, version: u32) {
        for (block, lba) in buffer.chunks_exact_mut(self.block_bytes).zip(lba..) {
            let (header, base) = self.header(lba, version);
            let (head, body) = block.split_at_mut(HEADER_BYTES);
            for (bytes, word) in head.chunks_exact_mut(8).zip(header) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            let mut word = base;
            for bytes in body.chunks_exact_mut(8) {
                bytes.copy_from_slice(&word.to_le_bytes());
                word = word.wrapping_add(STEP);
            }
        }
    }

    /// True if `block` is exactly what `version` wrote to `lba`.
    #[inline]
    pub fn is_whole(&self, block: &[u8], lba: u64, version: u32) -> bool {
        let (header, base) = self.header(lba, version);
        let (head, body) = block.split_at(HEADER_BYTES);
        // Differences are gathered, not branched on: the loop over the body vectorises.
        let mut wrong = 0;
        for (bytes, word) in head.chunks_exact(8).zip(header) {
            wrong |= read_word(bytes) ^ word;
        }
        let mut word = base;
        for bytes in body.chunks_exact(8) {
            wrong |= read_word(bytes) ^ word;
            word = word.wrapping_add(STEP);
        }
        wrong == 0
    }

    /// Says what `block` is; for blocks that are not what was expected.
    pub fn recognise(&self, block: &[u8]) -> Found {
        if is_zero(block) {
            return Found::Zeroes;
        }
        let word = |index: usize| read_word(&block[index * 8..index * 8 + 8]);
        if word(0) == POISON && word(block.len() / 8 - 1) == POISON {
            return Found::Untouched;
        }
        let (lba, Ok(version)) = (word(1), u32::try_from(word(2))) else {
            return Found::Foreign;
        };
        let (header, base) = self.header(lba, version);
        if word(0) != header[0] || word(3) != header[3] {
            return Found::Foreign;
        }
        let words = block.len() / 8;
        let wrong = (HEADER_WORDS..words).find(|&index| {
            let count = (index - HEADER_WORDS) as u64;
            word(index) != base.wrapping_add(STEP.wrapping_mul(count))
        });
        match wrong {
            None => Found::Whole { lba, version },
            Some(index) => Found::Torn { lba, version, at: index * 8 },
        }
    }

    /// Marks the blocks of a read's buffer, so that a read that moves no data is noticed even when the
    /// buffer happens to hold the right block from an earlier read.
    pub fn poison(&self, buffer: &mut [u8]) {
        for block in buffer.chunks_exact_mut(self.block_bytes) {
            block[..8].copy_from_slice(&POISON.to_le_bytes());
            let last = block.len() - 8;
            block[last..].copy_from_slice(&POISON.to_le_bytes());
        }
    }
}

/// What a read's buffer holds before the read, at both ends of every block.
const POISON: u64 = 0x5ead_beef_0bad_f00d;

#[inline]
fn read_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("callers pass eight bytes"))
}

/// True if every byte of `block` is zero.
#[inline]
pub fn is_zero(block: &[u8]) -> bool {
    block.chunks_exact(8).fold(0, |all, bytes| all | read_word(bytes)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_for_what_it_is() {
        for block_bytes in [512, 4096] {
            let pattern = Pattern::new(42, block_bytes);
            let mut blocks = vec![0; 3 * block_bytes];
            pattern.fill(&mut blocks, 1 << 40, 7);
            for (block, lba) in blocks.chunks(block_bytes).zip(1 << 40..) {
                assert!(pattern.is_whole(block, lba, 7));
                assert!(!pattern.is_whole(block, lba, 8));
                assert!(!pattern.is_whole(block, lba + 1, 7));
                assert!(!Pattern::new(43, block_bytes).is_whole(block, lba, 7));
                assert_eq!(pattern.recognise(block), Found::Whole { lba, version: 7 });
                assert_eq!(Pattern::new(43, block_bytes).recognise(block), Found::Foreign);
            }
        }
    }

    #[test]
    fn every_single_wrong_byte_shows() {
        let pattern = Pattern::new(1, 512);
        let mut block = vec![0; 512];
        pattern.fill(&mut block, 5, 3);
        for at in 0..block.len() {
            block[at] ^= 0x10;
            assert!(!pattern.is_whole(&block, 5, 3), "byte {at}");
            assert_ne!(pattern.recognise(&block), Found::Whole { lba: 5, version: 3 }, "byte {at}");
            block[at] ^= 0x10;
        }
    }

    #[test]
    fn a_torn_block_says_where() {
        let pattern = Pattern::new(1, 4096);
        let (mut new, mut old) = (vec![0; 4096], vec![0; 4096]);
        pattern.fill(&mut new, 5, 9);
        pattern.fill(&mut old, 5, 8);
        new[1024..].copy_from_slice(&old[1024..]);
        assert_eq!(pattern.recognise(&new), Found::Torn { lba: 5, version: 9, at: 1024 });
    }

    #[test]
    fn zeroes_and_untouched_buffers_are_told_apart() {
        let pattern = Pattern::new(1, 512);
        let mut block = vec![0; 512];
        assert_eq!(pattern.recognise(&block), Found::Zeroes);
        pattern.fill(&mut block, 5, 9);
        pattern.poison(&mut block);
        assert_eq!(pattern.recognise(&block), Found::Untouched);
        assert!(!pattern.is_whole(&block, 5, 9));
    }
}
