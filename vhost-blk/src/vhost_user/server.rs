//! The threads that serve an export: one accepts front-ends, and each front-end has one of its own.
//!
//! A front-end is answered as soon as it comes, whoever is there before it: a VMM that waits for an answer stands still, with
//! its monitor. `MOST_FRONT_ENDS` may be there at a time; more are refused by closing, which a VMM survives.
//!
//! This module owns the threads of an export. A thread of one front-end may wait for that front-end; the one that accepts them
//! must never wait for any.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use super::export::Export;
use super::front_end_queue::{QueuePosition, QueueTicket};
use crate::datapath::worker::panic_message;
use crate::event::EventFd;
use crate::fault_point::fault_point;
use crate::log_limit::Kind;
use crate::vhost_user::listener::{Listener, ServedSocket};
use crate::vhost_user::session::Session;
use crate::vhost_user::session::connection::{self, Disconnect, Wakers};

/// Front-ends of one disk at a time: the one that is served, and those that wait.
const MOST_FRONT_ENDS: usize = 5;
/// Whoever has not said anything for so long gives way to one that comes.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a front-end that finds no place waits for one that is just leaving.
const LEAVING: Duration = Duration::from_millis(100);
/// How often the socket's file is looked at.
const LOOK_AT_FILE: Duration = Duration::from_secs(1);
/// After an error of the socket.
const PAUSE: Duration = Duration::from_secs(1);

/// The threads that serve an export.
pub struct Server {
    export: Arc<Export>,
    clients: Arc<Clients>,
    thread: Option<JoinHandle<()>>,
}

/// The front-ends that are there, and how all their threads are told to stop, wherever they wait.
struct Clients {
    stop: EventFd,
    /// A front-end has left.
    left: EventFd,
    list: Mutex<ClientList>,
}

#[derive(Default)]
struct ClientList {
    stopping: bool,
    clients: Vec<ConnectedClient>,
    /// Why a thread has died.
    defect: Option<ServerError>,
}

struct ConnectedClient {
    number: u64,
    /// Shutting it down ends a write that nobody reads.
    stream: UnixStream,
    since: Instant,
    spoken: bool,
    /// How many of its rings run, once there is a session.
    rings: Arc<AtomicU16>,
}

/// A front-end that is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontEnd {
    /// Its number among all that the disk has ever had, from 1.
    pub number: u64,
    /// It has sent a message.
    pub spoken: bool,
    /// How many of its rings run.
    pub rings: u16,
}

impl ConnectedClient {
    fn disconnect(&self) {
        // Only one that has gone already cannot be shut down.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Clients {
    fn list(&self) -> MutexGuard<'_, ClientList> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False: it is too late for new ones.
    fn enter(&self, client: ConnectedClient) -> bool {
        let mut list = self.list();
        if !list.stopping {
            list.clients.push(client);
        }
        !list.stopping
    }

    fn leave(&self, number: u64, defect: Option<ServerError>) {
        let mut list = self.list();
        list.clients.retain(|client| client.number != number);
        list.defect = list.defect.take().or(defect);
        drop(list);
        self.left.notify();
    }

    fn disconnect_all(&self) {
        let mut list = self.list();
        list.stopping = true;
        self.stop.notify();
        list.clients.iter().for_each(ConnectedClient::disconnect);
    }

    fn has_session(&self, number: u64, rings: &Arc<AtomicU16>) {
        let mut list = self.list();
        list.clients
            .iter_mut()
            .filter(|client| client.number == number)
            .for_each(|client| client.rings = rings.clone());
    }

    fn has_spoken(&self, number: u64) {
        let mut list = self.list();
        list.clients.iter_mut().filter(|client| client.number == number).for_each(|client| client.spoken = true);
    }

    /// Disconnects the one that has been silent for longest, if that is long enough.
    fn disconnect_silent(&self) -> bool {
        let list = self.list();
        let silent = list.clients.iter().filter(|client| !client.spoken && client.since.elapsed() >= SILENCE);
        silent.min_by_key(|client| client.since).map(ConnectedClient::disconnect).is_some()
    }
}

impl Server {
    /// Starts to accept front-ends; `ended` is called when there will be no more of them, with an error if there should be.
    pub fn start(
        export: Arc<Export>,
        listener: Listener,
        ended: impl FnOnce(Result<(), ServerError>) + Send + 'static,
    ) -> Result<Server, ServerError> {
        let cannot = |source: io::Error| ServerError::Start { disk: export.name.clone(), source };
        let (stop, left) = (EventFd::new().map_err(cannot)?, EventFd::new().map_err(cannot)?);
        let clients = Arc::new(Clients { stop, left, list: Mutex::default() });
        let acceptor = Acceptor { export: export.clone(), clients: clients.clone(), threads: Vec::new(), next: 0 };
        let run = move || {
            let name = acceptor.export.name.clone();
            // Its disk would be gone for as long as the program lives.
            let end = catch_unwind(AssertUnwindSafe(|| acceptor.run(listener)));
            ended(end.unwrap_or_else(|panic| Err(ServerError::died(&name, panic.as_ref()))));
        };
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(run).map_err(cannot)?;
        Ok(Server { export, clients, thread: Some(thread) })
    }

