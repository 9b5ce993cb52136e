//! Memory in shared files: what a device of another process, or the IOMMU, can reach.

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{LazyLock, Once};

use memmap2::{MmapOptions, MmapRaw};

use super::DmaElement;
use crate::{Error, Guard};

/// The granularity of memory for DMA in this crate, bytes.
pub(super) const PAGE: usize = 4096;
/// What memory for DMA is made of, bytes: a hugepage of most machines.
pub(super) const HUGE_2M: usize = 2 << 20;

/// The hugepages this kernel has, bytes, the largest first.
static HUGEPAGES: LazyLock<Vec<usize>> = LazyLock::new(|| hugepages(Path::new("/sys/kernel/mm/hugepages")));

/// A piece of a file, mapped shared: other processes that map the file see the same bytes.
///
/// The bytes may change at any time, so they are seen as atomics. The file of memory that is made here keeps its length,
/// whoever has it (F_SEAL_SHRINK, F_SEAL_GROW). One that came from elsewhere may be made shorter while it is mapped: then the
/// memory is replaced by zeroes of this process ([`SharedMemory::is_lost`]).
pub struct SharedMemory {
    file: File,
    file_offset: u64,
    bytes: usize,
    /// Before the memory: it ends first.
    guard: Option<Guard>,
    memory: MmapRaw,
}

impl SharedMemory {
    /// New anonymous memory of zeroes, `bytes` long (rounded up to whole pages).
    pub fn create(bytes: usize) -> Result<SharedMemory, Error> {
        let bytes = round_up(bytes, page_size())?;
        let file = anonymous_file(bytes, 0).map_err(|source| memory_error("creating memory", bytes, source))?;
        SharedMemory::map(file, 0, bytes)
    }

    /// Maps `bytes` bytes of `file` from `offset` on, which is a multiple of the page size. The file is long enough.
    pub fn from_file(file: File, offset: u64, bytes: usize) -> Result<SharedMemory, Error> {
        let mut memory = SharedMemory::map(file, offset, bytes)?;
        let whole = round_up(bytes, page_size())?;
        // SAFETY: the mapping has just been made, of so many whole pages, and is dropped after the guard. It is seen as atomics.
        let guard = unsafe { Guard::new(memory.as_ptr(), whole, &memory.file) };
        memory.guard = Some(guard.map_err(|source| memory_error("guarding a mapping", bytes, source))?);
        Ok(memory)
    }

