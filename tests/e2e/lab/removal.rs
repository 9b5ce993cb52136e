//! Drives that go away while they are in use, and come back: the target and its front-ends stay as they are.

use std::path::PathBuf;

use e2e::{Guest, Kernel, Lab, LabDrive, Qmp};
use serde_json::json;

use super::{LONG, SHORT, bind, folder, on_each_kernel};

/// The drive behind a port, and the one that nothing happens to.
const REMOVED: &str = "0000:01:00.0";
const OTHER: &str = "0000:00:05.0";

/// What the scripts have in common. `wait_for` waits for a condition; `told` for the n-th line of the target's log with a text.
const FUNCTIONS: &str = r#"
    set -eu
    fail() { echo "$*"; cat /tmp/target.log /tmp/*.err; dmesg | tail -n 20; exit 1; }
    wait_for() { for _ in $(seq 600); do ! "$@" || return 0; sleep 0.1; done; fail "waited for: $*"; }
    count() { [ "$(grep -c "$2" /tmp/target.log)" -ge "$1" ]; }
    told() { wait_for count "$1" "$2"; }
    alive() { kill -0 "$(cat /tmp/target.pid)"; }
    # The sum of a counter over all rings of the disk whose drive is removed, so far. Those of the other disk are logged last.
    counter() {
        before=$(grep -c '/b.sock\( ring 0\)\?: ' /tmp/target.log || true)
        kill -USR1 "$(cat /tmp/target.pid)"
        told $((before + 1)) '/b.sock\( ring 0\)\?: '
        awk -v name="$1" '/a\.sock ring [0-9]+:/ {
                for (at = 1; at <= NF; at++) {
                    if ($at == "ring") ring = $(at + 1)
                    if (index($at, name "=") == 1) last[ring] = substr($at, length(name) + 2)
                }
            }
            END { for (ring in last) sum += last[ring]; print sum + 0 }' /tmp/target.log
    }
    grows() { [ "$(counter "$1")" -gt "$2" ]; }
"#;

/// What QEMU notes for each I/O command, and when CC.SHN is set.
const COMMAND: &str = "pci_nvme_io_cmd";
const SHUTDOWN: &str = "pci_nvme_mmio_shutdown_set";

/// Producers first, then the device (NVMe Base 2.0, 3.6.1): no command of the removed drive's namespace after CC.SHN was set.
fn nothing_comes_after_the_shutdown(trace: &str) -> bool {
    let is_command = |line: &&str| line.contains(COMMAND) && line.contains("nsid 0x1 ");
    let Some((before, after)) = trace.rsplit_once(SHUTDOWN) else { return false };
    before.lines().filter(is_command).count() > 50 && after.lines().filter(is_command).count() == 0
}

fn program(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| Lab::build().join("release").join(name), PathBuf::from)
}

fn script(guest: &mut Guest, text: &str) -> String {
    let text = text
        .replace("VHOST_BLK", &program("VHOST_BLK", "vhost-blk").display().to_string())
        .replace("BLK_PERF", &program("BLK_PERF", "blk-perf").display().to_string());
    guest.run(&format!("{FUNCTIONS}{text}"), LONG).unwrap()
}

/// The drive that stays answers hardly anything for a while, and is brought up again where it is: nothing is unmapped, which is seen where
/// the kernel can trace that. No request of its guest fails.
fn fails_in_place(guest: &mut Guest, monitor: &mut Qmp, is_traced: bool) {
    let trace = r#"
        mount -t tracefs none /sys/kernel/tracing 2>/dev/null || true
        unmap=/sys/kernel/tracing/events/iommu/unmap/enable
        [ ! -e $unmap ] || echo 1 >$unmap
        [ ! -e $unmap ] || cat $unmap"#;
    assert_eq!(script(guest, trace).trim() == "1", is_traced);
    let mut throttle = |iops: u32| {
        let limits = json!({ "id": "namespace-staying-2", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0 });
        monitor.execute("block_set_io_throttle", limits).unwrap();
    };
    throttle(1);
    script(guest, "told 1 '0000:00:05.0: out of operation: [0-9]* commands were not answered in time'");
    throttle(0);
    let back = r#"
        told 1 '0000:00:05.0: the drive is back'
        ! grep 'its function cannot be reset' /tmp/target.log || fail 'its function could not be reset'
        unmaps=/sys/kernel/tracing/trace
        [ ! -e $unmaps ] || ! grep 'unmap:' $unmaps || fail 'memory was unmapped'
        [ ! -e $unmaps ] || echo 0 >/sys/kernel/tracing/events/iommu/unmap/enable"#;
    script(guest, back);
}

fn a_drive_is_removed_under_load_and_put_back(kernel: &Kernel) {
    let folder = folder();
    let drive = LabDrive::new("moving").hotplug();
    // Its commands are those of namespace 2, by which QEMU's trace tells the two apart.
    let staying = LabDrive::new("staying").namespace(8, 512).namespace(64, 512);
    let lab = Lab::new(kernel)
        .arguments(&["-trace", COMMAND, "-trace", SHUTDOWN])
        .hugepages(16)
        .drive(drive.clone())
        .drive(staying);
    let mut guest = lab.boot(folder.path()).unwrap();
    bind(&mut guest, REMOVED);
    bind(&mut guest, OTHER);
    let start = r#"
        cat >/tmp/target.toml <<END
hold = 15
io-timeout = 5
[[export]]
device = "0000:01:00.0"
socket-path = "/tmp/a.sock"
[[export]]
device = "0000:00:05.0"
namespace = 2
socket-path = "/tmp/b.sock"
END
        VHOST_BLK --config /tmp/target.toml >/tmp/target.log 2>&1 </dev/null &
        echo $! >/tmp/target.pid
        told 2 'is ready for a front-end'
        # The rate leaves errors a chance to be few, and the model blocks it knows.
        for disk in a b; do
            errors=; [ $disk = b ] || errors=--allow-errors
            BLK_PERF --socket /tmp/$disk.sock --queues 2 --depth 8 --rate 50 --verify --window 16M --seconds 900 \
                $errors --json >/tmp/$disk.json 2>/tmp/$disk.err </dev/null &
            echo $! >/tmp/$disk.pid
        done
        wait_for grows reads 50"#;
    script(&mut guest, start);

    let mut monitor = guest.monitor().unwrap();
    // Debian's kernels can trace; the other one has no modules, and cannot.
    fails_in_place(&mut guest, &mut monitor, kernel.modules.is_some());

    // By QEMU, as by somebody who pulls it: it goes when the target has let go of it, and not before.
    monitor.execute("device_del", json!({ "id": "moving" })).unwrap();
    loop {
        let event = monitor.event("DEVICE_DELETED").unwrap();
        if event["data"]["device"] == "moving" {
            break;
        }
    }
    let trace = std::fs::read_to_string(folder.path().join("qemu.log")).unwrap();
    assert!(nothing_comes_after_the_shutdown(&trace), "{trace}");
    let away = r#"
        told 1 '0000:01:00.0: out of operation: it is being removed'
        [ ! -e /sys/bus/pci/devices/0000:01:00.0 ]
        alive
        # Requests wait, and then there are errors, and nothing else, and no end of them.
        told 1 '0000:01:00.0: its disks answer with I/O errors until it is back: it was not back within 15s'
        errors=$(counter errors)
        wait_for grows errors $((errors + 20))
        reads=$(counter reads)
        wait_for grows errors $((errors + 60))
        [ "$(counter reads)" = "$reads" ] || fail 'a drive that is away has read something'
        told 1 '0000:01:00.0: not back yet'"#;
    script(&mut guest, away);

    // In its place again, and given to the target again: nobody tells it.
    monitor.execute("device_add", drive.device()).unwrap();
    script(&mut guest, "wait_for [ -e /sys/bus/pci/devices/0000:01:00.0/driver ]");
    bind(&mut guest, REMOVED);
    let back = |number: u32| {
        format!(
            "told {number} '0000:01:00.0: the drive is back'
            errors=$(counter errors) reads=$(counter reads)
            wait_for grows reads $((reads + 50))
            [ \"$(counter errors)\" = \"$errors\" ] || fail 'the drive is back, and there are errors'"
        )
    };
    script(&mut guest, &back(1));

    // By its driver's hand: this, too, waits for the target. It is back so soon that nobody notices more than a pause.
    let unbound = r#"
        counter errors >/tmp/errors
        echo 0000:01:00.0 >/sys/bus/pci/drivers/vfio-pci/unbind
        told 2 '0000:01:00.0: out of operation: it is being removed'"#;
    script(&mut guest, unbound);
    bind(&mut guest, REMOVED);
    script(&mut guest, &back(2));
    // Nothing may have been with the drive at that moment: what counts is that the rest has waited.
    script(
        &mut guest,
        r#"[ "$(counter errors)" = "$(cat /tmp/errors)" ] || fail 'requests did not wait for the drive'"#,
    );

    // All that was written in between is there, the other disk has noticed nothing, and the target ends as ever.
    let end = r#"
        kill -INT "$(cat /tmp/a.pid)" "$(cat /tmp/b.pid)"
        for disk in a b; do
            wait_for [ -s /tmp/$disk.json ]
            cat /tmp/$disk.json
        done
        BLK_PERF --socket /tmp/a.sock --queues 2 --verify --window 16M --operations 500 --json 2>&1
        kill "$(cat /tmp/target.pid)"
        gone() { ! alive 2>/dev/null; }
        wait_for gone
        # The crate vfio-ioctls may panic when it closes a device that the kernel has forgotten already; that is caught.
        ! grep panicked /tmp/target.log | grep -v /vfio-ioctls- || fail 'the target has panicked'"#;
    let output = script(&mut guest, end);
    let reports = output.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let reports: Vec<_> = reports.filter(|report| report.is_object()).collect();
    let [removed, other, after] = &reports[..] else { panic!("three reports are expected: {output}") };
    for (report, name) in [(removed, "removed"), (other, "other"), (after, "after")] {
        let number = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("{field} in {report:#}"));
        assert_eq!((number("verify_errors"), number("read_back_errors")), (0, 0), "{name}: {report:#}");
        assert_eq!(number("io_errors") > 0, name == "removed", "{name}: {report:#}");
        assert!(number("blocks_read_back") > 100, "{name}: {report:#}");
    }
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(a_drive_is_removed_under_load_and_put_back);
