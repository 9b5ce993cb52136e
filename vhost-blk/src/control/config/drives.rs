//! `[[drive]]` sections: settings of single drives, for a drive that is not as it says it is.
//!
//! Without a section a drive is opened as it says, and as is known of its model.

use std::fmt;
use std::time::Duration;

use nvme_driver::Options;

use super::Settings;
use crate::drive::DeviceAddress;

/// One drive's own settings; `None`: as the drive says, and as what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveSettings {
    /// The controller.
    pub device: DeviceAddress,
    /// Use scatter gather lists; else what needs them is copied.
    pub sgl: Option<bool>,
    /// Use Dataset Management, and offer discards to guests.
    pub discard: Option<bool>,
    /// Use Write Zeroes, and offer it to guests.
    pub write_zeroes: Option<bool>,
    /// Use shadow doorbells.
    pub shadow_doorbells: Option<bool>,
    /// The longest wait for the controller to become ready, or not ready.
    pub ready_timeout: Option<Duration>,
    /// The time for an admin command.
    pub admin_timeout: Option<Duration>,
    /// The longest wait for a shutdown.
    pub shutdown_timeout: Option<Duration>,
    /// Queue pairs to ask the controller for.
    pub queue_pairs: Option<u16>,
}

impl DriveSettings {
    fn apply(&self, options: &mut Options) {
        options.sgl = self.sgl.or(options.sgl);
        options.discard = self.discard.or(options.discard);
        options.write_zeroes = self.write_zeroes.or(options.write_zeroes);
        options.ready_timeout = self.ready_timeout.or(options.ready_timeout);
        options.shadow_doorbells = self.shadow_doorbells.unwrap_or(options.shadow_doorbells);
        options.admin_timeout = self.admin_timeout.unwrap_or(options.admin_timeout);
        options.shutdown_timeout = self.shutdown_timeout.unwrap_or(options.shutdown_timeout);
        options.max_queue_pairs = self.queue_pairs.unwrap_or(options.max_queue_pairs);
    }
}

/// As it is told: what is otherwise.
impl fmt::Display for DriveSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let switches = [
            ("sgl", self.sgl),
            ("discard", self.discard),
            ("write-zeroes", self.write_zeroes),
            ("shadow-doorbells", self.shadow_doorbells),
        ];
        let times = [
            ("ready-timeout", self.ready_timeout),
            ("admin-timeout", self.admin_timeout),
            ("shutdown-timeout", self.shutdown_timeout),
        ];
        let switches = switches.iter().filter_map(|(key, value)| Some(format!("{key} = {}", (*value)?)));
        let times = times.iter().filter_map(|(key, value)| Some(format!("{key} = {}", (*value)?.as_secs_f64())));
        let pairs = self.queue_pairs.iter().map(|count| format!("queue-pairs = {count}"));
        let all: Vec<String> = switches.chain(times).chain(pairs).collect();
        match all.is_empty() {
            true => write!(f, "the drive {}: as it says", self.device),
            false => write!(f, "the drive {}: {}", self.device, all.join(", ")),
        }
    }
}

impl Settings {
    /// The settings of a drive, if it has any of its own.
    pub fn drive(&self, device: &DeviceAddress) -> Option<&DriveSettings> {
        self.drives.iter().find(|drive| drive.device == *device)
    }

    /// How a drive is opened: as `base` says, but for what its disks may need and what its own settings say.
    pub fn options(&self, device: &DeviceAddress, base: &Options) -> Options {
        let mut options = base.clone();
        // Every ring of every disk may have a queue pair. A drive that has fewer grants fewer.
        let disks = self.exports.iter().filter(|export| export.device == *device);
        let rings = disks.map(|export| u32::from(export.queues.max(export.queue_pairs.unwrap_or(0)))).sum::<u32>();
        options.max_queue_pairs = options.max_queue_pairs.max(rings.min(MOST_QUEUE_PAIRS) as u16);
        // Workers poll.
        options.interrupts = false;
        if let Some(drive) = self.drive(device) {
            drive.apply(&mut options);
        }
        options
    }
}

/// As many as can be asked for (NVMe Base 2.0, 5.27.1.5).
const MOST_QUEUE_PAIRS: u32 = 65535;
