//! The setup script on a real kernel.

use e2e::{Guest, Kernel, Lab, LabDrive, Output, build_dir, vhost_blk_program};
use serde_json::Value;

use super::{SHORT, folder, on_each_kernel};

const PLAIN: &str = "0000:00:04.0";
const MOUNTED: &str = "0000:00:05.0";
const SWAPPING: &str = "0000:00:06.0";
const HIDDEN: &str = "0000:00:07.0";
const MEMBER: &str = "0000:00:08.0";

/// Without any privilege.
const AS_NOBODY: &str = "setpriv --reuid nobody --regid nogroup --clear-groups";

/// Runs the script, which has to end with this status.
#[track_caller]
fn setup(guest: &mut Guest, words: &str, status: i32) -> String {
    setup_as(guest, "", words, status)
}

#[track_caller]
fn setup_as(guest: &mut Guest, before: &str, words: &str, status: i32) -> String {
    let script = format!("{before} {}/setup/setup.sh {words} 2>&1", Lab::project().display());
    let Output { status: found, text } = guest.try_run(&script, SHORT).unwrap();
    assert_eq!(found, status, "setup.sh {words}:\n{text}");
    // Bash says so when a script of its own goes wrong.
    assert!(!text.contains(": line "), "setup.sh {words}:\n{text}");
    text
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// Everything that the script may change.
fn state(guest: &mut Guest) -> String {
    let script = r#"cd /sys/bus/pci/devices
        for device in *; do
            [ "$(cat $device/class)" = 0x010802 ] || continue
            echo "$device $(readlink $device/driver) $(cat $device/driver_override)"
        done
        cut -d' ' -f1 /proc/modules | sort
        cat /sys/kernel/mm/hugepages/*/nr_hugepages
        find /dev/vfio /dev/iommu /run/hugepages /dev/hugepages* -maxdepth 1 -exec stat -c '%n %u %a' {} + 2>/dev/null | sort
        cut -d' ' -f3- /proc/self/mountinfo | grep -v ' /run/place '"#;
    guest.run(script, SHORT).unwrap()
}

/// Shell functions that find the disk of a drive once it is there: disk ADDRESS.
const DISK: &str = r#"set -e
    disk() {
        local found
        for _ in $(seq 100); do
            found=$(ls -d /sys/bus/pci/devices/$1/nvme/nvme*/nvme*n1 2>/dev/null | sed 's|.*/||; s|c[0-9]*n|n|') || :
            [ -z "$found" ] || [ ! -b /dev/$found ] || { echo /dev/$found; return; }
            sleep 0.1
        done
        return 1
    }
"#;

