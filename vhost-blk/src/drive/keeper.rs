//! The thread that looks after one drive: hears when it has to go, sees when it fails, and tries to get it back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::back::NotBack;
use super::{Cause, Condition, Drive};

/// Time between two looks at a controller.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Between two looks at lanes that move.
const DEAL_PAUSE: Duration = Duration::from_millis(5);
/// Between a drive's going and the first attempt to get it back: a controller that only needs a reset is back at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at an address where nothing is.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// A controller that fails again and again is reset less and less often, but no less often than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// What works for this long has recovered.
const RECOVERED: Duration = Duration::from_secs(1);
/// How long the program's end waits for an attempt that is under way.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A drive's thread; it ends when this is dropped.
pub struct Keeper {
    drive: Arc<Drive>,
    stop: Arc<AtomicBool>,
    ended: Receiver<()>,
}

impl Keeper {
    /// Starts to look after a drive. The error is one line.
    pub fn start(drive: Arc<Drive>) -> Result<Keeper, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let (end, ended) = mpsc::channel();
        let (kept, stopped) = (drive.clone(), stop.clone());
        let run = move || {
            run(&kept, &stopped);
            // Before the other end hears of it: it may count on being the last to have the drive.
            drop(kept);
            drop(end);
        };
        std::thread::Builder::new()
            .name("keeper".into())
            .spawn(run)
            .map_err(|error| format!("cannot start the keeper of {drive}: {error}"))?;
        Ok(Keeper { drive, stop, ended })
    }

    /// The drive, if nobody looks after it any more: the thread has panicked.
    pub fn bereft(&self) -> Option<&Drive> {
        matches!(self.ended.try_recv(), Err(mpsc::TryRecvError::Disconnected)).then_some(&*self.drive)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.drive.bell.ring();
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.ended.recv_timeout(STOP_LIMIT) {
            // It ends when the controller has answered, or its deadline has passed; what it opened is closed then.
            log::debug!("{}: an attempt to get it back is still under way", self.drive);
        }
    }
}

fn run(drive: &Drive, stop: &AtomicBool) {
    let mut attempts = Attempts::default();
    let mut next_check = Instant::now() + CHECK_INTERVAL;
    let mut dealing = false;
    // Relaxed: the flag guards nothing but this loop.
    while !stop.load(Ordering::Relaxed) {
        #[cfg(test)]
        crate::target::tests::panic_if_asked(&drive.name, "keeper panics");
        let mut until = attempts.next.unwrap_or(next_check);
        if dealing {
            until = until.min(Instant::now() + DEAL_PAUSE);
        }
        wait(drive, until.saturating_duration_since(Instant::now()));
        let cause = drive.trouble();
        if let Some(cause) = cause {
            drive.leave(cause);
        }
        let now = Instant::now();
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let since = match &drive.state().condition {
            Condition::Present(present) => Some(present.since),
            Condition::Away(_) => None,
            Condition::Over => return,
        };
        match since {
            Some(since) => {
                attempts.works(now.saturating_duration_since(since));
                dealing = drive.deal();
                if now >= next_check {
                    drive.log.tell_left_out(&drive.name, false);
                    drive.check();
                    next_check = Instant::now() + CHECK_INTERVAL;
                }
            }
            None => {
                dealing = false;
                let due = *attempts.next.get_or_insert(now + attempts.pause.max(FIRST_PAUSE));
                if now >= due {
                    let result = drive.come_back();
                    attempts.tried(drive, result);
                }
            }
        }
    }
}

/// Waits until something is told about the drive, for `time` at most.
fn wait(drive: &Drive, time: Duration) {
    let device = match &drive.state().condition {
        Condition::Present(present) => Some(present.device.clone()),
        _ => None,
    };
    let mut sources = vec![PollFd::new(&drive.bell, PollFlags::IN)];
    let notices = device.as_ref().map(|device| device.notices());
    sources.extend(notices.iter().map(|notices| PollFd::new(notices, PollFlags::IN)));
    let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    // An error (a signal) is a wake-up like any other.
    let _ = poll(&mut sources, Some(&time));
    drive.bell.silence();
}

impl Drive {
    /// Why the drive has to go away, if it has to.
    fn trouble(&self) -> Option<Cause> {
        let expired = self.expired.lock().unwrap_or_else(PoisonError::into_inner).take();
        let notice = match &self.state().condition {
            Condition::Present(present) => present.device.notice(),
            _ => None,
        };
        if let Some(notice) = notice {
            return Some(Cause::from(notice));
        }
        let (why, at) = expired?;
        let controller = match &self.state().condition {
            // What was noticed before the controller came back has been dealt with.
            Condition::Present(present) if present.since < at => present.controller.clone(),
            _ => return None,
        };
        // It may have gone, which is another matter than a command that it has lost.
        let health = controller.health();
        Some(health.map_or_else(|error| Cause::from(&error), |()| Cause::Failed(why)))
    }
}

/// The next one of the pauses that grow.
pub(crate) fn longer(pause: &mut Duration) -> Duration {
    *pause = (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    *pause
}

impl NotBack {
    /// Why, and how long it is before the next attempt: `growing` if there is something that does not work.
    pub(crate) fn pause(self, growing: &mut Duration) -> (String, Duration) {
        match self {
            NotBack::Nothing(why) | NotBack::Withheld(why) => (why, LOOK_PAUSE),
            NotBack::Unfit(why) => (why, longer(growing)),
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
    told: Option<String>,
}

impl Attempts {
    /// The drive has been there for this long.
    fn works(&mut self, time: Duration) {
        (self.next, self.told) = (None, None);
        if time >= RECOVERED {
            self.pause = FIRST_PAUSE;
        }
    }

    /// Chooses the time of the next attempt. Tells why this one failed if it is something new.
    fn tried(&mut self, drive: &Drive, result: Result<(), NotBack>) {
        let (why, pause) = match result {
            Ok(()) => {
                longer(&mut self.pause);
                self.next = None;
                return;
            }
            Err(error) => error.pause(&mut self.pause),
        };
        if self.told.as_ref() != Some(&why) {
            log::warn!("{drive}: not back yet, which is tried again and again: {why}");
            self.told = Some(why);
        }
        self.next = Some(Instant::now() + pause);
    }
}
