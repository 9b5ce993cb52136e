//! I/O commands of the NVM command set (NVM Command Set 1.0, chapter 3).

use crate::command::{ALL_NAMESPACES, Command, nvm};
use crate::controller::Controller;
use crate::data_pointer::{Direction, transfer_error};
use crate::namespace::Namespace;
use crate::offers::Offers;
use crate::shared::Counters;
use crate::status::Status;

/// Carries an I/O command out.
#[inline]
pub(crate) fn execute(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let id = command.namespace();
    controller.offers.check_io(command.opcode())?;
    if command.opcode() == nvm::FLUSH {
        return flush(controller, id);
    }
    let Some(Some(namespace)) = controller.namespaces.get_mut((id as usize).wrapping_sub(1)) else {
        return Err(Status::INVALID_NAMESPACE);
    };
    // Blocks with metadata exist so that a host can refuse them; their data cannot be had.
    if namespace.format.metadata != 0 {
        return Err(Status::INVALID_NAMESPACE);
    }
    match command.opcode() {
        nvm::READ => read(controller, command),
        nvm::WRITE => write(controller, command),
        nvm::COMPARE => compare(controller, command),
        nvm::VERIFY => {
            let (_, len) = in_range(namespace, command)?;
            controller.offers.check_size(nvm::VERIFY, len as u64)
        }
        nvm::WRITE_ZEROES => write_zeroes(namespace, &controller.offers, command),
        nvm::DATASET_MANAGEMENT => dataset_management(controller, command),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// The namespace of a command; [`execute`] has made sure that there is one.
#[inline]
fn namespace<'a>(namespaces: &'a mut [Option<Namespace>], command: &Command) -> Result<&'a mut Namespace, Status> {
    let place = namespaces.get_mut((command.namespace() as usize).wrapping_sub(1));
    place.and_then(Option::as_mut).ok_or(Status::INVALID_NAMESPACE)
}

/// Byte offset and length of the blocks a command names.
#[inline]
fn in_range(namespace: &Namespace, command: &Command) -> Result<(usize, usize), Status> {
    namespace.range(command.lba(), command.blocks().into()).ok_or(Status::LBA_OUT_OF_RANGE)
}

/// Checks a transfer against MDTS and the range, and walks its pointers; byte offset and length.
#[inline]
fn prepare(controller: &mut Controller, command: &Command, direction: Direction) -> Result<(usize, usize), Status> {
    let namespace = namespace(&mut controller.namespaces, command)?;
    let (offset, len) = in_range(namespace, command)?;
    if controller.offers.max_transfer.is_some_and(|limit| len as u64 > limit) {
        return Err(Status::INVALID_FIELD);
    }
    controller.pointers.walk(&controller.view, command, len as u64, direction)?;
    Ok((offset, len))
}

#[inline]
fn read(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let (mut offset, len) = prepare(controller, command, Direction::ToHost)?;
    let media = &namespace(&mut controller.namespaces, command)?.backing;
    for piece in &controller.pointers.pieces {
        let bytes = piece.bytes as usize;
        if let Some(iova) = piece.iova {
            media.copy_out(&controller.view, iova, bytes, offset)?;
        }
        offset += bytes;
    }
    Counters::add(&controller.shared.counters.reads, 1);
    Counters::add(&controller.shared.counters.bytes_read, len as u64);
    Ok(())
}

#[inline]
fn write(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    // DTYPE (dword 12 bits 23:20).
    if command.dword(12) >> 20 & 15 != 0 && !controller.offers.directives() {
        return Err(Status::INVALID_FIELD);
    }
    let (mut offset, len) = prepare(controller, command, Direction::FromHost)?;
    let namespace = namespace(&mut controller.namespaces, command)?;
    if namespace.read_only {
        return Err(Status::WRITE_PROTECTED);
    }
    // All of it is there before the first block changes.
    for piece in &controller.pointers.pieces {
        if let Some(iova) = piece.iova {
            controller.view.check(iova, piece.bytes as usize, false).map_err(transfer_error)?;
        }
    }
    namespace.before_write(command.lba(), command.blocks().into(), command.force_unit_access());
    let media = &namespace.backing;
    for piece in &controller.pointers.pieces {
        let bytes = piece.bytes as usize;
        if let Some(iova) = piece.iova {
            media.copy_in(&controller.view, iova, bytes, offset)?;
        }
        offset += bytes;
    }
    Counters::add(&controller.shared.counters.writes, 1);
    Counters::add(&controller.shared.counters.bytes_written, len as u64);
    Ok(())
}

