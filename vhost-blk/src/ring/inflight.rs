//! What outlives this process: which chains were taken and not given back (vhost-user, "Inflight I/O tracking").
//!
//! The front-end keeps the memory and hands it to the next process, which learns from it what to do again: [`SplitLog`]
//! and [`PackedLog`] follow the specification's steps for the two formats.
//!
//! There is one writer. A process that is killed stops between two instructions, and what it stored before is there for its
//! successor; so stores only have to be issued in order. [`store_after`] is for those that must not come before what was
//! stored earlier; others may change places among themselves. Fields are little-endian, as all machines this runs on.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio::SharedMemory;

use crate::guest_memory::GuestSlice;

/// `version` of a region in use; 0: not used yet.
const VERSION: u16 = 1;
/// Words of a split ring's region (QueueRegionSplit). Header: features; version, desc_num, last_batch_head, used_idx.
const SPLIT_HEADER: usize = 2;
/// DescStateSplit: inflight (8 bits), padding (40), next (16); counter.
const SPLIT_ENTRY: usize = 2;
/// Words of a packed ring's region (QueueRegionPacked). Header: features; version, desc_num, free_head, old_free_head;
/// used_idx, old_used_idx, 8 bits each of used_wrap_counter and old_used_wrap_counter; padding.
const PACKED_HEADER: usize = 4;
/// DescStatePacked: inflight (8 bits), padding (8), next, last, num; counter; id, flags, len; addr.
const PACKED_ENTRY: usize = 4;
/// Regions begin at multiples of a cache line, so that two queues' workers do not share one.
const ALIGNMENT: usize = 64;

const IN_FLIGHT: u64 = 1;

/// Memory for in-flight tracking that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// It could not be made or mapped.
    #[error("the in-flight region cannot be mapped: {0}")]
    Memory(#[from] vfio::Error),
    /// It is too small for what it has to track.
    #[error("the in-flight region has {bytes} bytes for this ring, {needed} are needed")]
    TooSmall {
        /// Bytes there are for the ring.
        bytes: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// Somebody else's layout, or not a log at all.
    #[error("the in-flight region was written for version {version} and {entries} descriptors, this ring has {size}")]
    Foreign {
        /// Its version.
        version: u16,
        /// Its number of descriptors.
        entries: u16,
        /// The ring's.
        size: u16,
    },
}

/// The memory of all queues of a device (`VhostUserInflight`).
pub struct InflightMemory {
    memory: Arc<SharedMemory>,
    queues: u16,
    /// Bytes per queue.
    stride: usize,
}

impl InflightMemory {
    /// Zeroed memory for `queues` rings of up to `size` descriptors of either format.
    pub fn create(queues: u16, size: u16) -> Result<InflightMemory, InflightError> {
        let stride = (8 * (PACKED_HEADER + PACKED_ENTRY * usize::from(size))).next_multiple_of(ALIGNMENT);
        let memory = Arc::new(SharedMemory::create(stride * usize::from(queues).max(1))?);
        Ok(InflightMemory { memory, queues, stride })
    }

    /// The memory in `bytes` bytes of a front-end's file, with whatever an earlier process has left there.
    pub fn from_file(file: File, offset: u64, bytes: u64, queues: u16) -> Result<InflightMemory, InflightError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let memory = Arc::new(SharedMemory::from_file(file, offset, bytes)?);
        // Whoever made it, the regions are as long as each other.
        let stride = bytes / usize::from(queues.max(1)) / 8 * 8;
        Ok(InflightMemory { memory, queues, stride })
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
        Some(InflightQueue { memory: self.memory.clone(), offset, bytes: self.stride })
    }

    /// Forgets what every queue had in flight: the device was reset.
    pub fn clear(&self) {
        for queue in (0..usize::from(self.queues)).filter_map(|index| self.queue(index)) {
            // Version 0, whatever the format.
            if let Some(words) = self.memory.slice::<AtomicU64>(queue.offset + 8, 1) {
                words[0].store(0, Ordering::Relaxed);
            }
        }
    }
}

