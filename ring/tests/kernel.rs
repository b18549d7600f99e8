//! The reactor on the real kernel: transfers, streams, time, offload, wake-ups, shutdown.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockferry_ring::{Completer, Config, Errno, Keep, OffloadMode, OpenHow, Ring, SocketAddress};

fn ring() -> Ring {
    Ring::new(&Config::default()).unwrap()
}

/// Pieces of different lengths, read in one go: each has its bytes, also where the file ends within them.
#[test]
fn one_read_fills_many_buffers() {
    let scratch = Scratch::new("pieces");
    let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(scratch.path(), &bytes).unwrap();
    let path = scratch.path().to_owned();
    let ring = ring();
    let r = ring.clone();
    ring.block_on(async move {
        let file = r.open(&path, &OpenHow::default()).unwrap();
        let lens = [4096usize, 1, 65_536, 512, 30_000];
        for (offset, there) in [(0, 100_145), (777, 100_145), (150_000, 50_000)] {
            let mut bufs = Vec::new();
            for len in lens {
                bufs.push(r.alloc(len).await);
            }
            let (bufs, n) = r.read_pieces(&file, offset as u64, bufs).await;
            assert_eq!(n, Ok(there as u32));
            let read: Vec<u8> = bufs.iter().flat_map(|buf| buf.as_slice().to_vec()).collect();
            assert_eq!(bufs.iter().map(|buf| buf.len()).collect::<Vec<_>>(), lens);
            assert!(read[..there] == bytes[offset..offset + there], "at {offset}");
        }
    });
    // Where it came short it was asked once more, and that was the end of the file.
    assert_eq!(ring.stats().operations.get(), 4);
}

/// A path that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("blockferry-ring-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Scratch(path)
    }
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn writes_come_back_and_are_fixed() {
    let scratch = Scratch::new("rw");
    let path = scratch.path().to_owned();
    let ring = ring();
    let r = ring.clone();
    ring.block_on(async move {
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let file = r.open(&path, &how).unwrap();
        for i in 0..64u64 {
            let mut buf = r.alloc(65_536).await;
            buf.as_mut_slice().fill(i as u8);
            assert_eq!(r.write(&file, i * 65_536, buf.freeze(), false).await, Ok(65_536));
        }
        r.sync(&file, false).await.unwrap();
        for i in 0..64u64 {
            let (buf, n) = r.read(&file, i * 65_536, r.alloc(65_536).await).await;
            assert_eq!(n, Ok(65_536));
            assert!(buf.as_slice().iter().all(|&b| b == i as u8));
        }
        // At the end of the file a read is short, and that is the result.
        let (_, n) = r.read(&file, 64 * 65_536 - 100, r.alloc(4096).await).await;
        assert_eq!(n, Ok(100));
    });
    let stats = ring.stats().snapshot();
    assert_eq!(stats.transfers_plain, 0, "{stats:?}");
    assert!(stats.transfers_fixed >= 129 && stats.stale_completions == 0);
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}

#[test]
fn the_end_is_not_slept_through() {
    let ring = ring();
    let start = Instant::now();
    let r = ring.clone();
    for _ in 0..4 {
        ring.block_on(std::future::ready(()));
        let r = r.clone();
        ring.block_on(async move { r.sleep(1_000_000).await });
    }
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
}

#[test]
fn streams_echo() {
    let scratch = Scratch::new("sock");
    let address = SocketAddress::Unix(scratch.path().to_owned());
    let ring = ring();
    let r = ring.clone();
    ring.block_on(async move {
        let (listener, _) = r.listen(&address).unwrap();
        let server = r.clone();
        r.spawn(async move {
            let stream = server.accept(&listener).await.unwrap();
            loop {
                let (mut buf, n) = server.recv(&stream, server.alloc(4096).await).await;
                let n = n.unwrap() as usize;
                if n == 0 {
                    break;
                }
                buf.truncate(n);
                server.send(&stream, buf.freeze()).await.unwrap();
            }
        });
        let stream = r.connect(&address).unwrap();
        let pieces: Vec<_> = {
            let mut pieces = Vec::new();
            for i in 0..8u8 {
                let mut buf = r.alloc(10_000).await;
                buf.as_mut_slice().fill(i);
                pieces.push(buf.freeze());
            }
            pieces
        };
        let sender = r.send_pieces(&stream, pieces);
        let receiver = async {
            let (buf, n) = r.recv_all(&stream, r.alloc(80_000).await).await;
            assert_eq!(n, Ok(80_000));
            assert!(buf.as_slice().iter().enumerate().all(|(i, &b)| b as usize == i / 10_000));
        };
        let (sent, ()) = blockferry_ring::sync::join(sender, receiver).await;
        assert_eq!(sent, Ok(80_000));
    });
}

