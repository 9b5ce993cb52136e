//! What survives a power cut: every promise the target makes about data, against a drive that loses what it may lose.
//!
//! The machine dies again and again at random moments of a random load: the drive stops, the target is killed, and the
//! drive's volatile cache loses all or some of what was not flushed. A target on the same drive then has to find, in every
//! logical block, something the model ([`Blocks`]) allows. The load repeats for a seed (`E2E_SEED`); what the drive has
//! done at the moment of a cut depends on the machine too.

#[path = "../../vhost-blk/tests/common/mod.rs"]
mod front_end;

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use blk_perf::Random;
use e2e::{Blocks, Change, Promise, Target};
use front_end::{DEADLINE, Front, Region, Ring, SET_CONFIG, config};
use nvme_sim::{Config, FaultPlan, NamespaceConfig, PowerLoss, Simulator};
use vm_memory::{Bytes, GuestAddress};

/// Cuts of one test.
const CUTS: u64 = 100;
/// Logical blocks of the disk: few, so that each is written often.
const BLOCKS: u64 = 256;
/// Rings, each with one request under way.
const RINGS: u64 = 6;
/// Bytes of ring memory, buffers included.
const RING_BYTES: u64 = 0x10000;
const MOST_BLOCKS: u64 = 8;

/// Request types and the status for success (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
/// Offset of `writeback` in the configuration space (5.2.4).
const WRITEBACK: u32 = 32;

/// A request under way.
enum Pending {
    Read(Range<u64>),
    /// `through`: sent while the cache was written through.
    Change {
        blocks: Range<u64>,
        through: bool,
    },
    Flush(Promise),
}

/// One life of the target and its front-end, from start to power cut.
struct Life<'a> {
    front: Front,
    rings: Vec<(Ring<'a>, Option<Pending>)>,
    memory: &'a Region,
    model: &'a mut Blocks,
    random: &'a mut Random,
    sectors_per_block: u64,
    through: bool,
    /// Flushes in 100 requests.
    flushes: u64,
    /// The drive has stopped.
    cut: bool,
}

