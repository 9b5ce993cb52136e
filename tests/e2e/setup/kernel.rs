//! What a kernel does when files of sysfs are written, by a thread that looks at them all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How a kernel differs from one that does everything it is told.
#[derive(Debug)]
pub(crate) struct Behaviour {
    /// The larger size of hugepages.
    pub larger_page: &'static str,
    /// Drivers that do not take a drive.
    pub refusing: Vec<&'static str>,
    /// At most so many hugepages on each node.
    pub most_pages: u64,
    /// So many hugepages of each node are in use and stay.
    pub used_pages: u64,
    /// Drives have a device file each.
    pub iommufd: bool,
    /// The script dies with this write (1 is the first one) to a file about drives. 0 is never.
    pub dies_at: u32,
    /// Something that happens when a drive's override is written.
    pub meanwhile: Option<fn(&Path)>,
}

impl Default for Behaviour {
    fn default() -> Behaviour {
        Behaviour {
            refusing: Vec::new(),
            most_pages: 4096,
            used_pages: 0,
            iommufd: false,
            dies_at: 0,
            meanwhile: None,
            larger_page: "1048576kB",
        }
    }
}

#[derive(Default)]
struct Shared {
    behaviour: Behaviour,
    script: u32,
    passes: u64,
    stop: bool,
}

/// The thread.
pub(crate) struct Kernel {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Kernel {
    pub(crate) fn start(root: PathBuf, behaviour: Behaviour) -> Kernel {
        let shared = Arc::new((Mutex::new(Shared { behaviour, ..Shared::default() }), Condvar::new()));
        let also = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut waiting = false;
            let mut state = State { root, pages: BTreeMap::new(), taken: BTreeSet::new(), writes: 0 };
            loop {
                let mut shared = also.0.lock().unwrap();
                if shared.stop {
                    return;
                }
                let asked = state.root.with_file_name("wait");
                let wait = asked.exists();
                state.pass(&mut shared);
                // What was written before it was asked for has been seen by two passes.
                if wait && waiting {
                    fs::remove_file(asked).unwrap();
                }
                waiting = wait && !waiting;
                shared.passes += 1;
                also.1.notify_all();
                drop(shared);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Kernel { shared, thread: Some(thread) }
    }

    pub(crate) fn script_is(&self, process: u32) {
        self.shared.0.lock().unwrap().script = process;
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.0.lock().unwrap().behaviour);
    }

    /// Waits until everything written before was seen.
    pub(crate) fn settle(&self) {
        let guard = self.shared.0.lock().unwrap();
        let wanted = guard.passes + 2;
        let waited = self.shared.1.wait_timeout_while(guard, Duration::from_secs(60), |shared| shared.passes < wanted);
        assert!(!waited.unwrap().1.timed_out(), "the thread that plays the kernel has died");
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Ok(mut shared) = self.shared.0.lock() {
            shared.stop = true;
        }
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the thread that plays the kernel has died");
        }
    }
}

struct State {
    root: PathBuf,
    /// The hugepages of each node and size, as "node0/hugepages-2048kB".
    pages: BTreeMap<String, u64>,
    /// Devices whose override says vfio-pci.
    taken: BTreeSet<PathBuf>,
    /// To files about drives.
    writes: u32,
}

impl State {
    fn pass(&mut self, shared: &mut Shared) {
        let pci = self.root.join("sys/bus/pci");
        for device in list(&pci.join("devices")) {
            let file = device.join("driver_override");
            let text = fs::read_to_string(&file).unwrap_or_default();
            if text == "\n" {
                self.taken.remove(&device);
                write(&file, "(null)\n");
                self.written(shared);
            } else if text == "vfio-pci\n" && self.taken.insert(device) {
                if let Some(meanwhile) = shared.behaviour.meanwhile {
                    meanwhile(&self.root);
                }
                self.written(shared);
            }
        }
        for driver in list(&pci.join("drivers")) {
            let name = driver.file_name().unwrap().to_str().unwrap().to_owned();
            for action in ["unbind", "bind"] {
                let file = driver.join(action);
                let address = fs::read_to_string(&file).unwrap_or_default().trim().to_owned();
                if address.is_empty() {
                    continue;
                }
                write(&file, "");
                self.written(shared);
                match action {
                    "unbind" => self.unbind(&name, &address),
                    _ if shared.behaviour.refusing.contains(&name.as_str()) => {}
                    _ => self.bind(&name, &address, shared.behaviour.iommufd),
                }
            }
        }
        for size in ["2048kB", shared.behaviour.larger_page] {
            self.hugepages(&format!("hugepages-{size}"), &shared.behaviour);
        }
    }

    /// Counts, and kills the script while it waits for what this write does.
    fn written(&mut self, shared: &mut Shared) {
        self.writes += 1;
        if self.writes == shared.behaviour.dies_at {
            let killed = Command::new("kill").args(["-9", &shared.script.to_string()]).status();
            assert!(killed.unwrap().success());
        }
    }

    fn device(&self, address: &str) -> PathBuf {
        self.root.join("sys/devices/pci0000:00").join(address)
    }

