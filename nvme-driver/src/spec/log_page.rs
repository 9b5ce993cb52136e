//! Log pages (NVMe Base 2.0, 5.16.1): error information, SMART / health, changed namespaces.

use std::mem::offset_of;

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::{Error, Status};

/// Log page identifiers (NVMe Base 2.0, 5.16.1).
pub mod id {
    #![allow(missing_docs)]
    pub const ERROR_INFORMATION: u8 = 0x01;
    pub const SMART_HEALTH: u8 = 0x02;
    pub const FIRMWARE_SLOT: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
}

/// One entry of the Error Information log as the controller writes it (5.16.1.2).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawErrorEntry {
    error_count: U64,
    sq_id: U16,
    command_id: U16,
    status: U16,
    parameter_location: U16,
    lba: U64,
    namespace: U32,
    vendor_log: u8,
    transport: u8,
    _reserved: [u8; 2],
    command_specific: U64,
    transport_specific: U16,
    _reserved2: [u8; 22],
}

const _: () = {
    assert!(size_of::<RawErrorEntry>() == 64);
    assert!(offset_of!(RawErrorEntry, lba) == 16);
    assert!(offset_of!(RawErrorEntry, command_specific) == 32);
};

/// An entry of the Error Information log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorEntry {
    /// Which error this is: counts up over the controller's life, never 0.
    pub count: u64,
    /// Submission queue of the command; `None`: not about a command.
    pub sq_id: Option<u16>,
    /// Command identifier; `None`: not about a command.
    pub command_id: Option<u16>,
    /// The status the command completed with.
    pub status: Status,
    /// First logical block with the error, where that means something.
    pub lba: u64,
    /// Namespace identifier; 0 or FFFFFFFFh: none in particular.
    pub namespace: u32,
}

impl ErrorEntry {
    /// Bytes per entry.
    pub const BYTES: usize = size_of::<RawErrorEntry>();

    /// The valid entries of a log page, newest first. An entry whose count is 0 is empty, and so are those after it.
    pub fn parse(page: &[u8]) -> Vec<ErrorEntry> {
        page.chunks_exact(Self::BYTES)
            .map_while(|bytes| RawErrorEntry::ref_from_bytes(bytes).ok().filter(|raw| raw.error_count.get() != 0))
            .map(|raw| {
                let real = |id: u16| (id != 0xffff).then_some(id);
                ErrorEntry {
                    count: raw.error_count.get(),
                    sq_id: real(raw.sq_id.get()),
                    command_id: real(raw.command_id.get()),
                    status: Status::from_phase_and_status(raw.status.get()),
                    lba: raw.lba.get(),
                    namespace: raw.namespace.get(),
                }
            })
            .collect()
    }
}

/// The SMART / Health Information log as the controller writes it (5.16.1.3).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHealth {
    critical_warning: u8,
    temperature: U16,
    spare: u8,
    spare_threshold: u8,
    used: u8,
    endurance_group_warning: u8,
    _reserved: [u8; 25],
    data_units_read: U128,
    data_units_written: U128,
    host_reads: U128,
    host_writes: U128,
    busy_minutes: U128,
    power_cycles: U128,
    power_on_hours: U128,
    unsafe_shutdowns: U128,
    media_errors: U128,
    error_log_entries: U128,
    warning_temperature_minutes: U32,
    critical_temperature_minutes: U32,
    sensors: [U16; 8],
    _reserved2: [u8; 296],
}

const _: () = {
    assert!(size_of::<RawHealth>() == 512);
    assert!(offset_of!(RawHealth, data_units_read) == 32);
    assert!(offset_of!(RawHealth, unsafe_shutdowns) == 144);
    assert!(offset_of!(RawHealth, warning_temperature_minutes) == 192);
    assert!(offset_of!(RawHealth, sensors) == 200);
};

