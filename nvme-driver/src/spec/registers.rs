//! Controller registers in BAR0 (NVMe Base 2.0, 3.1.3) and the doorbells (NVMe over PCIe Transport 1.0, 3.1.2).

use std::time::Duration;

use bitfield_struct::bitfield;

/// Offsets in BAR0, in bytes (NVMe Base 2.0, 3.1.3).
pub mod offset {
    /// Controller Capabilities, 64 bits.
    pub const CAP: u64 = 0x00;
    /// Version, 32 bits.
    pub const VS: u64 = 0x08;
    /// Controller Configuration, 32 bits.
    pub const CC: u64 = 0x14;
    /// Controller Status, 32 bits.
    pub const CSTS: u64 = 0x1c;
    /// Admin Queue Attributes, 32 bits.
    pub const AQA: u64 = 0x24;
    /// Admin Submission Queue base address, 64 bits.
    pub const ASQ: u64 = 0x28;
    /// Admin Completion Queue base address, 64 bits.
    pub const ACQ: u64 = 0x30;
    /// Controller Ready Timeouts, 32 bits.
    pub const CRTO: u64 = 0x68;
    /// The first doorbell.
    pub const DOORBELLS: u64 = 0x1000;
}

/// Controller Capabilities (CAP; NVMe Base 2.0, 3.1.3.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Capabilities {
    /// MQES: entries a queue can have, zero-based.
    #[bits(16)]
    pub max_queue_entries_minus_one: u16,
    /// CQR: queues have to be physically contiguous.
    pub contiguous_queues_required: bool,
    #[bits(2)]
    pub arbitration: u8,
    #[bits(5)]
    __: u8,
    /// TO: the longest time to become ready or not ready, in 500 ms.
    pub timeout: u8,
    /// DSTRD: the distance of two doorbells is `4 << DSTRD` bytes.
    #[bits(4)]
    pub doorbell_stride: u8,
    pub subsystem_reset: bool,
    /// CSS: bit 0 NVM Command Set, bit 6 I/O command sets by Identify, bit 7 admin commands only.
    pub command_sets: u8,
    pub boot_partitions: bool,
    #[bits(2)]
    pub power_scope: u8,
    /// MPSMIN: the smallest memory page is `4096 << MPSMIN` bytes.
    #[bits(4)]
    pub page_size_min: u8,
    /// MPSMAX: the largest memory page is `4096 << MPSMAX` bytes.
    #[bits(4)]
    pub page_size_max: u8,
    pub persistent_memory: bool,
    pub memory_buffer: bool,
    pub subsystem_shutdown: bool,
    /// CRMS: bit 0 the controller can be ready with media, bit 1 independent of media; with bit 0 CRTO is there.
    #[bits(2)]
    pub ready_modes: u8,
    #[bits(3)]
    __: u8,
}

impl Capabilities {
    /// Entries a queue can have: 2 to 65536. A queue of one entry (MQES 0) could hold nothing; drives that say so take 64.
    pub fn max_queue_entries(&self) -> u32 {
        match self.max_queue_entries_minus_one() {
            0 => 64,
            most => u32::from(most) + 1,
        }
    }

    /// Time to become ready or not ready by TO; at least one unit, since a few controllers report 0.
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_millis(500) * u32::from(self.timeout().max(1))
    }
}

/// Controller Configuration (CC; NVMe Base 2.0, 3.1.3.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Configuration {
    /// EN.
    pub enable: bool,
    #[bits(3)]
    __: u8,
    /// CSS: 0 NVM Command Set, 6 all supported I/O command sets, 7 admin only.
    #[bits(3)]
    pub command_set: u8,
    /// MPS: the memory page is `4096 << MPS` bytes.
    #[bits(4)]
    pub page_size: u8,
    #[bits(3)]
    pub arbitration: u8,
    /// SHN: 0 none, 1 normal, 2 abrupt.
    #[bits(2)]
    pub shutdown: u8,
    /// IOSQES: a submission entry is `1 << IOSQES` bytes.
    #[bits(4)]
    pub sq_entry_shift: u8,
    /// IOCQES: a completion entry is `1 << IOCQES` bytes.
    #[bits(4)]
    pub cq_entry_shift: u8,
    pub ready_independent_of_media: bool,
    #[bits(7)]
    __: u8,
}

