//! The client's threads: keep every queue at its depth, look at what came back.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue, VirtioBlkTransport};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::pace::Pace;
use crate::plan::{Kind, Next, Plan, Request};
use crate::report::{Polls, QueueStats, Totals};
use crate::{ClientOptions, Error};

/// Loops between two looks at the clock while completions keep coming.
const CLOCK_EVERY: u64 = 64;
/// An interrupt-driven client looks at its stop flag at least this often, in milliseconds.
const WAIT_MS: i32 = 50;
/// How long a notification may come after the completions it tells of before it counts as missed.
const LATE_CALL: Duration = Duration::from_secs(1);
/// A client that sends at a fixed rate wakes this long before the next request is due,
const EARLY: Duration = Duration::from_millis(1);
/// and looks at its stop flag at least this often.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The queue type of this client: the context of a request is the number of its slot.
pub(crate) type Ring = VirtioBlkQueue<'static, u32>;

/// The buffers of one queue's requests, one per slot; they need not be of one size.
pub(crate) type Buffers<'m> = Vec<&'m mut [u8]>;

/// Numbers the progress display reads while the load runs.
pub(crate) struct Shared<'s> {
    /// Set from outside to end the load early.
    pub(crate) stop: &'s AtomicBool,
    /// Set when one queue fails, so that the others end.
    pub(crate) failed: AtomicBool,
    /// One per queue.
    pub(crate) queues: Vec<QueueProgress>,
}

/// What one queue has done so far. Written by its own thread only; on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct QueueProgress {
    /// Completed requests.
    pub(crate) operations: AtomicU64,
    /// Bytes read and written.
    pub(crate) bytes: AtomicU64,
}

/// One request that may be in flight.
struct Slot<'m> {
    buffer: &'m mut [u8],
    request: Option<Request>,
    sent: Instant,
}

/// One queue with its requests and its plan.
pub(crate) struct QueueClient<'m, P> {
    /// The number of the queue among all of the run, and on its device.
    at: usize,
    index: usize,
    ring: Ring,
    notifier: Box<dyn QueueNotifier>,
    completions: Arc<EventFd>,
    block_bytes: usize,
    slots: Vec<Slot<'m>>,
    free: Vec<u32>,
    done: Vec<(u32, bool)>,
    plan: P,
    /// Requests that may still be sent.
    quota: u64,
    /// When they are due, if not as soon as there is room.
    pace: Option<Pace>,
    finished: bool,
    last_progress: Instant,
    pub(crate) stats: QueueStats,
}

impl<'m, P: Plan> QueueClient<'m, P> {
    pub(crate) fn new(
        at: usize,
        index: usize,
        ring: Ring,
        transport: &VirtioBlkTransport,
        buffers: Buffers<'m>,
        block_bytes: usize,
        plan: P,
    ) -> Self {
        let now = Instant::now();
        let free = (0..).take(buffers.len()).collect();
        let slot = |buffer| Slot { buffer, request: None, sent: now };
        QueueClient {
            at,
            index,
            ring,
            notifier: transport.get_submission_notifier(index),
            completions: transport.get_completion_fd(index),
            block_bytes,
            done: Vec::with_capacity(buffers.len()),
            slots: buffers.into_iter().map(slot).collect(),
            free,
            plan,
            quota: u64::MAX,
            pace: None,
            finished: false,
            last_progress: now,
            stats: QueueStats::new(),
        }
    }

    /// Ends the load after `quota` requests.
    pub(crate) fn with_quota(mut self, quota: u64) -> Self {
        self.quota = quota;
        self
    }

    /// Sends requests when they are due, at a pace; `None`: whenever one has completed.
    pub(crate) fn with_pace(mut self, pace: Option<Pace>) -> Self {
        self.pace = pace;
        self
    }

    /// Gives back the parts that a second phase uses again.
    pub(crate) fn into_parts(self) -> (Ring, Buffers<'m>, P, QueueStats) {
        let buffers = self.slots.into_iter().map(|slot| slot.buffer).collect();
        (self.ring, buffers, self.plan, self.stats)
    }

    /// The queue's number in the run.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes what completed. Returns false if nothing did.
    #[inline]
    fn reap(&mut self, shared: &Shared<'_>) -> bool {
        let done = &mut self.done;
        done.extend(self.ring.completions().map(|c| (c.context, c.ret == 0)));
        if done.is_empty() {
            return false;
        }
        // One clock read for all of them: what takes time below is this client's own work.
        let now = Instant::now();
        self.last_progress = now;
        for (index, success) in done.drain(..) {
            let slot = &mut self.slots[index as usize];
            let Some(request) = slot.request.take() else {
                continue;
            };
            let length = data_length(&request, self.block_bytes);
            self.stats.record(&request, success, now.saturating_duration_since(slot.sent), length);
            let buffer = &slot.buffer[request.shift..request.shift + length];
            let before = self.stats.mismatches.len();
            self.plan.complete(&request, success, buffer, &mut self.stats.mismatches);
            self.stats.count_mismatches(before);
            self.free.push(index);
        }
        // Read for display only: no order with anything else is needed.
        let progress = &shared.queues[self.at];
        let Totals { operations, bytes } = self.stats.totals;
        progress.operations.store(operations, Ordering::Relaxed);
        progress.bytes.store(bytes, Ordering::Relaxed);
        true
    }

