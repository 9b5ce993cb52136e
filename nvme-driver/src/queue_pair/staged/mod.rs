//! Long requests: those of many commands. They share the queue pair with all other requests.
//!
//! A queue pair has at most [`MOST_REQUESTS`] of them, and all together only so many commands out at once. The next command
//! belongs to the owner that has been served least, and there to the request that has been served least, counted in bytes moved.

use super::job::Job;
use crate::{LbaRange, Segment};

/// Bits of a token from here on name the request's owner: see [`super::QueuePair::submit`].
pub const OWNER_SHIFT: u32 = 32;

/// Most commands that long requests have out, all together; and no more than half of the slots. It keeps a drive busy, and is
/// soon done.
const MOST_COMMANDS: usize = 32;
/// With this many bytes out, nothing more of a long request is issued. At 10 MB/s they are done within two seconds.
const MOST_BYTES: u64 = 16 << 20;

/// Long requests that there may be.
pub(super) const MOST_REQUESTS: usize = 64;
/// One owner may have so many, unless the queue pair has half of [`MOST_REQUESTS`]: then it may have one.
const MOST_OF_OWNER: usize = 16;
/// Segments and ranges in the requests of an owner that has several.
const MOST_ENTRIES: usize = 16 << 10;

/// Lists that are kept for later requests, and how long they may be.
const SPARE_LISTS: usize = 16;
const SPARE_ENTRIES: usize = 1024;

/// What a command weighs that moves nothing, at least, and what one of Dataset Management does, of which a drive should not
/// have many to do.
const LIGHTEST: u64 = 4096;
const DISCARD: u64 = MOST_BYTES / 4;

/// A copy of a request's segments or ranges.
#[derive(Default)]
struct Lists {
    segments: Vec<Segment>,
    ranges: Vec<LbaRange>,
}

/// A long request.
struct LongRequest {
    request: u16,
    token: u64,
    /// Bytes it was served, and what it had to begin with.
    served: u64,
    /// A command of it has been issued.
    begun: bool,
    job: Job,
    lists: Lists,
}

impl LongRequest {
    fn owner(&self) -> u32 {
        owner(self.token)
    }

    fn entries(&self) -> usize {
        self.lists.segments.len() + self.lists.ranges.len()
    }
}

/// One who has long requests.
struct Owner {
    id: u32,
    requests: usize,
    served: u64,
}

fn owner(token: u64) -> u32 {
    (token >> OWNER_SHIFT) as u32
}

/// The next thing to do of a long request.
pub(super) struct Next<'a> {
    pub request: u16,
    pub job: &'a mut Job,
    pub segments: &'a [Segment],
    pub ranges: &'a [LbaRange],
}

/// The long requests of a queue pair.
pub(super) struct Staged {
    requests: Vec<LongRequest>,
    /// The owners of these requests.
    owners: Vec<Owner>,
    /// Of the commands that are out: how many, and what they weigh.
    commands: usize,
    weight: u64,
    most_commands: usize,
    spare: Vec<Lists>,
    /// Somebody else was refused for want of a slot, since this was last looked at.
    pub refused: bool,
    /// It was to their advantage.
    yielded: bool,
}

impl Staged {
    /// None, on a queue pair with this many slots.
    pub(super) fn new(slots: usize) -> Staged {
        Staged {
            requests: Vec::with_capacity(MOST_REQUESTS),
            owners: Vec::with_capacity(MOST_REQUESTS),
            commands: 0,
            weight: 0,
            most_commands: (slots / 2).clamp(1, MOST_COMMANDS),
            spare: Vec::new(),
            refused: false,
            yielded: false,
        }
    }

    /// Are there none?
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// May there be one more, with this many segments and ranges?
    pub(super) fn admits(&self, token: u64, entries: usize) -> bool {
        let Some(owner) = self.owners.iter().find(|other| other.id == owner(token)) else {
            return self.requests.len() < MOST_REQUESTS;
        };
        let its = self.requests.iter().filter(|long| long.owner() == owner.id);
        owner.requests < MOST_OF_OWNER
            && self.requests.len() < MOST_REQUESTS / 2
            && its.map(LongRequest::entries).sum::<usize>() + entries <= MOST_ENTRIES
    }

