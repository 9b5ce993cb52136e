//! What is refused, with which words; nothing may change then.

use std::fs;
use std::process::Command;

use crate::machine::{Machine, same};
use crate::{FIRST, SECOND};

const BIND: &str = "bind 0000:01:00.0";

/// A machine with one drive that `spoil` has made unfit, given the folder of its namespace; binding it is refused with
/// all of `parts`.
#[track_caller]
fn refuses(parts: &[&str], spoil: impl FnOnce(&mut Machine, &str)) {
    let mut machine = Machine::new();
    let disk = machine.drive(FIRST, "nvme0", 7) + "/nvme0n1";
    spoil(&mut machine, &disk);
    machine.is_refused(BIND, parts);
}

#[test]
fn mounted_file_systems() {
    refuses(&["nvme0n1 is mounted on /srv/a\\040b"], |machine, disk| {
        let number = machine.number_of(disk);
        machine.append("proc/self/mountinfo", &format!("30 22 {number} / /srv/a\\040b rw - ext4 /dev/nvme0n1 rw\n"));
    });
    refuses(&["nvme0n1p2 is mounted on / (the root file system"], |machine, disk| {
        machine.partition(disk, 1);
        let part = machine.partition(disk, 2);
        let number = machine.number_of(&part);
        machine.write("proc/self/mountinfo", &format!("22 1 {number} / / rw - ext4 /dev/root rw\n"));
    });
    // In a container's mount namespace only.
    refuses(&["nvme0n1 is mounted on /var/lib/data"], |machine, disk| {
        let number = machine.number_of(disk);
        machine.write("proc/77/mountinfo", &format!("30 22 {number} / /var/lib/data rw - xfs /dev/x rw\n"));
    });
    refuses(&["/a /b /c and 2 more"], |machine, disk| {
        let number = machine.number_of(disk);
        for place in ["/a", "/b", "/c", "/d", "/e"] {
            machine.append("proc/self/mountinfo", &format!("30 22 {number} / {place} rw - xfs /dev/x rw\n"));
        }
    });
    // What cannot be looked at counts as in use.
    refuses(&["nobody knows what is mounted"], |machine, _| machine.write("proc/self/mountinfo", ""));
}

/// With multipath, the disk belongs to the subsystem and has another number than the controller.
#[test]
fn a_mounted_disk_of_several_ways() {
    let mut machine = Machine::new();
    let controller = machine.drive(FIRST, "nvme3", 7);
    fs::remove_dir_all(machine.path(&format!("{controller}/nvme3n1"))).unwrap();
    machine.write(&format!("{controller}/nvme0c3n1/size"), "4096\n");
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
    machine.disk(&format!("{subsystem}/nvme0n1"));
    let number = machine.number_of(&format!("{subsystem}/nvme0n1"));
    machine.link(&format!("{subsystem}/nvme3"), &format!("../../../pci0000:00/{FIRST}/nvme/nvme3"));
    machine.link("sys/class/nvme-subsystem/nvme-subsys0", "../../devices/virtual/nvme-subsystem/nvme-subsys0");
    machine.run(&format!("{BIND} --dry-run")).succeeded();
    machine.append("proc/self/mountinfo", &format!("30 22 {number} / /data rw - ext4 /dev/nvme0n1 rw\n"));
    machine.is_refused(BIND, &["nvme0n1 is mounted on /data"]);
}

#[test]
fn swap() {
    refuses(&["nvme0n1p3 is used as swap", "swapoff /dev/nvme0n1p3"], |machine, disk| {
        machine.partition(disk, 3);
        machine.append("proc/swaps", "/dev/nvme0n1p3                          partition\t999\t0\t-2\n");
    });
    // By another name of the device file.
    refuses(&["nvme0n1 is used as swap"], |machine, _| {
        machine.link("dev/disk/by-label/my swap", "../../nvme0n1");
        machine.link("dev/disk/by-id/x", "../by-label/my swap");
        machine.append("proc/swaps", "/dev/disk/by-id/x  partition\t999\t0\t-2\n");
    });
}

