//! A drive that announces what it then refuses.

use std::time::Duration;

use nvme_sim::{FaultAction, FaultMatch, FaultRule, Status};
use vm_memory::{Bytes, GuestAddress};

use crate::common::raw::*;
use crate::common::*;
use crate::stand::Stand;
use crate::{IOERR, MIB, guest};

const UNSUPP: u8 = 2;
const T_READ: u32 = 0;
const T_WRITE: u32 = 1;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const INVALID_OPCODE: Status = Status::new(0, 0x01).not_to_be_retried();
const INVALID_FIELD: Status = Status::new(0, 0x02).not_to_be_retried();
const SGL_DESCRIPTOR_TYPE_INVALID: Status = Status::new(0, 0x11).not_to_be_retried();
/// Opcodes of the NVM command set.
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// What the drive says of SGLs that it refuses.
const REFUSES_SGLS: &str = "the drive announces SGLs and refuses them";

/// Commands of the first namespace with this opcode fail, so often.
fn refuse(stand: &Stand, opcode: u8, status: Status, limit: Option<u64>) {
    let when = FaultMatch { opcode: Some(opcode), namespace: Some(1), limit, ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::Fail(status), when });
}

/// Discards, or writes zeroes to, a block.
fn range(ring: &mut Ring, region: &Region, kind: u32) -> u8 {
    let range = [&0u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    region.memory.write_slice(&range, GuestAddress(ring.data())).unwrap();
    ring.request(kind, 0, (ring.data(), 16))
}

#[test]
fn discards_and_writes_of_zeroes_are_unsupported_then() {
    for (kind, opcode, feature, status) in [
        (T_DISCARD, DATASET_MANAGEMENT, 1u64 << 13, INVALID_OPCODE),
        (T_DISCARD, DATASET_MANAGEMENT, 1 << 13, INVALID_FIELD),
        (T_WRITE_ZEROES, WRITE_ZEROES, 1 << 14, INVALID_FIELD),
    ] {
        let stand = Stand::new();
        let mut neighbour = stand.neighbour();
        neighbour.measure_alone();
        let region = Region::new(0, MIB);
        let (front, mut ring) = guest(&stand, &region);
        assert_eq!(range(&mut ring, &region, kind), 0);
        refuse(&stand, opcode, status, None);
        (0..3).for_each(|_| assert_eq!(range(&mut ring, &region, kind), UNSUPP, "{status:?}"));
        ring.check_io(8);
        assert_eq!(stand.program.lines_with("the drive announces"), 1);
        drop(front);
        let front = stand.hostile();
        let offered = front.ask_u64(GET_FEATURES);
        assert_eq!(offered & feature, 0, "it is offered to the next one");
        // One that was there before comes with what its guest knows.
        let known = front.negotiate();
        front.accept(SET_FEATURES, &(known | feature).to_ne_bytes(), &[]);
        let mut ring = Ring::first(&front, &region);
        ring.check_io(16);
        neighbour.verdict();
    }
}

/// Writes and reads at an address that PRPs cannot say: the codes.
fn odd_io(ring: &mut Ring, region: &Region, byte: u8) -> (u8, u8) {
    let (from, to) = (ring.data() + 0x101, ring.data() + 0x2203);
    region.memory.write_slice(&[byte; 4096], GuestAddress(from)).unwrap();
    region.memory.write_slice(&[0; 4096], GuestAddress(to)).unwrap();
    let codes = (ring.request(T_WRITE, 64, (from, 4096)), ring.request(T_READ, 64, (to, 4096)));
    let mut read = [0; 4096];
    region.memory.read_slice(&mut read, GuestAddress(to)).unwrap();
    assert_eq!(read == [byte; 4096], codes == (0, 0), "{codes:?}");
    codes
}

/// The drive does not say that it is the SGL which it does not take.
#[test]
fn an_sgl_that_is_an_invalid_field_is_the_last_if_it_was_that() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let when = FaultMatch { namespace: Some(1), sgl: Some(true), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::Fail(INVALID_FIELD), when });
    for byte in 1..10 {
        assert_eq!(odd_io(&mut ring, &region, byte), (0, 0));
        assert_eq!(stand.drive.faults().fired(), 1, "only the first has an SGL");
    }
    eventually("it is told", || stand.program.lines_with(REFUSES_SGLS) == 1);
    ring.check_io(8);
    // Nor has one of a new front-end.
    drop((ring, _front));
    let (_front, mut ring) = guest(&stand, &region);
    assert_eq!(odd_io(&mut ring, &region, 99), (0, 0));
    assert_eq!((stand.drive.faults().fired(), stand.program.lines_with(REFUSES_SGLS)), (1, 1));
    neighbour.verdict();
}

