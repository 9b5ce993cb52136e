//! Servers that are stuck, gone, refuse, or talk nonsense: an error each time, in time.

mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use server::raw::{self, RawServer};
use server::{Behaviour, Refuse, TestServer};
use vfio::{Address, Device, Error, SharedMemory};

/// The deadline given to devices here, and what a call may take when it is not met.
const DEADLINE: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(10);

fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (call(), start.elapsed())
}

#[test]
fn no_server_is_an_error_that_names_the_socket() {
    let address: Address = "vfio-user:/nonexistent/nvme.sock".parse().unwrap();
    let error = Device::open(&address).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }));
    assert!(error.to_string().contains("/nonexistent/nvme.sock"), "{error}");
}

#[test]
fn a_server_that_does_not_negotiate_is_given_up_and_left() {
    let server = RawServer::start(|_| None);
    let (result, took) = timed(|| server.open(DEADLINE));
    let error = result.unwrap_err();
    assert!(took >= DEADLINE && took < LATE, "{took:?}");
    assert!(error.to_string().contains("did not answer within 1000 ms"), "{error}");
    // The thread that waited is freed: its socket is closed.
    server.join();
}

#[test]
fn a_region_that_is_told_of_in_part_is_an_error() {
    let server = RawServer::start(|message| {
        Some(match message.command {
            raw::VERSION => raw::version(),
            raw::DEVICE_GET_INFO => raw::device_info(1),
            // It claims 100 bytes of capabilities, and sends none.
            raw::DEVICE_GET_REGION_INFO => [&132u32.to_ne_bytes()[..], &[0; 28]].concat(),
            command => panic!("unexpected command {command}"),
        })
    });
    let error = server.open(LATE).unwrap_err();
    assert!(error.to_string().contains("made no sense"), "{error}");
    server.join();
}

#[test]
fn a_request_without_an_answer_ends_the_connection() {
    let server = RawServer::start(|message| match message.command {
        raw::VERSION => Some(raw::version()),
        raw::DEVICE_GET_INFO => Some(raw::device_info(0)),
        _ => None,
    });
    let device = server.open(DEADLINE).unwrap();
    assert_eq!(device.interrupt_vectors(), 0);
    assert!(matches!(device.bar(0), Err(Error::NoRegion { .. })));
    let (result, took) = timed(|| device.reset());
    assert!(matches!(result, Err(Error::Timeout { request: "reset the device", .. })), "{result:?}");
    assert!(took >= DEADLINE && took < LATE, "{took:?}");
    // It may be as alive as ever, which is another thing than one that has closed the connection.
    assert_eq!(device.notice(), Some(vfio::Notice::GivenUp));
    let (results, took) = timed(|| (0..20).map(|_| device.reset()).collect::<Vec<_>>());
    assert!(results.iter().all(|result| matches!(result, Err(Error::GivenUp { .. }))), "{results:?}");
    assert!(took < 10 * DEADLINE, "later calls fail at once, 20 not after {took:?}");
    server.join();
}

#[test]
fn what_waits_behind_a_stuck_request_is_not_sent() {
    let resets = Arc::new(AtomicUsize::new(0));
    let heard = resets.clone();
    let server = RawServer::start(move |message| match message.command {
        raw::VERSION => Some(raw::version()),
        raw::DEVICE_GET_INFO => Some(raw::device_info(0)),
        _ => {
            heard.fetch_add(1, Ordering::Relaxed);
            None
        }
    });
    let device = server.open(DEADLINE).unwrap();
    let results = std::thread::scope(|scope| {
        let callers = [(); 3].map(|()| scope.spawn(|| device.reset()));
        callers.map(|caller| caller.join().unwrap())
    });
    let late = results.iter().filter(|result| matches!(result, Err(Error::Timeout { .. }))).count();
    let given_up = results.iter().filter(|result| matches!(result, Err(Error::GivenUp { .. }))).count();
    assert_eq!((late, given_up), (1, 2), "{results:?}");
    drop(device);
    server.join();
    assert_eq!(resets.load(Ordering::Relaxed), 1, "the others were told that theirs failed");
}

#[test]
fn a_stuck_register_is_a_timeout_and_mapped_doorbells_stay() {
    let server = TestServer::start(Behaviour { stuck_at: Some(0x1c), ..Behaviour::default() });
    let device = server.open_within(DEADLINE).unwrap();
    let bar = device.bar(0).unwrap();
    let doorbell = bar.doorbell(0x1000).unwrap();
    let buffer = device.dma().allocate(4096).unwrap();
    let (result, took) = timed(|| bar.read_u32(0x1c));
    let error = result.unwrap_err();
    assert!(took >= DEADLINE && took < LATE, "{took:?}");
    assert!(error.to_string().contains("device.sock") && error.to_string().contains("read a register"), "{error}");
    assert!(matches!(bar.read_u32(0), Err(Error::GivenUp { .. })));
    doorbell.ring(3);
    assert_eq!(bar.read_u32(0x1000).unwrap(), 3);
    drop(buffer);
    assert!(device.dma().allocate(4096).is_err());
}

