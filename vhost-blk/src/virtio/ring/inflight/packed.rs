//! The log of a packed ring.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use vfio::DmaElement;

use super::super::Head;
use super::{Field, Header, IN_FLIGHT, InflightError, InflightQueue, VERSION, by_age, field, is_empty, word};
use crate::fault_point::fault_point;
use crate::virtio::memory::GuestSlice;

/// Words before the entries (QueueRegionPacked): features; version, desc_num, free_head, old_free_head; used_idx,
/// old_used_idx, 8 bits each of used_wrap_counter and old_used_wrap_counter; padding.
const HEADER: usize = 4;
const STATE: usize = 1;
const USED: usize = 2;

/// A descriptor in the ring: its address, then length, id and flags.
type Words = [AtomicU64; 2];

/// DescStatePacked.
#[repr(C)]
struct PackedEntry {
    inflight: AtomicU8,
    _padding: AtomicU8,
    next: AtomicU16,
    last: AtomicU16,
    num: AtomicU16,
    counter: AtomicU64,
    /// id, flags and len: the second word of the descriptor in the ring, its halves exchanged.
    rest: AtomicU64,
    address: AtomicU64,
}

// SAFETY: nothing but atomics, without a gap between them; any bytes are valid.
unsafe impl DmaElement for PackedEntry {}

impl PackedEntry {
    /// In the ring: length, id, flags. In the log: id, flags, length.
    #[inline(always)]
    fn copy(&self, [address, rest]: &Words) {
        // They were read before; a driver that has changed them since harms itself only.
        self.rest.set(rest.get().rotate_left(32));
        self.address.set(address.get());
    }
}

/// Bytes of the region of a ring of this size.
pub(super) fn bytes(size: u16) -> usize {
    8 * HEADER + size_of::<PackedEntry>() * usize::from(size)
}

/// Index and wrap counter of the next used descriptor.
type Used = (u16, bool);

/// What a packed log says of its ring.
pub(in super::super) struct PackedState {
    /// Where the ring goes on.
    pub used: Used,
    /// Descriptors of the ring taken and not given back.
    pub taken: u16,
    /// The chains to be done again, but for their ids, the oldest last.
    pub unfinished: Vec<Head>,
}

/// The log of a packed ring.
///
/// What is free is kept in our own memory, too, as a stack of runs: entries that follow each other in memory and in the list
/// of free entries, whose front is the top of the stack. A run is a [`Head`] of one of two kinds:
/// - one that a chain has had: its first entry says `last` and `num` already, and the next chain of that length has to set
///   `inflight` only; `id` is 0;
/// - any other: `entries` is 0, and `id` is how many there are.
pub(in super::super) struct PackedLog {
    entries: GuestSlice<PackedEntry>,
    header: Header,
    /// The stack: the run at the bottom is an empty one that says how the list in the log ends.
    free: Box<[Head]>,
    /// Index of the run at the top of the stack.
    top: usize,
    /// The chains given back and not published yet: the first `given` ones.
    batch: Box<[Head]>,
    given: usize,
    /// `top` before the batch was put onto the stack.
    before: usize,
    counter: u64,
    size: u16,
}

impl PackedLog {
    /// No entry. Of a chain whose entries are not a run, it is the last one.
    pub(crate) const NONE: u16 = u16::MAX;

