//! Who listens on a socket file, as /proc tells it. To connect would disturb whoever listens, so nobody does.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The process that listens on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Nobody,
    /// Somebody, of whom no more can be seen.
    Unknown,
    /// Nobody who can be seen; processes that this user may not look at may have networks of their own.
    Hidden,
    Process {
        id: u32,
        name: String,
    },
}

/// The listening UNIX sockets that have a path.
pub(super) struct Listeners {
    inodes: BTreeMap<PathBuf, u64>,
    /// Every process could be looked at.
    complete: bool,
}

/// /proc/net/unix, see proc_pid_net(5): the socket accepts connections.
const ACCEPTS: u32 = 1 << 16;

impl Listeners {
    /// Reads those of all networks that can be seen: sockets are listed with the network of the process that made them.
    pub(super) fn look() -> Listeners {
        let mut listeners = Listeners { inodes: BTreeMap::new(), complete: true };
        let mut networks = Vec::new();
        for process in processes() {
            match std::fs::read_link(process.join("ns/net")) {
                Ok(network) if networks.contains(&network) => {}
                Ok(network) => {
                    networks.push(network);
                    listeners.read(&process.join("net/unix"));
                }
                // It may just have ended.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(_) => listeners.complete = false,
            }
        }
        listeners
    }

    fn read(&mut self, table: &Path) {
        let Ok(table) = std::fs::read(table) else { return };
        for line in table.split(|byte| *byte == b'\n').skip(1) {
            if let Some((path, inode)) = listening(line) {
                self.inodes.insert(whole(&path), inode);
            }
        }
    }

    /// Who listens there.
    pub(super) fn owner(&self, path: &Path) -> Owner {
        match self.inodes.get(&whole(path)) {
            Some(inode) => holder(*inode).unwrap_or(Owner::Unknown),
            None if self.complete => Owner::Nobody,
            None => Owner::Hidden,
        }
    }
}

/// The path and the inode of a socket that listens. The columns: Num RefCount Protocol Flags Type St Inode Path.
fn listening(line: &[u8]) -> Option<(PathBuf, u64)> {
    let mut columns = line.split(|byte| *byte == b' ').filter(|column| !column.is_empty());
    let flags = u32::from_str_radix(std::str::from_utf8(columns.nth(3)?).ok()?, 16).ok()?;
    let inode = std::str::from_utf8(columns.nth(2)?).ok()?.parse().ok()?;
    // The rest is the path, which may have spaces in it.
    let at = line.windows(2).position(|two| two == b" /")? + 1;
    (flags & ACCEPTS != 0).then(|| (PathBuf::from(OsString::from_vec(line[at..].to_vec())), inode))
}

/// By whatever name it is called.
fn whole(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let is_process = |name: &OsStr| name.as_bytes().iter().all(u8::is_ascii_digit);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter(move |entry| is_process(&entry.file_name())).map(|entry| entry.path())
}

/// A process that has a socket open.
fn holder(inode: u64) -> Option<Owner> {
    let link = format!("socket:[{inode}]");
    let has = |process: &PathBuf| {
        let files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file.as_os_str() == link.as_str())
    };
    let process = processes().find(has)?;
    let name = std::fs::read_to_string(process.join("comm")).ok()?.trim().to_owned();
    Some(Owner::Process { id: process.file_name()?.to_str()?.parse().ok()?, name })
}

/// Whether a process is this program with this configuration file.
pub(super) fn serves(id: u32, file: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{id}"));
    let Ok(arguments) = std::fs::read(process.join("cmdline")) else { return false };
    let arguments: Vec<&OsStr> = arguments.split(|byte| *byte == 0).map(OsStr::from_bytes).collect();
    let program = arguments.first().map(Path::new).and_then(Path::file_name);
    let values = arguments.iter().zip(arguments.iter().skip(1));
    let after = values.filter(|(option, _)| **option == "--config").map(|(_, value)| value.as_bytes());
    let joined = arguments.iter().filter_map(|argument| argument.as_bytes().strip_prefix(b"--config="));
    // A relative path is one in its own directory.
    let is_same = |value: &[u8]| whole(&process.join("cwd").join(OsStr::from_bytes(value))) == whole(file);
    program == std::env::args_os().next().as_deref().map(Path::new).and_then(Path::file_name)
        && after.chain(joined).any(is_same)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn who_listens_is_found_and_not_who_is_connected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a socket");
        let listener = UnixListener::bind(&path).unwrap();
        let _connected = UnixStream::connect(&path).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for path in [&path, &link] {
            match Listeners::look().owner(path) {
                Owner::Process { id, .. } => assert_eq!(id, std::process::id()),
                other => panic!("{other:?}"),
            }
        }
        drop(listener);
        // As root everything can be seen.
        let owner = Listeners::look().owner(&path);
        assert!(matches!(owner, Owner::Nobody | Owner::Hidden), "{owner:?}");
    }

    #[test]
    fn lines_of_the_table() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/a b";
        assert_eq!(listening(line), Some(("/run/a b".into(), 12345)));
        for other in [
            &b"0000000000000000: 00000003 00000000 00000000 0001 03 12345 /run/a"[..],
            b"0000000000000000: 00000002 00000000 00010000 0001 01 12345 @/run/a",
            b"0000000000000000: 00000002 00000000 00010000 0001 01 12345",
            b"",
        ] {
            assert_eq!(listening(other), None);
        }
    }
}
