//! An NVMe driver in user space, usable as a library of its own.
#![forbid(unsafe_code)]
