use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::initramfs::find_program;
use crate::transcript::Transcript;
use crate::{Error, Initramfs, Kernel, Process, Qmp, build_dir, poll};

/// What runs a guest's CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's emulation, by one thread: several threads of emulation hang now and then.
    #[default]
    Emulation,
    /// The host's CPUs. `/dev/kvm` may exist and yet be unable to run a kernel: try a short boot first.
    Kvm,
}

/// A virtual machine to be booted. Its CPU is emulated unless [`Machine::accelerator`] says otherwise.
#[derive(Clone, Debug)]
pub struct Machine {
    kernel: Kernel,
    initramfs: Initramfs,
    accelerator: Accelerator,
    memory_mib: u32,
    hugepages: bool,
    hotplug: &'static str,
    cpus: u32,
    append: String,
    arguments: Vec<String>,
    disks: usize,
    boot_limit: Duration,
}

impl Machine {
    /// A machine of 512 MiB and two CPUs that boots `kernel` with `initramfs` (made for that kernel).
    pub fn new(kernel: &Kernel, initramfs: &Initramfs) -> Machine {
        Machine {
            kernel: kernel.clone(),
            initramfs: initramfs.clone(),
            accelerator: Accelerator::default(),
            memory_mib: 512,
            hugepages: false,
            hotplug: "",
            cpus: 2,
            append: String::new(),
            arguments: Vec::new(),
            disks: 0,
            boot_limit: Duration::from_secs(120),
        }
    }

    /// What runs the CPUs.
    pub fn accelerator(mut self, accelerator: Accelerator) -> Machine {
        self.accelerator = accelerator;
        self
    }

    /// How long a boot may take until scripts are taken; two minutes unless said.
    pub fn boot_limit(mut self, limit: Duration) -> Machine {
        self.boot_limit = limit;
        self
    }

    /// The memory in MiB.
    pub fn memory_mib(mut self, mib: u32) -> Machine {
        self.memory_mib = mib;
        self
    }

    /// Takes the memory from the hugepages at `/dev/hugepages`.
    pub fn on_hugepages(mut self) -> Machine {
        self.hugepages = true;
        self
    }

    /// Leaves room for memory added while it runs: four modules, 4 GiB in all.
    pub fn memory_slots(mut self) -> Machine {
        self.hotplug = ",slots=4,maxmem=4G";
        self
    }

    /// The number of CPUs. Linux uses no more queues of a disk than it has CPUs.
    pub fn cpus(mut self, count: u32) -> Machine {
        self.cpus = count;
        self
    }

    /// Adds to the kernel's command line.
    pub fn append(mut self, text: &str) -> Machine {
        self.append.push(' ');
        self.append.push_str(text);
        self
    }

