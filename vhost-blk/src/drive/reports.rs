//! What a drive reports: its asynchronous events, its health, and how both are logged.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use nvme_driver::spec::log_page::{ChangedNamespaces, ErrorEntry, Health};
use nvme_driver::{Controller, Error, Event};

use super::{Condition, Drive};

/// Time between two reads of namespaces and health, of whose changes a drive should send events.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two reads of namespaces and health while something is wrong: no drive sends an event when that is over.
const LOOK_INTERVAL_IN_TROUBLE: Duration = Duration::from_secs(1);

/// What was logged of a drive's reports, so that it is logged once.
#[derive(Default)]
pub(super) struct Reports {
    /// Why the reports could not be read last time.
    unreadable: Option<String>,
    /// Critical warnings, as the drive numbers them.
    warnings: u8,
    /// When to read again; `None`: never read.
    next_look: Option<Instant>,
    /// Error events so far.
    errors: u64,
}

impl Drive {
    /// Reads and logs what the controller reports.
    pub(super) fn check(&self) {
        let Ok(controller) = self.controller() else { return };
        let controller = controller.monitor(self.options.admin_timeout);
        // What cannot be read is no reason to stop a drive that answers its guests.
        match self.look_at_reports(&controller) {
            Err(error) => self.complain(error.to_string()),
            Ok(()) => self.reports().unreadable = None,
        }
    }

