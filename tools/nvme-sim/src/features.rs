//! Get and Set Features (NVMe Base 2.0, 5.27.1).

use crate::command::Command;
use crate::config::Config;
use crate::controller::Controller;
use crate::status::Status;

const ARBITRATION: u8 = 0x01;
const POWER_MANAGEMENT: u8 = 0x02;
const TEMPERATURE_THRESHOLD: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const VOLATILE_WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;
const INTERRUPT_COALESCING: u8 = 0x08;
const INTERRUPT_VECTOR: u8 = 0x09;
const WRITE_ATOMICITY: u8 = 0x0a;
const ASYNC_EVENTS: u8 = 0x0b;
const HOST_BEHAVIOR: u8 = 0x16;
/// Bytes of its data structure (5.27.1.18).
const HOST_BEHAVIOR_BYTES: usize = 512;

/// The temperature the controller always has, in kelvins.
pub(crate) const TEMPERATURE: u32 = 300;
/// The default over-temperature threshold, also WCTEMP.
pub(crate) const WARNING_TEMPERATURE: u32 = 343;

/// What capabilities (SEL 3) say of a feature: changeable; not saveable, not per namespace.
const CHANGEABLE: u32 = 1 << 2;

/// I/O queues granted to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub submission: u16,
    pub completion: u16,
}

impl Granted {
    /// The most queues of each kind that `config` allows.
    fn most(config: &Config) -> Granted {
        let most = |wanted: Option<u16>| wanted.unwrap_or(config.max_queue_pairs);
        Granted { submission: most(config.submission_queues), completion: most(config.completion_queues) }
    }

    /// No more of a kind than this; one there always is.
    fn at_most(self, most: Option<u16>) -> Granted {
        let most = most.unwrap_or(u16::MAX).max(1);
        Granted { submission: self.submission.min(most), completion: self.completion.min(most) }
    }
}

/// The features as the host has set them. They are back at their defaults after a controller reset.
///
/// Interrupt coalescing, arbitration, error recovery and power state are kept and reported but change nothing: the
/// specification leaves it to the controller what to make of them.
#[derive(Clone)]
pub(crate) struct Features {
    /// By feature identifier.
    values: [u32; 12],
    over_temperature: u32,
    under_temperature: u32,
    vectors: Vec<u32>,
    queues: Granted,
    /// Advanced Command Retry Enable, in Host Behavior Support.
    retry_delays: bool,
}

impl Features {
    pub(crate) fn new(config: &Config) -> Features {
        let mut values = [0; 12];
        values[usize::from(ARBITRATION)] = 7; // no limit on the burst
        values[usize::from(VOLATILE_WRITE_CACHE)] = config.volatile_write_cache.into();
        Features {
            values,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            vectors: vec![0; usize::from(config.max_queue_pairs) + 1],
            queues: Granted::most(config),
            retry_delays: false,
        }
    }

    pub(crate) fn write_cache(&self) -> bool {
        self.values[usize::from(VOLATILE_WRITE_CACHE)] & 1 != 0
    }

    /// Does the host want retry delays in statuses?
    pub(crate) fn retry_delays(&self) -> bool {
        self.retry_delays
    }

    /// The highest I/O queue identifiers the host may use.
    pub(crate) fn queues(&self) -> Granted {
        self.queues
    }

    /// Asynchronous Event Configuration.
    pub(crate) fn events(&self) -> u32 {
        self.values[usize::from(ASYNC_EVENTS)]
    }

    /// Whether the temperature is outside the thresholds.
    pub(crate) fn temperature_warning(&self) -> bool {
        TEMPERATURE >= self.over_temperature || TEMPERATURE <= self.under_temperature
    }

