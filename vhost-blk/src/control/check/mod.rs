//! What this machine lacks for a configuration (`--check=machine`).
//!
//! Nothing is opened, bound or changed that a running program may use, so a configuration can be checked while it is served.

mod listeners;

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use thiserror::Error;

use crate::control::config::{Configuration, ExportSettings, Listen};
use crate::datapath::worker;
use crate::drive::DeviceAddress;
use listeners::{Listeners, Owner};

/// What a look at the machine has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What has to be mended, in one line each.
    pub mistakes: Vec<String>,
    /// What is worth knowing, and what could not be looked at.
    pub notes: Vec<String>,
}

/// Looks at this machine: CPUs, sockets and their folders, drives. `file` is the configuration's, if it is in one: a program that
/// serves it by now is about to be started again, and its sockets are no mistake.
pub fn machine(configuration: &Configuration, file: Option<&Path>) -> Findings {
    let mut findings = Findings::default();
    let settings = &configuration.settings;
    for cpu in &settings.cpus {
        findings.mistakes.extend(worker::try_cpu(*cpu).err().map(|error| error.to_string()));
    }
    let listeners = Listeners::look();
    let mut seen: Vec<&DeviceAddress> = Vec::new();
    for export in &settings.exports {
        if let Listen::Path(path) = &export.listen {
            findings.socket(path, &listeners, file);
        }
        if !seen.contains(&&export.device) {
            seen.push(&export.device);
            findings.device(&export.device, &listeners);
        }
    }
    // Of an embedded controller the address says it all.
    let drives = |export: &&ExportSettings| export.device.namespaces().is_none();
    if settings.exports.iter().any(|export| drives(&export)) {
        findings.notes.push(
            "not looked at: whether drives work and have these namespaces, which shows when they are opened".into(),
        );
    }
    findings
}

impl Findings {
    /// What a check prints: what would be served, a line for each disk and each drive with settings of its own, and the notes.
    pub fn report(&self, configuration: &Configuration) -> String {
        let exports = configuration.settings.exports.iter().map(|export| format!("{export}\n"));
        let drives = configuration.settings.drives.iter().map(|drive| format!("{drive}\n"));
        exports.chain(drives).chain(self.notes.iter().map(|note| format!("# {note}\n"))).collect()
    }

    fn wrong(&mut self, why: String) {
        if !self.mistakes.contains(&why) {
            self.mistakes.push(why);
        }
    }

