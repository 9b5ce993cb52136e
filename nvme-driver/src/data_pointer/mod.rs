//! Data pointers: how a command says where its data lies (NVMe Base 2.0, 4.1).
//!
//! A PRP entry names one memory page, so a PRP list can only join buffers at page boundaries ([`prp`]); an SGL joins any
//! buffers the controller's alignment rule allows ([`sgl`]). Both work on a request's segments from a [`Position`] on and
//! never allocate: the entries go into the page that belongs to the command's slot.

pub(crate) mod prp;
pub(crate) mod sgl;

use crate::Segment;

/// Memory page size in bytes: CC.MPS is always set to 0 (NVMe Base 2.0, 3.1.3.5).
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Words in a slot's page: 512 PRP entries, or 256 SGL descriptors, or 256 Dataset Management ranges.
pub(crate) const LIST_WORDS: usize = PAGE_BYTES as usize / 8;

/// Most bytes one command moves: with any offset into the first page, PRP1 and one full list page reach that far.
pub(crate) const MAX_COMMAND_BYTES: u32 = LIST_WORDS as u32 * PAGE_BYTES as u32;

/// What the controller demands of SGL data blocks (SGLS bits 1:0; NVMe Base 2.0, figure 275).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SglAlignment {
    /// Any address and any length (SGLS 01b).
    Byte,
    /// Addresses and lengths are multiples of four bytes (SGLS 10b).
    Dword,
}

/// A place in a list of segments: `offset` bytes into segment `index`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub index: usize,
    pub offset: u32,
}

impl Position {
    /// The position `bytes` further on.
    pub(crate) fn advanced(mut self, segments: &[Segment], mut bytes: u64) -> Position {
        while let Some(segment) = segments.get(self.index) {
            let left = u64::from(segment.bytes - self.offset);
            if bytes < left {
                self.offset += bytes as u32;
                break;
            }
            bytes -= left;
            self = Position { index: self.index + 1, offset: 0 };
        }
        self
    }
}

/// The runs of memory from a position on: segments that follow each other in memory are one run, empty ones are passed over.
#[derive(Clone)]
pub(crate) struct Runs<'a> {
    segments: &'a [Segment],
    position: Position,
    left: u64,
}

impl<'a> Runs<'a> {
    /// The runs of the next `bytes` bytes.
    pub(crate) fn new(segments: &'a [Segment], position: Position, bytes: u64) -> Runs<'a> {
        Runs { segments, position, left: bytes }
    }
}

impl Iterator for Runs<'_> {
    /// Address and length in bytes.
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        let mut run: Option<(u64, u64)> = None;
        while self.left > 0 {
            let Some(segment) = self.segments.get(self.position.index) else { break };
            let address = segment.iova.wrapping_add(u64::from(self.position.offset));
            let bytes = u64::from(segment.bytes - self.position.offset).min(self.left);
            match &mut run {
                None if bytes > 0 => run = Some((address, bytes)),
                Some((start, length)) if start.wrapping_add(*length) == address => *length += bytes,
                // An empty segment anywhere does not end a run.
                _ if bytes == 0 => {}
                _ => break,
            }
            self.left -= bytes;
            self.position = Position { index: self.position.index + 1, offset: 0 };
        }
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(list: &[(u64, u32)]) -> Vec<Segment> {
        list.iter().map(|&(iova, bytes)| Segment { iova, bytes }).collect()
    }

    #[test]
    fn runs_join_neighbours_and_pass_over_empty_segments() {
        let list = segments(&[(0, 0), (0x1000, 0x100), (0x1100, 0x200), (0x9999, 0), (0x1300, 1), (0x4000, 0x1000)]);
        let all: Vec<_> = Runs::new(&list, Position::default(), 0x1301).collect();
        assert_eq!(all, [(0x1000, 0x301), (0x4000, 0x1000)]);
        let part: Vec<_> = Runs::new(&list, Position { index: 2, offset: 0x80 }, 0x200).collect();
        assert_eq!(part, [(0x1180, 0x181), (0x4000, 0x7f)]);
    }

    #[test]
    fn a_list_that_is_too_short_ends_the_runs() {
        let list = segments(&[(0x1000, 16)]);
        assert_eq!(Runs::new(&list, Position::default(), 1000).collect::<Vec<_>>(), [(0x1000, 16)]);
        assert_eq!(Runs::new(&list, Position { index: 1, offset: 0 }, 1000).next(), None);
    }

    #[test]
    fn positions_advance_over_segments() {
        let list = segments(&[(0, 10), (0, 0), (0, 20)]);
        let start = Position::default();
        assert_eq!(start.advanced(&list, 3), Position { index: 0, offset: 3 });
        assert_eq!(start.advanced(&list, 10), Position { index: 2, offset: 0 });
        assert_eq!(start.advanced(&list, 3).advanced(&list, 12), Position { index: 2, offset: 5 });
        assert_eq!(start.advanced(&list, 30), Position { index: 3, offset: 0 });
    }
}
