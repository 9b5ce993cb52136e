//! The data path: everything that runs for a request.
//!
//! A [`worker`] is a polled thread that owns [poll groups](poll_group); a poll group is a queue pair and the [lanes](lane) that
//! submit to it; a lane is a guest's virtqueue being served. [`PollGroup::poll`](poll_group::PollGroup::poll) is the door: everything a
//! request costs happens below it.
//!
//! Nothing here blocks, takes a lock, allocates or makes a system call for a request. Control threads hand lanes and queue pairs over
//! by value, and get them back the same way.

mod admission;
pub mod counters;
pub mod lane;
pub mod poll_group;
pub mod stop_policy;
pub mod trial;
pub mod worker;
