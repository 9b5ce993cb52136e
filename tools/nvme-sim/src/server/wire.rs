//! vfio-user messages (protocol version 0.1) on a stream socket: read whole, answered in one piece.
//!
//! Front-ends differ in what they send: a VERSION without any data, requests longer than their structure, several file
//! descriptors. A message is therefore taken by the length in its header, and of its body what the command needs. An answer is
//! one write, as there are front-ends that read it with one read.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// File descriptors in one message, at most; told to the front-end as `max_msg_fds`.
pub(super) const MAX_FDS: usize = 16;
/// Bytes of data in one region access, at most; told as `max_data_xfer_size`.
pub(super) const MAX_DATA: usize = 1 << 20;
/// Longest body: a region access with its data.
const MAX_BODY: usize = MAX_DATA + size_of::<RegionAccess>();

const TYPE: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Commands.
pub(super) mod command {
    pub(crate) const VERSION: u16 = 1;
    pub(crate) const DMA_MAP: u16 = 2;
    pub(crate) const DMA_UNMAP: u16 = 3;
    pub(crate) const DEVICE_GET_INFO: u16 = 4;
    pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(crate) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(crate) const DEVICE_SET_IRQS: u16 = 8;
    pub(crate) const REGION_READ: u16 = 9;
    pub(crate) const REGION_WRITE: u16 = 10;
    pub(crate) const DEVICE_RESET: u16 = 13;
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub id: u16,
    pub command: u16,
    /// Bytes of the message, this header included.
    bytes: u32,
    flags: u32,
    error: u32,
}

/// Body of VERSION; text in JSON may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Version {
    pub major: u16,
    pub minor: u16,
}

/// Body of DMA_MAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaMap {
    pub argsz: u32,
    /// Bit 0: the device may read, bit 1: it may write.
    pub flags: u32,
    pub offset: u64,
    pub address: u64,
    pub size: u64,
}

/// Body of DMA_UNMAP and its answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaUnmap {
    pub argsz: u32,
    /// Bit 1: with the dirty pages; bit 2: everything.
    pub flags: u32,
    pub address: u64,
    pub size: u64,
}

/// Body of DEVICE_GET_INFO and its answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub argsz: u32,
    pub flags: u32,
    pub regions: u32,
    pub irqs: u32,
}

/// Body of DEVICE_GET_REGION_INFO and its answer; capabilities may follow that.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub capabilities: u32,
    pub size: u64,
    pub offset: u64,
}

/// The capability that names the parts of a region that can be mapped, here one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseArea {
    pub id: u16,
    pub version: u16,
    pub next: u32,
    pub areas: u32,
    pub reserved: u32,
    pub offset: u64,
    pub size: u64,
}

/// Body of DEVICE_GET_IRQ_INFO and its answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}

/// Body of DEVICE_SET_IRQS; the eventfds come beside it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetIrqs {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
}

/// Body of REGION_READ and REGION_WRITE and their answers; data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionAccess {
    pub offset: u64,
    pub region: u32,
    pub count: u32,
}

/// A message of the front-end.
pub(super) struct Message {
    pub header: Header,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The structure the body begins with, and what follows.
    pub(super) fn parse<T: FromBytes>(&self) -> io::Result<(T, &[u8])> {
        T::read_from_prefix(&self.body).map_err(|_| {
            let (have, want) = (self.body.len(), size_of::<T>());
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("command {}: a body of {have} bytes, of {want} at least", self.header.command),
            )
        })
    }

    /// Whether the front-end waits for an answer.
    pub(super) fn wants_reply(&self) -> bool {
        self.header.flags & NO_REPLY == 0
    }
}

fn malformed(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The next message; `None`: the front-end has gone.
///
/// # Errors
/// The socket failed, or what came is no message: nothing can be read any more.
pub(super) fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let mut raw = [0; size_of::<Header>()];
    let mut fds = Vec::new();
    let mut have = 0;
    while have < raw.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut raw[have..])];
        let got = match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?.bytes,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                fds.extend(files);
            }
        }
        if got == 0 {
            return if have == 0 {
                Ok(None)
            } else {
                Err(malformed(format!("it left after {have} bytes of a header")))
            };
        }
        have += got;
    }
    let header: Header = zerocopy::transmute!(raw);
    if header.flags & TYPE != 0 {
        return Err(malformed(format!("message {} is no command: flags {:#x}", header.id, header.flags)));
    }
    let body = (header.bytes as usize).checked_sub(size_of::<Header>()).filter(|bytes| *bytes <= MAX_BODY);
    let bytes = body.ok_or_else(|| malformed(format!("command {} with {} bytes", header.command, header.bytes)))?;
    let mut body = vec![0; bytes];
    (&*stream).read_exact(&mut body)?;
    Ok(Some(Message { header, body, fds }))
}

/// Answers `to` with `body`, in one piece, and a file descriptor beside it.
pub(super) fn reply(stream: &UnixStream, to: &Header, body: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = (size_of::<Header>() + body.len()) as u32;
    let header = Header { id: to.id, command: to.command, bytes, flags: REPLY, error: 0 };
    send(stream, &[header.as_bytes(), body].concat(), fd)
}

/// Answers that `to` failed, and why (errno).
pub(super) fn refuse(stream: &UnixStream, to: &Header, error: &io::Error) -> io::Result<()> {
    let bytes = size_of::<Header>() as u32;
    let header = Header { id: to.id, command: to.command, bytes, flags: REPLY | ERROR, error: errno(error) };
    send(stream, header.as_bytes(), None)
}

fn send(stream: &UnixStream, mut bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut fd = fd;
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            // There is room for one.
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        match sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => {
                bytes = &bytes[result?..];
                // It has gone with the first piece.
                fd = None;
            }
        }
    }
    Ok(())
}

/// The number that says to the front-end what went wrong.
fn errno(error: &io::Error) -> u32 {
    let code = error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::InvalidInput => libc::EINVAL,
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        io::ErrorKind::AlreadyExists => libc::EEXIST,
        io::ErrorKind::NotFound => libc::ENOENT,
        io::ErrorKind::QuotaExceeded => libc::ENOSPC,
        _ => libc::EIO,
    });
    code as u32
}
