//! Virtio-blk requests (virtio 1.2, section 5.2.6): from a chain of guest buffers to work for a drive.
//!
//! The driver may lay a request out over descriptors as it likes (2.7.4): the header is the first 16 bytes of the readable
//! part, the status the last byte of the writable part, the data what is between.

use nvme_driver::{LbaRange, Segment};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::blk::config::{MAX_RANGES, RangeLimits};
use crate::blk::disk::{Disk, Geometry};
use crate::virtio::memory::GuestView;
use crate::virtio::ring::{Buffer, Chain, MAX_CHAIN, SimpleChain, SimpleChainRing};

/// Status byte: the request was carried out.
pub const OK: u8 = VIRTIO_BLK_S_OK as u8;
/// Status byte: the request failed, or made no sense.
pub const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// Status byte: this device does not do such requests.
pub const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Bytes of a request's header (5.2.6): le32 type, le32 reserved, le64 sector.
const HEADER_BYTES: u32 = 16;
/// Bytes of a discard or write zeroes segment (5.2.6): le64 sector, le32 num_sectors, le32 flags.
const RANGE_BYTES: u32 = 16;

/// The most pieces of regions that one request's data may lie in: with it a request costs its worker a bounded time.
const MAX_SEGMENTS: usize = 2 * MAX_CHAIN;

/// The most data one request may move, in bytes: what the length of a used element can say, less the status byte.
const MAX_BYTES: u64 = u32::MAX as u64 - 1;

/// What a request asks of the drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Blocks into the segments.
    Read,
    /// The segments onto the blocks.
    Write,
    /// The drive's volatile cache onto its media.
    Flush,
    /// The ranges are not needed any more.
    Discard,
    /// The ranges read as zeroes afterwards.
    WriteZeroes,
    /// The ranges read as zeroes afterwards, and the drive may deallocate them.
    WriteZeroesUnmap,
}

/// A request whose status byte can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do. Its segments or ranges are in the [`Parser`].
    pub operation: Operation,
    /// First logical block of a read or write.
    pub lba: u64,
    /// Bytes of data a read or write moves.
    pub bytes: u32,
    /// Guest address of the status byte, which is in guest memory.
    pub status: u64,
    /// What the used element says, success or not: the bytes of the writable part, the status byte included. The length counts
    /// from the first writable byte and the status is the last one: with less, a driver could not rely on the status (2.7.8).
    pub written: u32,
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// [`Parser::request`] is to be carried out by the drive.
    Submit,
    /// [`Parser::request`] is answered with this status, without the drive; the data, if any, is written already.
    Answer(u8),
    /// There is no byte in guest memory to put a status into: the driver is beyond help.
    NoStatus,
}

/// The next chain, if it is a read or write of header, data in one region and status: it needs no storage. Whether the disk
/// has these blocks is left to the queue pair, which refuses them otherwise. The chain stays available;
/// [`SimpleChainRing::accept`] takes it. `None`: anything else, [`Parser::parse`] finds out what.
#[inline(always)]
pub fn peek_simple(
    ring: &mut impl SimpleChainRing,
    view: &mut GuestView,
    disk: &Disk,
    geometry: &Geometry,
) -> Option<(SimpleChain, Request, Segment)> {
    let simple = ring.peek_simple_chain::<HEADER_BYTES, 1>(view)?;
    let [kind, sector] = view.read_words(simple.first).ok()?;
    let Buffer { address, bytes } = simple.middle;
    if bytes == 0 {
        return None;
    }
    let (operation, written) = match kind as u32 {
        // A multiple of the block size, see below: no overflow.
        VIRTIO_BLK_T_IN if simple.middle_writable => (Operation::Read, bytes.wrapping_add(1)),
        VIRTIO_BLK_T_OUT if !simple.middle_writable && !disk.read_only => (Operation::Write, 1),
        _ => return None,
    };
    let lba = geometry.first_block(sector, bytes)?;
    let segment = view.segment(address, bytes)?;
    let status = simple.last;
    if !view.contains(status) {
        return None;
    }
    Some((simple, Request { operation, lba, bytes, status, written }, segment))
}

/// Turns chains into requests. Its storage is made once.
pub struct Parser {
    /// The last request.
    pub request: Request,
    /// Its data as the device sees it, for [`Operation::Read`] and [`Operation::Write`].
    pub segments: Vec<Segment>,
    /// Its blocks, for discard and write zeroes.
    pub ranges: Vec<LbaRange>,
    payload: Vec<u8>,
}

impl Default for Parser {
    fn default() -> Self {
        Parser {
            request: Request { operation: Operation::Flush, lba: 0, bytes: 0, status: 0, written: 1 },
            // A buffer that crosses regions takes more than one segment: growing beyond this is rare, and possible.
            segments: Vec::with_capacity(MAX_CHAIN),
            ranges: Vec::with_capacity(MAX_RANGES as usize),
            payload: Vec::new(),
        }
    }
}

