//! The whole path: a drive bound by setup.sh, exported, and used by a guest inside the machine.

use std::path::Path;

use e2e::{Initramfs, Kernel, Lab, LabDrive, Machine, vhost_blk_program};

use super::{LONG, SHORT, folder, on_each_kernel};

/// Functions for a script that runs a guest inside the machine: QEMU's arguments are in `arguments`, its files in `folder`.
const INNER: &str = r#"
set -e
start() {
    coproc QEMU { exec qemu-system-x86_64 "${arguments[@]}"; }
    qemu=$QEMU_PID
    await '@ready '
}
# Waits for a line that begins so; prints all up to it.
await() {
    local line
    while read -t 300 -r line <&"${QEMU[0]}"; do
        printf 'guest: %s\n' "$line"
        case $line in "$1"*) return ;; "@end "*) break ;; esac
    done
    echo "no line '$1' within 300 s, but another end, or that of QEMU"
    cat "$folder/console.log" /run/target.log
    exit 1
}
# Runs the script on standard input in the guest.
inside() {
    printf '1 %s\n' "$(base64 -w0)" >&"${QEMU[1]}"
    await '@end 1 0'
}
"#;

/// Files in a new file system, synced; then one that grows on.
const FILL: &str = r#"
start
inside <<'END'
    set -e
    mkfs.ext4 -q -E nodiscard /dev/vda
    mount /dev/vda /mnt
    cd /mnt
    for i in $(seq 20); do head -c ${i}001 /dev/urandom >$i; done
    head -c 300000 /dev/urandom >large
    sha256sum [0-9]* large >/tmp/sums
    cp /tmp/sums sums
    sync
    while :; do echo more; done >unsynced 2>/dev/null &
END
kill -9 $qemu
wait $qemu || [ $? = 137 ]
"#;

const CHECK: &str = r#"
start
inside <<'END'
    set -e
    mount /dev/vda /mnt
    cd /mnt
    [ $(wc -l <sums) = 21 ]
    sha256sum -c sums
    cd /
    umount /mnt
    e2fsck -fn /dev/vda
END
printf '2 %s\n' "$(echo poweroff -f | base64)" >&"${QEMU[1]}"
wait $qemu
"#;

/// Emulation inside emulation takes minutes: `tests/run.sh` leaves this to one kernel, `tests/lab.sh nested` does both.
///
/// A guest with its memory in hugepages makes a file system, writes, syncs and is cut off; the next one finds its files, and
/// so does the kernel's own driver in the end.
fn files_survive_a_guest_that_is_cut_off(kernel: &Kernel) {
    let folder = folder();
    let inner_folder = folder.path().join("inner");
    std::fs::create_dir(&inner_folder).unwrap();
    // Emulation inside emulation is slow: the small kernel, where it is there, takes half as long to start.
    let inner_kernel = Kernel::iommufd().or_else(|_| Kernel::stable()).unwrap();
    let initramfs = Initramfs::small(&inner_kernel).program("mkfs.ext4").program("e2fsck").module("ext4");
    let machine = Machine::new(&inner_kernel, &initramfs).memory_mib(192).cpus(1);
    let machine = machine.on_hugepages().disk(Path::new("/run/disk.sock"), "num-queues=1");
    let arguments = machine.prepare(&inner_folder).unwrap();
    let arguments = arguments.iter().map(|argument| format!("'{argument}'")).collect::<Vec<_>>().join(" ");
    let functions = format!("folder={}; arguments=({arguments})\n{INNER}", inner_folder.display());

    let lab = Lab::new(kernel).memory_mib(1536).drive(LabDrive::new("d0").size_mib(128));
    let mut guest = lab.boot(folder.path()).unwrap();
    let setup = format!(
        "set -e; cd {}; setup/setup.sh hugepages 256M; setup/setup.sh bind 0000:00:04.0",
        Lab::project().display()
    );
    guest.run(&setup, SHORT).unwrap();
    let target = format!(
        "RUST_LOG=info {} --device 0000:00:04.0 --socket-path /run/disk.sock >/run/target.log 2>&1 & echo $! >/run/target.pid
        for _ in $(seq 600); do [ -S /run/disk.sock ] && exit; sleep 0.1; done; cat /run/target.log; exit 1",
        vhost_blk_program().unwrap().display()
    );
    guest.run(&target, SHORT).unwrap();
    guest.run(&format!("{functions}{FILL}"), LONG * 2).unwrap();
    guest.run(&format!("{functions}{CHECK}"), LONG * 2).unwrap();
    let stop = "set -e; pid=$(cat /run/target.pid); kill $pid; for _ in $(seq 600); do [ -e /proc/$pid ] || break; sleep 0.1; done
        ! [ -e /proc/$pid ]; cat /run/target.log";
    let log = guest.run(stop, SHORT).unwrap();
    assert!(log.contains("stopping") && !log.contains("panicked"), "{log}");

    let give_back = format!(
        "set -e; cd {}; setup/setup.sh undo; [ $(cat /proc/sys/vm/nr_hugepages) = 0 ]",
        Lab::project().display()
    );
    guest.run(&give_back, SHORT).unwrap();
    let read = "set -e; for _ in $(seq 600); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done
        mount -o ro /dev/nvme0n1 /mnt; cd /mnt; sha256sum -c sums >/dev/null; wc -l <sums";
    assert_eq!(guest.run(read, SHORT).unwrap().trim(), "21");
    guest.power_off(SHORT).unwrap();
}

on_each_kernel!(files_survive_a_guest_that_is_cut_off);
