//! Shared memory that somebody else may take away.
//!
//! A file that is made shorter while it is mapped, or one with holes on a file system that is full, leaves a mapping without
//! pages: the next access is a SIGBUS, which would end the process. Memory that comes from others therefore has a [`Guard`]
//! for as long as it is mapped. A SIGBUS in guarded memory replaces that whole mapping by private pages of zeroes, marks it
//! as lost, and the access goes on; whoever is responsible for it hears of that through a [`LossListener`]. Every other
//! SIGBUS goes to whoever had the signal before: a defect still ends the process.
//!
//! The signal handler runs in the thread that has made the access, at any point of it. It uses no lock and no allocation,
//! only the table of guarded memory (atomics in a static) and system calls. That the entry it finds is right rests on one
//! rule: memory is accessed only while its guard exists, so an entry that changes meanwhile is not the one in question.
//!
//! Nothing of this is on the way of an access that finds its page.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::dma::page_size;

/// Mappings that can be guarded at a time: as many as Linux lets a process have by default (vm.max_map_count).
const SLOTS: usize = 1 << 16;

/// What becomes of the memory at a SIGBUS.
const INTACT: u32 = 0;
/// A handler is at it.
const REPLACING: u32 = 1;
/// It is private, or its pieces become so one by one.
const REPLACED: u32 = 2;

/// Guarded memory. All zero: nothing.
struct Slot {
    /// Odd while the fields below change. Even: they belong together.
    version: AtomicU64,
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// The file: whoever has mapped it, too, has lost it as well.
    device: AtomicU64,
    inode: AtomicU64,
    state: AtomicU32,
    /// What bytes are made of that replace the memory: 0 or 0xff.
    fill: AtomicU32,
    /// The version that was found lost.
    lost: AtomicU64,
}