#[test]
fn holders() {
    refuses(&["nvme0n1p1 is part of device mapper dm-0 (vg-root)"], |machine, disk| {
        let part = machine.partition(disk, 1);
        machine.write(&format!("{part}/holders/dm-0/dm/name"), "vg-root\n");
    });
    refuses(&["nvme0n1 is part of RAID md127"], |machine, disk| machine.link(&format!("{disk}/holders/md127"), "../x"));
    refuses(&["nvme0n1 is part of cache bcache0"], |machine, disk| {
        machine.link(&format!("{disk}/holders/bcache0"), "../x");
    });
    refuses(&["nvme0n1 belongs to a mounted btrfs"], |machine, disk| {
        machine.link("sys/fs/btrfs/1b2c/devices/nvme0n1", &format!("../../../../../{disk}"));
    });
    refuses(&["nvme0n1p1 is behind the loop device loop3"], |machine, disk| {
        machine.partition(disk, 1);
        machine.write("sys/block/loop3/loop/backing_file", "/dev/nvme0n1p1\n");
    });
    refuses(&["nvme0n1 is exported by the kernel's NVMe target"], |machine, _| {
        machine.write("sys/kernel/config/nvmet/subsystems/a/namespaces/1/device_path", "/dev/nvme0n1\n");
    });
    refuses(&["nvme0 is exported"], |machine, _| {
        machine.write("sys/kernel/config/nvmet/subsystems/a/passthru/device_path", "/dev/nvme0\n");
    });
}

#[test]
fn open_files() {
    refuses(&["nvme0n1 is open in process 4711 (dd)"], |machine, _| machine.process(4711, "dd", "/dev/nvme0n1"));
    refuses(&["nvme0 is open in process 4711 (fio)"], |machine, _| machine.process(4711, "fio", "/dev/nvme0"));
    refuses(&["ng0n1 is open in process 4711 (fio)"], |machine, disk| {
        machine.write(&disk.replace("nvme0n1", "ng0n1/dev"), "241:0\n");
        machine.process(4711, "fio", "/dev/ng0n1");
    });
    // A device file by another name, as in a container: this one is told by its number. It is the zero device's.
    refuses(&["nvme0 is open in process 4711 (x)"], |machine, disk| {
        machine.write(&disk.replace("nvme0n1", "dev"), "1:5\n");
        machine.process(4711, "x", "/dev/zero");
    });
}

/// What the kernel itself claims, and nothing else shows: the last resort is to claim it oneself.
#[test]
fn what_only_the_kernel_knows() {
    let perl = |machine: &Machine, says: &str| machine.command("perl", &format!("echo '{says}'"));
    refuses(&["nvme0n1 is in use inside the kernel"], |machine, _| {
        perl(machine, "/dev/nvme0n1: Device or resource busy");
    });
    refuses(&["cannot be asked whether it is in use", "No such device"], |machine, _| {
        perl(machine, "/dev/nvme0n1: No such device");
    });
    refuses(&["cannot be asked whether it is in use: no answer"], |machine, _| perl(machine, ""));
    refuses(&["perl is missing", "apt install perl-base"], |machine, _| {
        let names = "bash env readlink find xargs cut sort stat dd timeout tr head od tail grep cat sleep mkdir flock blkid dirname";
        machine.only_commands(&names.split(' ').collect::<Vec<_>>());
    });
    refuses(&["nvme0n1 has no device file"], |machine, _| fs::remove_file(machine.path("dev/nvme0n1")).unwrap());
}

#[test]
fn drives_that_are_not_what_they_seem() {
    refuses(&["it has 4 virtual functions"], |machine, disk| {
        let device = disk.split("/nvme/").next().unwrap();
        machine.write(&format!("{device}/sriov_numvfs"), "4\n");
    });
    refuses(&["controller nvme0 is not ready", "'connecting'"], |machine, disk| {
        machine.write(&disk.replace("nvme0n1", "state"), "connecting\n");
    });
    let machine = Machine::new();
    machine.function(FIRST, "0x010802", Some("other"), 7);
    machine.is_refused(BIND, &["the driver 'other' has it"]);
    machine.is_refused("bind 0000:77:00.0", &["there is no such PCI device", "setup.sh status"]);
    machine.is_refused("unbind 0000:77:00.0", &["there is no such PCI device"]);
    machine.is_refused("unbind 0000:01:00.0", &["the driver 'other' has it"]);
    machine.function(SECOND, "0x020000", Some("e1000e"), 8);
    machine.is_refused("bind 0000:02:00.0", &["no NVMe drive but a network card (class 0x020000)"]);
    machine.is_refused("unbind 0000:02:00.0", &["no NVMe drive but a network card (class 0x020000)"]);
    machine.function("0000:03:00.0", "0x010601", Some("ahci"), 9);
    machine.is_refused("bind 0000:03:00.0", &["no NVMe drive but a storage controller"]);
}

