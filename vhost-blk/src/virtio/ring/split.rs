//! The split virtqueue (virtio 1.2, section 2.7).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::inflight::SplitLog;
use super::{
    Chain, DESCRIPTOR_BYTES, Descriptor, Head, INDIRECT, InflightError, InflightQueue, MAX_CHAIN, MAX_QUEUE_SIZE, NEXT,
    Part, RingError, RingSetup, SIMPLE_TABLE, SimpleChain, SimpleChainRing, WRITE, endless, event_passed,
    indirect_entries, longest,
};
use crate::virtio::memory::{GuestMemory, GuestSlice, GuestView};

/// Index of `idx` in the available and used ring seen as 16-bit words; `flags` is before it (2.7.6, 2.7.8).
const IDX: usize = 1;
/// Index of the first ring entry in the available ring seen as 16-bit words.
const AVAIL_RING: usize = 2;

/// A split virtqueue, device side.
pub struct SplitRing {
    /// Two words per descriptor.
    descriptors: GuestSlice<[AtomicU64; 2]>,
    /// flags, idx, ring[size], used_event (with EVENT_IDX).
    avail: GuestSlice<AtomicU16>,
    /// Pairs of id and length (2.7.8); 4 bytes after the start of the used ring.
    used: GuestSlice<[AtomicU32; 2]>,
    /// flags and idx of the used ring.
    used_head: GuestSlice<AtomicU16>,
    /// avail_event, the last field of the used ring; only with EVENT_IDX.
    avail_event: Option<GuestSlice<AtomicU16>>,
    size: u16,
    /// `size - 1`.
    mask: u16,
    indirect: bool,
    /// The next entry of the available ring to take; free-running, as all indexes here.
    next_avail: u16,
    /// The driver's index as last seen: entries before it can be read.
    seen_avail: u16,
    /// The next entry of the used ring to write.
    next_used: u16,
    /// What used.idx says.
    published: u16,
    log: Option<SplitLog>,
    /// An earlier process has used this ring: see [`super::Ring::resumed`].
    resumed: bool,
    /// Heads of the chains that it has left unfinished, the oldest last.
    unfinished: Vec<u16>,
}

impl SimpleChainRing for SplitRing {
    #[inline(always)]
    fn peek_simple_chain<const FIRST: u32, const LAST: u32>(&mut self, view: &mut GuestView) -> Option<SimpleChain> {
        if self.next_avail == self.seen_avail && !self.look().ok()? {
            return None;
        }
        self.simple_chain::<FIRST, LAST>(view)
    }

    #[inline(always)]
    fn is_empty(&mut self) -> bool {
        self.next_avail == self.seen_avail && self.look() == Ok(false)
    }

    #[inline(always)]
    fn accept(&mut self, head: Head) -> Head {
        self.take(head.id());
        head
    }

    #[inline(always)]
    fn commit(&mut self) {
        // Each chain is in the log as soon as it is taken.
    }
}

