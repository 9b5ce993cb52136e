//! The drive of our target when there is none: an NVMe controller in software, in memory and in a process of its own.
//!
//! Of its own, so that the CPU time it takes is not our target's: a real drive does its work itself. The process is this
//! program again, called with [`DriveOptions`].

use std::path::{Path, PathBuf};

use nvme_sim::{Config, NamespaceConfig, Simulator, replicate};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Error;

/// Bytes per logical block: the smallest, so that every job fits.
const BLOCK_BYTES: u32 = 512;

/// Options of the program when it is the drive.
#[derive(Clone, Debug, clap::Args)]
pub struct DriveOptions {
    /// Be the drive in software, on this socket
    #[arg(long, value_name = "SOCKET", hide = true)]
    pub serve_drive: Option<PathBuf>,
    /// Bytes of a namespace
    #[arg(long, hide = true, default_value_t = 0)]
    pub drive_bytes: u64,
    /// Namespaces
    #[arg(long, hide = true, default_value_t = 1)]
    pub drive_namespaces: u32,
    /// Queue pairs
    #[arg(long, hide = true, default_value_t = 1)]
    pub drive_queues: u16,
}

/// The arguments that make this program serve a drive.
pub fn arguments(socket: &Path, bytes: u64, namespaces: u32, queues: u32) -> Vec<String> {
    vec![
        format!("--serve-drive={}", socket.display()),
        format!("--drive-bytes={bytes}"),
        format!("--drive-namespaces={namespaces}"),
        format!("--drive-queues={queues}"),
    ]
}

/// Serves the drive until SIGTERM.
pub fn serve(socket: &Path, options: &DriveOptions) -> Result<(), Error> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(Error::system("watching for signals"))?;
    let namespace =
        NamespaceConfig { bytes: options.drive_bytes, block_bytes: BLOCK_BYTES, ..NamespaceConfig::default() };
    let config = Config {
        namespaces: replicate(&namespace, options.drive_namespaces),
        max_queue_pairs: options.drive_queues,
        ..Config::default()
    };
    let simulator = Simulator::start(config, socket).map_err(|error| Error::Options(error.to_string()))?;
    signals.forever().next();
    simulator.stop();
    Ok(())
}
