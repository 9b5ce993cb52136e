//! Memory on the NUMA node of its device: each access of the device to another node's crosses the machine.
//!
//! The kernel takes the pages of memory from where the policy of the thread says that touches them first, here or while it pins
//! them (set_mempolicy(2)). So the thread prefers the device's node while it makes memory for it.

use std::io;
use std::path::Path;
use std::ptr;

/// Of `mode` (linux/mempolicy.h): from this node as long as it has any.
const MPOL_PREFERRED: libc::c_int = 1;
/// Flags of get_mempolicy(2): tell the node of the page at an address.
const MPOL_F_NODE_OF_ADDRESS: libc::c_ulong = 1 | 2;
/// The most NUMA nodes that any kernel has.
const NODES: usize = 1024;
/// What the calls take for the length of a mask: one more than there are bits.
const MASK_BITS: libc::c_ulong = NODES as libc::c_ulong + 1;

type Mask = [u64; NODES / 64];

/// The policy that this thread had; it has it again when this is dropped.
struct Before {
    mode: libc::c_int,
    nodes: Mask,
}

impl Drop for Before {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = set_policy(self.mode, &self.nodes);
    }
}

/// Runs `make` with its memory coming from `node`, as far as that has any. The error says why it does not.
pub(super) fn on_node<T>(node: u32, make: impl FnOnce() -> T) -> (T, io::Result<()>) {
    match prefer(node) {
        Ok(_before) => (make(), Ok(())),
        Err(error) => (make(), Err(error)),
    }
}

fn prefer(node: u32) -> io::Result<Before> {
    let mut before = Before { mode: 0, nodes: [0; NODES / 64] };
    let (mode, nodes) = (&raw mut before.mode, before.nodes.as_mut_ptr());
    // SAFETY: the call writes a number and a mask of so many bits, which both outlive it.
    let result = unsafe { libc::syscall(libc::SYS_get_mempolicy, mode, nodes, MASK_BITS, ptr::null::<u8>(), 0) };
    if result != 0 {
        let error = io::Error::last_os_error();
        // Nothing has been changed, so that nothing is to be changed back.
        std::mem::forget(before);
        return Err(error);
    }
    let mut nodes: Mask = [0; NODES / 64];
    match nodes.get_mut(node as usize / 64) {
        Some(word) => *word |= 1 << (node % 64),
        None => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
    set_policy(MPOL_PREFERRED, &nodes)?;
    Ok(before)
}

fn set_policy(mode: libc::c_int, nodes: &Mask) -> io::Result<()> {
    // SAFETY: the call reads a mask of so many bits, which outlives it.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes.as_ptr(), MASK_BITS) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The node that the page at `address` lies on; one that nobody has touched gets its place.
pub(super) fn node_of(address: *const u8) -> io::Result<u32> {
    let mut node: libc::c_int = -1;
    let to = &raw mut node;
    let no_mask = ptr::null::<u64>();
    // SAFETY: the call writes a number, which outlives it; an address that is not mapped is an error.
    let result = unsafe { libc::syscall(libc::SYS_get_mempolicy, to, no_mask, 0, address, MPOL_F_NODE_OF_ADDRESS) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(node).map_err(|_| io::Error::from_raw_os_error(libc::ENODATA))
}

/// The NUMA node of a CPU, if the machine tells.
pub fn numa_node_of_cpu(cpu: usize) -> Option<u32> {
    node_of_cpu(Path::new("/sys/devices/system/cpu"), cpu)
}

/// The NUMA node of a CPU, read in a folder such as /sys/devices/system/cpu.
fn node_of_cpu(folder: &Path, cpu: usize) -> Option<u32> {
    let entries = std::fs::read_dir(folder.join(format!("cpu{cpu}"))).ok()?;
    entries.flatten().find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SharedMemory;

    /// The policy of this thread: `None` where the machine does not tell (a container without the right to ask).
    fn mode() -> Option<libc::c_int> {
        let mut mode = -1;
        let to = &raw mut mode;
        // SAFETY: the call writes a number, which outlives it.
        let result = unsafe { libc::syscall(libc::SYS_get_mempolicy, to, ptr::null::<u64>(), 0, ptr::null::<u8>(), 0) };
        (result == 0).then_some(mode)
    }

    #[test]
    fn memory_is_preferred_from_a_node_for_so_long_and_no_longer() {
        let Some(before) = mode() else { return };
        let memory = SharedMemory::create(4096).unwrap();
        let Ok(here) = node_of(memory.as_ptr()) else { return };
        let ((during, memory), result) = on_node(here, || (mode(), SharedMemory::create(4096).unwrap()));
        if result.is_ok() {
            assert_eq!(during, Some(MPOL_PREFERRED));
            assert_eq!(node_of(memory.as_ptr()).unwrap(), here);
        }
        assert_eq!(mode(), Some(before));
    }

    #[test]
    fn a_node_that_is_not_there_is_told_and_costs_nothing() {
        for node in [1000, 1023, 1024, u32::MAX] {
            let (made, result) = on_node(node, || 7);
            assert!(made == 7 && result.is_err(), "{node}: {result:?}");
        }
    }

    #[test]
    fn the_node_of_a_cpu_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["cpu3/topology", "cpu3/node1", "cpu4/topology", "cpu5/nodex"] {
            std::fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        assert_eq!([3, 4, 5, 6].map(|cpu| node_of_cpu(folder.path(), cpu)), [Some(1), None, None, None]);
    }
}
