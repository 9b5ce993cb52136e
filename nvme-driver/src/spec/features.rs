//! Features (NVMe Base 2.0, 5.27): settings with one dword of value, as types.

/// Feature identifiers (NVMe Base 2.0, 5.27.1).
pub mod id {
    #![allow(missing_docs)]
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    pub const ASYNC_EVENTS: u8 = 0x0b;
    pub const HOST_BEHAVIOR: u8 = 0x16;
}

/// Which value of a feature Get Features returns (SEL; NVMe Base 2.0, 5.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Select {
    /// What is in force.
    #[default]
    Current = 0,
    /// What the controller started with.
    Default = 1,
    /// What was saved over resets.
    Saved = 2,
    /// Bit 0 saveable, bit 1 per namespace, bit 2 changeable.
    Capabilities = 3,
}

/// A feature whose value fits into the command's dword 11 and the completion's dword 0.
pub trait Feature: Sized {
    /// Feature identifier (FID).
    const ID: u8;
    /// Name in the specification.
    const NAME: &'static str;
    /// What Get Features has to be told in dword 11: which of several values is meant; `()` for most.
    type Which: Which;
    /// From dword 0 of the completion of Get or Set Features.
    fn from_dword(value: u32) -> Self;
    /// Dword 11 of Set Features.
    fn to_dword(&self) -> u32;
}

/// The part of dword 11 that chooses between several values of one feature.
pub trait Which {
    /// Dword 11 of Get Features.
    fn to_dword(&self) -> u32;
}

impl Which for () {
    fn to_dword(&self) -> u32 {
        0
    }
}

/// Volatile Write Cache (06h; NVMe Base 2.0, 5.27.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolatileWriteCache {
    /// WCE: the cache is in use, so that Flush is needed for durability.
    pub enabled: bool,
}

impl Feature for VolatileWriteCache {
    const ID: u8 = id::VOLATILE_WRITE_CACHE;
    const NAME: &'static str = "Volatile Write Cache";
    type Which = ();

    fn from_dword(value: u32) -> Self {
        VolatileWriteCache { enabled: value & 1 != 0 }
    }

    fn to_dword(&self) -> u32 {
        u32::from(self.enabled)
    }
}

/// Number of Queues (07h; NVMe Base 2.0, 5.27.1.5). Counts are of I/O queues and not zero-based here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumberOfQueues {
    /// Submission queues wanted or granted: 1 to 65536 (65536 is not a legal wish).
    pub submission: u32,
    /// Completion queues wanted or granted.
    pub completion: u32,
}

impl Feature for NumberOfQueues {
    const ID: u8 = id::NUMBER_OF_QUEUES;
    const NAME: &'static str = "Number of Queues";
    type Which = ();

    fn from_dword(value: u32) -> Self {
        NumberOfQueues { submission: (value & 0xffff) + 1, completion: (value >> 16) + 1 }
    }

    fn to_dword(&self) -> u32 {
        // FFFFh is not allowed (5.27.1.5), so 65535 queues are the most one can ask for.
        let zero_based = |count: u32| count.clamp(1, 65535) - 1;
        zero_based(self.completion) << 16 | zero_based(self.submission)
    }
}

/// Interrupt Coalescing (08h; NVMe Base 2.0, 5.27.1.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptCoalescing {
    /// THR: completions to gather before an interrupt, zero-based.
    pub threshold: u8,
    /// TIME: the longest delay, in 100 µs; 0 switches coalescing off.
    pub time: u8,
}

impl Feature for InterruptCoalescing {
    const ID: u8 = id::INTERRUPT_COALESCING;
    const NAME: &'static str = "Interrupt Coalescing";
    type Which = ();

    fn from_dword(value: u32) -> Self {
        InterruptCoalescing { threshold: value as u8, time: (value >> 8) as u8 }
    }

    fn to_dword(&self) -> u32 {
        u32::from(self.time) << 8 | u32::from(self.threshold)
    }
}

/// Asynchronous Event Configuration (0Bh; NVMe Base 2.0, 5.27.1.9): which events the controller reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct EventConfiguration {
    /// Bits of the SMART log's critical warning that are reported.
    pub critical_warnings: u8,
    /// Namespaces attached, detached, resized or formatted.
    pub namespace_attributes: bool,
    /// A firmware activation starts: the controller pauses.
    pub firmware_activation: bool,
}

impl Feature for EventConfiguration {
    const ID: u8 = id::ASYNC_EVENTS;
    const NAME: &'static str = "Asynchronous Event Configuration";
    type Which = ();

    fn from_dword(value: u32) -> Self {
        EventConfiguration {
            critical_warnings: value as u8,
            namespace_attributes: value & 1 << 8 != 0,
            firmware_activation: value & 1 << 9 != 0,
        }
    }

    fn to_dword(&self) -> u32 {
        u32::from(self.critical_warnings)
            | u32::from(self.namespace_attributes) << 8
            | u32::from(self.firmware_activation) << 9
    }
}

/// Which temperature threshold is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TemperatureSensor {
    /// TMPSEL: 0 the composite temperature, 1 to 8 a sensor.
    pub sensor: u8,
    /// THSEL: the threshold warns when the temperature falls under it, instead of rising over it.
    pub under: bool,
}

impl Which for TemperatureSensor {
    fn to_dword(&self) -> u32 {
        u32::from(self.sensor & 0xf) << 16 | u32::from(self.under) << 20
    }
}

/// Temperature Threshold (04h; NVMe Base 2.0, 5.27.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemperatureThreshold {
    /// TMPTH: in kelvins.
    pub kelvins: u16,
    /// Which threshold: for setting; a value read has the default here.
    pub which: TemperatureSensor,
}

impl Feature for TemperatureThreshold {
    const ID: u8 = id::TEMPERATURE_THRESHOLD;
    const NAME: &'static str = "Temperature Threshold";
    type Which = TemperatureSensor;

    fn from_dword(value: u32) -> Self {
        TemperatureThreshold { kelvins: value as u16, which: TemperatureSensor::default() }
    }

    fn to_dword(&self) -> u32 {
        self.which.to_dword() | u32::from(self.kelvins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_where_the_specification_puts_them() {
        assert_eq!(NumberOfQueues { submission: 4, completion: 8 }.to_dword(), 7 << 16 | 3);
        assert_eq!(NumberOfQueues { submission: 0, completion: 70000 }.to_dword(), 65534 << 16);
        let most = NumberOfQueues::from_dword(u32::MAX);
        assert_eq!((most.submission, most.completion), (65536, 65536));
        assert_eq!(InterruptCoalescing { threshold: 7, time: 2 }.to_dword(), 0x0207);
        assert_eq!(InterruptCoalescing::from_dword(0x0207), InterruptCoalescing { threshold: 7, time: 2 });
        let events =
            EventConfiguration { critical_warnings: 0x1f, namespace_attributes: true, firmware_activation: true };
        assert_eq!(events.to_dword(), 0x31f);
        assert_eq!(EventConfiguration::from_dword(0x31f), events);
        assert!(VolatileWriteCache::from_dword(1).enabled && !VolatileWriteCache::from_dword(2).enabled);
        let hot = TemperatureThreshold { kelvins: 343, which: TemperatureSensor { sensor: 2, under: true } };
        assert_eq!(hot.to_dword(), 343 | 2 << 16 | 1 << 20);
        assert_eq!(TemperatureThreshold::from_dword(343).kelvins, 343);
    }
}
