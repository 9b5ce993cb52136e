//! Parsing, without a drive.

use super::*;
use crate::blk::config::Offer;
use crate::virtio::ring::model::{Driver, Guest, IOVA_OFFSET, Piece, Random, readable, writable};
use crate::virtio::ring::{Head, Ring, RingError};

const RING: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x10_0000;

pub(crate) fn disk(block_shift: u8, blocks: u64) -> Disk {
    let namespace = nvme_driver::testing::namespace(block_shift, blocks);
    Disk { serial: *b"serial-0123456789abc", features: 1 << 9, ..Disk::new(namespace) }
}

pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..4].copy_from_slice(&kind.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    raw
}

struct RequestBench {
    guest: Guest,
    driver: Driver,
    ring: Ring,
    view: GuestView,
    chain: Chain,
    parser: Parser,
}

/// What the fast path makes of the next chain; nothing where the queue pair would refuse it, for the disk has no such blocks.
fn short_way(ring: &mut Ring, view: &mut GuestView, disk: &Disk) -> Option<(Request, Segment)> {
    let next = match ring {
        Ring::Split(ring) => peek_simple(ring, view, disk, &disk.geometry()),
        Ring::Packed(ring) => peek_simple(ring, view, disk, &disk.geometry()),
    };
    let (_, request, segment) = next?;
    let blocks = u64::from(request.bytes) >> disk.namespace.block_shift;
    (request.lba <= disk.namespace.blocks && blocks <= disk.namespace.blocks - request.lba)
        .then_some((request, segment))
}

impl RequestBench {
    fn new() -> RequestBench {
        let guest = Guest::new(&[(0, 0x10_0000), (DATA, 0x20_0000), (0x1_0000_0000, 0x1000)], None);
        let driver = Driver::new(&guest, false, 64, RING, false);
        let ring = Ring::new(&guest.memory, &driver.setup).unwrap();
        let view = GuestView::new(guest.memory.clone());
        RequestBench { guest, driver, ring, view, chain: Chain::new(), parser: Parser::new() }
    }

    fn parse(&mut self, disk: &Disk, pieces: &[Piece]) -> Seen {
        self.driver.add(&self.guest, pieces, Some(0x2_0000)).unwrap();
        let short = short_way(&mut self.ring, &mut self.view, disk);
        let head = self.ring.pop(&mut self.view, &mut self.chain).unwrap().unwrap();
        let parsed = Seen::of(self.parser.parse(&self.chain, &mut self.view, disk), &self.parser);
        // Whatever becomes of it, the length reaches to the status byte.
        if parsed != Seen::NoStatus {
            let room: u64 = pieces.iter().filter(|piece| piece.writable).map(|piece| u64::from(piece.bytes)).sum();
            assert_eq!(u64::from(self.parser.request.written), room.min(u32::MAX.into()));
        }
        if let Some((request, segment)) = short {
            assert_eq!(parsed, Seen::Submit(request), "the short way and the long one agree");
            assert_eq!(self.parser.segments, [segment]);
        }
        self.ring.push_used(head, 1);
        self.ring.publish();
        self.driver.used(&self.guest).unwrap();
        parsed
    }

    /// Header at HEADER, status at STATUS, these pieces between.
    fn request(&mut self, disk: &Disk, kind: u32, sector: u64, data: &[Piece]) -> Seen {
        self.guest.write(HEADER, &header(kind, sector));
        let mut pieces = vec![readable(HEADER, 16)];
        pieces.extend_from_slice(data);
        pieces.push(writable(STATUS, 1));
        self.parse(disk, &pieces)
    }
}

/// What became of a chain, with what the parser says of it.
#[derive(Debug, PartialEq)]
enum Seen {
    Submit(Request),
    Answer { code: u8, status: u64 },
    NoStatus,
}

impl Seen {
    fn of(parsed: Parsed, parser: &Parser) -> Seen {
        let request = parser.request;
        match parsed {
            Parsed::Submit => Seen::Submit(request),
            Parsed::Answer(code) => Seen::Answer { code, status: request.status },
            Parsed::NoStatus => Seen::NoStatus,
        }
    }
}

