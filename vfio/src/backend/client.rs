//! A client of a vfio-user server: one request at a time, each with a deadline, and nothing that a server says is taken on
//! trust.
//!
//! The crate `vfio_user` has a client too. It has no deadlines, does not look at the error flag of replies, and panics on some;
//! its messages are not public.
//!
//! The connection ends in one of two ways, which mean different things to whoever has data there ([`End`]): the server has
//! closed it, or it was given up here, as an answer was missing or made no sense. Nothing more is sent then.

use std::fmt::Display;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::messages::{Command, FLAG_ERROR, FLAG_NO_REPLY, FLAGS_TYPE, Header, TYPE_REPLY, Version};
use crate::Error;

/// More than any reply has that is asked for here, bytes.
const MOST_BYTES: usize = 64 << 10;
/// Descriptors taken with a message; further ones are closed by the kernel.
const MOST_FILES: usize = 8;
/// Between two attempts to get into a server's queue of connections.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);

/// What is said in VERSION ("VFIO_USER_VERSION"): the version that is spoken here, and what can be received.
const VERSION: Version = Version { major: 0, minor: 1 };
const CAPABILITIES: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":1048576}}\0";

/// A connection to a vfio-user server.
pub(crate) struct Client {
    socket: PathBuf,
    patience: Duration,
    stream: UnixStream,
    /// Signalled when the connection is given up.
    given_up: EventFd,
    /// The number of the next command. Whoever holds it has the connection to itself.
    turn: Mutex<u16>,
    /// The first reason explains the others.
    end: Mutex<Option<End>>,
}

/// Why nothing can be sent any more.
#[derive(Clone, Debug)]
enum End {
    /// The server has closed the connection.
    Gone(String),
    /// The client has given the connection up: the server lives, for all that is known.
    GivenUp(String),
}

/// An answer without an error.
#[derive(Default)]
pub(crate) struct Reply {
    pub payload: Vec<u8>,
    pub files: Vec<OwnedFd>,
}

impl Reply {
    /// What the payload begins with; `None` if it is shorter.
    pub(super) fn read<T: FromBytes + KnownLayout + Immutable>(&self) -> Option<T> {
        Some(T::read_from_prefix(&self.payload).ok()?.0)
    }
}

/// What keeps an answer from coming.
enum Trouble {
    Gone(String),
    Late,
    Nonsense(String),
}

impl From<Errno> for Trouble {
    fn from(error: Errno) -> Trouble {
        Trouble::Gone(io::Error::from(error).to_string())
    }
}

