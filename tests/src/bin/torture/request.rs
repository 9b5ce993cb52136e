//! Virtio-blk requests (virtio 1.2, section 5.2.6): drawn at random, laid out in memory, checked when they come back.

use std::ops::Range;
use std::time::Instant;

use e2e::{Blocks, Change, Promise};

use crate::front_end::DiskInfo;
use crate::memory::{DATA, Memory};
use crate::random::Random;
use crate::ring::Piece;

/// The most data of one request.
pub(crate) const MAX_BYTES: u64 = 64 << 10;
/// A slot's data: room to begin anywhere in a page.
pub(crate) const SLOT_DATA: u64 = MAX_BYTES + 4096;
/// A slot's header, status and table.
pub(crate) const SLOT_LOW: u64 = 2048;
const STATUS: u64 = 64;
const TABLE: u64 = 128;
const MAX_SEGMENTS: u64 = 32;
/// A status that is none.
const NO_STATUS: u8 = 0xff;
const OK: u8 = 0;
const IOERR: u8 = 1;
/// What is in memory that no request has.
const POISON: u8 = 0xa5;
const SECTOR: u64 = 512;
const ID_BYTES: u32 = 20;

static IDLE: [u8; SLOT_DATA as usize] = [POISON; SLOT_DATA as usize];

const _: () = assert!(TABLE + 16 * (MAX_SEGMENTS + 2) <= SLOT_LOW);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes { unmap: bool },
    Id,
}

/// Where a request lies.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    low: u64,
    data: u64,
}

impl Slot {
    /// The slot `number` after `low`.
    pub(crate) fn new(low: u64, number: u64) -> Slot {
        Slot { low: low + number * SLOT_LOW, data: DATA + number * SLOT_DATA }
    }

    /// Has nothing in it.
    pub(crate) fn wipe(&self, memory: &Memory) {
        wipe(memory, self.low, SLOT_LOW);
        wipe(memory, self.data, SLOT_DATA);
    }

    /// Where somebody has written to it, while it was not in use or beside the buffers of the requests that used it.
    pub(crate) fn disturbed(&self, memory: &Memory) -> Option<String> {
        disturbed(memory, self.low, SLOT_LOW).or_else(|| disturbed(memory, self.data, SLOT_DATA))
    }
}

fn wipe(memory: &Memory, address: u64, bytes: u64) {
    memory.write(address, &IDLE[..bytes as usize]);
}

fn disturbed(memory: &Memory, address: u64, bytes: u64) -> Option<String> {
    let mut found = vec![0; bytes as usize];
    memory.read(address, &mut found);
    if found == IDLE[..found.len()] {
        return None;
    }
    let strange = || found.iter().enumerate().filter(|(_, byte)| **byte != POISON).map(|(at, _)| at);
    let (first, last) = (strange().next()?, strange().next_back()?);
    let start = &found[first..found.len().min(first + 16)];
    let count = last + 1 - first;
    Some(format!(
        "up to {count} bytes at {:#x}, which nobody was given, were written: {start:02x?}…",
        address + first as u64
    ))
}

/// A request in flight.
pub(crate) struct Request {
    pub kind: Kind,
    pub blocks: Vec<Range<u64>>,
    /// A count of all requests.
    pub number: u64,
    pub since: Instant,
    /// What a flush is to keep.
    promise: Promise,
    slot: Slot,
    data: Vec<Piece>,
    /// What was put into these pieces.
    sent: Vec<u8>,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Right,
    /// A flush that failed: what was answered before is not safe.
    NotFlushed,
    /// It failed, or its answer makes no sense.
    Error(String),
    /// What was acknowledged before is not there.
    Lost(Vec<String>),
}

