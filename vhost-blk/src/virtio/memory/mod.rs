//! A guest's memory as its front-end describes it: an immutable table of regions.
//!
//! Each region is a shared mapping of the file the front-end sent, and the same piece of that file mapped for DMA. A table
//! never changes: adding or removing a region makes a new table, which shares the other regions with the old one. When the
//! last table that names a region is dropped, the region is unmapped: first from the device, then from this process.
//!
//! A table does not hold DMA addresses, because they change when the device is closed and opened again: see [`DmaScope`].
//!
//! A file is checked to be as long as its region when it arrives. A region whose file is shortened afterwards, or finds its file
//! system full, is lost: it is replaced by memory of this process ([`vfio::Guard`]), and its session ends.
//!
//! How much a front-end may have mapped, and all of them together, is bounded: see [`Budget`].
//!
//! An address that a guest supplies is not trusted. [`GuestView`] checks it, and is the only way from such an address to memory.

mod budget;
mod dma_scope;
mod view;

pub use budget::{Account, Budget, Exhausted, LimitError, Limits, MemoryGrant, parse_bytes, parse_regions};
pub use dma_scope::DmaScope;
pub use view::{GuestSlice, GuestView, OutsideMemory};

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vfio::{DmaLimits, DmaMapping, DmaSpace, Guard};
use vm_memory::{FileOffset, MmapRegion};

/// Regions have to start on a multiple of this many bytes, in guest memory and in their file: the page of an IOMMU.
pub const PAGE: u64 = 4096;

/// `f_type` of hugetlbfs in `statfs(2)`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// One memory region as a vhost-user message describes it ("Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Address of the first byte in the front-end's own address space.
    pub user_address: u64,
    /// Where the region begins in its file, in bytes.
    pub file_offset: u64,
}

impl std::fmt::Display for RegionDescription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "memory region of {:#x} bytes at guest address {:#x} (front-end address {:#x}, file offset {:#x})",
            self.bytes, self.guest_address, self.user_address, self.file_offset
        )
    }
}

/// A region that was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region without bytes.
    #[error("{0} is empty")]
    Empty(RegionDescription),
    /// Address plus length does not fit into 64 bits, or into this process.
    #[error("{0} does not fit into the address space")]
    Overflow(RegionDescription),
    /// The address or the place in the file is not a multiple of [`PAGE`]; an IOMMU cannot map such a region.
    #[error("{0} does not begin at a multiple of {PAGE} bytes in guest memory and in its file, which DMA needs")]
    Unaligned(RegionDescription),
    /// The new region overlaps one that is there already.
    #[error("{new} overlaps the {old}")]
    Overlap {
        /// The refused region.
        new: RegionDescription,
        /// The one it overlaps in guest or front-end addresses.
        old: RegionDescription,
    },
    /// The file ends before the region does.
    #[error("{region} reaches beyond the end of its file, which has {file_bytes:#x} bytes")]
    FileTooShort {
        /// The refused region.
        region: RegionDescription,
        /// Length of the file in bytes.
        file_bytes: u64,
    },
    /// The file could not be looked at or mapped.
    #[error("{region}: cannot {attempt} its file: {source}")]
    File {
        /// The refused region.
        region: RegionDescription,
        /// What was attempted.
        attempt: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// More than a front-end, or all of them together, may have mapped.
    #[error("{region}: {reason}")]
    Budget {
        /// The refused region.
        region: RegionDescription,
        /// Which limit it is, and what to do.
        reason: Exhausted,
    },
    /// The region could not be mapped for the device.
    #[error("{region} cannot be mapped for DMA: {source}")]
    Dma {
        /// The refused region.
        region: RegionDescription,
        /// What the device layer says.
        source: vfio::Error,
    },
    /// There is no region with these addresses to remove.
    #[error("{0} is not in the memory table")]
    NoSuchRegion(RegionDescription),
}

impl MemoryError {
    /// Is it the drive that does not answer, whatever it is asked for?
    fn is_the_drives(&self) -> bool {
        use vfio::Error::{Disconnected, GivenUp, Timeout};
        matches!(self, MemoryError::Dma { source: Disconnected { .. } | GivenUp { .. } | Timeout { .. }, .. })
    }
}

