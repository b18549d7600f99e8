//! A stalled write that lands last: one connection hangs with changes on it, they are given up, newer ones go over
//! another, and then the old ones are carried out after all.

use std::path::Path;
use std::rc::Rc;

use blockferry::base::limits::VERIFY_LEFT_BYTES;
use blockferry::base::planted::{Bug, plant};
use blockferry::block::patience::for_job;
use blockferry::block::{Driver, WriteFlags, ZeroFlags};
use blockferry::graph::node::{Node, Role, Root};
use blockferry::job::mirror::verify::Verifier;
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::policy::{CopyMode, OnError};
use blockferry::job::runner::{Ending, ErrorPolicies};
use blockferry::protocol::nbd::{NbdNode, Patience, RemoteOptions};
use blockferry::protocol::open::{self as files, OpenOptions};
use blockferry_ring::sim::{Fault, FaultRule, FileModel, OpKind, World};
use blockferry_ring::{Errno, Nanos, Ring};

use super::link::{Harm, Link};
use super::{MILLI, SECOND, SOCKET, in_world, in_world_of, options, serve};

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

const MIB: u64 = 1 << 20;

/// A job fails by itself, and the server of its target hangs with what a guest has sent to both sides: how long that keeps
/// the target from the next job, and whether that job makes a copy while the old change lands.
async fn held_by_a_change_of_a_guest(ring: Ring, world: World, zeroes: bool) -> (Nanos, bool) {
    // Zeroes of so much may take a server long.
    let len = if zeroes { 40 * MIB } else { 4 * MIB };
    for (path, byte) in [("/disk", 1), ("/source", 2)] {
        world.add_file(path, FileModel::regular(len));
        world.write_raw(path, 0, &vec![byte; len as usize]);
    }
    let server = serve(&ring);
    let link = Rc::new(Link::new(&ring, "/link", SOCKET, Harm::Stall(u64::MAX)));
    let file = files::open(&ring, Path::new("/source"), &OpenOptions::default()).unwrap();
    let source = Node::new(&ring, "source", file);
    let target = Node::new(&ring, "target", NbdNode::open(&ring, options("/link"), false).await.unwrap());
    let guest = Root::new(&source, false).unwrap();
    let how =
        |speed| MirrorOptions { copy_mode: CopyMode::WriteBlocking, speed, ..MirrorOptions::new("job") };
    let job = mirror::start(&ring, &source, &target, how(64 << 10)).await.unwrap();
    ring.sleep(10 * SECOND).await;
    // The job waits for its turn: what is under way is the guest's alone. A write is held before the server has it; zeroes,
    // for which the server is asked this and that before, in a server that takes a while.
    if zeroes {
        let slow = Fault::Delay { nanos_min: SECOND, nanos_max: SECOND };
        let kinds = OpKind::Write | OpKind::PunchHole | OpKind::ZeroRange;
        world.add_fault(FaultRule::new(kinds, "/disk", 65_536, slow));
    } else {
        link.hold();
    }
    world.fail_nth(OpKind::Read, "/source", 1, Errno::EIO);
    let change = |byte| {
        let (ring, guest) = (ring.clone(), guest.client());
        async move {
            if zeroes {
                return guest.write_zeroes(MIB, len - MIB, ZeroFlags::default()).await;
            }
            let mut buf = ring.alloc(64 << 10).await;
            buf.as_mut_slice().fill(byte);
            guest.write(len - (64 << 10), buf.freeze(), WriteFlags::default()).await
        }
    };
    let asked = ring.spawn_with_result(change(3));
    ring.sleep(100 * MILLI).await;
    link.hold();
    let begin = ring.clock();
    let Ending::Failed(why) = job.until_over().await else { panic!("{:?}", job.ending()) };
    assert!(why.contains("/source") && ring.clock() - begin < 10 * SECOND, "{why}");
    asked.take().await.expect("a guest does not notice");
    assert!(ring.clock() - begin < 10 * SECOND, "a guest waits for a job that has failed");
    world.heal();
    change(4).await.unwrap();
    while let Err(busy) = target.attach(Role::JobTarget("next")) {
        let refused = mirror::start(&ring, &source, &target, how(0)).await.unwrap_err();
        assert!(refused.to_string().contains(&busy.to_string()), "{refused}");
        ring.sleep(SECOND / 10).await;
    }
    let held = ring.clock() - begin;
    release_after(&ring, &link, 3 * SECOND);
    let next = mirror::start(&ring, &source, &target, how(0)).await.unwrap();
    next.until_ready().await;
    ring.sleep(5 * SECOND).await;
    next.cancel(false).unwrap();
    assert_eq!(next.until_over().await, Ending::Completed);
    let (from, to) = (world.read_live("/source", 0, len as usize), world.read_live("/disk", 0, len as usize));
    drop((job, next, guest, source, target));
    link.close();
    server.stop().await;
    (held, from == to)
}

