//! A guest that writes anything into its virtqueue, and a front-end that hands over any log of what is in flight.
//!
//! The first bytes choose the format; then the guest writes to its memory and the device takes and gives back chains, in any
//! order. The front-end changes the log while the ring runs, makes the memory's files shorter, and gives one file as several
//! regions. Checked besides: nothing outside of the guest's memory is handed to the drive or written, a request moves what its
//! segments say to blocks that the disk has, and the short way to a request and the long one agree (as long as memory that was
//! looked at does not go away).

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nvme_driver::testing::namespace;
use nvme_driver::{Namespace, Segment};
use vhost_blk::blk::disk::Disk;
use vhost_blk::blk::request::{Operation, Parsed, Parser, Request, peek_simple};
use vhost_blk::virtio::memory::{DmaScope, GuestMemory, GuestView, RegionDescription};
use vhost_blk::virtio::ring::{Chain, Head, InflightMemory, Ring, RingSetup, SimpleChainRing};

use crate::input::Input;
use crate::memory::{Region, file};

/// Where a guest that means well puts things.
pub(crate) const DESCRIPTORS: u64 = 0x0000;
pub(crate) const DRIVER: u64 = 0x1000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const TABLE: u64 = 0x3000;
pub(crate) const HEADER: u64 = 0x3800;
pub(crate) const STATUS: u64 = 0x3900;
pub(crate) const DATA: u64 = 0x3e00;
const FAR: u64 = 1 << 32;

/// The memory: two regions side by side, and one far away; the last bytes of the last pages are not the guest's.
const REGIONS: [(u64, u64); 3] = [(0, 0x4000), (0x4000, 0x2ff8), (FAR, 0xff8)];
const ADDRESSES: [u64; 10] = [HEADER, STATUS, DATA, TABLE, DESCRIPTORS, DRIVER, DEVICE, 0x6ff0, FAR, FAR + 0xff0];
const LENGTHS: [u64; 8] = [16, 1, 512, 4096, 48, 0, 0x2ff8, 24];
const SIZES: [u64; 8] = [8, 4, 1, 2, 16, 256, 7, 3];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Chains a lane has out at most, whatever the guest claims.
const MOST: usize = 16;

fn disk(read_only: bool, block_shift: u8) -> Disk {
    let namespace = Namespace { read_only, ..namespace(block_shift, 1000) };
    Disk { serial: [b'x'; 20], features: 1 << 9, ..Disk::new(namespace) }
}

/// All of a guest's memory. `None`: a file is too short for its region by now.
fn map(regions: &[Region]) -> Option<GuestMemory> {
    let scope = DmaScope::default();
    regions.iter().try_fold(GuestMemory::new(), |memory, region| {
        let (guest_address, bytes) = (region.guest, region.bytes);
        let description = RegionDescription { guest_address, bytes, user_address: guest_address, file_offset: 0 };
        let file = region.file.try_clone().expect("a descriptor to spare");
        memory.with_region(&scope, description, file).ok()
    })
}

/// The guest and the device.
struct RingBench {
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
    setup: RingSetup,
    log: Option<InflightMemory>,
    disk: Disk,
    /// `None`: the ring is broken, and left alone.
    ring: Option<Ring>,
    view: GuestView,
    chain: Chain,
    parser: Parser,
    /// Taken, not given back.
    out: Vec<(Head, u32)>,
    /// What the guest knows: the next place in its ring, and the wrap counter.
    next: u16,
    wrap: bool,
}

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(mut bench) = RingBench::new(&mut input) else { return };
    while !input.is_empty() {
        bench.step(&mut input);
    }
    bench.regions.iter().for_each(Region::check);
}

