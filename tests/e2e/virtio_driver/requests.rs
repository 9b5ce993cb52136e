//! Single requests, built by hand.

use blk_perf::{Random, Workload};
use e2e::Target;

use super::raw::*;
use super::{MIB, alone, folder, options, run, run_clean, seed};

const SECTORS: u64 = (MIB << 20) / SECTOR;

fn serve(folder: &tempfile::TempDir, lba: u32, more: &[&str]) -> Target {
    Target::serve_disk(folder.path(), MIB, lba, more).expect("the target serves a disk")
}

fn random_bytes(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length).map(|_| random.next_u64() as u8).collect()
}

#[test]
fn get_id_tells_the_serial() {
    let _alone = alone();
    let folder = folder();
    let target = serve(&folder, 512, &["--serial", "A-SERIAL"]);
    for packed in [false, true] {
        let mut disk = RawDisk::connect(target.socket(), packed, 4096);
        disk.data()[..32].fill(0xee);
        assert_eq!(disk.request(GET_ID, 0, &[], &first(20)), OK);
        assert_eq!(&disk.data()[..21], b"A-SERIAL\0\0\0\0\0\0\0\0\0\0\0\0\xee");
    }
    target.stop().expect("the target ends cleanly");
}

#[test]
fn geometry_is_the_drives() {
    let _alone = alone();
    for lba in [512, 4096] {
        let folder = folder();
        let target = serve(&folder, lba, &["--queues", "5"]);
        let config = RawDisk::connect(target.socket(), false, 4096).config();
        assert_eq!(config.capacity.to_native(), SECTORS);
        assert_eq!(config.blk_size.to_native(), lba);
        assert_eq!(config.num_queues.to_native(), 5);
        assert!(config.seg_max.to_native() >= 512, "{}", config.seg_max.to_native());
        target.stop().expect("the target ends cleanly");
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let _alone = alone();
    let folder = folder();
    // What is there before must be there afterwards.
    let target = serve(&folder, 512, &[]);
    let content = vec![0x3c; 4096];
    assert_eq!(RawDisk::connect(target.socket(), false, 4096).write(8, &content), OK);
    target.stop().expect("the target ends cleanly");
    let target = serve(&folder, 512, &["--read-only"]);
    for packed in [false, true] {
        let mut disk = RawDisk::connect(target.socket(), packed, 4096);
        assert_ne!(disk.features() & FEATURE_RO, 0);
        assert_eq!(disk.write(8, &[0xff; 512]), IOERR);
        assert_ne!(disk.change(DISCARD, &[range(8, 8, 0)]), OK);
        assert_ne!(disk.change(WRITE_ZEROES, &[range(8, 8, 0)]), OK);
        assert_eq!(disk.request(FLUSH, 0, &[], &[]), OK);
        assert_eq!(disk.read(8, 4096), content);
    }
    let options = options(target.socket(), 1, false);
    run_clean(&options, &Workload::plain(seed(), 4096, 100).for_operations(1000));
    let refused = run(&options, &Workload::verified(1).for_operations(1));
    assert!(matches!(refused, Err(blk_perf::Error::Options(_))), "{refused:?}");
    target.stop().expect("the target ends cleanly");
}

#[test]
fn what_was_flushed_survives_the_target() {
    let _alone = alone();
    let folder = folder();
    let mut random = Random::new(seed(), 0);
    let content = random_bytes(&mut random, 64 << 10);
    let target = serve(&folder, 4096, &[]);
    let mut disk = RawDisk::connect(target.socket(), false, 64 << 10);
    assert_eq!(disk.write(SECTORS - 128, &content), OK);
    assert_eq!(disk.request(FLUSH, 0, &[], &[]), OK);
    drop(disk);
    target.stop().expect("the target ends cleanly");
    let target = serve(&folder, 4096, &[]);
    let mut disk = RawDisk::connect(target.socket(), true, 64 << 10);
    assert!(disk.read(SECTORS - 128, 64 << 10) == content);
    drop(disk);
    target.stop().expect("the target ends cleanly");
}

#[test]
fn requests_that_cannot_be_done_are_refused_and_change_nothing() {
    let _alone = alone();
    let folder = folder();
    let target = serve(&folder, 4096, &[]);
    let content = vec![0xa5; 8192];
    for packed in [false, true] {
        let mut disk = RawDisk::connect(target.socket(), packed, 8192);
        assert_eq!(disk.write(0, &content), OK);
        assert_eq!(disk.write(SECTORS - 16, &content), OK);
        // Beyond the end, in part and in whole; at the end of all numbers.
        for sector in [SECTORS - 8, SECTORS, SECTORS + 8, u64::MAX / 512, u64::MAX - 7] {
            assert_eq!(disk.request(OUT, sector, &first(8192), &[]), IOERR, "writing sector {sector}");
            // The crate's packed ring takes no answer to a read but that of a successful one.
            if !packed {
                assert_eq!(disk.request(IN, sector, &[], &first(8192)), IOERR, "reading sector {sector}");
            }
        }
        // Not whole blocks of a disk with blocks of 4096 bytes.
        assert_eq!(disk.request(OUT, 1, &first(4096), &[]), IOERR);
        assert_eq!(disk.request(OUT, 0, &first(512), &[]), IOERR);
        assert_eq!(disk.request(OUT, 0, &first(100), &[]), IOERR);
        // Types that do not exist.
        assert_eq!(disk.request(77, 0, &[], &[]), UNSUPP);
        assert_eq!(disk.request(u32::MAX, 0, &first(512), &[]), UNSUPP);
        // Ranges outside the disk, and flags that do not exist.
        assert_ne!(disk.change(WRITE_ZEROES, &[range(SECTORS - 8, 16, 0)]), OK);
        assert_ne!(disk.change(DISCARD, &[range(u64::MAX - 7, 8, 0)]), OK);
        assert_eq!(disk.change(WRITE_ZEROES, &[range(0, 8, 1 << 7)]), UNSUPP);
        assert_eq!(disk.change(DISCARD, &[range(0, 8, 1)]), UNSUPP);
        // The queue is as good as before, and the data as it was.
        assert!(disk.read(0, 8192) == content);
        assert!(disk.read(SECTORS - 16, 8192) == content);
    }
    target.stop().expect("the target ends cleanly");
}

/// Cuts `length` bytes into segments whose lengths are multiples of `grain`, each at a place of its own.
fn scatter(random: &mut Random, length: usize, grain: usize, memory: usize) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let (mut left, mut at) = (length, 0);
    // Each segment gets a slot of twice its size at most, in order, so that none overlap.
    while left > 0 {
        let longest = (left / grain).min(1 + random.below(12 * 1024 / grain as u64) as usize);
        let bytes = longest.max(1) * grain;
        let gap = random.below(4096 / grain as u64) as usize * grain;
        at += gap;
        ranges.push(at..at + bytes);
        at += bytes;
        left -= bytes;
    }
    assert!(at <= memory, "{at} of {memory} bytes");
    ranges
}

