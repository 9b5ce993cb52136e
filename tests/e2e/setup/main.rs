//! `setup/setup.sh` on made-up machines: every refusal, what is written and what is not, and the way back.

mod changes;
mod kernel;
mod machine;
mod memory;
mod refusals;
mod reports;

const FIRST: &str = "0000:01:00.0";
const SECOND: &str = "0000:02:00.0";