    /// Was the memory found without pages: is its file shorter now, or its file system full? It reads as zeroes since, and is
    /// no longer shared with anybody.
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }

    fn map(file: File, offset: u64, bytes: usize) -> Result<SharedMemory, Error> {
        let length = file.metadata().map_err(|source| memory_error("looking at a file", bytes, source))?.len();
        let bad = |reason| Err(Error::BadMemory { reason });
        if bytes == 0 {
            return bad("it has no bytes".into());
        }
        if offset.checked_add(bytes as u64).is_none_or(|end| end > length) {
            return bad(format!("{bytes:#x} bytes at {offset:#x} do not lie in a file of {length:#x} bytes"));
        }
        let page = page_size() as u64;
        if !offset.is_multiple_of(page) {
            return bad(format!("offset {offset:#x} in its file is not a multiple of {page}"));
        }
        let memory = MmapOptions::new()
            .offset(offset)
            .len(bytes)
            .map_raw(&file)
            .map_err(|source| memory_error("mapping a file", bytes, source))?;
        Ok(SharedMemory { file, file_offset: offset, bytes, guard: None, memory })
    }

    /// Memory of zeroes for DMA, `wanted` or at least `needed` bytes long, which are multiples of 2 MiB: hugepages if there are
    /// any free, else normal pages, locked if `lock`.
    pub(super) fn create_for_dma(needed: usize, wanted: usize, lock: bool) -> Result<SharedMemory, Error> {
        let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
        let lengths = [wanted, needed];
        for bytes in &lengths[if wanted > needed { 0 } else { 1 }..] {
            // Memory is not made of pages longer than itself, most of which would be wasted.
            for page in HUGEPAGES.iter().filter(|page| *page <= bytes) {
                match SharedMemory::create_huge(round_up(*bytes, *page)?, *page) {
                    Ok(memory) => return Ok(memory),
                    Err(error) => refused = error,
                }
            }
        }
        if wanted > needed
            && let Ok(memory) = SharedMemory::create(wanted)
            && (!lock || memory.memory.lock().is_ok())
        {
            warn_once(needed, &refused, None);
            return Ok(memory);
        }
        let memory = SharedMemory::create(needed)?;
        let not_locked = if lock { memory.memory.lock().err() } else { None };
        warn_once(needed, &refused, not_locked);
        Ok(memory)
    }

    /// Makes memory of hugepages of `page` bytes, a power of two.
    fn create_huge(bytes: usize, page: usize) -> io::Result<SharedMemory> {
        let file = anonymous_file(bytes, libc::MFD_HUGETLB | page.trailing_zeros() << libc::MFD_HUGE_SHIFT)?;
        // Mapping reserves the pages: it fails here if there are too few, not at a later access.
        let memory = MmapOptions::new().len(bytes).populate().map_raw(&file)?;
        Ok(SharedMemory { file, file_offset: 0, bytes, guard: None, memory })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the memory begins in its file, bytes.
    pub fn file_offset(&self) -> u64 {
        self.file_offset
    }

    /// The memory's length, bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes; there always are some.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// `count` elements from `byte_offset` on; `None` if they are not inside, or misaligned.
    pub fn slice<T: DmaElement>(&self, byte_offset: usize, count: usize) -> Option<&[T]> {
        let end = count.checked_mul(size_of::<T>())?.checked_add(byte_offset)?;
        if end > self.bytes || !byte_offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: `byte_offset` was checked to lie inside the mapping.
        let first = unsafe { self.memory.as_ptr().add(byte_offset) };
        // SAFETY: the elements lie inside the mapping, which lives as long as `self`, and are aligned, as mappings begin
        // at a page. Any bytes are valid for a `DmaElement`, and all its accesses are atomic.
        Some(unsafe { slice::from_raw_parts(first.cast::<T>(), count) })
    }

    /// Copies `data.len()` bytes from `byte_offset` on into `data`; `None` if they are not inside.
    ///
    /// The bytes may change meanwhile: each aligned group of 8 is read at once, all others one by one.
    pub fn read(&self, byte_offset: usize, data: &mut [u8]) -> Option<()> {
        let (head, words, tail) = self.split(byte_offset, data.len())?;
        let (data_head, rest) = data.split_at_mut(head.len());
        let (data_words, data_tail) = rest.split_at_mut(words.len() * 8);
        // Relaxed, here and in `write`: whoever shares the memory orders the copy by other means, such as a doorbell.
        for (to, from) in data_head.iter_mut().zip(head).chain(data_tail.iter_mut().zip(tail)) {
            *to = from.load(Ordering::Relaxed);
        }
        for (to, from) in data_words.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.load(Ordering::Relaxed).to_ne_bytes());
        }
        Some(())
    }

    /// Copies `data` to `byte_offset`; `None`, and nothing is copied, if it does not fit there.
    pub fn write(&self, byte_offset: usize, data: &[u8]) -> Option<()> {
        let (head, words, tail) = self.split(byte_offset, data.len())?;
        let (data_head, rest) = data.split_at(head.len());
        let (data_words, data_tail) = rest.split_at(words.len() * 8);
        for (from, to) in data_head.iter().zip(head).chain(data_tail.iter().zip(tail)) {
            to.store(*from, Ordering::Relaxed);
        }
        for (from, to) in data_words.as_chunks().0.iter().zip(words) {
            to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
        Some(())
    }

    /// The bytes before the first multiple of 8, the groups of 8 from there on, and the bytes that are left.
    fn split(&self, byte_offset: usize, bytes: usize) -> Option<(&[AtomicU8], &[AtomicU64], &[AtomicU8])> {
        let head = (byte_offset.wrapping_neg() % 8).min(bytes);
        let words = (bytes - head) / 8;
        let tail = bytes - head - words * 8;
        let words_at = byte_offset.checked_add(head)?;
        let tail_at = words_at.checked_add(words * 8)?;
        // With no groups, what is left may begin anywhere.
        let groups: &[AtomicU64] = if words == 0 { &[] } else { self.slice(words_at, words)? };
        Some((self.slice(byte_offset, head)?, groups, self.slice(tail_at, tail)?))
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.memory.as_mut_ptr()
    }
}

/// The sizes of hugepages that a kernel lists in a folder such as /sys/kernel/mm/hugepages, bytes, the largest first.
fn hugepages(folder: &Path) -> Vec<usize> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let size = |name: std::ffi::OsString| {
        let kilobytes: usize = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        kilobytes.checked_mul(1024).filter(|bytes| bytes.is_power_of_two())
    };
    let mut sizes: Vec<usize> = names.filter_map(size).collect();
    sizes.sort_unstable_by(|one, other| other.cmp(one));
    sizes
}

pub(super) fn round_up(bytes: usize, unit: usize) -> Result<usize, Error> {
    match bytes.checked_next_multiple_of(unit) {
        Some(rounded) if rounded > 0 => Ok(rounded),
        _ => Err(Error::BadMemory { reason: format!("{bytes} bytes cannot be allocated") }),
    }
}

/// The size of the machine's pages, bytes: a power of two, at least 4096.
pub(crate) fn page_size() -> usize {
    // SAFETY: the call reads a number the kernel has given the process.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).map_or(PAGE, |size| size.max(PAGE))
}

fn anonymous_file(bytes: usize, flags: libc::c_uint) -> io::Result<File> {
    const NAME: &CStr = c"vfio-dma";
    // SAFETY: the name is a C string; the call touches no other memory.
    let descriptor = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes as u64)?;
    // Whoever gets the file cannot take the memory away from us.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call touches no memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn memory_error(attempt: &'static str, bytes: usize, source: io::Error) -> Error {
    Error::Memory { attempt, bytes, source, advice: String::new() }
}