impl RingBench {
    /// `None`: the ring was refused.
    fn new(input: &mut Input) -> Option<RingBench> {
        let regions: Vec<Region> = REGIONS.into_iter().map(|(guest, bytes)| Region::new(guest, bytes)).collect();
        let memory = Arc::new(map(&regions).expect("proper regions"));
        let flags = input.u8();
        let size = input.one_of(&SIZES) as u16;
        let mut setup = RingSetup {
            packed: flags & 1 != 0,
            size,
            event_idx: flags & 2 != 0,
            indirect: flags & 4 != 0,
            descriptors: DESCRIPTORS,
            driver: DRIVER,
            device: DEVICE,
            base: if flags & 1 != 0 { 0x8000_8000 } else { 0 },
        };
        if flags & 8 != 0 {
            setup.base = input.u32();
        }
        if flags & 16 != 0 {
            setup.descriptors = input.one_of(&ADDRESSES);
            setup.driver = input.one_of(&ADDRESSES);
            setup.device = input.one_of(&ADDRESSES);
        }
        let log = (flags & 32 != 0).then(|| log(input, size));
        let (next, wrap) = (setup.base as u16 & if setup.packed { 0x7fff } else { 0xffff }, true);
        let view = GuestView::new(memory.clone());
        let disk = disk(flags & 64 != 0, if flags & 128 != 0 { 12 } else { 9 });
        let (chain, parser) = (Chain::new(), Parser::new());
        let out = Vec::new();
        let mut bench = RingBench {
            regions,
            memory,
            setup,
            log: log.flatten(),
            disk,
            ring: None,
            view,
            chain,
            parser,
            out,
            next,
            wrap,
        };
        bench.start();
        bench.ring.is_some().then_some(bench)
    }

