//! A drive that announces what it then refuses.

use nvme_sim::{FaultAction, FaultMatch, FaultRule, Status};
use vm_memory::{Bytes, GuestAddress};

use crate::common::*;
use crate::stand::Stand;
use crate::{MIB, guest};

const UNSUPP: u8 = 2;
const T_READ: u32 = 0;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const INVALID_OPCODE: Status = Status::new(0, 0x01).not_to_be_retried();
const INVALID_FIELD: Status = Status::new(0, 0x02).not_to_be_retried();
const SGL_DESCRIPTOR_TYPE_INVALID: Status = Status::new(0, 0x11).not_to_be_retried();
/// Opcodes of the NVM command set.
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// How often commands of the first namespace with this opcode fail.
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
    assert_eq!(stand.program.lines_with("the drive announces SGLs and refuses them"), 1);
    ring.check_io(8);
    neighbour.verdict();
}
