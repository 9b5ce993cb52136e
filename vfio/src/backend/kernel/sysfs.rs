//! What sysfs and /dev say about a PCI device before it is opened, and what the user has to do if it cannot be.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, PciAddress};

/// Where the kernel shows its devices; other directories in tests.
pub(crate) struct Roots {
    pub sys: PathBuf,
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Roots {
        Roots { sys: "/sys".into(), dev: "/dev".into() }
    }
}

/// How the kernel lets a device be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interfaces {
    /// The device's own character device, where the kernel has iommufd.
    pub cdev: Option<PathBuf>,
    /// The number of the device's IOMMU group, where the kernel has a file for it.
    pub group: Option<u32>,
}

/// A PCI device that is ready to be opened.
#[derive(Debug)]
pub(super) struct PciFunction {
    /// The function's directory in sysfs.
    pub path: PathBuf,
    pub interfaces: Interfaces,
    /// The number of its IOMMU group.
    pub group: u32,
    pub numa_node: Option<u32>,
}

/// Looks a device up, and refuses one that VFIO cannot open, with what to do about it.
pub(super) fn find(roots: &Roots, address: PciAddress) -> Result<PciFunction, Error> {
    let path = roots.sys.join("bus/pci/devices").join(address.to_string());
    let refuse = |reason: String, advice: String| Err(Error::NotUsable { device: address.to_string(), reason, advice });
    if !path.exists() {
        return Err(Error::NoDevice { device: address.to_string() });
    }
    // Before the driver: without an IOMMU, vfio-pci takes no device, and advice to bind it would lead nowhere.
    let Some(group) = link_name(&path.join("iommu_group")).and_then(|name| name.parse::<u32>().ok()) else {
        return refuse(
            "it is behind no IOMMU, so that its DMA cannot be confined".into(),
            "switch the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU) and, on Intel, boot with intel_iommu=on".into(),
        );
    };
    let bind = format!("bind it to vfio-pci: setup/setup.sh bind {address}");
    match link_name(&path.join("driver")) {
        None => return refuse("no driver is bound to it, and vfio-pci has to be".into(), bind),
        // Drivers for VFIO of particular devices are called so as well ("mlx5_vfio_pci").
        Some(driver) if !driver.contains("vfio") => {
            return refuse(
                format!("the kernel's driver '{driver}' has it"),
                format!("if nothing on it is in use, {bind}"),
            );
        }
        Some(_) => {}
    }
    let interfaces = Interfaces {
        cdev: cdev_name(&path)
            .map(|name| roots.dev.join("vfio/devices").join(name))
            .filter(|cdev| cdev.exists() && roots.dev.join("iommu").exists()),
        group: Some(group).filter(|group| {
            roots.dev.join("vfio/vfio").exists() && roots.dev.join("vfio").join(group.to_string()).exists()
        }),
    };
    if interfaces.cdev.is_none() && interfaces.group.is_none() {
        let dev = roots.dev.display();
        if roots.dev.join("vfio").join(format!("noiommu-{group}")).exists() {
            return refuse(
                "vfio has it in no-IOMMU mode, which does not confine its DMA and is not supported".into(),
                "switch the IOMMU on in the firmware and the kernel".into(),
            );
        }
        return refuse(
            format!("there is neither {dev}/vfio/{group} with {dev}/vfio/vfio, nor {dev}/iommu with a file of its own"),
            format!(
                "modprobe vfio-pci vfio_iommu_type1; in a container, pass {dev}/vfio/vfio and {dev}/vfio/{group} in"
            ),
        );
    }
    let numa_node = fs::read_to_string(path.join("numa_node")).ok();
    // The kernel says -1 where it does not know.
    let numa_node = numa_node.and_then(|node| node.trim().parse().ok());
    Ok(PciFunction { path, interfaces, group, numa_node })
}

