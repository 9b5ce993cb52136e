//! A host for tests, written from the specification and not from our driver: no unsafe code, memory and doorbells are
//! read and written through their files.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nvme_sim::{Config, NamespaceConfig, Simulator};
use vfio_user::Client;

/// Every wait of a test ends here.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Where the host's memory begins for DMA.
pub(crate) const MEMORY: u64 = 0x1_0000_0000;
pub(crate) const MEMORY_BYTES: u64 = 256 << 20;
const DOORBELLS: u64 = 0x1000;

/// A controller on a socket in a directory of its own.
pub(crate) struct Controller {
    pub simulator: Simulator,
    pub directory: tempfile::TempDir,
}

pub(crate) fn start(config: Config) -> Controller {
    let _ = env_logger::builder().is_test(true).try_init();
    let directory = tempfile::tempdir().unwrap();
    let simulator = Simulator::start(config, &directory.path().join("nvme.sock")).unwrap();
    Controller { simulator, directory }
}

/// A controller with two namespaces of 64 MiB, brought up, with one queue pair.
pub(crate) fn with_two_namespaces(config: Config) -> (Controller, Host) {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let controller = start(Config { namespaces: vec![namespace.clone(), namespace], ..config });
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 64, None);
    (controller, host)
}

impl Controller {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Waits until `ready` gives something.
pub(crate) fn await_some<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "timed out: {what}");
        std::thread::yield_now();
    }
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sqe(pub [u32; 16]);

impl Sqe {
    pub(crate) fn new(opcode: u8, namespace: u32) -> Sqe {
        let mut entry = Sqe::default();
        entry.0[0] = opcode.into();
        entry.0[1] = namespace;
        entry
    }

    pub(crate) fn dword(mut self, n: usize, value: u32) -> Sqe {
        self.0[n] = value;
        self
    }

    pub(crate) fn prp(mut self, prp1: u64, prp2: u64) -> Sqe {
        (self.0[6], self.0[7]) = (prp1 as u32, (prp1 >> 32) as u32);
        (self.0[8], self.0[9]) = (prp2 as u32, (prp2 >> 32) as u32);
        self
    }

    /// An SGL descriptor in the command.
    pub(crate) fn sgl(mut self, descriptor: [u8; 16]) -> Sqe {
        self.0[0] |= 1 << 14;
        for n in 0..4 {
            self.0[6 + n] = u32::from_le_bytes(descriptor[4 * n..][..4].try_into().unwrap());
        }
        self
    }

    /// SLBA and NLB (1's based here).
    pub(crate) fn blocks(mut self, lba: u64, blocks: u32) -> Sqe {
        (self.0[10], self.0[11]) = (lba as u32, (lba >> 32) as u32);
        self.0[12] = self.0[12] & 0xffff_0000 | (blocks - 1);
        self
    }
}

/// An SGL descriptor: kind 0 data block, 1 bit bucket, 2 segment, 3 last segment.
pub(crate) fn descriptor(kind: u8, address: u64, bytes: u32) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&bytes.to_le_bytes());
    raw[15] = kind << 4;
    raw
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cqe {
    pub result: u32,
    pub sq_head: u16,
    pub sq: u16,
    pub id: u16,
    /// Status code type and code: `sct << 8 | sc`.
    pub status: u16,
    pub do_not_retry: bool,
}

#[derive(Clone, Debug)]
struct Queue {
    sq: u64,
    cq: u64,
    entries: u16,
    cq_entries: u16,
    tail: u16,
    head: u16,
    phase: bool,
}

pub(crate) struct Host {
    pub client: Client,
    pub memory: File,
    next: u64,
    /// Memory from here on is given out again after [`Host::rewind`].
    mark: u64,
    doorbells: Option<File>,
    /// Ring by message even though the doorbells can be mapped.
    pub by_message: bool,
    stride: u64,
    queues: Vec<Option<Queue>>,
    next_id: u16,
    /// The shadow doorbell buffer.
    pub shadow: Option<u64>,
}