/// Puts the drives to use, each in another way. Returns whether the kernel has RAID arrays.
fn put_to_use(guest: &mut Guest) -> bool {
    let script = format!(
        r#"{DISK}
        disk {PLAIN} >/dev/null
        # In a mount namespace that no process is in; it has a copy of all mounts, so it comes first.
        mkdir -p /run/place /run/spaces
        mkfs.ext4 -q $(disk {HIDDEN})
        mount -t tmpfs none /run/spaces
        mount --make-private /run/spaces
        touch /run/spaces/one
        unshare --mount=/run/spaces/one mount $(disk {HIDDEN}) /mnt
        mkfs.ext4 -q -L guest $(disk {MOUNTED})
        mount $(disk {MOUNTED}) /run/place
        mkswap -q $(disk {SWAPPING})
        swapon $(disk {SWAPPING})
        # An array of one, without metadata, by hand.
        member=$(disk {MEMBER})
        modprobe -q md_mod || :
        if (echo md127 >/sys/module/md_mod/parameters/new_array) 2>/dev/null; then
            cd /sys/block/md127/md
            echo external:none >metadata_version
            echo linear >level
            cat /sys/class/block/${{member#/dev/}}/dev >new_dev
            echo array
        fi"#
    );
    guest.run(&script, SHORT).unwrap().lines().any(|line| line == "array")
}

fn the_script_refuses_what_is_in_use(guest: &mut Guest) {
    // Without this link, which is udev's to make, bash would see empty lists.
    guest.run("rm /dev/fd", SHORT).unwrap();
    let text = setup_as(guest, "", &format!("bind {PLAIN}"), 1);
    says(&text, &["refused", "ln -s /proc/self/fd /dev/fd"]);
    guest.run("ln -s /proc/self/fd /dev/fd", SHORT).unwrap();
    let array = put_to_use(guest);
    let before = state(guest);
    // Which drive has which name depends on which one answered first.
    let member = if array { MEMBER } else { "" };
    let text = setup(guest, &format!("bind 0000:00:00.0 {PLAIN} {MOUNTED} {SWAPPING} {HIDDEN} {member} --force"), 1);
    says(&text, &["0000:00:00.0: refused: it is no NVMe drive but a bridge", "no drive was changed"]);
    says(&text, &["n1 is mounted on /run/place", "n1 holds: ext4 named 'guest' (--force)"]);
    says(&text, &["n1 is used as swap", "is in use inside the kernel (a mount that is not visible"]);
    assert!(text.contains(&format!("{HIDDEN}: refused: /dev/nvme")), "{text}");
    assert!(!array || text.contains("n1 is part of RAID md127"), "{text}");
    assert!(!text.contains(&format!("{PLAIN}: refused")), "{text}");
    let open = format!(
        "{DISK}\nexec 5<$(disk {PLAIN}); {}/setup/setup.sh bind {PLAIN} --force 2>&1 && exit 9; exit 0",
        Lab::project().display()
    );
    says(&guest.run(&open, SHORT).unwrap(), &["is open in process", "(bash)"]);
    // Not in use any more: what is on it still speaks against it.
    guest.run("umount /run/place && swapoff -a", SHORT).unwrap();
    let text = setup(guest, &format!("bind {PLAIN} {MOUNTED} {SWAPPING}"), 1);
    says(&text, &["n1 holds: ext4 named 'guest'", "n1 holds: swap", "--force", "no drive was changed"]);
    says(&setup_as(guest, AS_NOBODY, &format!("bind {PLAIN}"), 1), &["only root"]);
    says(&setup(guest, &format!("bind {PLAIN} {MOUNTED} --force --dry-run"), 0), &["would write 'vfio-pci'"]);
    assert_eq!(state(guest), before);
}

/// The program as a normal user, who may lock so much memory.
fn target_of_user(memlock: &str) -> String {
    let program = vhost_blk_program().unwrap();
    let arguments = format!("--device {PLAIN} --socket-path /run/user/disk.sock");
    format!(
        "RUST_LOG=info prlimit --memlock={memlock} timeout 300 {AS_NOBODY} {} {arguments} </dev/null",
        program.display()
    )
}

/// The program does not start as that user, and says these words.
#[track_caller]
fn target_fails(guest: &mut Guest, memlock: &str, parts: &[&str]) {
    let output = guest.try_run(&format!("{} 2>&1", target_of_user(memlock)), SHORT).unwrap();
    assert_eq!(output.status, 1, "{}", output.text);
    says(&output.text, parts);
}

fn drives_are_bound_served_by_a_user_and_given_back(kernel: &Kernel) {
    let folder = folder();
    // Both ways in which Linux shows a drive's disk: below the controller, and (with modules) apart from it.
    let multipath = if kernel.modules.is_some() { "nvme_core.multipath=1" } else { "" };
    let lab = Lab::new(kernel)
        .append(multipath)
        .drive(LabDrive::new("plain"))
        .drive(LabDrive::new("mounted").size_mib(16))
        .drive(LabDrive::new("swapping").size_mib(16))
        .drive(LabDrive::new("hidden").size_mib(16))
        .drive(LabDrive::new("member").size_mib(16));
    let mut guest = lab.boot(folder.path()).unwrap();
    the_script_refuses_what_is_in_use(&mut guest);
    let before = state(&mut guest);

    let text = setup(&mut guest, &format!("bind {PLAIN}"), 0);
    says(&text, &["bound to vfio-pci (before: nvme)"]);
    says(&setup(&mut guest, &format!("bind {PLAIN}"), 0), &["already"]);
    says(&setup(&mut guest, &format!("bind {MOUNTED} --force"), 0), &["bound to vfio-pci"]);

    // Not the user's yet; then the user's, but without the memory.
    guest.run("mkdir /run/user && chown nobody /run/user", SHORT).unwrap();
    target_fails(&mut guest, "unlimited", &["your user may not open /dev/"]);
    let text = setup(&mut guest, &format!("bind {PLAIN} --user nobody"), 0);
    says(&text, &["belongs to nobody now", "limits.d/vhost-blk.conf"]);
    target_fails(&mut guest, "65536", &["RLIMIT_MEMLOCK, now 64 KiB", "ulimit -l unlimited"]);
    let text = setup(&mut guest, "hugepages 64M --user nobody", 0);
    says(&text, &["there are 32 now (64 MiB; before: 0)", "/run/hugepages/nobody-2M"]);
    guest
        .run(&format!("{AS_NOBODY} touch /run/hugepages/nobody-2M/x && rm /run/hugepages/nobody-2M/x"), SHORT)
        .unwrap();
    let text = setup(&mut guest, "check --user nobody", 1);
    says(
        &text,
        &[
            "ready    IOMMU",
            "ready    interrupt remapping",
            "belongs to nobody",
            "ready    hugepages of the user",
            "MISSING  memlock",
            "limits.d",
        ],
    );
    says(&text, &[&format!("mend it: setup.sh bind {MOUNTED} --user nobody")]);

    // As it should be: the user's program serves the drive, and data goes through.
    let start = format!(
        "{} >/run/log 2>&1 & echo $! >/run/pid
        for _ in $(seq 900); do [ ! -S /run/user/disk.sock ] || break; sleep 0.1; done; [ -S /run/user/disk.sock ]",
        target_of_user("unlimited")
    );
    guest.run(&start, SHORT).unwrap();
    let perf = build_dir().join("release/blk-perf");
    let load = format!(
        "prlimit --memlock=unlimited timeout 100 {AS_NOBODY} {} --socket /run/user/disk.sock --verify --window 4M \
         --operations 500 --json",
        perf.display()
    );
    let text = guest.run(&load, SHORT).unwrap();
    let verified: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!((&verified["io_errors"], &verified["verify_errors"]), (&0.into(), &0.into()), "{verified}");

    // In use: neither unbind nor undo takes it away.
    let text = setup(&mut guest, &format!("unbind {MOUNTED} {PLAIN}"), 1);
    says(&text, &[PLAIN, "open in process", "(vhost-blk)", "no drive was changed"]);
    let json: Value = serde_json::from_str(&setup(&mut guest, "status --json", 0)).unwrap();
    let open: Vec<_> = json["drives"].as_array().unwrap().iter().map(|drive| &drive["open_in"]).collect();
    assert!(open[0][0].as_str().unwrap().contains("(vhost-blk)") && open[1].as_array().unwrap().is_empty(), "{json}");
    says(
        &setup(&mut guest, "undo", 1),
        &[PLAIN, "failed", "open in process", &format!("{MOUNTED}: given back to nvme")],
    );
    guest.run("kill $(cat /run/pid); while [ -e /proc/$(cat /run/pid) ]; do sleep 0.1; done", SHORT).unwrap();
    says(&setup(&mut guest, &format!("unbind {PLAIN}"), 0), &["given back to nvme"]);
    setup(&mut guest, "undo", 0);
    assert_eq!(state(&mut guest), before);
    let script = format!("{DISK}\nmount $(disk {MOUNTED}) /run/place && umount /run/place");
    guest.run(&script, SHORT).unwrap();
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(drives_are_bound_served_by_a_user_and_given_back);
