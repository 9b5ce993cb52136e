//! What a drive reports without being asked.

use std::sync::PoisonError;

use nvme_driver::Event;

use super::Drive;

impl Drive {
    /// Looks whether the controller still works, and what it reports.
    pub(super) fn check(&self) {
        let Ok(controller) = self.controller() else { return };
        let events = controller.health().and_then(|()| controller.poll_events());
        drop(controller);
        match events {
            Ok(events) => {
                self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).take();
                events.iter().for_each(|event| self.log_event(event));
            }
            Err(error) => {
                self.look();
                // A log page that cannot be read is no reason to stop a drive that works.
                if self.controller().is_ok() {
                    self.complain(error.to_string());
                }
            }
        }
    }

    /// Logs why the drive's reports cannot be read, once as long as the reason stays the same.
    fn complain(&self, why: String) {
        let mut last = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() != Some(&why) {
            log::warn!("{}: cannot read what the drive reports; I/O goes on: {why}", self.name);
            *last = Some(why);
        }
    }

    /// Logs what the drive tells without being asked.
    fn log_event(&self, event: &Event) {
        let name = &self.name;
        match event {
            Event::Error { information, entries } => {
                log::warn!(
                    "{name}: the drive reports error event {information}; its newest log entry: {:?}",
                    entries.first()
                );
            }
            Event::Health { information, health } => {
                log::warn!("{name}: the drive reports health event {information}: {health:?}");
            }
            Event::NamespacesChanged(changed) => {
                log::warn!(
                    "{name}: namespaces have changed ({changed:?}); exports go on with what they were until a restart"
                );
            }
            Event::FirmwareActivation => log::warn!("{name}: new firmware is being activated; requests may wait"),
            other => log::info!("{name}: the drive reports {other:?}"),
        }
    }
}