    fn socket(&mut self, path: &Path, listeners: &Listeners, file: Option<&Path>) {
        let name = path.display();
        let folder = folder_of(path);
        // Its program locks the folder, and makes a file in it.
        if let Err(error) = may(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
            let folder = folder.display();
            return self.wrong(match error {
                Errno::NOENT => format!("cannot listen on {name}: the folder {folder} does not exist; create it first"),
                _ => format!("cannot listen on {name}: the folder {folder} cannot be read and written: {error}"),
            });
        }
        use std::os::unix::fs::FileTypeExt;
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => return self.wrong(format!("cannot look at {name}: {error}")),
            Ok(found) if found.file_type().is_socket() => {}
            Ok(_) => {
                return self
                    .wrong(format!("cannot listen on {name}: a file that is no socket is there; choose another path"));
            }
        }
        match listeners.owner(path) {
            Owner::Nobody => self.notes.push(format!("{name}: nobody listens there; the stale socket will be replaced")),
            Owner::Hidden => self.notes.push(format!(
                "{name}: a socket is there; run the check as root to find out whether a process listens on it (services may have network namespaces of their own)"
            )),
            Owner::Process { id, name: program } if program == "systemd" => {
                self.notes.push(format!("{name}: the service manager (process {id}) listens there, to hand it over"));
            }
            Owner::Process { id, .. } if file.is_some_and(|file| listeners::serves(id, file)) => {
                self.notes.push(format!("{name}: process {id} serves this configuration there now; a restart replaces it"));
            }
            Owner::Process { id, name: program } => self.wrong(format!(
                "cannot listen on {name}: {program} (process {id}) does already; stop it or choose another path"
            )),
            Owner::Unknown => {
                self.wrong(format!("cannot listen on {name}: another process does already; stop it or choose another path"));
            }
        }
    }

    fn device(&mut self, device: &DeviceAddress, listeners: &Listeners) {
        match device {
            DeviceAddress::Vfio(vfio::Address::Pci(address)) => match address.device_files() {
                Err(error) => self.wrong(error.to_string()),
                Ok(ways) => {
                    let refused = |files: &Vec<PathBuf>| files.iter().find_map(|file| may_use(file).err());
                    let reasons: Vec<String> = ways.iter().filter_map(refused).map(|error| error.to_string()).collect();
                    if reasons.len() == ways.len() {
                        self.wrong(format!(
                            "{device} cannot be opened: {}; setup.sh bind {device} --user NAME gives it to a user",
                            reasons.join("; ")
                        ));
                    }
                }
            },
            DeviceAddress::Vfio(vfio::Address::VfioUser(path)) => {
                if let Err(why) = may_use(path) {
                    self.wrong(format!("{device} cannot be opened: {why}"));
                } else {
                    match listeners.owner(path) {
                        Owner::Nobody => {
                            self.wrong(format!("{device} cannot be opened: nobody listens there; start its program"));
                        }
                        Owner::Hidden => {
                            self.notes.push(format!("not looked at: whether somebody listens on {device}"))
                        }
                        Owner::Unknown | Owner::Process { .. } => {}
                    }
                }
            }
            DeviceAddress::Sim(_) => {
                device.check_files().into_iter().for_each(|why| self.wrong(why));
                // Those that are not there yet are made.
                for file in device.files().iter().filter(|file| !file.exists() && folder_of(file).exists()) {
                    let folder = folder_of(file);
                    if let Err(error) = may(folder, Access::WRITE_OK | Access::EXEC_OK) {
                        self.wrong(format!("{} cannot be made: {}: {error}", file.display(), folder.display()));
                    }
                }
            }
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// This user may not read and write a file that a drive is reached by.
#[derive(Debug, Error)]
#[error("{file}: {source}")]
struct Unusable {
    file: PathBuf,
    source: Errno,
}

/// Whether this process may do that, as the user it runs as.
fn may(path: &Path, access: Access) -> Result<(), Errno> {
    accessat(CWD, path, access, AtFlags::EACCESS)
}

fn may_use(file: &Path) -> Result<(), Unusable> {
    may(file, Access::READ_OK | Access::WRITE_OK).map_err(|source| Unusable { file: file.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::control::config::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUES, Settings};

    fn configuration(cpus: &[usize], exports: &[(&str, &Path)]) -> Configuration {
        let export = |(device, path): &(&str, &Path)| ExportSettings {
            device: device.parse().unwrap(),
            listen: Listen::Path(path.to_path_buf()),
            namespace: None,
            queues: DEFAULT_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            queue_pairs: None,
            read_only: false,
            serial: None,
        };
        let exports = exports.iter().map(export).collect();
        let settings = Settings { cpus: cpus.to_vec(), exports, ..Settings::default() };
        Configuration { settings, refused: vec![] }
    }

    #[test]
    fn what_the_machine_lacks_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let _listening = UnixListener::bind(path("busy")).unwrap();
        drop(UnixListener::bind(path("stale")).unwrap());
        std::fs::write(path("text"), "127.0.0.1 localhost\n").unwrap();
        let text = format!("sim:1G,file={}", path("text").display());
        let nowhere = Path::new("/nowhere/s").to_path_buf();
        let vfio_user = format!("vfio-user:{}", path("stale").display());
        let free = path("free");
        let (busy, occupied) = (path("busy").display().to_string(), path("text").display().to_string());
        for (cpus, exports, parts) in [
            (&[8191][..], vec![("sim:1G", free.clone())], &["CPU 8191"][..]),
            (&[], vec![("sim:1G", nowhere)], &["the folder /nowhere does not exist; create it first"]),
            (&[], vec![("sim:1G", path("busy"))], &[busy.as_str(), "does already; stop it"]),
            (&[], vec![("sim:1G", path("text"))], &[occupied.as_str(), "no socket is there"]),
            (&[], vec![(text.as_str(), free.clone())], &["with 20 bytes instead of"]),
            (&[], vec![("sim:1G,file=/nowhere/disk", free.clone())], &["/nowhere"]),
            (&[], vec![("ffff:ff:1f.7", free.clone())], &["ffff:ff:1f.7"]),
            (&[], vec![("vfio-user:/nowhere/n", free.clone())], &["/nowhere/n"]),
        ] {
            let exports: Vec<(&str, &Path)> = exports.iter().map(|(device, path)| (*device, path.as_path())).collect();
            let findings = machine(&configuration(cpus, &exports), None);
            assert_eq!(findings.mistakes.len(), 1, "{exports:?}: {findings:?}");
            parts.iter().for_each(|part| assert!(findings.mistakes[0].contains(part), "{findings:?}"));
        }
        // Nothing is wrong, and what is there is as it was.
        let stale = path("stale");
        let findings = machine(&configuration(&[], &[("sim:1G", &free), ("sim:2G", &stale)]), None);
        assert_eq!(findings.mistakes, [""; 0]);
        assert!(findings.notes.len() == 1 && findings.notes[0].contains("stale"), "{findings:?}");
        assert!(stale.exists() && !free.exists());
        // A controller's socket on which nobody listens: some processes may not be looked at, even as root.
        let findings = machine(&configuration(&[], &[(vfio_user.as_str(), &free)]), None);
        let all = [findings.mistakes, findings.notes].concat();
        let told = ["nobody listens there", "not looked at: whether somebody listens"];
        assert!(all.iter().any(|line| told.iter().any(|told| line.contains(told))), "{all:?}");
        // Of one socket as good as of two: it is told once.
        let both = configuration(&[], &[("vfio-user:/nowhere/n", &free), ("vfio-user:/nowhere/n", &stale)]);
        assert_eq!(machine(&both, None).mistakes.len(), 1);
        assert!(machine(&both, None).notes.iter().any(|note| note.starts_with("not looked at: ")));
    }
}
