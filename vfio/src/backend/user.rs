//! A device on a vfio-user socket.
//!
//! What the `vfio_user` crate (0.1.7) hides, and what is made of it here:
//! - It does not look at the error flag of replies. A refused DMA map, reset or change of interrupts looks like success;
//!   the device will report the commands that use such memory as failed. A refused register access or DMA unmap (of
//!   memory whose map was refused, say) has a shorter reply than the crate waits for: it ends in [`Error::Timeout`] and
//!   the connection is given up.
//! - It has no deadlines and panics on some odd replies: see [`super::connection`].
//! - It does not tell what was negotiated, nor how many kinds of interrupts there are: the least is assumed.
//! - Its `resettable()` is inverted; it is not used.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP,
};
use vmm_sys_util::eventfd::EventFd;

use super::connection::Connection;
use super::{Backend, CONFIG_REGION, MappedArea, Notices, Region};
use crate::config_space::{self, CAPABILITY_MSIX};
use crate::{Error, Guard, IovaRange};

/// A server has no IOMMU whose ranges could be asked for. These fit the address width of any that it may model; they
/// leave out page 0, which is how null pointers look.
const IOVA_RANGE: IovaRange = IovaRange { start: 0x1000_0000, last: (1 << 47) - 1 };

/// What registers are made of whose memory the server has taken away: what those of a device that has gone are made of.
const GONE: u8 = 0xff;

/// The granularity at which the protocol maps memory.
const PAGE: u64 = 4096;

pub(crate) struct UserBackend {
    connection: Connection,
    notices: Notices,
    regions: Vec<Region>,
    vectors: u32,
}

/// What a server says about a region.
struct Described {
    index: u32,
    flags: u32,
    size: u64,
    file: Option<(File, u64)>,
    sparse: Vec<(u64, u64)>,
}

impl UserBackend {
    pub fn open(socket: &Path, deadline: Duration) -> Result<UserBackend, Error> {
        let connection = Connection::open(socket, deadline)?;
        let mut notices =
            Notices::new().map_err(|error| Error::Connect { socket: socket.to_owned(), reason: error.to_string() })?;
        if let Some(Err(error)) = connection.stream().map(|stream| notices.add_connection(stream)) {
            log::debug!("the end of the connection to {} will not be noticed by itself: {error}", socket.display());
        }
        let described = connection.call("describe regions", |client| {
            Ok((0..=CONFIG_REGION).filter_map(|index| client.region(index).map(describe)).collect::<Vec<_>>())
        })?;
        let mut regions = vec![Region::default(); CONFIG_REGION as usize + 1];
        for region in described {
            let index = region.index as usize;
            regions[index] = map_region(region).map_err(|reason| Error::BadRegion {
                device: format!("the vfio-user server on {}", socket.display()),
                region: format!("region {index}"),
                reason,
            })?;
        }
        let mut backend = UserBackend { connection, notices, regions, vectors: 0 };
        backend.vectors = backend.count_vectors()?;
        Ok(backend)
    }

    /// Asks for the vectors only if the device has MSI-X at all: a server may answer an unknown interrupt index with an
    /// error, which the client does not understand.
    fn count_vectors(&self) -> Result<u32, Error> {
        if self.regions[CONFIG_REGION as usize].size == 0
            || config_space::find_capability(self, CAPABILITY_MSIX)?.is_none()
        {
            return Ok(0);
        }
        let info =
            self.connection.call("get interrupt information", |client| client.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX))?;
        Ok(info.count)
    }

    fn duplicate(&self, request: &'static str, file: io::Result<File>) -> Result<File, Error> {
        file.map_err(|error| Error::Server {
            socket: self.connection.socket().to_owned(),
            request,
            reason: format!("its file descriptor cannot be duplicated: {error}"),
        })
    }
}

