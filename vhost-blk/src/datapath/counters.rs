//! What a lane counts. One writer, many readers, no read-modify-write.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// Counters of one queue, since the export began: they go on when a ring is stopped and started again.
        ///
        /// The lane's worker writes them once per batch; anyone may read at any time.
        #[derive(Debug, Default)]
        #[repr(align(128))] // a pair of cache lines of its own: readers disturb one line of one worker at most
        pub struct LaneCounters {
            $($(#[doc = $doc])+ pub $name: AtomicU64,)+
        }

        /// The counters' values at one moment (each is exact, together they may be a batch apart).
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Tally {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl LaneCounters {
            /// The present values.
            pub fn read(&self) -> Tally {
                Tally { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }

            /// Overwrites all values. Only the lane does so: it is the only writer, so nothing is lost.
            pub(crate) fn write(&self, tally: &Tally) {
                $(self.$name.store(tally.$name, Ordering::Relaxed);)+
            }
        }

        impl Tally {
            /// Names and values, for printing.
            pub fn fields(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }

        impl std::ops::AddAssign for Tally {
            fn add_assign(&mut self, other: Tally) {
                $(self.$name += other.$name;)+
            }
        }
    };
}

counters! {
    /// Read requests given to the drive.
    reads,
    /// Write requests given to the drive.
    writes,
    /// Flush requests given to the drive.
    flushes,
    /// Discard requests given to the drive.
    discards,
    /// Write zeroes requests given to the drive.
    write_zeroes,
    /// Requests answered without the drive: GET_ID, and those that were refused.
    answered,
    /// Bytes of data of the reads.
    bytes_read,
    /// Bytes of data of the writes.
    bytes_written,
    /// Requests whose status was not OK.
    errors,
    /// Requests whose data had to be copied through a bounce buffer.
    copies,
    /// Notifications received: times a kick of the driver ended a sleep.
    kicks,
    /// Notifications sent to the driver: signals of the call eventfd.
    calls,
    /// Times a request was given to the drive again: after a status that allows it, or after the drive was detached.
    again,
    /// Publications of the used ring.
    batches,
    /// Times the queue pair had no room for a request.
    full,
}
