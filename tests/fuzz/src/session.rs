//! A front-end that sends anything: messages in any order, cut short, with lies in them, and with file descriptors of any kind.
//!
//! All messages are in the socket before the session begins, and the socket ends behind them. Rings that start run on a worker
//! thread, against a small drive in this process. While all of that goes on a thread of the front-end's changes what it shares:
//! the log of what is in flight, the length of the memory's files, flags and counters of eventfds. Checked besides: the session
//! ends, and no descriptor stays open.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nvme_driver::Options;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};
use vhost_blk::control::config::{ExportSettings, Listen};
use vhost_blk::datapath::worker::WorkerPool;
use vhost_blk::drive::{Drive, Supervisor};
use vhost_blk::event::EventFd;
use vhost_blk::vhost_user::export::Export;
use vhost_blk::vhost_user::session::Session;
use vhost_blk::vhost_user::session::connection::{Disconnect, Wakers, serve};
use vhost_blk::virtio::memory::{Budget, Limits};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::input::Input;
use crate::memory::Region;

/// Messages of one session: what the socket surely takes, and whose replies it does.
const MOST_MESSAGES: usize = 60;
/// Bytes sent that are no message of ours: headers of 12 bytes, each with a reply, may be among them.
const MOST_RAW: usize = 512;

/// How long requests would wait for the drive, which never goes.
const HOLD: Duration = Duration::from_secs(1);

const GUEST_BYTES: u64 = 0x1_0000;
const SMALL_BYTES: u64 = 0x2000;
/// Front-end addresses are guest addresses plus this.
const USER: u64 = 0x7000_0000_0000;
/// What each of three rings takes, with a request.
const RING_BYTES: u64 = 0x4000;
const RINGS: u32 = 3;
const RING_SIZE: u16 = 16;
/// Where the guest's memory is once more, if it is added as several regions.
const ALIAS: u64 = 0x20_0000;
/// Kinds of descriptors, see [`FrontEnd::descriptor`].
const EVENT: usize = 2;
const FULL: usize = 7;
/// Deeds of one session.
const MOST_DEEDS: usize = 60;

/// Requests (vhost-user, "Front-end message types").
mod request {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const GET_CONFIG: u32 = 24;
    pub(super) const SET_CONFIG: u32 = 25;
    pub(super) const GET_INFLIGHT_FD: u32 = 31;
    pub(super) const SET_INFLIGHT_FD: u32 = 32;
    pub(super) const RESET_DEVICE: u32 = 34;
    pub(super) const ADD_MEM_REG: u32 = 37;
    pub(super) const REM_MEM_REG: u32 = 38;
}
use request::*;

const F_RING_PACKED: u64 = 1 << 34;
const PROTOCOL_FEATURES: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
const VERSION: u8 = 1;
const NEED_REPLY: u8 = 8;

/// The disk that is served, for the life of the process.
struct Served {
    export: Arc<Export>,
    /// Nobody rings it.
    stop: EventFd,
}

fn served() -> &'static Served {
    static SERVED: OnceLock<Served> = OnceLock::new();
    SERVED.get_or_init(|| {
        let settings = ExportSettings {
            device: "sim:1M,write-cache=on".parse().expect("a proper address"),
            listen: Listen::Path("fuzz".into()),
            namespace: None,
            queues: RINGS as u16,
            queue_size: 256,
            queue_pairs: None,
            read_only: false,
            serial: None,
        };
        let pool = Arc::new(WorkerPool::start(&[]).expect("a worker starts"));
        let drive = Drive::open(&settings.device, &Options::default(), HOLD, pool).expect("the drive is there");
        let drive = Arc::new(drive);
        // What rings have left is given back by its threads, as long as the process lives.
        std::mem::forget(Supervisor::start(drive.clone()).expect("threads start"));
        let export = Export::new(&settings, drive, &Budget::new(Limits::default(), 1), 0).expect("the disk is there");
        Served { export: Arc::new(export), stop: EventFd::new().expect("an eventfd can be made") }
    })
}

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let served = served();
    let before = descriptors();
    talk(served, data);
    // A worker may still be about to drop what it was given.
    let deadline = Instant::now() + Duration::from_secs(2);
    while descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors were open before, {} are now", before, descriptors());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// File descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs is there").count()
}

