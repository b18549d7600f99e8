//! A stalled write that lands last: one connection hangs with changes on it, they are given up, newer ones go over
//! another, and then the old ones are carried out after all.

use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::block::patience::for_job;
use blockferry::block::{Driver, WriteFlags};
use blockferry::protocol::nbd::{NbdNode, Patience, RemoteOptions};
use blockferry_ring::{Errno, Nanos, Ring};

use super::link::{Harm, Link};
use super::{SECOND, SOCKET, in_world, options, serve};

/// Until a job's request is given up, and until a newer one no longer waits for it.
const SILENCE: Nanos = 2 * SECOND;
const DELAY: Nanos = 4 * SECOND;

async fn open(ring: &Ring) -> Rc<NbdNode> {
    let patience = Patience { job_ns: SILENCE, guest_ns: 0, flush_ns: SILENCE };
    let options = RemoteOptions { patience, reconnect_delay_ns: DELAY, ..options("/link") };
    NbdNode::open(ring, options, false).await.unwrap()
}

async fn write(ring: &Ring, node: &NbdNode, byte: u8) -> Result<(), Errno> {
    let mut buf = ring.alloc(4096).await;
    buf.as_mut_slice().fill(byte);
    node.write(8192, buf.freeze(), WriteFlags::default()).await.map_err(|error| error.errno)
}

fn release_after(ring: &Ring, link: &Rc<Link>, span: Nanos) {
    let (link, later) = (link.clone(), ring.clone());
    ring.spawn(async move {
        later.sleep(span).await;
        link.release();
    });
}

/// What is on the disk in the end when the old write is let go after a time.
fn lands_after(span: Nanos, bug: Option<Bug>) -> u8 {
    plant(bug);
    let (byte, _) = in_world(21, move |ring, world| async move {
        let server = serve(&ring);
        let link = Rc::new(Link::new(&ring, "/link", SOCKET, Harm::Stall(u64::MAX)));
        let node = open(&ring).await;
        link.hold();
        let begin = ring.clock();
        assert_eq!(for_job(write(&ring, &node, 0xaa)).await, Err(Errno::ETIMEDOUT));
        let took = ring.clock() - begin;
        assert!((SILENCE..2 * SILENCE).contains(&took), "{took}");
        release_after(&ring, &link, span);
        // Elsewhere nothing is waited for.
        let begin = ring.clock();
        let buf = for_job(node.read(1 << 20, ring.alloc(4096).await)).await;
        assert!(buf.1.is_ok() && ring.clock() - begin < SECOND, "{:?}", buf.1);
        for_job(write(&ring, &node, 0xbb)).await.unwrap();
        assert!(ring.clock() - begin < DELAY + 2 * SECOND);
        ring.sleep(30 * SECOND).await;
        drop((buf, node));
        link.close();
        server.stop().await;
        world.read_live("/disk", 8192, 1)[0]
    });
    plant(None);
    byte
}

#[test]
fn a_newer_write_waits_for_the_end_of_one_that_was_given_up() {
    assert_eq!(lands_after(SECOND, None), 0xbb);
    assert_eq!(lands_after(3 * SECOND, None), 0xbb);
    // Whoever waits no longer takes the risk.
    assert_eq!(lands_after(20 * SECOND, None), 0xaa);
    assert_eq!(lands_after(3 * SECOND, Some(Bug::LateWriteNotAwaited)), 0xaa, "the planted bug is not found");
}

#[test]
fn guests_wait_for_ever() {
    in_world(22, |ring, _| async move {
        let server = serve(&ring);
        let link = Rc::new(Link::new(&ring, "/link", SOCKET, Harm::Stall(u64::MAX)));
        let node = open(&ring).await;
        link.hold_all();
        let (guest, other, r) = (node.clone(), node.clone(), ring.clone());
        let waits = ring.spawn_with_result(async move { write(&r, &guest, 1).await });
        let r = ring.clone();
        let job = ring.spawn_with_result(for_job(async move {
            let buf = r.alloc(512).await;
            other.read(0, buf).await.1.map_err(|error| error.errno)
        }));
        assert_eq!(job.take().await, Err(Errno::ETIMEDOUT));
        // Those who come later find no connection, since the server hangs for all of them; and wait like the others.
        let (guest, r) = (node.clone(), ring.clone());
        let later = ring.spawn_with_result(async move { write(&r, &guest, 2).await });
        ring.sleep(3600 * SECOND).await;
        assert!(!waits.is_given() && !later.is_given());
        link.release();
        assert_eq!((waits.take().await, later.take().await), (Ok(()), Ok(())));
        drop(node);
        link.close();
        server.stop().await;
    });
}
