//! The driver on a library that misbehaves: what a real GlusterFS cannot be made to do on demand.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use blockferry_ring::{Config, Errno, Ring, SharedBuf};

use super::fake::{FAKE, LEN, MADE};
use super::uri::{Image, Server};
use super::{GlusterNode, Logging, OpenHow};
use crate::block::{BlockError, Driver, Extent, Operation, Word, WriteFlags, ZeroFlags};

fn how(volume: &str, path: &str, hosts: &[&str]) -> OpenHow {
    let servers = hosts.iter().map(|host| Server::Tcp { host: (*host).into(), port: 24007 }).collect();
    OpenHow {
        image: Image { servers, volume: volume.into(), path: path.into() },
        logging: Logging::default(),
        read_only: false,
        create: false,
    }
}

async fn open(ring: &Ring, path: &str) -> Rc<GlusterNode> {
    GlusterNode::open_with(ring, how("v", path, &["h"]), Some(&FAKE)).await.expect("an image")
}

async fn filled(ring: &Ring, len: usize, byte: u8) -> SharedBuf {
    let mut buf = ring.alloc(len).await;
    buf.as_mut_slice().fill(byte);
    buf.freeze()
}

async fn read(ring: &Ring, node: &GlusterNode, offset: u64, len: usize) -> Result<Vec<u8>, BlockError> {
    let mut buf = ring.alloc(len).await;
    buf.as_mut_slice().fill(0x55);
    let (buf, result) = node.read(offset, buf).await;
    assert_eq!(buf.len(), len, "the buffer comes back whole");
    result.map(|()| buf.as_slice().to_vec())
}

/// Runs a test on a ring of its own; whatever was begun ends with it.
fn on_a_ring<F: Future<Output = ()> + 'static>(test: impl FnOnce(Ring) -> F) {
    let ring = Ring::new(&Config::default()).expect("a ring");
    ring.block_on(test(ring.clone()));
    assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
}

#[test]
fn reads_end_whole_or_with_zeroes_behind_the_end_or_with_an_error() {
    on_a_ring(|ring| async move {
        let good = open(&ring, "good").await;
        assert_eq!(read(&ring, &good, 0, 8192).await.unwrap(), [0xaa; 8192]);
        let early = open(&ring, "ends-early").await;
        let bytes = read(&ring, &early, 4096, 4096).await.unwrap();
        assert!(bytes[..904] == [0xaa; 904] && bytes[904..] == [0; 3192]);
        assert_eq!(read(&ring, &early, 8192, 4096).await.unwrap(), [0; 4096], "nothing came, all is zero");
        for (path, errno) in
            [("short-read", Errno::EIO), ("read-fails", Errno::ESTALE), ("not-started", Errno::ENOTCONN)]
        {
            let node = open(&ring, path).await;
            let error = read(&ring, &node, 4096, 4096).await.unwrap_err();
            assert_eq!(
                (error.operation, error.errno, error.place),
                (Operation::Read, errno, Some((4096, 4096)))
            );
            assert!(error.to_string().contains(&format!("gluster://h/v/{path}")), "{error}");
        }
    });
}

#[test]
fn a_write_that_did_not_write_all_is_no_success() {
    on_a_ring(|ring| async move {
        let good = open(&ring, "good").await;
        good.write(100, filled(&ring, 5000, 7).await, WriteFlags { fua: true }).await.unwrap();
        let bytes = read(&ring, &good, 0, 8192).await.unwrap();
        assert!(bytes[..100] == [0xaa; 100] && bytes[100..5100] == [7; 5000] && bytes[5100] == 0xaa);
        for path in ["short-write", "empty-write"] {
            let node = open(&ring, path).await;
            let error = node.write(0, filled(&ring, 4096, 7).await, WriteFlags::default()).await.unwrap_err();
            assert_eq!(error.errno, Errno::EIO, "{path}");
        }
    });
}

