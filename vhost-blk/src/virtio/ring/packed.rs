//! The packed virtqueue (virtio 1.2, section 2.8).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::inflight::{PackedLog, PackedState};
use super::{
    Chain, DESCRIPTOR_BYTES, Descriptor, Head, INDIRECT, InflightError, InflightQueue, MAX_CHAIN, MAX_QUEUE_SIZE, NEXT,
    Part, RingError, RingSetup, SIMPLE_TABLE, SimpleChain, SimpleChainRing, WRITE, endless, event_passed,
    indirect_entries, longest,
};
use crate::virtio::memory::{GuestMemory, GuestSlice, GuestView};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Both in a descriptor's second word.
const AVAIL_USED: u64 = ((AVAIL | USED) as u64) << 48;
const ENABLE: u16 = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
const DISABLE: u16 = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const AT_DESCRIPTOR: u16 = VRING_PACKED_EVENT_FLAG_DESC as u16;
/// The flags that say what a descriptor is, in its second word.
const CHAIN_BITS: u64 = ((NEXT | WRITE | INDIRECT) as u64) << 48;
const WRITE_BIT: u64 = (WRITE as u64) << 48;

/// Has a descriptor just this length and, of the flags that say what it is, these? One comparison for both.
#[inline(always)]
fn is(words: [u64; 2], bytes: u32, flags: u16) -> bool {
    words[1] & (CHAIN_BITS | u64::from(u32::MAX)) == u64::from(bytes) | u64::from(flags) << 48
}

/// Both words of a descriptor.
#[inline(always)]
fn words(descriptor: &[AtomicU64; 2]) -> [u64; 2] {
    [u64::from_le(descriptor[0].load(Ordering::Relaxed)), u64::from_le(descriptor[1].load(Ordering::Relaxed))]
}

/// The event flags are two bits, the rest is reserved (2.8.14).
const EVENT_FLAGS: u16 = 3;

/// A place in the ring: index of a descriptor and the wrap counter that goes with it (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RingPosition {
    index: u16,
    wrap: bool,
}