impl Request {
    /// Draws a request on blocks that no other has; `None`: none was found this time.
    pub(crate) fn draw(
        random: &mut Random,
        disk: &mut Blocks,
        info: &DiskInfo,
        slot: Slot,
        number: u64,
    ) -> Option<Request> {
        let kind = match random.below(100) {
            0..42 => Kind::Write,
            42..54 if info.flush => Kind::Flush,
            54..60 if info.discard => Kind::Discard,
            60..66 if info.write_zeroes => Kind::WriteZeroes { unmap: random.one_in(2) },
            66 => Kind::Id,
            _ => Kind::Read,
        };
        let most = match kind {
            Kind::WriteZeroes { .. } => MAX_BYTES.min(u64::from(info.max_write_zeroes_sectors) * SECTOR),
            _ => MAX_BYTES,
        } / disk.block_bytes() as u64;
        let ranges = match kind {
            Kind::Flush | Kind::Id => 0,
            Kind::Discard | Kind::WriteZeroes { .. } => random.between(1..=4),
            Kind::Read | Kind::Write => 1,
        };
        let blocks: Vec<_> = (0..ranges).filter_map(|_| Self::extent(random, disk, most)).collect();
        if ranges > 0 && blocks.is_empty() {
            return None;
        }
        let promise = disk.promise();
        let mut request =
            Request { kind, blocks, number, since: Instant::now(), promise, slot, data: Vec::new(), sent: Vec::new() };
        request.data = request.segments(random, disk);
        Some(request)
    }

    /// Reads all of `blocks`.
    pub(crate) fn read(random: &mut Random, disk: &Blocks, slot: Slot, number: u64, blocks: Range<u64>) -> Request {
        let since = Instant::now();
        let (kind, promise, blocks) = (Kind::Read, disk.promise(), vec![blocks]);
        let mut request = Request { kind, blocks, number, since, promise, slot, data: Vec::new(), sent: Vec::new() };
        request.data = request.segments(random, disk);
        request
    }

    /// Free blocks, half of the time in a small part of the disk, where each is written again soon.
    fn extent(random: &mut Random, disk: &mut Blocks, most: u64) -> Option<Range<u64>> {
        let part = if random.one_in(2) { disk.count() / 32 } else { disk.count() };
        let most = match random.below(10) {
            0..4 => 1,
            4..8 => most.min(8),
            _ => most,
        };
        let (first, count) = (random.below(part), random.between(1..=most));
        disk.claim(first, count)
    }

    /// Cuts the data into pieces: of whole sectors, of words, or of any bytes; in order or backwards in memory.
    fn segments(&self, random: &mut Random, disk: &Blocks) -> Vec<Piece> {
        let writable = matches!(self.kind, Kind::Read | Kind::Id);
        let bytes = match self.kind {
            Kind::Read | Kind::Write => (self.blocks[0].end - self.blocks[0].start) * disk.block_bytes() as u64,
            Kind::Discard | Kind::WriteZeroes { .. } => 16 * self.blocks.len() as u64,
            Kind::Id => ID_BYTES.into(),
            Kind::Flush => return Vec::new(),
        };
        let unit = match random.below(8) {
            0 => 1,
            1 => 4,
            _ => 512,
        };
        let start = random.below(4096 / unit) * unit;
        let units = bytes.div_ceil(unit);
        let count = if random.one_in(3) { random.between(1..=units.min(MAX_SEGMENTS)) } else { 1 };
        let mut cuts: Vec<u64> = (1..count).map(|_| random.below(units) * unit).collect();
        cuts.extend([0, bytes]);
        cuts.sort_unstable();
        cuts.dedup();
        let backwards = random.one_in(2);
        let piece = |cut: &[u64]| {
            let at = if backwards { bytes - cut[1] } else { cut[0] };
            Piece { address: self.slot.data + start + at, bytes: (cut[1] - cut[0]) as u32, writable }
        };
        cuts.windows(2).map(piece).collect()
    }

    fn bytes(&self) -> usize {
        self.data.iter().map(|piece| piece.bytes as usize).sum()
    }

    /// Whether the part of its slot that it is going to use was written to while nobody used it.
    pub(crate) fn disturbed(&self, memory: &Memory) -> Option<String> {
        let low = disturbed(memory, self.slot.low, SLOT_LOW);
        low.or_else(|| self.data.iter().find_map(|piece| disturbed(memory, piece.address, piece.bytes.into())))
    }

    /// Leaves nothing of it in memory.
    pub(crate) fn wipe(&self, memory: &Memory) {
        wipe(memory, self.slot.low, SLOT_LOW);
        self.data.iter().for_each(|piece| wipe(memory, piece.address, piece.bytes.into()));
    }

