//! `nvme-driver` on QEMU's controllers, beside the kernel's own driver: each reads what the other has written.

use std::path::Path;

use e2e::{Exception, Guest, Kernel, Lab, LabDrive, Layout};
use serde_json::{Value, json};

use crate::{LONG, SHORT, bind, folder, on_each_kernel, unbind};

/// Runs `lab-drive` in the guest, where it has to succeed: its report, and all that it printed.
pub(crate) fn lab_drive(guest: &mut Guest, arguments: &str) -> (Value, String) {
    let text = guest.run(&format!("{} {arguments}", env!("CARGO_BIN_EXE_lab-drive")), LONG).unwrap();
    let report = text.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no report: {text}"));
    (serde_json::from_str(report).unwrap(), text)
}

/// A namespace of one of the drives, and what is on it.
struct Disk {
    address: &'static str,
    namespace: u32,
    image: &'static str,
    block_bytes: usize,
    blocks: u64,
    seed: u64,
    except: Vec<Exception>,
}

impl Disk {
    fn new(address: &'static str, namespace: u32, image: &'static str, mib: u64, block_bytes: usize) -> Disk {
        let blocks = (mib << 20) / block_bytes as u64;
        Disk { address, namespace, image, block_bytes, blocks, seed: 0, except: Vec::new() }
    }

    /// Writes every block, with our driver; the report.
    fn fill(&mut self, guest: &mut Guest, seed: u64, options: &str) -> Value {
        (self.seed, self.except) = (seed, Vec::new());
        let arguments = format!("fill {} --namespace {} --seed {seed} {options}", self.address, self.namespace);
        let (report, _) = lab_drive(guest, &arguments);
        assert_eq!(report["blocks"], self.blocks);
        report
    }

    /// Does each kind of request, with our driver.
    fn change(&mut self, guest: &mut Guest) {
        let arguments = format!("change {} --namespace {} --seed {}", self.address, self.namespace, self.seed);
        let (report, _) = lab_drive(guest, &arguments);
        let changes = report["changes"].as_array().unwrap().iter();
        self.except = changes.map(|change| change.as_str().unwrap().parse().unwrap()).collect();
        assert!(self.except.len() >= 11, "{report}");
        assert!(report["compare"].as_str().unwrap().contains("Compare Failure"), "{report}");
    }

    /// Reads every block and compares it, with our driver; the report.
    fn verify(&self, guest: &mut Guest, options: &str) -> Value {
        let (address, namespace, seed) = (self.address, self.namespace, self.seed);
        let arguments =
            format!("verify {address} --namespace {namespace} --seed {seed} {} {options}", self.exceptions());
        let (report, _) = lab_drive(guest, &arguments);
        assert_eq!(report["blocks"], self.blocks);
        report
    }

    /// So that a success of [`Disk::verify`] means something.
    fn is_not_verified_under_another_seed(&self, guest: &mut Guest) {
        let program = env!("CARGO_BIN_EXE_lab-drive");
        let seed = self.seed + 100;
        let output = guest.try_run(&format!("{program} verify {} --seed {seed}", self.address), LONG).unwrap();
        assert_eq!(output.status, 1, "{}", output.text);
        assert!(output.text.contains(&format!("should hold {seed}, and holds")), "{}", output.text);
    }

    fn exceptions(&self) -> String {
        self.except.iter().map(|exception| format!("--except {exception} ")).collect()
    }

