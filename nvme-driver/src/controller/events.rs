//! Asynchronous events (NVMe Base 2.0, 5.2): what a controller tells without being asked.

use std::time::{Duration, Instant};

use vmm_sys_util::poll::PollContext;

use super::admin::Admin;
use super::{Controller, lock};
use crate::Error;
use crate::spec::log_page::{self, ChangedNamespaces, ErrorEntry, Health};

/// Something a controller has told, with the log page that says more: reading it is what lets the next such event come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An error that belongs to no command, or one the controller wants looked at.
    Error {
        /// What happened: 0 invalid doorbell, 1 invalid doorbell value, 2 diagnostic failure, 3 persistent internal error,
        /// 4 transient internal error, 5 firmware image load error.
        information: u8,
        /// The error log, newest first.
        entries: Vec<ErrorEntry>,
    },
    /// The drive's health: 0 reliability, 1 temperature, 2 spare.
    Health {
        /// Which of them.
        information: u8,
        /// The SMART / health log.
        health: Box<Health>,
    },
    /// Namespaces were attached, detached, resized or formatted: ask for them again.
    NamespacesChanged(ChangedNamespaces),
    /// New firmware is being activated; commands may wait meanwhile.
    FirmwareActivation,
    /// Something else.
    Other {
        /// Event type: 0 error, 1 health, 2 notice, 6 I/O command set, 7 vendor specific.
        kind: u8,
        /// Event information.
        information: u8,
        /// The log page that has more; it was read once, so that such events go on.
        log_page: u8,
    },
}

/// Bits of completion DW0 (NVMe Base 2.0, 5.2.1).
struct Answer {
    kind: u8,
    information: u8,
    log_page: u8,
}

impl Answer {
    fn parse(result: u32) -> Answer {
        Answer { kind: result as u8 & 7, information: (result >> 8) as u8, log_page: (result >> 16) as u8 }
    }

    /// The event without its log.
    fn unexplained(&self) -> Event {
        let &Answer { kind, information, log_page } = self;
        match (kind, information) {
            (KIND_NOTICE, NOTICE_NAMESPACES) => Event::NamespacesChanged(ChangedNamespaces::TooMany),
            (KIND_NOTICE, NOTICE_FIRMWARE) => Event::FirmwareActivation,
            _ => Event::Other { kind, information, log_page },
        }
    }
}

const KIND_ERROR: u8 = 0;
const KIND_HEALTH: u8 = 1;
const KIND_NOTICE: u8 = 2;
const NOTICE_NAMESPACES: u8 = 0;
const NOTICE_FIRMWARE: u8 = 1;

/// How long one wait lasts before the controller's status is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the queue is looked at where there is no interrupt.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

impl Controller {
    /// The events there are now. Does not wait for events, only for the log pages that belong to them.
    pub fn poll_events(&self) -> Result<Vec<Event>, Error> {
        let mut admin = lock(&self.inner.admin);
        self.inner.hardware.in_operation()?;
        admin.reap(&self.inner.hardware);
        let mut events = Vec::new();
        // No event request is renewed before the end: a controller that tells without pause does not keep the thread here.
        while let Some(result) = admin.events.pop_front() {
            let answer = Answer::parse(result);
            events.push(match self.explain(&mut admin, &answer) {
                Ok(event) => event,
                // The log could not be had; that something happened is worth telling all the same.
                Err(error @ (Error::Command { .. } | Error::Untrustworthy(_) | Error::Unanswered { .. })) => {
                    log::warn!("{}: the log of an event is not to be had: {error}", self.inner.hardware.name);
                    answer.unexplained()
                }
                Err(error) => return Err(error),
            });
        }
        admin.request_events(&self.inner.hardware, self.inner.identity.event_limit);
        Ok(events)
    }

    /// Waits for events, `timeout` at most; empty when none came. An error also when the controller is gone or has failed
    /// meanwhile, which is noticed within a fraction of a second.
    pub fn next_events(&self, timeout: Duration) -> Result<Vec<Event>, Error> {
        let start = Instant::now();
        loop {
            let waited = start.elapsed();
            if let Some(interrupt) = self.inner.vectors.first() {
                // Cleared before the look, so that an answer after the look makes it readable again. An error means
                // that there was nothing to clear.
                let _ = interrupt.read();
            }
            let events = self.poll_events()?;
            if !events.is_empty() || waited >= timeout {
                return Ok(events);
            }
            self.health()?;
            self.pause((timeout - waited).min(LOOK_INTERVAL));
        }
    }

    /// Until the admin queue's interrupt, or where there is none for a short time.
    fn pause(&self, time: Duration) {
        let waited = self.inner.vectors.first().and_then(|interrupt| {
            let poll: PollContext<()> = PollContext::new().ok()?;
            poll.add(interrupt, ()).ok()?;
            poll.wait_timeout(time).ok().map(|_| ())
        });
        if waited.is_none() {
            std::thread::sleep(time.min(POLL_INTERVAL));
        }
    }

    fn explain(&self, admin: &mut Admin, answer: &Answer) -> Result<Event, Error> {
        let &Answer { kind, information, log_page } = answer;
        match (kind, information, log_page) {
            (KIND_ERROR, _, log_page::id::ERROR_INFORMATION) => {
                Ok(Event::Error { information, entries: self.read_error_log(admin)? })
            }
            (KIND_HEALTH, _, log_page::id::SMART_HEALTH) => {
                Ok(Event::Health { information, health: Box::new(self.read_health_log(admin)?) })
            }
            (KIND_NOTICE, NOTICE_NAMESPACES, _) => Ok(Event::NamespacesChanged(self.read_changed_namespaces(admin)?)),
            (KIND_NOTICE, NOTICE_FIRMWARE, _) => {
                self.clear_event(admin, log_page::id::FIRMWARE_SLOT);
                Ok(Event::FirmwareActivation)
            }
            _ => {
                self.clear_event(admin, log_page);
                Ok(answer.unexplained())
            }
        }
    }

    /// Reads the beginning of a log page only so that the controller reports such events again.
    fn clear_event(&self, admin: &mut Admin, log_page: u8) {
        if log_page != 0
            && let Err(error) = self.read_log_page(admin, log_page, 0, 0, 512)
        {
            log::debug!("log page {log_page:#04x} of an event could not be read: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_fields_lie_where_the_specification_puts_them() {
        let answer = Answer::parse(0x0004_0102);
        assert_eq!((answer.kind, answer.information, answer.log_page), (2, 1, 4));
        assert_eq!(Answer::parse(u32::MAX).kind, 7);
        let changed = Answer::parse(0x0004_0002).unexplained();
        assert_eq!(changed, Event::NamespacesChanged(ChangedNamespaces::TooMany), "unknown which: look at all");
    }
}