    /// Takes up the log of a ring; `used` is where a ring without a log goes on, `new` says that the ring was never used,
    /// and `is_available` whether the descriptor at a place is still as the driver made it available. The state is that of
    /// an earlier process which has used this ring.
    pub(crate) fn open(
        queue: &InflightQueue,
        size: u16,
        used: Used,
        new: bool,
        is_available: impl Fn(Used) -> bool,
    ) -> Result<(PackedLog, Option<PackedState>), InflightError> {
        let (header, entries) = queue.parts(HEADER, size)?;
        let stack = |length: usize| vec![Head::default(); length].into_boxed_slice();
        let (free, batch) = (stack(usize::from(size) + 1), stack(size.into()));
        let mut log = PackedLog { entries, header, free, top: 0, batch, given: 0, before: 0, counter: 0, size };
        let state = log.header[STATE].get();
        let (version, count) = (field(state, 0), field(state, 1));
        let state = match version {
            0 => None,
            _ if new => None,
            VERSION if count == size => log.recover(state, is_available),
            VERSION if is_empty(queue, HEADER, count, |entry: &PackedEntry| &entry.inflight) => None,
            _ => return Err(InflightError::Foreign { version, entries: count, size }),
        };
        if state.is_none() {
            log.begin(used);
        }
        Ok((log, state))
    }

    /// A log in which nothing is in flight.
    fn begin(&mut self, used: Used) {
        for (next, entry) in (1..).zip(self.entries.iter()) {
            entry.inflight.set(0);
            entry.next.set(next);
        }
        self.counter = 0;
        self.free[0] = Self::end(self.size);
        self.top = 0;
        put(&mut self.free, &mut self.top, Self::run(0, self.size));
        self.save_used(used, used);
        self.save_free(0);
    }

    /// The steps "When reconnecting"; `None`: nothing that a ring could go on from.
    fn recover(&mut self, state: u64, is_available: impl Fn(Used) -> bool) -> Option<PackedState> {
        let words = self.header[USED].get();
        let (new, old) = ((field(words, 0), words >> 32 & 1 == 1), (field(words, 1), words >> 40 & 1 == 1));
        // The guest sees a batch from the moment its first descriptor is used; it may be available anew since, in the next
        // round, which looks different again.
        let committed = new != old && old.0 < self.size && !is_available(old);
        let (used, free) = if committed { (new, field(state, 2)) } else { (old, field(state, 3)) };
        if used.0 >= self.size {
            return None;
        }
        let mut is_free = vec![false; self.size.into()];
        let mut list = Vec::new();
        let mut next = free;
        while let Some(seen) = is_free.get_mut(usize::from(next)) {
            if std::mem::replace(seen, true) {
                return None;
            }
            let entry = &self.entries[usize::from(next)];
            entry.inflight.set(0);
            list.push(next);
            next = entry.next.get();
        }
        self.free[0] = Self::end(next);
        self.top = 0;
        put_list(&mut self.free, &mut self.top, list.into_iter());
        self.save_used(used, used);
        self.save_free(free);
        let taken = (0..).zip(self.entries.iter()).filter(|(_, entry)| entry.inflight.get() == IN_FLIGHT);
        // How long each chain is counts from here on as it was read here, whatever becomes of the log.
        let chain = |(first, entry): (u16, &PackedEntry)| {
            (entry.counter.get(), Head::logged(0, entry.num.get(), first, Self::NONE))
        };
        let found: Vec<_> = taken.map(chain).collect();
        if found.iter().any(|(_, head)| head.entries() == 0) {
            return None;
        }
        let descriptors: u32 = found.iter().map(|(_, head)| u32::from(head.entries())).sum();
        let taken = u16::try_from(descriptors).ok().filter(|taken| *taken <= self.size)?;
        let (unfinished, counter) = by_age(found);
        self.counter = counter;
        Some(PackedState { used, taken, unfinished })
    }

    /// Stores used_idx and used_wrap_counter, and their old values.
    #[inline(always)]
    fn save_used(&self, new: Used, old: Used) {
        let wraps = u16::from(new.1) | u16::from(old.1) << 8;
        self.header[USED].set_after(word([new.0, old.0, wraps, 0]));
    }

    /// Stores free_head, and its old value.
    #[inline(always)]
    fn save_free(&self, old: u16) {
        self.header[STATE].set_after(word([VERSION, self.size, self.front(), old]));
    }

    /// Everything taken so far is in the log from here on.
    #[inline(always)]
    pub(crate) fn commit(&mut self) {
        self.save_free(self.front());
    }

