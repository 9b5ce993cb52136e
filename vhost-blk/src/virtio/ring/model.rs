//! The driver's side of both ring formats, written from the specification, for tests.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vfio::SharedMemory;

use super::RingSetup;
use crate::virtio::memory::{DmaScope, GuestMemory, RegionDescription};

/// Where a test's front-end says that its memory is: this much above the guest's addresses.
pub(crate) const USER_OFFSET: u64 = 0x7000_0000_0000;
/// Without a device: what an I/O virtual address is above the guest's.
pub(crate) const IOVA_OFFSET: u64 = 0x100_0000_0000;

/// A guest's memory, seen from the guest.
pub(crate) struct Guest {
    pub memory: Arc<GuestMemory>,
    regions: Vec<(RegionDescription, SharedMemory)>,
}

impl Guest {
    /// Regions at these guest addresses, of these lengths; a device's too if there is one.
    pub(crate) fn new(layout: &[(u64, u64)], scope: Option<&DmaScope>) -> Guest {
        let mut guest = Guest { memory: Arc::new(GuestMemory::new()), regions: Vec::new() };
        for &(address, bytes) in layout {
            guest.add(address, bytes, scope);
        }
        guest
    }

    pub(crate) fn add(&mut self, guest_address: u64, bytes: u64, scope: Option<&DmaScope>) {
        let shared = SharedMemory::create(bytes as usize).unwrap();
        let user_address = guest_address + USER_OFFSET;
        let region = RegionDescription { guest_address, bytes, user_address, file_offset: 0 };
        let file = shared.file().try_clone().unwrap();
        self.memory = Arc::new(match scope {
            Some(scope) => self.memory.with_region(scope, region, file).unwrap(),
            None => self.memory.with_region_without_device(region, file, IOVA_OFFSET).unwrap(),
        });
        self.regions.push((region, shared));
    }

    fn place(&self, address: u64) -> (&SharedMemory, usize) {
        let hit = self.regions.iter().find(|(r, _)| (r.guest_address..r.guest_address + r.bytes).contains(&address));
        let (region, memory) = hit.unwrap_or_else(|| panic!("the test uses {address:#x}, which is outside its memory"));
        (memory, (address - region.guest_address) as usize)
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let (memory, at) = self.place(address + done as u64);
            let piece = (data.len() - done).min(memory.len() - at);
            memory.write(at, &data[done..done + piece]).unwrap();
            done += piece;
        }
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        let mut done = 0;
        while done < bytes {
            let (memory, at) = self.place(address + done as u64);
            let piece = (bytes - done).min(memory.len() - at);
            memory.read(at, &mut data[done..done + piece]).unwrap();
            done += piece;
        }
        data
    }

    /// In one piece where it is aligned, as everything in a ring is: another thread may be at it.
    pub(crate) fn read_u16(&self, address: u64) -> u16 {
        match self.word(address) {
            // Relaxed, here and in `write_u16`: the driver below has its fences.
            Some(word) => u16::from_le(word.load(Ordering::Relaxed)),
            None => u16::from_le_bytes(self.read(address, 2).try_into().unwrap()),
        }
    }

    fn word(&self, address: u64) -> Option<&AtomicU16> {
        let (memory, at) = self.place(address);
        memory.slice(at, 1)?.first()
    }

    pub(crate) fn read_u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().unwrap())
    }

    pub(crate) fn write_u16(&self, address: u64, value: u16) {
        match self.word(address) {
            Some(word) => word.store(value.to_le(), Ordering::Relaxed),
            None => self.write(address, &value.to_le_bytes()),
        }
    }

    /// Is `iova..iova + bytes` within what the table maps (without a device)?
    pub(crate) fn iova_inside(&self, iova: u64, bytes: u64) -> bool {
        let Some(address) = iova.checked_sub(IOVA_OFFSET) else { return false };
        let Some(end) = address.checked_add(bytes) else { return false };
        self.regions.iter().any(|(r, _)| address >= r.guest_address && end <= r.guest_address + r.bytes)
    }
}

/// A piece of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub address: u64,
    pub bytes: u32,
    pub writable: bool,
}

pub(crate) fn readable(address: u64, bytes: u32) -> Piece {
    Piece { address, bytes, writable: false }
}

