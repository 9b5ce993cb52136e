//! The states of a lane, in one place.
//!
//! A lane's state has three parts: its [`Mode`], its [`DriveAccess`], and whether it is *resuming*, that is, whether an earlier
//! process has left requests in the in-flight log that have to be done before any other.
//!
//! | mode | resuming | [`Attached`](DriveAccess::Attached) | [`Held`](DriveAccess::Held) | [`HoldExpired`](DriveAccess::HoldExpired) |
//! |---|---|---|---|---|
//! | [`Running`](Mode::Running) | no | takes what comes | takes nothing | takes what comes, answers it with an error |
//! | [`Running`](Mode::Running) | yes | takes what the log has | takes nothing | takes what the log has, answers it with an error |
//! | [`Moving`](Mode::Moving) | either | takes nothing | takes nothing | takes nothing |
//! | [`Stopping`](Mode::Stopping) | no | takes nothing | takes nothing | takes nothing |
//! | [`Stopping`](Mode::Stopping) | yes | takes what the log has | takes nothing | takes what the log has, answers it with an error |
//! | [`Broken`](Mode::Broken) | never | takes nothing, answers nothing | as before | as before |
//!
//! What was taken is answered in every mode but the last; in [`Mode::Stopping`] the [`StopPolicy`] says how.

use crate::datapath::stop_policy::StopPolicy;

/// Whether a lane takes requests, and what becomes of those that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Takes and answers requests.
    Running,
    /// Answers what is in flight, takes nothing: it is to go on with another queue pair.
    Moving,
    /// Ends what is in flight as the policy says, takes nothing. This mode is not left.
    Stopping(StopPolicy),
    /// The guest broke its ring, which is not touched any more. This mode is not left.
    Broken,
}

impl Mode {
    #[inline(always)]
    pub(super) fn is_running(self) -> bool {
        matches!(self, Mode::Running)
    }

    #[inline(always)]
    pub(super) fn is_broken(self) -> bool {
        matches!(self, Mode::Broken)
    }

    /// How the requests end that wait for the drive.
    pub(super) fn stop_policy(self) -> StopPolicy {
        match self {
            Mode::Running | Mode::Moving => StopPolicy::AnswerAll,
            Mode::Stopping(policy) => policy,
            // The guest gets no more answers from a ring that it broke.
            Mode::Broken => StopPolicy::LeaveInLog,
        }
    }
}

/// Whether a lane has a drive to give its requests to. Without one there is no queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DriveAccess {
    /// The drive is attached.
    Attached,
    /// The drive is detached, and may be back soon: what it had waits, and nothing more is taken.
    Held,
    /// The drive is detached, and its hold has expired: everything is answered with an error.
    HoldExpired,
}