    /// The export it serves.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// The front-ends that are connected, in the order in which they have come. Waits for none of them.
    pub fn front_ends(&self) -> Vec<FrontEnd> {
        let front_end = |client: &ConnectedClient| FrontEnd {
            number: client.number,
            spoken: client.spoken,
            // Relaxed: a number, ordered with nothing.
            rings: client.rings.load(Ordering::Relaxed),
        };
        self.clients.list().clients.iter().map(front_end).collect()
    }

    /// Asks the threads to stop; dropping the server waits for them.
    pub fn ask_to_stop(&self) {
        self.clients.disconnect_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

/// A disk cannot be served any more, or not at all.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The process has no descriptor or no thread left.
    #[error("{disk}: cannot start serving: {source}")]
    Start {
        /// The disk's socket.
        disk: String,
        /// What the system says.
        source: io::Error,
    },
    /// The socket cannot be waited for.
    #[error("{disk}: cannot wait for front-ends: {source}")]
    Wait {
        /// The disk's socket.
        disk: String,
        /// What the system says.
        source: io::Error,
    },
    /// A defect of this program has ended a thread.
    #[error("the thread that serves {disk} died: {message}")]
    Died {
        /// The disk's socket.
        disk: String,
        /// What its panic says.
        message: String,
    },
}

impl ServerError {
    fn died(disk: &str, panic: &(dyn std::any::Any + Send)) -> ServerError {
        ServerError::Died { disk: disk.to_owned(), message: panic_message(panic) }
    }
}

/// The thread that accepts front-ends.
struct Acceptor {
    export: Arc<Export>,
    clients: Arc<Clients>,
    threads: Vec<JoinHandle<()>>,
    /// Numbers of front-ends are never used twice.
    next: u64,
}

impl Acceptor {
    /// Accepts front-ends until told to stop. All that have come have left then.
    fn run(mut self, listener: Listener) -> Result<(), ServerError> {
        let mut socket = match listener {
            Listener::Connected(stream) => {
                if let Some(number) = self.enter(&stream) {
                    serve(&self.export, &self.clients, stream, number);
                }
                return self.clients.list().defect.take().map_or(Ok(()), Err);
            }
            Listener::Listening(file, socket) => ServedSocket::new(file, socket),
        };
        log::info!("{}: {} is ready for a front-end", self.export.name, self.export);
        let result = self.accept(&mut socket);
        self.clients.disconnect_all();
        while !self.threads.is_empty() {
            // Those that come now have to come again, to another process.
            while socket.socket().accept().is_ok() {}
            wait([&self.clients.left.as_fd(), &socket.socket().as_fd()], PAUSE);
            self.look_after_threads();
        }
        result
    }

    fn accept(&mut self, socket: &mut ServedSocket) -> Result<(), ServerError> {
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() >= LOOK_AT_FILE {
                socket.look_after(&self.export.name);
                looked = Instant::now();
            }
            let mut sources = [self.clients.stop.as_fd(), self.clients.left.as_fd(), socket.socket().as_fd()]
                .map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
            if let Err(error) = poll(&mut sources, Some(&timespec(LOOK_AT_FILE)))
                && error != rustix::io::Errno::INTR
            {
                return Err(ServerError::Wait { disk: self.export.name.clone(), source: error.into() });
            }
            let [stopped, left, comes] = sources.map(|source| !source.revents().is_empty());
            if left {
                self.look_after_threads();
                if let Some(defect) = self.clients.list().defect.take() {
                    return Err(defect);
                }
            }
            if stopped {
                return Ok(());
            }
            if !comes {
                continue;
            }
            match socket.socket().accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => {
                    self.tell_failure("accept a front-end", &error);
                    // Out of descriptors, most likely: give others time to release some, but hear a stop.
                    wait([&self.clients.stop.as_fd()], PAUSE);
                }
            }
        }
    }