/// Writes and reads through scattered segments, compared with a copy of the disk's content.
fn scattered(packed: bool, grain: usize) {
    const MEMORY: usize = 4 << 20;
    const AREA: usize = 1 << 20;
    let _alone = alone();
    let folder = folder();
    let target = serve(&folder, 512, &[]);
    let mut random = Random::new(seed(), grain as u64);
    let mut disk = RawDisk::connect(target.socket(), packed, MEMORY);
    let mut expected = vec![0; AREA];
    assert_eq!(disk.change(WRITE_ZEROES, &[range(0, (AREA / 512) as u32, 0)]), OK);
    for round in 0..150 {
        let sectors = 1 + random.below(256) as usize;
        let sector = random.below((AREA / 512 - sectors) as u64) as usize;
        let (length, start) = (sectors * 512, sector * 512);
        let mut segments = scatter(&mut random, length, grain, MEMORY);
        // A chain must not be longer than the ring.
        while segments.len() > 200 {
            segments = scatter(&mut random, length, grain.max(512), MEMORY);
        }
        if random.chance(1, 2) {
            let content = random_bytes(&mut random, length);
            let mut rest = &content[..];
            for segment in &segments {
                let (part, more) = rest.split_at(segment.len());
                disk.data()[segment.clone()].copy_from_slice(part);
                rest = more;
            }
            assert_eq!(disk.request(OUT, sector as u64, &segments, &[]), OK, "round {round}");
            expected[start..start + length].copy_from_slice(&content);
        } else {
            disk.data().fill(0xee);
            assert_eq!(disk.request(IN, sector as u64, &[], &segments), OK, "round {round}");
            let data = disk.data();
            let content: Vec<u8> = segments.iter().flat_map(|segment| data[segment.clone()].to_vec()).collect();
            assert!(content == expected[start..start + length], "round {round}: {segments:?}");
            // Nothing beside the segments was written.
            for segment in &segments {
                data[segment.clone()].fill(0xee);
            }
            let stray = data.iter().position(|byte| *byte != 0xee);
            assert_eq!(stray, None, "round {round}: {segments:?}");
        }
    }
    drop(disk);
    target.stop().expect("the target ends cleanly");
}

