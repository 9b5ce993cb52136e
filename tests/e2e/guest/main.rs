//! Virtual machines on disks that `vhost-blk` serves: Debian kernels, their own virtio-blk driver, file systems.

mod features;
mod files;
mod lifecycle;
mod memory;
mod resize;
mod restart;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use e2e::{Guest, Initramfs, Kernel, Machine, Target};
use tempfile::TempDir;

/// For what takes a second when nothing is wrong.
const SHORT: Duration = Duration::from_secs(60);
/// For scripts that move many megabytes through an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("e2e-").tempdir().unwrap()
}

fn machine() -> Machine {
    let kernel = Kernel::stable().unwrap();
    Machine::new(&kernel, &Initramfs::new(&kernel))
}

/// Boots a machine with the target's only disk.
fn boot(folder: &Path, target: &Target, properties: &str) -> Guest {
    machine().disk(target.socket(), properties).boot(folder).unwrap()
}

/// Makes a file system on the disk $1, files of many sizes in it, and their checksums. ($1 is put in by [`on`].)
const FILL: &str = r#"set -eo pipefail
mkfs.ext4 -q -E discard $1
mount $1 /mnt
for size in 1 511 512 4095 4096 65537 1048577 9000001; do
    head -c $size /dev/urandom >/mnt/$size
done
mkdir /mnt/many
for i in $(seq 100); do echo "file $i" >/mnt/many/$i; done
dd if=/dev/urandom of=/mnt/synced bs=64k count=16 conv=fsync 2>/dev/null
cd /mnt && find . -type f -exec sha256sum {} + >/tmp/sums
[ $(wc -l </tmp/sums) = 109 ]
cp /tmp/sums /mnt/sums
cd / && umount /mnt"#;

/// Checks the file system of the disk $1 and compares its files with their checksums.
const CHECK: &str = r#"set -eo pipefail
e2fsck -fn $1
mount $1 /mnt
cd /mnt
[ $(wc -l <sums) = 109 ]
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c sums >/tmp/result || { grep -v OK /tmp/result; exit 1; }
cd / && umount /mnt"#;

/// The script with `disk` as its first argument.
fn on(disk: &str, script: &str) -> String {
    format!("set -- {disk}\n{script}")
}

/// In a guest that was booted after a crash: the file system is put in order, and what was safe before is there. `sum` is the
/// line of sha256sum for /mnt/last.
fn is_whole_after_a_crash(guest: &mut Guest, sum: &str) {
    // The journal is replayed; 1 means that something was put in order, as it should be.
    let output = guest.try_run("e2fsck -fp /dev/vda", SHORT).unwrap();
    assert!(output.status <= 1, "{output:?}");
    guest.run("mount /dev/vda /mnt && rm -f /mnt/x", SHORT).unwrap();
    assert_eq!(guest.run("sha256sum /mnt/last", SHORT).unwrap(), sum);
    guest.run("umount /mnt", SHORT).unwrap();
    guest.run(&on("/dev/vda", CHECK), LONG).unwrap();
}

/// Whether the tests are being proved on another target, which lacks some features: those are not asserted then.
fn on_peer() -> bool {
    e2e::Peer::wanted() != e2e::Peer::VhostBlk
}

/// What a target did in its whole life, summed over its rings.
struct Totals(BTreeMap<String, u64>);

impl Totals {
    fn of(log: &str) -> Totals {
        let mut totals = BTreeMap::new();
        for word in log.lines().filter(|line| line.contains(" ring ")).flat_map(str::split_whitespace) {
            if let Some((name, Ok(value))) = word.split_once('=').map(|(name, value)| (name, value.parse::<u64>())) {
                *totals.entry(name.to_owned()).or_default() += value;
            }
        }
        Totals(totals)
    }

    fn get(&self, name: &str) -> u64 {
        if on_peer() {
            return 0;
        }
        *self.0.get(name).unwrap_or_else(|| panic!("the target's log has no counter {name}: {:?}", self.0))
    }
}

/// Stops the target: by itself and with success, without a failed request, and without a copy made of any data.
fn stop(target: Target) -> Totals {
    let log = target.stop().unwrap();
    if on_peer() {
        return Totals(BTreeMap::new());
    }
    let totals = Totals::of(&log);
    assert!(totals.get("reads") > 0, "{log}");
    assert_eq!(totals.get("errors"), 0, "{log}");
    assert_eq!(totals.get("copies"), 0, "{log}");
    totals
}
