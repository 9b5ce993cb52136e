//! A PCI function through the kernel's VFIO: by iommufd and the device's own character device where the kernel has
//! both, else by its IOMMU group in a type1v2 container.
//!
//! What `vfio-ioctls` (0.10) does not do, and is done here:
//! - Its `region_read`, `region_write` and `reset` drop errors: a second descriptor of the device is read, written and
//!   reset instead.
//! - It does not tell which DMA addresses may be used: VFIO_IOMMU_GET_INFO and IOMMU_IOAS_IOVA_RANGES are asked.
//! - It does not map regions.
//! - It does not tell that a device is wanted back: `watch_for_end` has the kernel signal that.
//! - Dropping its `VfioDevice` panics when the device was removed from the machine: the panic is caught.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use iommufd_bindings::{IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_TYPE, iommu_ioas_iova_ranges, iommu_iova_range};
use iommufd_ioctls::IommuFd;
use memmap2::MmapOptions;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_TYPE,
    vfio_iommu_type1_info,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioIommufd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use self::explain::{Subject, explain, on_open};
use self::space::{IommuInterface, OpenDevices, Space};
use self::sysfs::Roots;
use super::{Backend, CONFIG_REGION, MappedArea, Notice, Notices, Region, ServerIdentity};
use crate::config_space::{self, CAPABILITY_MSIX};
use crate::dma::page_size;
use crate::iova::RangeAllocator;
use crate::{Error, IovaRange, PciAddress};

mod explain;
mod layout;
mod space;
pub(crate) mod sysfs;

ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, IOMMUFD_TYPE.into(), IOMMUFD_CMD_IOAS_IOVA_RANGES);

pub(crate) struct KernelBackend {
    // In the order in which they have to go: the kernel gives a device back when no mapping and descriptor of it is left.
    regions: Vec<Region>,
    file: File,
    device: OpenDevice,
    space: Arc<Space>,
    subject: Subject,
    /// Where each region begins in the device's file, bytes.
    offsets: Vec<u64>,
    numa_node: Option<u32>,
    interrupts_enabled: Mutex<bool>,
    notices: Notices,
    /// Last: says that the device is open.
    _open: Arc<()>,
}

/// What the IOMMU lets be mapped.
struct Iommu {
    ranges: Vec<IovaRange>,
    /// The smallest page, bytes.
    page: u64,
}

/// A device whose drop does not panic.
struct OpenDevice(PciAddress, Option<VfioDevice>);

impl OpenDevice {
    fn get(&self) -> &VfioDevice {
        self.1.as_ref().expect("it is taken only when dropped")
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let device = self.1.take();
        if catch_unwind(AssertUnwindSafe(|| drop(device))).is_err() {
            log::warn!("{}: it could not be given back in order; was it removed?", self.0);
        }
    }
}

impl KernelBackend {
    pub(crate) fn open(address: PciAddress) -> Result<KernelBackend, Error> {
        let roots = Roots::default();
        let found = sysfs::find(&roots, address)?;
        let group = found.interfaces.group;
        let file = found.interfaces.cdev.as_ref().map_or_else(String::new, |cdev| cdev.display().to_string());
        let mut subject = Subject { address, group, file, unviable: Vec::new() };
        let mut open = OpenDevices::lock();
        if open.has(address) {
            return Err(Error::NotUsable {
                device: address.to_string(),
                reason: "it is open already, by this very program".into(),
                advice: "use what was opened, or close all of it first".into(),
            });
        }
        let (device, space) = match &found.interfaces.cdev {
            Some(cdev) => match open_iommufd(&subject, cdev, open.space(found.group, true)) {
                // The administrator may have given the user only one of the two interfaces.
                Err(Error::Kernel { source, .. })
                    if source.kind() == io::ErrorKind::PermissionDenied && group.is_some() =>
                {
                    log::debug!("{address}: {} may not be opened ({source}), trying its group", cdev.display());
                    open_group(&roots, &mut subject, &found.path, open.space(found.group, false))
                }
                opened => opened,
            },
            None => open_group(&roots, &mut subject, &found.path, open.space(found.group, false)),
        }?;
        // SAFETY: `device` has this descriptor open, and lives until the call returns.
        let descriptor = unsafe { BorrowedFd::borrow_raw(device.get().as_raw_fd()) };
        let file = descriptor.try_clone_to_owned().map(File::from);
        let file = file.map_err(|source| kernel_error(&subject, "duplicating its descriptor", source))?;
        let offsets = (0..=CONFIG_REGION).map(|index| device.get().get_region_offset(index)).collect();
        let sizes = (0..=CONFIG_REGION).map(|index| device.get().get_region_size(index));
        let notices = watch_for_end(device.get(), address)
            .map_err(|source| kernel_error(&subject, "preparing to hear of its removal", source))?;
        let mut backend = KernelBackend {
            regions: sizes.map(|size| Region { size, areas: Vec::new() }).collect(),
            file,
            device,
            _open: open.add(address, found.group, &space),
            space,
            subject,
            offsets,
            numa_node: found.numa_node,
            interrupts_enabled: Mutex::new(false),
            notices,
        };
        backend.map_regions()?;
        log::info!(
            "{address}: opened by {}",
            if backend.space.is_iommufd() { "iommufd".to_owned() } else { format!("IOMMU group {}", found.group) }
        );
        Ok(backend)
    }