#[test]
fn after_a_flush_that_failed_nothing_goes_on() {
    on_a_ring(|ring| async move {
        let node = open(&ring, "flush-fails").await;
        node.write(0, filled(&ring, 4096, 7).await, WriteFlags::default()).await.unwrap();
        // Two at once: neither may claim success.
        let (first, second) = blockferry_ring::sync::join(node.flush(), node.flush()).await;
        assert_eq!(first.unwrap_err().errno, Errno::EIO);
        assert_eq!(second.unwrap_err().errno, Errno::EIO);
        // The library says that all is well by now.
        let error = node.flush().await.unwrap_err();
        assert!(error.to_string().contains("open it anew"), "{error}");
        let write = node.write(0, filled(&ring, 512, 1).await, WriteFlags::default()).await;
        let zero = node.write_zeroes(0, 4096, ZeroFlags::default()).await;
        let (discard, status) = (node.discard(0, 4096).await, node.block_status(0, 4096).await.map(drop));
        let read = read(&ring, &node, 0, 512).await.map(drop);
        for (what, result) in [write, zero, discard, status, read].into_iter().enumerate() {
            assert_eq!(result.unwrap_err().errno, Errno::EIO, "{what}");
        }
        // Another image on the same volume is none the worse for it.
        assert!(open(&ring, "good").await.flush().await.is_ok());
    });
}

#[test]
fn after_a_descriptor_went_bad_no_flush_succeeds() {
    on_a_ring(|ring| async move {
        let node = open(&ring, "goes-bad").await;
        node.write(0, filled(&ring, 4096, 7).await, WriteFlags::default()).await.unwrap();
        node.flush().await.unwrap();
        node.write(0, filled(&ring, 4096, 8).await, WriteFlags::default()).await.unwrap();
        assert_eq!(read(&ring, &node, 0, 4096).await.unwrap_err().errno, Errno::EBADFD);
        // The library would say that all is well.
        let error = node.flush().await.unwrap_err();
        assert!(error.errno == Errno::EIO && error.to_string().contains("open it anew"), "{error}");
        assert!(node.write(0, filled(&ring, 512, 1).await, WriteFlags::default()).await.is_err());
    });
}

#[test]
fn who_reads_goes_over_to_writing_and_back() {
    on_a_ring(|ring| async move {
        let open = async |path| {
            let how = OpenHow { read_only: true, ..how("v", path, &["h"]) };
            GlusterNode::open_with(&ring, how, Some(&FAKE)).await.expect("an image")
        };
        let write = async |node: &Rc<GlusterNode>| {
            let result = node.write(0, filled(&ring, 4096, 7).await, WriteFlags::default()).await;
            result.map_err(|error| error.errno)
        };
        let node = open("good").await;
        assert_eq!((node.is_read_only(), write(&node).await), (true, Err(Errno::EROFS)));
        node.reopen(false).expect("it can").await.unwrap();
        assert!(!node.is_read_only() && node.capabilities().discard);
        write(&node).await.unwrap();
        assert_eq!(read(&ring, &node, 0, 4096).await.unwrap(), [7; 4096]);
        node.reopen(true).expect("it can").await.unwrap();
        assert_eq!((node.is_read_only(), write(&node).await), (true, Err(Errno::EROFS)));
        // What was written is flushed first; without that nothing changes.
        let node = open("flush-fails").await;
        node.reopen(false).expect("it can").await.unwrap();
        write(&node).await.unwrap();
        assert_eq!(node.reopen(true).expect("it can").await.unwrap_err().errno, Errno::EIO);
        assert!(!node.is_read_only());
        // Under the name is another file by now.
        let node = open("replaced").await;
        let error = node.reopen(false).expect("it can").await.unwrap_err();
        assert_eq!(error.errno, Errno::ESTALE);
        assert!(node.is_read_only() && read(&ring, &node, 0, 512).await.is_ok());
    });
}

#[test]
fn nonsense_about_holes_is_data() {
    on_a_ring(|ring| async move {
        for path in ["seek-unknown", "seek-backwards", "seek-nowhere"] {
            let node = open(&ring, path).await;
            assert_eq!(node.capabilities().status, path != "seek-unknown");
            assert_eq!(node.block_status(4096, 8192).await.unwrap(), Extent::data(8192), "{path}");
        }
        let whole = open(&ring, "good").await;
        assert_eq!(whole.block_status(0, LEN as u64).await.unwrap(), Extent::data(LEN as u64));
        // Bricks that have not seen a write yet say that there is a hole.
        let hole = open(&ring, "all-hole").await;
        assert_eq!(hole.block_status(0, LEN as u64).await.unwrap(), Extent::hole(LEN as u64).on(Word::Claim));
        hole.write(8192, filled(&ring, 4096, 7).await, WriteFlags::default()).await.unwrap();
        for (offset, wanted) in [
            (0, Extent::hole(8192).on(Word::Claim)),
            (8192, Extent::data(4096)),
            (12_288, Extent::hole(LEN as u64 - 12_288).on(Word::Claim)),
        ] {
            assert_eq!(hole.block_status(offset, LEN as u64 - offset).await.unwrap(), wanted, "{offset}");
        }
        // Nor are they believed after a flush.
        hole.flush().await.unwrap();
        assert_eq!(hole.block_status(0, LEN as u64).await.unwrap(), Extent::hole(8192).on(Word::Claim));
        assert_eq!(hole.block_status(8192, 4096).await.unwrap(), Extent::data(4096));
    });
}

