//! Sets of CPUs as SPDK writes them.

use rustix::thread::{CpuSet, sched_getaffinity};

/// The mask of CPUs such as `0x5`; one that is `None` is that of a worker which runs wherever this process may.
pub(super) fn cpu_mask(cpus: &[Option<usize>]) -> String {
    let mut all: Vec<usize> = cpus.iter().copied().flatten().collect();
    if cpus.contains(&None)
        && let Ok(allowed) = sched_getaffinity(None)
    {
        all.extend((0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)));
    }
    // Four CPUs a digit, the last ones first.
    let digits = (0..all.iter().max().map_or(1, |most| most / 4 + 1)).rev();
    let digit = |at: usize| {
        let bits = all.iter().filter(|cpu| *cpu / 4 == at).fold(0, |bits, cpu| bits | 1 << (cpu % 4));
        char::from_digit(bits, 16).unwrap_or_default()
    };
    format!("0x{}", digits.map(digit).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_as_spdk_writes_them() {
        let mask = |cpus: &[usize]| cpu_mask(&cpus.iter().copied().map(Some).collect::<Vec<_>>());
        assert_eq!(mask(&[0]), "0x1");
        assert_eq!(mask(&[0, 1, 2, 3, 4]), "0x1f");
        assert_eq!(mask(&[2, 2]), "0x4");
        assert_eq!(mask(&[127]), format!("0x8{}", "0".repeat(31)));
        assert_eq!(mask(&[]), "0x0");
        let allowed = cpu_mask(&[None]);
        assert!(allowed.len() > 2 && allowed != "0x0", "{allowed}");
    }
}
