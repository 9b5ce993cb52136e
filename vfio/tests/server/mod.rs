//! Servers for the tests. The one here has one BAR: registers by message, one page of doorbells at 0x1000 in shared
//! memory.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod raw;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vfio::{Address, Device, Error, OpenOptions, SharedMemory};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

pub(crate) const BAR_BYTES: u64 = 0x3000;
pub(crate) const VECTORS: u32 = 4;
/// Offset of the MSI-X capability; another one comes before it.
pub(crate) const MSIX: u16 = 0x60;

/// What the server does apart from serving.
#[derive(Clone)]
pub(crate) struct Behaviour {
    /// The mappable areas of BAR 0 (offset, bytes).
    pub areas: Vec<(u64, u64)>,
    /// Reads of this register of BAR 0 are answered with an error.
    pub refuse_read_of: Option<u64>,
    /// Reads of this register of BAR 0 are never answered.
    pub stuck_at: Option<u64>,
    /// A DMA map beyond so many is refused.
    pub most_dma: usize,
    /// What else is answered with an error.
    pub refuse: Refuse,
    /// The length of the file behind BAR 0.
    pub file_bytes: u64,
    /// The configuration space.
    pub config: Vec<u8>,
}

/// What a server answers with an error.
#[derive(Clone, Copy, Default)]
pub(crate) struct Refuse {
    /// Writes of this register of BAR 0.
    pub write_of: Option<u64>,
    pub unmap: bool,
    pub reset: bool,
}

impl Default for Behaviour {
    fn default() -> Behaviour {
        let mut config = vec![0; 256];
        config[0..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, MSIX as u8]);
        config[MSIX as usize..][..2].copy_from_slice(&[0x11, 0]);
        Behaviour {
            areas: vec![(0x1000, 0x1000)],
            refuse_read_of: None,
            stuck_at: None,
            most_dma: usize::MAX,
            refuse: Refuse::default(),
            file_bytes: BAR_BYTES,
            config,
        }
    }
}

#[derive(Default)]
struct State {
    registers: Vec<u8>,
    config: Vec<u8>,
    messages: usize,
    resets: usize,
    refused_unmaps: usize,
    hang_up: bool,
    dma: BTreeMap<u64, (u64, u64, File)>,
    interrupts: BTreeMap<u32, File>,
}

struct Backend {
    behaviour: Behaviour,
    state: Arc<Mutex<State>>,
}