/// The region of one queue.
pub struct InflightQueue {
    memory: Arc<SharedMemory>,
    offset: usize,
    bytes: usize,
}

type Parts<const ENTRY: usize> = (GuestSlice<AtomicU64>, GuestSlice<[AtomicU64; ENTRY]>);

impl InflightQueue {
    /// A header and `count` entries of so many words.
    fn parts<const HEADER: usize, const ENTRY: usize>(&self, count: u16) -> Result<Parts<ENTRY>, InflightError> {
        let needed = 8 * (HEADER + ENTRY * usize::from(count));
        let too_small = || InflightError::TooSmall { bytes: self.bytes, needed };
        if needed > self.bytes {
            return Err(too_small());
        }
        let head = GuestSlice::of_shared(&self.memory, self.offset, HEADER).ok_or_else(too_small)?;
        let entries = GuestSlice::of_shared(&self.memory, self.offset + 8 * HEADER, count.into());
        Ok((head, entries.ok_or_else(too_small)?))
    }
}

#[inline(always)]
fn load(word: &AtomicU64) -> u64 {
    u64::from_le(word.load(Ordering::Relaxed))
}

#[inline(always)]
fn store(word: &AtomicU64, value: u64) {
    #[cfg(test)]
    super::inflight_tests::may_die_here();
    word.store(value.to_le(), Ordering::Relaxed);
}

/// Stores what only counts when everything stored before is there.
#[inline(always)]
fn store_after(word: &AtomicU64, value: u64) {
    #[cfg(test)]
    super::inflight_tests::may_die_here();
    // Release: stays behind all earlier stores. It pairs with the successor's reading, which begins after this process's end.
    word.store(value.to_le(), Ordering::Release);
}

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

/// Counter and number of each entry that is in flight. In both formats the first word says that, and the second is the counter.
fn in_flight<const WORDS: usize>(entries: &[[AtomicU64; WORDS]]) -> Vec<(u64, u16)> {
    let taken = (0..).zip(entries).filter(|(_, entry)| load(&entry[0]) & 0xff == IN_FLIGHT);
    taken.map(|(number, entry)| (load(&entry[1]), number)).collect()
}

/// What is to be done again, the oldest last.
fn by_age(mut found: Vec<(u64, u16)>) -> (Vec<u16>, u64) {
    found.sort_unstable_by(|a, b| b.cmp(a));
    let next = found.first().map_or(0, |newest| newest.0.wrapping_add(1));
    (found.into_iter().map(|(_, entry)| entry).collect(), next)
}

/// The log of a split ring.
pub(super) struct SplitLog {
    header: GuestSlice<AtomicU64>,
    /// By index of a chain's first descriptor.
    entries: GuestSlice<[AtomicU64; SPLIT_ENTRY]>,
    size: u16,
    counter: u64,
    /// The head given back last: where the list of the last batch begins.
    last: u16,
    /// Heads of the chains to be done again, the oldest last.
    pub unfinished: Vec<u16>,
    /// An earlier process has used this ring.
    pub resumed: bool,
}

impl SplitLog {
    const STATE: usize = 1;

    /// Takes up the log of a ring: `used` is its used index, `available` its available index.
    pub fn open(queue: &InflightQueue, size: u16, used: u16, available: u16) -> Result<SplitLog, InflightError> {
        let (header, entries) = queue.parts::<SPLIT_HEADER, SPLIT_ENTRY>(size)?;
        let mut log = SplitLog { header, entries, size, counter: 0, last: 0, unfinished: Vec::new(), resumed: false };
        let state = load(&log.header[Self::STATE]);
        let (version, count) = (field(state, 0), field(state, 1));
        if version != 0 && (version != VERSION || count != size) {
            return Err(InflightError::Foreign { version, entries: count, size });
        }
        if version == 0 || !log.recover(state, used, available) {
            log.begin(used);
        }
        Ok(log)
    }

