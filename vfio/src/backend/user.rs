//! A device on a vfio-user socket.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_MMAP,
};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::client::{Client, Reply};
use super::messages::{
    Access, Area, Capability, Command, DMA_READ_WRITE, DmaMap, DmaUnmap, Info, IrqInfo, RegionInfo, SetIrqs,
    SparseAreas,
};
use super::{Backend, CONFIG_REGION, MappedArea, Notice, Notices, Region, ServerIdentity};
use crate::config_space::{self, CAPABILITY_MSIX};
use crate::dma::page_size;
use crate::{Error, Guard, IovaRange};

/// A server has no IOMMU whose ranges could be asked for. These fit the address width of any that it may model; they
/// leave out page 0, which is how null pointers look.
const IOVA_RANGE: IovaRange = IovaRange { start: 0x1000_0000, last: (1 << 47) - 1 };

/// What registers are made of whose memory the server has taken away: what those of a device that has gone are made of.
const GONE: u8 = 0xff;

/// The granularity at which the protocol maps memory.
const PAGE: u64 = 4096;

/// What a description of a region may take, bytes: as many areas as no device has.
const MOST_OF_A_REGION: u32 = 32 << 10;

/// What requests are called in errors.
const DESCRIBE: &str = "describe regions";
const READ: &str = "read a register";
const WRITE: &str = "write a register";
const MAP: &str = "map memory for DMA";
const UNMAP: &str = "unmap memory from DMA";

pub(crate) struct UserBackend {
    client: Client,
    server: ServerIdentity,
    notices: Notices,
    regions: Vec<Region>,
    vectors: u32,
    /// For the error of one that is refused: a server may take only so many.
    mappings: AtomicUsize,
}

/// What a server says about a region.
struct Described {
    flags: u32,
    size: u64,
    file: Option<(File, u64)>,
    sparse: Vec<(u64, u64)>,
}

impl UserBackend {
    /// Opens the device; the server may take `patience` to answer a request.
    pub(crate) fn open(socket: &Path, patience: Duration) -> Result<UserBackend, Error> {
        let client = Client::open(socket, patience)?;
        let notices = watch(&client).map_err(|error| Error::Connect {
            socket: socket.to_owned(),
            reason: format!("its end cannot be seen: {error}"),
        })?;
        let server = ServerIdentity::behind(client.stream());
        let info = Info { argsz: size_of::<Info>() as u32, ..Info::default() };
        let info: Info = ask(&client, DESCRIBE, Command::GetInfo, &info)?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(Error::Connect { socket: socket.to_owned(), reason: "it does not serve a PCI device".into() });
        }
        let mut regions = vec![Region::default(); CONFIG_REGION as usize + 1];
        for (index, region) in (0..info.regions).zip(&mut regions) {
            *region = map_region(describe(&client, index)?, page_size() as u64).map_err(|reason| Error::BadRegion {
                device: format!("the vfio-user server on {}", socket.display()),
                region: format!("region {index}"),
                reason,
            })?;
        }
        let mut backend = UserBackend { client, server, notices, regions, vectors: 0, mappings: AtomicUsize::new(0) };
        if info.irqs > VFIO_PCI_MSIX_IRQ_INDEX {
            backend.vectors = backend.count_vectors()?;
        }
        Ok(backend)
    }

    /// Asks for the vectors only if the device has MSI-X at all.
    fn count_vectors(&self) -> Result<u32, Error> {
        if self.regions[CONFIG_REGION as usize].size == 0
            || config_space::find_capability(self, CAPABILITY_MSIX)?.is_none()
        {
            return Ok(0);
        }
        let argsz = size_of::<IrqInfo>() as u32;
        let info = IrqInfo { argsz, index: VFIO_PCI_MSIX_IRQ_INDEX, ..IrqInfo::default() };
        Ok(ask::<_, IrqInfo>(&self.client, "get interrupt information", Command::GetIrqInfo, &info)?.count)
    }

    /// Reads or writes registers; the reply has to be about just these.
    fn access(
        &self,
        request: &'static str,
        command: Command,
        access: Access,
        data: &[u8],
        reply_data: usize,
    ) -> Result<Reply, Error> {
        let payload = [access.as_bytes(), data].concat();
        let bytes = size_of::<Access>() + reply_data;
        let reply = self.client.call(request, command, &payload, &[], bytes..=bytes);
        let reply = reply.map_err(|error| {
            about(error, format_args!("{} bytes at {:#x} of region {}", access.bytes, access.offset, access.region))
        })?;
        match reply.read::<Access>() {
            Some(answered) if answered == access => Ok(reply),
            answered => Err(self.client.nonsense(request, format_args!("it answers {answered:?} to {access:?}"))),
        }
    }

    fn set_irqs(&self, request: &'static str, data: u32, start: u32, events: &[&EventFd]) -> Result<(), Error> {
        let message = SetIrqs {
            argsz: size_of::<SetIrqs>() as u32,
            flags: data | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: VFIO_PCI_MSIX_IRQ_INDEX,
            start,
            count: events.len() as u32,
        };
        // SAFETY: each event has its descriptor open for as long as it is borrowed.
        let descriptor = |event: &&EventFd| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        // A borrow of `events`, which outlives the call below.
        let files: Vec<BorrowedFd<'_>> = events.iter().map(descriptor).collect();
        self.client.call(request, Command::SetIrqs, message.as_bytes(), &files, 0..=0).map(drop)
    }
}

