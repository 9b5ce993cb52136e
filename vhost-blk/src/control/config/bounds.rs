//! The bounds of options, and their defaults.

/// Virtqueues offered to a front-end unless told otherwise: QEMU asks for one per virtual CPU and refuses a back-end with
/// fewer. Queues that no guest starts cost nothing.
pub const DEFAULT_QUEUES: u16 = 64;
/// A vring's index is one byte in the messages that carry its file descriptors.
pub const MAX_QUEUES: u16 = 256;
/// Largest virtqueue accepted unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// virtio 1.2, section 2.6: a virtqueue has at most 32768 entries.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// The shortest time for a command, in seconds.
pub(super) const LEAST_COMMAND_SECONDS: f64 = 0.01;
/// The shortest time that a drive may be given for something, in seconds.
pub(super) const LEAST_DRIVE_SECONDS: f64 = 0.1;
/// The longest time, in seconds: a day.
pub(super) const MOST_SECONDS: f64 = 86400.0;
