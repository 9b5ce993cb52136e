//! A namespace that is resized while a guest uses its disk.

use e2e::Target;
use nvme_sim::{Config, NamespaceConfig, Simulator};

use crate::{LONG, SHORT, folder, machine};

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_grows_and_shrinks_under_a_guest() {
    // A matter between this target and its drive.
    if crate::on_peer() {
        return;
    }
    let folder = folder();
    let namespace = NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() };
    let config = Config { namespaces: vec![namespace], ..Config::default() };
    let simulator = Simulator::start(config, &folder.path().join("nvme.sock")).unwrap();
    let (device, socket) = (format!("vfio-user:{}", simulator.socket().display()), folder.path().join("disk.sock"));
    let arguments = ["--device", &device, "--socket-path", &socket.display().to_string()];
    let target = Target::vhost_blk(folder.path(), &arguments, vec![socket.clone()]).unwrap();
    let mut guest = machine().disk(target.socket(), "num-queues=2").boot(folder.path()).unwrap();
    guest.run("[ $(cat /sys/block/vda/size) = 131072 ] && mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt", LONG).unwrap();
    let has_size = |mib: u64| {
        let sectors = mib * MIB / 512;
        format!(
            "i=0; until [ $(cat /sys/block/vda/size) = {sectors} ]; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done"
        )
    };
    simulator.resize(1, 160 * MIB).unwrap();
    guest.run(&has_size(160), SHORT).unwrap();
    // More than would have fitted, and all of it on the disk.
    let fill = "set -e; resize2fs /dev/vda
        dd if=/dev/urandom of=/mnt/file bs=1M count=100 conv=fsync 2>/dev/null; sha256sum /mnt/file >/tmp/sum
        echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /tmp/sum; rm /mnt/file; umount /mnt; e2fsck -fn /dev/vda";
    guest.run(fill, LONG).unwrap();
    simulator.resize(1, 96 * MIB).unwrap();
    guest.run(&has_size(96), SHORT).unwrap();
    let edges = "set -e; dd if=/dev/zero of=/dev/vda bs=1M seek=95 count=1 oflag=direct
        ! dd if=/dev/zero of=/dev/vda bs=1M seek=96 count=1 oflag=direct";
    guest.run(edges, SHORT).unwrap();
    guest.power_off(SHORT).unwrap();
    let log = target.stop().unwrap();
    assert_eq!(log.matches("the front-end was told of the new size").count(), 2, "{log}");
    assert_eq!(crate::Totals::of(&log).get("errors"), 0, "{log}");
}