fn answer(code: u8) -> Seen {
    Seen::Answer { code, status: STATUS }
}

/// A request without data.
fn bare(operation: Operation) -> Seen {
    Seen::Submit(Request { operation, lba: 0, bytes: 0, status: STATUS, written: 1 })
}

#[test]
fn reads_and_writes_become_blocks_and_segments() {
    let mut bench = RequestBench::new();
    for (shift, sectors_per_block) in [(9, 1), (12, 8)] {
        let disk = disk(shift, 1000);
        let data = [writable(DATA + 3, 4095), writable(DATA + 0x3000, 4097)];
        let parsed = bench.request(&disk, 0, 40 * sectors_per_block, &data);
        let operation = Operation::Read;
        assert_eq!(parsed, Seen::Submit(Request { operation, lba: 40, bytes: 8192, status: STATUS, written: 8193 }));
        let segment = |address, bytes| Segment { iova: address + IOVA_OFFSET, bytes };
        assert_eq!(bench.parser.segments, [segment(DATA + 3, 4095), segment(DATA + 0x3000, 4097)]);
        let parsed = bench.request(&disk, 1, 8 * sectors_per_block, &[readable(DATA, 4096)]);
        let operation = Operation::Write;
        assert_eq!(parsed, Seen::Submit(Request { operation, lba: 8, bytes: 4096, status: STATUS, written: 1 }));
        assert_eq!(bench.parser.segments, [segment(DATA, 4096)]);
    }
}

#[test]
fn only_whole_blocks_within_the_disk() {
    let mut bench = RequestBench::new();
    for (shift, blocks) in [(9, 1000), (12, 125)] {
        let disk = disk(shift, blocks);
        let block = 1u32 << shift;
        let sectors = 1000;
        let per_block = u64::from(block) / 512;
        for (sector, bytes, fits) in [
            (0, block, true),
            (sectors - per_block, block, true),
            (sectors - per_block, 2 * block, false),
            (sectors, block, false),
            (u64::MAX, block, false),
            (u64::MAX - per_block + 1, block, false),
            // In bytes these are 0 again.
            (1 << 55, block, false),
            ((1 << 55) + per_block, block, false),
            (1 << 63, block, false),
            (0, 1000 * 512, true),
            (0, 1000 * 512 + block, false),
            (0, 511, false),
            (0, block + 1, false),
            (1, 4096, shift == 9),
            (0, 512, shift == 9),
        ] {
            for (kind, piece) in [(0, writable(DATA, bytes)), (1, readable(DATA, bytes))] {
                let parsed = bench.request(&disk, kind, sector, &[piece]);
                assert_eq!(matches!(parsed, Seen::Submit(_)), fits, "shift {shift}, sector {sector}, {bytes} bytes");
                if !fits {
                    assert_eq!(parsed, answer(IOERR));
                }
            }
        }
        // Nothing to move, nothing to do; but not beyond the end.
        assert_eq!(bench.request(&disk, 0, 0, &[]), answer(OK));
        assert_eq!(bench.request(&disk, 0, sectors + per_block, &[]), answer(IOERR));
    }
}

