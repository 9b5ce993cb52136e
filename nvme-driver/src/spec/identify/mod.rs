//! Identify data structures (NVMe Base 2.0, 5.17; NVM Command Set 1.0, 4.1.5): as the drive writes them, and checked.
//!
//! The raw structures are only views of the bytes; nothing is believed until it went through [`ControllerIdentity`] or
//! [`Namespace`](crate::Namespace).

mod descriptors;
mod namespace;

use std::mem::offset_of;
use std::time::Duration;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::quirks::{Function, Quirk, Quirks};
use crate::spec::registers::Version;
use crate::{Error, Options, SglAlignment};

pub(crate) use descriptors::Descriptors;
pub(crate) use namespace::{NamespaceContext, RawNamespace};

/// Every Identify data structure has this many bytes.
pub const BYTES: usize = 4096;

/// Controller or Namespace Structure values (NVMe Base 2.0, 5.17).
pub mod cns {
    #![allow(missing_docs)]
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
}

/// Identify Controller, CNS 01h (NVMe Base 2.0, figure 275): the fields this driver looks at.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawController {
    vendor: U16,
    subsystem_vendor: U16,
    serial: [u8; 20],
    model: [u8; 40],
    firmware: [u8; 8],
    _rab_to_cmic: [u8; 5],
    mdts: u8,
    controller_id: U16,
    version: U32,
    _rtd3r: U32,
    rtd3e: U32,
    oaes: U32,
    _ctratt: [u8; 32],
    retry_delays: [U16; 3],
    _rest_to_oacs: [u8; 122],
    oacs: U16,
    acl: u8,
    aerl: u8,
    _frmw: u8,
    lpa: u8,
    elpe: u8,
    _npss: [u8; 3],
    warning_temperature: U16,
    critical_temperature: U16,
    mtfa: U16,
    _rest_to_sqes: [u8; 240],
    sqes: u8,
    cqes: u8,
    _maxcmd: U16,
    nn: U32,
    oncs: U16,
    _fuses: U16,
    fna: u8,
    vwc: u8,
    _awun: [u8; 2],
    awupf: U16,
    _icsvscc: [u8; 6],
    sgls: U32,
    mnan: U32,
    _reserved: [u8; 224],
    subsystem_name: [u8; 256],
    _rest: [u8; 3072],
}

const _: () = {
    assert!(size_of::<RawController>() == BYTES);
    assert!(offset_of!(RawController, serial) == 4);
    assert!(offset_of!(RawController, model) == 24);
    assert!(offset_of!(RawController, firmware) == 64);
    assert!(offset_of!(RawController, mdts) == 77);
    assert!(offset_of!(RawController, controller_id) == 78);
    assert!(offset_of!(RawController, version) == 80);
    assert!(offset_of!(RawController, rtd3e) == 88);
    assert!(offset_of!(RawController, oaes) == 92);
    assert!(offset_of!(RawController, retry_delays) == 128);
    assert!(offset_of!(RawController, oacs) == 256);
    assert!(offset_of!(RawController, acl) == 258);
    assert!(offset_of!(RawController, aerl) == 259);
    assert!(offset_of!(RawController, lpa) == 261);
    assert!(offset_of!(RawController, elpe) == 262);
    assert!(offset_of!(RawController, warning_temperature) == 266);
    assert!(offset_of!(RawController, mtfa) == 270);
    assert!(offset_of!(RawController, sqes) == 512);
    assert!(offset_of!(RawController, nn) == 516);
    assert!(offset_of!(RawController, oncs) == 520);
    assert!(offset_of!(RawController, fna) == 524);
    assert!(offset_of!(RawController, vwc) == 525);
    assert!(offset_of!(RawController, awupf) == 528);
    assert!(offset_of!(RawController, sgls) == 536);
    assert!(offset_of!(RawController, mnan) == 540);
    assert!(offset_of!(RawController, subsystem_name) == 768);
};

/// I/O Command Set specific Identify Controller, CNS 06h for the NVM Command Set (NVM Command Set 1.0, 4.1.5).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawNvmController {
    vsl: u8,
    wzsl: u8,
    _wusl: u8,
    dmrl: u8,
    dmrsl: U32,
    dmsl: U64,
    _rest: [u8; 4080],
}

