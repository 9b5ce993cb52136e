//! The socket of a disk: bound by us, handed over by a service manager, or inherited.
//!
//! This module owns the socket file: it is made under a lock of its directory, removed with the socket, and made again when somebody
//! removes it. A file that is not our socket is never removed, and neither is a socket on which another process listens.

mod error;
mod handed;
mod listen;
mod served;

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub use error::ListenError;
pub use handed::Handed;
pub use listen::Listen;
pub use served::ServedSocket;

/// Where an export's front-ends come from. A socket file that we made is removed on drop.
#[derive(Debug)]
pub enum Listener {
    /// Front-ends connect one after the other. Non-blocking. The file goes first: it is ours as long as we listen.
    Listening(Option<BoundPath>, UnixListener),
    /// The one front-end was connected by our parent; there will be no other.
    Connected(UnixStream),
}

impl Listener {
    /// Opens the socket. One on which another process listens is waited for, as that may be going: killed, it is there for as
    /// long as the kernel needs to take its memory back.
    pub fn open(listen: &Listen) -> Result<Listener, ListenError> {
        Listener::open_by(listen, Instant::now() + PATIENCE)
    }

    /// Opens the socket without waiting for anybody: one on which another process listens is an error at once.
    pub fn open_now(listen: &Listen) -> Result<Listener, ListenError> {
        Listener::open_by(listen, Instant::now())
    }

    fn open_by(listen: &Listen, deadline: Instant) -> Result<Listener, ListenError> {
        match listen {
            Listen::Path(path) => bind_by(path, deadline),
            Listen::Fd(number) => inherited(*number),
        }
    }
}

/// How long a process that listens where we want to is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// The sockets of exports.
pub struct Sockets {
    /// In the order asked for; or why there is none.
    pub listeners: Vec<Result<Listener, ListenError>>,
    /// What the service manager hands over and no export wants.
    pub unwanted: Vec<Handed>,
}

/// Opens the sockets of exports: those that the service manager hands over, and ours. A process that is going is waited for
/// if there is nothing to serve without it.
pub fn open_all(places: &[&Listen], mut handed: Vec<Handed>) -> Sockets {
    let mut open = |listen: &&Listen| {
        let is_wanted = |handed: &Handed| match listen {
            Listen::Path(path) => handed.is_at(path),
            Listen::Fd(number) => handed.number == *number,
        };
        let Some(at) = handed.iter().position(is_wanted) else { return Listener::open_now(listen) };
        let Handed { path, listener, .. } = handed.swap_remove(at);
        listener.set_nonblocking(true).map_err(|source| ListenError::HandedOver { path, source })?;
        log::info!("{listen}: the service manager hands its socket over");
        // Its file is not ours to remove.
        Ok(Listener::Listening(None, listener))
    };
    let mut listeners: Vec<_> = places.iter().map(&mut open).collect();
    if listeners.iter().all(Result::is_err) {
        let deadline = Instant::now() + PATIENCE;
        for (listener, listen) in listeners.iter_mut().zip(places) {
            *listener = Listener::open_by(listen, deadline);
        }
    }
    Sockets { listeners, unwanted: handed }
}

/// A file of ours, a socket or a lock, removed on drop if its path still leads to it.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl BoundPath {
    /// The file that is at `path` now.
    fn at(path: &Path) -> io::Result<BoundPath> {
        Ok(BoundPath::of(path, &std::fs::symlink_metadata(path)?))
    }

    /// A file that was at `path` when it was opened.
    pub fn of(path: &Path, file: &Metadata) -> BoundPath {
        BoundPath { path: path.into(), device: file.dev(), inode: file.ino() }
    }

    /// Leaves the file alone.
    pub fn forget(self) {
        // A drop would free the path, too, which is not worth a state of its own.
        std::mem::forget(self);
    }

    /// Whether the file is still there. As long as it is open, no other file can have its number.
    pub fn is_there(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode))
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        // Another process may have put its own socket there since.
        if self.is_there() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn bind_by(path: &Path, deadline: Instant) -> Result<Listener, ListenError> {
    let mut told = false;
    loop {
        match bind(path, LOCK_DEADLINE) {
            Ok((bound, listener)) => return Ok(Listener::Listening(Some(bound), listener)),
            // The directory is not locked meanwhile.
            Err(error @ ListenError::InUse { .. }) if Instant::now() < deadline => {
                if !std::mem::replace(&mut told, true) {
                    log::info!("{error}; it may be ending: waiting for {PATIENCE:?} at most");
                }
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Makes a socket whose file has these permissions, in place of a stale one if need be; it does not block.
///
/// # Errors
/// Another process listens there, or it cannot be made.
pub fn bind_with_mode(path: &Path, mode: u32) -> Result<(BoundPath, UnixListener), ListenError> {
    bind_by_means_of(path, LOCK_DEADLINE, || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the socket's mode, without what umask forbids: nobody connects before it is as it should be.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(mode))?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(UnixListener::from(socket))
    })
}

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Makes the socket, in place of a stale one if need be.
fn bind(path: &Path, lock_deadline: Duration) -> Result<(BoundPath, UnixListener), ListenError> {
    bind_by_means_of(path, lock_deadline, || UnixListener::bind(path))
}

fn bind_by_means_of(
    path: &Path,
    lock_deadline: Duration,
    make: impl Fn() -> io::Result<UnixListener>,
) -> Result<(BoundPath, UnixListener), ListenError> {
    let cannot = |error| ListenError::bind(path.to_owned(), error);
    // Until this is dropped no other target looks at, removes or makes a socket here: of two that start at the same moment
    // on one path, the second one finds the first one listening.
    let _lock = lock_directory(path, lock_deadline)?;
    let listener = match make() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            make().map_err(cannot)?
        }
        bound => bound.map_err(cannot)?,
    };
    let bound = BoundPath::at(path).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    Ok((bound, listener))
}

/// How long another target may take to make its socket in the same directory.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Locks the directory of `path`. The directory itself takes the lock, so that no file is left behind; the kernel releases it
/// with the process, however that ends.
fn lock_directory(path: &Path, deadline: Duration) -> Result<File, ListenError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let cannot = |error| ListenError::bind(path.to_owned(), error);
    let directory = File::open(directory).map_err(cannot)?;
    let end = Instant::now() + deadline;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
            Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Err(TryLockError::WouldBlock) => return Err(ListenError::DirectoryLocked { path: path.to_owned() }),
        }
    }
}

/// Removes a socket file that nobody listens on any more, and nothing else.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let owned = || path.to_owned();
    let kind = match std::fs::symlink_metadata(path) {
        // Its owner has just removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        kind => kind.map_err(|source| ListenError::Look { path: owned(), source })?,
    };
    if !kind.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: owned() });
    }
    match is_listened_on(path) {
        Ok(true) => Err(ListenError::InUse { path: owned() }),
        Ok(false) => {
            log::info!("removing the stale socket {}: nobody listens on it", path.display());
            match std::fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(ListenError::Stale { path: owned(), source })
                }
                _ => Ok(()),
            }
        }
        Err(source) => Err(ListenError::Unknown { path: owned(), source }),
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

fn inherited(number: i32) -> Result<Listener, ListenError> {
    let wrong = |source: io::Error| ListenError::Inherited { number, source };
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
mod tests;