    /// Lays the request out in memory; what comes back is its chain, and where a table for it may be.
    pub(crate) fn prepare(&mut self, memory: &Memory, disk: &mut Blocks) -> (Vec<Piece>, u64) {
        let kind: u32 = match self.kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
            Kind::Id => 8,
            Kind::Discard => 11,
            Kind::WriteZeroes { .. } => 13,
        };
        let sectors = disk.block_bytes() as u64 / SECTOR;
        let sector_of = |block: u64| block * sectors;
        let sector = match self.kind {
            Kind::Read | Kind::Write => sector_of(self.blocks[0].start),
            _ => 0,
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write(self.slot.low, &header);
        memory.write(self.slot.low + STATUS, &[NO_STATUS]);
        let mut data = vec![POISON; self.bytes()];
        match self.kind {
            Kind::Write => data = disk.begin_change(&self.blocks[0], Change::Write),
            Kind::Discard | Kind::WriteZeroes { .. } => {
                let change = if self.kind == Kind::Discard { Change::Discard } else { Change::Zero };
                self.blocks.iter().for_each(|blocks| _ = disk.begin_change(blocks, change));
                for (blocks, range) in self.blocks.iter().zip(data.chunks_exact_mut(16)) {
                    let unmap = u32::from(self.kind == Kind::WriteZeroes { unmap: true });
                    range[..8].copy_from_slice(&sector_of(blocks.start).to_le_bytes());
                    let count = sector_of(blocks.end - blocks.start) as u32;
                    range[8..12].copy_from_slice(&count.to_le_bytes());
                    range[12..].copy_from_slice(&unmap.to_le_bytes());
                }
            }
            Kind::Read | Kind::Flush | Kind::Id => {}
        }
        let mut rest = &data[..];
        for piece in &self.data {
            let (now, later) = rest.split_at(piece.bytes as usize);
            memory.write(piece.address, now);
            rest = later;
        }
        self.sent = data;
        let mut chain = vec![Piece { address: self.slot.low, bytes: 16, writable: false }];
        chain.extend(&self.data);
        chain.push(Piece { address: self.slot.low + STATUS, bytes: 1, writable: true });
        (chain, self.slot.low + TABLE)
    }

    /// The device says that the request is done, and that it wrote so many bytes.
    pub(crate) fn complete(
        &self,
        memory: &Memory,
        disk: &mut Blocks,
        written: u32,
        id: &mut Option<Vec<u8>>,
    ) -> Outcome {
        let outcome = self.check(memory, disk, written, id);
        self.blocks.iter().for_each(|blocks| disk.release(blocks));
        outcome
    }

    fn check(&self, memory: &Memory, disk: &mut Blocks, written: u32, id: &mut Option<Vec<u8>>) -> Outcome {
        let what = || format!("request {} ({:?} of {:?})", self.number, self.kind, self.blocks);
        match memory.load_u8(self.slot.low + STATUS) {
            OK => {}
            IOERR if self.kind == Kind::Flush => return Outcome::NotFlushed,
            NO_STATUS => return Outcome::Error(format!("{} came back without a status", what())),
            status => return Outcome::Error(format!("{} came back with status {status}", what())),
        }
        let writable: u32 = self.data.iter().filter(|piece| piece.writable).map(|piece| piece.bytes).sum();
        if written != writable + 1 {
            return Outcome::Error(format!("{}: {written} bytes written, {writable} and a status asked for", what()));
        }
        if writable == 0 && self.data(memory) != self.sent {
            return Outcome::Error(format!("{}: its data, which the device has to read, was changed", what()));
        }
        match self.kind {
            Kind::Read => {
                let data = self.data(memory);
                let wrong = disk.was_read(&self.blocks[0], &data);
                if !wrong.is_empty() {
                    return Outcome::Lost(wrong.into_iter().map(|text| format!("{}: {text}", what())).collect());
                }
            }
            Kind::Write | Kind::WriteZeroes { .. } | Kind::Discard => {
                self.blocks.iter().for_each(|blocks| disk.changed(blocks, false));
            }
            Kind::Id => {
                let data = self.data(memory);
                if *id.get_or_insert_with(|| data.clone()) != data {
                    return Outcome::Error(format!("{}: the disk has another serial number than before", what()));
                }
            }
            Kind::Flush => disk.keep(self.promise),
        }
        Outcome::Right
    }

    fn data(&self, memory: &Memory) -> Vec<u8> {
        let mut data = vec![0; self.bytes()];
        let mut rest = &mut data[..];
        for piece in &self.data {
            let (now, later) = rest.split_at_mut(piece.bytes as usize);
            memory.read(piece.address, now);
            rest = later;
        }
        data
    }
}
