//! A small repeatable generator for faults and power cuts (SplitMix64).

#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound` (at least 1).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True with the given probability.
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        ((self.next() >> 11) as f64) < probability * (1_u64 << 53) as f64
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for n in (1..items.len()).rev() {
            items.swap(n, self.below(n as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeatable_and_in_range() {
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        let mut hits = 0;
        for _ in 0..10_000 {
            assert_eq!(a.next(), b.next());
            assert!(a.below(3) < 3 && b.below(3) < 3);
            hits += usize::from(a.chance(0.25));
            b.chance(0.25);
        }
        assert!((2_200..2_800).contains(&hits), "{hits}");
        assert!(a.chance(1.0) && !a.chance(0.0));
        let mut items: Vec<u32> = (0..100).collect();
        a.shuffle(&mut items);
        assert!(items.iter().enumerate().any(|(n, item)| n as u32 != *item));
        items.sort();
        assert!(items.iter().enumerate().all(|(n, item)| n as u32 == *item));
    }
}
