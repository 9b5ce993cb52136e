//! The socket of an export: bound by us, or inherited.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::config::{ExportSettings, Listen};
use crate::service_manager::Handed;

/// Where an export's front-ends come from. A socket file that we made is removed on drop.
#[derive(Debug)]
pub enum Listener {
    /// Front-ends connect one after the other. Non-blocking. The file goes first: it is ours as long as we listen.
    Listening(Option<BoundPath>, UnixListener),
    /// The one front-end was connected by our parent; there will be no other.
    Connected(UnixStream),
}

impl Listener {
    /// Opens the socket. The error is one line.
    pub fn open(listen: &Listen) -> Result<Listener, String> {
        match listen {
            Listen::Path(path) => bind(path),
            Listen::Fd(number) => inherited(*number),
        }
    }
}

/// The sockets of exports, in their order: those that the service manager hands over, and ours. The error is one line; it is one
/// if something is handed over that no export wants.
pub fn open_all(exports: &[ExportSettings], mut handed: Vec<Handed>) -> Result<Vec<Listener>, String> {
    let mut listeners = Vec::new();
    for export in exports {
        let is_wanted = |handed: &Handed| match &export.listen {
            Listen::Path(path) => handed.is_at(path),
            Listen::Fd(number) => handed.number == *number,
        };
        listeners.push(match handed.iter().position(is_wanted) {
            Some(at) => {
                let Handed { path, listener, .. } = handed.swap_remove(at);
                let cannot = |error| format!("cannot use the service manager's socket {}: {error}", path.display());
                listener.set_nonblocking(true).map_err(cannot)?;
                log::info!("{}: the service manager hands its socket over", export.listen);
                // Its file is not ours to remove.
                Listener::Listening(None, listener)
            }
            None => Listener::open(&export.listen)?,
        });
    }
    match handed.first() {
        None => Ok(listeners),
        Some(Handed { name, path, .. }) => Err(format!(
            "the service manager hands over the socket {} ({name}), and no export is left that has it as socket-path; \
             change its ListenStream= or the export",
            path.display()
        )),
    }
}

/// A socket file, removed on drop if it is still the one we made.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        // Another process may have put its own socket there since.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn bind(path: &Path) -> Result<Listener, String> {
    let name = path.display();
    let cannot = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("cannot listen on {name}: its directory does not exist; create it first"),
        io::ErrorKind::PermissionDenied => {
            format!("cannot listen on {name}: no permission to read and write its directory")
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            format!("cannot listen on {name}: {error}; a systemd unit has to name its directory in ReadWritePaths=")
        }
        // The name in a socket address has at most 107 bytes.
        io::ErrorKind::InvalidInput => format!("cannot listen on {name}: {error}; use a shorter path"),
        _ => format!("cannot listen on {name}: {error}"),
    };
    // Until this is dropped no other target looks at, removes or makes a socket here: of two that start at the same moment
    // on one path, the second one finds the first one listening.
    let _lock = lock_directory(path, LOCK_DEADLINE).map_err(cannot)?;
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path).map_err(cannot)?
        }
        bound => bound.map_err(cannot)?,
    };
    let made = std::fs::symlink_metadata(path).map_err(cannot)?;
    let bound = BoundPath { path: path.into(), device: made.dev(), inode: made.ino() };
    listener.set_nonblocking(true).map_err(cannot)?;
    Ok(Listener::Listening(Some(bound), listener))
}

/// How long another target may take to make its socket in the same directory.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Locks the directory of `path`. The directory itself takes the lock, so that no file is left behind; the kernel releases it
/// with the process, however that ends.
fn lock_directory(path: &Path, deadline: Duration) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory)?;
    let end = Instant::now() + deadline;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::other(
                    "another process keeps its directory locked; try again, or use another one",
                ));
            }
        }
    }
}

/// Removes a socket file that nobody listens on any more, and nothing else.
fn remove_stale(path: &Path) -> Result<(), String> {
    let name = path.display();
    let kind = match std::fs::symlink_metadata(path) {
        // Its owner has just removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        kind => kind.map_err(|error| format!("cannot look at {name}: {error}"))?,
    };
    if !kind.file_type().is_socket() {
        return Err(format!("cannot listen on {name}: a file that is no socket is there; choose another path"));
    }
    match is_listened_on(path) {
        Ok(true) => {
            Err(format!("cannot listen on {name}: another process does already; stop it or choose another path"))
        }
        Ok(false) => {
            log::info!("removing the stale socket {name}: nobody listens on it");
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(format!("cannot remove the stale socket {name}: {error}"))
                }
                _ => Ok(()),
            }
        }
        Err(error) => Err(format!(
            "cannot listen on {name}: whether another process listens there cannot be told: {error}; choose another path"
        )),
    }
}

