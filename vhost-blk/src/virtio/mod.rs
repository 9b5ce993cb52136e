//! Virtqueues and the guest's memory: all that this program reads and writes of a guest, and the only room with `unsafe` code.
//!
//! What is there can be changed by the guest at any moment. It is read once into memory of our own, checked, then used.

#[allow(unsafe_code)] // shared memory, see its documentation
pub mod memory;
pub mod ring;
