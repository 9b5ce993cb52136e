//! Drives that offer little, and drives that are odd: what they say is patched, and what they do not offer they refuse.

use std::time::{Duration, Instant};

use nvme_driver::{Erase, Error, FormatOptions, LbaRange, Options, QueuePairOptions, Status, SubmitError, Work};
use nvme_sim::{Config, IdentifyPatch, RegisterPatch};

use crate::{Rig, complete, small, works};

const NAMESPACE: u8 = 0x00;
const CONTROLLER: u8 = 0x01;

/// A drive with these bytes of Identify data.
fn patched(patches: &[(u8, usize, &[u8])]) -> Rig {
    let patch = |&(cns, offset, bytes): &(u8, usize, &[u8])| IdentifyPatch::new(cns, offset, bytes);
    Rig::new(Config { identify: patches.iter().map(patch).collect(), ..small() })
}

/// Every command that was refused would have an entry in the drive's error log.
#[test]
fn nothing_is_sent_that_a_drive_does_not_offer() {
    let nothing: &[(u8, usize, &[u8])] = &[
        (CONTROLLER, 92, &[0; 4]),  // OAES
        (CONTROLLER, 128, &[0; 6]), // CRDT1 to CRDT3
        (CONTROLLER, 256, &[0; 2]), // OACS
        (CONTROLLER, 258, &[0, 0]), // ACL, AERL: one abort, one event request
        (CONTROLLER, 261, &[0]),    // LPA
        (CONTROLLER, 520, &[0; 2]), // ONCS
        (CONTROLLER, 524, &[0, 0]), // FNA, VWC
        (CONTROLLER, 536, &[0; 4]), // SGLS
        (NAMESPACE, 33, &[0]),      // DLFEAT
    ];
    let rig = patched(nothing);
    let controller = rig.open();
    assert!(!controller.uses_shadow_doorbells());
    let namespace = controller.namespace(1).unwrap();
    works(&controller, 1, 1);
    controller.health_log().unwrap();
    controller.poll_events().unwrap();
    controller.reset().unwrap();
    works(&controller, 1, 2);

    let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let ranges = [LbaRange { lba: 0, blocks: 1 }];
    for work in [
        Work::Discard { ranges: &ranges },
        Work::WriteZeroes { ranges: &ranges, deallocate: false, fua: false },
        Work::Verify(ranges[0]),
        Work::Compare { lba: 0, segments: &[] },
    ] {
        assert!(matches!(pair.submit(&namespace, work, 1), Err(SubmitError::Invalid(_))), "{work:?}");
    }
    let format = FormatOptions { block_bytes: 512, erase: Erase::No, timeout: Duration::from_secs(10) };
    assert!(matches!(controller.format(1, &format), Err(Error::Unsupported(_))));
    assert!(matches!(controller.changed_namespaces(), Err(Error::Unsupported(_))));
    let coalescing = nvme_driver::spec::features::InterruptCoalescing { threshold: 1, time: 1 };
    assert!(matches!(controller.set_feature(&coalescing, true), Err(Error::Unsupported(_))));
    let cache = nvme_driver::spec::features::VolatileWriteCache { enabled: true };
    assert!(matches!(controller.set_feature(&cache, false), Err(Error::Unsupported(_))));
    assert_eq!(controller.error_log().unwrap(), [], "refused by the drive");
}

/// Seen on another target: DLFEAT says no, and a guest's every write of zeroes failed.
#[test]
fn zeroes_deallocate_only_where_the_drive_takes_that() {
    // Bit 3: the bit is taken; bits 2:0, 1: deallocated blocks read as zeroes.
    for (dlfeat, deallocates) in [(0, false), (1, false), (0b1000, false), (0b1010, false), (0b1001, true)] {
        let rig = patched(&[(NAMESPACE, 33, &[dlfeat])]);
        let controller = rig.open();
        let namespace = controller.namespace(1).unwrap();
        assert_eq!(namespace.write_zeroes_deallocates, deallocates, "{dlfeat:#b}");
        let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
        let ranges = [LbaRange { lba: 8, blocks: 8 }];
        pair.submit(&namespace, Work::WriteZeroes { ranges: &ranges, deallocate: true, fua: false }, 7).unwrap();
        pair.ring();
        assert_eq!(complete(&mut pair, 1), [(7, Status::SUCCESS)], "{dlfeat:#b}");
    }
}

#[test]
fn a_format_erases_only_as_the_drive_can() {
    let rig = patched(&[(CONTROLLER, 524, &[0])]);
    let controller = rig.open();
    let format = FormatOptions { block_bytes: 512, erase: Erase::Cryptographic, timeout: Duration::from_secs(10) };
    let error = controller.format(1, &format).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    assert_eq!(controller.error_log().unwrap(), []);
}

/// CAP.MQES is 0 on a few drives, which take queues of 64 entries.
#[test]
fn queues_of_no_entries_are_of_64() {
    let rig = Rig::new(Config { registers: vec![RegisterPatch::new(0, [0, 0])], ..small() });
    let controller = rig.open();
    let pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    assert_eq!(pair.capacity(), 63);
    works(&controller, 1, 1);
}

/// Some drives were only ever tried with as many: they fill a page.
#[test]
fn the_admin_queues_are_of_64() {
    for mqes in [[0, 0], [0xff, 0xff]] {
        let rig = Rig::new(Config { registers: vec![RegisterPatch::new(0, mqes)], ..small() });
        let controller = rig.open();
        assert_eq!(rig.simulator.admin_queue_entries(), (64, 64));
        controller.reset().unwrap();
        assert_eq!(rig.simulator.admin_queue_entries(), (64, 64));
    }
}

/// RTD3E says what a shutdown takes: no less is waited for.
#[test]
fn a_drive_may_take_its_time_to_shut_down() {
    // In microseconds, at byte 88: half a minute, or nothing. Twice as long, or 5 seconds, is waited for.
    let rigs = [30_000_000u32, 0].map(|rtd3e| patched(&[(CONTROLLER, 88, &rtd3e.to_le_bytes())]));
    let [slow, silent] = rigs.each_ref().map(|rig| {
        rig.simulator.faults().change(|plan| plan.shutdown_hangs = true);
        rig.open()
    });
    std::thread::scope(|threads| {
        let (start, slow) = (Instant::now(), threads.spawn(|| slow.shutdown()));
        let Err(Error::Register { register: "CSTS", .. }) = silent.shutdown() else { panic!("it is not waited for") };
        assert!(start.elapsed() >= Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(500));
        rigs.iter().for_each(|rig| rig.simulator.faults().change(|plan| plan.shutdown_hangs = false));
        slow.join().unwrap().unwrap();
    });
}

#[test]
fn a_controller_that_has_paused_is_waited_for() {
    let rig = Rig::new(small());
    let timeout = Duration::from_millis(300);
    let controller = rig.try_open(&Options { admin_timeout: timeout, ..Default::default() }).unwrap();
    assert!(!controller.is_paused());
    rig.simulator.faults().change(|plan| plan.paused = true);
    std::thread::scope(|threads| {
        let asked = threads.spawn(|| (controller.health_log(), Instant::now()));
        let start = Instant::now();
        // Longer than the command may take, and shorter than a pause may.
        while start.elapsed() < 5 * timeout && !asked.is_finished() {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(controller.is_paused());
        rig.simulator.faults().change(|plan| plan.paused = false);
        let (answer, when) = asked.join().unwrap();
        answer.unwrap();
        assert!(when - start >= 5 * timeout);
    });
    works(&controller, 1, 1);
}
