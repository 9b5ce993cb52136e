//! A drive that means ill: an NVMe controller on a vfio-user socket that does as an input says.
//!
//! Left alone it comes up and answers admin commands properly. Its registers, the structures it sends and its answers can all
//! be changed; what it answers on I/O queues is left to [`crate::completions`].

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const BAR_BYTES: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;

/// Offsets of registers (NVMe Base 2.0, 3.1.3).
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

/// A structure that commands ask for: Identify by CNS, log pages by their identifier.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Page {
    Identify(u8),
    Log(u8),
}

/// A queue as the host has described it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Queue {
    pub address: u64,
    pub entries: u16,
    /// Where this side goes on.
    pub at: u16,
    /// The phase of the entries this side writes.
    pub phase: bool,
}

/// A command on an I/O queue, or an event request.
#[derive(Clone, Copy)]
pub(crate) struct Fetched {
    pub queue: u16,
    pub id: u16,
}

/// Everything about it.
#[derive(Default)]
pub(crate) struct State {
    pub registers: Vec<u8>,
    config: Vec<u8>,
    dma: Vec<(u64, u64, u64, File)>,
    pub submission: HashMap<u16, Queue>,
    pub completion: HashMap<u16, Queue>,
    pub pages: HashMap<Page, Vec<u8>>,
    /// What Get and Set Features answer, by feature.
    pub features: HashMap<u8, u32>,
    /// How the next admin commands are answered; properly when it is empty.
    pub manners: VecDeque<u8>,
    pub fetched: Vec<Fetched>,
    pub events: Vec<u16>,
}

impl State {
    /// A controller that is in order, with one namespace of 1 MiB.
    fn new() -> State {
        let mut state = State { registers: vec![0; BAR_BYTES as usize], config: vec![0; 4096], ..State::default() };
        // CAP: queues of 64 entries, contiguous, 500 ms, the NVM command set. VS: 2.0.
        state.set(0x00, &(63u64 | 1 << 16 | 1 << 24 | 1 << 37).to_le_bytes());
        state.set(0x08, &0x0002_0000u32.to_le_bytes());
        state.config[0x08..0x0c].copy_from_slice(&[0, 2, 8, 1]);
        let mut page = |page, fields: &[(usize, &[u8])]| {
            let mut bytes = vec![0; 4096];
            fields.iter().for_each(|(at, field)| bytes[*at..at + field.len()].copy_from_slice(field));
            state.pages.insert(page, bytes);
        };
        // SN, MN, MDTS, VER, OAES, AERL, LPA, ELPE, SQES, CQES, NN, ONCS, VWC, SGLS.
        page(
            Page::Identify(1),
            &[
                (4, b"SERIAL              "),
                (24, &[b'M'; 40]),
                (77, &[5]),
                (80, &[0, 0, 2, 0]),
                (92, &[0, 3]),
                (259, &[3, 0, 4, 7]),
                (512, &[0x66, 0x44]),
                (516, &[4]),
                (520, &[0x9f]),
                (525, &[1]),
                (536, &[1]),
            ],
        );
        // NSZE, NCAP, FLBAS, LBAF0: blocks of 512 bytes.
        page(Page::Identify(0), &[(0, &[0, 8]), (8, &[0, 8]), (130, &[9])]);
        page(Page::Identify(2), &[(0, &[1]), (4, &[3])]);
        // An EUI64, and the end of the list.
        page(Page::Identify(3), &[(0, &[1, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8])]);
        page(Page::Identify(6), &[(0, &[3, 3, 0, 16])]);
        page(Page::Log(1), &[(0, &[1]), (8, &[1])]);
        page(Page::Log(2), &[(0, &[4, 0x2c, 1, 100, 10])]);
        page(Page::Log(4), &[(0, &[1])]);
        state.features.insert(7, 0x0001_0001);
        state.features.insert(6, 1);
        state
    }

