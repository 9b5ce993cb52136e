//! Each fault, on demand and repeatable.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nvme_sim::{Config, FaultAction, FaultMatch, FaultPlan, FaultRule, NamespaceConfig, Status};
use support::{Host, Sqe, await_some, start};

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;

fn rule(action: FaultAction, when: FaultMatch) -> FaultRule {
    FaultRule { action, when }
}

fn on(opcode: u8) -> FaultMatch {
    FaultMatch { opcode: Some(opcode), ..Default::default() }
}

fn bring_up(plan: FaultPlan) -> (support::Controller, Host) {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let controller = start(Config { namespaces: vec![namespace], faults: plan, ..Default::default() });
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 64, None);
    (controller, host)
}

fn read(host: &mut Host, lba: u64) -> Sqe {
    let buffer = host.allocate(4096);
    Sqe::new(READ, 1).prp(buffer, 0).blocks(lba, 8)
}

#[test]
fn error_statuses_where_and_when_they_are_asked_for() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    let entry = read(&mut host, 100);
    let media = FaultAction::Fail(Status::new(2, 0x81));
    faults.add(rule(media.clone(), FaultMatch { blocks: Some(107..=107), ..on(READ) }));
    assert_eq!(host.command(1, entry).status, 0x281);
    assert!(!host.command(1, entry).do_not_retry);
    assert_eq!(host.command(1, entry.blocks(99, 8)).status, 0, "blocks 99 to 106");
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
    assert_eq!(host.write_blocks(1, 100, 9, &[1; 4096]), 0, "another opcode");
    assert_eq!(faults.fired(), 2);
    // The third and fourth flush.
    faults.set(FaultPlan {
        rules: vec![rule(
            FaultAction::Fail(Status::new(0, 6).not_to_be_retried()),
            FaultMatch { skip: 2, limit: Some(2), ..on(FLUSH) },
        )],
        ..Default::default()
    });
    let results: Vec<u16> = (0..6).map(|_| host.command(1, Sqe::new(FLUSH, 1)).status).collect();
    assert_eq!(results, [0, 0, 6, 6, 0, 0]);
    // Admin commands.
    faults.set(FaultPlan {
        rules: vec![rule(media, FaultMatch { admin: true, limit: Some(1), ..on(6) })],
        ..Default::default()
    });
    assert_eq!(host.identify(1, 0), Err(0x281));
    assert!(host.identify(1, 0).is_ok());
    // The host finds each of them in the error log, the newest first.
    let log = host.log_page(1, 6 * 64);
    let entries: Vec<(u64, u16, u16, u64)> = log
        .chunks_exact(64)
        .map(|raw| {
            let number = |at: usize, len: usize| raw[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            (number(0, 8), number(8, 2) as u16, (number(12, 2) >> 1 & 0x7ff) as u16, number(16, 8))
        })
        .collect();
    assert_eq!(entries[..3], [(5, 0, 0x281, 0), (4, 1, 6, 0), (3, 1, 6, 0)]);
    assert_eq!(entries[3..], [(2, 1, 0x281, 100), (1, 1, 0x281, 100), (0, 0, 0, 0)]);
    // A failed write changes nothing.
    faults
        .set(FaultPlan { rules: vec![rule(FaultAction::Fail(Status::new(2, 0x80)), on(WRITE))], ..Default::default() });
    assert_eq!(host.write_blocks(1, 100, 9, &[9; 4096]), 0x280);
    faults.clear();
    assert_eq!(host.read_blocks(1, 100, 9, 4096), Ok(vec![1; 4096]));
}