#[test]
fn time_offload_and_wakes() {
    let ring = ring();
    let r = ring.clone();
    let began = Instant::now();
    ring.block_on(async move {
        r.sleep(20_000_000).await;
        assert_eq!(r.offload(|| 6 * 7).await, Ok(42));
        // A future from elsewhere: woken by another thread.
        let done = std::sync::Arc::new(std::sync::Mutex::new((false, None::<std::task::Waker>)));
        let theirs = done.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            let mut state = theirs.lock().unwrap();
            state.0 = true;
            if let Some(waker) = state.1.take() {
                waker.wake();
            }
        });
        std::future::poll_fn(|cx| {
            let mut state = done.lock().unwrap();
            if state.0 {
                return std::task::Poll::Ready(());
            }
            state.1 = Some(cx.waker().clone());
            std::task::Poll::Pending
        })
        .await;
    });
    assert!(began.elapsed() >= Duration::from_millis(25));
    assert_eq!(ring.stats().snapshot().backstops, 0);
}

#[test]
fn inline_offload_starts_no_thread() {
    let config = Config { offload: OffloadMode::Inline, ..Config::default() };
    let ring = Ring::new(&config).unwrap();
    let me = std::thread::current().id();
    let r = ring.clone();
    let there = ring.block_on(async move { r.offload(|| std::thread::current().id()).await });
    assert_eq!(there, Ok(me));
}

#[test]
fn memory_of_an_orphan_is_not_used_again_before_its_end() {
    let scratch = Scratch::new("orphan");
    let address = SocketAddress::Unix(scratch.path().to_owned());
    let config = Config { arena_bytes: 1 << 20, ..Config::default() };
    let ring = Ring::new(&config).unwrap();
    let r = ring.clone();
    ring.block_on(async move {
        let (listener, _) = r.listen(&address).unwrap();
        let client = r.connect(&address).unwrap();
        let server = r.accept(&listener).await.unwrap();
        // A receive that cannot end holds the whole arena; dropping its future gives nothing back yet.
        let receive = r.recv(&server, r.alloc(1 << 20).await);
        r.sleep(1_000_000).await;
        drop(receive);
        assert!(r.arena().try_alloc(4096).is_none());
        // The cancel that the drop asked for ends it, and then the memory is there again.
        let buf = r.alloc(4096).await;
        drop((buf, client));
    });
    assert_eq!(ring.arena().bytes_used(), 0);
}

#[test]
fn restricted_rings_work() {
    let scratch = Scratch::new("restricted");
    let path = scratch.path().to_owned();
    let config = Config { restrict: true, ..Config::default() };
    let ring = Ring::new(&config).unwrap();
    assert!(ring.describe().iter().any(|line| line.contains("restricted")));
    let r = ring.clone();
    ring.block_on(async move {
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let file = r.open(&path, &how).unwrap();
        let buf = r.alloc(4096).await;
        assert_eq!(r.write(&file, 0, buf.freeze(), true).await, Ok(4096));
        assert_eq!(r.offload(|| 1).await, Ok(1));
    });
}

/// Sleeps in `poll` on the ring's fd; whether it was readable, and for how long it slept.
fn poll_fd(ring: &Ring, timeout: Duration) -> (bool, Duration) {
    let began = Instant::now();
    let readable = ring.with_fd(|fd| {
        let fd = fd.unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let timeout = rustix::time::Timespec::try_from(timeout).unwrap();
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
    });
    (readable, began.elapsed())
}