impl Host {
    /// Connects and maps memory for DMA.
    pub(crate) fn connect(socket: &Path) -> Host {
        let mut client = Client::new(socket).unwrap();
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        memory.set_len(MEMORY_BYTES).unwrap();
        client.dma_map(0, MEMORY, MEMORY_BYTES, memory.as_raw_fd()).unwrap();
        let doorbells = client.region(0).unwrap().file_offset.as_ref().map(|f| f.file().try_clone().unwrap());
        let mut host = Host {
            client,
            memory,
            next: MEMORY,
            mark: MEMORY,
            doorbells,
            by_message: false,
            stride: 4,
            queues: vec![],
            next_id: 1,
            shadow: None,
        };
        host.stride = 4 << (host.read64(0) >> 32 & 15);
        host.config_write(4, &[6, 0]);
        host
    }

    /// Connects and brings the controller up.
    pub(crate) fn bring_up(socket: &Path) -> Host {
        let mut host = Host::connect(socket);
        host.enable();
        host
    }

    pub(crate) fn read32(&mut self, offset: u64) -> u32 {
        let mut raw = [0; 4];
        self.client.region_read(0, offset, &mut raw).unwrap();
        u32::from_le_bytes(raw)
    }

    pub(crate) fn read64(&mut self, offset: u64) -> u64 {
        let mut raw = [0; 8];
        self.client.region_read(0, offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    }

    pub(crate) fn write32(&mut self, offset: u64, value: u32) {
        self.client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn write64(&mut self, offset: u64, value: u64) {
        self.client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn config_read(&mut self, offset: u64, bytes: &mut [u8]) {
        self.client.region_read(7, offset, bytes).unwrap();
    }

    pub(crate) fn config_write(&mut self, offset: u64, bytes: &[u8]) {
        self.client.region_write(7, offset, bytes).unwrap();
    }

    /// Page-aligned memory, zero when first given out; its DMA address.
    pub(crate) fn allocate(&mut self, bytes: u64) -> u64 {
        let at = self.next;
        self.next += bytes.next_multiple_of(4096);
        assert!(self.next <= MEMORY + MEMORY_BYTES, "out of test memory");
        at
    }

    /// What is allocated next begins at a multiple of `bytes`.
    pub(crate) fn align(&mut self, bytes: u64) {
        self.next = self.next.next_multiple_of(bytes);
    }

    /// Gives back all memory but that of queues.
    pub(crate) fn rewind(&mut self) {
        self.next = self.mark;
    }

    pub(crate) fn put(&self, iova: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, iova - MEMORY).unwrap();
    }

    pub(crate) fn get(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, iova - MEMORY).unwrap();
        bytes
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.read32(0x1c)
    }

    pub(crate) fn await_status(&mut self, mask: u32, value: u32) {
        await_some("CSTS", || (self.status() & mask == value).then_some(()));
    }

    /// Admin queues of 32 entries and CC.EN; waits until the controller is ready.
    pub(crate) fn enable(&mut self) {
        self.prepare(32);
        self.write32(0x14, 4 << 20 | 6 << 16 | 1);
        self.await_status(1, 1);
    }

    /// Admin queues of `entries`, not yet enabled.
    pub(crate) fn prepare(&mut self, entries: u16) {
        let (sq, cq) = (self.allocate(u64::from(entries) * 64), self.allocate(u64::from(entries) * 16));
        let size = u32::from(entries) - 1;
        self.write32(0x24, size << 16 | size);
        self.write64(0x28, sq);
        self.write64(0x30, cq);
        self.queues = vec![Some(Queue { sq, cq, entries, cq_entries: entries, tail: 0, head: 0, phase: true })];
        self.shadow = None;
    }

    /// Puts the admin queues elsewhere, before they are enabled.
    pub(crate) fn relocate_admin(&mut self, sq: u64, cq: u64) {
        self.write64(0x28, sq);
        self.write64(0x30, cq);
        let queue = self.queue(0);
        (queue.sq, queue.cq) = (sq, cq);
    }

    pub(crate) fn disable(&mut self) {
        self.write32(0x14, 0);
        self.await_status(1, 0);
    }

    fn doorbell(&mut self, queue: u16, completion: bool, value: u32) {
        let at = (u64::from(queue) * 2 + u64::from(completion)) * self.stride;
        if let (Some(shadow), 1..) = (self.shadow, queue) {
            self.put(shadow + at, &value.to_le_bytes());
        } else {
            self.ring(DOORBELLS + at, value);
        }
    }

    /// Writes a doorbell, by its offset in BAR0.
    pub(crate) fn ring(&mut self, offset: u64, value: u32) {
        match &self.doorbells {
            Some(file) if !self.by_message => file.write_all_at(&value.to_le_bytes(), offset).unwrap(),
            _ => self.write32(offset, value),
        }
    }

    fn queue(&mut self, id: u16) -> &mut Queue {
        self.queues[usize::from(id)].as_mut().expect("the queue exists")
    }

    /// Writes an entry; the doorbell waits for [`Host::flush`].
    pub(crate) fn push(&mut self, queue: u16, mut entry: Sqe) -> u16 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        entry.0[0] |= u32::from(id) << 16;
        self.push_raw(queue, entry);
        id
    }

