//! Guest memory that comes and goes while the disk is in use.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::{Qmp, Target};
use serde_json::json;

use crate::{LONG, SHORT, folder, machine, stop};

/// Memory is added under a running disk; then more data than the first memory could hold is read from the disk into
/// memory, so the drive has written into what was added, and is written from there to another place of the disk. At
/// last the guest gives the added memory back.
#[test]
fn memory_comes_and_goes_while_the_disk_is_busy() {
    const MIB: usize = 160;
    let folder = folder();
    let image = folder.path().join("disk.img");
    let mut data = vec![0; MIB << 20];
    File::open("/dev/urandom").unwrap().read_exact(&mut data).unwrap();
    std::fs::write(&image, &data).unwrap();
    // As long as the disk is: the target takes no other.
    File::options().write(true).open(&image).unwrap().set_len(512 << 20).unwrap();
    let target = Target::serve_disk(folder.path(), 512, 512, &[]).unwrap();
    let machine = machine().memory_mib(192).memory_slots().append("memhp_default_state=online_movable");
    let mut guest = machine.disk(target.socket(), "num-queues=2").boot(folder.path()).unwrap();
    let busy = "(until [ -e /tmp/enough ]; do
                    dd if=/dev/vda of=/dev/null bs=64k count=512 iflag=direct || touch /tmp/bad
                done; touch /tmp/rests) >/tmp/busy 2>&1 &
                until [ -s /tmp/busy ]; do sleep 0.1; done";
    guest.run(busy, SHORT).unwrap();
    let before = total_mib(&mut guest);
    assert!(before < MIB as u64, "{before} MiB would hold the data without any added memory");
    let mut monitor = guest.monitor().unwrap();
    for number in 0..3 {
        let memory = format!("more{number}");
        let backend = json!({ "qom-type": "memory-backend-memfd", "id": memory, "size": 256 << 20, "share": true });
        monitor.execute("object-add", backend).unwrap();
        let module = json!({ "driver": "pc-dimm", "id": format!("dimm{number}"), "memdev": memory });
        monitor.execute("device_add", module).unwrap();
    }
    let online = format!(
        "until [ $(awk '/MemTotal/ {{ print int($2 / 1024) }}' /proc/meminfo) -ge {} ]; do sleep 0.2; done",
        before + 3 * 256 * 9 / 10
    );
    guest.run(&online, SHORT).unwrap();
    assert_eq!(modules(&mut monitor), 3);
    let read = format!(
        "set -eo pipefail
         mkdir /big && mount -t tmpfs -o size=600m tmpfs /big
         dd if=/dev/vda of=/big/data iflag=direct,fullblock bs=1M count={MIB} 2>/dev/null
         sha256sum </big/data
         dd if=/big/data of=/dev/vda oflag=direct,seek_bytes seek=300M bs=1M conv=fsync 2>/dev/null"
    );
    let sum = guest.run(&read, LONG).unwrap();
    assert_eq!(sum.split_whitespace().next(), sha256(&image, 0, MIB).split_whitespace().next());

    guest.run("umount /big", SHORT).unwrap();
    for number in 0..3 {
        let deadline = Instant::now() + LONG;
        let mut asked = None;
        while modules(&mut monitor) > 2 - number {
            assert!(Instant::now() < deadline, "the guest does not let go of its memory");
            // The guest refuses while it cannot move a page, which a request under way may hold; it is asked again then.
            if asked.is_none_or(|asked: Instant| asked.elapsed() > Duration::from_secs(2)) {
                asked = Some(Instant::now());
                // An error means that the last attempt is not over.
                let _ = monitor.execute("device_del", json!({ "id": format!("dimm{number}") }));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    assert!(total_mib(&mut guest) <= before);
    guest.run("dd if=/dev/vda of=/dev/null iflag=direct bs=1M count=100", SHORT).unwrap();
    // A kernel that powers off stops its devices under the requests on their way, and calls that an I/O error.
    guest.run("touch /tmp/enough; until [ -e /tmp/rests ]; do sleep 0.1; done", SHORT).unwrap();
    assert_eq!(guest.try_run("ls /tmp/bad", SHORT).unwrap().status, 1, "the reads in the background all went well");
    guest.power_off(SHORT).unwrap();
    stop(target);
    assert_eq!(sha256(&image, 300, MIB), sha256(&image, 0, MIB));
}

fn sha256(file: &Path, skip_mib: usize, mib: usize) -> String {
    let script = "dd if=\"$1\" bs=1M skip=\"$2\" count=\"$3\" 2>/dev/null | sha256sum";
    let numbers = [skip_mib.to_string(), mib.to_string()];
    let output = Command::new("sh").args(["-c", script, "sh"]).arg(file).args(numbers).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// How many memory modules are plugged in, the first memory not counted.
fn modules(monitor: &mut Qmp) -> usize {
    monitor.execute("query-memory-devices", json!({})).unwrap().as_array().unwrap().len()
}

fn total_mib(guest: &mut e2e::Guest) -> u64 {
    let text = guest.run("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo", SHORT).unwrap();
    text.trim().parse().unwrap()
}
