//! A log that the systemd journal reads: the level of a line stands before it, as systemd understands it (sd-daemon(3)), and
//! the time is the journal's own.
//!
//! Everywhere else the log is written as for a terminal.

use std::ffi::OsStr;
use std::os::fd::AsFd;

use log::Level;

/// Whether a stream is the journal, by what JOURNAL_STREAM says of it (systemd.exec(5)): a child of ours may have inherited the
/// variable, and not the stream.
pub fn is_journal(stream: impl AsFd, variable: Option<&OsStr>) -> bool {
    let Some((device, inode)) = variable.and_then(OsStr::to_str).and_then(|text| text.split_once(':')) else {
        return false;
    };
    let (Ok(device), Ok(inode)) = (device.parse::<u64>(), inode.parse::<u64>()) else { return false };
    rustix::fs::fstat(stream).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (device, inode))
}

/// What stands before a line of this level.
pub fn prefix(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_the_very_stream_is_the_journal() {
        let file = tempfile::tempfile().unwrap();
        let stat = file.metadata().unwrap();
        let is = |text: &str| is_journal(&file, Some(OsStr::new(text)));
        assert!(is(&format!("{}:{}", stat.dev(), stat.ino())));
        for other in [format!("{}:{}", stat.dev(), stat.ino() + 1), format!("{}:{}", stat.dev() + 1, stat.ino())] {
            assert!(!is(&other), "{other}");
        }
        for nonsense in ["", ":", "8", "a:b", "-1:5", &format!("{}:{}:", stat.dev(), stat.ino())] {
            assert!(!is(nonsense), "{nonsense}");
        }
        assert!(!is_journal(&file, None));
    }
}
