//! Front-ends and targets that come and go.

use std::time::Duration;

use e2e::Target;

use crate::{CHECK, FILL, LONG, SHORT, boot, folder, is_whole_after_a_crash, on, on_peer, stop};

/// Keeps the disk busy in the background: writes what it reads, so that the data stays the same.
const BUSY: &str = "(while :; do dd if=/dev/vda of=/tmp/x bs=1M count=20; dd if=/tmp/x of=/dev/vda bs=64k oflag=direct;
done) >/tmp/busy 2>&1 &
until [ -s /tmp/busy ]; do sleep 0.1; done; sleep 1";

/// The guest restarts inside the same QEMU: the front-end stops its rings, resets the device and starts anew, on the
/// same connection or the next.
#[test]
fn a_guest_reboots() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    for _ in 0..2 {
        // Restart with requests under way, not from an idle disk. (QEMU's storage daemon does not survive that.)
        if !on_peer() {
            guest.run(BUSY, SHORT).unwrap();
        }
        guest.reboot(SHORT).unwrap();
        guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    }
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// QEMU is killed while its guest writes; the target forgets it, and what had been synced is there for the next guest.
#[test]
fn a_front_end_dies() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    let script = "mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/last bs=1M count=5 conv=fsync 2>/dev/null && sha256sum /mnt/last";
    let sum = guest.run(script, SHORT).unwrap();
    let busy = "(while :; do dd if=/dev/urandom of=/mnt/x bs=1M count=20 conv=fsync; done) >/tmp/busy 2>&1 &
until [ -s /tmp/busy ]; do sleep 0.1; done; sleep 1";
    guest.run(busy, SHORT).unwrap();
    drop(guest);

    let mut guest = boot(folder.path(), &target, "num-queues=2");
    is_whole_after_a_crash(&mut guest, &sum);
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// SIGTERM while a guest has its disk in use: the target ends by itself, with success, and loses nothing it had
/// acknowledged after a flush.
#[test]
fn a_target_is_stopped_under_a_guest() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.run(BUSY, SHORT).unwrap();
    stop(target);
    drop(guest);

    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// The disk is unplugged from a running guest and plugged in again.
#[test]
fn a_disk_is_unplugged_and_plugged() {
    use serde_json::json;
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let machine = crate::machine().arguments(&["-device", "pcie-root-port,id=hotplug0,chassis=1"]);
    let mut guest = machine.disk(target.socket(), "num-queues=2,bus=hotplug0").boot(folder.path()).unwrap();
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    let mut monitor = guest.monitor().unwrap();
    for _ in 0..2 {
        monitor.execute("device_del", json!({ "id": "disk0" })).unwrap();
        let gone = "i=0; while [ -e /sys/block/vda ]; do i=$((i + 1)); [ $i -lt 60 ] || exit 1; sleep 0.5; done";
        guest.run(gone, SHORT).unwrap();
        // The guest's driver has let go; QEMU may take a moment more until it has closed the socket.
        e2e::poll(Duration::from_secs(30), "the chardev to be free", || {
            Ok(monitor.execute("chardev-remove", json!({ "id": "c0" })).ok())
        })
        .unwrap();
        let address = json!({ "type": "unix", "data": { "path": target.socket() } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        monitor.execute("chardev-add", json!({ "id": "c0", "backend": backend })).unwrap();
        let device = json!({ "driver": "vhost-user-blk-pci", "id": "disk0", "chardev": "c0", "bus": "hotplug0", "num-queues": 2 });
        monitor.execute("device_add", device).unwrap();
        let back = "i=0; while [ ! -e /dev/vda ]; do i=$((i + 1)); [ $i -lt 60 ] || exit 1; sleep 0.5; done";
        guest.run(back, SHORT).unwrap();
        guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    }
    guest.power_off(SHORT).unwrap();
    stop(target);
}
