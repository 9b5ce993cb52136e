//! The command line: what is asked for ([`Cli`]), and what the options of one disk mean ([`ServeArgs::configuration`]).
//!
//! It owns the texts of `--help`. It opens nothing but the configuration file.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::control::config::{
    self, ConfigError, Configuration, CpuList, DriveTimeouts, ExportSettings, Listen, Serial, Settings, ValueError,
};
use crate::drive::{DeviceAddress, SocketPathError, socket_path};
use crate::virtio::memory::Limits;

/// Why the program ends before it has begun.
#[derive(Debug)]
pub enum Stop {
    /// Text that was asked for (help, version, capabilities): to standard output, exit status 0.
    Print(String),
    /// One line that says what is wrong and what to do: to standard error, exit status 2.
    Usage(String),
}

/// Parses the command line (with the program's name first).
///
/// # Errors
/// Nothing is to be run: text was asked for, or the command line makes no sense.
pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Cli, Stop> {
    let args: Vec<_> = args.into_iter().collect();
    // The conventions want every other argument ignored, wrong ones too.
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Err(Stop::Print(capabilities() + "\n"));
    }
    Cli::try_parse_from(args).map_err(|error| {
        let text = error.render().to_string();
        if error.use_stderr() { Stop::Usage(one_line(&text)) } else { Stop::Print(text) }
    })
}

/// Joins a message over several lines, without the usage that follows it.
fn one_line(text: &str) -> String {
    let head = text.split("\n\nUsage:").next().unwrap_or(text).split("\n\nFor more information").next().unwrap_or(text);
    let line = head.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line} (vhost-blk --help tells more)")
}

/// What `--print-capabilities` prints: docs/interop/vhost-user.json of QEMU, `VHostUserBackendCapabilitiesBlock`.
pub fn capabilities() -> String {
    serde_json::json!({ "type": "block", "features": ["read-only"] }).to_string()
}

/// Serves NVMe namespaces to virtual machines as vhost-user-blk disks.
#[derive(Debug, Parser)]
#[command(name = "vhost-blk", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = MORE)]
pub struct Cli {
    /// What to do; serving when absent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of serving.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What is no option.
const MORE: &str = "\
sim: addresses are sim:SIZE[,KEY=VALUE]..., such as sim:10G,file=/path,write-cache=on,queues=4: SIZE is that of each namespace;
write-cache=on is a volatile cache that dies with the program; queues is the number of queue pairs; a wrong key lists them all.

Environment:
  RUST_LOG          what is logged: error, warn, info (the default), debug or trace, also by part, such as info,vhost_blk=debug
Signals:
  SIGUSR1           log the counters of every queue
  SIGHUP, SIGUSR2   nothing, with a line in the log: the configuration is read when the program starts
  SIGTERM, SIGINT   finish the requests under way, tell the drives to shut down, and exit; a second one exits at once
Exit status:
  0  done; 1  something could not be opened or has failed; 2  the command line or the configuration makes no sense;
  128 + N  a second signal, number N, has ended it";

/// What to do.
// There is one of it, for a moment.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Serve exports to front-ends until SIGTERM (the default)
    #[command(after_help = MORE)]
    Serve(ServeArgs),
    /// Run verified I/O from a virtqueue through an embedded controller and back, and print what it costs
    #[cfg(feature = "demo")]
    Demo(crate::control::demo::Args),
}