impl<'a> Life<'a> {
    fn begin(socket: &Path, memory: &'a Region, model: &'a mut Blocks, random: &'a mut Random) -> Life<'a> {
        let front = Front::connect(socket);
        front.negotiate();
        memory.add(&front);
        let sectors_per_block = model.block_bytes() as u64 / 512;
        let rings = (0..RINGS).map(|index| (Ring::new(memory, index as u32, index * RING_BYTES), None)).collect();
        let flushes = random.below(10);
        let life = Life { front, rings, memory, model, random, sectors_per_block, through: false, flushes, cut: false };
        life.rings.iter().for_each(|(ring, _)| ring.start(&life.front));
        life
    }

    /// Reads the whole disk, before anything is written: after a cut this is what was kept.
    fn look(&mut self) {
        for first in (0..BLOCKS).step_by(MOST_BLOCKS as usize) {
            let blocks = first..first + MOST_BLOCKS;
            let ring = &mut self.rings[0].0;
            let place = (ring.data(), (MOST_BLOCKS as usize * self.model.block_bytes()) as u32);
            assert_eq!(ring.request(IN, first * self.sectors_per_block, place), OK, "reading block {first}");
            let data = self.data(0, &blocks);
            assert_eq!(self.model.was_read(&blocks, &data), [""; 0]);
        }
    }

    fn data(&self, ring: usize, blocks: &Range<u64>) -> Vec<u8> {
        let mut data = vec![0; (blocks.end - blocks.start) as usize * self.model.block_bytes()];
        self.memory.memory.read_slice(&mut data, GuestAddress(self.rings[ring].0.data())).unwrap();
        data
    }

    /// Takes the answer of a ring's request; true if none is under way then.
    fn take(&mut self, number: usize) -> bool {
        let (ring, pending) = &mut self.rings[number];
        if pending.is_none() {
            return true;
        }
        let Some(status) = ring.poll() else { return false };
        if status != OK {
            assert!(self.cut, "a request fails with {status} while the drive is well");
            // What it has done is open.
            return true;
        }
        match pending.take() {
            Some(Pending::Read(blocks)) => {
                let data = self.data(number, &blocks);
                assert_eq!(self.model.was_read(&blocks, &data), [""; 0]);
            }
            // To leave write-through is to wait for all requests first (`switch`), so this one was under it all its life:
            // then it is stable when it is answered (virtio 1.2, 5.2.6.2).
            Some(Pending::Change { blocks, through }) => self.model.changed(&blocks, through),
            Some(Pending::Flush(promise)) => self.model.keep(promise),
            None => {}
        }
        true
    }

    /// Waits until nothing is under way.
    fn drain(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while !(0..self.rings.len()).all(|ring| self.take(ring)) {
            assert!(Instant::now() < deadline, "requests are not answered");
            std::thread::yield_now();
        }
    }

    /// Sends one more request, as soon as a ring is free.
    fn step(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        let first = self.random.below(RINGS) as usize;
        let free = loop {
            let all = self.rings.len();
            if let Some(free) = (first..first + all).map(|ring| ring % all).find(|ring| self.take(*ring)) {
                break free;
            }
            assert!(Instant::now() < deadline, "requests are not answered");
            std::thread::yield_now();
        };
        let first = self.random.below(BLOCKS);
        let blocks = first..(first + 1 + self.random.below(MOST_BLOCKS)).min(BLOCKS);
        let (sector, count) = (first * self.sectors_per_block, (blocks.end - first) as u32);
        let ring = &mut self.rings[free].0;
        let place = ring.data();
        let bytes = count * self.model.block_bytes() as u32;
        match self.random.below(100) {
            kind if kind < self.flushes => {
                ring.submit(FLUSH, 0, (0, 0));
                self.rings[free].1 = Some(Pending::Flush(self.model.promise()));
            }
            // One request at a time for a block: what it holds then is not a matter of luck.
            _ if !self.model.claim_all(&blocks) => {}
            ..20 => {
                ring.submit(IN, sector, (place, bytes));
                self.rings[free].1 = Some(Pending::Read(blocks));
            }
            kind => {
                let change = match kind {
                    20..80 => Change::Write,
                    80..90 => Change::Zero,
                    _ => Change::Discard,
                };
                let data = self.model.begin_change(&blocks, change);
                let through = self.through;
                let sectors = count * self.sectors_per_block as u32;
                let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
                let (kind, sector, data) = match change {
                    Change::Write => (OUT, sector, data),
                    Change::Zero => (WRITE_ZEROES, 0, range),
                    Change::Discard => (DISCARD, 0, range),
                };
                self.memory.memory.write_slice(&data, GuestAddress(place)).unwrap();
                ring.submit(kind, sector, (place, data.len() as u32));
                self.rings[free].1 = Some(Pending::Change { blocks, through });
            }
        }
    }

    /// Switches the cache between write-back and write-through, under load when to the latter.
    fn switch(&mut self, through: bool) {
        if !through {
            self.drain();
        }
        (0..self.rings.len()).for_each(|ring| _ = self.take(ring));
        let promise = self.model.promise();
        self.front.accept(SET_CONFIG, &config(WRITEBACK, &[u8::from(!through)]), &[]);
        if through && !self.through {
            // What was answered before must not depend on a flush that a driver of this mode does not send.
            self.model.keep(promise);
        }
        self.through = through;
    }
}

/// Cuts the power [`CUTS`] times.
fn cuts(block_bytes: u32) {
    let seed = e2e::seed();
    let mut random = Random::new(seed, block_bytes.into());
    let folder = tempfile::tempdir().unwrap();
    let namespace = NamespaceConfig { bytes: BLOCKS * u64::from(block_bytes), block_bytes, ..Default::default() };
    // The seed also decides which blocks are lost.
    let faults = FaultPlan { seed, ..FaultPlan::default() };
    let drive = Config { namespaces: vec![namespace], volatile_write_cache: true, faults, ..Config::default() };
    let drive = Simulator::start(drive, &folder.path().join("drive")).unwrap();
    let memory = Region::new(0, RINGS * RING_BYTES);
    let mut model = Blocks::new(BLOCKS as usize, block_bytes as usize);
    let (mut lost, mut under_way) = (0, 0);
    for cut in 0..=CUTS {
        let socket = folder.path().join("disk");
        let (device, path) = (format!("vfio-user:{}", drive.socket().display()), socket.display().to_string());
        let arguments = ["--device", &device, "--socket-path", &path];
        let target = Target::vhost_blk(folder.path(), &arguments, vec![socket.clone()]).unwrap();
        let mut life = Life::begin(&socket, &memory, &mut model, &mut random);
        life.look();
        if cut == CUTS {
            target.stop().unwrap();
            break;
        }
        // Half of the lives begin with the cache written through; a mode lasts for some requests.
        let steps = 1 + life.random.below(400);
        if life.random.chance(1, 2) {
            life.switch(true);
        }
        for _ in 0..steps {
            if life.random.chance(1, 150) {
                life.switch(!life.through);
            }
            life.step();
        }
        // Somewhere between the last request's doorbell and its answer, or a little later.
        let moment = Instant::now() + Duration::from_micros(life.random.below(300));
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        // Nothing is carried out from here on, by nobody.
        drive.remove();
        life.cut = true;
        drop(target);
        // What the target has answered by now was a promise.
        (0..life.rings.len()).for_each(|ring| _ = life.take(ring));
        under_way += life.rings.iter().filter(|(_, pending)| pending.is_some()).count();
        let loss = if life.random.chance(1, 4) { PowerLoss::All } else { PowerLoss::Some };
        model.abandon();
        model.power_cut();
        lost += drive.power_cut_losing(loss).unwrap();
        drive.reinsert().unwrap();
    }
    let old = model.went_back();
    println!("{CUTS} cuts, {under_way} requests under way; {lost} blocks lost, {old} had lost what was answered");
    // Else the drive lost nothing, or the cuts met an idle target: nothing was proved.
    assert!(lost > CUTS && old > CUTS && under_way > 0, "{lost} {old} {under_way}");
}

#[test]
fn promises_hold_over_power_cuts_with_blocks_of_512_bytes() {
    cuts(512);
}

#[test]
fn promises_hold_over_power_cuts_with_blocks_of_4096_bytes() {
    cuts(4096);
}
