//! The thread that answers all clients of the control socket. It waits for none of them, and no worker and no front-end waits for it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::{CHUNK_BYTES, HangUp, RpcClient};
use super::dispatch::Caller;
use super::error::RpcSocketError;
use super::socket::RpcSocket;
use crate::control::target::Defect;
use crate::control::target::registry::Registry;
use crate::datapath::worker::panic_message;
use crate::event::EventFd;
use crate::fault_point::fault_point;
use crate::log_limit::{Kind, LogLimit};

/// Clients at a time.
const MAX_CONNECTIONS: usize = 64;
/// A client that has been silent for so long gives way to one that finds no place.
const SILENCE: Duration = Duration::from_secs(10);
/// Clients that are accepted before those that are there have their turn.
const ACCEPTED_AT_ONCE: usize = 16;
/// After an error of the listening socket: out of descriptors, most likely.
const PAUSE: Duration = Duration::from_secs(1);

/// The thread; dropping this ends it.
pub struct RpcServer {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl RpcServer {
    /// Starts to answer.
    ///
    /// # Errors
    /// The process has no descriptor or no thread left.
    pub(in crate::control) fn start(socket: RpcSocket, registry: Arc<Registry>) -> Result<RpcServer, RpcSocketError> {
        let name = socket.name();
        let cannot = |source: io::Error| RpcSocketError::Start { path: name.clone(), source };
        let stop = Arc::new(EventFd::new().map_err(cannot)?);
        let termination = registry.termination.clone();
        let mut clients = RpcThread {
            stop: stop.clone(),
            caller: Caller::new(socket.name(), registry),
            socket,
            connections: Vec::new(),
            accepts_from: None,
            log: LogLimit::default(),
        };
        let run = move || {
            let end = catch_unwind(AssertUnwindSafe(|| clients.serve()));
            let message = match end {
                Ok(Ok(())) => return,
                Ok(Err(error)) => format!("cannot wait for clients: {error}"),
                Err(panic) => panic_message(panic.as_ref()),
            };
            termination.end(Defect::Rpc { message });
        };
        let thread = std::thread::Builder::new().name("rpc".into()).spawn(run).map_err(cannot)?;
        log::info!("{name}: the control socket is ready");
        Ok(RpcServer { stop, thread: Some(thread) })
    }
}

impl Drop for RpcServer {
    fn drop(&mut self) {
        self.stop.notify();
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

/// What the thread of the control socket owns: the socket, and its clients.
struct RpcThread {
    stop: Arc<EventFd>,
    caller: Caller,
    socket: RpcSocket,
    connections: Vec<RpcClient>,
    /// Nobody is accepted before this time.
    accepts_from: Option<Instant>,
    log: LogLimit,
}

/// What `poll` has found.
struct Found {
    stop: bool,
    comes: bool,
    /// In the order of the connections.
    happened: Vec<PollFlags>,
}

impl RpcThread {
    fn serve(&mut self) -> io::Result<()> {
        let mut space = vec![0; CHUNK_BYTES];
        loop {
            let Found { stop, comes, happened } = self.wait()?;
            if stop {
                // What can be written without waiting.
                for connection in &mut self.connections {
                    let _ = connection.flush();
                }
                return Ok(());
            }
            let mut happened = happened.into_iter();
            let connections = std::mem::take(&mut self.connections);
            for mut connection in connections {
                let flags = happened.next().unwrap_or(PollFlags::empty());
                match connection.turn(flags, &mut space, &mut self.caller) {
                    Ok(()) => self.connections.push(connection),
                    Err(HangUp::Done) => {}
                    Err(HangUp::DoesNotRead) => self.tell(
                        Kind::Connection,
                        &format!("a client ({}) was disconnected: it does not read its answers", connection.peer),
                    ),
                }
            }
            if comes {
                self.accept();
            }
        }
    }

    fn wait(&self) -> io::Result<Found> {
        let now = Instant::now();
        let accepts = self.accepts_from.is_none_or(|time| time <= now);
        let listens = if accepts { PollFlags::IN } else { PollFlags::empty() };
        let mut sources = vec![PollFd::new(&*self.stop, PollFlags::IN), PollFd::new(self.socket.listener(), listens)];
        sources.extend(self.connections.iter().map(|connection| PollFd::new(connection, connection.interest())));
        let limit = if self.connections.iter().any(RpcClient::has_work) {
            Some(Duration::ZERO)
        } else {
            let deadlines = self.connections.iter().filter_map(RpcClient::deadline);
            let next = deadlines.chain(self.accepts_from.filter(|_| !accepts)).min();
            next.map(|time| time.saturating_duration_since(now))
        };
        // Rounded up: what is not due yet is not looked at again and again.
        let limit = limit.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
        match poll(&mut sources, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => sources.iter_mut().for_each(PollFd::clear_revents),
            Err(error) => return Err(error.into()),
        }
        let mut happened = sources.iter().map(PollFd::revents);
        let stop = happened.next().is_some_and(|flags| !flags.is_empty());
        let comes = happened.next().is_some_and(|flags| !flags.is_empty());
        Ok(Found { stop, comes, happened: happened.collect() })
    }

    fn accept(&mut self) {
        fault_point!("rpc panics", self.caller.socket());
        self.accepts_from = None;
        for _ in 0..ACCEPTED_AT_ONCE {
            match self.socket.listener().accept() {
                Ok((stream, _)) if self.has_place() => match RpcClient::new(stream) {
                    Ok(connection) => self.connections.push(connection),
                    Err(error) => self.tell(Kind::TurnedAway, &format!("a client cannot be answered: {error}")),
                },
                Ok(_) => self.tell(
                    Kind::TurnedAway,
                    &format!("a client was turned away: {MAX_CONNECTIONS} are connected, and none of them is silent"),
                ),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.tell(Kind::TurnedAway, &format!("cannot accept a client: {error}"));
                    self.accepts_from = Some(Instant::now() + PAUSE);
                    break;
                }
            }
        }
    }

    /// Whether there is a place for one more; the one that has been silent for longest may have to give it.
    fn has_place(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let idle = self.connections.iter().map(RpcClient::idle).enumerate();
        let silent = idle.filter_map(|(index, time)| Some((time.filter(|time| *time >= SILENCE)?, index))).max();
        let Some((time, index)) = silent else { return false };
        let peer = self.connections.swap_remove(index).peer;
        let text = format!("a client ({peer}) that was silent for {} s gives way to another one", time.as_secs());
        self.tell(Kind::Connection, &text);
        true
    }

    fn tell(&self, kind: Kind, text: &str) {
        if let Some(more) = self.log.admit(kind) {
            log::warn!("{}: {text}{more}", self.caller.socket());
        }
    }
}
