//! What a service manager offers, as systemd defines it: sockets that it has opened for us (sd_listen_fds(3)), and an ear for
//! how we are (sd_notify(3)). Without one nothing happens here.
//!
//! Nothing depends on whether it listens: a service manager that does not read never keeps the program waiting.

use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use listenfd::ListenFd;
use thiserror::Error;

use crate::vhost_user::listener::Handed;

/// The service manager hands over something that cannot be used.
#[derive(Debug, Error)]
pub enum HandOverError {
    /// `LISTEN_FDS` is not what it has to be.
    #[error("LISTEN_FDS={count} is not a number of sockets up to {most}: unset it, or correct what sets it", most = MOST)]
    Count {
        /// What it is.
        count: String,
    },
    /// A socket is not as it has to be.
    #[error(
        "the socket {name} of the service manager cannot be used: {fault}; give it a ListenStream= with an export's socket-path"
    )]
    Socket {
        /// What its unit calls it.
        name: String,
        /// What is wrong with it.
        #[source]
        fault: SocketFault,
    },
}

/// What is wrong with a socket that the service manager hands over.
#[derive(Debug, Error)]
pub enum SocketFault {
    /// It is no UNIX stream socket, or cannot be asked.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It was taken already.
    #[error("it was used before")]
    UsedBefore,
    /// It does not listen.
    #[error("nobody can connect to it (Accept=no is needed in its unit)")]
    NotListening,
    /// It has an abstract name, or none.
    #[error("it has no path")]
    NoPath,
}

/// The sockets handed over, of which every one has to be of use. To be called once, while the program has one thread: the variables
/// that tell of them are removed from the environment.
///
/// # Errors
/// One of them is not a listening UNIX socket with a path.
pub fn sockets() -> Result<Vec<Handed>, HandOverError> {
    let count = std::env::var("LISTEN_FDS").unwrap_or_default();
    if !count.is_empty() && !count.parse().is_ok_and(|count: u16| count <= MOST) {
        return Err(HandOverError::Count { count });
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut sockets = ListenFd::from_env();
    (0..sockets.len())
        .map(|index| {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unnamed").to_owned();
            let listener = sockets.take_unix_listener(index).map_err(SocketFault::from);
            let listener = listener.and_then(|listener| listener.ok_or(SocketFault::UsedBefore));
            match listener.and_then(|listener| Ok((path_of(&listener)?, listener))) {
                Ok((path, listener)) => Ok(Handed { name, number: listener.as_raw_fd(), path, listener }),
                Err(fault) => Err(HandOverError::Socket { name, fault }),
            }
        })
        .collect()
}

/// Sockets that one program may be given; it listens on far fewer.
const MOST: u16 = 1024;

/// Where a socket listens.
fn path_of(listener: &UnixListener) -> Result<PathBuf, SocketFault> {
    if !rustix::net::sockopt::socket_acceptconn(listener).unwrap_or(false) {
        return Err(SocketFault::NotListening);
    }
    listener.local_addr()?.as_pathname().map(Path::to_owned).ok_or(SocketFault::NoPath)
}

/// Tells the service manager how we are: lines such as `READY=1`. Nothing depends on whether it hears.
pub fn notify(lines: &[&str]) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(socket.as_bytes(), &lines.join("\n")) {
        log::warn!("cannot notify the service manager of {lines:?}: {error} (NOTIFY_SOCKET is {})", socket.display());
    }
}

fn send(address: &[u8], message: &str) -> io::Result<()> {
    let address = match address {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    // Its queue may be full; it is not worth more.
    socket.set_write_timeout(Some(Duration::from_secs(1)))?;
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_reach_a_path_and_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("vhost-blk-test-{}", std::process::id());
        let ears = [
            (path.as_os_str().as_bytes().to_vec(), UnixDatagram::bind(&path).unwrap()),
            (
                format!("@{name}").into_bytes(),
                UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
            ),
        ];
        for (address, ear) in &ears {
            ear.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            send(address, "READY=1\nSTATUS=x").unwrap();
            let mut bytes = [0; 64];
            let length = ear.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"READY=1\nSTATUS=x");
        }
        assert!(send(b"/nowhere/notify", "READY=1").is_err());
    }

    #[test]
    fn a_service_manager_that_does_not_read_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let _ear = UnixDatagram::bind(&path).unwrap();
        let begin = std::time::Instant::now();
        // The kernel queues some of them.
        while send(path.as_os_str().as_bytes(), "WATCHDOG=1").is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(10), "its queue has no end");
        }
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_socket_is_known_by_its_path_whatever_that_is_called() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let name = "disk".to_owned();
        let socket = Handed { name, number: listener.as_raw_fd(), path: path_of(&listener).unwrap(), listener };
        let other = directory.path().join("other");
        std::os::unix::fs::symlink(directory.path(), &other).unwrap();
        assert!(socket.is_at(&path) && socket.is_at(&other.join("s")));
        assert!(!socket.is_at(&directory.path().join("t")) && !socket.is_at(directory.path()));
        let address = SocketAddr::from_abstract_name(format!("vhost-blk-handed-{}", std::process::id())).unwrap();
        let fault = path_of(&UnixListener::bind_addr(&address).unwrap()).unwrap_err();
        assert!(matches!(fault, SocketFault::NoPath), "{fault}");
    }
}
