//! One front-end's connection: messages in, replies out, until it goes away.
//!
//! The `vhost` crate reads and answers the messages; this loop looks at each header first. It keeps messages away from
//! the crate which we do not offer (the crate would leave their bodies in the stream), and sends the error reply where
//! the crate refuses a message without one, so that a wrong message costs the front-end that message and no more. Where
//! there is no way to say "no", the connection ends: a front-end that believes in what was refused waits for ever.
//!
//! This module owns the stream and what is said on it. It does not know what a message means, and a front-end that sends a part of
//! one keeps it waiting for a second at most.

use std::collections::HashSet;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vfio::LossListener;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use super::error::{ConnectionError, MemoryLoss, MessageRefusal, SessionError};
use crate::event::EventFd;
use crate::log_limit::{Kind, LogLimit};
use crate::vhost_user::front_end_queue::{QueuePosition, QueueTicket};

/// What the loop needs of the device besides the handling of messages.
pub trait ConnectionHandler: VhostUserBackendReqHandlerMut {
    /// Why the last message was refused; `None` when no method has refused one since the last call.
    fn take_refusal(&mut self) -> Option<SessionError>;
    /// The descriptor that comes with the next SET_BACKEND_REQ_FD, if there is one.
    fn offer_back_channel(&mut self, descriptor: Option<OwnedFd>);
    /// What is known of the namespace may have changed.
    fn look_at_namespace(&mut self);
    /// The front-end's turn on the disk has come. The error says which of its earlier messages cannot take effect.
    fn take_turn(&mut self) -> Result<(), SessionError>;
    /// What to say if memory of the front-end was found without pages: the session has to end.
    fn lost_memory(&self) -> Option<MemoryLoss>;
    /// Whether REPLY_ACK is negotiated.
    fn reply_ack(&self) -> bool;
}

/// Why a connection ended.
#[derive(Debug)]
pub enum Disconnect {
    /// The front-end closed it.
    ByFrontEnd,
    /// We were told to stop.
    Stopped,
    /// The front-end broke the protocol beyond repair, or the socket failed.
    Broken(ConnectionError),
}

impl Disconnect {
    fn socket(what: &'static str, source: impl Into<io::Error>) -> Disconnect {
        Disconnect::Broken(ConnectionError::Socket { what, source: source.into() })
    }
}

/// `struct vhost_user_header` (vhost-user, "MessageHeader"): request, flags, size; the machine's byte order.
const HEADER_BYTES: usize = 12;
const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// The longest body the `vhost` crate takes; longer than any message we know.
const MAX_BODY: u32 = 4096;
/// How long the rest of a message may take.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
struct MessageHeader {
    request: u32,
    flags: u32,
    size: u32,
}

impl MessageHeader {
    fn from_bytes(bytes: [u8; HEADER_BYTES]) -> MessageHeader {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        MessageHeader { request: word(0), flags: word(4), size: word(8) }
    }

    /// Whether it can be the header of a message at all.
    fn is_proper(&self) -> bool {
        self.flags & VERSION_MASK == VERSION && self.size <= MAX_BODY
    }

    /// The request, if it is one we serve; everything else never reaches the crate.
    fn served(&self) -> Option<FrontendReq> {
        use FrontendReq::*;
        let request = FrontendReq::try_from(self.request).ok()?;
        let known = matches!(
            request,
            GET_FEATURES
                | SET_FEATURES
                | SET_OWNER
                | RESET_OWNER
                | SET_MEM_TABLE
                | SET_VRING_NUM
                | SET_VRING_ADDR
                | SET_VRING_BASE
                | GET_VRING_BASE
                | SET_VRING_KICK
                | SET_VRING_CALL
                | SET_VRING_ERR
                | GET_PROTOCOL_FEATURES
                | SET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | SET_VRING_ENABLE
                | SET_BACKEND_REQ_FD
                | GET_CONFIG
                | SET_CONFIG
                | RESET_DEVICE
                | GET_MAX_MEM_SLOTS
                | ADD_MEM_REG
                | REM_MEM_REG
                | GET_INFLIGHT_FD
                | SET_INFLIGHT_FD
        );
        (known && self.flags & !(VERSION_MASK | NEED_REPLY) == 0).then_some(request)
    }

