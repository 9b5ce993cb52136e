//! status and check, for people and as JSON.

use std::fs;

use serde_json::{Value, json};

use crate::machine::{Machine, same};
use crate::{FIRST, SECOND};

fn two_drives() -> Machine {
    let mut machine = Machine::new();
    machine.drive(FIRST, "nvme0", 7);
    machine.drive(SECOND, "nvme1", 8);
    machine.function("0000:00:01.0", "0x060400", Some("pcieport"), 8);
    machine
}

#[test]
fn status_tells_of_every_drive() {
    let machine = two_drives();
    machine.append("proc/swaps", "/dev/nvme1n1  partition\t999\t0\t-2\n");
    let before = machine.snapshot();
    let output =
        machine.run("status").succeeded().says("0000:01:00.0   nvme       7      1     A \"good\" drive \\ one");
    let output = output
        .says("    serial number: S-nvme0\n    disk: nvme0n1 (2 MiB)")
        .says("same IOMMU group: 0000:00:01.0, PCI bridge");
    output.says("not to be bound: nvme1n1 is used as swap").says("hugepages of 2M on node 1: 0, 0 free");
    same(&before, &machine.snapshot());
    machine.run("bind 01:00.0").succeeded();
    machine.process(12, "a \"b\"\\\u{1}\tc", "/dev/vfio/7");
    let output = machine.run("status").succeeded().says("setup.sh undo would take back:");
    output.says("    driver 0000:01:00.0 (before: nvme)").says("open in process 12");

    let json = machine.run("status --json").succeeded().json();
    let drives = json["drives"].as_array().unwrap();
    assert_eq!(drives.len(), 2);
    assert_eq!(drives[0]["address"], FIRST);
    assert_eq!(drives[0]["driver"], "vfio-pci");
    assert_eq!(drives[0]["iommu_group"], 7);
    assert_eq!(drives[0]["open_in"], json!(["12 (a \"b\"\\\u{1}\tc)"]));
    assert_eq!(drives[1]["model"], "A \"good\" drive \\ one");
    assert_eq!(drives[1]["serial"], "S-nvme1");
    assert_eq!(drives[1]["numa_node"], 1);
    assert_eq!(drives[1]["namespaces"], json!(["nvme1n1 (2 MiB)"]));
    assert_eq!(drives[1]["refused"], json!(["nvme1n1 is used as swap (swapoff /dev/nvme1n1)"]));
    assert_eq!(drives[1]["siblings"][0], json!({"address": "0000:00:01.0", "class": "0x060400", "driver": "pcieport"}));
    let pools = json["hugepages"].as_array().unwrap();
    assert_eq!(pools.len(), 4);
    assert_eq!(pools[0], json!({"page_kib": 2048, "node": 0, "total": 0, "free": 0}));
    let record = json["record"].as_array().unwrap();
    assert_eq!(*record.last().unwrap(), format!("driver\t{FIRST}\tnvme\t"));
}

/// Bytes that are no UTF-8 are no reason for JSON that is none.
#[test]
fn names_of_any_bytes_are_valid_json() {
    let machine = two_drives();
    machine.run("bind 01:00.0").succeeded();
    machine.process(12, "", "/dev/vfio/7");
    for (name, shown) in [(&b"\xff\xfe\x80ab"[..], "12 (???ab)"), ("grün".as_bytes(), "12 (grün)")] {
        fs::write(machine.path("proc/12/comm"), name).unwrap();
        assert_eq!(machine.run("status --json").succeeded().json()["drives"][0]["open_in"][0], shown);
    }
}

#[test]
fn nothing_at_all_is_valid_json_too() {
    let machine = Machine::new();
    let json = machine.run("status --json").succeeded().json();
    assert_eq!((&json["drives"], &json["record"]), (&json!([]), &json!([])));
    let json = machine.run("undo --json").succeeded().json();
    assert_eq!(json["steps"][0]["kind"], "unchanged");
    machine.run("status").succeeded().says("no NVMe drive");
}

#[test]
fn steps_are_valid_json() {
    let machine = two_drives();
    let kinds = |json: &Value| -> Vec<String> {
        json["steps"].as_array().unwrap().iter().map(|step| step["kind"].as_str().unwrap().to_owned()).collect()
    };
    let json = machine.run("bind 01:00.0 --json --dry-run").succeeded().json();
    assert_eq!((&json["command"], &json["dry_run"], &json["exit"]), (&json!("bind"), &json!(true), &json!(0)));
    assert!(kinds(&json).iter().all(|kind| kind == "would"), "{json}");
    let json = machine.run("bind 01:00.0 --json").succeeded().json();
    assert_eq!(kinds(&json), ["changed"]);
    let json = machine.run("undo --json").succeeded().json();
    assert_eq!(json["dry_run"], false);
    assert_eq!(kinds(&json), ["changed", "changed", "changed"]);
}

