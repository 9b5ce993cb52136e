//! What each logical block of a disk may hold, also after its drive has lost its power.
//!
//! Changes are numbered from 1; 0 is the disk as it was made, zeroes. Only one request at a time is under way for a block, so
//! the order of its changes is known. Its newest *kept* change is the last one that a flush, or writing through, promised to
//! keep. It holds the newest change that was answered; after a power cut the kept one or a later one, whole, and nothing else.
//! Which one, the next read tells, or the next change makes unimportant.

use std::collections::VecDeque;
use std::ops::Range;

/// What a request does to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Data of its own in every block.
    Write,
    /// Write zeroes: promised as a write is.
    Zero,
    /// Discard: gives zeroes on this drive, and promises nothing.
    Discard,
}

#[derive(Clone)]
struct Block {
    /// The kept change first, then all later ones that were answered.
    changes: Vec<(u32, Change)>,
    /// The change under way.
    coming: Option<(u32, Change)>,
    /// The last change that was answered.
    answered: u32,
    /// A power cut may have taken changes up to this one: any of them may be there.
    cut: u32,
    /// A request for it is under way.
    busy: bool,
}

impl Block {
    /// Everything up to this change is to be kept. What a discard leaves is not: the one before it is as good. Nor is what a
    /// power cut had taken before.
    fn keep(&mut self, answered: u32) {
        let promised = |change: &(u32, Change)| {
            change.0 <= answered && change.1 != Change::Discard && (change.0 > self.cut || self.cut == 0)
        };
        if let Some(kept) = self.changes.iter().rposition(promised) {
            self.changes.drain(..kept);
        }
    }
}

/// What a flush that begins now promises to keep: all that was answered before, as a number of answers.
#[derive(Clone, Copy, Debug)]
pub struct Promise(u64);

/// A change that was answered, and that no flush has kept so far.
struct Answer {
    number: u64,
    blocks: Range<u64>,
    change: u32,
}

/// The blocks of a disk.
pub struct Blocks {
    blocks: Vec<Block>,
    block_bytes: usize,
    /// The number of the last change; not used again when that is lost, so that it cannot come back unnoticed.
    last: u32,
    /// Changes answered so far.
    answered: u64,
    answers: VecDeque<Answer>,
    /// How often a block had lost its newest answered change after a cut.
    went_back: u64,
}

/// Bytes in which a block says what it is: its number, the change, and the place in the block.
const UNIT: usize = 16;

impl Blocks {
    /// A disk of zeroes.
    pub fn new(blocks: usize, block_bytes: usize) -> Blocks {
        let block = Block { changes: vec![(0, Change::Zero)], coming: None, answered: 0, cut: 0, busy: false };
        let blocks = vec![block; blocks];
        Blocks { blocks, block_bytes, last: 0, answered: 0, answers: VecDeque::new(), went_back: 0 }
    }

