//! I/O queue pairs: a submission queue, its completion queue, and what is known of each command between them.
//!
//! A queue pair belongs to one thread, which needs neither lock nor atomic read-modify-write: it writes commands
//! ([`QueuePair::submit`], [`QueuePair::push`]), announces a whole batch with one doorbell ([`QueuePair::ring`]) and collects
//! answers by their phase tag ([`QueuePair::reap`]). Everything a command needs is allocated when the pair is made.

mod completion;
mod counters;
mod doorbell;
mod job;
mod requests;
mod slots;
mod staged;
mod submission;
mod submit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use vfio::{DmaBuffer, DmaSlice, DmaSpace, Doorbell};
use vmm_sys_util::eventfd::EventFd;

use crate::data_pointer::{LIST_WORDS, MAX_COMMAND_BYTES, PAGE_BYTES, SglAlignment};
use crate::{Command, Status};
use completion::{CompletionEntry, CompletionQueue};
use doorbell::QueueDoorbell;
use requests::{Outcome, Requests};
use slots::{NO_REQUEST, Released, Slots};
use staged::{MOST_REQUESTS, Staged};
use submission::{SubmissionEntry, SubmissionQueue};

pub use counters::Counters;
pub(crate) use doorbell::{ShadowDoorbell, ShadowDoorbells};
pub use slots::CommandId;
pub use staged::OWNER_SHIFT;
pub use submit::SubmitError;

/// Every slot is in use: reap first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all command slots of the queue pair are in use; try again after the next completions")]
pub struct Full;

/// One answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// What was given with the request.
    pub token: u64,
    /// The command's status; of a request of several commands the first error, else success.
    pub status: Status,
    /// The command's result (completion DW0); 0 for a request of several commands.
    pub result: u32,
}

/// How the owner learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completions {
    /// By looking.
    Polling,
    /// By the eventfd of the completion queue's interrupt vector.
    Interrupt,
}

/// What a queue pair is made from.
pub(crate) struct QueueSettings {
    /// Queue identifier of both queues; 0 is the admin queue pair.
    pub id: u16,
    /// Entries of each queue, 2 to 4096.
    pub entries: u16,
    /// Most bytes per command (MDTS).
    pub max_transfer: u32,
    /// What the controller's SGLs can say, if it has any.
    pub sgl: Option<SglAlignment>,
    /// The controller's: it was found to refuse SGLs.
    pub sgl_refused: Arc<AtomicBool>,
    /// Commands older than this are told by `tick`.
    pub timeout: Duration,
    /// For `retry_delay`.
    pub retry_delays: [Duration; 3],
    /// Non-blocking eventfd of the completion queue's interrupt vector.
    pub interrupt: Option<EventFd>,
    pub shadow: Option<ShadowDoorbells>,
}

/// An I/O submission queue and its completion queue.
///
/// There is one command slot fewer than entries. Dropping a pair frees its memory: delete it from the controller first
/// (`Controller::delete_queue_pair`).
pub struct QueuePair {
    submission: SubmissionQueue<DmaSlice<SubmissionEntry>>,
    completion: CompletionQueue<DmaSlice<CompletionEntry>>,
    slots: Slots,
    /// One page per slot, for PRP lists, SGLs and ranges.
    lists: DmaSlice<[AtomicU64; LIST_WORDS]>,
    max_bytes: u32,
    /// A transfer of one segment that ends within this many bytes from the start of its first page takes no list: two pages
    /// (or nothing, if one command may not even move that much).
    plain_bytes: u32,
    id: u16,
    sgl: Option<SglAlignment>,
    /// What that was before the controller was found to refuse SGLs.
    sgl_before: Option<SglAlignment>,
    sgl_refused: Arc<AtomicBool>,
    staged: Staged,
    /// Long requests do not go on.
    held: bool,
    counters: Counters,
    submission_doorbell: QueueDoorbell,
    completion_doorbell: QueueDoorbell,
    requests: Requests,
    stale: Stale,
    clock: Clock,
    completions: Completions,
    retry_delays: [Duration; 3],
    interrupt: Option<EventFd>,
    submission_iova: u64,
    completion_iova: u64,
    memory: DmaBuffer,
    /// Gone when the pair is: how the controller notices that a pair was dropped instead of deleted.
    lease: Arc<()>,
}

/// The coarse clock by which commands age, in milliseconds: 64 bits do not wrap, however long a pair has nothing to do.
struct Clock {
    start: Instant,
    now: u64,
    timeout: u64,
    next_look: u64,
}

