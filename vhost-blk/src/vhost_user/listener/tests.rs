use std::os::fd::AsRawFd;

use super::*;

fn at(path: &Path) -> Listen {
    Listen::Path(path.into())
}

/// Waits for nobody.
fn open(path: &Path) -> Result<Listener, ListenError> {
    Listener::open_by(&at(path), Instant::now())
}

#[test]
fn the_socket_file_goes_with_the_listener() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = Listener::open(&at(&path)).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "the standard library leaves the file");
    let _listener = Listener::open(&at(&path)).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_in_use_is_refused_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _first = Listener::open(&at(&path)).unwrap();
    let name = path.display();
    assert_eq!(
        open(&path).unwrap_err().to_string(),
        format!("cannot listen on {name}: another process does already; stop it or choose another path")
    );
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_too_busy_to_answer_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let (busy, address) = (socket(), SocketAddrUnix::new(&path).unwrap());
    rustix::net::bind(&busy, &address).unwrap();
    rustix::net::listen(&busy, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let front = socket();
        if rustix::net::connect(&front, &address) == Err(Errno::AGAIN) {
            break;
        }
        waiting.push(front);
    }
    let (result, end) = std::sync::mpsc::channel();
    let listen = path.clone();
    std::thread::spawn(move || result.send(open(&listen).err()));
    let error = end.recv_timeout(Duration::from_secs(10)).expect("it waits for the busy one");
    assert!(error.is_some_and(|error| matches!(error, ListenError::InUse { .. })));
    assert!(path.exists());
}

#[test]
fn a_socket_of_another_kind_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let error = Listener::open(&at(&path)).unwrap_err().to_string();
    assert!(error.contains("cannot find out") && error.contains("another path"), "{error}");
    assert!(path.exists());
}

#[test]
fn a_directory_locked_for_ever_does_not_hang_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let held = lock_directory(&path, Duration::ZERO).unwrap();
    let error = lock_directory(&path, Duration::from_millis(20)).unwrap_err().to_string();
    assert!(error.contains("locked"), "{error}");
    drop(held);
    lock_directory(&path, Duration::ZERO).unwrap();
}

/// Connects to `path`; is it this listener that answers?
fn answers(path: &Path, listener: &UnixListener) -> bool {
    use std::io::{Read, Write};
    static TOKENS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let token = TOKENS.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_ne_bytes();
    let Ok(mut front) = UnixStream::connect(path) else { return false };
    front.write_all(&token).unwrap();
    // Those who looked whether the socket is in use come first, and have nothing to say.
    while let Ok((mut stream, _)) = listener.accept() {
        let mut bytes = [0; 8];
        stream.set_nonblocking(true).unwrap();
        if stream.read(&mut bytes).is_ok_and(|length| length == 8) && bytes == token {
            return true;
        }
    }
    false
}

/// Runs `turn` on two threads, as many times; both begin each turn at the same moment.
fn two_at_once(turns: u32, turn: impl Fn(u32, u32) + Sync) {
    use std::sync::atomic::{AtomicU32, Ordering};
    let arrived = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (turn, arrived) = (&turn, &arrived);
            scope.spawn(move || {
                for number in 0..turns {
                    arrived.fetch_add(1, Ordering::AcqRel);
                    let deadline = Instant::now() + Duration::from_secs(20);
                    while arrived.load(Ordering::Acquire) < (number + 1) * 2 {
                        assert!(Instant::now() < deadline, "the other thread does not come");
                        std::thread::yield_now();
                    }
                    turn(number, thread);
                }
            });
        }
    });
}

#[test]
fn of_two_that_start_at_once_one_wins() {
    const TURNS: u32 = 2000;
    let directory = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..TURNS).map(|turn| directory.path().join(turn.to_string())).collect();
    // Half of them find a stale socket.
    paths.iter().step_by(2).for_each(|path| drop(UnixListener::bind(path).unwrap()));
    let results = std::sync::Mutex::new(vec![Vec::new(); TURNS as usize]);
    let listeners = std::sync::Mutex::new(Vec::new());
    two_at_once(TURNS, |turn, _| {
        let result = open(&paths[turn as usize]);
        results.lock().unwrap()[turn as usize].push(result.as_ref().err().map(ToString::to_string));
        let mut listeners = listeners.lock().unwrap();
        // Those of the last turns go on listening.
        let enough = listeners.len().saturating_sub(64);
        listeners.drain(..enough);
        listeners.extend(result);
    });
    for (turn, results) in results.into_inner().unwrap().iter().enumerate() {
        let refused: Vec<&String> = results.iter().flatten().collect();
        assert_eq!((results.len(), refused.len()), (2, 1), "turn {turn}: {results:?}");
        assert!(refused[0].contains("another process does already"), "{refused:?}");
    }
}

/// Targets that start, end and die on one path: whoever was told that it listens is reached as long as it lives.
#[test]
fn nobody_removes_the_socket_of_one_that_lives() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(std::process::id);
    println!("seed {seed}");
    two_at_once(2000, |turn, thread| {
        let random = (seed ^ (turn * 2 + thread)).wrapping_mul(0x9e37_79b9) >> 16;
        let (bound, socket) = match open(&path) {
            Ok(Listener::Listening(bound, socket)) => (bound, socket),
            Ok(other) => panic!("{other:?}"),
            Err(error) => return assert!(matches!(error, ListenError::InUse { .. }), "{error}"),
        };
        for look in 0..1 + random % 4 {
            assert!(answers(&path, &socket), "seed {seed}, turn {turn}, look {look}: another one answers");
        }
        match random & 16 {
            // Killed: the file stays.
            0 => std::mem::forget(bound),
            _ => drop(bound),
        }
        drop(socket);
    });
}