/// The status of a request that fails without the drive.
struct FailureStatus(u8);

const FAILED: FailureStatus = FailureStatus(IOERR);
const UNSUPPORTED: FailureStatus = FailureStatus(UNSUPP);

impl Parser {
    /// A parser with room for the largest request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses the request in `chain`: resolves every address in it against `view`, checks it against `disk`.
    ///
    /// Each byte of the request is read at most once; what is in `self` then does not depend on guest memory any longer.
    pub fn parse(&mut self, chain: &Chain, view: &mut GuestView, disk: &Disk) -> Parsed {
        let Some((last, writable)) = chain.writable().split_last() else { return Parsed::NoStatus };
        // Buffers are not empty. The end may overflow only where no memory is.
        let status = last.address.wrapping_add(u64::from(last.bytes) - 1);
        if !view.contains(status) {
            return Parsed::NoStatus;
        }
        let tail = Buffer { address: last.address, bytes: last.bytes - 1 };
        let room: u64 = chain.writable().iter().map(|buffer| u64::from(buffer.bytes)).sum();
        let written = u32::try_from(room).unwrap_or(u32::MAX);
        self.request = Request { operation: Operation::Flush, lba: 0, bytes: 0, status, written };
        match self.parse_body(chain.readable(), writable, tail, view, disk) {
            Ok(parsed) => parsed,
            Err(FailureStatus(code)) => Parsed::Answer(code),
        }
    }

    /// `writable` and `tail` are the writable part without the status byte.
    fn parse_body(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        tail: Buffer,
        view: &mut GuestView,
        disk: &Disk,
    ) -> Result<Parsed, FailureStatus> {
        let ([kind, sector], head, readable) = header(readable, view)?;
        match kind as u32 {
            VIRTIO_BLK_T_IN => {
                let bytes = self.data(None, writable, Some(tail), view)?;
                self.transfer(Operation::Read, sector, bytes, disk)
            }
            // 5.2.6.2: a read-only device fails writes with IOERR.
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => Err(FAILED),
            VIRTIO_BLK_T_OUT => {
                let bytes = self.data(head, readable, None, view)?;
                self.transfer(Operation::Write, sector, bytes, disk)
            }
            // Without a volatile cache everything that completed is on the media already.
            VIRTIO_BLK_T_FLUSH if !disk.namespace.volatile_write_cache => Ok(Parsed::Answer(OK)),
            VIRTIO_BLK_T_FLUSH => Ok(Parsed::Submit),
            VIRTIO_BLK_T_GET_ID => self.get_id(writable, tail, view, disk),
            VIRTIO_BLK_T_DISCARD if disk.namespace.discard => {
                // For discard every flag is reserved (5.2.6.2: UNSUPP if any is set).
                self.block_ranges(head, readable, 0, disk.offer.discard, view, disk)?;
                self.request.operation = Operation::Discard;
                Ok(self.unless_empty())
            }
            VIRTIO_BLK_T_WRITE_ZEROES if disk.namespace.write_zeroes => {
                let (known, limits) = (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, disk.offer.write_zeroes);
                let flags = self.block_ranges(head, readable, known, limits, view, disk)?;
                // The flag is per segment; deallocation is a permission, so all have to give it.
                self.request.operation = match flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP {
                    0 => Operation::WriteZeroes,
                    _ => Operation::WriteZeroesUnmap,
                };
                Ok(self.unless_empty())
            }
            _ => Err(UNSUPPORTED),
        }
    }

    fn transfer(
        &mut self,
        operation: Operation,
        sector: u64,
        bytes: u32,
        disk: &Disk,
    ) -> Result<Parsed, FailureStatus> {
        self.request.lba = disk.geometry().block(sector, bytes).ok_or(FAILED)?;
        self.request.operation = operation;
        self.request.bytes = bytes;
        // Nothing to move is done at once; the drive has no command for it.
        Ok(if bytes == 0 { Parsed::Answer(OK) } else { Parsed::Submit })
    }

    fn get_id(
        &self,
        writable: &[Buffer],
        tail: Buffer,
        view: &mut GuestView,
        disk: &Disk,
    ) -> Result<Parsed, FailureStatus> {
        let mut written = 0;
        for buffer in writable.iter().chain([&tail]) {
            let rest = &disk.serial[written..];
            let piece = &rest[..rest.len().min(buffer.bytes as usize)];
            view.write(buffer.address, piece).map_err(|_| FAILED)?;
            written += piece.len();
        }
        Ok(Parsed::Answer(OK))
    }

    fn unless_empty(&self) -> Parsed {
        if self.ranges.is_empty() { Parsed::Answer(OK) } else { Parsed::Submit }
    }

