//! Memory that a device can reach.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::backend::Backend;

mod buffer;
mod iova;
mod memory;

use buffer::Pool;
pub use buffer::{DmaBuffer, DmaElement, DmaSlice};
pub use iova::IovaRange;
use iova::RangeAllocator;
pub use memory::SharedMemory;
pub(crate) use memory::page_size;

/// DMA addresses are congruent to the memory's offset in its file modulo this, bytes. Hugepages begin at multiples of
/// it, in the file as in physical memory, so that the IOMMU can map them by its large pages.
const LARGE_PAGE: u64 = 2 << 20;

/// The DMA address space of a device. Clones are the same space.
#[derive(Clone)]
pub struct DmaSpace {
    inner: Arc<Inner>,
}

struct Inner {
    device: String,
    backend: Arc<dyn Backend>,
    ranges: Vec<IovaRange>,
    alignment: u64,
    addresses: Mutex<RangeAllocator>,
    pool: Pool,
}

impl DmaSpace {
    pub(crate) fn new(backend: Arc<dyn Backend>, device: String) -> DmaSpace {
        let alignment = backend.iova_alignment();
        // Address 0 is left out: some devices and drivers take it for "no address".
        let ranges: Vec<_> = backend
            .iova_ranges()
            .into_iter()
            .map(|range| IovaRange { start: range.start.max(alignment), ..range })
            .filter(|range| range.start <= range.last)
            .collect();
        let addresses = Mutex::new(RangeAllocator::new(&ranges));
        DmaSpace { inner: Arc::new(Inner { device, backend, ranges, alignment, addresses, pool: Pool::default() }) }
    }

    /// Allocates memory of zeroes for the device: `bytes` bytes (rounded up to pages of 4096 bytes), page-aligned for
    /// the host and the device, contiguous for the device. Hugepages if any are free, else normal pages kept in memory.
    pub fn allocate(&self, bytes: usize) -> Result<DmaBuffer, Error> {
        self.inner.pool.allocate(self, bytes)
    }

    /// Lets the device reach `memory`, until the mapping is dropped.
    pub fn map(&self, memory: Arc<SharedMemory>) -> Result<DmaMapping, Error> {
        // SAFETY: `memory` is a shared mapping of its file, and the returned mapping keeps it.
        let mut mapping = unsafe { self.map_raw(memory.file(), memory.file_offset(), memory.as_ptr(), memory.len()) }?;
        mapping.memory = Some(memory);
        Ok(mapping)
    }

    /// Lets the device reach `len` bytes at `host`, until the mapping is dropped. `file_offset`, `host` and `len` are
    /// multiples of the page size (of the IOMMU, at least 4096).
    ///
    /// # Safety
    /// `host..host + len` must stay a valid shared mapping of `file` at `file_offset` until the mapping is dropped.
    pub unsafe fn map_raw(
        &self,
        file: &File,
        file_offset: u64,
        host: *mut u8,
        len: usize,
    ) -> Result<DmaMapping, Error> {
        let alignment = self.inner.alignment;
        if len == 0 || [file_offset, host.addr() as u64, len as u64].iter().any(|number| number % alignment != 0) {
            return Err(Error::BadMemory {
                reason: format!(
                    "its length {len:#x}, offset {file_offset:#x} and address {host:?} must be multiples of {alignment:#x}"
                ),
            });
        }
        let bytes = len as u64;
        let iova = self.addresses().allocate(bytes, LARGE_PAGE.max(alignment), file_offset);
        let iova = iova.ok_or_else(|| Error::NoDmaAddresses { device: self.inner.device.clone(), bytes })?;
        // SAFETY: the caller promises just this.
        if let Err(error) = unsafe { self.inner.backend.dma_map(iova, file, file_offset, host, len) } {
            // What was refused is not mapped, so that its addresses are free again.
            self.addresses().free(iova, bytes);
            return Err(error);
        }
        Ok(DmaMapping { iova, len, space: self.clone(), memory: None })
    }

    /// The DMA addresses that mappings are given, as the IOMMU reports them.
    pub fn ranges(&self) -> Vec<IovaRange> {
        self.inner.ranges.clone()
    }

    fn addresses(&self) -> MutexGuard<'_, RangeAllocator> {
        self.inner.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory the device can reach until this is dropped.
pub struct DmaMapping {
    iova: u64,
    len: usize,
    space: DmaSpace,
    memory: Option<Arc<SharedMemory>>,
}

impl DmaMapping {
    /// The address at which the device sees the memory's first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// The mapping's length, bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes; there always are some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        let space = &self.space.inner;
        match space.backend.dma_unmap(self.iova, self.len) {
            Ok(()) => self.space.addresses().free(self.iova, self.len as u64),
            // The device may still reach the memory there: the addresses must not mean anything else.
            Err(error) => {
                log::warn!("{}: DMA addresses at {:#x} cannot be used again: {error}", space.device, self.iova)
            }
        }
    }
}
