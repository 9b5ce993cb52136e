//! Virtual machines on disks that `vhost-blk` serves: a Debian kernel, its own virtio-blk driver, a file system.

use std::path::Path;
use std::time::Duration;

use e2e::{Guest, Initramfs, Kernel, Machine, Target};
use tempfile::TempDir;

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("e2e-").tempdir().unwrap()
}

fn machine() -> Machine {
    let kernel = Kernel::stable().unwrap();
    Machine::new(&kernel, &Initramfs::new(&kernel))
}

fn boot(folder: &Path, target: &Target, properties: &str) -> Guest {
    machine().disk(target.socket(), properties).boot(folder).unwrap()
}

/// Makes a file system, files in it of many sizes, and their checksums.
const FILL: &str = r#"set -e
mkfs.ext4 -q -E discard /dev/vda
mount /dev/vda /mnt
for size in 1 511 512 4095 4096 65537 1048577 9000001; do
    head -c $size /dev/urandom >/mnt/$size
done
mkdir /mnt/many
for i in $(seq 200); do echo "file $i" >/mnt/many/$i; done
dd if=/dev/urandom of=/mnt/synced bs=64k count=16 conv=fsync 2>/dev/null
cd /mnt && find . -type f -exec sha256sum {} + >/tmp/sums
cp /tmp/sums /mnt/sums && sync
cd / && umount /mnt"#;

/// Checks the file system and compares its files with their checksums.
const CHECK: &str = r#"set -e
e2fsck -fn /dev/vda
mount /dev/vda /mnt
cd /mnt && sha256sum -c sums >/tmp/result || { cat /tmp/result; exit 1; }
[ $(grep -c OK /tmp/result) = 209 ]
cd / && umount /mnt"#;

#[test]
fn files_survive_a_new_guest_and_a_new_target() {
    let folder = folder();
    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(FILL, LONG).unwrap();
    guest.run(CHECK, LONG).unwrap();
    guest.power_off(SHORT).unwrap();

    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(CHECK, LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    target.stop().unwrap();

    let target = Target::serve_disk(folder.path(), 256, 512, &[]).unwrap();
    let mut guest = boot(folder.path(), &target, "num-queues=2");
    guest.run(CHECK, LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    target.stop().unwrap();
}