    /// Fills the queue up to its depth. Returns false if nothing was sent.
    #[inline]
    fn submit(&mut self) -> Result<bool, Error> {
        let was_idle = self.outstanding() == 0;
        let mut now = None;
        while self.quota > 0 {
            let Some(&index) = self.free.last() else {
                break;
            };
            let due = match &mut self.pace {
                None => None,
                Some(pace) => {
                    let clock = Instant::now();
                    let due = pace.due(clock);
                    if due > clock {
                        break;
                    }
                    Some((due, clock))
                }
            };
            let slot = &mut self.slots[index as usize];
            let request = match self.plan.next(slot.buffer.len()) {
                Next::Request(request) => request,
                Next::Later => break,
                Next::Done => {
                    self.finished = true;
                    break;
                }
            };
            let length = data_length(&request, self.block_bytes);
            let buffer = &mut slot.buffer[request.shift..request.shift + length];
            self.plan.prepare(&request, buffer);
            slot.sent = match (due, now) {
                (Some((due, clock)), _) => {
                    now = Some(clock);
                    due
                }
                (None, Some(now)) if !P::STAMP_EACH => now,
                _ => *now.insert(Instant::now()),
            };
            slot.request = Some(request);
            send(&mut self.ring, &request, buffer, self.block_bytes, index).map_err(|source| Error::Submit {
                queue: self.index,
                kind: request.kind,
                source,
            })?;
            self.free.pop();
            self.quota -= 1;
            if let Some(pace) = &mut self.pace {
                pace.advance();
            }
        }
        let Some(now) = now else {
            return Ok(false);
        };
        if was_idle {
            // The stall clock of a queue that had nothing to do starts with its first request.
            self.last_progress = now;
        }
        if self.ring.avail_notif_needed() {
            self.kick()?;
        }
        Ok(true)
    }

    fn kick(&mut self) -> Result<(), Error> {
        self.stats.kicks += 1;
        self.notifier.notify().map_err(self.event_error("notifying the target of requests"))
    }

