//! How much of others' memory this process maps: for a front-end, and for all of them together.
//!
//! A file with holes may be of any length, and costs its owner nothing. What it costs here is address space, and places in the
//! kernel's tables of mappings, this process's and a drive's. So each front-end has a limit, and of what a process can have, the
//! larger part is never given to front-ends: the target needs some for itself, above all to make queue pairs.
//!
//! Of what front-ends can have together, half is shared out evenly: so much is there for each disk, whatever the others do.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What one front-end may have mapped at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of guest memory.
    pub bytes: u64,
    /// Memory regions; each is a mapping for DMA, too.
    pub regions: usize,
}

/// Memory regions a front-end may have at most. QEMU uses at most 512 slots and keeps a few for itself.
const MOST_REGIONS: usize = 509;

impl Default for Limits {
    /// For a guest of 16 TiB: firmware and video memory are regions, too.
    fn default() -> Limits {
        Limits { bytes: 17 << 40, regions: MOST_REGIONS }
    }
}

impl Limits {
    /// The default, but for what is given.
    pub fn with(bytes: Option<u64>, regions: Option<usize>) -> Limits {
        let default = Limits::default();
        Limits { bytes: bytes.unwrap_or(default.bytes), regions: regions.unwrap_or(default.regions) }
    }
}

/// Why a value is no limit of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// No front-end may have so many regions.
    #[error("{count} memory regions: use 1 to {MOST_REGIONS}")]
    Regions {
        /// How many were asked for.
        count: u64,
    },
    /// The text is no size.
    #[error("size \"{text}\": use a number with K, M, G or T, such as 64G")]
    Size {
        /// The text.
        text: String,
    },
}

/// Checks the number of memory regions that a front-end may have.
///
/// # Errors
/// There are none, or more than a front-end can use.
pub fn parse_regions(count: u64) -> Result<usize, LimitError> {
    let fits = usize::try_from(count).ok().filter(|count| (1..=MOST_REGIONS).contains(count));
    fits.ok_or(LimitError::Regions { count })
}

/// Reads a size such as 512M, 64G or 16T, in bytes.
///
/// # Errors
/// It is no number with one of these letters, or it is 0.
pub fn parse_bytes(text: &str) -> Result<u64, LimitError> {
    let wrong = || LimitError::Size { text: text.to_owned() };
    let (number, shift) = match text.char_indices().last().ok_or_else(wrong)? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        (at, 'T' | 't') => (&text[..at], 40),
        _ => (text, 0),
    };
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|bytes| digits && *bytes != 0).ok_or_else(wrong)
}

/// Why nothing more is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// The front-end has too much.
    #[error(
        "its front-end would have {} mapped, and {} are allowed: --guest-memory-limit, or guest-memory-limit in the \
         configuration file, sets the limit",
        Bytes(*asked), Bytes(*limit)
    )]
    Bytes {
        /// What it would have, in bytes.
        asked: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The front-end has too many.
    #[error(
        "its front-end has {limit} regions already: --guest-regions-limit, or guest-regions-limit in the configuration file, \
         sets the limit"
    )]
    Regions {
        /// The limit.
        limit: usize,
    },
    /// All front-ends together have too much.
    #[error(
        "all front-ends together have so much mapped that {} more cannot be mapped for this one: the process can map {} for them, \
         and {} are kept for each disk; a lower --guest-memory-limit (guest-memory-limit in the configuration file) keeps others \
         from taking it, a second target serves more",
        Bytes(*asked), Bytes(*total), Bytes(*share)
    )]
    AllBytes {
        /// What it wants, in bytes.
        asked: u64,
        /// What all can have, in bytes.
        total: u64,
        /// What each can have whatever the others do, in bytes.
        share: u64,
    },
    /// All front-ends together have too many.
    #[error(
        "all front-ends together have so many memory regions that there is none for this one: the process can map {total}, and \
         {share} are kept for each disk; raise vm.max_map_count, or lower --guest-regions-limit (guest-regions-limit in the \
         configuration file)"
    )]
    AllRegions {
        /// What all can have.
        total: u64,
        /// What each can have whatever the others do.
        share: u64,
    },
}

/// Bytes, in words.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bytes(bytes) = *self;
        let unit = [(40, "TiB"), (30, "GiB"), (20, "MiB")].into_iter().find(|(shift, _)| bytes >> shift >= 10);
        match unit {
            Some((shift, name)) => write!(f, "{} {name}", bytes >> shift),
            None => write!(f, "{bytes} bytes"),
        }
    }
}

