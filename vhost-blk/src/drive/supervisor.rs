//! The thread that looks after one drive: hears when it has to go, sees when it fails, and tries to get it back. It asks nothing of a
//! drive that is there, so that it waits for no answer when it is needed; see `monitor` for that.

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
/// Between a drive's going and the first attempt to get it back: a controller that only needs a reset is back at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at an address where nothing is.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// A controller that fails again and again is reset less and less often, but no less often than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a controller may pause that does not say so (MTFA).
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);
/// So often a drive may fail, without having recovered, before the pauses grow: by then a request that is the reason has its error.
const QUICK_ATTEMPTS: u32 = 5;
/// What works for this long has recovered.
const RECOVERED: Duration = Duration::from_secs(1);
/// How long the program's end waits for what is under way.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A drive's threads: this one, and its monitor. They end when this is dropped.
pub struct Supervisor {
    drive: Arc<Drive>,
    stop: Arc<AtomicBool>,
    ended: Vec<Receiver<()>>,
}

impl Supervisor {
    /// Starts to look after a drive.
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

    /// The drive, if nobody looks after it any more: a thread has panicked.
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
                log::debug!("{}: it is still being asked, or got back", self.drive);
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

/// Waits until something is told about the drive, for `time` at most.
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
    /// When that was noticed.
    pub at: Instant,
    /// When the controller was last seen to pause since then.
    pub paused: Option<Instant>,
}

impl Drive {
    /// Why the drive has to go away, if it has to.
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

    /// A controller that activates firmware may pause (CSTS.PP): what it does not answer meanwhile is not lost. After that it has as long as
    /// any command has.
    fn still_expired(&self, controller: &Controller, expired: Expired) -> Option<String> {
        let longest = controller.identity().activation_time.unwrap_or(UNKNOWN_PAUSE);
        let waits = match expired.paused {
            _ if controller.is_paused() && expired.at.elapsed() < longest => Some(Instant::now()),
            Some(last) if !self.has_overdue() => {
                log::info!("{}: it has paused for {:?}", self, last.saturating_duration_since(expired.at));
                return None;
            }
            Some(last) if last.elapsed() < self.options.io_timeout => Some(last),
            _ => return Some(expired.why),
        };
        let mut slot = self.expired.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(Expired { paused: waits, ..expired });
        None
    }

    /// Is anything with the drive for longer than a command may take?
    fn has_overdue(&self) -> bool {
        let places = self.shares().places().to_vec();
        let mut ages = places.iter().filter_map(|place| self.pool.oldest(place.id).ok().flatten());
        ages.any(|age| age >= self.options.io_timeout)
    }
}

/// The next one of the pauses that grow.
pub(crate) fn longer(pause: &mut Duration) -> Duration {
    *pause = (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    *pause
}

impl OpenError {
    /// How long it is before the next attempt. `growing`: the pause between attempts at what is there and does not work.
    pub(crate) fn pause(&self, growing: &mut Duration) -> Duration {
        match self {
            OpenError::Absent(_) | OpenError::Denied(_) => LOOK_PAUSE,
            OpenError::Unusable(_) => longer(growing),
        }
    }
}

/// When the next attempt is made, and what the last one said.
#[derive(Default)]
struct Attempts {
    /// `None`: the drive is there.
    next: Option<Instant>,
    /// After a failure.
    pause: Duration,
    /// How often it was back, and had not recovered.
    times: u32,
    told: Option<String>,
}

impl Attempts {
    /// The drive has been there for this long.
    fn works(&mut self, time: Duration) {
        (self.next, self.told) = (None, None);
        if time >= RECOVERED {
            (self.pause, self.times) = (FIRST_PAUSE, 0);
        }
    }

    /// How long it is before the first attempt. What is `kept` has been reset already, and has all the time it needs.
    fn first(&self, kept: bool) -> Duration {
        if kept && self.pause <= FIRST_PAUSE { Duration::ZERO } else { self.pause.max(FIRST_PAUSE) }
    }

    /// Chooses the time of the next attempt. Tells why this one failed if it is something new.
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
