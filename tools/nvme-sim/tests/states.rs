//! Controllers that are busy, stubborn, or told to stop.

mod support;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule};
use support::{Host, MEMORY_BYTES, Sqe, await_some, with_two_namespaces};
use vmm_sys_util::eventfd::EventFd;

const FLUSH: u8 = 0x00;
const READ: u8 = 0x02;
const ABORT: u8 = 0x08;
/// vfio's MSI-X index, and "the data are eventfds to be triggered".
const MSIX: u32 = 2;
const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;

#[test]
fn what_is_sanitized_or_formatted_answers_later() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let faults = controller.simulator.faults();
    let flush = |host: &mut Host| [1, 2, 0xffff_ffff].map(|id| host.command(1, Sqe::new(FLUSH, id)).status);
    assert_eq!(flush(&mut host), [0; 3]);
    faults.change(|plan| plan.sanitizing = true);
    assert_eq!(flush(&mut host), [0x1d; 3], "Sanitize In Progress");
    assert!(!host.command(1, Sqe::new(FLUSH, 1)).do_not_retry);
    assert!(host.identify(1, 0).is_ok());
    assert_eq!(host.admin(Sqe::new(0x80, 1)).status, 0x1d, "Format NVM");
    faults.change(|plan| (plan.sanitizing, plan.formatting) = (false, Some(2)));
    assert_eq!(flush(&mut host), [0, 0x84, 0x84], "Format In Progress");
    assert_eq!(host.admin(Sqe::new(0x80, 2)).status, 0x84);
    faults.change(|plan| plan.formatting = Some(0xffff_ffff));
    assert_eq!(flush(&mut host), [0x84; 3]);
    faults.clear();
    assert_eq!(flush(&mut host), [0; 3]);
}

#[test]
fn an_abort_that_aborts_nothing() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let faults = controller.simulator.faults();
    let delay = FaultAction::Delay(Duration::from_secs(600)..=Duration::from_secs(600));
    let when = FaultMatch { opcode: Some(READ), ..Default::default() };
    faults.add(FaultRule { action: delay, when });
    faults.change(|plan| plan.never_aborts = true);
    let buffer = host.allocate(4096);
    let slow = host.submit(1, Sqe::new(READ, 1).prp(buffer, 0).blocks(0, 8));
    assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0, "the read was fetched");
    let abort = Sqe::new(ABORT, 0).dword(10, u32::from(slow) << 16 | 1);
    let answer = host.admin(abort);
    assert_eq!((answer.status, answer.result), (0, 1));
    assert_eq!(host.poll(1), None);
    faults.change(|plan| plan.never_aborts = false);
    let answer = host.admin(abort);
    assert_eq!((answer.status, answer.result), (0, 0));
    assert_eq!(host.wait(1).id, slow);
}

#[test]
fn a_pause_shows_in_csts() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let faults = controller.simulator.faults();
    faults.change(|plan| plan.paused = true);
    host.await_status(1 << 5, 1 << 5);
    host.submit(1, Sqe::new(FLUSH, 1));
    host.expect_silence(1);
    faults.change(|plan| plan.paused = false);
    assert_eq!(host.wait(1).status, 0);
    host.await_status(1 << 5, 0);
}

#[test]
fn commands_after_a_shutdown_are_counted() {
    for (shadow, hangs) in [(false, false), (true, false), (false, true)] {
        let (controller, mut host) = with_two_namespaces(Config::default());
        let counters = controller.simulator.counters();
        let counted = || counters.commands_after_shutdown.load(Ordering::Relaxed);
        if shadow {
            let [doorbells, events] = [(); 2].map(|()| host.allocate(4096));
            assert_eq!(host.admin(Sqe::new(0x7c, 0).prp(doorbells, events)).status, 0);
            host.shadow = Some(doorbells);
        }
        controller.simulator.faults().change(|plan| plan.shutdown_hangs = hangs);
        for _ in 0..70 {
            assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
        }
        host.write32(0x14, 1 << 14 | 4 << 20 | 6 << 16 | 1);
        host.await_status(3 << 2, if hangs { 1 << 2 } else { 2 << 2 });
        assert_eq!(counted(), 0, "what came before");
        host.push(1, Sqe::new(FLUSH, 1));
        host.submit(1, Sqe::new(FLUSH, 1));
        await_some("the two", || (counted() == 2).then_some(()));
        host.submit(0, Sqe::new(6, 0));
        await_some("the third", || (counted() == 3).then_some(()));
        // A reset is the way on.
        controller.simulator.faults().clear();
        host.disable();
        host.enable();
        host.create_pair(1, 64, None);
        assert_eq!(host.command(1, Sqe::new(FLUSH, 1)).status, 0);
        assert_eq!(counted(), 3);
    }
}

