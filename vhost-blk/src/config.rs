//! What to serve: from the command line or from a TOML file, checked before anything is opened.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::address::DeviceAddress;

/// Virtqueues offered to a front-end unless told otherwise: QEMU asks for one per virtual CPU and refuses a back-end with
/// fewer. Queues that no guest starts cost nothing.
pub const DEFAULT_QUEUES: u16 = 64;
/// A vring's index is one byte in the messages that carry its file descriptors.
pub const MAX_QUEUES: u16 = 256;
/// Largest virtqueue accepted unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// virtio 1.2, section 2.6: a virtqueue has at most 32768 entries.
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// virtio 1.2, section 5.2.6: the device ID string has 20 bytes.
pub const SERIAL_BYTES: usize = 20;

/// Everything one run of the program serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// CPUs with one polled worker each; empty: one worker that is not pinned.
    pub cpus: Vec<usize>,
    /// How drives that do not answer are dealt with.
    pub patience: Patience,
    /// At least one; no two with the same socket.
    pub exports: Vec<ExportSettings>,
}

/// How long a drive may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For one command; then the controller is reset and its unfinished commands are issued again.
    pub io_timeout: Duration,
    /// For a drive that fails or disappears to be back. Requests wait so long, then they fail.
    pub hold: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { io_timeout: Duration::from_secs(30), hold: Duration::from_secs(30) }
    }
}

impl Patience {
    /// The default, but for what is given.
    pub fn with(io_timeout: Option<Duration>, hold: Option<Duration>) -> Patience {
        let default = Patience::default();
        Patience { io_timeout: io_timeout.unwrap_or(default.io_timeout), hold: hold.unwrap_or(default.hold) }
    }
}

/// One disk on one vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSettings {
    /// The controller.
    pub device: DeviceAddress,
    /// Where front-ends connect.
    pub listen: Listen,
    /// Namespace identifier; `None`: the only one the controller has.
    pub namespace: Option<u32>,
    /// Virtqueues offered: 1 to 256.
    pub queues: u16,
    /// Largest virtqueue accepted, in entries: a power of two, 2 to 32768.
    pub queue_size: u16,
    /// Refuse every command that changes data.
    pub read_only: bool,
    /// What GET_ID tells the guest; `None`: the drive's serial number.
    pub serial: Option<Serial>,
}

impl std::fmt::Display for ExportSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.listen)?;
        match self.namespace {
            Some(id) => write!(f, "namespace {id}")?,
            None => f.write_str("the only namespace")?,
        }
        write!(f, " of {}, {} queues of up to {} entries", self.device, self.queues, self.queue_size)?;
        if self.read_only {
            f.write_str(", read-only")?;
        }
        match &self.serial {
            Some(Serial(serial)) => write!(f, ", serial number {serial}"),
            None => Ok(()),
        }
    }
}

impl ExportSettings {
    /// Whether both may be used at the same time only by guests that know of each other.
    fn may_spoil(&self, other: &ExportSettings) -> bool {
        let same = match (self.namespace, other.namespace) {
            (Some(one), Some(two)) => one == two,
            // The only one there is, or the start will fail.
            _ => true,
        };
        same && self.device == other.device && !(self.read_only && other.read_only)
    }
}

impl Settings {
    /// What makes sense and is hardly meant: exports of one namespace, of which at least one can write to it.
    pub fn warnings(&self) -> Vec<String> {
        let earlier = |index: usize, export: &ExportSettings| {
            self.exports[..index].iter().find(|earlier| earlier.may_spoil(export))
        };
        let pairs =
            self.exports.iter().enumerate().filter_map(|(index, export)| Some((earlier(index, export)?, export)));
        pairs
            .map(|(one, two)| {
                format!(
                    "{} and {} serve the same namespace of {}: two guests that do not know of each other destroy what is on it; \
                     make both read-only, or give each a namespace of its own",
                    one.listen, two.listen, one.device
                )
            })
            .collect()
    }
}

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

/// 1 to 20 printable ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Serial(String);

impl Serial {
    /// The device ID string of virtio 1.2, section 5.2.6: padded with zeroes, no terminator when it fills all 20 bytes.
    pub fn to_bytes(&self) -> [u8; SERIAL_BYTES] {
        let mut bytes = [0; SERIAL_BYTES];
        // Its length was checked when it was made.
        bytes.iter_mut().zip(self.0.bytes()).for_each(|(to, from)| *to = from);
        bytes
    }
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = !text.is_empty() && text.len() <= SERIAL_BYTES;
        if fits && text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            Ok(Serial(text.into()))
        } else {
            Err(format!("serial \"{text}\": use 1 to {SERIAL_BYTES} printable ASCII characters"))
        }
    }
}

