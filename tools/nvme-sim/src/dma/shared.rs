//! Memory that others write too: guest memory, doorbells, the blocks of a namespace.
//!
//! The only unsafe code of the crate. No reference into such memory is ever made: single words go through atomics, and
//! bytes are copied by pointer. A copy that races with its owner yields some mixture of old and new bytes, as a device's
//! DMA would, and nothing else depends on them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw, RemapOptions, UncheckedAdvice};

const PAGE: usize = 4096;

/// Guards a mapping of a client's memory: the address of its first byte, its length, which is that of whole pages, and its
/// file. The mapping is there until what comes back is dropped; its bytes may be replaced at any time.
///
/// # Safety
/// Whoever calls it says that the first two are such a mapping.
pub type MappingGuard = unsafe fn(*mut u8, usize, &File) -> io::Result<Box<dyn Send + Sync>>;

static GUARD: OnceLock<MappingGuard> = OnceLock::new();

/// Has every mapping of a client's memory guarded from now on, by a program that keeps a simulator within: a client that makes
/// its file shorter ends this process otherwise (SIGBUS). The first one that is set stays.
pub fn set_mapping_guard(guard: MappingGuard) {
    let _ = GUARD.set(guard);
}

/// A mapped piece of shared memory of fixed length. All access is checked against that length.
pub(crate) struct SharedBytes {
    /// Before the mapping: it ends first.
    _guard: Option<Box<dyn Send + Sync>>,
    map: MmapRaw,
    /// Where the piece begins inside the mapping.
    start: usize,
    len: usize,
}

impl SharedBytes {
    /// `len` bytes of zeroes that cost memory only where they are written (terabytes are fine).
    pub(crate) fn anonymous(len: usize) -> io::Result<SharedBytes> {
        let map = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        Ok(SharedBytes { _guard: None, map: MmapRaw::from(map), start: 0, len })
    }

    /// A new memory file of `len` bytes, which whoever gets it cannot change, and its mapping.
    pub(crate) fn memory_file(name: &std::ffi::CStr, len: usize) -> io::Result<(File, SharedBytes)> {
        // SAFETY: `name` is a valid C string for the length of the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and has no other owner.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(len as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the call touches no memory.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let bytes = SharedBytes::of_file(&file, 0, len, true)?;
        Ok((file, bytes))
    }

