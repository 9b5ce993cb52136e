//! A guest's side of a virtqueue, in memory that the target maps as it would a guest's.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vfio::SharedMemory;
use vhost_blk::virtio::memory::RegionDescription;
use vhost_blk::virtio::ring::RingSetup;

/// Descriptors in the ring: room for 64 requests of three.
pub(crate) const RING: u16 = 256;
/// Bytes of data per request.
pub(crate) const BYTES: u32 = 4096;

const MEMORY: u64 = 8 << 20;
const DESCRIPTORS: u64 = 0x0000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x4000;
const HEADERS: u64 = 0x1_0000;
const TABLES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
/// How much higher a guest sees the second of two regions.
const ABOVE: u64 = 4 << 30;
/// Each request's header, status and indirect table lie this far apart, as a guest's slab would put them.
const PLACE: u64 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How the guest lays out its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub packed: bool,
    /// One indirect descriptor per request (what Linux does), else three descriptors in the ring.
    pub indirect: bool,
    /// The data lies in another region than everything else, far above it, as in a guest with more than some GiB.
    pub two_regions: bool,
}

/// The driver of a virtqueue that is used for reads of 4 KiB, one ring slot per outstanding request.
pub(crate) struct Guest {
    memory: Arc<SharedMemory>,
    layout: Layout,
    /// Free-running index of the next request (split), or the next ring entry (packed).
    next: u16,
    wrap: bool,
    random: fastrand::Rng,
    /// Where the next used element is expected.
    next_used: u16,
    used_wrap: bool,
}

impl Guest {
    pub(crate) fn new(layout: Layout) -> Guest {
        let memory = Arc::new(SharedMemory::create(MEMORY as usize).expect("a memfd of a few MiB"));
        let guest = Guest {
            memory,
            layout,
            next: 0,
            wrap: true,
            random: fastrand::Rng::with_seed(0),
            next_used: 0,
            used_wrap: true,
        };
        // A guest that polls: no notification is asked for. Split: a used_event that is far away; packed: DISABLE.
        match layout.packed {
            true => guest.u16(DRIVER + 2, 1),
            false => guest.u16(DRIVER + 4 + 2 * u64::from(RING), 0x8000),
        }
        guest
    }

    /// The memory in one region.
    pub(crate) fn region(&self) -> (RegionDescription, File) {
        self.part(0, MEMORY, 0)
    }

    /// The memory as a front-end would send it.
    pub(crate) fn regions(&self) -> Vec<(RegionDescription, File)> {
        match self.layout.two_regions {
            true => vec![self.part(0, DATA, 0), self.part(DATA, MEMORY - DATA, ABOVE)],
            false => vec![self.region()],
        }
    }

    /// `bytes` of the memory from `at` on, which the guest has `above` bytes higher.
    fn part(&self, at: u64, bytes: u64, above: u64) -> (RegionDescription, File) {
        let file = self.memory.file().try_clone().expect("a descriptor to spare");
        let region = RegionDescription {
            guest_address: at + above,
            bytes,
            user_address: 0x7f00_0000_0000 + at,
            file_offset: self.memory.file_offset() + at,
        };
        (region, file)
    }

    pub(crate) fn ring(&self) -> RingSetup {
        RingSetup {
            packed: self.layout.packed,
            size: RING,
            event_idx: true,
            indirect: self.layout.indirect,
            descriptors: DESCRIPTORS,
            driver: DRIVER,
            device: DEVICE,
            // Packed: both wrap counters begin at 1.
            base: if self.layout.packed { 0x8000_8000 } else { 0 },
        }
    }

    /// Makes `count` reads of random blocks available, on a disk of `sectors` sectors of 512 bytes.
    pub(crate) fn submit(&mut self, count: u16, sectors: u64) {
        let data = if self.layout.two_regions { DATA + ABOVE } else { DATA };
        for at in 0..count {
            let place = u64::from(at);
            let sector = self.random.u64(..sectors / 8) * 8;
            // Header: type IN (0), reserved, sector.
            self.u64(HEADERS + place * PLACE, 0);
            self.u64(HEADERS + place * PLACE + 8, sector);
            // A status that is none.
            self.u16(HEADERS + place * PLACE + 16, 0x00ff);
            let pieces = [
                (HEADERS + place * PLACE, 16, NEXT),
                (data + place * u64::from(BYTES), BYTES, NEXT | WRITE),
                (HEADERS + place * PLACE + 16, 1, WRITE),
            ];
            match self.layout.packed {
                true => self.offer_packed(at, &pieces),
                false => self.offer_split(at, &pieces),
            }
        }
        if !self.layout.packed {
            // Release: pairs with the device's Acquire of avail.idx.
            self.slice::<AtomicU16>(DRIVER + 2)[0].store(self.next, Ordering::Release);
        }
    }