#[test]
fn a_refused_read_is_an_error() {
    let server = TestServer::start(Behaviour { refuse_read_of: Some(0x20), ..Behaviour::default() });
    let device = server.open_within(DEADLINE).unwrap();
    let bar = device.bar(0).unwrap();
    let (result, took) = timed(|| bar.read_u32(0x20));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("'read a register' failed") && error.contains("4 bytes at 0x20 of region 0"), "{error}");
    assert!(took < DEADLINE, "{took:?}");
    bar.read_u32(0).unwrap();
}

#[test]
fn a_refused_dma_map_is_an_error_by_name_and_costs_nobody_else() {
    let server = TestServer::start(Behaviour { most_dma: 1, ..Behaviour::default() });
    let device = server.open_within(LATE).unwrap();
    let taken = device.dma().allocate(4096).unwrap();
    let memory = || Arc::new(SharedMemory::create(8192).unwrap());
    let error = device.dma().map(memory()).unwrap_err();
    assert!(matches!(error, Error::Server { request: "map memory for DMA", .. }), "{error:?}");
    let text = error.to_string();
    for part in ["device.sock", "0x2000 bytes at 0x", "it refuses", "with 1 mappings there already"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // What was refused takes no addresses, is not unmapped, and the connection is as good as before.
    assert!(server.has_dma(taken.iova()) && device.notice().is_none());
    device.reset().unwrap();
    let iova = taken.iova();
    drop(taken);
    assert!(!server.has_dma(iova));
    drop(device.dma().map(memory()).unwrap());
    assert_eq!(server.refused_unmaps(), 0);
}

#[test]
fn refused_unmaps_writes_and_resets_are_errors_at_once() {
    let refuse = Refuse { write_of: Some(0x24), unmap: true, reset: true };
    let server = TestServer::start(Behaviour { refuse, ..Behaviour::default() });
    let device = server.open_within(LATE).unwrap();
    let bar = device.bar(0).unwrap();
    let (result, took) = timed(|| bar.write_u32(0x24, 5));
    let text = result.unwrap_err().to_string();
    assert!(text.contains("4 bytes at 0x24 of region 0: it refuses") && took < LATE, "{text} after {took:?}");
    let error = device.reset().unwrap_err();
    assert!(matches!(error, Error::Server { request: "reset the device", .. }), "{error:?}");
    // Memory that the server may still reach: its addresses are not used again.
    let first = device.dma().map(Arc::new(SharedMemory::create(4096).unwrap())).unwrap();
    let iova = first.iova();
    drop(first);
    let second = device.dma().map(Arc::new(SharedMemory::create(4096).unwrap())).unwrap();
    assert_ne!(second.iova(), iova);
    bar.write_u32(0x28, 5).unwrap();
    assert_eq!((bar.read_u32(0x28).unwrap(), device.notice()), (5, None));
}

/// A server without regions that answers DEVICE_RESET with what `reply` makes of it.
fn reset_answered(reply: impl Fn(&mut Vec<u8>) + Send + 'static) -> (RawServer, Device) {
    let server = RawServer::start_raw(move |message| {
        let mut answer = message.reply(match message.command {
            raw::VERSION => raw::version(),
            raw::DEVICE_GET_INFO => raw::device_info(0),
            _ => vec![],
        });
        if message.command == raw::DEVICE_RESET {
            reply(&mut answer);
        }
        Some(answer)
    });
    let device = server.open(LATE).unwrap();
    (server, device)
}

#[test]
fn an_errno_is_told_in_words() {
    let (server, device) = reset_answered(|reply| {
        reply[8..12].copy_from_slice(&0x21u32.to_ne_bytes());
        reply[12..16].copy_from_slice(&(libc::ENOSPC as u32).to_ne_bytes());
    });
    for _ in 0..2 {
        let error = device.reset().unwrap_err().to_string();
        assert!(error.contains("it refuses: No space left"), "{error}");
    }
    drop(device);
    server.join();
}

#[test]
fn a_reply_that_does_not_fit_is_an_error_and_no_panic() {
    let set_bytes = |reply: &mut Vec<u8>, bytes: u32| reply[4..8].copy_from_slice(&bytes.to_ne_bytes());
    // It is longer than it should be, but whole: the next one begins where it should.
    let (server, device) = reset_answered(move |reply| {
        reply.extend([0; 8]);
        set_bytes(reply, 24);
    });
    for _ in 0..2 {
        let error = device.reset().unwrap_err();
        assert!(matches!(&error, Error::Server { reason, .. } if reason.contains("it has 8 bytes")), "{error}");
    }
    assert_eq!(device.notice(), None);
    drop(device);
    server.join();
    // After these nothing can be made of what comes next.
    type Spoil = fn(&mut Vec<u8>);
    let spoils: [Spoil; 5] = [
        |reply| reply[4..8].copy_from_slice(&15u32.to_ne_bytes()),
        |reply| reply[4..8].copy_from_slice(&u32::MAX.to_ne_bytes()),
        |reply| reply[0] ^= 1,
        |reply| reply[2] = 2,
        |reply| reply[8] = 7,
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let (server, device) = reset_answered(spoil);
        let error = device.reset().unwrap_err();
        assert!(
            matches!(error, Error::Server { .. }) && error.to_string().contains("made no sense"),
            "{number}: {error}"
        );
        assert!(matches!(device.reset(), Err(Error::GivenUp { .. })), "{number}");
        assert_eq!(device.notice(), Some(vfio::Notice::GivenUp), "{number}");
        server.join();
    }
}

#[test]
fn what_the_server_asks_for_is_refused_and_what_it_answers_is_heard() {
    let (told, refusals) = std::sync::mpsc::channel();
    let server = RawServer::start_raw(move |message| {
        if message.is_reply() {
            told.send(message.header).unwrap();
            return None;
        }
        Some(match message.command {
            raw::VERSION => message.reply(raw::version()),
            raw::DEVICE_GET_INFO => message.reply(raw::device_info(0)),
            // DMA_READ of 16 bytes, numbered by the server; the answer comes behind it.
            _ => {
                let ask = [&[7, 0, 11, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat();
                [ask, message.reply(vec![])].concat()
            }
        })
    });
    let device = server.open(LATE).unwrap();
    device.reset().unwrap();
    let refusal = refusals.recv_timeout(LATE).unwrap();
    assert_eq!((refusal[0], refusal[2], refusal[8]), (7, 11, 0x21), "a reply with the error flag: {refusal:?}");
    drop(device);
    server.join();
}

#[test]
fn a_server_that_ends_gives_errors_and_no_crash() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let bar = device.bar(0).unwrap();
    let mapped = bar.doorbell(0x1004).unwrap();
    let by_message = bar.doorbell(0x10).unwrap();
    let buffer = device.dma().allocate(4096).unwrap();
    assert_eq!(device.notice(), None);
    server.hang_up();
    let (result, took) = timed(|| bar.read_u32(0));
    assert_eq!(device.notice(), Some(vfio::Notice::Disconnected));
    assert!(matches!(result, Err(Error::Disconnected { .. })), "{result:?}");
    assert!(took < LATE, "{took:?}");
    mapped.ring(1);
    by_message.ring(1);
    assert_eq!(bar.read_u32(0x1004).unwrap(), 1);
    assert!(device.config_space().read_u16(0).is_err());
    assert!(device.enable_interrupts(&[&vfio::EventFd::new(0).unwrap()]).is_err());
    drop(buffer);
    drop(device);
}

#[test]
fn areas_that_make_no_sense_are_refused() {
    let bar = server::BAR_BYTES;
    for areas in [
        vec![(0x1000, 0x1800)],
        vec![(0x800, 0x1000)],
        vec![(0x1000, 0)],
        vec![(bar, 0x1000)],
        vec![(0x1000, bar)],
        vec![(u64::MAX - 0xfff, 0x1000)],
        vec![(0x1000, u64::MAX - 0xfff)],
    ] {
        let server = TestServer::start(Behaviour { areas: areas.clone(), ..Behaviour::default() });
        let result = server.open_within(LATE);
        assert!(matches!(result, Err(Error::BadRegion { .. })), "{areas:x?} gave {result:?}");
    }
}

#[test]
fn a_file_that_is_shorter_than_its_area_is_refused() {
    let server = TestServer::start(Behaviour { file_bytes: 0x1000, ..Behaviour::default() });
    let error = server.open_within(LATE).unwrap_err();
    assert!(error.to_string().contains("its file has 0x1000 bytes"), "{error}");
}

#[test]
fn a_server_with_another_client_is_an_error_in_time() {
    let server = TestServer::start(Behaviour::default());
    let _first = server.open();
    let (result, took) = timed(|| server.open_within(DEADLINE));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("another client"), "{error}");
    assert!(took < LATE, "{took:?}");
}

#[test]
fn the_connection_ends_with_the_last_that_needs_it() {
    let server = RawServer::start(|message| match message.command {
        raw::VERSION => Some(raw::version()),
        raw::DEVICE_GET_INFO => Some(raw::device_info(0)),
        _ => None,
    });
    let device = server.open(LATE).unwrap();
    let config = device.config_space();
    drop(device);
    assert!(!server.is_left());
    drop(config);
    server.join();
}
