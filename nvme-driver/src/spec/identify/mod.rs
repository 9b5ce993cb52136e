//! Identify data structures (NVMe Base 2.0, 5.17; NVM Command Set 1.0, 4.1.5): as the drive writes them, and checked.
//!
//! The raw structures are only views of the bytes; nothing is believed until it went through [`ControllerIdentity`] or
//! [`Namespace`].

mod descriptors;

use std::mem::offset_of;
use std::time::Duration;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::quirks::{Function, Quirk, Quirks};
use crate::spec::registers::Version;
use crate::{Error, Namespace, Options, SglAlignment};

pub(crate) use descriptors::Descriptors;

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

/// Identify Namespace, CNS 00h (NVM Command Set 1.0, figure 97).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawNamespace {
    nsze: U64,
    ncap: U64,
    _nuse: U64,
    nsfeat: u8,
    nlbaf: u8,
    flbas: u8,
    _mc: u8,
    _dpc: u8,
    dps: u8,
    _nmic: u8,
    _rescap: u8,
    _fpi: u8,
    dlfeat: u8,
    _nawun: U16,
    nawupf: U16,
    _nacwu: U16,
    _nabsn: U16,
    nabo: U16,
    nabspf: U16,
    noiob: U16,
    _nvmcap: [u8; 16],
    npwg: U16,
    npwa: U16,
    npdg: U16,
    npda: U16,
    nows: U16,
    _mssrl: [u8; 25],
    nsattr: u8,
    _nvmsetid: [u8; 4],
    nguid: [u8; 16],
    eui64: [u8; 8],
    formats: [RawFormat; 64],
    _rest: [u8; 3712],
}

/// An LBA format (NVM Command Set 1.0, 4.1.5.1).
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFormat {
    metadata: U16,
    /// LBADS: a block is `1 << shift` bytes.
    shift: u8,
    performance: u8,
}

const _: () = {
    assert!(size_of::<RawNamespace>() == BYTES);
    assert!(offset_of!(RawNamespace, nsfeat) == 24);
    assert!(offset_of!(RawNamespace, flbas) == 26);
    assert!(offset_of!(RawNamespace, dps) == 29);
    assert!(offset_of!(RawNamespace, dlfeat) == 33);
    assert!(offset_of!(RawNamespace, nawupf) == 36);
    assert!(offset_of!(RawNamespace, nabo) == 42);
    assert!(offset_of!(RawNamespace, nabspf) == 44);
    assert!(offset_of!(RawNamespace, noiob) == 46);
    assert!(offset_of!(RawNamespace, npwg) == 64);
    assert!(offset_of!(RawNamespace, nows) == 72);
    assert!(offset_of!(RawNamespace, nsattr) == 99);
    assert!(offset_of!(RawNamespace, nguid) == 104);
    assert!(offset_of!(RawNamespace, eui64) == 120);
    assert!(offset_of!(RawNamespace, formats) == 128);
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

/// Everything needed besides the namespace's own structure to make a [`Namespace`].
pub(crate) struct NamespaceContext<'a> {
    pub id: u32,
    pub identity: &'a ControllerIdentity,
    pub limits: &'a CommandLimits,
    pub descriptors: &'a Descriptors,
    /// The write cache is there and enabled.
    pub write_cache_enabled: bool,
}