impl Slot {
    const fn empty() -> Slot {
        Slot {
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            device: AtomicU64::new(0),
            inode: AtomicU64::new(0),
            state: AtomicU32::new(INTACT),
            fill: AtomicU32::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// What it says, if it does not change just now. For the signal handler.
    fn read(&self) -> Option<Seen> {
        // Acquire: the fields are read after it; pairs with the Release at the end of `write`.
        let version = self.version.load(Ordering::Acquire);
        if !version.is_multiple_of(2) {
            return None;
        }
        let seen = Seen {
            version,
            start: self.start.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            file: (self.device.load(Ordering::Relaxed), self.inode.load(Ordering::Relaxed)),
        };
        // Acquire fence: the fields were read before the version is read again; pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == version).then_some(seen)
    }

    /// Changes it; the caller has the lock of the table. Returns the new version.
    fn write(&self, start: usize, bytes: usize, file: (u64, u64), fill: u8) -> u64 {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Release fence: whoever reads one of the fields below sees that the version is odd, or later. Pairs with `read`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.device.store(file.0, Ordering::Relaxed);
        self.inode.store(file.1, Ordering::Relaxed);
        self.state.store(INTACT, Ordering::Relaxed);
        self.fill.store(fill.into(), Ordering::Relaxed);
        self.version.store(version + 2, Ordering::Release);
        version + 2
    }
}

/// What a slot said at one moment.
#[derive(Clone, Copy)]
struct Seen {
    version: u64,
    start: usize,
    bytes: usize,
    file: (u64, u64),
}

static TABLE: [Slot; SLOTS] = [const { Slot::empty() }; SLOTS];
/// No slot from this index on was ever used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Free slots below `USED`; the lock of the table.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// Written at each loss; never closed. -1 before the handler is installed.
static EVENT: AtomicI32 = AtomicI32::new(-1);
static HANDLER: OnceLock<Handler> = OnceLock::new();

/// The installed signal handler.
struct Handler {
    event: EventFd,
    before: libc::sigaction,
}

/// Guards a mapping while it exists.
pub struct Guard {
    slot: usize,
    version: u64,
}

impl Guard {
    /// Guards `bytes` bytes from `start` on, a mapping of `file`, from now on. After a loss they are zero.
    ///
    /// # Errors
    /// The signal handler cannot be installed, the file cannot be looked at, or too much is guarded already.
    ///
    /// # Safety
    /// `start..start + bytes` are whole pages of one mapping, which is there until the guard is dropped. Nobody relies on
    /// what the memory holds, as with all memory that others write: it is only accessed by atomics and copies.
    pub unsafe fn new(start: *mut u8, bytes: usize, file: &File) -> io::Result<Guard> {
        // SAFETY: the caller's word.
        unsafe { Guard::with_fill(start, bytes, file, 0) }
    }

    /// Guards a mapping as [`Guard::new`] does; after a loss its memory is made of bytes with the value `fill`. For small
    /// mappings.
    ///
    /// # Safety
    /// The caller promises what [`Guard::new`] asks for.
    pub(crate) unsafe fn with_fill(start: *mut u8, bytes: usize, file: &File, fill: u8) -> io::Result<Guard> {
        install()?;
        let metadata = file.metadata()?;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match free.pop() {
            Some(slot) => slot,
            None => {
                let slot = USED.load(Ordering::Relaxed);
                if slot == SLOTS {
                    return Err(io::Error::other(format!("{SLOTS} pieces of shared memory are mapped already")));
                }
                // Relaxed: a handler that needs the slot runs in a thread that has heard of the memory after this.
                USED.store(slot + 1, Ordering::Relaxed);
                slot
            }
        };
        let version = TABLE[slot].write(start.expose_provenance(), bytes, (metadata.dev(), metadata.ino()), fill);
        Ok(Guard { slot, version })
    }

    /// Was the memory, or other memory of the same file that this process has mapped, found without pages?
    pub fn is_lost(&self) -> bool {
        // Acquire: pairs with the Release in `tell`; nothing else is read through it.
        TABLE[self.slot].lost.load(Ordering::Acquire) == self.version
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.slot].write(0, 0, (0, 0), 0);
        free.push(self.slot);
    }
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guard({:#x}, lost: {})", TABLE[self.slot].start.load(Ordering::Relaxed), self.is_lost())
    }
}

/// Hears of losses: its descriptor becomes readable when any guarded memory of this process is found lost.
/// [`Guard::is_lost`] tells whether it is one's own.
pub struct LossListener(Epoll);

impl LossListener {
    /// Hears of losses from now on.
    pub fn new() -> io::Result<LossListener> {
        let handler = install()?;
        let epoll = Epoll::new()?;
        // Edge-triggered: each listener hears of each loss, and nobody has to reset the event.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, handler.event.as_raw_fd(), event)?;
        Ok(LossListener(epoll))
    }

    /// Makes it unreadable until the next loss.
    pub fn clear(&self) {
        // It waits for nothing; what it returns was heard by the caller.
        let _ = self.0.wait(0, &mut [EpollEvent::default()]);
    }
}

impl AsFd for LossListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the borrow does not outlive.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Installs the signal handler, once.
fn install() -> io::Result<&'static Handler> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handler) = HANDLER.get() {
        return Ok(handler);
    }
    let event = EventFd::new(EFD_NONBLOCK)?;
    // SAFETY: all zero is a valid `sigaction`: the default action, no flags, an empty mask.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the call only writes `before`.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    EVENT.store(event.as_raw_fd(), Ordering::Relaxed);
    // Before the handler, which needs it.
    let handler = HANDLER.get_or_init(|| Handler { event, before });
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    // On the thread's own signal stack, if it has one, as the standard library's handler, which is called from here.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_sigbus` has the signature that SA_SIGINFO asks for, and does only what a signal handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(handler)
}

/// The signal handler.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the call only says where this thread's errno is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the place is this thread's own. The interrupted code may be about to look there.
    let errno = unsafe { *place };
    // SAFETY: the kernel gives a valid `info` to a handler with SA_SIGINFO.
    let told = unsafe { &*info };
    // SAFETY: a field that is there for this signal.
    let (code, address) = (told.si_code, unsafe { told.si_addr() }.addr());
    // No page there, or (BUS_MCEERR_AR) one whose memory is broken. Others, misaligned accesses and what a process sends,
    // are not about a mapping.
    let mended = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR) && mend(address);
    // SAFETY: as above.
    unsafe { *place = errno };
    if !mended {
        pass_on(signal, info, context);
    }
}