fn describe(region: &vfio_user::Region) -> Described {
    Described {
        index: region.index,
        flags: region.flags,
        size: region.size,
        file: region.file_offset.as_ref().and_then(|file| match file.file().try_clone() {
            Ok(duplicate) => Some((duplicate, file.start())),
            Err(error) => {
                log::warn!("region {} is not mapped, and slow: its file cannot be duplicated: {error}", region.index);
                None
            }
        }),
        sparse: region.sparse_areas.iter().map(|area| (area.offset, area.size)).collect(),
    }
}

fn map_region(region: Described) -> Result<Region, String> {
    let mut mapped = Region { size: region.size, areas: Vec::new() };
    let Some((file, file_start)) = region.file else { return Ok(mapped) };
    if region.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Ok(mapped);
    }
    let areas = match region.sparse {
        // A region that is not made of pages can be mappable only in parts.
        sparse if sparse.is_empty() && !region.size.is_multiple_of(PAGE) => Vec::new(),
        sparse if sparse.is_empty() => vec![(0, region.size)],
        sparse => sparse,
    };
    for (offset, bytes) in areas {
        let end = offset.checked_add(bytes).filter(|end| *end <= region.size);
        if end.is_none() || bytes == 0 || offset % PAGE != 0 || bytes % PAGE != 0 {
            return Err(format!(
                "its mappable area of {bytes:#x} bytes at {offset:#x} is not made of pages within {:#x} bytes",
                region.size
            ));
        }
        let start = file_start.checked_add(offset).ok_or("its offset in the file overflows")?;
        let memory = map_file(&file, start, bytes)?;
        // SAFETY: the mapping has just been made, of whole pages, and is dropped after the guard. Registers are accessed by
        // volatile accesses only, and mean whatever the server likes.
        let guard = unsafe { Guard::with_fill(memory.as_mut_ptr(), memory.len(), &file, GONE) };
        let guard = Some(guard.map_err(|error| format!("its mapping cannot be guarded: {error}"))?);
        mapped.areas.push(Arc::new(MappedArea { offset, _guard: guard, memory }));
    }
    Ok(mapped)
}

/// Maps a piece of the server's file. A file that is too short is refused at once.
fn map_file(file: &File, start: u64, bytes: u64) -> Result<MmapRaw, String> {
    let length = file.metadata().map_err(|error| format!("its file cannot be looked at: {error}"))?.len();
    let end = start.checked_add(bytes).ok_or("its end in the file overflows")?;
    if end > length {
        return Err(format!("its file has {length:#x} bytes, and {bytes:#x} at {start:#x} are to be mapped"));
    }
    let bytes = usize::try_from(bytes).map_err(|_| "it does not fit the address space")?;
    MmapOptions::new().offset(start).len(bytes).map_raw(file).map_err(|error| format!("it cannot be mapped: {error}"))
}

impl Backend for UserBackend {
    fn region(&self, index: u32) -> Region {
        self.regions.get(index as usize).cloned().unwrap_or_default()
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut bytes = vec![0; data.len()];
        let bytes = self.connection.call("read a register", move |client| {
            client.region_read(region, offset, &mut bytes)?;
            Ok(bytes)
        })?;
        data.copy_from_slice(&bytes);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let bytes = data.to_vec();
        self.connection.call("write a register", move |client| client.region_write(region, offset, &bytes))
    }

    fn interrupt_vectors(&self) -> u32 {
        self.vectors
    }