impl Client {
    /// Connects and negotiates. Each request may take `patience` from when it is sent, this one included.
    pub(super) fn open(socket: &Path, patience: Duration) -> Result<Client, Error> {
        let refused = |reason| Error::Connect { socket: socket.to_owned(), reason };
        let late = |what| format!("it {what} within {} ms, perhaps as it serves another client", patience.as_millis());
        let deadline = Instant::now() + patience;
        let stream = match connect_by(socket, deadline) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Err(refused(late("did not answer (it takes no connections)"))),
            Err(error) => return Err(refused(error.to_string())),
        };
        let given_up = EventFd::new(libc::EFD_NONBLOCK).map_err(|error| refused(error.to_string()))?;
        let client = Client {
            socket: socket.to_owned(),
            patience,
            stream,
            given_up,
            turn: Mutex::new(0),
            end: Mutex::default(),
        };
        let payload = [VERSION.as_bytes(), CAPABILITIES].concat();
        let reply = client.call("negotiate", Command::Version, &payload, &[], 4..=MOST_BYTES);
        let reply = reply.map_err(|error| match error {
            Error::Timeout { .. } => refused(late("did not answer")),
            Error::Server { reason, .. } | Error::Disconnected { reason, .. } => refused(reason),
            other => other,
        })?;
        match reply.read::<Version>() {
            // "If the major versions do not match, the connection is closed." What minor versions add is not used here.
            Some(Version { major: 0, .. }) => Ok(client),
            theirs => Err(refused(format!("it speaks another version of the protocol: {theirs:?}"))),
        }
    }

    /// Sends a command and waits for its reply, whose payload has to have so many bytes. `request` names it in errors.
    pub(super) fn call(
        &self,
        request: &'static str,
        command: Command,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
        expected: RangeInclusive<usize>,
    ) -> Result<Reply, Error> {
        let mut turn = lock(&self.turn);
        if let Some(end) = self.end() {
            return Err(self.ended(request, end));
        }
        let deadline = Instant::now() + self.patience;
        *turn = turn.wrapping_add(1);
        let bytes = (size_of::<Header>() + payload.len()) as u32;
        let header = Header { id: *turn, command: command as u16, bytes, ..Header::default() };
        let answer = self.send(&header, payload, files, deadline).and_then(|()| self.receive_reply(&header, deadline));
        let server = |reason| Error::Server { socket: self.socket.clone(), request, reason };
        match answer {
            Ok(Ok(reply)) if expected.contains(&reply.payload.len()) => Ok(reply),
            // The next message begins where it should, so that the connection is as good as before.
            Ok(Ok(reply)) => Err(server(format!("its reply made no sense (it has {} bytes)", reply.payload.len()))),
            Ok(Err(error)) => Err(server(said(error))),
            Err(Trouble::Gone(reason)) => {
                self.note(End::Gone(format!("the connection was lost ({reason})")));
                Err(Error::Disconnected { socket: self.socket.clone(), request, reason })
            }
            Err(Trouble::Late) => {
                self.note(End::GivenUp(format!(
                    "'{request}' was not answered within {} ms",
                    self.patience.as_millis()
                )));
                Err(Error::Timeout { socket: self.socket.clone(), request, after: self.patience })
            }
            Err(Trouble::Nonsense(what)) => {
                let reason = format!("its reply made no sense ({what})");
                self.note(End::GivenUp(format!("the reply to '{request}' made no sense ({what})")));
                Err(server(reason))
            }
        }
    }

    /// What cannot be made of an answer that is well-formed: an error that names the request.
    pub(super) fn nonsense(&self, request: &'static str, what: impl Display) -> Error {
        Error::Server { socket: self.socket.clone(), request, reason: format!("its reply made no sense ({what})") }
    }

    /// The connection, to see its end by.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Signalled when the connection is given up here.
    pub(super) fn given_up(&self) -> &EventFd {
        &self.given_up
    }

    /// Whether nothing can be sent any more.
    pub(super) fn is_over(&self) -> bool {
        self.end().is_some()
    }

    fn end(&self) -> Option<End> {
        lock(&self.end).clone()
    }

    fn ended(&self, request: &'static str, end: End) -> Error {
        let socket = self.socket.clone();
        match end {
            End::Gone(reason) => Error::Disconnected { socket, request, reason },
            End::GivenUp(reason) => Error::GivenUp { socket, request, reason },
        }
    }

    /// Notes the end. A server that still runs hears of it, and forgets our memory.
    fn note(&self, end: End) {
        if let End::GivenUp(_) = end {
            // Before the connection ends, which would look like the server's doing. It fails only if it was signalled already.
            let _ = self.given_up.write(1);
        }
        lock(&self.end).get_or_insert(end);
        // It fails if the other end was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends a message, descriptors with its first byte.
    fn send(
        &self,
        header: &Header,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), Trouble> {
        let message = [header.as_bytes(), payload].concat();
        let mut sent = 0;
        while sent < message.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !files.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(files));
            }
            let rest = [IoSlice::new(&message[sent..])];
            match sendmsg(&self.stream, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(bytes) => sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for the reply to `command`; the inner error is what the server refuses it with. What the server itself asks for
    /// (it may read and write memory by message, "VFIO_USER_DMA_READ") is not offered here, and refused.
    fn receive_reply(&self, command: &Header, deadline: Instant) -> Result<Result<Reply, u32>, Trouble> {
        loop {
            let mut reply = Reply::default();
            let mut bytes = [0; size_of::<Header>()];
            self.receive(&mut bytes, &mut reply.files, deadline)?;
            let header: Header = zerocopy::transmute!(bytes);
            let payload = (header.bytes as usize).checked_sub(size_of::<Header>()).filter(|bytes| *bytes <= MOST_BYTES);
            let Some(payload) = payload else {
                return Err(Trouble::Nonsense(format!("a message of {} bytes", header.bytes)));
            };
            reply.payload = vec![0; payload];
            self.receive(&mut reply.payload, &mut reply.files, deadline)?;
            match header.flags & FLAGS_TYPE {
                TYPE_REPLY => {}
                0 => {
                    if header.flags & FLAG_NO_REPLY == 0 {
                        let flags = TYPE_REPLY | FLAG_ERROR;
                        let bytes = size_of::<Header>() as u32;
                        let refusal = Header { bytes, flags, error: libc::EOPNOTSUPP as u32, ..header };
                        self.send(&refusal, &[], &[], deadline)?;
                    }
                    continue;
                }
                kind => return Err(Trouble::Nonsense(format!("a message of type {kind}"))),
            }
            if (header.id, header.command) != (command.id, command.command) {
                return Err(Trouble::Nonsense(format!(
                    "it answers message {} with command {}, and was asked {} with command {}",
                    header.id, header.command, command.id, command.command
                )));
            }
            return Ok(if header.flags & FLAG_ERROR != 0 { Err(header.error) } else { Ok(reply) });
        }
    }

    /// Fills `bytes`.
    fn receive(&self, bytes: &mut [u8], files: &mut Vec<OwnedFd>, deadline: Instant) -> Result<(), Trouble> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut bytes[filled..])];
            match recvmsg(&self.stream, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(more) = message {
                            files.extend(more.take(MOST_FILES - files.len().min(MOST_FILES)));
                        }
                    }
                    if message.bytes == 0 {
                        return Err(Trouble::Gone("the server has closed it".into()));
                    }
                    filled += message.bytes;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits until the stream is ready, or has ended.
    fn wait(&self, ready: PollFlags, deadline: Instant) -> Result<(), Trouble> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Trouble::Late);
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.stream, ready)], Some(&left)) {
            // After a timeout the stream is looked at once more, then `left` is zero.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the number in a reply says.
fn said(error: u32) -> String {
    match i32::try_from(error) {
        Ok(0) | Err(_) => format!("it refuses, and does not say why (error {error})"),
        Ok(error) => format!("it refuses: {}", io::Error::from_raw_os_error(error)),
    }
}

/// Connects, without waiting in the kernel. `None`: the server's queue was full until the deadline.
fn connect_by(socket: &Path, deadline: Instant) -> io::Result<Option<UnixStream>> {
    let address = SocketAddrUnix::new(socket)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&stream, &address) {
            Ok(()) => return Ok(Some(UnixStream::from(stream))),
            Err(Errno::INTR) => {}
            // Of a local socket, this is the full queue; nothing tells when there is room.
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(CONNECT_PAUSE),
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}
