//! The in-flight log, which outlives this process: the chains that were taken and not given back (vhost-user, "Inflight I/O
//! tracking").
//!
//! The front-end keeps the memory and hands it to the next process, which learns from it what to do again: [`SplitLog`]
//! and [`PackedLog`] follow the specification's steps for the two formats.
//!
//! There is one writer. A process that is killed stops between two instructions, and what it stored before is there for its
//! successor: memory that other processes have mapped, too, loses no store that was executed. So it is the order of the
//! program that counts, and no barrier of the machine is needed. [`Field::set_after`] is for stores that must not come before
//! what was stored earlier; others may change places among themselves. Where the specification sets several fields in a row,
//! they may be set by one store that is wider. Fields are little-endian, as all machines this runs on.

mod packed;
mod split;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

pub(super) use packed::{PackedLog, PackedState};
pub(super) use split::SplitLog;

use vfio::{DmaElement, SharedMemory};

use crate::fault_point::fault_point;
use crate::virtio::memory::GuestSlice;

/// `version` of a region in use; 0: not used yet.
const VERSION: u16 = 1;
/// Regions begin at multiples of a cache line, so that two queues' workers do not share one.
const ALIGNMENT: usize = 64;

const IN_FLIGHT: u8 = 1;
/// The memory of any log: 256 queues of 32768 entries of 32 bytes each take half of it.
const MOST_BYTES: u64 = 512 << 20;

/// What sessions leave for each other, see [`Note`]: as many words at the end of the first queue's region. The other regions
/// are as much longer: they are as long as each other for every implementation, and for none is this a part of the log.
const NOTE_WORDS: usize = 8;
const NOTE_BYTES: usize = 8 * NOTE_WORDS;
/// The note's first word, if there is one.
const NOTE_MAGIC: u64 = u64::from_le_bytes(*b"vhblknt1");
/// Index of the note's second word: the mode of the write cache.
const MODE: usize = 1;
const WRITE_BACK: u64 = 1;
const WRITE_THROUGH: u64 = 2;
/// Then: the first flush that makes safe every change answered so far, and the last one that has succeeded.
const NEEDED: usize = 2;
const SUCCEEDED: usize = 3;
/// How often the drive had lost its cache, and 1; 0: it does not say.
const LOSSES: usize = 4;
/// Not 0: the next flush has to fail.
const BROKEN: usize = 5;
/// Not 0: a ring has run without a log, for which there was too little room.
const UNLOGGED: usize = 6;

