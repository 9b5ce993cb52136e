//! What the handlers of methods work with.

use std::sync::Arc;

use rustix::process::Signal;

use crate::control::target::registry::Registry;

/// The target, as handlers see it, and what they ask to be done after their answer.
pub(super) struct Context {
    /// The drives and disks that are served.
    pub(super) registry: Arc<Registry>,
    /// The signal to send to this program once the answer is written.
    pub(super) signal: Option<Signal>,
}
