//! A front-end written by hand: it sends any message in any order, also wrong ones, and drives a split ring.
#![allow(dead_code)] // each test program uses a part of it

pub(crate) mod raw;
pub(crate) mod served;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const RESET_OWNER: u32 = 4;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SEND_RARP: u32 = 19;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;

pub(crate) const VERSION: u32 = 1;
pub(crate) const NEED_REPLY: u32 = 8;

pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_RING_PACKED: u64 = 1 << 34;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_CONFIG_WCE: u64 = 1 << 11;

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// One connection.
pub(crate) struct Front {
    pub stream: UnixStream,
}

impl Front {
    pub(crate) fn connect(path: &Path) -> Front {
        Front::on(UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub(crate) fn on(stream: UnixStream) -> Front {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Front { stream }
    }

    /// Sends a message and waits for nothing.
    pub(crate) fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        let mut message = Vec::new();
        for word in [request, VERSION | flags, body.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(body);
        let sent = self.stream.send_with_fds(&[&message[..]], fds).unwrap();
        assert_eq!(sent, message.len());
    }

    /// The body of the reply to `request`; `None` when the connection has ended.
    pub(crate) fn reply(&self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        match (&self.stream).read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("no reply to request {request}: {error}"),
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, VERSION | 4), "reply to {request}");
        let mut body = vec![0; word(8) as usize];
        (&self.stream).read_exact(&mut body).unwrap();
        Some(body)
    }

    /// A request with a reply of its own.
    pub(crate) fn ask(&self, request: u32, body: &[u8]) -> Option<Vec<u8>> {
        self.send(request, 0, body, &[]);
        self.reply(request)
    }

    /// A request whose reply brings a file.
    pub(crate) fn ask_file(&self, request: u32, body: &[u8]) -> (Vec<u8>, File) {
        self.send(request, 0, body, &[]);
        let mut message = vec![0; 12 + body.len()];
        let (bytes, file) = self.stream.recv_with_fd(&mut message).unwrap();
        assert_eq!(bytes, message.len());
        assert_eq!(message[..4], request.to_ne_bytes());
        (message.split_off(12), file.expect("a descriptor comes with the reply"))
    }

    pub(crate) fn ask_u64(&self, request: u32) -> u64 {
        number(&self.ask(request, &[]).expect("connection ended"))
    }

    /// A request that wants to be acknowledged: 0 is success.
    pub(crate) fn acknowledged(&self, request: u32, body: &[u8], fds: &[RawFd]) -> u64 {
        self.send(request, NEED_REPLY, body, fds);
        number(&self.reply(request).unwrap_or_else(|| panic!("request {request} ended the connection")))
    }

    #[track_caller]
    pub(crate) fn accept(&self, request: u32, body: &[u8], fds: &[RawFd]) {
        assert_eq!(self.acknowledged(request, body, fds), 0, "request {request} is refused");
    }

    #[track_caller]
    pub(crate) fn refuse(&self, request: u32, body: &[u8], fds: &[RawFd]) {
        assert_ne!(self.acknowledged(request, body, fds), 0, "request {request} is accepted");
        // The connection is still in step.
        assert_ne!(self.ask_u64(GET_FEATURES), 0);
    }

    /// Owner, features and protocol features, as QEMU sends them. All that is offered is accepted but what [`Ring`] is not.
    pub(crate) fn negotiate(&self) -> u64 {
        self.negotiate_without(F_EVENT_IDX | F_RING_PACKED)
    }

    /// Owner, features and protocol features, as QEMU sends them. All features that are offered are accepted but these.
    pub(crate) fn negotiate_without(&self, unwanted: u64) -> u64 {
        let features = self.ask_u64(GET_FEATURES) & !unwanted;
        let protocol = self.ask_u64(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, 0, &protocol.to_ne_bytes(), &[]);
        self.accept(SET_OWNER, &[], &[]);
        self.accept(SET_FEATURES, &features.to_ne_bytes(), &[]);
        features
    }

