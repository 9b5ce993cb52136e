//! A server that listens and takes no connections: each attempt ends in time, and they do not pile up. Alone in its program, whose
//! threads and descriptors it counts.
#![allow(unsafe_code)] // listen(2) with a queue of no entries

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use vfio::{Address, Device, OpenOptions};

const DEADLINE: Duration = Duration::from_millis(300);
const LATE: Duration = Duration::from_secs(20);

fn open(socket: &Path) -> String {
    let options = OpenOptions { request_timeout: DEADLINE };
    Device::open_with(&Address::VfioUser(socket.to_owned()), &options).unwrap_err().to_string()
}

/// Threads that have to do with a server, and descriptors of this process.
fn waiting() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    let threads = tasks.map(name).filter(|name| name == "vfio-user\n").count();
    (threads, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

#[test]
fn attempts_on_a_server_that_takes_no_connections_do_not_pile_up() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("full.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (_, files) = waiting();
    // SAFETY: the call takes no pointers; it makes the queue of the socket, which is open, as short as can be: one connection.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    // The first one is in the queue, and given up. There is no room for the others.
    for _ in 0..4 {
        let start = Instant::now();
        let error = open(&socket);
        assert!(error.contains("did not answer") && error.contains("within 300 ms"), "{error}");
        assert!(start.elapsed() < LATE, "{:?}", start.elapsed());
        assert_eq!(waiting(), (0, files), "nothing of an attempt stays");
    }
    // When the server takes connections again, the next attempt is heard.
    drop(listener.accept().unwrap());
    let attempt = std::thread::spawn(move || open(&socket));
    drop(listener.accept().unwrap());
    let error = attempt.join().unwrap();
    assert!(!error.contains("takes no connections"), "{error}");
}