    /// Ends what is left of the threads of front-ends that have left.
    fn look_after_threads(&mut self) {
        self.clients.left.clear();
        let (ended, running) = std::mem::take(&mut self.threads).into_iter().partition(JoinHandle::is_finished);
        self.threads = running;
        // They catch their panics.
        Vec::into_iter(ended).for_each(|thread: JoinHandle<()>| drop(thread.join()));
    }

    /// A front-end's number; `None`: it is left at once.
    fn enter(&mut self, stream: &UnixStream) -> Option<u64> {
        self.next += 1;
        let number = self.next;
        let entered = stream.set_nonblocking(false).and_then(|()| stream.try_clone()).map(|stream| {
            self.clients.enter(ConnectedClient {
                number,
                stream,
                since: Instant::now(),
                spoken: false,
                rings: Arc::default(),
            })
        });
        match entered {
            Ok(entered) => entered.then_some(number),
            Err(error) => {
                self.tell_failure("use a front-end's socket", &error);
                None
            }
        }
    }

    /// Gives a front-end a thread, if there is a place for it.
    fn admit(&mut self, stream: UnixStream) {
        if !self.has_place() {
            return self.refuse();
        }
        let Some(number) = self.enter(&stream) else { return };
        let (export, clients) = (self.export.clone(), self.clients.clone());
        let thread = std::thread::Builder::new()
            .name("front-end".into())
            .spawn(move || serve(&export, &clients, stream, number));
        match thread {
            Ok(thread) => self.threads.push(thread),
            Err(error) => {
                self.clients.leave(number, None);
                self.tell_failure("start to serve a front-end", &error);
            }
        }
    }

    /// Whether there is a place for one more, now or in a moment.
    fn has_place(&mut self) -> bool {
        let deadline = Instant::now() + LEAVING;
        self.look_after_threads();
        if self.threads.len() >= MOST_FRONT_ENDS && self.clients.disconnect_silent() {
            log::warn!(
                "{}: a client that has sent nothing is disconnected, to make room for a front-end",
                self.export.name
            );
        }
        while self.threads.len() >= MOST_FRONT_ENDS {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // A thread's last steps come after its word.
            wait([&self.clients.left.as_fd()], left.min(LEAVING / 10));
            self.look_after_threads();
        }
        true
    }

    /// Tells of a front-end that is refused by closing.
    fn refuse(&self) {
        if let Some(more) = self.export.log.admit(Kind::TurnedAway) {
            log::warn!(
                "{}: a front-end was refused: {MOST_FRONT_ENDS} are connected already, of which one is served; disconnect one{more}",
                self.export.name
            );
        }
    }

    /// Tells of a front-end that cannot be served for want of something.
    fn tell_failure(&self, what: &str, error: &io::Error) {
        if let Some(more) = self.export.log.admit(Kind::TurnedAway) {
            log::error!("{}: cannot {what}: {error}{more}", self.export.name);
        }
    }
}