#[test]
fn admin_commands_by_what_they_ask_for() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    let fail = |when: FaultMatch| rule(FaultAction::Fail(Status::new(0, 6)), when);
    let only = |when: FaultMatch| faults.set(FaultPlan { rules: vec![fail(when)], ..Default::default() });
    let any = FaultMatch::default;
    let identify = |host: &mut Host| [0, 1, 3].map(|cns| host.identify(cns, 1).map(|_| ()));
    only(FaultMatch { cns: Some(3), skip: 1, limit: Some(1), ..any() });
    let results = [(); 3].map(|()| identify(&mut host));
    assert_eq!(results, [[Ok(()); 3], [Ok(()), Ok(()), Err(6)], [Ok(()); 3]], "the second of CNS 3");
    only(FaultMatch { cns: Some(0), namespace: Some(1), ..any() });
    assert_eq!(identify(&mut host), [Err(6), Ok(()), Ok(())]);
    // Feature 2 (power management), read and set; or only one of the two.
    let feature = |host: &mut Host, id| [host.get_feature(id, 0).status, host.set_feature(id, 0).status];
    only(FaultMatch { feature: Some(2), ..any() });
    assert_eq!((feature(&mut host, 2), feature(&mut host, 5)), ([6, 6], [0, 0]));
    only(FaultMatch { feature: Some(2), opcode: Some(9), ..any() });
    assert_eq!(feature(&mut host, 2), [0, 6]);
    only(FaultMatch { log_page: Some(2), limit: Some(1), ..any() });
    let page = host.allocate(4096);
    let log = |id: u32| Sqe::new(2, 0xffff_ffff).prp(page, 0).dword(10, 127 << 16 | id);
    assert_eq!([1, 2, 2].map(|id| host.admin(log(id)).status), [0, 6, 0]);
    // I/O commands with the same numbers are others, and as text it is the same.
    faults.set(FaultPlan::default());
    for text in ["fail=0:6,cns=1", "fail=0:6,fid=7", "fail=0:6,lid=2", "fail=0:6,opcode=delete-sq"] {
        faults.add(text.parse().unwrap());
    }
    let entry = read(&mut host, 1);
    assert_eq!([entry, entry.blocks(2, 8), entry.blocks(7, 8)].map(|entry| host.command(1, entry).status), [0; 3]);
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
    assert_eq!(identify(&mut host), [Ok(()), Err(6), Ok(())]);
    assert_eq!((host.get_feature(7, 0).status, host.admin(log(2)).status), (6, 6));
    assert_eq!(host.admin(Sqe::new(0, 0).dword(10, 1)).status, 6, "Delete I/O Submission Queue");
    for text in ["fail=0:6,cns=256", "fail=0:6,fid", "fail=0:6,opcode=identity"] {
        assert!(text.parse::<FaultRule>().is_err(), "{text}");
    }
}

#[test]
fn a_command_that_says_it_was_done_and_was_not() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    assert_eq!(host.write_blocks(1, 0, 9, &[3; 4096]), 0);
    faults.add("nothing,opcode=write,limit=1".parse().unwrap());
    faults.add("nothing,cns=1,limit=1".parse().unwrap());
    assert_eq!(host.write_blocks(1, 0, 9, &[4; 4096]), 0);
    assert_eq!(host.read_blocks(1, 0, 9, 4096), Ok(vec![3; 4096]));
    assert_eq!(host.identify(1, 0), Ok(vec![0; 4096]));
    assert_ne!(host.identify(1, 0), Ok(vec![0; 4096]));
}

#[test]
fn a_fault_befalls_the_very_next_command() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    let once = || rule(FaultAction::Fail(Status::new(0, 6)), FaultMatch { limit: Some(1), ..on(FLUSH) });
    for round in 0..5000 {
        faults.set(FaultPlan { rules: vec![once()], ..Default::default() });
        let results = [(); 2].map(|()| host.command(1, Sqe::new(FLUSH, 1)).status);
        assert_eq!(results, [6, 0], "round {round}");
    }
}