    pub(crate) fn set(&mut self, at: u64, bytes: &[u8]) {
        let room = self.registers.len().saturating_sub(at as usize);
        let bytes = &bytes[..bytes.len().min(room)];
        if !bytes.is_empty() {
            self.registers[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        }
    }

    pub(crate) fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|n| self.registers[at as usize + n]))
    }

    fn u32(&self, at: u64) -> u32 {
        self.u64(at) as u32
    }

    /// The file and the place in it of `bytes` bytes that the host has mapped for DMA.
    fn reach(&self, address: u64, bytes: u64) -> Option<(&File, u64)> {
        self.dma.iter().find_map(|(start, size, offset, file)| {
            let at = address.checked_sub(*start)?;
            (at.checked_add(bytes)? <= *size).then_some((file, offset + at))
        })
    }

    /// What is mapped can be written; a drive's writes elsewhere go nowhere.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        if let Some((file, at)) = self.reach(address, bytes.len() as u64) {
            file.write_all_at(bytes, at).expect("the host's memory is long enough");
        }
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some((file, at)) = self.reach(address, N as u64) {
            file.read_exact_at(&mut bytes, at).expect("the host's memory is long enough");
        }
        bytes
    }

    /// Writes the next completion of a queue.
    pub(crate) fn complete(&mut self, queue: u16, result: u32, submission: u16, id: u16, status: u16) {
        let Some(mut answers) = self.completion.get(&queue).copied() else { return };
        let phase = u32::from(status) << 1 | u32::from(answers.phase);
        let words = [result, 0, u32::from(submission) << 16, u32::from(id) | phase << 16];
        let entry: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write(answers.address.wrapping_add(16 * u64::from(answers.at)), &entry);
        answers.at += 1;
        if answers.at >= answers.entries {
            (answers.at, answers.phase) = (0, !answers.phase);
        }
        self.completion.insert(queue, answers);
    }

    fn written(&mut self, at: u64, bytes: &[u8]) {
        if at >= DOORBELLS {
            let stride = 4u64 << (self.u64(0) >> 32 & 0xf);
            let number = (at - DOORBELLS) / stride;
            if number.is_multiple_of(2) && bytes.len() >= 4 {
                self.rung((number / 2) as u16, u16::from_le_bytes([bytes[0], bytes[1]]));
            }
            return;
        }
        // CAP, VS and CSTS are not for the host to write.
        if at < 0x0c || at == CSTS {
            return;
        }
        self.set(at, bytes);
        if at == CC {
            let cc = self.u32(CC);
            let shut_down = if cc >> 14 & 3 != 0 { 2 << 2 } else { 0 };
            self.set(CSTS, &(cc & 1 | shut_down).to_le_bytes());
            if cc & 1 == 0 {
                (self.submission, self.completion) = (HashMap::new(), HashMap::new());
                self.fetched.clear();
                self.events.clear();
            } else if self.submission.is_empty() {
                let sizes = self.u32(0x24);
                let queue = |address, entries: u32| {
                    let entries = (entries & 0xfff) as u16 + 1;
                    Queue { address, entries, at: 0, phase: true }
                };
                self.submission.insert(0, queue(self.u64(ASQ), sizes));
                self.completion.insert(0, queue(self.u64(ACQ), sizes >> 16));
            }
        }
    }

    /// Fetches commands up to `tail`.
    fn rung(&mut self, number: u16, tail: u16) {
        while let Some(mut queue) = self.submission.get(&number).copied() {
            if queue.at == tail || tail >= queue.entries {
                return;
            }
            let command: [u8; 64] = self.read(queue.address.wrapping_add(64 * u64::from(queue.at)));
            queue.at = (queue.at + 1) % queue.entries;
            self.submission.insert(number, queue);
            let id = u16::from_le_bytes([command[2], command[3]]);
            match number {
                0 => self.answer(id, &command),
                _ => self.fetched.push(Fetched { queue: number, id }),
            }
        }
    }

    /// Answers an admin command, in whatever manner.
    fn answer(&mut self, id: u16, command: &[u8; 64]) {
        let mut status = 0;
        let manner = self.manners.pop_front().unwrap_or(0);
        match manner {
            0..128 => {}
            128..176 => status = u16::from(self.manners.pop_front().unwrap_or(0)) | u16::from(manner & 7) << 8,
            // No answer.
            176..180 => return,
            180..200 => self.complete(0, 0, 0, id ^ 1 << (manner & 15), 0),
            200..220 => self.complete(0, 0, u16::from(manner), id, 0),
            _ => self.complete(0, u32::MAX, 0, id, 0),
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| command[at + n]));
        let data = u64::from(word(24)) | u64::from(word(28)) << 32;
        let (cdw10, queue) = (word(40), word(40) as u16);
        let mut result = 0;
        match command[0] {
            0x06 => self.send(Page::Identify(cdw10 as u8), data, 4096),
            0x02 => self.send(Page::Log(cdw10 as u8), data, 4 * ((cdw10 >> 16) as usize + 1)),
            0x09 | 0x0a => result = self.features.get(&(cdw10 as u8)).copied().unwrap_or(0),
            0x0c => return self.events.push(id),
            0x05 => _ = self.completion.insert(queue, create(cdw10, data)),
            0x01 => _ = self.submission.insert(queue, create(cdw10, data)),
            0x04 => _ = self.completion.remove(&queue),
            0x00 => _ = self.submission.remove(&queue),
            _ => {}
        }
        self.complete(0, result, 0, id, status);
    }

    /// The host's buffers are in one piece.
    fn send(&self, page: Page, to: u64, bytes: usize) {
        if let Some(page) = self.pages.get(&page) {
            self.write(to, &page[..bytes.min(page.len())]);
        }
    }
}