fn compare(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let (mut offset, _) = prepare(controller, command, Direction::FromHost)?;
    let media = &namespace(&mut controller.namespaces, command)?.backing;
    for piece in &controller.pointers.pieces {
        let bytes = piece.bytes as usize;
        if let Some(iova) = piece.iova
            && !media.equals(&controller.view, iova, bytes, offset)?
        {
            return Err(Status::COMPARE_FAILURE);
        }
        offset += bytes;
    }
    Ok(())
}

/// Flush (3.2.2), of one namespace or of all.
fn flush(controller: &mut Controller, id: u32) -> Result<(), Status> {
    if id == ALL_NAMESPACES {
        if !controller.offers.flushes_all() {
            return Err(Status::INVALID_NAMESPACE);
        }
        controller.namespaces.iter_mut().flatten().for_each(Namespace::flush);
        return Ok(());
    }
    let place = controller.namespaces.get_mut((id as usize).wrapping_sub(1));
    place.and_then(Option::as_mut).ok_or(Status::INVALID_NAMESPACE)?.flush();
    Ok(())
}

/// Write Zeroes (3.2.8); with DEAC (dword 12 bit 25) the blocks are deallocated, which reads the same.
fn write_zeroes(namespace: &mut Namespace, offers: &Offers, command: &Command) -> Result<(), Status> {
    let deallocates = command.dword(12) & 1 << 25 != 0;
    if deallocates && !namespace.write_zeroes_deallocates {
        return Err(Status::INVALID_FIELD);
    }
    let (offset, len) = in_range(namespace, command)?;
    offers.check_size(nvm::WRITE_ZEROES, len as u64)?;
    if namespace.read_only {
        return Err(Status::WRITE_PROTECTED);
    }
    let (lba, blocks, durable) = (command.lba(), command.blocks().into(), command.force_unit_access());
    if deallocates {
        namespace.before_deallocate(lba, blocks, durable);
        namespace.backing.deallocate(offset, len)?;
    } else {
        namespace.before_write(lba, blocks, durable);
        namespace.backing.zero(offset, len)?;
    }
    Ok(())
}

/// Dataset Management (3.2.3): ranges are deallocated if the AD bit is set; other attributes are hints.
fn dataset_management(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let count = (command.dword(10) & 0xff) as usize + 1;
    let deallocate = command.dword(11) & 4 != 0;
    let limits = controller.offers.deallocation;
    if deallocate && limits.ranges.is_some_and(|most| count > most.into()) {
        return Err(Status::COMMAND_SIZE_LIMIT);
    }
    let len = count * 16;
    let mut raw = [0; 256 * 16];
    crate::admin::take(controller, command, &mut raw[..len])?;
    let namespace = namespace(&mut controller.namespaces, command)?;
    if deallocate && namespace.read_only {
        return Err(Status::WRITE_PROTECTED);
    }
    let mut ranges = [(0, 0, 0, 0); 256];
    let mut total = 0;
    for (range, raw) in ranges.iter_mut().zip(raw[..len].chunks_exact(16)) {
        let blocks = u64::from(u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]));
        let lba = u64::from_le_bytes(std::array::from_fn(|n| raw[8 + n]));
        total += blocks;
        let too_long = limits.range_blocks.is_some_and(|most| blocks > most.into());
        if deallocate && (too_long || limits.blocks.is_some_and(|most| total > most)) {
            return Err(Status::COMMAND_SIZE_LIMIT);
        }
        let (offset, bytes) = namespace.range(lba, blocks).ok_or(Status::LBA_OUT_OF_RANGE)?;
        *range = (lba, blocks, offset, bytes);
    }
    for (lba, blocks, offset, bytes) in ranges.into_iter().take(count).filter(|range| deallocate && range.1 > 0) {
        namespace.before_deallocate(lba, blocks, false);
        namespace.backing.deallocate(offset, bytes)?;
    }
    Ok(())
}