fn talk(served: &Served, data: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    // The messages should all fit; what does not is not sent.
    ours.set_nonblocking(true).expect("a socket can be changed");
    let mut front_end = FrontEnd::new(&ours, served.export.features);
    let mut input = Input::new(data);
    while !input.is_empty() && front_end.messages < MOST_MESSAGES {
        front_end.step(&mut input);
    }
    let (deeds, shared) = (std::mem::take(&mut front_end.deeds), Shared::of(&front_end));
    drop(front_end);
    ours.shutdown(Shutdown::Write).expect("a socket can be shut down");
    let changed = served.export.on_change().expect("an eventfd can be made");
    let session = Arc::new(Mutex::new(Session::new(served.export.clone())));
    let turn = served.export.front_ends.join().expect("an eventfd can be made");
    let wakers = Wakers { stop: &served.stop, changed: &changed, turn: &turn, log: &served.export.log };
    let end = std::thread::scope(|scope| {
        // Beside the session, from here on.
        if !deeds.is_empty() {
            scope.spawn(move || deeds.iter().for_each(|deed| shared.act(deed)));
        }
        serve(theirs, session, &wakers, "fuzz", |_| {})
    });
    assert!(!matches!(end, Disconnect::Stopped), "nobody has asked it to stop");
}

/// What a front-end does beside its messages to what it shares.
enum Deed {
    /// Writes into the log that it has handed over, or into the guest's memory.
    Write {
        log: bool,
        at: u64,
        bytes: [u8; 8],
        count: usize,
    },
    /// Makes the file of the log, or of the guest's memory, so long.
    SetLen {
        log: bool,
        bytes: u64,
    },
    /// Of an eventfd: its counter is empty, 1, or full, and whoever uses it may have to wait.
    Event {
        full: bool,
        count: u64,
        blocks: bool,
    },
    Pause(Duration),
}

/// What deeds are done to: one more descriptor of each thing.
struct Shared {
    guest: File,
    log: File,
    event: OwnedFd,
    full: OwnedFd,
}

impl Shared {
    fn of(front_end: &FrontEnd) -> Shared {
        let file = |region: &Region| region.file.try_clone().expect("a descriptor to spare");
        let other = |kind: usize| front_end.others[kind - 2].try_clone().expect("a descriptor to spare");
        Shared { guest: file(&front_end.guest), log: file(&front_end.small), event: other(EVENT), full: other(FULL) }
    }

    fn act(&self, deed: &Deed) {
        let file = |log: bool| if log { &self.log } else { &self.guest };
        match deed {
            Deed::Write { log, at, bytes, count } => {
                file(*log).write_all_at(&bytes[..*count], *at).expect("a memory file takes bytes");
            }
            Deed::SetLen { log, bytes } => file(*log).set_len(*bytes).expect("a memory file takes any length"),
            Deed::Event { full, count, blocks } => {
                let event = if *full { &self.full } else { &self.event };
                let set = |flags| fcntl_setfl(event, flags).expect("flags of an eventfd can be changed");
                // Nobody else makes it one that waits: this thread does not.
                set(OFlags::NONBLOCK);
                let _ = rustix::io::read(event, &mut [0; 8]);
                let _ = rustix::io::write(event, &count.to_ne_bytes());
                if *blocks {
                    set(OFlags::empty());
                }
            }
            Deed::Pause(time) => std::thread::sleep(*time),
        }
    }
}

struct FrontEnd<'a> {
    socket: &'a UnixStream,
    messages: usize,
    raw: usize,
    features: u64,
    packed: bool,
    flags: u8,
    /// Bytes that the next message lacks at its end.
    short_by: usize,
    guest: Region,
    small: Region,
    /// A descriptor of each kind, after these two: an eventfd, what is of no use, and an eventfd whose counter is full.
    others: Vec<OwnedFd>,
    deeds: Vec<Deed>,
    _peer: UnixStream,
}