/// A mapped region. Fields are dropped in their order: the device loses its access before the process does.
struct Region {
    description: RegionDescription,
    /// I/O virtual address of the first byte; means nothing while there is no mapping.
    iova: AtomicU64,
    /// The device's access, while it is there.
    dma: Mutex<Option<DmaMapping>>,
    /// Why the device could not be given access when it came back: its session ends.
    refusal: OnceLock<String>,
    guard: Guard,
    mapping: MmapRegion,
    _grant: MemoryGrant,
    /// Where the region begins in `mapping`, which starts at a page of the file.
    offset_in_mapping: usize,
    /// Device and inode of the file: says that another descriptor names the same memory.
    file: (u64, u64),
}

impl Region {
    /// Address of the first byte in this process.
    fn host(&self) -> *mut u8 {
        // In bounds: `map` has made the mapping `offset_in_mapping + bytes` long at least.
        self.mapping.as_ptr().wrapping_add(self.offset_in_mapping)
    }

    /// Where the device sees the first byte.
    ///
    /// Relaxed: it changes only while no lane has a queue pair; how a lane gets one orders it behind the change.
    fn iova(&self) -> u64 {
        self.iova.load(Ordering::Relaxed)
    }

    /// Lets a device reach it, in place of the one before.
    fn attach(&self, dma: &DmaSpace) -> Result<(), MemoryError> {
        let file = self.mapping.file_offset().expect("made from a file in Region::map").file();
        let bytes = self.dma_bytes();
        // SAFETY: `host()..host() + bytes` is a shared mapping of `file` at `file_offset`, made by `Region::map`, which
        // maps whole pages; or its guard has found it lost. The DmaMapping lives in the same Region, before the mapping, so it
        // is dropped first; nothing else unmaps either.
        let mapped = unsafe { dma.map_raw(file, self.description.file_offset, self.host(), bytes) };
        let mapped = mapped.map_err(|source| MemoryError::Dma { region: self.description, source })?;
        self.iova.store(mapped.iova(), Ordering::Relaxed);
        *self.dma.lock().unwrap_or_else(PoisonError::into_inner) = Some(mapped);
        Ok(())
    }

    /// A region may end within a page; the rest of that page is the same file's, and `mapping` has it.
    fn dma_bytes(&self) -> usize {
        (self.description.bytes as usize).next_multiple_of(PAGE as usize)
    }

    /// Could a device with these limits be given access?
    fn check(&self, limits: &DmaLimits) -> Result<(), MemoryError> {
        let result = limits.check(self.description.file_offset, self.host(), self.dma_bytes());
        result.map_err(|source| MemoryError::Dma { region: self.description, source })
    }

    /// Takes the device's access away.
    fn detach(&self) {
        self.dma.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Maps the file into this process, at the account's expense. The checks of `description` are done.
    fn map(description: RegionDescription, file: File, account: &Arc<Account>) -> Result<Region, MemoryError> {
        let failed = |attempt, source| MemoryError::File { region: description, attempt, source };
        let metadata = file.metadata().map_err(|e| failed("look at", e))?;
        if description.file_offset.checked_add(description.bytes).is_none_or(|end| end > metadata.len()) {
            return Err(MemoryError::FileTooShort { region: description, file_bytes: metadata.len() });
        }
        // Hugepage files can be mapped in whole hugepages only, yet a region may begin within one: map from the page below.
        let mut page = rustix::param::page_size() as u64;
        let file_system = rustix::fs::fstatfs(&file).map_err(|e| failed("look at", e.into()))?;
        if file_system.f_type as u64 == HUGETLBFS_MAGIC && metadata.blksize().is_power_of_two() {
            page = page.max(metadata.blksize());
        }
        let start = description.file_offset & !(page - 1);
        let offset = description.file_offset - start;
        let bytes =
            (offset + description.bytes).checked_next_multiple_of(page).ok_or(MemoryError::Overflow(description))?;
        let bytes = usize::try_from(bytes).map_err(|_| MemoryError::Overflow(description))?;
        let grant =
            account.grant(bytes as u64).map_err(|reason| MemoryError::Budget { region: description, reason })?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, start), bytes)
            .map_err(|e| failed("map", io::Error::other(e.to_string())))?;
        let file = mapping.file_offset().expect("it was made from one").file();
        // SAFETY: the mapping has just been made, of `bytes` bytes, which are whole pages, and is dropped after the guard. It is
        // accessed by atomics and volatile copies only.
        let guard =
            unsafe { Guard::new(mapping.as_ptr(), bytes, file) }.map_err(|e| failed("guard the mapping of", e))?;
        Ok(Region {
            description,
            iova: AtomicU64::new(0),
            dma: Mutex::default(),
            refusal: OnceLock::new(),
            guard,
            mapping,
            _grant: grant,
            offset_in_mapping: offset as usize,
            file: (metadata.dev(), metadata.ino()),
        })
    }
}

