//! Drives that go away while they are in use, and come back.
