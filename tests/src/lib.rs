//! The harness of the end-to-end tests: it runs the program `vhost-blk` and boots virtual machines
//! against the sockets that it serves.
//!
//! - [`Target`] is a running `vhost-blk` (or another vhost-user-blk program): started, awaited, stopped, its log kept.
//! - [`Guest`] is a virtual machine: QEMU with an emulated CPU, a Debian kernel and an initramfs made on the spot.
//!   Shell scripts are run inside through [`Guest::run`], which returns their output and their own exit status.
//! - [`Lab`] is a virtual machine with NVMe drives and an IOMMU, on the files of the host: what runs here runs there.
//! - [`Kernel`] and [`Initramfs`] say what the machine boots; [`Qmp`] talks to QEMU itself.
//!
//! Every wait has a deadline. What was started is killed when its value is dropped; when the test is panicking the
//! whole console and the whole log are printed then. `tests/run.sh` provides what this needs of the machine.

mod blocks;
mod error;
mod guest;
mod initramfs;
mod lab;
mod layout;
mod process;
mod qmp;
mod target;
mod transcript;

pub use blocks::{Blocks, Change, Promise};
pub use error::Error;
pub use guest::{Accelerator, Guest, Machine, Output};
pub use initramfs::{Initramfs, Kernel};
pub use lab::{Lab, LabDrive};
pub use layout::{Content, Exception, Layout};
pub use process::Process;
pub use qmp::Qmp;
pub use target::{Peer, Target, are_listening, vhost_blk_program};

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The top of the repository.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in a folder of the workspace").to_path_buf()
}

/// Cargo's build folder: `CARGO_TARGET_DIR`, or `target` at the top of the repository.
pub fn build_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// What a test draws from: the environment's `E2E_SEED`, or a new seed; printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let chosen = std::env::var("E2E_SEED").ok().map(|text| text.parse().expect("E2E_SEED is a number"));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64 & 0xffff_ffff);
    let seed = chosen.unwrap_or_else(now);
    println!("E2E_SEED={seed}");
    seed
}

/// Asks `probe` every few milliseconds until it has an answer, at most for `limit`.
pub fn poll<T>(
    limit: Duration,
    waiting_for: &str,
    mut probe: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { waiting_for: waiting_for.to_owned(), limit });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