/// The SMART / Health Information log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Bit 0 spare low, 1 temperature, 2 reliability degraded, 3 read-only, 4 volatile memory backup failed, 5 persistent
    /// memory region read-only.
    pub critical_warning: u8,
    /// Composite temperature in kelvins.
    pub temperature_kelvins: u16,
    /// Spare left, in percent.
    pub spare_percent: u8,
    /// Spare under which the drive warns, in percent.
    pub spare_threshold_percent: u8,
    /// Life used, in percent; may go over 100.
    pub used_percent: u8,
    /// Data read, in units of 1000 × 512 bytes.
    pub data_units_read: u128,
    /// Data written, in units of 1000 × 512 bytes.
    pub data_units_written: u128,
    /// Read commands.
    pub host_reads: u128,
    /// Write commands.
    pub host_writes: u128,
    /// Minutes with commands outstanding.
    pub busy_minutes: u128,
    /// Power cycles.
    pub power_cycles: u128,
    /// Hours switched on.
    pub power_on_hours: u128,
    /// Power lost without a shutdown notification.
    pub unsafe_shutdowns: u128,
    /// Unrecovered data integrity errors.
    pub media_errors: u128,
    /// Error Information entries over the controller's life.
    pub error_log_entries: u128,
    /// Minutes over the warning temperature.
    pub warning_temperature_minutes: u32,
    /// Minutes over the critical temperature.
    pub critical_temperature_minutes: u32,
    /// Temperature sensors 1 to 8 in kelvins; 0: not there.
    pub sensors_kelvins: [u16; 8],
}

impl Health {
    /// Bytes of the log page.
    pub const BYTES: usize = size_of::<RawHealth>();

    /// From the log page's bytes.
    pub fn parse(page: &[u8]) -> Result<Health, Error> {
        let (raw, _) = RawHealth::ref_from_prefix(page)
            .map_err(|_| Error::Untrustworthy(format!("a SMART / health log of {} bytes", page.len())))?;
        Ok(Health {
            critical_warning: raw.critical_warning,
            temperature_kelvins: raw.temperature.get(),
            spare_percent: raw.spare,
            spare_threshold_percent: raw.spare_threshold,
            used_percent: raw.used,
            data_units_read: raw.data_units_read.get(),
            data_units_written: raw.data_units_written.get(),
            host_reads: raw.host_reads.get(),
            host_writes: raw.host_writes.get(),
            busy_minutes: raw.busy_minutes.get(),
            power_cycles: raw.power_cycles.get(),
            power_on_hours: raw.power_on_hours.get(),
            unsafe_shutdowns: raw.unsafe_shutdowns.get(),
            media_errors: raw.media_errors.get(),
            error_log_entries: raw.error_log_entries.get(),
            warning_temperature_minutes: raw.warning_temperature_minutes.get(),
            critical_temperature_minutes: raw.critical_temperature_minutes.get(),
            sensors_kelvins: raw.sensors.map(|sensor| sensor.get()),
        })
    }
}

/// The namespaces that changed since the log was read last (5.16.1.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedNamespaces {
    /// The identifiers of those that changed, in ascending order.
    Some(Vec<u32>),
    /// More than the log has room for: look at all of them.
    TooMany,
}

impl ChangedNamespaces {
    /// Bytes of the log page.
    pub const BYTES: usize = 4096;

    /// From the log page's bytes; identifiers over `max_namespace_id` and out of order are refused.
    pub fn parse(page: &[u8], max_namespace_id: u32) -> Result<ChangedNamespaces, Error> {
        let ids = parse_namespace_list(page, 0, u32::MAX)?;
        match ids.as_slice() {
            [u32::MAX] => Ok(ChangedNamespaces::TooMany),
            // Broadcast behind other entries, or beyond NN: not a namespace.
            [.., last] if *last > max_namespace_id => Err(Error::Untrustworthy(format!(
                "changed namespace list with namespace {last:#x}, NN is {max_namespace_id}"
            ))),
            _ => Ok(ChangedNamespaces::Some(ids)),
        }
    }
}

