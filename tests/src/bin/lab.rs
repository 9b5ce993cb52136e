//! What `tests/lab.sh` asks of the harness besides the proofs: a shell in a machine, and what a kernel can do.

use std::io::{Read, Write, stdin, stdout};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use e2e::{Error, Guest, Kernel, Lab, LabDrive};

const LIMIT: Duration = Duration::from_secs(120);
/// How long a shell may be used.
const SHELL_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["shell"] => Kernel::lab_stable().and_then(|kernel| in_folder(|folder| shell(&kernel, folder))),
        ["shell", image] => in_folder(|folder| shell(&Kernel::at(Path::new(image)), folder)),
        ["way", image] => in_folder(|folder| way(&Kernel::at(Path::new(image)), folder)),
        _ => {
            eprintln!("usage: lab shell [KERNEL] | lab way KERNEL (see tests/lab.sh)");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `work` with a folder of its own, which is removed afterwards.
fn in_folder(work: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let folder: PathBuf = std::env::temp_dir().join(format!("lab-{}", std::process::id()));
    std::fs::create_dir(&folder).map_err(system(format!("making {}", folder.display())))?;
    let result = work(&folder);
    std::fs::remove_dir_all(&folder).map_err(system(format!("removing {}", folder.display())))?;
    result
}

fn system(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::System { doing: doing.into(), source }
}

/// Prints how this kernel lets a drive be opened: "iommufd" (it has the device files), "group" or "none".
fn way(kernel: &Kernel, folder: &Path) -> Result<(), Error> {
    let mut guest = Lab::new(kernel).drive(LabDrive::new("d0")).boot(folder)?;
    let script = r#"cd /sys/bus/pci/devices/0000:00:04.0
        modprobe -qa vfio-pci vfio_iommu_type1
        echo 0000:00:04.0 >driver/unbind
        echo vfio-pci >driver_override
        echo 0000:00:04.0 >/sys/bus/pci/drivers_probe
        if [ -e /dev/iommu ] && [ -e "/dev/vfio/devices/$(ls vfio-dev)" ]; then echo iommufd
        elif [ -e /dev/vfio/vfio ] && [ -e "/dev/vfio/$(basename "$(readlink iommu_group)")" ]; then echo group
        else echo none; fi 2>/dev/null"#;
    let output = guest.try_run(script, LIMIT)?;
    println!("{}", output.text.lines().last().unwrap_or("none"));
    guest.power_off(LIMIT)
}

/// A shell over a serial port of its own.
fn shell(kernel: &Kernel, folder: &Path) -> Result<(), Error> {
    let socket = folder.join("shell.sock");
    let port = format!("socket,id=shell,path={},server=on,wait=off", socket.display());
    let lab = Lab::new(kernel)
        .memory_mib(2048)
        .arguments(&["-chardev", &port, "-serial", "chardev:shell"])
        .drive(LabDrive::new("d0").size_mib(1024))
        .drive(LabDrive::new("d1").size_mib(1024).logical_block_size(4096));
    eprintln!("booting …");
    let mut guest = lab.boot(folder)?;
    eprintln!(
        "Two NVMe drives, 0000:00:04.0 and 0000:00:05.0. The files are this machine's; what is written to them is gone when \
         the shell ends (exit, or Ctrl-D)."
    );
    let terminal = Terminal::raw()?;
    let result = bridge(&mut guest, &socket, &terminal);
    drop(terminal);
    result?;
    guest.power_off(LIMIT)
}

fn bridge(guest: &mut Guest, socket: &Path, terminal: &Terminal) -> Result<(), Error> {
    let connect = || UnixStream::connect(socket).and_then(|stream| Ok((stream.try_clone()?, stream)));
    let (from, to) = connect().map_err(system("connecting to the machine's serial port"))?;
    // Both end with the program. Keys wait for the shell's first words: a port that nobody has opened loses them.
    std::thread::spawn(move || {
        let mut from = from;
        let mut first = [0; 1];
        if from.read_exact(&mut first).is_ok() {
            std::thread::spawn(move || copy(stdin(), to));
            copy(&first[..], stdout());
            copy(from, stdout());
        }
    });
    let script = format!(
        "cd {}; stty -F /dev/ttyS2 sane {}; TERM={} setsid -wc bash -c 'echo; exec bash -i' </dev/ttyS2 >/dev/ttyS2 2>&1; true",
        Lab::project().display(),
        terminal.size,
        std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned()),
    );
    guest.run(&script, SHELL_LIMIT).map(|_| ())
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
            break;
        }
    }
}

/// The terminal, every key of which goes to the machine while the value lives. Nothing where there is none.
struct Terminal {
    before: Option<String>,
    /// For the machine's `stty`.
    size: String,
}

impl Terminal {
    fn raw() -> Result<Terminal, Error> {
        let Some(before) = stty(&["-g"])? else { return Ok(Terminal { before: None, size: String::new() }) };
        let size = stty(&["size"])?.unwrap_or_default();
        let size =
            size.split_once(' ').map_or_else(String::new, |(rows, columns)| format!("rows {rows} cols {columns}"));
        stty(&["raw", "-echo"])?;
        Ok(Terminal { before: Some(before), size })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = stty(&[before])
        {
            eprintln!("the terminal could not be put back in order ({error}): try `stty sane`");
        }
    }
}

/// Runs `stty` on the terminal; `None` if there is no terminal.
fn stty(arguments: &[&str]) -> Result<Option<String>, Error> {
    let output =
        Command::new("stty").args(arguments).stdin(Stdio::inherit()).output().map_err(system("running stty"))?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}