    /// Maps `len` bytes of `file` from `offset`. The file must be that long already, but for the rest of its last page.
    pub(crate) fn of_file(file: &File, offset: u64, len: usize, writable: bool) -> io::Result<SharedBytes> {
        let metadata = file.metadata()?;
        let end = offset.checked_add(len as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if metadata.is_file() && end > metadata.len().next_multiple_of(PAGE as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the file has {} bytes, the mapping would end at {end}", metadata.len()),
            ));
        }
        // Files on hugetlbfs (their block size is the huge page) are mapped in whole huge pages only.
        let unit = if metadata.blksize() > PAGE as u64 { metadata.blksize() } else { PAGE as u64 };
        let (mut from, mut inner) = (offset, 0);
        if !offset.is_multiple_of(unit) || !(len as u64).is_multiple_of(unit) {
            from = offset - offset % unit;
            inner = (offset - from) as usize;
        }
        let whole = (inner + len).next_multiple_of(unit as usize);
        let map = |from: u64, len: usize| {
            let mut options = MmapOptions::new();
            options.offset(from).len(len);
            if writable { options.map_raw(file) } else { options.map_raw_read_only(file) }
        };
        match map(from, whole) {
            Ok(map) => Ok(SharedBytes { _guard: None, map, start: inner, len }),
            // Not hugetlbfs after all, and the file ends inside the last unit.
            Err(_) => Ok(SharedBytes { _guard: None, map: map(offset, len)?, start: 0, len }),
        }
    }

    /// Maps a piece of a client's file, guarded against its loss if this program has a guard.
    pub(crate) fn of_client(file: &File, offset: u64, len: usize, writable: bool) -> io::Result<SharedBytes> {
        let mut bytes = SharedBytes::of_file(file, offset, len, writable)?;
        if let Some(guard) = GUARD.get() {
            let whole = bytes.map.len().next_multiple_of(PAGE);
            // SAFETY: the mapping has just been made; the guard is dropped before it.
            bytes._guard = Some(unsafe { guard(bytes.map.as_mut_ptr(), whole, file) }?);
        }
        Ok(bytes)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of `len` bytes at `offset`, if they lie inside.
    #[inline]
    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| self.map.as_mut_ptr().wrapping_add(self.start + offset))
    }

    #[inline]
    fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.at(offset, 4).filter(|at| at.addr() % 4 == 0)?;
        // SAFETY: in bounds and aligned, checked above; the mapping lives as long as `self`.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    #[inline]
    fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.at(offset, 8).filter(|at| at.addr() % 8 == 0)?;
        // SAFETY: in bounds and aligned, checked above; the mapping lives as long as `self`.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// Loads an aligned word; `None` where it is outside or misaligned.
    #[inline]
    pub(crate) fn load_u32(&self, offset: usize, order: Ordering) -> Option<u32> {
        Some(u32::from_le(self.atomic_u32(offset)?.load(order)))
    }

    /// Stores an aligned word; `None` where it is outside or misaligned.
    #[inline]
    pub(crate) fn store_u32(&self, offset: usize, value: u32, order: Ordering) -> Option<()> {
        self.atomic_u32(offset)?.store(value.to_le(), order);
        Some(())
    }

    /// Loads an aligned word; `None` where it is outside or misaligned.
    #[inline]
    pub(crate) fn load_u64(&self, offset: usize, order: Ordering) -> Option<u64> {
        Some(u64::from_le(self.atomic_u64(offset)?.load(order)))
    }

    /// Stores an aligned word; `None` where it is outside or misaligned.
    #[inline]
    pub(crate) fn store_u64(&self, offset: usize, value: u64, order: Ordering) -> Option<()> {
        self.atomic_u64(offset)?.store(value.to_le(), order);
        Some(())
    }

    /// Copies bytes out of the shared memory.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `from` has `into.len()` mapped bytes (checked); `into` is private memory, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Some(())
    }

    /// Copies bytes into the shared memory.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        let into = self.at(offset, from.len())?;
        // SAFETY: `into` has `from.len()` mapped bytes (checked); `from` is private memory, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        Some(())
    }

    /// Copies `len` bytes to another piece of shared memory, with nothing in between.
    #[inline]
    pub(crate) fn copy_to(&self, offset: usize, into: &SharedBytes, into_offset: usize, len: usize) -> Option<()> {
        let from = self.at(offset, len)?;
        let into = into.at(into_offset, len)?;
        // SAFETY: both have `len` mapped bytes (checked). `copy` rather than `copy_nonoverlapping`: nothing but the
        // callers' habit says that the two pieces are not one mapping.
        unsafe { std::ptr::copy(from, into, len) };
        Some(())
    }

    /// Whether `len` bytes equal those of another piece.
    pub(crate) fn equals(&self, offset: usize, other: &SharedBytes, other_offset: usize, len: usize) -> Option<bool> {
        let a = self.at(offset, len)?;
        let b = other.at(other_offset, len)?;
        // SAFETY: both have `len` mapped bytes (checked); memcmp only reads them.
        Some(unsafe { libc::memcmp(a.cast(), b.cast(), len) } == 0)
    }

    /// Fills `len` bytes from a file. The system copies: memory that cannot be written is an error here, and no signal.
    pub(crate) fn fill_from(&self, offset: usize, file: &File, from: u64, len: usize) -> io::Result<()> {
        let into = self.at(offset, len).ok_or(io::ErrorKind::InvalidInput)?;
        whole(len, |done| {
            let at = position(from, done)?;
            // SAFETY: `into` has `len` mapped bytes (checked), of which `done` are filled; `file` is open.
            let count = unsafe { libc::pread(file.as_raw_fd(), into.wrapping_add(done).cast(), len - done, at) };
            usize::try_from(count).map_err(|_| io::Error::last_os_error())
        })
    }

    /// Writes `len` bytes to a file, in the same way.
    pub(crate) fn write_to(&self, offset: usize, file: &File, to: u64, len: usize) -> io::Result<()> {
        let from = self.at(offset, len).ok_or(io::ErrorKind::InvalidInput)?;
        whole(len, |done| {
            let at = position(to, done)?;
            // SAFETY: `from` has `len` mapped bytes (checked), of which `done` are written; `file` is open.
            let count = unsafe { libc::pwrite(file.as_raw_fd(), from.wrapping_add(done).cast(), len - done, at) };
            usize::try_from(count).map_err(|_| io::Error::last_os_error())
        })
    }

    /// Has the system give the pages of a range for writing now, with their contents as they are. A range outside is left
    /// alone.
    #[inline]
    pub(crate) fn make_writable(&self, offset: usize, len: usize) {
        let (first, end) = (offset / PAGE * PAGE, offset.saturating_add(len));
        for page in (first..end).step_by(PAGE) {
            if let Some(word) = self.atomic_u32(page) {
                // Changes nothing, whoever else writes there, but counts as a write. Relaxed: it orders nothing.
                word.fetch_or(0, Ordering::Relaxed);
            }
        }
    }

    /// Writes zeroes.
    pub(crate) fn zero(&self, offset: usize, len: usize) -> Option<()> {
        let at = self.at(offset, len)?;
        // SAFETY: `at` has `len` mapped bytes (checked).
        unsafe { std::ptr::write_bytes(at, 0, len) };
        Some(())
    }

    /// Gives the whole pages inside the range back to the system. Only for anonymous memory, where they then read zero.
    pub(crate) fn forget_pages(&self, offset: usize, len: usize) -> io::Result<()> {
        let first = offset.next_multiple_of(PAGE);
        let last = offset.saturating_add(len).min(self.len) / PAGE * PAGE;
        if first >= last {
            return Ok(());
        }
        // SAFETY: the range lies inside the mapping; no reference to its bytes exists anywhere (module rule).
        unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.start + first, last - first) }
    }

    /// Changes the length of a whole mapping; new bytes read zero (the file behind it must have them already).
    pub(crate) fn resize(&mut self, len: usize) -> io::Result<()> {
        debug_assert_eq!(self.start, 0, "only whole mappings are resized");
        // SAFETY: `&mut self`: nothing else uses the mapping, and no pointer into it is kept.
        unsafe { self.map.remap(len, RemapOptions::new().may_move(true))? };
        self.len = len;
        Ok(())
    }
}

