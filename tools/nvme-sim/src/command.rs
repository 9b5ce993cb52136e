//! Submission and completion queue entries (NVMe Base 2.0, 3.3.3.1 and 3.3.3.2).

use crate::status::Status;

/// Bytes of a submission queue entry.
pub(crate) const SQE_BYTES: u64 = 64;
/// Bytes of a completion queue entry.
pub(crate) const CQE_BYTES: u64 = 16;

/// The namespace identifier that stands for all namespaces.
pub(crate) const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// A submission queue entry, fetched whole: the host cannot change it behind the controller's back.
#[derive(Clone, Copy)]
pub(crate) struct Command(pub [u64; 8]);

const _: () = assert!(size_of::<Command>() as u64 == SQE_BYTES);

impl Command {
    /// Command dword `n` (0–15).
    pub(crate) fn dword(&self, n: usize) -> u32 {
        (self.0[n / 2] >> (32 * (n % 2))) as u32
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    /// FUSE, dword 0 bits 9:8.
    pub(crate) fn fused(&self) -> u8 {
        (self.0[0] >> 8) as u8 & 3
    }

    /// PSDT, dword 0 bits 15:14: 0 PRP, 1 SGL, 2 SGL with metadata SGL.
    pub(crate) fn data_pointer_kind(&self) -> u8 {
        (self.0[0] >> 14) as u8 & 3
    }

    pub(crate) fn id(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }

    pub(crate) fn namespace(&self) -> u32 {
        (self.0[0] >> 32) as u32
    }

    pub(crate) fn prp1(&self) -> u64 {
        self.0[3]
    }

    pub(crate) fn prp2(&self) -> u64 {
        self.0[4]
    }

    /// SLBA of the NVM commands, dwords 10 and 11.
    pub(crate) fn lba(&self) -> u64 {
        self.0[5]
    }

    /// NLB of the NVM commands, made 1's based.
    pub(crate) fn blocks(&self) -> u32 {
        (self.dword(12) & 0xffff) + 1
    }

    /// FUA of the NVM commands, dword 12 bit 30.
    pub(crate) fn force_unit_access(&self) -> bool {
        self.dword(12) & 1 << 30 != 0
    }
}

/// What a completion says, before the queue adds its head pointer and phase.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// Dword 0, command specific.
    pub result: u32,
    pub sq: u16,
    pub id: u16,
    pub status: Status,
}

impl Completion {
    /// The entry as two little-endian quadwords; the second holds the phase tag.
    pub(crate) fn encode(&self, sq_head: u16, phase: bool) -> [u64; 2] {
        let dword2 = u32::from(sq_head) | u32::from(self.sq) << 16;
        let dword3 = u32::from(self.id) | u32::from(phase) << 16 | u32::from(self.status.bits()) << 17;
        [u64::from(self.result), u64::from(dword2) | u64::from(dword3) << 32]
    }
}

/// Admin opcodes (NVMe Base 2.0, figure 138).
pub(crate) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const ASYNC_EVENT: u8 = 0x0c;
    pub(crate) const DOORBELL_BUFFER: u8 = 0x7c;
    pub(crate) const FORMAT: u8 = 0x80;
}

/// NVM command set opcodes (NVM Command Set 1.0, figure 16).
pub(crate) mod nvm {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const COMPARE: u8 = 0x05;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(crate) const VERIFY: u8 = 0x0c;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_dwords() {
        let completion = Completion { result: 7, sq: 3, id: 0x1234, status: Status::INVALID_FIELD };
        let [low, high] = completion.encode(9, true);
        assert_eq!(low, 7);
        assert_eq!(high as u32, 3 << 16 | 9);
        assert_eq!((high >> 32) as u32, 0x4002 << 17 | 1 << 16 | 0x1234);
    }

    #[test]
    fn command_fields() {
        let mut words = [0; 8];
        words[0] = 0x0000_0005_1234_4202;
        words[6] = 0x4000_0007;
        let command = Command(words);
        assert_eq!((command.opcode(), command.id(), command.namespace()), (2, 0x1234, 5));
        assert_eq!((command.fused(), command.data_pointer_kind()), (2, 1));
        assert!(command.force_unit_access());
        assert_eq!(command.blocks(), 8);
    }
}
