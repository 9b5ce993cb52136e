//! A device that is not there, for tests of what does not depend on the way to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memmap2::{MmapOptions, MmapRaw};
use vmm_sys_util::eventfd::EventFd;

use super::{Backend, CONFIG_REGION, MappedArea, Notices, Region, ServerIdentity};
use crate::{Error, IovaRange, SharedMemory};

/// Bytes of BAR 0; the page at 0x1000 is mapped.
pub(crate) const BAR_BYTES: u64 = 0x3000;

pub(crate) struct FakeBackend {
    pub config: Mutex<Vec<u8>>,
    bar: Region,
    registers: Mutex<Vec<u8>>,
    requests: AtomicUsize,
    mapped: Mutex<BTreeMap<u64, u64>>,
    refuse_map: AtomicBool,
    /// Bytes of the longest mapping that is not refused.
    longest: AtomicU64,
    refuse_unmap: AtomicBool,
    alignment: u64,
    notices: Notices,
    numa_node: Mutex<Option<u32>>,
}

impl Default for FakeBackend {
    fn default() -> FakeBackend {
        let file = SharedMemory::create(0x1000).unwrap();
        let memory: MmapRaw = MmapOptions::new().len(0x1000).map_raw(file.file()).unwrap();
        FakeBackend {
            config: Mutex::new(vec![0; 256]),
            bar: Region { size: BAR_BYTES, areas: vec![Arc::new(MappedArea { offset: 0x1000, _guard: None, memory })] },
            registers: Mutex::new(vec![0; BAR_BYTES as usize]),
            requests: AtomicUsize::default(),
            mapped: Mutex::default(),
            refuse_map: AtomicBool::default(),
            longest: AtomicU64::new(u64::MAX),
            refuse_unmap: AtomicBool::default(),
            alignment: 4096,
            notices: Notices::new().unwrap(),
            numa_node: Mutex::default(),
        }
    }
}

impl FakeBackend {
    /// One whose IOMMU has pages of `bytes`.
    pub(crate) fn with_pages(bytes: u64) -> FakeBackend {
        FakeBackend { alignment: bytes, ..FakeBackend::default() }
    }

    /// What is mapped for DMA: address and bytes.
    pub(crate) fn mapped(&self) -> Vec<(u64, u64)> {
        self.mapped.lock().unwrap().iter().map(|(&start, &bytes)| (start, bytes)).collect()
    }

    pub(crate) fn refuse_map(&self, refuse: bool) {
        self.refuse_map.store(refuse, Ordering::Relaxed);
    }

    pub(crate) fn refuse_more_than(&self, bytes: u64) {
        self.longest.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_numa_node(&self, node: Option<u32>) {
        *self.numa_node.lock().unwrap() = node;
    }

    pub(crate) fn refuse_unmap(&self, refuse: bool) {
        self.refuse_unmap.store(refuse, Ordering::Relaxed);
    }

    /// How many register accesses were requests.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    fn memory(&self, region: u32) -> &Mutex<Vec<u8>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if region == 0 { &self.registers } else { &self.config }
    }
}

fn refused() -> Error {
    let source = io::Error::from_raw_os_error(libc::ENOMEM);
    Error::Kernel { attempt: "a test", device: "fake".into(), source, advice: String::new() }
}

impl Backend for FakeBackend {
    fn region(&self, index: u32) -> Region {
        match index {
            0 => self.bar.clone(),
            CONFIG_REGION => Region { size: self.config.lock().unwrap().len() as u64, areas: Vec::new() },
            _ => Region::default(),
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        data.copy_from_slice(&self.memory(region).lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.memory(region).lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn interrupt_vectors(&self) -> u32 {
        0
    }

    fn enable_interrupts(&self, _: &[&EventFd]) -> Result<(), Error> {
        Ok(())
    }

    fn disable_interrupts(&self) -> Result<(), Error> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        Ok(())
    }

    fn notices(&self) -> &Notices {
        &self.notices
    }

    fn server(&self) -> ServerIdentity {
        ServerIdentity::Kernel
    }

    fn numa_node(&self) -> Option<u32> {
        *self.numa_node.lock().unwrap()
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { start: 0, last: u64::from(u32::MAX) }]
    }

    fn iova_alignment(&self) -> u64 {
        self.alignment
    }

    fn pins_memory(&self) -> bool {
        true
    }

    unsafe fn dma_map(&self, iova: u64, _: &File, _: u64, _: *mut u8, bytes: usize) -> Result<(), Error> {
        if self.refuse_map.load(Ordering::Relaxed) || bytes as u64 > self.longest.load(Ordering::Relaxed) {
            return Err(refused());
        }
        let bytes = bytes as u64;
        let mut mapped = self.mapped.lock().unwrap();
        assert!((iova | bytes).is_multiple_of(self.alignment), "{iova:#x}, {bytes:#x} bytes: pages of the IOMMU");
        assert!(iova + bytes <= 1 << 32, "inside the range");
        let overlaps = mapped.iter().any(|(&start, &other)| iova < start + other && start < iova + bytes);
        assert!(!overlaps, "{iova:#x} overlaps what is mapped");
        mapped.insert(iova, bytes);
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, bytes: usize) -> Result<(), Error> {
        if self.refuse_unmap.load(Ordering::Relaxed) {
            return Err(refused());
        }
        assert_eq!(self.mapped.lock().unwrap().remove(&iova), Some(bytes as u64));
        Ok(())
    }
}
