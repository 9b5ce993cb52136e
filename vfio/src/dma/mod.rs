//! Memory that a device can reach.

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::backend::Backend;
use crate::iova::{IovaRange, RangeAllocator};

mod buffer;
mod memory;
pub(crate) mod numa;
mod plain;

use buffer::Pool;
pub use buffer::{DmaBuffer, DmaElement, DmaSlice};
pub use memory::SharedMemory;
pub(crate) use memory::{RAISE_MEMLOCK, memlock_limit, page_size};
pub use plain::PlainMemory;

/// DMA addresses are congruent to the memory's offset in its file modulo the first of these that the memory is as long as, and
/// for which there are addresses; always modulo the last one. Bytes. Hugepages begin at multiples of their size, in the file as
/// in physical memory and in this process, so that the IOMMU can map them by its large pages: those of x86-64, and of arm64
/// with pages of 64 KiB (512 MiB) and 16 KiB (32 MiB).
const LARGE_PAGES: [u64; 4] = [1 << 30, 512 << 20, 32 << 20, 2 << 20];
/// Of the addresses, this part, counted from the highest one down, is kept back from [`DmaSpace::map_raw`], but
const KEPT_BACK_PART: u64 = 8;
/// no more than this, bytes: a driver's queues and buffers take far less.
const KEPT_BACK: u64 = 64 << 30;

/// The DMA address space of a device. Clones are the same space.
#[derive(Clone)]
pub struct DmaSpace {
    inner: Arc<DmaSpaceInner>,
}

/// What a device demands of memory that it is to reach, for whoever wants to know while the device is not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaLimits {
    alignment: u64,
    /// Bytes of the longest piece of others' memory for which there are addresses.
    longest: u64,
}

impl DmaLimits {
    /// The limits of a device that maps multiples of `alignment` bytes, a power of two, and has addresses for `longest` bytes
    /// in one piece.
    pub fn new(alignment: u64, longest: u64) -> DmaLimits {
        DmaLimits { alignment: alignment.max(1), longest }
    }

    /// Could the device be given these bytes, if it had no others? As for [`DmaSpace::map_raw`].
    ///
    /// # Errors
    /// They are not made of its pages, or longer than its addresses.
    pub fn check(&self, file_offset: u64, host: *const u8, bytes: usize) -> Result<(), Error> {
        let alignment = self.alignment;
        let bytes = bytes as u64;
        if bytes == 0 || [file_offset, host.addr() as u64, bytes].iter().any(|number| number % alignment != 0) {
            return Err(Error::BadMemory {
                reason: format!(
                    "its length {bytes:#x}, offset {file_offset:#x} and address {host:?} must be multiples of {alignment:#x}"
                ),
            });
        }
        if bytes > self.longest {
            let longest = self.longest;
            return Err(Error::BadMemory {
                reason: format!(
                    "the device has no more than {longest:#x} addresses in one piece for its {bytes:#x} bytes"
                ),
            });
        }
        Ok(())
    }
}

/// The addresses that a space has handed out.
#[derive(Clone, Copy, Debug)]
pub struct DmaAddresses {
    highest: u64,
}