    fn event_error(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<P> {
        let queue = self.index;
        move |source| Error::Event { queue, what, source }
    }

    fn has_work(&self) -> bool {
        self.quota > 0 && !self.finished
    }

    /// Counts what was due before `now`, the end of the load, and was not sent.
    fn count_unsent(&mut self, now: Instant) {
        self.stats.unsent = self.pace.as_ref().map_or(0, |pace| pace.overdue(now).min(self.quota));
    }

    fn check_stall(&self, now: Instant, limit: Duration) -> Result<(), Error> {
        let outstanding = self.outstanding();
        if outstanding == 0 || now.saturating_duration_since(self.last_progress) < limit {
            return Ok(());
        }
        Err(Error::Stalled { queue: self.index, outstanding, seconds: limit.as_secs() })
    }
}

/// Bytes of the request's buffer that move.
#[inline]
fn data_length(request: &Request, block_bytes: usize) -> usize {
    match request.kind {
        Kind::Read | Kind::Write => request.blocks as usize * block_bytes,
        Kind::Flush | Kind::Discard | Kind::WriteZeroes => 0,
    }
}

/// Puts one request on the ring; `context` comes back with its completion.
#[inline]
fn send(
    ring: &mut Ring,
    request: &Request,
    buffer: &mut [u8],
    block_bytes: usize,
    context: u32,
) -> std::io::Result<()> {
    let offset = request.lba * block_bytes as u64;
    let length = u64::from(request.blocks) * block_bytes as u64;
    match request.kind {
        Kind::Read => ring.read(offset, buffer, context),
        Kind::Write => ring.write(offset, buffer, context),
        Kind::Flush => ring.flush(context),
        Kind::Discard => ring.discard(offset, length, context),
        Kind::WriteZeroes => ring.write_zeroes(offset, length, request.unmap, context),
    }
}

/// Drives `queues` from the calling thread until their plans are done, `deadline` has passed or somebody
/// stops the run, and everything in flight has come back.
pub(crate) fn drive<P: Plan>(
    queues: &mut [QueueClient<'_, P>],
    options: &ClientOptions,
    deadline: Option<Instant>,
    shared: &Shared<'_>,
) -> Result<Polls, Error> {
    let waiter = options.interrupts.then(|| Waiter::new(queues)).transpose()?;
    for queue in queues.iter_mut() {
        queue.ring.set_used_notif_enabled(options.interrupts);
    }
    let mut polls = Polls::default();
    let mut stopping = false;
    let mut timed_out = false;
    loop {
        let mut active = false;
        let mut busy = false;
        for at in 0..queues.len() {
            let reaped = queues[at].reap(shared);
            if reaped
                && timed_out
                && let Some(waiter) = &waiter
            {
                waiter.expect_call(queues, at)?;
            }
            active |= reaped;
            let queue = &mut queues[at];
            if !stopping && queue.has_work() {
                active |= queue.submit()?;
                busy |= queue.has_work();
            }
            busy |= queue.outstanding() > 0;
        }
        polls.all += 1;
        polls.empty += u64::from(!active);
        if !busy {
            break;
        }
        if !active || polls.all.is_multiple_of(CLOCK_EVERY) {
            let now = Instant::now();
            let stop = deadline.is_some_and(|deadline| now >= deadline)
                || shared.stop.load(Ordering::Relaxed)
                || shared.failed.load(Ordering::Relaxed);
            if stop && !stopping {
                stopping = true;
                queues.iter_mut().for_each(|queue| queue.count_unsent(now));
            }
            for queue in queues.iter() {
                queue.check_stall(now, options.stall)?;
            }
        }
        timed_out = false;
        if !active {
            match &waiter {
                Some(waiter) => timed_out = !waiter.collect(queues, WAIT_MS)?,
                None if options.spin => std::hint::spin_loop(),
                // The target's threads may need this CPU.
                None => match pause(queues, stopping) {
                    Some(time) => std::thread::sleep(time),
                    None => std::thread::yield_now(),
                },
            }
        }
    }
    // What the target wrote although nobody waited for it counts as well.
    Waiter::new(queues)?.collect(queues, 0)?;
    Ok(polls)
}

/// How long nothing will happen, if that is long: nothing is out, and the next request is not due for a while.
fn pause<P: Plan>(queues: &mut [QueueClient<'_, P>], stopping: bool) -> Option<Duration> {
    if stopping || queues.iter().any(|queue| queue.outstanding() > 0) {
        return None;
    }
    let now = Instant::now();
    let waits =
        queues.iter_mut().filter(|queue| queue.has_work()).map(|queue| queue.pace.as_mut().map(|pace| pace.due(now)));
    let due = waits.collect::<Option<Vec<_>>>()?.into_iter().min()?;
    // Awake a while before, so that it is not sent late; and no longer than it takes to notice a stop.
    due.checked_duration_since(now)?
        .checked_sub(EARLY)
        .map(|time| time.min(LONGEST_PAUSE))
        .filter(|time| !time.is_zero())
}

/// Waits for the completion eventfds of one thread's queues.
struct Waiter {
    epoll: Epoll,
}

impl Waiter {
    fn new<P: Plan>(queues: &[QueueClient<'_, P>]) -> Result<Waiter, Error> {
        let failed = |queue| move |source| Error::Event { queue, what: "preparing to wait for completions", source };
        let first = queues.first().map_or(0, |queue| queue.index);
        let epoll = Epoll::new().map_err(failed(first))?;
        for (at, queue) in queues.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN, at as u64);
            epoll.ctl(ControlOperation::Add, queue.completions.as_raw_fd(), event).map_err(failed(queue.index))?;
        }
        Ok(Waiter { epoll })
    }

    /// Completions were found although no notification came: it has to be on its way. If it is not, a
    /// client without a time limit would have slept for ever.
    fn expect_call<P: Plan>(&self, queues: &mut [QueueClient<'_, P>], at: usize) -> Result<(), Error> {
        let before = queues[at].stats.calls;
        let deadline = Instant::now() + LATE_CALL;
        while queues[at].stats.calls == before {
            if Instant::now() >= deadline {
                queues[at].stats.missed_calls += 1;
                return Ok(());
            }
            self.collect(queues, WAIT_MS)?;
        }
        Ok(())
    }

    /// Waits until a queue was notified, or the time is over; reads every eventfd that was written, and counts the
    /// writes. Returns false if there was none.
    fn collect<P: Plan>(&self, queues: &mut [QueueClient<'_, P>], timeout_ms: i32) -> Result<bool, Error> {
        let mut events = [EpollEvent::default(); 16];
        let ready = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(source) => {
                return Err(Error::Event {
                    queue: queues.first().map_or(0, |queue| queue.index),
                    what: "waiting for completions",
                    source,
                });
            }
        };
        for event in &events[..ready] {
            let Some(queue) = usize::try_from(event.data()).ok().and_then(|at| queues.get_mut(at)) else {
                continue;
            };
            // Known to be readable, and nobody else reads it: this does not block.
            let calls = queue.completions.read().map_err(queue.event_error("reading a completion notification"))?;
            queue.stats.calls += calls;
        }
        Ok(ready > 0)
    }
}