    fn reports(&self) -> std::sync::MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_at_reports(&self, controller: &Controller) -> Result<(), Error> {
        controller.health()?;
        let events = controller.poll_events()?;
        events.iter().for_each(|event| self.log_event(event));
        let now = Instant::now();
        let told = events.iter().any(|event| matches!(event, Event::NamespacesChanged(_) | Event::Health { .. }));
        if !told && self.reports().next_look.is_some_and(|next| now < next) {
            return Ok(());
        }
        // One who refuses the first question may still answer the second.
        self.reports().next_look = Some(now + LOOK_INTERVAL_IN_TROUBLE);
        let complete = self.look_at_namespaces(controller);
        let health = controller.health_log()?;
        self.settle_losses(health.unsafe_shutdowns);
        self.tell_warnings(&health);
        if complete? && health.critical_warning == 0 {
            self.reports().next_look = Some(now + LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Compares the count of unsafe shutdowns if the controller did not tell it when the drive was reattached.
    fn settle_losses(&self, count: u128) {
        let mut state = self.state();
        let Condition::Attached(attached) = &mut state.condition else { return };
        if !std::mem::take(&mut attached.unsure) || attached.unsafe_shutdowns == Some(count) {
            return;
        }
        attached.unsafe_shutdowns = Some(count);
        let losses = attached.losses();
        state.namespaces.iter().for_each(|namespace| namespace.lose_cache(&self.name, losses));
    }

    /// Logs why the drive's reports cannot be read, once for each new reason.
    fn complain(&self, why: String) {
        let last = &mut self.reports().unreadable;
        if last.as_ref() != Some(&why) {
            log::warn!("{}: cannot read what the drive reports; I/O goes on: {why}", self.name);
            *last = Some(why);
        }
    }

    /// Logs critical warnings that have appeared or disappeared.
    fn tell_warnings(&self, health: &Health) {
        let now = health.critical_warning;
        let before = std::mem::replace(&mut self.reports().warnings, now);
        for bit in 0..8 {
            match (before & 1 << bit != 0, now & 1 << bit != 0) {
                (false, true) => log::error!("{}: the drive warns: {}", self.name, warning(bit, health)),
                (true, false) => log::warn!("{}: the drive no longer warns of {}", self.name, subject(bit)),
                _ => {}
            }
        }
    }

    /// Logs an asynchronous event.
    fn log_event(&self, event: &Event) {
        let name = &self.name;
        match event {
            Event::Error { information, entries } => {
                let count = self.reports().count_error();
                // Each doubling: a failing drive cannot fill the log.
                if count.is_power_of_two() {
                    let newest = entries.first().map_or_else(|| "its error log is empty".into(), error_entry);
                    log::warn!(
                        "{name}: the drive reports {}: {newest} ({count} error events so far)",
                        error_event(*information)
                    );
                }
            }
            // What it says is looked at, and told if it is news.
            Event::Health { information, health } => {
                log::debug!("{name}: the drive reports health event {information}: {health:?}");
            }
            Event::NamespacesChanged(ChangedNamespaces::Some(ids)) => {
                log::info!("{name}: namespaces have changed: {ids:?}")
            }
            Event::NamespacesChanged(ChangedNamespaces::TooMany) => {
                log::info!("{name}: namespaces have changed: more than the drive can name, so that all are looked at");
            }
            Event::FirmwareActivation => log::warn!("{name}: new firmware is being activated; requests may wait"),
            Event::Other { kind, information, log_page } => log::info!(
                "{name}: the drive reports an event that means nothing here: type {kind}, information {information:#04x}, \
                 log page {log_page:#04x}"
            ),
            other => log::info!("{name}: the drive reports {other:?}"),
        }
    }
}

impl Reports {
    /// Counts an error event; returns how many there were.
    fn count_error(&mut self) -> u64 {
        self.errors += 1;
        self.errors
    }
}

/// The subject of an error event, in words that follow "reports" (NVMe Base 2.0, 5.2.1, figure of Error Status).
fn error_event(information: u8) -> String {
    match information {
        0 => "a write to a doorbell that does not exist".into(),
        1 => "an invalid value in a doorbell".into(),
        2 => "a failed self-diagnosis".into(),
        3 => "a persistent internal error".into(),
        4 => "a transient internal error".into(),
        5 => "that it could not load its firmware".into(),
        _ => format!("an error (event {information})"),
    }
}

/// Describes an entry of the drive's error log.
fn error_entry(entry: &ErrorEntry) -> String {
    let command = match (entry.sq_id, entry.command_id) {
        (Some(queue), Some(id)) => format!("command {id} of queue {queue}"),
        _ => "no command in particular".into(),
    };
    let place = match entry.namespace {
        0 | u32::MAX => String::new(),
        namespace => format!(", namespace {namespace}, from block {}", entry.lba),
    };
    format!("entry {} of its error log, {command}{place}: {}", entry.count, entry.status)
}

/// The subject of a bit of Critical Warning (NVMe Base 2.0, 5.16.1.3), in words that follow "warns of".
fn subject(bit: u8) -> String {
    match bit {
        0 => "low spare capacity".into(),
        1 => "its temperature".into(),
        2 => "degraded reliability".into(),
        3 => "media that cannot be written".into(),
        4 => "its volatile memory's backup".into(),
        5 => "its persistent memory region".into(),
        _ => format!("something unknown (bit {bit})"),
    }
}

/// The meaning of a bit of Critical Warning, and what to do about it.
fn warning(bit: u8, health: &Health) -> String {
    let celsius = i32::from(health.temperature_kelvins) - 273;
    match bit {
        0 => format!(
            "its spare capacity has fallen to {} %, below its threshold of {} %; replace it soon",
            health.spare_percent, health.spare_threshold_percent
        ),
        1 => format!("its temperature, {celsius} °C, is beyond its limits; check the cooling"),
        2 => format!(
            "it has become unreliable, with {} media errors so far; back up what it holds and replace it",
            health.media_errors
        ),
        3 => "its media cannot be written any more: writes fail, reads go on; copy what it holds and replace it".into(),
        4 => {
            "the backup of its volatile memory has failed: what is in its cache may be lost with the power; replace it"
                .into()
        }
        5 => "its persistent memory region cannot be trusted; it is not used here, so nothing has to be done".into(),
        _ => format!("critical warning bit {bit}, whose meaning is unknown; see its manual"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_warning_says_what_to_do() {
        let mut page = [0; Health::BYTES];
        page[1..6].copy_from_slice(&[0x57, 0x01, 3, 10, 99]);
        let health = Health::parse(&page).unwrap();
        assert!(warning(0, &health).contains("3 %, below its threshold of 10 %"), "{}", warning(0, &health));
        assert!(warning(1, &health).contains("70 °C"), "{}", warning(1, &health));
        for (bit, advice) in
            (0..).zip(["replace", "cooling", "back up", "copy", "replace", "nothing", "manual", "manual"])
        {
            let text = warning(bit, &health);
            assert!(text.contains(advice) && !text.contains('\n'), "bit {bit}: {text}");
        }
        let subjects: std::collections::HashSet<_> = (0..8).map(subject).collect();
        assert_eq!(subjects.len(), 8);
    }

    #[test]
    fn error_events_are_words() {
        let events: std::collections::HashSet<_> = (0..8).map(error_event).collect();
        assert_eq!(events.len(), 8);
        let mut page = [0; ErrorEntry::BYTES];
        page[0] = 7;
        page[8..12].copy_from_slice(&[2, 0, 5, 0]);
        // Media and Data Integrity Errors, 81h.
        page[12..14].copy_from_slice(&[0x02, 0x05]);
        page[16] = 99;
        page[24] = 3;
        let [mut entry] = ErrorEntry::parse(&page)[..] else { panic!("one entry") };
        let text = error_entry(&entry);
        let start = "entry 7 of its error log, command 5 of queue 2, namespace 3, from block 99: ";
        assert!(text.starts_with(start) && text.contains("Unrecovered Read Error"), "{text}");
        (entry.sq_id, entry.namespace) = (None, 0);
        assert!(error_entry(&entry).starts_with("entry 7 of its error log, no command in particular: "));
    }
}
