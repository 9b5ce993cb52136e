//! Cutting a transfer into commands the controller accepts.
//!
//! A request is cut at the controller's transfer limit (MDTS), at the namespace's boundaries (NOIOB), and where no one data
//! pointer can join two buffers; always at a multiple of the block size. Planning is apart from issuing, so that
//! a request that cannot be expressed is known before its first command has been sent.

#[cfg(test)]
mod tests;

use crate::Segment;
use crate::data_pointer::{MAX_COMMAND_BYTES, Position, SglAlignment, prp, sgl};

/// Most commands of a transfer that are looked at for an SGL: with 128 KiB each, those of half a gigabyte.
const MOST_LOOKED_AT: usize = 4096;

/// What one command may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most bytes per command (MDTS), at least one block, at most [`MAX_COMMAND_BYTES`].
    pub max_bytes: u32,
    /// Block size as a power of two.
    pub block_shift: u8,
    /// No command crosses a multiple of this many blocks (NOIOB); 0: no boundary.
    pub boundary_blocks: u32,
    /// What the controller's SGLs can say; `None`: it has none.
    pub sgl: Option<SglAlignment>,
}

/// How a command's data pointer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Prp,
    Sgl,
}

/// One command of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Length in bytes, a multiple of the block size, not 0.
    pub bytes: u64,
    pub form: Form,
}

impl Limits {
    /// The longest command that begins at `position` with block `lba`, when `left` bytes (a multiple of the block size, not 0)
    /// are still to be moved. `None`: neither PRP nor SGL can express the block at `position`.
    ///
    /// A stretch can be expressed if and only if each of its blocks can (see the two `reach` functions), so taking the longest
    /// command each time fails exactly when no way of cutting would do.
    pub(crate) fn next_piece(&self, segments: &[Segment], position: Position, lba: u64, left: u64) -> Option<Piece> {
        let block = 1u64 << self.block_shift;
        let mut limit = left.min(u64::from(self.max_bytes.min(MAX_COMMAND_BYTES)) & !(block - 1)).max(block);
        if self.boundary_blocks != 0 {
            let boundary = u64::from(self.boundary_blocks);
            limit = limit.min((boundary - lba % boundary) << self.block_shift);
        }
        let by_prp = prp::reach(segments, position, limit) & !(block - 1);
        let by_sgl = match self.sgl {
            Some(alignment) if by_prp < limit => sgl::reach(segments, position, limit, block, alignment),
            _ => 0,
        };
        if by_sgl > by_prp {
            Some(Piece { bytes: by_sgl, form: Form::Sgl })
        } else if by_prp > 0 {
            Some(Piece { bytes: by_prp, form: Form::Prp })
        } else {
            None
        }
    }

    /// Can a transfer be expressed, in however many commands? Takes no longer than the list of segments is, whatever the limits
    /// on a command are: they do not matter, see [`Limits::next_piece`].
    pub(crate) fn expressible(&self, segments: &[Segment], bytes: u64) -> bool {
        let block = 1u64 << self.block_shift;
        let mut position = Position::default();
        let mut left = bytes;
        while left > 0 {
            let by_prp = prp::reach(segments, position, left) & !(block - 1);
            let by_sgl = match self.sgl {
                Some(alignment) if by_prp < left => sgl::reach(segments, position, left, block, alignment),
                _ => 0,
            };
            let reached = by_prp.max(by_sgl);
            if reached == 0 {
                return false;
            }
            position = position.advanced(segments, reached);
            left -= reached;
        }
        true
    }

    /// Is the data of any command of a transfer described by an SGL? Of the first commands, that is: looked at are
    /// [`MOST_LOOKED_AT`] at most.
    pub(crate) fn any_sgl(&self, segments: &[Segment], lba: u64, bytes: u64) -> bool {
        let mut position = Position::default();
        let mut done = 0;
        for _ in 0..MOST_LOOKED_AT {
            if done >= bytes {
                break;
            }
            let piece = self.next_piece(segments, position, lba + (done >> self.block_shift), bytes - done);
            let Some(Piece { bytes: piece, form: Form::Prp }) = piece else { return piece.is_some() };
            position = position.advanced(segments, piece);
            done += piece;
        }
        false
    }

    /// How many commands a transfer takes. `None`: some block cannot be expressed, the data has to be copied.
    pub(crate) fn count_pieces(&self, segments: &[Segment], lba: u64, bytes: u64) -> Option<usize> {
        let mut position = Position::default();
        let mut done = 0;
        let mut pieces = 0;
        while done < bytes {
            let piece = self.next_piece(segments, position, lba + (done >> self.block_shift), bytes - done)?;
            position = position.advanced(segments, piece.bytes);
            done += piece.bytes;
            pieces += 1;
        }
        Some(pieces)
    }
}