impl RingPosition {
    /// From 15 bits of index and one of wrap counter.
    fn from_bits(bits: u16) -> Self {
        RingPosition { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `by` descriptors on, at most `size`.
    #[inline(always)]
    fn advanced(self, by: u16, size: u16) -> Self {
        // At most 32767 + 32768: no overflow.
        let index = self.index + by;
        match index.checked_sub(size) {
            Some(index) => RingPosition { index, wrap: !self.wrap },
            None => RingPosition { index, ..self },
        }
    }

    /// Descriptors from `earlier` to here, at most `size`.
    fn since(self, earlier: RingPosition, size: u16) -> u16 {
        let round = if self.wrap == earlier.wrap { 0 } else { size };
        (self.index + round).wrapping_sub(earlier.index)
    }

    /// AVAIL and USED, in their place in a descriptor's second word, of a descriptor here that the driver has made available:
    /// AVAIL is the wrap counter and USED is not (2.8.1).
    fn available(self) -> u64 {
        u64::from(if self.wrap { AVAIL } else { USED }) << 48
    }

    /// AVAIL and USED, in their place in a descriptor's second word, of a used descriptor here: both are the wrap counter (2.8.1).
    fn used(self) -> u64 {
        if self.wrap { u64::from(AVAIL | USED) << 48 } else { 0 }
    }
}

/// A packed virtqueue, device side.
pub struct PackedRing {
    /// Two words per descriptor: address, then length, id and flags.
    descriptors: GuestSlice<[AtomicU64; 2]>,
    /// The driver's event suppression area: off_wrap, flags (2.8.14). We read it.
    driver_event: GuestSlice<AtomicU16>,
    /// Ours. The driver reads it.
    device_event: GuestSlice<AtomicU16>,
    size: u16,
    indirect: bool,
    event_idx: bool,
    next_avail: RingPosition,
    /// `next_avail.available()`.
    available: u64,
    next_used: RingPosition,
    /// `next_used.used()`.
    used: u64,
    /// `used` with WRITE.
    used_written: u64,
    /// Where `next_used` was at the last publication.
    published: RingPosition,
    /// The second word of the used descriptor at `published`, which is written last of its batch.
    unpublished: Option<u64>,
    log: Option<PackedLog>,
    /// An earlier process has used this ring: see [`super::Ring::resumed`].
    resumed: bool,
    /// What it has left unfinished: chains in the log, but for their ids, the oldest last.
    unfinished: Vec<Head>,
    /// The ring was as new when it was set up.
    new: bool,
}

impl SimpleChainRing for PackedRing {
    #[inline(always)]
    fn peek_simple_chain<const FIRST: u32, const LAST: u32>(&mut self, view: &mut GuestView) -> Option<SimpleChain> {
        let entry = self.descriptors.get(usize::from(self.next_avail.index))?;
        let word = self.available_word(entry)?;
        self.simple_chain::<FIRST, LAST>(entry, word, view)
    }

    #[inline(always)]
    fn is_empty(&mut self) -> bool {
        self.look().is_none()
    }

    #[inline(always)]
    fn accept(&mut self, head: Head) -> Head {
        let head = self.note_simple_chain(head);
        // No overflow, see `advanced`. Once a round the rest is needed.
        self.next_avail.index += head.entries();
        if self.next_avail.index >= self.size {
            self.wrap_avail();
        }
        head
    }

    #[inline(always)]
    fn commit(&mut self) {
        if let Some(log) = &mut self.log {
            log.commit();
        }
    }
}

impl PackedRing {
    /// Resolves and checks the ring's addresses, as [`super::Ring::new`] does for both formats.
    pub fn new(memory: &Arc<GuestMemory>, setup: &RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(RingError::Size { packed: true, size });
        }
        let next_avail = RingPosition::from_bits(setup.base as u16);
        let next_used = RingPosition::from_bits((setup.base >> 16) as u16);
        if next_avail.index >= size || next_used.index >= size {
            return Err(RingError::Base { base: setup.base, size });
        }
        let wrong = |part, address| RingError::Address { part, address };
        // Alignments: 16 bytes for the ring, 4 for the event areas (2.8.10).
        let part = |part, address: u64, alignment| {
            if address.is_multiple_of(alignment) { Ok(()) } else { Err(wrong(part, address)) }
        };
        part(Part::Descriptors, setup.descriptors, 16)?;
        part(Part::Driver, setup.driver, 4)?;
        part(Part::Device, setup.device, 4)?;
        let descriptors: GuestSlice<[AtomicU64; 2]> = GuestSlice::new(memory, setup.descriptors, size.into())
            .ok_or(wrong(Part::Descriptors, setup.descriptors))?;
        // Relaxed: a front-end is done with a new ring's memory before it sends the messages that start the ring.
        let new = descriptors.iter().flatten().all(|word: &AtomicU64| word.load(Ordering::Relaxed) == 0);
        // Some front-ends send base 0 for a new ring and mean what a new ring begins with: both wrap counters 1 (2.8.1). A
        // ring that really stopped at index 0 with both counters 0 has been used: its first descriptor was, and says so, or is
        // available in the next round. One that is available in the first round was never used, however long it has waited.
        let first = descriptors.first().map_or(0, |first| words(first)[1] & AVAIL_USED);
        let begins = RingPosition { index: 0, wrap: true };
        let (next_avail, next_used) = match setup.base == 0 && (new || first == begins.available()) {
            true => (begins, begins),
            false => (next_avail, next_used),
        };
        Ok(PackedRing {
            descriptors,
            driver_event: GuestSlice::new(memory, setup.driver, 2).ok_or(wrong(Part::Driver, setup.driver))?,
            device_event: GuestSlice::new(memory, setup.device, 2).ok_or(wrong(Part::Device, setup.device))?,
            size,
            indirect: setup.indirect,
            event_idx: setup.event_idx,
            next_avail,
            available: next_avail.available(),
            next_used,
            used: next_used.used(),
            used_written: next_used.used() | WRITE_BIT,
            published: next_used,
            unpublished: None,
            log: None,
            resumed: false,
            unfinished: Vec::new(),
            new,
        })
    }

    pub(super) fn set_log(&mut self, queue: &InflightQueue) -> Result<(), InflightError> {
        let here = (self.next_used.index, self.next_used.wrap);
        let is_available = |(index, wrap): (u16, bool)| {
            let flags = RingPosition { index, wrap }.available();
            (self.word(index, 1) ^ flags) & AVAIL_USED == 0
        };
        let (log, state) = PackedLog::open(queue, self.size, here, self.new, is_available)?;
        self.log = Some(log);
        if let Some(PackedState { used: (index, wrap), taken, unfinished }) = state {
            (self.resumed, self.unfinished) = (true, unfinished);
            let mut at = RingPosition { index, wrap };
            (self.next_used, self.published) = (at, at);
            (self.used, self.used_written) = (at.used(), at.used() | WRITE_BIT);
            // A process that died in the middle of a publication may have written all but the first of its used descriptors.
            // The driver would take them for ours as soon as it sees the first.
            for _ in 0..taken {
                let entry = &self.descriptors[usize::from(at.index)][1];
                let word = u64::from_le(entry.load(Ordering::Relaxed));
                if (word ^ at.used()) & AVAIL_USED == 0 {
                    entry.store((word & !AVAIL_USED | at.available()).to_le(), Ordering::Relaxed);
                }
                at = at.advanced(1, self.size);
            }
            self.go_to(at);
        }
        Ok(())
    }

    pub(super) fn takes_indirect(&self) -> bool {
        self.indirect
    }

    pub(super) fn resumed(&self) -> bool {
        self.resumed
    }

    pub(super) fn pop_unfinished(
        &mut self,
        view: &mut GuestView,
        chain: &mut Chain,
    ) -> Result<Option<Head>, RingError> {
        let Some(mut head) = self.unfinished.pop() else { return Ok(None) };
        chain.clear();
        let Some(log) = &self.log else { return Ok(None) };
        let first = head.log();
        if usize::from(head.entries()) > MAX_CHAIN {
            return Err(RingError::TooLong { head: first });
        }
        for descriptor in log.chain(head).map(Descriptor::packed) {
            head = head.without_id().with_id(descriptor.link);
            // As in `pop`: a table ends the chain.
            if descriptor.flags & INDIRECT != 0 {
                self.indirect(descriptor, first, view, chain)?;
                break;
            }
            chain.push(descriptor, first)?;
        }
        Ok(Some(head))
    }

    /// Notes that the chain which begins with the next descriptor is taken; gives its head as it is to be kept.
    #[inline(always)]
    fn note(&mut self, head: Head) -> Head {
        if head.entries() == 1 {
            return self.note_simple_chain(head);
        }
        let Some(log) = &mut self.log else { return head };
        let (at, entries) = (usize::from(self.next_avail.index), usize::from(head.entries()));
        let before_end = (self.descriptors.len() - at).min(entries);
        log.take_any(head, &self.descriptors[at..at + before_end], &self.descriptors[..entries - before_end])
    }

    /// Notes a [`SimpleChain`] in the log, if there is one; gives the head to be kept.
    #[inline(always)]
    fn note_simple_chain(&mut self, head: Head) -> Head {
        let Some(log) = &mut self.log else { return head };
        let at = usize::from(self.next_avail.index);
        // It has 1 descriptor or 3, see `simple_chain`: one bit tells.
        let noted = match head.entries() & 2 {
            0 => self.descriptors.get(at).map(|descriptor| log.take(head, std::array::from_ref(descriptor))),
            _ => self.descriptors.get(at..at + 3).and_then(<[_]>::first_chunk::<3>).map(|three| log.take(head, three)),
        };
        noted.unwrap_or(head)
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The second word of the next descriptor, if the driver has made it available.
    #[inline(always)]
    fn look(&self) -> Option<u64> {
        self.available_word(&self.descriptors[usize::from(self.next_avail.index)])
    }

    #[inline(always)]
    fn available_word(&self, entry: &[AtomicU64; 2]) -> Option<u64> {
        // Acquire: pairs with the driver's write barrier before it sets the first flags of a chain (2.8.21); this one load
        // of 64 bits takes length, id and flags at once.
        let word = u64::from_le(entry[1].load(Ordering::Acquire));
        ((word ^ self.available) & AVAIL_USED == 0).then_some(word)
    }

    #[inline(always)]
    fn word(&self, index: u16, word: usize) -> u64 {
        // Relaxed: ordered by the Acquire in `look`, which the whole chain precedes.
        u64::from_le(self.descriptors[usize::from(index)][word].load(Ordering::Relaxed))
    }

    /// The chain that begins with this available descriptor, whose second word is `word`, if it is a simple one.
    #[inline(always)]
    fn simple_chain<const FIRST: u32, const LAST: u32>(
        &self,
        entry: &[AtomicU64; 2],
        word: u64,
        view: &mut GuestView,
    ) -> Option<SimpleChain> {
        // Relaxed, here and in `words`: ordered by the Acquire in `available_word`, which the whole chain precedes.
        let first = [u64::from_le(entry[0].load(Ordering::Relaxed)), word];
        if is(first, FIRST, NEXT) {
            // A chain across the end of the ring takes the slow path.
            let at = usize::from(self.next_avail.index);
            let [_, middle, last] = self.descriptors.get(at..at + 3)?.first_chunk::<3>()?;
            let [middle, last] = [middle, last].map(words);
            if (middle[1] >> 48) as u16 & (NEXT | INDIRECT) != NEXT || !is(last, LAST, WRITE) {
                return None;
            }
            return Some(SimpleChain::new(
                Head::new((last[1] >> 32) as u16, 3),
                [first, middle, last].map(Descriptor::packed),
            ));
        }
        if is(first, SIMPLE_TABLE, INDIRECT) && self.indirect {
            let words: [u64; 6] = view.read_words(first[0]).ok()?;
            let all = [0, 2, 4].map(|at| [words[at], words[at + 1]]);
            // NEXT means nothing in a table; a driver that sets it anyway takes the slow path.
            if !is(all[0], FIRST, 0) || all[1][1] & (CHAIN_BITS & !WRITE_BIT) != 0 || !is(all[2], LAST, WRITE) {
                return None;
            }
            let head = Head::new((word >> 32) as u16, 1);
            return Some(SimpleChain::new(head, all.map(Descriptor::packed)));
        }
        None
    }

    #[cold]
    #[inline(never)]
    fn wrap_avail(&mut self) {
        self.go_to(RingPosition { index: self.next_avail.index - self.size, wrap: !self.next_avail.wrap });
    }

    /// The next available descriptor is expected there.
    fn go_to(&mut self, position: RingPosition) {
        self.next_avail = position;
        self.available = position.available();
    }

    #[cold]
    #[inline(never)]
    fn wrap_used(&mut self) {
        self.next_used = RingPosition { index: self.next_used.index - self.size, wrap: !self.next_used.wrap };
        (self.used, self.used_written) = (self.next_used.used(), self.next_used.used() | WRITE_BIT);
    }

    /// Takes the next available chain into `chain`, as [`super::Ring::pop`] does for both formats.
    #[inline]
    pub(super) fn pop(&mut self, view: &mut GuestView, chain: &mut Chain) -> Result<Option<Head>, RingError> {
        let Some(word) = self.look() else { return Ok(None) };
        let first = self.next_avail.index;
        chain.clear();
        let mut at = self.next_avail;
        let mut descriptor = Descriptor::packed([self.word(first, 0), word]);
        let mut entries = 1;
        let most = longest(self.size);
        loop {
            at = at.advanced(1, self.size);
            if descriptor.flags & INDIRECT != 0 {
                self.indirect(descriptor, first, view, chain)?;
                break;
            }
            chain.push(descriptor, first)?;
            if descriptor.flags & NEXT == 0 {
                break;
            }
            if entries == most {
                return Err(endless(self.size, first));
            }
            entries += 1;
            descriptor = Descriptor::packed([self.word(at.index, 0), self.word(at.index, 1)]);
        }
        // The id is that of the chain's last descriptor (2.8.6).
        let head = self.note(Head::new(descriptor.link, entries));
        self.commit();
        self.go_to(at);
        Ok(Some(head))
    }

    /// An indirect table (2.8.7): its descriptors are the chain, in order; of their flags only WRITE has a meaning.
    #[inline(always)]
    fn indirect(&self, table: Descriptor, head: u16, view: &mut GuestView, chain: &mut Chain) -> Result<(), RingError> {
        if !self.indirect || table.flags & NEXT != 0 {
            return Err(RingError::Indirect { head });
        }
        let entries = indirect_entries(table, head)?;
        if entries as usize > MAX_CHAIN {
            return Err(RingError::TooLong { head });
        }
        for index in 0..entries {
            let words = view
                .read_words(table.address + DESCRIPTOR_BYTES * u64::from(index))
                .map_err(|_| RingError::IndirectTable { head, address: table.address, bytes: table.bytes })?;
            let descriptor = Descriptor::packed(words);
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingError::Indirect { head });
            }
            chain.push(descriptor, head)?;
        }
        Ok(())
    }