fn create(cdw10: u32, address: u64) -> Queue {
    Queue { address, entries: ((cdw10 >> 16) as u16).saturating_add(1), at: 0, phase: true }
}

/// The drive of this process, behind a socket that lives as long.
pub(crate) struct Drive {
    pub address: vfio::Address,
    state: Arc<Mutex<State>>,
    _folder: tempfile::TempDir,
}

impl Drive {
    pub(crate) fn start() -> Drive {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let socket: PathBuf = folder.path().join("drive");
        let listener = listen(&socket);
        let state = Arc::new(Mutex::new(State::new()));
        let mut backend = Connected(state.clone());
        std::thread::spawn(move || {
            loop {
                let listener = listener.try_clone().expect("a descriptor to spare");
                let server = Server::from_owned_fd(OwnedFd::from(listener), true, irqs(), regions());
                // A host that leaves in the middle of a message is no matter.
                let _ = server.run(&mut backend);
                // Its memory is not ours any more.
                lock(&backend.0).dma.clear();
            }
        });
        Drive { address: vfio::Address::VfioUser(socket), state, _folder: folder }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes the drive what it was at first. Its last host may not have left yet: what that one has mapped stays.
    pub(crate) fn renew(&self) {
        let mut state = self.state();
        let dma = std::mem::take(&mut state.dma);
        *state = State { dma, ..State::new() };
    }
}

fn listen(socket: &Path) -> UnixListener {
    UnixListener::bind(socket).expect("a socket in a folder of our own")
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn irqs() -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS).map(|index| IrqInfo { index, flags: 0, count: 0 }).collect()
}

fn regions() -> Vec<ServerRegion> {
    let region = |index| {
        let size = match index {
            BAR0 => BAR_BYTES,
            CONFIG => 4096,
            _ => 0,
        };
        let flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
        let argsz = size_of::<vfio_region_info>() as u32;
        let region_info = vfio_region_info { argsz, flags, index, cap_offset: 0, size, offset: 0 };
        ServerRegion { region_info, sparse_areas: vec![], mmap_fd: None }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

struct Connected(Arc<Mutex<State>>);

impl ServerBackend for Connected {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let state = lock(&self.0);
        let bytes = if region == CONFIG { &state.config } else { &state.registers };
        data.fill(0);
        if let Some(bytes) = bytes.get(offset as usize..) {
            let count = data.len().min(bytes.len());
            data[..count].copy_from_slice(&bytes[..count]);
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.0);
        match region {
            BAR0 => state.written(offset, data),
            // The command register is all there is to write.
            CONFIG if offset == 4 && data.len() >= 2 => state.config[4..6].copy_from_slice(&data[..2]),
            _ => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        lock(&self.0).dma.extend(file.map(|file| (address, size, offset, file)));
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, _size: u64) -> io::Result<()> {
        lock(&self.0).dma.retain(|mapping| mapping.0 != address);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        lock(&self.0).written(CC, &[0; 4]);
        Ok(())
    }

    fn set_irqs(&mut self, _index: u32, _flags: u32, _start: u32, _count: u32, _fds: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}
