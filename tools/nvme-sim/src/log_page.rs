//! Get Log Page (NVMe Base 2.0, 5.16).

use std::sync::atomic::{AtomicU64, Ordering};

use crate::command::{ALL_NAMESPACES, Command, admin, nvm};
use crate::controller::Controller;
use crate::events::{LOG_CHANGED_NAMESPACES, LOG_ERROR, LOG_FIRMWARE, LOG_HEALTH};
use crate::features::TEMPERATURE;
use crate::identify::{FIRMWARE, Page};
use crate::shared::Counters;
use crate::status::Status;

const LOG_SUPPORTED: u8 = 0x00;
const LOG_EFFECTS: u8 = 0x05;

/// The bytes the command asks for; beyond the end of a page they are zero.
pub(crate) fn get(controller: &mut Controller, command: &Command) -> Result<Vec<u8>, Status> {
    let dword10 = command.dword(10);
    let (id, keep_event) = (dword10 as u8, dword10 & 1 << 15 != 0);
    let dwords = u64::from(dword10 >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
    let bytes = (dwords + 1) * 4;
    let offset = u64::from(command.dword(12)) | u64::from(command.dword(13)) << 32;
    // OT (dword 14 bit 23): an index offset; no page here has entries that can be indexed.
    if command.dword(14) & 1 << 23 != 0 || offset % 4 != 0 {
        return Err(Status::INVALID_FIELD);
    }
    let extended = dwords > 0xffff || offset != 0;
    if extended && !controller.offers.extended_log() {
        return Err(Status::INVALID_FIELD);
    }
    let whole = matches!(command.namespace(), 0 | ALL_NAMESPACES);
    let page = match id {
        LOG_HEALTH if !whole && !controller.offers.namespace_health() => return Err(Status::INVALID_FIELD),
        LOG_EFFECTS if !controller.offers.effects_log() => return Err(Status::INVALID_LOG_PAGE),
        LOG_SUPPORTED => supported(controller),
        LOG_ERROR => errors(controller),
        LOG_HEALTH => health(controller),
        LOG_FIRMWARE => firmware(),
        LOG_CHANGED_NAMESPACES => controller.events.changed_namespaces(),
        LOG_EFFECTS => effects(controller),
        _ => return Err(Status::INVALID_LOG_PAGE),
    };
    if offset > page.len() as u64 {
        return Err(Status::INVALID_FIELD);
    }
    if controller.offers.max_transfer.is_some_and(|limit| bytes > limit) {
        return Err(Status::INVALID_FIELD);
    }
    // No limit on transfers is no licence to make the controller reserve 16 GiB.
    let bytes = usize::try_from(bytes.min(64 << 20)).map_err(|_| Status::INVALID_FIELD)?;
    let from = offset as usize;
    let mut data = page[from..page.len().min(from.saturating_add(bytes))].to_vec();
    data.resize(bytes, 0);
    if !keep_event {
        controller.events.page_read(id);
        Counters::add(&controller.shared.counters.events_released, 1);
    }
    Ok(data)
}

/// Supported log pages (5.16.1.1).
fn supported(controller: &Controller) -> Vec<u8> {
    let mut page = Page::new(1024);
    for id in [LOG_SUPPORTED, LOG_ERROR, LOG_HEALTH, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES] {
        page.put(usize::from(id) * 4, &[1]);
    }
    page.put(usize::from(LOG_EFFECTS) * 4, &[u8::from(controller.offers.effects_log())]);
    page.0
}

/// Error information (5.16.1.2), the newest first.
fn errors(controller: &Controller) -> Vec<u8> {
    let mut page = Page::new(controller.offers.error_entries * 64);
    for (n, entry) in controller.events.errors.iter().take(controller.offers.error_entries).enumerate() {
        let at = n * 64;
        page.put(at, &entry.count.to_le_bytes());
        page.put(at + 8, &entry.sq.to_le_bytes());
        page.put(at + 10, &entry.command.to_le_bytes());
        page.put(at + 12, &(entry.status.bits() << 1).to_le_bytes());
        page.put(at + 14, &0xffff_u16.to_le_bytes()); // not a single parameter's fault
        page.put(at + 16, &entry.lba.to_le_bytes());
        page.put(at + 24, &entry.namespace.to_le_bytes());
    }
    page.0
}

/// SMART / health information (5.16.1.3).
fn health(controller: &Controller) -> Vec<u8> {
    let counters = &controller.shared.counters;
    let count = |counter: &AtomicU64| u128::from(counter.load(Ordering::Relaxed));
    // Thousands of 512 bytes, rounded up.
    let units = |bytes: u128| bytes.div_ceil(512_000).to_le_bytes();
    let mut page = Page::new(512);
    page.put(0, &[u8::from(controller.features.temperature_warning()) << 1 | controller.faults.plan.critical_warning]);
    page.put(1, &(TEMPERATURE as u16).to_le_bytes());
    page.put(3, &[100, 10, 0]); // available spare, its threshold, percentage used
    page.put(32, &units(count(&counters.bytes_read)));
    page.put(48, &units(count(&counters.bytes_written)));
    page.put(64, &count(&counters.reads).to_le_bytes());
    page.put(80, &count(&counters.writes).to_le_bytes());
    page.put(112, &(1 + count(&counters.power_cuts)).to_le_bytes()); // power cycles
    page.put(128, &u128::from(controller.started.elapsed().as_secs() / 3600).to_le_bytes());
    page.put(144, &count(&counters.power_cuts).to_le_bytes()); // unsafe shutdowns
    page.put(176, &u128::from(controller.events.error_count).to_le_bytes());
    page.0
}

/// Firmware slot information (5.16.1.4).
fn firmware() -> Vec<u8> {
    let mut page = Page::new(512);
    page.put(0, &[1]);
    page.text(8, 8, FIRMWARE);
    page.0
}

/// Commands supported and effects (5.16.1.6).
fn effects(controller: &Controller) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const DATA_CHANGES: u32 = 1 << 1;
    let mut page = Page::new(4096);
    let mut set =
        |base: usize, opcode: u8, effects: u32| page.put(base + usize::from(opcode) * 4, &effects.to_le_bytes());
    for opcode in [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
    ] {
        set(0, opcode, SUPPORTED);
    }
    let offers = &controller.offers;
    // Format changes data and the namespace, and wants to be alone with it (CSE 1).
    let format = SUPPORTED | DATA_CHANGES | 1 << 3 | 1 << 16;
    for (opcode, effects) in [(admin::DOORBELL_BUFFER, SUPPORTED), (admin::FORMAT, format)] {
        if offers.check_admin(opcode).is_ok() {
            set(0, opcode, effects);
        }
    }
    let changing = [nvm::FLUSH, nvm::WRITE, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT].map(|n| (n, DATA_CHANGES));
    let reading = [nvm::READ, nvm::COMPARE, nvm::VERIFY].map(|n| (n, 0));
    for (opcode, effects) in changing.into_iter().chain(reading) {
        if offers.check_io(opcode).is_ok() {
            set(1024, opcode, SUPPORTED | effects);
        }
    }
    page.0
}