/// A namespace list (NVMe Base 2.0, 4.5.2): up to 1024 identifiers, ascending, unused entries 0.
///
/// Identifiers have to be over `after` and at most `max`.
pub(crate) fn parse_namespace_list(page: &[u8], after: u32, max: u32) -> Result<Vec<u32>, Error> {
    let mut ids = Vec::new();
    let mut last = after;
    for entry in page.chunks_exact(4) {
        let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        if id == 0 {
            break;
        }
        if id <= last || id > max {
            return Err(Error::Untrustworthy(format!(
                "namespace list with {id:#x} after {last:#x}; identifiers have to ascend and be at most {max:#x} (NN)"
            )));
        }
        ids.push(id);
        last = id;
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ids: &[u32]) -> Vec<u8> {
        let mut page = vec![0; 4096];
        for (index, id) in ids.iter().enumerate() {
            page[4 * index..4 * index + 4].copy_from_slice(&id.to_le_bytes());
        }
        page
    }

    #[test]
    fn error_entries_end_at_the_first_empty_one() {
        let mut page = vec![0u8; 4 * 64];
        page[0..8].copy_from_slice(&9u64.to_le_bytes());
        page[8..10].copy_from_slice(&3u16.to_le_bytes());
        page[10..12].copy_from_slice(&0x77u16.to_le_bytes());
        page[12..14].copy_from_slice(&(1u16 | 0x281 << 1).to_le_bytes());
        page[16..24].copy_from_slice(&0x1234u64.to_le_bytes());
        page[24..28].copy_from_slice(&1u32.to_le_bytes());
        page[64..72].copy_from_slice(&8u64.to_le_bytes());
        page[72..76].copy_from_slice(&[0xff; 4]);
        page[192..200].copy_from_slice(&7u64.to_le_bytes());
        let entries = ErrorEntry::parse(&page);
        assert_eq!(entries.len(), 2, "the third is empty, so the fourth is not looked at");
        assert_eq!(
            entries[0],
            ErrorEntry {
                count: 9,
                sq_id: Some(3),
                command_id: Some(0x77),
                status: Status::UNRECOVERED_READ,
                lba: 0x1234,
                namespace: 1
            }
        );
        assert_eq!((entries[1].sq_id, entries[1].command_id), (None, None));
    }

    #[test]
    fn health_is_read_from_its_offsets() {
        let mut page = vec![0u8; 512];
        page[0] = 4;
        page[1..3].copy_from_slice(&310u16.to_le_bytes());
        page[3..6].copy_from_slice(&[90, 10, 120]);
        page[48..64].copy_from_slice(&(1u128 << 100).to_le_bytes());
        page[144] = 5;
        page[160] = 6;
        page[196] = 7;
        page[214..216].copy_from_slice(&299u16.to_le_bytes());
        let health = Health::parse(&page).unwrap();
        assert_eq!(health.critical_warning, 4);
        assert_eq!(health.temperature_kelvins, 310);
        assert_eq!((health.spare_percent, health.spare_threshold_percent, health.used_percent), (90, 10, 120));
        assert_eq!(health.data_units_written, 1 << 100);
        assert_eq!((health.unsafe_shutdowns, health.media_errors), (5, 6));
        assert_eq!(health.critical_temperature_minutes, 7);
        assert_eq!(health.sensors_kelvins[7], 299);
        assert!(Health::parse(&page[..511]).is_err());
    }

    #[test]
    fn namespace_lists_have_to_ascend_and_stay_within_nn() {
        assert_eq!(parse_namespace_list(&list(&[1, 2, 9]), 0, 9).unwrap(), [1, 2, 9]);
        assert!(parse_namespace_list(&list(&[]), 0, 9).unwrap().is_empty());
        for bad in [&[2, 1][..], &[1, 1], &[10], &[1, 2, 3, u32::MAX]] {
            assert!(parse_namespace_list(&list(bad), 0, 9).is_err(), "{bad:?}");
        }
        assert!(parse_namespace_list(&list(&[4]), 4, 9).is_err(), "not greater than where the list was to begin");
        let full: Vec<u32> = (1..=1024).collect();
        assert_eq!(parse_namespace_list(&list(&full), 0, 1024).unwrap(), full);
    }

    #[test]
    fn changed_namespaces() {
        let parse = |ids: &[u32]| ChangedNamespaces::parse(&list(ids), 9);
        assert_eq!(parse(&[3, 9]).unwrap(), ChangedNamespaces::Some(vec![3, 9]));
        assert_eq!(parse(&[]).unwrap(), ChangedNamespaces::Some(vec![]));
        assert_eq!(parse(&[u32::MAX]).unwrap(), ChangedNamespaces::TooMany);
        assert!(parse(&[1, u32::MAX]).is_err());
        assert!(parse(&[10]).is_err());
    }
}