    fn unbind(&self, driver: &str, address: &str) {
        let device = self.device(address);
        let wanted = Path::new("../../../bus/pci/drivers").join(driver);
        assert_eq!(fs::read_link(device.join("driver")).unwrap(), wanted, "{address} is not with {driver}");
        fs::remove_file(device.join("driver")).unwrap();
        fs::remove_file(self.root.join("sys/bus/pci/drivers").join(driver).join(address)).unwrap();
        if driver == "nvme" {
            for disk in disks(&device) {
                let dev = self.root.join("dev");
                fs::rename(dev.join(&disk), self.root.with_file_name(disk)).unwrap();
            }
            fs::rename(device.join("nvme"), self.root.with_file_name(format!("nvme-{address}"))).unwrap();
        } else {
            let vfio = self.root.join("dev/vfio");
            fs::remove_file(vfio.join(group(&device))).unwrap();
            let _ = fs::remove_dir_all(device.join("vfio-dev"));
            let _ = fs::remove_file(vfio.join("devices").join(own_file(address)));
            // Succeeds when it was the last one.
            let _ = fs::remove_dir(vfio.join("devices"));
        }
    }

    fn bind(&self, driver: &str, address: &str, iommufd: bool) {
        let device = self.device(address);
        let wanted = fs::read_to_string(device.join("driver_override")).unwrap();
        if (wanted != "(null)\n" && wanted.trim() != driver) || device.join("driver").is_symlink() {
            return;
        }
        if driver == "nvme" {
            fs::rename(self.root.with_file_name(format!("nvme-{address}")), device.join("nvme")).unwrap();
            for disk in disks(&device) {
                fs::rename(self.root.with_file_name(&disk), self.root.join("dev").join(disk)).unwrap();
            }
        } else {
            let make = |path: PathBuf| {
                write(&path, "");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            };
            make(self.root.join("dev/vfio").join(group(&device)));
            if iommufd {
                let name = own_file(address);
                fs::create_dir_all(device.join("vfio-dev").join(&name)).unwrap();
                fs::create_dir_all(self.root.join("dev/vfio/devices")).unwrap();
                make(self.root.join("dev/vfio/devices").join(name));
            }
        }
        let entry = self.root.join("sys/bus/pci/drivers").join(driver).join(address);
        symlink(format!("../../../../devices/pci0000:00/{address}"), entry).unwrap();
        // Last: this is what the script waits for.
        symlink(format!("../../../bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
    }

    /// A pool of a node that was written is changed as far as there are pages; the machine's is the sum, and is spread.
    fn hugepages(&mut self, size: &str, behaviour: &Behaviour) {
        let nodes: Vec<_> = list(&self.root.join("sys/devices/system/node")).into_iter().collect();
        let mut sum = 0;
        for node in &nodes {
            let file = node.join("hugepages").join(size).join("nr_hugepages");
            let key = format!("{}/{size}", node.file_name().unwrap().to_str().unwrap());
            let known = self.pages.get(&key).copied();
            // Empty is a file that is just being written.
            let found = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok());
            let now = match (known, found) {
                (None, Some(found)) => found,
                (Some(known), Some(found)) if found != known => {
                    found.min(behaviour.most_pages).max(behaviour.used_pages.min(known))
                }
                (known, _) => known.unwrap_or(0),
            };
            if known != Some(now) || found.is_some_and(|found| found != now) {
                write(&file, &format!("{now}\n"));
                write(
                    &file.with_file_name("free_hugepages"),
                    &format!("{}\n", now.saturating_sub(behaviour.used_pages)),
                );
            }
            self.pages.insert(key, now);
            sum += now;
        }
        let file = self.root.join("sys/kernel/mm/hugepages").join(size).join("nr_hugepages");
        let key = format!("all/{size}");
        let known = self.pages.insert(key.clone(), sum);
        let found = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok());
        match (known, found) {
            (Some(known), Some(found)) if found != known => {
                // Somebody wrote the sum: every node gets its part, and the next pass the sum that came of it.
                self.pages.insert(key, found);
                for (number, node) in (0..).zip(&nodes) {
                    let count = nodes.len() as u64;
                    let part = found / count + u64::from(number < found % count);
                    write(&node.join("hugepages").join(size).join("nr_hugepages"), &format!("{part}\n"));
                }
            }
            (_, Some(found)) if found != sum => write(&file, &format!("{sum}\n")),
            _ => {}
        }
    }
}

fn list(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Writes a file of which, as in sysfs, nobody sees half.
fn write(path: &Path, text: &str) {
    let file = fs::File::options().write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all_at(text.as_bytes(), 0).unwrap();
    file.set_len(text.len() as u64).unwrap();
}

fn own_file(address: &str) -> String {
    format!("vfio{}", &address[5..7])
}

fn group(device: &Path) -> String {
    fs::read_link(device.join("iommu_group")).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

/// The names of the disks and partitions of a drive.
fn disks(device: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for controller in list(&device.join("nvme")) {
        for disk in list(&controller).into_iter().filter(|path| path.join("size").exists() && path.join("dev").exists())
        {
            let parts = list(&disk).into_iter().filter(|path| path.join("partition").exists());
            names
                .extend(parts.chain([disk.clone()]).map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()));
        }
    }
    names
}
