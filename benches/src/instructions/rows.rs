//! What is measured.

use crate::guest::Layout;

/// What a row exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// From avail ring to used ring, driver included.
    Lane(Layout),
    /// From avail ring to used ring, driver included, with the in-flight log that the next process would read.
    LoggedLane(Layout),
    /// The driver alone: submit, ring, reap.
    Driver,
    /// Our ring alone: pop, walk, give back, publish.
    Ring(Layout),
    /// The ring of the crate `virtio-queue` alone: pop, walk, give back, publish.
    VirtioQueue(Layout),
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub name: &'static str,
    pub what: What,
    /// Requests per batch.
    pub batch: u16,
}

impl Row {
    /// Rounds before counting begins.
    pub(crate) fn warm_up(&self) -> u32 {
        4
    }

    /// Rounds counted. Enough for the rings to wrap.
    pub(crate) fn rounds(&self) -> u32 {
        if self.batch == 1 { 300 } else { 60 }
    }

    /// Requests counted.
    pub(crate) fn requests(&self) -> u64 {
        u64::from(self.rounds()) * u64::from(self.batch)
    }
}

const SPLIT: Layout = Layout { packed: false, indirect: false, two_regions: false };
const SPLIT_INDIRECT: Layout = Layout { indirect: true, ..SPLIT };
const SPLIT_TWO_REGIONS: Layout = Layout { two_regions: true, ..SPLIT };
const PACKED: Layout = Layout { packed: true, ..SPLIT };
const PACKED_INDIRECT: Layout = Layout { indirect: true, ..PACKED };

/// All rows, the most important first.
pub(crate) const ROWS: &[Row] = &[
    Row { name: "lane, split ring, batch 32", what: What::Lane(SPLIT), batch: 32 },
    Row { name: "lane, split ring, batch 1", what: What::Lane(SPLIT), batch: 1 },
    Row { name: "lane, split ring with indirect descriptors, batch 32", what: What::Lane(SPLIT_INDIRECT), batch: 32 },
    Row { name: "lane, split ring with indirect descriptors, batch 1", what: What::Lane(SPLIT_INDIRECT), batch: 1 },
    Row {
        name: "lane, split ring, guest memory in two regions, batch 32",
        what: What::Lane(SPLIT_TWO_REGIONS),
        batch: 32,
    },
    Row { name: "lane, packed ring, batch 32", what: What::Lane(PACKED), batch: 32 },
    Row { name: "lane, packed ring, batch 1", what: What::Lane(PACKED), batch: 1 },
    Row { name: "lane, packed ring with indirect descriptors, batch 32", what: What::Lane(PACKED_INDIRECT), batch: 32 },
    Row { name: "lane, split ring, in-flight log, batch 32", what: What::LoggedLane(SPLIT), batch: 32 },
    Row {
        name: "lane, split ring with indirect descriptors, in-flight log, batch 32",
        what: What::LoggedLane(SPLIT_INDIRECT),
        batch: 32,
    },
    Row { name: "lane, packed ring, in-flight log, batch 32", what: What::LoggedLane(PACKED), batch: 32 },
    Row {
        name: "lane, packed ring with indirect descriptors, in-flight log, batch 32",
        what: What::LoggedLane(PACKED_INDIRECT),
        batch: 32,
    },
    Row { name: "driver alone, batch 32", what: What::Driver, batch: 32 },
    Row { name: "driver alone, batch 1", what: What::Driver, batch: 1 },
    Row { name: "ring alone, split, batch 32", what: What::Ring(SPLIT), batch: 32 },
    Row { name: "ring alone, split with indirect descriptors, batch 32", what: What::Ring(SPLIT_INDIRECT), batch: 32 },
    Row { name: "virtio-queue 0.18, split, batch 32", what: What::VirtioQueue(SPLIT), batch: 32 },
    Row {
        name: "virtio-queue 0.18, split with indirect descriptors, batch 32",
        what: What::VirtioQueue(SPLIT_INDIRECT),
        batch: 32,
    },
];
