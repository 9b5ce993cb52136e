//! A guard around `vfio_user::Client`, whose calls may block for ever or panic.
//!
//! The client lives on a thread of its own. A caller hands it a request and waits for the answer with a deadline. After
//! a missed deadline, a lost socket or a panic nothing more is sent: what would come next on the socket is unknown. The
//! socket is shut down then, which ends the thread. One thread nothing can end: that which waits for a server to take its
//! connection, as there is no connected socket yet. There is at most one for each server.

use std::any::Any;
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use vfio_user::Client;

use super::socket::ClientSocket;
use crate::Error;

type Request = Box<dyn FnOnce(&mut Client, &State) + Send>;

/// A connection to a vfio-user server.
pub(crate) struct Connection {
    socket: PathBuf,
    deadline: Duration,
    requests: mpsc::Sender<Request>,
    state: Arc<State>,
    /// `None` if it could not be told from others. A thread that waits in it then stays until the server ends.
    client: Option<ClientSocket>,
}

/// What the callers and the thread share.
#[derive(Default)]
struct State {
    /// Why nothing can be sent any more.
    broken: Mutex<Option<String>>,
}

impl State {
    fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the reason, unless there is one already: the first one explains the others.
    fn break_down(&self, reason: String) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
    }
}

/// Attempts to connect that were given up, by socket. Each is alive as long as its thread waits.
static WAITING: LazyLock<Mutex<HashMap<PathBuf, Weak<()>>>> = LazyLock::new(Mutex::default);

/// How long a thread whose socket was shut down may take to say so.
const LAST_WORDS: Duration = Duration::from_millis(100);

fn waiting() -> MutexGuard<'static, HashMap<PathBuf, Weak<()>>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Connects and negotiates.
    pub fn open(socket: &Path, deadline: Duration) -> Result<Connection, Error> {
        let refused = |reason| Error::Connect { socket: socket.to_owned(), reason };
        if waiting().get(socket).is_some_and(|attempt| attempt.strong_count() > 0) {
            return Err(refused("it takes no connections: an earlier attempt still waits for it".into()));
        }
        let attempt = Arc::new(());
        let given_up = Arc::downgrade(&attempt);
        let (requests, incoming) = mpsc::channel::<Request>();
        let (opened, result) = mpsc::sync_channel(1);
        let state = Arc::new(State::default());
        let (path, thread_state) = (socket.to_owned(), state.clone());
        thread::Builder::new()
            .name("vfio-user".into())
            .spawn(move || {
                let client = catch_unwind(|| Client::new(&path)).map_err(|panic| panic_text(&*panic));
                drop(attempt);
                match client {
                    Ok(Ok(client)) => {
                        if opened.send(Ok(())).is_ok() {
                            serve(client, incoming, &thread_state);
                        }
                    }
                    Ok(Err(error)) => _ = opened.send(Err(error.to_string())),
                    Err(panic) => _ = opened.send(Err(format!("its reply made no sense ({panic})"))),
                }
            })
            .map_err(|error| refused(format!("no thread can be started: {error}")))?;
        match result.recv_timeout(deadline) {
            Ok(Ok(())) => {
                let client = ClientSocket::find(socket);
                Ok(Connection { socket: socket.to_owned(), deadline, requests, state, client })
            }
            Ok(Err(reason)) => Err(refused(reason)),
            Err(RecvTimeoutError::Disconnected) => Err(refused("its thread has ended".into())),
            Err(RecvTimeoutError::Timeout) => {
                ClientSocket::find(socket).iter().for_each(ClientSocket::shut_down);
                // That ends the thread, unless it has no connected socket yet.
                if let Err(RecvTimeoutError::Timeout) = result.recv_timeout(LAST_WORDS) {
                    waiting().insert(socket.to_owned(), given_up);
                }
                let waited = deadline.as_millis();
                Err(refused(format!("it did not answer within {waited} ms, perhaps as it serves another client")))
            }
        }
    }

    /// Has `ask` run on the connection's thread and waits for its answer.
    pub fn call<T: Send + 'static>(
        &self,
        request: &'static str,
        ask: impl FnOnce(&mut Client) -> Result<T, vfio_user::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let disconnected = |reason| Error::Disconnected { socket: self.socket.clone(), request, reason };
        if let Some(reason) = self.state.broken() {
            return Err(disconnected(reason));
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let job: Request = Box::new(move |client, state| {
            match catch_unwind(AssertUnwindSafe(|| ask(client))) {
                Ok(answer) => _ = reply.send(answer),
                // Noted before `reply` is dropped, which is what the caller sees.
                Err(panic) => state.break_down(format!("a reply made no sense ({})", panic_text(&*panic))),
            }
        });
        if self.requests.send(job).is_err() {
            return Err(disconnected(self.state.broken().unwrap_or_else(|| "its thread has ended".into())));
        }
        match answer.recv_timeout(self.deadline) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) if loses_the_stream(&error) => {
                let reason = error.to_string();
                self.state.break_down(format!("the connection was lost ({reason})"));
                Err(disconnected(reason))
            }
            Ok(Err(error)) => Err(Error::Server { socket: self.socket.clone(), request, reason: error.to_string() }),
            Err(RecvTimeoutError::Timeout) => {
                self.state.break_down(format!("'{request}' was not answered in time"));
                self.client.iter().for_each(ClientSocket::shut_down);
                Err(Error::Timeout { socket: self.socket.clone(), request, after: self.deadline })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(disconnected(self.state.broken().unwrap_or_else(|| "its thread has ended".into())))
            }
        }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The client's socket, to see its end by, if it is known.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.client.as_ref().map(ClientSocket::stream)
    }

    /// Whether nothing can be sent any more.
    pub fn is_broken(&self) -> bool {
        self.state.broken().is_some()
    }
}