    /// Adds arguments for QEMU.
    pub fn arguments(mut self, arguments: &[&str]) -> Machine {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Adds a disk served on the vhost-user socket at `socket`; `properties` are QEMU's for the device, for example
    /// `num-queues=4,packed=on`, or nothing. The first one is `/dev/vda` in the guest and `disk0` for QEMU.
    pub fn disk(mut self, socket: &Path, properties: &str) -> Machine {
        let number = self.disks;
        self.disks += 1;
        let comma = if properties.is_empty() { "" } else { "," };
        self.arguments.extend([
            "-chardev".to_owned(),
            format!("socket,id=c{number},path={}", socket.display()),
            "-device".to_owned(),
            format!("vhost-user-blk-pci,id=disk{number},chardev=c{number}{comma}{properties}"),
        ]);
        self
    }

    /// Boots the machine, with its files in `folder`, and waits until it takes scripts.
    ///
    /// Should the emulation itself abort, or the boot not end within its deadline, it is tried once more; this is
    /// written to `e2e-retries.log` in the build folder, which `tests/run.sh` shows.
    pub fn boot(&self, folder: &Path) -> Result<Guest, Error> {
        match self.try_boot(folder, true) {
            Err(error) if self.accelerator == Accelerator::Emulation && is_emulation_failure(&error) => {
                let report = format!("{}: booted again after: {error}\n", test_name());
                eprint!("{report}");
                let path = build_dir().join("e2e-retries.log");
                let written = File::options().create(true).append(true).open(path);
                written
                    .and_then(|mut file| file.write_all(report.as_bytes()))
                    .map_err(Error::doing("noting a retry"))?;
                self.try_boot(folder, true)
            }
            result => result,
        }
    }

    /// Like [`Machine::boot`], but a single try that prints nothing: to find out whether the machine boots at all.
    pub fn boot_once(&self, folder: &Path) -> Result<Guest, Error> {
        self.try_boot(folder, false)
    }

    fn try_boot(&self, folder: &Path, tell_failure: bool) -> Result<Guest, Error> {
        use std::os::unix::process::ExitStatusExt;
        let arguments = self.prepare(folder)?;
        let files = GuestFiles::in_folder(folder);
        let program = find_program(Path::new("qemu-system-x86_64"))?;
        let mut process = Process::start("QEMU", &program, arguments, &[], &folder.join("qemu.log"), true)?;
        let (commands, output) = process.take_pipes();
        let transcript = Transcript::of(output);
        let mut guest = Guest { process, files, commands, transcript, scripts: 0, checked: 0 };
        match guest.await_ready(self.boot_limit) {
            // A refusal of QEMU to start (exit status 1) is not emulation gone wrong: no second try.
            Err(Error::Ended { program, status, .. }) if status.signal().is_none() => {
                Err(Error::Ended { program, status, expected: " before the guest was up" })
            }
            Err(error) => {
                if tell_failure {
                    eprintln!("{}", guest.report());
                }
                Err(error)
            }
            Ok(()) => Ok(guest),
        }
    }

    /// Writes what the machine boots to `folder`, and returns the arguments for a QEMU that others start, such as one inside
    /// another machine. The scripts go over its standard input and output.
    pub fn prepare(&self, folder: &Path) -> Result<Vec<String>, Error> {
        let initramfs = folder.join("initramfs");
        self.initramfs.write(&initramfs)?;
        Ok(self.qemu_arguments(&initramfs, &GuestFiles::in_folder(folder)))
    }

    fn qemu_arguments(&self, initramfs: &Path, files: &GuestFiles) -> Vec<String> {
        let memory = self.memory_mib;
        let words = "-nodefaults -no-user-config -display none -machine q35,memory-backend=mem -action reboot=shutdown \
                     -serial chardev:console -serial chardev:scripts -chardev stdio,id=scripts,signal=off \
                     -mon chardev=monitor,mode=control";
        let accelerator = match self.accelerator {
            Accelerator::Emulation => ["-accel", "tcg,thread=single", "-cpu", "max"],
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
        };
        let mut arguments =
            accelerator.into_iter().chain(words.split_whitespace()).map(str::to_owned).collect::<Vec<_>>();
        let backend =
            if self.hugepages { "memory-backend-file,mem-path=/dev/hugepages" } else { "memory-backend-memfd" };
        let pairs = [
            ("-m", format!("{memory}M{}", self.hotplug)),
            ("-object", format!("{backend},id=mem,size={memory}M,share=on")),
            ("-smp", self.cpus.to_string()),
            ("-chardev", format!("file,id=console,path={}", files.console.display())),
            ("-chardev", format!("socket,id=monitor,server=on,wait=off,path={}", files.monitor.display())),
            ("-kernel", self.kernel.image.display().to_string()),
            ("-initrd", initramfs.display().to_string()),
        ];
        arguments.extend(pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
        // Warnings are shown; the rest of the kernel's log would cost seconds on an emulated serial port.
        let append = format!("console=ttyS0 loglevel=5 panic=-1 reboot=t no_timer_check{}", self.append);
        arguments.extend(["-append".to_owned(), append]);
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

/// Whether a boot may have failed for a reason that lies in the emulation alone.
fn is_emulation_failure(error: &Error) -> bool {
    use std::os::unix::process::ExitStatusExt;
    match error {
        Error::Timeout { .. } => true,
        Error::Ended { status, .. } => status.signal().is_some(),
        _ => false,
    }
}

fn test_name() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

#[derive(Clone, Debug)]
struct GuestFiles {
    console: PathBuf,
    monitor: PathBuf,
}

impl GuestFiles {
    fn in_folder(folder: &Path) -> GuestFiles {
        GuestFiles { console: folder.join("console.log"), monitor: folder.join("monitor.sock") }
    }
}

/// A virtual machine that is up and takes scripts.
pub struct Guest {
    process: Process,
    files: GuestFiles,
    commands: ChildStdin,
    transcript: Transcript,
    scripts: u32,
    /// Up to where the console needs no further look.
    checked: usize,
}

/// What a script in the guest printed, and its own exit status.
#[derive(Clone, Debug)]
pub struct Output {
    /// 0 if all went well.
    pub status: i32,
    /// Standard output and standard error.
    pub text: String,
}

/// Parts of lines in the kernel's log that no test may cause.
const COMPLAINTS: [&str; 8] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "BUG:",
    "Oops",
    "Kernel panic",
    "blocked for more than",
    // A device used an address which is not mapped for it: "DMAR: [DMA Write NO_PASID] Request device …".
    "DMAR: [DMA",
];

/// Where in the kernel a warning concerns us. An emulated CPU, or one that is too slow, causes others by itself.
const WARNINGS: [&str; 8] = [
    "at block/",
    "at drivers/block/",
    "at drivers/iommu/",
    "at drivers/nvme/",
    "at drivers/vfio/",
    "at drivers/virtio/",
    "at fs/",
    "at mm/",
];

fn is_complaint(line: &str) -> bool {
    let has = |parts: &[&str]| parts.iter().any(|part| line.contains(part));
    // A soft lockup only says that the CPU was not given any time.
    (has(&COMPLAINTS) && !line.contains("soft lockup")) || (line.contains("WARNING:") && has(&WARNINGS))
}

impl Guest {
    /// Runs a script in the guest: by a fresh `bash`, with `/` as working directory. Returns what
    /// it printed on both outputs; a status other than 0 is an error.
    pub fn run(&mut self, script: &str, limit: Duration) -> Result<String, Error> {
        let output = self.try_run(script, limit)?;
        if output.status == 0 {
            Ok(output.text)
        } else {
            Err(Error::Script { script: script.to_owned(), status: output.status, output: output.text })
        }
    }

    /// Like [`Guest::run`], for scripts that may fail.
    pub fn try_run(&mut self, script: &str, limit: Duration) -> Result<Output, Error> {
        let deadline = Instant::now() + limit;
        let number = self.send(script)?;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.next_line(&format!("@begin {number}"), left())?;
        let (text, status) = self.next_line(&format!("@end {number} "), left())?;
        let status = status.trim().parse().map_err(|_| Error::Script {
            script: script.to_owned(),
            status: -1,
            output: format!("{text}\n(no exit status but {status:?})"),
        })?;
        // The closing line is preceded by a line feed of its own.
        Ok(Output { status, text: text.strip_suffix('\n').unwrap_or(&text).to_owned() })
    }

    /// The process of QEMU.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Everything the guest's kernel wrote to its console.
    pub fn console(&self) -> String {
        std::fs::read(&self.files.console).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Fails if the kernel's console shows an I/O error, a file system error or a fault of the kernel.
    pub fn check_kernel_log(&self) -> Result<(), Error> {
        let console = self.console();
        let lines = console.get(self.checked..).unwrap_or_default().lines().filter(|line| is_complaint(line));
        let lines = lines.collect::<Vec<_>>().join("\n");
        if lines.is_empty() { Ok(()) } else { Err(Error::KernelLog(lines)) }
    }

    /// Returns what the kernel has written since the last call (or the boot), and has [`Guest::check_kernel_log`] not look
    /// at it: for a test that causes complaints on purpose and looks for them itself.
    pub fn take_kernel_log(&mut self) -> String {
        let console = self.console();
        let taken = console.get(self.checked..).unwrap_or_default().to_owned();
        self.checked = console.len();
        taken
    }

    /// A connection to QEMU's monitor. Only one at a time.
    pub fn monitor(&self) -> Result<Qmp, Error> {
        Qmp::connect(&self.files.monitor)
    }

    /// Looks through the kernel's log, restarts the guest inside the same QEMU, and waits until it takes scripts again.
    ///
    /// A kernel that goes down stops its devices under requests on their way, which it reports as I/O errors; what it
    /// says from here until it is up again is therefore not looked at.
    pub fn reboot(&mut self, limit: Duration) -> Result<(), Error> {
        self.check_kernel_log()?;
        self.monitor()?.execute("set-action", json!({ "reboot": "reset" }))?;
        self.send("reboot -f")?;
        self.await_ready(limit)?;
        self.checked = self.console().len();
        self.monitor()?.execute("set-action", json!({ "reboot": "shutdown" }))?;
        Ok(())
    }

    /// Powers the guest off, waits for QEMU's end and looks through the kernel's log. No I/O may be under way: see
    /// [`Guest::reboot`].
    pub fn power_off(mut self, limit: Duration) -> Result<(), Error> {
        self.send("poweroff -f")?;
        let status = self.process.wait(limit)?;
        if !status.success() {
            let program = "QEMU".to_owned();
            return Err(Error::Ended {
                program,
                status,
                expected: " and not with success after the guest's power-off",
            });
        }
        self.check_kernel_log()
    }

    fn send(&mut self, script: &str) -> Result<u32, Error> {
        self.process.check_alive()?;
        self.scripts += 1;
        let line = format!("{} {}\n", self.scripts, base64(script.as_bytes()));
        self.commands.write_all(line.as_bytes()).map_err(Error::doing("sending a script to the guest"))?;
        self.commands.flush().map_err(Error::doing("sending a script to the guest"))?;
        Ok(self.scripts)
    }

    fn await_ready(&mut self, limit: Duration) -> Result<(), Error> {
        self.next_line("@ready ", limit).map(|_| ())
    }

    fn next_line(&mut self, prefix: &str, limit: Duration) -> Result<(String, String), Error> {
        if let Some(found) = self.transcript.next_line(prefix, limit)? {
            return Ok(found);
        }
        let status = poll(Duration::from_secs(10), "QEMU's end after its output had ended", || self.process.ended())?;
        Err(Error::Ended { program: "QEMU".to_owned(), status, expected: " while a guest was in use" })
    }

    fn report(&self) -> String {
        let console = self.console();
        let scripts = self.transcript.text();
        let qemu = self.process.log();
        format!("==== console ====\n{console}\n==== scripts ====\n{scripts}\n==== QEMU ====\n{qemu}\n==== end ====")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0, |group, &byte| group << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = (group >> (18 - 6 * place)) & 63;
            text.push(if place <= chunk.len() { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_from_what_emulation_causes() {
        assert!(is_complaint("[ 5.6] I/O error, dev vda, sector 30688 op 0x0:(READ) flags 0x80700"));
        assert!(is_complaint("[ 5.6] WARNING: CPU: 1 PID: 161 at block/blk-mq.c:309 blk_mq_x+0xca/0x160"));
        assert!(!is_complaint("[ 3.5] WARNING: CPU: 1 PID: 161 at arch/x86/kernel/traps.c:1120 exc_debug_kernel+0xca"));
        assert!(!is_complaint("[ 9.9] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [dd:99]"));
        assert!(is_complaint("[ 9.9] BUG: unable to handle page fault for address: ffffc90000000000"));
        assert!(!is_complaint("[ 0.0] Linux version 6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn base64_as_in_the_rfc() {
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
