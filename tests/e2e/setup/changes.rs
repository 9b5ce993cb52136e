//! Binding, unbinding, and back.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::kernel::Behaviour;
use crate::machine::{Machine, same};
use crate::{FIRST, SECOND};

fn two_drives() -> Machine {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.drive(SECOND, "nvme1", 8);
    machine
}

#[test]
fn a_drive_is_bound_once_and_given_back_exactly() {
    let machine = two_drives();
    let before = machine.snapshot();
    machine.run("bind 01:00.0").succeeded().says("0000:01:00.0: bound to vfio-pci (before: nvme)");
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("vfio-pci"));
    assert_eq!(machine.driver_of(SECOND).as_deref(), Some("nvme"), "only what is named is touched");
    assert_eq!(machine.read(&format!("sys/bus/pci/devices/{FIRST}/driver_override")), "vfio-pci\n");
    // Twice is harmless.
    let bound = machine.snapshot();
    machine.run("bind 0000:01:00.0").succeeded().says("is bound to vfio-pci already");
    same(&bound, &machine.snapshot());
    machine.run("undo").succeeded().says("0000:01:00.0: given back to nvme");
    same(&before, &machine.snapshot());
    machine.run("undo").succeeded().says("nothing is recorded");
    same(&before, &machine.snapshot());
}

#[test]
fn a_dry_run_changes_nothing_and_tells_what_would_be() {
    let machine = two_drives();
    let before = machine.snapshot();
    let output = machine.run("bind 01:00.0 02:00.0 --dry-run").succeeded();
    for part in ["run modprobe vfio-pci", "write 'vfio-pci' to ", "driver/unbind", "drivers/vfio-pci/bind", SECOND] {
        assert!(output.out.contains(part), "{part}: {output:?}");
    }
    machine.run("bind 01:00.0 --user daemon --dry-run").succeeded().says("give its file");
    machine.run("hugepages 1G --user daemon --dry-run").succeeded().says("would write '512'");
    same(&before, &machine.snapshot());
    machine.run("bind 01:00.0 --user daemon").succeeded();
    let bound = machine.snapshot();
    for command in ["undo", "unbind 01:00.0"] {
        machine.run(&format!("{command} --dry-run")).succeeded().says("would write '' to ");
        same(&bound, &machine.snapshot());
    }
}

#[test]
fn unbind_gives_a_drive_back_and_forgets_it() {
    let machine = two_drives();
    let before = machine.snapshot();
    machine.run("unbind 01:00.0").succeeded().says("is not with vfio-pci but with nvme");
    same(&before, &machine.snapshot());
    // Upper case, and twice the same.
    machine.run("bind 0000:01:00.0 01:00.0").succeeded();
    machine.run("unbind 01:00.0 0000:01:00.0").succeeded().says("given back to nvme");
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("nvme"));
    machine.run("unbind 01:00.0").succeeded().says("is not with vfio-pci");
    // What is left is the module.
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

/// Bound by somebody else: unbind gives it to nvme, and undo gives it back to vfio-pci, unless it is in use by then.
#[test]
fn a_drive_that_others_bound() {
    let machine = two_drives();
    machine.run("bind 01:00.0").succeeded();
    fs::remove_file(machine.path("run/vhost-blk-setup/record")).unwrap();
    let before = machine.snapshot();
    machine.run("unbind 01:00.0").succeeded();
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("nvme"));
    machine.append("proc/swaps", "/dev/nvme0n1  partition\t999\t0\t-2\n");
    let swapping = machine.snapshot();
    machine.run("undo").refused(&["in use by now: nvme0n1 is used as swap"]);
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("nvme"));
    let override_file = "sys/devices/pci0000:00/0000:01:00.0/driver_override".into();
    let mut after = machine.snapshot();
    after.insert(
        override_file,
        swapping["sys/devices/pci0000:00/0000:01:00.0/driver_override".as_ref() as &std::path::Path].clone(),
    );
    same(&swapping, &after);
    machine.write("proc/swaps", "Filename\t\t\tType\t\tSize\tUsed\tPriority\n");
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn a_drive_that_vfio_does_not_take_goes_back() {
    let machine = two_drives();
    let before = machine.snapshot();
    machine.behave(|behaviour| behaviour.refusing.push("vfio-pci"));
    let output = machine.run("bind 01:00.0 --user daemon").refused(&["vfio-pci did not take it", "back with nvme"]);
    assert!(!output.out.contains("daemon"), "{output:?}");
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("nvme"));
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
    // Nor does nvme: it is recorded, and undo says so until it works.
    machine.behave(|behaviour| behaviour.refusing.push("nvme"));
    machine.run("bind 01:00.0").refused(&["could not be given back to nvme", "setup.sh undo"]);
    assert_eq!(machine.driver_of(FIRST), None);
    machine.run("undo").refused(&["nvme did not take it", "still recorded"]);
    machine.behave(|behaviour| behaviour.refusing.clear());
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

