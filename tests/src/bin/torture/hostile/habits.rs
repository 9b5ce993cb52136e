//! What a hostile front-end does, once it is connected.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};

use crate::hostile::Deeds;
use crate::hostile::line::{Buffer, HostileMemory, HostileRing, Line, RING_BYTES, TABLE_BYTES, add, pair, region};
use crate::random::Random;

const MIB: u64 = 1 << 20;
/// The guest's memory: rings, tables, headers, data.
const BYTES: u64 = 64 * MIB;
const TABLES: u64 = MIB;
const HEADERS: u64 = 24 * MIB;
const DATA: u64 = 32 * MIB;
const MOST_RINGS: u64 = 4;
/// Entries of a ring.
const SIZES: [u16; 3] = [16, 64, 256];
/// Sectors of the disk that it uses.
const SECTORS: u64 = 512 * MIB / 512;

const _: () = assert!(TABLES + MOST_RINGS * 256 * TABLE_BYTES <= HEADERS);

/// Features: FLUSH, DISCARD, WRITE_ZEROES, CONFIG_WCE, INDIRECT_DESC, protocol features, VERSION_1; EVENT_IDX is left out.
const FEATURES: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14 | 1 << 28 | 1 << 30 | 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;

macro_rules! habits {
    ($($habit:ident: $name:literal),* $(,)?) => {
        /// One of them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Habit { $($habit),* }

        const ALL: &[Habit] = &[$(Habit::$habit),*];

        impl Habit {
            pub(crate) fn name(self) -> &'static str {
                match self { $(Habit::$habit => $name),* }
            }
        }
    };
}

habits! {
    Sound: "sound requests",
    Messages: "wrong messages",
    BrokenRings: "broken rings",
    Regions: "regions added and removed",
    Shorten: "memory shortened",
    Events: "eventfd tricks",
    Log: "log scribbled",
    Resets: "resets",
    Long: "long requests",
    Odd: "odd addresses",
    Connections: "more connections",
    Config: "configuration",
    Kicks: "kicks for nothing",
    Scribble: "memory scribbled",
}

impl Habit {
    pub(crate) fn draw(random: &mut Random) -> Habit {
        ALL[random.below(ALL.len() as u64) as usize]
    }
}

/// A connection with rings that run, as far as the target allows.
pub(super) struct Session<'a> {
    line: Line,
    socket: PathBuf,
    memory: HostileMemory,
    /// Of GET_INFLIGHT_FD: what was told, and the file.
    log: Option<(Vec<u8>, File)>,
    rings: Vec<HostileRing>,
    /// Descriptors of all kinds.
    pile: Vec<OwnedFd>,
    deeds: &'a mut Deeds,
}