const _: () = {
    assert!(size_of::<RawNvmController>() == BYTES);
    assert!(offset_of!(RawNvmController, dmrsl) == 4);
    assert!(offset_of!(RawNvmController, dmsl) == 8);
};

/// Sizes beyond which a command without data transfer is refused by the controller (CNS 06h), in its own units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CommandLimits {
    /// Bytes per Verify.
    pub verify_bytes: Option<u64>,
    /// Bytes per Write Zeroes.
    pub write_zeroes_bytes: Option<u64>,
    /// Ranges per Dataset Management: 1 to 256.
    pub discard_ranges: u16,
    /// Logical blocks per range of Dataset Management.
    pub discard_range_blocks: u32,
    /// Logical blocks per Dataset Management.
    pub discard_blocks: u64,
}

impl CommandLimits {
    /// What holds when the controller reports no limits.
    pub(crate) const NONE: CommandLimits = CommandLimits {
        verify_bytes: None,
        write_zeroes_bytes: None,
        discard_ranges: 256,
        discard_range_blocks: u32::MAX,
        discard_blocks: u64::MAX,
    };

    /// Is any of these limits tighter than it was?
    pub(crate) fn less_than(&self, before: &CommandLimits) -> bool {
        let bytes = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
        bytes(self.verify_bytes) < bytes(before.verify_bytes)
            || bytes(self.write_zeroes_bytes) < bytes(before.write_zeroes_bytes)
            || self.discard_ranges < before.discard_ranges
            || self.discard_range_blocks < before.discard_range_blocks
            || self.discard_blocks < before.discard_blocks
    }

    /// From CNS 06h; 0 means no limit in each field. `page_size_min` is CAP.MPSMIN.
    pub(crate) fn parse(raw: &RawNvmController, page_size_min: u8) -> CommandLimits {
        let or = |value: u64, none: u64| if value == 0 { none } else { value };
        CommandLimits {
            verify_bytes: pages(raw.vsl, page_size_min),
            write_zeroes_bytes: pages(raw.wzsl, page_size_min),
            discard_ranges: or(raw.dmrl.into(), 256) as u16,
            discard_range_blocks: or(raw.dmrsl.get().into(), u32::MAX.into()) as u32,
            discard_blocks: or(raw.dmsl.get(), u64::MAX),
        }
    }
}

/// `1 << exponent` pages of `4096 << page_size_min` bytes; `None`: 0 (no limit), or more than any command can say.
fn pages(exponent: u8, page_size_min: u8) -> Option<u64> {
    let shift = u32::from(exponent) + 12 + u32::from(page_size_min & 0xf);
    // 65536 blocks of 4096 bytes, the most a command can ask for, are 1 << 28 bytes.
    (exponent != 0 && shift <= 28).then(|| 1 << shift)
}

