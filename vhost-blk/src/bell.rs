//! An eventfd by which one thread wakes another out of `poll`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Readable from the first ring on, until it is silenced.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A bell that has not rung.
    pub fn new() -> std::io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Silences it.
    pub fn silence(&self) {
        // The only error possible is that it has not rung.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Waits until it rings, for `time` at most, and silences it.
    pub fn wait(&self, time: Duration) {
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&time));
        self.silence();
    }

    /// Rings it.
    pub fn ring(&self) {
        // The only error possible is a full counter, and that one is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