    /// Resolves the data buffers, in order; returns their length.
    fn data(
        &mut self,
        first: Option<Buffer>,
        buffers: &[Buffer],
        last: Option<Buffer>,
        view: &mut GuestView,
    ) -> Result<u32, FailureStatus> {
        let mut total = 0u64;
        self.segments.clear();
        let segments = &mut self.segments;
        let mut add = |buffer: &Buffer| {
            total += u64::from(buffer.bytes);
            // At once: the pieces of what is too long anyway could be very many.
            if total > MAX_BYTES {
                return Err(FAILED);
            }
            view.segments(buffer.address, buffer.bytes, |segment| segments.push(segment)).map_err(|_| FAILED)?;
            // Each buffer may touch very many regions, which no front-end makes so small for a guest.
            if segments.len() > MAX_SEGMENTS { Err(FAILED) } else { Ok(()) }
        };
        if let Some(first) = first {
            add(&first)?;
        }
        for buffer in buffers {
            add(buffer)?;
        }
        if let Some(last) = last
            && last.bytes != 0
        {
            add(&last)?;
        }
        Ok(total as u32)
    }

    /// Reads and checks the segments of a discard or write zeroes request into `self.ranges`. Returns the flags that all of
    /// them have. Beyond the limits, which the driver has read (5.2.6.1), it fails as any error of the driver's (5.2.6).
    fn block_ranges(
        &mut self,
        head: Option<Buffer>,
        readable: &[Buffer],
        known_flags: u32,
        limits: RangeLimits,
        view: &mut GuestView,
        disk: &Disk,
    ) -> Result<u32, FailureStatus> {
        self.ranges.clear();
        self.payload.clear();
        for buffer in head.iter().chain(readable) {
            let start = self.payload.len();
            let end = start + buffer.bytes as usize;
            if end > (limits.ranges * RANGE_BYTES) as usize {
                return Err(FAILED);
            }
            self.payload.resize(end, 0);
            view.read(buffer.address, &mut self.payload[start..]).map_err(|_| FAILED)?;
        }
        let (entries, rest) = self.payload.as_chunks::<{ RANGE_BYTES as usize }>();
        if entries.is_empty() || !rest.is_empty() {
            return Err(FAILED);
        }
        let mut common = u32::MAX;
        for entry in entries {
            let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
            let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (sectors, flags) = (word(8), word(12));
            if flags & !known_flags != 0 {
                return Err(UNSUPPORTED);
            }
            common &= flags;
            if sectors > limits.sectors {
                return Err(FAILED);
            }
            let range = disk.range(sector, sectors).ok_or(FAILED)?;
            if range.blocks != 0 {
                self.ranges.push(range);
            }
        }
        Ok(common & known_flags)
    }
}

/// Where the data of a read or write lies in guest memory; `chain` is the one it was parsed from.
pub(crate) fn data_buffers(chain: &Chain, operation: Operation) -> impl Iterator<Item = Buffer> {
    // Before the data of a write is the header, after that of a read the status byte.
    let (buffers, mut before, after) = match operation {
        Operation::Read => (chain.writable(), 0, 1),
        _ => (chain.readable(), HEADER_BYTES, 0),
    };
    let last = buffers.len().saturating_sub(1);
    buffers.iter().enumerate().filter_map(move |(index, buffer)| {
        let skip = before.min(buffer.bytes);
        before -= skip;
        let bytes = buffer.bytes - skip - if index == last { after } else { 0 };
        (bytes != 0).then_some(Buffer { address: buffer.address + u64::from(skip), bytes })
    })
}

/// A request's header as two words, what is left of the buffer it ends in, and the buffers after that.
type RequestHeader<'a> = ([u64; 2], Option<Buffer>, &'a [Buffer]);

/// Takes the header off the readable part.
fn header<'a>(readable: &'a [Buffer], view: &mut GuestView) -> Result<RequestHeader<'a>, FailureStatus> {
    let (first, rest) = readable.split_first().ok_or(FAILED)?;
    if first.bytes == HEADER_BYTES {
        return Ok((view.read_words(first.address).map_err(|_| FAILED)?, None, rest));
    }
    split_header(readable, view)
}

/// A header that shares a buffer with data, or is spread over several.
#[cold]
fn split_header<'a>(readable: &'a [Buffer], view: &mut GuestView) -> Result<RequestHeader<'a>, FailureStatus> {
    let mut bytes = [0u8; HEADER_BYTES as usize];
    let mut filled = 0;
    for (index, buffer) in readable.iter().enumerate() {
        let piece = (bytes.len() - filled).min(buffer.bytes as usize);
        view.read(buffer.address, &mut bytes[filled..filled + piece]).map_err(|_| FAILED)?;
        filled += piece;
        if filled == bytes.len() {
            let left = buffer.bytes - piece as u32;
            // No overflow: `piece` bytes at the address were found in guest memory.
            let head = (left != 0).then(|| Buffer { address: buffer.address + piece as u64, bytes: left });
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
            return Ok(([word(0), word(8)], head, &readable[index + 1..]));
        }
    }
    Err(FAILED)
}

#[cfg(test)]
pub(crate) mod tests;
