//! Exercises an NVMe drive that is bound to vfio-pci, for the proofs of the lab.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--help") => {
            println!("lab-drive: exercises an NVMe drive that is bound to vfio-pci");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("lab-drive: nothing is asked for: see --help");
            ExitCode::from(2)
        }
    }
}