/// Something that all front-ends share.
#[derive(Clone, Copy, Debug, Default)]
struct Pool {
    total: u64,
    /// What is there for each.
    share: u64,
    /// What front-ends have beyond their shares, all together.
    beyond: u64,
}

impl Pool {
    fn new(total: u64, exports: usize) -> Pool {
        Pool { total, share: total / 2 / exports.max(1) as u64, beyond: 0 }
    }

    /// What a front-end that has `used` takes beyond its share.
    fn excess(&self, used: u64) -> u64 {
        used.saturating_sub(self.share)
    }

    /// A front-end has `before`, and is to have `after`; says whether that is there.
    fn change(&mut self, before: u64, after: u64) -> bool {
        let beyond = self.beyond - self.excess(before) + self.excess(after);
        let fits = after <= before || beyond <= self.total / 2;
        if fits {
            self.beyond = beyond;
        }
        fits
    }
}

/// What all front-ends of a target have mapped.
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    pools: Mutex<Pools>,
}

#[derive(Debug)]
struct Pools {
    bytes: Pool,
    regions: Pool,
}

impl Budget {
    /// For this process, and so many disks.
    pub fn new(limits: Limits, exports: usize) -> Arc<Budget> {
        Budget::of(limits, exports, part_for_guests(address_space()), part_for_guests(mappings()))
    }

    fn of(limits: Limits, exports: usize, bytes: u64, regions: u64) -> Arc<Budget> {
        let pools = Pools { bytes: Pool::new(bytes, exports), regions: Pool::new(regions, exports) };
        Arc::new(Budget { limits, pools: Mutex::new(pools) })
    }

    /// The account of a disk: of its front-end, and those that wait for it to go.
    pub fn account(self: &Arc<Budget>) -> Arc<Account> {
        Arc::new(Account { budget: self.clone(), used: Mutex::default() })
    }

    fn pools(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part for guests of what the process can have: an embedded controller maps everything once more, and the rest is the target's.
fn part_for_guests(all: u64) -> u64 {
    all / 8 * 3
}

/// The length of this process's address space in bytes.
fn address_space() -> u64 {
    // The stack lies at its end, which is a power of two.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let stack = maps.lines().find(|line| line.ends_with("[stack]"));
    let end = stack.and_then(|line| u64::from_str_radix(line.split(['-', ' ']).nth(1)?, 16).ok());
    let length = end.and_then(u64::checked_next_power_of_two).unwrap_or(1 << 47);
    rustix::process::getrlimit(rustix::process::Resource::As).current.map_or(length, |limit| limit.min(length))
}

/// Mappings that a process can have: the kernel's default for a process is also its default for what one has mapped for DMA.
fn mappings() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse().unwrap_or(65530).min(65530)
}

/// What the front-ends of one disk have mapped.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    /// Bytes and regions.
    used: Mutex<(u64, u64)>,
}

impl Default for Account {
    /// Without a limit of its own; for tests and tools with a memory of their own.
    fn default() -> Account {
        let budget = Budget::of(Limits { bytes: u64::MAX, regions: usize::MAX }, 1, u64::MAX, u64::MAX);
        Account { budget, used: Mutex::default() }
    }
}

impl Account {
    /// Memory regions that a front-end may have.
    pub fn regions(&self) -> usize {
        self.budget.limits.regions
    }

    /// May a front-end have a memory table of so many bytes, in so many regions? While one takes the place of another, both
    /// are mapped.
    pub fn check(&self, bytes: u64, regions: usize) -> Result<(), Exhausted> {
        let Limits { bytes: most, regions: most_regions } = self.budget.limits;
        if bytes > most {
            return Err(Exhausted::Bytes { asked: bytes, limit: most });
        }
        if regions > most_regions {
            return Err(Exhausted::Regions { limit: most_regions });
        }
        Ok(())
    }

    /// Takes what a mapping of so many bytes needs, until the grant is dropped.
    pub fn grant(self: &Arc<Account>, bytes: u64) -> Result<MemoryGrant, Exhausted> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pools = self.budget.pools();
        let (before, regions) = *used;
        let after = before.saturating_add(bytes);
        if !pools.bytes.change(before, after) {
            let Pool { total, share, .. } = pools.bytes;
            return Err(Exhausted::AllBytes { asked: bytes, total, share });
        }
        if !pools.regions.change(regions, regions + 1) {
            pools.bytes.change(after, before);
            let Pool { total, share, .. } = pools.regions;
            return Err(Exhausted::AllRegions { total, share });
        }
        *used = (after, regions + 1);
        Ok(MemoryGrant { account: self.clone(), bytes: after - before })
    }
}