    /// How many blocks there are.
    pub fn count(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Bytes of one.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// How often a read has found that a block had lost what was answered.
    pub fn went_back(&self) -> u64 {
        self.went_back
    }

    /// Takes up to `most` blocks from `first` on for a request; fewer if another one has them.
    pub fn claim(&mut self, first: u64, most: u64) -> Option<Range<u64>> {
        let end = self.count().min(first + most);
        let end = (first..end).find(|block| self.blocks[*block as usize].busy).unwrap_or(end);
        self.of_mut(&(first..end)).for_each(|block| block.busy = true);
        (first < end).then_some(first..end)
    }

    /// Takes these blocks for a request; false if another one has any of them.
    pub fn claim_all(&mut self, blocks: &Range<u64>) -> bool {
        let free = self.of_mut(blocks).all(|block| !block.busy);
        if free {
            self.of_mut(blocks).for_each(|block| block.busy = true);
        }
        free
    }

    /// No request has these blocks any more, and what it would have changed it has not.
    pub fn release(&mut self, blocks: &Range<u64>) {
        self.of_mut(blocks).for_each(|block| (block.busy, block.coming) = (false, None));
    }

    fn of_mut(&mut self, blocks: &Range<u64>) -> impl Iterator<Item = &mut Block> {
        self.blocks[blocks.start as usize..blocks.end as usize].iter_mut()
    }

    /// A change of claimed blocks is sent; returns their new contents.
    pub fn begin_change(&mut self, blocks: &Range<u64>, change: Change) -> Vec<u8> {
        self.last += 1;
        let coming = (self.last, change);
        self.of_mut(blocks).for_each(|block| block.coming = Some(coming));
        let mut data = vec![0; (blocks.end - blocks.start) as usize * self.block_bytes];
        for (number, data) in blocks.clone().zip(data.chunks_exact_mut(self.block_bytes)) {
            fill(number, coming, data);
        }
        data
    }

    /// The change of the blocks that was under way was answered; `kept` if it is durable by that.
    pub fn changed(&mut self, blocks: &Range<u64>, kept: bool) {
        let mut number = 0;
        for block in self.of_mut(blocks) {
            block.busy = false;
            let Some(change) = block.coming.take() else { continue };
            block.changes.push(change);
            (number, block.answered) = (change.0, change.0);
            if kept {
                block.keep(number);
            }
        }
        self.answered += 1;
        self.answers.push_back(Answer { number: self.answered, blocks: blocks.clone(), change: number });
    }

    /// A read was answered; says which blocks do not hold what they have to.
    pub fn was_read(&mut self, blocks: &Range<u64>, data: &[u8]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (number, data) in blocks.clone().zip(data.chunks_exact(self.block_bytes)) {
            let block = &mut self.blocks[number as usize];
            block.busy = false;
            let known = block.answered > block.cut;
            let least = if known { block.answered } else { 0 };
            // Where several left zeroes, the newest of them is as good as any.
            let mut may_be = block.changes.iter().rev().take_while(|change| change.0 >= least);
            match may_be.find(|change| holds(number, **change, data)) {
                Some(_) if known => {}
                Some(&found) => {
                    self.went_back += u64::from(found.0 < block.answered);
                    (block.answered, block.changes) = (found.0, vec![found]);
                }
                None => {
                    let allowed: Vec<_> = block.changes.iter().filter(|change| change.0 >= least).collect();
                    wrong
                        .push(format!("block {number} holds {}; only these may be there: {allowed:?}", describe(data)));
                }
            }
        }
        wrong
    }

    /// What a flush that is sent now promises.
    pub fn promise(&self) -> Promise {
        Promise(self.answered)
    }

    /// The promise was given.
    pub fn keep(&mut self, promise: Promise) {
        while let Some(answer) = self.answers.pop_front_if(|answer| answer.number <= promise.0) {
            self.of_mut(&answer.blocks).for_each(|block| block.keep(answer.change));
        }
    }

    /// The drive has lost its power, and with it, perhaps, what nobody has promised to keep. What is under way still is.
    pub fn power_cut(&mut self) {
        self.answers.clear();
        for block in &mut self.blocks {
            block.cut = block.changes.last().expect("there is always one").0;
        }
    }

    /// What was under way will not be answered any more, and may have happened: said before the power cut that was the reason.
    pub fn abandon(&mut self) {
        for block in &mut self.blocks {
            block.busy = false;
            block.changes.extend(block.coming.take());
        }
    }
}

/// Puts into a block what a change leaves there.
fn fill(number: u64, (version, change): (u32, Change), data: &mut [u8]) {
    match change {
        Change::Zero | Change::Discard => data.fill(0),
        Change::Write => {
            for (place, bytes) in (0..).zip(data.chunks_exact_mut(UNIT)) {
                bytes.copy_from_slice(&unit(number as u32, version, place));
            }
        }
    }
}

fn holds(number: u64, (version, change): (u32, Change), data: &[u8]) -> bool {
    let mut units = (0..).zip(data.chunks_exact(UNIT));
    match change {
        Change::Zero | Change::Discard => units.all(|(_, bytes)| bytes == [0; UNIT]),
        Change::Write => units.all(|(place, bytes)| bytes == unit(number as u32, version, place)),
    }
}

/// One unit of a written block. Never zeroes, and nowhere twice on the disk.
fn unit(number: u32, version: u32, place: u32) -> [u8; UNIT] {
    let mut unit = [0; UNIT];
    for (word, value) in unit.chunks_mut(4).zip([!number, number, version, place]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    unit
}

/// Says what is in a block: runs of units that belong together.
fn describe(data: &[u8]) -> String {
    let word = |unit: &[u8], at: usize| u32::from_le_bytes([unit[at], unit[at + 1], unit[at + 2], unit[at + 3]]);
    let mut seen = Vec::new();
    for (place, found) in data.chunks(UNIT).enumerate() {
        let (number, version) = (word(found, 4), word(found, 8));
        let text = match found {
            _ if found.iter().all(|byte| *byte == 0) => "zeroes".to_owned(),
            _ if found == unit(number, version, place as u32) => format!("change {version} of block {number}"),
            _ => "something else".to_owned(),
        };
        if seen.last() != Some(&text) {
            seen.push(text);
        }
    }
    seen.join(", then ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 512;

    fn contents(change: (u32, Change)) -> Vec<u8> {
        let mut data = vec![0; BYTES];
        fill(0, change, &mut data);
        data
    }

    fn write(blocks: &mut Blocks) -> Vec<u8> {
        let claimed = blocks.claim(0, 1).unwrap();
        let data = blocks.begin_change(&claimed, Change::Write);
        blocks.changed(&claimed, false);
        data
    }

    fn is_right(blocks: &mut Blocks, data: &[u8]) -> bool {
        blocks.was_read(&(0..1), data).is_empty()
    }

    #[test]
    fn what_was_flushed_stays() {
        let mut blocks = Blocks::new(1, BYTES);
        let old = write(&mut blocks);
        let kept = write(&mut blocks);
        blocks.keep(blocks.promise());
        let newer = write(&mut blocks);
        assert!(!is_right(&mut blocks, &kept), "nothing was cut");
        blocks.power_cut();
        assert!(!is_right(&mut blocks, &old) && !is_right(&mut blocks, &[0; BYTES]));
        let mixed = [&kept[..BYTES / 2], &newer[BYTES / 2..]].concat();
        assert!(!is_right(&mut blocks, &mixed), "half of the one and half of the other");
        assert!(is_right(&mut blocks, &kept));
        assert!(!is_right(&mut blocks, &newer), "it was gone a moment ago");
        assert_eq!(blocks.went_back(), 1);
    }

    #[test]
    fn a_flush_does_not_bring_back_what_a_cut_took() {
        let mut blocks = Blocks::new(1, BYTES);
        let [old, new] = [(); 2].map(|()| write(&mut blocks));
        blocks.power_cut();
        blocks.keep(blocks.promise());
        for data in [&old, &new, &vec![0; BYTES]] {
            let mut blocks = Blocks { blocks: blocks.blocks.clone(), answers: VecDeque::new(), ..blocks };
            assert!(is_right(&mut blocks, data));
        }
        let last = write(&mut blocks);
        assert!(!is_right(&mut blocks, &new) && is_right(&mut blocks, &last));
        blocks.keep(blocks.promise());
        blocks.power_cut();
        assert!(!is_right(&mut blocks, &new) && is_right(&mut blocks, &last), "promised behind the cut");
    }

    #[test]
    fn a_flush_promises_what_was_answered_before_it() {
        let mut blocks = Blocks::new(1, BYTES);
        let early = blocks.promise();
        let data = write(&mut blocks);
        blocks.keep(early);
        blocks.power_cut();
        assert!(is_right(&mut blocks, &[0; BYTES]));
        assert!(!is_right(&mut blocks, &data));
    }

    #[test]
    fn a_discard_promises_nothing() {
        let mut blocks = Blocks::new(1, BYTES);
        let data = write(&mut blocks);
        let claimed = blocks.claim(0, 1).unwrap();
        blocks.begin_change(&claimed, Change::Discard);
        blocks.changed(&claimed, false);
        assert!(!is_right(&mut blocks, &data));
        blocks.keep(blocks.promise());
        blocks.power_cut();
        assert!(is_right(&mut blocks, &data) && data == contents((1, Change::Write)));
    }
}