/// The files by which a device would be opened, without opening any: one way after the other, each with all files that it
/// takes. The error is why the device cannot be opened by anybody.
pub(crate) fn files(roots: &Roots, address: PciAddress) -> Result<Vec<Vec<PathBuf>>, Error> {
    let PciFunction { interfaces, group, .. } = find(roots, address)?;
    let others = unviable(roots, group);
    if !others.is_empty() {
        return Err(Error::NotUsable {
            device: address.to_string(),
            reason: format!("the kernel drives other devices of its IOMMU group {group}: {}", others.join(", ")),
            advice: "bind all devices of the group to vfio-pci, or put the device into a slot of its own".into(),
        });
    }
    let cdev = interfaces.cdev.map(|cdev| vec![cdev, roots.dev.join("iommu")]);
    let group =
        interfaces.group.map(|group| vec![roots.dev.join("vfio").join(group.to_string()), roots.dev.join("vfio/vfio")]);
    Ok(cdev.into_iter().chain(group).collect())
}

/// The devices of an IOMMU group that keep it from being used: those the kernel drives.
pub(super) fn unviable(roots: &Roots, group: u32) -> Vec<String> {
    let devices = roots.sys.join("kernel/iommu_groups").join(group.to_string()).join("devices");
    let mut names: Vec<_> = fs::read_dir(devices)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let driver = link_name(&entry.path().join("driver"))?;
            // These two do no DMA of their own and are allowed in a group.
            let harmless = driver.contains("vfio") || driver == "pcieport" || driver == "pci-stub";
            (!harmless).then(|| format!("{} ({driver})", entry.file_name().to_string_lossy()))
        })
        .collect();
    names.sort();
    names
}

/// "vfio3" for a device with the directory `vfio-dev/vfio3`.
fn cdev_name(device: &Path) -> Option<String> {
    let entry = fs::read_dir(device.join("vfio-dev")).ok()?.flatten().next()?;
    entry.file_name().into_string().ok()
}