/// What a mapping needs; given back when dropped.
#[derive(Debug)]
pub struct MemoryGrant {
    account: Arc<Account>,
    bytes: u64,
}

impl Drop for MemoryGrant {
    fn drop(&mut self) {
        let mut used = self.account.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pools = self.account.budget.pools();
        let (bytes, regions) = *used;
        pools.bytes.change(bytes, bytes - self.bytes);
        pools.regions.change(regions, regions - 1);
        *used = (bytes - self.bytes, regions - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 1 << 40;

    #[test]
    fn one_front_end_leaves_the_others_their_share() {
        let limits = Limits { bytes: 20 * T, regions: 10 };
        let budget = Budget::of(limits, 4, 16 * T, 1000);
        let (greedy, modest) = (budget.account(), budget.account());
        let mut grants = Vec::new();
        let refused = loop {
            match greedy.grant(T) {
                Ok(grant) => grants.push(grant),
                Err(refused) => break refused,
            }
        };
        // Its share, and all that is nobody's.
        assert_eq!(grants.len(), 2 + 8);
        assert_eq!(refused, Exhausted::AllBytes { asked: T, total: 16 * T, share: 2 * T });
        let told = refused.to_string();
        assert!(told.contains("can map 16 TiB for them, and 2048 GiB are kept for each disk"), "{told}");
        assert!(told.contains("--guest-memory-limit"), "{told}");
        let its_share = modest.grant(2 * T).unwrap();
        assert!(modest.grant(1).is_err());
        drop(grants.pop());
        let more = modest.grant(T).unwrap();
        drop((its_share, more, grants));
        let pools = budget.pools();
        assert_eq!((pools.bytes.beyond, pools.regions.beyond), (0, 0), "all is given back");
    }

    #[test]
    fn regions_are_shared_as_bytes_are() {
        let budget = Budget::of(Limits::default(), 2, 1 << 40, 8);
        let (greedy, modest) = (budget.account(), budget.account());
        let grants: Vec<_> = std::iter::from_fn(|| greedy.grant(4096).ok()).take(100).collect();
        assert_eq!(grants.len(), 6);
        assert_eq!(greedy.grant(4096).unwrap_err(), Exhausted::AllRegions { total: 8, share: 2 });
        assert_eq!(greedy.used.lock().unwrap().0, 6 * 4096, "a refusal takes nothing");
        let _share = [modest.grant(1).unwrap(), modest.grant(1).unwrap()];
    }

    #[test]
    fn a_front_end_has_a_limit_which_is_told() {
        let account = Budget::of(Limits { bytes: 64 << 30, regions: 2 }, 1, u64::MAX, 1000).account();
        assert_eq!(account.check(64 << 30, 2), Ok(()));
        let told = account.check((64 << 30) + 4096, 1).unwrap_err().to_string();
        assert!(told.contains("64 GiB are allowed") && told.contains("--guest-memory-limit"), "{told}");
        let told = account.check(4096, 3).unwrap_err().to_string();
        assert!(told.contains("has 2 regions already") && told.contains("--guest-regions-limit"), "{told}");
    }

    /// The default has room for a guest of 16 TiB, twice while its memory table is replaced, on a machine with 47 address bits.
    #[test]
    fn a_guest_of_16_tib_fits() {
        let budget = Budget::of(Limits::default(), 3, part_for_guests(1 << 47), part_for_guests(65530));
        let account = budget.account();
        account.check(16 * T + (1 << 30), 40).unwrap();
        let _old = account.grant(16 * T).unwrap();
        let _new = account.grant(16 * T).unwrap();
        assert!(address_space() >= 1 << 38, "{:#x}", address_space());
        assert!(mappings() > 1000, "{}", mappings());
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("16T"), Ok(16 * T));
        assert_eq!(parse_bytes("3g"), Ok(3 << 30));
        for wrong in ["", "T", "1.5G", "-1", "+1G", "0", "99999999999T", "16X"] {
            assert!(parse_bytes(wrong).unwrap_err().to_string().contains("such as 64G"), "{wrong}");
        }
        assert_eq!(parse_regions(509), Ok(509));
        assert!(parse_regions(0).is_err() && parse_regions(510).is_err());
    }
}
