//! Servers that refuse, go and come back: what is waited for, what is told at once, and what is done without.

use std::time::Instant;

use blockferry::block::{Driver, WriteFlags};
use blockferry::protocol::nbd::{NbdNode, RemoteOptions};

use super::faulty::{Faults, Faulty};
use super::{on_ring, open, options, scrutinise};
use common::image::MIB;

const POLICY: u32 = 2;
const TLS_REQUIRED: u32 = 5;
const UNKNOWN: u32 = 6;
const SHUTDOWN: u32 = 7;

fn refusing(refusals: &[u32]) -> Faulty {
    Faulty::new(
        vec![0; MIB as usize],
        Faults { refusals: refusals.iter().copied().collect(), ..Faults::default() },
    )
}

#[test]
fn a_refusal_is_told_as_what_it_is_and_a_server_that_goes_is_waited_for() {
    for (code, word, cure) in [
        (UNKNOWN, "no such export", "serve --list"),
        (TLS_REQUIRED, "TLS", "not here"),
        (POLICY, "policy", "not here"),
    ] {
        let server = refusing(&[code; 100]);
        let patient = RemoteOptions { open_timeout_ns: 60_000_000_000, ..options(&server.uri()) };
        let error = on_ring(|ring| async move { NbdNode::open(&ring, patient, true).await.unwrap_err() });
        let text = error.to_string();
        assert!(text.contains(word) && text.contains(cure), "{text}");
        assert_eq!(server.connections(), 1, "{text}");
    }
    let server = refusing(&[SHUTDOWN; 3]);
    let (uri, patient) = (server.uri(), 60_000_000_000);
    let hasty = options(&uri);
    on_ring(|ring| async move {
        let error = NbdNode::open(&ring, hasty.clone(), true).await.unwrap_err();
        assert!(error.to_string().contains("shutting down"), "{error}");
        NbdNode::open(&ring, RemoteOptions { open_timeout_ns: patient, ..hasty }, true).await.unwrap();
    });
    assert_eq!(server.connections(), 4);
}

#[test]
fn a_server_that_says_that_it_goes_is_followed_by_the_next() {
    // Its connections end with the word, and those who come at once are told the same.
    for times in [1, 5] {
        let faults = Faults { shutdown: Some((5, times)), ..Faults::default() };
        let server = Faulty::new(vec![0; MIB as usize], faults);
        let uri = server.uri();
        on_ring(|ring| async move {
            let node = open(&ring, &uri).await;
            let parts: Vec<_> = (0..16u64)
                .map(|i| {
                    let (node, ring) = (node.clone(), ring.clone());
                    ring.clone().spawn_with_result(async move {
                        let mut buf = ring.alloc(4096).await;
                        buf.as_mut_slice().fill(i as u8 + 1);
                        node.write(i * 4096, buf.freeze(), WriteFlags::default()).await
                    })
                })
                .collect();
            for part in parts {
                part.take().await.expect("a write, whoever carries it out");
            }
            node.flush().await.unwrap();
        });
        let disk = server.disk();
        assert!((0..16).all(|i| disk[i * 4096..(i + 1) * 4096].iter().all(|byte| *byte == i as u8 + 1)));
        assert!(server.connections() > 1);
    }
    // Who says so for ever is given up when the time is over.
    let faults = Faults { shutdown: Some((1, u64::MAX)), ..Faults::default() };
    let server = Faulty::new(vec![0; MIB as usize], faults);
    let hasty = RemoteOptions { reconnect_delay_ns: 300_000_000, ..options(&server.uri()) };
    let begin = Instant::now();
    let error = on_ring(|ring| async move {
        let node = NbdNode::open(&ring, hasty, false).await.unwrap();
        node.flush().await.unwrap_err()
    });
    assert!(error.to_string().contains("shutting down"), "{error}");
    assert!(begin.elapsed().as_secs() < 10);
}

#[test]
fn what_a_server_hangs_up_at_is_not_asked_again() {
    for (options, connections) in
        [(&[11u32][..], 2), (&[11, 8], 3), (&[11, 8, 10, 7], 4), (&[10], 2), (&[7], 2)]
    {
        let faults = Faults { hangs_up_at: options.to_vec(), ..Faults::default() };
        let server = Faulty::new(vec![0; MIB as usize], faults);
        let uri = server.uri();
        on_ring(|ring| async move {
            let node = open(&ring, &uri).await;
            scrutinise(ring, node, 9, 60).await;
        });
        assert!(server.connections() >= connections, "{options:?}: {}", server.connections());
    }
    let everything = Faults { hangs_up_at: vec![11, 8, 10, 7, 1], ..Faults::default() };
    let server = Faulty::new(vec![0; MIB as usize], everything);
    let hopeless = options(&server.uri());
    let error = on_ring(|ring| async move { NbdNode::open(&ring, hopeless, false).await.unwrap_err() });
    assert!(error.to_string().contains("export"), "{error}");
}

#[test]
fn blocks_may_be_as_large_as_a_piece_of_memory() {
    const LEAST: u32 = 1 << 20;
    // The last: advice that makes no sense.
    for blocks in [[LEAST; 3], [LEAST, LEAST, 1 << 25], [4096, 1, 1 << 25]] {
        let faults = Faults { blocks: Some(blocks), ..Faults::default() };
        let server = Faulty::new(vec![0; 4 << 20], faults);
        let uri = server.uri();
        on_ring(|ring| async move {
            let node = open(&ring, &uri).await;
            assert_eq!(node.limits().request_align, blocks[0]);
            scrutinise(ring, node, 3, 200).await;
        });
    }
    for (blocks, word) in
        [([1 << 21; 3], "2097152"), ([3000, 3000, 6000], "3000"), ([4096, 4096, 512], "512")]
    {
        let faults = Faults { blocks: Some(blocks), ..Faults::default() };
        let server = Faulty::new(vec![0; 4 << 20], faults);
        let options = options(&server.uri());
        let error = on_ring(|ring| async move { NbdNode::open(&ring, options, false).await.unwrap_err() });
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn who_cannot_tell_of_holes_has_data() {
    for errno in [5, 22, 95] {
        let faults = Faults { status_errno: errno, ..Faults::default() };
        let server = Faulty::new(vec![0; 2 << 20], faults);
        let uri = server.uri();
        on_ring(|ring| async move {
            let node = open(&ring, &uri).await;
            for _ in 0..50 {
                let extent = node.block_status(4096, 8192).await.unwrap();
                assert!(extent.allocated && !extent.zero && extent.len > 0, "{extent:?}");
            }
        });
        let (_, asked) = server.asked();
        assert!((1..10).contains(&asked), "it was asked {asked} times");
    }
}