    fn map_regions(&mut self) -> Result<(), Error> {
        let table = self.msix_table()?;
        for index in 0..CONFIG_REGION {
            let device = self.device.get();
            let table = table.filter(|table| table.0 == index).map(|(_, offset, bytes)| (offset, bytes));
            let (flags, capabilities) = (device.get_region_flags(index), device.get_region_caps(index));
            let size = self.regions[index as usize].size;
            for (offset, bytes) in layout::mappable(size, flags, &capabilities, table, page_size() as u64) {
                let start = self.offsets[index as usize].checked_add(offset);
                let (Some(start), Ok(len)) = (start, usize::try_from(bytes)) else { continue };
                let memory = MmapOptions::new().offset(start).len(len).map_raw(&self.file);
                let memory = memory.map_err(|source| kernel_error(&self.subject, "mapping its registers", source))?;
                self.regions[index as usize].areas.push(Arc::new(MappedArea { offset, _guard: None, memory }));
            }
        }
        Ok(())
    }

    /// BAR, offset and bytes of the MSI-X table (PCI Local Bus 3.0, section 6.8.2: message control, table offset).
    fn msix_table(&self) -> Result<Option<(u32, u64, u64)>, Error> {
        let Some(at) = config_space::find_capability(self, CAPABILITY_MSIX)? else { return Ok(None) };
        let mut control = [0; 2];
        let mut table = [0; 4];
        self.read(CONFIG_REGION, u64::from(at) + 2, &mut control)?;
        self.read(CONFIG_REGION, u64::from(at) + 4, &mut table)?;
        let vectors = u64::from(u16::from_le_bytes(control) & 0x7ff) + 1;
        let table = u32::from_le_bytes(table);
        Ok(Some((table & 7, u64::from(table & !7), vectors * 16)))
    }

    fn explain(&self, attempt: &'static str, error: VfioError) -> Error {
        explain(&self.subject, attempt, error)
    }

    /// Where an access lies in the device's file.
    fn place(&self, region: u32, offset: u64) -> u64 {
        // Offsets within a region are checked by the caller, and the kernel's regions do not overflow.
        self.offsets[region as usize].wrapping_add(offset)
    }
}

/// Has the kernel signal when it wants the device back, and when it has an error that only a reset ends. Not every device and
/// kernel has both.
fn watch_for_end(device: &VfioDevice, address: PciAddress) -> io::Result<Notices> {
    let mut notices = Notices::new()?;
    for (index, notice) in [(VFIO_PCI_REQ_IRQ_INDEX, Notice::RemovalRequested), (VFIO_PCI_ERR_IRQ_INDEX, Notice::Error)]
    {
        if device.get_irq_info(index).is_none_or(|info| info.count == 0) {
            continue;
        }
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        match device.enable_irq(index, vec![&event]) {
            Ok(()) => notices.add_event(notice, event)?,
            Err(error) => log::debug!("{address}: the kernel will not tell when {notice}: {error}"),
        }
    }
    Ok(notices)
}

type Opened = (OpenDevice, Arc<Space>);