/// One warning per process: what is missing, what it costs and what to run.
fn warn_once(bytes: usize, refused: &io::Error, not_locked: Option<io::Error>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let lock = not_locked.map_or_else(String::new, |error| {
            let limit = memlock_limit();
            format!(
                ". They could not be locked either ({error}; RLIMIT_MEMLOCK is {limit}) and may be swapped out: \
                 {RAISE_MEMLOCK}"
            )
        });
        log::warn!(
            "no hugepages for {} MiB of DMA memory ({refused}): normal pages are used, which cost more translations. To \
             have 1 GiB of hugepages, run: setup/setup.sh hugepages 1G{lock}",
            bytes >> 20
        );
    });
}

/// How to be allowed to lock more memory.
pub(crate) const RAISE_MEMLOCK: &str = "raise the limit (ulimit -l unlimited, LimitMEMLOCK=infinity for a service, \
     --ulimit memlock=-1 for a container)";

/// How much memory the process may lock, in words.
pub(crate) fn memlock_limit() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes the structure, which outlives it.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    match limit.rlim_cur {
        _ if result != 0 => "not known".into(),
        libc::RLIM_INFINITY => "unlimited".into(),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({:#x} bytes at {:#x} of its file)", self.bytes, self.file_offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hugepages_of_any_size_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["2048kB", "524288kB", "16777216kB", "3kB", "kB", "-1kB", "99999999999999999999kB"] {
            std::fs::create_dir(folder.path().join(format!("hugepages-{name}"))).unwrap();
        }
        std::fs::create_dir(folder.path().join("others")).unwrap();
        assert_eq!(hugepages(folder.path()), [16 << 30, 512 << 20, 2 << 20]);
        assert_eq!(hugepages(&folder.path().join("none")), [0; 0]);
    }

    #[test]
    fn slices_stay_inside_and_aligned() {
        let memory = SharedMemory::create(5000).unwrap();
        assert_eq!(memory.len(), 8192);
        assert_eq!(memory.slice::<AtomicU64>(0, 1024).map(<[_]>::len), Some(1024));
        assert!(memory.slice::<AtomicU64>(0, 1025).is_none());
        assert!(memory.slice::<AtomicU64>(8, 1024).is_none());
        assert!(memory.slice::<AtomicU64>(4, 1).is_none());
        assert!(memory.slice::<AtomicU64>(8, usize::MAX / 4).is_none());
        assert!(memory.slice::<AtomicU8>(usize::MAX, 1).is_none());
        assert!(memory.slice::<AtomicU8>(8192, 0).is_some());
        assert!(memory.slice::<AtomicU8>(8193, 0).is_none());
    }

    #[test]
    fn two_mappings_of_a_file_are_the_same_memory() {
        let one = SharedMemory::create(8192).unwrap();
        let two = SharedMemory::from_file(one.file().try_clone().unwrap(), 4096, 4096).unwrap();
        two.slice::<AtomicU64>(16, 1).unwrap()[0].store(77, Ordering::Relaxed);
        assert_eq!(one.slice::<AtomicU64>(4096 + 16, 1).unwrap()[0].load(Ordering::Relaxed), 77);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let memory = SharedMemory::create(8192).unwrap();
        let map = |offset, bytes| {
            SharedMemory::from_file(memory.file().try_clone().unwrap(), offset, bytes)
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        assert!(map(4096, 8192).unwrap_err().contains("0x2000"));
        assert!(map(u64::MAX - 4095, 8192).unwrap_err().contains("do not lie"));
        assert!(map(100, 4096).unwrap_err().contains("multiple"));
        assert!(map(0, 0).is_err());
        assert_eq!(map(4096, 4096), Ok(()));
    }

    #[test]
    fn memory_that_is_handed_out_keeps_its_length() {
        let memory = SharedMemory::create(8192).unwrap();
        let file = memory.file().try_clone().unwrap();
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        // Others map it and write to it as before.
        let other = SharedMemory::from_file(file, 0, 8192).unwrap();
        other.write(8000, &[7]).unwrap();
        let mut byte = [0];
        memory.read(8000, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    proptest! {
        #[test]
        fn copies_are_exact_and_stay_inside(offset in 0usize..4200, data in proptest::collection::vec(any::<u8>(), 0..100)) {
            let memory = SharedMemory::create(4096).unwrap();
            let mut expected = vec![0; 4096];
            let fits = offset + data.len() <= 4096;
            prop_assert_eq!(memory.write(offset, &data).is_some(), fits);
            if fits {
                expected[offset..][..data.len()].copy_from_slice(&data);
            }
            let mut all = vec![1; 4096];
            prop_assert_eq!(memory.read(0, &mut all), Some(()));
            prop_assert_eq!(all, expected);
            let mut back = vec![0; data.len()];
            prop_assert_eq!(memory.read(offset, &mut back).is_some(), fits);
            prop_assert!(!fits || back == data);
        }
    }
}
