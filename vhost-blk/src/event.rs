//! Eventfds: ours, and those of front-ends, which are signalled without ever waiting for one.
//!
//! Whether a write to an eventfd may block belongs to the open file description, which the front-end shares: it can clear
//! `O_NONBLOCK` and fill the counter whenever it likes, and the next `write` waits until it reads. So nothing here writes. An
//! asynchronous read of nothing (Linux AIO, `io_submit`) names the eventfd as the one to signal when it is done, which it is at
//! once; the kernel signals it from within, as KVM does: that adds to the counter unless it is full, wakes whoever waits, and
//! never blocks.

use std::cell::{Cell, OnceCell};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vmm_sys_util::aio::{IOCB_CMD_PREAD, IOCB_FLAG_RESFD, IoContext, IoControlBlock, IoEvent};

/// An eventfd of our own, by which one thread wakes another out of `poll`: readable from the first [`EventFd::notify`] on, until
/// it is cleared.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// An eventfd that is not readable.
    pub fn new() -> std::io::Result<EventFd> {
        Ok(EventFd(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        // The only error possible is that it is clear.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Waits until it is readable, for `time` at most, and clears it.
    pub fn wait(&self, time: Duration) {
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&time));
        self.clear();
    }

    /// Makes it readable.
    pub fn notify(&self) {
        // The only error possible is a full counter, and that one is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Signals whose records the kernel keeps until they are looked at: what a context takes from the machine's `fs.aio-max-nr`,
/// which is 65536 for all processes together unless somebody has changed it.
const RECORDS: u32 = 64;
/// Signals between two looks. The kernel has room for more than [`RECORDS`], so this never finds it full.
const SIGNALS_PER_LOOK: u32 = 32;

thread_local! {
    static SIGNALLER: OnceCell<Signaller> = const { OnceCell::new() };
}

/// Makes what this thread needs to signal; a thread that must not fail later calls this first. The others get it when they signal
/// for the first time.
///
/// # Errors
/// The kernel gives out no AIO context; the error says what to do.
pub fn prepare() -> io::Result<()> {
    SIGNALLER.with(|cell| {
        if cell.get().is_none() {
            let _ = cell.set(Signaller::new()?);
        }
        Ok(())
    })
}

/// Signals an eventfd once. Never blocks, whatever the other owners of the eventfd have done to it; one whose counter is full
/// stays as it is, which is a signal already.
///
/// Does nothing if the file is no eventfd.
pub fn signal(event: &File) {
    let signalled =
        prepare().and_then(|()| SIGNALLER.with(|cell| cell.get().map_or(Ok(()), |signaller| signaller.signal(event))));
    if let Err(error) = signalled {
        log::error!("cannot signal an eventfd of a front-end: {error}");
    }
}

/// Whether a file is an eventfd. Nothing else is signalled or waited for.
pub fn is_eventfd(file: &impl AsFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

/// One thread's AIO context.
struct Signaller {
    context: IoContext,
    /// What is read: always at its end.
    nothing: File,
    /// Signals since the last look at their records.
    unseen: Cell<u32>,
}

impl Signaller {
    fn new() -> io::Result<Signaller> {
        let context = IoContext::new(RECORDS).map_err(|error| {
            let advice = match error.kind() {
                // EAGAIN (io_setup(2)).
                io::ErrorKind::WouldBlock => {
                    "; other processes have taken what the machine has: compare /proc/sys/fs/aio-nr with aio-max-nr, and raise \
                     the latter (sysctl fs.aio-max-nr=1048576)"
                }
                io::ErrorKind::Unsupported => "; this kernel was built without CONFIG_AIO",
                io::ErrorKind::PermissionDenied => {
                    "; a filter of system calls forbids io_setup: allow io_setup, io_submit, io_getevents and io_destroy"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("no AIO context for signalling eventfds: {error}{advice}"))
        })?;
        let nothing = File::open("/dev/null")
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open /dev/null: {error}")))?;
        Ok(Signaller { context, nothing, unseen: Cell::new(0) })
    }

    fn signal(&self, event: &File) -> io::Result<()> {
        let mut request = IoControlBlock {
            aio_lio_opcode: IOCB_CMD_PREAD as u16,
            // Descriptors are not negative.
            aio_fildes: self.nothing.as_raw_fd() as u32,
            aio_flags: IOCB_FLAG_RESFD,
            aio_resfd: event.as_raw_fd() as u32,
            // Of nothing, to nowhere.
            ..IoControlBlock::default()
        };
        self.unseen.set(self.unseen.get() + 1);
        if self.unseen.get() >= SIGNALS_PER_LOOK {
            self.look();
        }
        match self.context.submit(&[&mut request]) {
            // No room for a record.
            Err(error) if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => {
                self.look();
                self.context.submit(&[&mut request]).map(|_| ())
            }
            submitted => submitted.map(|_| ()),
        }
    }

    /// Takes the records of what is done: of everything, for a read of nothing is done when it has been submitted.
    fn look(&self) {
        let mut records = [IoEvent::default(); RECORDS as usize];
        // At least 0 of them: it waits for none. An error leaves them where they are, and the next look finds them.
        let _ = self.context.get_events(0, &mut records, None);
        self.unseen.set(0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    use super::*;

    /// An eventfd as a front-end makes it: blocking.
    fn event() -> File {
        File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    fn value(event: &File) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(event, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Runs `work` on another thread; the test fails if that takes long.
    fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (send, done) = mpsc::channel();
        std::thread::spawn(move || send.send(work()));
        done.recv_timeout(Duration::from_secs(20)).expect("it hangs, or has panicked")
    }

    #[test]
    fn every_signal_counts_however_many_there_are() {
        let event = event();
        for round in 1..=1000 {
            signal(&event);
            signal(&event);
            assert_eq!(value(&event), 2, "round {round}");
        }
    }

    #[test]
    fn a_full_eventfd_that_blocks_is_signalled_at_once() {
        let event = event();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let theirs = event.try_clone().unwrap();
        in_time(move || (0..1000).for_each(|_| signal(&theirs)));
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)), Ok(1), "it says that it was signalled");
        assert!(value(&event) >= u64::MAX - 1);
        signal(&event);
        assert_eq!(value(&event), 1, "it goes on when it has been read");
    }

    #[test]
    fn whoever_waits_is_woken() {
        let event = event();
        let theirs = event.try_clone().unwrap();
        let (send, read) = mpsc::channel();
        std::thread::spawn(move || (0..100).for_each(|_| send.send(value(&theirs)).unwrap()));
        for round in 1..=100 {
            signal(&event);
            assert_eq!(read.recv_timeout(Duration::from_secs(20)), Ok(1), "round {round}");
        }
    }

    #[test]
    fn a_thread_is_prepared_once() {
        prepare().unwrap();
        prepare().unwrap();
    }

    #[test]
    fn what_is_no_eventfd_is_recognised_and_left_alone() {
        assert!(is_eventfd(&event()));
        let (pipe, write) = std::io::pipe().unwrap();
        assert!(!is_eventfd(&pipe));
        let null = File::open("/dev/null").unwrap();
        assert!(!is_eventfd(&null));
        in_time(move || [null, File::from(std::os::fd::OwnedFd::from(write))].iter().for_each(signal));
    }
}