/// Puts pages where this address is, if that is guarded memory. The access is then made again.
fn mend(address: usize) -> bool {
    let used = USED.load(Ordering::Relaxed).min(SLOTS);
    let hit = TABLE[..used].iter().find_map(|slot| {
        let seen = slot.read()?;
        (address.wrapping_sub(seen.start) < seen.bytes).then_some((slot, seen))
    });
    // The thread is just accessing this memory: its guard exists, and the slot stays as it is.
    let Some((slot, seen)) = hit else { return false };
    // AcqRel, Acquire: of several threads that find it so at the same time one replaces it.
    match slot.state.compare_exchange(INTACT, REPLACING, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            let whole = replace(seen.start, seen.bytes);
            let fill = slot.fill.load(Ordering::Relaxed) as u8;
            if whole && fill != 0 {
                let start = std::ptr::with_exposed_provenance_mut::<u8>(seen.start);
                // SAFETY: `replace` has just made these bytes writable memory of this process alone.
                unsafe { std::ptr::write_bytes(start, fill, seen.bytes) };
            }
            let mended = whole || replace_piece(seen, address);
            // Release: the memory is there. Whoever comes next needs a piece of it.
            slot.state.store(REPLACED, Ordering::Release);
            tell(slot, seen);
            mended
        }
        // Another thread is at it: this one makes its access again, and comes back here until that is done.
        Err(REPLACING) => true,
        // What has no page yet, or had none when this access was made.
        Err(_) => replace_piece(seen, address),
    }
}

