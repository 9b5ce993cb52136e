//! Buffers for the device's structures and data, cut from chunks that are mapped once.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::memory::{HUGE_2M, PAGE, round_up};
use super::{DmaMapping, DmaSpace, SharedMemory, numa};
use crate::Error;
use crate::iova::{IovaRange, RangeAllocator};

/// What DMA memory may be seen as.
///
/// # Safety
/// Any bytes must be a valid value, all accesses through a shared reference must be atomic, and there must be nothing to
/// drop.
pub unsafe trait DmaElement: Send + Sync + 'static {}

// SAFETY: any byte is valid, and shared access is atomic.
unsafe impl DmaElement for AtomicU8 {}
// SAFETY: any two bytes are valid, and shared access is atomic.
unsafe impl DmaElement for AtomicU16 {}
// SAFETY: any four bytes are valid, and shared access is atomic.
unsafe impl DmaElement for AtomicU32 {}
// SAFETY: any eight bytes are valid, and shared access is atomic.
unsafe impl DmaElement for AtomicU64 {}
// SAFETY: an array has no bytes but those of its elements.
unsafe impl<T: DmaElement, const N: usize> DmaElement for [T; N] {}

/// The chunks that have a buffer in use.
#[derive(Default)]
pub(super) struct Pool {
    /// A chunk lives as long as one of its buffers.
    chunks: Mutex<Vec<Weak<Chunk>>>,
    /// It was told that memory is not on the device's node.
    told: AtomicBool,
}

/// New chunks are as large as all before them together, so that they stay few: a vfio-user server may take no more than a few
/// dozen mappings. But no larger than this, bytes.
const LARGEST_STEP: usize = 256 << 20;

/// Memory mapped for the device in one piece.
struct Chunk {
    /// Before the memory: a mapping has to end before its memory does.
    mapping: DmaMapping,
    memory: Arc<SharedMemory>,
    free: Mutex<RangeAllocator>,
}

impl Pool {
    pub(super) fn allocate(&self, space: &DmaSpace, bytes: usize) -> Result<DmaBuffer, Error> {
        let bytes = round_up(bytes, PAGE)?;
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.retain(|chunk| chunk.strong_count() > 0);
        for chunk in chunks.iter().filter_map(Weak::upgrade) {
            if let Some(buffer) = chunk.cut(bytes) {
                buffer.piece.clear();
                return Ok(buffer);
            }
        }
        let needed = round_up(bytes, HUGE_2M)?;
        let before: usize = chunks.iter().filter_map(Weak::upgrade).map(|chunk| chunk.memory.len()).sum();
        let wanted = needed.max(before.min(LARGEST_STEP));
        let chunk = match space.inner.backend.numa_node() {
            None => Chunk::new(space, needed, wanted)?,
            Some(node) => {
                let (chunk, preferred) = numa::on_node(node, || Chunk::new(space, needed, wanted));
                let chunk = chunk?;
                self.tell_of_node(space, &chunk, node, preferred);
                chunk
            }
        };
        chunks.push(Arc::downgrade(&chunk));
        // New memory is zero.
        Ok(chunk.cut(bytes).expect("a new chunk is free, and as large as the buffer"))
    }
}

impl Pool {
    /// Tells, once, of memory that is not on the device's node.
    fn tell_of_node(&self, space: &DmaSpace, chunk: &Chunk, node: u32, preferred: io::Result<()>) {
        let why = match (numa::node_of(chunk.memory.as_ptr()), preferred) {
            (Ok(there), _) if there == node => return,
            (_, Err(error)) => format!("the kernel does not let this process choose ({error})"),
            (Ok(there), Ok(())) => format!("it lies on node {there}, as that node has none free"),
            (Err(error), Ok(())) => format!("the kernel does not tell where it lies ({error})"),
        };
        // Relaxed: the flag guards nothing but the line.
        if !self.told.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{}: memory for its queues may not be on its NUMA node {node}, which costs each of its accesses: {why}. For \
                 hugepages there run: setup/setup.sh hugepages 1G --node {node}",
                space.inner.device
            );
        }
    }

    #[cfg(test)]
    pub(super) fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }
}

impl Chunk {
    /// A chunk of `wanted` bytes; of `needed` ones if there is no more.
    fn new(space: &DmaSpace, needed: usize, wanted: usize) -> Result<Arc<Chunk>, Error> {
        let lock = !space.inner.backend.pins_memory();
        let memory = Arc::new(SharedMemory::create_for_dma(needed, wanted, lock)?);
        let (memory, mapping) = match space.map(memory.clone()) {
            Ok(mapping) => (memory, mapping),
            Err(error) if memory.len() > needed => {
                log::debug!("{space:?}: {} bytes in one piece cannot be had: {error}", memory.len());
                drop(memory);
                let memory = Arc::new(SharedMemory::create_for_dma(needed, needed, lock)?);
                let mapping = space.map(memory.clone())?;
                (memory, mapping)
            }
            Err(error) => return Err(error),
        };
        let free = RangeAllocator::new(&[IovaRange { start: 0, last: memory.len() as u64 - 1 }]);
        Ok(Arc::new(Chunk { mapping, memory, free: Mutex::new(free) }))
    }

