//! Opens a device and prints what it offers: `cargo run -p vfio --example inspect -- 0000:01:00.0`

use std::process::ExitCode;

use vfio::{Address, Device, Error};

fn main() -> ExitCode {
    env_logger::init();
    let Some(text) = std::env::args().nth(1) else {
        eprintln!("give a PCI address such as 0000:01:00.0, or vfio-user:/path/to.sock");
        return ExitCode::FAILURE;
    };
    match inspect(&text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn inspect(text: &str) -> Result<(), Error> {
    let device = Device::open(&text.parse::<Address>()?)?;
    println!("{}", device.address());
    let config = device.config_space();
    let (vendor, product) = (config.read_u16(0)?, config.read_u16(2)?);
    println!("  PCI id {vendor:04x}:{product:04x}, class {:06x}", config.read_u32(8)? >> 8);
    println!("  {} MSI-X vectors, NUMA node {:?}", device.interrupt_vectors(), device.numa_node());
    for index in 0..6 {
        let Ok(bar) = device.bar(index) else { continue };
        let mapped = (0..bar.size() / 4).filter(|register| bar.is_mapped(register * 4, 4)).count() * 4;
        println!("  BAR {index}: {:#x} bytes, {mapped:#x} of them mapped", bar.size());
    }
    for range in device.dma().ranges() {
        println!("  DMA addresses {:#x} to {:#x}", range.start, range.last);
    }
    let buffer = device.dma().allocate(4096)?;
    println!("  a buffer at {:#x}", buffer.iova());
    Ok(())
}
