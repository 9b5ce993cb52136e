//! A seeded generator: the same seed gives the same run.

use fastrand::Rng;

/// Draws what a load does next.
#[derive(Clone, Debug)]
pub struct Random(Rng);

impl Random {
    /// A generator for `seed`; `stream` sets apart the generators of one run (one per queue).
    pub fn new(seed: u64, stream: u64) -> Self {
        Random(Rng::with_seed(seed ^ Rng::with_seed(stream).u64(..)))
    }

    /// The next 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound.max(1))
    }

    /// True with a probability of `part` in `whole`.
    #[inline]
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.below(whole) < part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_for_a_seed_and_differs_between_streams() {
        let numbers = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.next_u64(), random.next_u64(), random.next_u64()]
        };
        assert_eq!(numbers(7, 0), numbers(7, 0));
        assert_ne!(numbers(7, 0), numbers(7, 1));
        assert_ne!(numbers(7, 0), numbers(8, 0));
    }

    #[test]
    fn stays_below_the_bound_and_reaches_all_of_it() {
        let mut random = Random::new(1, 0);
        let mut seen = [false; 10];
        for _ in 0..1000 {
            seen[usize::try_from(random.below(10)).unwrap()] = true;
        }
        assert_eq!(seen, [true; 10]);
        assert_eq!(random.below(0), 0);
    }
}
