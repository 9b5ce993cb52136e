//! Submission and completion queue entries (NVMe Base 2.0, 3.3.3) and the opcodes.
//!
//! Both entries are kept as little-endian 64-bit words, the unit in which they are written to and read from queue memory.

use crate::Status;

/// Opcodes of the admin commands (NVMe Base 2.0, figure 138).
pub mod admin {
    #![allow(missing_docs)]
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
    pub const FORMAT_NVM: u8 = 0x80;
}

/// Opcodes of the I/O commands (NVM Command Set 1.0, 3.2).
pub mod io {
    #![allow(missing_docs)]
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const VERIFY: u8 = 0x0c;
}

/// The name of an I/O opcode, for messages.
pub fn io_name(opcode: u8) -> &'static str {
    match opcode {
        io::FLUSH => "Flush",
        io::WRITE => "Write",
        io::READ => "Read",
        io::COMPARE => "Compare",
        io::WRITE_ZEROES => "Write Zeroes",
        io::DATASET_MANAGEMENT => "Dataset Management",
        io::VERIFY => "Verify",
        _ => "unknown I/O command",
    }
}

/// Force unit access: CDW12 bit 30 of Write, Write Zeroes, Read, Compare, Verify (NVM Command Set 1.0, 3.2).
pub const CDW12_FUA: u32 = 1 << 30;
/// Deallocate: CDW12 bit 25 of Write Zeroes (NVM Command Set 1.0, 3.2.8).
pub const CDW12_DEAC: u32 = 1 << 25;
/// Attribute deallocate: CDW11 bit 2 of Dataset Management (NVM Command Set 1.0, 3.2.3).
pub const CDW11_AD: u32 = 1 << 2;
/// PSDT in CDW0 (bits 15:14): the data pointer is an SGL, metadata (if any) a contiguous buffer.
pub const CDW0_PSDT_SGL: u32 = 0b01 << 14;

/// A submission queue entry: 64 bytes (NVMe Base 2.0, figure 87).
///
/// | word | bits 31:0 | bits 63:32 |
/// |---|---|---|
/// | 0 | CDW0: opcode 7:0, FUSE 9:8, PSDT 15:14, command identifier 31:16 | NSID |
/// | 1 | CDW2 | CDW3 |
/// | 2 | MPTR | |
/// | 3, 4 | data pointer: PRP1, PRP2, or one SGL descriptor | |
/// | 5 to 7 | CDW10, CDW12, CDW14 | CDW11, CDW13, CDW15 |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Command([u64; 8]);

const _: () = assert!(size_of::<Command>() == 64);