pub(crate) fn writable(address: u64, bytes: u32) -> Piece {
    Piece { address, bytes, writable: true }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A descriptor of either format: split has flags, then next; packed has id, then flags.
pub(crate) fn descriptor(address: u64, bytes: u32, third: u16, fourth: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&bytes.to_le_bytes());
    raw[12..14].copy_from_slice(&third.to_le_bytes());
    raw[14..].copy_from_slice(&fourth.to_le_bytes());
    raw
}

/// A well-behaved driver's ring.
pub(crate) struct Driver {
    pub setup: RingSetup,
    /// Free descriptors (split) or buffer ids (packed), the next one last.
    free: Vec<u16>,
    free_entries: u16,
    /// What each head or id in flight has taken.
    taken: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    avail_wrap: bool,
    next_used: u16,
    used_wrap: bool,
    /// Entries made available since `kick_wanted` was asked.
    added: u16,
}

impl Driver {
    /// A ring whose parts lie at `at` and after it, `bytes_needed` in all.
    pub(crate) fn new(guest: &Guest, packed: bool, size: u16, at: u64, event_idx: bool) -> Driver {
        let descriptors = at;
        let driver = descriptors + 16 * u64::from(size);
        let device = (driver + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let base = if packed { 0x8000_8000 } else { 0 };
        guest.write(at, &vec![0; Self::bytes_needed(size) as usize]);
        Driver {
            setup: RingSetup { packed, size, event_idx, indirect: true, descriptors, driver, device, base },
            free: (0..size).rev().collect(),
            free_entries: size,
            taken: HashMap::new(),
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
            added: 0,
        }
    }

    pub(crate) fn bytes_needed(size: u16) -> u64 {
        26 * u64::from(size) + 32
    }

    /// Makes a chain available, through an indirect table at this address if there is one; returns its head or id.
    /// `None`: the ring is full.
    pub(crate) fn add(&mut self, guest: &Guest, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        match self.setup.packed {
            false => self.add_split(guest, chain, table),
            true => self.add_packed(guest, chain, table),
        }
    }

    fn add_split(&mut self, guest: &Guest, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        let flag = |p: &Piece| if p.writable { WRITE } else { 0 };
        let mut entries = Vec::new();
        for (index, piece) in chain.iter().enumerate() {
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            entries.push((piece.address, piece.bytes, flag(piece) | next));
        }
        if let Some(table) = table {
            for (index, &(address, bytes, flags)) in entries.iter().enumerate() {
                let raw = descriptor(address, bytes, flags, index as u16 + 1);
                guest.write(table + 16 * index as u64, &raw);
            }
            entries = vec![(table, 16 * chain.len() as u32, INDIRECT)];
        }
        if self.free.len() < entries.len() {
            return None;
        }
        let indexes: Vec<u16> = entries.iter().map(|_| self.free.pop().unwrap()).collect();
        for (k, &(address, bytes, flags)) in entries.iter().enumerate() {
            let next = indexes.get(k + 1).copied().unwrap_or(0);
            let raw = descriptor(address, bytes, flags, next);
            guest.write(self.setup.descriptors + 16 * u64::from(indexes[k]), &raw);
        }
        let head = indexes[0];
        self.taken.insert(head, indexes);
        self.offer(guest, head);
        Some(head)
    }

    /// Split: puts a head into the available ring, whatever it is.
    pub(crate) fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.next_avail % self.setup.size);
        guest.write_u16(self.setup.driver + 4 + 2 * slot, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.added = self.added.wrapping_add(1);
        fence(Ordering::SeqCst);
        guest.write_u16(self.setup.driver + 2, self.next_avail);
    }

    fn add_packed(&mut self, guest: &Guest, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        let mut entries = Vec::new();
        for (index, piece) in chain.iter().enumerate() {
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            entries.push((piece.address, piece.bytes, next | if piece.writable { WRITE } else { 0 }));
        }
        if let Some(table) = table {
            for (index, &(address, bytes, flags)) in entries.iter().enumerate() {
                guest.write(table + 16 * index as u64, &descriptor(address, bytes, 0, flags & WRITE));
            }
            entries = vec![(table, 16 * chain.len() as u32, INDIRECT)];
        }
        if usize::from(self.free_entries) < entries.len() {
            return None;
        }
        let id = self.free.pop()?;
        let mut first = None;
        for (address, bytes, flags) in &entries {
            let at = self.setup.descriptors + 16 * u64::from(self.next_avail);
            let flags = flags | if self.avail_wrap { AVAIL } else { USED };
            let raw = descriptor(*address, *bytes, id, flags);
            match first {
                // All but the flags of the first descriptor, which come last.
                None => {
                    guest.write(at, &raw[..14]);
                    first = Some((at + 14, flags));
                }
                Some(_) => guest.write(at, &raw),
            }
            self.next_avail += 1;
            if self.next_avail == self.setup.size {
                self.next_avail = 0;
                self.avail_wrap = !self.avail_wrap;
            }
        }
        self.free_entries -= entries.len() as u16;
        self.added = self.added.wrapping_add(entries.len() as u16);
        self.taken.insert(id, vec![0; entries.len()]);
        let (at, flags) = first.unwrap();
        fence(Ordering::SeqCst);
        guest.write_u16(at, flags);
        Some(id)
    }

