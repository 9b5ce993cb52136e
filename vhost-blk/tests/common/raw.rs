//! A virtqueue, split or packed, that takes any chain: many requests at once, any address, any flag, anything broken.

use std::sync::atomic::Ordering;
use std::time::Instant;

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Descriptor flags (virtio 1.2, 2.7.5 and 2.8.1).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// What SET_VRING_BASE says of a packed ring that begins: both wrap counters are 1.
pub(crate) const PACKED_BASE: u32 = 0x8000_8000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Split,
    Packed,
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub address: u64,
    pub bytes: u32,
    pub writable: bool,
}

/// A buffer that the device reads.
pub(crate) fn readable(address: u64, bytes: u32) -> Piece {
    Piece { address, bytes, writable: false }
}

/// A buffer that the device writes.
pub(crate) fn writable(address: u64, bytes: u32) -> Piece {
    Piece { address, bytes, writable: true }
}

/// Bytes of guest memory that [`RawRing::request`] takes: the header, and at [`STATUS`] the status.
pub(crate) const REQUEST_BYTES: u64 = 32;
pub(crate) const STATUS: u64 = 16;

/// A virtqueue in a region, from the guest's side. Nothing is checked: what makes no sense is written as it is asked for.
pub(crate) struct RawRing<'a> {
    pub index: u32,
    pub size: u16,
    pub format: Format,
    pub kick: EventFd,
    pub call: EventFd,
    /// Where its three parts lie; they may be moved before it is started.
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// Split: avail.idx. Packed: the place of the next descriptor.
    pub next: u16,
    memory: &'a GuestMemoryMmap,
    /// Split: the next used.idx. Packed: the place of the next used descriptor.
    seen: u16,
    wraps: (bool, bool),
    /// Split: descriptors that are free. Packed: buffer IDs.
    free: Vec<u16>,
    /// The descriptors of each chain that is out, by ID.
    out: Vec<Vec<u16>>,
}

impl<'a> RawRing<'a> {
    /// Bytes of guest memory that a ring takes.
    pub(crate) const fn bytes(size: u16) -> u64 {
        let descriptors = (16 * size as u64).next_multiple_of(4096);
        descriptors + 2 * (8 * size as u64 + 4096).next_multiple_of(4096)
    }

