//! What the device offers, as the guest's driver sees and uses it.

use e2e::{Guest, Target};

use crate::{CHECK, FILL, LONG, SHORT, Totals, boot, folder, machine, on, on_peer, stop};

/// Whether the guest's driver has accepted feature `bit` of its disk number `disk`.
fn accepted(guest: &mut Guest, disk: usize, bit: usize) -> bool {
    let letter = char::from(b'a' + u8::try_from(disk).unwrap());
    // One character per feature, bit 0 first.
    let features = guest.run(&format!("cat /sys/block/vd{letter}/device/features"), SHORT).unwrap();
    features.as_bytes()[bit] == b'1'
}

/// virtio 1.2, section 6 and 5.2.3.
const INDIRECT_DESC: usize = 28;
const EVENT_IDX: usize = 29;
const RING_PACKED: usize = 34;
const FLUSH: usize = 9;
const DISCARD: usize = 13;
const WRITE_ZEROES: usize = 14;

#[test]
fn the_packed_ring() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    for script in [FILL, CHECK] {
        let mut guest = boot(folder.path(), &target, "num-queues=2,packed=on");
        assert!(accepted(&mut guest, 0, RING_PACKED) || on_peer());
        guest.run(&on("/dev/vda", script), LONG).unwrap();
        guest.power_off(SHORT).unwrap();
    }
    stop(target);
}

#[test]
fn blocks_of_4096_bytes() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 4096, &[]).unwrap();
    // QEMU takes the block sizes from the target; they are not said here.
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    assert_eq!(guest.run("cat /sys/block/vda/queue/logical_block_size", SHORT).unwrap(), "4096\n");
    assert_eq!(guest.run("cat /sys/block/vda/size", SHORT).unwrap(), "524288\n", "always in units of 512 bytes");
    let output = guest.try_run("dd if=/dev/vda of=/dev/null iflag=direct bs=512 count=1", SHORT).unwrap();
    assert_ne!(output.status, 0, "a direct read of half a block: {}", output.text);
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// Every CPU writes and reads its own piece of the disk at once, each through its own queue.
#[test]
fn four_queues_at_once() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = machine().cpus(4).disk(target.socket(), "num-queues=4").boot(folder.path()).unwrap();
    assert_eq!(guest.run("ls -1 /sys/block/vda/mq", SHORT).unwrap(), "0\n1\n2\n3\n");
    let script = r#"
for cpu in 0 1 2 3; do
    (
        set -e
        head -c 8M /dev/urandom >/tmp/data$cpu
        taskset -c $cpu dd if=/tmp/data$cpu of=/dev/vda oflag=direct bs=36864 seek=$((cpu * 512)) conv=fsync
        taskset -c $cpu dd if=/dev/vda of=/tmp/back$cpu iflag=direct,fullblock bs=36864 skip=$((cpu * 512)) count=228
        head -c 8M /tmp/back$cpu | cmp - /tmp/data$cpu
        touch /tmp/good$cpu
    ) >/tmp/log$cpu 2>&1 &
done
wait
cat /tmp/log*
[ $(ls /tmp/good* | wc -l) = 4 ]"#;
    guest.run(script, LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    if on_peer() {
        return;
    }
    let log = target.stop().unwrap();
    for ring in 0..4 {
        // The counters are told at the end, per ring: each has carried its CPU's 8 MiB.
        let totals = Totals::of(log.lines().rfind(|line| line.contains(&format!(" ring {ring}: "))).unwrap());
        assert!(totals.get("bytes_written") >= 8 << 20 && totals.get("bytes_read") >= 8 << 20, "{log}");
    }
}

