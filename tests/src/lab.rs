use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::initramfs::SHARE;
use crate::{Accelerator, Error, Guest, Initramfs, Kernel, Machine, build_dir, workspace};

/// A virtual machine with what this machine may lack: NVMe drives, an IOMMU, and a kernel with VFIO.
///
/// It has the host's files under their own paths, so that programs built here run inside; what it writes stays in its
/// memory. The drives are the kernel's own at first (`/dev/nvme0n1` …); the modules for VFIO are there, not loaded:
/// `modprobe -qa vfio-pci vfio_iommu_type1`. Hugepages are mounted at `/dev/hugepages`.
#[derive(Clone, Debug)]
pub struct Lab {
    machine: Machine,
    iommu: bool,
    drives: Vec<LabDrive>,
}

impl Lab {
    /// A machine with an IOMMU, 1 GiB of memory and two CPUs.
    pub fn new(kernel: &Kernel) -> Lab {
        let initramfs = Initramfs::on_host_files(kernel).module("nvme");
        let machine = Machine::new(kernel, &initramfs).memory_mib(1024).boot_limit(Duration::from_secs(240));
        // The drives are simple ones: by default Linux takes QEMU's for parts of a subsystem with several ways to it.
        let machine = machine.append("intel_iommu=on iommu=pt nvme_core.multipath=0");
        Lab { machine, iommu: true, drives: Vec::new() }
    }

    /// The memory in MiB. What is written to files takes part of it.
    pub fn memory_mib(mut self, mib: u32) -> Lab {
        self.machine = self.machine.memory_mib(mib);
        self
    }

    /// The number of CPUs.
    pub fn cpus(mut self, count: u32) -> Lab {
        self.machine = self.machine.cpus(count);
        self
    }

    /// Reserves so many pages of 2 MiB when the kernel starts.
    pub fn hugepages(self, count: u32) -> Lab {
        self.append(&format!("hugepages={count}"))
    }

    /// Adds to the kernel's command line; of words that contradict each other the last one counts.
    pub fn append(mut self, text: &str) -> Lab {
        self.machine = self.machine.append(text);
        self
    }

    /// Adds arguments for QEMU.
    pub fn arguments(mut self, arguments: &[&str]) -> Lab {
        self.machine = self.machine.arguments(arguments);
        self
    }

    /// Leaves the IOMMU out.
    pub fn without_iommu(mut self) -> Lab {
        self.iommu = false;
        self
    }

    /// Adds a drive. The n-th one (from 0) is at `0000:00:0{4+n}.0` (hexadecimal); those with [`LabDrive::hotplug`] have
    /// their port there, and are themselves at `0000:0{1+m}:00.0`, the m-th one of them.
    pub fn drive(mut self, drive: LabDrive) -> Lab {
        self.drives.push(drive);
        self
    }

    /// Makes the images of the drives in `folder` (those which are there are taken as they are), boots the machine and
    /// waits until it takes scripts. Retries as [`Machine::boot`] does.
    pub fn boot(&self, folder: &Path) -> Result<Guest, Error> {
        let accelerator = accelerator()?;
        let mut machine = self.machine.clone().accelerator(accelerator);
        if accelerator == Accelerator::Kvm {
            // An emulated IOMMU remaps interrupts only where QEMU has the I/O APIC.
            machine = machine.arguments(&["-machine", "kernel-irqchip=split"]);
        }
        if self.iommu {
            // Before the other devices: QEMU's rule for a device that translates for them.
            machine = machine.arguments(&["-device", "intel-iommu,intremap=on,caching-mode=on"]);
        }
        let share = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap";
        let device = format!("virtio-9p-pci,fsdev=root,mount_tag={SHARE},addr=1d");
        machine = machine.arguments(&["-fsdev", share, "-device", &device]);
        for (number, drive) in self.drives.iter().enumerate() {
            let arguments = drive.arguments(folder, number)?;
            machine = machine.arguments(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        }
        machine.boot(folder)
    }

    /// The top of the repository, in the machine as outside.
    pub fn project() -> PathBuf {
        workspace()
    }

    /// Cargo's build folder, in the machine as outside.
    pub fn build() -> PathBuf {
        build_dir()
    }
}

/// What runs the machines' CPUs: emulation, or with `LAB_ACCEL=kvm` KVM if a kernel boots with it here.
fn accelerator() -> Result<Accelerator, Error> {
    static KVM_WORKS: OnceLock<bool> = OnceLock::new();
    match std::env::var("LAB_ACCEL").as_deref() {
        Err(_) | Ok("" | "tcg") => Ok(Accelerator::Emulation),
        Ok("kvm") if *KVM_WORKS.get_or_init(kvm_boots_a_kernel) => Ok(Accelerator::Kvm),
        Ok("kvm") => Ok(Accelerator::Emulation),
        Ok(other) => Err(Error::Setting(format!("LAB_ACCEL={other}: neither tcg nor kvm"))),
    }
}

/// Whether a Debian kernel comes up with KVM within seconds: that `/dev/kvm` is there proves nothing.
fn kvm_boots_a_kernel() -> bool {
    let folder = build_dir().join("guest").join(format!("kvm-{}", std::process::id()));
    let attempt = || {
        std::fs::create_dir_all(&folder).map_err(Error::doing(format!("making {}", folder.display())))?;
        let kernel = Kernel::lab_stable()?;
        let machine = Machine::new(&kernel, &Initramfs::small(&kernel));
        let guest = machine.accelerator(Accelerator::Kvm).boot_limit(Duration::from_secs(20)).boot(&folder)?;
        guest.power_off(Duration::from_secs(20))
    };
    let result = attempt();
    // Nothing of it is of use afterwards; what is left lies in cargo's own folder.
    let _ = std::fs::remove_dir_all(&folder);
    result
        .inspect_err(|error| eprintln!("LAB_ACCEL=kvm, but no kernel boots with KVM here ({error}): emulating"))
        .is_ok()
}

/// An emulated NVMe drive of a [`Lab`], kept in files of the folder in which the machine is booted.
#[derive(Clone, Debug)]
pub struct LabDrive {
    name: String,
    size_mib: u64,
    block_size: u32,
    namespaces: Vec<(u64, u32)>,
    properties: String,
    unreadable: Option<u64>,
    hotplug: bool,
}

impl LabDrive {
    /// A drive with one namespace of 64 MiB, in blocks of 512 bytes, in the file `NAME.img`. Its serial number and its
    /// name for QEMU are `name`, which must not be a property of QEMU's devices such as `drive`; its port's is `port-NAME`, its image's `image-NAME`.
    pub fn new(name: &str) -> LabDrive {
        LabDrive {
            name: name.to_owned(),
            size_mib: 64,
            block_size: 512,
            namespaces: Vec::new(),
            properties: String::new(),
            unreadable: None,
            hotplug: false,
        }
    }

