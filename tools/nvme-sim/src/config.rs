//! What a simulated controller is made of, and the short text form of it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, invalid};
use crate::faults::FaultPlan;
use crate::patch::{IdentifyPatch, RegisterPatch};

/// A simulated controller. `Config::default()` is one namespace of 1 GiB with 512-byte blocks in memory.
#[derive(Clone, Debug)]
pub struct Config {
    /// The namespaces; the first has identifier 1. May be empty.
    pub namespaces: Vec<NamespaceConfig>,
    /// Largest data transfer of one command in bytes, reported as MDTS: 4096 times a power of two. `None`: no limit.
    pub max_transfer: Option<u32>,
    /// I/O queue pairs granted at most (1–2047).
    pub max_queue_pairs: u16,
    /// I/O submission queues granted at most, if fewer than [`Config::max_queue_pairs`] (NVMe Base 2.0, 5.27.1.5: not as many
    /// need be granted of one kind as of the other).
    pub submission_queues: Option<u16>,
    /// I/O completion queues granted at most, if fewer than [`Config::max_queue_pairs`] (NVMe Base 2.0, 5.27.1.5).
    pub completion_queues: Option<u16>,
    /// Entries of the largest I/O queue (2–65536), reported as CAP.MQES.
    pub queue_entries: u32,
    /// CAP.DSTRD: doorbells are `4 << doorbell_stride` bytes apart (0–8).
    pub doorbell_stride: u8,
    /// Whether SGLs are supported (SGLS in Identify Controller).
    pub sgl: bool,
    /// Whether shadow doorbells are supported (Doorbell Buffer Config).
    pub shadow_doorbells: bool,
    /// Whether there is a volatile write cache: what was not flushed is lost in a power cut.
    pub volatile_write_cache: bool,
    /// Bytes of unflushed data the cache holds per namespace; older data is written back by itself.
    pub write_cache_bytes: u64,
    /// NOIOB of every namespace, in logical blocks; 0: none.
    pub noiob: u16,
    /// Whether LBA formats with metadata are offered (so that a driver's refusal of them can be tested).
    pub metadata_formats: bool,
    /// How long the controller may take to become ready, reported as CAP.TO in units of 500 ms.
    pub ready_timeout: Duration,
    /// Serial number, at most 20 printable ASCII characters.
    pub serial: String,
    /// Command retry delays 1 to 3 (CRDT1 to CRDT3), in units of 100 ms. Statuses with a retry delay have it only for a host
    /// that asks for it (Host Behavior Support, ACRE).
    pub retry_delays: [u16; 3],
    /// What Identify says otherwise than this configuration would have it; of two changes of a byte the later one counts.
    pub identify: Vec<IdentifyPatch>,
    /// What CAP, CRTO and other registers say otherwise.
    pub registers: Vec<RegisterPatch>,
    /// Regions that may be mapped for DMA at a time; a further one is refused. `None`: any number.
    pub dma_regions: Option<usize>,
    /// Faults from the start.
    pub faults: FaultPlan,
}

/// A namespace.
#[derive(Clone, Debug)]
pub struct NamespaceConfig {
    /// Size in bytes; rounded down to whole blocks.
    pub bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Metadata bytes per block: 0, or 8 if [`Config::metadata_formats`]. Such a namespace refuses I/O.
    pub metadata_bytes: u16,
    /// The file that holds the blocks, made if there is none; `None`: anonymous memory. One that is there has the size of the
    /// namespace, or is empty, or is refused: it may be another file than was meant.
    pub file: Option<PathBuf>,
    /// Take a file of another size, too. A shorter one grows, of a longer one only the beginning is used.
    pub resize: bool,
    /// Write protected.
    pub read_only: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            namespaces: vec![NamespaceConfig::default()],
            max_transfer: Some(512 << 10),
            max_queue_pairs: 16,
            submission_queues: None,
            completion_queues: None,
            queue_entries: 1024,
            doorbell_stride: 0,
            sgl: true,
            shadow_doorbells: true,
            volatile_write_cache: false,
            write_cache_bytes: 64 << 20,
            noiob: 0,
            metadata_formats: false,
            ready_timeout: Duration::from_secs(2),
            serial: "SIM0001".into(),
            retry_delays: [0; 3],
            identify: Vec::new(),
            registers: Vec::new(),
            dma_regions: None,
            faults: FaultPlan::default(),
        }
    }
}

impl Default for NamespaceConfig {
    fn default() -> NamespaceConfig {
        NamespaceConfig {
            bytes: 1 << 30,
            block_bytes: 512,
            metadata_bytes: 0,
            file: None,
            resize: false,
            read_only: false,
        }
    }
}

impl Config {
    /// CAP.TO: the ready timeout in units of 500 ms, 1–255.
    pub(crate) fn ready_timeout_units(&self) -> u8 {
        self.ready_timeout.as_millis().div_ceil(500).clamp(1, 255) as u8
    }

