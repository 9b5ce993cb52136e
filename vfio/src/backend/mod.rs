//! The two ways to a device, behind one trait: [`user`] (a vfio-user socket) and [`kernel`] VFIO.

use std::fs::File;
use std::sync::{Arc, Mutex};

use memmap2::MmapRaw;
use vmm_sys_util::eventfd::EventFd;

use crate::iova::RangeAllocator;
use crate::{Error, Guard, IovaRange};

mod client;
#[cfg(test)]
pub(crate) mod fake;
mod identity;
pub(crate) mod kernel;
mod messages;
mod notices;
pub(crate) mod user;

pub use identity::ServerIdentity;
pub use notices::Notice;
pub(crate) use notices::Notices;

/// VFIO's number of the PCI configuration space among a device's regions (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub(crate) const CONFIG_REGION: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// A part of a region that lies in this process's address space.
pub(crate) struct MappedArea {
    /// Where the area begins in its region, bytes.
    pub offset: u64,
    /// The guard of memory that another process may take away. It stands before the mapping, so that it is dropped first.
    pub _guard: Option<Guard>,
    /// The mapping; its length is the area's length.
    pub memory: MmapRaw,
}

/// A region as it was found when the device was opened.
#[derive(Clone, Default)]
pub(crate) struct Region {
    /// Bytes; 0 if the device does not have the region.
    pub size: u64,
    /// The parts that are mapped, in no particular order; all other parts are reached by request.
    pub areas: Vec<Arc<MappedArea>>,
}

/// What [`Device`](crate::Device) and [`DmaSpace`](crate::DmaSpace) need from the way to a device.
///
/// Callers have checked that accesses lie within their region. Every request to a vfio-user server has a deadline. The kernel
/// returns when it has done what was asked: at once, but for a reset of the function, which waits for the hardware, a minute
/// and more if that is in a bad way.
pub(crate) trait Backend: Send + Sync {
    /// The region with VFIO's number `index` (0 to 5: BARs, 7: configuration space).
    fn region(&self, index: u32) -> Region;
    /// Reads a register by request.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error>;
    /// Writes a register by request.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error>;
    /// The number of MSI-X vectors.
    fn interrupt_vectors(&self) -> u32;
    /// Gives vectors `0..events.len()` their eventfds, and disables all others.
    fn enable_interrupts(&self, events: &[&EventFd]) -> Result<(), Error>;
    /// Disables all vectors.
    fn disable_interrupts(&self) -> Result<(), Error>;
    /// Resets the device's function.
    fn reset(&self) -> Result<(), Error>;
    /// What the device tells of its own end.
    fn notices(&self) -> &Notices;
    /// Who serves the device.
    fn server(&self) -> ServerIdentity;
    /// The NUMA node the device is attached to.
    fn numa_node(&self) -> Option<u32>;
    /// The DMA addresses that may be used.
    fn iova_ranges(&self) -> Vec<IovaRange>;
    /// Which of them are free. Another device may have to share them; `new` makes them for the first one.
    fn addresses(&self, new: &dyn Fn() -> RangeAllocator) -> Arc<Mutex<RangeAllocator>> {
        Arc::new(Mutex::new(new()))
    }
    /// What DMA addresses, lengths and memory have to be aligned to, bytes: a power of two, at least 4096.
    fn iova_alignment(&self) -> u64;
    /// Whether mapping memory for DMA also keeps it in memory.
    fn pins_memory(&self) -> bool;
    /// Lets the device reach memory at `iova`.
    ///
    /// # Safety
    /// `host..host + bytes` is a shared mapping of `file` at `file_offset` and stays so until it is unmapped.
    unsafe fn dma_map(
        &self,
        iova: u64,
        file: &File,
        file_offset: u64,
        host: *mut u8,
        bytes: usize,
    ) -> Result<(), Error>;
    /// Takes that away. After an error the device may still reach the memory.
    fn dma_unmap(&self, iova: u64, bytes: usize) -> Result<(), Error>;
}
