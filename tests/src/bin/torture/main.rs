//! The torture test: a client that knows what it has written, and a target that is killed under it, or a drive that fails.
//! See `tests/torture.sh`.
#![forbid(unsafe_code)]

mod client;
mod front_end;
mod hostile;
mod memory;
mod namespace;
mod packed;
mod random;
mod request;
mod ring;
mod rounds;
mod split;
mod stand;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Parser, ValueEnum};

use crate::rounds::Report;

/// Keeps a deep queue of verified requests on a target that is killed, or whose drive fails, again and again
#[derive(Parser)]
#[command(name = "torture")]
pub struct Options {
    /// How often
    #[arg(long, default_value_t = 50)]
    kills: u32,
    /// The rings' format
    #[arg(long, value_enum, default_value_t = RingFormat::Split)]
    ring: RingFormat,
    /// What befalls the target: it is killed, or its drive fails, loses completions, or is pulled out for a while, or both
    /// lose their power and with it what was not flushed; or another disk of it has a hostile front-end, or another namespace of
    /// the drive fails
    #[arg(long, value_enum, default_value_t = Fault::Kill)]
    fault: Fault,
    /// Repeats the requests and moments of an earlier run [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Rings in use
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
    rings: u16,
    /// The longest pause that is no failure, in milliseconds
    #[arg(long, default_value_t = 5000)]
    pause_limit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RingFormat {
    Split,
    Packed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fault {
    Kill,
    Reset,
    Lost,
    Removal,
    Power,
    Neighbour,
    Namespace,
}

/// Why a run came to no end.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The test itself cannot go on.
    #[error("{0}")]
    Stand(String),
}

fn main() -> ExitCode {
    let options = Options::parse();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64 & 0xffff_ffff);
    let seed = options.seed.unwrap_or_else(now);
    let (ring, fault) = (name(options.ring), name(options.fault));
    // First of all: a run that comes to no end has to be repeatable, too.
    eprintln!("torture: {} x {fault}, {ring} rings: --seed {seed}", options.kills);
    let report = match programs().and_then(|programs| rounds::run(&options, seed, &programs)) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("torture: {error}");
            return ExitCode::from(2);
        }
    };
    let limit = Duration::from_millis(options.pause_limit);
    let good = report.wrong.total() == 0 && report.in_time;
    print(&options, &report, seed);
    if !report.in_time {
        eprintln!("torture: a pause was longer than {limit:?} (--pause-limit)");
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
}

/// The programs under test: the target, and the drive.
pub struct Programs {
    target: PathBuf,
    drive: PathBuf,
}

fn programs() -> Result<Programs, Failure> {
    let stand = |error: &dyn std::fmt::Display| Failure::Stand(error.to_string());
    let target = e2e::vhost_blk_program().map_err(|error| stand(&error))?;
    let own = std::env::current_exe().map_err(|error| stand(&error))?;
    let drive = std::env::var_os("NVME_SIM").map_or_else(|| own.with_file_name("nvme-sim"), PathBuf::from);
    if !drive.is_file() {
        let advice =
            "build it with `cargo build --package nvme-sim`, or name another build in the environment's NVME_SIM";
        return Err(Failure::Stand(format!("the drive is missing at {}: {advice}", drive.display())));
    }
    Ok(Programs { target, drive })
}

fn milliseconds(time: Option<&Duration>) -> f64 {
    time.map_or(0.0, |time| (time.as_secs_f64() * 10_000.0).round() / 10.0)
}

fn print(options: &Options, report: &Report, seed: u64) {
    let mut pauses = report.pauses.clone();
    pauses.sort_unstable();
    let (median, worst) = (milliseconds(pauses.get(pauses.len() / 2)), milliseconds(pauses.last()));
    let Report { kills, wrong, requests, resumed, blocks_lost, went_back, deeds, suffering, .. } = report;
    if options.json {
        let mut value = serde_json::json!({
            "kills": kills,
            "errors": wrong.errors,
            "lost": wrong.lost,
            "duplicates": wrong.duplicates,
            "pause_ms_median": median,
            "pause_ms_worst": worst,
            "ring": name(options.ring),
            "fault": name(options.fault),
            "seed": seed,
            "requests": requests,
            "in_flight_at_faults": resumed,
            "blocks_lost": blocks_lost,
            "answers_lost": went_back,
        });
        if let Some(suffering) = suffering {
            value["other"] = serde_json::json!({ "requests": suffering.requests, "failures": suffering.failures });
        }
        if let Some(deeds) = deeds {
            value["hostile"] = serde_json::json!({
                "sessions": deeds.sessions,
                "requests": deeds.requests,
                "answers": deeds.answers,
                "refusals": deeds.refusals,
                "habits": deeds.habits,
            });
        }
        println!("{value}");
        return;
    }
    let what = match options.fault {
        Fault::Kill => "kills",
        Fault::Reset => "controller failures",
        Fault::Lost => "times of lost completions",
        Fault::Removal => "removals",
        Fault::Power => "power cuts",
        Fault::Neighbour => "hostile front-ends",
        Fault::Namespace => "failures of another namespace",
    };
    println!("{kills} {what}, {} rings, seed {seed}", name(options.ring));
    println!("{requests} requests, {resumed} of them in flight at one of these moments");
    if options.fault == Fault::Power {
        println!("{blocks_lost} blocks lost; {went_back} were read that had lost what was answered and not flushed");
    }
    if let Some(suffering) = suffering {
        println!("the other namespace: {} requests, {} failures", suffering.requests, suffering.failures);
    }
    if let Some(deeds) = deeds {
        let habits: Vec<_> = deeds.habits.iter().map(|(name, count)| format!("{name} {count}")).collect();
        println!(
            "the hostile: {} sessions, {} requests, {} answers, {} messages refused; {}",
            deeds.sessions,
            deeds.requests,
            deeds.answers,
            deeds.refusals,
            habits.join(", ")
        );
    }
    println!("{} errors, {} lost, {} duplicates", wrong.errors, wrong.lost, wrong.duplicates);
    println!("pause: median {median} ms, worst {worst} ms");
}
