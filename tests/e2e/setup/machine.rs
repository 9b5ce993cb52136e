//! A made-up machine: a folder with `/sys`, `/proc`, `/dev`, `/run` and `/etc` for `setup.sh`, stand-ins for the commands
//! that it calls, and a thread that does what a kernel does when its files are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::workspace;
use serde_json::Value;
use tempfile::TempDir;

use crate::kernel::{Behaviour, Kernel};

/// How long one run of the script may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) struct Machine {
    folder: TempDir,
    kernel: Option<Kernel>,
    number: u32,
}

/// What the script printed, and its status.
#[derive(Debug)]
pub(crate) struct Output {
    /// `None` if it was killed.
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Output {
    #[track_caller]
    pub(crate) fn succeeded(self) -> Output {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }

    /// It failed, and says all of these.
    #[track_caller]
    pub(crate) fn refused(self, parts: &[&str]) -> Output {
        assert_eq!(self.status, Some(1), "{self:?}");
        for part in parts {
            assert!(self.err.contains(part) || self.out.contains(part), "{part:?} is not in {self:?}");
        }
        self
    }

    #[track_caller]
    pub(crate) fn says(self, part: &str) -> Output {
        assert!(self.out.contains(part) || self.err.contains(part), "{part:?} is not in {self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Everything below a folder: kind, permissions, owner and contents of each file.
pub(crate) type Snapshot = BTreeMap<PathBuf, String>;

const MODPROBE: &str = r#"echo "modprobe $*" >>"$SETUP_ROOT/../commands"
drivers=$SETUP_ROOT/sys/bus/pci/drivers module=$SETUP_ROOT/sys/module
case "$*" in
    '-n -q '*) [ ! -e "$SETUP_ROOT/../no-vfio" ] ;;
    vfio-pci) mkdir -p "$drivers/vfio-pci" "$module/vfio_pci"; : >"$drivers/vfio-pci/bind"; : >"$drivers/vfio-pci/unbind" ;;
    vfio_iommu_type1) mkdir -p "$module/vfio_iommu_type1" ;;
    '-r -- vfio-pci') rm -r "$drivers/vfio-pci" "$module/vfio_pci" ;;
    '-r -- vfio_iommu_type1') rmdir "$module/vfio_iommu_type1" ;;
    *) exit 1 ;;
esac
"#;

const MOUNT: &str = r#"echo "mount $*" >>"$SETUP_ROOT/../commands"
[ "$1 $2 $3 $5" = '-t hugetlbfs -o vhost-blk' ] || exit 1
[ -d "$6" ] || exit 1
echo "99 1 0:99 / ${6#"$SETUP_ROOT"} rw,relatime - hugetlbfs vhost-blk rw,$4" >>"$SETUP_ROOT/proc/self/mountinfo"
"#;

const UMOUNT: &str = r#"[ ! -e "$SETUP_ROOT/../busy" ] || { echo 'umount: target is busy'; exit 32; }
grep -v " ${2#"$SETUP_ROOT"} " "$SETUP_ROOT/proc/self/mountinfo" >"$SETUP_ROOT/../mountinfo"
cat "$SETUP_ROOT/../mountinfo" >"$SETUP_ROOT/proc/self/mountinfo"
"#;

const OTHERS: &str = r#"[ "$1" = show ] || echo "${0##*/} $*" >>"$SETUP_ROOT/../commands"
"#;

const MEMINFO: &str = "MemTotal:       8388608 kB\nMemFree:        6291456 kB\nMemAvailable:   6291456 kB\n";
const ROOT_MOUNT: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n";

impl Machine {
    /// A machine with two NUMA nodes, an IOMMU and no drive. vfio-pci can be loaded.
    pub(crate) fn new() -> Machine {
        Machine::with(Behaviour::default())
    }

