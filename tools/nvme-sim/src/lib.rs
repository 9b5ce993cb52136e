//! An NVMe controller in software, served on a vfio-user socket.