#[test]
fn the_same_seed_makes_the_same_faults() {
    let run = |seed| {
        let when = FaultMatch { probability: 0.3, ..Default::default() };
        let rules = vec![rule(FaultAction::Fail(Status::new(0, 6)), when)];
        let (_controller, mut host) = bring_up(FaultPlan { seed, rules, ..Default::default() });
        (0..100).map(|_| host.command(1, Sqe::new(FLUSH, 1)).status == 6).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let hits = run(3).into_iter().filter(|hit| *hit).count();
    assert!((10..60).contains(&hits), "{hits}");
}

#[test]
fn delayed_commands_can_be_overtaken_and_aborted() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    let delay = |time: Duration| FaultAction::Delay(time..=time);
    faults.add(rule(delay(Duration::from_millis(40)), on(READ)));
    let entry = read(&mut host, 0);
    let start = Instant::now();
    let slow = host.submit(1, entry);
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0, "overtakes");
    let completion = host.wait(1);
    assert_eq!((completion.id, completion.status), (slow, 0));
    assert!(start.elapsed() >= Duration::from_millis(40));
    // Held for long: aborted by Abort, by deletion of the queue, forgotten by a reset.
    faults.set(FaultPlan { rules: vec![rule(delay(Duration::from_secs(3600)), on(READ))], ..Default::default() });
    let slow = host.submit(1, entry);
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
    let abort = Sqe::new(8, 0).dword(10, u32::from(slow) << 16 | 1);
    assert_eq!(host.admin(abort).result, 0);
    let completion = host.wait(1);
    assert_eq!((completion.id, completion.status), (slow, 7));
    assert_eq!(host.admin(abort).result, 1, "not there any more");
    let slow = host.submit(1, entry);
    let mut again = entry;
    again.0[0] |= u32::from(slow) << 16;
    host.push_raw(1, again);
    host.flush(1);
    let completion = host.wait(1);
    assert_eq!((completion.id, completion.status), (slow, 3), "its identifier is in use");
    assert_eq!(host.admin(Sqe::new(0, 0).dword(10, 1)).status, 0);
    let completion = host.wait(1);
    assert_eq!((completion.id, completion.status), (slow, 8));
    host.disable();
    host.enable();
    host.create_pair(1, 16, None);
    host.submit(1, entry);
    host.disable();
    host.enable();
    faults.clear();
    host.create_pair(1, 16, None);
    assert_eq!(host.command(1, entry).status, 0);
    host.expect_silence(1);
}

#[test]
fn a_delayed_write_is_carried_out_late() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let time = Duration::from_millis(30);
    controller.simulator.faults().add(rule(FaultAction::Delay(time..=time), on(WRITE)));
    let buffer = host.allocate(4096);
    host.put(buffer, &[1; 4096]);
    host.submit(1, Sqe::new(WRITE, 1).prp(buffer, 0).blocks(0, 8));
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0, "the write was fetched");
    host.put(buffer, &[2; 4096]);
    assert_eq!(host.wait(1).status, 0);
    assert_eq!(host.read_blocks(1, 0, 9, 4096), Ok(vec![2; 4096]), "data are fetched when it is carried out");
}

#[test]
fn a_stray_command_outlives_its_queue() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let counters = controller.simulator.counters();
    let strays = || (counters.strays.load(Ordering::Relaxed), counters.strays_refused.load(Ordering::Relaxed));
    assert_eq!(host.write_blocks(1, 0, 9, &[7; 4096]), 0);
    let time = Duration::from_secs(1);
    let stray = FaultAction::Stray(time..=time);
    controller.simulator.faults().add(rule(stray, FaultMatch { limit: Some(2), ..on(READ) }));
    // A reset leaves the memory where it is: the fault shows.
    let buffer = host.allocate(4096);
    host.put(buffer, &[1; 4096]);
    host.submit(1, Sqe::new(READ, 1).prp(buffer, 0).blocks(0, 8));
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0, "the read was fetched");
    host.disable();
    assert_eq!(strays(), (0, 0), "it is still to come");
    await_some("the stray", || (strays() == (1, 0)).then_some(()));
    assert_eq!(host.get(buffer, 4096), [7; 4096]);
    // A front-end that leaves takes its memory away.
    host.enable();
    host.create_pair(1, 16, None);
    host.submit(1, Sqe::new(READ, 1).prp(buffer, 0).blocks(0, 8));
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0, "the read was fetched");
    host.put(buffer, &[1; 4096]);
    drop(host);
    await_some("the stray", || (strays() == (2, 2)).then_some(()));
}

