//! From addresses a guest supplies to memory, checked at each use.

use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use nvme_driver::Segment;
use vfio::{DmaElement, SharedMemory};
use vm_memory::VolatileMemory;

use super::{GuestMemory, Region};

/// Some byte of a range a guest named is in no region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes:#x} bytes at guest address {address:#x} are not wholly in guest memory")]
pub struct OutsideMemory {
    /// Guest-physical address of the range.
    pub address: u64,
    /// Length of the range in bytes.
    pub bytes: u64,
}

/// A region that was used lately, ready for the next look.
#[derive(Clone, Copy)]
struct Window {
    /// Guest-physical address of the first byte.
    start: u64,
    /// Length in bytes; 0 before the first look.
    bytes: u64,
    /// I/O virtual address of the first byte.
    iova: u64,
    /// The first byte in this process.
    host: *mut u8,
}

impl Window {
    /// The offset of `address`, if `bytes` from there on are all in the window.
    #[inline(always)]
    fn offset(&self, address: u64, bytes: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.start);
        // After the first comparison the sum cannot overflow: regions and lengths are far from 2^64.
        (offset < self.bytes && offset + bytes <= self.bytes).then_some(offset)
    }

    /// The offset of the byte at `address`, if it is in the window: one comparison is enough for that.
    #[inline(always)]
    fn offset_of_byte(&self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.start);
        (offset < self.bytes).then_some(offset)
    }

    /// The byte at `offset` in this process; in bounds if one of the above has returned the offset.
    #[inline(always)]
    fn host(&self, offset: u64) -> *mut u8 {
        self.host.wrapping_add(offset as usize)
    }
}

/// A lane's way into guest memory: a table, kept alive, and two regions used lately.
///
/// Most guests have one or two regions of any size (below and above 4 GiB), and what describes requests may lie in another
/// than their data: so each has a window of its own, and looks into the other's before it looks for a region.
///
/// All access to guest memory is atomic or volatile, for the guest may write at any time.
pub struct GuestView {
    /// For what describes requests: headers, status bytes, indirect tables.
    control: Window,
    /// For what is only resolved for the device.
    data: Window,
    memory: Arc<GuestMemory>,
}

// SAFETY: the windows' `host` points into a region of `memory`, which the view keeps alive and which is Send and Sync; it
// is used for atomic accesses only.
unsafe impl Send for GuestView {}

const NO_WINDOW: Window = Window { start: 0, bytes: 0, iova: 0, host: std::ptr::null_mut() };

