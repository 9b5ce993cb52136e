//! What runs the guests' CPUs: the processor's virtualisation only where it is proved to work.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use e2e::{Initramfs, Kernel, Machine};

use crate::{Accelerator, Error};

/// For the short boot that shows whether KVM works: it takes a second or two where it does.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wanted {
    /// KVM if it works, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Emulation,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// The accelerator that was chosen.
    pub accelerator: Accelerator,
    /// Why, as a sentence for the report.
    pub note: String,
}

impl Choice {
    /// For the harness.
    pub(super) fn for_machine(&self) -> e2e::Accelerator {
        match self.accelerator {
            Accelerator::Kvm => e2e::Accelerator::Kvm,
            _ => e2e::Accelerator::Emulation,
        }
    }
}

/// Chooses, by a short boot of `kernel` with its files in `folder`.
///
/// # Errors
/// If KVM is wanted and does not work.
pub(super) fn choose(wanted: Wanted, kernel: &Kernel, folder: &Path) -> Result<Choice, Error> {
    if wanted == Wanted::Emulation {
        return Ok(emulation("as asked for"));
    }
    match (probe(kernel, Path::new("/dev/kvm"), folder), wanted) {
        (Ok(()), _) => Ok(Choice { accelerator: Accelerator::Kvm, note: "Accelerator: KVM.".into() }),
        (Err(why), Wanted::Kvm) => Err(Error::Options(format!("KVM does not work here: {why}"))),
        (Err(why), _) => Ok(emulation(&format!("KVM does not work here: {why}"))),
    }
}

fn emulation(why: &str) -> Choice {
    let note = format!(
        "Accelerator: emulation ({why}). The guest's emulated CPU is the limit on both sides, not the storage below it: the figures \
         show that everything works, they are not performance and cannot rank the sides."
    );
    Choice { accelerator: Accelerator::Emulation, note }
}

/// Boots a small guest and lets it run one program. The device file alone says nothing: it may be there and yet be unable to
/// run a kernel.
fn probe(kernel: &Kernel, device: &Path, folder: &Path) -> Result<(), String> {
    let opened = File::options().read(true).write(true).open(device);
    opened.map_err(|error| format!("{}: {error}", device.display()))?;
    let machine = Machine::new(kernel, &Initramfs::small(kernel)).memory_mib(256).boot_limit(PROBE_LIMIT);
    let machine = machine.accelerator(e2e::Accelerator::Kvm);
    let run = || {
        let mut guest = machine.boot_once(folder)?;
        guest.run("true", PROBE_LIMIT)?;
        guest.power_off(PROBE_LIMIT)
    };
    run().map_err(|error| format!("a short boot failed: {error}{}", super::last_line(&folder.join("qemu.log"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn no_kernel() -> Kernel {
        Kernel { image: "/no/kernel".into(), modules: None }
    }

    #[test]
    fn without_the_device_it_is_emulation_with_the_note() {
        let folder = tempfile::tempdir().unwrap();
        let error = probe(&no_kernel(), Path::new("/no/such/kvm"), folder.path()).unwrap_err();
        assert_eq!(error, "/no/such/kvm: No such file or directory (os error 2)");
        let choice = emulation(&error);
        assert_eq!(choice.accelerator, Accelerator::Emulation);
        assert!(choice.note.contains("not performance") && choice.note.contains("/no/such/kvm"), "{}", choice.note);
    }

    #[test]
    fn a_kernel_that_does_not_boot_is_emulation_or_an_error_within_seconds() {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let choice = choose(Wanted::Auto, &no_kernel(), folder.path()).unwrap();
        assert_eq!(choice.accelerator, Accelerator::Emulation);
        assert!(choice.note.contains("KVM does not work here"), "{}", choice.note);
        let error = choose(Wanted::Kvm, &no_kernel(), folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("KVM does not work here"), "{error}");
        assert!(start.elapsed() < 3 * PROBE_LIMIT);
        let choice = choose(Wanted::Emulation, &no_kernel(), folder.path()).unwrap();
        assert!(choice.note.starts_with("Accelerator: emulation (as asked for)."), "{}", choice.note);
    }
}