    /// A log in which nothing is in flight.
    fn begin(&mut self, used: u16) {
        for entry in self.entries.iter() {
            store(&entry[0], 0);
        }
        (self.counter, self.last, self.resumed) = (0, 0, false);
        self.unfinished.clear();
        self.save(used);
    }

    /// The steps "When reconnecting". False: the log is not of this ring, which has begun anew since.
    fn recover(&mut self, state: u64, used: u16, available: u16) -> bool {
        let batch = used.wrapping_sub(field(state, 3));
        if batch > self.size {
            return false;
        }
        self.last = field(state, 2);
        let mut head = self.last;
        for _ in 0..batch {
            let Some(entry) = self.entries.get(usize::from(head)) else { return false };
            let old = load(&entry[0]);
            store(&entry[0], old & !0xff);
            head = field(old, 3);
        }
        self.save(used);
        let found = in_flight(&self.entries);
        if found.len() > usize::from(available.wrapping_sub(used)) {
            return false;
        }
        (self.unfinished, self.counter) = by_age(found);
        self.resumed = true;
        true
    }

    /// Stores last_batch_head and used_idx.
    #[inline(always)]
    fn save(&self, used: u16) {
        store_after(&self.header[Self::STATE], word([VERSION, self.size, self.last, used]));
    }

    /// "When receiving available buffers": a chain was taken.
    #[inline(always)]
    pub fn take(&mut self, head: u16) {
        if let Some(entry) = self.entries.get(usize::from(head)) {
            store(&entry[1], self.counter);
            self.counter = self.counter.wrapping_add(1);
            store_after(&entry[0], IN_FLIGHT);
        }
    }

    /// A chain that was taken last is put back.
    pub fn untake(&mut self, head: u16) {
        if let Some(entry) = self.entries.get(usize::from(head)) {
            store(&entry[0], 0);
        }
    }

    /// "When supplying used buffers", steps 1 to 3.
    #[inline(always)]
    pub fn give_back(&mut self, head: u16) {
        if let Some(entry) = self.entries.get(usize::from(head)) {
            store(&entry[0], IN_FLIGHT | u64::from(self.last) << 48);
            self.last = head;
        }
    }

    /// The batch is complete: `published` is what the used index still says. The store of the new index has to stay behind.
    #[inline(always)]
    pub fn publishing(&self, published: u16) {
        // last_batch_head; once is enough, for nobody looks at it while the used index is the old one.
        self.save(published);
        #[cfg(test)]
        super::inflight_tests::may_die_here();
    }

    /// The used index went from `old` to `new`, and a fence is between that and this: what was given back is in flight no
    /// more.
    #[inline(always)]
    pub fn published(&self, old: u16, new: u16) {
        let mut head = self.last;
        for _ in 0..new.wrapping_sub(old) {
            let Some(entry) = self.entries.get(usize::from(head)) else { break };
            head = field(load(&entry[0]), 3);
            store(&entry[0], u64::from(head) << 48);
        }
        self.save(new);
    }
}

/// The log of a packed ring.
pub(super) struct PackedLog {
    header: GuestSlice<AtomicU64>,
    entries: GuestSlice<[AtomicU64; PACKED_ENTRY]>,
    size: u16,
    counter: u64,
    /// The first of the free entries.
    free: u16,
    /// Entries of the chains given back and not published yet; never longer than the ring.
    batch: Vec<u16>,
    /// First entries of the chains to be done again, the oldest last.
    pub unfinished: Vec<u16>,
    /// An earlier process has used this ring.
    pub resumed: bool,
}

/// Index and wrap counter of the next used descriptor.
type Used = (u16, bool);

/// What a packed log says of its ring.
pub(super) struct PackedState {
    /// Where the ring goes on.
    pub used: Used,
    /// Descriptors of the ring taken and not given back.
    pub taken: u16,
}

impl PackedLog {
    const STATE: usize = 1;
    const USED: usize = 2;
    /// No entry.
    pub const NONE: u16 = u16::MAX;

