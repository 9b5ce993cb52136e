//! Opens a controller, says what it is, and reads a block.
//!
//! ```text
//! cargo run -p nvme-driver --example read_block -- 0000:01:00.0          # a drive bound to vfio-pci
//! cargo run -p nvme-driver --example read_block -- vfio-user:/path.sock  # a software controller
//! ```
//!
//! After the address: the namespace (1) and the block (0).

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use nvme_driver::{Controller, Options};

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match run(std::env::args().skip(1), std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("read_block: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str, of: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("'{text}' is not the number of a {of} ({error}); numbers are decimal"))
}

/// All but the set-up of the log, so that it can be tested.
pub(crate) fn run(mut arguments: impl Iterator<Item = String>, mut out: impl Write) -> Result<(), Box<dyn Error>> {
    let address = arguments.next().ok_or("usage: read_block ADDRESS [NAMESPACE [BLOCK]]")?;
    let id: u32 = number(arguments.next().as_deref().unwrap_or("1"), "namespace")?;
    let block: u64 = number(arguments.next().as_deref().unwrap_or("0"), "block")?;

    let device = vfio::Device::open(&address.parse()?)?;
    let controller = Controller::open(&device, &Options::default())?;
    let identity = controller.identity();
    writeln!(out, "model      {}", identity.model)?;
    writeln!(out, "serial     {}", identity.serial)?;
    writeln!(out, "firmware   {} (NVMe {})", identity.firmware, identity.version)?;
    writeln!(out, "namespaces {:?}", controller.namespaces()?)?;

    let mut disk = controller.blocking(id, Duration::from_secs(10))?;
    let namespace = disk.namespace();
    writeln!(out, "namespace  {id}: {} blocks of {} bytes", namespace.blocks, namespace.block_bytes())?;

    let mut data = vec![0; namespace.block_bytes() as usize];
    disk.read(block, &mut data)?;
    writeln!(out, "block {block}:")?;
    for (line, bytes) in data.chunks(16).enumerate() {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String = bytes.iter().map(|&byte| if byte.is_ascii_graphic() { byte as char } else { '.' }).collect();
        writeln!(out, "{:06x}  {hex} {text}", line * 16)?;
    }
    drop(disk);
    controller.shutdown()?;
    Ok(())
}
