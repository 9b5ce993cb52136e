//! What the hostile speaks through: a connection, memory, rings. Nothing here insists on anything.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::USER;
use crate::ring::{INDIRECT, NEXT, WRITE};

/// An answer that takes longer is not waited for.
const ANSWER: Duration = Duration::from_millis(300);
/// Flags of a packed descriptor that say where it stands (virtio 1.2, 2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// A connection.
pub(super) struct Line {
    pub stream: UnixStream,
}

impl Line {
    pub(super) fn connect(socket: &Path) -> io::Result<Line> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Line { stream })
    }

    /// Sends a header and a body that may have nothing to do with each other.
    pub(super) fn send(&self, request: u32, flags: u32, size: u32, body: &[u8], files: &[RawFd]) -> io::Result<()> {
        let mut message: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(body);
        self.stream.send_with_fds(&[&message[..]], files).map(drop).map_err(io::Error::from)
    }

    /// The body of the reply to `request`; replies to others before it are passed over.
    fn reply(&self, request: u32) -> io::Result<(Vec<u8>, Option<File>)> {
        loop {
            let mut header = [0; 12];
            let (bytes, file) = self.stream.recv_with_fd(&mut header).map_err(io::Error::from)?;
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (&self.stream).read_exact(&mut header[bytes..])?;
            let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let mut body = vec![0; word(8).min(4096) as usize];
            (&self.stream).read_exact(&mut body)?;
            if word(0) == request {
                return Ok((body, file));
            }
        }
    }

    pub(super) fn ask(&self, request: u32, body: &[u8]) -> io::Result<(Vec<u8>, Option<File>)> {
        self.send(request, VERSION, body.len() as u32, body, &[])?;
        self.reply(request)
    }

    pub(super) fn ask_u64(&self, request: u32) -> io::Result<u64> {
        let (body, _) = self.ask(request, &[])?;
        body.try_into().map(u64::from_ne_bytes).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Whether the other side agrees.
    pub(super) fn tell(&self, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<bool> {
        self.send(request, VERSION | NEED_REPLY, body.len() as u32, body, files)?;
        Ok(self.reply(request)?.0.iter().all(|byte| *byte == 0))
    }

    pub(super) fn raw(&self, bytes: &[u8]) {
        let _ = (&self.stream).write(bytes);
    }

    /// Takes what has come, so that the other side is not held up.
    pub(super) fn drain(&self) {
        let _ = self.stream.set_nonblocking(true);
        while matches!((&self.stream).read(&mut [0; 4096]), Ok(bytes) if bytes > 0) {}
        let _ = self.stream.set_nonblocking(false);
    }
}

/// The memory of its guest. It is reached through the file, so that it may be made shorter.
pub(super) struct HostileMemory {
    pub file: File,
    pub guest: u64,
    pub bytes: u64,
}

impl HostileMemory {
    pub(super) fn new(guest: u64, bytes: u64) -> io::Result<HostileMemory> {
        let file = File::from(memfd_create("hostile", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes)?;
        Ok(HostileMemory { file, guest, bytes })
    }

    pub(super) fn write(&self, at: u64, data: &[u8]) {
        // Beyond the end of a file that was made shorter, this makes it longer.
        let _ = self.file.write_all_at(data, at.wrapping_sub(self.guest) % self.bytes);
    }

    pub(super) fn u16(&self, at: u64) -> u16 {
        let mut word = [0; 2];
        let _ = self.file.read_exact_at(&mut word, at.wrapping_sub(self.guest) % self.bytes);
        u16::from_le_bytes(word)
    }

    /// A region as ADD_MEM_REG tells it.
    pub(super) fn region(&self) -> Vec<u8> {
        region(self.guest, self.bytes, 0)
    }
}

pub(super) fn region(guest: u64, bytes: u64, offset: u64) -> Vec<u8> {
    [0, guest, bytes, guest.wrapping_add(USER), offset].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(super) fn pair(first: u32, second: u32) -> Vec<u8> {
    [first, second].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Adds to an eventfd, if there is room.
pub(super) fn add(event: &OwnedFd, count: u64) {
    let _ = rustix::io::write(event, &count.to_ne_bytes());
}

/// A buffer: address, bytes, whether the device writes to it.
pub(super) type Buffer = (u64, u32, bool);

/// Bytes of guest memory for a ring's three parts.
pub(super) const RING_BYTES: u64 = 0x1_0000;
const DRIVER: u64 = 0x8000;
const DEVICE: u64 = 0xa000;
/// Bytes for the table of each entry.
pub(super) const TABLE_BYTES: u64 = 0x4000;

/// A ring that every entry of is a table of indirect descriptors, offered one after the other.
pub(super) struct HostileRing {
    pub index: u32,
    pub size: u16,
    pub packed: bool,
    pub at: u64,
    tables: u64,
    pub offered: u16,
    /// Answers seen.
    seen: u16,
    pub kick: OwnedFd,
    pub call: OwnedFd,
}

impl HostileRing {
    pub(super) fn new(index: u32, size: u16, packed: bool, at: u64, tables: u64) -> io::Result<HostileRing> {
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        Ok(HostileRing { index, size, packed, at, tables, offered: 0, seen: 0, kick: event()?, call: event()? })
    }

    pub(super) fn driver(&self) -> u64 {
        self.at + DRIVER
    }

    /// Has nothing in it any more, and begins anew.
    pub(super) fn wipe(&mut self, memory: &HostileMemory) {
        memory.write(self.at, &[0; RING_BYTES as usize]);
        (self.offered, self.seen) = (0, 0);
    }

    pub(super) fn start(&self, line: &Line) -> io::Result<bool> {
        let index = self.index;
        let addresses = [self.at, self.at + DEVICE, self.driver()].map(|address| (address + USER).to_ne_bytes());
        let addresses = [&pair(index, 0)[..], &addresses.concat(), &[0; 8]].concat();
        let base = if self.packed { 0x8000_8000 } else { u32::from(self.offered) };
        let place = u64::from(index).to_ne_bytes();
        Ok(line.tell(8, &pair(index, self.size.into()), &[])?
            & line.tell(10, &pair(index, base), &[])?
            & line.tell(9, &addresses, &[])?
            & line.tell(12, &place, &[self.kick.as_raw_fd()])?
            & line.tell(13, &place, &[self.call.as_raw_fd()])?
            & line.tell(18, &pair(index, 1), &[])?)
    }

    /// Writes descriptors from `at` on, as a table has them.
    pub(super) fn table(&self, memory: &HostileMemory, at: u64, chain: &[Buffer], more: u16) {
        let mut table = Vec::new();
        for (number, (address, bytes, writable)) in (1u16..).zip(chain) {
            let next = if usize::from(number) < chain.len() && !self.packed { NEXT } else { 0 };
            let flags = more | next | if *writable { WRITE } else { 0 };
            table.extend(address.to_le_bytes());
            table.extend(bytes.to_le_bytes());
            let words = if self.packed { [0, flags] } else { [flags, number] };
            table.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        memory.write(at, &table);
    }

    /// Makes a chain available.
    pub(super) fn offer(&mut self, memory: &HostileMemory, chain: &[Buffer]) {
        let slot = self.offered % self.size;
        let table = self.tables + TABLE_BYTES * u64::from(slot);
        self.table(memory, table, chain, 0);
        let at = self.at + 16 * u64::from(slot);
        let bytes = 16 * chain.len() as u32;
        memory.write(at, &table.to_le_bytes());
        memory.write(at + 8, &bytes.to_le_bytes());
        if self.packed {
            let wrapped = self.offered / self.size % 2 == 1;
            let flags = INDIRECT | if wrapped { USED } else { AVAIL };
            memory.write(at + 12, &slot.to_le_bytes());
            memory.write(at + 14, &flags.to_le_bytes());
            self.offered = self.after(self.offered);
        } else {
            memory.write(at + 12, &[INDIRECT.to_le_bytes(), [0; 2]].concat());
            memory.write(self.driver() + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
            self.offered = self.after(self.offered);
            memory.write(self.driver() + 2, &self.offered.to_le_bytes());
        }
    }

    pub(super) fn kick(&self) {
        add(&self.kick, 1);
    }

    /// Gives the other side a moment to answer; how many answers there were.
    pub(super) fn linger(&mut self, memory: &HostileMemory, most: Duration) -> u64 {
        let end = Instant::now() + most;
        let mut answers = 0;
        loop {
            while self.seen != self.offered && self.is_used(memory) {
                self.seen = self.after(self.seen);
                answers += 1;
            }
            if self.seen == self.offered || Instant::now() >= end {
                return answers;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether there is one more answer, as far as the ring can be believed.
    fn is_used(&self, memory: &HostileMemory) -> bool {
        if !self.packed {
            return memory.u16(self.at + DEVICE + 2) != self.seen;
        }
        let flags = memory.u16(self.at + 16 * u64::from(self.seen % self.size) + 14);
        let wrapped = self.seen / self.size % 2 == 1;
        (flags & AVAIL != 0) == (flags & USED != 0) && (flags & USED != 0) != wrapped
    }

    /// What comes after this place: packed rings count two rounds, since their flags change from one to the next.
    fn after(&self, place: u16) -> u16 {
        if self.packed { (place + 1) % (2 * self.size) } else { place.wrapping_add(1) }
    }
}