#[test]
fn a_read_only_export() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);

    let target = Target::serve_disk(folder.path(), 256, 512, &["--read-only"]).unwrap();
    let mut guest = boot(folder.path(), &target, "");
    assert_eq!(guest.run("blockdev --getro /dev/vda", SHORT).unwrap(), "1\n");
    let output = guest.try_run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct", SHORT).unwrap();
    assert_ne!(output.status, 0, "{}", output.text);
    let check = CHECK.replace("mount $1", "mount -o ro $1");
    guest.run(&on("/dev/vda", &check), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

#[test]
fn the_serial_number() {
    let folder = folder();
    // 20 bytes: the longest there is, without a terminating zero (virtio 1.2, section 5.2.6).
    let serial = "SERIAL-of-20-bytes..";
    let target = Target::serve_disk(folder.path(), 64, 512, &["--serial", serial]).unwrap();
    let mut guest = boot(folder.path(), &target, "");
    let seen = guest.run("cat /sys/block/vda/serial", SHORT).unwrap();
    assert!(seen == serial || on_peer(), "{seen}");
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// The guest's cache mode decides whether it flushes; data is right in both.
#[test]
fn write_back_and_write_through() {
    if on_peer() {
        return;
    }
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    assert_eq!(guest.run("cat /sys/block/vda/cache_type", SHORT).unwrap(), "write back\n");
    guest.run("echo 'write through' >/sys/block/vda/cache_type", SHORT).unwrap();
    assert_eq!(guest.run("cat /sys/block/vda/cache_type", SHORT).unwrap(), "write through\n");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.run("echo 'write back' >/sys/block/vda/cache_type", SHORT).unwrap();
    assert_eq!(guest.run("cat /sys/block/vda/cache_type", SHORT).unwrap(), "write back\n");
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// Several exports of one process, whose rings differ in everything that a front-end can choose.
#[test]
fn several_exports_with_different_rings() {
    if on_peer() {
        return;
    }
    let folder = folder();
    let properties = [
        "num-queues=1,queue-size=16",
        "num-queues=2,queue-size=1024,packed=on,event_idx=off",
        // Without indirect descriptors a ring has to hold the longest request.
        "num-queues=2,queue-size=1024,event_idx=off,indirect_desc=off",
        "num-queues=2,queue-size=1024,packed=on,indirect_desc=off",
    ];
    let mut config = String::new();
    let mut sockets = Vec::new();
    for number in 0..properties.len() {
        let socket = folder.path().join(format!("disk{number}.sock"));
        let image = folder.path().join(format!("disk{number}.img"));
        config += &format!(
            "[[export]]\ndevice = \"sim:128M,write-cache=on,file={}\"\nsocket-path = \"{}\"\nserial = \"disk{number}\"\n",
            image.display(),
            socket.display()
        );
        sockets.push(socket);
    }
    let path = folder.path().join("vhost-blk.toml");
    std::fs::write(&path, config).unwrap();
    let target = Target::vhost_blk(folder.path(), &["--config", &path.to_string_lossy()], sockets).unwrap();
    let machine = properties.iter().zip(target.sockets()).fold(machine(), |m, (p, socket)| m.disk(socket, p));
    let mut guest = machine.boot(folder.path()).unwrap();
    for (number, letter) in ["a", "b", "c", "d"].iter().enumerate() {
        let disk = format!("/dev/vd{letter}");
        assert_eq!(guest.run(&format!("cat /sys/block/vd{letter}/serial"), SHORT).unwrap(), format!("disk{number}"));
        for (bit, off) in [(INDIRECT_DESC, "indirect_desc=off"), (EVENT_IDX, "event_idx=off")] {
            assert_eq!(accepted(&mut guest, number, bit), !properties[number].contains(off), "{disk}, bit {bit}");
        }
        assert_eq!(accepted(&mut guest, number, RING_PACKED), properties[number].contains("packed=on"), "{disk}");
        for bit in [FLUSH, DISCARD, WRITE_ZEROES] {
            assert!(accepted(&mut guest, number, bit), "{disk}, bit {bit}");
        }
        guest.run(&on(&disk, FILL), LONG).unwrap();
    }
    for letter in ["a", "b", "c", "d"] {
        guest.run(&on(&format!("/dev/vd{letter}"), CHECK), LONG).unwrap();
    }
    guest.power_off(SHORT).unwrap();
    stop(target);
}
