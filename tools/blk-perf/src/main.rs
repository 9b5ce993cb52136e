//! The program `blk-perf`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blk_perf::console::{Bar, Table};
use blk_perf::{ClientOptions, Load, Report, Workload, parse_size};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Load and verification for a vhost-user-blk target: connects as a virtual machine's guest would.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// The target's socket.
    #[arg(long, value_name = "PATH")]
    socket: std::path::PathBuf,
    /// Virtqueues to use.
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: usize,
    /// Requests in flight per queue.
    #[arg(long, value_name = "N", default_value_t = 32)]
    depth: usize,
    /// Use packed rings instead of split ones.
    #[arg(long)]
    packed: bool,
    /// Ask for EVENT_IDX or do without; by default on split rings only.
    #[arg(long, value_name = "BOOL")]
    event_idx: Option<bool>,
    /// Wait for completion notifications instead of polling.
    #[arg(long)]
    interrupts: bool,
    /// Never give up the CPU while polling; for machines with a CPU for each polling thread.
    #[arg(long, conflicts_with = "interrupts")]
    spin: bool,
    /// Client threads; 0: one per queue, but no more than CPUs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Descriptors per ring; 0: enough for the depth.
    #[arg(long, value_name = "N", default_value_t = 0)]
    queue_size: u16,
    /// Pieces of shared memory the buffers are spread over.
    #[arg(long, value_name = "N", default_value_t = 1)]
    regions: usize,
    /// End the load after this many seconds [default: 5, unless --operations is given].
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// End the load after this many requests.
    #[arg(long, value_name = "N")]
    operations: Option<u64>,
    /// Seed of the random numbers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Give up when nothing completes for this many seconds.
    #[arg(long, value_name = "S", default_value = "30", value_parser = parse_seconds)]
    stall: Duration,
    /// Random reads, writes, flushes, discards and write zeroes whose results are verified. OVERWRITES THE DISK.
    #[arg(long, conflicts_with_all = ["block_size", "read_percent"])]
    verify: bool,
    /// With --verify: bytes of the disk to work on, spread over the whole disk.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    window: u64,
    /// Without --verify: bytes per request.
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_size)]
    block_size: u64,
    /// Without --verify: one request after the other instead of all over the disk.
    #[arg(long, conflicts_with = "verify")]
    sequential: bool,
    /// Requests per second to start, whether earlier ones have completed or not; latency counts from when each was due.
    #[arg(long, value_name = "N", conflicts_with = "interrupts", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// Without --verify: share of reads. Below 100 it OVERWRITES THE DISK.
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: u8,
    /// Requests that the device reports as failed are counted, and no failure of the run, unless they are among those of the
    /// final read-back. For disks that are made to fail.
    #[arg(long)]
    allow_errors: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

impl Arguments {
    fn client_options(&self) -> ClientOptions {
        ClientOptions {
            queues: self.queues,
            depth: self.depth,
            packed: self.packed,
            event_idx: self.event_idx,
            interrupts: self.interrupts,
            spin: self.spin,
            threads: self.threads,
            queue_size: self.queue_size,
            memory_regions: self.regions,
            stall: self.stall,
            ..ClientOptions::new(&self.socket)
        }
    }

    fn workload(&self) -> Result<Workload, String> {
        let mut workload = match self.verify {
            true => Workload::verified(self.seed),
            false => {
                let bytes = usize::try_from(self.block_size).map_err(|error| error.to_string())?;
                Workload::plain(self.seed, bytes, self.read_percent)
            }
        };
        if let Load::Verified { window_bytes, .. } = &mut workload.load {
            *window_bytes = self.window;
        }
        if self.sequential {
            workload = workload.in_order();
        }
        workload.rate = self.rate;
        workload.operations = self.operations;
        workload.duration = match self.operations {
            None => self.seconds.or(Some(Duration::from_secs(5))),
            Some(_) => self.seconds,
        };
        Ok(workload)
    }
}

fn main() -> ExitCode {
    env_logger::init();
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(report) if report.is_success() => ExitCode::SUCCESS,
        Ok(report) if arguments.allow_errors && report.is_right_where_it_worked() => ExitCode::SUCCESS,
        Ok(report) => {
            for failure in &report.failures {
                eprintln!("blk-perf: {failure}");
            }
            if report.operations == 0 {
                eprintln!("blk-perf: not one request was completed");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("blk-perf: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<Report, Box<dyn std::error::Error>> {
    let workload = arguments.workload()?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first signal ends the load, a second one the program.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let mut bar = Bar::new(!arguments.json);
    let options = arguments.client_options();
    let result = blk_perf::run(&options, &workload, &stop, |progress| bar.show(progress));
    bar.finish();
    let report = result?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(report);
    }
    let mut table = Table::default();
    table.report(&report);
    if arguments.verify {
        table
            .row("verification errors", report.verify_errors.to_string())
            .row("blocks read back", report.blocks_read_back.to_string());
    }
    let empty = report.client_empty_polls * 100.0;
    if arguments.rate.is_some() {
        table.row("due, not sent", report.unsent.to_string());
    }
    table
        .row("client's empty polls", format!("{empty:.1} %"))
        .row("notifications sent", report.client_kicks.to_string())
        .row("notifications received", report.client_calls.to_string());
    print!("{}", table.render());
    Ok(report)
}