/// Watches for the end of the connection.
fn watch(client: &Client) -> std::io::Result<Notices> {
    let mut notices = Notices::new()?;
    notices.add_event(Notice::GivenUp, client.given_up().try_clone()?)?;
    notices.add_connection(client.stream())?;
    Ok(notices)
}

/// Sends a message whose answer is one structure.
fn ask<Q: IntoBytes + Immutable, A: FromBytes + KnownLayout + Immutable>(
    client: &Client,
    request: &'static str,
    command: Command,
    question: &Q,
) -> Result<A, Error> {
    let reply = client.call(request, command, question.as_bytes(), &[], size_of::<A>()..=size_of::<A>())?;
    reply.read().ok_or_else(|| client.nonsense(request, "it is too short"))
}

/// Adds what was asked for to a server's refusal.
fn about(error: Error, what: impl std::fmt::Display) -> Error {
    match error {
        Error::Server { socket, request, reason } => {
            Error::Server { socket, request, reason: format!("{what}: {reason}") }
        }
        other => other,
    }
}

/// Asks for a region: twice if there is more to tell than was asked for, as the answer says.
fn describe(client: &Client, index: u32) -> Result<Described, Error> {
    let bytes = size_of::<RegionInfo>();
    let mut question = RegionInfo { argsz: bytes as u32, index, ..RegionInfo::default() };
    loop {
        let expected = bytes..=question.argsz as usize;
        let reply = client.call(DESCRIBE, Command::GetRegionInfo, question.as_bytes(), &[], expected);
        let mut reply = reply.map_err(|error| about(error, format_args!("region {index}")))?;
        let nonsense = |what: String| client.nonsense(DESCRIBE, format_args!("region {index}: {what}"));
        let info = reply.read::<RegionInfo>().ok_or_else(|| nonsense("it is too short".into()))?;
        if info.index != index {
            return Err(nonsense(format!("it is about region {}", info.index)));
        }
        if info.argsz > question.argsz && question.argsz as usize == bytes {
            if info.argsz > MOST_OF_A_REGION {
                return Err(nonsense(format!("its description would take {} bytes", info.argsz)));
            }
            question.argsz = info.argsz;
            continue;
        }
        if info.argsz as usize > reply.payload.len() {
            return Err(nonsense(format!("{} bytes were announced, and {} came", info.argsz, reply.payload.len())));
        }
        let sparse = sparse_areas(&reply.payload, info.first_capability).map_err(nonsense)?;
        let file = (!reply.files.is_empty()).then(|| (File::from(reply.files.swap_remove(0)), info.offset));
        return Ok(Described { flags: info.flags, size: info.bytes, file, sparse });
    }
}

/// The mappable areas among a region's capabilities, of which the first begins at `next`; 0 if there is none.
fn sparse_areas(description: &[u8], mut next: u32) -> Result<Vec<(u64, u64)>, String> {
    let mut areas = Vec::new();
    let mut end = size_of::<RegionInfo>();
    while next != 0 {
        let start = next as usize;
        // Each one lies behind the one before, so that the list has an end.
        if start < end {
            return Err(format!("a capability at {start} begins before byte {end}"));
        }
        let outside = || format!("a capability at {start} does not lie within {} bytes", description.len());
        let rest = description.get(start..).ok_or_else(outside)?;
        let (capability, rest) = Capability::read_from_prefix(rest).map_err(|_| outside())?;
        next = capability.next;
        end = start + size_of::<Capability>();
        if u32::from(capability.id) != VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            continue;
        }
        let (count, mut rest) = SparseAreas::read_from_prefix(rest).map_err(|_| outside())?;
        for _ in 0..count.areas {
            let (area, behind) = Area::read_from_prefix(rest).map_err(|_| outside())?;
            areas.push((area.offset, area.bytes));
            rest = behind;
        }
    }
    Ok(areas)
}

