//! The hostile suite: a front-end that breaks every rule, and a neighbour on the same worker and drive that must not notice.
//!
//! Each test is one way of being hostile, or odd. Beside it a [`Neighbour`](neighbour::Neighbour), a guest of the same program with
//! another namespace of the same drive, reads and writes its disk and knows what every block has to hold. It is asserted that none of its
//! requests failed, none read a wrong byte, and none took longer than 100 ms, or twice its longest one while it was alone.
//!
//! # A test of your own
//!
//! In a module of your own (`mod mine;` below):
//!
//! ```ignore
//! #[test]
//! fn a_ring_that_is_broken_again_and_again() {
//!     let stand = Stand::new();                     // or Stand::with(|setup| ...): see `stand::Setup`
//!     let mut neighbour = stand.neighbour();        // its load begins
//!     neighbour.measure_alone();                    // what it is like without the attack
//!     for _ in 0..100 {                             // the attack: `Front`, `Ring`, `RawRing`, `Region`, `Log` of tests/common
//!         let front = stand.hostile();              // a connection that has said nothing; `front.negotiate()` ...
//!         ...
//!     }
//!     neighbour.verdict();                          // asserts
//!     assert_eq!(stand.program.lines_with("..."), 1); // what the log has to say
//! }
//! ```
//!
//! Tests of this program run one after the other, since they measure time: [`Stand`](stand::Stand) holds a lock. Keep each within a
//! second or so. Time for which the machine had no CPU for the worker, the drive or the neighbour's own thread, whichever waited longest
//! (`/proc/*/schedstat`), does not count, so that a busy machine makes little difference.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/program.rs"]
mod program;

mod neighbour;
mod stand;

mod basics;
mod events;
mod exports;
mod front_ends;
mod log;
mod long;
mod memory;
mod shared;
mod waiting;
