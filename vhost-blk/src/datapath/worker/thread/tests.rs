//! Single acts of a worker, in an order that threads come upon rarely.

use std::sync::mpsc;

use nvme_sim::{Config, NamespaceConfig};

use super::*;
use crate::datapath::lane::testing::{DATA, DEADLINE, Machine, TestClient};
use crate::virtio::ring::model::writable;

/// A driver that was told not to kick puts a request on its ring just before the worker asks for kicks: nobody would wake it.
#[test]
fn a_request_from_before_the_sleep_is_seen() {
    for packed in [false, true] {
        let namespace = NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() };
        let machine = Machine::new(Config { namespaces: vec![namespace], ..Config::default() });
        let mut client = TestClient::new(&machine.guest, 0, packed, 16);
        let (events, _receiver) = mpsc::channel();
        let mut worker = Worker::new(0, Arc::new(Mailbox::new().unwrap()), events, false).unwrap();
        worker.groups.push(Some(machine.group(64)));
        worker.ids.push(QueueSlotId { worker: 0, index: 0, number: 0 });
        worker.start(LaneId(1), 0, client.lane(&machine.guest, &Arc::new(machine.disk())));
        client.send(&machine.guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
        assert!(!client.driver.kick_wanted(&machine.guest), "its ring is polled");
        let (awake, woken) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            crate::event::prepare().unwrap();
            worker.sleep();
            let _ = awake.send(());
            worker
        });
        let seen = woken.recv_timeout(DEADLINE / 4);
        // One that sleeps is woken, so that it ends.
        rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
        drop(thread.join());
        assert!(seen.is_ok(), "packed {packed}: the worker sleeps, and a request waits");
    }
}