/// Memory for in-flight tracking that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// The region could not be made or mapped.
    #[error("the in-flight region cannot be mapped: {0}")]
    Memory(#[from] vfio::Error),
    /// The region is longer than any log: nobody pays for such a mapping.
    #[error("the in-flight region has {bytes} bytes; {MOST_BYTES} are enough for any log")]
    TooLong {
        /// Length of the region in bytes.
        bytes: u64,
    },
    /// The region is too small for what it has to track. The ring can run without.
    #[error("the in-flight region has {bytes} bytes for this ring, {needed} are needed")]
    TooSmall {
        /// Bytes there are for the ring.
        bytes: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// Somebody else's layout, or not a log at all; or requests are in flight in it, of a ring of another size.
    #[error("the in-flight region was written for version {version} and {entries} descriptors, this ring has {size}")]
    Foreign {
        /// Version of the region's layout.
        version: u16,
        /// Descriptors for which the region was written.
        entries: u16,
        /// Descriptors of the ring.
        size: u16,
    },
}

/// The memory of all queues of a device (`VhostUserInflight`).
pub struct InflightMemory {
    memory: Arc<SharedMemory>,
    queues: u16,
    /// Bytes per queue.
    stride: usize,
    /// Memory that another implementation made has none.
    note: Option<Arc<Note>>,
}

impl InflightMemory {
    /// Zeroed memory for `queues` rings of up to `size` descriptors of either format.
    pub fn create(queues: u16, size: u16) -> Result<InflightMemory, InflightError> {
        let stride = packed::bytes(size).next_multiple_of(ALIGNMENT) + NOTE_BYTES;
        let memory = Arc::new(SharedMemory::create(stride * usize::from(queues).max(1))?);
        if let Some(note) = Note::place(&memory, stride) {
            note.word(0).set(NOTE_MAGIC);
        }
        let note = Note::find(&memory, stride);
        Ok(InflightMemory { memory, queues, stride, note })
    }

    /// The memory in `bytes` bytes of a front-end's file, with whatever an earlier process has left there.
    pub fn from_file(file: File, offset: u64, bytes: u64, queues: u16) -> Result<InflightMemory, InflightError> {
        if bytes > MOST_BYTES {
            return Err(InflightError::TooLong { bytes });
        }
        let memory = Arc::new(SharedMemory::from_file(file, offset, bytes as usize)?);
        let bytes = memory.len();
        // Whoever made it, the regions are as long as each other.
        let stride = bytes / usize::from(queues.max(1)) / 8 * 8;
        let note = Note::find(&memory, stride);
        Ok(InflightMemory { memory, queues, stride, note })
    }

    /// What sessions leave for each other; `None`: there is no place for it.
    pub fn note(&self) -> Option<&Arc<Note>> {
        self.note.as_ref()
    }

    /// Was it found without pages: is its file shorter now?
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// Has a ring used it, of this process or an earlier one? Also if there was no room for its log.
    pub fn in_use(&self) -> bool {
        if self.note().is_some_and(|note| note.unlogged()) {
            return true;
        }
        let offsets = (0..usize::from(self.queues)).map(|index| index * self.stride + 8);
        offsets
            .filter_map(|offset| self.memory.slice::<AtomicU64>(offset, 1))
            .any(|words| field(words[0].get(), 0) != 0)
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> Arc<SharedMemory> {
        self.memory.clone()
    }

    /// The file, from offset 0 on.
    pub fn file(&self) -> &File {
        self.memory.file()
    }

    /// Length of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.stride as u64 * u64::from(self.queues)
    }

    /// The region of a queue; `None`: there is none.
    pub fn queue(&self, index: usize) -> Option<InflightQueue> {
        let offset = (index < usize::from(self.queues)).then(|| index * self.stride)?;
        let bytes = self.stride - if self.note.is_some() { NOTE_BYTES } else { 0 };
        Some(InflightQueue { memory: self.memory.clone(), offset, bytes })
    }

    /// Forgets what every queue had in flight: the device was reset.
    pub fn clear(&self) {
        for queue in (0..usize::from(self.queues)).filter_map(|index| self.queue(index)) {
            // Version 0, whatever the format.
            if let Some(words) = self.memory.slice::<AtomicU64>(queue.offset + 8, 1) {
                words[0].store(0, Ordering::Relaxed);
            }
        }
        if let Some(note) = &self.note {
            note.set_unlogged(false);
        }
    }
}

/// What a session leaves for the next one, of this process or another: a front-end that comes again does not say everything
/// again. In its memory, as the log is.
pub struct Note {
    memory: Arc<SharedMemory>,
    offset: usize,
}

impl Note {
    /// The place for one in memory with regions of this length.
    fn place(memory: &Arc<SharedMemory>, stride: usize) -> Option<Note> {
        let offset = stride.checked_sub(NOTE_BYTES)?;
        memory.slice::<AtomicU64>(offset, NOTE_WORDS)?;
        Some(Note { memory: memory.clone(), offset })
    }

    fn find(memory: &Arc<SharedMemory>, stride: usize) -> Option<Arc<Note>> {
        Note::place(memory, stride).filter(|note| note.word(0).get() == NOTE_MAGIC).map(Arc::new)
    }

    fn word(&self, number: usize) -> &AtomicU64 {
        let words = self.memory.slice(self.offset, NOTE_WORDS);
        &words.expect("`place` has found it inside, and the memory keeps its length")[number]
    }

    /// The mode of the write cache, true for write-back; `None`: nobody has said.
    pub fn mode(&self) -> Option<bool> {
        match self.word(MODE).get() {
            WRITE_BACK => Some(true),
            WRITE_THROUGH => Some(false),
            _ => None,
        }
    }

    /// Says what the mode is.
    pub fn set_mode(&self, writeback: bool) {
        self.word(MODE).set_after(if writeback { WRITE_BACK } else { WRITE_THROUGH });
    }

    /// Changes were answered which a flush with this number makes safe, or a later one. Lanes of several workers say so.
    pub fn set_needed(&self, number: u64) {
        // AcqRel, here and below: what is told of later is not there before.
        self.word(NEEDED).fetch_max(number.to_le(), Ordering::AcqRel);
    }

    /// The flush with this number has succeeded.
    pub fn set_succeeded(&self, number: u64) {
        self.word(SUCCEEDED).fetch_max(number.to_le(), Ordering::AcqRel);
    }

    /// Have changes been answered that no flush has made safe?
    pub fn unsafe_changes(&self) -> bool {
        self.word(NEEDED).get() > self.word(SUCCEEDED).get()
    }

    /// Begins to count flushes anew. Whenever this process dies, it stays as it was whether there are unsafe changes.
    pub fn restart(&self, needed: u64, succeeded: u64) {
        let steps = match needed > succeeded {
            true => [(SUCCEEDED, 0), (NEEDED, needed), (SUCCEEDED, succeeded)],
            false => [(NEEDED, 0), (SUCCEEDED, succeeded), (NEEDED, needed)],
        };
        steps.into_iter().for_each(|(word, value)| self.word(word).set_after(value));
    }

    /// How often the drive had lost its cache when this was written, if it counts that.
    pub fn losses(&self) -> Option<u64> {
        self.word(LOSSES).get().checked_sub(1)
    }

    /// Says how often.
    pub fn set_losses(&self, losses: Option<u64>) {
        self.word(LOSSES).set_after(losses.map_or(0, |losses| losses.saturating_add(1)));
    }

    /// Does the guest still have to be told that changes are lost?
    pub fn broken(&self) -> bool {
        self.word(BROKEN).get() != 0
    }

    /// Says whether.
    pub fn set_broken(&self, broken: bool) {
        self.word(BROKEN).set_after(broken.into());
    }

    /// Has a ring run without a log since the device was new?
    fn unlogged(&self) -> bool {
        self.word(UNLOGGED).get() != 0
    }

    /// Says whether: the log of no ring tells then that the memory is in use.
    pub fn set_unlogged(&self, unlogged: bool) {
        self.word(UNLOGGED).set_after(unlogged.into());
    }
}

/// The region of one queue.
pub struct InflightQueue {
    memory: Arc<SharedMemory>,
    offset: usize,
    bytes: usize,
}

impl InflightQueue {
    /// A header of so many words, and an entry per descriptor.
    fn parts<E: DmaElement>(&self, header: usize, size: u16) -> Result<(Header, GuestSlice<E>), InflightError> {
        let needed = 8 * header + size_of::<E>() * usize::from(size);
        let too_small = || InflightError::TooSmall { bytes: self.bytes, needed };
        if needed > self.bytes {
            return Err(too_small());
        }
        let head = GuestSlice::of_shared(&self.memory, self.offset, header).ok_or_else(too_small)?;
        let entries = GuestSlice::of_shared(&self.memory, self.offset + 8 * header, size.into());
        Ok((head, entries.ok_or_else(too_small)?))
    }
}

type Header = GuestSlice<AtomicU64>;

/// A field in the log.
trait Field {
    type Value;

    fn get(&self) -> Self::Value;

    fn set(&self, value: Self::Value);

    /// Stores what only counts when everything stored before is there.
    fn set_after(&self, value: Self::Value);
}

macro_rules! field {
    ($atomic:ty, $value:ty) => {
        impl Field for $atomic {
            type Value = $value;

            #[inline(always)]
            fn get(&self) -> $value {
                fault_point!(Load);
                <$value>::from_le(self.load(Ordering::Relaxed))
            }

            #[inline(always)]
            fn set(&self, value: $value) {
                fault_point!(Store);
                self.store(value.to_le(), Ordering::Relaxed);
            }

            #[inline(always)]
            fn set_after(&self, value: $value) {
                fault_point!(Store);
                // Release: stays behind all earlier stores. It pairs with the successor's reading, which begins after this
                // process's end.
                self.store(value.to_le(), Ordering::Release);
            }
        }
    };
}

field!(AtomicU8, u8);
field!(AtomicU16, u16);
field!(AtomicU64, u64);

/// The 16 bits at `place` (0 to 3) of a word.
#[inline(always)]
fn field(word: u64, place: u32) -> u16 {
    (word >> (16 * place)) as u16
}

/// Four 16-bit fields as a word.
#[inline(always)]
fn word(fields: [u16; 4]) -> u64 {
    u64::from(fields[0]) | u64::from(fields[1]) << 16 | u64::from(fields[2]) << 32 | u64::from(fields[3]) << 48
}

/// What is to be done again, by the counters of what is in flight: the oldest last, and the next counter.
fn by_age<T>(mut found: Vec<(u64, T)>) -> (Vec<T>, u64) {
    found.sort_by_key(|&(counter, _)| std::cmp::Reverse(counter));
    let next = found.first().map_or(0, |newest| newest.0.wrapping_add(1));
    (found.into_iter().map(|(_, chain)| chain).collect(), next)
}

/// Does the log of a ring that had `count` descriptors, this one or one before it, have nothing in flight?
fn is_empty<E: DmaElement>(queue: &InflightQueue, header: usize, count: u16, inflight: fn(&E) -> &AtomicU8) -> bool {
    // A log that does not fit into its memory is none of ours.
    queue.parts::<E>(header, count).is_ok_and(|(_, entries)| entries.iter().all(|e| inflight(e).get() != IN_FLIGHT))
}