    /// One message per vector: the protocol lets a server accept no more than one descriptor per message, and the client
    /// does not tell what it negotiated.
    fn enable_interrupts(&self, events: &[&EventFd]) -> Result<(), Error> {
        self.disable_interrupts()?;
        for (vector, event) in (0u32..).zip(events) {
            let event = event.try_clone().map_err(|error| Error::Server {
                socket: self.connection.socket().to_owned(),
                request: "enable interrupts",
                reason: format!("an eventfd cannot be duplicated: {error}"),
            })?;
            self.connection.call("enable interrupts", move |client| {
                let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
                client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, vector, 1, &[event.as_raw_fd()])
            })?;
        }
        Ok(())
    }

    fn disable_interrupts(&self) -> Result<(), Error> {
        self.connection.call("disable interrupts", |client| {
            let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
            client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, 0, &[])
        })
    }

    fn reset(&self) -> Result<(), Error> {
        self.connection.call("reset the device", |client| client.reset())
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn numa_node(&self) -> Option<u32> {
        None
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IOVA_RANGE]
    }

    fn iova_alignment(&self) -> u64 {
        PAGE
    }

    fn pins_memory(&self) -> bool {
        false
    }

    unsafe fn dma_map(
        &self,
        iova: u64,
        file: &File,
        file_offset: u64,
        _host: *mut u8,
        bytes: usize,
    ) -> Result<(), Error> {
        let file = self.duplicate("map memory for DMA", file.try_clone())?;
        self.connection
            .call("map memory for DMA", move |client| client.dma_map(file_offset, iova, bytes as u64, file.as_raw_fd()))
    }

    /// A server forgets the memory of a connection that has ended, so that a broken one unmaps everything. One that is not dead
    /// but stuck forgets nothing before it runs again: it has mapped the memory itself, no IOMMU stands between, and what it
    /// was about to write may still be written then.
    fn dma_unmap(&self, iova: u64, bytes: usize) -> Result<(), Error> {
        let result = self.connection.call("unmap memory from DMA", move |client| client.dma_unmap(iova, bytes as u64));
        match result {
            Err(error) if self.connection.is_broken() => {
                log::debug!("DMA at {iova:#x} ends with its connection: {error}");
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SharedMemory;

    fn region(flags: u32, size: u64, start: u64, sparse: &[(u64, u64)]) -> Described {
        let memory = SharedMemory::create(0x4000).unwrap();
        let file = Some((memory.file().try_clone().unwrap(), start));
        Described { index: 0, flags, size, file, sparse: sparse.to_vec() }
    }

    fn areas(region: Described) -> Result<Vec<(u64, usize)>, String> {
        Ok(map_region(region)?.areas.iter().map(|area| (area.offset, area.memory.len())).collect())
    }

    const MMAP: u32 = VFIO_REGION_INFO_FLAG_MMAP;

    #[test]
    fn exactly_the_sparse_areas_are_mapped() {
        let sparse = [(0x1000, 0x1000), (0x3000, 0x1000)];
        assert_eq!(areas(region(MMAP, 0x4000, 0, &sparse)).unwrap(), [(0x1000, 0x1000), (0x3000, 0x1000)]);
    }

    #[test]
    fn without_sparse_areas_the_whole_region_is_mapped_if_it_is_pages() {
        assert_eq!(areas(region(MMAP, 0x4000, 0, &[])).unwrap(), [(0, 0x4000)]);
        assert_eq!(areas(region(MMAP, 0x3000, 0x1000, &[])).unwrap(), [(0, 0x3000)]);
        assert_eq!(areas(region(MMAP, 0x3800, 0, &[])).unwrap(), []);
    }

    #[test]
    fn nothing_is_mapped_that_is_not_offered() {
        assert_eq!(areas(region(0, 0x4000, 0, &[(0, 0x1000)])).unwrap(), []);
        let no_file = Described { file: None, ..region(MMAP, 0x4000, 0, &[(0, 0x1000)]) };
        assert_eq!(areas(no_file).unwrap(), []);
    }

    #[test]
    fn areas_outside_the_region_or_its_file_are_refused() {
        for (start, area) in [
            (0, (0x4000, 0x1000)),
            (0, (0x1000, 0x4000)),
            (0, (u64::MAX - 0xfff, 0x1000)),
            (0x1000, (0x3000, 0x1000)),
            (u64::MAX - 0xfff, (0x1000, 0x1000)),
            (0, (0x1000, 0)),
            (0, (0x10, 0x1000)),
        ] {
            assert!(areas(region(MMAP, 0x4000, start, &[area])).is_err(), "{start:#x} {area:x?}");
        }
    }
}