/// Cuts the readable and the writable part of a request at random places.
#[test]
fn any_layout_means_the_same() {
    let seed = 0x1a_10;
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let mut bench = RequestBench::new();
    let disk = disk(9, 100_000);
    for round in 0..3000 {
        let kind = random.below(2) as u32;
        let sector = random.below(1000);
        let bytes = 512 * random.below(8) as u32;
        let (reads, writes) = if kind == 1 { (16 + bytes, 1) } else { (16, bytes + 1) };
        let mut contents = header(kind, sector).to_vec();
        contents.resize(reads as usize, 0xda);
        let mut pieces = Vec::new();
        // Pieces are laid out with gaps, so that a wrong address shows.
        let mut at = DATA + random.below(64);
        let (mut status, mut data) = (0, Vec::new());
        for (total, write) in [(reads, false), (writes, true)] {
            let mut done = 0;
            while done < total {
                let most = if random.one_in(2) { 20 } else { 3000 };
                let piece = (1 + random.below(most) as u32).min(total - done);
                if !write {
                    bench.guest.write(at, &contents[done as usize..(done + piece) as usize]);
                }
                pieces.push(Piece { address: at, bytes: piece, writable: write });
                let (skip, tail) = if write {
                    (0, u32::from(done + piece == total))
                } else {
                    (16u32.saturating_sub(done).min(piece), 0)
                };
                if piece - skip - tail > 0 && write == (kind == 0) {
                    data.push(Segment { iova: at + u64::from(skip) + IOVA_OFFSET, bytes: piece - skip - tail });
                }
                status = at + u64::from(piece) - 1;
                done += piece;
                at += u64::from(piece) + random.below(3) * 8;
            }
        }
        let parsed = bench.parse(&disk, &pieces);
        if bytes == 0 {
            assert_eq!(parsed, Seen::Answer { code: OK, status }, "round {round}");
            continue;
        }
        let (operation, written) = if kind == 0 { (Operation::Read, bytes + 1) } else { (Operation::Write, 1) };
        assert_eq!(parsed, Seen::Submit(Request { operation, lba: sector, bytes, status, written }), "round {round}");
        assert_eq!(bench.parser.segments, data, "round {round}: {pieces:?}");
        let copied = data_buffers(&bench.chain, operation);
        let copied: Vec<Segment> = copied.map(|b| Segment { iova: b.address + IOVA_OFFSET, bytes: b.bytes }).collect();
        assert_eq!(copied, data, "round {round}: what would be copied is what would be moved");
    }
}

#[test]
fn read_only_disks_take_no_writes() {
    let mut bench = RequestBench::new();
    let disk = Disk { read_only: true, ..disk(9, 1000) };
    assert_eq!(bench.request(&disk, 1, 0, &[readable(DATA, 512)]), answer(IOERR));
    assert_eq!(bench.request(&disk, 11, 0, &[readable(DATA, 16)]), answer(IOERR));
    assert_eq!(bench.request(&disk, 13, 0, &[readable(DATA, 16)]), answer(IOERR));
    assert!(matches!(bench.request(&disk, 0, 0, &[writable(DATA, 512)]), Seen::Submit(_)));
    assert!(matches!(bench.request(&disk, 4, 0, &[]), Seen::Submit(_)));
}

#[test]
fn flush_is_for_drives_with_a_cache() {
    let mut bench = RequestBench::new();
    let mut disk = disk(9, 1000);
    assert_eq!(bench.request(&disk, 4, 0, &[]), bare(Operation::Flush));
    disk.namespace.volatile_write_cache = false;
    assert_eq!(bench.request(&disk, 4, 0, &[]), answer(OK));
}

