//! The inputs that fuzzing begins with: what a guest, a front-end and a drive do when they mean well, and a few well-known ways
//! not to. `cargo run -p fuzz --bin seeds` writes them into the corpus.
//!
//! The numbers are those of the targets' steps: a seed has to be written anew when the steps of its target change.

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// Seeds of [`crate::rings`].
pub fn rings() -> Seeds {
    const PACKED: u8 = 1;
    const INDIRECT: u8 = 4;
    const PLACES: u8 = 16;
    const LOG: u8 = 32;
    const POP: &[u8] = &[7];
    const PLAIN: &[u8] = &[10];
    const GIVE_BACK: &[u8] = &[11, 0, 12];
    const AGAIN: &[u8] = &[15];
    const READ: &[u8] = &[3, 0, 1, 0, 0];
    const WRITE: &[u8] = &[3, 1, 1, 0, 0];
    const FLUSH: &[u8] = &[3, 4, 0, 0, 0];
    const GET_ID: &[u8] = &[3, 8, 0, 0, 0];
    const DISCARD: &[u8] = &[3, 11, 0, 1, 0];
    const ZEROES: &[u8] = &[3, 13, 0, 1, 3];
    // Data the device writes, reads; through an indirect table.
    const IN: &[u8] = &[5, 1, 0, 0];
    const OUT: &[u8] = &[5, 0, 1, 1];
    const TABLE_IN: &[u8] = &[5, 3, 2, 0];
    const RANGE: &[u8] = &[5, 0, 3, 3];
    let load = |flags: u8| {
        join(&[
            &[flags, 4],
            READ,
            IN,
            POP,
            GIVE_BACK,
            IN,
            PLAIN,
            GIVE_BACK,
            TABLE_IN,
            POP,
            GIVE_BACK,
            WRITE,
            OUT,
            PLAIN,
            OUT,
            POP,
            GIVE_BACK,
            GIVE_BACK,
            &[13, 1, 13, 0],
        ])
    };
    let others = |flags: u8| {
        join(&[
            &[flags, 4],
            FLUSH,
            IN,
            POP,
            GET_ID,
            IN,
            POP,
            GIVE_BACK,
            GIVE_BACK,
            DISCARD,
            RANGE,
            POP,
            GIVE_BACK,
            ZEROES,
            RANGE,
            POP,
            GIVE_BACK,
        ])
    };
    let death = |flags: u8| {
        join(&[
            &[flags | LOG, 4, 0],
            READ,
            IN,
            POP,
            IN,
            PLAIN,
            TABLE_IN,
            POP,
            &[11, 1, 12],
            IN,
            POP,
            &[11, 0],
            AGAIN,
            GIVE_BACK,
            GIVE_BACK,
            IN,
            POP,
            GIVE_BACK,
            AGAIN,
        ])
    };
    // Version 1, 8 entries; entry after entry is in flight.
    let state = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 0, 0, 0];
    let entries: Vec<u8> =
        (0..8u8).flat_map(|entry| [1, 0, entry, 0, 0, 0, 1, 0, entry, 0, 0, 0, 0, 0, 0, 0]).collect();
    let foreign = |flags: u8| {
        let file = join(&[&state, &entries]);
        join(&[&[flags | LOG, 0, 1 + file.len() as u8 / 2 / 2 * 2], &file, &[0; 2], &[1, 0, 1], READ, IN, POP, AGAIN])
    };
    // A chain that comes back to itself, and one that leaves its table.
    let loops = |flags: u8| {
        join(&[&[flags, 0], &[1, 0, 0, 0, 1, 0, 0], &[4, 0, 1], POP, AGAIN, &[1, 0, 0, 0, 1, 0, 200, 4, 0, 1], POP])
    };
    let outside = |flags: u8| join(&[&[flags | PLACES, 0, 7, 8, 9], &[3, 0, 200], &[255; 8], IN, POP, PLAIN]);
    // The log changes while the ring runs: the length of a chain, the list of free entries, the state; then what is left of it.
    let log_changes = |flags: u8| {
        let changes = |entry: u8, field: u8, value: u8| [16, entry, field, value];
        join(&[
            &[flags | LOG, 4, 0],
            READ,
            IN,
            POP,
            &changes(0, 6, 5),
            &changes(1, 2, 5),
            GIVE_BACK,
            TABLE_IN,
            POP,
            &changes(0, 128 + 8 + 16, 4),
            IN,
            POP,
            &changes(0, 0, 1),
            GIVE_BACK,
            GIVE_BACK,
            AGAIN,
            IN,
            POP,
            GIVE_BACK,
        ])
    };
    // Memory that goes away while a request is under way, and comes back as something else.
    let shrinks = |flags: u8| {
        join(&[
            &[flags | LOG, 4, 0],
            READ,
            IN,
            POP,
            &[17, 0, 1],
            IN,
            POP,
            GIVE_BACK,
            &[17, 1, 0],
            TABLE_IN,
            PLAIN,
            GIVE_BACK,
            &[17, 0, 0],
            POP,
            AGAIN,
        ])
    };
    // One file as two regions: data lies on rings.
    let aliased = |flags: u8| join(&[&[flags, 4], &[18, 1, 0], READ, IN, POP, OUT, POP, GIVE_BACK, GIVE_BACK, AGAIN]);
    // A front-end's log that gets shorter.
    let log_shrinks = |flags: u8| {
        let file = join(&[&state, &entries]);
        join(&[
            &[flags | LOG, 0, 1 + file.len() as u8 / 2 / 2 * 2],
            &file,
            &[0; 2],
            &[1, 0, 1],
            READ,
            IN,
            POP,
            &[19, 0],
            GIVE_BACK,
            AGAIN,
        ])
    };
    // A used ring of one place, which would end behind its region.
    let at_the_end = join(&[&[INDIRECT | PLACES, 2, 4, 5, 7], READ, IN, POP, GIVE_BACK]);
    vec![
        ("split", load(INDIRECT)),
        ("packed", load(INDIRECT | PACKED)),
        ("split-event-index", load(INDIRECT | 2)),
        ("packed-event-index", load(INDIRECT | PACKED | 2)),
        ("split-4096-byte-blocks", load(INDIRECT | 128)),
        ("packed-read-only", load(INDIRECT | PACKED | 64)),
        ("split-others", others(INDIRECT)),
        ("packed-others", others(INDIRECT | PACKED)),
        ("split-death", death(INDIRECT)),
        ("packed-death", death(INDIRECT | PACKED)),
        ("split-foreign-log", foreign(0)),
        ("packed-foreign-log", foreign(PACKED)),
        ("split-loop", loops(0)),
        ("packed-loop", loops(PACKED)),
        ("split-outside", outside(0)),
        ("packed-outside", outside(PACKED)),
        ("split-at-the-end", at_the_end),
        ("split-log-changes", log_changes(INDIRECT)),
        ("packed-log-changes", log_changes(INDIRECT | PACKED)),
        ("split-memory-shrinks", shrinks(INDIRECT)),
        ("packed-memory-shrinks", shrinks(INDIRECT | PACKED)),
        ("split-one-file", aliased(INDIRECT)),
        ("packed-one-file", aliased(INDIRECT | PACKED)),
        ("split-log-shrinks", log_shrinks(0)),
        ("packed-log-shrinks", log_shrinks(PACKED)),
    ]
}

