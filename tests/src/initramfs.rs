use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, build_dir, workspace};

const RUN_TESTS: &str = "run tests/run.sh once, which fetches and builds what the tests need";

/// A Linux kernel for guests.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel's image.
    pub image: PathBuf,
    /// The folder with `modules.dep`; `None` for a kernel that has everything built in.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// Debian's own kernel, or the one that the environment's `GUEST_KERNEL` names (an image; its modules in
    /// `GUEST_MODULES`, the folder with `modules.dep`, unless it has everything built in).
    pub fn stable() -> Result<Kernel, Error> {
        match std::env::var_os("GUEST_KERNEL") {
            Some(image) => {
                Ok(Kernel { image: image.into(), modules: std::env::var_os("GUEST_MODULES").map(PathBuf::from) })
            }
            None => Kernel::unpacked("stable"),
        }
    }

    /// The newer kernel from Debian's backports.
    pub fn backports() -> Result<Kernel, Error> {
        Kernel::unpacked("backports")
    }

    /// The kernel that the host runs, as Linux distributions install it.
    pub fn of_the_host() -> Result<Kernel, Error> {
        let release = read_text(Path::new("/proc/sys/kernel/osrelease"))?;
        let image = Path::new("/boot").join(format!("vmlinuz-{}", release.trim()));
        let modules = Some(Path::new("/lib/modules").join(release.trim()));
        if image.exists() {
            Ok(Kernel { image, modules })
        } else {
            let advice = "name a kernel for the guests, and the folder with its modules.dep";
            Err(Error::Missing { what: "the host's own kernel", path: image, advice })
        }
    }

    /// Debian's own kernel with all its drivers, for the lab: VFIO with groups and containers. `LAB_KERNEL_GROUP` of the
    /// environment names another one.
    pub fn lab_stable() -> Result<Kernel, Error> {
        match std::env::var_os("LAB_KERNEL_GROUP") {
            Some(image) => Ok(Kernel::at(Path::new(&image))),
            None => Kernel::unpacked("lab-stable"),
        }
    }

    /// The kernel from Debian's backports with all its drivers, for the lab: VFIO with groups and containers.
    pub fn lab_backports() -> Result<Kernel, Error> {
        Kernel::unpacked("lab-backports")
    }

    /// A kernel with iommufd and its device files, which no Debian kernel has. It is looked for at `LAB_KERNEL_IOMMUFD`
    /// of the environment, in `shared/lab` beside the repository, and where `tests/kernel/build.sh` puts it.
    pub fn iommufd() -> Result<Kernel, Error> {
        let built = build_dir().join("guest/iommufd/bzImage");
        let places = match std::env::var_os("LAB_KERNEL_IOMMUFD") {
            Some(image) => vec![PathBuf::from(image)],
            None => vec![workspace().join("../shared/lab/bzImage-iommufd"), built.clone()],
        };
        match places.iter().find(|place| place.exists()) {
            Some(image) => Ok(Kernel::at(image)),
            None => Err(Error::Missing {
                what: "a kernel with iommufd",
                path: places.into_iter().next_back().unwrap_or(built),
                advice: "build one with tests/kernel/build.sh, or name one in the environment's LAB_KERNEL_IOMMUFD",
            }),
        }
    }

    /// The kernel in this file. Its modules are taken from the folder `modules` beside it, or for a file
    /// `vmlinuz-VERSION` from `/lib/modules/VERSION`; where neither is there, it has everything built in.
    pub fn at(image: &Path) -> Kernel {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let installed = name.strip_prefix("vmlinuz-").map(|version| Path::new("/lib/modules").join(version));
        let modules = std::iter::once(image.with_file_name("modules")).chain(installed);
        Kernel {
            image: image.to_path_buf(),
            modules: modules.into_iter().find(|folder| folder.join("modules.dep").exists()),
        }
    }

    fn unpacked(flavour: &str) -> Result<Kernel, Error> {
        let folder = build_dir().join("guest").join(flavour);
        let kernel = Kernel { image: folder.join("vmlinuz"), modules: Some(folder.join("modules")) };
        if kernel.image.exists() {
            Ok(kernel)
        } else {
            Err(Error::Missing { what: "a kernel for the guests", path: kernel.image, advice: RUN_TESTS })
        }
    }

    /// The files of the modules that `names` need, in the order in which they have to be loaded. Names of modules
    /// that the kernel has built in are left out.
    fn module_files(&self, names: &[String]) -> Result<Vec<PathBuf>, Error> {
        let Some(folder) = &self.modules else { return Ok(Vec::new()) };
        let dependencies = read_text(&folder.join("modules.dep"))?;
        let built_in = read_text(&folder.join("modules.builtin"))?;
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let entry = dependencies.lines().filter_map(|line| line.split_once(':')).find(|e| is_module(e.0, name));
            match entry {
                // The list names the module needed first last.
                Some((file, needed)) => {
                    for file in needed.split_whitespace().rev().chain([file]) {
                        let file = folder.join(file);
                        if !files.contains(&file) {
                            files.push(file);
                        }
                    }
                }
                None if built_in.lines().any(|line| is_module(line, name)) => {}
                None => return Err(Error::Initramfs(format!("{} has no module {name}", folder.display()))),
            }
        }
        Ok(files)
    }
}