/// Controller Status (CSTS; NVMe Base 2.0, 3.1.3.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ControllerStatus {
    /// RDY.
    pub ready: bool,
    /// CFS: a fatal error; only a reset helps.
    pub fatal: bool,
    /// SHST: 0 no shutdown, 1 in progress, 2 complete.
    #[bits(2)]
    pub shutdown: u8,
    pub subsystem_reset_occurred: bool,
    pub processing_paused: bool,
    pub shutdown_type: bool,
    #[bits(25)]
    __: u32,
}

impl ControllerStatus {
    /// What a read gives when the device is gone: no status register can have its reserved bits all set.
    pub fn is_gone(&self) -> bool {
        self.into_bits() == u32::MAX
    }
}

/// SHST: shutdown complete.
pub const SHUTDOWN_COMPLETE: u8 = 2;
/// SHN: normal shutdown.
pub const SHUTDOWN_NORMAL: u8 = 1;

/// Admin Queue Attributes (AQA; NVMe Base 2.0, 3.1.3.8) for queues of `entries` (2 to 4096) each.
pub fn admin_queue_attributes(entries: u16) -> u32 {
    let size = u32::from(entries.saturating_sub(1) & 0xfff);
    size << 16 | size
}

/// Version (VS; NVMe Base 2.0, 3.1.3.2): 2.1.0 compares greater than 1.4.0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u32);

impl Version {
    /// A version from its parts.
    pub const fn new(major: u16, minor: u8) -> Version {
        Version((major as u32) << 16 | (minor as u32) << 8)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 >> 16, self.0 >> 8 & 0xff, self.0 & 0xff)
    }
}

/// Byte offset in BAR0 of the submission queue tail doorbell of queue `id`.
pub fn sq_doorbell(id: u16, stride: u8) -> u64 {
    offset::DOORBELLS + 2 * u64::from(id) * (4 << stride)
}

/// Byte offset in BAR0 of the completion queue head doorbell of queue `id`.
pub fn cq_doorbell(id: u16, stride: u8) -> u64 {
    offset::DOORBELLS + (2 * u64::from(id) + 1) * (4 << stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_fields_lie_where_the_specification_puts_them() {
        let cap = Capabilities::from_bits(
            0x03ff | 1 << 16 | 0x28 << 24 | 3 << 32 | 1 << 36 | 0x41 << 37 | 1 << 48 | 4 << 52 | 1 << 57 | 1 << 59,
        );
        assert_eq!(cap.max_queue_entries(), 1024);
        assert!(cap.contiguous_queues_required() && cap.subsystem_reset() && cap.memory_buffer());
        assert!(!cap.persistent_memory() && !cap.boot_partitions());
        assert_eq!(cap.ready_timeout(), Duration::from_secs(20));
        assert_eq!((cap.doorbell_stride(), cap.command_sets(), cap.ready_modes()), (3, 0x41, 1));
        assert_eq!((cap.page_size_min(), cap.page_size_max()), (1, 4));
        assert_eq!(Capabilities::from_bits(0).ready_timeout(), Duration::from_millis(500));
        assert_eq!(Capabilities::from_bits(u64::MAX).max_queue_entries(), 65536);
        assert_eq!(Capabilities::from_bits(0).max_queue_entries(), 64);
        assert_eq!(Capabilities::from_bits(1).max_queue_entries(), 2);
    }

    #[test]
    fn configuration_and_status_fields_lie_where_the_specification_puts_them() {
        let cc = Configuration::new()
            .with_enable(true)
            .with_command_set(6)
            .with_page_size(2)
            .with_shutdown(1)
            .with_sq_entry_shift(6)
            .with_cq_entry_shift(4);
        assert_eq!(cc.into_bits(), 1 | 6 << 4 | 2 << 7 | 1 << 14 | 6 << 16 | 4 << 20);
        let csts = ControllerStatus::from_bits(0b1011);
        assert!(csts.ready() && csts.fatal() && !csts.is_gone());
        assert_eq!(csts.shutdown(), SHUTDOWN_COMPLETE);
        assert!(ControllerStatus::from_bits(u32::MAX).is_gone());
        assert_eq!(admin_queue_attributes(32), 31 << 16 | 31);
    }

    #[test]
    fn doorbells_follow_the_stride() {
        assert_eq!((sq_doorbell(0, 0), cq_doorbell(0, 0), sq_doorbell(1, 0)), (0x1000, 0x1004, 0x1008));
        assert_eq!((sq_doorbell(2, 4), cq_doorbell(2, 4)), (0x1000 + 4 * 64, 0x1000 + 5 * 64));
    }

    #[test]
    fn versions_compare() {
        assert!(Version::new(2, 0) > Version::new(1, 4));
        assert_eq!(Version(0x0001_0301).to_string(), "1.3.1");
    }
}