/// Waits until one of them is readable, no longer than that.
fn wait<const COUNT: usize>(sources: [&BorrowedFd; COUNT], limit: Duration) {
    let mut sources = sources.map(|source| PollFd::new(source, PollFlags::IN));
    // An error (a signal) is looked into by whoever waits.
    let _ = poll(&mut sources, Some(&timespec(limit)));
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Serves one front-end until it has gone and nothing of it is left.
fn serve(export: &Arc<Export>, clients: &Clients, stream: UnixStream, number: u64) {
    let end = catch_unwind(AssertUnwindSafe(|| converse(export, clients, stream, number)));
    clients.leave(number, end.err().map(|panic| ServerError::died(&export.name, panic.as_ref())));
}

fn converse(export: &Arc<Export>, clients: &Clients, stream: UnixStream, number: u64) {
    let name = &export.name;
    fault_point!("server panics", name);
    let (turn, changed) = match (export.front_ends.join(), export.on_change()) {
        (Ok(turn), Ok(changed)) => (turn, changed),
        (Err(error), _) | (_, Err(error)) => {
            if let Some(more) = export.log.admit(Kind::TurnedAway) {
                log::error!("{name}: cannot serve a front-end: {error}{more}");
            }
            return;
        }
    };
    let session = Session::new(export.clone());
    clients.has_session(number, &session.rings_running());
    let session = Arc::new(Mutex::new(session));
    let mut spoken = false;
    let wakers = Wakers { stop: &clients.stop, changed: &changed, turn: &turn, log: &export.log };
    let end = connection::serve(stream, session.clone(), &wakers, name, |asked| {
        spoken = true;
        clients.has_spoken(number);
        let Some(more) = export.log.admit(Kind::Connection) else { return };
        match asked {
            QueuePosition::First => log::info!("{name}: a front-end connected{more}"),
            QueuePosition::NextAfterDrain => log::info!(
                "{name}: a front-end connected; its rings wait until the requests of the last one have ended{more}"
            ),
            QueuePosition::Behind(1) => {
                log::warn!("{name}: a second front-end connected; its rings wait until the first leaves{more}");
            }
            QueuePosition::Behind(before) => log::warn!(
                "{name}: another front-end connected; its rings wait until the {before} before it leave{more}"
            ),
        }
    });
    match (end, spoken) {
        (Disconnect::ByFrontEnd, false) => log::debug!("{name}: a client came and said nothing"),
        (Disconnect::Stopped, _) => log::debug!("{name}: the front-end is disconnected, as serving ends"),
        (end, spoken) => {
            if let Some(more) = export.log.admit(Kind::Connection) {
                match (end, spoken) {
                    (Disconnect::Broken(why), true) => {
                        log::warn!("{name}: the front-end was disconnected: {why}{more}")
                    }
                    (Disconnect::Broken(why), false) => log::warn!("{name}: a client was disconnected: {why}{more}"),
                    _ => log::info!("{name}: the front-end disconnected{more}"),
                }
            }
        }
    }
    keep_choice(&session, &turn, name);
    turn.drains();
    // In this order: what it has under way ends, then it is the next one's turn.
    drop(session);
    drop(turn);
}

/// What a front-end has chosen and was told to be done outlives it, though its turn has not come. Behind one that stays it is
/// dropped: the next one has the mode that one leaves.
fn keep_choice(session: &Mutex<Session>, turn: &QueueTicket, name: &str) {
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    if session.leaves_a_choice()
        && turn.wait_soon()
        && let Err(why) = session.keep_choice()
    {
        log::error!("{name}: {why}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_is_silent_for_longest_gives_way() {
        let clients = Clients { stop: EventFd::new().unwrap(), left: EventFd::new().unwrap(), list: Mutex::default() };
        let long = |seconds| Instant::now().checked_sub(SILENCE + Duration::from_secs(seconds)).unwrap();
        let client = |number, since, spoken| {
            let (stream, far) = UnixStream::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            assert!(clients.enter(ConnectedClient { number, stream, since, spoken, rings: Arc::default() }));
            far
        };
        let ends = |mut far: &UnixStream| io::Read::read(&mut far, &mut [0]).is_ok();
        let ears = [client(0, long(9), true), client(1, Instant::now(), false)];
        assert!(!clients.disconnect_silent(), "they have spoken, or just come");
        let silent = [client(2, long(1), false), client(3, long(5), false)];
        assert!(clients.disconnect_silent());
        assert!(ends(&silent[1]) && !ends(&silent[0]));
        clients.leave(3, None);
        clients.has_spoken(2);
        assert!(!clients.disconnect_silent());
        assert!(!ears.iter().chain(&silent[..1]).any(ends));
        // When all have to go they do, and nobody comes any more.
        clients.disconnect_all();
        assert!(ears.iter().chain(&silent).all(ends));
        let (stream, _far) = UnixStream::pair().unwrap();
        assert!(!clients.enter(ConnectedClient {
            number: 4,
            stream,
            since: Instant::now(),
            spoken: false,
            rings: Arc::default()
        }));
    }
}