impl GuestView {
    /// A view of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        GuestView { control: NO_WINDOW, data: NO_WINDOW, memory }
    }

    /// The table in use.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Goes over to another table, which has to hold every region of the present one: requests in flight point into them.
    /// Returns whether it does; if not, nothing changes.
    #[must_use]
    pub fn extend(&mut self, memory: Arc<GuestMemory>) -> bool {
        if !memory.is_superset_of(&self.memory) {
            return false;
        }
        (self.control, self.data) = (NO_WINDOW, NO_WINDOW);
        self.memory = memory;
        true
    }

    /// Forgets where the device sees what: it has come back, and sees it elsewhere.
    pub fn forget_device(&mut self) {
        (self.control, self.data) = (NO_WINDOW, NO_WINDOW);
    }

    /// Where the device sees `bytes` at `address`, if they are all in one region.
    #[inline(always)]
    fn device_address(&mut self, address: u64, bytes: u64) -> Option<u64> {
        match self.data.offset(address, bytes) {
            Some(offset) => Some(self.data.iova + offset),
            None => self.device_address_slowly(address, bytes),
        }
    }

    #[cold]
    #[inline(never)]
    fn device_address_slowly(&mut self, address: u64, bytes: u64) -> Option<u64> {
        if let Some(offset) = self.control.offset(address, bytes) {
            return Some(self.control.iova + offset);
        }
        self.data = self.look_up(address)?;
        // The first region of all serves for both, until they differ.
        if self.control.bytes == 0 {
            self.control = self.data;
        }
        Some(self.data.iova + self.data.offset(address, bytes)?)
    }

    /// Where `bytes` at `address` are in this process, if they are all in one region; for what `control` does not have.
    #[cold]
    #[inline(never)]
    fn host_address_slowly(&mut self, address: u64, bytes: u64) -> Option<*mut u8> {
        if let Some(offset) = self.data.offset(address, bytes) {
            return Some(self.data.host(offset));
        }
        self.control = self.look_up(address)?;
        if self.data.bytes == 0 {
            self.data = self.control;
        }
        Some(self.control.host(self.control.offset(address, bytes)?))
    }

    fn look_up(&self, address: u64) -> Option<Window> {
        let region = self.memory.find(address)?;
        let (start, bytes) = (region.description.guest_address, region.description.bytes);
        Some(Window { start, bytes, iova: region.iova(), host: region.host() })
    }

    /// Calls `add` with the pieces the device sees `bytes` at `address` as: one, or one for each region they touch.
    ///
    /// # Errors
    /// A byte is in no region; `add` may have been called for those before it.
    #[inline(always)]
    pub fn segments(&mut self, address: u64, bytes: u32, mut add: impl FnMut(Segment)) -> Result<(), OutsideMemory> {
        if let Some(segment) = self.segment(address, bytes) {
            add(segment);
            return Ok(());
        }
        self.segments_across(address, bytes, &mut add)
    }

    #[cold]
    fn segments_across(&mut self, address: u64, bytes: u32, add: &mut dyn FnMut(Segment)) -> Result<(), OutsideMemory> {
        self.pieces(address, bytes.into(), |region, offset, piece| {
            add(Segment { iova: region.iova() + offset, bytes: piece as u32 });
        })
    }

    /// What the device sees `bytes` at `address` as, if they are in one region.
    #[inline(always)]
    pub fn segment(&mut self, address: u64, bytes: u32) -> Option<Segment> {
        let iova = self.device_address(address, bytes.into())?;
        Some(Segment { iova, bytes })
    }

    /// Is this byte in guest memory?
    #[inline(always)]
    pub fn contains(&mut self, address: u64) -> bool {
        self.control.offset_of_byte(address).is_some() || self.host_address_slowly(address, 1).is_some()
    }

    /// Little-endian 64-bit words, each read once: descriptors, or the header of a request.
    ///
    /// Where they are in one region and aligned each is one atomic load; else each byte is read once.
    #[inline(always)]
    pub fn read_words<const N: usize>(&mut self, address: u64) -> Result<[u64; N], OutsideMemory> {
        if address.is_multiple_of(8)
            && let Some(offset) = self.control.offset(address, 8 * N as u64)
        {
            // SAFETY: 8 * N bytes at `offset` are within a region that `self.memory` keeps mapped. Regions start at a page in
            // the guest and in this process, so an address aligned to 8 there is aligned to 8 here.
            return Ok(unsafe { load_words(self.control.host(offset)) });
        }
        self.read_words_slowly(address)
    }

    #[cold]
    #[inline(never)]
    fn read_words_slowly<const N: usize>(&mut self, address: u64) -> Result<[u64; N], OutsideMemory> {
        if address.is_multiple_of(8)
            && let Some(host) = self.host_address_slowly(address, 8 * N as u64)
        {
            // SAFETY: 8 * N bytes at `host` are within a region that `self.memory` keeps mapped, and aligned, see above.
            return Ok(unsafe { load_words(host) });
        }
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            self.read(address.wrapping_add(8 * index as u64), &mut bytes)?;
            *word = u64::from_le_bytes(bytes);
        }
        Ok(words)
    }

    /// Writes one byte: a request's status.
    ///
    /// Relaxed: the publication of the used ring orders it before the guest's look.
    #[inline(always)]
    pub fn write_byte(&mut self, address: u64, value: u8) -> Result<(), OutsideMemory> {
        let host = match self.control.offset_of_byte(address) {
            Some(offset) => self.control.host(offset),
            None => self.host_address_slowly(address, 1).ok_or(OutsideMemory { address, bytes: 1 })?,
        };
        // SAFETY: the byte at `host` was found within a region that `self.memory` keeps mapped.
        let byte = unsafe { &*host.cast::<AtomicU8>() };
        byte.store(value, Ordering::Relaxed);
        Ok(())
    }

    /// Copies from guest memory; the range may cross regions. Not for the hot path.
    ///
    /// # Errors
    /// A byte is in no region; `to` may be partly overwritten.
    pub fn read(&mut self, address: u64, to: &mut [u8]) -> Result<(), OutsideMemory> {
        let mut rest = to;
        self.pieces(address, rest.len() as u64, |region, offset, bytes| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(bytes as usize);
            region.volatile(offset, bytes).copy_to(piece);
            rest = after;
        })
    }

    /// Copies to guest memory; the range may cross regions. Not for the hot path.
    ///
    /// # Errors
    /// A byte is in no region; those before it may have been written.
    pub fn write(&mut self, address: u64, from: &[u8]) -> Result<(), OutsideMemory> {
        let mut rest = from;
        self.pieces(address, rest.len() as u64, |region, offset, bytes| {
            let (piece, after) = rest.split_at(bytes as usize);
            region.volatile(offset, bytes).copy_from(piece);
            rest = after;
        })
    }

    /// The first byte of a range that is in no region; `None`: all of them are in some.
    pub fn first_outside(&self, address: u64, bytes: u64) -> Option<u64> {
        let mut inside = 0;
        let result = self.pieces(address, bytes, |_, _, piece| inside += piece);
        result.err().map(|_| address.wrapping_add(inside))
    }

    /// Visits the pieces of a range, region by region: (region, offset in it, length of the piece).
    fn pieces(&self, address: u64, bytes: u64, mut visit: impl FnMut(&Region, u64, u64)) -> Result<(), OutsideMemory> {
        let outside = OutsideMemory { address, bytes };
        let mut done = 0;
        while done < bytes {
            let at = address.checked_add(done).ok_or(outside)?;
            let region = self.memory.find(at).ok_or(outside)?;
            let offset = at - region.description.guest_address;
            let piece = (bytes - done).min(region.description.bytes - offset);
            visit(region, offset, piece);
            done += piece;
        }
        Ok(())
    }
}

