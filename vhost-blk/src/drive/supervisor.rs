//! The supervisor: a drive's thread that hears of removal requests, notices failures, and reattaches the drive. It asks an attached
//! drive nothing, so that it never waits for an answer when it is needed; `monitor` asks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nvme_driver::Controller;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::{Error, OpenError};
use super::{Condition, DetachCause, Drive, monitor};
use crate::fault_point::fault_point;

/// Time between two looks at a controller: one that has failed is noticed within it, if no request was with it.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Between a detach and the first attempt to reattach: a controller that only needs a reset is ready at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at an address where no device is.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause between two resets of a controller that fails again and again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The longest pause for a firmware activation if the controller does not tell one (MTFA).
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);
/// The failure limit: how often a drive may fail without having recovered before the pauses grow. By then a request that is the
/// reason has failed.
const QUICK_ATTEMPTS: u32 = 5;
/// A drive that works for this long has recovered.
const RECOVERED: Duration = Duration::from_secs(1);
/// How long the end of the program waits for attempts under way.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A drive's two threads, supervisor and monitor. They end when this is dropped.
pub struct Supervisor {
    drive: Arc<Drive>,
    stop: Arc<AtomicBool>,
    ended: Vec<Receiver<()>>,
}

impl Supervisor {
    /// Starts both threads.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start(drive: Arc<Drive>) -> Result<Supervisor, Error> {
        let mut supervisor = Supervisor { drive, stop: Arc::default(), ended: Vec::new() };
        supervisor.spawn("supervisor", run)?;
        supervisor.spawn("monitor", monitor::run)?;
        Ok(supervisor)
    }

    fn spawn(&mut self, thread: &'static str, run: fn(&Drive, &AtomicBool)) -> Result<(), Error> {
        let (end, ended) = mpsc::channel();
        let (kept, stopped) = (self.drive.clone(), self.stop.clone());
        let run = move || {
            run(&kept, &stopped);
            // Before the other end hears of it: it may count on being the last to have the drive.
            drop(kept);
            drop(end);
        };
        std::thread::Builder::new().name(thread.into()).spawn(run).map_err(|source| Error::Thread {
            drive: self.drive.to_string(),
            thread,
            source,
        })?;
        self.ended.push(ended);
        Ok(())
    }

    /// The drive, if one of its threads has panicked.
    pub fn bereft(&self) -> Option<&Drive> {
        let has_ended = |ended: &Receiver<()>| matches!(ended.try_recv(), Err(mpsc::TryRecvError::Disconnected));
        self.ended.iter().any(has_ended).then_some(&*self.drive)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.drive.supervisor_event.notify();
        self.drive.monitor_event.notify();
        let deadline = Instant::now() + STOP_LIMIT;
        for ended in &self.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(left) {
                // It ends when the controller has answered, or its deadline has passed; what it opened is closed then.
                log::debug!(
                    "{}: its threads still wait for the controller; they end with its answer or its deadline",
                    self.drive
                );
            }
        }
    }
}

fn run(drive: &Drive, stop: &AtomicBool) {
    let mut attempts = Attempts::default();
    // Relaxed: the flag guards nothing but this loop.
    while !stop.load(Ordering::Relaxed) {
        fault_point!("supervisor panics", drive);
        let until = attempts.next.unwrap_or(Instant::now() + CHECK_INTERVAL);
        wait(drive, until.saturating_duration_since(Instant::now()));
        if let Some(cause) = drive.trouble() {
            drive.detach(cause);
        }
        drive.look();
        let now = Instant::now();
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let since = match &drive.state().condition {
            Condition::Attached(attached) => Some(attached.since),
            Condition::Detached(_) => None,
            Condition::Closed => return,
        };
        match since {
            Some(since) => attempts.works(now.saturating_duration_since(since)),
            None => {
                let due = attempts.next.unwrap_or_else(|| now + attempts.first(drive.device_is_open()));
                attempts.next = Some(due);
                if now >= due {
                    let result = drive.reattach();
                    attempts.tried(drive, result);
                }
            }
        }
    }
}

/// Waits for a notice from the device or a wake-up, for `time` at most.
fn wait(drive: &Drive, time: Duration) {
    let device = match &drive.state().condition {
        Condition::Attached(attached) => Some(attached.device.clone()),
        Condition::Detached(detached) => detached.kept.as_ref().map(|kept| kept.device.clone()),
        Condition::Closed => None,
    };
    let mut sources = vec![PollFd::new(&drive.supervisor_event, PollFlags::IN)];
    let notices = device.as_ref().map(|device| device.notices());
    sources.extend(notices.iter().map(|notices| PollFd::new(notices, PollFlags::IN)));
    let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    // An error (a signal) is a wake-up like any other.
    let _ = poll(&mut sources, Some(&time));
    drive.supervisor_event.clear();
}

