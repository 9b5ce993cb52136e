//! Servers that are stuck, gone, refuse, or talk nonsense: an error each time, in time.

mod server;

use std::time::{Duration, Instant};

use server::raw::{self, RawServer};
use server::{Behaviour, TestServer};
use vfio::{Address, Device, Error};

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
fn a_reply_that_makes_the_client_panic_is_an_error() {
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
    let (results, took) = timed(|| (0..20).map(|_| device.reset()).collect::<Vec<_>>());
    assert!(results.iter().all(|result| matches!(result, Err(Error::Disconnected { .. }))), "{results:?}");
    assert!(took < 10 * DEADLINE, "later calls fail at once, 20 not after {took:?}");
    server.join();
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
    assert!(matches!(bar.read_u32(0), Err(Error::Disconnected { .. })));
    doorbell.ring(3);
    assert_eq!(bar.read_u32(0x1000).unwrap(), 3);
    drop(buffer);
    assert!(device.dma().allocate(4096).is_err());
}

#[test]
fn a_refused_read_is_an_error() {
    let server = TestServer::start(Behaviour { refuse_read_of: Some(0x20), ..Behaviour::default() });
    let device = server.open_within(DEADLINE).unwrap();
    let (result, took) = timed(|| device.bar(0).unwrap().read_u32(0x20));
    assert!(result.is_err());
    assert!(took < LATE, "{took:?}");
}

/// What `backend::user` documents: the client does not see the refusal. This fails when a newer client does.
#[test]
fn a_refused_dma_map_goes_unnoticed() {
    let server = TestServer::start(Behaviour { refuse_dma: true, ..Behaviour::default() });
    let device = server.open_within(DEADLINE).unwrap();
    let buffer = device.dma().allocate(4096).unwrap();
    assert!(!server.has_dma(buffer.iova()));
    // The refusal to unmap it is what ends the connection.
    drop(buffer);
    assert!(matches!(device.reset(), Err(Error::Disconnected { .. })));
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