/// Turns whenever the fd says so, until `done`.
fn turn_by_fd(ring: &Ring, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "the work never ended");
        let turn = ring.turn();
        if !turn.more_work && !done() {
            let (readable, slept) = poll_fd(ring, Duration::from_secs(10));
            assert!(readable, "there was work, and the fd slept through it for {slept:?}");
        }
    }
}

#[test]
fn the_fd_wakes_a_poller_that_sleeps_already() {
    let ring = ring();
    let r = ring.clone();
    let scratch = Scratch::new("fd");
    let path = scratch.path().to_owned();
    let (listener, _) = ring.listen(&SocketAddress::Unix(path.clone())).unwrap();
    let accepted = ring.spawn_with_result(async move { r.accept(&listener).await.map(drop) });
    let client = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        std::os::unix::net::UnixStream::connect(path).unwrap()
    });
    let mut result = None;
    turn_by_fd(&ring, || {
        result = result.or_else(|| accepted.try_take());
        result.is_some()
    });
    assert_eq!(result, Some(Ok(())));
    drop(client.join().unwrap());

    // A disk operation, and another thread.
    let file = Scratch::new("fd-file");
    let how = OpenHow { write: true, direct: true, create_new: true, ..OpenHow::default() };
    let opened = ring.open(file.path(), &how).unwrap();
    let r = ring.clone();
    let written = ring.spawn_with_result(async move {
        let buf = r.alloc(65_536).await;
        r.write(&opened, 0, buf.freeze(), false).await
    });
    let mut result = None;
    turn_by_fd(&ring, || {
        result = result.or_else(|| written.try_take());
        result.is_some()
    });
    assert_eq!(result, Some(Ok(65_536)));
    while ring.turn().more_work {}
    let waker = ring.remote_waker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        waker.wake();
    });
    assert!(poll_fd(&ring, Duration::from_secs(10)).0);
    thread.join().unwrap();
}

#[test]
fn errors_have_their_number() {
    let ring = ring();
    assert_eq!(ring.open(Path::new("/nonexistent/x"), &OpenHow::default()).map(drop), Err(Errno::ENOENT));
    let missing = SocketAddress::Unix("/nonexistent/sock".into());
    assert_eq!(ring.connect(&missing).map(drop), Err(Errno::ENOENT));
}

#[test]
fn a_range_is_copied_without_being_read() {
    use blockferry_ring::{CopyHow, CopyRange};
    let (one, other) = (Scratch::new("copy-from"), Scratch::new("copy-to"));
    std::fs::write(one.path(), [7; 8192]).unwrap();
    std::fs::write(other.path(), [1; 16_384]).unwrap();
    let (from, to) = (one.path().to_owned(), other.path().to_owned());
    let ring = ring();
    let r = ring.clone();
    ring.block_on(async move {
        let (source, how) = (r.open(&from, &OpenHow::default()).unwrap(), CopyHow::Offload);
        let target = r.open(&to, &OpenHow { write: true, ..OpenHow::default() }).unwrap();
        let range = CopyRange { from_offset: 4096, to_offset: 8192, len: 4096 };
        assert_eq!(r.copy_range(&source, &target, range, how).await, Ok(4096));
        // The file that is read ends before the range does.
        let range = CopyRange { len: 8192, to_offset: 0, ..range };
        assert_eq!(r.copy_range(&source, &target, range, how).await, Ok(4096));
        let mut wanted = vec![1; 16_384];
        wanted[..4096].fill(7);
        wanted[8192..12_288].fill(7);
        assert!(std::fs::read(&to).unwrap() == wanted);
        // Who may not write may not copy either.
        let refused = r.copy_range(&target, &source, range, how).await;
        assert_eq!(refused, Err(Errno::EBADF));
        // Blocks are shared whole, or not at all, or nowhere on this filesystem.
        let range = CopyRange { from_offset: 1, to_offset: 1, len: 10 };
        assert!(r.copy_range(&source, &target, range, CopyHow::Reflink).await.is_err());
        assert!(std::fs::read(&to).unwrap() == wanted);
    });
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}

