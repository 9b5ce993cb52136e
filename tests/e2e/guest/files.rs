//! What was written is there afterwards.

use std::path::Path;

use e2e::{Initramfs, Kernel, Machine, Target};
use nvme_sim::{Config, NamespaceConfig, Simulator};

use crate::{CHECK, FILL, LONG, SHORT, boot, folder, is_whole_after_a_crash, on, on_peer, stop};

/// Files, file system and checksums stay right: in the same guest, in the next one, and after the target was started anew.
#[test]
fn files_survive_a_new_guest_and_a_new_target() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();

    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    let totals = stop(target);
    if !on_peer() {
        assert!(totals.get("flushes") > 0 && totals.get("discards") > 0);
        assert!(totals.get("bytes_written") > 10 << 20 && totals.get("bytes_read") > 10 << 20);
    }

    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// Files survive also with the newer kernel of Debian's backports.
#[test]
fn files_survive_with_a_newer_kernel() {
    let folder = folder();
    let kernel = Kernel::backports().unwrap();
    let machine = Machine::new(&kernel, &Initramfs::new(&kernel));
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    for script in [FILL, CHECK] {
        let mut guest = machine.clone().disk(target.socket(), "num-queues=2").boot(folder.path()).unwrap();
        guest.run(&on("/dev/vda", script), LONG).unwrap();
        guest.power_off(SHORT).unwrap();
    }
    stop(target);
}

/// The guest's page cache is bypassed, so every size and offset reaches the device as it is. Each pass writes the same
/// random data by pieces of another size, and it is read back by pieces of yet another.
#[test]
fn direct_io_of_odd_sizes() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 64, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    let script = r#"set -eo pipefail
length=$((4095 * 512 * 3))
head -c $length /dev/urandom >/tmp/data
cmp_disk() { # OFFSET READ-SIZE
    dd if=/dev/vda of=/tmp/back iflag=direct,skip_bytes,fullblock skip=$1 bs=$2 count=$(((length + $2 - 1) / $2)) 2>/dev/null
    head -c $length /tmp/back | cmp - /tmp/data
}
offset=0
for sizes in "512 1048576" "3584 512" "4608 66048" "65536 3584" "130560 4096" "1048064 1536" "2096640 2096640"; do
    write=${sizes% *} read=${sizes#* }
    dd if=/dev/zero of=/dev/vda oflag=direct,seek_bytes seek=$offset bs=1M count=7 2>/dev/null
    dd if=/tmp/data of=/dev/vda oflag=direct,seek_bytes seek=$offset bs=$write 2>/dev/null
    cmp_disk $offset $read
    # What lies behind is still zero.
    dd if=/dev/vda iflag=direct,skip_bytes skip=$((offset + length)) bs=512 count=1 2>/dev/null | cmp - /tmp/zero
    offset=$((offset + 7 * 1048576 + 512))
done"#;
    guest.run("head -c 512 /dev/zero >/tmp/zero", SHORT).unwrap();
    guest.run(script, LONG).unwrap();
    // The whole disk as the guest sees it is the file as the host sees it, once the target has stopped.
    let seen = guest.run("dd if=/dev/vda iflag=direct bs=1M 2>/dev/null | sha256sum", LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
    let image = folder.path().join("disk.img");
    let output = std::process::Command::new("sha256sum").arg(image).output().unwrap();
    let stored = String::from_utf8(output.stdout).unwrap();
    assert_eq!(seen.split_whitespace().next(), stored.split_whitespace().next());
}

/// Discards and zeroes what was asked for, and nothing else.
#[test]
fn discard_and_write_zeroes() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    let script = r#"set -eo pipefail
cd /sys/block/vda/queue
[ $(cat discard_max_bytes) -gt 0 ] && [ $(cat write_zeroes_max_bytes) -gt 0 ]
[ $(cat discard_granularity) -ge 512 ]
cd /
yes | head -c 16M >/tmp/data || true
dd if=/tmp/data of=/dev/vda oflag=direct bs=1M 2>/dev/null
head -c 16M /dev/zero >/tmp/zero
part() { dd if=/dev/vda iflag=direct,skip_bytes,count_bytes,fullblock bs=512 skip=$1 count=$2 2>/dev/null; }
# Zeroed, not aligned to anything but blocks, first without then with leave to unmap.
blkdiscard -z -o 1049088 -l 3000320 /dev/vda
part 1049088 3000320 | cmp -n 3000320 - /tmp/zero
part 0 1049088 | cmp -n 1049088 - /tmp/data
part $((1049088 + 3000320)) 1000448 | cmp -n 1000448 - /tmp/data
# Discarded: what it holds is undefined, what is beside it is not.
blkdiscard -o 8389120 -l 2097152 /dev/vda
part 7340032 1049088 | cmp -n 1049088 - /tmp/data
part $((8389120 + 2097152)) 1000448 | cmp -n 1000448 - /tmp/data
# The whole disk, more than one request can name.
blkdiscard /dev/vda
blkdiscard -z /dev/vda
dd if=/dev/vda iflag=direct bs=1M count=16 2>/dev/null | cmp - /tmp/zero"#;
    guest.run(script, LONG).unwrap();
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    let script = r#"set -eo pipefail
mount /dev/vda /mnt
head -c 30M /dev/urandom >/mnt/bulk && sync && rm /mnt/bulk && sync
fstrim -v /mnt
umount /mnt"#;
    let trimmed = guest.run(script, LONG).unwrap();
    let bytes: u64 = trimmed.split_whitespace().find_map(|word| word.parse().ok()).expect("fstrim says how much");
    assert!(bytes > 30 << 20, "{trimmed}");
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    assert!(stop(target).get("write_zeroes") > 0 || on_peer());
}

