//! Mistakes that users make, and what the program says about them: one line, with what is wrong and what to do.

use e2e::{Guest, Kernel, Lab, LabDrive, build_dir, vhost_blk_program};

use super::{SHORT, bind, folder, on_each_kernel};

/// Runs `vhost-blk` with these arguments, which have to be refused: with status 1 and one line that contains all `parts`.
/// `before` is put before the program.
#[track_caller]
fn refuses(guest: &mut Guest, before: &str, arguments: &str, parts: &[&str]) {
    let program = vhost_blk_program().unwrap();
    let script = format!(
        "export RUST_LOG=error RUST_BACKTRACE=1; timeout 90 {before} {} {arguments} 2>&1 </dev/null",
        program.display()
    );
    let output = guest.try_run(&script, SHORT).unwrap();
    let line = output.text.trim_end();
    assert_eq!(output.status, 1, "{script}:\n{line}");
    assert!(line.starts_with("vhost-blk: ") && !line.contains('\n'), "{script}: not one line:\n{line}");
    for part in parts {
        assert!(line.contains(part), "{script}: {part:?} is not in:\n{line}");
    }
}

/// Runs `vhost-blk` with a drive that is not there: one line tells so, and it waits for the drive until it is ended.
#[track_caller]
fn waits(guest: &mut Guest, arguments: &str, parts: &[&str]) {
    let script = format!(
        r#"export RUST_LOG=error
        {} {arguments} >/run/waits.log 2>&1 </dev/null &
        target=$!
        for _ in $(seq 600); do grep -q 'until this is corrected; retrying' /run/waits.log && break; sleep 0.1; done
        kill $target; wait $target; echo "target $?"; cat /run/waits.log"#,
        vhost_blk_program().unwrap().display()
    );
    let text = guest.run(&script, SHORT).unwrap();
    let line = text.trim_end().strip_prefix("target 0\n").unwrap_or_else(|| panic!("{script}:\n{text}"));
    assert!(!line.contains('\n') && parts.iter().all(|part| line.contains(part)), "{script}:\n{text}");
}

/// A user without any privilege.
const AS_NOBODY: &str = "setpriv --reuid nobody --regid nogroup --clear-groups";

