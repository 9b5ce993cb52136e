//! A target that is killed under a guest, and started again: the guest notices nothing but a pause.

use std::path::Path;

use e2e::{Guest, Machine, Target};

use crate::{LONG, SHORT, folder, machine};

const KILLS: usize = 5;

/// Writes files with their checksums, each made durable before its line in `/mnt/sums`; ends with the first error.
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
    echo $i >/tmp/written
done
touch /tmp/rests
END
(bash /tmp/write || touch /tmp/bad) >/tmp/output 2>&1 &
until [ -s /tmp/written ]; do sleep 0.05; done"#;

/// How many files were written so far.
fn written(guest: &mut Guest) -> u64 {
    let text = guest.run("[ ! -e /tmp/bad ] || { cat /tmp/output; exit 1; }; cat /tmp/written", SHORT).unwrap();
    text.trim().parse().unwrap()
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
    for kill in 0..KILLS {
        let before = written(&mut guest);
        // At another point of the guest's work each time: some files later, and then somewhere in a file.
        e2e::poll(SHORT, "the guest to write", || Ok((written(&mut guest) > before + 1 + kill as u64).then_some(())))
            .unwrap();
        target.process().signal("KILL").unwrap();
        target.process().wait(SHORT).unwrap();
        target = serve(folder.path());
        let before = written(&mut guest);
        e2e::poll(SHORT, "the guest to go on", || Ok((written(&mut guest) > before + 1).then_some(()))).unwrap();
    }
    let script = r#"touch /tmp/enough; until [ -e /tmp/rests ] || [ -e /tmp/bad ]; do sleep 0.1; done; [ ! -e /tmp/bad ]
        umount /mnt && e2fsck -fn /dev/vda && mount /dev/vda /mnt
        tac /mnt/log | awk '!seen[$2]++' >/tmp/sums && [ $(wc -l </tmp/sums) -gt 5 ]
        sha256sum -c /tmp/sums >/tmp/result || { grep -v OK /tmp/result; exit 1; }
        umount /mnt"#;
    guest.run(&format!("set -e\n{script}"), LONG).unwrap();
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