fn is_module(file: &str, name: &str) -> bool {
    let file = file.rsplit('/').next().unwrap_or(file);
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|&ending| file.strip_suffix(ending));
    stem.is_some_and(|stem| stem.replace('-', "_") == name.replace('-', "_"))
}

/// The name of a module's file once it is unpacked, written as in parameters on the kernel's command line.
fn module_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
    name.split('.').next().unwrap_or_default().to_owned() + ".ko"
}

/// A module as the kernel takes it from any loader: unpacked.
fn read_module(path: &Path) -> Result<Vec<u8>, Error> {
    let unpacker = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return read(path),
    };
    let output = Command::new(unpacker).arg("-dc").arg(path).output();
    let output = output.map_err(Error::doing(format!("running {unpacker} to unpack {}", path.display())))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Initramfs(format!("{unpacker} cannot unpack {}: {why}", path.display())))
    }
}

/// What a guest has in its memory when it starts: busybox, the kernel modules and host programs that were asked
/// for, and an `/init` that runs the scripts which [`crate::Guest`] sends.
#[derive(Clone, Debug)]
pub struct Initramfs {
    kernel: Kernel,
    modules: Vec<String>,
    programs: Vec<PathBuf>,
    files: Vec<(String, PathBuf)>,
    root: Root,
}

/// What the scripts see as their file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    Initramfs,
    Host,
}

impl Initramfs {
    /// With the modules for virtio block devices, the host's programs to make and check ext4, and some whose
    /// namesakes in busybox do less: its `dd` silently gives up direct I/O where that fails. Its shell takes its own
    /// programs before any in `PATH`, so scripts are run by `bash`.
    pub fn new(kernel: &Kernel) -> Initramfs {
        let mut initramfs = Initramfs::small(kernel);
        initramfs
            .programs
            .extend(["mkfs.ext4", "e2fsck", "resize2fs", "blkdiscard", "dd", "head", "cmp"].map(PathBuf::from));
        initramfs
    }

    /// With the modules for virtio block devices, and no program but busybox and `bash`.
    pub fn small(kernel: &Kernel) -> Initramfs {
        let modules = ["virtio_pci", "virtio_blk"].map(str::to_owned).to_vec();
        let programs = vec!["bash".into()];
        Initramfs { kernel: kernel.clone(), modules, programs, files: Vec::new(), root: Root::Initramfs }
    }

    /// Changes over to the file system of the host, which QEMU shares as the 9p device `host`: scripts see its
    /// files and programs under their own paths. What they write stays in the guest's memory (an overlay); `/run`, `/dev`,
    /// `/proc` and `/sys` are the guest's own. `/lib/modules` holds the kernel's modules, unless it has none.
    pub fn on_host_files(kernel: &Kernel) -> Initramfs {
        let modules = ["virtio_pci", "9pnet_virtio", "9p", "overlay"].map(str::to_owned).to_vec();
        Initramfs { kernel: kernel.clone(), modules, programs: Vec::new(), files: Vec::new(), root: Root::Host }
    }

    /// Loads this kernel module, after those it needs, before the first script runs.
    pub fn module(mut self, name: &str) -> Initramfs {
        self.modules.push(name.to_owned());
        self
    }