#[test]
fn another_file_is_never_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    std::fs::write(&path, "precious").unwrap();
    let name = path.display();
    assert_eq!(
        Listener::open(&at(&path)).unwrap_err().to_string(),
        format!("cannot listen on {name}: a file that is no socket is there; choose another path")
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn someone_elses_socket_is_not_removed_on_drop() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let ours = Listener::open(&at(&path)).unwrap();
    std::fs::rename(&path, directory.path().join("moved")).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    drop(ours);
    assert!(path.exists());
}

#[test]
fn directories_that_are_not_there_and_long_paths() {
    assert_eq!(
        Listener::open(&at(Path::new("/nowhere/s"))).unwrap_err().to_string(),
        "cannot listen on /nowhere/s: its directory does not exist; create it first"
    );
    let long = format!("/tmp/{}", "x".repeat(200));
    let error = Listener::open(&at(Path::new(&long))).unwrap_err().to_string();
    assert!(error.ends_with("use a shorter path"), "{error}");
}

#[test]
fn inherited_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let listening = UnixListener::bind(directory.path().join("s")).unwrap();
    assert!(matches!(Listener::open(&Listen::Fd(listening.as_raw_fd())), Ok(Listener::Listening(None, _))));
    let (one, _other) = UnixStream::pair().unwrap();
    assert!(matches!(Listener::open(&Listen::Fd(one.as_raw_fd())), Ok(Listener::Connected(_))));

    let error = Listener::open(&Listen::Fd(9999)).unwrap_err().to_string();
    assert!(error.starts_with("--fd 9999 cannot be used: ") && error.contains("Bad file descriptor"), "{error}");
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(Listener::open(&Listen::Fd(file.as_raw_fd())).is_err());
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    assert!(Listener::open(&Listen::Fd(datagram.as_raw_fd())).is_err());
}

/// Those that are going: one that ends as it should, and one that is killed.
#[test]
fn one_that_is_going_is_waited_for() {
    for killed in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let Listener::Listening(Some(file), first) = open(&path).unwrap() else { panic!("it has a file") };
        let going = std::thread::spawn(move || {
            // Until somebody has looked.
            let deadline = Instant::now() + Duration::from_secs(20);
            while first.accept().is_err() {
                assert!(Instant::now() < deadline, "nobody looks");
                std::thread::sleep(Duration::from_millis(1));
            }
            if killed {
                file.forget();
            }
        });
        let Listener::Listening(_file, second) = Listener::open(&at(&path)).unwrap() else { panic!("it has a file") };
        going.join().unwrap();
        assert!(answers(&path, &second));
    }
}

fn served(path: &Path) -> ServedSocket {
    match open(path) {
        Ok(Listener::Listening(file, socket)) => ServedSocket::new(file, socket),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_was_removed_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut socket = served(&path);
    for stale in [false, true, false] {
        socket.look_after("disk");
        assert!(answers(&path, socket.socket()), "nothing was wrong");
        std::fs::remove_file(&path).unwrap();
        if stale {
            drop(UnixListener::bind(&path).unwrap());
        }
        assert!(!answers(&path, socket.socket()));
        socket.look_after("disk");
        assert!(answers(&path, socket.socket()), "stale: {stale}");
        assert_eq!(socket.told, None);
    }
    // It is ours as the first one was.
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn what_has_taken_the_place_of_a_file_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut socket = served(&path);
    let told = |socket: &ServedSocket, why: &str| socket.told.as_ref().is_some_and(|told| told.contains(why));
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    other.set_nonblocking(true).unwrap();
    socket.look_after("disk");
    assert!(told(&socket, "another process does already"), "{:?}", socket.told);
    assert!(answers(&path, &other), "it is not stolen");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    socket.look_after("disk");
    assert!(told(&socket, "a file that is no socket is there"), "{:?}", socket.told);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    // The directory itself.
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_dir(directory.path()).unwrap();
    socket.look_after("disk");
    assert!(told(&socket, "its directory does not exist"), "{:?}", socket.told);
    // When the place is free it is taken.
    std::fs::create_dir(directory.path()).unwrap();
    socket.look_after("disk");
    assert!(answers(&path, socket.socket()) && socket.told.is_none());
}

#[test]
fn a_file_that_is_not_ours_is_told_of_and_left_to_its_owner() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let handed = UnixListener::bind(&path).unwrap();
    handed.set_nonblocking(true).unwrap();
    let mut socket = ServedSocket::new(None, handed);
    socket.look_after("disk");
    assert_eq!(socket.told, None);
    std::fs::rename(&path, directory.path().join("moved")).unwrap();
    socket.look_after("disk");
    assert!(socket.told.as_ref().is_some_and(|told| told.contains("the socket file is gone")));
    assert!(!path.exists());
    std::fs::rename(directory.path().join("moved"), &path).unwrap();
    socket.look_after("disk");
    assert_eq!(socket.told, None);
    drop(socket);
    assert!(path.exists());
}
