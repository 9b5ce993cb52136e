//! The options that both ways share.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blk_perf::parse_size;
use vhost_blk::control::config::CpuList;

use crate::Error;
use crate::comparison::Settings;
use crate::job::{Job, default_jobs, select};

/// Disks of the jobs that load several at once: as many as in the field test.
pub const DISKS: u32 = 7;

/// How data-plane reaches its file or disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Aio {
    /// io_uring.
    #[default]
    #[value(name = "io_uring")]
    IoUring,
    /// Linux AIO; only past the page cache.
    Native,
    /// A pool of threads: not what anybody runs who wants speed.
    Threads,
}

impl Aio {
    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
            Aio::Threads => "threads",
        }
    }
}

/// Shared options as they stand on the command line.
#[derive(Clone, Debug, clap::Args)]
pub struct CommonOptions {
    /// Run only this job; may be repeated [default: all that --list-jobs shows]
    #[arg(long = "job", value_name = "NAME")]
    pub jobs: Vec<String>,
    /// Bytes per request instead of the job's own, such as 512,16k,128k
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = parse_size)]
    pub block_size: Vec<u64>,
    /// Requests in flight per disk instead of the job's own, such as 1,4,32,128
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub depth: Vec<u32>,
    /// Disks of the jobs that load several at once; 1: leave those jobs out [default: 7, or 1 on a drive of your own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub disks: Option<u32>,
    /// Rounds of each job on each side, interleaved
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// Length of a round
    #[arg(long, value_name = "S", default_value = "1", value_parser = parse_seconds)]
    pub seconds: Duration,
    /// Virtqueues per disk
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: u32,
    /// Host CPUs that the side under test may use, such as 2,4-7 [default: chosen, and told in the report]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// Size of a disk in memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub size: u64,
    /// Our target's drive instead of one in memory: a PCI function (0000:01:00.0) or vfio-user:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub device: Option<String>,
    /// Data-plane's disk instead of a file in memory, such as /dev/nvme0n1
    #[arg(long, value_name = "PATH")]
    pub kernel_device: Option<PathBuf>,
    /// What --device and --kernel-device hold may be destroyed
    #[arg(long)]
    pub overwrite: bool,
    /// How data-plane reaches its file or disk [default: io_uring; with --guest, native where io_uring does not work]
    #[arg(long, value_enum)]
    pub aio: Option<Aio>,
    /// Our target [default: $VHOST_BLK, or vhost-blk beside this program]
    #[arg(long, value_name = "PATH")]
    pub vhost_blk: Option<PathBuf>,
}

/// What is to be done, checked: what both ways work from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The jobs, in the order in which they run.
    pub jobs: Vec<Job>,
    /// Rounds of each job on each side.
    pub repeat: u32,
    /// Length of a round's load.
    pub round: Duration,
    /// Virtqueues per disk.
    pub queues: u32,
    /// Host CPUs of the side under test; `None`: to be chosen.
    pub cpus: Option<Vec<usize>>,
    /// Size of a disk in memory, in bytes.
    pub disk_bytes: u64,
    /// The drive of our target, if it is not to be one in memory.
    pub device: Option<String>,
    /// The disk of data-plane, if it is not to be a file in memory.
    pub kernel_device: Option<PathBuf>,
    /// Whether what these two hold may be destroyed.
    pub overwrite: bool,
    /// How data-plane reaches its file or disk; `None`: to be chosen.
    pub aio: Option<Aio>,
    /// Where our target is.
    pub vhost_blk: Option<PathBuf>,
    /// Becomes true when the user wants to stop.
    pub stop: Arc<AtomicBool>,
}

impl Plan {
    /// Checks the options.
    ///
    /// # Errors
    /// Jobs that do not exist or do not fit the disks.
    pub fn new(options: CommonOptions, stop: Arc<AtomicBool>) -> Result<Plan, Error> {
        let own = options.device.is_some() || options.kernel_device.is_some();
        let all = default_jobs(options.disks.unwrap_or(if own { 1 } else { DISKS }));
        let jobs = select(&all, &options.jobs, &options.block_size, &options.depth).map_err(Error::Options)?;
        for job in &jobs {
            let bytes = job.block_bytes;
            if bytes < 512 || !bytes.is_multiple_of(512) || bytes > options.size {
                return Err(Error::Options(format!(
                    "{}: {bytes} bytes per request; use a multiple of 512, and no more than a disk has",
                    job.name
                )));
            }
        }
        Ok(Plan {
            jobs,
            repeat: options.repeat,
            round: options.seconds,
            queues: options.queues,
            cpus: options.cpus.map(|CpuList(mut cpus)| {
                cpus.sort_unstable();
                cpus
            }),
            disk_bytes: options.size,
            device: options.device,
            kernel_device: options.kernel_device,
            overwrite: options.overwrite,
            aio: options.aio,
            vhost_blk: options.vhost_blk,
            stop,
        })
    }

    /// How long and how often, for the report.
    pub fn settings(&self) -> Settings {
        Settings {
            repeat: self.repeat,
            seconds: self.round.as_secs_f64(),
            queues: self.queues,
            disk_bytes: self.disk_bytes,
        }
    }

    /// The most disks that any job loads.
    pub fn most_disks(&self) -> u32 {
        self.jobs.iter().map(|job| job.disks).max().unwrap_or(1)
    }

    /// Fails once the user wants to stop.
    pub fn check_stop(&self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// The program of our target.
    ///
    /// # Errors
    /// When it is not there.
    pub fn vhost_blk_program(&self) -> Result<PathBuf, Error> {
        let beside = || {
            let own = std::env::current_exe().ok()?;
            Some(own.parent()?.join("vhost-blk"))
        };
        let path = self.vhost_blk.clone().or_else(|| std::env::var_os("VHOST_BLK").map(PathBuf::from)).or_else(beside);
        let path = path.unwrap_or_else(|| "vhost-blk".into());
        crate::process::find_program(&path).ok_or_else(|| Error::NoProgram {
            program: path.display().to_string(),
            advice: "build it with `cargo build --release`, or say where it is with --vhost-blk PATH",
        })
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    match seconds {
        _ if !(0.05..=3600.0).contains(&seconds) => Err("use 0.05 to 3600 seconds".into()),
        _ => Ok(Duration::from_secs_f64(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_rounds() {
        assert_eq!(parse_seconds("0.3"), Ok(Duration::from_millis(300)));
        for bad in ["0", "-1", "NaN", "inf", "x", "1e9"] {
            assert!(parse_seconds(bad).is_err(), "{bad:?}");
        }
    }
}