fn position(start: u64, done: usize) -> io::Result<libc::off_t> {
    start.checked_add(done as u64).and_then(|at| at.try_into().ok()).ok_or(io::ErrorKind::InvalidInput.into())
}

/// Repeats a part of a transfer, which says how much it has done, until all of it is.
fn whole(len: usize, mut part: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match part(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_is_reached() {
        let bytes = SharedBytes::anonymous(8192).unwrap();
        assert_eq!(bytes.load_u32(8188, Ordering::Relaxed), Some(0));
        assert_eq!(bytes.load_u32(8192, Ordering::Relaxed), None);
        assert_eq!(bytes.load_u32(2, Ordering::Relaxed), None, "misaligned");
        assert_eq!(bytes.load_u64(8188, Ordering::Relaxed), None);
        assert_eq!(bytes.write(8191, &[1, 2]), None);
        assert_eq!(bytes.read(usize::MAX, &mut [0; 2]), None);
        assert_eq!(bytes.zero(1, 8192), None);
        let other = SharedBytes::anonymous(4096).unwrap();
        assert_eq!(bytes.copy_to(0, &other, 0, 4097), None);
        assert_eq!(bytes.equals(0, &other, 1, 4096), None);
    }

    #[test]
    fn a_piece_inside_a_file() {
        let (file, whole) = SharedBytes::memory_file(c"test", 16384).unwrap();
        whole.write(8000, b"here").unwrap();
        let piece = SharedBytes::of_file(&file, 8000, 100, true).unwrap();
        let mut got = [0; 4];
        piece.read(0, &mut got).unwrap();
        assert_eq!(&got, b"here");
        assert!(piece.read(97, &mut got).is_none());
        assert!(SharedBytes::of_file(&file, 8192, 8193, true).is_err());
    }

    #[test]
    fn files_are_read_and_written_whole_or_not() {
        let (file, whole) = SharedBytes::memory_file(c"test", 8192).unwrap();
        let bytes = SharedBytes::anonymous(8192).unwrap();
        bytes.write(100, b"there").unwrap();
        bytes.write_to(100, &file, 8187, 5).unwrap();
        let mut got = [0; 5];
        whole.read(8187, &mut got).unwrap();
        assert_eq!(&got, b"there");
        bytes.fill_from(0, &file, 8187, 5).unwrap();
        bytes.read(0, &mut got).unwrap();
        assert_eq!(&got, b"there");
        let kind = |result: io::Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(bytes.fill_from(0, &file, 8187, 6)), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(bytes.fill_from(8190, &file, 0, 3)), io::ErrorKind::InvalidInput);
        assert_eq!(kind(bytes.write_to(0, &file, u64::MAX, 1)), io::ErrorKind::InvalidInput);
        // Memory behind which there is no file any more.
        let cut = tempfile::tempfile().unwrap();
        cut.set_len(8192).unwrap();
        let whole = SharedBytes::of_file(&cut, 0, 8192, true).unwrap();
        cut.set_len(4096).unwrap();
        assert!(whole.fill_from(4096, &file, 0, 8).is_err() && whole.write_to(4096, &file, 0, 8).is_err());
    }

    #[test]
    fn resized_and_forgotten_memory_reads_zero() {
        let mut bytes = SharedBytes::anonymous(8192).unwrap();
        bytes.write(0, &[7; 8192]).unwrap();
        bytes.forget_pages(1, 8191).unwrap();
        let mut got = [9; 8192];
        bytes.read(0, &mut got).unwrap();
        assert!(got[..4096].iter().all(|b| *b == 7), "a page that is not wholly inside stays");
        assert!(got[4096..].iter().all(|b| *b == 0));
        bytes.resize(1 << 20).unwrap();
        assert_eq!(bytes.load_u64((1 << 20) - 8, Ordering::Relaxed), Some(0));
        assert_eq!(bytes.load_u64(0, Ordering::Relaxed), Some(0x0707_0707_0707_0707));
    }
}