    /// The size of the only namespace.
    pub fn size_mib(mut self, mib: u64) -> LabDrive {
        self.size_mib = mib;
        self
    }

    /// The bytes per block of the only namespace.
    pub fn logical_block_size(mut self, bytes: u32) -> LabDrive {
        self.block_size = bytes;
        self
    }

    /// Adds a namespace, of this size and these bytes per block, instead of the only one: they are numbered from 1, and
    /// the n-th one is kept in `NAME-n.img`; QEMU's monitor knows it as `namespace-NAME-n`. Not for a drive that is to be put back after its removal: QEMU cannot
    /// add namespaces to a machine that runs.
    pub fn namespace(mut self, mib: u64, block_size: u32) -> LabDrive {
        self.namespaces.push((mib, block_size));
        self
    }

    /// QEMU's properties of the device `nvme`, such as `mdts=5,max_ioqpairs=2`.
    pub fn properties(mut self, properties: &str) -> LabDrive {
        if !self.properties.is_empty() {
            self.properties.push(',');
        }
        self.properties.push_str(properties);
        self
    }

    /// The only namespace cannot be read at this sector (of 512 bytes), ever.
    pub fn unreadable(mut self, sector: u64) -> LabDrive {
        self.unreadable = Some(sector);
        self
    }

    /// Behind a port of its own, from which it can be taken away: `device_del` with its name, by QEMU's monitor. To put
    /// it back, `device_add` what [`LabDrive::device`] returns.
    pub fn hotplug(mut self) -> LabDrive {
        self.hotplug = true;
        self
    }

    /// The device (of a drive with [`LabDrive::hotplug`]) for `device_add`.
    pub fn device(&self) -> serde_json::Value {
        let mut device = serde_json::json!({
            "driver": "nvme",
            "id": self.name,
            "serial": self.name,
            "bus": format!("port-{}", self.name),
            "drive": format!("image-{}", self.name),
            "logical_block_size": self.block_size,
            "physical_block_size": self.block_size,
        });
        for (key, value) in self.properties.split(',').filter_map(|property| property.split_once('=')) {
            // The monitor wants numbers and truth values as such.
            device[key] = match value {
                "on" | "off" => (value == "on").into(),
                _ => value.parse::<u64>().map_or_else(|_| value.into(), serde_json::Value::from),
            };
        }
        device
    }

    fn arguments(&self, folder: &Path, number: usize) -> Result<Vec<String>, Error> {
        let name = &self.name;
        let place = format!("addr={:x}", 4 + number);
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        let comma = if self.properties.is_empty() { "" } else { "," };
        let mut device = format!("nvme,id={name},serial={name}{comma}{}", self.properties);
        if self.hotplug {
            add("-device", format!("pcie-root-port,id=port-{name},chassis={number},slot={number},{place}"));
            device += &format!(",bus=port-{name}");
        } else {
            device += &format!(",bus=pcie.0,{place}");
        }
        if self.namespaces.is_empty() {
            add("-blockdev", image(folder, name, self.size_mib, self.unreadable)?);
            let size = self.block_size;
            device += &format!(",drive=image-{name},logical_block_size={size},physical_block_size={size}");
        }
        add("-device", device);
        for (number, &(mib, size)) in (1..).zip(&self.namespaces) {
            let image_name = format!("{name}-{number}");
            add("-blockdev", image(folder, &image_name, mib, None)?);
            let sizes = format!("logical_block_size={size},physical_block_size={size}");
            let device = format!("nvme-ns,id=namespace-{image_name},bus={name},nsid={number}");
            add("-device", format!("{device},drive=image-{image_name},{sizes}"));
        }
        Ok(arguments)
    }
}

/// Makes an empty image, unless it is there, and returns QEMU's description of it.
fn image(folder: &Path, name: &str, mib: u64, unreadable: Option<u64>) -> Result<String, Error> {
    let path = folder.join(format!("{name}.img"));
    if !path.exists() {
        let sized = File::create(&path).and_then(|file| file.set_len(mib << 20));
        sized.map_err(Error::doing(format!("making {}", path.display())))?;
    }
    let path = path.display();
    let file = match unreadable {
        None => format!("file.driver=file,file.filename={path}"),
        Some(sector) => format!(
            "file.driver=blkdebug,file.image.driver=file,file.image.filename={path},\
             file.inject-error.0.event=read_aio,file.inject-error.0.sector={sector}"
        ),
    };
    Ok(format!("driver=raw,node-name=image-{name},discard=unmap,{file}"))
}