/// The last part of what a link leads to: the name of a driver, the number of a group.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const NAME: &str = "0000:01:00.0";

    /// A made-up machine with one device.
    struct Machine {
        _directory: tempfile::TempDir,
        roots: Roots,
        device: PathBuf,
    }

    impl Machine {
        fn new() -> Machine {
            let directory = tempfile::tempdir().unwrap();
            let roots = Roots { sys: directory.path().join("sys"), dev: directory.path().join("dev") };
            let device = roots.sys.join("bus/pci/devices").join(NAME);
            fs::create_dir_all(&device).unwrap();
            fs::create_dir_all(roots.dev.join("vfio/devices")).unwrap();
            Machine { _directory: directory, roots, device }
        }

        fn driver(self, name: &str) -> Machine {
            symlink(format!("../../../../bus/pci/drivers/{name}"), self.device.join("driver")).unwrap();
            self
        }

        fn group(self, number: u32) -> Machine {
            symlink(format!("../../../kernel/iommu_groups/{number}"), self.device.join("iommu_group")).unwrap();
            self
        }

        fn node(self, path: &str) -> Machine {
            fs::write(self.roots.dev.join(path), "").unwrap();
            self
        }

        fn cdev(self, name: &str) -> Machine {
            fs::create_dir_all(self.device.join("vfio-dev").join(name)).unwrap();
            self
        }

        fn find(&self) -> Result<PciFunction, Error> {
            find(&self.roots, NAME.parse().unwrap())
        }

        fn refusal(&self) -> String {
            let error = self.find().unwrap_err();
            assert!(matches!(error, Error::NotUsable { .. }), "{error:?}");
            error.to_string()
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        let machine = Machine::new();
        let error = find(&machine.roots, "0000:02:00.0".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("0000:02:00.0") && error.contains("lspci -D"), "{error}");
    }

    #[test]
    fn a_device_without_driver_or_with_another_one_says_how_to_bind_it() {
        let bind = format!("setup.sh bind {NAME}");
        let error = Machine::new().group(7).refusal();
        assert!(error.contains("no driver") && error.contains(&bind), "{error}");
        let error = Machine::new().group(7).driver("nvme").refusal();
        assert!(
            error.contains("'nvme'") && error.contains("if nothing on it is in use, ") && error.contains(&bind),
            "{error}"
        );
    }

    #[test]
    fn a_device_behind_no_iommu_is_refused() {
        // Whatever drives it: vfio-pci refuses it, so that it stays with its driver, or without any.
        for machine in [Machine::new(), Machine::new().driver("nvme"), Machine::new().driver("vfio-pci")] {
            let error = machine.refusal();
            assert!(error.contains("no IOMMU") && error.contains("intel_iommu=on"), "{error}");
        }
    }

    #[test]
    fn missing_files_in_dev_name_the_modules() {
        let error = Machine::new().driver("vfio-pci").group(7).refusal();
        assert!(error.contains("vfio/7") && error.contains("modprobe vfio-pci vfio_iommu_type1"), "{error}");
        // A group needs the container as well.
        let error = Machine::new().driver("vfio-pci").group(7).node("vfio/7").refusal();
        assert!(error.contains("vfio/vfio"), "{error}");
        let error = Machine::new().driver("vfio-pci").group(7).node("vfio/noiommu-7").refusal();
        assert!(error.contains("no-IOMMU"), "{error}");
    }

    #[test]
    fn the_files_of_both_interfaces_are_told_unless_the_group_is_spoiled() {
        let machine = Machine::new().driver("vfio-pci").group(7).cdev("vfio0");
        let machine = machine.node("iommu").node("vfio/devices/vfio0").node("vfio/vfio").node("vfio/7");
        let dev = |names: [&str; 2]| names.map(|name| machine.roots.dev.join(name)).to_vec();
        let address: PciAddress = NAME.parse().unwrap();
        assert_eq!(
            files(&machine.roots, address).unwrap(),
            [dev(["vfio/devices/vfio0", "iommu"]), dev(["vfio/7", "vfio/vfio"])]
        );
        let other = machine.roots.sys.join("kernel/iommu_groups/7/devices/0000:01:00.1");
        fs::create_dir_all(&other).unwrap();
        symlink("/drivers/nvme", other.join("driver")).unwrap();
        let error = files(&machine.roots, address).unwrap_err().to_string();
        assert!(error.contains("0000:01:00.1 (nvme)"), "{error}");
    }

    #[test]
    fn both_interfaces_are_found() {
        let machine = Machine::new().driver("vfio-pci").group(7).node("vfio/7").node("vfio/vfio");
        assert_eq!(machine.find().unwrap().interfaces, Interfaces { cdev: None, group: Some(7) });
        // The device's own file is of no use without /dev/iommu.
        let machine = machine.cdev("vfio3").node("vfio/devices/vfio3");
        assert_eq!(machine.find().unwrap().interfaces, Interfaces { cdev: None, group: Some(7) });
        let machine = machine.node("iommu");
        let cdev = Some(machine.roots.dev.join("vfio/devices/vfio3"));
        assert_eq!(machine.find().unwrap().interfaces, Interfaces { cdev: cdev.clone(), group: Some(7) });
        fs::remove_file(machine.roots.dev.join("vfio/vfio")).unwrap();
        assert_eq!(machine.find().unwrap().interfaces, Interfaces { cdev, group: None });
    }

    #[test]
    fn the_numa_node_is_read_where_it_is_known() {
        let machine = Machine::new().driver("vfio-pci").group(7).node("vfio/7").node("vfio/vfio");
        assert_eq!(machine.find().unwrap().numa_node, None);
        fs::write(machine.device.join("numa_node"), "-1\n").unwrap();
        assert_eq!(machine.find().unwrap().numa_node, None);
        fs::write(machine.device.join("numa_node"), "1\n").unwrap();
        assert_eq!(machine.find().unwrap().numa_node, Some(1));
    }

    #[test]
    fn the_devices_that_spoil_a_group_are_named() {
        let machine = Machine::new();
        let devices = machine.roots.sys.join("kernel/iommu_groups/7/devices");
        for (name, driver) in [("0000:01:00.0", "vfio-pci"), ("0000:00:01.0", "pcieport"), ("0000:01:00.1", "nvme")] {
            fs::create_dir_all(devices.join(name)).unwrap();
            symlink(format!("../drivers/{driver}"), devices.join(name).join("driver")).unwrap();
        }
        fs::create_dir_all(devices.join("0000:01:00.2")).unwrap();
        assert_eq!(unviable(&machine.roots, 7), ["0000:01:00.1 (nvme)"]);
        assert!(unviable(&machine.roots, 8).is_empty());
    }
}