/// SGLs that are refused where nothing has to be copied: PRPs can say it in more commands.
#[test]
fn sgls_are_refused_and_more_commands_do_without_them() {
    for (fails, code, told) in [(1, 0, 1), (2, IOERR, 0)] {
        let stand = Stand::new();
        let mut neighbour = stand.neighbour();
        neighbour.measure_alone();
        let region = Region::new(0, MIB);
        let front = stand.hostile();
        front.negotiate();
        region.add(&front);
        let mut ring = RawRing::new(&region, 0, 0x10000, Format::Split, 16);
        ring.start(&front);
        let (at, data) = (0x4_0000, 0x5_0000);
        assert_eq!(ring.run(at, T_WRITE, 8, &[readable(data, 4096)]), 0);
        refuse(&stand, READ, INVALID_FIELD, Some(fails));
        let gap = [writable(data, 1024), writable(data + 8192, 3072)];
        assert_eq!((ring.run(at, T_READ, 8, &gap), stand.drive.faults().fired()), (code, fails));
        // The first that has an SGL after that, if any has.
        let when = FaultMatch { namespace: Some(1), sgl: Some(true), ..FaultMatch::default() };
        stand.drive.faults().add(FaultRule { action: FaultAction::Delay(Duration::ZERO..=Duration::ZERO), when });
        assert_eq!(ring.run(at, T_READ, 8, &gap), 0);
        assert_eq!(stand.drive.faults().fired() - fails, 1 - told as u64);
        eventually("it is told", || stand.program.lines_with(REFUSES_SGLS) == told);
        neighbour.verdict();
    }
}

/// What has another field that is invalid fails, with an SGL or without, and SGLs stay.
#[test]
fn an_invalid_field_that_is_not_the_sgl_changes_nothing() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let faults = stand.drive.faults();
    refuse(&stand, READ, INVALID_FIELD, Some(3));
    // With an SGL, and copied.
    assert_eq!(odd_io(&mut ring, &region, 1), (0, IOERR));
    assert_eq!(faults.fired(), 2);
    // By PRPs: there is no other way.
    assert_eq!((ring.read_one(64), faults.fired()), (IOERR, 3));
    assert_eq!(odd_io(&mut ring, &region, 2), (0, 0));
    let when = FaultMatch { namespace: Some(1), sgl: Some(true), ..FaultMatch::default() };
    let action = FaultAction::Delay(Duration::ZERO..=Duration::ZERO);
    faults.add(FaultRule { action, when });
    assert_eq!(odd_io(&mut ring, &region, 3), (0, 0));
    assert_eq!(faults.fired(), 5, "both had an SGL");
    assert_eq!(stand.program.lines_with(REFUSES_SGLS), 0);
    neighbour.verdict();
}

#[test]
fn an_sgl_that_is_refused_is_the_last() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    ring.store(64, 7);
    refuse(&stand, READ, SGL_DESCRIPTOR_TYPE_INVALID, Some(1));
    // PRPs cannot say this address.
    let odd = ring.data() + 0x101;
    for _ in 0..10 {
        assert_eq!(ring.request(T_READ, 64, (odd, 4096)), 0);
        let mut read = [0; 4096];
        region.memory.read_slice(&mut read, GuestAddress(odd)).unwrap();
        assert_eq!(read, [7; 4096]);
    }
    assert_eq!(stand.program.lines_with(REFUSES_SGLS), 1);
    ring.check_io(8);
    neighbour.verdict();
}