/// Guards another mapping of guest memory in this process, until what comes back is dropped.
///
/// # Errors
/// The signal handler cannot be installed, the file cannot be looked at, or too much is guarded already.
///
/// # Safety
/// `start..start + bytes` are whole pages of one mapping of `file`, which is there until what comes back is dropped. Nobody relies on
/// what the memory holds, as with all memory that others write: it is only accessed by atomics and copies.
#[cfg(feature = "sim")]
pub unsafe fn guard_mapping(start: *mut u8, bytes: usize, file: &File) -> io::Result<Box<dyn Send + Sync>> {
    // SAFETY: the caller's word.
    Ok(Box::new(unsafe { Guard::new(start, bytes, file) }?))
}

/// The table: immutable, cheap to share, regions sorted by guest address.
#[derive(Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
    /// Who pays for what is mapped.
    account: Arc<Account>,
}

impl GuestMemory {
    /// A table without regions: every address is outside.
    pub fn new() -> Self {
        Self::default()
    }

    /// A table without regions, of a front-end whose memory is on this account.
    pub fn of(account: Arc<Account>) -> Self {
        GuestMemory { regions: Vec::new(), account }
    }

    /// A table without regions, of the same front-end.
    pub fn emptied(&self) -> Self {
        Self::of(self.account.clone())
    }

    /// A region that was found without pages since it was mapped.
    pub fn lost(&self) -> Option<&RegionDescription> {
        self.regions.iter().find(|region| region.guard.is_lost()).map(|region| &region.description)
    }

    /// A region that the device cannot be given access to, and why. Nothing of the table may be told to it.
    pub fn unreachable(&self) -> Option<&str> {
        self.regions.iter().find_map(|region| region.refusal.get()).map(String::as_str)
    }

    /// This table and one region more, mapped into this process, and for the device if that is there. One that is in the
    /// table already, at the same addresses and the same place of the same file, changes nothing.
    ///
    /// # Errors
    /// The region is empty, unaligned, overlaps another in guest or front-end addresses, is longer than its file, or cannot
    /// be mapped. This table stays as it is.
    pub fn with_region(
        &self,
        scope: &DmaScope,
        region: RegionDescription,
        file: File,
    ) -> Result<GuestMemory, MemoryError> {
        self.with_region_like(self, scope, region, file)
    }

    /// This table and one region more, which is shared with `earlier` instead of mapped anew if it is in that table.
    ///
    /// # Errors
    /// The region is empty, unaligned, overlaps another in guest or front-end addresses, is longer than its file, or cannot
    /// be mapped. This table stays as it is.
    pub fn with_region_like(
        &self,
        earlier: &GuestMemory,
        scope: &DmaScope,
        region: RegionDescription,
        file: File,
    ) -> Result<GuestMemory, MemoryError> {
        if self.find_same(&region, &file).is_some() {
            return Ok(GuestMemory { regions: self.regions.clone(), account: self.account.clone() });
        }
        self.check(&region)?;
        let region = match earlier.find_same(&region, &file) {
            Some(region) => region,
            None => self.map_for_dma(scope, region, file)?,
        };
        Ok(self.insert(region))
    }

    /// This table without a region. Addresses and length have to match; the file offset does not (vhost-user, REM_MEM_REG).
    ///
    /// # Errors
    /// No region has these addresses.
    pub fn without_region(&self, region: &RegionDescription) -> Result<GuestMemory, MemoryError> {
        let same = |r: &Arc<Region>| {
            let there = &r.description;
            there.guest_address == region.guest_address
                && there.bytes == region.bytes
                && there.user_address == region.user_address
        };
        let at = self.regions.iter().position(same).ok_or(MemoryError::NoSuchRegion(*region))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(GuestMemory { regions, account: self.account.clone() })
    }

    /// A whole new table (SET_MEM_TABLE). A region that is in this table too, at the same addresses and the same place of
    /// the same file, is shared instead of mapped anew: a front-end that adds memory by sending everything again gets a
    /// table that [`is_superset_of`](Self::is_superset_of) this one, and its rings need not stop.
    ///
    /// # Errors
    /// One of the regions is empty, unaligned, overlaps another in guest or front-end addresses, is longer than its file, or cannot
    /// be mapped. This table stays as it is.
    pub fn replaced(
        &self,
        scope: &DmaScope,
        regions: Vec<(RegionDescription, File)>,
    ) -> Result<GuestMemory, MemoryError> {
        let mut table = self.emptied();
        for (description, file) in regions {
            table.check(&description)?;
            let region = match self.find_same(&description, &file) {
                Some(region) => region,
                None => table.map_for_dma(scope, description, file)?,
            };
            table = table.insert(region);
        }
        Ok(table)
    }