struct DmaSpaceInner {
    device: String,
    backend: Arc<dyn Backend>,
    ranges: Vec<IovaRange>,
    /// The last address for memory of others.
    last_for_others: u64,
    alignment: u64,
    /// Shared with the devices that share an address space with this one.
    addresses: Arc<Mutex<RangeAllocator>>,
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
        let addresses = backend.addresses(&|| RangeAllocator::new(&ranges));
        let last_for_others = last_for_others(&ranges);
        let pool = Pool::default();
        DmaSpace {
            inner: Arc::new(DmaSpaceInner { device, backend, ranges, last_for_others, alignment, addresses, pool }),
        }
    }

    /// Allocates memory of zeroes for the device: `bytes` bytes (rounded up to pages of 4096 bytes), page-aligned for
    /// the host and the device, contiguous for the device. Hugepages if any are free, else normal pages kept in memory.
    pub fn allocate(&self, bytes: usize) -> Result<DmaBuffer, Error> {
        self.inner.pool.allocate(self, bytes)
    }

    /// Lets the device reach `memory`, until the mapping is dropped.
    pub fn map(&self, memory: Arc<SharedMemory>) -> Result<DmaMapping, Error> {
        // SAFETY: `memory` is a shared mapping of its file, and the returned mapping keeps it.
        let mut mapping =
            unsafe { self.map_below(u64::MAX, memory.file(), memory.file_offset(), memory.as_ptr(), memory.len()) }?;
        mapping.memory = Some(memory);
        Ok(mapping)
    }

    /// Lets the device reach `len` bytes at `host`, until the mapping is dropped. `file_offset`, `host` and `len` are
    /// multiples of the page size (of the IOMMU, at least 4096).
    ///
    /// It is for the memory of others, who may have much of it: the last eighth of the device's addresses (64 GiB at most) is
    /// kept back for [`DmaSpace::map`] and [`DmaSpace::allocate`].
    ///
    /// # Safety
    /// `host..host + len` must stay mapped until the mapping is dropped, and has to be a shared mapping of `file` at
    /// `file_offset`, unless its [`Guard`](crate::Guard) has found it lost.
    pub unsafe fn map_raw(
        &self,
        file: &File,
        file_offset: u64,
        host: *mut u8,
        len: usize,
    ) -> Result<DmaMapping, Error> {
        // SAFETY: the caller promises just this.
        unsafe { self.map_below(self.inner.last_for_others, file, file_offset, host, len) }
    }

    /// Lets the device reach `len` bytes at `host`, at addresses up to `last`, until the mapping is dropped.
    ///
    /// # Safety
    /// The caller promises what [`DmaSpace::map_raw`] asks for.
    unsafe fn map_below(
        &self,
        last: u64,
        file: &File,
        file_offset: u64,
        host: *mut u8,
        len: usize,
    ) -> Result<DmaMapping, Error> {
        DmaLimits { longest: u64::MAX, ..self.limits() }.check(file_offset, host, len)?;
        let bytes = len as u64;
        let iova = self
            .take_addresses(last, bytes, file_offset)
            .ok_or_else(|| Error::NoDmaAddresses { device: self.inner.device.clone(), bytes })?;
        // SAFETY: the caller promises just this.
        if let Err(error) = unsafe { self.inner.backend.dma_map(iova, file, file_offset, host, len) } {
            // What was refused is not mapped, so that its addresses are free again.
            self.addresses().free(iova, bytes);
            return Err(error);
        }
        Ok(DmaMapping { iova, len, space: self.clone(), memory: None })
    }

    /// What this space demands of memory that others own ([`DmaSpace::map_raw`]).
    pub fn limits(&self) -> DmaLimits {
        let last = self.inner.last_for_others;
        let lengths = self.inner.ranges.iter().filter(|range| range.start <= last);
        let longest = lengths.map(|range| (range.last.min(last) - range.start).saturating_add(1)).max().unwrap_or(0);
        DmaLimits { alignment: self.inner.alignment, longest }
    }

    /// The DMA addresses that mappings are given, as the IOMMU reports them.
    pub fn ranges(&self) -> Vec<IovaRange> {
        self.inner.ranges.clone()
    }

    /// Leaves the addresses alone that an `earlier` space of the device has handed out, as long as there are others: whatever
    /// the device still does there finds nothing. When they reach beyond the middle of all addresses, the first ones have their
    /// turn again.
    pub fn keep_clear_of(&self, earlier: DmaAddresses) {
        let middle = self.inner.ranges.last().map_or(0, |range| range.last / 2);
        if earlier.highest < middle {
            self.addresses().set_floor(earlier.highest + 1);
        }
    }

    /// The addresses it has handed out so far, for [`DmaSpace::keep_clear_of`].
    pub fn handed_out(&self) -> DmaAddresses {
        DmaAddresses { highest: self.addresses().highest() }
    }

    fn take_addresses(&self, last: u64, bytes: u64, file_offset: u64) -> Option<u64> {
        let mut addresses = self.addresses();
        let [.., least] = LARGE_PAGES;
        let mut pages = LARGE_PAGES.into_iter().filter(|page| *page == least || bytes >= *page);
        pages.find_map(|page| addresses.allocate_below(last, bytes, page, file_offset))
    }

    fn addresses(&self) -> MutexGuard<'_, RangeAllocator> {
        self.inner.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last address for memory of others: those above are kept back.
fn last_for_others(ranges: &[IovaRange]) -> u64 {
    let lengths = ranges.iter().map(|range| range.last - range.start);
    let kept = (lengths.fold(0, u64::saturating_add) / KEPT_BACK_PART).min(KEPT_BACK);
    ranges.iter().map(|range| range.last).max().unwrap_or(0).saturating_sub(kept)
}

/// Memory the device can reach until this is dropped. It keeps the device open.
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

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaSpace({})", self.inner.device)
    }
}

impl fmt::Debug for DmaMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMapping({:#x}, {:#x} bytes)", self.iova, self.len)
    }
}

#[cfg(test)]
mod tests;
