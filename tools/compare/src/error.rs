//! What ends a comparison before it has a result. One line each, with what to do about it.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why there is no comparison. Failures of single rounds are not here: they are in the report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options contradict each other or the machine.
    #[error("{0}")]
    Options(String),
    /// A program that is needed is not there.
    #[error("{program} was not found; {advice}")]
    NoProgram {
        /// The name or path of the program.
        program: String,
        /// How to get the program, or how to say where it is.
        advice: &'static str,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program ended that should have gone on.
    #[error("{program} ended with {status}: {reason}")]
    Ended {
        /// The name of the program.
        program: String,
        /// How the program ended.
        status: ExitStatus,
        /// The last thing it wrote.
        reason: String,
    },
    /// Something took too long.
    #[error("{what} took longer than {} s: {reason}", .limit.as_secs())]
    Timeout {
        /// What was awaited.
        what: String,
        /// How long it was awaited.
        limit: Duration,
        /// The last thing that the program wrote.
        reason: String,
    },
    /// A guest cannot be made, or what it says is not what it should.
    #[error("{what}: {source}{hint}")]
    Guest {
        /// Which guest, and what was done with it.
        what: String,
        /// What went wrong.
        source: e2e::Error,
        /// What QEMU or the target wrote last, on a line of its own; may be empty.
        hint: String,
    },
    /// A disk would be overwritten.
    #[error("{}: {found}; the jobs write all over it: add --overwrite if what it holds may be lost", .path.display())]
    NotEmpty {
        /// The disk.
        path: PathBuf,
        /// What is on it.
        found: String,
    },
    /// The comparison was stopped from outside.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// For `map_err`: the system refused `what`.
    pub fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::System { what, source }
    }
}