    /// A script that sets `disk` to the block device the kernel's driver has made of the namespace, and begins with the
    /// program's arguments that describe it.
    fn script(&self, rest: &str) -> String {
        let (address, namespace) = (self.address, self.namespace);
        let program = env!("CARGO_BIN_EXE_lab-drive");
        let is = format!("--seed {} --block-bytes {} --blocks {}", self.seed, self.block_bytes, self.blocks);
        format!(
            "set -eo pipefail
            # The kernel finds namespaces in any order, and numbers their devices as it finds them.
            find_disk() {{
                for disk in /sys/bus/pci/devices/{address}/nvme/nvme*/nvme*n*; do
                    [ \"$(cat $disk/nsid 2>/dev/null)\" = {namespace} ] && [ -b /dev/${{disk##*/}} ] && return
                done
                return 1
            }}
            for _ in $(seq 200); do find_disk && break; sleep 0.1; done
            [ \"$(cat $disk/queue/logical_block_size)\" = {} ]
            [ \"$(cat $disk/size)\" = {} ]
            disk=/dev/${{disk##*/}}; is='{is}'; program={program}
            {rest}",
            self.block_bytes,
            self.blocks * self.block_bytes as u64 / 512,
        )
    }

    /// Reads every block and compares it, with the kernel's driver.
    fn verify_by_kernel(&self, guest: &mut Guest) {
        let exceptions = self.exceptions();
        let read = format!("dd if=$disk iflag=direct bs=1M status=none | $program compare $is {exceptions}");
        guest.run(&self.script(&read), LONG).unwrap();
    }

    /// Writes every block with the kernel's driver, then has it write zeroes and discard.
    fn fill_by_kernel(&mut self, guest: &mut Guest, seed: u64) {
        (self.seed, self.except) = (seed, Vec::new());
        let write = "$program pattern $is | dd of=$disk iflag=fullblock oflag=direct bs=1M conv=fsync status=none
            blkdiscard -z -o $((1 << 20)) -l $((3 << 16)) $disk
            blkdiscard -f -o $((2 << 20)) -l $((1 << 20)) $disk";
        guest.run(&self.script(write), LONG).unwrap();
        let zeroes = |first: u64, bytes: u64| {
            let size = self.block_bytes as u64;
            format!("{}+{}=zeroes", first / size, bytes / size).parse().unwrap()
        };
        self.except = vec![zeroes(1 << 20, 3 << 16), zeroes(2 << 20, 1 << 20)];
    }

    /// Compares the drive's file, after QEMU has ended.
    fn verify_image(&self, folder: &Path) {
        let image = std::fs::read(folder.join(format!("{}.img", self.image))).unwrap();
        assert_eq!(image.len() as u64, self.blocks * self.block_bytes as u64);
        Layout::new(self.seed, self.block_bytes).except(&self.except).check(0, &image).unwrap();
    }
}

const PLAIN: &str = "0000:00:04.0";
const LARGE: &str = "0000:00:05.0";
const MDTS: [&str; 5] = ["0000:00:06.0", "0000:00:07.0", "0000:00:08.0", "0000:00:09.0", "0000:00:0a.0"];
const SEVERAL: &str = "0000:00:0b.0";
const BROKEN: &str = "0000:00:0c.0";
const UNREADABLE: u64 = 1234;
/// What QEMU notes in its log for each flush of a namespace.
const FLUSH: &str = "pci_nvme_flush_ns";

fn lab(kernel: &Kernel) -> Lab {
    let mut lab = Lab::new(kernel)
        .hugepages(32)
        .arguments(&["-trace", FLUSH])
        .drive(LabDrive::new("plain").size_mib(32))
        .drive(LabDrive::new("large").size_mib(16).logical_block_size(4096));
    for mdts in 1..=5 {
        let drive = LabDrive::new(&format!("mdts{mdts}")).size_mib(4).properties(&format!("mdts={mdts}"));
        lab = lab.drive(match mdts {
            1 => drive.properties("max_ioqpairs=1"),
            2 => drive.properties("max_ioqpairs=2,msix_qsize=2"),
            _ => drive,
        });
    }
    // Linux and this driver differ in what they serve; 1024 bytes per block only Linux does.
    lab.drive(LabDrive::new("several").namespace(4, 512).namespace(8, 4096).namespace(4, 1024))
        .drive(LabDrive::new("broken").size_mib(4).unreadable(UNREADABLE))
}

fn drives_hold_what_either_driver_has_written(kernel: &Kernel) {
    let folder = folder();
    let mut machine = lab(kernel).boot(folder.path()).unwrap();
    let guest = &mut machine;
    for address in [PLAIN, LARGE, SEVERAL, BROKEN].iter().chain(&MDTS) {
        bind(guest, address);
    }
    identities(guest);

    let mut plain = Disk::new(PLAIN, 1, "plain", 32, 512);
    let mut large = Disk::new(LARGE, 1, "large", 16, 4096);
    let mut one = Disk::new(SEVERAL, 1, "several-1", 4, 512);
    let mut two = Disk::new(SEVERAL, 2, "several-2", 8, 4096);
    plain.fill(guest, 1, "--wait switching");
    let before = flushes(folder.path());
    plain.change(guest);
    // A flush leaves nothing that could be read back.
    assert!(flushes(folder.path()) > before, "no flush has reached the drive");
    plain.is_not_verified_under_another_seed(guest);
    let report = plain.verify(guest, "--wait interrupts --no-shadow");
    assert!(report["interrupts"].as_u64().unwrap() > 0, "{report}");
    let report = large.fill(guest, 2, "--wait interrupts");
    assert!(report["interrupts"].as_u64().unwrap() > 0, "{report}");
    large.change(guest);
    one.fill(guest, 3, "");
    two.fill(guest, 4, "");
    one.verify(guest, "");
    let mut split = transfers_are_split(guest);
    queue_pairs_are_few(guest);
    read_errors_are_named(guest);

    // Over to the kernel's driver; and after it has written, back.
    let handed_over = [PLAIN, LARGE, SEVERAL, split.address];
    handed_over.iter().for_each(|address| unbind(guest, address));
    for (disk, seed) in [&mut plain, &mut large, &mut one, &mut two, &mut split].into_iter().zip(11..) {
        disk.verify_by_kernel(guest);
        disk.fill_by_kernel(guest, seed);
    }
    handed_over.iter().for_each(|address| bind(guest, address));
    for disk in [&plain, &large, &one, &two, &split] {
        disk.verify(guest, "");
    }
    let formatted = another_format(guest);
    machine.power_off(SHORT).unwrap();
    for disk in [&plain, &large, &one, &two, &split, &formatted] {
        disk.verify_image(folder.path());
    }
}

on_each_kernel!(drives_hold_what_either_driver_has_written);

/// Flushes that QEMU's controllers have done so far.
fn flushes(folder: &Path) -> usize {
    std::fs::read_to_string(folder.join("qemu.log")).unwrap().matches(FLUSH).count()
}

/// What each controller says of itself is what QEMU was told.
fn identities(guest: &mut Guest) {
    let namespace = |id: u32, mib: u64, block_bytes: u64| {
        json!({
            "id": id, "blocks": (mib << 20) / block_bytes, "block_bytes": block_bytes,
            "write_cache": true, "discard": true, "discard_reads_zeroes": true, "write_zeroes": true,
        })
    };
    let names = ["plain", "large", "mdts1", "mdts2", "mdts3", "mdts4", "mdts5", "several", "broken"];
    for (number, name) in (4..).zip(names) {
        let (report, _) = lab_drive(guest, &format!("identify 0000:00:{number:02x}.0"));
        assert_eq!(report["serial"], name, "{report}");
        assert_eq!(report["model"], "QEMU NVMe Ctrl", "{report}");
        assert_eq!(report["shadow_doorbells"], true, "{report}");
        // QEMU's temperature, in kelvins.
        assert_eq!(report["temperature"], 323, "{report}");
        // Without being told, QEMU takes 512 KiB.
        let mdts = name.strip_prefix("mdts").map_or(7, |mdts| mdts.parse().unwrap());
        assert_eq!(report["max_transfer"], 4096 << mdts, "{report}");
        let (pairs, vectors) = match name {
            "mdts1" => (1, 65),
            "mdts2" => (2, 2),
            _ => (64, 65),
        };
        assert_eq!((&report["queue_pairs"], &report["vectors"]), (&json!(pairs), &json!(vectors)), "{report}");
        let namespaces = report["namespaces"].as_array().unwrap();
        match name {
            "several" => {
                assert_eq!(namespaces[..2], [namespace(1, 4, 512), namespace(2, 8, 4096)], "{report}");
                let refused = namespaces[2]["error"].as_str().unwrap();
                assert!(refused.contains("namespace 3") && refused.contains("1024 bytes per block"), "{report}");
            }
            "plain" => assert_eq!(*namespaces, [namespace(1, 32, 512)], "{report}"),
            "large" => assert_eq!(*namespaces, [namespace(1, 16, 4096)], "{report}"),
            _ => assert_eq!(*namespaces, [namespace(1, 4, 512)], "{report}"),
        }
        let missing = report["missing"].as_str().unwrap();
        assert!(missing.contains("not active") && missing.contains("active are [1"), "{report}");
    }
}

/// Transfers of up to 1 MiB, on drives that take less and less of it at once. The disk on which most was split.
fn transfers_are_split(guest: &mut Guest) -> Disk {
    let mut disks = Vec::new();
    for (number, address) in MDTS.into_iter().enumerate() {
        let image = ["mdts1", "mdts2", "mdts3", "mdts4", "mdts5"][number];
        let mut disk = Disk::new(address, 1, image, 4, 512);
        let report = disk.fill(guest, 20 + number as u64, "");
        // 4 MiB by pieces of at most 8, 16, 32, 64 and 128 KiB.
        let fewest = 512u64 >> number;
        let commands = report["commands"].as_u64().unwrap();
        assert!(report["splits"].as_u64().unwrap() > 0, "{report}");
        assert!((fewest..fewest + 64).contains(&commands), "{report}");
        assert_eq!(disk.verify(guest, "--wait interrupts")["commands"], commands);
        disks.push(disk);
    }
    disks.swap_remove(0)
}

/// More queue pairs or vectors than there are get a clear error; those there are work all at once.
fn queue_pairs_are_few(guest: &mut Guest) {
    for (address, granted) in [(MDTS[0], 1), (MDTS[1], 2), (PLAIN, 64)] {
        let (report, _) = lab_drive(guest, &format!("queues {address}"));
        assert_eq!(report["granted"], granted, "{report}");
        let refused = report["refused"].as_str().unwrap();
        assert!(refused.contains(&format!("all {granted} queue pairs the controller granted are in use")), "{report}");
        // Shadow doorbells save some of the real ones.
        let count = |name: &str| report[name].as_u64().unwrap();
        assert!(count("submission_doorbells") < count("batches"), "{report}");
        match report["without_vector"].as_str() {
            Some(text) => assert!(text.contains("all 1 interrupt vectors for queue pairs are in use"), "{report}"),
            None => assert_ne!(granted, 2, "{report}"),
        }
    }
    // Fewer are asked for than there are, and no doorbell is in the shadow.
    let (report, _) = lab_drive(guest, &format!("queues {PLAIN} --max-queue-pairs 3 --no-shadow"));
    assert_eq!(report["granted"], 3, "{report}");
    assert_eq!(report["submission_doorbells"], report["batches"], "{report}");
}

fn read_errors_are_named(guest: &mut Guest) {
    let (report, _) = lab_drive(guest, &format!("read-error {BROKEN} --lba {UNREADABLE}"));
    let name = "Media and Data Integrity: Unrecovered Read Error (sct 2, sc 0x81";
    assert!(report["status"].as_str().unwrap().starts_with(name), "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.starts_with(&format!("Read of 512 bytes from block {UNREADABLE} on failed: {name}")), "{report}");
}

/// A namespace is formatted with other blocks, filled, and read as such by the kernel's driver.
fn another_format(guest: &mut Guest) -> Disk {
    let mut disk = Disk::new(MDTS[4], 1, "mdts5", 4, 4096);
    let (report, _) = lab_drive(guest, &format!("format {} --block-bytes 4096", disk.address));
    assert_eq!(report["blocks"], disk.blocks, "{report}");
    disk.fill(guest, 31, "");
    unbind(guest, disk.address);
    disk.verify_by_kernel(guest);
    disk
}
