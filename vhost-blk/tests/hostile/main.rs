//! The hostile suite: a front-end that breaks every rule, and a neighbour on the same worker and drive that must not notice.
//!
//! Each test is one way of being hostile, or odd. Beside it a [`Neighbour`](neighbour::Neighbour), a guest of the same program with
//! another namespace of the same drive, reads and writes its disk and knows what every block has to hold. It is asserted that none of its
//! requests failed, none read a wrong byte, and none took longer than 100 ms, or twice its longest one while it was alone.
//!
//! # What is tested
//!
//! | what somebody does | the neighbour's test |
//! |---|---|
//! | makes eventfds block, fills their counters, gives one to several rings; reads no replies | `events::eventfds_that_block`, `replies_that_nobody_reads` |
//! | changes the log of requests in flight while the ring runs | `memory::a_log_that_changes_while_the_ring_runs` |
//! | asks for ranges beyond the limits, or for all that they allow | `long::ranges_beyond_what_is_offered_fail_at_once`, `all_the_zeroes_that_may_be_asked_for_leave_others_their_part` |
//! | has long requests under way when a ring stops | `long::small_requests_pass_long_ones_and_a_stop_waits_seconds_at_most`, `a_long_request_that_is_soon_done_is_waited_for` |
//! | makes requests that the drive never answers, or that make it fail | `shared::a_request_that_the_drive_never_answers`, `a_request_that_makes_the_controller_fail`, `a_request_that_is_copied_and_makes_the_controller_fail` |
//! | takes all buffers for data that is copied | `shared::long_requests_that_are_copied` |
//! | uses up the process's address space | `memory::address_space_that_is_asked_for_without_end` |
//! | shortens guest memory or a log, has them on a full file system | `memory::guest_memory_that_is_shortened_ends_its_session_alone`, `guest_memory_on_a_full_file_system_ends_its_session_alone`, `a_log_that_is_shortened_ends_its_session_alone` |
//! | breaks its ring or resets its device in a loop | `log::lines_that_a_guest_can_cause_are_few`, `basics::a_ring_that_is_broken_again_and_again` |
//! | sends long requests through a large ring | `waiting::memory_for_long_requests_goes_back` |
//! | connects to a busy socket, says nothing | `front_ends::front_ends_that_crowd_a_socket` |
//! | sends what is refused; leaves in the middle of a message | `front_ends::a_front_end_that_is_refused_again_and_again`, `basics::a_front_end_that_leaves_in_the_middle_of_a_message` |
//! | kicks, with guest memory that is not shared | `log::kicks_without_a_ring_that_changes` |
//! | comes back with an empty log and a ring of another size | `memory::an_empty_log_takes_a_ring_of_another_size` |
//! | begins anew on its connection (QEMU's `device_add`) | `front_ends::devices_that_come_and_go_on_one_connection` |
//! | uses memory that was added and not shared | `log::buffers_in_memory_that_is_not_shared` |
//! | asks for a log that is too small (QEMU's microvm) | `memory::a_log_that_is_too_small_is_done_without` |
//! | has more rings than the drive has queue pairs | `shared::rings_that_take_all_queue_pairs` |
//! | reads 4 GiB of which the last block has to be copied | `waiting::a_request_of_4_gib_with_an_odd_end` |
//! | removes the socket's file | `front_ends::a_socket_whose_file_is_taken_away` |
//! | has short rings and no indirect descriptors, which suffices (firmware) | `log::advice_when_a_request_just_fits` |
//! | has a mistake in one export | `exports::exports_that_cannot_be_served` |
//! | has a full file system under an embedded controller | `exports::a_file_that_cannot_take_more_under_a_simulated_drive` |
//! | sends SIGHUP | `exports::signals_that_mean_nothing` |
//!
//! That the neighbour would notice is tested, too: `basics::a_request_that_waits_is_noticed`, `a_request_that_fails_is_noticed`.
//! What takes no neighbour (refusals, their lines, a start while another program is going) is tested in the other test programs
//! beside this one, and all of it at random in `tests/torture.sh --fault neighbour`.
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
//! (`/proc/*/schedstat`), does not count, but for a tenth, so that a busy machine makes little difference.

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