/// Answers that answered nothing: counted on the spot, told in the log later and rarely.
#[derive(Default)]
struct Stale {
    told: u64,
    last: u32,
    next_telling: u64,
}

/// Between two log lines about stale completions of one queue pair.
const STALE_TELLING_MS: u64 = 5_000;

impl QueuePair {
    /// Allocates the memory of a queue pair; the controller does not know of it yet.
    pub(crate) fn new(
        dma: &DmaSpace,
        settings: QueueSettings,
        submission: Doorbell,
        completion: Doorbell,
    ) -> Result<QueuePair, vfio::Error> {
        let entries = usize::from(settings.entries.clamp(2, Slots::MAX + 1));
        let slots = entries - 1;
        // One allocation, each part on a page of its own: both queues have to be physically contiguous.
        let page = PAGE_BYTES as usize;
        let completion_at = (entries * size_of::<SubmissionEntry>()).next_multiple_of(page);
        let lists_at = completion_at + (entries * size_of::<CompletionEntry>()).next_multiple_of(page);
        let memory = dma.allocate(lists_at + slots * page)?;
        let (submission_doorbell, completion_doorbell) = match settings.shadow {
            Some(shadow) => (Some(shadow.submission), Some(shadow.completion)),
            None => (None, None),
        };
        let max_bytes = settings.max_transfer.min(MAX_COMMAND_BYTES);
        let two_pages = 2 * PAGE_BYTES as u32;
        let timeout = milliseconds(settings.timeout).max(1);
        Ok(QueuePair {
            submission: SubmissionQueue::new(part(&memory, 0, entries)),
            completion: CompletionQueue::new(part(&memory, completion_at, entries)),
            slots: Slots::new(slots as u16, settings.id),
            lists: part(&memory, lists_at, slots),
            max_bytes,
            plain_bytes: if max_bytes < two_pages { 0 } else { two_pages },
            id: settings.id,
            sgl: settings.sgl,
            sgl_before: settings.sgl,
            sgl_refused: settings.sgl_refused,
            staged: Staged::new(slots),
            held: false,
            counters: Counters::default(),
            submission_doorbell: QueueDoorbell::new(submission, submission_doorbell),
            completion_doorbell: QueueDoorbell::new(completion, completion_doorbell),
            requests: Requests::new(slots + MOST_REQUESTS),
            stale: Stale::default(),
            clock: Clock { start: Instant::now(), now: 0, timeout, next_look: 0 },
            completions: Completions::Polling,
            retry_delays: settings.retry_delays,
            interrupt: settings.interrupt,
            submission_iova: memory.iova(),
            completion_iova: memory.iova() + completion_at as u64,
            memory,
            lease: Arc::new(()),
        })
    }

    /// Queue identifier of both queues.
    #[inline]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Entries of each queue.
    pub(crate) fn entries(&self) -> u16 {
        self.completion.len() as u16
    }

    /// Where the controller finds the submission queue.
    pub(crate) fn submission_iova(&self) -> u64 {
        self.submission_iova
    }

    /// Where the controller finds the completion queue.
    pub(crate) fn completion_iova(&self) -> u64 {
        self.completion_iova
    }

    /// The memory of both queues and of the data pointers, to be kept until the controller has been told to forget it.
    pub(crate) fn memory(&self) -> &DmaBuffer {
        &self.memory
    }

    /// Alive as long as the pair is.
    pub(crate) fn lease(&self) -> &Arc<()> {
        &self.lease
    }

    /// Commands the controller has, or will have with the next doorbell.
    #[inline]
    pub fn outstanding(&self) -> usize {
        (self.counters.commands + self.submission.unannounced() as u64 - self.counters.completions) as usize
    }

    /// Commands that can be out at once.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Would [`QueuePair::submit`] refuse any request, as [`SubmitError::Full`]?
    #[inline]
    pub fn is_full(&self) -> bool {
        self.slots.next().is_none()
    }

    /// What has been done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Writes one command into the submission queue, with its command identifier; the controller does not know of it until
    /// [`QueuePair::ring`]. The command is taken as it is: its namespace, blocks and data pointer are the caller's word.
    #[inline(always)]
    pub fn push(&mut self, command: Command, token: u64) -> Result<CommandId, Full> {
        let id = self.slots.take(token).ok_or(Full)?;
        self.submission.write(&command.with_id(id.0));
        Ok(id)
    }