/// Commands that were not answered in time.
pub(super) struct Expired {
    pub why: String,
    /// When the worker noticed.
    pub at: Instant,
    /// When the controller was last seen to pause since then.
    pub paused: Option<Instant>,
}

impl Drive {
    /// Why the drive has to be detached; `None`: it need not.
    fn trouble(&self) -> Option<DetachCause> {
        let expired = self.expired.lock().unwrap_or_else(PoisonError::into_inner).take();
        let notice = match &mut self.state().condition {
            Condition::Attached(attached) => attached.device.notice(),
            Condition::Detached(detached) => {
                // It is wanted back, or gone, before it could be brought up again.
                let kept = detached.kept.take_if(|kept| kept.device.notice().is_some());
                kept.into_iter().for_each(|kept| self.close(kept));
                None
            }
            Condition::Closed => None,
        };
        if let Some(notice) = notice {
            return Some(DetachCause::from(notice));
        }
        let expired = expired?;
        let controller = match &self.state().condition {
            // What was noticed before the controller came back has been dealt with.
            Condition::Attached(attached) if attached.since < expired.at => attached.controller.clone(),
            _ => return None,
        };
        // It may have gone, which is another matter than a command that it has lost.
        if let Err(error) = controller.health() {
            return Some(DetachCause::from(&error));
        }
        self.still_expired(&controller, expired).map(DetachCause::Failed)
    }

    /// Why overdue commands are lost; `None`: they are not. A controller that activates firmware may pause (CSTS.PP); after that it
    /// has the usual time for a command.
    fn still_expired(&self, controller: &Controller, expired: Expired) -> Option<String> {
        let longest = controller.identity().activation_time.unwrap_or(UNKNOWN_PAUSE);
        let waits = match expired.paused {
            _ if controller.is_paused() && expired.at.elapsed() < longest => Some(Instant::now()),
            Some(last) if !self.has_overdue() => {
                log::info!(
                    "{}: it has paused for {:?} and answers again; nothing was reset",
                    self,
                    last.saturating_duration_since(expired.at)
                );
                return None;
            }
            Some(last) if last.elapsed() < self.options.io_timeout => Some(last),
            _ => return Some(expired.why),
        };
        let mut slot = self.expired.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(Expired { paused: waits, ..expired });
        None
    }

    /// Whether the controller holds a command for longer than the time for a command.
    fn has_overdue(&self) -> bool {
        let slots = self.shares().slots().to_vec();
        let mut ages = slots.iter().filter_map(|slot| self.pool.oldest(slot.id).ok().flatten());
        ages.any(|age| age >= self.options.io_timeout)
    }
}

/// Doubles a pause, within bounds, and returns it.
pub(crate) fn longer(pause: &mut Duration) -> Duration {
    *pause = (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    *pause
}

impl OpenError {
    /// The pause before the next attempt. `growing`: the pause between attempts at a controller that does not work; it is doubled.
    pub(crate) fn pause(&self, growing: &mut Duration) -> Duration {
        match self {
            OpenError::Absent(_) | OpenError::Denied(_) => LOOK_PAUSE,
            OpenError::Unusable(_) => longer(growing),
        }
    }
}

/// The attempts to reattach a drive: when the next one is due, and what the last one said.
#[derive(Default)]
struct Attempts {
    /// `None`: the drive is attached.
    next: Option<Instant>,
    /// The pause after a failure.
    pause: Duration,
    /// How often the drive was reattached and failed before it had recovered.
    times: u32,
    told: Option<String>,
}

impl Attempts {
    /// Notes that the drive has been attached for this long.
    fn works(&mut self, time: Duration) {
        (self.next, self.told) = (None, None);
        if time >= RECOVERED {
            (self.pause, self.times) = (FIRST_PAUSE, 0);
        }
    }

    /// The pause before the first attempt; none for a device that was `kept` open, whose function has been reset already.
    fn first(&self, kept: bool) -> Duration {
        if kept && self.pause <= FIRST_PAUSE { Duration::ZERO } else { self.pause.max(FIRST_PAUSE) }
    }

    /// Notes how an attempt has ended, and chooses the time of the next. Logs the reason of a failure if it is a new one.
    fn tried(&mut self, drive: &Drive, result: Result<(), OpenError>) {
        let (why, pause) = match result {
            Ok(()) => {
                self.times += 1;
                if self.times > QUICK_ATTEMPTS {
                    longer(&mut self.pause);
                }
                (self.next, self.told) = (None, None);
                return;
            }
            Err(error) => (error.to_string(), error.pause(&mut self.pause)),
        };
        if self.told.as_ref() != Some(&why) {
            log::warn!("{drive}: not back yet; the program goes on trying: {why}");
            self.told = Some(why);
        }
        self.next = Some(Instant::now() + pause);
    }
}