    /// The first of the free entries.
    #[inline(always)]
    fn front(&self) -> u16 {
        self.free[self.top].log()
    }

    /// The bottom of the stack, for a list of free entries that ends with a link to `end`, which is no entry.
    fn end(end: u16) -> Head {
        Head::logged(0, 0, end, Self::NONE)
    }

    /// A run of the second kind.
    fn run(first: u16, count: u16) -> Head {
        Head::logged(count, 0, first, first + (count - 1))
    }

    /// How many entries a run has.
    fn length(run: Head) -> u16 {
        if run.entries() == 0 { run.id() } else { run.entries() }
    }

    /// "When receiving available buffers": the chain with this head, of the descriptors in this part of the ring, was taken.
    /// Gives the head back, its place in the log in it. It counts after [`PackedLog::commit`].
    #[inline(always)]
    pub(crate) fn take<const N: usize>(&mut self, head: Head, descriptors: &[Words; N]) -> Head {
        // SAFETY: `top` is the index of a run, always.
        let run = unsafe { *self.free.get_unchecked(self.top) };
        // One comparison: of such a run the id is 0.
        if run.0 as u32 != (N as u32) << 16 {
            return self.take_any(head, descriptors, &[]);
        }
        self.top -= 1;
        let first = usize::from(run.log());
        // SAFETY: a run on the stack is within the entries; `put` is given no other.
        let entries = unsafe { self.entries.get_unchecked(first..first + N) };
        for (entry, words) in entries.iter().zip(descriptors) {
            entry.copy(words);
        }
        let counter = self.counter;
        self.counter = counter.wrapping_add(1);
        entries[0].counter.set(counter);
        entries[0].inflight.set_after(IN_FLIGHT);
        run.with_id(head.id())
    }

    /// Takes whatever entries are free for a chain whose descriptors are in both parts of the ring, at its end and at its beginning.
    #[cold]
    #[inline(never)]
    pub(crate) fn take_any(&mut self, head: Head, descriptors: &[Words], more: &[Words]) -> Head {
        let count = descriptors.len() + more.len();
        // The driver may have more in flight than its ring holds: that is not in the log.
        let mut free = 0;
        if !self.free[1..=self.top].iter().rev().any(|run| {
            free += usize::from(Self::length(*run));
            free >= count
        }) {
            return Head::logged(head.id(), head.entries(), Self::NONE, Self::NONE);
        }
        let first = self.front();
        let (mut last, mut is_run) = (first, true);
        for (number, words) in descriptors.iter().chain(more).enumerate() {
            let entry = self.take_entry();
            is_run &= number == 0 || entry == last + 1;
            self.entries[usize::from(entry)].copy(words);
            last = entry;
        }
        let entry = &self.entries[usize::from(first)];
        entry.last.set(last);
        entry.num.set(head.entries());
        entry.counter.set(self.counter);
        self.counter = self.counter.wrapping_add(1);
        entry.inflight.set_after(IN_FLIGHT);
        Head::logged(head.id(), head.entries(), first, if is_run { last } else { Self::NONE })
    }

    /// Takes the first free entry; there has to be one.
    fn take_entry(&mut self) -> u16 {
        let run = self.free[self.top];
        match Self::length(run) {
            0 | 1 => self.top -= 1,
            count => self.free[self.top] = Self::run(run.log() + 1, count - 1),
        }
        run.log()
    }

    /// A chain that was taken last is put back.
    pub(crate) fn untake(&mut self, head: Head) {
        if self.link(head) {
            self.commit();
            // In either order: what is in the list of free entries is not in flight.
            self.clear(self.free[self.top]);
        }
    }

