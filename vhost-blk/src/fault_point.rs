//! Places where a test may have something go wrong. In a build that is not for unit tests they are nothing.

/// `fault_point!(STEP)`: what this thread's test has asked for at such a step ([`set`]) happens here.
///
/// `fault_point!("WHAT panics", NAME)`: a panic, if a test has given something a name that contains these words.
macro_rules! fault_point {
    ($step:ident) => {
        #[cfg(test)]
        $crate::fault_point::reach($crate::fault_point::FaultStep::$step);
    };
    ($panics:literal, $name:expr) => {
        #[cfg(test)]
        assert!(!$name.to_string().contains($panics), "asked to by a test");
    };
}
pub(crate) use fault_point;

#[cfg(test)]
pub(crate) use steps::{FaultStep, reach, set};

#[cfg(test)]
mod steps {
    use std::cell::Cell;

    /// What is just about to happen.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum FaultStep {
        /// A field of the log of requests in flight is read.
        Load,
        /// A field of the log of requests in flight is written.
        Store,
        /// The guest is shown a batch of used chains, which the log knows of.
        Show,
        /// A queue pair could not be created, and it is asked whether its controller works.
        QueueFailed,
    }

    thread_local! {
        static HOOK: Cell<Option<fn(FaultStep)>> = const { Cell::new(None) };
    }

    /// Has `hook` called at every step on this thread.
    pub(crate) fn set(hook: fn(FaultStep)) {
        HOOK.set(Some(hook));
    }

    pub(crate) fn reach(step: FaultStep) {
        if let Some(hook) = HOOK.get() {
            hook(step);
        }
    }
}
