//! Finding the socket that a `vfio_user::Client` has opened.
//!
//! The client keeps its socket to itself, and a thread that waits in it for an answer can only be freed by shutting the
//! socket down. So the socket is looked for among this process's descriptors, by the name of its other end.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// The sockets that belong to a connection already, by the kernel's name for them ("socket:[inode]").
static TAKEN: LazyLock<Mutex<HashSet<Vec<u8>>>> = LazyLock::new(Mutex::default);

fn taken() -> MutexGuard<'static, HashSet<Vec<u8>>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client's socket, to shut it down from outside.
pub(super) struct ClientSocket {
    name: Vec<u8>,
    stream: UnixStream,
}

impl ClientSocket {
    /// The socket connected to `server` that no other connection has taken; `None` if there is none or several: then it
    /// is not known whose they are.
    pub fn find(server: &Path) -> Option<ClientSocket> {
        let mut taken = taken();
        // By name, as several descriptors may be the same socket.
        let mut found = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fd").ok()?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let name = target.as_os_str().as_bytes();
            if !name.starts_with(b"socket:") || taken.contains(name) || found.contains_key(name) {
                continue;
            }
            let Some(number) = entry.file_name().to_str().and_then(|number| number.parse().ok()) else { continue };
            let Ok(stream) = duplicate(number) else { continue };
            if stream.peer_addr().is_ok_and(|peer| peer.as_pathname().is_some_and(|path| same(path, server))) {
                found.insert(name.to_owned(), stream);
            }
        }
        if found.len() > 1 {
            log::debug!("{} sockets are connected to {}", found.len(), server.display());
            return None;
        }
        let (name, stream) = found.pop_first()?;
        taken.insert(name.clone());
        Some(ClientSocket { name, stream })
    }

    /// The socket; it is the client's own, so that nothing may be read from it.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Ends the connection, and every wait for the other end.
    pub fn shut_down(&self) {
        // It fails if the other end was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for ClientSocket {
    fn drop(&mut self) {
        taken().remove(&self.name);
    }
}

/// A second descriptor of the socket `number`. If it is something else meanwhile, asking for its peer will fail.
fn duplicate(number: RawFd) -> io::Result<UnixStream> {
    // SAFETY: the call takes no pointers; a number that is no open descriptor gives an error.
    let duplicate = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    Ok(unsafe { UnixStream::from_raw_fd(duplicate) })
}

/// Whether two paths lead to the same socket. A server may have bound it by another name than the client's.
fn same(bound: &Path, connected: &Path) -> bool {
    bound == connected
        || match (fs::canonicalize(bound), fs::canonicalize(connected)) {
            (Ok(bound), Ok(connected)) => bound == connected,
            _ => false,
        }
}