    /// Adds a program of the host (a name that is looked up, or a path) with its libraries; the guest's `PATH` has it.
    pub fn program(mut self, name: impl Into<PathBuf>) -> Initramfs {
        self.programs.push(name.into());
        self
    }

    /// Adds a file of the host at `path` in the guest (no leading `/`).
    pub fn file(mut self, path: &str, source: &Path) -> Initramfs {
        self.files.push((path.to_owned(), source.to_path_buf()));
        self
    }

    /// Writes the archive: uncompressed, because an emulated CPU unpacks slowly.
    pub fn write(&self, to: &Path) -> Result<(), Error> {
        let mut archive = Archive::default();
        match self.root {
            Root::Initramfs => archive.file("init", [INIT, SERVE].concat().as_bytes(), 0o755),
            Root::Host => {
                archive.file("init", [INIT, CHANGE_ROOT].concat().as_bytes(), 0o755);
                archive.file("serve", SERVE.as_bytes(), 0o755);
                if let Some(modules) = &self.kernel.modules {
                    let modules = std::path::absolute(modules).map_err(Error::doing("making a path absolute"))?;
                    archive.file("modules-of-host", format!("{}\n", modules.display()).as_bytes(), 0o644);
                }
            }
        }
        archive.file("bin/busybox", &read(&find_program(Path::new("busybox"))?)?, 0o755);
        for (number, module) in self.kernel.module_files(&self.modules)?.iter().enumerate() {
            archive.file(&format!("modules/{number:02}-{}", module_name(module)), &read_module(module)?, 0o644);
        }
        let mut libraries = BTreeSet::new();
        for program in &self.programs {
            let path = find_program(program)?;
            let name = program.file_name().expect("a program's path ends in its name").to_string_lossy();
            archive.file(&format!("host/{name}"), &read(&path)?, 0o755);
            libraries.extend(libraries_of(&path)?);
        }
        for library in libraries {
            archive.file(library.trim_start_matches('/'), &read(Path::new(&library))?, 0o755);
        }
        for (path, source) in &self.files {
            archive.file(path, &read(source)?, 0o755);
        }
        std::fs::write(to, archive.finish()).map_err(Error::doing(format!("writing {}", to.display())))
    }
}

/// The name of the 9p device for [`Initramfs::on_host_files`].
pub(crate) const SHARE: &str = "host";

/// The guest's first program.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /run /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/host:/sbin:/usr/sbin:/bin:/usr/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
read -r words </proc/cmdline
for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    # NUMBER-NAME.ko; the kernel's command line may have parameters for it: NAME.PARAMETER=VALUE.
    name=${module#/modules/??-}
    name=${name%.ko}
    parameters=
    for word in $words; do case $word in "$name".*) parameters="$parameters ${word#*.}" ;; esac; done
    insmod "$module" $parameters
done
"#;

/// How the scripts get there: the first serial port is the kernel's console; scripts and their output go over the
/// second, so that the two do not mix. Each script arrives as one line, `NUMBER BASE64`.
const SERVE: &str = r#"
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo "@ready $(uname -r)"
while read -r number encoded; do
    echo "$encoded" | base64 -d >/run/script
    echo "@begin $number"
    bash /run/script </dev/null
    status=$?
    printf '\n@end %s %s\n' "$number" "$status"
done
poweroff -f
"#;

/// The host's files as the root. 9p: `cache=loose` because nobody changes the files meanwhile; `access=any` saves
/// asking for access control lists. Busybox keeps serving, out of the guest's memory.
const CHANGE_ROOT: &str = r#"
set -e
mkdir -p /lower /layer /root
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,access=any,ro host /lower
mount -t tmpfs -o mode=755 layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /root
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root/run/lab /root/run/lock
cp /bin/busybox /serve /root/run/lab
if [ -e /modules-of-host ]; then
    folder=/root/lib/modules/$(uname -r)
    mkdir -p "$folder"
    mount --bind "/lower$(cat /modules-of-host)" "$folder"
