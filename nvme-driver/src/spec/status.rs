//! The status field of a completion (NVMe Base 2.0, 3.3.3.2.1) and the names of its codes.

use std::fmt;

/// The 15-bit status field: everything of a completion's last 16 bits but the phase tag.
///
/// Bits 7:0 are the status code (SC), 10:8 its type (SCT), 12:11 the command retry delay (CRD), 13 says that the
/// error log has more (M), 14 do not retry (DNR).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Status(u16);

/// The status code types (NVMe Base 2.0, 3.3.3.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeType {
    /// Generic command status (0).
    Generic,
    /// Depends on the command (1).
    CommandSpecific,
    /// Media and data integrity errors (2).
    MediaAndDataIntegrity,
    /// Path related (3).
    PathRelated,
    /// Vendor specific (7).
    VendorSpecific,
    /// Reserved (4 to 6).
    Reserved,
}

impl fmt::Display for CodeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CodeType::Generic => "Generic",
            CodeType::CommandSpecific => "Command Specific",
            CodeType::MediaAndDataIntegrity => "Media and Data Integrity",
            CodeType::PathRelated => "Path Related",
            CodeType::VendorSpecific => "Vendor Specific",
            CodeType::Reserved => "Reserved",
        })
    }
}

/// What may come of giving the drive the same command once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// A retry would be answered in the same way: the drive says so (Do Not Retry), or there is nothing that could change.
    Never,
    /// A retry at once may be answered otherwise: something has interfered with this command.
    AtOnce,
    /// A retry later may be answered otherwise: the drive is not ready for it, and nobody can say for how long. To be tried
    /// again at growing intervals, or at those that it asks for ([`Status::retry_delay`]), for as long as anybody can wait.
    OverTime,
}

