//! A device's registers: typed accesses to its BARs, and doorbells.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use volatile::VolatilePtr;

use crate::Error;
use crate::backend::{Backend, MappedArea, Region};

/// A base address register's region: device registers, at offsets in bytes.
///
/// Accesses are single accesses of their width where the region is mapped, else one request to the server or kernel.
/// Values are in the host's byte order; the device's is little-endian.
#[derive(Clone)]
pub struct Bar {
    inner: Arc<BarInner>,
}

struct BarInner {
    index: u32,
    region: Region,
    backend: Arc<dyn Backend>,
    device: String,
    /// It was told that doorbells are requests.
    told: AtomicBool,
}

impl Bar {
    pub(crate) fn new(index: u32, region: Region, backend: Arc<dyn Backend>, device: String) -> Bar {
        Bar { inner: Arc::new(BarInner { index, region, backend, device, told: AtomicBool::new(false) }) }
    }

    /// The region's size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.region.size
    }

    /// Whether the `bytes` bytes at `offset` lie in memory, so that reaching them needs no request.
    pub fn is_mapped(&self, offset: u64, bytes: u64) -> bool {
        self.find(offset, bytes).is_some()
    }

    /// Reads a 32-bit register; `offset` is a multiple of 4.
    ///
    /// What the device stored to DMA memory before it set the register is visible afterwards.
    pub fn read_u32(&self, offset: u64) -> Result<u32, Error> {
        self.check(offset, 4)?;
        match self.pointer::<u32>(offset) {
            Some((register, _area)) => {
                // SAFETY: `register` points to 4 aligned bytes of the mapping that `_area` keeps.
                let value = unsafe { VolatilePtr::new(register) }.read();
                acquire_dma_loads();
                Ok(u32::from_le(value))
            }
            None => {
                let mut data = [0; 4];
                self.inner.backend.read(self.inner.index, offset, &mut data)?;
                Ok(u32::from_le_bytes(data))
            }
        }
    }

    /// Reads a 64-bit register in one access of 8 bytes; `offset` is a multiple of 8.
    ///
    /// What the device stored to DMA memory before it set the register is visible afterwards. Where the region is not
    /// mapped, the kernel may make two 32-bit accesses of the request, low half first.
    pub fn read_u64(&self, offset: u64) -> Result<u64, Error> {
        self.check(offset, 8)?;
        match self.pointer::<u64>(offset) {
            Some((register, _area)) => {
                // SAFETY: `register` points to 8 aligned bytes of the mapping that `_area` keeps.
                let value = unsafe { VolatilePtr::new(register) }.read();
                acquire_dma_loads();
                Ok(u64::from_le(value))
            }
            None => {
                let mut data = [0; 8];
                self.inner.backend.read(self.inner.index, offset, &mut data)?;
                Ok(u64::from_le_bytes(data))
            }
        }
    }

    /// Writes a 32-bit register; `offset` is a multiple of 4.
    ///
    /// Earlier stores to DMA memory are visible to the device before the write.
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<(), Error> {
        self.check(offset, 4)?;
        publish_dma_stores();
        match self.pointer::<u32>(offset) {
            Some((register, _area)) => {
                // SAFETY: `register` points to 4 aligned bytes of the mapping that `_area` keeps.
                unsafe { VolatilePtr::new(register) }.write(value.to_le());
                Ok(())
            }
            None => self.inner.backend.write(self.inner.index, offset, &value.to_le_bytes()),
        }
    }

    /// Writes a 64-bit register in one access of 8 bytes; `offset` is a multiple of 8.
    ///
    /// Earlier stores to DMA memory are visible to the device before the write.
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), Error> {
        self.check(offset, 8)?;
        publish_dma_stores();
        match self.pointer::<u64>(offset) {
            Some((register, _area)) => {
                // SAFETY: `register` points to 8 aligned bytes of the mapping that `_area` keeps.
                unsafe { VolatilePtr::new(register) }.write(value.to_le());
                Ok(())
            }
            None => self.inner.backend.write(self.inner.index, offset, &value.to_le_bytes()),
        }
    }

    /// The doorbell register at `offset`, a multiple of 4. That it is not mapped is logged, once for the BAR: each ring is a
    /// request then.
    pub fn doorbell(&self, offset: u64) -> Result<Doorbell, Error> {
        self.check(offset, 4)?;
        let pointer = self.pointer::<u32>(offset);
        // Relaxed: the flag guards nothing but the line.
        if pointer.is_none() && !self.inner.told.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{}: the doorbell at {offset:#x} of BAR {} cannot be mapped: each ring of it is a request, which takes \
                 microseconds in place of nanoseconds",
                self.inner.device,
                self.inner.index
            );
        }
        Ok(Doorbell(match pointer {
            Some((register, area)) => {
                Target::Mapped(MappedDoorbell { register, _area: area.clone(), _backend: self.inner.backend.clone() })
            }
            None => Target::Request(Box::new(RequestDoorbell {
                index: self.inner.index,
                offset,
                backend: self.inner.backend.clone(),
                warned: AtomicBool::new(false),
            })),
        }))
    }

    fn check(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        let size = self.inner.region.size;
        if offset.is_multiple_of(bytes) && offset.checked_add(bytes).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let region = format!("BAR {}", self.inner.index);
        Err(Error::OutOfRegion { region, offset, bytes: bytes as usize, size })
    }

    fn find(&self, offset: u64, bytes: u64) -> Option<&Arc<MappedArea>> {
        let end = offset.checked_add(bytes)?;
        self.inner.region.areas.iter().find(|area| {
            let area_end = area.offset + area.memory.len() as u64;
            area.offset <= offset && end <= area_end
        })
    }

    /// Where the register of type `T` at `offset` lies, if it is mapped. `offset` is a multiple of the register's size.
    fn pointer<T>(&self, offset: u64) -> Option<(NonNull<T>, &Arc<MappedArea>)> {
        let area = self.find(offset, size_of::<T>() as u64)?;
        let within = (offset - area.offset) as usize;
        // SAFETY: `find` has checked that `within` lies inside the mapping.
        let register = unsafe { area.memory.as_mut_ptr().add(within) };
        // Mappings begin at a page, so that an aligned offset gives an aligned pointer.
        Some((NonNull::new(register.cast())?, area))
    }
}

