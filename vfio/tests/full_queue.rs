//! A server that listens and takes no connections: each attempt ends in time, and they do not pile up. Alone in its program, whose
//! threads it counts.

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

/// Threads that have to do with a server.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.map(name).filter(|name| name == "vfio-user\n").count()
}

#[test]
fn attempts_on_a_server_that_takes_no_connections_do_not_pile_up() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("full.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // SAFETY: the call takes no pointers; it makes the queue of the socket, which is open, as short as can be: one connection.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    // The first one is in the queue, and given up. There is no room for the second.
    for _ in 0..2 {
        let error = open(&socket);
        assert!(error.contains("did not answer within 300 ms"), "{error}");
    }
    assert_eq!(threads(), 1, "nothing can end a thread that waits to be connected");
    let start = Instant::now();
    for _ in 0..5 {
        let error = open(&socket);
        assert!(error.contains("an earlier attempt still waits for it"), "{error}");
    }
    assert!(start.elapsed() < DEADLINE, "there is nothing to wait for: {:?}", start.elapsed());
    assert_eq!(threads(), 1);
    // Another server has nothing to do with it.
    assert!(!open(&directory.path().join("other.sock")).contains("an earlier attempt"));

    // When the server takes connections again, that thread is the first to know, and the next attempt is a new one.
    listener.accept().unwrap();
    drop(listener.accept().unwrap());
    let end = Instant::now() + LATE;
    while threads() > 0 {
        assert!(Instant::now() < end, "the thread has its connection, and stays");
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = open(&socket);
    assert!(!error.contains("an earlier attempt"), "{error}");
}
