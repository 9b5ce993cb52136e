//! What becomes of a lane's unanswered requests when the lane stops.

/// What becomes of the requests of a stopping lane that are not answered yet.
///
/// Under every policy the lane takes no new requests, and comes back only when the drive has nothing of it: what the drive has may
/// still write to the guest's memory. The policies differ in the requests that wait for the drive: to be tried again, for a bounce
/// buffer, for room in the queue pair, or for a drive that is detached.
///
/// A policy may be followed by one that is further down; never by one that is further up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopPolicy {
    /// All are answered as if the lane went on, however long that takes.
    #[default]
    AnswerAll,
    /// What waits is answered with an error at once.
    FailWaiting,
    /// What waits gets no answer. In the ring and in its in-flight log it stays in flight, for the ring's next user.
    LeaveInLog,
}