/// A register that tells the device that there is work. It belongs to one thread.
///
/// ```no_run
/// # let device = vfio::Device::open(&"01:00.0".parse()?)?;
/// let doorbell = device.bar(0)?.doorbell(0x1000)?;
/// doorbell.ring(1);
/// # Ok::<(), vfio::Error>(())
/// ```
pub struct Doorbell(Target);

enum Target {
    Mapped(MappedDoorbell),
    Request(Box<RequestDoorbell>),
}

struct MappedDoorbell {
    register: NonNull<u32>,
    // In the order in which they have to go: the device is given back when nothing of it is mapped.
    _area: Arc<MappedArea>,
    _backend: Arc<dyn Backend>,
}

// SAFETY: the pointer leads into the mapping that `_area` keeps, which any thread may use by volatile
// accesses; all else in it is `Send`.
unsafe impl Send for MappedDoorbell {}

struct RequestDoorbell {
    index: u32,
    offset: u64,
    backend: Arc<dyn Backend>,
    warned: AtomicBool,
}

impl Doorbell {
    /// Writes `value` to the register. Earlier stores to DMA memory are visible to the device first.
    ///
    /// One store where the register is mapped. Where it is not, the write is a request, and a failed one is logged: the
    /// device is gone then, which shows in its other registers.
    #[inline]
    pub fn ring(&self, value: u32) {
        publish_dma_stores();
        match &self.0 {
            Target::Mapped(doorbell) => {
                // SAFETY: `doorbell.register` points to 4 aligned bytes of the mapping that the doorbell keeps.
                unsafe { VolatilePtr::new(doorbell.register) }.write(value.to_le());
            }
            Target::Request(doorbell) => doorbell.ring(value),
        }
    }

    /// Whether ringing is a plain store.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Target::Mapped(_))
    }
}

impl RequestDoorbell {
    #[cold]
    fn ring(&self, value: u32) {
        if let Err(error) = self.backend.write(self.index, self.offset, &value.to_le_bytes())
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            log::warn!("a doorbell was not rung: {error}");
        }
    }
}