    /// The device begins, or begins again after its death.
    fn start(&mut self) {
        self.out.clear();
        self.ring = Ring::new(&self.memory, &self.setup).ok();
        let (Some(ring), Some(queue)) = (&mut self.ring, self.log.as_ref().and_then(|log| log.queue(0))) else {
            return;
        };
        if ring.set_log(&queue).is_err() {
            self.ring = None;
            return;
        }
        let mut unfinished = 0;
        while let Some(ring) = &mut self.ring {
            match ring.pop_unfinished(&mut self.view, &mut self.chain) {
                Ok(Some(head)) => {
                    unfinished += 1;
                    assert!(
                        unfinished <= u32::from(self.setup.size),
                        "more chains in flight than the ring has entries"
                    );
                    self.parse(head, None);
                }
                Ok(None) => break,
                Err(_) => self.ring = None,
            }
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.regions.iter().for_each(|region| region.write(address, bytes));
    }

    fn step(&mut self, input: &mut Input) {
        match input.u8() % 20 {
            0 => {
                let address = input.one_of(&ADDRESSES).wrapping_add(input.u8().into());
                let count = usize::from(input.u8() % 64);
                self.write(address, input.bytes(count));
            }
            1 | 2 => self.write_descriptor(input),
            3 => self.write_header(input),
            4 => self.offer(input),
            5 | 6 => self.offer_request(input),
            7..=9 => self.pop(),
            10 => self.take_simple(),
            11 => {
                if !self.out.is_empty() {
                    let (head, written) = self.out.swap_remove(usize::from(input.u8()) % self.out.len());
                    self.ring.iter_mut().for_each(|ring| ring.push_used(head, written));
                }
            }
            12 => _ = self.ring.as_mut().map(Ring::publish),
            13 => {
                if let Some(ring) = &mut self.ring {
                    match input.u8() & 1 {
                        0 => ring.disable_notifications(),
                        _ => _ = ring.enable_notifications(),
                    }
                }
            }
            14 => {
                if let Some(log) = &self.log {
                    let at = u64::from(input.u16()) % log.bytes().max(1);
                    let bytes = input.bytes(8);
                    if at + 8 <= log.bytes() {
                        log.file().write_all_at(bytes, at).expect("a memory file takes bytes");
                    }
                }
            }
            16 => self.change_log(input),
            17 => {
                let region = &self.regions[usize::from(input.u8()) % self.regions.len()];
                region.set_len(input.one_of(&[0, 0x1000, 0x2000, 0x3000, 0x3800, 0xff8, 0x4000]));
            }
            18 => self.alias(input),
            19 => {
                // A log of our own is sealed; a front-end's is not.
                if let Some(log) = &self.log {
                    let _ = log.file().set_len(input.one_of(&[0, 64, 0x1000, 0x3000]).min(0x3000));
                }
            }
            _ => {
                // The device dies, or is stopped as it should be.
                if let (Some(ring), true) = (&mut self.ring, self.out.is_empty()) {
                    ring.publish();
                    self.setup.base = ring.base();
                }
                self.start();
            }
        }
    }

    /// A field of the log, with what it might hold, or might not.
    fn change_log(&self, input: &mut Input) {
        let Some(log) = &self.log else { return };
        let (entry, field) = (u64::from(input.u8() % 24), input.u8());
        let value = input.one_of(&[0, 1, self.setup.size.into(), u64::from(self.setup.size) - 1, 0xffff, 60000]);
        // Entries begin after 16 bytes, or 32, and take 16, or 32; fields are of one byte, of two, or of eight.
        let (begin, bytes) = if self.setup.packed { (32, 32) } else { (16, 16) };
        let (at, width) = match field & 15 {
            0 => (0, 1),
            1 => (1, 1),
            even @ 2..8 => (u64::from(even & !1), 2),
            other => (u64::from(other & 8) * u64::from(field >> 4 & 3) / 8, 8),
        };
        let at = if field & 128 != 0 { at } else { begin + bytes * entry + at };
        if at + width <= log.bytes() {
            // A file that was made shorter grows again.
            log.file().write_all_at(&value.to_le_bytes()[..width as usize], at).expect("a memory file takes bytes");
        }
    }

    /// The memory is given anew: a file is that of two regions, or of each its own, and the ring begins again.
    fn alias(&mut self, input: &mut Input) {
        let (to, from) = (usize::from(input.u8()) % self.regions.len(), usize::from(input.u8()) % self.regions.len());
        if self.regions[from].bytes < self.regions[to].bytes {
            return;
        }
        let file = self.regions[from].file.try_clone().expect("a descriptor to spare");
        // What lies behind the end of the one may be inside the other.
        self.regions[to].shortened.set(true);
        self.regions[from].shortened.set(true);
        self.regions[to].file = file;
        let Some(memory) = map(&self.regions) else { return };
        self.memory = Arc::new(memory);
        self.view = GuestView::new(self.memory.clone());
        self.start();
    }

    /// Whether what was read once is there to be read again.
    fn is_steady(&self) -> bool {
        !self.regions.iter().any(|region| region.shortened.get())
    }

    /// A descriptor anywhere in the ring, or in an indirect table.
    fn write_descriptor(&mut self, input: &mut Input) {
        let place = input.u8();
        let table = if place & 128 != 0 { TABLE } else { self.setup.descriptors };
        let address = input.one_of(&ADDRESSES);
        let bytes = input.one_of(&LENGTHS) as u32;
        let (flags, link) = (u16::from(input.u8()) | u16::from(input.u8()) << 8, input.u8().into());
        self.descriptor(table, (place & 127).into(), address, bytes, flags, link);
    }

    fn descriptor(&self, table: u64, place: u16, address: u64, bytes: u32, flags: u16, link: u16) {
        let (low, high) = if self.setup.packed { (link, flags) } else { (flags, link) };
        let word = u64::from(bytes) | u64::from(low) << 32 | u64::from(high) << 48;
        let both = [address.to_le_bytes(), word.to_le_bytes()].concat();
        self.write(table.wrapping_add(16 * u64::from(place)), &both);
    }

    fn write_header(&mut self, input: &mut Input) {
        let mut header = [0; 32];
        header[0] = input.u8() % 16;
        header[8..16].copy_from_slice(&input.one_of(&[0, 8, 992, 999, 1000, 1 << 55]).to_le_bytes());
        // The same bytes as a range of a discard.
        header[16..24].copy_from_slice(&input.one_of(&[0, 8, 992, 1 << 55]).to_le_bytes());
        header[24..].copy_from_slice(&input.one_of(&[8, 1, 0, 8 | 1 << 32, 8 | 2 << 32]).to_le_bytes());
        self.write(HEADER, &header);
    }

    /// Makes the next place, or some, available.
    fn offer(&mut self, input: &mut Input) {
        if self.setup.packed {
            return self.advance(input.u8().into());
        }
        let (head, count) = (input.u8().into(), u16::from(input.u8() % 8));
        self.offer_split(head);
        let index = self.regions[0].read_u16(DRIVER + 2).wrapping_add(count);
        self.write(self.setup.driver.wrapping_add(2), &index.to_le_bytes());
    }

    fn offer_split(&mut self, head: u16) {
        let slot = 4 + 2 * u64::from(self.next % self.setup.size);
        self.write(self.setup.driver.wrapping_add(slot), &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
    }

    fn advance(&mut self, count: u16) {
        let next = u32::from(self.next) + u32::from(count);
        let size = u32::from(self.setup.size);
        self.wrap ^= next / size % 2 == 1;
        self.next = (next % size) as u16;
    }

    /// A whole request of three descriptors (indirect ones if they fit no other way), as a driver does it.
    fn offer_request(&mut self, input: &mut Input) {
        let how = input.u8();
        let (data, bytes) =
            (input.one_of(&[DATA, 0x6000, FAR, 0x3c00]), input.one_of(&[512, 4096, 1024, 16, 32]) as u32);
        let status = STATUS + u64::from(how >> 4);
        let data_flags = if how & 1 != 0 { WRITE } else { 0 };
        let pieces = [(HEADER, 16, 0), (data, bytes, data_flags), (status, 1, WRITE)];
        let indirect = how & 2 != 0 || self.setup.size < 3;
        let first = self.next;
        let mut place = if self.setup.packed { first } else { 3 * (first % (self.setup.size / 3).max(1)) };
        let head = place;
        if indirect {
            for (at, (address, bytes, flags)) in (0..).zip(pieces) {
                // In a packed table descriptors follow each other.
                let flags = flags | if at < 2 && !self.setup.packed { NEXT } else { 0 };
                self.descriptor(TABLE, at, address, bytes, flags, at + 1);
            }
            let flags = INDIRECT | self.available();
            self.descriptor(self.setup.descriptors, place, TABLE, 48, flags, 0);
            self.advance_if_packed();
        } else {
            for (at, (address, bytes, flags)) in (0..).zip(pieces) {
                let flags = flags | if at < 2 { NEXT } else { 0 } | self.available();
                let link = if self.setup.packed { head } else { place + 1 };
                self.descriptor(self.setup.descriptors, place, address, bytes, flags, link);
                self.advance_if_packed();
                place = if self.setup.packed { self.next } else { place + 1 };
            }
        }
        if !self.setup.packed {
            self.offer_split(head);
            self.write(self.setup.driver.wrapping_add(2), &self.next.to_le_bytes());
        }
    }

    /// What says that a packed descriptor is available now.
    fn available(&self) -> u16 {
        match (self.setup.packed, self.wrap) {
            (false, _) => 0,
            (true, true) => 1 << 7,
            (true, false) => 1 << 15,
        }
    }

    fn advance_if_packed(&mut self) {
        if self.setup.packed {
            self.advance(1);
        }
    }

    /// What the short way would make of the next chain. It leaves to the queue pair what reaches beyond the disk.
    fn peek(&mut self) -> Option<(Request, Segment)> {
        let (view, disk) = (&mut self.view, &self.disk);
        let (_, request, segment) = match self.ring.as_mut()? {
            Ring::Split(ring) => peek_simple(ring, view, disk, &disk.geometry()),
            Ring::Packed(ring) => peek_simple(ring, view, disk, &disk.geometry()),
        }?;
        self.on_disk(&request).then_some((request, segment))
    }

    fn on_disk(&self, request: &Request) -> bool {
        let namespace = &self.disk.namespace;
        let blocks = u64::from(request.bytes) >> namespace.block_shift;
        blocks <= namespace.blocks && request.lba <= namespace.blocks - blocks
    }

    /// The long way.
    fn pop(&mut self) {
        if self.out.len() == MOST {
            return;
        }
        let short = self.peek().filter(|_| self.is_steady());
        let Some(ring) = &mut self.ring else { return };
        match ring.pop(&mut self.view, &mut self.chain) {
            Ok(Some(head)) => self.parse(head, short),
            Ok(None) => assert!(short.is_none(), "the short way found a request where there is none"),
            Err(_) => {
                assert!(short.is_none(), "the short way found a request in a broken ring");
                self.ring = None;
            }
        }
    }

    /// The short way, for good.
    fn take_simple(&mut self) {
        if self.out.len() == MOST {
            return;
        }
        let (view, disk) = (&mut self.view, &self.disk);
        let taken = match &mut self.ring {
            Some(Ring::Split(ring)) => take_simple(ring, view, disk),
            Some(Ring::Packed(ring)) => take_simple(ring, view, disk),
            None => None,
        };
        self.out.extend(taken);
    }

    fn parse(&mut self, head: Head, short: Option<(Request, Segment)>) {
        let parsed = self.parser.parse(&self.chain, &mut self.view, &self.disk);
        if let Some((request, segment)) = short {
            assert_eq!(parsed, Parsed::Submit, "the short way took what the long one refuses");
            assert_eq!(self.parser.request, request, "the short way and the long one differ");
            assert_eq!(self.parser.segments, [segment], "the short way and the long one differ");
        }
        let request = self.parser.request;
        match parsed {
            Parsed::Submit => self.check_submitted(&request),
            Parsed::Answer(_) => {}
            // A lane leaves such a ring alone.
            Parsed::NoStatus => return self.ring = None,
        }
        self.view.write_byte(request.status, 0).expect("the status byte was found in guest memory");
        self.out.push((head, request.written));
    }

    fn check_submitted(&self, request: &Request) {
        match request.operation {
            Operation::Read | Operation::Write => {
                let sum: u64 = self.parser.segments.iter().map(|segment| u64::from(segment.bytes)).sum();
                assert_eq!(sum, u64::from(request.bytes));
                assert!(self.on_disk(request), "{request:?}");
                // Without a drive a region's DMA address is 0.
                let inside = |segment: &Segment| segment.iova + u64::from(segment.bytes) <= REGIONS[0].1;
                assert!(self.parser.segments.iter().all(inside), "{:?}", self.parser.segments);
            }
            Operation::Flush => {}
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                let blocks = self.disk.namespace.blocks;
                let ends = self.parser.ranges.iter().map(|range| range.lba.checked_add(range.blocks.into()));
                assert!(ends.into_iter().all(|end| end.is_some_and(|end| end <= blocks)), "{:?}", self.parser.ranges);
            }
        }
    }
}

/// The next chain, if the short way takes it, and what its used element says.
fn take_simple(ring: &mut impl SimpleChainRing, view: &mut GuestView, disk: &Disk) -> Option<(Head, u32)> {
    let (simple, request, _) = peek_simple(ring, view, disk, &disk.geometry())?;
    let head = ring.accept(simple.head);
    ring.commit();
    Some((head, request.written))
}

/// A log: a new one, or a front-end's own file.
fn log(input: &mut Input, size: u16) -> Option<InflightMemory> {
    let how = input.u8();
    if how & 1 == 0 {
        return InflightMemory::create(1 + u16::from(how >> 6), size).ok();
    }
    let file = file(0x3000);
    let contents = input.bytes(usize::from(how) * 2);
    file.write_all_at(contents, 0).expect("a memory file takes bytes");
    let bytes = input.one_of(&[0x1000, 0x3000, 0, 64, 0x2001]);
    let offset = input.one_of(&[0, 64, 0x1000, 3]);
    InflightMemory::from_file(file, offset, bytes, input.u8().into()).ok()
}