    pub(crate) fn set_ring(&self, request: u32, index: u32, value: u32) {
        self.accept(request, &state(index, value), &[]);
    }

    pub(crate) fn vring_base(&self, index: u32) -> u32 {
        let reply = self.ask(GET_VRING_BASE, &state(index, 0)).expect("GET_VRING_BASE ended the connection");
        assert_eq!(u32::from_ne_bytes(reply[..4].try_into().unwrap()), index);
        u32::from_ne_bytes(reply[4..8].try_into().unwrap())
    }

    pub(crate) fn config(&self, offset: u32, bytes: u32) -> Vec<u8> {
        self.ask(GET_CONFIG, &config(offset, &vec![0; bytes as usize])).expect("connection ended").split_off(12)
    }

    /// Waits until the other side has closed the connection.
    pub(crate) fn wait_for_end(&self) {
        let mut rest = Vec::new();
        let result = (&self.stream).read_to_end(&mut rest);
        let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(result.as_ref().err().is_none_or(reset), "{result:?}");
    }

    /// Sends bytes as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).unwrap();
    }
}

pub(crate) fn number(body: &[u8]) -> u64 {
    u64::from_ne_bytes(body.try_into().expect("8 bytes"))
}

pub(crate) fn state(index: u32, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&index.to_ne_bytes());
    body[4..].copy_from_slice(&value.to_ne_bytes());
    body
}

/// `VhostUserInflight`.
pub(crate) fn inflight(bytes: u64, queues: u16, size: u16) -> Vec<u8> {
    [&bytes.to_ne_bytes()[..], &[0; 8], &queues.to_ne_bytes(), &size.to_ne_bytes(), &[0; 4]].concat()
}

pub(crate) fn config(offset: u32, data: &[u8]) -> Vec<u8> {
    let words = [offset, data.len() as u32, 0];
    words.iter().flat_map(|word| word.to_ne_bytes()).chain(data.iter().copied()).collect()
}

/// Front-end addresses are guest addresses plus this.
pub(crate) const USER: u64 = 0x7000_0000_0000;

/// A region of guest memory.
pub(crate) struct Region {
    pub guest: u64,
    pub bytes: u64,
    pub file: File,
    pub memory: GuestMemoryMmap,
}

