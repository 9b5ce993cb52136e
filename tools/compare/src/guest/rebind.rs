//! One drive for both sides: `setup/setup.sh` hands it from the kernel to VFIO and back.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Error, Plan, Side};

/// Until the kernel has found the drive again.
const APPEAR_LIMIT: Duration = Duration::from_secs(30);

/// Who has the drive.
#[derive(Debug)]
pub(super) struct Rebind {
    script: PathBuf,
    device: String,
    block_device: PathBuf,
    /// What `--overwrite` allows: a signature on the drive is no reason to refuse.
    force: bool,
    was_bound: bool,
}

impl Rebind {
    /// Prepares; touches nothing yet.
    pub(super) fn new(plan: &Plan) -> Result<Rebind, Error> {
        let script = e2e::workspace().join("setup/setup.sh");
        if !script.is_file() {
            let advice = "hand the drive over by hand, and measure without --rebind";
            return Err(Error::NoProgram { program: script.display().to_string(), advice });
        }
        let (Some(device), Some(block_device)) = (&plan.device, &plan.kernel_device) else {
            return Err(Error::Options("--rebind needs --device and --kernel-device".into()));
        };
        Rebind::with(script, device, block_device, plan.overwrite)
    }

    fn with(script: PathBuf, device: &str, block_device: &Path, force: bool) -> Result<Rebind, Error> {
        let driver = std::fs::read_link(format!("/sys/bus/pci/devices/{device}/driver"));
        let was_bound = driver.is_ok_and(|path| path.ends_with("vfio-pci"));
        Ok(Rebind { script, device: device.to_owned(), block_device: block_device.to_owned(), force, was_bound })
    }

    /// Gives the drive to a side.
    pub(super) fn hand_to(&self, side: Side) -> Result<(), Error> {
        self.hand_over(side == Side::VhostBlk)
    }

    /// Puts things back as they were.
    pub(super) fn give_back(self) -> Result<(), Error> {
        self.hand_over(self.was_bound)
    }

    fn hand_over(&self, to_vfio: bool) -> Result<(), Error> {
        let mut command = Command::new(&self.script);
        command.args([if to_vfio { "bind" } else { "unbind" }, &self.device]);
        if to_vfio && self.force {
            command.arg("--force");
        }
        let what = format!("{} {} {}", self.script.display(), if to_vfio { "bind" } else { "unbind" }, self.device);
        let output = command.output().map_err(Error::system(format!("running {what}")))?;
        if !output.status.success() {
            let text =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
            let reason = text.trim().to_owned();
            return Err(Error::Ended { program: what, status: output.status, reason });
        }
        let deadline = Instant::now() + APPEAR_LIMIT;
        while !to_vfio && !self.block_device.exists() {
            if Instant::now() >= deadline {
                let what = format!("the return of {}", self.block_device.display());
                return Err(Error::Timeout { what, limit: APPEAR_LIMIT, reason: "the kernel has not found it".into() });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("setup.sh");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn each_side_gets_the_drive_and_the_kernel_gets_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let (log, disk) = (folder.path().join("log"), folder.path().join("nvme0n1"));
        // The disk comes back a moment after it was asked for, as with a kernel.
        let text = format!(
            "echo \"$*\" >>{}; [ $1 = bind ] && rm -f {disk}; [ $1 = unbind ] && (sleep 0.1; touch {disk}) >/dev/null 2>&1 & exit 0",
            log.display(),
            disk = disk.display()
        );
        let rebind = Rebind::with(script(folder.path(), &text), "0000:99:00.0", &disk, true).unwrap();
        rebind.hand_to(Side::VhostBlk).unwrap();
        rebind.hand_to(Side::DataPlane).unwrap();
        assert!(disk.exists());
        rebind.give_back().unwrap();
        let expected = "bind 0000:99:00.0 --force\nunbind 0000:99:00.0\nunbind 0000:99:00.0\n";
        assert_eq!(std::fs::read_to_string(log).unwrap(), expected);
    }

    #[test]
    fn a_refusal_is_told_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let script = script(folder.path(), "echo 'it is mounted on /home'; exit 1");
        let rebind = Rebind::with(script, "0000:99:00.0", &folder.path().join("nvme0n1"), false).unwrap();
        let error = rebind.hand_to(Side::VhostBlk).unwrap_err().to_string();
        assert!(error.contains("it is mounted on /home") && error.contains("bind 0000:99:00.0"), "{error}");
    }
}