    /// Takes one, which was admitted. The lists are copied, since the caller's are gone when `submit` returns.
    pub(super) fn put(&mut self, request: u16, token: u64, job: Job, segments: &[Segment], ranges: &[LbaRange]) {
        let mut lists = self.spare.pop().unwrap_or_default();
        lists.segments.extend_from_slice(segments);
        lists.ranges.extend_from_slice(ranges);
        // Whoever comes is served as those are who were served least.
        let served = match self.owners.iter_mut().find(|other| other.id == owner(token)) {
            Some(owner) => {
                owner.requests += 1;
                let its = self.requests.iter().filter(|long| long.owner() == owner.id);
                its.map(|long| long.served).min()
            }
            None => {
                let served = self.owners.iter().map(|owner| owner.served).min().unwrap_or_default();
                self.owners.push(Owner { id: owner(token), requests: 1, served });
                None
            }
        };
        let served = served.unwrap_or_default();
        self.requests.push(LongRequest { request, token, served, begun: false, job, lists });
    }

    /// May a command of a long request be issued?
    pub(super) fn has_room(&self) -> bool {
        self.commands < self.most_commands && self.weight < MOST_BYTES
    }

    /// Is it somebody else's turn? Every other time, if they were refused.
    pub(super) fn yields(&mut self) -> bool {
        self.yielded = std::mem::take(&mut self.refused) && !self.yielded;
        self.yielded
    }

    /// The request whose turn it is.
    pub(super) fn next(&mut self) -> Option<(usize, Next<'_>)> {
        let owner = self.owners.iter().min_by_key(|owner| owner.served)?.id;
        let its = self.requests.iter_mut().enumerate().filter(|(_, long)| long.owner() == owner);
        let (at, long) = its.min_by_key(|(_, long)| long.served)?;
        let LongRequest { request, job, lists, .. } = long;
        Some((at, Next { request: *request, job, segments: &lists.segments, ranges: &lists.ranges }))
    }

    /// A command of the request at this index was issued. `bytes`: it moves or fills so many; `None`: it discards. Returns what
    /// the command weighs, for [`Staged::answered`], and whether it is the first of several.
    pub(super) fn issued(&mut self, at: usize, bytes: Option<u64>) -> (u64, bool) {
        let weight = bytes.map_or(DISCARD, |bytes| bytes.max(LIGHTEST));
        self.commands += 1;
        self.weight += weight;
        let Some(long) = self.requests.get_mut(at) else { return (weight, false) };
        long.served += weight;
        let id = long.owner();
        let done = long.job.is_done(&long.lists.ranges);
        let first = !std::mem::replace(&mut long.begun, true);
        if let Some(owner) = self.owners.iter_mut().find(|owner| owner.id == id) {
            owner.served += weight;
        }
        if done {
            self.remove(at);
        }
        (weight, first && !done)
    }

    /// The controller has answered a command of this weight.
    pub(super) fn answered(&mut self, weight: u64) {
        if weight != 0 {
            self.commands -= 1;
            self.weight -= weight;
        }
    }

    /// Nothing more of this request is to be issued, if it is here.
    pub(super) fn forget(&mut self, request: u16) {
        if let Some(at) = self.requests.iter().position(|long| long.request == request) {
            self.remove(at);
        }
    }

    /// Nothing more is to be issued of the requests whose tokens `which` selects; `each` gets them.
    pub(super) fn forget_all(&mut self, mut which: impl FnMut(u64) -> bool, mut each: impl FnMut(u16)) {
        let mut at = 0;
        while let Some(LongRequest { request, token, .. }) = self.requests.get(at) {
            if !which(*token) {
                at += 1;
                continue;
            }
            let request = *request;
            self.remove(at);
            each(request);
        }
    }

    /// No command is out any more.
    pub(super) fn reset(&mut self) {
        (self.commands, self.weight, self.refused) = (0, 0, false);
    }

    fn remove(&mut self, at: usize) {
        let long = self.requests.swap_remove(at);
        let id = long.owner();
        if let Some(at) = self.owners.iter().position(|owner| owner.id == id) {
            self.owners[at].requests -= 1;
            if self.owners[at].requests == 0 {
                self.owners.swap_remove(at);
            }
        }
        let Lists { mut segments, mut ranges } = long.lists;
        // What a rare request took goes back.
        if self.spare.len() < SPARE_LISTS && segments.capacity().max(ranges.capacity()) <= SPARE_ENTRIES {
            segments.clear();
            ranges.clear();
            self.spare.push(Lists { segments, ranges });
        }
    }
}

#[cfg(test)]
mod tests;