impl TryFrom<String> for Serial {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A list of CPUs such as `2,4-7`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(pub Vec<usize>);

/// Linux's own limit on CPU numbers (CONFIG_NR_CPUS on the biggest kernels).
const MAX_CPU: usize = 8191;

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("CPU list \"{text}\": {why}; use numbers and ranges such as 2,4-7");
        let number = |part: &str| match part.parse::<usize>() {
            Ok(cpu) if cpu <= MAX_CPU && part.bytes().all(|byte| byte.is_ascii_digit()) => Ok(cpu),
            _ => Err(wrong(&format!("\"{part}\" is not a CPU number"))),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong(&format!("the range {part} runs backwards")));
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(wrong(&format!("CPU {cpu} is there twice")));
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Checks the number of virtqueues.
pub fn queues(count: u64) -> Result<u16, String> {
    u16::try_from(count)
        .ok()
        .filter(|count| (1..=MAX_QUEUES).contains(count))
        .ok_or_else(|| format!("{count} queues: use 1 to {MAX_QUEUES}"))
}

/// Checks the size of the largest virtqueue.
pub fn queue_size(entries: u64) -> Result<u16, String> {
    u16::try_from(entries)
        .ok()
        .filter(|entries| (2..=MAX_QUEUE_SIZE).contains(entries) && entries.is_power_of_two())
        .ok_or_else(|| format!("queue size {entries}: use a power of two from 2 to {MAX_QUEUE_SIZE}"))
}

/// Checks a namespace identifier (NVMe Base 2.0, section 3.2.1: 0 is none, all ones is all).
pub fn namespace(id: u64) -> Result<u32, String> {
    u32::try_from(id)
        .ok()
        .filter(|id| (1..u32::MAX).contains(id))
        .ok_or_else(|| format!("namespace {id}: use 1 to {}", u32::MAX - 1))
}

/// Checks the time for a command, in seconds.
pub fn io_timeout(seconds: f64) -> Result<Duration, String> {
    duration(seconds, 0.01).ok_or_else(|| format!("{seconds} seconds for a command: use 0.01 to {MOST_SECONDS}"))
}

/// Checks how long requests wait for a drive, in seconds.
pub fn hold(seconds: f64) -> Result<Duration, String> {
    duration(seconds, 0.0).ok_or_else(|| format!("{seconds} seconds to wait for a drive: use 0 to {MOST_SECONDS}"))
}

const MOST_SECONDS: f64 = 86400.0;

fn duration(seconds: f64, least: f64) -> Option<Duration> {
    (least..=MOST_SECONDS).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileContents {
    cpus: Option<CpuList>,
    io_timeout: Option<Checked<IoTimeoutRule>>,
    hold: Option<Checked<HoldRule>>,
    #[serde(default)]
    export: Vec<FileExport>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileExport {
    device: DeviceAddress,
    socket_path: PathBuf,
    namespace: Option<Checked<NamespaceRule>>,
    queues: Option<Checked<QueuesRule>>,
    queue_size: Option<Checked<QueueSizeRule>>,
    #[serde(default)]
    read_only: bool,
    serial: Option<Serial>,
}

/// A number checked while it is read, so that the error carries its line.
struct Checked<R: Rule>(R::Value);

trait Rule {
    /// As it stands in the file.
    type Number: for<'de> Deserialize<'de>;
    type Value;
    fn check(number: Self::Number) -> Result<Self::Value, String>;
}

macro_rules! rule {
    ($name:ident, $number:ty, $value:ty, $check:path) => {
        struct $name;
        impl Rule for $name {
            type Number = $number;
            type Value = $value;
            fn check(number: $number) -> Result<$value, String> {
                $check(number)
            }
        }
    };
}

rule!(NamespaceRule, u64, u32, namespace);
rule!(QueuesRule, u64, u16, queues);
rule!(QueueSizeRule, u64, u16, queue_size);
rule!(IoTimeoutRule, f64, Duration, io_timeout);
rule!(HoldRule, f64, Duration, hold);

impl<'de, R: Rule> Deserialize<'de> for Checked<R> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        R::check(R::Number::deserialize(deserializer)?).map(Checked).map_err(serde::de::Error::custom)
    }
}

/// Reads the settings from a TOML file. The error is one line with the file and, where there is one, the line.
pub fn load(path: &Path) -> Result<Settings, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read the configuration file {}: {error}", path.display()))?;
    parse(&text, &path.display().to_string())
}