    fn cut(self: &Arc<Chunk>, bytes: usize) -> Option<DmaBuffer> {
        let offset = self.free().allocate(bytes as u64, PAGE as u64, 0)? as usize;
        let piece = Arc::new(Piece { offset, bytes, chunk: self.clone(), abandoned: AtomicBool::new(false) });
        Some(DmaBuffer { piece })
    }

    fn free(&self) -> MutexGuard<'_, RangeAllocator> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of a chunk; free again when dropped, unless it was abandoned.
struct Piece {
    offset: usize,
    bytes: usize,
    chunk: Arc<Chunk>,
    abandoned: AtomicBool,
}

impl Piece {
    fn slice<T: DmaElement>(&self, byte_offset: usize, count: usize) -> Option<&[T]> {
        let end = count.checked_mul(size_of::<T>())?.checked_add(byte_offset)?;
        (end <= self.bytes).then(|| self.chunk.memory.slice(self.offset + byte_offset, count))?
    }

    fn clear(&self) {
        let words = self.slice::<AtomicU64>(0, self.bytes / 8).expect("a piece is made of pages of its chunk");
        // Relaxed: whoever is told of the buffer learns of the zeroes the same way; the device by its doorbell.
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !*self.abandoned.get_mut() {
            self.chunk.free().free(self.offset as u64, self.bytes as u64);
        }
    }
}

/// Memory shared with the device. Clones are the same memory; it is free again when the last clone and slice is gone.
///
/// The device must have been told to forget it by then: its pages are given to the next buffer. Where that has failed,
/// there is [`DmaBuffer::abandon`].
#[derive(Clone)]
pub struct DmaBuffer {
    piece: Arc<Piece>,
}

impl DmaBuffer {
    /// The address at which the device sees the first byte, a multiple of 4096.
    pub fn iova(&self) -> u64 {
        self.piece.chunk.mapping.iova() + self.piece.offset as u64
    }

    /// The buffer's length in bytes, a multiple of 4096.
    pub fn len(&self) -> usize {
        self.piece.bytes
    }

    /// Whether there are no bytes; there always are some.
    pub fn is_empty(&self) -> bool {
        self.piece.bytes == 0
    }

    /// `count` elements from `byte_offset` on; `None` if they are not inside the buffer, or misaligned.
    pub fn slice<T: DmaElement>(&self, byte_offset: usize, count: usize) -> Option<DmaSlice<T>> {
        let elements = self.piece.slice::<T>(byte_offset, count)?;
        Some(DmaSlice {
            first: NonNull::from(elements).cast(),
            count,
            iova: self.iova() + byte_offset as u64,
            _piece: self.piece.clone(),
            _elements: PhantomData,
        })
    }

    /// Copies bytes from `byte_offset` on into `data`; `None` if they are not inside.
    ///
    /// The bytes may change meanwhile: each aligned group of 8 is read at once, all others one by one.
    pub fn read(&self, byte_offset: usize, data: &mut [u8]) -> Option<()> {
        self.piece.chunk.memory.read(self.place(byte_offset, data.len())?, data)
    }

    /// Copies `data` to `byte_offset`; `None`, and nothing is copied, if it does not fit there.
    pub fn write(&self, byte_offset: usize, data: &[u8]) -> Option<()> {
        self.piece.chunk.memory.write(self.place(byte_offset, data.len())?, data)
    }

    /// Has the memory never given to another buffer: for a device that could not be told to forget it, and may still write
    /// to it. It is unmapped, and goes, with the last of the buffers that share its mapping.
    pub fn abandon(&self) {
        // Relaxed: read when the last owner goes, which is ordered behind all that the others did.
        self.piece.abandoned.store(true, Ordering::Relaxed);
    }

    /// Where bytes of the buffer lie in their chunk; `None` if they are not inside the buffer.
    fn place(&self, byte_offset: usize, bytes: usize) -> Option<usize> {
        let inside = byte_offset.checked_add(bytes).is_some_and(|end| end <= self.piece.bytes);
        inside.then(|| self.piece.offset + byte_offset)
    }
}

/// Elements of a [`DmaBuffer`]; keeps the buffer alive.
pub struct DmaSlice<T> {
    first: NonNull<T>,
    count: usize,
    iova: u64,
    _piece: Arc<Piece>,
    _elements: PhantomData<T>,
}

// SAFETY: a slice is a shared reference to elements (which are `Sync`) in memory that `_piece` keeps.
unsafe impl<T: DmaElement> Send for DmaSlice<T> {}
// SAFETY: as above.
unsafe impl<T: DmaElement> Sync for DmaSlice<T> {}

impl<T> DmaSlice<T> {
    /// The address at which the device sees the first element.
    pub fn iova(&self) -> u64 {
        self.iova
    }
}

impl<T> Deref for DmaSlice<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `first` and `count` are those of a slice that `DmaBuffer::slice` checked, in memory that `_piece` keeps.
        unsafe { slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl<T> Clone for DmaSlice<T> {
    fn clone(&self) -> DmaSlice<T> {
        DmaSlice { _piece: self._piece.clone(), _elements: PhantomData, ..*self }
    }
}

impl fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaBuffer({:#x}, {:#x} bytes)", self.iova(), self.len())
    }
}

impl<T> fmt::Debug for DmaSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaSlice({:#x}, {} elements)", self.iova, self.count)
    }
}
