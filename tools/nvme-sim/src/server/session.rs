//! One front-end's messages, answered one after the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use zerocopy::IntoBytes;

use super::wire::{
    self, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, MAX_DATA, MAX_FDS, Message, RegionAccess, RegionInfo, SetIrqs,
    SparseArea, Version, command,
};
use super::{FrontEnd, invalid};
use crate::config_space::CONFIG_BYTES;
use crate::registers::DOORBELLS;

/// DMA_MAP: the device may read, and write.
const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
/// DMA_UNMAP: everything.
const UNMAP_ALL: u32 = 1 << 2;

/// The version of the protocol that is spoken here: 0.1.
const MINOR: u16 = 1;

/// What a command is answered with.
struct Answer {
    body: Vec<u8>,
    /// The file behind BAR0 goes with it.
    with_memory: bool,
}

impl Answer {
    fn new(parts: &[&[u8]]) -> Answer {
        Answer { body: parts.concat(), with_memory: false }
    }
}

/// Answers messages until the front-end goes. `memory` is the file behind BAR0.
///
/// # Errors
/// The connection is of no use any more: the socket failed, or what came is no message.
pub(super) fn run(stream: &UnixStream, front_end: &mut FrontEnd, memory: &File) -> io::Result<()> {
    while let Some(message) = wire::receive(stream)? {
        std::thread::sleep(front_end.shared.faults.message_delay());
        let wants_reply = message.wants_reply();
        let header = message.header;
        match answer(front_end, message) {
            _ if !wants_reply => {}
            Ok(answer) => {
                let fd: Option<BorrowedFd<'_>> = answer.with_memory.then(|| memory.as_fd());
                wire::reply(stream, &header, &answer.body, fd)?;
            }
            Err(error) => {
                log::warn!("vfio-user command {} refused: {error}", header.command);
                wire::refuse(stream, &header, &error)?;
            }
        }
    }
    Ok(())
}

fn answer(front_end: &mut FrontEnd, message: Message) -> io::Result<Answer> {
    match message.header.command {
        command::VERSION => version(&message),
        command::DMA_MAP => {
            let (map, _) = message.parse::<DmaMap>()?;
            let mut fds = message.fds;
            if fds.len() > 1 {
                return Err(invalid(format!("DMA map with {} file descriptors", fds.len())));
            }
            let access = (map.flags & MAP_READ != 0, map.flags & MAP_WRITE != 0);
            front_end.dma_map(access, map.offset, map.address, map.size, fds.pop().map(File::from))?;
            Ok(Answer::new(&[]))
        }
        command::DMA_UNMAP => {
            let (unmap, _) = message.parse::<DmaUnmap>()?;
            front_end.dma_unmap(unmap.flags & UNMAP_ALL != 0, unmap.address, unmap.size)?;
            Ok(Answer::new(&[unmap.as_bytes()]))
        }
        command::DEVICE_GET_INFO => {
            message.parse::<DeviceInfo>()?;
            let flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
            let info = DeviceInfo { argsz: 16, flags, regions: VFIO_PCI_NUM_REGIONS, irqs: VFIO_PCI_NUM_IRQS };
            Ok(Answer::new(&[info.as_bytes()]))
        }
        command::DEVICE_GET_REGION_INFO => region_info(front_end, &message),
        command::DEVICE_GET_IRQ_INFO => {
            let index = message.parse::<IrqInfo>()?.0.index;
            if index >= VFIO_PCI_NUM_IRQS {
                return Err(invalid(format!("there are no interrupts of kind {index}")));
            }
            let msix = index == VFIO_PCI_MSIX_IRQ_INDEX;
            let flags = if msix { VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE } else { 0 };
            let count = if msix { front_end.shared.layout.vectors.into() } else { 0 };
            Ok(Answer::new(&[IrqInfo { argsz: 16, flags, index, count }.as_bytes()]))
        }
        command::DEVICE_SET_IRQS => {
            let (set, _) = message.parse::<SetIrqs>()?;
            let files = message.fds.into_iter().map(File::from).collect();
            front_end.set_irqs(set.index, set.flags, set.start, set.count, files)?;
            Ok(Answer::new(&[]))
        }
        command::REGION_READ => {
            let (access, _) = message.parse::<RegionAccess>()?;
            let mut data = vec![0; check_access(&access)?];
            front_end.region_read(access.region, access.offset, &mut data);
            Ok(Answer::new(&[access.as_bytes(), &data]))
        }
        command::REGION_WRITE => {
            let (access, data) = message.parse::<RegionAccess>()?;
            let count = check_access(&access)?;
            let data = data.get(..count).ok_or_else(|| {
                invalid(format!("a write of {count} bytes at {:#x} with {} of them", access.offset, data.len()))
            })?;
            front_end.region_write(access.region, access.offset, data)?;
            Ok(Answer::new(&[access.as_bytes()]))
        }
        command::DEVICE_RESET => front_end.reset().map(|()| Answer::new(&[])),
        other => Err(io::Error::new(io::ErrorKind::Unsupported, format!("command {other} is not known"))),
    }
}

