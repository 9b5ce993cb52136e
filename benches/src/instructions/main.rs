//! Cost per request in retired instructions: what the lane, the driver and the ring execute for a 4 KiB read.
//!
//! This program starts itself twice for each row: as a simulated controller, and under `valgrind --tool=callgrind` as the
//! measured process. `benches/README.md` says how to read the result.

mod guest;
mod measure;
mod rows;
mod simulator;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

use rows::{ROWS, Row};

#[derive(Parser)]
#[command(name = "instructions", about = "Instructions per 4 KiB read, counted by valgrind")]
struct Arguments {
    /// One JSON array instead of a table
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Be the simulated controller (started by this program)
    #[command(hide = true)]
    Simulator { socket: PathBuf },
    /// Be the measured process (started by this program)
    #[command(hide = true)]
    Measure { row: usize, socket: PathBuf, simulator: u32 },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.role {
        Some(Role::Simulator { socket }) => simulator::run(&socket).map_err(|error| error.to_string()),
        Some(Role::Measure { row, socket, simulator }) => {
            measure::measure(&ROWS[row], &socket, simulator);
            Ok(())
        }
        None => report(arguments.json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(json: bool) -> Result<(), String> {
    let directory = tempfile::tempdir().map_err(|error| format!("cannot make a temporary directory: {error}"))?;
    let mut results = Vec::new();
    for (index, row) in ROWS.iter().enumerate() {
        let instructions = count(index, row, directory.path())? as f64 / row.requests() as f64;
        if !json {
            if index == 0 {
                println!("| what | instructions per request |\n|---|---|");
            }
            println!("| {} | {instructions:.1} |", row.name);
        }
        // Two digits say all there is; more would only look exact.
        let rounded = (instructions * 100.0).round() / 100.0;
        results.push(serde_json::json!({ "name": row.name, "instructions_per_request": rounded }));
    }
    if json {
        println!("{}", serde_json::Value::Array(results));
    }
    Ok(())
}

/// Instructions counted for all requests of one row.
fn count(index: usize, row: &Row, directory: &Path) -> Result<u64, String> {
    let socket = directory.join(format!("{index}.sock"));
    let output = directory.join(format!("{index}.callgrind"));
    let simulator =
        simulator::Simulator::start(&socket).map_err(|error| format!("cannot start the simulator: {error}"))?;
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let measured = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*counted_*"])
        .arg(format!("--callgrind-out-file={}", output.display()))
        .arg(program)
        .arg("measure")
        .arg(index.to_string())
        .arg(&socket)
        .arg(simulator.pid().to_string())
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}; install it (apt-get install valgrind)"))?;
    drop(simulator);
    if !measured.status.success() {
        let said = String::from_utf8_lossy(&measured.stderr);
        return Err(format!("the measurement of {:?} failed ({}):\n{said}", row.name, measured.status));
    }
    let output = std::fs::read_to_string(&output).map_err(|error| format!("valgrind left no result: {error}"))?;
    let total = output.lines().find_map(|line| line.strip_prefix("summary:").or(line.strip_prefix("totals:")));
    match total.and_then(|total| total.trim().parse().ok()) {
        Some(0) | None => Err(format!("valgrind counted nothing for {:?}: are the function names stripped?", row.name)),
        Some(total) => Ok(total),
    }
}