/// Partitions made in one guest are found by the next, and are where they should be.
#[test]
fn partitions_are_found() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 128, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "");
    let script = r#"printf 'n\np\n1\n2048\n+40M\nn\np\n2\n100000\n\nw\n' | fdisk /dev/vda && ls /dev/vda2"#;
    let printed = guest.run(script, SHORT).unwrap();
    assert!(printed.ends_with("/dev/vda2\n"), "{printed}");
    guest.run(&on("/dev/vda2", FILL), LONG).unwrap();
    guest.run("dd if=/dev/urandom of=/dev/vda1 bs=1M count=2 conv=fsync", SHORT).unwrap();
    let first = guest.run("sha256sum /dev/vda1", LONG).unwrap();
    guest.power_off(SHORT).unwrap();

    let mut guest = boot(folder.path(), &target, "");
    assert_eq!(guest.run("ls -1 /dev/vda*", SHORT).unwrap(), "/dev/vda\n/dev/vda1\n/dev/vda2\n");
    assert_eq!(guest.run("cat /sys/block/vda/vda1/start", SHORT).unwrap(), "2048\n");
    assert_eq!(guest.run("sha256sum /dev/vda1", LONG).unwrap(), first);
    guest.run(&on("/dev/vda2", CHECK), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// A drive with a write cache, in a process of its own: this one.
fn drive(folder: &Path) -> Simulator {
    let file = Some(folder.join("drive.img"));
    let namespace = NamespaceConfig { bytes: 256 << 20, file, ..NamespaceConfig::default() };
    let config = Config { namespaces: vec![namespace], volatile_write_cache: true, ..Config::default() };
    Simulator::start(config, &folder.join("drive.sock")).unwrap()
}

fn serve(folder: &Path, drive: &Simulator) -> Target {
    let (device, socket) = (format!("vfio-user:{}", drive.socket().display()), folder.join("disk.sock"));
    let arguments = ["--device", &device, "--socket-path", &socket.display().to_string()];
    Target::vhost_blk(folder, &arguments, vec![socket]).unwrap()
}

/// The drive loses its power, and with it all that its write cache held. What the guest had synced is not among it.
#[test]
fn what_was_synced_survives_a_power_cut() {
    if on_peer() {
        return;
    }
    let folder = folder();
    let drive = drive(folder.path());
    let target = serve(folder.path(), &drive);
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(&on("/dev/vda", FILL), LONG).unwrap();
    // On a slow machine the journal's own commit, every 5 seconds, would flush what must not be safe.
    let script = "set -e
        mount -o commit=300 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/last bs=1M count=5 conv=fsync 2>/dev/null
        sha256sum /mnt/last";
    let sum = guest.run(script, SHORT).unwrap();
    // These have reached the drive, and nobody has asked it to keep them.
    guest.run("dd if=/dev/urandom of=/mnt/x bs=1M count=5 oflag=direct 2>/dev/null", SHORT).unwrap();
    drop(guest);
    drop(target);
    let lost = drive.power_cut().unwrap();
    assert!(lost > 0, "the drive's cache was empty: this power cut proves nothing");

    let target = serve(folder.path(), &drive);
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    is_whole_after_a_crash(&mut guest, &sum);
    guest.power_off(SHORT).unwrap();
    stop(target);
}

/// A guest that has chosen write-through does not flush: each write has to be on the medium when it is done.
#[test]
fn what_was_written_through_survives_a_power_cut() {
    if on_peer() {
        return;
    }
    let folder = folder();
    let drive = drive(folder.path());
    let target = serve(folder.path(), &drive);
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    let write = "dd if=/dev/urandom of=/dev/vda bs=64k count=64 oflag=direct 2>/dev/null";
    let read = "dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum";
    guest.run(&format!("echo 'write through' >/sys/block/vda/cache_type; {write}"), SHORT).unwrap();
    let sum = guest.run(read, SHORT).unwrap();
    drop(guest);
    drop(target);
    assert_eq!(drive.power_cut().unwrap(), 0, "blocks written through were still in the cache");

    let target = serve(folder.path(), &drive);
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    assert_eq!(guest.run(read, SHORT).unwrap(), sum);
    // And what was written back, without a flush, was indeed at the mercy of the cache.
    guest.run(&format!("echo 'write back' >/sys/block/vda/cache_type; {write}"), SHORT).unwrap();
    drop(guest);
    drop(target);
    assert!(drive.power_cut().unwrap() > 0);
}