    /// A ring at `guest`, zeroed; it is not started. Requests and data are the caller's to place.
    pub(crate) fn new(region: &'a Region, index: u32, guest: u64, format: Format, size: u16) -> RawRing<'a> {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let descriptors = (16 * u64::from(size)).next_multiple_of(4096);
        let part = (Self::bytes(size) - descriptors) / 2;
        let memory = &region.memory;
        memory.write_slice(&vec![0; Self::bytes(size) as usize], GuestAddress(guest)).unwrap();
        RawRing {
            index,
            size,
            format,
            kick: event(),
            call: event(),
            descriptors: guest,
            driver: guest + descriptors,
            device: guest + descriptors + part,
            next: 0,
            memory,
            seen: 0,
            wraps: (true, true),
            free: (0..size).rev().collect(),
            out: vec![Vec::new(); size.into()],
        }
    }

    /// The body of SET_VRING_ADDR.
    pub(crate) fn addresses(&self) -> Vec<u8> {
        let words = [self.descriptors + USER, self.device + USER, self.driver + USER, 0];
        let head = [self.index.to_ne_bytes(), [0; 4]].concat();
        words.iter().fold(head, |body, word| [body, word.to_ne_bytes().to_vec()].concat())
    }

    /// What SET_VRING_BASE has to say now, if nothing is out.
    pub(crate) fn base(&self) -> u32 {
        match self.format {
            Format::Split => self.next.into(),
            Format::Packed => {
                let place = |at: u16, wrap: bool| u32::from(at | u16::from(wrap) << 15);
                place(self.next, self.wraps.0) | place(self.seen, self.wraps.1) << 16
            }
        }
    }

    /// The messages that start it, in QEMU's order.
    pub(crate) fn start(&self, front: &Front) {
        self.start_at(front, self.base());
    }

    /// The messages that start it, in QEMU's order. `base`: what the back-end has said when it stopped the ring.
    pub(crate) fn start_at(&self, front: &Front, base: u32) {
        front.set_ring(SET_VRING_ENABLE, self.index, 1);
        front.set_ring(SET_VRING_NUM, self.index, self.size.into());
        front.set_ring(SET_VRING_BASE, self.index, base);
        front.accept(SET_VRING_ADDR, &self.addresses(), &[]);
        let index = u64::from(self.index).to_ne_bytes();
        front.accept(SET_VRING_KICK, &index, &[self.kick.as_raw_fd()]);
        front.accept(SET_VRING_CALL, &index, &[self.call.as_raw_fd()]);
    }

    pub(crate) fn kick(&self) {
        // A counter that is full tells as much; the hostile fill it.
        let _ = self.kick.write(1);
    }

    /// Stores a value anywhere in its memory.
    pub(crate) fn write<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn fill(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(crate) fn fetch(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Writes one descriptor, of the ring or of a table; `last` is `next` of a split ring, the buffer ID of a packed one.
    pub(crate) fn descriptor(&self, at: u64, piece: Piece, flags: u16, last: u16) {
        let flags = flags | if piece.writable { WRITE } else { 0 };
        self.write(at, piece.address);
        self.write(at + 8, piece.bytes);
        let (first, second) = if self.format == Format::Split { (flags, last) } else { (last, flags) };
        self.write(at + 12, first);
        self.write(at + 14, second);
    }

    /// Makes a chain available: its ID, or `None` if there is no room. The other side is not kicked.
    pub(crate) fn offer(&mut self, chain: &[Piece]) -> Option<u16> {
        self.place(chain, 0)
    }

    /// Makes a chain available by a table of indirect descriptors at `table`: its ID, or `None` if there is no room.
    pub(crate) fn offer_indirect(&mut self, table: u64, chain: &[Piece]) -> Option<u16> {
        for (at, piece) in (0u16..).zip(chain) {
            let more = self.format == Format::Split && usize::from(at) + 1 < chain.len();
            let (flags, last) = if more { (NEXT, at + 1) } else { (0, 0) };
            self.descriptor(table + 16 * u64::from(at), *piece, flags, last);
        }
        self.place(&[readable(table, 16 * chain.len() as u32)], INDIRECT)
    }

    fn place(&mut self, chain: &[Piece], flags: u16) -> Option<u16> {
        match self.format {
            Format::Split => self.place_split(chain, flags),
            Format::Packed => self.place_packed(chain, flags),
        }
    }

    fn place_split(&mut self, chain: &[Piece], flags: u16) -> Option<u16> {
        let left = self.free.len().checked_sub(chain.len())?;
        let places: Vec<u16> = self.free.drain(left..).rev().collect();
        for (at, piece) in chain.iter().enumerate() {
            let next = places.get(at + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.descriptor(self.descriptors + 16 * u64::from(places[at]), *piece, flags, next.unwrap_or(0));
        }
        let head = places[0];
        self.out[usize::from(head)] = places;
        self.write(self.driver + 4 + 2 * u64::from(self.next % self.size), head);
        self.publish(self.next.wrapping_add(1));
        Some(head)
    }

    /// Claims that the driver has got so far (split: avail.idx), true or not.
    pub(crate) fn publish(&mut self, next: u16) {
        self.next = next;
        // Release: the entries are there before; pairs with the device's Acquire of avail.idx.
        self.memory.store(next.to_le(), GuestAddress(self.driver + 2), Ordering::Release).unwrap();
    }

    fn place_packed(&mut self, chain: &[Piece], flags: u16) -> Option<u16> {
        let taken: usize = self.out.iter().map(Vec::len).sum();
        if taken + chain.len() > self.size.into() {
            return None;
        }
        let id = self.free.pop()?;
        let mut places = Vec::new();
        let mut first = None;
        for (at, piece) in chain.iter().enumerate() {
            let wrap = self.wraps.0;
            let flags = flags
                | if at + 1 < chain.len() { NEXT } else { 0 }
                | if piece.writable { WRITE } else { 0 }
                | if wrap { AVAIL } else { USED };
            let place = self.descriptors + 16 * u64::from(self.next);
            if first.is_none() {
                // The first one's flags come last: with them the chain is there.
                self.write(place, piece.address);
                self.write(place + 8, piece.bytes);
                self.write(place + 12, id);
                first = Some((place + 14, flags));
            } else {
                self.descriptor(place, *piece, flags, id);
            }
            places.push(self.next);
            self.next += 1;
            if self.next == self.size {
                (self.next, self.wraps.0) = (0, !wrap);
            }
        }
        self.out[usize::from(id)] = places;
        let (at, flags) = first?;
        // Release: the rest of the chain is there before; pairs with the device's Acquire of the flags.
        self.memory.store(flags.to_le(), GuestAddress(at), Ordering::Release).unwrap();
        Some(id)
    }

    /// The next chain that was given back: its ID and the bytes written.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        match self.format {
            Format::Split => {
                // Acquire: pairs with the device's Release of used.idx.
                let used: u16 = self.memory.load(GuestAddress(self.device + 2), Ordering::Acquire).unwrap();
                if u16::from_le(used) == self.seen {
                    return None;
                }
                let entry = self.device + 4 + 8 * u64::from(self.seen % self.size);
                let (id, bytes) = (self.read::<u32>(entry) as u16, self.read::<u32>(entry + 4));
                self.seen = self.seen.wrapping_add(1);
                let places = std::mem::take(self.out.get_mut(usize::from(id))?);
                self.free.extend(places);
                Some((id, bytes))
            }
            Format::Packed => {
                let entry = self.descriptors + 16 * u64::from(self.seen);
                // Acquire: pairs with the device's Release of the flags.
                let flags: u16 = self.memory.load(GuestAddress(entry + 14), Ordering::Acquire).unwrap();
                let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
                if avail != used || used != self.wraps.1 {
                    return None;
                }
                let (bytes, id) = (self.read::<u32>(entry + 8), self.read::<u16>(entry + 12));
                let places = std::mem::take(self.out.get_mut(usize::from(id))?);
                self.free.push(id);
                self.seen += places.len() as u16;
                if self.seen >= self.size {
                    (self.seen, self.wraps.1) = (self.seen - self.size, !self.wraps.1);
                }
                Some((id, bytes))
            }
        }
    }

    #[track_caller]
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(Instant::now() < deadline, "ring {}: no answer", self.index);
            std::thread::yield_now();
        }
    }

