//! The crate `vfio` on a kernel: both ways to a device, memory, interrupts, resets, and the IOMMU's watch over all of it.

use std::fs::File;
use std::path::Path;

use e2e::{Guest, Kernel, Lab, LabDrive};

use crate::nvme::lab_drive;
use crate::{SHORT, bind, folder, on_each_kernel};

const FIRST: &str = "0000:00:04.0";
const SECOND: &str = "0000:00:05.0";
/// Two functions of one device: nothing keeps them from reaching each other, so they are one IOMMU group.
const NEIGHBOURS: [&str; 2] = ["0000:00:06.0", "0000:00:06.1"];

fn lab(kernel: &Kernel, folder: &Path) -> Lab {
    let image = folder.join("neighbour.img");
    File::create(&image).and_then(|file| file.set_len(8 << 20)).unwrap();
    let blockdev = format!("driver=raw,node-name=neighbour,file.driver=file,file.filename={}", image.display());
    Lab::new(kernel)
        .hugepages(16)
        .drive(LabDrive::new("first").size_mib(8))
        .drive(LabDrive::new("second").size_mib(8).logical_block_size(4096))
        .drive(LabDrive::new("third").size_mib(8).properties("multifunction=on"))
        .arguments(&["-blockdev", &blockdev, "-device", "nvme,serial=neighbour,drive=neighbour,addr=06.1"])
}

/// Everything `vfio` offers, on each of two drives alone and on both at once; `way` is how they have to be opened.
fn exercise(guest: &mut Guest, drives: [&str; 2], way: &str) {
    let (report, log) = lab_drive(guest, &format!("exercise {}", drives.join(" ")));
    for address in drives {
        assert!(log.contains(&format!("{address}: opened by {way}")), "{log}");
    }
    // The crate vfio-ioctls grumbles when a group's first device is closed before its last one.
    let grumbles = ["VFIO_GROUP_UNSET_CONTAINER ioctl failed", "Could not unbind VFIO group"];
    let may_grumble = drives == NEIGHBOURS && way == "IOMMU group";
    let is_wrong = |line: &&str| {
        (line.contains("WARN") || line.contains("ERROR"))
            && !(may_grumble && grumbles.iter().any(|text| line.contains(text)))
    };
    assert_eq!(log.lines().find(is_wrong), None, "{log}");
    assert_eq!(report["together"], 2);
    assert_eq!(report["apart"], drives != NEIGHBOURS, "{report}");
    for drive in report["drives"].as_array().unwrap() {
        let busy = drive["busy"].as_str().unwrap();
        assert!(busy.contains("it is open already, by this very program"), "{busy}");
        // As Intel's IOMMU has them: all but the interrupts' addresses.
        assert_eq!(drive["ranges"][0][1], 0xfedf_ffffu64, "{report}");
        assert_eq!(drive["ranges"][1][0], 0xfef0_0000u64, "{report}");
    }
}

/// A drive that reaches for memory which is mapped no longer is stopped by the IOMMU, and the kernel says so.
fn stray(guest: &mut Guest) {
    guest.check_kernel_log().unwrap();
    let (report, _) = lab_drive(guest, &format!("stray {FIRST}"));
    let faults = report["faults"].as_array().unwrap();
    let iova = report["iova"].as_str().unwrap();
    for (fault, direction) in faults.iter().zip(["DMA Write", "DMA Read"]) {
        let fault = fault.as_str().unwrap();
        let expected = ["DMAR:", direction, "[00:04.0]", &format!("fault addr {iova}")];
        assert!(expected.iter().all(|part| fault.contains(part)), "{direction}: {report}");
    }
    assert_eq!(faults.len(), 2);
    // Also where an administrator looks.
    assert!(guest.take_kernel_log().contains("DMAR: [DMA Write"));
}

fn drives_are_reached_by_every_way_the_kernel_has(kernel: &Kernel) {
    let folder = folder();
    let mut guest = lab(kernel, folder.path()).boot(folder.path()).unwrap();
    for address in [FIRST, SECOND].iter().chain(&NEIGHBOURS) {
        bind(&mut guest, address);
    }
    let iommufd = guest.try_run("[ -e /dev/iommu ]", SHORT).unwrap().status == 0;
    if iommufd {
        exercise(&mut guest, [FIRST, SECOND], "iommufd");
        exercise(&mut guest, NEIGHBOURS, "iommufd");
        stray(&mut guest);
        guest.run("rm /dev/iommu", SHORT).unwrap();
    }
    exercise(&mut guest, [FIRST, SECOND], "IOMMU group");
    exercise(&mut guest, NEIGHBOURS, "IOMMU group");
    stray(&mut guest);
    // Without a hugepage left.
    guest.run("echo 0 >/proc/sys/vm/nr_hugepages; grep -q 'HugePages_Total: *0$' /proc/meminfo", SHORT).unwrap();
    let (_, log) = lab_drive(&mut guest, &format!("stray {FIRST}"));
    assert!(log.contains("no hugepages for 2 MiB of DMA memory"), "{log}");
    guest.take_kernel_log();
    guest.power_off(SHORT).unwrap();
    assert_eq!(iommufd, kernel.image == Kernel::iommufd().map(|kernel| kernel.image).unwrap_or_default());
}

on_each_kernel!(drives_are_reached_by_every_way_the_kernel_has);

/// Debian's newer kernel.
#[test]
fn drives_are_reached_on_the_backports_kernel() {
    let folder = folder();
    let mut guest = lab(&Kernel::lab_backports().unwrap(), folder.path()).boot(folder.path()).unwrap();
    bind(&mut guest, FIRST);
    bind(&mut guest, SECOND);
    exercise(&mut guest, [FIRST, SECOND], "IOMMU group");
    stray(&mut guest);
    guest.power_off(SHORT).unwrap();
}
