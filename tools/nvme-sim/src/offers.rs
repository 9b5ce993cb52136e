//! What the controller offers by its Identify data, as patched: what it does not offer it refuses.

use crate::command::{admin, nvm};
use crate::controller::Controller;
use crate::identify;
use crate::status::Status;

/// Bits of OACS, ONCS and LPA (NVMe Base 2.0, 5.17.2.1).
const OACS_FORMAT: u16 = 1 << 1;
const OACS_DIRECTIVES: u16 = 1 << 5;
const OACS_DOORBELL_BUFFER: u16 = 1 << 8;
const ONCS_COMPARE: u16 = 1 << 0;
const ONCS_DATASET_MANAGEMENT: u16 = 1 << 2;
const ONCS_WRITE_ZEROES: u16 = 1 << 3;
const ONCS_SELECT: u16 = 1 << 4;
const ONCS_VERIFY: u16 = 1 << 7;
const LPA_NAMESPACE_HEALTH: u8 = 1 << 0;
const LPA_EFFECTS: u8 = 1 << 1;
const LPA_EXTENDED: u8 = 1 << 2;
/// DLFEAT (NVM Command Set 1.0, 4.1.5.1): Write Zeroes may deallocate.
const DLFEAT_WRITE_ZEROES: u8 = 1 << 3;

/// The optional abilities and the limits of a controller.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Offers {
    /// Bytes of the largest transfer (MDTS).
    pub max_transfer: Option<u64>,
    admin: u16,
    commands: u16,
    log_pages: u8,
    /// AERL, 1's based.
    pub event_requests: usize,
    /// Entries of the error log (ELPE, 1's based).
    pub error_entries: usize,
    /// Asynchronous events that are optional (OAES).
    pub events: u32,
    pub sgl: SglOffer,
    write_cache: u8,
    /// There are retry delays (CRDT1 to CRDT3).
    pub retry_delays: bool,
    /// Largest sizes of commands without data, in bytes (VSL, WZSL).
    verify_limit: Option<u64>,
    write_zeroes_limit: Option<u64>,
    pub deallocation: DeallocationLimits,
}

/// What SGLS says of scatter gather lists (NVMe Base 2.0, 5.17.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct SglOffer {
    pub supported: bool,
    /// Addresses and lengths of data are multiples of four.
    pub dwords_only: bool,
    pub bit_bucket: bool,
}

/// Limits of Dataset Management (NVM Command Set 1.0, 4.1.5.4): ranges, blocks of a range, blocks of all; `None`: not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct DeallocationLimits {
    pub ranges: Option<u8>,
    pub range_blocks: Option<u32>,
    pub blocks: Option<u64>,
}

/// A little-endian field.
fn field<const N: usize>(page: &[u8], at: usize) -> u64 {
    page[at..at + N].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A size as a power of two of the smallest page (4 KiB, CAP.MPSMIN); 0: no limit.
fn power_of_pages(exponent: u8) -> Option<u64> {
    let bytes = || 1_u64.checked_shl(exponent.into())?.checked_mul(4096);
    (exponent != 0).then(|| bytes().unwrap_or(u64::MAX))
}

impl Offers {
    /// Reads what `controller` says of itself, and of its namespaces.
    pub(crate) fn of(controller: &Controller) -> Offers {
        let page = identify::controller_data(controller);
        let limits = identify::limits_data(controller);
        let sgls = field::<4>(&page, 536);
        Offers {
            max_transfer: power_of_pages(page[77]),
            admin: field::<2>(&page, 256) as u16,
            commands: field::<2>(&page, 520) as u16,
            log_pages: page[261],
            event_requests: usize::from(page[259]) + 1,
            error_entries: usize::from(page[262]) + 1,
            events: field::<4>(&page, 92) as u32,
            sgl: SglOffer {
                supported: matches!(sgls & 3, 1 | 2),
                dwords_only: sgls & 3 == 2,
                bit_bucket: sgls & 1 << 16 != 0,
            },
            write_cache: page[525],
            retry_delays: page[128..134].iter().any(|byte| *byte != 0),
            verify_limit: power_of_pages(limits[0]),
            write_zeroes_limit: power_of_pages(limits[1]),
            deallocation: DeallocationLimits {
                ranges: Some(limits[3]).filter(|ranges| *ranges != 0),
                range_blocks: Some(field::<4>(&limits, 4) as u32).filter(|blocks| *blocks != 0),
                blocks: Some(field::<8>(&limits, 8)).filter(|blocks| *blocks != 0),
            },
        }
    }

    /// An admin command that is optional: is it there?
    pub(crate) fn check_admin(&self, opcode: u8) -> Result<(), Status> {
        let needed = match opcode {
            admin::DOORBELL_BUFFER => OACS_DOORBELL_BUFFER,
            admin::FORMAT => OACS_FORMAT,
            _ => 0,
        };
        if self.admin & needed == needed { Ok(()) } else { Err(Status::INVALID_OPCODE) }
    }

    /// An I/O command that is optional: is it there?
    #[inline]
    pub(crate) fn check_io(&self, opcode: u8) -> Result<(), Status> {
        let needed = match opcode {
            nvm::COMPARE => ONCS_COMPARE,
            nvm::DATASET_MANAGEMENT => ONCS_DATASET_MANAGEMENT,
            nvm::WRITE_ZEROES => ONCS_WRITE_ZEROES,
            nvm::VERIFY => ONCS_VERIFY,
            _ => 0,
        };
        if self.commands & needed == needed { Ok(()) } else { Err(Status::INVALID_OPCODE) }
    }

    /// A directive type other than 0 in Write needs directives (NVM Command Set 1.0, 3.2.6).
    #[inline]
    pub(crate) fn directives(&self) -> bool {
        self.admin & OACS_DIRECTIVES != 0
    }

    /// The SEL field of Get Features and the SV bit of Set Features.
    pub(crate) fn selects_features(&self) -> bool {
        self.commands & ONCS_SELECT != 0
    }

    /// VWC bit 0.
    pub(crate) fn has_write_cache(&self) -> bool {
        self.write_cache & 1 != 0
    }

    /// Flush of all namespaces (VWC bits 2:1 are 3).
    pub(crate) fn flushes_all(&self) -> bool {
        self.write_cache >> 1 & 3 == 3
    }

    /// SMART / health information of one namespace.
    pub(crate) fn namespace_health(&self) -> bool {
        self.log_pages & LPA_NAMESPACE_HEALTH != 0
    }

    /// The log page of commands supported and effects.
    pub(crate) fn effects_log(&self) -> bool {
        self.log_pages & LPA_EFFECTS != 0
    }

    /// Offsets in log pages, and more than 65536 dwords of one.
    pub(crate) fn extended_log(&self) -> bool {
        self.log_pages & LPA_EXTENDED != 0
    }

    /// Verify and Write Zeroes of `bytes`.
    pub(crate) fn check_size(&self, opcode: u8, bytes: u64) -> Result<(), Status> {
        let limit = if opcode == nvm::VERIFY { self.verify_limit } else { self.write_zeroes_limit };
        if limit.is_some_and(|limit| bytes > limit) { Err(Status::INVALID_FIELD) } else { Ok(()) }
    }
}

/// Whether a namespace with this Identify data lets Write Zeroes deallocate.
pub(crate) fn write_zeroes_deallocates(page: &[u8]) -> bool {
    page[33] & DLFEAT_WRITE_ZEROES != 0
}
