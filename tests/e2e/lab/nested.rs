//! The whole path: a drive bound, exported, and used by a guest inside the machine.
