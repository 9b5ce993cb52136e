//! Data pointers of commands: from PRPs or SGLs to the pieces of host memory they name.

use crate::command::Command;
use crate::dma::DmaView;
use crate::offers::SglOffer;
use crate::status::Status;
use crate::{prp, sgl};

/// A piece of host memory, by its DMA address. `None` is a bit bucket: bytes the host does not want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub iova: Option<u64>,
    pub bytes: u32,
}

/// Walks pointers; keeps its list from command to command, so that nothing is allocated per command.
pub(crate) struct Pointers {
    pub pieces: Vec<Piece>,
    /// Bytes of a memory page (CC.MPS).
    pub page: u64,
    pub sgl: SglOffer,
}

/// Whether the command gives data to the controller or takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    FromHost,
    ToHost,
}

impl Pointers {
    pub(crate) fn new() -> Pointers {
        Pointers { pieces: Vec::new(), page: 4096, sgl: SglOffer::default() }
    }

    /// Fills `pieces` with what `command` names for a transfer of `bytes`.
    #[inline]
    pub(crate) fn walk(
        &mut self,
        view: &DmaView,
        command: &Command,
        bytes: u64,
        direction: Direction,
    ) -> Result<(), Status> {
        self.pieces.clear();
        match command.data_pointer_kind() {
            0 => prp::walk(view, self.page, command.prp1(), command.prp2(), bytes, &mut self.pieces),
            1 | 2 if self.sgl.supported => {
                let words = [command.prp1(), command.prp2()];
                sgl::walk(view, words, bytes, direction, self.sgl, &mut self.pieces)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }
}

/// Reports a DMA fault in the log, as a data transfer error.
pub(crate) fn transfer_error(fault: crate::dma::DmaFault) -> Status {
    log::warn!("{fault}: Data Transfer Error");
    Status::DATA_TRANSFER_ERROR
}
