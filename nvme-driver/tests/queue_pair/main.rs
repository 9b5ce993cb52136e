//! Queue pairs against the simulated controller.

mod faults;
mod interrupts;
mod setup;
mod transfers;