impl Backend {
    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock().unwrap();
        if state.hang_up {
            drop(state);
            // Ends the server's thread, and with it the connection, without a message on the terminal.
            std::panic::resume_unwind(Box::new(()));
        }
        state
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == 0 && self.behaviour.refuse_read_of == Some(offset) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if region == 0 && self.behaviour.stuck_at == Some(offset) {
            loop {
                std::thread::park();
            }
        }
        let mut state = self.state();
        state.messages += 1;
        let from = if region == 0 { &state.registers } else { &state.config };
        data.copy_from_slice(&from[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == 0 && self.behaviour.refuse.write_of == Some(offset) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut state = self.state();
        state.messages += 1;
        let to = if region == 0 { &mut state.registers } else { &mut state.config };
        to[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(&mut self, _: DmaMapFlags, offset: u64, address: u64, size: u64, fd: Option<File>) -> io::Result<()> {
        if self.state().dma.len() >= self.behaviour.most_dma {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let file = fd.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        self.state().dma.insert(address, (size, offset, file));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let mut state = self.state();
        let removed = if self.behaviour.refuse.unmap { None } else { state.dma.remove(&address) };
        if removed.is_none_or(|(bytes, ..)| bytes != size) {
            state.refused_unmaps += 1;
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        if self.behaviour.refuse.reset {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut state = self.state();
        state.resets += 1;
        state.config[4] = 0;
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        assert_eq!(index, 2, "only MSI-X is used");
        assert!(start + count <= VECTORS);
        let mut state = self.state();
        if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 {
            assert_eq!(fds.len(), count as usize);
            state.interrupts.extend((start..).zip(fds));
        } else if count == 0 {
            state.interrupts.clear();
        }
        Ok(())
    }
}

pub(crate) struct TestServer {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    memory: Arc<SharedMemory>,
    state: Arc<Mutex<State>>,
}

impl TestServer {
    pub(crate) fn start(behaviour: Behaviour) -> TestServer {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("device.sock");
        // The file holds the whole BAR: the offset in the file is the offset in the region.
        let memory = Arc::new(SharedMemory::create(behaviour.file_bytes as usize).unwrap());
        let state = Arc::new(Mutex::new(State {
            registers: vec![0; BAR_BYTES as usize],
            config: behaviour.config.clone(),
            ..State::default()
        }));
        let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: if index == 2 { VECTORS } else { 0 } });
        let regions = (0..9).map(|index| {
            let size = match index {
                0 => BAR_BYTES,
                7 => behaviour.config.len() as u64,
                _ => 0,
            };
            let mut flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
            let areas: &[(u64, u64)] = if index == 0 { &behaviour.areas } else { &[] };
            if !areas.is_empty() {
                flags |= VFIO_REGION_INFO_FLAG_MMAP;
            }
            ServerRegion {
                region_info: vfio_region_info {
                    argsz: size_of::<vfio_region_info>() as u32,
                    flags,
                    index,
                    size,
                    ..Default::default()
                },
                sparse_areas: areas
                    .iter()
                    .map(|&(offset, size)| SparseArea { area: vfio_region_sparse_mmap_area { offset, size } })
                    .collect(),
                mmap_fd: (!areas.is_empty()).then(|| memory.file().as_raw_fd()),
            }
        });
        let server = Server::new(&socket, true, irqs.collect(), regions.collect()).unwrap();
        let mut backend = Backend { behaviour, state: state.clone() };
        let keep = memory.clone();
        std::thread::spawn(move || {
            let _keep = keep;
            // An error is the end of the connection, which tests bring about.
            let _ = server.run(&mut backend);
        });
        TestServer { _directory: directory, socket, memory, state }
    }

    /// Opens the device; requests may take `timeout`.
    pub(crate) fn open_within(&self, timeout: Duration) -> Result<Device, Error> {
        let options = OpenOptions { request_timeout: timeout };
        Device::open_with(&Address::VfioUser(self.socket.clone()), &options)
    }

    /// Opens the device; requests may take so long that only a server that is stuck takes longer.
    pub(crate) fn open(&self) -> Device {
        self.open_within(Duration::from_secs(20)).unwrap()
    }

    /// What the server sees of the register at `offset`, if that is mapped.
    pub(crate) fn mapped_register(&self, offset: usize) -> u32 {
        self.memory.slice::<AtomicU32>(offset, 1).unwrap()[0].load(Ordering::Acquire)
    }

    /// Ends the connection at the next message, without an answer.
    pub(crate) fn hang_up(&self) {
        self.state.lock().unwrap().hang_up = true;
    }

    pub(crate) fn resets(&self) -> usize {
        self.state.lock().unwrap().resets
    }

    pub(crate) fn refused_unmaps(&self) -> usize {
        self.state.lock().unwrap().refused_unmaps
    }

    pub(crate) fn messages(&self) -> usize {
        self.state.lock().unwrap().messages
    }

    pub(crate) fn register(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.state.lock().unwrap().registers[offset..][..4].try_into().unwrap())
    }

    /// Reads 8 bytes as the device would.
    pub(crate) fn read_dma(&self, iova: u64) -> u64 {
        let state = self.state.lock().unwrap();
        let (start, (bytes, offset, file)) = state.dma.range(..=iova).next_back().expect("nothing is mapped there");
        assert!(iova + 8 <= start + bytes, "{iova:#x} is not mapped");
        let mut data = [0; 8];
        file.read_exact_at(&mut data, offset + (iova - start)).unwrap();
        u64::from_ne_bytes(data)
    }

    pub(crate) fn has_dma(&self, iova: u64) -> bool {
        self.state.lock().unwrap().dma.contains_key(&iova)
    }

    /// The vectors that have an eventfd.
    pub(crate) fn vectors(&self) -> Vec<u32> {
        self.state.lock().unwrap().interrupts.keys().copied().collect()
    }

    pub(crate) fn interrupt(&self, vector: u32) {
        use std::io::Write;
        let state = self.state.lock().unwrap();
        let mut event = state.interrupts.get(&vector).expect("the vector is enabled");
        event.write_all(&1u64.to_ne_bytes()).unwrap();
    }
}