/// Orders earlier stores to memory before a following store to a register, as the device sees them.
///
/// Pairs with the device's reads of DMA memory after it has seen the register. x86-64 keeps stores in order (Intel SDM,
/// volume 3, section 9.2.2), uncached ones included: only the compiler has to be held.
#[inline(always)]
fn publish_dma_stores() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier instruction; it touches neither registers nor flags. The default options make it a compiler
    // barrier for memory as well. `oshst`: stores, in the outer shareable domain, where devices are.
    unsafe {
        std::arch::asm!("dmb oshst", options(nostack, preserves_flags))
    };
    #[cfg(not(target_arch = "aarch64"))]
    std::sync::atomic::fence(Ordering::Release);
}

/// Orders an earlier load from a register before following loads from memory.
///
/// Pairs with the device's stores to DMA memory before the change of its register. x86-64 keeps loads in order.
#[inline(always)]
fn acquire_dma_loads() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier instruction, as above. `oshld`: loads before it, loads and stores behind it.
    unsafe {
        std::arch::asm!("dmb oshld", options(nostack, preserves_flags))
    };
    #[cfg(not(target_arch = "aarch64"))]
    std::sync::atomic::fence(Ordering::Acquire);
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bar({}, {:#x} bytes)", self.inner.index, self.size())
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_mapped() { "Doorbell(mapped)" } else { "Doorbell(by request)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::{BAR_BYTES, FakeBackend};

    fn bar() -> (Arc<FakeBackend>, Bar) {
        let backend = Arc::new(FakeBackend::default());
        (backend.clone(), Bar::new(0, backend.region(0), backend, "fake".into()))
    }

    #[test]
    fn doorbells_that_are_requests_are_told_once() {
        let (_, bar) = bar();
        assert!(bar.doorbell(0x1000).unwrap().is_mapped() && !bar.inner.told.load(Ordering::Relaxed));
        assert!(!bar.doorbell(0x2000).unwrap().is_mapped() && bar.inner.told.load(Ordering::Relaxed));
    }

    #[test]
    fn mapped_registers_need_no_request() {
        let (backend, bar) = bar();
        bar.write_u64(0x1ff8, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(bar.read_u32(0x1ff8).unwrap(), 0x5566_7788, "little-endian");
        assert_eq!(bar.read_u32(0x1ffc).unwrap(), 0x1122_3344);
        bar.write_u32(0x1000, 5).unwrap();
        assert_eq!(bar.read_u64(0x1000).unwrap(), 5);
        assert_eq!(backend.requests(), 0);
    }

    #[test]
    fn other_registers_are_requests() {
        let (backend, bar) = bar();
        bar.write_u64(0x0ff8, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(bar.read_u32(0x0ff8).unwrap(), 0x5566_7788);
        bar.write_u32(0x2000, 5).unwrap();
        assert_eq!(bar.read_u64(0x2000).unwrap(), 5);
        assert_eq!(backend.requests(), 4);
    }

    #[test]
    fn accesses_outside_or_misaligned_are_refused() {
        let (backend, bar) = bar();
        for offset in [1, 2, 0x1001, BAR_BYTES, u64::MAX, u64::MAX - 3, BAR_BYTES - 2] {
            assert!(matches!(bar.read_u32(offset), Err(Error::OutOfRegion { .. })), "{offset:#x}");
            assert!(bar.write_u32(offset, 1).is_err() && bar.doorbell(offset).is_err(), "{offset:#x}");
        }
        for offset in [4, 0x1004, BAR_BYTES - 4, u64::MAX - 7] {
            assert!(bar.read_u64(offset).is_err() && bar.write_u64(offset, 1).is_err(), "{offset:#x}");
        }
        assert_eq!(backend.requests(), 0);
    }

    #[test]
    fn a_doorbell_outlives_its_bar_and_may_move() {
        let (backend, bar) = bar();
        let doorbell = bar.doorbell(0x1008).unwrap();
        let requested = bar.doorbell(0x10).unwrap();
        assert!(doorbell.is_mapped() && !requested.is_mapped());
        assert!(bar.is_mapped(0x1008, 4) && !bar.is_mapped(0x1ffc, 8));
        std::thread::spawn(move || {
            doorbell.ring(0xdead_beef);
            requested.ring(9);
        })
        .join()
        .unwrap();
        assert_eq!(bar.read_u32(0x1008).unwrap(), 0xdead_beef);
        assert_eq!(backend.requests(), 1);
        assert_eq!(bar.read_u32(0x10).unwrap(), 9);
    }
}