impl<'a> FrontEnd<'a> {
    fn new(socket: &'a UnixStream, features: u64) -> FrontEnd<'a> {
        let (useless, peer) = UnixStream::pair().expect("a pair of sockets");
        let open = |path| OwnedFd::from(File::open(path).expect("it is there"));
        let event = eventfd(1, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
        let (pipe, _) = std::io::pipe().expect("a pipe can be made");
        let full = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("an empty counter has room");
        let others = vec![event, useless.into(), pipe.into(), open("/dev/null"), open("/"), full];
        FrontEnd {
            socket,
            messages: 0,
            raw: 0,
            features,
            packed: false,
            // What is refused without an answer ends the session, and nothing more would be tried.
            flags: NEED_REPLY,
            short_by: 0,
            guest: Region::new(0, GUEST_BYTES),
            small: Region::new(0x10_0000, SMALL_BYTES),
            others,
            deeds: Vec::new(),
            _peer: peer,
        }
    }

    fn descriptor(&self, kind: u8) -> RawFd {
        match kind % 8 {
            0 => self.guest.file.as_raw_fd(),
            1 => self.small.file.as_raw_fd(),
            other => self.others[usize::from(other) - 2].as_fd().as_raw_fd(),
        }
    }

    fn send(&mut self, request: u32, body: &[u8], kinds: &[u8]) {
        self.send_with(request, self.flags | VERSION, body.len() as u32, body, kinds);
    }

    fn send_with(&mut self, request: u32, flags: u8, size: u32, body: &[u8], kinds: &[u8]) {
        let words = [request, flags.into(), size];
        let mut message: Vec<u8> =
            words.iter().flat_map(|word| word.to_ne_bytes()).chain(body.iter().copied()).collect();
        message.truncate(message.len().saturating_sub(std::mem::take(&mut self.short_by)).max(1));
        let descriptors: Vec<RawFd> = kinds.iter().map(|kind| self.descriptor(*kind)).collect();
        // A full socket takes no more: so it ends here.
        let _ = self.socket.send_with_fds(&[&message[..]], &descriptors);
        self.messages += 1;
    }

    fn step(&mut self, input: &mut Input) {
        match input.u8() % 24 {
            0 => {
                let (request, flags) = (input.u8() % 48, input.u8());
                let descriptors = input.u8();
                let body = input.bytes(usize::from(descriptors >> 2));
                let size = (body.len() as u64).wrapping_add(input.one_of(&[0, 0, 0, 1, u64::MAX, 4096]));
                let kinds: Vec<u8> = (0..descriptors & 3).map(|_| input.u8()).collect();
                self.send_with(request.into(), flags, size as u32, body, &kinds);
            }
            1 => {
                let count = usize::from(input.u8()).min(MOST_RAW - self.raw);
                self.raw += count;
                let _ = std::io::Write::write(&mut &*self.socket, input.bytes(count));
                self.messages += 1;
            }
            2 => {
                let wanted =
                    self.features & !input.one_of(&[F_RING_PACKED, 0, 1 << 29 | F_RING_PACKED, 1 << 30, 1 << 28]);
                self.packed = wanted & F_RING_PACKED != 0;
                self.send(GET_FEATURES, &[], &[]);
                self.send(SET_FEATURES, &wanted.to_ne_bytes(), &[]);
            }
            3 => {
                let features = input.one_of(&[PROTOCOL_FEATURES, 0, u64::MAX]);
                self.send(SET_PROTOCOL_FEATURES, &features.to_ne_bytes(), &[]);
            }
            4 => self.flags = if input.u8() & 1 == 0 { 0 } else { NEED_REPLY },
            5 => self.memory(input),
            6 | 7 => self.ring_words(input),
            8 => {
                let (index, kind, which) = (u64::from(input.u8()), input.u8(), u32::from(input.u8() % 3));
                // Bit 8: no descriptor comes.
                let none = if kind & 128 != 0 { 1 << 8 } else { 0 };
                let kinds = [kind & 127];
                let kinds = if none == 0 { &kinds[..] } else { &[] };
                self.send(SET_VRING_KICK + which, &((index % 4) | none).to_ne_bytes(), kinds);
            }
            9 => {
                let index = u32::from(input.u8() % 4);
                self.send(GET_VRING_BASE, &pair(index, 0), &[]);
            }
            10 => self.config(input),
            11 => self.inflight(input),
            12 | 13 => self.offer(input),
            14 => {
                let at = u64::from(input.u16());
                let count = usize::from(input.u8() % 64);
                self.guest.write(at, input.bytes(count));
            }
            15 => self.short_by = usize::from(input.u8() % 24),
            16 => self.send(input.u8().into(), &[], &[]),
            17 => self.send(RESET_DEVICE, &[], &[]),
            20 | 21 => self.deed(input),
            22 => self.alias(input),
            23 => {
                // One eventfd for all that all rings are told, and tell.
                let kind = [EVENT, FULL][usize::from(input.u8() & 1)] as u8;
                for index in 0..u64::from(RINGS) {
                    (0..2).for_each(|which| self.send(SET_VRING_KICK + which, &index.to_ne_bytes(), &[kind]));
                }
            }
            _ => self.start(input),
        }
    }

    fn deed(&mut self, input: &mut Input) {
        let how = input.u8();
        let log = how & 8 != 0;
        let deed = match how & 7 {
            0..3 => {
                let most = if log { SMALL_BYTES } else { GUEST_BYTES };
                // Around the beginnings of logs, and of rings.
                let base = input.one_of(&[0, 8, 16, 32, 48, 0x1000, 0x1002, 0x2000]);
                let at = base.wrapping_add(input.u8().into()) % (most - 8);
                Deed::Write { log, at, bytes: input.u64().to_le_bytes(), count: 1 + usize::from(how >> 4 & 7) }
            }
            3 => {
                let bytes = input.one_of(&[0, 0x1000, 0x2000, 64, 0x8000, 0x1_0000]);
                Deed::SetLen { log, bytes: bytes.min(if log { SMALL_BYTES } else { GUEST_BYTES }) }
            }
            4 | 5 => Deed::Event {
                full: log,
                count: input.one_of(&[1, 0, u64::MAX - 1]).min(u64::MAX - 1),
                blocks: how & 16 != 0,
            },
            _ => Deed::Pause(Duration::from_micros(u64::from(input.u8()) * 4)),
        };
        if self.deeds.len() < MOST_DEEDS {
            self.deeds.push(deed);
        }
    }

    /// The file of the guest's memory once more, at another address, and a ring that is there.
    fn alias(&mut self, input: &mut Input) {
        let (offset, index) = (input.one_of(&[0, 0x1000, 0x4000]), u32::from(input.u8()) % RINGS);
        let bytes = GUEST_BYTES.saturating_sub(offset);
        let region = [0, ALIAS, bytes, ALIAS.wrapping_add(USER), offset].map(u64::to_ne_bytes).concat();
        self.send(ADD_MEM_REG, &region, &[0]);
        // The same ring in other words; or two rings in the same memory.
        let at = if input.u8() & 1 == 0 { index } else { 0 };
        let addresses =
            ring(at).map(|address| if address == 0 { 0 } else { address.wrapping_add(ALIAS).wrapping_sub(offset) });
        self.addresses(index, addresses);
    }

    fn memory(&mut self, input: &mut Input) {
        let how = input.u8();
        let regions = [&self.guest, &self.small].map(|region| {
            let guest = if how & 8 != 0 { input.one_of(&[0, 0x1000, 0x2_0000, 0x800]) } else { region.guest };
            let bytes = if how & 16 != 0 { input.one_of(&[0x1000, 0, 0x800, 1 << 40]) } else { region.bytes };
            let offset = if how & 32 != 0 { input.one_of(&[0x1000, 1, 1 << 63]) } else { 0 };
            [guest, bytes, guest.wrapping_add(USER), offset].map(u64::to_ne_bytes).concat()
        });
        let kind = if how & 64 != 0 { input.u8() } else { 0 };
        match how & 7 {
            0..3 => self.send(ADD_MEM_REG, &[&[0; 8], &regions[0][..]].concat(), &[kind]),
            3 => self.send(ADD_MEM_REG, &[&[0; 8], &regions[1][..]].concat(), &[kind ^ 1]),
            4 => self.send(REM_MEM_REG, &[&[0; 8], &regions[0][..]].concat(), &[]),
            5 => self.send(REM_MEM_REG, &[&[0; 8], &regions[1][..]].concat(), &[0]),
            6 => self.send(SET_MEM_TABLE, &[&pair(1, 0)[..], &regions[0]].concat(), &[kind]),
            _ => self.send(SET_MEM_TABLE, &[&pair(2, 0)[..], &regions[0], &regions[1]].concat(), &[kind, 1]),
        }
    }

    fn ring_words(&mut self, input: &mut Input) {
        let (index, which) = (u32::from(input.u8() % 4), input.u8());
        match which % 4 {
            0 => self.send(SET_VRING_NUM, &pair(index, input.one_of(&[16, 256, 3, 0]) as u32), &[]),
            1 => self.send(SET_VRING_BASE, &pair(index, input.one_of(&[0, 0x8000_8000, 1]) as u32), &[]),
            2 => self.send(SET_VRING_ENABLE, &pair(index, input.one_of(&[1, 0]) as u32), &[]),
            _ => {
                let mut addresses = ring(index);
                if which & 64 != 0 {
                    addresses[usize::from(which >> 4) & 3] = input.one_of(&[USER, USER + 0xfff8, 0]);
                }
                self.addresses(index, addresses);
            }
        }
    }

    fn addresses(&mut self, index: u32, [descriptors, device, driver, log]: [u64; 4]) {
        let addresses = [descriptors, device, driver, log].map(u64::to_ne_bytes).concat();
        self.send(SET_VRING_ADDR, &[&pair(index, 0)[..], &addresses].concat(), &[]);
    }

    /// All that starts a ring.
    fn start(&mut self, input: &mut Input) {
        let index = u32::from(input.u8()) % RINGS;
        let base = if self.packed { 0x8000_8000 } else { 0 };
        self.send(SET_VRING_NUM, &pair(index, RING_SIZE.into()), &[]);
        self.send(SET_VRING_BASE, &pair(index, base), &[]);
        self.addresses(index, ring(index));
        for which in 0..2 {
            self.send(SET_VRING_KICK + which, &u64::from(index).to_ne_bytes(), &[2]);
        }
        self.send(SET_VRING_ENABLE, &pair(index, 1), &[]);
    }

    fn config(&mut self, input: &mut Input) {
        let offset = input.one_of(&[0, 32, 60, 255]) as u32;
        let bytes = input.one_of(&[60, 1, 0, 256]) as u32;
        let contents = vec![input.u8(); bytes.min(300) as usize];
        let head = [offset, bytes, u32::from(input.u8() & 1)].map(u32::to_ne_bytes).concat();
        let request = if input.u8() & 1 == 0 { GET_CONFIG } else { SET_CONFIG };
        self.send(request, &[head, contents].concat(), &[]);
    }

    fn inflight(&mut self, input: &mut Input) {
        let how = input.u8();
        let (bytes, offset) = (input.one_of(&[0x1000, SMALL_BYTES, 0, 1]), input.one_of(&[0, 64, 0x1000, 3]));
        let (queues, size) = (input.one_of(&[1, 3, 0, 1024]) as u16, input.one_of(&[16, 256, 0]) as u16);
        let body =
            [&bytes.to_ne_bytes()[..], &offset.to_ne_bytes(), &queues.to_ne_bytes(), &size.to_ne_bytes(), &[0; 4]]
                .concat();
        match how & 3 {
            0 => self.send(GET_INFLIGHT_FD, &body, &[]),
            1 => self.send(SET_INFLIGHT_FD, &body, &[how >> 2]),
            _ => {
                // A log that a process has written: version, size, and what the input says.
                let mut words = [0; 64];
                words[8] = 1;
                words[10] = RING_SIZE as u8;
                words[12..].copy_from_slice(&{
                    let mut rest = [0; 52];
                    let bytes = input.bytes(52);
                    rest[..bytes.len()].copy_from_slice(bytes);
                    rest
                });
                self.small.write(self.small.guest, &words);
                self.send(SET_INFLIGHT_FD, &body, &[1]);
            }
        }
    }

    /// The guest puts a request into the first places of a ring.
    fn offer(&mut self, input: &mut Input) {
        let (index, kind) = (u64::from(input.u8()) % u64::from(RINGS), input.u8());
        let (data, bytes) = (input.one_of(&[0x3400, 0xf000, 0xfff0]), input.one_of(&[512, 4096, 513]) as u32);
        let start = index * RING_BYTES;
        let mut header = [0; 16];
        header[0] = [0, 1, 4, 8, 11, 13, 2][usize::from(kind % 7)];
        header[8..].copy_from_slice(&input.one_of(&[0, 8, 2047, 1 << 60]).to_le_bytes());
        self.guest.write(start + 0x3000, &header);
        let write = if header[0] == 0 || header[0] == 8 { 2 } else { 0 };
        let pieces = [(start + 0x3000, 16, 1u16), (start.wrapping_add(data), bytes, 1 | write), (start + 0x3100, 1, 2)];
        for (at, (address, bytes, flags)) in (0u16..).zip(pieces) {
            let (low, high) = if self.packed { (0, flags | 1 << 7) } else { (flags, at + 1) };
            let word = u64::from(bytes) | u64::from(low) << 32 | u64::from(high) << 48;
            self.guest.write(start + 16 * u64::from(at), &[address.to_le_bytes(), word.to_le_bytes()].concat());
        }
        if !self.packed {
            let count = u16::from(kind >> 6);
            self.guest.write(start + 0x1002, &count.to_le_bytes());
        }
    }
}

/// Where a ring lies, in front-end addresses: descriptors, used ring, available ring, log.
fn ring(index: u32) -> [u64; 4] {
    let start = USER + u64::from(index) * RING_BYTES;
    [start, start + 0x2000, start + 0x1000, 0]
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&first.to_ne_bytes());
    body[4..].copy_from_slice(&second.to_ne_bytes());
    body
}