/// Addresses change when cards are moved.
#[test]
fn another_drive_at_the_address() {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.is_refused("bind 0000:01:00.0=S-nvme9", &["its serial number is S-nvme0, and S-nvme9 is wanted"]);
    machine.run("unbind 01:00.0=S-nvme0").says("a serial number is for bind");
    machine.run("bind 01:00.0=").says("a serial number is for bind");
    machine.run("bind 01:00.0=S-nvme0").succeeded();
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("vfio-pci"));
    // There is no file of the kernel's driver now to read it from.
    machine.run("bind 01:00.0=S-nvme9").succeeded().says("its serial number, S-nvme9, was not checked");
    let machine = Machine::new();
    machine.function(FIRST, "0x010802", None, 7);
    machine.is_refused("bind 0000:01:00.0=S-nvme0", &["its serial number cannot be read"]);
}

#[test]
fn without_an_iommu() {
    let spoil = |machine: &mut Machine| {
        machine.drive(FIRST, "nvme0", 7);
        fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{FIRST}/iommu_group"))).unwrap();
    };
    let mut machine = Machine::new();
    spoil(&mut machine);
    machine.is_refused(BIND, &["behind no IOMMU", "on the kernel command line already", "VT-d", "firmware"]);
    machine.write("proc/cmdline", "quiet\n");
    machine.is_refused(BIND, &["add intel_iommu=on to the kernel command line"]);
    machine.write("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    machine.is_refused(BIND, &["AMD-Vi"]);
    refuses(&["no-IOMMU mode"], |machine, _| machine.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n"));
}

#[test]
fn groups_that_could_not_be_used() {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.function("0000:01:00.1", "0x0c0330", Some("xhci_hcd"), 7);
    let parts = ["shares IOMMU group 7 with 0000:01:00.1, a USB controller (class 0x0c0330)", "(xhci_hcd)"];
    machine.is_refused(BIND, &parts);
    // A second drive has to be named too.
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.drive(SECOND, "nvme1", 7);
    machine.is_refused(BIND, &["shares IOMMU group 7 with 0000:02:00.0, a NVMe drive", "name all drives"]);
    machine.run("bind 01:00.0 02:00.0 --dry-run").succeeded();
    // These are no obstacle, and shown.
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.function("0000:00:01.0", "0x060400", Some("pcieport"), 7);
    machine.function("0000:01:00.1", "0x0c0330", None, 7);
    machine.function("0000:01:00.2", "0x0c0330", Some("vfio-pci"), 7);
    let output = machine.run(&format!("{BIND} --dry-run")).succeeded();
    let output = output.says("shares IOMMU group 7 with: 0000:00:01.0 (PCI bridge (class 0x060400), driver pcieport)");
    output.says("0000:01:00.1 (USB controller (class 0x0c0330), driver -)");
}

#[test]
fn a_kernel_without_vfio() {
    refuses(&["this kernel has no vfio-pci"], |machine, _| fs::write(machine.beside("no-vfio"), "").unwrap());
}

/// Runs a command that makes something of the file at its end.
fn make(machine: &Machine, command: &str, name: &str) {
    let mut words = command.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg(machine.path(&format!("dev/{name}")));
    let path = std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin";
    let output = command.env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What is on a drive: refused with these words, and taken with --force.
#[track_caller]
fn needs_force(parts: &[&str], spoil: impl FnOnce(&mut Machine, &str)) {
    let mut machine = Machine::new();
    let disk = machine.drive(FIRST, "nvme0", 7) + "/nvme0n1";
    spoil(&mut machine, &disk);
    let before = machine.snapshot();
    for words in [BIND.to_owned(), format!("{BIND} --dry-run")] {
        machine.run(&words).refused(parts).says("--force");
    }
    same(&before, &machine.snapshot());
    let mut output = machine.run(&format!("{BIND} --force")).succeeded();
    for part in parts {
        output = output.says(part);
    }
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("vfio-pci"));
}

#[test]
fn contents() {
    needs_force(&["nvme0n1 holds: ext4 named 'guest'"], |machine, _| make(machine, "mkfs.ext4 -q -L guest", "nvme0n1"));
    needs_force(&["nvme0n1 holds: swap"], |machine, _| make(machine, "mkswap -q", "nvme0n1"));
    needs_force(&["nvme0n1p1 holds: ext2"], |machine, disk| {
        machine.partition(disk, 1);
        make(machine, "mkfs.ext2 -q", "nvme0n1p1");
    });
    needs_force(&["nvme0n1 has partitions: nvme0n1p1 nvme0n1p2"], |machine, disk| {
        machine.partition(disk, 1);
        machine.partition(disk, 2);
    });
    needs_force(&["nvme0n1 holds: dos partition table"], |machine, _| {
        let mut image = vec![0; 1 << 20];
        image[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        fs::write(machine.path("dev/nvme0n1"), image).unwrap();
    });
    needs_force(&["it shows no namespaces"], |machine, disk| fs::remove_dir_all(machine.path(disk)).unwrap());
}

/// Without blkid, whatever is not zero may be something.
#[test]
fn contents_without_blkid() {
    for place in [0, 5000, (2 << 20) - 1] {
        needs_force(&["nvme0n1 holds data", "blkid"], |machine, _| {
            machine.command("blkid", "exit 127");
            let mut image = vec![0; 2 << 20];
            image[place] = 1;
            fs::write(machine.path("dev/nvme0n1"), image).unwrap();
        });
    }
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.command("blkid", "exit 127");
    machine.run(BIND).succeeded();
}

#[test]
fn a_drive_without_driver_is_taken_by_force_only() {
    let machine = Machine::new();
    machine.function(FIRST, "0x010802", None, 7);
    let before = machine.snapshot();
    machine.run(BIND).refused(&["no driver has it", "setup.sh unbind 0000:01:00.0 gives it to nvme"]);
    same(&before, &machine.snapshot());
    machine.run(&format!("{BIND} --force")).succeeded();
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

/// All drives are looked at before the first one is changed.
#[test]
fn one_refused_drive_keeps_all() {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.drive(SECOND, "nvme1", 8);
    machine.append("proc/swaps", "/dev/nvme1n1  partition\t999\t0\t-2\n");
    machine.is_refused("bind 01:00.0 02:00.0", &["nvme1n1 is used as swap", "no drive was changed"]);
}

#[test]
fn a_drive_in_use_is_not_given_back() {
    for (iommufd, file) in [(false, "/dev/vfio/7"), (true, "/dev/vfio/devices/vfio01")] {
        let mut machine = Machine::new();
        machine.behave(|behaviour| behaviour.iommufd = iommufd);
        machine.drive(FIRST, "nvme0", 7);
        machine.drive(SECOND, "nvme1", 8);
        let before = machine.snapshot();
        machine.run("bind 01:00.0 02:00.0").succeeded();
        machine.process(99, "vhost-blk", file);
        let bound = machine.snapshot();
        let parts = ["open in process 99 (vhost-blk)", "stop that program first"];
        machine.run("unbind 02:00.0 01:00.0").refused(&parts);
        machine.run("unbind 01:00.0 --force").says("--force is for: bind");
        same(&bound, &machine.snapshot());
        // undo takes back what it can, and keeps the rest.
        machine.run("undo").refused(&["0000:01:00.0: failed", "open in process 99 (vhost-blk)"]);
        assert_eq!(machine.driver_of(FIRST).as_deref(), Some("vfio-pci"));
        assert_eq!(machine.driver_of(SECOND).as_deref(), Some("nvme"));
        fs::remove_dir_all(machine.path("proc/99")).unwrap();
        machine.run("undo").succeeded();
        same(&before, &machine.snapshot());
    }
}

#[test]
fn wrong_words() {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    let before = machine.snapshot();
    let wrong = [
        "",
        "bind",
        "unbind",
        "nonsense",
        "bind --user",
        "bind 01:00.0 --nonsense",
        "hugepages",
        "hugepages 1G 2G",
        "bind nvme0",
        "bind /dev/nvme0",
        "bind 01:00.8",
        "bind 01:00.0;",
        "bind *",
        "bind 0000:01:00.0/..",
        "status x",
        "undo 01:00.0",
        "hugepages 12",
        "hugepages 0G",
        "hugepages -1G",
        "hugepages 1G --page 4K",
        "hugepages 1G --page 3M",
        "hugepages 1G --node x",
        "hugepages 010",
        "unbind 01:00.0 --force",
        "bind 01:00.0 --node 0",
        "status --user daemon",
        "hugepages 99999999999999999999G",
    ];
    for words in wrong {
        let output = machine.run(words);
        assert_eq!(output.status, Some(2), "{words:?}: {output:?}");
        assert!(output.err.contains("usage:"), "{words:?}: {output:?}");
        same(&before, &machine.snapshot());
    }
    for user in ["nobody-of-this-name", "root", "0", "1", "-x", "a/b", "$(reboot)"] {
        machine.is_refused(&format!("bind 01:00.0 --user {user}"), &["user"]);
    }
}