fn mistakes_are_told_in_one_line(kernel: &Kernel) {
    let folder = folder();
    let lab = Lab::new(kernel)
        // Two functions of one device are one group, as nothing keeps them from reaching each other.
        .drive(LabDrive::new("shared").properties("multifunction=on"))
        .arguments(&["-blockdev", "driver=null-co,node-name=nothing,size=16777216,read-zeroes=on"])
        .arguments(&["-device", "nvme,serial=neighbour,drive=nothing,addr=04.1"])
        .drive(LabDrive::new("good"))
        .drive(LabDrive::new("other"));
    let mut guest = lab.boot(folder.path()).unwrap();
    let (shared, good, other) = ("0000:00:04.0", "0000:00:05.0", "0000:00:06.0");
    let device = |address: &str| format!("--socket-path /run/user/disk.sock --device {address}");
    guest.run("mkdir /run/user && chown nobody /run/user", SHORT).unwrap();

    // There is none, as if it had been pulled out. Not bound: the kernel's driver has it, nobody has it.
    waits(&mut guest, &device("0000:00:0f.0"), &["no such PCI device", "lspci -D", "no disk is served on"]);
    let bind_it = format!("setup/setup.sh bind {other}");
    refuses(&mut guest, "", &device(other), &["driver 'nvme' has it", "if nothing on it is in use", &bind_it]);
    guest.run(&format!("echo {other} >/sys/bus/pci/devices/{other}/driver/unbind"), SHORT).unwrap();
    refuses(&mut guest, "", &device(other), &["no driver is bound to it", &bind_it]);

    // A neighbour in the group that the kernel still drives.
    bind(&mut guest, shared);
    let parts = ["the kernel drives other devices of its IOMMU group", "0000:00:04.1 (nvme)", "bind all devices"];
    refuses(&mut guest, "", &device(shared), &parts);
    // No permission; then one file of the two that are needed.
    bind(&mut guest, good);
    let give = format!("setup/setup.sh bind {good} --user NAME");
    refuses(&mut guest, AS_NOBODY, &device(good), &["your user may not open /dev/vfio/", &give, "run as root"]);
    guest.run("for f in /dev/vfio/[0-9]* /dev/vfio/devices/*; do [ ! -e $f ] || chown nobody $f; done", SHORT).unwrap();
    if guest.try_run("[ -e /dev/iommu ]", SHORT).unwrap().status == 0 {
        // Without iommufd's own file, the group is taken.
        guest.run("chmod 600 /dev/vfio/vfio", SHORT).unwrap();
        refuses(&mut guest, AS_NOBODY, &device(good), &["your user may not open /dev/", &give]);
        guest.run("chown nobody /dev/iommu", SHORT).unwrap();
    }

    // Too little memory may be locked: for the program itself, or for a guest's memory. Hugepages are missing all along.
    let parts = ["RLIMIT_MEMLOCK, now 64 KiB", "ulimit -l unlimited", "LimitMEMLOCK=infinity"];
    refuses(&mut guest, &format!("prlimit --memlock=65536 {AS_NOBODY}"), &device(good), &parts);
    let script = format!(
        r#"export RUST_LOG=warn
        prlimit --memlock=16777216 {AS_NOBODY} {target} {device} >/run/target.log 2>&1 &
        target=$!
        for _ in $(seq 600); do [ -S /run/user/disk.sock ] && break; sleep 0.1; done
        timeout 60 {perf} --socket /run/user/disk.sock --block-size 1M --depth 64 --seconds 1 >/run/perf.log 2>&1
        echo "perf $?"
        kill $target; wait $target; echo "target $?"; cat /run/target.log"#,
        target = vhost_blk_program().unwrap().display(),
        perf = build_dir().join("release/blk-perf").display(),
        device = device(good),
    );
    let log = guest.run(&script, SHORT * 2).unwrap();
    assert!(log.starts_with("perf 1\ntarget 0\n"), "the front-end is refused, the target stays: {log}");
    let lines: Vec<_> = log.lines().filter(|line| line.contains("RLIMIT_MEMLOCK, now 16384 KiB")).collect();
    assert!(matches!(lines[..], [line] if line.contains("ulimit -l unlimited") && line.contains(good)), "{log}");
    let lines: Vec<_> = log.lines().filter(|line| line.contains("hugepages")).collect();
    assert!(matches!(lines[..], [line] if line.contains("setup/setup.sh hugepages")), "{log}");

    // Open already: by another program.
    let start = format!(
        "{} --device {good} --socket-path /run/first.sock >/run/first.log 2>&1 & echo $! >/run/first.pid
        for _ in $(seq 600); do [ -S /run/first.sock ] && break; sleep 0.1; done; [ -S /run/first.sock ]",
        vhost_blk_program().unwrap().display()
    );
    guest.run(&start, SHORT).unwrap();
    refuses(&mut guest, "", &device(good), &[good, "open already", "by another program (fuser -v /dev/vfio/"]);
    guest
        .run("kill $(cat /run/first.pid); while [ -e /proc/$(cat /run/first.pid) ]; do sleep 0.1; done", SHORT)
        .unwrap();
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(mistakes_are_told_in_one_line);

/// The IOMMU is switched off: the kernel's VFIO takes no device then, so that binding one only seems to work.
fn no_iommu_is_told_in_one_line(kernel: &Kernel) {
    let folder = folder();
    let mut guest =
        Lab::new(kernel).append("intel_iommu=off").drive(LabDrive::new("alone")).boot(folder.path()).unwrap();
    let device = "--socket-path /run/disk.sock --device 0000:00:04.0";
    let parts = ["it is behind no IOMMU", "in the firmware", "intel_iommu=on"];
    refuses(&mut guest, "", device, &parts);
    let bind = r#"modprobe -qa vfio-pci vfio_iommu_type1; cd /sys/bus/pci/devices/0000:00:04.0
        echo 0000:00:04.0 >driver/unbind; echo vfio-pci >driver_override; echo 0000:00:04.0 >/sys/bus/pci/drivers_probe
        [ ! -e driver ]"#;
    guest.run(bind, SHORT).unwrap();
    refuses(&mut guest, "", device, &parts);
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(no_iommu_is_told_in_one_line);