    /// A machine with two NUMA nodes, an IOMMU, no drive, and a kernel that behaves in this way.
    pub(crate) fn with(behaviour: Behaviour) -> Machine {
        let user = Command::new("id").arg("-u").output().unwrap();
        assert_eq!(user.stdout, b"0\n", "these tests are for root, as tests/run.sh is");
        let folder = tempfile::Builder::new().prefix("a machine ").tempdir().unwrap();
        let mut machine = Machine { folder, kernel: None, number: 0 };
        let commands = [("modprobe", MODPROBE), ("mount", MOUNT), ("umount", UMOUNT)];
        let others = ["systemctl", "dmesg", "udevadm"].map(|name| (name, OTHERS));
        for (name, text) in commands.into_iter().chain(others) {
            machine.command(name, text);
        }
        let root = machine.root();
        for path in
            ["sys/bus/pci/devices", "sys/module", "dev/vfio", "run/systemd/system", "etc/security", "dev/hugepages"]
        {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        machine.write("sys/bus/pci/drivers/nvme/bind", "");
        machine.write("sys/bus/pci/drivers/nvme/unbind", "");
        machine.write("sys/module/nvme/refcnt", "1\n");
        machine.write("proc/self/mountinfo", ROOT_MOUNT);
        machine.write("proc/swaps", "Filename\t\t\tType\t\tSize\tUsed\tPriority\n");
        machine.write("proc/meminfo", MEMINFO);
        machine.write("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n");
        machine.write("proc/cmdline", "root=/dev/sda1 intel_iommu=on\n");
        machine.write("proc/interrupts", "  24:   5   IR-PCI-MSI  nvme0q0\n");
        for pool in ["kernel/mm", "devices/system/node/node0", "devices/system/node/node1"] {
            for size in ["2048kB", behaviour.larger_page] {
                machine.write(&format!("sys/{pool}/hugepages/hugepages-{size}/nr_hugepages"), "0\n");
                machine.write(&format!("sys/{pool}/hugepages/hugepages-{size}/free_hugepages"), "0\n");
            }
        }
        machine.write("sys/devices/system/node/node0/cpulist", "0-3\n");
        machine.write("sys/devices/system/node/node1/cpulist", "4-7\n");
        machine.kernel = Some(Kernel::start(root, behaviour));
        machine
    }

    fn kernel(&self) -> &Kernel {
        self.kernel.as_ref().expect("it is started with the machine")
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn append(&self, path: &str, text: &str) {
        let old = self.read(path);
        self.write(path, &(old + text));
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// A file beside the tree, for the stand-ins.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A stand-in for a command.
    pub(crate) fn command(&self, name: &str, script: &str) {
        let path = self.beside("bin").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The real kernel does what is written to it before a write ends; this one takes a while. The script reads with `cat`
    /// what has become of its writes.
    pub(crate) fn cat_waits_for_the_kernel(&self) {
        let wait =
            r#": >"$SETUP_ROOT/../wait"; while [ -e "$SETUP_ROOT/../wait" ]; do sleep 0.002; done; exec /bin/cat "$@""#;
        self.command("cat", wait);
    }

    /// The commands that would have changed the real machine, so far.
    pub(crate) fn commands(&self) -> String {
        fs::read_to_string(self.beside("commands")).unwrap_or_default()
    }

    /// From now on, of the real commands in /bin only these are found.
    pub(crate) fn only_commands(&self, names: &[&str]) {
        for name in names {
            let output = Command::new("which").arg(name).output().unwrap();
            let real = String::from_utf8(output.stdout).unwrap();
            let place = self.beside("bin").join(name);
            if !place.exists() {
                symlink(real.trim(), place).unwrap();
            }
        }
        fs::write(self.beside("only"), "").unwrap();
    }

    /// A PCI function.
    pub(crate) fn function(&self, address: &str, class: &str, driver: Option<&str>, group: u32) {
        let device = format!("sys/devices/pci0000:00/{address}");
        self.write(&format!("{device}/class"), &format!("{class}\n"));
        self.write(&format!("{device}/vendor"), "0x1b36\n");
        self.write(&format!("{device}/device"), "0x0010\n");
        self.write(&format!("{device}/numa_node"), "1\n");
        self.write(&format!("{device}/driver_override"), "(null)\n");
        self.link(&format!("sys/bus/pci/devices/{address}"), &format!("../../../devices/pci0000:00/{address}"));
        self.link(&format!("{device}/iommu_group"), &format!("../../../kernel/iommu_groups/{group}"));
        self.link(
            &format!("sys/kernel/iommu_groups/{group}/devices/{address}"),
            &format!("../../../../devices/pci0000:00/{address}"),
        );
        if let Some(driver) = driver {
            self.link(&format!("{device}/driver"), &format!("../../../bus/pci/drivers/{driver}"));
            self.link(
                &format!("sys/bus/pci/drivers/{driver}/{address}"),
                &format!("../../../../devices/pci0000:00/{address}"),
            );
        }
    }

    /// An NVMe drive with the kernel's driver: a controller (`nvme0`) and a namespace (`nvme0n1`) full of zeroes.
    /// Returns the controller's folder.
    pub(crate) fn drive(&mut self, address: &str, controller: &str, group: u32) -> String {
        self.function(address, "0x010802", Some("nvme"), group);
        let folder = format!("sys/devices/pci0000:00/{address}/nvme/{controller}");
        self.write(&format!("{folder}/state"), "live\n");
        self.write(&format!("{folder}/serial"), &format!("{:20}\n", format!("S-{controller}")));
        self.write(&format!("{folder}/model"), "A \"good\" drive \\ one\n");
        self.number += 1;
        self.write(&format!("{folder}/dev"), &format!("240:{}\n", self.number));
        let name = format!("{controller}n1");
        self.disk(&format!("{folder}/{name}"));
        folder
    }

    /// A disk, or a partition, in this folder of sysfs.
    pub(crate) fn disk(&mut self, folder: &str) {
        self.number += 1;
        let name = folder.rsplit('/').next().unwrap();
        self.write(&format!("{folder}/dev"), &format!("259:{}\n", self.number));
        self.write(&format!("{folder}/size"), "4096\n");
        fs::create_dir_all(self.path(&format!("{folder}/holders"))).unwrap();
        fs::write(self.path(&format!("dev/{name}")), vec![0; 2 << 20]).unwrap();
    }

    pub(crate) fn partition(&mut self, disk: &str, number: u32) -> String {
        let folder = format!("{disk}/{}p{number}", disk.rsplit('/').next().unwrap());
        self.disk(&folder);
        self.write(&format!("{folder}/partition"), &format!("{number}\n"));
        folder
    }

    /// The number (259:1) of a disk.
    pub(crate) fn number_of(&self, folder: &str) -> String {
        self.read(&format!("{folder}/dev")).trim().to_owned()
    }

    /// A process with an open file.
    pub(crate) fn process(&self, id: u32, name: &str, file: &str) {
        self.write(&format!("proc/{id}/comm"), &format!("{name}\n"));
        self.write(&format!("proc/{id}/mountinfo"), "");
        self.link(&format!("proc/{id}/fd/5"), file);
    }

    pub(crate) fn driver_of(&self, address: &str) -> Option<String> {
        let link = fs::read_link(self.path(&format!("sys/bus/pci/devices/{address}/driver"))).ok()?;
        Some(link.file_name().unwrap().to_str().unwrap().to_owned())
    }

    /// Runs the script with these words.
    #[track_caller]
    pub(crate) fn run(&self, words: &str) -> Output {
        let words: Vec<_> = words.split_whitespace().collect();
        let mut command = Command::new(workspace().join("setup/setup.sh"));
        let bin = self.beside("bin");
        let path = match self.beside("only").exists() {
            true => bin.display().to_string(),
            false => format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display()),
        };
        let command = command.args(words).env_clear().env("SETUP_ROOT", self.root()).env("PATH", path);
        let (out, err) = (self.beside("out"), self.beside("err"));
        let create = |path: &Path| Stdio::from(fs::File::create(path).unwrap());
        let mut child =
            command.stdin(Stdio::null()).stdout(create(&out)).stderr(create(&err)).current_dir("/").spawn().unwrap();
        self.kernel().script_is(child.id());
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("the script hangs: {}{}", fs::read_to_string(&out).unwrap(), fs::read_to_string(&err).unwrap());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.kernel().settle();
        let read = |path: &Path| String::from_utf8(fs::read(path).unwrap()).unwrap();
        Output { status: status.code(), out: read(&out), err: read(&err) }
    }

    /// Changes what the kernel does from now on.
    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        self.kernel().behave(change);
    }

    /// Everything there is, except the lock that a run leaves.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut all = Snapshot::new();
        let root = self.root();
        collect(&root, &root, &mut all);
        let own = Path::new("run/vhost-blk-setup");
        all.remove(&own.join("lock"));
        if !all.keys().any(|path| path.starts_with(own) && path != own) {
            all.remove(own);
        }
        all
    }

    /// Runs the script, which has to be refused for these reasons and leave everything as it is, forced or not.
    #[track_caller]
    pub(crate) fn is_refused(&self, words: &str, parts: &[&str]) {
        let (before, commands) = (self.snapshot(), self.changing_commands());
        self.run(words).refused(parts);
        self.run(&format!("{words} --dry-run")).refused(parts);
        if words.starts_with("bind") {
            self.run(&format!("{words} --force")).refused(parts);
        }
        let output = self.run(&format!("{words} --json"));
        let json = output.json();
        assert_eq!(json["exit"], 1, "{json}");
        assert!(json["steps"].as_array().unwrap().iter().any(|step| step["kind"] == "refused"), "{json}");
        same(&before, &self.snapshot());
        assert_eq!(self.changing_commands(), commands, "nothing was to be run");
    }

    /// The commands that change something.
    fn changing_commands(&self) -> String {
        let harmless = |line: &&str| !line.starts_with("modprobe -n") && !line.starts_with("dmesg");
        self.commands().lines().filter(harmless).collect()
    }
}

fn collect(root: &Path, folder: &Path, all: &mut Snapshot) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let contents = if metadata.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if metadata.is_dir() {
            collect(root, &path, all);
            String::new()
        } else {
            String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned()
        };
        let name = path.strip_prefix(root).unwrap().to_owned();
        all.insert(name, format!("{:o} {} {contents}", metadata.mode(), metadata.uid()));
    }
}

/// Fails with what differs.
#[track_caller]
pub(crate) fn same(before: &Snapshot, after: &Snapshot) {
    let paths: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let differ: Vec<_> = paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| format!("{}: {:?} then {:?}", path.display(), before.get(path), after.get(path)))
        .collect();
    assert!(differ.is_empty(), "changed:\n{}", differ.join("\n"));
}
