//! The lab: what needs a kernel with VFIO, an IOMMU and NVMe drives, proved in virtual machines that have them.
//!
//! Every proof is a function that takes a kernel; [`on_each_kernel`] makes a test of it for Debian's kernel (VFIO with
//! groups and containers) and one for a kernel with iommufd.

mod errors;
mod nested;
mod nvme;
mod removal;
mod setup;
mod vfio;

use std::time::Duration;

use e2e::{Guest, Kernel, Lab, LabDrive};
use tempfile::TempDir;

/// For what takes a second when nothing is wrong.
const SHORT: Duration = Duration::from_secs(120);
/// For what moves many megabytes through an emulated CPU.
#[allow(dead_code)]
const LONG: Duration = Duration::from_secs(400);

/// Makes tests of functions `fn NAME(kernel: &Kernel)`: `NAME::group_kernel` and `NAME::iommufd_kernel`.
///
/// `tests/run.sh` leaves out the latter where there is no such kernel: no other test may have that name.
macro_rules! on_each_kernel {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[test]
            fn group_kernel() {
                super::$name(&e2e::Kernel::lab_stable().unwrap());
            }

            #[test]
            fn iommufd_kernel() {
                super::$name(&e2e::Kernel::iommufd().unwrap());
            }
        }
    )+ };
}
#[allow(unused_imports)]
pub(crate) use on_each_kernel;

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("lab-").tempdir().unwrap()
}

/// Takes the device at `address` from its driver and gives it to vfio-pci, by hand.
fn bind(guest: &mut Guest, address: &str) {
    let script = r#"set -e
        modprobe -qa vfio-pci vfio_iommu_type1 || [ -d /sys/bus/pci/drivers/vfio-pci ]
        cd /sys/bus/pci/devices/ADDRESS
        [ ! -e driver ] || echo ADDRESS >driver/unbind
        echo vfio-pci >driver_override
        echo ADDRESS >/sys/bus/pci/drivers_probe
        [ "$(basename "$(readlink driver)")" = vfio-pci ]"#;
    guest.run(&script.replace("ADDRESS", address), SHORT).unwrap();
}

/// Gives the device at `address` back to the kernel's own driver.
fn unbind(guest: &mut Guest, address: &str) {
    let script = r#"set -e
        cd /sys/bus/pci/devices/ADDRESS
        echo ADDRESS >driver/unbind
        echo >driver_override
        echo ADDRESS >/sys/bus/pci/drivers_probe
        [ "$(basename "$(readlink driver)")" = nvme ]"#;
    guest.run(&script.replace("ADDRESS", address), SHORT).unwrap();
}

/// The machine itself: what every other proof takes for granted.
fn a_machine_has_drives_an_iommu_and_the_hosts_files(kernel: &Kernel) {
    let folder = folder();
    let lab = Lab::new(kernel)
        .hugepages(8)
        .drive(LabDrive::new("first").size_mib(32).logical_block_size(4096).properties("mdts=5,max_ioqpairs=2"))
        .drive(LabDrive::new("second").namespace(16, 512).namespace(24, 4096))
        .drive(LabDrive::new("third").hotplug());
    let mut guest = lab.boot(folder.path()).unwrap();

    // The drives are where they are said to be, in a group each, and work with the kernel's own driver.
    let script = r#"set -ex
        [ "$(cat /proc/meminfo | awk '/HugePages_Total/ { print $2 }')" = 8 ]
        grep -q hugetlbfs /proc/mounts
        cd /sys/bus/pci/devices
        groups=$(for device in 0000:00:04.0 0000:00:05.0 0000:01:00.0; do
            [ "$(basename "$(readlink $device/driver)")" = nvme ]
            # Kernels differ in whether a port that leads to one drive only is in that drive's group. It uses no memory.
            for member in $device/iommu_group/devices/*; do
                case $(cat $member/class) in 0x0604*) ;; *) basename $member ;; esac
            done | wc -l >&2
            basename "$(readlink $device/iommu_group)"
        done | sort -u | wc -l)
        [ "$groups" = 3 ]
        for device in $PWD/0000:00:04.0 $PWD/0000:00:05.0 $PWD/0000:01:00.0; do
            for _ in $(seq 100); do [ "$(cat $device/nvme/nvme*/state)" = live ] && break; sleep 0.1; done
        done
        # By the number of the namespace: the name says in which order they were found.
        block() { for _ in $(seq 100); do
            for disk in $1/nvme/nvme*/nvme*n*; do [ "$(cat $disk/nsid 2>/dev/null)" != $2 ] || { echo $disk; return; }; done
            sleep 0.1
        done; }
        first=$(block 0000:00:04.0 1) second=$(block 0000:00:05.0 2) third=$(block 0000:01:00.0 1)
        cat $first/{size,queue/logical_block_size} $second/{size,queue/logical_block_size} $third/size
        cat 0000:00:0{4,5}.0/nvme/nvme*/serial 0000:01:00.0/nvme/nvme*/serial
        echo lab >/tmp/text
        dd if=/tmp/text of=/dev/${third##*/} conv=fsync,notrunc status=none"#;
    let output = guest.run(script, SHORT).unwrap();
    let words: Vec<_> = output.lines().filter(|line| !line.starts_with('+')).map(str::trim).collect();
    assert_eq!(
        words,
        ["1", "1", "1", "65536", "4096", "49152", "4096", "131072", "first", "second", "third"],
        "{output}"
    );
    // A drive's contents are in its file.
    assert!(std::fs::read(folder.path().join("third.img")).unwrap().starts_with(b"lab\n"));

    bind(&mut guest, "0000:00:04.0");
    unbind(&mut guest, "0000:00:04.0");

    // A program built here runs inside, under its own path, and what is written there stays there.
    let program = env!("CARGO_BIN_EXE_lab-drive");
    let output = guest.try_run(&format!("{program} --help"), SHORT).unwrap();
    assert_eq!(output.status, 0, "{}", output.text);
    let file = folder.path().join("text");
    std::fs::write(&file, "of the host").unwrap();
    let new = folder.path().join("new");
    let script = format!(
        "set -ex; cd {0}; [ \"$(cat text)\" = 'of the host' ]; echo other >text; echo other >new; rm third.img
        mkdir -p /etc/systemd/system/lab.d; [ \"$(cat text)\" = other ]; [ -e Cargo.toml ] || cd {1}; [ -e Cargo.toml ]",
        folder.path().display(),
        Lab::project().display(),
    );
    guest.run(&script, SHORT).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "of the host");
    assert!(!new.exists() && folder.path().join("third.img").exists());
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(a_machine_has_drives_an_iommu_and_the_hosts_files);