/// Reads words, each with one atomic load.
///
/// # Safety
/// 8 * N bytes from `host` on are mapped, and `host` is aligned to 8.
#[inline(always)]
unsafe fn load_words<const N: usize>(host: *mut u8) -> [u64; N] {
    // SAFETY: the caller's word for it; any bytes are valid atomics.
    let words = unsafe { &*host.cast::<[AtomicU64; N]>() };
    // Relaxed: ordered after the Acquire load that made the request visible (avail.idx, a descriptor's flags).
    std::array::from_fn(|index| u64::from_le(words[index].load(Ordering::Relaxed)))
}

impl Region {
    /// A piece for copying; `offset + bytes` has been checked against the region.
    fn volatile(&self, offset: u64, bytes: u64) -> vm_memory::VolatileSlice<'_> {
        self.mapping
            .get_slice(self.offset_in_mapping + offset as usize, bytes as usize)
            .expect("a piece that `pieces` cut out of this region")
    }
}

/// Atomics in guest memory or in other memory of the front-end, resolved and checked once: a part of a ring, or of the log
/// of one. Keeps its memory mapped.
pub struct GuestSlice<T: DmaElement> {
    first: NonNull<T>,
    count: usize,
    _owner: Arc<dyn Send + Sync>,
    _elements: PhantomData<T>,
}

// SAFETY: a pointer to atomics in memory that `_owner`, which is Send and Sync, keeps mapped; access is atomic.
unsafe impl<T: DmaElement> Send for GuestSlice<T> {}

impl<T: DmaElement> GuestSlice<T> {
    /// `count` elements at a guest address; all in one region, for a ring that crosses regions could not be a slice.
    ///
    /// Returns `None` if they are not, or if the address is not aligned to the element.
    pub fn new(memory: &GuestMemory, address: u64, count: usize) -> Option<GuestSlice<T>> {
        let region = memory.find(address)?;
        let offset = address - region.description.guest_address;
        let bytes = count.checked_mul(size_of::<T>())? as u64;
        if bytes > region.description.bytes - offset {
            return None;
        }
        let first = NonNull::new(region.host().wrapping_add(offset as usize).cast::<T>())?;
        first.is_aligned().then(|| GuestSlice { first, count, _owner: region.clone(), _elements: PhantomData })
    }

    /// `count` elements at an offset, in bytes, in memory that is not the guest's.
    ///
    /// Returns `None` if they are not inside, or not aligned.
    pub fn of_shared(memory: &Arc<SharedMemory>, offset: usize, count: usize) -> Option<GuestSlice<T>> {
        let first = NonNull::from(memory.slice::<T>(offset, count)?).cast();
        Some(GuestSlice { first, count, _owner: memory.clone(), _elements: PhantomData })
    }
}

impl<T: DmaElement> Deref for GuestSlice<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: bounds and alignment were checked within memory that `_owner` keeps mapped. `DmaElement` promises
        // atomics, for which every bit pattern is valid and which others may change meanwhile.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}
