//! The vfio-user backend against a small server.

mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use server::{Behaviour, TestServer};
use vfio::{Error, EventFd, SharedMemory};

#[test]
fn registers_are_reached_by_message_and_doorbells_by_memory() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let bar = device.bar(0).unwrap();
    assert_eq!(bar.size(), server::BAR_BYTES);
    bar.write_u32(0x14, 0x1234_5678).unwrap();
    bar.write_u64(0x28, 0xfedc_ba98_7654_3210).unwrap();
    assert_eq!(bar.read_u32(0x14).unwrap(), 0x1234_5678);
    assert_eq!(bar.read_u64(0x28).unwrap(), 0xfedc_ba98_7654_3210);
    assert_eq!(bar.read_u32(0x2c).unwrap(), 0xfedc_ba98);
    let messages = server.messages();
    let doorbell = bar.doorbell(0x1008).unwrap();
    assert!(doorbell.is_mapped());
    doorbell.ring(0xabcd);
    assert_eq!(server.mapped_register(0x1008), 0xabcd);
    assert_eq!(bar.read_u32(0x1008).unwrap(), 0xabcd);
    assert_eq!(server.messages(), messages, "a mapped register needs no message");
}

#[test]
fn a_doorbell_outside_the_mapped_area_is_rung_by_message() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let doorbell = device.bar(0).unwrap().doorbell(0x800).unwrap();
    assert!(!doorbell.is_mapped());
    doorbell.ring(7);
    assert_eq!(server.register(0x800), 7);
}

#[test]
fn memory_is_shared_with_the_server() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let buffer = device.dma().allocate(10_000).unwrap();
    assert_eq!(buffer.len(), 12_288);
    let words = buffer.slice::<AtomicU64>(4096, 512).unwrap();
    words[3].store(0x55aa, Ordering::Release);
    assert_eq!(server.read_dma(words.iova() + 24), 0x55aa);
    let memory = Arc::new(SharedMemory::create(8192).unwrap());
    let mapping = device.dma().map(memory.clone()).unwrap();
    memory.slice::<AtomicU64>(4096, 1).unwrap()[0].store(99, Ordering::Release);
    assert_eq!(server.read_dma(mapping.iova() + 4096), 99);
    let iova = mapping.iova();
    drop(mapping);
    assert!(!server.has_dma(iova));
}

#[test]
fn interrupts_reach_their_eventfds() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    assert_eq!(device.interrupt_vectors(), server::VECTORS);
    let events: Vec<_> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    device.enable_interrupts(&events.iter().collect::<Vec<_>>()).unwrap();
    server.interrupt(2);
    assert_eq!(events[2].read().unwrap(), 1);
    assert!(events[0].read().is_err());
}

#[test]
fn the_device_may_do_dma_after_open_and_after_reset() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let may = vfio::COMMAND_MEMORY_SPACE | vfio::COMMAND_BUS_MASTER | vfio::COMMAND_INTERRUPT_DISABLE;
    assert_eq!(device.config_space().read_u16(vfio::COMMAND).unwrap(), may);
    // The server's reset clears the command register, as a device's does.
    device.reset().unwrap();
    assert_eq!(server.resets(), 1);
    assert_eq!(device.config_space().read_u16(vfio::COMMAND).unwrap(), may);
}

#[test]
fn a_device_without_the_capability_has_no_vectors() {
    let mut behaviour = Behaviour::default();
    behaviour.config[server::MSIX as usize] = 0x05;
    let server = TestServer::start(behaviour);
    let device = server.open();
    assert_eq!(device.interrupt_vectors(), 0);
    let event = EventFd::new(0).unwrap();
    assert!(matches!(device.enable_interrupts(&[&event]), Err(Error::Interrupts { asked: 1, available: 0, .. })));
}

#[test]
fn interrupts_that_are_enabled_replace_the_earlier_ones() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let events: Vec<_> = (0..5).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    device.enable_interrupts(&[&events[0], &events[1]]).unwrap();
    device.enable_interrupts(&[&events[2]]).unwrap();
    assert_eq!(server.vectors(), [0]);
    server.interrupt(0);
    assert!(events[0].read().is_err());
    assert_eq!(events[2].read().unwrap(), 1);
    device.disable_interrupts().unwrap();
    assert!(server.vectors().is_empty());
    assert!(device.enable_interrupts(&[]).is_err());
    assert!(device.enable_interrupts(&events.iter().collect::<Vec<_>>()).is_err(), "5 of 4 vectors");
}

#[test]
fn several_threads_use_one_device() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let device = device.clone();
            scope.spawn(move || {
                let bar = device.bar(0).unwrap();
                for round in 0..50 {
                    let register = u64::from(0x100 + thread * 8);
                    bar.write_u32(register, thread << 16 | round).unwrap();
                    assert_eq!(bar.read_u32(register).unwrap(), thread << 16 | round);
                    let buffer = device.dma().allocate(4096).unwrap();
                    assert!(device.bar(0).unwrap().is_mapped(0x1000, 4) && buffer.iova() > 0);
                }
            });
        }
    });
}

#[test]
fn a_device_is_closed_when_nothing_of_it_is_left() {
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    assert_eq!(device.notice(), None);
    let doorbell = device.bar(0).unwrap().doorbell(0x1008).unwrap();
    assert!(!device.clone().close(), "a clone is left");
    assert!(!device.close(), "a doorbell is left");
    drop(doorbell);
    let server = TestServer::start(Behaviour::default());
    let device = server.open();
    let buffer = device.dma().allocate(4096).unwrap();
    let memory = device.dma().map(Arc::new(SharedMemory::create(4096).unwrap())).unwrap();
    drop(buffer);
    assert!(!device.clone().close());
    drop(memory);
    assert!(device.close(), "nothing is left");
}
