//! The setup script on a real kernel.