/// The state of a check, by its name.
fn state<'a>(json: &'a Value, name: &str) -> &'a Value {
    let checks = json["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {json}"))
}

#[test]
fn check_says_what_is_missing_and_what_mends_it() {
    let machine = two_drives();
    let before = machine.snapshot();
    let output =
        machine.run("check").refused(&["MISSING  drives: none is bound", "mend it: setup.sh bind 0000:01:00.0"]);
    let output = output.says("ready    IOMMU: on, 2 groups").says("ready    interrupt remapping: on");
    output.says("MISSING  hugepages of node 0: there are none").says("mend it: setup.sh hugepages 1G --node 0");
    same(&before, &machine.snapshot());

    machine.run("bind 01:00.0").succeeded();
    machine.write("dev/vfio/vfio", "");
    for node in [0, 1] {
        machine.run(&format!("hugepages 64M --node {node}")).succeeded();
    }
    let output = machine.run("check").succeeded();
    let output = output.says("ready    drive 0000:01:00.0: bound to vfio-pci, IOMMU group 7");
    let output = output.says("ready    hugepages of node 1: 32 of 2M (32 free), 0 of 1G (0 free)");
    output.says("note     CPUs for 0000:01:00.0: it is on NUMA node 1, with the CPUs 4-7; the workers are not pinned");
    let json = machine.run("check --json").succeeded().json();
    assert_eq!(json["ready"], true);
    assert_eq!(state(&json, "memlock")["state"], "ready");

    // What each of these spoils.
    let missing = |name: &str, mend: &str| {
        let output = machine.run("check --json");
        assert_eq!(output.status, Some(1), "{output:?}");
        let json = output.json();
        let check = state(&json, name);
        assert_eq!((&check["state"], &json["ready"]), (&json!("missing"), &json!(false)), "{json}");
        assert!(check["mend"].as_str().unwrap().contains(mend), "{json}");
    };
    machine.write("etc/vhost-blk.toml", "# cpus = \"9\"\ncpus = \"2-3\"\n");
    missing("CPUs for 0000:01:00.0", "cpus = \"…\" with some of 4-7");
    machine.write("etc/vhost-blk.toml", "cpus = \"2-5\"\n");
    machine.run("check").succeeded().says("workers on 2-5, of which some are on its NUMA node 1 (4-7)");
    machine.write("proc/interrupts", "  24:   5   PCI-MSI  nvme0q0\n");
    missing("interrupt remapping", "intremap=off");
    machine.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    machine.run("check").succeeded().says("note     interrupt remapping: off");
    fs::remove_dir_all(machine.path("sys/module/vfio_iommu_type1")).unwrap();
    machine.write("proc/interrupts", "  24:   5   IR-PCI-MSI  nvme0q0\n");
    missing("vfio_iommu_type1", "modprobe vfio_iommu_type1");
    machine.write("dev/iommu", "");
    machine.run("check").succeeded().says("opened by iommufd");
    machine.function("0000:01:00.1", "0x0c0330", Some("xhci_hcd"), 7);
    missing("drive 0000:01:00.0", "setup.sh unbind 0000:01:00.0");
}

#[test]
fn check_for_a_user() {
    let machine = two_drives();
    machine.write("dev/vfio/vfio", "");
    for words in ["bind 01:00.0", "hugepages 64M --node 0", "hugepages 64M --node 1"] {
        machine.run(words).succeeded();
    }
    machine.run("check").succeeded();
    let output = machine.run("check --user daemon").refused(&["dev/vfio/7 belongs to root, not to daemon"]);
    let output = output.says("mend it: setup.sh bind 0000:01:00.0 --user daemon");
    output.says("mend it: setup.sh hugepages 1G --user daemon").says("MISSING  memlock");
    machine.run("bind 01:00.0 --user daemon").succeeded();
    machine.run("hugepages 64M --user daemon").succeeded();
    machine.run("check --user daemon").succeeded().says("vhost-blk.service may lock all memory, as daemon");
    machine.run("check --user nobody").refused(&["not to nobody"]);
    fs::remove_dir_all(machine.path("run/systemd/system/vhost-blk.service.d")).unwrap();
    machine.run("check --user daemon").refused(&["the default of 8192 KiB", "limits.d"]);
    machine.write("etc/security/limits.conf", "daemon hard memlock unlimited\n");
    machine.run("check --user daemon").succeeded().says("unlimited");
}

#[test]
fn check_without_anything() {
    let machine = Machine::new();
    fs::write(machine.beside("no-vfio"), "").unwrap();
    let output = machine.run("check").refused(&["MISSING  IOMMU: off", "VT-d"]);
    output.says("MISSING  vfio-pci: this kernel has none").says("MISSING  VFIO files").says("MISSING  drives");
}