    fn offer_split(&mut self, at: u16, pieces: &[(u64, u32, u16); 3]) {
        let table = TABLES + u64::from(at) * PLACE;
        let (base, first) = if self.layout.indirect { (table, 0) } else { (DESCRIPTORS, 3 * at) };
        for (index, &(address, bytes, flags)) in pieces.iter().enumerate() {
            let descriptor = first + index as u16;
            let next = if flags & NEXT != 0 { descriptor + 1 } else { 0 };
            self.u64(base + 16 * u64::from(descriptor), address);
            let word = u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48;
            self.u64(base + 16 * u64::from(descriptor) + 8, word);
        }
        let head = if self.layout.indirect { at } else { first };
        if self.layout.indirect {
            self.u64(DESCRIPTORS + 16 * u64::from(head), table);
            self.u64(DESCRIPTORS + 16 * u64::from(head) + 8, 48 | u64::from(INDIRECT) << 32);
        }
        self.u16(DRIVER + 4 + 2 * u64::from(self.next % RING), head);
        self.next = self.next.wrapping_add(1);
    }

    fn offer_packed(&mut self, at: u16, pieces: &[(u64, u32, u16); 3]) {
        let table = TABLES + u64::from(at) * PLACE;
        if self.layout.indirect {
            for (index, &(address, bytes, flags)) in pieces.iter().enumerate() {
                self.u64(table + 16 * index as u64, address);
                self.u64(table + 16 * index as u64 + 8, u64::from(bytes) | u64::from(flags & WRITE) << 48);
            }
            self.entry(at, table, 48, INDIRECT, self.wrap, Ordering::Release);
            return;
        }
        let (first, first_wrap) = (self.next, self.wrap);
        for &(address, bytes, flags) in pieces {
            // The first one's flags come last: until then it has the wrap counter of the round before.
            let (ring_wrap, is_first) = (self.wrap, self.next == first);
            let wrap = if is_first { !ring_wrap } else { ring_wrap };
            self.entry(at, address, bytes, flags, wrap, Ordering::Relaxed);
        }
        let (next, wrap) = (self.next, self.wrap);
        (self.next, self.wrap) = (first, first_wrap);
        let (address, bytes, flags) = pieces[0];
        self.entry(at, address, bytes, flags, first_wrap, Ordering::Release);
        (self.next, self.wrap) = (next, wrap);
    }

    /// Writes the next packed descriptor: AVAIL (bit 7) is the wrap counter, USED (bit 15) is not (virtio 1.2, 2.8.1).
    fn entry(&mut self, id: u16, address: u64, bytes: u32, flags: u16, wrap: bool, order: Ordering) {
        let at = DESCRIPTORS + 16 * u64::from(self.next);
        self.u64(at, address);
        let flags = flags | if wrap { 1 << 7 } else { 1 << 15 };
        let word = u64::from(bytes) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.slice::<AtomicU64>(at + 8)[0].store(word, order);
        self.next += 1;
        if self.next == RING {
            (self.next, self.wrap) = (0, !self.wrap);
        }
    }

    /// Takes what the device gave back; returns how many requests, each with status OK.
    ///
    /// # Panics
    /// If a request did not succeed: what was measured would be something else.
    pub(crate) fn collect(&mut self) -> u16 {
        let mut count = 0;
        while let Some(place) = self.next_used() {
            let status = self.slice::<AtomicU16>(HEADERS + u64::from(place) * PLACE + 16)[0].load(Ordering::Relaxed);
            assert_eq!(status, 0, "request {place} did not succeed");
            count += 1;
        }
        count
    }

    /// Writes the status of every request, in place of a device that did nothing.
    pub(crate) fn succeed(&self) {
        for place in 0..u64::from(RING) / 3 {
            self.u16(HEADERS + place * PLACE + 16, 0);
        }
    }

    fn next_used(&mut self) -> Option<u16> {
        if !self.layout.packed {
            // Acquire: pairs with the device's Release of used.idx.
            if self.slice::<AtomicU16>(DEVICE + 2)[0].load(Ordering::Acquire) == self.next_used {
                return None;
            }
            let element = DEVICE + 4 + 8 * u64::from(self.next_used % RING);
            let id = self.slice::<AtomicU32>(element)[0].load(Ordering::Relaxed) as u16;
            self.next_used = self.next_used.wrapping_add(1);
            return Some(if self.layout.indirect { id } else { id / 3 });
        }
        // Acquire: pairs with the device's Release of the used flags.
        let at = DESCRIPTORS + 16 * u64::from(self.next_used) + 8;
        let word = self.slice::<AtomicU64>(at)[0].load(Ordering::Acquire);
        let (avail, used) = (word >> 55 & 1 != 0, word >> 63 != 0);
        if avail != used || used != self.used_wrap {
            return None;
        }
        self.next_used += if self.layout.indirect { 1 } else { 3 };
        if self.next_used >= RING {
            self.next_used -= RING;
            self.used_wrap = !self.used_wrap;
        }
        Some((word >> 32) as u16)
    }

    fn slice<T: vfio::DmaElement>(&self, at: u64) -> &[T] {
        self.memory.slice(at as usize, 1).expect("every address used here is in the memory and aligned")
    }

    fn u16(&self, at: u64, value: u16) {
        self.slice::<AtomicU16>(at)[0].store(value, Ordering::Relaxed);
    }

    fn u64(&self, at: u64, value: u64) {
        self.slice::<AtomicU64>(at)[0].store(value, Ordering::Relaxed);
    }
}