    /// Takes up the log of a ring; `used` is where a ring without a log goes on, `new` says that the ring was never used,
    /// and `is_available` whether the descriptor at a place is still as the driver made it available.
    pub fn open(
        queue: &InflightQueue,
        size: u16,
        used: Used,
        new: bool,
        is_available: impl Fn(Used) -> bool,
    ) -> Result<(PackedLog, PackedState), InflightError> {
        let (header, entries) = queue.parts::<PACKED_HEADER, PACKED_ENTRY>(size)?;
        let batch = Vec::with_capacity(size.into());
        let (counter, free, unfinished) = (0, 0, Vec::new());
        let mut log = PackedLog { header, entries, size, counter, free, batch, unfinished, resumed: false };
        let state = load(&log.header[Self::STATE]);
        let (version, count) = (field(state, 0), field(state, 1));
        if version != 0 && !new && (version != VERSION || count != size) {
            return Err(InflightError::Foreign { version, entries: count, size });
        }
        if version != 0
            && !new
            && let Some(state) = log.recover(state, is_available)
        {
            return Ok((log, state));
        }
        log.begin(used);
        Ok((log, PackedState { used, taken: 0 }))
    }

    /// A log in which nothing is in flight.
    fn begin(&mut self, used: Used) {
        for (index, entry) in (1..).zip(self.entries.iter()) {
            store(&entry[0], word([0, index, 0, 0]));
        }
        (self.counter, self.free, self.resumed) = (0, 0, false);
        self.unfinished.clear();
        self.save_used(used, used);
        self.save_free(0);
    }

    /// The steps "When reconnecting"; `None`: nothing that a ring could go on from.
    fn recover(&mut self, state: u64, is_available: impl Fn(Used) -> bool) -> Option<PackedState> {
        let words = load(&self.header[Self::USED]);
        let (new, old) = ((field(words, 0), words >> 32 & 1 == 1), (field(words, 1), words >> 40 & 1 == 1));
        // The guest sees a batch from the moment its first descriptor is used; it may be available anew since, in the next
        // round, which looks different again.
        let committed = new != old && old.0 < self.size && !is_available(old);
        let (used, free) = if committed { (new, field(state, 2)) } else { (old, field(state, 3)) };
        if used.0 >= self.size {
            return None;
        }
        self.free = free;
        let mut is_free = vec![false; self.size.into()];
        let mut next = usize::from(free);
        while let Some(seen) = is_free.get_mut(next) {
            if std::mem::replace(seen, true) {
                return None;
            }
            let entry = &self.entries[next];
            let old = load(&entry[0]);
            store(&entry[0], old & !0xff);
            next = field(old, 1).into();
        }
        self.save_used(used, used);
        self.save_free(free);
        let found = in_flight(&self.entries);
        let descriptors: u32 = found.iter().map(|&(_, head)| u32::from(self.entries_of(head))).sum();
        let taken = u16::try_from(descriptors).ok().filter(|taken| *taken <= self.size)?;
        (self.unfinished, self.counter) = by_age(found);
        self.resumed = true;
        Some(PackedState { used, taken })
    }

    /// Stores used_idx and used_wrap_counter, and their old values.
    #[inline(always)]
    fn save_used(&self, new: Used, old: Used) {
        let wraps = u16::from(new.1) | u16::from(old.1) << 8;
        store_after(&self.header[Self::USED], word([new.0, old.0, wraps, 0]));
    }

    /// Stores free_head and its old value.
    #[inline(always)]
    fn save_free(&self, old: u16) {
        store_after(&self.header[Self::STATE], word([VERSION, self.size, self.free, old]));
    }