    /// Puts the entries of a chain before the free ones; false if it has none.
    fn link(&mut self, head: Head) -> bool {
        let before = self.front();
        let last = match self.entries.get(usize::from(head.last())) {
            Some(_) => {
                put(&mut self.free, &mut self.top, head.without_id());
                Some(head.last())
            }
            None => {
                // Each link is read once, and checked.
                let mut next = head.log();
                let list = (0..head.entries()).map_while(|_| {
                    let link = self.entries.get(usize::from(next))?.next.get();
                    Some(std::mem::replace(&mut next, link))
                });
                put_list(&mut self.free, &mut self.top, list)
            }
        };
        let last = last.and_then(|last| self.entries.get(usize::from(last)));
        last.inspect(|last| last.next.set(before)).is_some()
    }

    /// A chain whose entries are on the stack is in flight no more. Of several runs, the first one's entry is the chain's.
    #[inline(always)]
    fn clear(&self, run: Head) {
        // SAFETY: as in `take`.
        let entry = unsafe { self.entries.get_unchecked(usize::from(run.log())) };
        entry.inflight.set(0);
    }

    /// The descriptors of a chain in the log, as they were in the ring: as many as its head says, at most.
    pub(crate) fn chain(&self, head: Head) -> impl Iterator<Item = [u64; 2]> + '_ {
        let mut next = head.log();
        (0..head.entries()).map_while(move |_| {
            let entry = self.entries.get(usize::from(next))?;
            next = entry.next.get();
            Some([entry.address.get(), entry.rest.get().rotate_right(32)])
        })
    }

    /// "When supplying used buffers", steps 1 and 2. The others wait for [`PackedLog::publishing`]: what is taken meanwhile
    /// must not get these entries.
    #[inline(always)]
    pub(crate) fn give_back(&mut self, head: Head) {
        // A ring gives back no more chains at once than it has descriptors.
        if let Some(place) = self.batch.get_mut(self.given) {
            *place = head;
            self.given += 1;
        }
    }

    /// Steps 3 to 6: the batch ends at `new`, the guest still sees it at `old`. The store that shows it has to stay behind.
    #[inline(always)]
    pub(crate) fn publishing(&mut self, new: Used, old: Used) {
        let before = self.front();
        self.before = self.top;
        let mut front = before;
        let mut linked = 0;
        for (head, place) in self.batch[..self.given].iter().zip(&mut self.free[self.top + 1..]) {
            let Some(last) = self.entries.get(usize::from(head.last())) else { break };
            last.next.set(front);
            front = head.log();
            *place = head.without_id();
            linked += 1;
        }
        self.top += linked;
        // What is not a run takes longer.
        for number in linked..self.given {
            self.link(self.batch[number]);
        }
        self.save_free(before);
        self.save_used(new, old);
        fault_point!(Show);
    }

    /// The guest sees the batch, which ends at `new`, and a fence is between that and this.
    #[inline(always)]
    pub(crate) fn published(&mut self, new: Used) {
        for &run in &self.free[self.before + 1..=self.top] {
            self.clear(run);
        }
        self.given = 0;
        self.save_free(self.front());
        // Until here the old position says that the batch is to be committed.
        self.save_used(new, new);
    }
}

/// Puts a run, which has to be within the entries, onto the stack.
fn put(free: &mut [Head], top: &mut usize, run: Head) {
    // There are no more runs than entries, unless the front-end has written to the log: then some are not used again.
    if let Some(place) = free.get_mut(*top + 1) {
        *place = run;
        *top += 1;
    }
}

/// Puts the entries of a list, all of which exist, before the free ones. Gives the last one; `None`: there is none.
fn put_list(free: &mut [Head], top: &mut usize, list: impl Iterator<Item = u16>) -> Option<u16> {
    let bottom = *top + 1;
    let mut last = None;
    for next in list {
        match &mut free[*top] {
            run if *top >= bottom && run.last() + 1 == next => *run = PackedLog::run(run.log(), run.id() + 1),
            _ => put(free, top, PackedLog::run(next, 1)),
        }
        last = Some(next);
    }
    // The list begins at the top.
    free[bottom..=*top].reverse();
    last
}
