//! The program `vhost-blk`: [`cli`](vhost_blk::control::cli) says what to do, `config` what to serve, `check` whether it can be
//! served here, and `target` serves it. This file joins them, owns the process's signals and its exit status, and nothing else.
#![forbid(unsafe_code)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use vhost_blk::control::check::{self, Findings};
use vhost_blk::control::cli::{self, Check, Cli, Command, ServeArgs, Stop};
use vhost_blk::control::config::{ConfigError, Configuration};
use vhost_blk::control::service_manager::HandOverError;
use vhost_blk::control::target::{Ended, StartError, Target};
use vhost_blk::control::{journal, logging, service_manager};

fn main() -> ExitCode {
    let is_journal = journal::is_journal(std::io::stderr(), std::env::var_os("JOURNAL_STREAM").as_deref());
    let fail = |lines: &[String], status: u8| {
        let prefix = if is_journal { journal::prefix(log::Level::Error) } else { "" };
        lines.iter().for_each(|line| eprintln!("{prefix}vhost-blk: {line}"));
        ExitCode::from(status)
    };
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Print(text)) => {
            print(&text);
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(line)) => return fail(&[line], WRONG_USAGE),
    };
    logging::start(is_journal);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure.lines(), failure.status()),
    }
}

/// The exit status of a command line or a configuration that makes no sense; the service manager does not try it again.
const WRONG_USAGE: u8 = 2;

fn run(cli: Cli) -> Result<(), ProgramError> {
    let args = match cli {
        #[cfg(feature = "demo")]
        Cli { command: Some(Command::Demo(args)), .. } => return Ok(vhost_blk::control::demo::run(args)?),
        Cli { command: Some(Command::Serve(args)), .. } | Cli { command: None, serve: args } => args,
    };
    let ServeArgs { check, config: ref file, .. } = args;
    let file = file.clone();
    let configuration = args.configuration()?;
    configuration.settings.warnings().iter().for_each(|warning| log::warn!("{warning}"));
    let findings = match check {
        None => return serve(&configuration),
        Some(Check::File) => Findings::default(),
        Some(Check::Machine) => check::machine(&configuration, file.as_deref()),
    };
    print(&findings.report(&configuration));
    let refused: Vec<String> = configuration.mistakes().map(ToString::to_string).collect();
    match refused.is_empty() && findings.mistakes.is_empty() {
        true => Ok(()),
        false => Err(ProgramError::Checked { refused, machine: findings.mistakes }),
    }
}

/// What the program ends with, other than success.
#[derive(Debug, thiserror::Error)]
enum ProgramError {
    /// The command line or the configuration file makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A check has found mistakes: exports that are refused, and what this machine lacks.
    #[error("{}", [refused.as_slice(), machine].concat().join("; "))]
    Checked { refused: Vec<String>, machine: Vec<String> },
    /// Signals cannot be handled.
    #[error("cannot handle signals: {0}")]
    Signals(#[source] std::io::Error),
    /// Signals cannot be waited for.
    #[error("cannot wait for signals: {0}")]
    Wait(#[source] rustix::io::Errno),
    /// The service manager hands over what cannot be used.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    /// Nothing can be served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Serving has ended by itself.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The demo has failed.
    #[cfg(feature = "demo")]
    #[error(transparent)]
    Demo(#[from] vhost_blk::control::demo::DemoError),
}

impl ProgramError {
    /// What is told of it, a line each.
    fn lines(&self) -> Vec<String> {
        match self {
            ProgramError::Config(error) => error.lines(),
            ProgramError::Checked { refused, machine } => [refused.as_slice(), machine].concat(),
            failure => vec![failure.to_string()],
        }
    }

    /// The program's exit status.
    fn status(&self) -> u8 {
        match self {
            ProgramError::Config(_) => WRONG_USAGE,
            ProgramError::Checked { refused, .. } if !refused.is_empty() => WRONG_USAGE,
            _ => 1,
        }
    }
}

fn print(text: &str) {
    // A reader that went away (`| head`) is no error.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// How to apply a changed configuration.
const AFRESH: &str = "the configuration is read only when the program starts; to apply a change, check it (--check=machine) and restart \
                      the program (systemctl restart vhost-blk): guests that reconnect notice a pause";

/// Serves until a signal ends it, or until no front-end can come any more.
fn serve(configuration: &Configuration) -> Result<(), ProgramError> {
    // Before anything is opened: a signal in between has to find us ready.
    let (mut signals, counters) = (Vec::new(), signal(SIGUSR1).map_err(ProgramError::Signals)?);
    // A terminal that is closed, or somebody who wants the configuration read again, must not cost a disk.
    let (hangup, other) =
        (signal(SIGHUP).map_err(ProgramError::Signals)?, signal(SIGUSR2).map_err(ProgramError::Signals)?);
    let stopping = Arc::new(AtomicBool::new(false));
    for number in [SIGTERM, SIGINT] {
        // The second one ends the program at once, whatever the first one is waiting for.
        signal_hook::flag::register_conditional_shutdown(number, 128 + number, stopping.clone())
            .map_err(ProgramError::Signals)?;
        signal_hook::flag::register(number, stopping.clone()).map_err(ProgramError::Signals)?;
        signals.push(signal(number).map_err(ProgramError::Signals)?);
    }
    raise_descriptor_limit();
    // Before there are other threads.
    let handed = service_manager::sockets()?;
    let target = Target::start_on(configuration, handed)?;
    target.tell_ready();
    loop {
        let mut sources = vec![PollFd::new(target.ended(), PollFlags::IN)];
        sources.extend([&counters, &hangup, &other].map(|signal| PollFd::new(signal, PollFlags::IN)));
        sources.extend(signals.iter().map(|signal| PollFd::new(signal, PollFlags::IN)));
        match poll(&mut sources, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(ProgramError::Wait(error)),
            Ok(_) => {}
        }
        if !sources[1].revents().is_empty() {
            drain(&counters);
            target.log_counters();
        }
        if !sources[2].revents().is_empty() {
            drain(&hangup);
            log::warn!("SIGHUP changes nothing: {AFRESH}");
        }
        if !sources[3].revents().is_empty() {
            drain(&other);
            log::warn!("SIGUSR2 changes nothing: SIGUSR1 logs the counters, SIGTERM ends the program");
        }
        if !sources[0].revents().is_empty() || sources[4..].iter().any(|signal| !signal.revents().is_empty()) {
            break;
        }
    }
    service_manager::notify(&["STOPPING=1", "STATUS=finishing the requests under way"]);
    log::info!("stopping: requests under way are finished first");
    Ok(target.stop()?)
}

/// A guest may send hundreds of memory regions and eventfds; the usual soft limit of 1024 is there for `select` only.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        let now = limit.current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
        log::warn!(
            "cannot raise the limit on open files ({now}): {error}; guests with many memory regions or queues may be refused: raise \
             it where the program is started (ulimit -n, or LimitNOFILE= in its unit)"
        );
    }
}

/// A stream that becomes readable when the signal arrives.
fn signal(number: i32) -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    signal_hook::low_level::pipe::register(number, write)?;
    Ok(read)
}

fn drain(mut stream: &UnixStream) {
    let mut bytes = [0; 64];
    while matches!(std::io::Read::read(&mut stream, &mut bytes), Ok(count) if count > 0) {}
}
