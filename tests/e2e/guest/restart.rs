//! A target that is killed under a guest, and started again: the guest notices nothing but a pause.

use std::path::Path;
use std::time::Duration;

use e2e::{Guest, Machine, Target};

use crate::{LONG, SHORT, folder, machine};

const KILLS: usize = 12;
/// The longest time from the guest's last sign of life to a kill.
const MOMENT: Duration = Duration::from_millis(400);

/// Writes files with their checksums, each made durable before its line in `/mnt/log`, while others are written and read back
/// from the disk; ends with the first error.
const WRITE: &str = r#"mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt
cat >/tmp/write <<'END'
set -e
i=0
until [ -e /tmp/enough ]; do
    i=$((i + 1)) file=/mnt/$((i % 40))
    head -c $((i % 7 * 100000 + 50000)) /dev/urandom >$file.new
    sum=$(sha256sum <$file.new)
    mv $file.new $file
    sync
    echo "${sum%% *}  $file" >>/mnt/log
    echo $i >/tmp/written.new
    mv /tmp/written.new /tmp/written
done
touch /tmp/rests
END
cat >/tmp/load <<'END'
set -e
head -c 3000001 /dev/urandom >/tmp/same
i=0
until [ -e /tmp/enough ]; do
    i=$((i + 1))
    cp /tmp/same /mnt/load.$((i % 4))
    sync -d /mnt/load.$((i % 4))
    echo 1 >/proc/sys/vm/drop_caches
    cmp /tmp/same /mnt/load.$(((i + 1) % 4)) || [ $i -lt 4 ]
done
touch /tmp/load.rests
END
(bash /tmp/write || touch /tmp/bad) >/tmp/output 2>&1 &
(bash /tmp/load || touch /tmp/bad) >/tmp/load.output 2>&1 &
until [ -s /tmp/written ]; do sleep 0.05; done"#;

/// Nothing has failed in the guest: no file could not be written, the file system is not read-only, the kernel has no complaint.
const WELL: &str = r#"[ ! -e /tmp/bad ] || { cat /tmp/output /tmp/load.output; exit 1; }
grep -q '^/dev/vda /mnt ext4 rw' /proc/mounts || { cat /proc/mounts; exit 1; }
! dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|emount|blocked for more' || exit 1
"#;

/// Everything that writes comes to its end.
const REST: &str = r#"touch /tmp/enough
until [ -e /tmp/rests ] && [ -e /tmp/load.rests ] || [ -e /tmp/bad ]; do sleep 0.1; done"#;

/// The file system is whole, and every file has the last of its checksums.
const COMPARE: &str = r#"umount /mnt
e2fsck -fn /dev/vda
mount /dev/vda /mnt
tac /mnt/log | awk '!seen[$2]++' >/tmp/sums && [ $(wc -l </tmp/sums) -gt 5 ]
sha256sum -c /tmp/sums >/tmp/result || { grep -v OK /tmp/result; exit 1; }
umount /mnt"#;

/// How many files were written so far.
fn written(guest: &mut Guest) -> u64 {
    let text = guest.run(&format!("{WELL}cat /tmp/written"), SHORT).unwrap();
    text.trim().parse().unwrap()
}

/// The guest works on: it has written another file.
fn goes_on(guest: &mut Guest) {
    let before = written(guest);
    e2e::poll(SHORT, "the guest to write", || Ok((written(guest) > before).then_some(()))).unwrap();
}

/// Times up to [`MOMENT`], from [`e2e::seed`].
fn moments() -> impl Iterator<Item = Duration> {
    let mut state = e2e::seed();
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros((state >> 33) % MOMENT.as_micros() as u64)
    })
}

fn serve(folder: &Path) -> Target {
    // What the embedded controller has acknowledged is in its file, which survives: as with a drive that has no cache.
    let device = format!("sim:256M,file={}", folder.join("disk.img").display());
    let socket = folder.join("disk.sock");
    let arguments = ["--device", &device, "--socket-path", &socket.display().to_string()];
    Target::vhost_blk(folder, &arguments, vec![socket.clone()]).unwrap()
}

fn with_disk(machine: Machine, folder: &Path, properties: &str) -> Machine {
    let socket = format!("socket,id=back,path={},reconnect-ms=50", folder.join("disk.sock").display());
    let device = format!("vhost-user-blk-pci,chardev=back,num-queues=2{properties}");
    machine.arguments(&["-chardev", &socket, "-device", &device])
}

fn a_target_is_killed_under_a_guest(properties: &str) {
    let folder = folder();
    let mut target = serve(folder.path());
    let mut guest = with_disk(machine(), folder.path(), properties).boot(folder.path()).unwrap();
    guest.run(WRITE, LONG).unwrap();
    for (kill, moment) in moments().take(KILLS).enumerate() {
        // Every third time before the new target can have done much, else somewhere in the guest's work.
        if kill % 3 != 0 {
            goes_on(&mut guest);
        }
        std::thread::sleep(moment);
        target.process().signal("KILL").unwrap();
        target.process().wait(SHORT).unwrap();
        target = serve(folder.path());
    }
    goes_on(&mut guest);
    guest.run(&format!("set -e\n{REST}\n{WELL}\n{COMPARE}"), LONG).unwrap();
    guest.power_off(SHORT).unwrap();
    let log = target.stop().unwrap();
    assert_eq!(crate::Totals::of(&log).get("errors"), 0, "{log}");
}

#[test]
fn a_target_is_killed_under_a_guest_with_split_rings() {
    a_target_is_killed_under_a_guest("");
}

#[test]
fn a_target_is_killed_under_a_guest_with_packed_rings() {
    a_target_is_killed_under_a_guest(",packed=on");
}