/// Mounted between the first look and the last one.
#[test]
fn what_begins_to_be_used_meanwhile_is_left_alone() {
    let machine = two_drives();
    machine.behave(|behaviour| {
        behaviour.meanwhile = Some(|root| {
            let swaps = root.join("proc/swaps");
            fs::write(swaps, "Filename\n/dev/nvme0n1  partition\t999\t0\t-2\n").unwrap();
        });
    });
    // Both files exist before, so that only their text may differ.
    let before = machine.snapshot();
    machine.run("bind 01:00.0").refused(&["in use by now: nvme0n1 is used as swap", "it is back with nvme"]);
    assert_eq!(machine.driver_of(FIRST).as_deref(), Some("nvme"));
    machine.write("proc/swaps", "Filename\t\t\tType\t\tSize\tUsed\tPriority\n");
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

/// Whenever the script dies, undo restores everything, and so does running the command again and then undo.
#[test]
fn a_run_that_is_cut_short_is_taken_back() {
    for dies_at in 1..=6 {
        for again in [false, true] {
            let machine = two_drives();
            let before = machine.snapshot();
            machine.behave(|behaviour| behaviour.dies_at = dies_at);
            assert_eq!(machine.run("bind 01:00.0 02:00.0").status, None, "it was to be killed at write {dies_at}");
            if again {
                machine.run("bind 01:00.0 02:00.0").succeeded();
                assert_eq!(machine.driver_of(FIRST).as_deref(), Some("vfio-pci"));
                assert_eq!(machine.driver_of(SECOND).as_deref(), Some("vfio-pci"));
            }
            machine.run("undo").succeeded();
            same(&before, &machine.snapshot());
        }
    }
    // The way back, cut short: 6 writes were before, each drive takes 3 again.
    for dies_at in 7..=12 {
        let machine = two_drives();
        let before = machine.snapshot();
        machine.behave(|behaviour| behaviour.dies_at = dies_at);
        machine.run("bind 01:00.0 02:00.0").succeeded();
        assert_eq!(machine.run("undo").status, None, "it was to be killed at write {dies_at}");
        machine.run("undo").succeeded();
        same(&before, &machine.snapshot());
    }
}

#[test]
fn a_module_that_others_use_stays() {
    let machine = two_drives();
    machine.run("bind 01:00.0").succeeded();
    machine.link("sys/bus/pci/drivers/vfio-pci/0000:09:00.0", "../../../../devices/x");
    machine.run("undo").succeeded().says("vfio-pci: stays loaded, since it is in use");
    assert!(!machine.commands().contains("modprobe -r -- vfio-pci"), "{}", machine.commands());
    // One that was there before is nobody's business.
    let machine = two_drives();
    machine.write("sys/bus/pci/drivers/vfio-pci/bind", "");
    machine.write("sys/bus/pci/drivers/vfio-pci/unbind", "");
    machine.write("sys/module/vfio_iommu_type1/x", "");
    let before = machine.snapshot();
    machine.run("bind 01:00.0").succeeded();
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
    assert_eq!(machine.commands().matches("modprobe").count(), 0, "{}", machine.commands());
}

#[test]
fn a_drive_that_is_gone_is_no_obstacle() {
    let machine = two_drives();
    machine.run("bind 01:00.0").succeeded();
    fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{FIRST}"))).unwrap();
    machine.run("undo").succeeded().says("is no longer there");
    assert!(!machine.path("run/vhost-blk-setup/record").exists());
}

#[test]
fn what_the_record_does_not_say_is_not_guessed() {
    let machine = two_drives();
    machine.write("run/vhost-blk-setup/record", "nonsense\tx\n");
    machine.run("undo").refused(&["a line that is not understood", "nonsense x"]);
    assert_eq!(machine.read("run/vhost-blk-setup/record"), "nonsense\tx\n");
}

/// Nothing is changed that could not be recorded.
#[test]
fn without_a_record_nothing_is_changed() {
    let machine = two_drives();
    fs::create_dir_all(machine.path("run/vhost-blk-setup/record")).unwrap();
    let before = machine.snapshot();
    machine.run("bind 01:00.0").refused(&["cannot be recorded"]);
    same(&before, &machine.snapshot());
}

fn uid(user: &str) -> u32 {
    let output = std::process::Command::new("id").args(["-u", user]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

#[test]
fn a_user_gets_the_drive() {
    let machine = two_drives();
    let before = machine.snapshot();
    let output = machine.run("bind 01:00.0 --user daemon").succeeded();
    let owner = |path: &str| fs::metadata(machine.path(path)).unwrap().uid();
    assert_eq!(owner("dev/vfio/7"), uid("daemon"));
    let output = output.says("limits.d").says("memory in a login session");
    output.says("vhost-blk.service: will run as daemon");
    let drop_in = machine.read("run/systemd/system/vhost-blk.service.d/50-setup-user.conf");
    assert!(drop_in.contains("\n[Service]\nUser=daemon\nLimitMEMLOCK=infinity\n"), "{drop_in}");
    assert!(machine.commands().contains("systemctl daemon-reload"), "{}", machine.commands());
    let bound = machine.snapshot();
    machine.run("bind 01:00.0 --user daemon").succeeded().says("belongs to daemon already");
    same(&bound, &machine.snapshot());
    // Another user takes it over.
    machine.run("bind 01:00.0 --user nobody").succeeded();
    assert_eq!(owner("dev/vfio/7"), uid("nobody"));
    assert!(machine.read("run/systemd/system/vhost-blk.service.d/50-setup-user.conf").contains("User=nobody"));
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn a_user_gets_the_device_file_and_iommufd() {
    let mut machine = Machine::with(Behaviour { iommufd: true, ..Behaviour::default() });
    machine.drive(FIRST, "nvme0", 7);
    machine.write("dev/iommu", "");
    let before = machine.snapshot();
    machine.run("bind 01:00.0 --user daemon").succeeded();
    let owner = |path: &str| fs::metadata(machine.path(path)).unwrap().uid();
    assert_eq!(
        [owner("dev/vfio/devices/vfio01"), owner("dev/iommu"), owner("dev/vfio/7")],
        [uid("daemon"), uid("daemon"), 0]
    );
    assert!(!machine.commands().contains("vfio_iommu_type1"), "iommufd needs no container");
    // /dev/iommu is for all drives: it is not taken from another user.
    machine.run("bind 01:00.0 --user nobody").refused(&["belongs to daemon already", "chgrp"]);
    assert_eq!(owner("dev/iommu"), uid("daemon"));
    machine.run("undo").succeeded();
    same(&before, &machine.snapshot());
}

#[test]
fn a_user_with_enough_memory_is_told_nothing() {
    let machine = two_drives();
    machine.write("etc/security/limits.d/x.conf", "# memlock\n* hard memlock 64\ndaemon - memlock unlimited\n");
    let output = machine.run("bind 01:00.0 --user daemon").succeeded();
    assert!(!output.err.contains("memlock") && !output.out.contains("login session"), "{output:?}");
    let output = machine.run("bind 01:00.0 --user nobody").succeeded();
    output.says("may lock 64 KiB of memory in a login session by limits.conf");
}
