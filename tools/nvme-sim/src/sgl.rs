//! Scatter gather lists (NVMe Base 2.0, 4.1.2).

use crate::data_pointer::{Direction, Piece, transfer_error};
use crate::dma::DmaView;
use crate::offers::SglOffer;
use crate::status::Status;

/// More descriptors than any transfer needs; an endless list of empty ones ends here.
const MAX_DESCRIPTORS: u32 = 65536;

const DATA_BLOCK: u8 = 0x0;
const BIT_BUCKET: u8 = 0x1;
const SEGMENT: u8 = 0x2;
const LAST_SEGMENT: u8 = 0x3;

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    kind: u8,
    subtype: u8,
}

impl Descriptor {
    fn new(words: [u64; 2]) -> Descriptor {
        let kind = (words[1] >> 56) as u8;
        Descriptor { address: words[0], bytes: words[1] as u32, kind: kind >> 4, subtype: kind & 15 }
    }
}

/// Walks the descriptor in a command and the segments it leads to, for a transfer of `bytes`.
pub(crate) fn walk(
    view: &DmaView,
    words: [u64; 2],
    bytes: u64,
    direction: Direction,
    offer: SglOffer,
    pieces: &mut Vec<Piece>,
) -> Result<(), Status> {
    let mut left = bytes;
    let mut seen = 0;
    let first = Descriptor::new(words);
    if matches!(first.kind, DATA_BLOCK | BIT_BUCKET) {
        take(first, &mut left, direction, offer, pieces)?;
        return if left == 0 { Ok(()) } else { Err(Status::SGL_LENGTH_INVALID) };
    }
    let mut segment = first;
    loop {
        check_segment(segment)?;
        let count = segment.bytes / 16;
        let mut next = None;
        let mut raw = [0; 16];
        for n in 0..count {
            seen += 1;
            if seen > MAX_DESCRIPTORS {
                return Err(Status::INVALID_SGL_COUNT);
            }
            let at = segment.address.checked_add(u64::from(n) * 16).ok_or(Status::INVALID_SGL_SEGMENT)?;
            view.read(at, &mut raw).map_err(transfer_error)?;
            let word = |half: usize| u64::from_le_bytes(std::array::from_fn(|n| raw[half * 8 + n]));
            let descriptor = Descriptor::new([word(0), word(1)]);
            if !matches!(descriptor.kind, SEGMENT | LAST_SEGMENT) {
                take(descriptor, &mut left, direction, offer, pieces)?;
            } else if segment.kind == LAST_SEGMENT {
                return Err(Status::INVALID_SGL_SEGMENT);
            } else if n + 1 != count {
                return Err(Status::INVALID_SGL_COUNT);
            } else {
                next = Some(descriptor);
            }
        }
        match (segment.kind, next) {
            (LAST_SEGMENT, _) => break,
            (_, Some(descriptor)) => segment = descriptor,
            // A segment that is not the last ends with a pointer to the next.
            (_, None) => return Err(Status::INVALID_SGL_COUNT),
        }
    }
    if left == 0 { Ok(()) } else { Err(Status::SGL_LENGTH_INVALID) }
}

fn check_segment(segment: Descriptor) -> Result<(), Status> {
    if !matches!(segment.kind, SEGMENT | LAST_SEGMENT) || segment.subtype != 0 {
        return Err(Status::SGL_TYPE_INVALID);
    }
    if segment.bytes == 0 || !segment.bytes.is_multiple_of(16) {
        return Err(Status::INVALID_SGL_SEGMENT);
    }
    Ok(())
}

/// Takes a data block or bit bucket. The list must be exactly as long as the transfer (SGLS bit 18 is 0); a bit bucket
/// counts for data to the host only, and is skipped otherwise.
fn take(
    d: Descriptor,
    left: &mut u64,
    direction: Direction,
    offer: SglOffer,
    pieces: &mut Vec<Piece>,
) -> Result<(), Status> {
    if d.subtype != 0 || d.kind == BIT_BUCKET && !offer.bit_bucket {
        return Err(Status::SGL_TYPE_INVALID);
    }
    if offer.dwords_only && (d.bytes & 3 != 0 || d.kind == DATA_BLOCK && d.address & 3 != 0) {
        return Err(Status::SGL_GRANULARITY_INVALID);
    }
    let iova = match d.kind {
        DATA_BLOCK => Some(d.address),
        BIT_BUCKET if direction == Direction::FromHost => return Ok(()),
        BIT_BUCKET => None,
        _ => return Err(Status::SGL_TYPE_INVALID),
    };
    if u64::from(d.bytes) > *left {
        return Err(Status::SGL_LENGTH_INVALID);
    }
    if d.bytes > 0 {
        pieces.push(Piece { iova, bytes: d.bytes });
        *left -= u64::from(d.bytes);
    }
    Ok(())
}