/// Opens a device by its character device and an iommufd. `shared` is the address space of its group, if another device of that
/// is open.
fn open_iommufd(subject: &Subject, cdev: &Path, shared: Option<Arc<Space>>) -> Result<Opened, Error> {
    let open = |attempt, path: &Path| {
        OpenOptions::new().read(true).write(true).open(path).map_err(|source| Error::Kernel {
            attempt,
            device: subject.address.to_string(),
            advice: on_open(subject.address, &source, &path.display().to_string()),
            source,
        })
    };
    let device = open("opening its character device", cdev)?;
    let dma = match shared.as_ref().map(|space| &space.iommu) {
        Some(IommuInterface::Iommufd(dma)) => dma.clone(),
        _ => {
            let iommufd = Arc::new(IommuFd::new_from_fd(open("opening /dev/iommu", Path::new("/dev/iommu"))?));
            let dma = VfioIommufd::new(iommufd, None, None);
            Arc::new(dma.map_err(|error| explain(subject, "making an I/O address space", error))?)
        }
    };
    let device = VfioDevice::new_from_fd(device, dma.clone(), true);
    let device = device.map_err(|error| explain(subject, "opening the device", error))?;
    let device = OpenDevice(subject.address, Some(device));
    if let Some(space) = shared {
        return Ok((device, space));
    }
    // The ranges are those of the attached device, so they are asked for only now.
    let iommu = iommufd_ranges(&dma).map_err(|source| kernel_error(subject, "asking for its DMA addresses", source))?;
    Ok((device, Space::new(IommuInterface::Iommufd(dma), iommu.ranges, iommu.page)))
}

/// Opens a device by its group and a container. `shared` is the address space of its group, if another device of that is open.
fn open_group(roots: &Roots, subject: &mut Subject, sysfs: &Path, shared: Option<Arc<Space>>) -> Result<Opened, Error> {
    if let Some(group) = subject.group {
        subject.file = format!("/dev/vfio/{group}");
        subject.unviable = sysfs::unviable(roots, group);
    }
    let container = match shared.as_ref().map(|space| &space.iommu) {
        Some(IommuInterface::Group(container)) => container.clone(),
        _ => Arc::new(VfioContainer::new(None).map_err(|error| explain(subject, "opening a container", error))?),
    };
    let device = VfioDevice::new(sysfs, container.clone(), true);
    let device = device.map_err(|error| explain(subject, "opening the device", error))?;
    let device = OpenDevice(subject.address, Some(device));
    if let Some(space) = shared {
        return Ok((device, space));
    }
    let iommu =
        type1_ranges(&container).map_err(|source| kernel_error(subject, "asking for its DMA addresses", source))?;
    Ok((device, Space::new(IommuInterface::Group(container), iommu.ranges, iommu.page)))
}

fn kernel_error(subject: &Subject, attempt: &'static str, source: io::Error) -> Error {
    Error::Kernel { attempt, device: subject.address.to_string(), source, advice: String::new() }
}