/// Not shorter, or the next job would meet what may still land; and not longer than a server may be silent.
#[test]
fn the_target_of_a_job_that_failed_is_held_until_its_requests_are_given_up() {
    for (seed, zeroes) in [(31, false), (32, true)] {
        let patience = Patience::default();
        let most = if zeroes { patience.flush_ns } else { patience.job_ns };
        let life = |ring, world| held_by_a_change_of_a_guest(ring, world, zeroes);
        let ((held, is_copy), _) = in_world_of(32 << 20, seed, life);
        assert!((most - 2 * SECOND..most + 2 * SECOND).contains(&held), "zeroes {zeroes}: {held}");
        assert!(is_copy, "zeroes {zeroes}: what landed late is on the copy");
    }
    plant(Some(Bug::LateWriteNotAwaited));
    let life = |ring, world| held_by_a_change_of_a_guest(ring, world, false);
    let ((_, is_copy), _) = in_world_of(32 << 20, 31, life);
    plant(None);
    assert!(!is_copy, "the planted bug is not found");
}

/// A piece of a mirror stalls on its way and is given up; a guest has changed the source when it is sent again, over another
/// connection. All is compared ahead of the end, and then the old one lands.
async fn verified_before_it_lands(ring: Ring, world: World) -> Ending {
    // Longer than what is left to the end, where everything lies still.
    let len = VERIFY_LEFT_BYTES + 4 * MIB;
    for path in ["/disk", "/source"] {
        world.add_file(path, FileModel::regular(len));
    }
    world.write_raw("/source", 0, &vec![2; len as usize]);
    let server = serve(&ring);
    let link = Rc::new(Link::new(&ring, "/link", SOCKET, Harm::Stall(u64::MAX)));
    let file = files::open(&ring, Path::new("/source"), &OpenOptions::default()).unwrap();
    let source = Node::new(&ring, "source", file);
    let target = Node::new(&ring, "target", open(&ring).await);
    let guest = Root::new(&source, false).unwrap();
    let verifier = Verifier::new(&ring, source.driver(), target.driver()).unwrap();
    let how = MirrorOptions {
        speed: 64 << 10,
        verifier: Some(verifier.clone()),
        policies: ErrorPolicies { source: OnError::Report, target: OnError::Ignore },
        ..MirrorOptions::new("job")
    };
    let job = mirror::start(&ring, &source, &target, how).await.unwrap();
    ring.sleep(10 * SECOND).await;
    let at = job.progress().offset();
    link.hold();
    let failed = || (job.details().errors > 0).then_some(());
    while failed().is_none() {
        ring.sleep(SECOND / 10).await;
    }
    let mut buf = ring.alloc(4096).await;
    buf.as_mut_slice().fill(3);
    guest.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
    job.set_speed(0).unwrap();
    job.until_ready().await;
    verifier.pass().await.unwrap();
    assert_eq!(world.read_live("/disk", at, 1), [3]);
    link.release();
    ring.sleep(SECOND).await;
    assert_eq!(world.read_live("/disk", at, 1), [2], "it has landed late");
    job.cancel(false).unwrap();
    let ending = job.until_over().await;
    drop((job, guest, verifier, source, target));
    link.close();
    server.stop().await;
    ending
}

#[test]
fn verifying_finds_a_write_that_lands_after_all_was_compared() {
    let ending = |bug| {
        plant(bug);
        let (ending, _) = in_world_of(32 << 20, 41, verified_before_it_lands);
        plant(None);
        ending
    };
    let found = ending(None);
    assert!(matches!(&found, Ending::Failed(why) if why.contains("Verifying failed")), "{found:?}");
    assert_eq!(ending(Some(Bug::LateWriteNotCompared)), Ending::Completed, "the planted bug is not found");
}