    /// Does this table hold every region of `other`, the very same mappings?
    pub fn is_superset_of(&self, other: &GuestMemory) -> bool {
        other.regions.iter().all(|r| self.find(r.description.guest_address).is_some_and(|mine| Arc::ptr_eq(mine, r)))
    }

    /// Number of regions.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// The regions, by ascending guest address.
    pub fn regions(&self) -> impl Iterator<Item = &RegionDescription> {
        self.regions.iter().map(|r| &r.description)
    }

    /// The guest-physical address of something the front-end names by its own address, as it does with rings.
    pub fn user_to_guest(&self, user_address: u64) -> Option<u64> {
        self.regions.iter().map(|r| &r.description).find_map(|d| {
            let offset = user_address.checked_sub(d.user_address)?;
            (offset < d.bytes).then(|| d.guest_address + offset)
        })
    }

    /// The region that holds the byte at `guest_address`.
    fn find(&self, guest_address: u64) -> Option<&Arc<Region>> {
        let next = self.regions.partition_point(|r| r.description.guest_address <= guest_address);
        let region = &self.regions[next.checked_sub(1)?];
        (guest_address - region.description.guest_address < region.description.bytes).then_some(region)
    }

    fn find_same(&self, description: &RegionDescription, file: &File) -> Option<Arc<Region>> {
        let region = self.find(description.guest_address)?;
        let metadata = file.metadata().ok()?;
        (region.description == *description && region.file == (metadata.dev(), metadata.ino())).then(|| region.clone())
    }

    /// Checks what can be checked without the file.
    fn check(&self, new: &RegionDescription) -> Result<(), MemoryError> {
        if new.bytes == 0 {
            return Err(MemoryError::Empty(*new));
        }
        let end = |start: u64, bytes: u64| start.checked_add(bytes).ok_or(MemoryError::Overflow(*new));
        let guest_end = end(new.guest_address, new.bytes)?;
        let user_end = end(new.user_address, new.bytes)?;
        // Also what an isize can say: the length of a Rust slice.
        if isize::try_from(new.bytes).is_err() {
            return Err(MemoryError::Overflow(*new));
        }
        if !(new.guest_address | new.file_offset).is_multiple_of(PAGE) {
            return Err(MemoryError::Unaligned(*new));
        }
        for old in self.regions() {
            let apart = |start: u64, end: u64, old_start: u64| end <= old_start || start >= old_start + old.bytes;
            if !apart(new.guest_address, guest_end, old.guest_address)
                || !apart(new.user_address, user_end, old.user_address)
            {
                return Err(MemoryError::Overlap { new: *new, old: *old });
            }
        }
        let before = self.regions.iter().map(|region| region.mapping.size() as u64).sum::<u64>();
        self.account
            .check(before.saturating_add(new.bytes), self.regions.len() + 1)
            .map_err(|reason| MemoryError::Budget { region: *new, reason })
    }

    fn insert(&self, region: Arc<Region>) -> GuestMemory {
        let mut regions = Vec::with_capacity(self.regions.len() + 1);
        regions.extend(self.regions.iter().cloned());
        let at = regions.partition_point(|r| r.description.guest_address < region.description.guest_address);
        regions.insert(at, region);
        GuestMemory { regions, account: self.account.clone() }
    }

    fn map_for_dma(
        &self,
        scope: &DmaScope,
        description: RegionDescription,
        file: File,
    ) -> Result<Arc<Region>, MemoryError> {
        let region = Arc::new(Region::map(description, file, &self.account)?);
        scope.add(&region)?;
        Ok(region)
    }

    /// Makes the table one that the device, having come back, has not taken.
    #[cfg(test)]
    pub(crate) fn refuse(&self) {
        self.regions.iter().for_each(|region| _ = region.refusal.set("refused by a test".into()));
    }

    /// A table whose regions no device can reach: `iova` is the guest address plus `iova_offset`.
    #[cfg(test)]
    pub(crate) fn with_region_without_device(
        &self,
        description: RegionDescription,
        file: File,
        iova_offset: u64,
    ) -> Result<GuestMemory, MemoryError> {
        self.check(&description)?;
        let region = Region::map(description, file, &self.account)?;
        region.iova.store(description.guest_address + iova_offset, Ordering::Relaxed);
        Ok(self.insert(Arc::new(region)))
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions()).finish()
    }
}

#[cfg(test)]
mod tests;
