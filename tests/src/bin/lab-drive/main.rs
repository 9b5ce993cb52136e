//! What the tests of real VFIO do with a drive: opens it by the project's own crates, does one thing, and says what came
//! of it as one line of JSON. Run inside the lab's virtual machine; on a real drive most of it **destroys the data**.

mod change;
mod engine;
mod exercise;
mod nvme;
mod stray;

use std::io::{Read, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use e2e::{Exception, Layout};
use nvme_driver::{Controller, Options, QueuePairOptions};
use serde_json::Value;

use crate::engine::{Lane, Wait};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// What the controller and its namespaces say of themselves.
    Identify {
        #[command(flatten)]
        drive: DriveArguments,
    },
    /// Writes every block of a namespace under a seed.
    Fill {
        #[command(flatten)]
        disk: Disk,
        #[arg(long)]
        seed: u64,
    },
    /// Reads every block of a namespace and compares it with what it should hold.
    Verify {
        #[command(flatten)]
        disk: Disk,
        #[arg(long)]
        seed: u64,
        /// Ranges that hold something else.
        #[arg(long)]
        except: Vec<Exception>,
    },
    /// Does each kind of request once to a namespace that was filled under the seed, checks their answers and what is read
    /// then, and lists the ranges that were changed.
    Change {
        #[command(flatten)]
        disk: Disk,
        #[arg(long)]
        seed: u64,
    },
    /// Takes all queue pairs there are, uses all of them, and asks for one more.
    Queues {
        #[command(flatten)]
        drive: DriveArguments,
    },
    /// Reads one block that the drive cannot read, and those around it.
    ReadError {
        #[command(flatten)]
        disk: Disk,
        #[arg(long)]
        lba: u64,
    },
    /// Formats a namespace.
    Format {
        #[command(flatten)]
        disk: Disk,
        #[arg(long)]
        block_bytes: u32,
    },
    /// Everything `vfio` offers, on each of the drives alone and then on all at once. Needs their first namespaces.
    Exercise {
        #[arg(required = true)]
        addresses: Vec<vfio::Address>,
    },
    /// Has the drive reach for memory that is mapped no longer.
    Stray {
        #[command(flatten)]
        disk: Disk,
    },
    /// Prints what a disk filled under the seed holds.
    Pattern {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        block_bytes: usize,
        #[arg(long)]
        blocks: u64,
    },
    /// Compares what comes on standard input, a whole disk, with what it should hold.
    Compare {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        block_bytes: usize,
        #[arg(long)]
        blocks: u64,
        #[arg(long)]
        except: Vec<Exception>,
    },
}

/// A drive, and how it is opened.
#[derive(clap::Args)]
struct DriveArguments {
    address: vfio::Address,
    /// Ring the doorbell registers even if the controller offers shadow doorbells.
    #[arg(long)]
    no_shadow: bool,
    #[arg(long, default_value_t = Options::default().max_queue_pairs)]
    max_queue_pairs: u16,
}

/// A namespace of a drive.
#[derive(clap::Args)]
struct Disk {
    #[command(flatten)]
    drive: DriveArguments,
    #[arg(long, default_value_t = 1)]
    namespace: u32,
    #[arg(long, value_enum, default_value = "polling")]
    wait: Wait,
}

impl DriveArguments {
    fn open(&self) -> Result<Controller> {
        let device = vfio::Device::open(&self.address)?;
        let options = Options {
            shadow_doorbells: !self.no_shadow,
            max_queue_pairs: self.max_queue_pairs,
            io_timeout: engine::DEADLINE,
            ..Default::default()
        };
        Ok(Controller::open(&device, &options)?)
    }
}

impl Disk {
    /// The controller, the namespace, and a queue pair with an interrupt.
    fn open(&self) -> Result<(Controller, nvme_driver::Namespace, Lane)> {
        let controller = self.drive.open()?;
        let namespace = controller.namespace(self.namespace)?;
        let lane = lane(&controller)?;
        Ok((controller, namespace, lane))
    }
}

fn lane(controller: &Controller) -> Result<Lane> {
    Lane::new(controller.create_queue_pair(QueuePairOptions { entries: Some(128), interrupt: true })?)
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    match run(Arguments::parse().task) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(report)) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("lab-drive: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<Option<Value>> {
    match task {
        Task::Identify { drive } => nvme::identify(&drive),
        Task::Fill { disk, seed } => nvme::fill(&disk, seed),
        Task::Verify { disk, seed, except } => nvme::verify(&disk, seed, &except),
        Task::Change { disk, seed } => change::change(&disk, seed),
        Task::Queues { drive } => nvme::queues(&drive),
        Task::ReadError { disk, lba } => nvme::read_error(&disk, lba),
        Task::Format { disk, block_bytes } => nvme::format(&disk, block_bytes),
        Task::Exercise { addresses } => exercise::exercise(&addresses),
        Task::Stray { disk } => stray::stray(&disk),
        Task::Pattern { seed, block_bytes, blocks } => {
            for_each_piece(block_bytes, blocks, |lba, piece| {
                Layout::new(seed, block_bytes).fill(lba, piece);
                Ok(std::io::stdout().write_all(piece)?)
            })?;
            Ok(None)
        }
        Task::Compare { seed, block_bytes, blocks, except } => {
            let layout = Layout::new(seed, block_bytes).except(&except);
            let mut input = std::io::stdin().lock();
            for_each_piece(block_bytes, blocks, |lba, piece| {
                input.read_exact(piece)?;
                Ok(layout.check(lba, piece)?)
            })?;
            match input.read(&mut [0])? {
                0 => Ok(None),
                _ => Err(format!("the disk is longer than {blocks} blocks").into()),
            }
        }
    }
}

/// Calls `each` with the first block of each piece of a disk, and memory for the piece.
fn for_each_piece(block_bytes: usize, blocks: u64, mut each: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    const BLOCKS: u64 = 512;
    let mut buffer = vec![0; BLOCKS as usize * block_bytes];
    for lba in (0..blocks).step_by(BLOCKS as usize) {
        let count = BLOCKS.min(blocks - lba) as usize;
        each(lba, &mut buffer[..count * block_bytes])?;
    }
    Ok(())
}