#[test]
fn lost_completions_and_wrong_identifiers() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    faults.add(rule(FaultAction::LoseCompletion, FaultMatch { limit: Some(1), ..on(WRITE) }));
    let buffer = host.allocate(4096);
    host.put(buffer, &[5; 4096]);
    let write = Sqe::new(WRITE, 1).prp(buffer, 0).blocks(0, 8);
    let lost = host.submit(1, write);
    host.expect_silence(1);
    assert_eq!(host.admin(Sqe::new(8, 0).dword(10, u32::from(lost) << 16 | 1)).result, 1, "too late to abort");
    assert_eq!(host.read_blocks(1, 0, 9, 4096), Ok(vec![5; 4096]), "it was carried out, and the queue works on");
    faults.add(rule(FaultAction::WrongCommandId, FaultMatch { limit: Some(1), ..on(WRITE) }));
    let id = host.submit(1, write);
    let completion = host.wait(1);
    assert_ne!(completion.id, id);
    assert_eq!((completion.sq, completion.status), (1, 0));
    assert_eq!(host.command(1, write).status, 0);
}

#[test]
fn reordered_completions() {
    let (controller, mut host) = bring_up(FaultPlan { seed: 4, reorder: true, ..Default::default() });
    let mut disordered = 0;
    for _ in 0..20 {
        let mut ids: Vec<u16> = (0..16).map(|_| host.push(1, Sqe::new(FLUSH, 1))).collect();
        host.flush(1);
        let mut seen: Vec<u16> = (0..16).map(|_| host.wait(1).id).collect();
        disordered += usize::from(seen != ids);
        seen.sort();
        ids.sort();
        assert_eq!(seen, ids, "each completes once");
    }
    assert!(disordered > 10, "{disordered}");
    controller.simulator.faults().change(|plan| plan.reorder = false);
    let ids: Vec<u16> = (0..16).map(|_| host.push(1, Sqe::new(FLUSH, 1))).collect();
    host.flush(1);
    assert_eq!((0..16).map(|_| host.wait(1).id).collect::<Vec<_>>(), ids);
}

#[test]
fn a_stuck_controller() {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let plan = FaultPlan { never_ready: true, ..Default::default() };
    let controller = start(Config { namespaces: vec![namespace], faults: plan, ..Default::default() });
    let faults = controller.simulator.faults();
    let mut host = Host::connect(controller.simulator.socket());
    let pause = || std::thread::sleep(Duration::from_millis(20));
    host.prepare(16);
    host.write32(0x14, 4 << 20 | 6 << 16 | 1);
    pause();
    assert_eq!(host.status(), 0, "never ready");
    faults.change(|plan| plan.never_ready = false);
    host.await_status(1, 1);
    host.create_pair(1, 16, None);

    faults.change(|plan| plan.stopped = true);
    let id = host.submit(1, Sqe::new(FLUSH, 1));
    host.expect_silence(1);
    assert_eq!(host.status(), 1, "it looks healthy");
    faults.change(|plan| plan.stopped = false);
    assert_eq!(host.wait(1).id, id);

    // From a command on.
    faults.add(rule(FaultAction::Stop, FaultMatch { limit: Some(1), ..on(FLUSH) }));
    host.submit(1, Sqe::new(FLUSH, 1));
    host.expect_silence(1);
    let late = host.submit(1, Sqe::new(FLUSH, 1));
    host.expect_silence(1);
    faults.change(|plan| plan.stopped = false);
    assert_eq!(host.wait(1).id, late, "the command it stopped at is never answered");

    faults.change(|plan| plan.shutdown_hangs = true);
    host.write32(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
    host.await_status(0xc, 4);
    pause();
    assert_eq!(host.status() & 0xc, 4);
    faults.change(|plan| plan.shutdown_hangs = false);
    host.await_status(0xc, 8);

    faults.change(|plan| plan.never_reset = true);
    host.write32(0x14, 0);
    pause();
    assert_eq!(host.status() & 1, 1, "does not reset");
    faults.change(|plan| plan.never_reset = false);
    host.await_status(1, 0);

    faults.change(|plan| plan.ready_delay = Duration::from_millis(50));
    let start = Instant::now();
    host.enable();
    assert!(start.elapsed() >= Duration::from_millis(50));
}

#[test]
fn a_fatal_status() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let faults = controller.simulator.faults();
    faults.add(rule(FaultAction::Fatal, FaultMatch { limit: Some(1), ..on(READ) }));
    let entry = read(&mut host, 0);
    host.submit(1, entry);
    await_some("CFS", || (host.status() & 2 != 0).then_some(()));
    host.submit(1, entry);
    host.expect_silence(1);
    host.disable();
    assert_eq!(host.status(), 0);
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.command(1, entry).status, 0);
    // While nothing runs, and for as long as it is asked for.
    faults.change(|plan| plan.fatal = true);
    await_some("CFS", || (host.status() & 2 != 0).then_some(()));
    host.write32(0x14, 0);
    host.await_status(1, 0);
    host.prepare(16);
    host.write32(0x14, 4 << 20 | 6 << 16 | 1);
    await_some("CFS again", || (host.status() & 2 != 0).then_some(()));
    faults.clear();
    host.disable();
    host.enable();
    assert!(host.identify(1, 0).is_ok());
}

