//! An NVMe controller in software, served on a vfio-user socket until it is told to stop.

mod control;

use std::io::{stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Parser;
use nvme_sim::{
    Config, Error, FaultRule, IdentifyPatch, NamespaceConfig, RegisterPatch, Simulator, parse_max_transfer, parse_size,
    replicate,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// An NVMe controller in software, served on a vfio-user socket.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Path of the vfio-user socket
    #[arg(long)]
    socket: PathBuf,
    /// Size of each namespace: a number, then nothing, K, M, G or T
    #[arg(long, default_value = "1G", value_parser = parse_size)]
    size: u64,
    /// Logical block size in bytes: 512 or 4096
    #[arg(long, default_value_t = 512)]
    lba: u32,
    /// Keep the blocks in this file (namespace n > 1: PATH.n) instead of memory
    #[arg(long)]
    file: Option<PathBuf>,
    /// Take a file that has another size, too: a shorter one grows, of a longer one only the beginning is used
    #[arg(long, requires = "file")]
    resize: bool,
    /// Number of namespaces
    #[arg(long, default_value_t = 1)]
    namespaces: u32,
    /// I/O queue pairs granted at most
    #[arg(long, default_value_t = 16)]
    queues: u16,
    /// Entries of the largest I/O queue (CAP.MQES)
    #[arg(long, default_value_t = 1024)]
    queue_entries: u32,
    /// log2 of the doorbell stride in dwords (CAP.DSTRD)
    #[arg(long, default_value_t = 0)]
    doorbell_stride: u8,
    /// Largest transfer of one command: a size that is a power of two, or "none"
    #[arg(long, default_value = "512K", value_parser = max_transfer)]
    max_transfer: MaxTransfer,
    /// Boundary that I/O should not cross, in logical blocks (NOIOB); 0: none
    #[arg(long, default_value_t = 0)]
    noiob: u16,
    /// Do not offer SGLs
    #[arg(long)]
    no_sgl: bool,
    /// Do not offer shadow doorbells
    #[arg(long)]
    no_shadow_doorbells: bool,
    /// Have a volatile write cache
    #[arg(long)]
    write_cache: bool,
    /// Offer LBA formats with metadata
    #[arg(long)]
    metadata_formats: bool,
    /// Write protect the namespaces
    #[arg(long)]
    read_only: bool,
    /// Serial number
    #[arg(long, default_value = "SIM0001")]
    serial: String,
    /// Milliseconds the controller may take to become ready (CAP.TO)
    #[arg(long, default_value_t = 2000)]
    ready_timeout: u64,
    /// What Identify says otherwise: CNS[/NSID]:OFFSET:BYTES, bytes in hexadecimal, like 1:520:9500; may be repeated
    #[arg(long, value_name = "CHANGE")]
    identify: Vec<IdentifyPatch>,
    /// What a register reads otherwise: OFFSET:BYTES, like 0:0000 (CAP.MQES); may be repeated
    #[arg(long = "register", value_name = "CHANGE")]
    registers: Vec<RegisterPatch>,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A fault: ACTION[,CONDITION]…; may be repeated. Actions: delay=TIME[..TIME], fail=TYPE:CODE, nothing, lose, wrong-id, fatal, stop,
    /// remove. Conditions: opcode=NAME or number, admin, cns=N (Identify), fid=N (features), lid=N (log pages), nsid=N,
    /// sgl=on or off (the data pointer), lba=FIRST[..LAST], skip=N, limit=N, p=PROBABILITY
    #[arg(long = "fault", value_name = "RULE")]
    faults: Vec<FaultRule>,
    /// Shuffle completions that are posted together
    #[arg(long)]
    reorder: bool,
    /// Never become ready
    #[arg(long)]
    never_ready: bool,
    /// Take commands from standard input, one per line, and answer each with a line: fault RULE, faults [RULE ...], fired,
    /// identify [CHANGE ...], registers [CHANGE ...], stop, go, remove, reinsert, power-cut
    #[arg(long)]
    control: bool,
}

/// `--max-transfer`; a type of its own, because clap takes an `Option` for an optional argument.
#[derive(Clone)]
struct MaxTransfer(Option<u32>);

fn max_transfer(text: &str) -> Result<MaxTransfer, Error> {
    parse_max_transfer(text).map(MaxTransfer)
}

impl Arguments {
    fn config(self) -> (Config, PathBuf) {
        let namespace = NamespaceConfig {
            bytes: self.size,
            block_bytes: self.lba,
            metadata_bytes: 0,
            file: self.file,
            resize: self.resize,
            read_only: self.read_only,
        };
        let mut config = Config {
            namespaces: replicate(&namespace, self.namespaces),
            max_transfer: self.max_transfer.0,
            max_queue_pairs: self.queues,
            queue_entries: self.queue_entries,
            doorbell_stride: self.doorbell_stride,
            sgl: !self.no_sgl,
            shadow_doorbells: !self.no_shadow_doorbells,
            volatile_write_cache: self.write_cache,
            noiob: self.noiob,
            metadata_formats: self.metadata_formats,
            ready_timeout: Duration::from_millis(self.ready_timeout),
            serial: self.serial,
            identify: self.identify,
            registers: self.registers,
            ..Default::default()
        };
        config.faults.seed = self.seed;
        config.faults.rules = self.faults;
        config.faults.reorder = self.reorder;
        config.faults.never_ready = self.never_ready;
        (config, self.socket)
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let arguments = Arguments::parse();
    let control = arguments.control;
    let (config, socket) = arguments.config();
    match run(config, socket, control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvme-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config, socket: PathBuf, control: bool) -> Result<(), Box<dyn std::error::Error>> {
    // Before the socket is there: a signal that comes early must remove it too.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let simulator = Arc::new(Mutex::new(Some(Simulator::start(config, &socket)?)));
    if control {
        let simulator = simulator.clone();
        // It ends with the input, or with the program.
        std::thread::Builder::new().name("control".into()).spawn(move || {
            if let Err(error) = control::serve(&simulator, stdin().lock(), stdout().lock()) {
                log::warn!("no more commands: {error}");
            }
        })?;
    }
    let signal = signals.forever().next();
    log::info!("signal {}: stopping", signal.unwrap_or_default());
    // After a command that is being answered.
    drop(simulator.lock().unwrap_or_else(PoisonError::into_inner).take());
    Ok(())
}
