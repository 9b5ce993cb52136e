//! Drives that are slow, odd, half dead, or come back different, under two guests: one meets the fault, the other uses another
//! namespace of the same drive and must not notice more than the drive's own pause.
//!
//! | what the drive does | test |
//! |---|---|
//! | answers questions about itself with errors, or not at all | `questions` |
//! | announces what it refuses | `announces` |
//! | comes back as another one | `back` |
//! | comes back with fewer queue pairs, and with more | `fewer` |
//! | loses a command, while its other commands are slow | `rescue` |

mod announces;
mod back;
#[path = "../common/mod.rs"]
mod common;
mod fewer;
#[path = "../hostile/neighbour.rs"]
mod neighbour;
#[path = "../common/program.rs"]
mod program;
mod questions;
mod rescue;
#[path = "../hostile/stand.rs"]
mod stand;

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use common::{Front, Region, Ring};
use stand::Stand;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;

/// Opcodes of admin commands.
mod admin {
    pub(crate) const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
}

/// What happens to the next `limit` admin commands with this opcode.
fn fault(stand: &Stand, opcode: u8, limit: u64, action: FaultAction) {
    let when = FaultMatch { admin: true, opcode: Some(opcode), limit: Some(limit), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action, when });
}

/// A front-end at work on the first disk.
fn guest<'a>(stand: &Stand, region: &'a Region) -> (Front, Ring<'a>) {
    let front = stand.hostile();
    front.negotiate();
    let mut ring = Ring::first(&front, region);
    ring.check_io(8);
    (front, ring)
}
