//! The socket of a disk while it is served. Its file may be removed, or another one put in its place: then a file of ours is made
//! again, and one of somebody else is left alone, with a line in the log.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::{BoundPath, bind};

/// A listening socket, and the file by which front-ends find it.
pub struct ServedSocket {
    /// Dropped before the socket, on which nobody else can take the file for a stale one.
    file: SocketFile,
    socket: UnixListener,
    /// What was told of a file that is not there.
    pub(super) told: Option<String>,
}

enum SocketFile {
    /// Made by us, and removed on drop.
    Ours(BoundPath),
    /// Made by whoever has handed the socket over, and theirs.
    Theirs(std::mem::ManuallyDrop<BoundPath>),
    Unknown,
}

/// How long another process may keep the directory locked; afterwards it is tried again.
const LOCK_DEADLINE: Duration = Duration::from_millis(20);

impl ServedSocket {
    /// `file`: if it was made by us.
    pub fn new(file: Option<BoundPath>, socket: UnixListener) -> ServedSocket {
        let theirs = || {
            let address = socket.local_addr().ok()?;
            // A path from another folder than ours names nothing, or something else.
            let path = address.as_pathname().filter(|path| path.is_absolute())?;
            BoundPath::at(path).ok().map(|file| SocketFile::Theirs(std::mem::ManuallyDrop::new(file)))
        };
        let file = file.map(SocketFile::Ours).or_else(theirs).unwrap_or(SocketFile::Unknown);
        ServedSocket { file, socket, told: None }
    }

    /// The socket.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Looks whether front-ends still find the socket by its file. If not, that is told, and a file of ours is made again,
    /// with a new socket. `name`: for the log.
    pub fn look_after(&mut self, name: &str) {
        let path = match &self.file {
            SocketFile::Ours(file) if !file.is_there() => &file.path,
            SocketFile::Theirs(file) if !file.is_there() => {
                return self.tell(format!(
                    "{name}: the socket file is gone, so that no front-end can connect; create it again, and restart \
                     this program (with systemd: restart its socket unit)"
                ));
            }
            _ => return self.told = None,
        };
        let what = if path.symlink_metadata().is_ok() { "replaced" } else { "removed" };
        match bind(path, LOCK_DEADLINE) {
            Ok((file, socket)) => {
                log::warn!("{name}: the socket file was {what}; it has been created again");
                // Not removed: it was not there, and its number may be the new one's when its socket is closed.
                if let SocketFile::Ours(old) = std::mem::replace(&mut self.file, SocketFile::Ours(file)) {
                    old.forget();
                }
                self.socket = socket;
                self.told = None;
            }
            Err(error) => self.tell(format!(
                "{name}: the socket file was {what}, so that no front-end can connect, and it cannot be created again: {error}; \
                 retrying every second"
            )),
        }
    }

    /// Tells the log, once.
    fn tell(&mut self, what: String) {
        if self.told.as_ref() != Some(&what) {
            log::error!("{what}");
            self.told = Some(what);
        }
    }
}