    /// Whether the front-end waits for a reply of its own kind, which no acknowledgement can stand for.
    fn has_own_reply(&self) -> bool {
        use FrontendReq::*;
        matches!(
            FrontendReq::try_from(self.request),
            Ok(GET_FEATURES
                | GET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | GET_VRING_BASE
                | GET_CONFIG
                | GET_MAX_MEM_SLOTS
                | SET_LOG_BASE
                | CREATE_CRYPTO_SESSION
                | POSTCOPY_ADVISE
                | GET_INFLIGHT_FD
                | GET_STATUS
                | GET_SHARED_OBJECT
                | SET_DEVICE_STATE_FD
                | CHECK_DEVICE_STATE
                | GET_SHMEM_CONFIG)
        )
    }

    /// Whether file descriptors may come with it: the crate gives up in the middle of any other that has some.
    fn may_have_descriptors(&self) -> bool {
        use FrontendReq::*;
        matches!(
            FrontendReq::try_from(self.request),
            Ok(SET_MEM_TABLE
                | SET_VRING_KICK
                | SET_VRING_CALL
                | SET_VRING_ERR
                | SET_BACKEND_REQ_FD
                | ADD_MEM_REG
                | SET_INFLIGHT_FD
                // By mistake, but many do, and the specification allows for it.
                | REM_MEM_REG)
        )
    }

    fn name(&self) -> String {
        match FrontendReq::try_from(self.request) {
            Ok(request) => format!("{request:?}"),
            Err(_) => format!("request {}", self.request),
        }
    }
}

/// What a connection listens to besides its socket.
pub struct Wakers<'a> {
    /// Readable when the connection has to end.
    pub stop: &'a EventFd,
    /// Rings when the namespace is to be looked at.
    pub changed: &'a EventFd,
    /// The front-end's place in the order of its disk.
    pub turn: &'a QueueTicket,
    /// How many lines its disk may cause.
    pub log: &'a LogLimit,
}

/// Serves one front-end until it goes away or is to be left. Its turn is asked for with its first message, upon which
/// `spoken` is called with what it was told.
pub fn serve<H: ConnectionHandler>(
    stream: UnixStream,
    device: Arc<Mutex<H>>,
    wakers: &Wakers,
    name: &str,
    spoken: impl FnOnce(QueuePosition),
) -> Disconnect {
    let Wakers { stop, changed, turn, log } = *wakers;
    let own = match stream.try_clone() {
        Ok(own) => own,
        Err(error) => return Disconnect::socket("duplicate the socket", error),
    };
    let losses = match LossListener::new() {
        Ok(losses) => losses,
        Err(error) => return Disconnect::socket("listen for lost memory", error),
    };
    let handler = BackendReqHandler::from_stream(stream, device.clone());
    let complained = HashSet::new();
    let mut connection = Connection { stream: own, handler, device, name, log, complained, features_asked: false };
    let mut spoken = Some(spoken);
    loop {
        let mut sources =
            [stop.as_fd(), connection.stream.as_fd(), changed.as_fd(), losses.as_fd(), turn.event().as_fd()]
                .map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
        match poll(&mut sources, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Disconnect::socket("wait for messages", error),
        }
        let [stopped, message, news, lost, begins] = sources.map(|source| !source.revents().is_empty());
        if stopped {
            return Disconnect::Stopped;
        }
        if lost {
            // First: what is lost from here on is heard again. Most often it is somebody else's.
            losses.clear();
        }
        if news {
            // First, for the same reason.
            changed.clear();
        }
        if (lost || news)
            && let Some(loss) = connection.device().lost_memory()
        {
            return Disconnect::Broken(loss.into());
        }
        if news {
            connection.device().look_at_namespace();
        }
        if begins {
            turn.event().clear();
            let result = connection.device().take_turn();
            if let Err(why) = result
                && let Some(more) = log.admit(Kind::Ring)
            {
                log::error!("{name}: {why}{more}");
            }
        }
        if !message {
            continue;
        }
        if let Err(end) = connection.message() {
            return end;
        }
        if let Some(spoken) = spoken.take() {
            spoken(turn.ask());
        }
    }
}