/// Bricks that get a write with the flush after it say until then that there is a hole; what they said is not believed later.
#[test]
fn a_hole_ends_where_something_was_written_that_the_bricks_have_not_seen() {
    on_a_ring(|ring| async move {
        let (image, len) = (open(&ring, "behind").await, LEN as u64);
        image.write(8192, filled(&ring, 4096, 7).await, WriteFlags::default()).await.unwrap();
        assert_eq!(image.block_status(0, len).await.unwrap(), Extent::hole(8192).on(Word::Claim));
        image.flush().await.unwrap();
        assert_eq!(image.block_status(0, len).await.unwrap(), Extent::hole(8192).on(Word::Claim));
        assert_eq!(image.block_status(8192, 4096).await.unwrap(), Extent::data(4096));
    });
}

#[test]
fn an_image_that_is_not_there_any_more_is_noticed() {
    on_a_ring(|ring| async move {
        for (path, wanted) in [
            ("removed", Err(Errno::ENOENT)),
            ("exchanged", Err(Errno::ESTALE)),
            ("cut", Err(Errno::ESTALE)),
            ("unreachable", Ok(())),
            ("good", Ok(())),
        ] {
            let image = open(&ring, path).await;
            let by_name = image.check_place(true, true).expect("a look").await;
            assert_eq!(by_name.map_err(|error| error.errno), wanted, "{path}");
            // The open file is what it was.
            assert!(image.check_place(false, true).expect("a look").await.is_ok(), "{path}");
        }
    });
}

#[test]
fn zeroes_are_written_where_the_library_cannot_zero() {
    on_a_ring(|ring| async move {
        for path in ["good", "no-zeroes"] {
            let node = open(&ring, path).await;
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            node.write_zeroes(1000, 200_000, flags).await.unwrap();
            let bytes = read(&ring, &node, 0, 300_000).await.unwrap();
            assert!(bytes[..1000] == [0xaa; 1000] && bytes[1000..201_000].iter().all(|byte| *byte == 0));
            assert!(bytes[201_000..].iter().all(|byte| *byte == 0xaa));
            let can = path == "good";
            assert_eq!((node.capabilities().zero_fast, node.capabilities().zero_unmap), (can, can));
            // Not doing so is no error of a discard, but one of zeroes that have to be fast.
            node.discard(0, 4096).await.unwrap();
            let fast = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
            assert_eq!(node.write_zeroes(0, 4096, fast).await.is_ok(), can);
        }
    });
}

#[test]
fn images_share_a_connection_if_servers_and_volume_are_the_same() {
    on_a_ring(|ring| async move {
        // Names of its own: other tests run beside this one, and count too.
        let open = async |volume: &'static str, hosts: &'static [&'static str]| {
            GlusterNode::open_with(&ring, how(volume, "good", hosts), Some(&FAKE)).await
        };
        let made = |before: u32| MADE.load(Ordering::SeqCst) - before;
        let (first, before) = (open("shared", &["a", "b"]).await.unwrap(), MADE.load(Ordering::SeqCst));
        let second = open("shared", &["a", "b"]).await.unwrap();
        assert_eq!(first.connection_address(), second.connection_address());
        // Another cluster may have a volume of the same name.
        let third = open("shared", &["c"]).await.unwrap();
        let fourth = open("other", &["a", "b"]).await.unwrap();
        assert_ne!(first.connection_address(), third.connection_address());
        assert_ne!(first.connection_address(), fourth.connection_address());
        assert!(made(before) >= 2);
        let error = open("shared", &["nobody"]).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("'shared'") && text.contains("host nobody and port 24007"), "{text}");
    });
}