#[test]
fn surprise_removal() {
    let (controller, mut host) = bring_up(FaultPlan::default());
    let simulator = &controller.simulator;
    assert_eq!(host.write_blocks(1, 0, 9, &[3; 512]), 0);
    simulator.remove();
    assert_eq!((host.status(), host.read64(0)), (u32::MAX, u64::MAX));
    let mut raw = [0; 4];
    host.config_read(0, &mut raw);
    assert_eq!(raw, [0xff; 4]);
    host.submit(1, Sqe::new(FLUSH, 1));
    host.expect_silence(1);
    host.write32(0x14, 0);
    assert_eq!(host.status(), u32::MAX);
    simulator.reinsert().unwrap();
    assert_eq!((host.read32(0x14), host.status()), (0, 0));
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.read_blocks(1, 0, 9, 512), Ok(vec![3; 512]));
    // At a command.
    simulator.faults().add(rule(FaultAction::Remove, FaultMatch { limit: Some(1), skip: 1, ..on(FLUSH) }));
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
    host.submit(1, Sqe::new(FLUSH, 1));
    await_some("removal", || (host.status() == u32::MAX).then_some(()));
    host.expect_silence(1);
}

#[test]
fn rules_as_text() {
    let parse = |text: &str| text.parse::<FaultRule>().map_err(|error| error.to_string());
    let ms = Duration::from_millis;
    assert_eq!(
        parse("delay=1ms..20ms,opcode=read,nsid=2,sgl=on,lba=0x10..31,skip=3,limit=4,p=0.5"),
        Ok(rule(
            FaultAction::Delay(ms(1)..=ms(20)),
            FaultMatch {
                admin: false,
                opcode: Some(2),
                namespace: Some(2),
                sgl: Some(true),
                blocks: Some(16..=31),
                skip: 3,
                limit: Some(4),
                probability: 0.5,
                ..Default::default()
            }
        ))
    );
    assert_eq!(parse("fail=2:0x81"), Ok(rule(FaultAction::Fail(Status::new(2, 0x81)), FaultMatch::default())));
    let admin = FaultMatch { admin: true, ..on(6) };
    assert_eq!(parse("lose,admin,opcode=6"), Ok(rule(FaultAction::LoseCompletion, admin)));
    for (text, said) in [
        ("", "not one of"),
        ("explode", "explode"),
        ("delay=5", "time"),
        ("delay=1m", "time"),
        ("fail=9:1", "TYPE:CODE"),
        ("fail=1", "TYPE:CODE"),
        ("lose,p=2", "probability"),
        ("lose,opcode=jump", "opcode"),
        ("lose,sgl=maybe", "on or off"),
        ("lose,lba=x", "FIRST..LAST"),
        ("lose,when=now", "when"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(said), "{text:?}: {error}");
    }
}
