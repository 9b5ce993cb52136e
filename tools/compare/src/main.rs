//! The program `compare`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use compare::comparison::FORMAT;
use compare::frontend::drive::DriveOptions;
use compare::frontend::{self, FrontendOptions};
use compare::guest::{self, GuestOptions};
use compare::job::default_jobs;
use compare::options::{CommonOptions, DISKS};
use compare::progress::Progress;
use compare::{Comparison, Error, Plan, report};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Runs the same load on this project's target and on virtio-blk-data-plane, and reports both.
#[derive(Parser, Debug)]
#[command(version)]
#[command(group = clap::ArgGroup::new("way").required(true).args(["frontend", "guest", "merge", "list_jobs", "serve_drive"]))]
struct Arguments {
    /// A load generator as vhost-user front-end, without a guest: what the back ends do, on any machine
    #[arg(long)]
    frontend: bool,
    /// fio in a guest: what an application gets; a matter of speed only where there is KVM
    #[arg(long)]
    guest: bool,
    /// Report on what was written with --json before: one file, or several of different sides or jobs
    #[arg(long, value_name = "FILE", num_args = 1..)]
    merge: Vec<PathBuf>,
    /// Print the names of the jobs
    #[arg(long)]
    list_jobs: bool,
    /// Also write the report as JSON ("-": to standard output, instead of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write the report as a page with a chart, in one file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    common: CommonOptions,
    #[command(flatten)]
    frontend_options: FrontendOptions,
    #[command(flatten)]
    guest_options: GuestOptions,
    #[command(flatten)]
    drive: DriveOptions,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match run(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns false if there is a report, and a round of it failed.
fn run(arguments: Arguments) -> Result<bool, Error> {
    if let Some(socket) = &arguments.drive.serve_drive {
        frontend::drive::serve(socket, &arguments.drive)?;
        return Ok(true);
    }
    if arguments.list_jobs {
        for job in default_jobs(arguments.common.disks.unwrap_or(DISKS)) {
            println!("{:28} {}", job.name, job.title());
        }
        return Ok(true);
    }
    if !arguments.merge.is_empty() {
        let comparison = merge(&arguments.merge)?;
        write_reports(&comparison, arguments.json.as_deref(), arguments.html.as_deref())?;
        return Ok(comparison.is_success());
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first signal ends the comparison in order, a second one the program.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(Error::system("watching for signals"))?;
    }
    let plan = Plan::new(arguments.common, stop)?;
    let progress = Progress::new(std::io::stderr().is_terminal());
    let result = match arguments.frontend {
        true => frontend::run(&plan, &arguments.frontend_options, &progress),
        false => guest::run(&plan, &arguments.guest_options, &progress),
    };
    progress.finish();
    let comparison = result?;
    write_reports(&comparison, arguments.json.as_deref(), arguments.html.as_deref())?;
    Ok(comparison.is_success())
}

fn merge(files: &[PathBuf]) -> Result<Comparison, Error> {
    let mut merged: Option<Comparison> = None;
    for path in files {
        let text = std::fs::read_to_string(path).map_err(Error::system(format!("reading {}", path.display())))?;
        let read: Comparison = serde_json::from_str(&text)
            .map_err(|error| Error::Options(format!("{} is not a report of this program: {error}", path.display())))?;
        if read.format != FORMAT {
            return Err(Error::Options(format!("{}: format {}, not {FORMAT}", path.display(), read.format)));
        }
        merged = Some(match merged.take() {
            None => read,
            Some(merged) => {
                let failed = |why| {
                    Error::Options(format!("{} cannot be joined to the reports before it: {why}", path.display()))
                };
                merged.join(read).map_err(failed)?
            }
        });
    }
    Ok(merged.expect("there is at least one file"))
}

fn write_reports(comparison: &Comparison, json: Option<&Path>, html: Option<&Path>) -> Result<(), Error> {
    let to_file = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(Error::system(format!("writing {}", path.display())))
    };
    match json {
        Some(path) if path == Path::new("-") => println!("{}", report::json(comparison)),
        _ => print!("{}", report::table(comparison)),
    }
    if let Some(path) = json.filter(|path| *path != Path::new("-")) {
        to_file(path, report::json(comparison))?;
    }
    if let Some(path) = html {
        to_file(path, report::html(comparison))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_of_both_ways_do_not_clash() {
        Arguments::command().debug_assert();
    }
}