impl<'a> Session<'a> {
    /// Comes as an honest front-end does.
    pub(super) fn open(socket: &Path, random: &mut Random, deeds: &'a mut Deeds) -> io::Result<Session<'a>> {
        let line = Line::connect(socket)?;
        let packed = random.one_in(2);
        let memory = HostileMemory::new(0, BYTES)?;
        let mut rings = Vec::new();
        for index in 0..random.between(1..=MOST_RINGS) {
            let size = SIZES[random.below(3) as usize];
            let tables = TABLES + index * 256 * TABLE_BYTES;
            rings.push(HostileRing::new(index as u32, size, packed, index * RING_BYTES, tables)?);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        let (one, other) = UnixStream::pair()?;
        let (reader, writer) = io::pipe()?;
        let null = File::open("/dev/null")?;
        let pile = vec![event, one.into(), other.into(), reader.into(), writer.into(), null.into()];
        let mut session = Session { line, socket: socket.into(), memory, log: None, rings, pile, deeds };
        session.introduce(random, packed)?;
        Ok(session)
    }

    fn introduce(&mut self, random: &mut Random, packed: bool) -> io::Result<()> {
        let line = &self.line;
        let offered = line.ask_u64(1)?;
        let features = offered & (FEATURES | if packed { F_RING_PACKED } else { 0 });
        let protocol = line.ask_u64(15)?;
        let mut agreed = line.tell(16, &protocol.to_ne_bytes(), &[])?;
        agreed &= line.tell(3, &[], &[])?;
        agreed &= line.tell(2, &features.to_ne_bytes(), &[])?;
        if random.one_in(2) {
            let mut asked = [0; 24];
            asked[16..18].copy_from_slice(&(self.rings.len() as u16).to_ne_bytes());
            asked[18..20].copy_from_slice(&256u16.to_ne_bytes());
            let (told, file) = line.ask(31, &asked)?;
            if let Some(file) = file {
                agreed &= line.tell(32, &told, &[file.as_raw_fd()])?;
                self.log = Some((told, file));
            }
        }
        agreed &= line.tell(37, &self.memory.region(), &[self.memory.file.as_raw_fd()])?;
        for ring in &self.rings {
            agreed &= ring.start(line)?;
        }
        self.deeds.sessions += u64::from(agreed);
        self.deeds.refusals += u64::from(!agreed);
        Ok(())
    }

    /// Tells something and counts what was refused. An error: the connection has ended, or nothing comes back any more.
    fn tell(&mut self, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<bool> {
        let told = self.line.tell(request, body, files);
        self.deeds.refusals += u64::from(!matches!(told, Ok(true)));
        told
    }

    fn any_fd(&self, random: &mut Random) -> RawFd {
        match random.below(self.pile.len() as u64 + 2) {
            0 => self.memory.file.as_raw_fd(),
            1 => self.rings[0].kick.as_raw_fd(),
            other => self.pile[other as usize - 2].as_raw_fd(),
        }
    }

    fn any_ring(&self, random: &mut Random) -> usize {
        random.below(self.rings.len() as u64) as usize
    }

    /// Makes requests available, as long as there is room, and kicks.
    fn offer(&mut self, which: usize, count: u64, mut chain: impl FnMut(&HostileMemory, u64) -> Vec<Buffer>) {
        let ring = &mut self.rings[which];
        for number in 0..count.min(ring.size.into()) {
            let chain = chain(&self.memory, HEADERS + 4096 * number);
            ring.offer(&self.memory, &chain);
            self.deeds.requests += 1;
        }
        ring.kick();
    }

    fn linger(&mut self, which: usize, random: &mut Random) {
        let most = random.time(Duration::from_millis(20));
        self.deeds.answers += self.rings[which].linger(&self.memory, most);
    }

    /// Does what the habit says. An error: there is nobody to talk to any more.
    pub(super) fn follow(&mut self, habit: Habit, random: &mut Random, held: &mut Vec<UnixStream>) -> io::Result<()> {
        *self.deeds.habits.entry(habit.name()).or_default() += 1;
        // Rarely is there nothing under way.
        if !random.one_in(4) {
            self.sound(random);
        }
        match habit {
            Habit::Sound => {
                let which = self.any_ring(random);
                self.linger(which, random);
            }
            Habit::Messages => self.messages(random)?,
            Habit::BrokenRings => self.broken_rings(random)?,
            Habit::Regions => self.regions(random)?,
            Habit::Shorten => self.shorten(random),
            Habit::Events => self.events(random)?,
            Habit::Log => self.scribble_log(random)?,
            Habit::Resets => self.resets(random)?,
            Habit::Long => self.long(random),
            Habit::Odd => self.odd(random),
            Habit::Connections => self.connections(random, held),
            Habit::Config => self.config(random)?,
            Habit::Kicks => {
                for _ in 0..random.between(1..=500) {
                    self.rings[0].kick();
                }
            }
            Habit::Scribble => self.scribble(random),
        }
        self.line.drain();
        Ok(())
    }

    /// Reads, writes and flushes that are in order.
    fn sound(&mut self, random: &mut Random) {
        let which = self.any_ring(random);
        let count = random.between(1..=40);
        let bytes = [512, 4096, 65536][random.below(3) as usize];
        let (kind, sector) = ([0, 1, 4][random.below(3) as usize], random.below(SECTORS - 128));
        self.offer(which, count, |memory, at| {
            let data = (DATA + at - HEADERS, bytes, kind == 0);
            request(memory, at, kind, sector, if kind == 4 { &[] } else { std::slice::from_ref(&data) })
        });
    }

    fn messages(&mut self, random: &mut Random) -> io::Result<()> {
        for _ in 0..random.between(1..=12) {
            let body: Vec<u8> = if random.one_in(4) {
                (0..random.below(300)).map(|_| random.next() as u8).collect()
            } else {
                // Words that might mean something.
                let words = [0, 1, 2, 0x1000, 1 << 40, u64::MAX, crate::memory::USER, 1 << 32];
                (0..random.below(9)).flat_map(|_| words[random.below(8) as usize].to_ne_bytes()).collect()
            };
            let size = body.len() as u64 + if random.one_in(8) { random.next() } else { 0 };
            let flags = if random.one_in(8) { random.next() as u32 } else { [1, 9][random.below(2) as usize] };
            let files: Vec<RawFd> = (0..random.below(4)).map(|_| self.any_fd(random)).collect();
            self.deeds.refusals += 1;
            self.line.send(random.below(48) as u32, flags, size as u32, &body, &files)?;
        }
        Ok(())
    }

    fn broken_rings(&mut self, random: &mut Random) -> io::Result<()> {
        let which = self.any_ring(random);
        for _ in 0..random.between(1..=3) {
            let ring = &mut self.rings[which];
            let slot = ring.at + 16 * u64::from(ring.offered % ring.size);
            match random.below(6) {
                // More than the ring has places for.
                0 if !ring.packed => {
                    let far = ring.offered.wrapping_add(ring.size + 1 + random.below(1000) as u16);
                    self.memory.write(ring.driver() + 2, &far.to_le_bytes());
                }
                1 => ring.offer(&self.memory, &[(random.next(), random.next() as u32, random.one_in(2)); 3]),
                2 => ring.offer(&self.memory, &[]),
                3 => ring.offer(&self.memory, &[(HEADERS, 16, true), (HEADERS, 0, false)]),
                // A table in a table; descriptors that follow each other in a circle.
                4 => {
                    ring.offer(&self.memory, &[(HEADERS, 16, false), (HEADERS + 64, 1, true)]);
                    let table = TABLES + ring.index as u64 * 256 * TABLE_BYTES;
                    ring.table(&self.memory, table, &[(table, 32, false), (HEADERS, 1, true)], 1 << random.below(16));
                }
                _ => {
                    ring.offer(&self.memory, &[(HEADERS, 16, false), (HEADERS + 64, 1, true)]);
                    let bytes: Vec<u8> = (0..16).map(|_| random.next() as u8).collect();
                    self.memory.write(slot, &bytes);
                }
            }
            self.deeds.requests += 1;
            self.rings[which].kick();
            self.linger(which, random);
            self.restart(which)?;
        }
        Ok(())
    }

    /// Stops a ring, whatever it does, and begins it anew.
    fn restart(&mut self, which: usize) -> io::Result<()> {
        self.line.ask(11, &pair(which as u32, 0))?;
        self.rings[which].wipe(&self.memory);
        self.rings[which].start(&self.line).map(drop)
    }

    fn regions(&mut self, random: &mut Random) -> io::Result<()> {
        let sizes = [4096, MIB, 1 << 30, 1 << 40, 64 << 40, 0x1800, 0];
        let mut added = Vec::new();
        for _ in 0..random.between(1..=40) {
            let bytes = sizes[random.below(7) as usize];
            let guest = if random.one_in(4) { random.next() } else { (1 + random.below(1 << 20)) << 26 };
            // One file as several regions, too.
            let own = HostileMemory::new(guest, bytes.max(1));
            let file = if random.one_in(4) { &self.memory.file } else { &own.as_ref().map_err(|_| gone())?.file };
            let file = file.as_raw_fd();
            let offset = if random.one_in(8) { random.next() } else { 0 };
            let body = region(guest, bytes, offset);
            if self.tell(37, &body, &[file])? {
                added.push(body);
            }
        }
        if random.one_in(4) {
            // All of it in other words, while rings run.
            let body = [&pair(1, 0)[..], &self.memory.region()[8..]].concat();
            self.tell(5, &body, &[self.memory.file.as_raw_fd()])?;
            return Ok(());
        }
        for body in added {
            if !random.one_in(4) {
                self.tell(38, &body, &[])?;
            }
        }
        if random.one_in(4) {
            let own = self.memory.region();
            self.tell(38, &own, &[])?;
        }
        Ok(())
    }

    fn shorten(&mut self, random: &mut Random) {
        let bytes = [0, 4096, TABLES, DATA, BYTES / 2 + 100, BYTES - 1][random.below(6) as usize];
        let _ = self.memory.file.set_len(bytes);
        self.rings[0].kick();
        let which = self.any_ring(random);
        self.linger(which, random);
        if random.one_in(2) {
            let _ = self.memory.file.set_len(BYTES);
        }
        self.sound(random);
        self.linger(which, random);
    }

    fn events(&mut self, random: &mut Random) -> io::Result<()> {
        let which = self.any_ring(random);
        match random.below(4) {
            // The flag belongs to the open file description, which is shared.
            0 => {
                for ring in &self.rings {
                    let _ = fcntl_setfl(&ring.call, OFlags::NONBLOCK);
                    // A full counter: a write of one more waits.
                    let _ = rustix::io::read(&ring.call, &mut [0; 8]);
                    add(&ring.call, u64::MAX - 1);
                    for event in [&ring.kick, &ring.call] {
                        let _ = fcntl_setfl(event, OFlags::empty());
                    }
                }
            }
            // One eventfd for everything.
            1 => {
                let event = self.rings[0].kick.as_raw_fd();
                for index in 0..self.rings.len() as u64 {
                    self.tell(12, &index.to_ne_bytes(), &[event])?;
                    self.tell(13, &index.to_ne_bytes(), &[event])?;
                }
            }
            2 => {
                let fd = self.any_fd(random);
                let request = 12 + random.below(3) as u32;
                self.tell(request, &(which as u64).to_ne_bytes(), &[fd])?;
            }
            // Polls instead of being told.
            _ => _ = self.tell(13, &(which as u64 | 1 << 8).to_ne_bytes(), &[])?,
        }
        self.sound(random);
        self.linger(which, random);
        Ok(())
    }

    fn scribble_log(&mut self, random: &mut Random) -> io::Result<()> {
        if let Some((told, file)) = &self.log {
            use std::os::unix::fs::FileExt;
            let bytes = told[..8].iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte)).max(1);
            for _ in 0..random.between(1..=2000) {
                let at = if random.one_in(2) { random.below(bytes.min(256)) } else { random.below(bytes) };
                let _ = file.write_all_at(&random.next().to_ne_bytes()[..1 + random.below(8) as usize], at);
            }
            if random.one_in(3) {
                let _ = file.set_len(random.below(bytes));
            }
        }
        self.sound(random);
        let which = self.any_ring(random);
        self.linger(which, random);
        self.restart(which)?;
        // What is left of it, for a ring that begins.
        if let Some((told, file)) = &self.log {
            let file = file.as_raw_fd();
            let told = told.clone();
            self.tell(32, &told, &[file])?;
            self.restart(which)?;
        }
        Ok(())
    }

    fn resets(&mut self, random: &mut Random) -> io::Result<()> {
        for _ in 0..random.between(1..=20) {
            match random.below(4) {
                0 => {
                    self.tell(34, &[], &[])?;
                    for which in 0..self.rings.len() {
                        self.rings[which].wipe(&self.memory);
                        self.rings[which].start(&self.line)?;
                    }
                }
                1 => {
                    let which = self.any_ring(random);
                    self.restart(which)?;
                }
                2 => {
                    // Begins anew on the same connection, as QEMU's device_add does.
                    self.line.ask_u64(1)?;
                    self.tell(3, &[], &[])?;
                    let region = self.memory.region();
                    self.tell(37, &region, &[self.memory.file.as_raw_fd()])?;
                }
                _ => {
                    let which = self.any_ring(random) as u32;
                    self.tell(18, &pair(which, 0), &[])?;
                    self.tell(18, &pair(which, 1), &[])?;
                }
            }
            self.sound(random);
        }
        Ok(())
    }

    /// Ranges by the hundred, and transfers as long as a table allows.
    fn long(&mut self, random: &mut Random) {
        let which = self.any_ring(random);
        let kind = [0, 1, 11, 13][random.below(4) as usize];
        let ranges = random.between(1..=256) as u32;
        let sectors = if random.one_in(2) { u32::MAX } else { random.below(SECTORS) as u32 };
        let pieces = random.between(1..=64);
        let count = random.between(1..=4);
        self.offer(which, count, |memory, at| {
            if kind >= 11 {
                let range = [&0u64.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
                memory.write(DATA, &range.repeat(ranges as usize));
                return request(memory, at, kind, 0, &[(DATA, 16 * ranges, false)]);
            }
            // The same megabytes over and over.
            let data: Vec<Buffer> = (0..pieces).map(|_| (DATA, 8 * MIB as u32, kind == 0)).collect();
            request(memory, at, kind, 0, &data)
        });
        self.linger(which, random);
    }

    /// Data that some drives cannot reach where it lies.
    fn odd(&mut self, random: &mut Random) {
        let which = self.any_ring(random);
        let shift = random.between(1..=511);
        let (pieces, kind) = (random.between(1..=200), random.below(2) as u32);
        let bytes = [512, 0x1_0000, MIB as u32][random.below(3) as usize];
        let count = random.between(1..=24);
        self.offer(which, count, |memory, at| {
            let data: Vec<Buffer> = (0..pieces).map(|_| (DATA + shift, bytes, kind == 0)).collect();
            request(memory, at, kind, 0, &data)
        });
        self.linger(which, random);
    }

    fn connections(&mut self, random: &mut Random, held: &mut Vec<UnixStream>) {
        for _ in 0..random.between(1..=8) {
            let Ok(line) = Line::connect(&self.socket) else { return };
            match random.below(4) {
                0 => {}
                1 => line.raw(&[1, 0, 0, 0, 1, 0][..1 + random.below(6) as usize]),
                2 => {
                    // As far as it is served.
                    let _ = line.stream.set_read_timeout(Some(Duration::from_millis(20)));
                    let _ = line.ask_u64(1).and_then(|_| line.ask_u64(17));
                }
                _ => {
                    let _ = line.send(5, 1, 200, &[0; 100], &[self.memory.file.as_raw_fd()]);
                }
            }
            if random.one_in(2) {
                held.push(line.stream);
            }
        }
    }

    fn config(&mut self, random: &mut Random) -> io::Result<()> {
        for _ in 0..random.between(1..=10) {
            let offset = [0, 32, 32, 60, 0x100, 0x120, u32::MAX][random.below(7) as usize];
            let bytes = [1, 1, 4, 60, 256, 0][random.below(6) as usize];
            let head = [offset, bytes, 0].map(u32::to_ne_bytes).concat();
            let body = [head, vec![random.next() as u8 & 1; bytes as usize]].concat();
            if random.one_in(2) {
                self.line.ask(24, &body)?;
            } else {
                self.tell(25, &body, &[])?;
            }
        }
        Ok(())
    }

    /// Writes anything anywhere into the memory of rings, tables and headers, while they are in use.
    fn scribble(&mut self, random: &mut Random) {
        let which = self.any_ring(random);
        for _ in 0..random.between(1..=300) {
            let at = match random.below(3) {
                0 => random.below(self.rings.len() as u64 * RING_BYTES),
                1 => TABLES + random.below(64) * 16,
                _ => HEADERS + random.below(40) * 4096 + random.below(32),
            };
            self.memory.write(at, &random.next().to_le_bytes()[..1 + random.below(8) as usize]);
            if random.one_in(8) {
                self.rings[which].kick();
            }
        }
        self.linger(which, random);
    }

    /// Leaves, in one way or another.
    pub(super) fn end(self, random: &mut Random, held: &mut Vec<UnixStream>) {
        match random.below(4) {
            // With whatever is under way.
            0 => {}
            // In the middle of a message.
            1 => self.line.raw(
                &[&5u32.to_ne_bytes()[..], &[1, 0, 0, 0, 200, 0, 0, 0, 1]].concat()[..1 + random.below(13) as usize],
            ),
            // In order.
            2 => {
                for ring in &self.rings {
                    if self.line.ask(11, &pair(ring.index, 0)).is_err() {
                        break;
                    }
                }
            }
            // Not yet.
            _ => held.push(self.line.stream),
        }
    }
}

/// Writes a request's header, and gives its chain.
fn request(memory: &HostileMemory, at: u64, kind: u32, sector: u64, data: &[Buffer]) -> Vec<Buffer> {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    memory.write(at, &header);
    [&[(at, 16, false)][..], data, &[(at + 64, 1, true)]].concat()
}

fn gone() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}
