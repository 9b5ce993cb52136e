//! One client: what it has sent and is not answered yet, and answers that it has not read yet. Nothing here waits for it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::dispatch::{Caller, Reply};
use super::error::RpcError;
use super::framing::{Framer, FramingError};
use super::message::answer;
use super::socket::Peer;

/// Bytes that are read at once.
pub(super) const CHUNK_BYTES: usize = 16 << 10;
/// While so many bytes of answers wait, nothing more of a client's is answered.
const QUEUE_BYTES: usize = 1 << 20;
/// A client that has answers waiting and takes no byte of them for so long is disconnected.
const STALL: Duration = Duration::from_secs(10);
/// Requests of one client before the others have their turn.
const REQUESTS_PER_TURN: usize = 8;

/// Why a client is disconnected by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HangUp {
    /// It has gone, or all is said.
    Done,
    /// It does not read.
    DoesNotRead,
}

/// A client's connection.
pub(super) struct RpcClient {
    stream: UnixStream,
    pub(super) peer: Peer,
    framer: Framer,
    /// What has come, and how far it has been looked at.
    input: Vec<u8>,
    looked_at: usize,
    /// Answers, and how far they are written.
    output: Vec<u8>,
    written: usize,
    /// Nothing more comes.
    ended: bool,
    /// What comes makes no sense any more; it is closed when the answers are written.
    broken: bool,
    /// When a byte last went through it, in either direction.
    last_byte: Instant,
    /// Since when answers wait without a byte being taken.
    stalled: Option<Instant>,
}

impl RpcClient {
    /// A client that has just come.
    ///
    /// # Errors
    /// Its socket cannot be made not to block.
    pub(super) fn new(stream: UnixStream) -> io::Result<RpcClient> {
        stream.set_nonblocking(true)?;
        let peer = Peer::of(&stream);
        Ok(RpcClient {
            stream,
            peer,
            framer: Framer::default(),
            input: Vec::new(),
            looked_at: 0,
            output: Vec::new(),
            written: 0,
            ended: false,
            broken: false,
            last_byte: Instant::now(),
            stalled: None,
        })
    }

    fn waiting_bytes(&self) -> usize {
        self.output.len() - self.written
    }

    fn has_room(&self) -> bool {
        self.waiting_bytes() < QUEUE_BYTES
    }

    /// Something has come that can be looked at now.
    pub(super) fn has_work(&self) -> bool {
        !self.broken && self.has_room() && self.looked_at < self.input.len()
    }

    /// What is waited for.
    pub(super) fn interest(&self) -> PollFlags {
        let reads = !self.ended && !self.broken && self.has_room() && self.looked_at == self.input.len();
        let writes = self.waiting_bytes() > 0;
        (if reads { PollFlags::IN } else { PollFlags::empty() })
            | (if writes { PollFlags::OUT } else { PollFlags::empty() })
    }

    /// When it has to be looked at though nothing happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.stalled.map(|since| since + STALL)
    }

    /// For how long it has said nothing and wanted nothing; `None`: it is in the middle of something.
    pub(super) fn idle(&self) -> Option<Duration> {
        (self.waiting_bytes() == 0 && !self.has_work()).then(|| self.last_byte.elapsed())
    }

    /// Does what can be done now. `happened`: what `poll` has found.
    ///
    /// # Errors
    /// It is to be closed.
    pub(super) fn turn(&mut self, happened: PollFlags, space: &mut [u8], caller: &mut Caller) -> Result<(), HangUp> {
        if happened.contains(PollFlags::OUT) {
            self.flush()?;
        }
        if self.interest().contains(PollFlags::IN) && !happened.is_empty() {
            self.read(space)?;
        } else if happened.intersects(PollFlags::HUP | PollFlags::ERR) {
            // Nobody is left who could read an answer.
            return Err(HangUp::Done);
        }
        self.work(caller);
        self.flush()?;
        let over = self.broken || (self.ended && self.looked_at == self.input.len());
        if over && self.waiting_bytes() == 0 {
            return Err(HangUp::Done);
        }
        match self.deadline() {
            Some(deadline) if deadline <= Instant::now() => Err(HangUp::DoesNotRead),
            _ => Ok(()),
        }
    }

    fn read(&mut self, space: &mut [u8]) -> Result<(), HangUp> {
        match self.stream.read(space) {
            Ok(0) => {
                self.ended = true;
                // A number at the end of the stream is whole now.
                if let Some(value) = self.framer.finish() {
                    self.input = value;
                    self.input.push(b' ');
                    self.looked_at = 0;
                }
            }
            Ok(count) => {
                self.input.clear();
                self.input.extend(&space[..count]);
                self.looked_at = 0;
                self.last_byte = Instant::now();
            }
            Err(error) if is_for_later(&error) => {}
            Err(_) => return Err(HangUp::Done),
        }
        Ok(())
    }

    /// Answers what is whole.
    fn work(&mut self, caller: &mut Caller) {
        for _ in 0..REQUESTS_PER_TURN {
            if !self.has_work() {
                break;
            }
            let mut rest = &self.input[self.looked_at..];
            let next = self.framer.next(&mut rest);
            self.looked_at = self.input.len() - rest.len();
            match next {
                Ok(None) => {}
                Ok(Some(value)) => {
                    let Reply { text, broken } = caller.answer(&value, self.peer);
                    self.queue(text);
                    self.broken |= broken;
                    if let Some(signal) = caller.take_signal() {
                        // The answer first: it may be the last one. A client that has gone is noticed later.
                        let _ = self.flush();
                        signal.send();
                    }
                }
                Err(error) => {
                    self.broken = true;
                    let error = match error {
                        FramingError::TooLong => RpcError::InvalidRequest(error.to_string()),
                        _ => RpcError::Parse(error.to_string()),
                    };
                    self.queue(Some(answer(&serde_json::Value::Null, Err(error))));
                }
            }
        }
    }

    fn queue(&mut self, text: Option<Vec<u8>>) {
        if let Some(text) = text {
            self.output.extend(text);
            self.output.push(b'\n');
        }
    }

    /// Writes what the client takes.
    pub(super) fn flush(&mut self) -> Result<(), HangUp> {
        while self.waiting_bytes() > 0 {
            match self.stream.write(&self.output[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.last_byte = Instant::now();
                    self.stalled = None;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_for_later(&error) => {
                    self.stalled.get_or_insert_with(Instant::now);
                    // What is written is not kept, however slowly the rest goes.
                    if self.written >= QUEUE_BYTES {
                        self.output.drain(..std::mem::take(&mut self.written));
                    }
                    return Ok(());
                }
                Err(_) => return Err(HangUp::Done),
            }
        }
        // A large answer's memory is not kept either.
        self.output = Vec::new();
        self.written = 0;
        Ok(())
    }
}

impl AsFd for RpcClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
