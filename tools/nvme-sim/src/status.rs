//! Status codes: the 15-bit status field of a completion (NVMe Base 2.0, 3.3.3.2.1, figures 92–97).

use std::fmt;

/// Status field of a completion: code in bits 7:0, code type in 10:8, Command Retry Delay in 12:11, More in 13, Do Not Retry in
/// 14.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(u16);

const RETRY_DELAY: u16 = 3 << 11;
const DO_NOT_RETRY: u16 = 1 << 14;
const GENERIC: u8 = 0;
const SPECIFIC: u8 = 1;
const MEDIA: u8 = 2;

impl Status {
    /// The command completed without error.
    pub const SUCCESS: Status = Status(0);
    pub(crate) const INVALID_OPCODE: Status = Status::refusal(GENERIC, 0x01);
    pub(crate) const INVALID_FIELD: Status = Status::refusal(GENERIC, 0x02);
    pub(crate) const COMMAND_ID_CONFLICT: Status = Status::refusal(GENERIC, 0x03);
    pub(crate) const DATA_TRANSFER_ERROR: Status = Status::new(GENERIC, 0x04);
    pub(crate) const INTERNAL_ERROR: Status = Status::new(GENERIC, 0x06);
    pub(crate) const ABORT_REQUESTED: Status = Status::new(GENERIC, 0x07);
    pub(crate) const ABORTED_SQ_DELETION: Status = Status::new(GENERIC, 0x08);
    pub(crate) const INVALID_NAMESPACE: Status = Status::refusal(GENERIC, 0x0b);
    pub(crate) const COMMAND_SEQUENCE: Status = Status::refusal(GENERIC, 0x0c);
    pub(crate) const INVALID_SGL_SEGMENT: Status = Status::refusal(GENERIC, 0x0d);
    pub(crate) const INVALID_SGL_COUNT: Status = Status::refusal(GENERIC, 0x0e);
    pub(crate) const SGL_LENGTH_INVALID: Status = Status::refusal(GENERIC, 0x0f);
    pub(crate) const SGL_TYPE_INVALID: Status = Status::refusal(GENERIC, 0x11);
    pub(crate) const PRP_OFFSET_INVALID: Status = Status::refusal(GENERIC, 0x13);
    pub(crate) const SANITIZE_IN_PROGRESS: Status = Status::new(GENERIC, 0x1d);
    pub(crate) const SGL_GRANULARITY_INVALID: Status = Status::refusal(GENERIC, 0x1e);
    pub(crate) const WRITE_PROTECTED: Status = Status::refusal(GENERIC, 0x20);
    pub(crate) const LBA_OUT_OF_RANGE: Status = Status::refusal(GENERIC, 0x80);
    pub(crate) const CAPACITY_EXCEEDED: Status = Status::refusal(GENERIC, 0x81);
    pub(crate) const FORMAT_IN_PROGRESS: Status = Status::new(GENERIC, 0x84);
    pub(crate) const CQ_INVALID: Status = Status::refusal(SPECIFIC, 0x00);
    pub(crate) const INVALID_QUEUE_ID: Status = Status::refusal(SPECIFIC, 0x01);
    pub(crate) const INVALID_QUEUE_SIZE: Status = Status::refusal(SPECIFIC, 0x02);
    pub(crate) const EVENT_LIMIT: Status = Status::refusal(SPECIFIC, 0x05);
    pub(crate) const INVALID_VECTOR: Status = Status::refusal(SPECIFIC, 0x08);
    pub(crate) const INVALID_LOG_PAGE: Status = Status::refusal(SPECIFIC, 0x09);
    pub(crate) const INVALID_FORMAT: Status = Status::refusal(SPECIFIC, 0x0a);
    pub(crate) const INVALID_QUEUE_DELETION: Status = Status::refusal(SPECIFIC, 0x0c);
    pub(crate) const NOT_SAVEABLE: Status = Status::refusal(SPECIFIC, 0x0d);
    pub(crate) const COMMAND_SIZE_LIMIT: Status = Status::refusal(SPECIFIC, 0x83);
    pub(crate) const WRITE_FAULT: Status = Status::refusal(MEDIA, 0x80);
    pub(crate) const UNRECOVERED_READ_ERROR: Status = Status::refusal(MEDIA, 0x81);
    pub(crate) const COMPARE_FAILURE: Status = Status::refusal(MEDIA, 0x85);

    /// A status of code type `code_type` (0–7) and code `code`, which the host may retry.
    pub const fn new(code_type: u8, code: u8) -> Status {
        Status((code_type as u16 & 7) << 8 | code as u16)
    }

    /// This status with the Do Not Retry bit: however often the host retries, it meets it again.
    pub const fn not_to_be_retried(self) -> Status {
        Status(self.0 | DO_NOT_RETRY)
    }

    /// This status with a Command Retry Delay: the host is to wait for retry delay 1 to 3 of the controller first; 0: for none.
    pub const fn with_retry_delay(self, delay: u8) -> Status {
        Status(self.0 & !RETRY_DELAY | (delay as u16 & 3) << 11)
    }

    /// A status that repeats however often the command is retried.
    const fn refusal(code_type: u8, code: u8) -> Status {
        Status::new(code_type, code).not_to_be_retried()
    }

    /// The 15-bit field as it stands in bits 31:17 of completion dword 3.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Status code type: 0 generic, 1 command specific, 2 media, 3 path, 7 vendor.
    pub const fn code_type(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status code within its type.
    pub const fn code(self) -> u8 {
        self.0 as u8
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sct {} sc {:#04x}", self.code_type(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_completion_expects_them() {
        let status = Status::COMPARE_FAILURE;
        assert_eq!((status.code_type(), status.code()), (2, 0x85));
        assert_eq!(status.bits(), 0x4285);
        assert_eq!(Status::new(0, 4).bits(), 4);
        assert_eq!(Status::new(0, 4).not_to_be_retried().bits(), 0x4004);
    }
}
