//! Which workers serve a disk's rings: those on the NUMA node of its drive, where there are any.
//!
//! A worker reads what the drive writes, and the other way round, for each request. From one node to another that crosses the
//! machine.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Where the workers are.
pub struct Placement {
    /// For each worker: the CPU that it is pinned to, and the NUMA node of that CPU, as far as there is one and the machine tells.
    workers: Vec<(Option<usize>, Option<u32>)>,
    /// For each NUMA node: the disks that only its own workers serve, so that each begins with the next one.
    disks: Mutex<BTreeMap<u32, usize>>,
}

/// The workers of a disk's rings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingWorkers {
    workers: Vec<usize>,
    first: usize,
}

impl RingWorkers {
    /// The worker of a ring: round robin, so that the rings of one disk are spread.
    pub fn of_ring(&self, ring: usize) -> usize {
        // There are some: see `near`.
        self.workers[(self.first + ring) % self.workers.len()]
    }

    /// The numbers of all of them.
    pub fn all(&self) -> &[usize] {
        &self.workers
    }
}

/// The numbers of the workers for a drive on `node`, by the nodes that they are on: those on it; if there are none, all.
fn near(workers: &[(Option<usize>, Option<u32>)], node: Option<u32>) -> Vec<usize> {
    let on_it = |&number: &usize| node.is_some() && workers[number].1 == node;
    let near: Vec<usize> = (0..workers.len()).filter(on_it).collect();
    if near.is_empty() { (0..workers.len()).collect() } else { near }
}

impl Placement {
    /// Of workers on these CPUs, `None` for one that runs where the kernel wants; there is at least one. `node_of` tells a CPU's
    /// node.
    pub fn new(cpus: &[Option<usize>], node_of: impl Fn(usize) -> Option<u32>) -> Placement {
        let workers = cpus.iter().map(|&cpu| (cpu, cpu.and_then(&node_of))).collect();
        Placement { workers, disks: Mutex::default() }
    }

    /// The CPU that a worker is pinned to; `None`: it runs where the kernel wants, or there is no worker of this number.
    pub fn cpu_of(&self, worker: usize) -> Option<usize> {
        self.workers.get(worker).and_then(|(cpu, _)| *cpu)
    }

    /// The workers for the rings of a disk whose drive is on `node`. `number`: of the disk in the whole program, so that disks begin
    /// on different workers.
    pub fn of_disk(&self, node: Option<u32>, number: usize) -> RingWorkers {
        let workers = near(&self.workers, node);
        let first = match node.filter(|_| workers.len() < self.workers.len()) {
            // Their numbers would not do: every second disk may be on this node.
            Some(node) => {
                let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
                let count = disks.entry(node).or_default();
                *count += 1;
                *count - 1
            }
            None => number,
        };
        RingWorkers { workers, first }
    }

    /// The CPUs of the workers that serve a drive on `node`, and of the others; those of which it is known that they are on
    /// another node.
    pub fn cpus(&self, node: u32) -> Cpus {
        let near = near(&self.workers, Some(node));
        let is_far = |number: &usize| self.workers[*number].1.is_some_and(|other| other != node);
        let cpus = |numbers: &mut dyn Iterator<Item = usize>| numbers.filter_map(|at| self.workers[at].0).collect();
        Cpus {
            far: cpus(&mut near.iter().copied().filter(is_far)),
            spared: cpus(&mut (0..self.workers.len()).filter(|number| !near.contains(number))),
            near: cpus(&mut near.iter().copied().filter(|number| !is_far(number))),
        }
    }
}

/// The CPUs of workers, as seen from a drive.
#[derive(Debug, PartialEq, Eq)]
pub struct Cpus {
    /// CPUs whose workers serve the drive, and that are on its node, or nobody knows of another.
    pub near: Vec<usize>,
    /// CPUs whose workers serve the drive, and that are on another node.
    pub far: Vec<usize>,
    /// CPUs whose workers do not serve the drive, as others are nearer.
    pub spared: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUs 0 to 3 are on node 0, 4 to 7 on node 1; of others nothing is known.
    fn placement(cpus: &[usize]) -> Placement {
        let cpus: Vec<_> = cpus.iter().copied().map(Some).collect();
        Placement::new(&cpus, |cpu| (cpu < 8).then_some(cpu as u32 / 4))
    }

    fn workers(placement: &Placement, node: Option<u32>, number: usize) -> Vec<usize> {
        let workers = placement.of_disk(node, number);
        (0..4).map(|ring| workers.of_ring(ring)).collect()
    }

    #[test]
    fn rings_go_to_the_workers_on_their_drives_node() {
        let both = placement(&[2, 4, 3, 5, 9]);
        // Every second disk is on a node, and they begin on all of its workers.
        for (number, node, expected) in [
            (0, 0, [0, 2, 0, 2]),
            (1, 1, [1, 3, 1, 3]),
            (2, 0, [2, 0, 2, 0]),
            (3, 1, [3, 1, 3, 1]),
            (4, 0, [0, 2, 0, 2]),
        ] {
            assert_eq!(workers(&both, Some(node), number), expected, "{number}");
        }
        assert_eq!(workers(&placement(&[0, 1, 4]), Some(1), 5), [2; 4]);
    }

    #[test]
    fn rings_go_to_all_workers_if_none_is_nearer() {
        for (cpus, node) in [
            (&[0, 1, 2][..], Some(1)), // all on the other node
            (&[0, 1, 2], Some(0)),     // all on its own
            (&[0, 4, 9], None),        // a controller in software
            (&[8, 9, 10], Some(1)),    // the machine does not tell
        ] {
            let placement = placement(cpus);
            assert_eq!(workers(&placement, node, 0), [0, 1, 2, 0], "{cpus:?} {node:?}");
            assert_eq!(workers(&placement, node, 1), [1, 2, 0, 1], "{cpus:?} {node:?}");
        }
        let unpinned = Placement::new(&[None], |_| panic!("it is on no CPU"));
        assert_eq!(workers(&unpinned, Some(0), 3), [0; 4]);
    }

    #[test]
    fn the_cpus_of_workers_are_told_by_what_they_are_to_a_drive() {
        let cpus = |cpus: &[usize], node| {
            let Cpus { near, far, spared } = placement(cpus).cpus(node);
            [near, far, spared]
        };
        assert_eq!(cpus(&[4, 5], 1), [vec![4, 5], vec![], vec![]]);
        assert_eq!(cpus(&[3, 4, 0, 9], 1), [vec![4], vec![], vec![3, 0, 9]]);
        assert_eq!(cpus(&[3, 0, 9], 1), [vec![9], vec![3, 0], vec![]]);
        assert_eq!(Placement::new(&[None], |_| None).cpus(0), Cpus { near: vec![], far: vec![], spared: vec![] });
    }
}