/// Options of serving: one export by options, or several by a file.
#[derive(Debug, clap::Args)]
// The help text is what the user types, not a link.
#[allow(rustdoc::broken_intra_doc_links)]
pub struct ServeArgs {
    /// The NVMe controller: a PCI function (0000:01:00.0), vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    pub device: Option<DeviceAddress>,
    /// The vhost-user socket to listen on
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "fd"])]
    pub socket_path: Option<PathBuf>,
    /// Use this inherited file descriptor as the vhost-user socket (listening, or already connected)
    #[arg(long, value_name = "FDNUM", conflicts_with = "config", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,
    /// Namespace identifier [default: the only one there is]
    #[arg(long, value_name = "N", conflicts_with = "config", value_parser = number(config::namespace))]
    pub namespace: Option<u32>,
    /// Virtqueues offered to the guest [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "config", value_parser = number(config::queues))]
    pub queues: Option<u16>,
    /// Largest virtqueue accepted, in entries [default: 1024]
    #[arg(long, value_name = "N", conflicts_with = "config", value_parser = number(config::queue_size))]
    pub queue_size: Option<u16>,
    /// Queue pairs of the drive that the disk may count on [default: an even part of what the drive grants]
    #[arg(long, value_name = "N", conflicts_with = "config", value_parser = number(config::queue_pairs))]
    pub queue_pairs: Option<u16>,
    /// CPUs with a polled worker each, such as 2,4-7 [default: one worker, not pinned]
    #[arg(long, value_name = "LIST", conflicts_with = "config")]
    pub cpus: Option<CpuList>,
    /// Time for one command; then the controller is reset and what it has not finished is issued again [default: 30]
    #[arg(long, value_name = "SECONDS", conflicts_with = "config", value_parser = seconds(config::io_timeout))]
    pub io_timeout: Option<Duration>,
    /// How long requests wait for a drive that fails or disappears, before they fail [default: 30]
    #[arg(long, value_name = "SECONDS", conflicts_with = "config", value_parser = seconds(config::hold))]
    pub hold: Option<Duration>,
    /// Guest memory that one front-end may have mapped, such as 64G [default: 17T]
    #[arg(long, value_name = "SIZE", conflicts_with = "config", value_parser = config::guest_memory)]
    pub guest_memory_limit: Option<u64>,
    /// Memory regions that one front-end may have [default: 509]
    #[arg(long, value_name = "N", conflicts_with = "config", value_parser = number(config::guest_regions))]
    pub guest_regions_limit: Option<usize>,
    /// Refuse every command that changes data
    #[arg(long, conflicts_with = "config")]
    pub read_only: bool,
    /// Serial number shown to the guest, at most 20 characters [default: the drive's]
    #[arg(long, value_name = "S", conflicts_with = "config")]
    pub serial: Option<Serial>,
    /// Read the exports from a TOML file instead
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Answer SPDK's JSON-RPC on this Unix socket; with --config it counts more than the file's rpc-socket
    #[arg(long, value_name = "PATH", value_parser = rpc_socket)]
    pub rpc_socket: Option<PathBuf>,
    /// Print what would be served, a line for each export, and everything that is wrong, and exit; no drive and no socket is
    /// opened. With =machine it also looks whether this machine has what is needed
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "file")]
    pub check: Option<Check>,
    /// Print what this back-end can do as JSON, and exit (QEMU's conventions for vhost-user back-end programs)
    #[arg(long)]
    pub print_capabilities: bool,
}

/// What `--check` looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// The command line and the file
    File,
    /// This machine, too
    Machine,
}

type Parsed<T> = fn(&str) -> Result<T, ValueError>;

/// A parser for a number with a rule of its own.
fn number<T: Clone + Send + Sync + 'static>(
    check: fn(u64) -> Result<T, ValueError>,
) -> impl clap::builder::TypedValueParser<Value = T> {
    use clap::builder::TypedValueParser;
    let parse: Parsed<u64> = |text| text.parse().map_err(|_| ValueError::NotANumber);
    parse.try_map(check)
}

/// A parser for a time with a rule of its own.
fn seconds(check: fn(f64) -> Result<Duration, ValueError>) -> impl clap::builder::TypedValueParser<Value = Duration> {
    use clap::builder::TypedValueParser;
    let parse: Parsed<f64> = |text| text.parse().map_err(|_| ValueError::NotSeconds);
    parse.try_map(check)
}

/// A parser for the path of the control socket.
fn rpc_socket(path: &str) -> Result<PathBuf, SocketPathError> {
    let path = PathBuf::from(path);
    socket_path(&path).map(|()| path)
}

impl ServeArgs {
    /// What these options mean; reads the file of `--config`.
    ///
    /// # Errors
    /// Nothing can be served.
    pub fn configuration(self) -> Result<Configuration, ConfigError> {
        match &self.config {
            Some(path) => {
                let mut configuration = config::load(path)?;
                configuration.settings.rpc_socket = self.rpc_socket.or(configuration.settings.rpc_socket);
                Ok(configuration)
            }
            None => Ok(Configuration { settings: self.settings()?, refused: vec![] }),
        }
    }

