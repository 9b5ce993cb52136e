//! The program `vhost-blk`.
#![forbid(unsafe_code)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use vhost_blk::control::check::Findings;
use vhost_blk::control::cli::{self, Check, Cli, Command, Stop};
use vhost_blk::control::config::Configuration;
use vhost_blk::control::target::Target;
use vhost_blk::control::{journal, service_manager};

/// What is logged unless RUST_LOG says otherwise; what the embedded controller says of itself is no news.
const DEFAULT_LOG: &str = "info,nvme_sim=warn,vfio_user=warn";

fn main() -> ExitCode {
    let is_journal = journal::is_journal(std::io::stderr(), std::env::var_os("JOURNAL_STREAM").as_deref());
    let fail = |lines: &[String], status: u8| {
        let prefix = if is_journal { journal::prefix(log::Level::Error) } else { "" };
        lines.iter().for_each(|line| eprintln!("{prefix}vhost-blk: {line}"));
        ExitCode::from(status)
    };
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Print(text)) => return print(&text),
        Err(Stop::Usage(line)) => return fail(&[line], WRONG_USAGE),
    };
    start_log(is_journal);
    let result = match cli {
        #[cfg(feature = "demo")]
        Cli { command: Some(Command::Demo(args)), .. } => vhost_blk::control::demo::run(args),
        Cli { command: Some(Command::Serve(args)), .. } | Cli { command: None, serve: args } => {
            let (check, file) = (args.check, args.config.clone());
            let configuration = match args.configuration() {
                Ok(configuration) => configuration,
                Err(lines) => return fail(&lines, WRONG_USAGE),
            };
            configuration.settings.warnings().iter().for_each(|warning| log::warn!("{warning}"));
            if let Some(check) = check {
                let found = match check {
                    Check::File => Findings::default(),
                    Check::Machine => vhost_blk::control::check::machine(&configuration, file.as_deref()),
                };
                let exports = configuration.settings.exports.iter().map(|export| format!("{export}\n"));
                let drives = configuration.settings.drives.iter().map(|drive| format!("{drive}\n"));
                print(
                    &exports
                        .chain(drives)
                        .chain(found.notes.iter().map(|note| format!("# {note}\n")))
                        .collect::<String>(),
                );
                let wrong: Vec<String> = configuration.mistakes().map(str::to_owned).collect();
                return match (wrong.is_empty(), found.mistakes.is_empty()) {
                    (true, true) => ExitCode::SUCCESS,
                    (true, false) => fail(&found.mistakes, 1),
                    (false, _) => fail(&[wrong, found.mistakes].concat(), WRONG_USAGE),
                };
            }
            serve(&configuration)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => fail(&[line], 1),
    }
}

/// The exit status of a command line or a configuration that makes no sense; the service manager does not try it again.
const WRONG_USAGE: u8 = 2;

fn print(text: &str) -> ExitCode {
    // A reader that went away (`| head`) is no error.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn start_log(is_journal: bool) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(DEFAULT_LOG));
    if is_journal {
        log.format(|to, record| {
            writeln!(to, "{}{}: {}", journal::prefix(record.level()), record.target(), record.args())
        });
    }
    log.init();
}

/// How a configuration is read again.
const AFRESH: &str = "the configuration is read when the program starts; to have it read again, check it (--check=machine) and \
                      restart the program, as by systemctl restart vhost-blk: guests that reconnect notice a pause";

/// Serves until a signal ends it, or until no front-end can come any more.
fn serve(configuration: &Configuration) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot handle signals: {error}");
    // Before anything is opened: a signal in between has to find us ready.
    let (mut signals, counters) = (Vec::new(), signal(SIGUSR1).map_err(cannot)?);
    // A terminal that is closed, or somebody who wants the configuration read again, must not cost a disk.
    let (hangup, other) = (signal(SIGHUP).map_err(cannot)?, signal(SIGUSR2).map_err(cannot)?);
    let stopping = Arc::new(AtomicBool::new(false));
    for number in [SIGTERM, SIGINT] {
        // The second one ends the program at once, whatever the first one is waiting for.
        signal_hook::flag::register_conditional_shutdown(number, 128 + number, stopping.clone()).map_err(cannot)?;
        signal_hook::flag::register(number, stopping.clone()).map_err(cannot)?;
        signals.push(signal(number).map_err(cannot)?);
    }
    raise_descriptor_limit();
    // Before there are other threads.
    let handed = service_manager::sockets()?;
    let target = Target::start_on(configuration, handed).map_err(|error| error.to_string())?;
    target.tell_ready();
    loop {
        let mut sources = vec![PollFd::new(target.ended(), PollFlags::IN)];
        sources.extend([&counters, &hangup, &other].map(|signal| PollFd::new(signal, PollFlags::IN)));
        sources.extend(signals.iter().map(|signal| PollFd::new(signal, PollFlags::IN)));
        match poll(&mut sources, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(format!("cannot wait for signals: {error}")),
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
    target.stop().map_err(|error| error.to_string())
}

/// A guest may send hundreds of memory regions and eventfds; the usual soft limit of 1024 is there for `select` only.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("cannot raise the limit on open files from {:?}: {error}", limit.current);
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