    /// MDTS: a power of two of 4 KiB pages, 0: no limit.
    pub(crate) fn mdts(&self) -> u8 {
        self.max_transfer.map_or(0, |bytes| (bytes / 4096).ilog2() as u8)
    }

    /// Checks every value against what the specification and this simulator allow.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let in_range = |what: &str, value: u64, range: std::ops::RangeInclusive<u64>| {
            if range.contains(&value) {
                return Ok(());
            }
            Err(invalid(format!("{what} is {value}: give {} to {}", range.start(), range.end())))
        };
        in_range("the number of I/O queue pairs", self.max_queue_pairs.into(), 1..=2047)?;
        for queues in [self.submission_queues, self.completion_queues].into_iter().flatten() {
            in_range("the number of I/O queues of a kind", queues.into(), 1..=self.max_queue_pairs.into())?;
        }
        in_range("the number of queue entries", self.queue_entries.into(), 2..=65536)?;
        in_range("the doorbell stride", self.doorbell_stride.into(), 0..=8)?;
        in_range("the number of namespaces", self.namespaces.len() as u64, 0..=4096)?;
        if let Some(bytes) = self.max_transfer
            && (bytes < 8192 || !bytes.is_power_of_two())
        {
            return Err(invalid(format!("the largest transfer is {bytes} bytes: give a power of two from 8192")));
        }
        if self.serial.len() > 20 || !self.serial.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(invalid(format!(
                "the serial number {:?} is not at most 20 printable ASCII characters",
                self.serial
            )));
        }
        self.identify.iter().try_for_each(IdentifyPatch::check)?;
        self.registers.iter().try_for_each(RegisterPatch::check)?;
        for namespace in &self.namespaces {
            namespace.check(self)?;
        }
        Ok(())
    }
}

impl NamespaceConfig {
    /// Checks whether its file can be used: what it is, its size, and the permission to read and write it. Nothing is made or
    /// changed, and whether another controller uses it is not looked at.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn check_file(&self) -> Result<(), Error> {
        crate::backing::check_file(self)
    }

    pub(crate) fn check(&self, config: &Config) -> Result<(), Error> {
        if !matches!(self.block_bytes, 512 | 4096) {
            return Err(invalid(format!("the block size is {}: give 512 or 4096", self.block_bytes)));
        }
        if self.bytes < u64::from(self.block_bytes) || self.bytes > 1 << 46 {
            return Err(invalid(format!("the namespace size is {} bytes: give one block to 64 TiB", self.bytes)));
        }
        if self.resize && self.file.is_none() {
            return Err(invalid("resize is for a file, and none is given: add file=PATH".into()));
        }
        match self.metadata_bytes {
            0 => Ok(()),
            8 if config.metadata_formats => Ok(()),
            n => Err(invalid(format!("{n} bytes of metadata per block: give 0, or 8 with metadata formats enabled"))),
        }
    }
}

/// Parses a size in bytes: a number, then nothing, `K`, `M`, `G` or `T` (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, Error> {
    let bad = || invalid(format!("the size {text:?} is not a number with an optional K, M, G or T, like 64M or 2T"));
    let (digits, shift) = match text.as_bytes().last().ok_or_else(bad)? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(bad)
}

/// The text form of a [`Config`]: `SIZE[,key=value]…`.
///
/// `SIZE` is the size of each namespace (see [`parse_size`]). Keys: `lba` (512 or 4096), `file` (path; namespace *n* > 1
/// uses `PATH.n`), `resize` (without a value: the file may have another size), `namespaces`, `queues` (I/O queue pairs),
/// `queue-entries`, `max-transfer` (size, or `none`), `noiob` (blocks), and, with the values `on` and `off`, `sgl`,
/// `shadow-doorbells`, `write-cache`, `metadata-formats`, `read-only`; `serial`;
/// `identify` (an [`IdentifyPatch`]) and `register` (a [`RegisterPatch`]), which may come more than once.
///
/// ```
/// let config = "64M,lba=4096,namespaces=2".parse::<nvme_sim::SimAddress>().unwrap().config;
/// assert_eq!((config.namespaces.len(), config.namespaces[1].block_bytes), (2, 4096));
/// assert!("64Q".parse::<nvme_sim::SimAddress>().is_err());
/// ```
#[derive(Clone, Debug)]
pub struct SimAddress {
    /// The controller it describes.
    pub config: Config,
}

