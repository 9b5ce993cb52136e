//! Promises that no ordinary use shows to be broken: what is written where nobody looks, done in an order that nearly always does
//! as well, or asked for by a controller that nearly never means it.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nvme_driver::spec::command;
use nvme_driver::{Controller, Error, LbaRange, Options, QueuePairOptions, Segment, Status, Work};
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, IdentifyPatch, RegisterPatch};

use crate::recovery::interrupts_work;
use crate::{DEADLINE, Rig, complete, small, works};

/// Registers of BAR0 (NVMe Base 2.0, 3.1.3).
const CC: u64 = 0x14;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        thread::yield_now();
    }
}

/// Until the controller is disabled it may write to the queues it was told of, also to those that their owner has dropped.
#[test]
fn a_reset_frees_no_memory_before_the_controller_is_disabled() {
    const COUNT: u64 = 8;
    // Long enough for the reset to wait for all that happens here.
    let rig = Rig::new(Config { ready_timeout: Duration::from_secs(60), ..small() });
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let bar = rig.device.bar(0).unwrap();
    let data = rig.device.dma().allocate(4096).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions { entries: Some(16), interrupt: false }).unwrap();
    let delay = Duration::from_millis(700);
    rig.io_fault(command::io::READ, FaultAction::Delay(delay..=delay), COUNT);
    for token in 0..COUNT {
        let segment = [Segment { iova: data.iova(), bytes: 512 }];
        pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, token).unwrap();
    }
    pair.ring();
    rig.wait_for_faults(COUNT);
    drop(pair);
    // It goes on although CC.EN is cleared, as one that is slow to notice does.
    rig.simulator.faults().change(|plan| plan.never_reset = true);
    let carried_out = || rig.simulator.counters().commands.load(Ordering::Relaxed);
    let before = carried_out();
    thread::scope(|scope| {
        let reset = scope.spawn(|| controller.reset());
        wait_until("CC.EN is not cleared", || bar.read_u32(CC).unwrap() & 1 == 0);
        // As much as the queues had, and more: what was free too early is given to these.
        let others: Vec<_> = (0..128).map(|_| rig.device.dma().allocate(4096).unwrap()).collect();
        others.iter().for_each(|other| other.write(0, &[0x5a; 4096]).unwrap());
        wait_until("the reads are not carried out", || carried_out() == before + COUNT);
        rig.simulator.faults().change(|plan| plan.never_reset = false);
        reset.join().unwrap().unwrap();
        let mut found = [0; 4096];
        for other in &others {
            other.read(0, &mut found).unwrap();
            assert!(found == [0x5a; 4096], "the controller has written to memory of somebody else");
        }
    });
    works(&controller, 1, 1);
}

/// A reset of the function takes the eventfds away from the vectors: they are given once more.
#[test]
fn interrupts_outlive_a_reset_that_forgets_them() {
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), ..small() });
    let controller = rig.open();
    rig.simulator.faults().change(|plan| (plan.never_reset, plan.reset_forgets_interrupts) = (true, true));
    controller.reset().unwrap();
    rig.simulator.faults().change(|plan| plan.never_reset = false);
    interrupts_work(&rig, &controller);
}

/// CC.EN is cleared when CSTS.RDY has followed it, and not before (NVMe Base 2.0, 3.1.3.5).
#[test]
fn a_controller_that_is_becoming_ready_is_waited_for() {
    let rig = Rig::new(small());
    rig.simulator.faults().change(|plan| plan.ready_delay = Duration::from_millis(300));
    // Somebody has enabled it a moment ago, and has gone.
    let bar = rig.device.bar(0).unwrap();
    let queues = rig.device.dma().allocate(8192).unwrap();
    bar.write_u32(AQA, 15 << 16 | 15).unwrap();
    bar.write_u64(ASQ, queues.iova()).unwrap();
    bar.write_u64(ACQ, queues.iova() + 4096).unwrap();
    bar.write_u32(CC, 4 << 20 | 6 << 16 | 1).unwrap();
    let controller = rig.open();
    assert_eq!(rig.simulator.counters().early_disables.load(Ordering::Relaxed), 0);
    works(&controller, 1, 1);
}

/// CAP.TO has room for 127 seconds; CRTO says more, and counts where it is there (NVMe Base 2.0, 3.1.3.21).
#[test]
fn a_controller_has_the_time_that_crto_says() {
    // CAP.TO is 500 ms, CRTO.CRWMT 20 s.
    let registers = vec![RegisterPatch::new(0x68, [40, 0])];
    let rig = Rig::new(Config { ready_timeout: Duration::from_millis(500), registers, ..small() });
    let controller = Controller::open(&rig.device, &Options::default()).unwrap();
    assert_eq!(controller.ready_timeout(), Duration::from_secs(30), "and half as much again");
    works(&controller, 1, 1);
}

/// A pair needs a queue of either kind.
#[test]
fn as_many_pairs_as_there_are_queues_of_the_rarer_kind() {
    for (submission, completion) in [(2, 5), (5, 2)] {
        let config = Config { submission_queues: Some(submission), completion_queues: Some(completion), ..small() };
        let rig = Rig::new(config);
        let controller = rig.open();
        assert_eq!(controller.max_queue_pairs(), 2);
        let pairs: Vec<_> = (0..2).map(|_| controller.create_queue_pair(Default::default()).unwrap()).collect();
        let error = controller.create_queue_pair(Default::default()).unwrap_err();
        assert!(matches!(error, Error::NoQueuePairsLeft { granted: 2 }), "{error}");
        pairs.into_iter().for_each(|pair| controller.delete_queue_pair(pair).unwrap());
        controller.reset().unwrap();
        works(&controller, 1, 1);
    }
}