#[test]
fn more_queues_of_one_kind_than_of_the_other() {
    for (submission, completion) in [(2_u16, 4_u16), (4, 2)] {
        let config =
            Config { submission_queues: Some(submission), completion_queues: Some(completion), ..Default::default() };
        let (_controller, mut host) = with_two_namespaces(Config { max_queue_pairs: 8, ..config });
        host.disable();
        host.enable();
        let granted = u32::from(completion - 1) << 16 | u32::from(submission - 1);
        assert_eq!(host.set_feature(7, 7 << 16 | 7).result, granted);
        assert_eq!(host.get_feature(7, 0).result, granted);
        let base = host.allocate(64 << 10);
        for id in 1..=5_u16 {
            let page = base + u64::from(id) * 8192;
            let status = host.admin(Host::create_cq_entry(id, 16, page, 1)).status;
            assert_eq!(status, if id <= completion { 0 } else { 0x101 }, "completion queue {id}");
            let status = host.admin(Host::create_sq_entry(id, 16, page + 4096, 1)).status;
            assert_eq!(status, if id <= submission { 0 } else { 0x101 }, "submission queue {id}");
        }
    }
}

#[test]
fn a_function_reset_may_forget_the_interrupts() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut after_reset = |forgets: bool, given_again: bool| {
        controller.simulator.faults().change(|plan| plan.reset_forgets_interrupts = forgets);
        host.client.set_irqs(MSIX, EVENTFD_TRIGGER, 0, 1, &[event.as_raw_fd()]).unwrap();
        host.client.reset().unwrap();
        if given_again {
            host.client.set_irqs(MSIX, EVENTFD_TRIGGER, 0, 1, &[event.as_raw_fd()]).unwrap();
        }
        let _ = event.read();
        host.config_write(4, &[6, 0]);
        host.enable();
        assert!(host.identify(1, 0).is_ok());
        // The interrupt follows its completion; the one of this command is there when the next one is answered.
        assert!(host.identify(1, 0).is_ok());
        event.read().is_ok()
    };
    assert_eq!([after_reset(false, false), after_reset(true, false), after_reset(true, true)], [true, false, true]);
}

#[test]
fn a_region_too_many_is_refused() {
    let config = Config { dma_regions: Some(2), ..Default::default() };
    let (_controller, mut host) = with_two_namespaces(config);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(8192).unwrap();
    let far = support::MEMORY + MEMORY_BYTES;
    for (n, status) in [(0, 0), (1, 4)] {
        // The client does not look at the answer's error: whether it is mapped shows in a command.
        host.client.dma_map(n * 4096, far + n * 4096, 4096, file.as_raw_fd()).unwrap();
        let read = Sqe::new(READ, 1).prp(far + n * 4096, 0).blocks(0, 8);
        assert_eq!(host.command(1, read).status, status, "region {n} besides the first");
    }
    host.client.dma_unmap(far, 4096).unwrap();
    host.client.dma_map(4096, far + 4096, 4096, file.as_raw_fd()).unwrap();
    let read = Sqe::new(READ, 1).prp(far + 4096, 0).blocks(0, 8);
    assert_eq!(host.command(1, read).status, 0);
}

#[test]
fn a_controller_that_is_disabled_while_it_becomes_ready() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let early = || controller.simulator.counters().early_disables.load(Ordering::Relaxed);
    host.disable();
    assert_eq!(early(), 0);
    controller.simulator.faults().change(|plan| plan.never_ready = true);
    host.prepare(32);
    host.write32(0x14, 4 << 20 | 6 << 16 | 1);
    host.disable();
    assert_eq!(early(), 1);
}

#[test]
fn log_pages_that_keep_their_event() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let released = || controller.simulator.counters().events_released.load(Ordering::Relaxed);
    let page = host.allocate(4096);
    let log = |keep: u32| Sqe::new(2, 0xffff_ffff).prp(page, 0).dword(10, 15 << 16 | keep << 15 | 1);
    assert_eq!((host.admin(log(1)).status, released()), (0, 0));
    assert_eq!((host.admin(log(0)).status, released()), (0, 1));
}
