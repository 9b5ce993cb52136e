//! What a drive has lost with its write cache, and who is told.

use super::*;

#[test]
fn a_flush_fails_when_the_drive_has_lost_what_it_would_make_safe() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    let mut other = Ring::new(&region, 1, 0x20000);
    other.start(&front);
    other.check_io(32);
    // Flushed: nothing to tell. The flush of one ring is for all.
    ring.store(64, 1);
    assert_eq!(ring.flush(), 0);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 1));
    assert_eq!((ring.flush(), other.flush()), (0, 0));
    // Answered, and lost. Told once, to whoever asks first.
    ring.store(64, 2);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    assert!(ring.holds(64, 1));
    assert_eq!(other.flush(), IOERR);
    assert_eq!((ring.flush(), other.flush()), (0, 0));
    // A reset loses nothing.
    ring.store(64, 3);
    bench.fault(FaultAction::Fatal);
    assert!(ring.holds(64, 3));
    assert_eq!(ring.flush(), 0);
    // A flush that waits for the drive is no better than one that comes later.
    ring.store(64, 4);
    bench.simulator().remove();
    ring.submit(T_FLUSH, 0, (0, 0));
    bench.simulator().reinsert().unwrap();
    assert_eq!(ring.wait(), IOERR);
    assert_eq!(ring.flush(), 0);
    // Written through: nothing can be lost.
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    ring.store(64, 5);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 5));
    assert_eq!(ring.flush(), 0);
}

#[test]
fn no_ring_flushes_before_all_know_of_a_loss() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    let mut other = Ring::new(&region, 1, 0x20000);
    other.start(&front);
    // A drive that goes again and again is tried less and less often: more rounds take long.
    for round in 0..4 {
        // Now the one with the writes, now the one with the flush is told first that the drive is back.
        let (writer, flusher) = if round % 2 == 0 { (&mut other, &mut ring) } else { (&mut ring, &mut other) };
        writer.store(64, round);
        drop(bench.simulator.take());
        flusher.submit(T_FLUSH, 0, (0, 0));
        bench.put_back(Config { volatile_write_cache: true, ..Bench::config(bench.folder.path()) });
        assert_eq!(flusher.wait(), IOERR, "round {round}");
        assert_eq!((ring.flush(), other.flush()), (0, 0), "round {round}");
    }
}

#[test]
fn a_ring_that_stops_leaves_behind_what_a_flush_has_to_know() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    // Stopped and started.
    ring.store(64, 1);
    ring.stop(&front);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    ring.start(&front);
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // While the drive is away.
    ring.store(64, 2);
    bench.simulator().remove();
    ring.stop(&front);
    ring.start(&front);
    ring.submit(T_FLUSH, 0, (0, 0));
    bench.simulator().reinsert().unwrap();
    assert_eq!(ring.wait(), IOERR);
    assert_eq!(ring.flush(), 0);
    // Memory that is taken away stops all rings.
    let more = Region::new(16 * MIB, MIB);
    more.add(&front);
    ring.store(64, 3);
    front.accept(REM_MEM_REG, &more.single(), &[]);
    bench.simulator().power_cut().unwrap();
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // The front-end comes again.
    ring.store(64, 4);
    drop(front);
    bench.simulator().power_cut().unwrap();
    let front = bench.connect("a");
    region.add(&front);
    ring.start(&front);
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    // Nothing is told twice, and of what was flushed nothing.
    ring.store(64, 5);
    assert_eq!(ring.flush(), 0);
    ring.stop(&front);
    bench.simulator().power_cut().unwrap();
    ring.start(&front);
    assert_eq!(ring.flush(), 0);
}

#[test]
fn the_cache_is_not_said_to_be_written_through_when_it_was_lost() {
    let bench = Bench::with(Duration::from_secs(600), |config| config.volatile_write_cache = true);
    let region = Region::new(0, MIB);
    let (front, mut ring) = one_ring(&bench, &region);
    ring.store(64, 1);
    assert_eq!(ring.flush(), 0);
    ring.store(64, 2);
    assert!(bench.simulator().power_cut().unwrap() > 0, "nothing was lost");
    assert!(ring.holds(64, 1));
    for _ in 0..2 {
        front.refuse(SET_CONFIG, &config(32, &[0]), &[]);
        assert_eq!(front.config(32, 1), [1]);
    }
    // The guest has not been told before this.
    assert_eq!((ring.flush(), ring.flush()), (IOERR, 0));
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    // The switch is a flush: nothing was lost before it that is not told, and nothing can be after it.
    front.accept(SET_CONFIG, &config(32, &[1]), &[]);
    ring.store(64, 3);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    bench.simulator().power_cut().unwrap();
    assert!(ring.holds(64, 3));
    assert_eq!(ring.flush(), 0);
}
