//! The eventfds by which a lane and the driver's side wake each other.
//!
//! A front-end shares them and may do to them what it likes: the lane reads none of them, and signals them in a way that never
//! blocks.

use std::fs::File;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Lane;
use crate::event;

/// What the front-end has given the ring; `None`: that side polls, or does not want to know.
pub(super) struct Events {
    /// Wakes the lane. It is only waited for, see `Worker::watch`.
    pub kick: Option<File>,
    /// Wakes the driver's side.
    pub call: Option<File>,
    /// Says that the ring has stopped for good.
    pub error: Option<File>,
    /// Nobody reads a kick, so one that an earlier ring got ends this one's first sleep.
    earlier_kick: bool,
}

impl Events {
    pub(super) fn new(kick: Option<File>, call: Option<File>, error: Option<File>) -> Events {
        let earlier_kick = kick.as_ref().is_some_and(is_readable);
        Events { kick, call, error, earlier_kick }
    }

    /// The ring has stopped for good.
    pub(super) fn tell_broken(&self) {
        self.error.iter().for_each(event::signal);
    }
}

impl Lane {
    /// Wakes the driver's side, if there is an eventfd for it.
    #[inline(never)]
    pub(super) fn notify(&mut self) {
        if let Some(call) = &self.events.call {
            self.tally.calls += 1;
            event::signal(call);
        }
    }

    /// The eventfds, for a lane that goes on with another ring: kick, call, error.
    pub fn into_events(mut self) -> [Option<File>; 3] {
        let Events { kick, call, error, .. } = &mut self.events;
        [kick.take(), call.take(), error.take()]
    }

    /// Replaces the call eventfd. The driver's side may have looked at the old one for the last time already, so the new one
    /// is signalled once: a notification too many is harmless, a lost one is not.
    pub(crate) fn set_call(&mut self, call: Option<File>) {
        self.events.call = call;
        self.notify();
    }

    pub(crate) fn set_kick(&mut self, kick: Option<File>) {
        self.events.earlier_kick = kick.as_ref().is_some_and(is_readable);
        self.events.kick = kick;
    }

    pub(crate) fn set_error(&mut self, error: Option<File>) {
        self.events.error = error;
    }

    pub(crate) fn kick(&self) -> Option<&File> {
        self.events.kick.as_ref()
    }

    /// The kick eventfd ended a sleep.
    pub(crate) fn count_kick(&mut self) {
        self.tally.kicks += 1;
        if !std::mem::take(&mut self.events.earlier_kick) {
            self.advice.count_kick();
        }
    }
}

/// Has the eventfd been signalled, and not been read?
fn is_readable(event: &File) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready != 0)
}