#[test]
fn the_serial_fills_what_there_is() {
    let mut bench = RequestBench::new();
    let disk = disk(9, 1000);
    for room in [20, 30, 5, 0] {
        bench.guest.write(DATA, &[0xee; 40]);
        let pieces: Vec<_> = [(DATA, room / 2), (DATA + u64::from(room / 2), room - room / 2)]
            .into_iter()
            .filter(|piece| piece.1 != 0)
            .map(|(address, bytes)| writable(address, bytes))
            .collect();
        let parsed = bench.request(&disk, 8, 0, &pieces);
        assert_eq!(parsed, answer(OK));
        let filled = room.min(20) as usize;
        assert_eq!(bench.guest.read(DATA, filled), disk.serial[..filled]);
        assert_eq!(bench.guest.read(DATA + filled as u64, 5), [0xee; 5]);
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn ranges_of_discard_and_write_zeroes() {
    let mut bench = RequestBench::new();
    let (small, large) = (disk(9, 1000), disk(12, 125));
    let zeroes = |unmap| bare(if unmap { Operation::WriteZeroesUnmap } else { Operation::WriteZeroes });
    let discard = || bare(Operation::Discard);
    let cases = [
        (11, vec![range(8, 16, 0)], discard(), discard()),
        (13, vec![range(8, 16, 0)], zeroes(false), zeroes(false)),
        (13, vec![range(8, 16, 1)], zeroes(true), zeroes(true)),
        // Deallocation only where all ranges permit it.
        (13, vec![range(8, 16, 1), range(64, 8, 0)], zeroes(false), zeroes(false)),
        (13, vec![range(8, 16, 0), range(64, 8, 1)], zeroes(false), zeroes(false)),
        (11, vec![range(8, 16, 1)], answer(UNSUPP), answer(UNSUPP)),
        (13, vec![range(8, 16, 2)], answer(UNSUPP), answer(UNSUPP)),
        (13, vec![range(0, 8, 0), range(8, 16, 0x8000_0000)], answer(UNSUPP), answer(UNSUPP)),
        (11, vec![range(992, 8, 0)], discard(), discard()),
        (11, vec![range(992, 16, 0)], answer(IOERR), answer(IOERR)),
        (11, vec![range(u64::MAX - 7, 8, 0)], answer(IOERR), answer(IOERR)),
        (11, vec![range(0, 8, 0), range(1000, 8, 0)], answer(IOERR), answer(IOERR)),
        (11, vec![range(4, 8, 0)], discard(), answer(IOERR)),
        (11, vec![range(8, 4, 0)], discard(), answer(IOERR)),
        (11, vec![range(8, 0, 0)], answer(OK), answer(OK)),
        (11, vec![], answer(IOERR), answer(IOERR)),
        (11, vec![range(8, 8, 0)[..15].to_vec()], answer(IOERR), answer(IOERR)),
        (13, vec![vec![0; 17]], answer(IOERR), answer(IOERR)),
        (11, (0..MAX_RANGES as u64).map(|k| range(k % 100 * 8, 8, 0)).collect(), discard(), discard()),
        (11, (0..=MAX_RANGES as u64).map(|k| range(k % 100 * 8, 8, 0)).collect(), answer(IOERR), answer(IOERR)),
    ];
    for (index, (kind, ranges, on_small, on_large)) in cases.into_iter().enumerate() {
        let bytes = ranges.concat();
        bench.guest.write(DATA, &bytes);
        let pieces: Vec<_> = match bytes.len() as u32 {
            0 => vec![],
            // The segments may lie across descriptors, too.
            length if length > 7 => vec![readable(DATA, 7), readable(DATA + 7, length - 7)],
            length => vec![readable(DATA, length)],
        };
        assert_eq!(bench.request(&small, kind, 0, &pieces), on_small, "case {index}");
        assert_eq!(bench.request(&large, kind, 0, &pieces), on_large, "case {index}");
    }
    bench.guest.write(DATA, &[range(8, 16, 0), range(0, 0, 0), range(80, 800, 0)].concat());
    bench.request(&large, 11, 0, &[readable(DATA, 48)]);
    assert_eq!(bench.parser.ranges, [LbaRange { lba: 1, blocks: 2 }, LbaRange { lba: 10, blocks: 100 }]);
    let mut without = small;
    (without.namespace.discard, without.namespace.write_zeroes) = (false, false);
    assert_eq!(bench.request(&without, 11, 0, &[readable(DATA, 48)]), answer(UNSUPP));
    assert_eq!(bench.request(&without, 13, 0, &[readable(DATA, 48)]), answer(UNSUPP));
}

#[test]
fn ranges_beyond_what_the_configuration_space_says_fail() {
    let mut bench = RequestBench::new();
    let mut disk = disk(9, 100_000);
    disk.namespace.max_write_zeroes_blocks = 64;
    (disk.namespace.max_discard_ranges, disk.namespace.max_discard_range_blocks) = (3, 1000);
    disk.offer = Offer::new(&disk.namespace);
    let features = crate::blk::config::features(&disk.namespace, false);
    let config = crate::blk::config::config(&disk.namespace, features, 1, true);
    for (kind, sectors, ranges) in [
        (11, config.max_discard_sectors.get(), config.max_discard_seg.get()),
        (13, config.max_write_zeroes_sectors.get(), config.max_write_zeroes_seg.get()),
    ] {
        let mut answers = |ranges: u32, sectors: u32| {
            let bytes: Vec<u8> = (0..ranges).flat_map(|at| range(u64::from(at % 8) * 8, sectors, 0)).collect();
            bench.guest.write(DATA, &bytes);
            bench.request(&disk, kind, 0, &[readable(DATA, bytes.len() as u32)])
        };
        let taken = bare(if kind == 11 { Operation::Discard } else { Operation::WriteZeroes });
        assert_eq!(answers(ranges, sectors), taken, "kind {kind}");
        assert_eq!(answers(1, sectors + 1), answer(IOERR), "kind {kind}: a block more");
        assert_eq!(answers(ranges + 1, 8), answer(IOERR), "kind {kind}: a range more");
        assert_eq!(answers(256, 100_000), answer(IOERR), "kind {kind}: all of the disk, time and again");
    }
}

#[test]
fn what_is_not_understood_is_answered_where_it_can_be() {
    let mut bench = RequestBench::new();
    let disk = disk(9, 1000);
    for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(bench.request(&disk, kind, 0, &[writable(DATA, 512)]), answer(UNSUPP), "type {kind}");
    }
    // No, or half a header.
    assert_eq!(bench.parse(&disk, &[writable(STATUS, 1)]), answer(IOERR));
    assert_eq!(bench.parse(&disk, &[readable(HEADER, 15), writable(STATUS, 1)]), answer(IOERR));
    // Nowhere for the status.
    assert_eq!(bench.parse(&disk, &[readable(HEADER, 16)]), Seen::NoStatus);
    for address in [0x30_0000, 0x1_0000_1000, u64::MAX] {
        assert_eq!(bench.parse(&disk, &[readable(HEADER, 16), writable(address, 1)]), Seen::NoStatus);
    }
    // The header, or some of the data, outside of memory.
    for address in [0x30_0000 - 8, 0x80_0000, u64::MAX - 8] {
        assert_eq!(bench.parse(&disk, &[readable(address, 16), writable(STATUS, 1)]), answer(IOERR));
        for (kind, piece) in [
            (0, writable(address, 512)),
            (1, readable(address, 512)),
            (8, writable(address, 20)),
            (11, readable(address, 16)),
        ] {
            assert_eq!(bench.request(&disk, kind, 0, &[piece]), answer(IOERR), "type {kind} at {address:#x}");
        }
    }
    // More than a used element can say.
    let much = vec![writable(DATA, 0x20_0000); 2049];
    assert_eq!(bench.request(&Disk { ..self::disk(9, 1 << 40) }, 0, 0, &much), answer(IOERR));
    // A kind the drive of 2^52 blocks could do.
    assert!(matches!(bench.request(&self::disk(9, 1 << 40), 0, 0, &much[..2040]), Seen::Submit(_)));
}

/// Random and mutated requests in both formats: whatever a guest does, no segment and no status byte is outside its memory,
/// and nothing panics.
#[test]
fn a_hostile_guest_reaches_nothing_but_its_memory() {
    let (mut submitted, mut answered, mut broken, mut segments, mut shortened) = (0, 0, 0, 0, 0);
    for seed in 0..10_000u64 {
        let mut random = Random::new(seed);
        let packed = random.one_in(2);
        let guest = Guest::new(&[(0, 0x8000), (0x8000, 0x4000), (0x10_0000, 0x2000)], None);
        let size = if packed { 1 + random.below(16) as u16 } else { 1 << random.below(5) };
        let mut driver = Driver::new(&guest, packed, size, RING, random.one_in(2));
        let mut setup = driver.setup;
        setup.indirect = !random.one_in(8);
        let disk = disk(if random.one_in(2) { 9 } else { 12 }, 4096 + random.below(1 << 20));
        let mut ring = Ring::new(&guest.memory, &setup).unwrap();
        let mut view = GuestView::new(guest.memory.clone());
        let (mut chain, mut parser) = (Chain::new(), Parser::new());
        // Some good requests, their memory near the edges.
        for k in 0..1 + random.below(6) {
            let at = [0x7f00, 0xbe00, 0x10_1c00, 0x3000][random.below(4) as usize] + random.below(0x100);
            let kind = [0, 1, 4, 8, 11, 13, 14][random.below(7) as usize];
            guest.write(0x4000 + 16 * k, &header(kind, random.below(256) * 8));
            let piece = Piece {
                address: at,
                bytes: 512 * (1 + random.below(8)) as u32,
                writable: !matches!(kind, 1 | 11 | 13),
            };
            let all = [readable(0x4000 + 16 * k, 16), piece, writable(0x5000 + k, 1)];
            driver.add(&guest, &all, random.one_in(2).then_some(0x6000 + 48 * k));
        }
        // Then the guest goes mad: bytes anywhere in its rings, tables and headers, over and over.
        for _ in 0..20 {
            for _ in 0..random.below(3) {
                let (from, bytes) =
                    [(RING, Driver::bytes_needed(size)), (0x4000, 0x100), (0x6000, 0x140)][random.below(3) as usize];
                let at = from + random.below(bytes);
                let interesting = [0, 0xff, 1, 2, 4, 0x80, 0x7f, 16][random.below(8) as usize];
                guest.write(at, &[if random.one_in(2) { interesting } else { random.next() as u8 }]);
            }
            // Believable heads and indexes get further than random ones.
            if !packed && random.one_in(2) {
                driver.offer(&guest, random.below(u64::from(size) + 1) as u16);
            }
            let short = short_way(&mut ring, &mut view, &disk);
            let popped: Result<Option<Head>, RingError> = ring.pop(&mut view, &mut chain);
            let head = match popped {
                Ok(Some(head)) => head,
                Ok(None) => continue,
                Err(_) => {
                    broken += 1;
                    break;
                }
            };
            parser.segments.clear();
            let parsed = Seen::of(parser.parse(&chain, &mut view, &disk), &parser);
            if let Some((request, segment)) = short {
                assert_eq!((&parsed, &parser.segments[..]), (&Seen::Submit(request), &[segment][..]), "seed {seed}");
                shortened += 1;
            }
            let status = match parsed {
                Seen::Submit(request) => {
                    submitted += 1;
                    let moves = matches!(request.operation, Operation::Read | Operation::Write);
                    for segment in parser.segments.iter().filter(|_| moves) {
                        segments += 1;
                        let inside = guest.iova_inside(segment.iova, segment.bytes.into());
                        assert!(inside && segment.bytes != 0, "seed {seed}: {segment:?}");
                    }
                    if moves {
                        let total: u64 = parser.segments.iter().map(|s| u64::from(s.bytes)).sum();
                        assert_eq!(total, u64::from(request.bytes), "seed {seed}");
                        assert_eq!(total % u64::from(disk.namespace.block_bytes()), 0, "seed {seed}");
                    }
                    for range in parser.ranges.iter().filter(|_| matches!(request.operation, Operation::Discard)) {
                        assert!(range.lba + u64::from(range.blocks) <= disk.namespace.blocks, "seed {seed}");
                    }
                    request.status
                }
                Seen::Answer { status, .. } => {
                    answered += 1;
                    status
                }
                Seen::NoStatus => {
                    broken += 1;
                    break;
                }
            };
            assert!(guest.iova_inside(status + IOVA_OFFSET, 1), "seed {seed}");
            view.write_byte(status, OK).unwrap();
            ring.push_used(head, 1);
            ring.publish();
        }
    }
    println!(
        "{submitted} submitted with {segments} segments, {answered} answered, {broken} broken, {shortened} the short way"
    );
    assert!(
        submitted > 3000 && segments > 2000 && answered > 3000 && broken > 1000 && shortened > 500,
        "the cases got nowhere"
    );
}