    /// The controller cannot work with an SGL ([`Status::concerns_sgl`], [`QueuePair::submit_without_sgls`]), whatever it says
    /// of itself: requests are described without from now on, and on queue pairs that are created later. True: that is news, of
    /// all pairs of the controller.
    pub fn refuse_sgls(&mut self) -> bool {
        self.sgl = None;
        // Relaxed: it guards nothing.
        !self.sgl_refused.swap(true, Ordering::Relaxed)
    }

    /// Issues no further commands of long requests, until [`QueuePair::drain_after_reset`]: what the controller has can be
    /// waited for.
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Announces every command written since the last time with one doorbell; nothing if there are none.
    #[inline]
    pub fn ring(&mut self) {
        let (written, tail) = self.submission.announce();
        if written == 0 {
            return;
        }
        self.counters.commands += written as u64;
        self.counters.batches += 1;
        if self.submission_doorbell.announce(tail) {
            self.counters.submission_doorbells += 1;
        }
    }

    /// Takes every completion there is and frees their slots with one doorbell; returns how many there were. Goes on with long
    /// requests, and announces their commands.
    ///
    /// `done` is called once per request. A completion that answers no command of this pair is counted and dropped.
    #[inline(always)]
    pub fn reap(&mut self, mut done: impl FnMut(Completed)) -> usize {
        let QueuePair { completion, slots, requests, staged, counters, stale, .. } = self;
        let mut unanswering = 0;
        let taken = completion.take_all(|completion| {
            let completed = match slots.release(completion.answered()) {
                Some(released) if released.request == NO_REQUEST => {
                    Completed { token: released.token, status: completion.status(), result: completion.result() }
                }
                Some(released) => match part_completed(requests, staged, released, completion.status()) {
                    Outcome::Finished { token, status } => Completed { token, status, result: 0 },
                    _ => return,
                },
                None => {
                    unanswering += 1;
                    stale.last = completion.answered();
                    return;
                }
            };
            // The one place that calls it: so it is compiled into this loop.
            done(completed);
        });
        if taken > 0 {
            counters.completions += (taken - unanswering) as u64;
            counters.stale_completions += unanswering as u64;
            // Acquire fence: the entries have been read before the controller may write over them; the doorbell itself orders
            // stores only. Pairs with the controller's read of the doorbell, after which it reuses the entries.
            fence(Ordering::Acquire);
            if self.completion_doorbell.announce(self.completion.head()) {
                self.counters.completion_doorbells += 1;
            }
            if !self.staged.is_empty() {
                self.issue_staged();
                self.ring();
            }
        }
        taken
    }

    /// Are there completions to reap?
    #[inline]
    pub fn ready(&self) -> bool {
        self.completion.ready()
    }

    /// How many completions are there to reap. Walks the queue: for tests and measurements.
    pub fn answered(&self) -> usize {
        self.completion.answered()
    }

    /// How long the controller wants a host to wait before it tries a command again, by the status' retry delay
    /// ([`Status::retry_delay`]); no longer than a command may take.
    pub fn retry_delay(&self, delay: u8) -> Duration {
        let wanted = usize::from(delay).checked_sub(1).and_then(|index| self.retry_delays.get(index));
        wanted.copied().unwrap_or_default().min(Duration::from_millis(self.clock.timeout))
    }

    /// How completions are learned of.
    pub fn completions(&self) -> Completions {
        self.completions
    }

    /// Changes how completions are learned of. The interrupt itself is always delivered when the pair was made with one;
    /// while polling, nobody reads its eventfd.
    ///
    /// Returns true if completions are there to be reaped now: after changing to [`Completions::Interrupt`], do so before
    /// waiting, as their interrupts may be among those cleared here. Without an interrupt the pair goes on polling.
    pub fn set_completions(&mut self, completions: Completions) -> bool {
        self.completions = if self.interrupt.is_some() { completions } else { Completions::Polling };
        match self.completions {
            Completions::Polling => self.ready(),
            Completions::Interrupt => self.acknowledge_interrupt(),
        }
    }

    /// The eventfd to wait on with [`Completions::Interrupt`], if the pair was made with one.
    pub fn interrupt(&self) -> Option<&EventFd> {
        self.interrupt.as_ref()
    }