    /// A block request: writes its header at `at` (see [`REQUEST_BYTES`]), and gives the chain with `data` in the middle.
    pub(crate) fn request(&self, at: u64, kind: u32, sector: u64, data: &[Piece]) -> Vec<Piece> {
        self.write(at, u64::from(kind));
        self.write(at + 8, sector);
        self.write(at + STATUS, 0xffu8);
        [&[readable(at, 16)], data, &[writable(at + STATUS, 1)]].concat()
    }

    /// What the device said of the request at `at`; 0xff: nothing.
    pub(crate) fn status(&self, at: u64) -> u8 {
        self.read(at + STATUS)
    }

    /// One request, with its status.
    #[track_caller]
    pub(crate) fn run(&mut self, at: u64, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        let chain = self.request(at, kind, sector, data);
        self.offer(&chain).expect("there is room");
        self.kick();
        self.wait_used();
        self.status(at)
    }
}

/// A log of requests in flight that the back-end has made for a front-end, and that this side has mapped, too.
pub(crate) struct Log {
    /// `VhostUserInflight`, as the back-end has filled it in.
    pub told: Vec<u8>,
    pub file: File,
    memory: GuestMemoryMmap,
}

impl Log {
    pub(crate) fn new(front: &Front, queues: u16, size: u16) -> Log {
        let (told, file) = front.ask_file(GET_INFLIGHT_FD, &inflight(0, queues, size));
        let bytes = number(&told[..8]) as usize;
        let range = (GuestAddress(0), bytes, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        Log { told, file, memory }
    }

    /// Hands it to the back-end.
    pub(crate) fn set(&self, front: &Front) {
        front.accept(SET_INFLIGHT_FD, &self.told, &[self.file.as_raw_fd()]);
    }

    pub(crate) fn bytes(&self) -> u64 {
        number(&self.told[..8])
    }

    /// Bytes of one queue's part.
    pub(crate) fn stride(&self) -> u64 {
        self.bytes() / u64::from(u16::from_ne_bytes(self.told[16..18].try_into().unwrap()))
    }

    pub(crate) fn write<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}