    /// Writes an entry that has its identifier.
    pub(crate) fn push_raw(&mut self, queue: u16, entry: Sqe) {
        let q = self.queue(queue);
        let at = q.sq + u64::from(q.tail) * 64;
        q.tail = (q.tail + 1) % q.entries;
        let raw: Vec<u8> = entry.0.iter().flat_map(|dword| dword.to_le_bytes()).collect();
        self.put(at, &raw);
    }

    pub(crate) fn flush(&mut self, queue: u16) {
        let tail = self.queue(queue).tail;
        self.doorbell(queue, false, tail.into());
    }

    pub(crate) fn submit(&mut self, queue: u16, entry: Sqe) -> u16 {
        let id = self.push(queue, entry);
        self.flush(queue);
        id
    }

    /// The next completion, if it is there; does not tell the controller.
    fn peek(&mut self, queue: u16) -> Option<Cqe> {
        let q = self.queue(queue).clone();
        let raw = self.get(q.cq + u64::from(q.head) * 16, 16);
        let dword = |n: usize| u32::from_le_bytes(raw[4 * n..][..4].try_into().unwrap());
        if (dword(3) >> 16 & 1 == 1) != q.phase {
            return None;
        }
        Some(Cqe {
            result: dword(0),
            sq_head: dword(2) as u16,
            sq: (dword(2) >> 16) as u16,
            id: dword(3) as u16,
            status: (dword(3) >> 17 & 0x7ff) as u16,
            do_not_retry: dword(3) >> 31 != 0,
        })
    }

    pub(crate) fn poll(&mut self, queue: u16) -> Option<Cqe> {
        let completion = self.peek(queue)?;
        let q = self.queue(queue);
        q.head += 1;
        if q.head == q.cq_entries {
            q.head = 0;
            q.phase = !q.phase;
        }
        let head = q.head;
        self.doorbell(queue, true, head.into());
        Some(completion)
    }

    pub(crate) fn wait(&mut self, queue: u16) -> Cqe {
        await_some("a completion", || self.poll(queue))
    }