    pub(super) fn unpop(&mut self, head: Head) {
        if let Some(log) = &mut self.log {
            log.untake(head);
        }
        let RingPosition { index, wrap } = self.next_avail;
        self.go_to(match index.checked_sub(head.entries()) {
            Some(index) => RingPosition { index, wrap },
            None => RingPosition { index: index + (self.size - head.entries()), wrap: !wrap },
        });
    }

    #[inline(always)]
    pub(super) fn push_used(&mut self, head: Head, written: u32) {
        // WRITE says that the length counts (2.8.8).
        let flags = if written == 0 { self.used } else { self.used_written };
        let word = u64::from(written) | u64::from(head.id()) << 32 | flags;
        match self.unpublished {
            None => self.unpublished = Some(word),
            // Relaxed: the driver looks here only after it has seen the first one of the batch, see `publish`.
            Some(_) => self.descriptors[usize::from(self.next_used.index)][1].store(word.to_le(), Ordering::Relaxed),
        }
        if let Some(log) = &mut self.log {
            log.give_back(head);
        }
        // No overflow, see `advanced`.
        self.next_used.index += head.entries();
        if self.next_used.index >= self.size {
            self.wrap_used();
        }
    }

    #[inline(always)]
    pub(super) fn unpublished(&self) -> bool {
        self.unpublished.is_some()
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some(word) = self.unpublished.take() else { return false };
        let first = std::mem::replace(&mut self.published, self.next_used);
        if let Some(log) = &mut self.log {
            log.publishing((self.next_used.index, self.next_used.wrap), (first.index, first.wrap));
        }
        // Release: pairs with the driver's read barrier after it sees the flags (2.8.22). The driver takes used descriptors
        // in ring order, so the first one, written last, hides the others of the batch until now.
        self.descriptors[usize::from(first.index)][1].store(word.to_le(), Ordering::Release);
        // SeqCst fence: the used descriptors are written before the driver's event area is read; pairs with the driver's
        // barrier between writing that area and looking at the ring once more (2.8.10, 2.8.14).
        fence(Ordering::SeqCst);
        if let Some(log) = &mut self.log {
            log.published((self.next_used.index, self.next_used.wrap));
        }
        let flags = u16::from_le(self.driver_event[1].load(Ordering::Relaxed)) & EVENT_FLAGS;
        match flags {
            DISABLE => false,
            AT_DESCRIPTOR if self.event_idx => {
                let event = RingPosition::from_bits(u16::from_le(self.driver_event[0].load(Ordering::Relaxed)));
                // An event in the round before this one is that much behind.
                let behind = if event.wrap == self.next_used.wrap { 0 } else { self.size };
                let new = self.next_used.index;
                let entries = self.next_used.since(first, self.size);
                event_passed(event.index.wrapping_sub(behind), new, new.wrapping_sub(entries))
            }
            // ENABLE, and what only a broken driver writes.
            _ => true,
        }
    }

    pub(super) fn enable_notifications(&mut self) -> bool {
        self.device_event[1].store(ENABLE.to_le(), Ordering::Relaxed);
        // SeqCst fence: the flags are visible before the ring is read; pairs with the driver's barrier between making a
        // chain available and reading our event area (2.8.21.3).
        fence(Ordering::SeqCst);
        self.look().is_some()
    }

    pub(super) fn disable_notifications(&mut self) {
        self.device_event[1].store(DISABLE.to_le(), Ordering::Relaxed);
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }
}
