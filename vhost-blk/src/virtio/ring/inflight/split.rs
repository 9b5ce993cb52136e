//! The log of a split ring.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use vfio::DmaElement;

use super::{Field, Header, IN_FLIGHT, InflightError, InflightQueue, VERSION, by_age, field, is_empty, word};
use crate::fault_point::fault_point;
use crate::virtio::memory::GuestSlice;

/// Words before the entries (QueueRegionSplit): features; version, desc_num, last_batch_head, used_idx.
const HEADER: usize = 2;
const STATE: usize = 1;

/// DescStateSplit.
#[repr(C)]
struct SplitEntry {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    /// Given back before this one, in the same batch.
    next: AtomicU16,
    counter: AtomicU64,
}

// SAFETY: nothing but atomics, without a gap between them; any bytes are valid.
unsafe impl DmaElement for SplitEntry {}

/// The log of a split ring.
pub(in super::super) struct SplitLog {
    header: Header,
    /// The entries, by index of a chain's first descriptor.
    entries: GuestSlice<SplitEntry>,
    /// One less than there are entries, which are a power of two.
    mask: u16,
    counter: u64,
    /// The head given back last: where the list of the last batch begins.
    last: u16,
}

impl SplitLog {
    /// Takes up the log of a ring of `size` descriptors, a power of two: `used` is its used index, `available` its available
    /// index. Gives also the heads of the chains to be done again, the oldest last, if an earlier process has used this ring.
    pub(crate) fn open(
        queue: &InflightQueue,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<(SplitLog, Option<Vec<u16>>), InflightError> {
        assert!(size.is_power_of_two(), "every ring is made with such a size");
        let (header, entries) = queue.parts(HEADER, size)?;
        let mut log = SplitLog { header, entries, mask: size - 1, counter: 0, last: 0 };
        let state = log.header[STATE].get();
        let (version, count) = (field(state, 0), field(state, 1));
        let unfinished = match version {
            0 => None,
            VERSION if count == size => log.recover(state, used, available),
            VERSION if is_empty(queue, HEADER, count, |entry: &SplitEntry| &entry.inflight) => None,
            _ => return Err(InflightError::Foreign { version, entries: count, size }),
        };
        if unfinished.is_none() {
            log.begin(used);
        }
        Ok((log, unfinished))
    }

    fn size(&self) -> u16 {
        self.mask + 1
    }

    /// The entry of a head, which is below the ring's size: the mask only spares the check.
    #[inline(always)]
    fn entry(&self, head: u16) -> &SplitEntry {
        // SAFETY: `mask` is one less than there are entries.
        unsafe { self.entries.get_unchecked(usize::from(head & self.mask)) }
    }

    /// A log in which nothing is in flight.
    fn begin(&mut self, used: u16) {
        for entry in self.entries.iter() {
            entry.inflight.set(0);
        }
        (self.counter, self.last) = (0, 0);
        self.save(used);
    }

    /// The steps "When reconnecting". `None`: the log is not of this ring, which has begun anew since.
    fn recover(&mut self, state: u64, used: u16, available: u16) -> Option<Vec<u16>> {
        let batch = used.wrapping_sub(field(state, 3));
        if batch > self.size() {
            return None;
        }
        self.last = field(state, 2);
        let mut head = self.last;
        for _ in 0..batch {
            let entry = self.entries.get(usize::from(head))?;
            entry.inflight.set(0);
            head = entry.next.get();
        }
        self.save(used);
        let taken = (0..).zip(self.entries.iter()).filter(|(_, entry)| entry.inflight.get() == IN_FLIGHT);
        let found: Vec<_> = taken.map(|(head, entry)| (entry.counter.get(), head)).collect();
        if found.len() > usize::from(available.wrapping_sub(used)) {
            return None;
        }
        let (unfinished, counter) = by_age(found);
        self.counter = counter;
        Some(unfinished)
    }

    /// Stores last_batch_head and used_idx.
    #[inline(always)]
    fn save(&self, used: u16) {
        self.header[STATE].set_after(word([VERSION, self.size(), self.last, used]));
    }

    /// "When receiving available buffers": a chain was taken.
    #[inline(always)]
    pub(crate) fn take(&mut self, head: u16) {
        let counter = self.counter;
        self.counter = counter.wrapping_add(1);
        let entry = self.entry(head);
        entry.counter.set(counter);
        entry.inflight.set_after(IN_FLIGHT);
    }

    /// A chain that was taken last is put back.
    pub(crate) fn untake(&mut self, head: u16) {
        self.entry(head).inflight.set(0);
    }

    /// "When supplying used buffers", steps 1 to 3.
    #[inline(always)]
    pub(crate) fn give_back(&mut self, head: u16) {
        self.entry(head).next.set(self.last);
        self.last = head;
    }

    /// The batch is complete: `published` is what the used index still says. The store of the new index has to stay behind.
    #[inline(always)]
    pub(crate) fn publishing(&self, published: u16) {
        // last_batch_head; once is enough, for nobody looks at it while the used index is the old one.
        self.save(published);
        fault_point!(Show);
    }

    /// The used index went from `old` to `new`, and a fence is between that and this: what was given back is in flight no
    /// more.
    #[inline(always)]
    pub(crate) fn published(&self, old: u16, new: u16) {
        let mut head = self.last;
        for _ in 0..new.wrapping_sub(old) {
            let entry = self.entry(head);
            entry.inflight.set(0);
            head = entry.next.get();
        }
        self.save(new);
    }
}
