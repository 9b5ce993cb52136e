//! The socket of an export: bound by us, or inherited.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::config::Listen;

/// Where an export's front-ends come from. A socket file that we made is removed on drop.
#[derive(Debug)]
pub enum Listener {
    /// Front-ends connect one after the other. Non-blocking.
    Listening(UnixListener, Option<BoundPath>),
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
        io::ErrorKind::PermissionDenied => format!("cannot listen on {name}: no permission to write its directory"),
        // The name in a socket address has at most 107 bytes.
        io::ErrorKind::InvalidInput => format!("cannot listen on {name}: {error}; use a shorter path"),
        _ => format!("cannot listen on {name}: {error}"),
    };
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
    Ok(Listener::Listening(listener, Some(bound)))
}

/// Removes a socket file that nobody listens on any more, and nothing else.
fn remove_stale(path: &Path) -> Result<(), String> {
    let name = path.display();
    let kind = std::fs::symlink_metadata(path).map_err(|error| format!("cannot look at {name}: {error}"))?;
    if !kind.file_type().is_socket() {
        return Err(format!("cannot listen on {name}: a file that is no socket is there; choose another path"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(format!("cannot listen on {name}: another process does already; stop it or choose another path")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!("removing the stale socket {name}: nobody listens on it");
            std::fs::remove_file(path).map_err(|error| format!("cannot remove the stale socket {name}: {error}"))
        }
        Err(error) => Err(format!("cannot listen on {name}: the socket that is there does not answer: {error}")),
    }
}

fn inherited(number: i32) -> Result<Listener, String> {
    let wrong = |error: io::Error| {
        format!("--fd {number} cannot be used: {error}; pass the number of an open UNIX stream socket")
    };
    let socket = own(number).map_err(wrong)?;
    let domain = rustix::net::sockopt::socket_domain(&socket).map_err(|error| wrong(error.into()))?;
    let kind = rustix::net::sockopt::socket_type(&socket).map_err(|error| wrong(error.into()))?;
    if domain != rustix::net::AddressFamily::UNIX || kind != rustix::net::SocketType::STREAM {
        return Err(wrong(io::Error::other("it is another kind of socket")));
    }
    if rustix::net::sockopt::socket_acceptconn(&socket).map_err(|error| wrong(error.into()))? {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(wrong)?;
        Ok(Listener::Listening(listener, None))
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

/// Whether a file is an eventfd. A worker writes to what the front-end sends: anything else could block it.
pub fn is_eventfd(file: &impl AsFd) -> bool {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
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
        assert!(matches!(Listener::open(&Listen::Fd(listening.as_raw_fd())), Ok(Listener::Listening(_, None))));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(Listener::open(&Listen::Fd(one.as_raw_fd())), Ok(Listener::Connected(_))));

        let error = Listener::open(&Listen::Fd(9999)).unwrap_err();
        assert!(error.starts_with("--fd 9999 cannot be used: ") && error.contains("Bad file descriptor"), "{error}");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Listener::open(&Listen::Fd(file.as_raw_fd())).is_err());
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(Listener::open(&Listen::Fd(datagram.as_raw_fd())).is_err());
    }

    #[test]
    fn eventfds_are_recognised() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        assert!(is_eventfd(&event));
        let (pipe, _write) = std::io::pipe().unwrap();
        assert!(!is_eventfd(&pipe));
        assert!(!is_eventfd(&std::fs::File::open("/dev/null").unwrap()));
    }
}