/// Runs requests until the [`Connection`] is dropped, or broken when a request comes.
fn serve(mut client: Client, incoming: mpsc::Receiver<Request>, state: &State) {
    while let Ok(request) = incoming.recv() {
        // A request whose caller has given up must not be sent after all.
        if state.broken().is_some() {
            break;
        }
        request(&mut client, state);
    }
    // Nobody listens if this fails.
    let _ = client.shutdown();
}

/// Whether an error leaves the position in the stream of replies unknown.
fn loses_the_stream(error: &vfio_user::Error) -> bool {
    use vfio_user::Error::*;
    matches!(error, StreamWrite(_) | StreamRead(_) | SendWithFd(_) | ReceiveWithFd(_))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no reason given").lines().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A connection to a server that negotiates, has no regions, and says no more.
    fn connection(deadline: Duration) -> (tempfile::TempDir, Connection, thread::JoinHandle<()>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut message = [0; 1024];
            let version = b"\0\0\x01\0{\"capabilities\":{}}\0";
            let info = [16u32, 2, 0, 0].map(u32::to_ne_bytes).concat();
            for payload in [&version[..], &info] {
                assert!(stream.read(&mut message).unwrap() >= 16);
                let size = (16 + payload.len() as u32).to_ne_bytes();
                stream.write_all(&[&message[..4], &size, &1u32.to_ne_bytes(), &[0; 4], payload].concat()).unwrap();
            }
            while stream.read(&mut message).expect("the client leaves in time") > 0 {}
        });
        let connection = Connection::open(&path, deadline).unwrap();
        (directory, connection, server)
    }

    #[test]
    fn a_panic_ends_the_connection_and_is_told() {
        let (_directory, connection, server) = connection(Duration::from_secs(10));
        let error = connection.call::<()>("test", |_| std::panic::resume_unwind(Box::new("odd reply"))).unwrap_err();
        assert!(error.to_string().contains("odd reply"), "{error}");
        let error = connection.call("another test", |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("odd reply") && connection.is_broken(), "{error}");
        drop(connection);
        server.join().unwrap();
    }

    #[test]
    fn what_waits_behind_a_stuck_request_is_not_sent() {
        let (_directory, connection, server) = connection(Duration::from_millis(300));
        let (running, told) = mpsc::channel();
        let ran = Arc::new(AtomicBool::new(false));
        thread::scope(|scope| {
            let stuck = scope.spawn(|| {
                connection.call("stuck", move |client| {
                    running.send(()).unwrap();
                    client.reset()
                })
            });
            told.recv_timeout(Duration::from_secs(10)).unwrap();
            let mark = ran.clone();
            let behind = connection.call("behind", move |_| {
                mark.store(true, Ordering::Relaxed);
                Ok(())
            });
            assert!(behind.is_err() && stuck.join().unwrap().is_err());
        });
        drop(connection);
        server.join().unwrap();
        assert!(!ran.load(Ordering::Relaxed), "its caller was told that it failed");
    }

    #[test]
    fn an_error_that_keeps_the_stream_keeps_the_connection() {
        let (_directory, connection, server) = connection(Duration::from_secs(10));
        let error = connection.call::<()>("test", |_| Err(vfio_user::Error::InvalidInput)).unwrap_err();
        assert!(matches!(error, Error::Server { request: "test", .. }), "{error}");
        assert_eq!(connection.call("test", |_| Ok(5)).unwrap(), 5);
        let lost = || vfio_user::Error::StreamRead(std::io::ErrorKind::UnexpectedEof.into());
        assert!(matches!(connection.call::<()>("test", move |_| Err(lost())), Err(Error::Disconnected { .. })));
        assert!(connection.is_broken());
        drop(connection);
        server.join().unwrap();
    }
}