#[test]
fn more_calls_than_the_pool_queues_wait_for_room() {
    let ring = ring();
    let calls: Vec<_> = (0..2000u32)
        .map(|n| {
            let r = ring.clone();
            ring.spawn_with_result(async move { r.offload(move || n + 1).await })
        })
        .collect();
    ring.block_on(async move {
        for (n, call) in (0u32..).zip(calls) {
            assert_eq!(call.take().await, Ok(n + 1));
        }
    });
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}

/// What is to be ended, and how.
type Call = (Completer, Result<u32, Errno>);

/// A library with a thread of its own, which ends what it was given in reverse order, a few at a time.
fn library() -> (std::sync::mpsc::Sender<Call>, std::thread::JoinHandle<()>) {
    let (sender, calls) = std::sync::mpsc::channel::<Call>();
    let thread = std::thread::spawn(move || {
        while let Ok(first) = calls.recv() {
            let mut some: Vec<_> = std::iter::once(first).chain(calls.try_iter().take(6)).collect();
            while let Some((completer, result)) = some.pop() {
                completer.complete(result);
            }
        }
    });
    (sender, thread)
}

#[test]
fn what_others_carry_out_comes_back_from_their_threads() {
    let ring = ring();
    let (calls, thread) = library();
    let keep: Keep = std::sync::Arc::new("something that has to live");
    let tasks: Vec<_> = (0..2000u32)
        .map(|n| {
            let (r, calls, keep) = (ring.clone(), calls.clone(), keep.clone());
            ring.spawn_with_result(async move {
                let result = if n % 10 == 9 { Err(Errno::ENOSPC) } else { Ok(n) };
                if n % 2 == 0 {
                    return r.external(keep, |completer| calls.send((completer, result)).unwrap()).await;
                }
                let buf = r.alloc(4096).await;
                let read = r.external_read(buf, keep, |mem, completer| {
                    assert_eq!(mem.len(), 4096);
                    calls.send((completer, result)).unwrap();
                });
                let (buf, result) = read.await;
                assert_eq!(buf.len(), 4096);
                result
            })
        })
        .collect();
    ring.block_on(async move {
        for (n, task) in (0u32..).zip(tasks) {
            let wanted = if n % 10 == 9 { Err(Errno::ENOSPC) } else { Ok(n) };
            assert_eq!(task.take().await, wanted);
        }
    });
    assert_eq!(ring.stats().snapshot().external, 2000);
    drop(calls);
    thread.join().unwrap();
    assert_eq!(std::sync::Arc::strong_count(&keep), 1, "nothing is kept for longer");
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}

#[test]
fn memory_of_others_work_is_kept_until_they_end_it_whatever_becomes_of_its_owner() {
    let ring = ring();
    let keep: Keep = std::sync::Arc::new(());
    let held = std::rc::Rc::new(std::cell::RefCell::new(None));
    let (r, k, h) = (ring.clone(), keep.clone(), held.clone());
    let used = ring.block_on(async move {
        let buf = r.alloc(65_536).await;
        let used = r.arena().bytes_used();
        drop(r.external_read(buf, k, |_, completer| drop(h.replace(Some(completer)))));
        r.yield_now().await;
        used
    });
    assert!(used >= 65_536 && ring.arena().bytes_used() == used, "the memory is not free");
    assert_eq!(std::sync::Arc::strong_count(&keep), 2);
    // Whoever drops the right to end it has ended it.
    drop(held.take());
    let _ = ring.turn();
    assert_eq!((ring.arena().bytes_used(), std::sync::Arc::strong_count(&keep)), (0, 1));
    // At the end what never comes back is leaked, not freed.
    let (r, k, h) = (ring.clone(), keep.clone(), held.clone());
    ring.block_on(async move {
        let buf = r.alloc(4096).await.freeze();
        drop(r.external_write(buf, k, |_, completer| drop(h.replace(Some(completer)))));
    });
    assert_eq!(ring.shutdown(10_000_000).leaked, 1);
    assert_eq!(std::sync::Arc::strong_count(&keep), 2);
    drop(held.take());
}