    /// The one export that is described by options.
    fn settings(self) -> Result<Settings, ConfigError> {
        let device = self.device.ok_or(ConfigError::NoDevice)?;
        let listen = match (self.socket_path, self.fd) {
            (Some(path), _) => socket_path(&path).map(|()| Listen::Path(path))?,
            (None, Some(number)) => Listen::Fd(number),
            (None, None) => return Err(ConfigError::NoSocket),
        };
        let export = ExportSettings {
            device,
            listen,
            namespace: self.namespace,
            queues: self.queues.unwrap_or(config::DEFAULT_QUEUES),
            queue_size: self.queue_size.unwrap_or(config::DEFAULT_QUEUE_SIZE),
            queue_pairs: self.queue_pairs,
            read_only: self.read_only,
            serial: self.serial,
        };
        if let Some(mistake) = export.mistake() {
            return Err(mistake.into());
        }
        let timeouts = DriveTimeouts::with(self.io_timeout, self.hold);
        let memory = Limits::with(self.guest_memory_limit, self.guest_regions_limit);
        Ok(Settings {
            cpus: self.cpus.unwrap_or_default().0,
            timeouts,
            memory,
            exports: vec![export],
            rpc_socket: self.rpc_socket,
            drives: vec![],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Result<Cli, Stop> {
        parse(std::iter::once("vhost-blk").chain(words.split_whitespace()).map(Into::into))
    }

    fn settings(words: &str) -> Result<Settings, String> {
        match parse_words(words) {
            Ok(Cli { command: Some(Command::Serve(args)), .. }) | Ok(Cli { command: None, serve: args }) => {
                args.settings().map_err(|error| error.to_string())
            }
            Err(Stop::Usage(line)) => Err(line),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn serving_is_the_default() {
        let expected = Settings {
            cpus: vec![],
            timeouts: DriveTimeouts::default(),
            memory: Limits::default(),
            exports: vec![ExportSettings {
                device: "sim:1G".parse().unwrap(),
                listen: Listen::Path("/a".into()),
                namespace: None,
                queues: 64,
                queue_size: 1024,
                queue_pairs: None,
                read_only: false,
                serial: None,
            }],
            rpc_socket: None,
            drives: vec![],
        };
        assert_eq!(settings("--device sim:1G --socket-path /a"), Ok(expected.clone()));
        assert_eq!(settings("serve --device sim:1G --socket-path /a"), Ok(expected));
    }

    #[test]
    fn every_option_arrives() {
        let settings = settings(
            "--device 01:00.0 --fd 5 --namespace 3 --queues 2 --queue-size 64 --queue-pairs 4 --cpus 1-2 --read-only --serial S \
             --io-timeout 0.25 --hold 7 --guest-memory-limit 8G --guest-regions-limit 3 --rpc-socket /r",
        )
        .unwrap();
        assert_eq!(settings.cpus, [1, 2]);
        assert_eq!(settings.rpc_socket, Some("/r".into()));
        assert_eq!(
            settings.timeouts,
            DriveTimeouts { io_timeout: Duration::from_millis(250), hold: Duration::from_secs(7) }
        );
        assert_eq!(settings.memory, Limits { bytes: 8 << 30, regions: 3 });
        assert_eq!(
            settings.exports,
            [ExportSettings {
                device: "0000:01:00.0".parse().unwrap(),
                listen: Listen::Fd(5),
                namespace: Some(3),
                queues: 2,
                queue_size: 64,
                queue_pairs: Some(4),
                read_only: true,
                serial: Some("S".parse().unwrap()),
            }]
        );
    }

    #[test]
    fn wrong_input_is_one_line_that_says_what_to_do() {
        const HOW: &str = config::HOW_TO_SERVE;
        let more = "(vhost-blk --help tells more)";
        for (words, expected) in [
            ("", format!("no device to serve: {HOW}")),
            ("--device sim:1G", format!("no socket to serve on: {HOW}")),
            ("--socket-path /a", format!("no device to serve: {HOW}")),
            (
                "--device sim:1G --fd=-3",
                format!("invalid value '-3' for '--fd <FDNUM>': -3 is not in 0..=2147483647 {more}"),
            ),
            (
                "--device disk --socket-path /a",
                format!(
                    "invalid value 'disk' for '--device <ADDRESS>': device address \"disk\" is not valid: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH] {more}"
                ),
            ),
            ("--queues 0", format!("invalid value '0' for '--queues <N>': 0 queues: use 1 to 256 {more}")),
            ("--queues x", format!("invalid value 'x' for '--queues <N>': not a whole number {more}")),
            (
                "--queue-size 1000",
                format!(
                    "invalid value '1000' for '--queue-size <N>': queue size 1000: use a power of two from 2 to 32768 {more}"
                ),
            ),
            (
                "--namespace 0",
                format!("invalid value '0' for '--namespace <N>': namespace 0: use 1 to 4294967294 {more}"),
            ),
            (
                "--io-timeout 0",
                format!(
                    "invalid value '0' for '--io-timeout <SECONDS>': 0 seconds for a command: use 0.01 to 86400 {more}"
                ),
            ),
            ("--hold x", format!("invalid value 'x' for '--hold <SECONDS>': not a number of seconds {more}")),
            ("--colour", format!("unexpected argument '--colour' found {more}")),
            ("--device", format!("a value is required for '--device <ADDRESS>' but none was supplied {more}")),
            (
                "--config a --device sim:1G",
                format!("the argument '--config <FILE>' cannot be used with '--device <ADDRESS>' {more}"),
            ),
            (
                "--device sim:1G --socket-path /a --fd 3",
                format!("the argument '--socket-path <PATH>' cannot be used with '--fd <FDNUM>' {more}"),
            ),
        ] {
            assert_eq!(settings(words), Err(expected), "{words}");
        }
    }

    #[test]
    fn capabilities_ignore_everything_else() {
        match parse_words("--print-capabilities --no-such-option") {
            Err(Stop::Print(text)) => {
                let value: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert_eq!(value, serde_json::json!({"type": "block", "features": ["read-only"]}));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn help_and_version_are_no_errors() {
        for words in ["--help", "--version", "serve --help"] {
            assert!(matches!(parse_words(words), Err(Stop::Print(_))), "{words}");
        }
    }
}
