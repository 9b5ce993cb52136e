//! What a queue pair has done; plain numbers with one writer, the pair's own thread.

/// Counted since the queue pair was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commands announced to the controller.
    pub commands: u64,
    /// Commands the controller has answered (or that a reset took back).
    pub completions: u64,
    /// Batches of commands announced.
    pub batches: u64,
    /// Writes to the submission doorbell register (fewer than batches with shadow doorbells).
    pub submission_doorbells: u64,
    /// Writes to the completion doorbell register.
    pub completion_doorbells: u64,
    /// Requests that took more than one command.
    pub splits: u64,
    /// Commands whose data pointer is an SGL.
    pub sgls: u64,
    /// Long requests: they had to share, and may have waited with a part of their commands.
    pub staged: u64,
    /// Requests refused because their data has to be copied.
    pub needs_bounce: u64,
    /// Completions that answered no command: dropped.
    pub stale_completions: u64,
}