#[test]
fn scattered_blocks_split() {
    scattered(false, 512);
}

#[test]
fn scattered_blocks_packed() {
    scattered(true, 512);
}

#[test]
fn scattered_words() {
    scattered(false, 4);
}

#[test]
fn scattered_odd_bytes() {
    scattered(true, 1);
}

#[test]
fn several_ranges_in_one_request() {
    let _alone = alone();
    for lba in [512, 4096] {
        let folder = folder();
        let target = serve(&folder, lba, &[]);
        let mut disk = RawDisk::connect(target.socket(), false, 1 << 20);
        for kind in [WRITE_ZEROES, DISCARD] {
            for unmap in [0, u32::from(kind == WRITE_ZEROES)] {
                let content = vec![0x77; 1 << 20];
                assert_eq!(disk.write(0, &content), OK);
                let config = disk.config();
                let most = match kind {
                    WRITE_ZEROES => config.max_write_zeroes_seg.to_native(),
                    _ => config.max_discard_seg.to_native(),
                };
                assert!(most >= 2, "{most} ranges");
                let ranges = [range(8, 8, unmap), range(64, 16, unmap), range(1024, 256, unmap)];
                let ranges = &ranges[..ranges.len().min(most as usize)];
                assert_eq!(disk.change(kind, ranges), OK);
                let mut after = disk.read(0, 1 << 20);
                for range in ranges {
                    let sector = u64::from_le_bytes(range[..8].try_into().unwrap()) as usize;
                    let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap()) as usize;
                    let part = &mut after[sector * 512..(sector + sectors) * 512];
                    assert!(kind == DISCARD || part.iter().all(|byte| *byte == 0), "sector {sector} is not zero");
                    // After a discard the content is the drive's choice.
                    part.fill(0x77);
                }
                assert!(after == content, "something outside the ranges has changed");
            }
        }
        drop(disk);
        target.stop().expect("the target ends cleanly");
    }
}

#[test]
fn memory_comes_and_goes_while_the_queue_runs() {
    let _alone = alone();
    let folder = folder();
    let target = serve(&folder, 512, &[]);
    for packed in [false, true] {
        let mut disk = RawDisk::connect(target.socket(), packed, 1 << 20);
        let mut random = Random::new(seed(), 0);
        for _ in 0..20 {
            let content = random_bytes(&mut random, 64 << 10);
            assert_eq!(disk.write(2048, &content), OK);
            disk.replace_data(1 << 20);
            assert!(disk.read(2048, 64 << 10) == content);
        }
    }
    target.stop().expect("the target ends cleanly");
}