/// What a controller says of itself, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ControllerIdentity {
    /// PCI vendor identifier (VID).
    pub vendor: u16,
    /// Serial number, without the padding; characters other than printable ASCII are replaced by `?`.
    pub serial: String,
    /// Model number, without the padding; characters other than printable ASCII are replaced by `?`.
    pub model: String,
    /// Firmware revision, without the padding; characters other than printable ASCII are replaced by `?`.
    pub firmware: String,
    /// Name of the NVM subsystem (SUBNQN); empty when the controller gives none.
    pub subsystem_name: String,
    /// Controller identifier (CNTLID).
    pub controller_id: u16,
    /// Version of the specification the controller follows.
    pub version: Version,
    /// Bytes per data transfer command (MDTS); `None`: bounded by the command only.
    pub max_transfer: Option<u32>,
    /// What its scatter gather lists can say (SGLS bits 1:0); `None`: it takes PRPs only.
    pub sgl: Option<SglAlignment>,
    /// Largest possible namespace identifier (NN).
    pub max_namespace_id: u32,
    /// Namespaces that can be active at once (MNAN); 0: not said.
    pub max_active_namespaces: u32,
    /// There is a volatile write cache (VWC bit 0); whether it is enabled is a feature.
    pub volatile_write_cache: bool,
    /// Compare.
    pub supports_compare: bool,
    /// Dataset Management.
    pub supports_discard: bool,
    /// Write Zeroes.
    pub supports_write_zeroes: bool,
    /// Verify.
    pub supports_verify: bool,
    /// Format NVM.
    pub supports_format: bool,
    /// A format of one namespace formats all of them (FNA bit 0).
    pub formats_all_namespaces: bool,
    /// A format of one namespace that erases erases all of them (FNA bit 1).
    pub erases_all_namespaces: bool,
    /// A format can erase by throwing the key away (FNA bit 2).
    pub supports_cryptographic_erase: bool,
    /// Namespace Management and Attachment.
    pub supports_namespace_management: bool,
    /// Doorbell Buffer Config.
    pub supports_shadow_doorbells: bool,
    /// Get Features can tell default, saved values and capabilities (ONCS bit 4).
    pub supports_feature_select: bool,
    /// Events about namespaces that changed (OAES bit 8).
    pub namespace_events: bool,
    /// Events about firmware activation (OAES bit 9).
    pub firmware_events: bool,
    /// Abort commands outstanding at once: 1 to 256.
    pub abort_limit: u16,
    /// Asynchronous event requests outstanding at once: 1 to 256.
    pub event_limit: u16,
    /// Log pages can be read from an offset, and more than 4 KiB at once (LPA bit 2).
    pub log_page_offsets: bool,
    /// Entries of the error log: 1 to 256.
    pub error_log_entries: u16,
    /// Temperature at which the drive warns, in kelvins (WCTEMP); `None`: not said.
    pub warning_temperature: Option<u16>,
    /// Temperature at which the drive may stop (CCTEMP).
    pub critical_temperature: Option<u16>,
    /// How long a shutdown usually takes (RTD3E); `None`: not said.
    pub shutdown_time: Option<Duration>,
    /// How long to wait before a command is tried again, for each value of the status field's retry delay from 1 on (CRDT1 to
    /// CRDT3).
    pub retry_delays: [Duration; 3],
    /// Blocks written as a unit even over a power failure (AWUPF): 1 to 65536.
    pub atomic_write_blocks: u32,
    /// How long the controller may pause to activate firmware (MTFA; CSTS.PP says that it does); `None`: not said.
    pub activation_time: Option<Duration>,
    /// What is known of it from elsewhere; what follows from it and from [`Options`] shows in the abilities here.
    pub quirks: Quirks,
}