fi
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
ln -s /proc/self/fd /root/dev/fd
for name in 0:stdin 1:stdout 2:stderr; do ln -s fd/${name%:*} /root/dev/${name#*:}; done
mkdir -p /root/dev/pts /root/dev/shm /root/dev/hugepages
mount -t devpts devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t hugetlbfs hugetlbfs /root/dev/hugepages
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec switch_root /root /run/lab/busybox sh /run/lab/serve
"#;

/// An archive as the kernel wants its initramfs: cpio, "newc" (Documentation/driver-api/early-userspace).
#[derive(Default)]
struct Archive {
    /// By path, so that a folder comes before what it holds.
    entries: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Archive {
    fn file(&mut self, path: &str, content: &[u8], permissions: u32) {
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert((0o040_755, Vec::new()));
        }
        self.entries.insert(path.to_owned(), (0o100_000 | permissions, content.to_vec()));
    }

    fn finish(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (path, (mode, content))) in self.entries.iter().enumerate() {
            entry(&mut out, number + 1, path, *mode, content);
        }
        entry(&mut out, 0, "TRAILER!!!", 0, &[]);
        out
    }
}

fn entry(out: &mut Vec<u8>, inode: usize, path: &str, mode: u32, content: &[u8]) {
    // Magic, then: inode, mode, user, group, links, time, file size, device (2), special device (2), length of
    // the name with its closing zero, checksum.
    let size = content.len();
    out.extend_from_slice(b"070701");
    for field in [inode, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, path.len() + 1, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Where a program of the host is; administrators' folders are looked through too.
pub(crate) fn find_program(name: &Path) -> Result<PathBuf, Error> {
    let folders = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    // Joining an absolute path yields that path.
    folders
        .split(':')
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::Missing { what: "a program", path: name.to_path_buf(), advice: RUN_TESTS })
}

/// The shared libraries of a program, and its loader; none for a static one.
fn libraries_of(program: &Path) -> Result<Vec<String>, Error> {
    let output = Command::new("ldd").arg(program).output().map_err(Error::doing("running ldd"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("not found") {
        return Err(Error::Initramfs(format!("{} lacks a library:\n{text}", program.display())));
    }
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(Error::doing(format!("reading {}", path.display())))
}

fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(Error::doing(format!("reading {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_built_in_ones_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let dependencies = "kernel/a-b.ko: kernel/c.ko kernel/d.ko\nkernel/e.ko: kernel/d.ko\nkernel/d.ko:\n";
        std::fs::write(folder.path().join("modules.dep"), dependencies).unwrap();
        std::fs::write(folder.path().join("modules.builtin"), "kernel/f.ko\n").unwrap();
        let kernel = Kernel { image: PathBuf::new(), modules: Some(folder.path().to_path_buf()) };
        let files = kernel.module_files(&["f", "a_b", "e"].map(str::to_owned)).unwrap();
        let expected = ["d", "c", "a-b", "e"].map(|name| folder.path().join(format!("kernel/{name}.ko")));
        assert_eq!(files, expected);
        assert!(kernel.module_files(&["g".to_owned()]).is_err());
    }

    #[test]
    fn packed_modules_are_found_and_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.ko"), b"module a").unwrap();
        let packed = Command::new("xz").arg(folder.path().join("a.ko")).status().unwrap();
        assert!(packed.success());
        std::fs::write(folder.path().join("modules.dep"), "a.ko.xz:\n").unwrap();
        std::fs::write(folder.path().join("modules.builtin"), "").unwrap();
        let kernel = Kernel { image: PathBuf::new(), modules: Some(folder.path().to_path_buf()) };
        let files = kernel.module_files(&["a".to_owned()]).unwrap();
        assert_eq!(read_module(&files[0]).unwrap(), b"module a");
        std::fs::write(&files[0], b"not packed at all").unwrap();
        assert!(read_module(&files[0]).unwrap_err().to_string().contains("cannot unpack"));
    }

    #[test]
    fn an_archive_holds_folders_before_files_and_is_aligned() {
        let mut archive = Archive::default();
        archive.file("a/b/c", b"hello", 0o644);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let at = |text: &[u8]| bytes.windows(text.len()).position(|window| window == text).unwrap();
        assert!(at(b"a\0") < at(b"a/b\0") && at(b"a/b\0") < at(b"a/b/c\0") && at(b"a/b/c\0") < at(b"TRAILER!!!\0"));
        // "hello" and the next header begin on multiples of four: the format's rule.
        assert_eq!(at(b"hello") % 4, 0);
    }
}
