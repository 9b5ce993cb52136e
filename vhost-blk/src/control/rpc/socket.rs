//! The control socket: one target has it, and its file lets owner and group in.
//!
//! `PATH.lock` is locked as SPDK locks it, so that neither two targets nor a target and SPDK share a socket. The kernel releases the
//! lock with the process, however that ends; a socket file that is left over is replaced.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use rustix::fs::{Mode, OFlags};

use super::error::RpcSocketError;
use crate::vhost_user::listener::{self, BoundPath};

/// Owner and group may connect.
const MODE: u32 = 0o660;
/// How long a process that has the lock is waited for: one that was killed has it until the kernel has taken its memory back.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried.
const LOOK: Duration = Duration::from_millis(100);

/// The socket, listening; nobody is answered yet. Its file is removed on drop.
pub struct RpcSocket {
    path: PathBuf,
    // In this order: as long as the file is there somebody listens, and as long as somebody listens it is locked.
    _file: BoundPath,
    listener: UnixListener,
    _lock: Lock,
}

impl RpcSocket {
    /// Makes the socket. One that another process has is waited for, as that may be going.
    ///
    /// # Errors
    /// Another target has it, or it cannot be made.
    pub fn bind(path: &Path) -> Result<RpcSocket, RpcSocketError> {
        RpcSocket::bind_by(path, Instant::now() + PATIENCE)
    }

    fn bind_by(path: &Path, deadline: Instant) -> Result<RpcSocket, RpcSocketError> {
        let lock = Lock::take(path, deadline)?;
        let (file, listener) = listener::bind_with_mode(path, MODE)?;
        Ok(RpcSocket { path: path.to_owned(), _file: file, listener, _lock: lock })
    }

    /// Where it is, for the log.
    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The socket; it does not block.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// The lock on a socket's path.
struct Lock {
    // In this order: while it is locked, nobody else takes the file for one to lock.
    path: BoundPath,
    file: File,
}

impl Lock {
    fn take(socket: &Path, deadline: Instant) -> Result<Lock, RpcSocketError> {
        let name = || socket.display().to_string();
        let cannot = |source: io::Error| RpcSocketError::Lock { path: name(), source };
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let mut told = false;
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| cannot(error.into()))?;
            let file = File::from(file);
            let lock = Lock { path: BoundPath::of(&path, &file.metadata().map_err(cannot)?), file };
            match lock.file.try_lock() {
                // Whoever had it may have removed the file just before: the lock of a file that is not there is worth nothing.
                Ok(()) if lock.path.is_there() => return Ok(lock),
                Ok(()) => {}
                Err(TryLockError::Error(error)) => {
                    lock.path.forget();
                    return Err(cannot(error));
                }
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    if !std::mem::replace(&mut told, true) {
                        log::info!(
                            "the control socket {} belongs to another process, which may be going: waiting for that, \
                             {PATIENCE:?} at most",
                            name()
                        );
                    }
                    // Not ours to remove.
                    lock.path.forget();
                    std::thread::sleep(LOOK);
                }
                Err(TryLockError::WouldBlock) => {
                    lock.path.forget();
                    return Err(RpcSocketError::Locked { path: name() });
                }
            }
        }
    }
}

/// Who is at the other end of a connection, as the kernel knows it from the moment of connecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer(Option<(u32, i32)>);

impl Peer {
    pub(super) fn of(stream: &UnixStream) -> Peer {
        Peer(getsockopt(stream, sockopt::PeerCredentials).ok().map(|peer| (peer.uid(), peer.pid())))
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            // It is in a PID namespace that this one does not see.
            Some((uid, 0)) => write!(f, "uid {uid}"),
            Some((uid, pid)) => write!(f, "uid {uid}, process {pid}"),
            None => f.write_str("an unknown user"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_target_has_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let lock = folder.path().join("rpc.sock.lock");
        let first = RpcSocket::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, MODE);
        let second = RpcSocket::bind_by(&path, Instant::now());
        assert!(matches!(second, Err(RpcSocketError::Locked { .. })));
        assert!(path.exists() && lock.exists(), "the second one leaves the first one's files alone");
        assert!(UnixStream::connect(&path).is_ok());
        drop(first);
        assert!(!path.exists() && !lock.exists());
        RpcSocket::bind_by(&path, Instant::now()).unwrap();
    }

    #[test]
    fn what_a_killed_target_has_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        drop(UnixListener::bind(&path).unwrap());
        std::fs::write(folder.path().join("rpc.sock.lock"), "").unwrap();
        let socket = RpcSocket::bind_by(&path, Instant::now()).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
    }

    #[test]
    fn what_belongs_to_others_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(RpcSocket::bind_by(&path, Instant::now()), Err(RpcSocketError::Listen(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        std::fs::remove_file(&path).unwrap();
        // A program that knows nothing of the lock.
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(RpcSocket::bind_by(&path, Instant::now()), Err(RpcSocketError::Listen(_))));
        // A link in place of the lock file is not followed.
        let target = folder.path().join("precious");
        std::os::unix::fs::symlink(&target, folder.path().join("other.lock")).unwrap();
        let error = RpcSocket::bind_by(&folder.path().join("other"), Instant::now()).err().unwrap();
        assert!(matches!(error, RpcSocketError::Lock { .. }), "{error}");
        assert!(!target.exists());
    }

    #[test]
    fn a_lock_that_is_given_up_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let first = RpcSocket::bind(&path).unwrap();
        let waiter = std::thread::spawn(move || RpcSocket::bind_by(&path, Instant::now() + Duration::from_secs(60)));
        drop(first);
        let second = waiter.join().unwrap().unwrap();
        assert!(UnixStream::connect(second.name()).is_ok());
    }

    #[test]
    fn the_peer_is_known() {
        let (one, _two) = UnixStream::pair().unwrap();
        let uid = rustix::process::getuid().as_raw();
        assert_eq!(Peer::of(&one).to_string(), format!("uid {uid}, process {}", std::process::id()));
        assert_eq!(Peer(Some((7, 0))).to_string(), "uid 7");
    }
}