/// Seeds of [`crate::session`].
pub fn session() -> Seeds {
    const HELLO: &[u8] = &[3, 0, 16, 3, 2, 0];
    const HELLO_PACKED: &[u8] = &[3, 0, 16, 3, 2, 1];
    const ACKNOWLEDGE: &[u8] = &[4, 1];
    const MEMORY: &[u8] = &[5, 0];
    const MORE_MEMORY: &[u8] = &[5, 3];
    const TABLE: &[u8] = &[5, 7];
    const REMOVE: &[u8] = &[5, 4];
    const READ: &[u8] = &[12, 0, 64, 0, 0, 0];
    const WRITE: &[u8] = &[12, 1, 64 + 6, 0, 0, 1];
    const START: &[u8] = &[18, 0];
    const START_SECOND: &[u8] = &[18, 1];
    const BASE: &[u8] = &[9, 0];
    const CONFIG: &[u8] = &[10, 0, 0, 0, 0, 0];
    const WRITE_THROUGH: &[u8] = &[10, 1, 1, 0, 0, 1];
    const RESET: &[u8] = &[17];
    const GET_LOG: &[u8] = &[11, 0, 0, 0, 1, 0];
    const SET_LOG: &[u8] = &[11, 5, 1, 0, 1, 0];
    let old_log = join(&[&[11, 2, 1, 0, 0, 0], &[1; 52]]);
    // Beside the session: a pause, a change of the log, of the guest's memory, their lengths, an eventfd.
    let pause = |time: u8| [20, 6, time];
    let write = |log: u8, base: u8, at: u8| join(&[&[20, log, base, at], &[0xff; 8]]);
    let shorten = |log: u8, bytes: u8| [20, 3 | log, bytes];
    let event = |full: u8, count: u8| [20, 4 | full | 16, count];
    const LOG: u8 = 8;
    const SHARED_EVENTS: &[u8] = &[23, 0];
    const FULL_EVENTS: &[u8] = &[23, 1];
    let log_changes = |hello: &[u8]| {
        let beside = join(&[&pause(50), &write(LOG, 1, 0), &write(LOG, 2, 0), &pause(20), &write(LOG, 3, 4)]);
        join(&[hello, ACKNOWLEDGE, &old_log, MEMORY, READ, START, &beside, &[4, 1], BASE])
    };
    let shrinks = |hello: &[u8]| {
        let beside = join(&[&pause(30), &shorten(0, 1), &pause(30), &shorten(LOG, 0), &pause(30), &shorten(0, 0)]);
        join(&[hello, ACKNOWLEDGE, &old_log, MEMORY, READ, START, START_SECOND, &beside, CONFIG, BASE, RESET])
    };
    let shares = |hello: &[u8], events: &[u8]| {
        let beside = join(&[&pause(20), &event(0, 2), &event(LOG, 2), &pause(20), &event(0, 1)]);
        join(&[hello, ACKNOWLEDGE, MEMORY, READ, START, START_SECOND, events, &beside, BASE, &[9, 1]])
    };
    vec![
        ("log-changes", log_changes(HELLO)),
        ("log-changes-packed", log_changes(HELLO_PACKED)),
        ("memory-shrinks", shrinks(HELLO)),
        ("memory-shrinks-packed", shrinks(HELLO_PACKED)),
        ("events-shared", shares(HELLO, SHARED_EVENTS)),
        ("events-full", shares(HELLO_PACKED, FULL_EVENTS)),
        (
            "one-file",
            join(&[HELLO, ACKNOWLEDGE, MEMORY, &[22, 0, 0, 0], READ, START, &[22, 1, 1, 1], START_SECOND, BASE]),
        ),
        ("split", join(&[HELLO, ACKNOWLEDGE, CONFIG, MEMORY, READ, START, WRITE, START_SECOND, BASE])),
        ("packed", join(&[HELLO_PACKED, ACKNOWLEDGE, CONFIG, MEMORY, READ, START, BASE])),
        ("in-any-order", join(&[HELLO, START, READ, MEMORY, HELLO, START_SECOND, BASE, RESET, START])),
        ("anew", join(&[HELLO, MEMORY, READ, START, BASE, HELLO, MEMORY, MORE_MEMORY, READ, START, WRITE, BASE])),
        (
            "memory",
            join(&[HELLO, ACKNOWLEDGE, MEMORY, READ, START, MORE_MEMORY, REMOVE, MEMORY, TABLE, &[5, 5], &[5, 6]]),
        ),
        ("write-through", join(&[HELLO, ACKNOWLEDGE, MEMORY, WRITE, START, WRITE_THROUGH, CONFIG, RESET])),
        ("log", join(&[HELLO, ACKNOWLEDGE, GET_LOG, SET_LOG, MEMORY, READ, START, BASE])),
        ("old-log", join(&[HELLO, ACKNOWLEDGE, &old_log, MEMORY, READ, START, BASE])),
        ("old-log-packed", join(&[HELLO_PACKED, ACKNOWLEDGE, &old_log, MEMORY, READ, START, BASE])),
        ("cut-short", join(&[HELLO, MEMORY, START, &[15, 5], BASE, MEMORY])),
        ("lies", join(&[HELLO, ACKNOWLEDGE, &[0, 5, 1, 131, 0, 3, 4], &[255; 32], &[0, 38, 1, 2, 5, 6, 0]])),
        (
            "wrong-descriptors",
            join(&[HELLO, ACKNOWLEDGE, &[5, 64, 5], &[5, 64, 6], &[8, 0, 3, 0, 8, 0, 0, 0], MEMORY, START]),
        ),
        (
            "not-a-message",
            join(&[&[1, 24], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]]),
        ),
    ]
}