    /// Clears the eventfd, then looks: true if completions are there to be reaped. Call it after waking, and before waiting
    /// again; an interrupt that comes after it makes the eventfd readable.
    pub fn acknowledge_interrupt(&mut self) -> bool {
        if let Some(event) = &self.interrupt {
            // An error means that there was nothing to clear: the eventfd does not block.
            let _ = event.read();
        }
        self.ready()
    }

    /// Lets commands age: `expired` gets the token of each request that has had a command out for longer than the timeout,
    /// once. Call it every few milliseconds or less often, with the time; nothing else here reads a clock. (With a single slot,
    /// long requests need it to go on when somebody was refused that slot and then does not take it.) A command is told at most
    /// an eighth of the timeout and one interval of calls late, never early.
    ///
    /// Expired requests stay outstanding: the controller may still write to their memory until it has been reset
    /// ([`QueuePair::drain_after_reset`]), or answer after all.
    pub fn tick(&mut self, now: Instant, mut expired: impl FnMut(u64)) {
        self.clock.now = milliseconds(now.saturating_duration_since(self.clock.start));
        self.tell_stale();
        // Nothing will be reaped that would do it.
        if self.outstanding() == 0 && !self.staged.is_empty() {
            self.issue_staged();
            self.ring();
        }
        if self.outstanding() == 0 || self.clock.now < self.clock.next_look {
            return;
        }
        self.clock.next_look = self.clock.now.saturating_add(self.clock.timeout / 8);
        let requests = &mut self.requests;
        self.slots.look(self.clock.now, self.clock.timeout, |command| {
            let token = match command.request {
                NO_REQUEST => Some(command.token),
                request => requests.report(request),
            };
            if let Some(token) = token {
                expired(token);
            }
        });
    }

    /// The age of the oldest command as of the last [`QueuePair::tick`]; `None` if none has been seen by one.
    pub fn oldest(&self) -> Option<Duration> {
        self.slots.oldest(self.clock.now).map(Duration::from_millis)
    }

    fn tell_stale(&mut self) {
        let count = self.counters.stale_completions;
        if count == self.stale.told || self.clock.now < self.stale.next_telling {
            return;
        }
        log::warn!(
            "queue pair {}: {} completions answered no command that is out (the last one: command {:#06x} of queue {}); dropped",
            self.id,
            count - self.stale.told,
            self.stale.last >> 16,
            self.stale.last & 0xffff
        );
        self.stale.told = count;
        self.stale.next_telling = self.clock.now.saturating_add(STALE_TELLING_MS);
    }

    /// Are there requests that have not been answered, or taken out by [`QueuePair::drain_after_reset`]?
    pub(crate) fn has_requests(&self) -> bool {
        self.outstanding() > 0 || !self.staged.is_empty()
    }

    /// Empties the pair after the controller has been reset or disabled, or is gone: `abandoned` gets the token of each request
    /// that was outstanding, once. The queues are as new, ready to be created again.
    ///
    /// Before that, the controller may still write to the requests' memory.
    pub fn drain_after_reset(&mut self, mut abandoned: impl FnMut(u64)) {
        let requests = &mut self.requests;
        self.staged.forget_all(
            |_| true,
            |request| {
                if let Some((token, _)) = requests.end(request, Status::ABORTED_BY_HOST) {
                    abandoned(token);
                }
            },
        );
        self.staged.reset();
        self.held = false;
        self.slots.release_all(|command| {
            let token = match command.request {
                NO_REQUEST => Some(command.token),
                request => requests.abandon(request),
            };
            if let Some(token) = token {
                abandoned(token);
            }
        });
        self.counters.completions = self.counters.commands;
        self.submission.reset();
        self.completion.reset();
        self.submission_doorbell.reset();
        self.completion_doorbell.reset();
    }
}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("id", &self.id)
            .field("entries", &self.completion.len())
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}

/// A command of a request of several has completed.
#[cold]
#[inline(never)]
fn part_completed(requests: &mut Requests, staged: &mut Staged, released: Released, status: Status) -> Outcome {
    let Released { token: weight, request } = released;
    staged.answered(weight);
    let outcome = requests.completed(request, status);
    // Also one that has ended and is free again has this status still.
    if !status.is_success() && requests.failed(request) {
        staged.forget(request);
    }
    outcome
}

/// Whole milliseconds; what no number holds is as good as for ever.
fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A part of the pair's memory.
fn part<T: vfio::DmaElement>(memory: &DmaBuffer, at: usize, count: usize) -> DmaSlice<T> {
    memory.slice(at, count).expect("the buffer was allocated with room for every part, each on a page boundary")
}