fn iommufd_ranges(dma: &VfioIommufd) -> io::Result<Iommu> {
    let mut allowed: Vec<iommu_iova_range> = Vec::new();
    // Asked with too little room, the kernel says how much it needs. The ranges may change in between, though not often.
    for _ in 0..8 {
        let mut request = iommu_ioas_iova_ranges {
            size: size_of::<iommu_ioas_iova_ranges>() as u32,
            ioas_id: dma.ioas().id(),
            num_iovas: allowed.len() as u32,
            allowed_iovas: allowed.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        // SAFETY: the request says truly how many ranges `allowed` has room for, and both outlive the call.
        let result = unsafe { ioctl_with_mut_ref(&**dma.iommufd(), IOMMU_IOAS_IOVA_RANGES(), &mut request) };
        let error = io::Error::last_os_error();
        let needed = request.num_iovas as usize;
        if result == 0 && needed <= allowed.len() {
            allowed.truncate(needed);
            let ranges = allowed.iter().map(|range| IovaRange { start: range.start, last: range.last }).collect();
            return Ok(Iommu { ranges, page: request.out_iova_alignment });
        }
        if result != 0 && error.raw_os_error() != Some(libc::EMSGSIZE) {
            return Err(error);
        }
        allowed.resize(needed, iommu_iova_range::default());
    }
    Err(io::Error::other("the list of addresses keeps growing"))
}

fn type1_ranges(container: &VfioContainer) -> io::Result<Iommu> {
    // As 64-bit words, so that the buffer is aligned as the structure has to be.
    let mut words = vec![0u64; size_of::<vfio_iommu_type1_info>() / 8];
    for _ in 0..8 {
        let room = (words.len() * 8) as u32;
        words.fill(0);
        words[0] = u64::from_ne_bytes([room.to_ne_bytes(), [0; 4]].concat().try_into().expect("4 and 4 bytes are 8"));
        // SAFETY: the kernel writes at most `room` bytes, as told by the first field, into the buffer, which has them.
        let result = unsafe { ioctl_with_mut_ptr(container, VFIO_IOMMU_GET_INFO(), words.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let needed = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if needed > room {
            // It wrote no capabilities, and says how much room they need.
            words.resize(needed.div_ceil(8) as usize, 0);
            continue;
        }
        let info = layout::parse_type1_info(&bytes).ok_or_else(|| io::Error::other("its answer makes no sense"))?;
        let ranges = info.ranges.unwrap_or_else(|| {
            log::warn!(
                "the kernel does not tell which DMA addresses may be used (Linux 5.4 and later do): assuming 39 bits"
            );
            layout::assumed_ranges()
        });
        let page = if info.page_sizes == 0 { 4096 } else { 1 << info.page_sizes.trailing_zeros() };
        return Ok(Iommu { ranges, page });
    }
    Err(io::Error::other("the list of addresses keeps growing"))
}

impl Backend for KernelBackend {
    fn region(&self, index: u32) -> Region {
        self.regions.get(index as usize).cloned().unwrap_or_default()
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let result = self.file.read_exact_at(data, self.place(region, offset));
        result.map_err(|source| kernel_error(&self.subject, "reading a register", source))
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let result = self.file.write_all_at(data, self.place(region, offset));
        result.map_err(|source| kernel_error(&self.subject, "writing a register", source))
    }

    fn interrupt_vectors(&self) -> u32 {
        self.device.get().get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).map_or(0, |info| info.count)
    }

    fn enable_interrupts(&self, events: &[&EventFd]) -> Result<(), Error> {
        self.disable_interrupts()?;
        let mut enabled = self.interrupts_enabled.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.device.get().enable_msix(events.to_vec());
        result.map_err(|error| self.explain("enabling interrupts", error))?;
        *enabled = true;
        Ok(())
    }

    /// The kernel refuses to disable what is not enabled.
    fn disable_interrupts(&self) -> Result<(), Error> {
        let mut enabled = self.interrupts_enabled.lock().unwrap_or_else(PoisonError::into_inner);
        if *enabled {
            self.device.get().disable_msix().map_err(|error| self.explain("disabling interrupts", error))?;
            *enabled = false;
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        // SAFETY: the request takes no argument.
        let result = unsafe { ioctl_with_val(&self.file, VFIO_DEVICE_RESET(), 0) };
        if result == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        let advice = match source.raw_os_error() {
            Some(libc::EINVAL) => "the kernel knows no way to reset this function alone",
            Some(libc::EAGAIN) => "the kernel is busy with the device: try again",
            _ => "",
        };
        let device = self.subject.address.to_string();
        Err(Error::Kernel { attempt: "resetting the device", device, source, advice: advice.into() })
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn server(&self) -> ServerIdentity {
        ServerIdentity::Kernel
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        self.space.ranges.clone()
    }

    fn iova_alignment(&self) -> u64 {
        // The kernel pins whole pages of its own, whatever the IOMMU could do.
        self.space.page.max(page_size() as u64)
    }

    fn addresses(&self, new: &dyn Fn() -> RangeAllocator) -> Arc<Mutex<RangeAllocator>> {
        self.space.addresses.get_or_init(|| Arc::new(Mutex::new(new()))).clone()
    }

    fn pins_memory(&self) -> bool {
        true
    }

    unsafe fn dma_map(&self, iova: u64, _: &File, _: u64, host: *mut u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller keeps the memory mapped until it is unmapped, and it is seen only as atomics.
        let result = unsafe { self.space.dma().vfio_dma_map(iova, bytes, host) };
        result.map_err(|error| self.explain("mapping memory for DMA", error))
    }

    fn dma_unmap(&self, iova: u64, bytes: usize) -> Result<(), Error> {
        let result = self.space.dma().vfio_dma_unmap(iova, bytes);
        result.map_err(|error| self.explain("unmapping memory from DMA", error))
    }
}