impl Namespace {
    /// Checks what the drive answered; refuses formats that cannot be served.
    pub(crate) fn parse(raw: &RawNamespace, context: &NamespaceContext<'_>) -> Result<Namespace, Error> {
        let &NamespaceContext { id, identity, limits, descriptors, write_cache_enabled } = context;
        let refuse = |reason: String| Error::Format { namespace: id, reason };
        if let Some(set) = descriptors.command_set.filter(|&set| set != 0) {
            return Err(refuse(format!(
                "it belongs to I/O command set {set} (2 is zoned, 1 key value); only the NVM Command Set (0) is served"
            )));
        }
        let blocks = raw.nsze.get();
        if blocks == 0 {
            return Err(refuse("its size (NSZE) is 0: it is not active, or not formatted".into()));
        }
        let block_shift = raw.block_shift().map_err(refuse)?;
        if blocks > (i64::MAX as u64) >> block_shift {
            return Err(refuse(format!(
                "its size (NSZE) of {blocks:#x} blocks of {} bytes overflows",
                1u64 << block_shift
            )));
        }

        // The preferred sizes count logical blocks, zero-based, and are there only with OPTPERF (NSFEAT bit 4).
        let optperf = raw.nsfeat & 1 << 4 != 0;
        let block_bytes = 1u32 << block_shift;
        let bytes_of = |field: U16| (u32::from(field.get()) + 1) * block_bytes;
        let preferred = |field: U16| if optperf { bytes_of(field) } else { block_bytes };
        // What is written without tearing over a power failure: the namespace's own values count where it has some (NSABP, bit 1).
        let own = raw.nsfeat & 1 << 1 != 0;
        let atomic_blocks = match raw.nawupf.get() {
            0 => identity.atomic_write_blocks,
            _ if !own => identity.atomic_write_blocks,
            blocks => u32::from(blocks) + 1,
        };
        let boundary = own.then_some((raw.nabspf.get(), raw.nabo.get()));
        let atomic = untorn(atomic_blocks, boundary).saturating_mul(block_bytes);
        let granularity = preferred(raw.npwg);
        let has = |quirk| identity.quirks.has(quirk);
        // Not in the list of the specification's own boundaries; a drive that has one of those knows better.
        let stripe = identity.max_transfer.filter(|bytes| has(Quirk::Striped) && bytes.is_power_of_two());
        let boundary_blocks = match u32::from(raw.noiob.get()) {
            0 => stripe.map_or(0, |bytes| bytes >> block_shift),
            blocks => blocks,
        };
        let commands_blocks = |bytes: Option<u64>| {
            bytes.map_or(MAX_BLOCKS_PER_COMMAND, |bytes| {
                ((bytes >> block_shift) as u32).clamp(1, MAX_BLOCKS_PER_COMMAND)
            })
        };
        let reads_zeroes = raw.dlfeat & 7 == 1;
        let given = |id: &[u8]| !has(Quirk::UntrueIdentifiers) && id.iter().any(|&byte| byte != 0);
        Ok(Namespace {
            id,
            blocks,
            block_shift,
            boundary_blocks,
            physical_block_bytes: physical_block(atomic, granularity, block_bytes),
            write_granularity_bytes: granularity,
            write_alignment_bytes: preferred(raw.npwa),
            // One block is what drives say that do not care.
            optimal_io_bytes: if optperf && raw.nows.get() != 0 { bytes_of(raw.nows) } else { 0 },
            discard_granularity_bytes: preferred(raw.npdg),
            discard_alignment_bytes: preferred(raw.npda),
            max_discard_ranges: limits.discard_ranges,
            max_discard_range_blocks: limits.discard_range_blocks,
            // More is the same blocks again, and a drive may take its time for each.
            max_discard_blocks: limits.discard_blocks.min(blocks).max(1),
            max_write_zeroes_blocks: commands_blocks(limits.write_zeroes_bytes),
            max_verify_blocks: commands_blocks(limits.verify_bytes),
            volatile_write_cache: write_cache_enabled,
            discard: identity.supports_discard,
            write_zeroes: identity.supports_write_zeroes,
            write_zeroes_deallocates: raw.dlfeat & 1 << 3 != 0 && reads_zeroes && !has(Quirk::NoDeallocatingZeroes),
            discard_reads_zeroes: reads_zeroes,
            compare: identity.supports_compare,
            verify: identity.supports_verify,
            read_only: raw.nsattr & 1 != 0,
            eui64: descriptors.eui64.or(Some(raw.eui64)).filter(|id| given(id)),
            nguid: descriptors.nguid.or(Some(raw.nguid)).filter(|id| given(id)),
            uuid: descriptors.uuid.filter(|id| given(id)),
        })
    }
}

impl RawNamespace {
    /// The block size of the format in use, as a power of two, or why it cannot be served.
    fn block_shift(&self) -> Result<u8, String> {
        // The low four bits, and two more when there are over 16 formats (FLBAS; NVM Command Set 1.0, figure 97).
        let high = if self.nlbaf > 15 { self.flbas >> 5 & 3 } else { 0 };
        let index = self.flbas & 0xf | high << 4;
        if index > self.nlbaf {
            return Err(format!(
                "it says that it uses LBA format {index}, and that it has {} formats",
                u16::from(self.nlbaf) + 1
            ));
        }
        let format = &self.formats[usize::from(index)];
        let (shift, metadata, protection) = (format.shift, format.metadata.get(), self.dps & 7);
        let size = if shift < 32 { format!("{} bytes", 1u64 << shift) } else { format!("2^{shift} bytes") };
        let advice = "format it with 512 or 4096 bytes per block, without metadata";
        if metadata != 0 {
            return Err(format!("LBA format {index} has {size} per block and {metadata} bytes of metadata; {advice}"));
        }
        if protection != 0 {
            return Err(format!(
                "LBA format {index} ({size} per block) has protection information type {protection}; {advice}"
            ));
        }
        match shift {
            9 | 12 => Ok(shift),
            0 => Err(format!("LBA format {index} is not available (LBADS 0)")),
            _ => Err(format!("LBA format {index} has {size} per block (LBADS {shift}); {advice}")),
        }
    }

    /// The index of a served format: `1 << shift` bytes, no metadata.
    pub(crate) fn format_with(&self, shift: u8) -> Option<u8> {
        let count = usize::from(self.nlbaf.min(63)) + 1;
        self.formats[..count]
            .iter()
            .position(|format| format.shift == shift && format.metadata.get() == 0)
            .map(|at| at as u8)
    }
}

/// Number of logical blocks is a zero-based 16-bit field in every command that has one.
const MAX_BLOCKS_PER_COMMAND: u32 = 65536;

/// The largest power of two of blocks that is written without tearing wherever a multiple of it begins: `blocks` at a time, and
/// not across the boundaries that the namespace may have, given as NABSPF (zero-based, 0: none) and NABO.
fn untorn(blocks: u32, boundary: Option<(u16, u16)>) -> u32 {
    let largest = 1 << blocks.max(1).ilog2();
    match boundary {
        None | Some((0, _)) => largest,
        // A multiple of it lies on no boundary but its own ones if it divides the distance of two, and the first.
        Some((size, first)) => {
            let divides = |number: u32| 1u32.checked_shl(number.trailing_zeros()).unwrap_or(u32::MAX);
            largest.min(divides(u32::from(size) + 1)).min(divides(first.into()))
        }
    }
}

/// What serves as physical block: what is written without tearing, but no more than 4096 bytes unless the drive also writes in
/// larger units (`granularity`).
fn physical_block(untorn: u32, granularity: u32, block_bytes: u32) -> u32 {
    let unit = (1u32 << granularity.max(1).ilog2()).max(4096);
    untorn.min(unit).max(block_bytes)
}

#[cfg(test)]
mod tests;