impl Status {
    /// Successful Completion.
    pub const SUCCESS: Status = Status(0);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Status = Status::new(0, 0x01);
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Status = Status::new(0, 0x02);
    /// Internal Error.
    pub const INTERNAL_ERROR: Status = Status::new(0, 0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Status = Status::new(0, 0x07);
    /// Command Aborted due to SQ Deletion.
    pub const ABORTED_SQ_DELETION: Status = Status::new(0, 0x08);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Status = Status::new(0, 0x0b);
    /// Namespace is Write Protected.
    pub const WRITE_PROTECTED: Status = Status::new(0, 0x20);
    /// LBA Out of Range.
    pub const LBA_OUT_OF_RANGE: Status = Status::new(0, 0x80);
    /// Asynchronous Event Request Limit Exceeded.
    pub const EVENT_LIMIT_EXCEEDED: Status = Status::new(1, 0x05);
    /// Write Fault.
    pub const WRITE_FAULT: Status = Status::new(2, 0x80);
    /// Unrecovered Read Error.
    pub const UNRECOVERED_READ: Status = Status::new(2, 0x81);
    /// Compare Failure.
    pub const COMPARE_FAILURE: Status = Status::new(2, 0x85);
    /// Command Aborted By Host: what this driver reports for requests it gave up itself.
    pub const ABORTED_BY_HOST: Status = Status::new(3, 0x71);

    /// A status from type (0 to 7) and code.
    pub const fn new(code_type: u8, code: u8) -> Status {
        Status(((code_type as u16 & 7) << 8) | code as u16)
    }

    /// From the last 16 bits of a completion, whose bit 0 is the phase tag.
    #[inline]
    pub const fn from_phase_and_status(field: u16) -> Status {
        Status(field >> 1)
    }

    /// The 15 bits.
    #[inline]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Type and code are 0.
    #[inline]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Status code (SC).
    pub const fn code(self) -> u8 {
        self.0 as u8
    }

    /// Status code type (SCT) as a number, 0 to 7.
    pub const fn code_type_number(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status code type (SCT).
    pub const fn code_type(self) -> CodeType {
        match self.code_type_number() {
            0 => CodeType::Generic,
            1 => CodeType::CommandSpecific,
            2 => CodeType::MediaAndDataIntegrity,
            3 => CodeType::PathRelated,
            7 => CodeType::VendorSpecific,
            _ => CodeType::Reserved,
        }
    }

    /// Type and code only, without retry delay, more and do-not-retry: for comparing with the constants here.
    pub const fn kind(self) -> Status {
        Status(self.0 & 0x7ff)
    }

    /// Does the controller say that it cannot work with a scatter gather list (NVMe Base 2.0, figure 94: Invalid SGL Segment
    /// Descriptor, Invalid Number of SGL Descriptors, Data SGL Length Invalid, SGL Descriptor Type Invalid, SGL Offset
    /// Invalid)?
    #[inline]
    pub const fn concerns_sgl(self) -> bool {
        self.code_type_number() == 0 && matches!(self.code(), 0x0d | 0x0e | 0x0f | 0x11 | 0x16)
    }

    /// Do not retry (DNR): the same command would fail again.
    pub const fn do_not_retry(self) -> bool {
        self.0 & 1 << 14 != 0
    }

    /// What may come of another try. Without Do Not Retry every status allows one (NVMe Base 2.0, figure 93); those that name
    /// something that passes are worth more than a few.
    pub const fn retry(self) -> Retry {
        if self.is_success() || self.do_not_retry() {
            return Retry::Never;
        }
        // Who asks for a delay expects to be asked again after it.
        if self.retry_delay() != 0 {
            return Retry::OverTime;
        }
        match (self.code_type_number(), self.code()) {
            // Sanitize In Progress, Command Interrupted, Transient Transport Error, Admin Command Media Not Ready, Namespace Not
            // Ready, Format In Progress.
            (0, 0x1d | 0x21 | 0x22 | 0x24 | 0x82 | 0x84) => Retry::OverTime,
            // Internal Path Error, Asymmetric Access Inaccessible and Transition, Controller Pathing Error, Host Pathing Error. A
            // persistent loss (01h) does not pass.
            (3, 0x00 | 0x02 | 0x03 | 0x60 | 0x70) => Retry::OverTime,
            (3, 0x01) => Retry::Never,
            // Invalid opcode and field, namespace, SGL and PRP, LBA out of range, capacity, write protection: the command is the
            // same, and so is the drive.
            (0, 0x01 | 0x02 | 0x0b | 0x0d..=0x13 | 0x15 | 0x16 | 0x1e | 0x20 | 0x80 | 0x81 | 0x83) => Retry::Never,
            (2, 0x85) => Retry::Never,
            _ => Retry::AtOnce,
        }
    }

    /// More information is in the error log (M).
    pub const fn more(self) -> bool {
        self.0 & 1 << 13 != 0
    }

    /// Which of the controller's command retry delays to keep before trying again (CRD, 0: none).
    pub const fn retry_delay(self) -> u8 {
        (self.0 >> 11) as u8 & 3
    }

    /// The code's name in the specification.
    pub const fn name(self) -> &'static str {
        match self.code_type_number() {
            0 => generic(self.code()),
            1 => command_specific(self.code()),
            2 => media(self.code()),
            3 => path(self.code()),
            7 => "vendor specific",
            _ => "reserved",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} (sct {}, sc {:#04x}{})",
            self.code_type(),
            self.name(),
            self.code_type_number(),
            self.code(),
            if self.do_not_retry() { ", do not retry" } else { "" }
        )
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({self})")
    }
}

/// Generic command status (NVMe Base 2.0, 3.3.3.2.1.1; 80h and up: NVM Command Set 1.0).
const fn generic(code: u8) -> &'static str {
    match code {
        0x00 => "Successful Completion",
        0x01 => "Invalid Command Opcode",
        0x02 => "Invalid Field in Command",
        0x03 => "Command ID Conflict",
        0x04 => "Data Transfer Error",
        0x05 => "Commands Aborted due to Power Loss Notification",
        0x06 => "Internal Error",
        0x07 => "Command Abort Requested",
        0x08 => "Command Aborted due to SQ Deletion",
        0x09 => "Command Aborted due to Failed Fused Command",
        0x0a => "Command Aborted due to Missing Fused Command",
        0x0b => "Invalid Namespace or Format",
        0x0c => "Command Sequence Error",
        0x0d => "Invalid SGL Segment Descriptor",
        0x0e => "Invalid Number of SGL Descriptors",
        0x0f => "Data SGL Length Invalid",
        0x10 => "Metadata SGL Length Invalid",
        0x11 => "SGL Descriptor Type Invalid",
        0x12 => "Invalid Use of Controller Memory Buffer",
        0x13 => "PRP Offset Invalid",
        0x14 => "Atomic Write Unit Exceeded",
        0x15 => "Operation Denied",
        0x16 => "SGL Offset Invalid",
        0x18 => "Host Identifier Inconsistent Format",
        0x19 => "Keep Alive Timer Expired",
        0x1a => "Keep Alive Timeout Invalid",
        0x1b => "Command Aborted due to Preempt and Abort",
        0x1c => "Sanitize Failed",
        0x1d => "Sanitize In Progress",
        0x1e => "SGL Data Block Granularity Invalid",
        0x1f => "Command Not Supported for Queue in CMB",
        0x20 => "Namespace is Write Protected",
        0x21 => "Command Interrupted",
        0x22 => "Transient Transport Error",
        0x23 => "Command Prohibited by Command and Feature Lockdown",
        0x24 => "Admin Command Media Not Ready",
        0x80 => "LBA Out of Range",
        0x81 => "Capacity Exceeded",
        0x82 => "Namespace Not Ready",
        0x83 => "Reservation Conflict",
        0x84 => "Format In Progress",
        0xc0..=0xff => "vendor specific",
        _ => "reserved",
    }
}

/// Command specific status (NVMe Base 2.0, 3.3.3.2.1.2; 80h and up: NVM Command Set 1.0).
const fn command_specific(code: u8) -> &'static str {
    match code {
        0x00 => "Completion Queue Invalid",
        0x01 => "Invalid Queue Identifier",
        0x02 => "Invalid Queue Size",
        0x03 => "Abort Command Limit Exceeded",
        0x05 => "Asynchronous Event Request Limit Exceeded",
        0x06 => "Invalid Firmware Slot",
        0x07 => "Invalid Firmware Image",
        0x08 => "Invalid Interrupt Vector",
        0x09 => "Invalid Log Page",
        0x0a => "Invalid Format",
        0x0b => "Firmware Activation Requires Conventional Reset",
        0x0c => "Invalid Queue Deletion",
        0x0d => "Feature Identifier Not Saveable",
        0x0e => "Feature Not Changeable",
        0x0f => "Feature Not Namespace Specific",
        0x10 => "Firmware Activation Requires NVM Subsystem Reset",
        0x11 => "Firmware Activation Requires Controller Level Reset",
        0x12 => "Firmware Activation Requires Maximum Time Violation",
        0x13 => "Firmware Activation Prohibited",
        0x14 => "Overlapping Range",
        0x15 => "Namespace Insufficient Capacity",
        0x16 => "Namespace Identifier Unavailable",
        0x18 => "Namespace Already Attached",
        0x19 => "Namespace Is Private",
        0x1a => "Namespace Not Attached",
        0x1b => "Thin Provisioning Not Supported",
        0x1c => "Controller List Invalid",
        0x1d => "Device Self-test In Progress",
        0x1e => "Boot Partition Write Prohibited",
        0x1f => "Invalid Controller Identifier",
        0x20 => "Invalid Secondary Controller State",
        0x21 => "Invalid Number of Controller Resources",
        0x22 => "Invalid Resource Identifier",
        0x23 => "Sanitize Prohibited While Persistent Memory Region is Enabled",
        0x24 => "ANA Group Identifier Invalid",
        0x25 => "ANA Attach Failed",
        0x26 => "Insufficient Capacity",
        0x27 => "Namespace Attachment Limit Exceeded",
        0x28 => "Prohibition of Command Execution Not Supported",
        0x29 => "I/O Command Set Not Supported",
        0x2a => "I/O Command Set Not Enabled",
        0x2b => "I/O Command Set Combination Rejected",
        0x2c => "Invalid I/O Command Set",
        0x2d => "Identifier Unavailable",
        0x80 => "Conflicting Attributes",
        0x81 => "Invalid Protection Information",
        0x82 => "Attempted Write to Read Only Range",
        0x83 => "Command Size Limit Exceeded",
        0xc0..=0xff => "vendor specific",
        _ => "reserved",
    }
}

