//! What the message thread, the data thread and the simulator's owner share.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use crate::config::{Config, NamespaceConfig};
use crate::config_space::{BarLayout, ConfigSpace};
use crate::dma::{DmaTable, SharedBytes};
use crate::error::Error;
use crate::faults::FaultControl;
use crate::interrupts::Interrupts;
use crate::patch::IdentifyPatch;
use crate::registers::Registers;

/// The data thread answers requests between two commands; formatting a large file-backed namespace takes longest.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// What is lost in a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerLoss {
    /// Every block that was not flushed.
    All,
    /// About half of the blocks that were not flushed, chosen by the fault seed.
    Some,
}

/// A request to the data thread.
pub(crate) enum Request {
    /// Let go of DMA regions that were unmapped.
    RefreshDma,
    /// The front-end has gone.
    Reset,
    /// Function level reset: nothing outlives that (PCI Express Base 4.0, 6.6.2).
    FunctionReset,
    /// CC.SHN was set.
    ShutdownTold,
    /// Identify says this otherwise from now on.
    Identify(Vec<IdentifyPatch>),
    PowerCut(PowerLoss),
    AddNamespace(NamespaceConfig),
    RemoveNamespace(u32),
    Resize(u32, u64),
    Protect(u32, bool),
}

type Answer = Result<u64, Error>;
type Requests = VecDeque<(Request, SyncSender<Answer>)>;

/// Counts of what a controller did. Single values may be read at any time; they are not a consistent set.
#[derive(Debug, Default)]
pub struct Counters {
    /// I/O commands carried out or refused.
    pub commands: AtomicU64,
    /// I/O commands that completed with an error.
    pub errors: AtomicU64,
    /// Read commands that succeeded.
    pub reads: AtomicU64,
    /// Write commands that succeeded.
    pub writes: AtomicU64,
    /// Bytes read by the host.
    pub bytes_read: AtomicU64,
    /// Bytes written by the host.
    pub bytes_written: AtomicU64,
    /// MSI-X messages sent (eventfd writes).
    pub interrupts: AtomicU64,
    /// Times the idle data thread went to sleep.
    pub naps: AtomicU64,
    /// Commands that the host submitted after it had set CC.SHN, admin commands too (NVMe Base 2.0, 3.6.1, forbids it).
    pub commands_after_shutdown: AtomicU64,
    /// Times the host cleared CC.EN while the controller was becoming ready (NVMe Base 2.0, 3.1.3.5, forbids it).
    pub early_disables: AtomicU64,
    /// Log pages read without keeping their events (Get Log Page with RAE 0): such events are told again.
    pub events_released: AtomicU64,
    /// Unsafe shutdowns and power cuts.
    pub power_cuts: AtomicU64,
    /// Commands carried out after the end of their queue ([`FaultAction::Stray`](crate::FaultAction)).
    pub strays: AtomicU64,
    /// Memory accesses of such commands (one for the data, one for the completion) that found nothing mapped.
    pub strays_refused: AtomicU64,
    /// Front-ends that have gone.
    pub front_ends_gone: AtomicU64,
    /// Messages that took DMA memory away.
    pub dma_unmaps: AtomicU64,
}

impl Counters {
    /// Adds to a counter that only the data thread writes.
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        // Relaxed: a single writer, and nothing is ordered by it.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

pub(crate) struct Shared {
    pub config: Config,
    pub layout: BarLayout,
    pub registers: Mutex<Registers>,
    pub config_space: Mutex<ConfigSpace>,
    pub doorbells: SharedBytes,
    pub dma: Arc<DmaTable>,
    pub interrupts: Arc<Interrupts>,
    pub faults: FaultControl,
    pub counters: Counters,
    /// `None` once nobody answers any more.
    requests: Mutex<Option<Requests>>,
    /// Registers were written, or there are requests.
    attention: AtomicBool,
    /// The host lets the controller access memory (PCI command register bit 2).
    pub bus_master: AtomicBool,
    pub stop: AtomicBool,
    pub data_thread: OnceLock<Thread>,
}

/// A lock whose holder cannot leave half-done changes behind: poison is no reason to stop.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(config: Config, layout: BarLayout, doorbells: SharedBytes) -> Shared {
        Shared {
            layout,
            registers: Mutex::new(Registers::new(&config)),
            config_space: Mutex::new(ConfigSpace::new(&layout)),
            doorbells,
            dma: Arc::new(DmaTable::new(config.dma_regions)),
            interrupts: Arc::new(Interrupts::new(layout.vectors)),
            faults: FaultControl::new(config.faults.clone()),
            counters: Counters::default(),
            requests: Mutex::new(Some(VecDeque::new())),
            attention: AtomicBool::new(false),
            bus_master: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            data_thread: OnceLock::new(),
            config,
        }
    }

    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    pub(crate) fn config_space(&self) -> MutexGuard<'_, ConfigSpace> {
        lock(&self.config_space)
    }

    /// Wakes the data thread.
    pub(crate) fn wake(&self) {
        if let Some(thread) = self.data_thread.get() {
            thread.unpark();
        }
    }

    /// Makes the data thread look at registers and requests.
    pub(crate) fn call_attention(&self) {
        // Release: pairs with the Acquire in `take_attention`.
        self.attention.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether there is something besides queues to look at.
    #[inline]
    pub(crate) fn take_attention(&self) -> bool {
        // The plain load keeps the line shared while there is nothing.
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::Acquire)
    }

    /// Has the data thread carry a request out, and waits for it.
    pub(crate) fn ask(&self, request: Request) -> Answer {
        let (sender, receiver) = sync_channel(1);
        let stopped = Error::NoAnswer("it was stopped");
        lock(&self.requests).as_mut().ok_or(stopped)?.push_back((request, sender));
        self.call_attention();
        receiver.recv_timeout(ANSWER_DEADLINE).unwrap_or(Err(Error::NoAnswer("it is gone, or busy for too long")))
    }

    pub(crate) fn next_request(&self) -> Option<(Request, SyncSender<Answer>)> {
        lock(&self.requests).as_mut()?.pop_front()
    }

    /// Whether the data thread has ended, which touches no memory of the host's any more.
    pub(crate) fn is_over(&self) -> bool {
        lock(&self.requests).is_none()
    }

    /// Nobody answers requests any more; whoever waits sees that at once.
    pub(crate) fn refuse_requests(&self) {
        *lock(&self.requests) = None;
    }

    /// Byte offset of a doorbell: submission queue tail, or completion queue head.
    #[inline]
    pub(crate) fn doorbell_offset(&self, queue: u16, completion: bool) -> usize {
        (usize::from(queue) * 2 + usize::from(completion)) << (2 + self.config.doorbell_stride)
    }

    /// A doorbell's value.
    #[inline]
    pub(crate) fn doorbell(&self, queue: u16, completion: bool) -> u32 {
        // Acquire: pairs with the store by which the host rings; the entries it wrote before are visible after it.
        self.doorbells.load_u32(self.doorbell_offset(queue, completion), Ordering::Acquire).unwrap_or(0)
    }

    /// Puts a doorbell back to its value after reset.
    pub(crate) fn clear_doorbell(&self, queue: u16, completion: bool) {
        // Relaxed: the completion (or CSTS) that lets the host ring again is published after it.
        let _ = self.doorbells.store_u32(self.doorbell_offset(queue, completion), 0, Ordering::Relaxed);
    }
}
