//! From what `vfio-ioctls` reports to what a user can do about it.

use std::io;

use iommufd_ioctls::IommufdError;
use vfio_ioctls::VfioError;

use crate::dma::{RAISE_MEMLOCK, memlock_limit};
use crate::{Error, PciAddress};

/// The device an error is about.
pub(super) struct Subject {
    pub address: PciAddress,
    /// Its IOMMU group, if it is opened that way.
    pub group: Option<u32>,
    /// The file in /dev by which it is opened.
    pub file: String,
    /// What else of the group the kernel drives.
    pub unviable: Vec<String>,
}

const ON_MODULES: &str = "load the modules: modprobe vfio-pci vfio_iommu_type1; in a container, pass /dev/vfio in";
const ON_INTERRUPTS: &str =
    "if the kernel log speaks of interrupt remapping, switch that on in the firmware; see dmesg otherwise";

/// What to do when a device, or its group, is open in another program; `path` is the file that is.
fn on_busy(path: &str) -> String {
    format!(
        "it is open already, or another device of its IOMMU group is, by another program (fuser -v {path} shows which): \
         stop that program; the devices of one group can only be used by one"
    )
}

/// What to do when no more memory may be locked.
fn on_memlock() -> String {
    format!(
        "the memory that may be locked (RLIMIT_MEMLOCK, now {}) is used up: {RAISE_MEMLOCK}, or give less memory to the device",
        memlock_limit()
    )
}

/// The error for `attempt`, with the kernel's own reason where `vfio-ioctls` has kept it.
pub(super) fn explain(subject: &Subject, attempt: &'static str, error: VfioError) -> Error {
    let kernel =
        |source, advice: String| Error::Kernel { attempt, device: subject.address.to_string(), source, advice };
    let group = subject.group.map_or_else(String::new, |group| group.to_string());
    let busy = || on_busy(&subject.file);
    match error {
        VfioError::OpenContainer(source) => {
            let advice = on_open(subject.address, &source, "/dev/vfio/vfio");
            kernel(source, advice)
        }
        VfioError::OpenGroup(source, group) => {
            let advice = on_open(subject.address, &source, &format!("/dev/vfio/{group}"));
            kernel(source, advice)
        }
        VfioError::GroupViable => Error::NotUsable {
            device: subject.address.to_string(),
            reason: match subject.unviable.as_slice() {
                [] => format!("its IOMMU group {group} is in use, or other devices of it are"),
                devices => {
                    format!("the kernel drives other devices of its IOMMU group {group}: {}", devices.join(", "))
                }
            },
            advice: "bind all devices of the group to vfio-pci, or put the device into a slot of its own".into(),
        },
        VfioError::VfioApiVersion | VfioError::VfioExtension | VfioError::VfioType1V2 => Error::NotUsable {
            device: subject.address.to_string(),
            reason: format!("the kernel's VFIO does not offer type 1 version 2 ({error})"),
            advice: ON_MODULES.into(),
        },
        VfioError::GroupSetContainer => Error::NotUsable {
            device: subject.address.to_string(),
            reason: format!("its IOMMU group {group} cannot be put into a container"),
            advice: busy(),
        },
        VfioError::ContainerSetIOMMU(source) | VfioError::VfioDeviceAttachIommufdPt(source) => {
            kernel(source.into(), ON_INTERRUPTS.into())
        }
        VfioError::GroupGetDeviceFD(source) | VfioError::VfioDeviceBindIommufd(source) => {
            let source = io::Error::from(source);
            let advice = match source.raw_os_error() {
                // A device's own file answers so (vfio_df_open) where a group is busy.
                Some(libc::EBUSY | libc::EINVAL) => busy(),
                Some(libc::ENODEV) => "the device has gone, or was taken from vfio-pci: bind it again".into(),
                _ => "dmesg may say why".into(),
            };
            kernel(source, advice)
        }
        VfioError::IommuDmaMap(source) | VfioError::IommufdIoctlError(IommufdError::IommuIoasMap(source)) => {
            let source = io::Error::from(source);
            let advice = match source.raw_os_error() {
                Some(libc::ENOMEM) => on_memlock(),
                Some(libc::ENOSPC) => {
                    "there are too many mappings: raise /sys/module/vfio_iommu_type1/parameters/dma_entry_limit".into()
                }
                Some(libc::EFAULT) => "the memory cannot be locked: it has to be readable and writable".into(),
                _ => String::new(),
            };
            kernel(source, advice)
        }
        VfioError::VfioDeviceGetInfo(source)
        | VfioError::VfioDeviceGetRegionInfo(source)
        | VfioError::IommuDmaUnmap(source)
        | VfioError::IommufdIoctlError(IommufdError::IommuIoasUnmap(source)) => kernel(source.into(), String::new()),
        VfioError::NewVfioIommufd(error) => kernel(io::Error::other(error), on_iommufd()),
        // These carry no reason of the kernel's.
        other => kernel(io::Error::other(other), "dmesg may say why".into()),
    }
}

