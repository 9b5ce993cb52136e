//! A socket that a service manager has opened for a disk. Its file belongs to the service manager, and is never removed here.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A listening socket that was handed over.
#[derive(Debug)]
pub struct Handed {
    /// What its unit calls it (FileDescriptorName=).
    pub name: String,
    /// The number by which we were given it.
    pub number: i32,
    /// Where it listens.
    pub path: PathBuf,
    /// The socket.
    pub listener: UnixListener,
}

impl Handed {
    /// Whether it listens at this path, by whatever name.
    pub fn is_at(&self, path: &Path) -> bool {
        let same = |one: &Path, other: &Path| {
            one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|two| one == two))
        };
        self.path == path || same(&self.path, path)
    }
}