/// The version and the limits of this side. What a front-end says of itself, if anything, changes nothing here.
fn version(message: &Message) -> io::Result<Answer> {
    let (Version { major, minor }, text) = message.parse()?;
    let text = String::from_utf8_lossy(text);
    log::debug!("the front-end speaks version {major}.{minor}: {:?}", text.trim_end_matches('\0'));
    if major != 0 {
        return Err(invalid(format!("the front-end speaks version {major}.{minor} of the protocol, not 0.{MINOR}")));
    }
    let version = Version { major, minor: minor.min(MINOR) };
    let text = format!("{{\"capabilities\":{{\"max_msg_fds\":{MAX_FDS},\"max_data_xfer_size\":{MAX_DATA}}}}}\0");
    Ok(Answer::new(&[version.as_bytes(), text.as_bytes()]))
}

/// The bytes of an access, if there is such a region and they are not too many.
fn check_access(access: &RegionAccess) -> io::Result<usize> {
    let count = access.count as usize;
    if access.region >= VFIO_PCI_NUM_REGIONS || count > MAX_DATA {
        return Err(invalid(format!("an access of {count} bytes in region {}", access.region)));
    }
    Ok(count)
}

/// A region; of BAR0 the doorbells can be mapped.
fn region_info(front_end: &FrontEnd, message: &Message) -> io::Result<Answer> {
    let (asked, _) = message.parse::<RegionInfo>()?;
    let layout = &front_end.shared.layout;
    let access = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let mapped = asked.index == VFIO_PCI_BAR0_REGION_INDEX;
    let (size, flags) = match asked.index {
        VFIO_PCI_BAR0_REGION_INDEX => (layout.bytes, access | VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS),
        VFIO_PCI_CONFIG_REGION_INDEX => (CONFIG_BYTES as u64, access),
        index if index < VFIO_PCI_NUM_REGIONS => (0, 0),
        index => return Err(invalid(format!("there is no region {index}"))),
    };
    let own = size_of::<RegionInfo>() as u32;
    let argsz = if mapped { own + size_of::<SparseArea>() as u32 } else { own };
    let mut info = RegionInfo { argsz, flags, index: asked.index, capabilities: 0, size, offset: 0 };
    // A front-end that has no room for the capability asks again, with the size it is told.
    if !mapped || asked.argsz < argsz {
        return Ok(Answer::new(&[info.as_bytes()]));
    }
    info.capabilities = own;
    let area = SparseArea {
        id: VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16,
        version: 1,
        next: 0,
        areas: 1,
        reserved: 0,
        offset: DOORBELLS,
        size: layout.doorbell_bytes,
    };
    Ok(Answer { with_memory: true, ..Answer::new(&[info.as_bytes(), area.as_bytes()]) })
}