/// What to do when a file of VFIO's cannot be opened.
pub(super) fn on_open(address: PciAddress, error: &io::Error, path: &str) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => ON_MODULES.into(),
        io::ErrorKind::PermissionDenied => {
            format!(
                "your user may not open {path}: give the device to the user (setup/setup.sh bind {address} --user NAME), \
                 or run as root"
            )
        }
        io::ErrorKind::ResourceBusy => on_busy(path),
        _ => match error.raw_os_error() {
            Some(libc::ENODEV) => format!("nothing is behind {path}: {ON_MODULES}"),
            _ => String::new(),
        },
    }
}

fn on_iommufd() -> String {
    "the kernel needs iommufd (CONFIG_IOMMUFD): modprobe iommufd".into()
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::errno;

    use super::*;

    fn text(error: VfioError) -> String {
        let subject = Subject {
            address: "0000:01:00.0".parse().unwrap(),
            group: Some(7),
            file: "/dev/vfio/7".into(),
            unviable: vec!["0000:01:00.1 (nvme)".into()],
        };
        explain(&subject, "opening the device", error).to_string()
    }

    #[track_caller]
    fn says(error: VfioError, parts: &[&str]) {
        let text = text(error);
        for part in parts.iter().chain(&["0000:01:00.0"]) {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }

    #[test]
    fn each_error_says_what_to_do() {
        let os = io::Error::from_raw_os_error;
        let errno = errno::Error::new;
        says(VfioError::OpenContainer(os(libc::ENOENT)), &["modprobe vfio-pci"]);
        says(VfioError::OpenGroup(os(libc::EACCES), "7".into()), &["/dev/vfio/7", "setup.sh bind 0000:01:00.0 --user"]);
        says(VfioError::OpenGroup(os(libc::EBUSY), "7".into()), &["fuser -v /dev/vfio/7"]);
        says(VfioError::GroupViable, &["0000:01:00.1 (nvme)", "group 7", "vfio-pci"]);
        says(VfioError::GroupSetContainer, &["group 7", "open already", "another program"]);
        says(VfioError::ContainerSetIOMMU(errno(libc::EPERM)), &["interrupt remapping"]);
        says(VfioError::GroupGetDeviceFD(errno(libc::ENODEV)), &["bind it again"]);
        says(VfioError::VfioDeviceBindIommufd(errno(libc::EBUSY)), &["open already"]);
        says(VfioError::VfioDeviceBindIommufd(errno(libc::EINVAL)), &["open already"]);
        says(
            VfioError::IommuDmaMap(errno(libc::ENOMEM)),
            &["RLIMIT_MEMLOCK", "ulimit -l", "LimitMEMLOCK", "memlock=-1"],
        );
        says(VfioError::IommuDmaMap(errno(libc::ENOSPC)), &["dma_entry_limit"]);
        let map = |number| VfioError::IommufdIoctlError(IommufdError::IommuIoasMap(errno(number)));
        says(map(libc::ENOMEM), &["ulimit -l"]);
        says(VfioError::NewVfioIommufd(IommufdError::IommuIoasAlloc(errno(libc::ENOTTY))), &["iommufd"]);
        says(VfioError::VfioDeviceEnableIrq, &["opening the device", "dmesg"]);
    }
}
