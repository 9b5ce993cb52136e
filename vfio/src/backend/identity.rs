//! Which process serves a device: whether a server lived on while there was no connection to it.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Who serves a device.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum ServerIdentity {
    /// The kernel, which lives as long as this process.
    Kernel,
    /// The process that listens on a vfio-user socket.
    Process {
        /// Its number.
        id: i32,
        /// When it was started, in clock ticks since the machine was: numbers are used again.
        started: u64,
    },
    /// Not known: the process is in another PID namespace, or somebody else has made the socket for it.
    Unknown,
}

impl ServerIdentity {
    /// Whether it is certain that `later` is the same server, so that it has lost nothing of what it held in memory.
    pub fn lived_on_as(&self, later: &ServerIdentity) -> bool {
        use ServerIdentity::*;
        match (self, later) {
            (Kernel, Kernel) => true,
            (Process { id, started }, Process { id: later_id, started: later_started }) => {
                (id, started) == (later_id, later_started)
            }
            _ => false,
        }
    }

    /// The process at the other end. It is told of by the socket itself: who listened on it (unix(7), SO_PEERCRED).
    pub(super) fn behind(stream: &UnixStream) -> ServerIdentity {
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
        let (to, length) = (&raw mut peer, &raw mut bytes);
        // SAFETY: the call writes no more than `bytes` bytes to `peer`, and the number of bytes; both outlive it.
        let result =
            unsafe { libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to.cast(), length) };
        // The first process makes sockets for others (socket activation); 0 is somebody whom this namespace does not see.
        if result != 0 || peer.pid <= 1 {
            return ServerIdentity::Unknown;
        }
        let started = fs::read_to_string(format!("/proc/{}/stat", peer.pid)).ok().and_then(|stat| started(&stat));
        started.map_or(ServerIdentity::Unknown, |started| ServerIdentity::Process { id: peer.pid, started })
    }
}

/// The 22nd field of `/proc/PID/stat` (proc_pid_stat(5), "starttime"); the second, a name, may have spaces and brackets.
fn started(stat: &str) -> Option<u64> {
    let (_, behind_the_name) = stat.rsplit_once(')')?;
    behind_the_name.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_at_the_other_end_is_known_and_no_other_is_the_same() {
        let (mine, _theirs) = UnixStream::pair().unwrap();
        let this = ServerIdentity::behind(&mine);
        let ServerIdentity::Process { id, started } = this else { panic!("{this:?}") };
        assert_eq!(id as u32, std::process::id());
        assert!(this.lived_on_as(&this));
        assert!(!this.lived_on_as(&ServerIdentity::Process { id, started: started + 1 }));
        assert!(!this.lived_on_as(&ServerIdentity::Process { id: id + 1, started }));
        assert!(!ServerIdentity::Unknown.lived_on_as(&ServerIdentity::Unknown));
        assert!(ServerIdentity::Kernel.lived_on_as(&ServerIdentity::Kernel));
    }

    #[test]
    fn names_do_not_confuse() {
        let stat = "7 (a) S 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        assert_eq!(started(stat), Some(12345));
        assert_eq!((started(""), started("7 (a) S 1")), (None, None));
    }
}