/// Seeds of [`crate::completions`].
pub fn completions() -> Seeds {
    const READ: &[u8] = &[0, 0, 0, 0, 0];
    const LONG_WRITE: &[u8] = &[0, 2 + 192, 1, 3, 0];
    const DISCARD: &[u8] = &[0, 4 + 64, 1, 0, 0];
    const ZEROES: &[u8] = &[0, 5, 1, 2, 0];
    const RING: &[u8] = &[4];
    const ANSWER: &[u8] = &[5, 0, 0];
    const ANSWER_LAST: &[u8] = &[5, 255, 0];
    const AGAIN: &[u8] = &[5, 0, 2];
    const REFUSE: &[u8] = &[5, 0, 1, 0x81, 0x02];
    const REAP: &[u8] = &[8];
    const RESET: &[u8] = &[11];
    let load = |settings: u8| {
        join(&[
            &[settings, 0],
            READ,
            READ,
            RING,
            ANSWER,
            REAP,
            READ,
            RING,
            ANSWER_LAST,
            ANSWER,
            REAP,
            LONG_WRITE,
            RING,
            ANSWER,
            ANSWER,
            ANSWER,
            REAP,
            ANSWER,
            ANSWER,
            REAP,
            DISCARD,
            ZEROES,
            RING,
            ANSWER,
            REFUSE,
            REAP,
            RESET,
            READ,
            RING,
            ANSWER,
            REAP,
        ])
    };
    let asking: Vec<u8> = (0..9).flat_map(|what| [12, what, 1, 0, 1, 0]).collect();
    let wrong = join(&[
        &[0, 0],
        READ,
        READ,
        RING,
        AGAIN,
        AGAIN,
        REAP,
        &[5, 0, 4, 9, 0],
        &[5, 1, 8, 1, 0],
        &[5, 200, 0],
        REAP,
        &[7, 0],
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0],
        REAP,
        &[10, 20],
        &[10, 40],
        RESET,
        REAP,
    ]);
    let events = join(&[&[0, 0], &[15, 0], &[12, 5], &[15, 1], &[15, 2], &[12, 5], &[15, 3], &[12, 5]]);
    // The drive changes its mind: other structures, other answers.
    let patched = |page: u8, at: u16, bytes: &[u8]| {
        let at = at.to_le_bytes();
        join(&[
            &[0, 1, 0, page, at[0], at[1], bytes.len() as u8],
            bytes,
            READ,
            LONG_WRITE,
            RING,
            ANSWER,
            ANSWER,
            REAP,
            &asking,
        ])
    };
    let manners = |bytes: &[u8]| join(&[&[0, 1, 3, bytes.len() as u8], bytes, READ, RING, ANSWER, REAP, &asking]);
    vec![
        ("load", load(0)),
        ("load-3-entries", load(2)),
        ("load-64-entries", load(3)),
        ("asking", join(&[&[0, 0], &asking])),
        ("wrong-answers", wrong),
        ("events", events),
        ("no-sgl", patched(0, 536, &[0, 0, 0, 0])),
        ("shadow-doorbells", patched(0, 256, &[0, 1])),
        ("no-transfer-limit", patched(0, 77, &[0])),
        ("block-size-4096", patched(1, 130, &[12])),
        ("boundary", patched(1, 46, &[8, 0])),
        ("namespace-list", patched(2, 0, &[2, 0, 0, 0, 1, 0, 0, 0])),
        ("descriptors", patched(3, 0, &[2, 16, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9, 200, 0, 0])),
        ("refusals", manners(&[0, 128, 2, 0, 129, 0x81])),
        ("wrong-ids", manners(&[190, 210, 230, 0, 0, 230, 190])),
    ]
}
