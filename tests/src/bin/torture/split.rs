//! A split virtqueue, driver side.

use std::sync::atomic::{Ordering, fence};

use crate::memory::Memory;
use crate::ring::{INDIRECT, NEXT, Names, Parts, Piece, Used};

pub(crate) struct SplitDriver {
    pub parts: Parts,
    /// Free descriptors.
    free: Names,
    /// By head: the descriptors of its chain, none when it is not in flight.
    taken: Vec<Vec<u16>>,
    next_avail: u16,
    next_used: u16,
    /// Made available since `kick_wanted` was asked.
    added: u16,
}

impl SplitDriver {
    pub(crate) fn new(parts: Parts, rest: bool) -> SplitDriver {
        let taken = vec![Vec::new(); parts.size.into()];
        SplitDriver { parts, free: Names::new(parts.size, rest), taken, next_avail: 0, next_used: 0, added: 0 }
    }

    /// Address, bytes, flags, next (2.7.5).
    fn descriptor(memory: &Memory, at: u64, piece: &Piece, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&piece.address.to_le_bytes());
        raw[8..12].copy_from_slice(&piece.bytes.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        memory.write(at, &raw);
    }

    fn chain(memory: &Memory, base: u64, chain: &[Piece], places: &[u16]) {
        for (index, piece) in chain.iter().enumerate() {
            let next = places.get(index + 1);
            let flags = piece.flags() | if next.is_some() { NEXT } else { 0 };
            let at = base + 16 * u64::from(places[index]);
            Self::descriptor(memory, at, piece, flags, next.copied().unwrap_or(0));
        }
    }

    pub(crate) fn add(&mut self, memory: &Memory, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        let entries = if table.is_some() { 1 } else { chain.len() };
        if self.free.len() < entries {
            return None;
        }
        let places: Vec<u16> = (0..entries).map_while(|_| self.free.take()).collect();
        let head = places[0];
        match table {
            Some(table) => {
                let inside: Vec<u16> = (0..chain.len() as u16).collect();
                Self::chain(memory, table, chain, &inside);
                let whole = Piece { address: table, bytes: 16 * chain.len() as u32, writable: false };
                Self::descriptor(memory, self.parts.descriptors + 16 * u64::from(head), &whole, INDIRECT, 0);
            }
            None => Self::chain(memory, self.parts.descriptors, chain, &places),
        }
        self.taken[usize::from(head)] = places;
        let slot = u64::from(self.next_avail % self.parts.size);
        memory.store_u16(self.parts.driver + 4 + 2 * slot, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.added += 1;
        // Release: pairs with the device's Acquire of avail.idx.
        memory.store_u16(self.parts.driver + 2, self.next_avail, Ordering::Release);
        Some(head)
    }

    pub(crate) fn has_used(&self, memory: &Memory) -> bool {
        // Acquire: pairs with the device's Release of used.idx.
        memory.load_u16(self.parts.device + 2, Ordering::Acquire) != self.next_used
    }

    pub(crate) fn used(&mut self, memory: &Memory) -> Option<Used> {
        if !self.has_used(memory) {
            return None;
        }
        let at = self.parts.device + 4 + 8 * u64::from(self.next_used % self.parts.size);
        let (id, bytes) = (memory.load_u32(at), memory.load_u32(at + 4));
        self.next_used = self.next_used.wrapping_add(1);
        let places = self.taken.get_mut(id as usize).map(std::mem::take).unwrap_or_default();
        if places.is_empty() {
            return Some(Used::Stranger { id });
        }
        places.into_iter().for_each(|place| self.free.put(place));
        Some(Used::Chain { id: id as u16, bytes })
    }

    pub(crate) fn kick_wanted(&mut self, memory: &Memory) -> bool {
        // SeqCst fence: avail.idx is visible before avail_event is read; pairs with the device's between writing that and
        // reading avail.idx once more (2.7.10).
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.added);
        let event = memory.load_u16(self.parts.device + 4 + 8 * u64::from(self.parts.size), Ordering::Relaxed);
        self.next_avail.wrapping_sub(event).wrapping_sub(1) < added
    }

    pub(crate) fn ask_for_calls(&self, memory: &Memory, on: bool) {
        let event = if on { self.next_used } else { self.next_used.wrapping_sub(1) };
        memory.store_u16(self.parts.driver + 4 + 2 * u64::from(self.parts.size), event, Ordering::Relaxed);
        // SeqCst fence: used_event is visible before used.idx is read once more; pairs with the device's between the two.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn base(&self, memory: &Memory) -> u32 {
        memory.load_u16(self.parts.device + 2, Ordering::Acquire).into()
    }
}