/// Maps what is offered, on a machine with pages of `page` bytes.
fn map_region(region: Described, page: u64) -> Result<Region, String> {
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
        // What does not begin at a page of this machine can only be reached by request.
        if !start.is_multiple_of(page) {
            continue;
        }
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
        let access = Access { offset, region, bytes: data.len() as u32 };
        let reply = self.access(READ, Command::RegionRead, access, &[], data.len())?;
        data.copy_from_slice(&reply.payload[size_of::<Access>()..]);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let access = Access { offset, region, bytes: data.len() as u32 };
        self.access(WRITE, Command::RegionWrite, access, data, 0).map(drop)
    }

    fn interrupt_vectors(&self) -> u32 {
        self.vectors
    }

    /// One message per vector: a server need not take more than one descriptor with a message ("max_msg_fds").
    fn enable_interrupts(&self, events: &[&EventFd]) -> Result<(), Error> {
        self.disable_interrupts()?;
        for (vector, event) in (0u32..).zip(events) {
            self.set_irqs("enable interrupts", VFIO_IRQ_SET_DATA_EVENTFD, vector, &[event])
                .map_err(|error| about(error, format_args!("vector {vector}")))?;
        }
        Ok(())
    }

    fn disable_interrupts(&self) -> Result<(), Error> {
        self.set_irqs("disable interrupts", VFIO_IRQ_SET_DATA_NONE, 0, &[])
    }

    fn reset(&self) -> Result<(), Error> {
        self.client.call("reset the device", Command::Reset, &[], &[], 0..=0).map(drop)
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn server(&self) -> ServerIdentity {
        self.server
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
        let argsz = size_of::<DmaMap>() as u32;
        let bytes = bytes as u64;
        let message = DmaMap { argsz, flags: DMA_READ_WRITE, offset: file_offset, address: iova, bytes };
        let mapped = self.client.call(MAP, Command::DmaMap, message.as_bytes(), &[file.as_fd()], 0..=0);
        // Relaxed, here and below: the number is for a text.
        mapped.map_err(|error| {
            let others = self.mappings.load(Ordering::Relaxed);
            about(error, format_args!("{bytes:#x} bytes at {iova:#x}, with {others} mappings there already"))
        })?;
        self.mappings.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A server forgets the memory of a connection that has ended, so that the end unmaps everything. One that is not dead
    /// but stuck forgets nothing before it runs again: it has mapped the memory itself, no IOMMU stands between, and what it
    /// was about to write may still be written then.
    fn dma_unmap(&self, iova: u64, bytes: usize) -> Result<(), Error> {
        let bytes = bytes as u64;
        let argsz = size_of::<DmaUnmap>() as u32;
        let message = DmaUnmap { argsz, flags: 0, address: iova, bytes };
        match ask::<_, DmaUnmap>(&self.client, UNMAP, Command::DmaUnmap, &message) {
            Ok(_) => {
                self.mappings.fetch_sub(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) if self.client.is_over() => {
                log::debug!("DMA at {iova:#x} ends with its connection: {error}");
                Ok(())
            }
            Err(error) => Err(about(error, format_args!("{bytes:#x} bytes at {iova:#x}"))),
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
        Described { flags, size, file, sparse: sparse.to_vec() }
    }

    fn areas(region: Described) -> Result<Vec<(u64, usize)>, String> {
        Ok(map_region(region, PAGE)?.areas.iter().map(|area| (area.offset, area.memory.len())).collect())
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
    fn areas_within_a_page_of_a_machine_with_larger_ones_are_left_out() {
        let sparse = [(0, 0x1000), (0x1000, 0x1000)];
        let mapped = map_region(region(MMAP, 0x4000, 0, &sparse), 0x10000).unwrap();
        assert_eq!(mapped.areas.iter().map(|area| area.offset).collect::<Vec<_>>(), [0]);
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

    /// A description whose capabilities begin at 32: words of 4 bytes, and 0 where they end.
    fn capabilities(words: &[u32]) -> Vec<u8> {
        [vec![0; 32], words.iter().flat_map(|word| word.to_ne_bytes()).collect()].concat()
    }

    #[test]
    fn areas_are_found_behind_other_capabilities() {
        // Kind 2 at 32, which leads to the areas at 40.
        let list = capabilities(&[2, 40, 1 | 1 << 16, 0, 2, 0, 0x1000, 0, 0x2000, 0, 0x8000, 0, 0x1000, 0]);
        assert_eq!(sparse_areas(&list, 32).unwrap(), [(0x1000, 0x2000), (0x8000, 0x1000)]);
        assert_eq!(sparse_areas(&list, 0).unwrap(), []);
    }

    #[test]
    fn lists_that_loop_or_leave_are_refused() {
        let list = |next| capabilities(&[2, next, 0, 0]);
        for next in [32, 8, 36, 44, 48, u32::MAX] {
            assert!(sparse_areas(&list(next), 32).is_err(), "{next}");
        }
        for areas in [2, u32::MAX] {
            let list = capabilities(&[1, 0, areas, 0, 0x1000, 0, 0x1000, 0]);
            assert!(sparse_areas(&list, 32).is_err(), "{areas}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_list_makes_the_parser_panic(bytes in proptest::collection::vec(0u8..64, 0..200), first: u32) {
            let _ = sparse_areas(&bytes, first);
            let _ = sparse_areas(&bytes, 32);
        }
    }
}