/// Media and data integrity errors (NVMe Base 2.0, 3.3.3.2.1.3; NVM Command Set 1.0).
const fn media(code: u8) -> &'static str {
    match code {
        0x80 => "Write Fault",
        0x81 => "Unrecovered Read Error",
        0x82 => "End-to-end Guard Check Error",
        0x83 => "End-to-end Application Tag Check Error",
        0x84 => "End-to-end Reference Tag Check Error",
        0x85 => "Compare Failure",
        0x86 => "Access Denied",
        0x87 => "Deallocated or Unwritten Logical Block",
        0x88 => "End-to-End Storage Tag Check Error",
        0xc0..=0xff => "vendor specific",
        _ => "reserved",
    }
}

/// Path related status (NVMe Base 2.0, 3.3.3.2.1.4).
const fn path(code: u8) -> &'static str {
    match code {
        0x00 => "Internal Path Error",
        0x01 => "Asymmetric Access Persistent Loss",
        0x02 => "Asymmetric Access Inaccessible",
        0x03 => "Asymmetric Access Transition",
        0x60 => "Controller Pathing Error",
        0x70 => "Host Pathing Error",
        0x71 => "Command Aborted By Host",
        0xc0..=0xff => "vendor specific",
        _ => "reserved",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        // Phase 1, SC 81h, SCT 2, CRD 3, M, DNR.
        let field: u16 = 1 | 0x81 << 1 | 2 << 9 | 3 << 12 | 1 << 14 | 1 << 15;
        let status = Status::from_phase_and_status(field);
        assert_eq!(status.code(), 0x81);
        assert_eq!(status.code_type(), CodeType::MediaAndDataIntegrity);
        assert_eq!(status.retry_delay(), 3);
        assert!(status.more() && status.do_not_retry() && !status.is_success());
        assert_eq!(status.kind(), Status::UNRECOVERED_READ);
        assert!(Status::from_phase_and_status(1).is_success(), "the phase tag is no part of the status");
        assert!(Status::from_phase_and_status(1 << 15).is_success(), "only type and code decide");
    }

    #[test]
    fn another_try_depends_on_what_the_drive_says() {
        const DNR: u16 = 1 << 14;
        let over_time =
            [(0, 0x82), (0, 0x21), (0, 0x22), (0, 0x84), (0, 0x1d), (3, 0x00), (3, 0x02), (3, 0x03), (3, 0x60)];
        for (code_type, code) in over_time {
            let status = Status::new(code_type, code);
            assert_eq!(status.retry(), Retry::OverTime, "{status}");
            assert_eq!(Status(status.0 | DNR).retry(), Retry::Never, "{status}, do not retry");
        }
        for (code_type, code) in [(0, 0x04), (0, 0x06), (0, 0x07), (2, 0x80), (2, 0x81), (7, 0x11)] {
            let status = Status::new(code_type, code);
            assert_eq!(status.retry(), Retry::AtOnce, "{status}");
            // CRD 2: after a delay, which is asked for.
            assert_eq!(Status(status.0 | 2 << 11).retry(), Retry::OverTime, "{status} with a delay");
        }
        for (code_type, code) in [(0, 0x00), (0, 0x01), (0, 0x02), (0, 0x20), (0, 0x80), (2, 0x85), (3, 0x01)] {
            assert_eq!(Status::new(code_type, code).retry(), Retry::Never);
        }
    }

    #[test]
    fn names_are_the_specifications() {
        assert_eq!(Status::LBA_OUT_OF_RANGE.to_string(), "Generic: LBA Out of Range (sct 0, sc 0x80)");
        assert_eq!(Status::SUCCESS.name(), "Successful Completion");
        assert_eq!(Status::new(1, 0x02).name(), "Invalid Queue Size");
        assert_eq!(Status::new(1, 0x0a).name(), "Invalid Format");
        assert_eq!(Status::new(2, 0x85).name(), "Compare Failure");
        assert_eq!(Status::new(3, 0x71).name(), "Command Aborted By Host");
        assert_eq!(Status::new(7, 0x00).name(), "vendor specific");
        assert_eq!(Status::new(5, 0x00).name(), "reserved");
        assert_eq!(Status::new(0, 0xc1).name(), "vendor specific");
    }
}