impl Region {
    pub(crate) fn new(guest: u64, bytes: u64) -> Region {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let range = (GuestAddress(guest), bytes as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        Region { guest, bytes, file, memory }
    }

    /// The body of ADD_MEM_REG and REM_MEM_REG.
    pub(crate) fn single(&self) -> Vec<u8> {
        [0, self.guest, self.bytes, self.guest + USER, 0].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect()
    }

    pub(crate) fn add(&self, front: &Front) {
        front.accept(ADD_MEM_REG, &self.single(), &[self.file.as_raw_fd()]);
    }
}

/// The body of SET_MEM_TABLE and its descriptors.
pub(crate) fn table(regions: &[&Region]) -> (Vec<u8>, Vec<RawFd>) {
    let mut body = Vec::new();
    body.extend((regions.len() as u32).to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    regions.iter().for_each(|region| body.extend(&region.single()[8..]));
    (body, regions.iter().map(|region| region.file.as_raw_fd()).collect())
}

/// A split ring in a region, from the guest's side (virtio 1.2, 2.7). Requests have three descriptors.
pub(crate) struct Ring<'a> {
    pub index: u32,
    pub size: u16,
    pub kick: EventFd,
    pub call: EventFd,
    memory: &'a GuestMemoryMmap,
    guest: u64,
    pub next: u16,
    seen: u16,
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
pub(crate) const T_FLUSH: u32 = 4;

impl<'a> Ring<'a> {
    /// A ring that takes 64 KiB at `guest`, its buffers included.
    pub(crate) fn new(region: &'a Region, index: u32, guest: u64) -> Ring<'a> {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let ring =
            Ring { index, size: 64, kick: event(), call: event(), memory: &region.memory, guest, next: 0, seen: 0 };
        ring.memory.write_slice(&[0; 0x3000], GuestAddress(guest)).unwrap();
        ring
    }

    /// The first ring of a front-end that has no other memory: started.
    pub(crate) fn first(front: &Front, region: &'a Region) -> Ring<'a> {
        region.add(front);
        let ring = Ring::new(region, 0, 0x10000);
        ring.start(front);
        ring
    }

    fn descriptors(&self) -> u64 {
        self.guest
    }

    fn available(&self) -> u64 {
        self.guest + 0x1000
    }

    fn used(&self) -> u64 {
        self.guest + 0x2000
    }

    fn header(&self) -> u64 {
        self.guest + 0x3000
    }

    fn status(&self) -> u64 {
        self.guest + 0x3800
    }

    /// Where a request's data lies unless it is told otherwise.
    pub(crate) fn data(&self) -> u64 {
        self.guest + 0x4000
    }

    pub(crate) fn addresses(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.index.to_ne_bytes());
        body.extend(0u32.to_ne_bytes());
        for address in [self.descriptors() + USER, self.used() + USER, self.available() + USER, 0] {
            body.extend(address.to_ne_bytes());
        }
        body
    }

    /// The messages that start it, in QEMU's order.
    pub(crate) fn start(&self, front: &Front) {
        self.enable(front, true);
        front.set_ring(SET_VRING_NUM, self.index, self.size.into());
        front.set_ring(SET_VRING_BASE, self.index, self.next.into());
        front.accept(SET_VRING_ADDR, &self.addresses(), &[]);
        self.set_event(front, SET_VRING_KICK, Some(&self.kick));
        self.set_event(front, SET_VRING_CALL, Some(&self.call));
    }

    pub(crate) fn enable(&self, front: &Front, enable: bool) {
        front.set_ring(SET_VRING_ENABLE, self.index, enable.into());
    }

    pub(crate) fn set_event(&self, front: &Front, request: u32, event: Option<&EventFd>) {
        match event {
            Some(event) => front.accept(request, &u64::from(self.index).to_ne_bytes(), &[event.as_raw_fd()]),
            None => front.accept(request, &(u64::from(self.index) | 0x100).to_ne_bytes(), &[]),
        }
    }

    /// Puts one request on the ring; `data` is an address and a length.
    pub(crate) fn submit(&mut self, kind: u32, sector: u64, data: (u64, u32)) {
        let memory = self.memory;
        let write = |value: u64, at: u64| memory.write_slice(&value.to_le_bytes(), GuestAddress(at)).unwrap();
        memory.write_slice(&kind.to_le_bytes(), GuestAddress(self.header())).unwrap();
        memory.write_slice(&[0; 4], GuestAddress(self.header() + 4)).unwrap();
        write(sector, self.header() + 8);
        memory.write_slice(&[0xff], GuestAddress(self.status())).unwrap();
        const NEXT: u64 = 1;
        const WRITE: u64 = 2;
        let data_flags = NEXT | if kind == T_IN { WRITE } else { 0 };
        let mut chain = vec![(self.header(), 16, NEXT)];
        if data.1 != 0 {
            chain.push((data.0, data.1, data_flags));
        }
        chain.push((self.status(), 1, WRITE));
        for (at, (address, bytes, flags)) in chain.iter().enumerate() {
            let descriptor = self.descriptors() + at as u64 * 16;
            write(*address, descriptor);
            write(u64::from(*bytes) | flags << 32 | (at as u64 + 1) << 48, descriptor + 8);
        }
        let slot = self.available() + 4 + u64::from(self.next % self.size) * 2;
        memory.write_slice(&0u16.to_le_bytes(), GuestAddress(slot)).unwrap();
        self.next = self.next.wrapping_add(1);
        memory.store(self.next.to_le(), GuestAddress(self.available() + 2), Ordering::Release).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Claims more requests than the ring has places for, which breaks it (virtio 1.2, 2.7.13.3).
    pub(crate) fn break_it(&self) {
        let claim = self.next.wrapping_add(self.size + 1);
        self.memory.store(claim.to_le(), GuestAddress(self.available() + 2), Ordering::Release).unwrap();
        self.kick.write(1).unwrap();
    }

    /// The status of the request under way, or `None` while there is none.
    pub(crate) fn poll(&mut self) -> Option<u8> {
        let used: u16 = self.memory.load(GuestAddress(self.used() + 2), Ordering::Acquire).unwrap();
        if u16::from_le(used) == self.seen {
            return None;
        }
        self.seen = self.seen.wrapping_add(1);
        let mut status = [0];
        self.memory.read_slice(&mut status, GuestAddress(self.status())).unwrap();
        Some(status[0])
    }

    #[track_caller]
    pub(crate) fn wait(&mut self) -> u8 {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.poll() {
                return status;
            }
            assert!(Instant::now() < deadline, "ring {}: no answer", self.index);
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: (u64, u32)) -> u8 {
        self.submit(kind, sector, data);
        self.wait()
    }

    /// Writes a block and reads it back elsewhere.
    #[track_caller]
    pub(crate) fn check_io(&mut self, sector: u64) {
        let (from, to) = (self.data(), self.data() + 0x1000);
        self.check_io_at(sector, from, to);
    }

    #[track_caller]
    pub(crate) fn check_io_at(&mut self, sector: u64, from: u64, to: u64) {
        // Differs from sector to sector and from call to call.
        let pattern: Vec<u8> = (0..4096u64).map(|at| (at / 8 + sector * 31 + u64::from(self.next) * 7) as u8).collect();
        self.memory.write_slice(&pattern, GuestAddress(from)).unwrap();
        assert_eq!(self.request(T_OUT, sector, (from, 4096)), 0, "write");
        assert_eq!(self.request(T_IN, sector, (to, 4096)), 0, "read");
        let mut read = vec![0; 4096];
        self.memory.read_slice(&mut read, GuestAddress(to)).unwrap();
        assert!(read == pattern, "sector {sector} does not hold what was written");
    }

    #[track_caller]
    pub(crate) fn flush(&mut self) -> u8 {
        self.request(T_FLUSH, 0, (0, 0))
    }

    pub(crate) fn write_one(&mut self, sector: u64) -> u8 {
        let data = self.data();
        self.request(T_OUT, sector, (data, 4096))
    }

    pub(crate) fn read_one(&mut self, sector: u64) -> u8 {
        let data = self.data();
        self.request(T_IN, sector, (data, 4096))
    }

    /// Writes a block made of one byte.
    #[track_caller]
    pub(crate) fn store(&mut self, sector: u64, byte: u8) {
        self.memory.write_slice(&[byte; 4096], GuestAddress(self.data())).unwrap();
        assert_eq!(self.write_one(sector), 0, "write");
    }

    /// Is this block made of this byte?
    #[track_caller]
    pub(crate) fn holds(&mut self, sector: u64, byte: u8) -> bool {
        self.memory.write_slice(&[!byte; 4096], GuestAddress(self.data())).unwrap();
        assert_eq!(self.read_one(sector), 0, "read");
        let mut read = [0; 4096];
        self.memory.read_slice(&mut read, GuestAddress(self.data())).unwrap();
        read == [byte; 4096]
    }

    /// How far the guest has got, which is where the ring has to stop.
    pub(crate) fn position(&self) -> u32 {
        self.next.into()
    }

    /// Stops it and checks where it stopped.
    #[track_caller]
    pub(crate) fn stop(&self, front: &Front) {
        assert_eq!(front.vring_base(self.index), self.position(), "ring {}", self.index);
    }
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
