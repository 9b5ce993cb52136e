//! The vhost-user protocol, back-end side: who may connect, what a front-end says, and what follows from it for its rings.
//!
//! An [`export`] is one disk on one socket. Its server accepts front-ends and gives each a [`session`]; the rings of one front-end at
//! a time run ([`front_end_queue`]). What a guest believes of the write cache is kept in one place ([`write_cache`]). Everything a
//! front-end sends is hostile: it is read once, checked, then used. A VMM must never be left waiting for an answer.

pub mod export;
pub mod front_end_queue;
pub mod listener;
mod server;
pub mod session;
pub mod write_cache;

pub use server::{FrontEnd, Server, ServerError};
