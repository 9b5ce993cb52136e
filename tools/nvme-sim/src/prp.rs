//! Physical region pages (NVMe Base 2.0, 4.1.1).

use crate::data_pointer::{Piece, transfer_error};
use crate::dma::DmaView;
use crate::status::Status;

/// Appends a piece, joined to the one before it where they touch.
#[inline]
fn push(pieces: &mut Vec<Piece>, iova: u64, bytes: u64) {
    if let Some(Piece { iova: Some(last), bytes: have }) = pieces.last_mut()
        && last.wrapping_add(u64::from(*have)) == iova
        && let Some(sum) = have.checked_add(bytes as u32)
    {
        *have = sum;
        return;
    }
    pieces.push(Piece { iova: Some(iova), bytes: bytes as u32 });
}

/// Walks PRP1, PRP2 and the lists it leads to. `page` is the memory page size in bytes, a power of two.
///
/// PRP1 may begin inside a page, at a dword; all other data entries name whole pages. PRP2 is a page if what is left fits in
/// one, else a list (which may begin inside a page, at a quadword), whose last entry in a page leads on to the next list.
#[inline]
pub(crate) fn walk(
    view: &DmaView,
    page: u64,
    prp1: u64,
    prp2: u64,
    bytes: u64,
    pieces: &mut Vec<Piece>,
) -> Result<(), Status> {
    if prp1 & 3 != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let first = bytes.min(page - (prp1 & (page - 1)));
    push(pieces, prp1, first);
    let left = bytes - first;
    if left == 0 {
        return Ok(());
    }
    if left > page {
        return walk_list(view, page, prp2, left, pieces);
    }
    if prp2 & (page - 1) != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    push(pieces, prp2, left);
    Ok(())
}

fn walk_list(view: &DmaView, page: u64, mut list: u64, mut left: u64, pieces: &mut Vec<Piece>) -> Result<(), Status> {
    let mut raw = [0; 4096];
    loop {
        if list & 7 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        // Entries to the end of the page the list is in, or as many as are needed.
        let room = (page - (list & (page - 1))) / 8;
        let needed = left.div_ceil(page);
        let (data, chained) = if needed > room { (room - 1, true) } else { (needed, false) };
        for start in (0..data).step_by(512) {
            let count = (data - start).min(512) as usize;
            let chunk = &mut raw[..count * 8];
            view.read(list + start * 8, chunk).map_err(transfer_error)?;
            for entry in chunk.chunks_exact(8) {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight bytes"));
                if entry & (page - 1) != 0 {
                    return Err(Status::PRP_OFFSET_INVALID);
                }
                let bytes = left.min(page);
                push(pieces, entry, bytes);
                left -= bytes;
            }
        }
        if !chained {
            return Ok(());
        }
        let mut next = [0; 8];
        view.read(list + data * 8, &mut next).map_err(transfer_error)?;
        list = u64::from_le_bytes(next);
        // Only the first list may begin inside a page; so every further one gets the transfer on.
        if list & (page - 1) != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
    }
}