/// Whether somebody listens on a socket, however busy.
fn is_listened_on(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        // Its queue of front-ends is full.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn inherited(number: i32) -> Result<Listener, String> {
    let wrong = |error: io::Error| {
        format!("--fd {number} cannot be used: {error}; pass the number of an open UNIX stream socket")
    };
    let socket = own(number).map_err(wrong)?;
    let domain = rustix::net::sockopt::socket_domain(&socket).map_err(|error| wrong(error.into()))?;
    let kind = rustix::net::sockopt::socket_type(&socket).map_err(|error| wrong(error.into()))?;
    if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
        return Err(wrong(io::Error::other("it is another kind of socket")));
    }
    if rustix::net::sockopt::socket_acceptconn(&socket).map_err(|error| wrong(error.into()))? {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(wrong)?;
        Ok(Listener::Listening(None, listener))
    } else {
        Ok(Listener::Connected(UnixStream::from(socket)))
    }
}

/// A duplicate of a descriptor known by its number only. It goes through a socket pair: the kernel checks the number, and
/// what comes out is ours beyond doubt, which no conversion of a bare number could promise.
fn own(number: i32) -> io::Result<OwnedFd> {
    let (near, far) = UnixStream::pair()?;
    near.send_with_fd(&[0u8][..], number)?;
    match far.recv_with_fd(&mut [0u8])? {
        (1, Some(file)) => Ok(file.into()),
        _ => Err(io::Error::other("the descriptor did not arrive")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn at(path: &Path) -> Listen {
        Listen::Path(path.into())
    }

    #[test]
    fn the_socket_file_goes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::open(&at(&path)).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file");
        let _listener = Listener::open(&at(&path)).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_in_use_is_refused_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _first = Listener::open(&at(&path)).unwrap();
        let name = path.display();
        assert_eq!(
            Listener::open(&at(&path)).unwrap_err(),
            format!("cannot listen on {name}: another process does already; stop it or choose another path")
        );
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_too_busy_to_answer_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = || rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let (busy, address) = (socket(), SocketAddrUnix::new(&path).unwrap());
        rustix::net::bind(&busy, &address).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let front = socket();
            if rustix::net::connect(&front, &address) == Err(Errno::AGAIN) {
                break;
            }
            waiting.push(front);
        }
        let (result, end) = std::sync::mpsc::channel();
        let listen = at(&path);
        std::thread::spawn(move || result.send(Listener::open(&listen).err()));
        let error = end.recv_timeout(Duration::from_secs(10)).expect("it waits for the busy one");
        assert!(error.is_some_and(|error| error.contains("another process does already")));
        assert!(path.exists());
    }

    #[test]
    fn a_socket_of_another_kind_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        let error = Listener::open(&at(&path)).unwrap_err();
        assert!(error.contains("cannot be told") && error.contains("another path"), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn a_directory_locked_for_ever_does_not_hang_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let held = lock_directory(&path, Duration::ZERO).unwrap();
        let error = lock_directory(&path, Duration::from_millis(20)).unwrap_err().to_string();
        assert!(error.contains("locked"), "{error}");
        drop(held);
        lock_directory(&path, Duration::ZERO).unwrap();
    }

    /// Connects to `path`; is it this listener that answers?
    fn answers(path: &Path, listener: &UnixListener) -> bool {
        use std::io::{Read, Write};
        static TOKENS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let token = TOKENS.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_ne_bytes();
        let Ok(mut front) = UnixStream::connect(path) else { return false };
        front.write_all(&token).unwrap();
        // Those who looked whether the socket is in use come first, and have nothing to say.
        while let Ok((mut stream, _)) = listener.accept() {
            let mut bytes = [0; 8];
            stream.set_nonblocking(true).unwrap();
            if stream.read(&mut bytes).is_ok_and(|length| length == 8) && bytes == token {
                return true;
            }
        }
        false
    }

    /// Runs `turn` on two threads, as many times; both begin each turn at the same moment.
    fn two_at_once(turns: u32, turn: impl Fn(u32, u32) + Sync) {
        use std::sync::atomic::{AtomicU32, Ordering};
        let arrived = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (turn, arrived) = (&turn, &arrived);
                scope.spawn(move || {
                    for number in 0..turns {
                        arrived.fetch_add(1, Ordering::AcqRel);
                        let deadline = Instant::now() + Duration::from_secs(20);
                        while arrived.load(Ordering::Acquire) < (number + 1) * 2 {
                            assert!(Instant::now() < deadline, "the other thread does not come");
                            std::thread::yield_now();
                        }
                        turn(number, thread);
                    }
                });
            }
        });
    }

    #[test]
    fn of_two_that_start_at_once_one_wins() {
        const TURNS: u32 = 2000;
        let directory = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..TURNS).map(|turn| directory.path().join(turn.to_string())).collect();
        // Half of them find a stale socket.
        paths.iter().step_by(2).for_each(|path| drop(UnixListener::bind(path).unwrap()));
        let results = std::sync::Mutex::new(vec![Vec::new(); TURNS as usize]);
        let listeners = std::sync::Mutex::new(Vec::new());
        two_at_once(TURNS, |turn, _| {
            let result = Listener::open(&at(&paths[turn as usize]));
            results.lock().unwrap()[turn as usize].push(result.as_ref().err().cloned());
            let mut listeners = listeners.lock().unwrap();
            // Those of the last turns go on listening.
            let enough = listeners.len().saturating_sub(64);
            listeners.drain(..enough);
            listeners.extend(result);
        });
        for (turn, results) in results.into_inner().unwrap().iter().enumerate() {
            let refused: Vec<&String> = results.iter().flatten().collect();
            assert_eq!((results.len(), refused.len()), (2, 1), "turn {turn}: {results:?}");
            assert!(refused[0].contains("another process does already"), "{refused:?}");
        }
    }

    /// Targets that start, end and die on one path: whoever was told that it listens is reached as long as it lives.
    #[test]
    fn nobody_removes_the_socket_of_one_that_lives() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(std::process::id);
        println!("seed {seed}");
        two_at_once(2000, |turn, thread| {
            let random = (seed ^ (turn * 2 + thread)).wrapping_mul(0x9e37_79b9) >> 16;
            let (bound, socket) = match Listener::open(&at(&path)) {
                Ok(Listener::Listening(bound, socket)) => (bound, socket),
                Ok(other) => panic!("{other:?}"),
                Err(error) => return assert!(error.contains("another process does already"), "{error}"),
            };
            for look in 0..1 + random % 4 {
                assert!(answers(&path, &socket), "seed {seed}, turn {turn}, look {look}: another one answers");
            }
            match random & 16 {
                // Killed: the file stays.
                0 => std::mem::forget(bound),
                _ => drop(bound),
            }
            drop(socket);
        });
    }

    #[test]
    fn another_file_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        let name = path.display();
        assert_eq!(
            Listener::open(&at(&path)).unwrap_err(),
            format!("cannot listen on {name}: a file that is no socket is there; choose another path")
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn someone_elses_socket_is_not_removed_on_drop() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let ours = Listener::open(&at(&path)).unwrap();
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn directories_that_are_not_there_and_long_paths() {
        assert_eq!(
            Listener::open(&at(Path::new("/nowhere/s"))).unwrap_err(),
            "cannot listen on /nowhere/s: its directory does not exist; create it first"
        );
        let long = format!("/tmp/{}", "x".repeat(200));
        let error = Listener::open(&at(Path::new(&long))).unwrap_err();
        assert!(error.ends_with("use a shorter path"), "{error}");
    }

    #[test]
    fn inherited_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(directory.path().join("s")).unwrap();
        assert!(matches!(Listener::open(&Listen::Fd(listening.as_raw_fd())), Ok(Listener::Listening(None, _))));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(Listener::open(&Listen::Fd(one.as_raw_fd())), Ok(Listener::Connected(_))));

        let error = Listener::open(&Listen::Fd(9999)).unwrap_err();
        assert!(error.starts_with("--fd 9999 cannot be used: ") && error.contains("Bad file descriptor"), "{error}");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Listener::open(&Listen::Fd(file.as_raw_fd())).is_err());
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(Listener::open(&Listen::Fd(datagram.as_raw_fd())).is_err());
    }
}
