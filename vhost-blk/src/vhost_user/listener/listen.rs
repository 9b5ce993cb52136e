//! Where the front-ends of a disk connect.

use std::path::PathBuf;

/// Where an export's front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A UNIX socket that we bind.
    Path(PathBuf),
    /// A socket inherited from the parent process: listening, or already connected.
    Fd(i32),
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Listen::Path(path) => path.display().fmt(f),
            Listen::Fd(number) => write!(f, "file descriptor {number}"),
        }
    }
}
