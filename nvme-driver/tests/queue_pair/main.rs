//! Queue pairs against the simulated controller.

mod faults;
mod interrupts;
mod long;
mod setup;
mod transfers;
