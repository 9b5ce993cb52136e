//! Identify (NVMe Base 2.0, 5.17; NVM Command Set 1.0, 4.1.5).

use crate::command::{ALL_NAMESPACES, Command};
use crate::config::Config;
use crate::config_space::VENDOR;
use crate::controller::Controller;
use crate::events::{ERROR_ENTRIES, EVENT_REQUESTS};
use crate::features::WARNING_TEMPERATURE;
use crate::namespace::{Namespace, formats};
use crate::registers::VERSION;
use crate::status::Status;

pub(crate) const MODEL: &str = "Userspace NVMe simulator";
pub(crate) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// A data structure under construction: little-endian fields at their offsets.
pub(crate) struct Page(pub Vec<u8>);

impl Page {
    pub(crate) fn new(bytes: usize) -> Page {
        Page(vec![0; bytes])
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// ASCII, padded with spaces.
    pub(crate) fn text(&mut self, at: usize, width: usize, text: &str) {
        self.0[at..at + width].fill(b' ');
        let len = text.len().min(width);
        self.put(at, &text.as_bytes()[..len]);
    }
}

/// NN: the highest namespace identifier there can be.
pub(crate) fn namespace_limit(config: &Config) -> u32 {
    config.namespaces.len().max(64) as u32
}

/// The data that an Identify command returns.
pub(crate) fn identify(controller: &Controller, command: &Command) -> Result<Vec<u8>, Status> {
    let config = &controller.shared.config;
    let selector = command.dword(10) as u8;
    let id = command.namespace();
    let command_set = (command.dword(11) >> 24) as u8;
    let namespace = || match id {
        0 | ALL_NAMESPACES => Err(Status::INVALID_NAMESPACE),
        _ if id > namespace_limit(config) => Err(Status::INVALID_NAMESPACE),
        _ => Ok(controller.namespaces.get(id as usize - 1).and_then(Option::as_ref)),
    };
    // Only the NVM command set (0) is there.
    let of_command_set = || if command_set == 0 { Ok(()) } else { Err(Status::INVALID_FIELD) };
    let page = match selector {
        0x00 => namespace()?.map_or_else(|| Page::new(4096), |n| namespace_page(n, config)),
        0x01 => controller_page(controller),
        0x02 => active_list(controller, id)?,
        0x03 => descriptors(namespace()?.ok_or(Status::INVALID_FIELD)?, config),
        0x05 => {
            of_command_set()?;
            // No protection information: the NVM command set specific page of a namespace is empty.
            namespace()?;
            Page::new(4096)
        }
        0x06 => {
            of_command_set()?;
            // VSL, WZSL, WUSL, DMRL, DMRSL, DMSL: no limits but those of the commands' fields.
            Page::new(4096)
        }
        0x07 => {
            of_command_set()?;
            active_list(controller, id)?
        }
        0x08 => independent_page(namespace()?),
        0x1c => {
            // One combination of command sets: the NVM command set alone.
            let mut page = Page::new(4096);
            page.put(0, &1_u64.to_le_bytes());
            page
        }
        _ => return Err(Status::INVALID_FIELD),
    };
    Ok(patched(controller, selector, id, page))
}

/// A data structure with what is said otherwise in it.
fn patched(controller: &Controller, selector: u8, namespace: u32, mut page: Page) -> Vec<u8> {
    for patch in &controller.patches {
        patch.apply(selector, namespace, &mut page.0);
    }
    page.0
}

/// Identify Controller as the host reads it.
pub(crate) fn controller_data(controller: &Controller) -> Vec<u8> {
    patched(controller, 0x01, 0, controller_page(controller))
}

/// Identify Controller of the NVM command set as the host reads it.
pub(crate) fn limits_data(controller: &Controller) -> Vec<u8> {
    patched(controller, 0x06, 0, Page::new(4096))
}

/// Identify Namespace as the host reads it.
pub(crate) fn namespace_data(controller: &Controller, namespace: &Namespace) -> Vec<u8> {
    patched(controller, 0x00, namespace.id, namespace_page(namespace, &controller.shared.config))
}

/// Identify Controller (5.17.2.1).
fn controller_page(controller: &Controller) -> Page {
    let config = &controller.shared.config;
    let mut page = Page::new(4096);
    page.put(0, &VENDOR.to_le_bytes());
    page.put(2, &VENDOR.to_le_bytes());
    page.text(4, 20, &config.serial);
    page.text(24, 40, MODEL);
    page.text(64, 8, FIRMWARE);
    page.put(77, &[config.mdts()]);
    page.put(80, &VERSION.to_le_bytes());
    page.put(92, &(1_u32 << 8).to_le_bytes()); // OAES: namespace attribute notices
    page.put(111, &[1]); // CNTRLTYPE: I/O controller
    for (at, delay) in (128..).step_by(2).zip(config.retry_delays) {
        page.put(at, &delay.to_le_bytes()); // CRDT1 to CRDT3
    }
    let doorbell_buffer = u16::from(config.shadow_doorbells) << 8;
    page.put(256, &(1 << 1 | doorbell_buffer).to_le_bytes()); // OACS: Format NVM, Doorbell Buffer Config
    page.put(258, &[3, EVENT_REQUESTS as u8 - 1]); // ACL, AERL
    page.put(260, &[0x03]); // FRMW: one slot, read only
    page.put(261, &[1 << 1 | 1 << 2]); // LPA: commands supported and effects, offsets
    page.put(262, &[ERROR_ENTRIES as u8 - 1]); // ELPE
    page.put(266, &(WARNING_TEMPERATURE as u16).to_le_bytes()); // WCTEMP
    page.put(268, &(WARNING_TEMPERATURE as u16 + 10).to_le_bytes()); // CCTEMP
    let bytes: u128 = controller.namespaces.iter().flatten().map(|n| u128::from(n.bytes())).sum();
    page.put(280, &bytes.to_le_bytes()); // TNVMCAP
    page.put(512, &[0x66, 0x44]); // SQES, CQES: 64 and 16 bytes
    page.put(516, &namespace_limit(config).to_le_bytes()); // NN
    // ONCS: compare, dataset management, write zeroes, SEL in Get Features, verify.
    page.put(520, &(1_u16 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7).to_le_bytes());
    page.put(525, &[u8::from(config.volatile_write_cache) | 3 << 1]); // VWC; flush of all namespaces is supported
    // SGLS: any alignment, bit buckets. ACWU, AWUN and AWUPF are 0: one block.
    let sgls = if config.sgl { 1_u32 | 1 << 16 } else { 0 };
    page.put(536, &sgls.to_le_bytes());
    page.put(540, &namespace_limit(config).to_le_bytes()); // MNAN
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", uuid_text(uuid(config, 0)));
    page.put(768, name.as_bytes());
    page.put(2048, &2500_u16.to_le_bytes()); // PSD0: 25 W
    page
}

/// Identify Namespace (NVM Command Set 1.0, 4.1.5.1).
fn namespace_page(namespace: &Namespace, config: &Config) -> Page {
    let mut page = Page::new(4096);
    for at in [0, 8, 16] {
        page.put(at, &namespace.blocks.to_le_bytes()); // NSZE, NCAP, NUSE
    }
    let list = formats(config);
    let index = list.iter().position(|format| *format == namespace.format).unwrap_or_default();
    page.put(24, &[1 << 4]); // NSFEAT: OPTPERF, the fields from NPWG on
    page.put(25, &[list.len() as u8 - 1]); // NLBAF
    page.put(26, &[index as u8]); // FLBAS: metadata, if any, in a buffer of its own
    page.put(27, &[if config.metadata_formats { 2 } else { 0 }]); // MC
    page.put(33, &[1 | 1 << 3]); // DLFEAT: deallocated blocks read zero; DEAC in Write Zeroes
    page.put(46, &config.noiob.to_le_bytes());
    page.put(48, &u128::from(namespace.bytes()).to_le_bytes()); // NVMCAP
    // NPWG, NPWA, NPDG, NPDA, NOWS, 0's based: writes and deallocation go best by 4 KiB.
    let blocks = (4096_u16 >> namespace.format.block_shift).max(1) - 1;
    for at in [64, 66, 68, 70, 72] {
        page.put(at, &blocks.to_le_bytes());
    }
    page.put(99, &[u8::from(namespace.read_only)]); // NSATTR
    let uuid = uuid(config, namespace.id);
    page.put(104, &uuid); // NGUID
    page.put(120, &uuid[8..]); // EUI64
    for (n, format) in list.iter().enumerate() {
        page.put(128 + 4 * n, &format.metadata.to_le_bytes());
        page.put(128 + 4 * n + 2, &[format.block_shift]);
    }
    page
}

/// The part of Identify Namespace that all command sets share (5.17.2.8).
fn independent_page(namespace: Option<&Namespace>) -> Page {
    let mut page = Page::new(4096);
    if let Some(namespace) = namespace {
        page.put(13, &[u8::from(namespace.read_only)]); // NSATTR
        page.put(14, &[1]); // NSTAT: ready
    }
    page
}

/// Active namespace list (5.17.2.2): the identifiers above `above`.
fn active_list(controller: &Controller, above: u32) -> Result<Page, Status> {
    if above >= 0xffff_fffe {
        return Err(Status::INVALID_NAMESPACE);
    }
    let mut page = Page::new(4096);
    let ids = controller.namespaces.iter().flatten().map(|namespace| namespace.id).filter(|id| *id > above);
    for (n, id) in ids.take(1024).enumerate() {
        page.put(4 * n, &id.to_le_bytes());
    }
    Ok(page)
}

/// Namespace identification descriptors (5.17.2.3).
fn descriptors(namespace: &Namespace, config: &Config) -> Page {
    let uuid = uuid(config, namespace.id);
    let mut page = Page::new(4096);
    let mut at = 0;
    for (kind, value) in [(1, &uuid[8..]), (2, &uuid[..]), (3, &uuid[..]), (4, &[0][..])] {
        page.put(at, &[kind, value.len() as u8]);
        page.put(at + 4, value);
        at += 4 + value.len();
    }
    page
}

/// A UUID in the form of a random one (version 4), made of the serial number and the namespace. It never changes, not with a later
/// version of the simulator either: whoever uses a namespace knows it by this.
fn uuid(config: &Config, namespace: u32) -> [u8; 16] {
    let seed = config.serial.bytes().fold(u64::from(namespace), |seed, byte| mix(seed ^ u64::from(byte), 1));
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&mix(seed, 1).to_be_bytes());
    uuid[8..].copy_from_slice(&mix(seed, 2).to_be_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// A hash: the `nth` number of SplitMix64 from `seed`. Not a generator, whose numbers may be others in its next version.
fn mix(seed: u64, nth: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(nth));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn uuid_text(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (n, byte) in uuid.iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_keeps_its_name_for_ever() {
        let config = Config { serial: "SIM0001".into(), ..Config::default() };
        assert_eq!(uuid_text(uuid(&config, 1)), "a7c05e70-5d47-4428-bad2-59dcb7957cf6");
    }
}