impl Command {
    /// A command with everything but opcode and namespace zero.
    #[inline]
    pub const fn new(opcode: u8, namespace: u32) -> Command {
        Command([opcode as u64 | (namespace as u64) << 32, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Blocks `lba..lba + blocks` with a transfer or range opcode (Read, Write, Compare, Verify, Write Zeroes).
    ///
    /// `blocks`: 1 to 65536, not zero-based; `flags` go into CDW12 ([`CDW12_FUA`], [`CDW12_DEAC`]).
    #[inline]
    pub const fn blocks(opcode: u8, namespace: u32, lba: u64, blocks: u32, flags: u32) -> Command {
        let number = blocks.wrapping_sub(1) & 0xffff;
        Command([opcode as u64 | (namespace as u64) << 32, 0, 0, 0, 0, lba, (number | flags) as u64, 0])
    }

    /// Flush of one namespace.
    #[inline]
    pub const fn flush(namespace: u32) -> Command {
        Command::new(io::FLUSH, namespace)
    }

    /// Dataset Management with `ranges` (1 to 256) range descriptors of 16 bytes behind the data pointer; deallocates.
    #[inline]
    pub const fn deallocate(namespace: u32, ranges: u16) -> Command {
        Command::new(io::DATASET_MANAGEMENT, namespace).with_cdw10(ranges.wrapping_sub(1) as u32).with_cdw11(CDW11_AD)
    }

    /// With the data pointer as PRP1 and PRP2.
    #[inline]
    pub const fn with_prps(mut self, prp1: u64, prp2: u64) -> Command {
        self.0[3] = prp1;
        self.0[4] = prp2;
        self
    }

    /// With the data pointer as one SGL descriptor, and PSDT set.
    #[inline]
    pub const fn with_sgl(mut self, descriptor: [u64; 2]) -> Command {
        self.0[0] |= CDW0_PSDT_SGL as u64;
        self.0[3] = descriptor[0];
        self.0[4] = descriptor[1];
        self
    }

    /// With the command identifier.
    #[inline]
    pub const fn with_id(mut self, id: u16) -> Command {
        self.0[0] = self.0[0] & !0xffff_0000 | (id as u64) << 16;
        self
    }

    /// With CDW10.
    #[inline]
    pub const fn with_cdw10(self, value: u32) -> Command {
        self.with_low(5, value)
    }

    /// With CDW11.
    #[inline]
    pub const fn with_cdw11(self, value: u32) -> Command {
        self.with_high(5, value)
    }

    /// With CDW12.
    #[inline]
    pub const fn with_cdw12(self, value: u32) -> Command {
        self.with_low(6, value)
    }

    /// With CDW13.
    #[inline]
    pub const fn with_cdw13(self, value: u32) -> Command {
        self.with_high(6, value)
    }

    /// With CDW14.
    #[inline]
    pub const fn with_cdw14(self, value: u32) -> Command {
        self.with_low(7, value)
    }

    /// With CDW15.
    #[inline]
    pub const fn with_cdw15(self, value: u32) -> Command {
        self.with_high(7, value)
    }

    const fn with_low(mut self, word: usize, value: u32) -> Command {
        self.0[word] = self.0[word] & !0xffff_ffff | value as u64;
        self
    }

    const fn with_high(mut self, word: usize, value: u32) -> Command {
        self.0[word] = self.0[word] & 0xffff_ffff | (value as u64) << 32;
        self
    }

    /// The entry as it lies in the queue, in 64-bit words.
    #[inline]
    pub const fn words(&self) -> &[u64; 8] {
        &self.0
    }

    /// Opcode.
    #[inline]
    pub const fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    /// Namespace identifier.
    #[inline]
    pub const fn namespace(&self) -> u32 {
        (self.0[0] >> 32) as u32
    }

    /// Command identifier.
    #[inline]
    pub const fn id(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }

    /// Command dword `index` (0 to 15).
    pub const fn dword(&self, index: usize) -> u32 {
        (self.0[index / 2] >> (32 * (index % 2))) as u32
    }
}

/// A completion queue entry: 16 bytes (NVMe Base 2.0, 3.3.3.2).
///
/// Word 0 is the command's result (DW0, DW1); word 1 is SQHD 15:0, SQID 31:16, command identifier 47:32, phase tag 48,
/// status 63:49.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Completion([u64; 2]);

const _: () = assert!(size_of::<Completion>() == 16);

impl Completion {
    /// From the two words as they lie in the queue. The second has to be read first, with Acquire: its phase tag says
    /// whether the first is valid.
    #[inline]
    pub const fn from_words(words: [u64; 2]) -> Completion {
        Completion(words)
    }

    /// DW0: the command's result.
    #[inline]
    pub const fn result(&self) -> u32 {
        self.0[0] as u32
    }

    /// DW0 and DW1.
    #[inline]
    pub const fn result64(&self) -> u64 {
        self.0[0]
    }

    /// Submission queue head (SQHD): entries before it have been fetched.
    #[inline]
    pub const fn sq_head(&self) -> u16 {
        self.0[1] as u16
    }

    /// Submission queue identifier (SQID).
    #[inline]
    pub const fn sq_id(&self) -> u16 {
        (self.0[1] >> 16) as u16
    }

    /// Command identifier (CID). Untrusted: it has to be looked up, not indexed with.
    #[inline]
    pub const fn id(&self) -> u16 {
        (self.0[1] >> 32) as u16
    }

    /// Identifiers of command (31:16) and submission queue (15:0) together: what is answered. Untrusted as they are.
    #[inline]
    pub const fn answered(&self) -> u32 {
        (self.0[1] >> 16) as u32
    }

    /// Phase tag.
    #[inline]
    pub const fn phase(&self) -> bool {
        self.0[1] & 1 << 48 != 0
    }

    /// Status field.
    #[inline]
    pub const fn status(&self) -> Status {
        Status::from_phase_and_status((self.0[1] >> 48) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(command: &Command) -> Vec<u8> {
        command.words().iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn submission_entry_fields_lie_where_figure_87_puts_them() {
        let command = Command::new(0x7c, 0x0403_0201)
            .with_id(0xbeef)
            .with_prps(0x1111_2222_3333_4444, 0x5555_6666_7777_8888)
            .with_cdw10(0xa0a0_a0a0)
            .with_cdw11(0xa1a1_a1a1)
            .with_cdw12(0xa2a2_a2a2)
            .with_cdw13(0xa3a3_a3a3)
            .with_cdw14(0xa4a4_a4a4)
            .with_cdw15(0xa5a5_a5a5);
        let bytes = bytes(&command);
        assert_eq!(bytes[0], 0x7c);
        assert_eq!(bytes[1], 0, "FUSE and PSDT");
        assert_eq!(bytes[2..4], [0xef, 0xbe]);
        assert_eq!(bytes[4..8], [1, 2, 3, 4]);
        assert_eq!(bytes[8..24], [0; 16], "CDW2, CDW3, MPTR");
        assert_eq!(bytes[24..32], 0x1111_2222_3333_4444u64.to_le_bytes());
        assert_eq!(bytes[32..40], 0x5555_6666_7777_8888u64.to_le_bytes());
        for (index, value) in [0xa0u8, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5].into_iter().enumerate() {
            assert_eq!(bytes[40 + 4 * index..44 + 4 * index], [value; 4], "CDW{}", 10 + index);
            assert_eq!(command.dword(10 + index), u32::from_le_bytes([value; 4]));
        }
        assert_eq!((command.opcode(), command.namespace(), command.id()), (0x7c, 0x0403_0201, 0xbeef));
        assert_eq!(bytes.len(), 64);
    }

    #[test]
    fn block_commands_are_zero_based_and_keep_their_flags() {
        let command = Command::blocks(io::WRITE, 3, 0x1_0000_0002, 65536, CDW12_FUA);
        assert_eq!(command.dword(10), 2);
        assert_eq!(command.dword(11), 1);
        assert_eq!(command.dword(12), 0xffff | 1 << 30);
        assert_eq!(Command::blocks(io::WRITE_ZEROES, 1, 0, 1, CDW12_DEAC).dword(12), 1 << 25);
        let discard = Command::deallocate(1, 256);
        assert_eq!((discard.dword(10), discard.dword(11)), (255, 4));
    }

    #[test]
    fn an_sgl_sets_psdt() {
        let bytes = bytes(&Command::new(io::READ, 1).with_sgl([7, 9]).with_id(1));
        assert_eq!(bytes[1], 0x40);
        assert_eq!(bytes[24], 7);
        assert_eq!(bytes[32], 9);
    }

    #[test]
    fn completion_entry_fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0u8; 16];
        bytes[0..4].copy_from_slice(&0xdead_beefu32.to_le_bytes());
        bytes[8..10].copy_from_slice(&0x1234u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&0x0005u16.to_le_bytes());
        bytes[12..14].copy_from_slice(&0xabcdu16.to_le_bytes());
        bytes[14..16].copy_from_slice(&(1u16 | 0x80 << 1).to_le_bytes());
        let words = [0, 8]
            .map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of a sixteen byte array")));
        let completion = Completion::from_words(words);
        assert_eq!(completion.result(), 0xdead_beef);
        assert_eq!(completion.sq_head(), 0x1234);
        assert_eq!(completion.sq_id(), 5);
        assert_eq!(completion.id(), 0xabcd);
        assert!(completion.phase());
        assert_eq!(completion.status(), Status::LBA_OUT_OF_RANGE);
    }
}