    /// Takes the next used chain: its head or id, and the length written.
    pub(crate) fn used(&mut self, guest: &Guest) -> Option<(u16, u32)> {
        let (id, length) = if self.setup.packed {
            let at = self.setup.descriptors + 16 * u64::from(self.next_used);
            let flags = guest.read_u16(at + 14);
            let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
            if avail != used || used != self.used_wrap {
                return None;
            }
            fence(Ordering::SeqCst);
            let length = guest.read_u32(at + 8);
            assert_eq!(flags & WRITE != 0, length != 0, "WRITE says that the length counts");
            (guest.read_u16(at + 12), length)
        } else {
            if guest.read_u16(self.setup.device + 2) == self.next_used {
                return None;
            }
            fence(Ordering::SeqCst);
            let at = self.setup.device + 4 + 8 * u64::from(self.next_used % self.setup.size);
            (u16::try_from(guest.read_u32(at)).expect("a head has 16 bits"), guest.read_u32(at + 4))
        };
        let taken = self.taken.remove(&id).unwrap_or_else(|| panic!("chain {id} was given back but is not in flight"));
        let entries = taken.len() as u16;
        if self.setup.packed {
            self.free.push(id);
            self.free_entries += entries;
            self.next_used += entries;
            if self.next_used >= self.setup.size {
                self.next_used -= self.setup.size;
                self.used_wrap = !self.used_wrap;
            }
        } else {
            self.free.extend(taken);
            self.next_used = self.next_used.wrapping_add(1);
        }
        Some((id, length))
    }

    /// The used position `ahead` entries on (fewer than the ring has): an index, in packed rings with the wrap counter.
    pub(crate) fn position_ahead(&self, ahead: u16) -> u16 {
        if !self.setup.packed {
            return self.next_used.wrapping_add(ahead);
        }
        match (self.next_used + ahead).checked_sub(self.setup.size) {
            Some(index) => index | u16::from(!self.used_wrap) << 15,
            None => (self.next_used + ahead) | u16::from(self.used_wrap) << 15,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.taken.len()
    }

    /// Has the device asked for a notification of what was added since the last call (2.7.10, 2.8.10)?
    pub(crate) fn kick_wanted(&mut self, guest: &Guest) -> bool {
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.added);
        if self.setup.packed {
            return match guest.read_u16(self.setup.device + 2) {
                0 => added != 0,
                1 => false,
                other => panic!("event flags {other}"),
            };
        }
        if self.setup.event_idx {
            let event = guest.read_u16(self.setup.device + 4 + 8 * u64::from(self.setup.size));
            // Was the entry `event` among those added?
            return self.next_avail.wrapping_sub(event).wrapping_sub(1) < added;
        }
        added != 0 && guest.read_u16(self.setup.device) & 1 == 0
    }

    /// Asks for a notification of the next used chain, or for none.
    pub(crate) fn ask_for_calls(&self, guest: &Guest, on: bool) {
        let RingSetup { packed, size, event_idx, driver, .. } = self.setup;
        match (packed, event_idx) {
            (false, false) => guest.write_u16(driver, u16::from(!on)),
            (false, true) => {
                let event = if on { self.next_used } else { self.next_used.wrapping_sub(1) };
                guest.write_u16(driver + 4 + 2 * u64::from(size), event);
            }
            (true, true) if on => {
                guest.write_u16(driver, self.next_used | u16::from(self.used_wrap) << 15);
                guest.write_u16(driver + 2, 2);
            }
            (true, _) => guest.write_u16(driver + 2, u16::from(!on)),
        }
        fence(Ordering::SeqCst);
    }
}

/// A seeded generator: tests print the seed they use.
pub(crate) struct Random(fastrand::Rng);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(fastrand::Rng::with_seed(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.u64(..)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0.u64(..limit)
    }

    pub(crate) fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }
}