impl ControllerIdentity {
    /// Checks what the controller answered. `page_size_min` is CAP.MPSMIN, `version` the VS register.
    pub(crate) fn parse(raw: &RawController, page_size_min: u8, version: Version) -> Result<ControllerIdentity, Error> {
        // Both are a pair of nibbles: smallest and largest size as powers of two. Ours are 64 and 16 bytes.
        let allows = |sizes: u8, wanted: u8| sizes & 0xf <= wanted && wanted <= sizes >> 4;
        if !allows(raw.sqes, SQ_ENTRY_SHIFT) || !allows(raw.cqes, CQ_ENTRY_SHIFT) {
            return Err(Error::Unsupported(format!(
                "queue entries of 64 and 16 bytes (SQES {:#04x}, CQES {:#04x}; NVM needs 6 and 4 in their ranges)",
                raw.sqes, raw.cqes
            )));
        }
        if raw.nn.get() == 0 || raw.nn.get() > MAX_NAMESPACE_ID {
            return Err(Error::Untrustworthy(format!("number of namespaces (NN) {:#x}", raw.nn.get())));
        }
        let oncs = raw.oncs.get();
        let oacs = raw.oacs.get();
        Ok(ControllerIdentity {
            vendor: raw.vendor.get(),
            serial: text(&raw.serial),
            model: text(&raw.model),
            firmware: text(&raw.firmware),
            subsystem_name: text(&raw.subsystem_name),
            controller_id: raw.controller_id.get(),
            // VER came with 1.2; older controllers leave it 0.
            version: if raw.version.get() == 0 { version } else { Version(raw.version.get()) },
            max_transfer: pages(raw.mdts, page_size_min).and_then(|bytes| u32::try_from(bytes).ok()),
            sgl: match raw.sgls.get() & 3 {
                1 => Some(SglAlignment::Byte),
                2 => Some(SglAlignment::Dword),
                _ => None,
            },
            max_namespace_id: raw.nn.get(),
            max_active_namespaces: raw.mnan.get(),
            volatile_write_cache: raw.vwc & 1 != 0,
            supports_compare: oncs & 1 != 0,
            supports_discard: oncs & 1 << 2 != 0,
            supports_write_zeroes: oncs & 1 << 3 != 0,
            supports_feature_select: oncs & 1 << 4 != 0,
            supports_verify: oncs & 1 << 7 != 0,
            supports_format: oacs & 1 << 1 != 0,
            supports_namespace_management: oacs & 1 << 3 != 0,
            supports_shadow_doorbells: oacs & 1 << 8 != 0,
            formats_all_namespaces: raw.fna & 1 != 0,
            erases_all_namespaces: raw.fna & 1 << 1 != 0,
            supports_cryptographic_erase: raw.fna & 1 << 2 != 0,
            namespace_events: raw.oaes.get() & 1 << 8 != 0,
            firmware_events: raw.oaes.get() & 1 << 9 != 0,
            abort_limit: u16::from(raw.acl) + 1,
            event_limit: u16::from(raw.aerl) + 1,
            log_page_offsets: raw.lpa & 1 << 2 != 0,
            error_log_entries: u16::from(raw.elpe) + 1,
            warning_temperature: Some(raw.warning_temperature.get()).filter(|&kelvins| kelvins != 0),
            critical_temperature: Some(raw.critical_temperature.get()).filter(|&kelvins| kelvins != 0),
            // In units of 100 ms.
            retry_delays: raw.retry_delays.map(|time| Duration::from_millis(100) * u32::from(time.get())),
            shutdown_time: Some(Duration::from_micros(raw.rtd3e.get().into())).filter(|time| !time.is_zero()),
            atomic_write_blocks: u32::from(raw.awupf.get()) + 1,
            activation_time: Some(Duration::from_millis(100) * u32::from(raw.mtfa.get()))
                .filter(|time| !time.is_zero()),
            quirks: Quirks::NONE,
        })
    }

    /// Looks up what else is known of the drive, and takes away the abilities that are not to be used.
    pub(crate) fn restrict(mut self, function: Function, options: &Options) -> ControllerIdentity {
        self.quirks = Quirks::of_drive(function, &self.model, &self.firmware);
        let usable = |wanted: Option<bool>, quirk| wanted.unwrap_or(!self.quirks.has(quirk));
        let (sgl, discard, write_zeroes) = (
            usable(options.sgl, Quirk::NoSgl),
            usable(options.discard, Quirk::NoDiscard),
            usable(options.write_zeroes, Quirk::NoWriteZeroes),
        );
        self.sgl = self.sgl.filter(|_| sgl);
        self.supports_discard &= discard;
        self.supports_write_zeroes &= write_zeroes;
        self
    }
}

impl ControllerIdentity {
    /// What queue pairs and namespaces were made for when the controller was as `before`, and does not hold any more: new
    /// firmware may have come with a reset.
    pub(crate) fn broken_promise(&self, before: &ControllerIdentity) -> Option<&'static str> {
        let limit = |identity: &ControllerIdentity| identity.max_transfer.unwrap_or(u32::MAX);
        if limit(self) < limit(before) {
            return Some("a smaller largest transfer (MDTS)");
        }
        if before.sgl.is_some() && self.sgl != before.sgl {
            return Some("other scatter gather lists (SGLS)");
        }
        // Nobody would flush it.
        if self.volatile_write_cache && !before.volatile_write_cache {
            return Some("a volatile write cache (VWC)");
        }
        None
    }
}

/// Submission entries are `1 << 6` bytes.
pub(crate) const SQ_ENTRY_SHIFT: u8 = 6;
/// Completion entries are `1 << 4` bytes.
pub(crate) const CQ_ENTRY_SHIFT: u8 = 4;
/// FFFFFFFFh is the broadcast identifier.
const MAX_NAMESPACE_ID: u32 = 0xffff_fffe;

/// A text field: ASCII, padded with spaces (some pad with zeroes).
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let text: String =
        bytes[..end].iter().map(|&byte| if matches!(byte, b' '..=b'~') { byte as char } else { '?' }).collect();
    text.trim().to_string()
}

#[cfg(test)]
mod tests;