    /// "When receiving available buffers": a chain of `count` descriptors was taken, of which `descriptor` gives both words.
    /// Returns its entry; [`Self::NONE`] if the driver has more in flight than its ring holds.
    #[inline(always)]
    pub fn take(&mut self, count: u16, mut descriptor: impl FnMut(u16) -> [u64; 2]) -> u16 {
        let head = self.free;
        let Some(first) = self.entries.get(usize::from(head)) else { return Self::NONE };
        let second = field(load(&first[0]), 1);
        let (mut last, mut next) = (head, second);
        Self::copy(first, descriptor(0));
        for number in 1..count {
            let Some(entry) = self.entries.get(usize::from(next)) else { return Self::NONE };
            Self::copy(entry, descriptor(number));
            last = next;
            next = field(load(&entry[0]), 1);
        }
        store(&first[1], self.counter);
        self.counter = self.counter.wrapping_add(1);
        store(&first[0], word([IN_FLIGHT as u16, second, last, count]));
        self.free = next;
        // The chain is in the log from here on.
        self.save_free(next);
        head
    }

    /// In the ring: length, id, flags. In the log: id, flags, length.
    #[inline(always)]
    fn copy(entry: &[AtomicU64; PACKED_ENTRY], [address, rest]: [u64; 2]) {
        store(&entry[2], rest.rotate_left(32));
        store(&entry[3], address);
    }

    /// A chain that was taken last is put back.
    pub fn untake(&mut self, head: u16) {
        if self.link(head) {
            self.save_free(self.free);
            // In either order: what is in the list of free entries is not in flight.
            self.clear(head);
        }
    }

    /// Puts the entries of a chain before the free ones.
    #[inline(always)]
    fn link(&mut self, head: u16) -> bool {
        let last = self.entries.get(usize::from(head)).map(|entry| field(load(&entry[0]), 2));
        let Some(last) = last.and_then(|last| self.entries.get(usize::from(last))) else { return false };
        store(&last[0], load(&last[0]) & !0xffff_0000 | u64::from(self.free) << 16);
        self.free = head;
        true
    }

    /// It is in flight no more.
    #[inline(always)]
    fn clear(&self, head: u16) {
        if let Some(entry) = self.entries.get(usize::from(head)) {
            store(&entry[0], load(&entry[0]) & !0xff);
        }
    }

    /// Descriptors of the chain whose first entry this is.
    fn entries_of(&self, head: u16) -> u16 {
        self.entries.get(usize::from(head)).map_or(0, |entry| field(load(&entry[0]), 3))
    }

    /// The descriptors of a chain in the log, as they were in the ring.
    pub fn chain(&self, head: u16) -> impl Iterator<Item = [u64; 2]> + '_ {
        let mut next = head;
        (0..self.entries_of(head)).map_while(move |_| {
            let entry = self.entries.get(usize::from(next))?;
            next = field(load(&entry[0]), 1);
            Some([load(&entry[3]), load(&entry[2]).rotate_right(32)])
        })
    }

    /// "When supplying used buffers", steps 1 and 2. The others wait for [`PackedLog::publishing`]: between them no chain
    /// may be taken.
    #[inline(always)]
    pub fn give_back(&mut self, entry: u16) {
        // A ring gives back no more chains at once than it has descriptors: this never allocates.
        if self.batch.len() < self.batch.capacity() {
            self.batch.push(entry);
        }
    }

    /// Steps 3 to 6: the batch ends at `new`, the guest still sees it at `old`. The store that shows it has to stay behind.
    #[inline(always)]
    pub fn publishing(&mut self, new: Used, old: Used) {
        let before = self.free;
        for number in 0..self.batch.len() {
            self.link(self.batch[number]);
        }
        self.save_free(before);
        self.save_used(new, old);
        #[cfg(test)]
        super::inflight_tests::may_die_here();
    }

    /// The guest sees the batch, which ends at `new`, and a fence is between that and this.
    #[inline(always)]
    pub fn published(&mut self, new: Used) {
        for &head in &self.batch {
            self.clear(head);
        }
        self.batch.clear();
        self.save_free(self.free);
        // Until here the old position says that the batch is to be committed.
        self.save_used(new, new);
    }
}