    /// No completion comes for a while.
    pub(crate) fn expect_silence(&mut self, queue: u16) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            assert_eq!(self.poll(queue), None);
            std::thread::yield_now();
        }
    }

    /// One command, start to end.
    pub(crate) fn command(&mut self, queue: u16, entry: Sqe) -> Cqe {
        let id = self.submit(queue, entry);
        let completion = self.wait(queue);
        assert_eq!((completion.id, completion.sq), (id, queue));
        completion
    }

    pub(crate) fn admin(&mut self, entry: Sqe) -> Cqe {
        self.command(0, entry)
    }

    pub(crate) fn identify(&mut self, selector: u32, namespace: u32) -> Result<Vec<u8>, u16> {
        let page = self.allocate(4096);
        match self.admin(Sqe::new(0x06, namespace).prp(page, 0).dword(10, selector)).status {
            0 => Ok(self.get(page, 4096)),
            status => Err(status),
        }
    }

    pub(crate) fn set_feature(&mut self, id: u32, value: u32) -> Cqe {
        self.admin(Sqe::new(0x09, 0).dword(10, id).dword(11, value))
    }

    pub(crate) fn get_feature(&mut self, id: u32, value: u32) -> Cqe {
        self.admin(Sqe::new(0x0a, 0).dword(10, id).dword(11, value))
    }

    pub(crate) fn log_page(&mut self, id: u32, bytes: u32) -> Vec<u8> {
        let page = self.allocate(bytes.into());
        let entry = Sqe::new(0x02, 0xffff_ffff).prp(page, page + 4096).dword(10, (bytes / 4 - 1) << 16 | id);
        assert_eq!(self.admin(entry).status, 0);
        self.get(page, bytes as usize)
    }

    pub(crate) fn create_cq_entry(id: u16, entries: u16, base: u64, flags: u32) -> Sqe {
        let size = u32::from(entries - 1) << 16;
        Sqe::new(0x05, 0).prp(base, 0).dword(10, size | u32::from(id)).dword(11, flags)
    }

    pub(crate) fn create_sq_entry(id: u16, entries: u16, base: u64, cq: u16) -> Sqe {
        let size = u32::from(entries - 1) << 16;
        Sqe::new(0x01, 0).prp(base, 0).dword(10, size | u32::from(id)).dword(11, u32::from(cq) << 16 | 1)
    }

    /// An I/O queue pair; interrupts on `vector`, if given.
    pub(crate) fn create_pair(&mut self, id: u16, entries: u16, vector: Option<u16>) {
        let (sq, cq) = (self.allocate(u64::from(entries) * 64), self.allocate(u64::from(entries) * 16));
        let flags = 1 | vector.map_or(0, |vector| u32::from(vector) << 16 | 2);
        assert_eq!(self.admin(Host::create_cq_entry(id, entries, cq, flags)).status, 0);
        assert_eq!(self.admin(Host::create_sq_entry(id, entries, sq, id)).status, 0);
        self.queues.resize(self.queues.len().max(usize::from(id) + 1), None);
        self.queues[usize::from(id)] =
            Some(Queue { sq, cq, entries, cq_entries: entries, tail: 0, head: 0, phase: true });
        self.mark = self.next;
    }

    /// A pair that the test has created itself.
    pub(crate) fn adopt(&mut self, id: u16, sq: u64, entries: u16, cq: u64, cq_entries: u16) {
        self.queues.resize(self.queues.len().max(usize::from(id) + 1), None);
        self.queues[usize::from(id)] = Some(Queue { sq, cq, entries, cq_entries, tail: 0, head: 0, phase: true });
    }

    pub(crate) fn delete_pair(&mut self, id: u16) {
        assert_eq!(self.admin(Sqe::new(0x00, 0).dword(10, id.into())).status, 0);
        assert_eq!(self.admin(Sqe::new(0x04, 0).dword(10, id.into())).status, 0);
        self.queues[usize::from(id)] = None;
    }

    /// PRP1 and PRP2 for a buffer that begins on a page and is contiguous.
    pub(crate) fn prps(&mut self, buffer: u64, bytes: u64) -> (u64, u64) {
        let pages = bytes.div_ceil(4096);
        if pages <= 2 {
            return (buffer, if pages == 2 { buffer + 4096 } else { 0 });
        }
        let list = self.allocate(pages * 8);
        let entries: Vec<u8> = (1..pages).flat_map(|n| (buffer + n * 4096).to_le_bytes()).collect();
        assert!(entries.len() <= 4096, "one list page");
        self.put(list, &entries);
        (buffer, list)
    }

    /// A read or write of whole blocks, with a fresh buffer each.
    pub(crate) fn write_blocks(&mut self, queue: u16, lba: u64, shift: u32, data: &[u8]) -> u16 {
        let buffer = self.allocate(data.len() as u64);
        self.put(buffer, data);
        let (prp1, prp2) = self.prps(buffer, data.len() as u64);
        let entry = Sqe::new(0x01, 1).prp(prp1, prp2).blocks(lba, (data.len() >> shift) as u32);
        self.command(queue, entry).status
    }

    pub(crate) fn read_blocks(&mut self, queue: u16, lba: u64, shift: u32, len: usize) -> Result<Vec<u8>, u16> {
        let buffer = self.allocate(len as u64);
        self.put(buffer, &vec![0xee; len]);
        let (prp1, prp2) = self.prps(buffer, len as u64);
        match self.command(queue, Sqe::new(0x02, 1).prp(prp1, prp2).blocks(lba, (len >> shift) as u32)).status {
            0 => Ok(self.get(buffer, len)),
            status => Err(status),
        }
    }
}

/// Bytes that differ everywhere.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|n| ((n + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}