impl SplitRing {
    /// Resolves and checks the ring's addresses, as [`super::Ring::new`] does for both formats. The used index continues from what the ring in memory says, as vhost-user asks of split rings.
    pub fn new(memory: &Arc<GuestMemory>, setup: &RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(RingError::Size { packed: false, size });
        }
        let next_avail = u16::try_from(setup.base).map_err(|_| RingError::Base { base: setup.base, size })?;
        let (count, event) = (usize::from(size), usize::from(setup.event_idx));
        let wrong = |part, address| RingError::Address { part, address };
        // Alignments: 16, 2 and 4 bytes (2.7). The words' own alignment is checked by GuestSlice.
        let descriptors = wrong(Part::Descriptors, setup.descriptors);
        if !setup.descriptors.is_multiple_of(16) {
            return Err(descriptors);
        }
        let descriptors = GuestSlice::new(memory, setup.descriptors, count).ok_or(descriptors)?;
        let avail =
            GuestSlice::new(memory, setup.driver, 2 + count + event).ok_or(wrong(Part::Driver, setup.driver))?;
        let device = wrong(Part::Device, setup.device);
        // Each slice was found below 2^64, so the address of the next does not overflow.
        let used_head: GuestSlice<AtomicU16> = GuestSlice::new(memory, setup.device, 2).ok_or(device)?;
        let used = GuestSlice::new(memory, setup.device + 4, count).ok_or(device)?;
        let avail_event = match setup.event_idx {
            true => Some(GuestSlice::new(memory, setup.device + 4 + 8 * count as u64, 1).ok_or(device)?),
            false => None,
        };
        // Relaxed: the front-end's message that started the ring came after the driver's last write of it.
        let next_used = u16::from_le(used_head[IDX].load(Ordering::Relaxed));
        Ok(SplitRing {
            descriptors,
            avail,
            used,
            used_head,
            avail_event,
            size,
            mask: size - 1,
            indirect: setup.indirect,
            next_avail,
            seen_avail: next_avail,
            next_used,
            published: next_used,
            log: None,
            resumed: false,
            unfinished: Vec::new(),
        })
    }

    pub(super) fn set_log(&mut self, queue: &InflightQueue) -> Result<(), InflightError> {
        // Relaxed: only compared, nothing is read through it.
        let available = u16::from_le(self.avail[IDX].load(Ordering::Relaxed));
        let (log, unfinished) = SplitLog::open(queue, self.size, self.next_used, available)?;
        self.log = Some(log);
        if let Some(unfinished) = unfinished {
            // Everything taken was given back, or is unfinished: so many entries of the available ring are behind us.
            self.next_avail = self.next_used.wrapping_add(unfinished.len() as u16);
            self.seen_avail = self.next_avail;
            (self.resumed, self.unfinished) = (true, unfinished);
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
        let Some(head) = self.unfinished.pop() else { return Ok(None) };
        self.walk(head, view, chain)?;
        Ok(Some(Head::new(head, 1)))
    }

    /// The chain at the next entry of the available ring, which begins with `head`, is ours now.
    #[inline(always)]
    fn take(&mut self, head: u16) {
        if let Some(log) = &mut self.log {
            log.take(head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Looks at the driver's index; says whether there is something to take.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: pairs with the driver's write barrier between its entries and avail.idx (2.7.13.3).
        let seen = u16::from_le(self.avail[IDX].load(Ordering::Acquire));
        if seen.wrapping_sub(self.next_avail) > self.size {
            return Err(RingError::AvailableIndex { from: self.next_avail, to: seen, size: self.size });
        }
        self.seen_avail = seen;
        Ok(seen != self.next_avail)
    }

    #[inline(always)]
    fn descriptor(&self, index: u16) -> Result<Descriptor, RingError> {
        let Some([address, rest]) = self.descriptors.get(usize::from(index)) else {
            return Err(RingError::DescriptorIndex { index, size: self.size.into() });
        };
        // Relaxed: ordered by the Acquire in `look`.
        Ok(Descriptor::split([
            u64::from_le(address.load(Ordering::Relaxed)),
            u64::from_le(rest.load(Ordering::Relaxed)),
        ]))
    }

    /// The chain at the next entry of the available ring, if it is a simple one.
    #[inline(always)]
    fn simple_chain<const FIRST: u32, const LAST: u32>(&self, view: &mut GuestView) -> Option<SimpleChain> {
        let id = self.offered();
        let first = self.descriptor(id).ok()?;
        let all = if first.is(FIRST, NEXT) {
            let middle = self.descriptor(first.link).ok()?;
            [first, middle, self.descriptor(middle.link).ok()?]
        } else if first.is(SIMPLE_TABLE, INDIRECT) && self.indirect {
            let words: [u64; 6] = view.read_words(first.address).ok()?;
            let all = [0, 2, 4].map(|at| Descriptor::split([words[at], words[at + 1]]));
            if !all[0].is(FIRST, NEXT) || all[0].link != 1 || all[1].link != 2 {
                return None;
            }
            all
        } else {
            return None;
        };
        let good = all[1].flags & !WRITE == NEXT && all[2].is(LAST, WRITE);
        good.then(|| SimpleChain::new(Head::new(id, 1), all))
    }

    /// The head the driver has put into the next entry of the available ring.
    #[inline(always)]
    fn offered(&self) -> u16 {
        let entry = AVAIL_RING + usize::from(self.next_avail & self.mask);
        // Relaxed: ordered by the Acquire in `look`.
        u16::from_le(self.avail[entry].load(Ordering::Relaxed))
    }

    /// Takes the next available chain into `chain`, as [`super::Ring::pop`] does for both formats.
    #[inline]
    pub(super) fn pop(&mut self, view: &mut GuestView, chain: &mut Chain) -> Result<Option<Head>, RingError> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        let head = self.offered();
        self.walk(head, view, chain)?;
        self.take(head);
        Ok(Some(Head::new(head, 1)))
    }

    /// Reads the chain that begins with a descriptor.
    #[inline(always)]
    fn walk(&self, head: u16, view: &mut GuestView, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear();
        let most = longest(self.size);
        let mut index = head;
        let mut seen = 0;
        loop {
            let descriptor = self.descriptor(index)?;
            if descriptor.flags & INDIRECT != 0 {
                return self.indirect(descriptor, head, view, chain);
            }
            chain.push(descriptor, head)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            seen += 1;
            if seen == most {
                return Err(endless(self.size, head));
            }
            index = descriptor.link;
        }
    }

    /// An indirect table (2.7.5.3): the end of a chain, which may have had direct descriptors before it. The flag WRITE of
    /// the descriptor that refers to the table is ignored, as 2.7.5.3.2 asks.
    #[inline(always)]
    fn indirect(&self, table: Descriptor, head: u16, view: &mut GuestView, chain: &mut Chain) -> Result<(), RingError> {
        if !self.indirect || table.flags & NEXT != 0 {
            return Err(RingError::Indirect { head });
        }
        let entries = indirect_entries(table, head)?;
        let mut index = 0;
        let mut seen = 0;
        loop {
            if u32::from(index) >= entries {
                return Err(RingError::DescriptorIndex { index, size: entries });
            }
            let words = view
                .read_words(table.address + DESCRIPTOR_BYTES * u64::from(index))
                .map_err(|_| RingError::IndirectTable { head, address: table.address, bytes: table.bytes })?;
            let descriptor = Descriptor::split(words);
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingError::Indirect { head });
            }
            chain.push(descriptor, head)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            seen += 1;
            // Empty descriptors do not count in `chain.push`, so the walk has a limit of its own.
            if seen == entries || seen as usize > MAX_CHAIN {
                return Err(RingError::Loop { head });
            }
            index = descriptor.link;
        }
    }

    pub(super) fn unpop(&mut self, head: Head) {
        if let Some(log) = &mut self.log {
            log.untake(head.id());
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    #[inline(always)]
    pub(super) fn push_used(&mut self, head: Head, written: u32) {
        let entry = usize::from(self.next_used & self.mask);
        if let Some([id, length]) = self.used.get(entry) {
            // Relaxed: ordered by the Release in `publish`.
            id.store(u32::from(head.id()).to_le(), Ordering::Relaxed);
            length.store(written.to_le(), Ordering::Relaxed);
        }
        if let Some(log) = &mut self.log {
            log.give_back(head.id());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline(always)]
    pub(super) fn unpublished(&self) -> bool {
        self.published != self.next_used
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        let old = self.published;
        self.published = self.next_used;
        if let Some(log) = &self.log {
            log.publishing(old);
        }
        // Release: pairs with the driver's read barrier after it sees used.idx (2.7.14); the elements, the status bytes
        // and the data are visible before.
        self.used_head[IDX].store(self.next_used.to_le(), Ordering::Release);
        // SeqCst fence: used.idx is written before used_event or flags are read; pairs with the driver's barrier between
        // writing those and looking at used.idx once more (2.7.7.2, 2.7.10). Without it both could miss each other.
        fence(Ordering::SeqCst);
        if let Some(log) = &self.log {
            log.published(old, self.next_used);
        }
        match self.avail_event {
            Some(_) => {
                let event = self.avail[AVAIL_RING + usize::from(self.size)].load(Ordering::Relaxed);
                event_passed(u16::from_le(event), self.next_used, old)
            }
            None => u16::from_le(self.avail[0].load(Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0,
        }
    }

    pub(super) fn enable_notifications(&mut self) -> bool {
        match &self.avail_event {
            // The driver notifies when it makes the entry with this index available (2.7.10).
            Some(event) => event[0].store(self.next_avail.to_le(), Ordering::Relaxed),
            None => self.used_head[0].store(0, Ordering::Relaxed),
        }
        // SeqCst fence: what was stored above is visible before avail.idx is read; pairs with the driver's barrier between
        // writing avail.idx and reading avail_event or flags (2.7.13.4).
        fence(Ordering::SeqCst);
        self.look().unwrap_or(true)
    }

    pub(super) fn disable_notifications(&mut self) {
        match &self.avail_event {
            // flags has to be 0 with EVENT_IDX (2.7.10). The entry that is farthest in the future: the one just taken. The
            // driver will notify once in 65536 entries.
            Some(event) => event[0].store(self.next_avail.wrapping_sub(1).to_le(), Ordering::Relaxed),
            None => self.used_head[0].store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed),
        }
    }

    pub(super) fn base(&self) -> u32 {
        self.next_avail.into()
    }
}