struct Connection<'a, H: ConnectionHandler> {
    stream: UnixStream,
    handler: BackendReqHandler<Mutex<H>>,
    device: Arc<Mutex<H>>,
    name: &'a str,
    log: &'a LogLimit,
    /// Requests whose refusal has been logged.
    complained: HashSet<u32>,
    /// GET_FEATURES was answered: the crate acknowledges nothing before.
    features_asked: bool,
}

impl<H: ConnectionHandler> Connection<'_, H> {
    /// Handles the message at the front of the stream.
    fn message(&mut self) -> Result<(), Disconnect> {
        let header = self.peek()?;
        if !header.is_proper() {
            return Err(Disconnect::Broken(ConnectionError::NoMessage {
                request: header.request,
                flags: header.flags,
                bytes: header.size,
            }));
        }
        let Some(request) = header.served() else {
            self.skip(header)?;
            return self.refuse(header, MessageRefusal::NotOffered, true);
        };
        if !header.may_have_descriptors() && self.has_descriptors(header) {
            self.skip(header)?;
            return self.refuse(header, MessageRefusal::Descriptors, true);
        }
        if request == FrontendReq::SET_BACKEND_REQ_FD {
            let channel = self.descriptor(header);
            self.device().offer_back_channel(channel);
        }
        let result = self.handler.handle_request();
        let refusal = self.device().take_refusal();
        let error = match (result, &refusal) {
            (Ok(()), None) => {
                self.features_asked |= request == FrontendReq::GET_FEATURES;
                return Ok(());
            }
            // GET_CONFIG: an empty answer is a "no" (vhost-user, "Virtio device config space").
            (Ok(()), Some(why)) => {
                self.complain(header, why);
                return Ok(());
            }
            (Err(Error::Disconnected), _) => return Err(Disconnect::ByFrontEnd),
            (Err(error @ (Error::SocketBroken(_) | Error::SocketError(_) | Error::PartialMessage)), _) => {
                return Err(Disconnect::Broken(error.into()));
            }
            (Err(error), _) => error,
        };
        // The crate acknowledges what a method refused, and whatever goes wrong inside these three messages, but nothing
        // that it finds wrong before.
        let acknowledged = refusal.is_some()
            || (matches!(
                request,
                FrontendReq::SET_MEM_TABLE | FrontendReq::SET_CONFIG | FrontendReq::SET_BACKEND_REQ_FD
            ) && !matches!(error, Error::InactiveOperation(_)));
        self.refuse(header, refusal.map_or_else(|| error.into(), MessageRefusal::from), !acknowledged)
    }

    fn device(&self) -> std::sync::MutexGuard<'_, H> {
        self.device.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The next header, left in the stream. The whole message is there: nothing waits for a part of it later.
    fn peek(&self) -> Result<MessageHeader, Disconnect> {
        let deadline = Instant::now() + MESSAGE_DEADLINE;
        loop {
            let mut bytes = [0; HEADER_BYTES];
            let part = match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::PEEK) {
                Ok((_, 0)) => return Err(Disconnect::ByFrontEnd),
                Ok((_, HEADER_BYTES)) => {
                    let header = MessageHeader::from_bytes(bytes);
                    if !header.is_proper() || self.has_whole(header)? {
                        return Ok(header);
                    }
                    header.name()
                }
                Ok(_) => "a message's header".into(),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(Disconnect::ByFrontEnd),
                Err(error) => return Err(Disconnect::socket("read from the socket", error)),
            };
            // What a front-end left behind in the stream hides its end from a look ahead.
            if self.has_hung_up() {
                return Err(Disconnect::ByFrontEnd);
            }
            // The message comes in pieces: nobody does that, and nobody may hold us up with it.
            if Instant::now() >= deadline {
                return Err(Disconnect::Broken(ConnectionError::Incomplete(part)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether all of the message of which this is the header can be read.
    fn has_whole(&self, header: MessageHeader) -> Result<bool, Disconnect> {
        rustix::io::ioctl_fionread(&self.stream)
            .map(|bytes| bytes >= HEADER_BYTES as u64 + u64::from(header.size))
            .map_err(|error| Disconnect::socket("look into the socket", error))
    }

    /// Whether nothing more can come.
    fn has_hung_up(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.stream, PollFlags::RDHUP)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Whether descriptors come with the message of which this is the header.
    fn has_descriptors(&self, header: MessageHeader) -> bool {
        let length = HEADER_BYTES + header.size as usize;
        // A look ahead ends behind the first piece of the stream that carries descriptors. With room for a byte of the
        // next message it is clear which one they belong to.
        let mut bytes = vec![0; length + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        // What it receives are duplicates, closed when it is dropped.
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).is_ok_and(|message| {
            let some = control.drain().next().is_some() || message.flags.contains(ReturnFlags::CTRUNC);
            some && message.bytes <= length
        })
    }

    /// A duplicate of the descriptor that comes with the message of which this is the header, which stays in the stream.
    fn descriptor(&self, header: MessageHeader) -> Option<OwnedFd> {
        let mut bytes = vec![0; HEADER_BYTES + header.size as usize];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
        control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
    }

    /// Takes a whole message out of the stream; the kernel closes descriptors that nobody receives.
    fn skip(&mut self, header: MessageHeader) -> Result<(), Disconnect> {
        let mut message = vec![0; HEADER_BYTES + header.size as usize];
        self.stream.read_exact(&mut message).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Disconnect::ByFrontEnd,
            _ => Disconnect::socket("read from the socket", error),
        })
    }

    /// Logs a refused message once for each kind.
    fn complain(&mut self, header: MessageHeader, why: &dyn std::fmt::Display) {
        let request = header.name();
        if !self.complained.insert(header.request) {
            log::debug!("{}: {request} refused again: {why}", self.name);
        } else if let Some(more) = self.log.admit(Kind::Refusal) {
            log::warn!("{}: {request} refused: {why}{more}", self.name);
        }
    }

    /// Tells the front-end that a message is refused; without a way to do so the connection ends, which leaves nobody waiting.
    fn refuse(&mut self, header: MessageHeader, why: MessageRefusal, acknowledge: bool) -> Result<(), Disconnect> {
        if header.has_own_reply() {
            return Err(Disconnect::Broken(ConnectionError::Unanswerable {
                request: header.name(),
                why: Box::new(why),
            }));
        }
        if header.flags & NEED_REPLY == 0 || !self.features_asked || !self.device().reply_ack() {
            return Err(Disconnect::Broken(ConnectionError::Refused { request: header.name(), why: Box::new(why) }));
        }
        self.complain(header, &why);
        if acknowledge {
            let mut reply = [0; HEADER_BYTES + 8];
            let words = [header.request, VERSION | REPLY, 8, 1, 0];
            for (bytes, word) in reply.chunks_exact_mut(4).zip(words) {
                bytes.copy_from_slice(&word.to_ne_bytes());
            }
            if cfg!(target_endian = "big") {
                // The 64-bit value's low half comes last there.
                reply[HEADER_BYTES..].copy_from_slice(&1u64.to_ne_bytes());
            }
            self.stream.write_all(&reply).map_err(|error| Disconnect::socket("send a reply", error))?;
        }
        Ok(())
    }
}
