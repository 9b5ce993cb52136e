use std::fmt;
use std::str::FromStr;

use blk_perf::{Pattern, is_zero};

/// What the blocks of a disk are expected to hold: a pattern made from a seed and each block's number, but for some
/// ranges, which hold zeroes or were written under other seeds.
#[derive(Clone, Debug)]
pub struct Layout {
    block_bytes: usize,
    seed: u64,
    exceptions: Vec<Exception>,
}

/// A range of blocks that holds something else: written `FIRST+COUNT=SEED` or `FIRST+COUNT=zeroes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// What is there.
    pub content: Content,
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Zeroes,
    /// The pattern of this seed.
    Seed(u64),
}

impl Layout {
    /// A disk of blocks of `block_bytes` that was filled under `seed`.
    pub fn new(seed: u64, block_bytes: usize) -> Layout {
        Layout { block_bytes, seed, exceptions: Vec::new() }
    }

    /// With exceptions; of those that overlap the last one counts.
    pub fn except(mut self, exceptions: &[Exception]) -> Layout {
        self.exceptions.extend_from_slice(exceptions);
        self
    }

    /// Bytes per block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn content(&self, lba: u64) -> Content {
        let holds = |exception: &&Exception| lba.checked_sub(exception.first).is_some_and(|at| at < exception.blocks);
        self.exceptions.iter().rev().find(holds).map_or(Content::Seed(self.seed), |exception| exception.content)
    }

    /// Fills `buffer`, a whole number of blocks, with what the blocks from `lba` on hold.
    pub fn fill(&self, lba: u64, buffer: &mut [u8]) {
        for (block, lba) in buffer.chunks_exact_mut(self.block_bytes).zip(lba..) {
            match self.content(lba) {
                Content::Zeroes => block.fill(0),
                Content::Seed(seed) => Pattern::new(seed, self.block_bytes).fill(block, lba, 0),
            }
        }
    }

    /// Compares `buffer`, a whole number of blocks, with what the blocks from `lba` on hold; says what the first wrong
    /// block holds instead.
    pub fn check(&self, lba: u64, buffer: &[u8]) -> Result<(), String> {
        let (blocks, rest) = (buffer.chunks_exact(self.block_bytes), buffer.len() % self.block_bytes);
        if rest != 0 {
            return Err(format!("{} bytes from block {lba} on are no whole number of blocks", buffer.len()));
        }
        for (block, lba) in blocks.zip(lba..) {
            let content = self.content(lba);
            let right = match content {
                Content::Zeroes => is_zero(block),
                Content::Seed(seed) => Pattern::new(seed, self.block_bytes).is_whole(block, lba, 0),
            };
            if !right {
                let seed = if let Content::Seed(seed) = content { seed } else { self.seed };
                let found = Pattern::new(seed, self.block_bytes).recognise(block);
                return Err(format!("block {lba} should hold {content}, and holds {found} (seed {seed})"));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Zeroes => f.write_str("zeroes"),
            Content::Seed(seed) => write!(f, "{seed}"),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}={}", self.first, self.blocks, self.content)
    }
}

impl FromStr for Exception {
    type Err = String;

    fn from_str(text: &str) -> Result<Exception, String> {
        let bad = || format!("'{text}' is not FIRST+COUNT=SEED or FIRST+COUNT=zeroes");
        let (range, content) = text.split_once('=').ok_or_else(bad)?;
        let (first, blocks) = range.split_once('+').ok_or_else(bad)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| bad());
        let content = if content == "zeroes" { Content::Zeroes } else { Content::Seed(number(content)?) };
        Ok(Exception { first: number(first)?, blocks: number(blocks)?, content })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_block_is_found_and_named() {
        let layout = Layout::new(1, 512).except(&["2+2=zeroes".parse().unwrap(), "3+1=9".parse().unwrap()]);
        let mut disk = vec![0; 8 * 512];
        layout.fill(100, &mut disk);
        assert!(layout.check(100, &disk).is_ok());
        layout.fill(0, &mut disk);
        assert!(layout.check(0, &disk).is_ok());
        assert!(is_zero(&disk[2 * 512..][..512]) && !is_zero(&disk[3 * 512..][..512]));
        for at in 0..8 * 512 {
            disk[at] ^= 1;
            let error = layout.check(0, &disk).unwrap_err();
            assert!(error.starts_with(&format!("block {} should hold", at / 512)), "{error}");
            disk[at] ^= 1;
        }
        assert!(layout.check(1, &disk[..512]).is_err(), "a block in another's place");
        assert!(Layout::new(2, 512).check(0, &disk[..512]).is_err(), "a block of another seed");
        assert!(layout.check(0, &disk[..100]).is_err(), "a part of a block");
    }

    #[test]
    fn exceptions_are_read_as_they_are_written() {
        for text in ["0+1=zeroes", "100+64=7"] {
            assert_eq!(text.parse::<Exception>().unwrap().to_string(), text);
        }
        for text in ["", "1=2", "1+2", "1+2=", "a+2=zeroes", "1+2=none"] {
            assert!(text.parse::<Exception>().is_err(), "{text}");
        }
    }
}
