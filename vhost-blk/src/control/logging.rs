//! What is logged: the environment says it when the program starts, and an operator may say otherwise while it runs.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use env_logger::Logger;
use log::{LevelFilter, Log, Metadata, Record};
use thiserror::Error;

use super::journal;

/// What is logged unless RUST_LOG says otherwise; what the embedded controller says of itself is no news.
const DEFAULT: &str = "info,nvme_sim=warn,vfio_user=warn";
/// The parts of which only warnings are news.
const QUIET: [&str; 2] = ["nvme_sim", "vfio_user"];

/// How much is logged, by the names that SPDK has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What has gone wrong.
    Error,
    /// Also what may go wrong.
    Warning,
    /// Also what happens: the default.
    Notice,
    /// Also what happens in the embedded controller.
    Info,
    /// Everything but single messages and requests.
    Debug,
}

impl Level {
    /// All of them, from the fewest lines to the most.
    pub const ALL: [Level; 5] = [Level::Error, Level::Warning, Level::Notice, Level::Info, Level::Debug];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Level::Error => "ERROR",
            Level::Warning => "WARNING",
            Level::Notice => "NOTICE",
            Level::Info => "INFO",
            Level::Debug => "DEBUG",
        }
    }

    /// The level of a name, in capital or small letters.
    pub fn named(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.name().eq_ignore_ascii_case(name))
    }

    fn filter(self) -> LevelFilter {
        match self {
            Level::Error => LevelFilter::Error,
            Level::Warning => LevelFilter::Warn,
            Level::Notice | Level::Info => LevelFilter::Info,
            Level::Debug => LevelFilter::Debug,
        }
    }

    /// Whether a line is written.
    fn admits(self, metadata: &Metadata) -> bool {
        let part = metadata.target().split("::").next().unwrap_or_default();
        let is_quiet = self == Level::Notice && QUIET.contains(&part);
        metadata.level() <= if is_quiet { LevelFilter::Warn } else { self.filter() }
    }
}

/// The log is not this program's: the crate is used by another one, or the log has not been started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the log was not started by this program, and its level cannot be changed")]
pub struct NotOurs;

static LOG: OnceLock<SwitchedLog> = OnceLock::new();

/// As the environment said, until a level is set.
const AS_STARTED: u8 = u8::MAX;

struct SwitchedLog {
    /// Keeps to what the environment said.
    started: Logger,
    /// Writes whatever it gets.
    all: Logger,
    /// The index of the level that was set, or [`AS_STARTED`].
    level: AtomicU8,
}

impl SwitchedLog {
    /// The level that was set, if any.
    fn level(&self) -> Option<Level> {
        // Relaxed: a number, ordered with nothing.
        Level::ALL.get(usize::from(self.level.load(Ordering::Relaxed))).copied()
    }

    fn set(&self, level: Level) {
        self.level.store(level as u8, Ordering::Relaxed);
    }
}

impl Log for SwitchedLog {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.level().map_or_else(|| self.started.enabled(metadata), |level| level.admits(metadata))
    }

    fn log(&self, record: &Record) {
        match self.level() {
            None => self.started.log(record),
            Some(level) if level.admits(record.metadata()) => self.all.log(record),
            Some(_) => {}
        }
    }

    fn flush(&self) {
        self.all.flush();
    }
}

/// Starts the log, as RUST_LOG says. `is_journal`: lines have levels as the systemd journal understands them. To be called once.
pub fn start(is_journal: bool) {
    let environment = env_logger::Env::default().default_filter_or(DEFAULT);
    let format = |mut builder: env_logger::Builder| {
        if is_journal {
            builder.format(|to, record| {
                writeln!(to, "{}{}: {}", journal::prefix(record.level()), record.target(), record.args())
            });
        }
        builder
    };
    let started = format(env_logger::Builder::from_env(environment)).build();
    // Every line, in the style (colours) that the environment asks for.
    let mut all = env_logger::Builder::new();
    all.filter_level(LevelFilter::Trace).parse_write_style(&std::env::var("RUST_LOG_STYLE").unwrap_or_default());
    let all = format(all).build();
    let most = started.filter();
    let log = LOG.get_or_init(|| SwitchedLog { started, all, level: AtomicU8::new(AS_STARTED) });
    if log::set_logger(log).is_ok() {
        log::set_max_level(most);
    }
}

/// Sets how much is logged, by all parts of the program alike.
///
/// # Errors
/// The log was not started by [`start`].
pub fn set_level(level: Level) -> Result<(), NotOurs> {
    LOG.get().ok_or(NotOurs)?.set(level);
    log::set_max_level(level.filter());
    Ok(())
}

/// How much is logged, or the nearest to it; `None`: nothing.
pub fn level() -> Option<Level> {
    LOG.get().and_then(SwitchedLog::level).or(match log::max_level() {
        LevelFilter::Off => None,
        LevelFilter::Error => Some(Level::Error),
        LevelFilter::Warn => Some(Level::Warning),
        LevelFilter::Info => Some(Level::Notice),
        LevelFilter::Debug | LevelFilter::Trace => Some(Level::Debug),
    })
}

#[cfg(test)]
mod tests {
    use log::Level::{Debug, Error, Info, Trace, Warn};

    use super::*;

    #[test]
    fn a_level_admits_its_lines() {
        let admits = |level: Level, target: &str, of: log::Level| {
            level.admits(&Metadata::builder().target(target).level(of).build())
        };
        let most = |level, target| [Error, Warn, Info, Debug, Trace].into_iter().rfind(|of| admits(level, target, *of));
        let ours = Level::ALL.map(|level| most(level, "vhost_blk::drive").unwrap());
        assert_eq!(ours, [Error, Warn, Info, Info, Debug]);
        let simulator = Level::ALL.map(|level| most(level, "nvme_sim::admin").unwrap());
        assert_eq!(simulator, [Error, Warn, Warn, Info, Debug]);
    }

    #[test]
    fn levels_have_their_names() {
        for level in Level::ALL {
            assert_eq!(Level::named(level.name()), Some(level));
            assert_eq!(Level::ALL[level as usize], level);
        }
        assert_eq!(Level::named("debug"), Some(Level::Debug));
        assert_eq!(Level::named("LOUD"), None);
    }
}