    fn get(&self, id: u8, dword11: u32) -> Result<u32, Status> {
        match id {
            TEMPERATURE_THRESHOLD => match (dword11 >> 20 & 3, dword11 >> 16 & 15) {
                (0, 0) => Ok(self.over_temperature),
                (1, 0) => Ok(self.under_temperature),
                (0 | 1, 1..=8) => Ok(0), // sensors that do not exist
                _ => Err(Status::INVALID_FIELD),
            },
            NUMBER_OF_QUEUES => Ok(u32::from(self.queues.completion - 1) << 16 | u32::from(self.queues.submission - 1)),
            INTERRUPT_VECTOR => {
                let vector = dword11 & 0xffff;
                let value = self.vectors.get(vector as usize).ok_or(Status::INVALID_FIELD)?;
                Ok(vector | value)
            }
            ARBITRATION..=ASYNC_EVENTS if id != 0x03 => Ok(self.values[usize::from(id)]),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn set(&mut self, id: u8, value: u32) -> Result<u32, Status> {
        match id {
            POWER_MANAGEMENT if value & 31 != 0 => return Err(Status::INVALID_FIELD),
            TEMPERATURE_THRESHOLD => match (value >> 20 & 3, value >> 16 & 15) {
                (0, 0 | 15) => self.over_temperature = value & 0xffff,
                (1, 0 | 15) => self.under_temperature = value & 0xffff,
                (0 | 1, 1..=8) => {}
                _ => return Err(Status::INVALID_FIELD),
            },
            INTERRUPT_VECTOR => {
                let place = self.vectors.get_mut(value as usize & 0xffff).ok_or(Status::INVALID_FIELD)?;
                *place = value & 1 << 16;
            }
            ARBITRATION | POWER_MANAGEMENT | ERROR_RECOVERY | VOLATILE_WRITE_CACHE | INTERRUPT_COALESCING
            | WRITE_ATOMICITY | ASYNC_EVENTS => self.values[usize::from(id)] = value,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    fn set_queues(&mut self, value: u32, most: Granted) -> Result<u32, Status> {
        let [submission, completion] = [value & 0xffff, value >> 16];
        if submission == 0xffff || completion == 0xffff {
            return Err(Status::INVALID_FIELD);
        }
        // A pair each: what one kind does not ask for, the other cannot use.
        let wanted = submission.max(completion) + 1;
        let granted = |most: u16| wanted.min(most.into()) as u16;
        self.queues = Granted { submission: granted(most.submission), completion: granted(most.completion) };
        self.get(NUMBER_OF_QUEUES, 0)
    }
}

/// Whether a feature is there at all.
fn check(controller: &Controller, id: u8) -> Result<(), Status> {
    if id == VOLATILE_WRITE_CACHE && !controller.offers.has_write_cache() {
        return Err(Status::INVALID_FIELD);
    }
    Ok(())
}

/// Get Features: dword 0 of the completion.
pub(crate) fn get(controller: &Controller, command: &Command) -> Result<u32, Status> {
    let (id, select) = (command.dword(10) as u8, command.dword(10) >> 8 & 7);
    check(controller, id)?;
    if select != 0 && !controller.offers.selects_features() {
        return Err(Status::INVALID_FIELD);
    }
    let dword11 = command.dword(11);
    let current = controller.features.get(id, dword11)?;
    match select {
        0 => Ok(current),
        // Nothing is saveable: what is saved is the default.
        1 | 2 => Features::new(&controller.shared.config).get(id, dword11),
        3 => Ok(CHANGEABLE),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// Set Features: dword 0 of the completion.
pub(crate) fn set(controller: &mut Controller, command: &Command) -> Result<u32, Status> {
    let (id, value) = (command.dword(10) as u8, command.dword(11));
    check(controller, id)?;
    if command.dword(10) >> 31 != 0 {
        let selects = controller.offers.selects_features();
        return Err(if selects { Status::NOT_SAVEABLE } else { Status::INVALID_FIELD });
    }
    // What is optional of the events has to be offered (OAES).
    if id == ASYNC_EVENTS && value & !0xff & !controller.offers.events != 0 {
        return Err(Status::INVALID_FIELD);
    }
    let result = if id == HOST_BEHAVIOR && controller.offers.retry_delays {
        let mut behavior = [0; HOST_BEHAVIOR_BYTES];
        crate::admin::take(controller, command, &mut behavior)?;
        if behavior[0] > 1 {
            return Err(Status::INVALID_FIELD);
        }
        controller.features.retry_delays = behavior[0] == 1;
        0
    } else if id == NUMBER_OF_QUEUES {
        // Once, before any I/O queue is made (5.27.1.5).
        if controller.sqs.iter().skip(1).any(Option::is_some) || controller.cqs.iter().skip(1).any(Option::is_some) {
            return Err(Status::COMMAND_SEQUENCE);
        }
        let most = Granted::most(&controller.shared.config).at_most(controller.faults.plan.most_queues);
        controller.features.set_queues(value, most)?
    } else {
        controller.features.set(id, value)?
    };
    match id {
        VOLATILE_WRITE_CACHE => controller.apply_write_cache(),
        TEMPERATURE_THRESHOLD if controller.features.temperature_warning() => {
            controller.events.temperature();
            controller.deliver_events();
        }
        _ => {}
    }
    Ok(result)
}