fn parse(text: &str, name: &str) -> Result<Settings, String> {
    let contents: FileContents = toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        // The parser's message may go over several lines.
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        match line {
            Some(line) => format!("{name}, line {line}: {message}"),
            None => format!("{name}: {message}"),
        }
    })?;
    if contents.export.is_empty() {
        return Err(format!("{name}: no export: add an [[export]] section with device and socket-path"));
    }
    let exports = contents
        .export
        .into_iter()
        .map(|export| ExportSettings {
            device: export.device,
            listen: Listen::Path(export.socket_path),
            namespace: export.namespace.map(|checked| checked.0),
            queues: export.queues.map_or(DEFAULT_QUEUES, |checked| checked.0),
            queue_size: export.queue_size.map_or(DEFAULT_QUEUE_SIZE, |checked| checked.0),
            read_only: export.read_only,
            serial: export.serial,
        })
        .collect::<Vec<_>>();
    for (index, export) in exports.iter().enumerate() {
        if export.listen == Listen::Path(PathBuf::new()) {
            return Err(format!("{name}: export {}: socket-path is empty", index + 1));
        }
        if exports[..index].iter().any(|earlier| earlier.listen == export.listen) {
            return Err(format!("{name}: two exports use the socket {}: give each its own", export.listen));
        }
    }
    let patience = Patience::with(contents.io_timeout.map(|checked| checked.0), contents.hold.map(|checked| checked.0));
    Ok(Settings { cpus: contents.cpus.unwrap_or_default().0, patience, exports })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = parse(text, "c.toml").expect_err("the file is wrong");
        assert!(!error.contains('\n'), "one line: {error:?}");
        error
    }

    #[test]
    fn a_file_with_everything() {
        let settings = parse(
            r#"
            cpus = "2,4-5"
            io-timeout = 2.5
            hold = 0
            [[export]]
            device = "0000:01:00.0"
            socket-path = "/run/a.sock"
            namespace = 2
            queues = 4
            queue-size = 256
            read-only = true
            serial = "DISK-A"
            [[export]]
            device = "sim:1G"
            socket-path = "/run/b.sock"
            "#,
            "c.toml",
        )
        .unwrap();
        assert_eq!(settings.cpus, [2, 4, 5]);
        assert_eq!(settings.patience, Patience { io_timeout: Duration::from_millis(2500), hold: Duration::ZERO });
        assert_eq!(
            settings.exports[0],
            ExportSettings {
                device: "01:00.0".parse().unwrap(),
                listen: Listen::Path("/run/a.sock".into()),
                namespace: Some(2),
                queues: 4,
                queue_size: 256,
                read_only: true,
                serial: Some("DISK-A".parse().unwrap()),
            }
        );
        assert_eq!(
            settings.exports[1],
            ExportSettings {
                device: "sim:1G".parse().unwrap(),
                listen: Listen::Path("/run/b.sock".into()),
                namespace: None,
                queues: DEFAULT_QUEUES,
                queue_size: DEFAULT_QUEUE_SIZE,
                read_only: false,
                serial: None,
            }
        );
    }

    #[test]
    fn the_example_is_right_and_so_are_the_lines_it_leaves_out() {
        let example = include_str!("../../setup/vhost-blk.toml");
        assert_eq!(parse(example, "example").unwrap().exports.len(), 1);
        // A comment that is a line of TOML begins without a space.
        let all: String = example
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let settings = parse(&all, "example").unwrap();
        assert_eq!((settings.cpus.len(), settings.exports.len()), (2, 2));
        assert_eq!(settings.patience, Patience::default(), "what the example shows is the default");
        assert_eq!(settings.exports[0].queues, DEFAULT_QUEUES, "what the example shows is the default");
        assert_eq!(settings.exports[0].queue_size, DEFAULT_QUEUE_SIZE);
    }

    #[test]
    fn errors_name_the_line() {
        assert_eq!(
            error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueus = 4\n"),
            "c.toml, line 4: unknown field `queus`, expected one of `device`, `socket-path`, `namespace`, `queues`, `queue-size`, `read-only`, `serial`"
        );
        assert_eq!(
            error("cpu = \"1\"\n"),
            "c.toml, line 1: unknown field `cpu`, expected one of `cpus`, `io-timeout`, `hold`, `export`"
        );
        assert_eq!(error("hold = -1\n"), "c.toml, line 1: -1 seconds to wait for a drive: use 0 to 86400");
        assert_eq!(error("io-timeout = nan\n"), "c.toml, line 1: NaN seconds for a command: use 0.01 to 86400");
        assert_eq!(error("\n[[export]]\ndevice = \"sim:1G\"\n"), "c.toml, line 2: missing field `socket-path`");
        assert_eq!(
            error("[[export]]\nsocket-path = \"/a\"\ndevice = \"nvme\"\n"),
            "c.toml, line 3: device address \"nvme\" is not one: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]"
        );
        assert_eq!(
            error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueues = 0\n"),
            "c.toml, line 4: 0 queues: use 1 to 256"
        );
        assert_eq!(
            error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueue-size = 100\n"),
            "c.toml, line 4: queue size 100: use a power of two from 2 to 32768"
        );
        assert_eq!(
            error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nserial = \"\"\n"),
            "c.toml, line 4: serial \"\": use 1 to 20 printable ASCII characters"
        );
        assert_eq!(
            error("cpus = \"3-1\"\n"),
            "c.toml, line 1: CPU list \"3-1\": the range 3-1 runs backwards; use numbers and ranges such as 2,4-7"
        );
        let broken = error("cpus = \n");
        assert!(broken.starts_with("c.toml, line 1: "), "{broken}");
        let wrong_type = error("[[export]]\ndevice = 5\n");
        assert!(wrong_type.starts_with("c.toml, line 2: invalid type: integer `5`"), "{wrong_type}");
        let negative = error("[[export]]\nqueues = -1\n");
        assert!(negative.starts_with("c.toml, line 2: "), "{negative}");
    }

    #[test]
    fn exports_are_checked_together() {
        assert_eq!(error(""), "c.toml: no export: add an [[export]] section with device and socket-path");
        let one = "[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\n";
        assert_eq!(error(&one.repeat(2)), "c.toml: two exports use the socket /a: give each its own");
        assert_eq!(
            error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"\"\n"),
            "c.toml: export 1: socket-path is empty"
        );
    }

    #[test]
    fn a_namespace_of_two_exports_is_told_unless_nobody_writes() {
        let warnings = |exports: &[(&str, &str)]| {
            let export = |(at, (device, more)): (usize, &(&str, &str))| {
                format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"/{at}\"\n{more}\n")
            };
            parse(&exports.iter().enumerate().map(export).collect::<String>(), "c.toml").unwrap().warnings()
        };
        let read_only = "read-only = true";
        assert_eq!(warnings(&[("sim:1G", ""), ("sim:2G", "")]), [""; 0]);
        assert_eq!(warnings(&[("01:00.0", "namespace = 1"), ("01:00.0", "namespace = 2")]), [""; 0]);
        assert_eq!(warnings(&[("sim:1G", read_only), ("sim:1G", read_only)]), [""; 0]);
        let told = warnings(&[("01:00.0", "namespace = 1"), ("0000:01:00.0", "namespace = 1\nread-only = true")]);
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("/0 and /1 serve the same namespace of 0000:01:00.0: "), "{told:?}");
        // The one of which no number is given may be that one.
        assert_eq!(warnings(&[("sim:1G", "namespace = 1"), ("sim:1G", "")]).len(), 1);
        // A third one is told with the one that it may spoil.
        let told = warnings(&[("sim:1G", read_only), ("sim:1G", ""), ("sim:1G", read_only)]);
        assert!(told.len() == 2 && told[1].starts_with("/1 and /2 "), "{told:?}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load(Path::new("/nowhere/c.toml")).unwrap_err();
        assert_eq!(error, "cannot read the configuration file /nowhere/c.toml: No such file or directory (os error 2)");
    }

    #[test]
    fn cpu_lists() {
        assert_eq!("0".parse(), Ok(CpuList(vec![0])));
        assert_eq!("7,0-2".parse(), Ok(CpuList(vec![7, 0, 1, 2])));
        for (text, why) in [
            ("", "\"\" is not a CPU number"),
            ("a", "\"a\" is not a CPU number"),
            ("1-", "\"\" is not a CPU number"),
            ("+1", "\"+1\" is not a CPU number"),
            ("99999", "\"99999\" is not a CPU number"),
            ("1,0-2", "CPU 1 is there twice"),
        ] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert_eq!(error, format!("CPU list \"{text}\": {why}; use numbers and ranges such as 2,4-7"));
        }
    }

    #[test]
    fn serials_are_padded() {
        assert_eq!(&"AB".parse::<Serial>().unwrap().to_bytes()[..3], b"AB\0");
        let full = "12345678901234567890";
        assert_eq!(&full.parse::<Serial>().unwrap().to_bytes(), full.as_bytes());
        assert!("123456789012345678901".parse::<Serial>().is_err());
        assert!("a\nb".parse::<Serial>().is_err());
    }
}