/// Puts private pages of zeroes in the place of a mapping.
fn replace(start: usize, bytes: usize) -> bool {
    let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is (a piece of) a guarded mapping, whose owner allows for its content to change (`Guard::new`). It stays
    // mapped throughout: the kernel exchanges one mapping for the other at once.
    let mapped = unsafe { libc::mmap(address, bytes, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// Puts private pages of zeroes in the place of a piece of a mapping around an address: where the kernel does not give as much
/// as the whole takes (strict overcommit), or the whole was replaced before.
fn replace_piece(seen: Seen, address: usize) -> bool {
    // A mapping of hugepages cannot be cut within one.
    [2 << 20, 1 << 30, page_size()].into_iter().any(|unit: usize| {
        let start = (address & !(unit - 1)).max(seen.start);
        let end = ((address & !(unit - 1)) + unit).min(seen.start + seen.bytes);
        replace(start, end - start)
    })
}

/// Marks what is lost, other mappings of the same file too, and rings.
fn tell(slot: &Slot, seen: Seen) {
    // Release, here and below: pairs with the Acquire in `Guard::is_lost`. The latest version counts.
    slot.lost.fetch_max(seen.version, Ordering::Release);
    let used = USED.load(Ordering::Relaxed).min(SLOTS);
    for other in &TABLE[..used] {
        // Of another version by now: then the mark means nothing.
        if let Some(same) = other.read().filter(|other| other.bytes != 0 && other.file == seen.file) {
            other.lost.fetch_max(same.version, Ordering::Release);
        }
    }
    let one = 1u64;
    // SAFETY: the call reads the 8 bytes of `one`. The descriptor is never closed; it is non-blocking, and readable if full.
    unsafe { libc::write(EVENT.load(Ordering::Relaxed), (&raw const one).cast(), 8) };
}

/// Does with the signal what would have been done without this module.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Initialised before the handler was installed: this waits for nobody.
    let before = HANDLER.get().map(|handler| handler.before);
    match before {
        Some(before) if before.sa_sigaction > libc::SIG_IGN && before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: a handler with SA_SIGINFO has this signature.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(before) if before.sa_sigaction > libc::SIG_IGN => {
            // SAFETY: a handler without SA_SIGINFO has this signature.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(before.sa_sigaction) };
            handler(signal);
        }
        // The access is made again, and ends the process. A signal that was sent is sent again.
        _ => {
            // SAFETY: all zero is the default action.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: the call, which is allowed here, reads `default`.
            unsafe { libc::sigaction(signal, &default, std::ptr::null_mut()) };
            // SAFETY: the kernel gives a valid `info`.
            if unsafe { &*info }.si_code <= 0 {
                // SAFETY: allowed here, and touches no memory.
                unsafe { libc::raise(signal) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::atomic::AtomicU8;

    use super::*;
    use crate::SharedMemory;

    const MIB: usize = 1 << 20;

    /// Memory in a file that anybody may shorten.
    fn memory(bytes: usize) -> (File, SharedMemory) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes as u64).unwrap();
        let memory = SharedMemory::from_file(file.try_clone().unwrap(), 0, bytes).unwrap();
        (file, memory)
    }

    fn byte(memory: &SharedMemory, at: usize) -> &AtomicU8 {
        &memory.slice(at, 1).unwrap()[0]
    }

    fn is_readable(listener: &LossListener) -> bool {
        let mut poll = libc::pollfd { fd: listener.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the call reads and writes `poll`.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    #[test]
    fn memory_whose_file_was_shortened_is_replaced_and_everything_else_stays() {
        let (file, memory) = memory(4 * MIB);
        let (_other_file, other) = self::memory(4096);
        let again = SharedMemory::from_file(file.try_clone().unwrap(), MIB as u64, 4096).unwrap();
        byte(&memory, 0).store(7, Ordering::Relaxed);
        byte(&other, 0).store(8, Ordering::Relaxed);
        let listener = LossListener::new().unwrap();
        file.set_len(4096).unwrap();
        assert_eq!(byte(&memory, 0).load(Ordering::Relaxed), 7, "this page is still there");
        assert!(!memory.is_lost());
        assert_eq!(byte(&memory, 3 * MIB).load(Ordering::Relaxed), 0);
        assert_eq!(byte(&memory, 0).load(Ordering::Relaxed), 0, "all of it is replaced");
        byte(&memory, 4 * MIB - 1).store(9, Ordering::Relaxed);
        assert_eq!(byte(&memory, 4 * MIB - 1).load(Ordering::Relaxed), 9);
        assert!(memory.is_lost() && again.is_lost(), "and whoever has the same file is told");
        assert!(!other.is_lost());
        assert_eq!(byte(&other, 0).load(Ordering::Relaxed), 8);
        assert!(is_readable(&listener));
        listener.clear();
        drop(memory);
        // The other mapping of the file finds it out for itself.
        assert_eq!(byte(&again, 0).load(Ordering::Relaxed), 0);
        assert!(is_readable(&listener), "each loss is heard of");
        let (_file, new) = self::memory(4096);
        assert!(!new.is_lost(), "a slot that is used again");
    }

    #[test]
    fn many_threads_may_find_it_at_the_same_time() {
        for _ in 0..20 {
            let (file, memory) = memory(16 * MIB);
            file.set_len(0).unwrap();
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let memory = &memory;
                    scope.spawn(move || {
                        for page in (thread * 4096..16 * MIB).step_by(64 * 4096) {
                            byte(memory, page).store(1, Ordering::Relaxed);
                        }
                    });
                }
                // Others come and go meanwhile.
                scope.spawn(|| (0..50).for_each(|_| drop(self::memory(4096))));
            });
            assert!(memory.is_lost());
        }
    }

    #[test]
    fn a_piece_is_enough_where_there_is_no_more() {
        let (_file, memory) = memory(8 * MIB);
        let start = memory.slice::<AtomicU8>(0, 1).unwrap().as_ptr().addr();
        let seen = Seen { version: 0, start, bytes: 8 * MIB, file: (0, 0) };
        byte(&memory, 0).store(1, Ordering::Relaxed);
        byte(&memory, 5 * MIB).store(1, Ordering::Relaxed);
        assert!(replace_piece(seen, start + 5 * MIB));
        assert_eq!(byte(&memory, 5 * MIB).load(Ordering::Relaxed), 0);
        assert_eq!(byte(&memory, 0).load(Ordering::Relaxed), 1);
    }

    #[test]
    fn registers_that_are_taken_away_read_all_ones() {
        let (file, memory) = memory(8192);
        let other = memmap2::MmapOptions::new().len(8192).map_raw(&file).unwrap();
        // SAFETY: the mapping has just been made and is dropped after the guard.
        let guard = unsafe { Guard::with_fill(other.as_mut_ptr(), 8192, &file, 0xff) }.unwrap();
        file.set_len(0).unwrap();
        // SAFETY: a byte of the mapping, which nobody writes.
        let read = unsafe { other.as_ptr().wrapping_add(5000).read_volatile() };
        assert_eq!((read, guard.is_lost()), (0xff, true));
        drop((guard, other, memory));
    }

    /// A defect of this program: memory that nobody guards.
    #[test]
    fn every_other_sigbus_ends_the_process_as_before() {
        const CHILD: &str = "GUARD_TEST_CHILD";
        if std::env::var_os(CHILD).is_some() {
            let (_file, _guarded) = memory(4096);
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            let unguarded = memmap2::MmapOptions::new().len(4096).map_raw(&file).unwrap();
            file.set_len(0).unwrap();
            // SAFETY: it is not: the process ends here.
            let read = unsafe { unguarded.as_ptr().read_volatile() };
            panic!("{read} was read from nowhere");
        }
        let name = "guard::tests::every_other_sigbus_ends_the_process_as_before";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    }
}
