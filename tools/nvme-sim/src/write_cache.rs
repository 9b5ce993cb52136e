//! The volatile write cache: what a power cut would take away.
//!
//! Writes go to the backing at once; the cache keeps what each unflushed block held before (once per block). Reads so cost
//! nothing extra, a flush forgets the old contents, and a power cut puts them back. A block that was written several times
//! since the last flush holds, after a power cut, either its newest contents or those of the last flush.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use fastrand::Rng;

use crate::backing::Backing;
use crate::dma::SharedBytes;
use crate::error::Error;

/// Block numbers spread over the table by one multiplication.
#[derive(Default)]
pub(crate) struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (value ^ value >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// The old contents of one block.
struct Old {
    slot: u32,
    /// Distinguishes this entry from an earlier one of the same block in `order`.
    sequence: u64,
}

pub(crate) struct WriteCache {
    shift: u8,
    old: HashMap<u64, Old, BuildHasherDefault<BlockHasher>>,
    /// Blocks in the order in which they became unflushed; some are flushed since.
    order: VecDeque<(u64, u64)>,
    arena: SharedBytes,
    free: Vec<u32>,
    sequence: u64,
    slots: usize,
}

impl WriteCache {
    /// A cache for `bytes` of unflushed blocks of `1 << shift` bytes each.
    pub(crate) fn new(shift: u8, bytes: u64) -> Result<WriteCache, Error> {
        let slots = (bytes >> shift).clamp(1, 1 << 24) as usize;
        let size = slots << shift;
        let memory = |source| Error::Memory { what: "the write cache", bytes: size as u64, source };
        Ok(WriteCache {
            shift,
            old: HashMap::default(),
            order: VecDeque::new(),
            arena: SharedBytes::anonymous(size).map_err(memory)?,
            free: (0..slots as u32).rev().collect(),
            sequence: 0,
            slots,
        })
    }

    /// Blocks are about to change in `media`; with `durable` they survive a power cut from then on.
    #[inline]
    pub(crate) fn before_write(&mut self, media: &Backing, lba: u64, blocks: u64, durable: bool) {
        // A range larger than the cache goes straight through it.
        if durable || blocks > self.slots as u64 {
            self.commit(lba, blocks);
            return;
        }
        for block in lba..lba + blocks {
            if self.old.contains_key(&block) {
                continue;
            }
            let Some(slot) = self.free.pop().or_else(|| self.write_back_oldest()) else { return };
            let size = 1 << self.shift;
            if media.copy_to((block as usize) << self.shift, &self.arena, (slot as usize) << self.shift, size).is_none()
            {
                self.free.push(slot);
                return;
            }
            self.sequence += 1;
            self.old.insert(block, Old { slot, sequence: self.sequence });
            self.order.push_back((block, self.sequence));
        }
    }

    /// The oldest unflushed block becomes durable by itself, as a drive does when its cache is full.
    fn write_back_oldest(&mut self) -> Option<u32> {
        while let Some((block, sequence)) = self.order.pop_front() {
            if self.old.get(&block).is_some_and(|old| old.sequence == sequence) {
                return self.old.remove(&block).map(|old| old.slot);
            }
        }
        None
    }

    fn commit(&mut self, lba: u64, blocks: u64) {
        let free = &mut self.free;
        if blocks > self.old.len() as u64 {
            self.old.retain(|block, old| {
                let keep = block.wrapping_sub(lba) >= blocks;
                if !keep {
                    free.push(old.slot);
                }
                keep
            });
        } else {
            for block in lba..lba + blocks {
                free.extend(self.old.remove(&block).map(|old| old.slot));
            }
        }
        if self.old.is_empty() {
            self.order.clear();
        }
    }

    /// Everything written so far survives a power cut.
    pub(crate) fn flush(&mut self) {
        self.free.extend(self.old.drain().map(|(_, old)| old.slot));
        self.order.clear();
    }

    /// Puts the old contents back: of all unflushed blocks, or of a random half. Returns how many blocks were lost.
    pub(crate) fn power_cut(&mut self, media: &Backing, mut random: Option<&mut Rng>) -> usize {
        let mut lost = 0;
        // In the order of writing, so that the same seed loses the same blocks.
        for (block, sequence) in std::mem::take(&mut self.order) {
            let Some(old) = self.old.get(&block).filter(|old| old.sequence == sequence) else { continue };
            if random.as_mut().is_none_or(|random| random.bool()) {
                let size = 1 << self.shift;
                media.copy_from(&self.arena, (old.slot as usize) << self.shift, (block as usize) << self.shift, size);
                lost += 1;
            }
        }
        self.flush();
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIFT: u8 = 9;

    fn write(cache: &mut WriteCache, media: &Backing, lba: u64, blocks: u64, value: u8, durable: bool) {
        cache.before_write(media, lba, blocks, durable);
        media.write((lba as usize) << SHIFT, &vec![value; (blocks as usize) << SHIFT]);
    }

    fn values(media: &Backing, blocks: usize) -> Vec<u8> {
        let mut bytes = vec![0; blocks << SHIFT];
        media.read(0, &mut bytes);
        bytes
            .chunks(1 << SHIFT)
            .map(|block| if block.iter().all(|b| *b == block[0]) { block[0] } else { 0xff })
            .collect()
    }

    #[test]
    fn a_power_cut_takes_what_was_not_flushed() {
        let media = Backing::Memory(SharedBytes::anonymous(1 << 20).unwrap());
        let mut cache = WriteCache::new(SHIFT, 1 << 20).unwrap();
        write(&mut cache, &media, 0, 4, 1, false);
        cache.flush();
        write(&mut cache, &media, 1, 4, 2, false);
        write(&mut cache, &media, 2, 1, 3, false);
        write(&mut cache, &media, 3, 1, 4, true);
        assert_eq!(cache.power_cut(&media, None), 3);
        assert_eq!(values(&media, 6), [1, 1, 1, 4, 0, 0]);
        assert_eq!(cache.power_cut(&media, None), 0);
    }

    #[test]
    fn a_random_cut_is_repeatable() {
        let cut = |seed| {
            let media = Backing::Memory(SharedBytes::anonymous(1 << 20).unwrap());
            let mut cache = WriteCache::new(SHIFT, 1 << 20).unwrap();
            write(&mut cache, &media, 0, 100, 1, false);
            let lost = cache.power_cut(&media, Some(&mut Rng::with_seed(seed)));
            let values = values(&media, 100);
            assert_eq!(values.iter().filter(|v| **v == 0).count(), lost);
            assert!((20..80).contains(&lost), "{lost}");
            values
        };
        assert_eq!(cut(5), cut(5));
        assert_ne!(cut(5), cut(6));
    }

    #[test]
    fn a_full_cache_writes_the_oldest_back() {
        let media = Backing::Memory(SharedBytes::anonymous(1 << 20).unwrap());
        let mut cache = WriteCache::new(SHIFT, 4 << SHIFT).unwrap();
        write(&mut cache, &media, 0, 4, 1, false);
        write(&mut cache, &media, 0, 1, 2, false);
        write(&mut cache, &media, 8, 1, 3, false);
        assert_eq!(cache.power_cut(&media, None), 4);
        assert_eq!(values(&media, 9), [2, 0, 0, 0, 0, 0, 0, 0, 0]);
        write(&mut cache, &media, 0, 9, 5, false);
        assert_eq!(cache.power_cut(&media, None), 0, "larger than the cache: written through");
    }
}