impl FromStr for SimAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<SimAddress, Error> {
        let mut parts = text.split(',');
        let mut config = Config::default();
        let mut namespace =
            NamespaceConfig { bytes: parse_size(parts.next().unwrap_or_default())?, ..Default::default() };
        let mut count = 1;
        for part in parts {
            if part == "resize" {
                namespace.resize = true;
                continue;
            }
            let (key, value) = part.split_once('=').ok_or_else(|| {
                invalid(format!("{part:?} is not KEY=VALUE (in {text:?}; the form is SIZE[,KEY=VALUE]…)"))
            })?;
            match key {
                "lba" => namespace.block_bytes = number(key, value)?,
                "file" if value.is_empty() => return Err(invalid("file= needs a path".into())),
                "file" => namespace.file = Some(value.into()),
                "resize" => namespace.resize = switch(key, value)?,
                "namespaces" => count = number(key, value)?,
                "queues" => config.max_queue_pairs = number(key, value)?,
                "queue-entries" => config.queue_entries = number(key, value)?,
                "max-transfer" => config.max_transfer = parse_max_transfer(value)?,
                "noiob" => config.noiob = number(key, value)?,
                "sgl" => config.sgl = switch(key, value)?,
                "shadow-doorbells" => config.shadow_doorbells = switch(key, value)?,
                "write-cache" => config.volatile_write_cache = switch(key, value)?,
                "metadata-formats" => config.metadata_formats = switch(key, value)?,
                "read-only" => namespace.read_only = switch(key, value)?,
                "serial" => config.serial = value.into(),
                "identify" => config.identify.push(value.parse()?),
                "register" => config.registers.push(value.parse()?),
                _ => {
                    return Err(invalid(format!(
                        "{key:?} is not known (in {text:?}); known: lba, file, resize, namespaces, queues, \
                         queue-entries, max-transfer, noiob, sgl, shadow-doorbells, write-cache, metadata-formats, read-only, serial, \
                         identify, register"
                    )));
                }
            }
        }
        config.namespaces = replicate(&namespace, count);
        config.check()?;
        Ok(SimAddress { config })
    }
}

/// `count` namespaces like `first`, each with its own file: `PATH`, `PATH.2`, `PATH.3`…
pub fn replicate(first: &NamespaceConfig, count: u32) -> Vec<NamespaceConfig> {
    // More than `Config::check` accepts, few enough to be made before it says so.
    let with_file = |n: u32| {
        let mut namespace = first.clone();
        if let (Some(path), 2..) = (&first.file, n) {
            let mut name = path.clone().into_os_string();
            name.push(format!(".{n}"));
            namespace.file = Some(name.into());
        }
        namespace
    };
    (1..=count.min(65536)).map(with_file).collect()
}

/// Parses the largest transfer: a size, or `none`.
pub fn parse_max_transfer(value: &str) -> Result<Option<u32>, Error> {
    if value == "none" {
        return Ok(None);
    }
    let bytes = parse_size(value)?;
    u32::try_from(bytes).map(Some).map_err(|_| invalid(format!("the largest transfer {value:?} is above 2 GiB")))
}

/// A decimal number, or a hexadecimal one after `0x`.
pub(crate) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|_| invalid(format!("{key}={value}: {value:?} is not a number that fits")))
}

fn switch(key: &str, value: &str) -> Result<bool, Error> {
    match value {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err(invalid(format!("{key}={value}: give on or off"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("4096", 4096), ("64M", 64 << 20), ("10g", 10 << 30), ("2T", 2 << 40), ("1K", 1024)] {
            assert_eq!(parse_size(text).unwrap(), bytes);
        }
        for text in ["", "M", "-1", "1.5G", "64Q", "+5", "0", "99999999999T", "1é"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn addresses() {
        let address: SimAddress = "2T,lba=4096,file=/tmp/a,namespaces=2,sgl=off,max-transfer=128K".parse().unwrap();
        let config = address.config;
        assert_eq!(config.namespaces[0].bytes, 2 << 40);
        assert_eq!(config.namespaces[1].file.as_deref(), Some(std::path::Path::new("/tmp/a.2")));
        assert_eq!((config.sgl, config.max_transfer), (false, Some(128 << 10)));
        assert_eq!(config.mdts(), 5);
        assert!(!config.namespaces[0].resize);
        let config = "64M,identify=1:520:0000,register=0:0000,identify=0/1:33:00".parse::<SimAddress>().unwrap().config;
        assert_eq!((config.identify.len(), config.registers.len()), (2, 1));
        for text in ["1G,file=/tmp/a,resize", "1G,resize=on,file=/tmp/a"] {
            assert!(text.parse::<SimAddress>().unwrap().config.namespaces[0].resize);
        }
        for (text, said) in [
            ("", "size"),
            ("64M,lba=1000", "1000"),
            ("64M,lba", "KEY=VALUE"),
            ("64M,colour=red", "colour"),
            ("64M,sgl=maybe", "on or off"),
            ("64M,queues=0", "queue pairs"),
            ("64M,queues=99999", "fits"),
            ("64M,max-transfer=5000", "power of two"),
            ("64M,namespaces=5000", "5000"),
            ("64M,file=", "path"),
            ("64M,resize", "file=PATH"),
            ("64M,identify=1", "CNS"),
            ("64M,register=0x14:00", "0x14"),
            ("100T", "64 TiB"),
        ] {
            let error = text.parse::<SimAddress>().unwrap_err().to_string();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }
}