/// Limits of commands without data (Identify, CNS 06h): the controller refuses what is beyond them.
#[test]
fn commands_keep_within_their_limits() {
    // VSL and WZSL 8 KiB; DMRL 2 ranges, DMRSL 16 blocks, DMSL 24 blocks.
    let limits = [&[1, 1, 0, 2, 16, 0, 0, 0][..], &24_u64.to_le_bytes()].concat();
    let rig = Rig::new(Config { identify: vec![IdentifyPatch::new(0x06, 0, limits)], ..small() });
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions { entries: Some(64), interrupt: false }).unwrap();
    let data = rig.device.dma().allocate(64 << 10).unwrap();
    let segment = [Segment { iova: data.iova(), bytes: 64 << 10 }];
    let ranges: Vec<_> = (0..5).map(|n| LbaRange { lba: 20 * n, blocks: 19 }).collect();
    let whole = LbaRange { lba: 0, blocks: 128 };
    let works: [(&str, Work<'_>); 4] = [
        ("verify", Work::Verify(whole)),
        ("discard", Work::Discard { ranges: &ranges }),
        ("discard of one long range", Work::Discard { ranges: &[whole] }),
        ("write zeroes", Work::WriteZeroes { ranges: &[whole], deallocate: false, fua: false }),
    ];
    for (name, work) in works {
        data.write(0, &[7; 64 << 10]).unwrap();
        pair.submit(&namespace, Work::Write { lba: 0, segments: &segment, fua: false }, 1).unwrap();
        pair.ring();
        assert_eq!(complete(&mut pair, 1), [(1, Status::SUCCESS)]);
        pair.submit(&namespace, work, 2).unwrap();
        pair.ring();
        assert_eq!(complete(&mut pair, 1), [(2, Status::SUCCESS)], "{name}");
    }
    pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, 3).unwrap();
    pair.ring();
    assert_eq!(complete(&mut pair, 1), [(3, Status::SUCCESS)]);
    let mut found = vec![1; 64 << 10];
    data.read(0, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 0), "zeroes were written");
}

/// The log must not change between two pieces of it, so only the last one lets its events come again (RAE).
#[test]
fn only_the_last_piece_of_a_log_page_releases_its_event() {
    // MDTS 8 KiB, ELPE 256 entries: an error log of 16 KiB.
    let identify = vec![IdentifyPatch::new(0x01, 77, [1]), IdentifyPatch::new(0x01, 262, [255])];
    let rig = Rig::new(Config { identify, ..small() });
    let controller = rig.open();
    let released = || rig.simulator.counters().events_released.load(Ordering::Relaxed);
    let before = released();
    let reads = FaultMatch { log_page: Some(1), ..Default::default() };
    let none = Duration::ZERO;
    rig.simulator.faults().add(FaultRule { action: FaultAction::Delay(none..=none), when: reads });
    controller.error_log().unwrap();
    assert!(rig.simulator.faults().fired() > 1, "it was read in pieces");
    assert_eq!(released(), before + 1);
}

/// A controller that leaves its answer unwritten has not given the one before once more.
#[test]
fn an_answer_that_was_not_written_is_no_old_one() {
    let rig = Rig::new(small());
    let controller = rig.open();
    // Wherever in memory answers are taken, there is one afterwards.
    let temperature = (0..16).map(|_| controller.health_log().unwrap().temperature_kelvins).max().unwrap();
    assert_ne!(temperature, 0);
    let when = FaultMatch { log_page: Some(2), limit: Some(1), ..Default::default() };
    rig.simulator.faults().add(FaultRule { action: FaultAction::DoNothing, when });
    assert_eq!(controller.health_log().unwrap().temperature_kelvins, 0);
    assert_eq!(controller.health_log().unwrap().temperature_kelvins, temperature);
}

/// Two pages, by the short way: the second is named by its beginning, wherever in the first one the data begin.
#[test]
fn the_second_page_of_a_transfer_is_named_by_its_beginning() {
    let rig = Rig::new(small());
    let controller = rig.try_open(&Options { shadow_doorbells: false, ..Default::default() }).unwrap();
    let namespace = controller.namespace(1).unwrap();
    let mut pair = controller.create_queue_pair(Default::default()).unwrap();
    let memory = rig.device.dma().allocate(8192).unwrap();
    for (n, offset) in [4, 512, 1020, 2048, 3584, 3588, 4092].into_iter().enumerate() {
        let data: Vec<u8> = (0..4096_u32).map(|at| (at / 3) as u8 ^ n as u8).collect();
        let segment = [Segment { iova: memory.iova() + offset as u64, bytes: 4096 }];
        memory.write(offset, &data).unwrap();
        pair.submit(&namespace, Work::Write { lba: 8, segments: &segment, fua: false }, 1).unwrap();
        pair.ring();
        assert_eq!(complete(&mut pair, 1), [(1, Status::SUCCESS)], "offset {offset}");
        memory.write(0, &[0xee; 8192]).unwrap();
        pair.submit(&namespace, Work::Read { lba: 8, segments: &segment }, 2).unwrap();
        pair.ring();
        assert_eq!(complete(&mut pair, 1), [(2, Status::SUCCESS)], "offset {offset}");
        let mut found = vec![0; 8192];
        memory.read(0, &mut found).unwrap();
        assert!(found[offset..offset + 4096] == data, "offset {offset}");
        let beside = found[..offset].iter().chain(&found[offset + 4096..]);
        assert!(beside.copied().all(|byte| byte == 0xee), "offset {offset}: bytes beside it");
    }
    controller.delete_queue_pair(pair).unwrap();
}
