use std::path::PathBuf;
use std::time::Duration;

/// What went wrong in the harness: what was attempted, on what, why it failed and what to do.
///
/// `Debug` prints the same text as `Display`, because tests meet these errors through `unwrap`.
#[derive(thiserror::Error)]
pub enum Error {
    /// Something that `tests/run.sh` prepares is not there.
    #[error("{what} is missing at {}: {advice}", path.display())]
    Missing {
        /// The thing, in words.
        what: &'static str,
        /// Where the thing was looked for.
        path: PathBuf,
        /// What to run.
        advice: &'static str,
    },
    /// An operation of the host's system failed.
    #[error("{doing}: {source}")]
    System {
        /// What was attempted, and on what.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A deadline passed.
    #[error("waited {limit:?} for {waiting_for}, in vain")]
    Timeout {
        /// What did not happen.
        waiting_for: String,
        /// How long was waited.
        limit: Duration,
    },
    /// A program ended that should have gone on, or ended with another status than it should have.
    #[error("{program} ended with {status}{expected}")]
    Ended {
        /// The program's name.
        program: String,
        /// The exit status of the program, or the signal that ended it.
        status: std::process::ExitStatus,
        /// What had been expected, as a half sentence that begins with a separator; may be empty.
        expected: &'static str,
    },
    /// A script inside a guest ended with a status other than 0.
    #[error("a script in the guest ended with status {status}:\n{script}\n--- its output:\n{output}")]
    Script {
        /// The script's text.
        script: String,
        /// The exit status of the script.
        status: i32,
        /// What the script printed.
        output: String,
    },
    /// The guest's kernel log has lines which it should not have.
    #[error("the guest's kernel complained:\n{0}")]
    KernelLog(String),
    /// QEMU's monitor answered with an error, or with something that is no answer.
    #[error("QEMU's monitor, asked to {command}: {answer}")]
    Monitor {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
    /// The environment has a setting which means nothing.
    #[error("{0}")]
    Setting(String),
    /// A kernel or initramfs cannot be put together.
    #[error("initramfs: {0}")]
    Initramfs(String),
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Adds to an error of the host's system what was attempted: `.map_err(Error::doing(…))`.
    pub(crate) fn doing(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::System { doing: what.into(), source }
    }
}
