//! What a device tells of its own end, behind one descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Why a device should be given back. The first that applies, in this order, is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The kernel wants it back, because it is being removed or unbound: that waits until it is closed here.
    RemovalRequested,
    /// The connection to the vfio-user server was given up here: an answer did not come in time, or made no sense. The server
    /// lives, for all that is known.
    GivenUp,
    /// The vfio-user server has ended the connection.
    Disconnected,
    /// The kernel reports an uncorrectable PCI Express error: the device is of no use before a reset.
    Error,
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Notice::RemovalRequested => "it is being removed",
            Notice::GivenUp => "its vfio-user server did not answer in time, or made no sense",
            Notice::Disconnected => "its vfio-user server has gone",
            Notice::Error => "an uncorrectable PCI Express error is reported",
        })
    }
}

/// An epoll descriptor over everything that announces a device's end. What has come stays.
pub(crate) struct Notices {
    epoll: Epoll,
    sources: Vec<Source>,
}

struct Source {
    notice: Notice,
    /// Kept: a closed eventfd would never be signalled. `None` for a socket, which belongs to its connection.
    _event: Option<EventFd>,
}

impl Notices {
    pub(crate) fn new() -> io::Result<Notices> {
        Ok(Notices { epoll: Epoll::new()?, sources: Vec::new() })
    }

    /// From now on `event`, when it is signalled, means `notice`.
    pub(crate) fn add_event(&mut self, notice: Notice, event: EventFd) -> io::Result<()> {
        self.watch(event.as_raw_fd(), EventSet::IN)?;
        self.sources.push(Source { notice, _event: Some(event) });
        Ok(())
    }

    /// The end of this connection is [`Notice::Disconnected`].
    pub(crate) fn add_connection(&mut self, stream: &UnixStream) -> io::Result<()> {
        self.watch(stream.as_raw_fd(), EventSet::READ_HANG_UP)?;
        self.sources.push(Source { notice: Notice::Disconnected, _event: None });
        Ok(())
    }

    fn watch(&self, descriptor: i32, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, self.sources.len() as u64))
    }

    /// What has come, without waiting.
    pub(crate) fn look(&self) -> Option<Notice> {
        let mut events = [EpollEvent::default(); 4];
        // It fails only if a signal interrupts it: the next look finds what is there.
        let ready = self.epoll.wait(0, &mut events).unwrap_or(0);
        let told = |event: &EpollEvent| self.sources.get(event.data() as usize).map(|source| source.notice);
        events[..ready].iter().filter_map(told).min_by_key(|notice| *notice as u8)
    }

    /// Readable as soon as [`Notices::look`] has something.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: `epoll` has the descriptor open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.epoll.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn readable(descriptor: BorrowedFd<'_>) -> bool {
        let mut poll = libc::pollfd { fd: descriptor.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure is passed, and outlives the call.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    #[test]
    fn what_was_told_stays_and_the_request_comes_first() {
        let mut notices = Notices::new().unwrap();
        let (error, request) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        notices.add_event(Notice::Error, error.try_clone().unwrap()).unwrap();
        notices.add_event(Notice::RemovalRequested, request.try_clone().unwrap()).unwrap();
        assert_eq!((notices.look(), readable(notices.descriptor())), (None, false));
        error.write(1).unwrap();
        for _ in 0..2 {
            assert_eq!((notices.look(), readable(notices.descriptor())), (Some(Notice::Error), true));
        }
        request.write(1).unwrap();
        assert_eq!(notices.look(), Some(Notice::RemovalRequested));
    }

    #[test]
    fn a_connection_tells_of_its_end_and_not_of_its_messages() {
        use std::io::Write;
        let (mine, mut theirs) = UnixStream::pair().unwrap();
        let mut notices = Notices::new().unwrap();
        notices.add_connection(&mine).unwrap();
        theirs.write_all(b"a message").unwrap();
        assert_eq!((notices.look(), readable(notices.descriptor())), (None, false));
        drop(theirs);
        assert_eq!((notices.look(), readable(notices.descriptor())), (Some(Notice::Disconnected), true));
    }
}
