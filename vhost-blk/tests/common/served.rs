//! Targets served in the test's own process.

use std::path::PathBuf;

use tempfile::TempDir;
use vhost_blk::control::config::{ExportSettings, Listen, Settings};
use vhost_blk::control::target::Target;

use super::Front;

pub(crate) const MIB: u64 = 1 << 20;

/// A target in this process, its sockets in a folder.
pub(crate) struct Served {
    pub target: Target,
    pub folder: TempDir,
}

impl Served {
    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.folder.path().join(number.to_string())
    }

    pub(crate) fn connect(&self) -> Front {
        Front::connect(&self.socket(0))
    }
}

/// Serves disks; `change` adapts the settings of each.
pub(crate) fn serve(count: usize, change: impl Fn(usize, &mut ExportSettings)) -> Served {
    let _ =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).is_test(true).try_init();
    let folder = tempfile::tempdir().unwrap();
    let exports = (0..count)
        .map(|number| {
            let mut export = ExportSettings {
                device: "sim:64M".parse().unwrap(),
                listen: Listen::Path(folder.path().join(number.to_string())),
                namespace: None,
                queues: 4,
                queue_size: 256,
                queue_pairs: None,
                read_only: false,
                serial: None,
            };
            change(number, &mut export);
            export
        })
        .collect();
    let target = Target::start(&Settings { exports, ..Settings::default() }).unwrap();
    Served { target, folder }
}

pub(crate) fn one() -> Served {
    serve(1, |_, _| {})
}

pub(crate) fn with_cache() -> Served {
    serve(1, |_, export| export.device = "sim:64M,write-cache=on".parse().unwrap())
}
