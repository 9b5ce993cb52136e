//! A packed virtqueue, driver side.

use std::sync::atomic::{Ordering, fence};

use crate::memory::Memory;
use crate::ring::{INDIRECT, NEXT, Names, Parts, Piece, Used};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const DISABLE: u16 = 1;
const AT_DESCRIPTOR: u16 = 2;

pub(crate) struct PackedDriver {
    pub parts: Parts,
    /// Buffer ids.
    free: Names,
    free_entries: u16,
    /// By id: the ring entries of its chain, 0 when it is not in flight.
    taken: Vec<u16>,
    next_avail: u16,
    avail_wrap: bool,
    next_used: u16,
    used_wrap: bool,
    /// Entries made available since `kick_wanted` was asked.
    added: u16,
}

impl PackedDriver {
    pub(crate) fn new(parts: Parts, rest: bool) -> PackedDriver {
        PackedDriver {
            parts,
            free: Names::new(parts.size, rest),
            free_entries: parts.size,
            taken: vec![0; parts.size.into()],
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
            added: 0,
        }
    }

    /// Address, bytes, id (2.8.13); flags come after.
    fn descriptor(memory: &Memory, at: u64, piece: &Piece, id: u16) {
        let mut raw = [0; 14];
        raw[..8].copy_from_slice(&piece.address.to_le_bytes());
        raw[8..12].copy_from_slice(&piece.bytes.to_le_bytes());
        raw[12..].copy_from_slice(&id.to_le_bytes());
        memory.write(at, &raw);
    }

    pub(crate) fn add(&mut self, memory: &Memory, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        let whole = table.map(|address| {
            for (index, piece) in (0..).zip(chain) {
                let at = address + 16 * index;
                Self::descriptor(memory, at, piece, 0);
                memory.store_u16(at + 14, piece.flags(), Ordering::Relaxed);
            }
            Piece { address, bytes: 16 * chain.len() as u32, writable: false }
        });
        let entries = whole.as_ref().map_or(chain, std::slice::from_ref);
        let count = entries.len() as u16;
        if self.free_entries < count {
            return None;
        }
        let id = self.free.take()?;
        let mut first = None;
        for (index, piece) in entries.iter().enumerate() {
            let at = self.parts.descriptors + 16 * u64::from(self.next_avail);
            let more = if index + 1 < entries.len() { NEXT } else { 0 };
            let kind = if whole.is_some() { INDIRECT } else { piece.flags() | more };
            let flags = kind | if self.avail_wrap { AVAIL } else { USED };
            Self::descriptor(memory, at, piece, id);
            match first {
                // The flags of the first one come last.
                None => first = Some((at + 14, flags)),
                Some(_) => memory.store_u16(at + 14, flags, Ordering::Relaxed),
            }
            self.next_avail += 1;
            if self.next_avail == self.parts.size {
                (self.next_avail, self.avail_wrap) = (0, !self.avail_wrap);
            }
        }
        self.free_entries -= count;
        self.added += count;
        self.taken[usize::from(id)] = count;
        let (at, flags) = first.expect("a chain is not empty");
        // Release: pairs with the device's Acquire of the flags.
        memory.store_u16(at, flags, Ordering::Release);
        Some(id)
    }

    pub(crate) fn has_used(&self, memory: &Memory) -> bool {
        let at = self.parts.descriptors + 16 * u64::from(self.next_used);
        // Acquire: pairs with the device's Release of the used flags.
        let flags = memory.load_u16(at + 14, Ordering::Acquire);
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == used && used == self.used_wrap
    }

    pub(crate) fn used(&mut self, memory: &Memory) -> Option<Used> {
        if !self.has_used(memory) {
            return None;
        }
        let at = self.parts.descriptors + 16 * u64::from(self.next_used);
        let (bytes, id) = (memory.load_u32(at + 8), memory.load_u16(at + 12, Ordering::Relaxed));
        let entries = self.taken.get_mut(usize::from(id)).map_or(0, std::mem::take);
        // Nobody knows how long a chain was that never was; one entry is a guess.
        self.next_used += entries.max(1);
        if self.next_used >= self.parts.size {
            (self.next_used, self.used_wrap) = (self.next_used - self.parts.size, !self.used_wrap);
        }
        if entries == 0 {
            return Some(Used::Stranger { id: id.into() });
        }
        self.free.put(id);
        self.free_entries += entries;
        Some(Used::Chain { id, bytes })
    }

    pub(crate) fn kick_wanted(&mut self, memory: &Memory) -> bool {
        // SeqCst fence: the descriptors' flags are visible before the device's event area is read; pairs with the device's
        // between writing that and looking at the ring once more (2.8.21.3).
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.added);
        match memory.load_u16(self.parts.device + 2, Ordering::Relaxed) & 3 {
            _ if added == 0 => false,
            DISABLE => false,
            AT_DESCRIPTOR => {
                let event = memory.load_u16(self.parts.device, Ordering::Relaxed);
                // An event in the round before this one is that much behind.
                let behind = if (event >> 15 == 1) == self.avail_wrap { 0 } else { self.parts.size };
                let event = (event & 0x7fff).wrapping_sub(behind);
                self.next_avail.wrapping_sub(event).wrapping_sub(1) < added
            }
            _ => true,
        }
    }

    pub(crate) fn ask_for_calls(&self, memory: &Memory, on: bool) {
        if on {
            let event = self.next_used | u16::from(self.used_wrap) << 15;
            memory.store_u16(self.parts.driver, event, Ordering::Relaxed);
        }
        let flags = if on { AT_DESCRIPTOR } else { DISABLE };
        // Release: the flags say that the place before them counts.
        memory.store_u16(self.parts.driver + 2, flags, Ordering::Release);
        // SeqCst fence: both are visible before the ring is looked at once more; pairs with the device's between the two.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn base(&self, _memory: &Memory) -> u32 {
        0x8000_8000
    }
}
