//! Commit and stream on real files: chains that QEMU made, guests that write meanwhile, and what QEMU finds afterwards.

use common::nbd_peers;

use std::rc::Rc;

use blockferry::block::{BlockError, Holds, IoFuture, WriteFlags};
use blockferry::engine::open::open;
use blockferry::engine::{Engine, Format, ImageOptions};
use blockferry::format::qcow2::{Backing, OpenFiles, OpenOptions, Qcow2, Wanted};
use blockferry::graph::chain as layers_of;
use blockferry::graph::node::{Node, Root};
use blockferry::job::commit;
use blockferry::job::runner::{Ending, Job};
use blockferry::job::stream::{self, Floor};
use blockferry::job::sweep::{ChainError, SweepOptions};
use blockferry::protocol::open::Cache;
use blockferry_ring::{Config, Ring};

use common::chain::{Chain, LEN};
use common::image::{Dice, MIB, Scratch, pattern};
use common::tool;

fn options() -> ImageOptions {
    ImageOptions { cache: Cache::Buffered, format: Some(Format::Qcow2), ..ImageOptions::default() }
}

fn engine() -> Engine {
    Engine::new(&Config { arena_bytes: 16 << 20, ..Config::default() }).expect("an engine")
}

/// Writes and reads at random, checking what it reads, until `over`; gives the model as it is then.
async fn guest(ring: &Ring, root: &Root, model: &mut [u8], seed: u64, job: &Job) -> u64 {
    let mut dice = Dice::new(seed);
    let mut requests = 0;
    while job.ending().is_none() {
        let at = dice.below(LEN / 512 - 64) * 512;
        let len = ((1 + dice.below(64)) * 512) as usize;
        let range = at as usize..at as usize + len;
        if dice.below(2) == 0 {
            let mut buf = ring.alloc(len).await;
            pattern(at, requests + 1000, &mut model[range.clone()]);
            buf.copy_from(0, &model[range]);
            root.write(at, buf.freeze(), WriteFlags::default()).await.expect("a write");
        } else {
            let (buf, result) = root.read(at, ring.alloc(len).await).await;
            result.expect("a read");
            assert!(buf.as_slice() == &model[range], "what is read at {at} is wrong");
        }
        requests += 1;
    }
    requests
}

async fn all(ring: &Ring, node: &Rc<Node>) -> Vec<u8> {
    let mut bytes = vec![0; node.driver().len() as usize];
    for (i, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        let (buf, result) = node.driver().read((i as u64) << 20, ring.alloc(piece.len()).await).await;
        result.expect("a read");
        buf.copy_to(0, piece);
    }
    bytes
}

/// The chain of `top`, as its disk.
async fn opened(ring: &Ring, top: &str) -> Rc<Node> {
    open(ring, top, &options()).await.unwrap().called("disk")
}

fn sweep(id: &str) -> SweepOptions {
    SweepOptions { auto_dismiss: false, ..SweepOptions::new(id) }
}

const PLAIN: [&str; 4] = ["", "", "", ""];
const MIXED: [&str; 4] = [
    "cluster_size=4k",
    "compat=0.10,cluster_size=64k",
    "cluster_size=512k,extended_l2=on",
    "cluster_size=16k",
];

/// Two overlays of one base: one node, whoever merges into it is told of both, and each goes its way.
#[test]
fn two_overlays_of_one_base_share_its_node() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path("base"), "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &path("base")]);
    for name in ["one", "two"] {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", &path(name)]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 64k 64k", &path(name)]);
    }
    let engine = Engine::new(&blockferry_ring::Config::default()).unwrap();
    let (ring, names) = (engine.ring().clone(), [path("one"), path("two")]);
    let open = |name: &String| {
        let opening = engine.start_open(name, &options());
        engine.run(async move { opening.take().await }).unwrap()
    };
    let [one, two] = names.each_ref().map(open);
    let base = one.below().unwrap();
    assert!(Rc::ptr_eq(&base, &two.below().unwrap()));
    // The two, the base, and the three files that they are in; each has a name of its own.
    let mut all: Vec<_> = engine.nodes().iter().map(|node| node.unique_name()).collect();
    assert_eq!(all.len(), 6);
    assert!(engine.node(&names[0]).is_some_and(|node| Rc::ptr_eq(&node, &one)));
    assert!(engine.node(&base.unique_name()).is_some_and(|node| Rc::ptr_eq(&node, &base)));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 6);
    let guests = [Root::new(&one, false).unwrap(), Root::new(&two, false).unwrap()];
    let [first, second] = guests;
    engine.run(async move {
        let refused = commit::start(&ring, &one, None, None, sweep("a")).await;
        let Err(error) = refused else { panic!("{refused:?}") };
        let text = error.to_string();
        assert!(text.contains("block job: commit") && text.contains("as its backing file"), "{text}");
        assert!(text.contains(two.name()), "{text}");
        assert!(base.driver().is_read_only() && one.filter_count() == 0);
        drop(second);
        let job = commit::start(&ring, &one, None, None, sweep("b")).await.unwrap();
        job.until_ready().await;
        // Now the base changes: nobody else may build on it.
        let text = Root::new(&two, true).unwrap_err().to_string();
        assert!(text.contains("block job: commit"), "{text}");
        job.complete().unwrap();
        assert_eq!(job.until_over().await, Ending::Completed);
        assert!(Rc::ptr_eq(&first.node(), &base) && one.users().is_empty());
    });
    drop(engine);
    let read = ["-f", "qcow2", "-c", "read -P 2 64k 64k", "-c", "read -P 1 128k 896k", &path("base")];
    assert!(!tool("qemu-io", &read).contains("failed"));
}

/// Two intermediates of five layers go down into the one below them while a guest writes.
#[test]
fn an_intermediate_commit_under_a_guest() {
    for (seed, layers) in [(1, PLAIN), (2, MIXED)] {
        let chain = Chain::new(seed, &layers);
        let engine = engine();
        let (ring, top) = (engine.ring().clone(), chain.top());
        let mut model = chain.model.clone();
        let model = engine.run(async move {
            let node = opened(&ring, &top).await;
            let root = Root::new(&node, false).unwrap();
            let layers = node.chain();
            let read_only: Vec<bool> = layers.iter().map(|node| node.driver().is_read_only()).collect();
            // base.raw ← l0 ← l1 ← l2 ← l3: l2 and l1 go into l0.
            let job =
                commit::start(&ring, &node, Some(&layers[1]), Some(&layers[3]), sweep("c")).await.unwrap();
            let requests = guest(&ring, &root, &mut model, 9, &job).await;
            assert_eq!(job.ending(), Some(Ending::Completed));
            assert!(requests > 0);
            assert_eq!(job.progress().offset(), job.progress().len());
            let after = node.chain();
            assert_eq!(after.len(), 3);
            assert!(Rc::ptr_eq(&after[1], &layers[3]));
            assert_eq!(after[1].driver().is_read_only(), read_only[3]);
            assert!(all(&ring, &node).await == model);
            root.flush().await.unwrap();
            model
        });
        drop(engine);
        assert_eq!(chain.chain_of(&chain.top()), ["l0.qcow2", "base.raw"]);
        chain.check(&chain.top(), &model, &[1, 4]);
    }
}

/// All layers go down into the raw base, and the guest goes on there.
#[test]
fn an_active_commit_pivots_to_the_base() {
    for (seed, layers) in [(3, PLAIN), (4, MIXED)] {
        let chain = Chain::new(seed, &layers);
        let engine = engine();
        let (ring, top) = (engine.ring().clone(), chain.top());
        let mut model = chain.model.clone();
        let model = engine.run(async move {
            let node = opened(&ring, &top).await;
            let root = Root::new(&node, false).unwrap();
            let base = node.chain().last().unwrap().clone();
            assert!(base.driver().is_read_only());
            let job = commit::start(&ring, &node, None, None, sweep("c")).await.unwrap();
            let waiter = job.clone();
            ring.spawn(async move {
                waiter.until_ready().await;
                waiter.complete().unwrap();
            });
            guest(&ring, &root, &mut model, 10, &job).await;
            assert_eq!(job.ending(), Some(Ending::Completed));
            assert!(Rc::ptr_eq(&root.node(), &base));
            assert!(!base.driver().is_read_only());
            // The guest goes on.
            let mut buf = ring.alloc(512).await;
            buf.as_mut_slice().fill(7);
            model[..512].fill(7);
            root.write(0, buf.freeze(), WriteFlags::default()).await.unwrap();
            assert!(all(&ring, &base).await == model);
            root.flush().await.unwrap();
            model
        });
        drop(engine);
        chain.check(&chain.path(0), &model, &[]);
    }
}

/// A soft cancel of a ready commit leaves the overlay, and the base restored.
#[test]
fn a_soft_cancel_keeps_the_overlay() {
    let chain = Chain::new(5, &PLAIN);
    let engine = engine();
    let (ring, top) = (engine.ring().clone(), chain.top());
    engine.run(async move {
        let node = opened(&ring, &top).await;
        let layers = node.chain();
        let job = commit::start(&ring, &node, None, Some(&layers[2]), sweep("c")).await.unwrap();
        job.until_ready().await;
        job.cancel(false).unwrap();
        assert_eq!(job.until_over().await, Ending::Completed);
        drop(job);
        while !layers[2].driver().is_read_only() {
            ring.yield_now().await;
        }
        assert_eq!(node.chain().len(), 5);
    });
    drop(engine);
    assert_eq!(chain.chain_of(&chain.top()).len(), 4);
    chain.check(&chain.top(), &chain.model, &[1, 2, 3, 4]);
    chain.check(&chain.path(2), &chain.model, &[]);
}

/// The whole chain, or part of it, goes up into the top, or into a layer in the middle.
#[test]
fn streams_under_a_guest() {
    type Case = (u64, [&'static str; 4], usize, Option<usize>, &'static [&'static str], &'static [usize]);
    let cases: [Case; 5] = [
        (6, PLAIN, 0, None, &[], &[4]),
        (7, MIXED, 0, None, &[], &[4]),
        (8, PLAIN, 0, Some(3), &["l0.qcow2", "base.raw"], &[1, 4]),
        (9, MIXED, 1, Some(4), &["l2.qcow2", "base.raw"], &[3, 4]),
        (10, MIXED, 2, Some(4), &["l2.qcow2", "l1.qcow2", "base.raw"], &[2, 3, 4]),
    ];
    for (seed, layers, top_at, base_at, left, sound) in cases {
        let chain = Chain::new(seed, &layers);
        let engine = engine();
        let (ring, top) = (engine.ring().clone(), chain.top());
        let mut model = chain.model.clone();
        let model = engine.run(async move {
            let node = opened(&ring, &top).await;
            let root = Root::new(&node, false).unwrap();
            let layers = node.chain();
            let was = layers[top_at].driver().is_read_only();
            let floor = base_at.map_or(Floor::Whole, |at| Floor::Base(layers[at].clone()));
            let job = stream::start(&ring, &node, Some(&layers[top_at]), floor, sweep("s")).await.unwrap();
            guest(&ring, &root, &mut model, 11, &job).await;
            assert_eq!(job.ending(), Some(Ending::Completed), "seed {seed}");
            assert_eq!(layers[top_at].driver().is_read_only(), was);
            assert!(all(&ring, &node).await == model);
            root.flush().await.unwrap();
            model
        });
        drop(engine);
        assert_eq!(chain.chain_of(&chain.top()), left, "seed {seed}");
        chain.check(&chain.top(), &model, sound);
    }
}

/// Two jobs that share a layer: the second is refused, with QEMU's words, and nothing has changed.
#[test]
fn two_jobs_share_no_layer() {
    let chain = Chain::new(12, &PLAIN);
    let engine = engine();
    let (ring, top) = (engine.ring().clone(), chain.top());
    engine.run(async move {
        let node = opened(&ring, &top).await;
        let layers = node.chain();
        let slow = SweepOptions { speed: 4096, ..sweep("one") };
        let one = commit::start(&ring, &node, Some(&layers[2]), Some(&layers[3]), slow).await.unwrap();
        let again = commit::start(&ring, &node, Some(&layers[3]), Some(&layers[4]), sweep("two")).await;
        let Err(ChainError::Block(error)) = again else { panic!("{again:?}") };
        let wanted =
            format!("Node '{}' is busy: block device is in use by block job: commit", layers[3].name());
        assert!(error.to_string().contains(&wanted), "{error}");
        assert!(layers[4].driver().is_read_only());
        // Neighbours get along.
        let other =
            stream::start(&ring, &node, Some(&layers[0]), Floor::Base(layers[2].clone()), sweep("three"));
        let other = other.await.unwrap();
        assert_eq!(other.until_over().await, Ending::Completed);
        one.set_speed(0).unwrap();
        assert_eq!(one.until_over().await, Ending::Completed);
        assert_eq!(layers_of::called(&node, "l0.qcow2").len(), 1);
        assert_eq!(node.chain().len(), 3);
        assert!(layers[3].driver().is_read_only());
    });
    drop(engine);
    assert_eq!(chain.chain_of(&chain.top()), ["l0.qcow2", "base.raw"]);
    chain.check(&chain.top(), &chain.model, &[1, 4]);
}

/// What guests read is filled at once, however slow the job is told to be; and a job that is cancelled leaves it.
#[test]
fn what_a_guest_reads_is_filled_first() {
    let chain = Chain::new(13, &PLAIN);
    let engine = engine();
    let (ring, top) = (engine.ring().clone(), chain.top());
    engine.run(async move {
        let driver = open(&ring, &top, &options()).await.unwrap();
        let node = driver.called("disk");
        let root = Root::new(&node, false).unwrap();
        let slow = SweepOptions { speed: 1, ..sweep("s") };
        let job = stream::start(&ring, &node, None, Floor::Whole, slow).await.unwrap();
        let layer = node.driver().as_layer().expect("a layer");
        // From the end of what the base holds: the sweep is still at the beginning.
        let mut filled = 0;
        for cluster in (0..LEN / 2 / 65_536).rev() {
            let at = cluster * 65_536;
            let held = layer.holds(at, 65_536).await.unwrap();
            if held.holds() != Holds::Nothing
                || node.chain()[0].driver().block_status(at, 4096).await.unwrap().zero
            {
                continue;
            }
            let (_, result) = root.read(at + 512, ring.alloc(512).await).await;
            result.unwrap();
            while layer.holds(at, 65_536).await.unwrap().holds() == Holds::Nothing {
                ring.sleep(100_000).await;
            }
            filled += 1;
            if filled == 5 {
                break;
            }
        }
        assert_eq!(filled, 5);
        assert!(job.details().bytes_copied >= 5 * 65_536);
        job.cancel(true).unwrap();
        assert_eq!(job.until_over().await, Ending::Cancelled);
        assert_eq!(node.chain().len(), 5);
        root.flush().await.unwrap();
    });
    drop(engine);
    assert_eq!(chain.chain_of(&chain.top()).len(), 4);
    chain.check(&chain.top(), &chain.model, &[4]);
}

/// Reads somewhere that the layer below the uppermost has something and the uppermost nothing: whether the uppermost gets it.
async fn is_filled(
    ring: &Ring,
    root: &Root,
    layers: &[Rc<Node>],
    clusters: &mut impl Iterator<Item = u64>,
) -> bool {
    let held = async |layer: usize, at| {
        let layer = layers[layer].driver().as_layer().expect("a layer");
        layer.holds(at, 65_536).await.expect("what it holds").holds()
    };
    for at in clusters {
        if held(0, at).await != Holds::Nothing || held(1, at).await != Holds::Data {
            continue;
        }
        let (_, result) = root.read(at + 512, ring.alloc(512).await).await;
        result.expect("a read");
        // Ten thousand times what it takes.
        for _ in 0..10_000 {
            if held(0, at).await != Holds::Nothing {
                return true;
            }
            ring.sleep(1_000_000).await;
        }
        return false;
    }
    panic!("the chain has no such place left");
}

/// Of two streams under one root each hears what guests read, also after the other one has ended.
#[test]
fn a_stream_goes_on_to_hear_of_reads_when_another_one_has_ended() {
    let chain = Chain::new(16, &PLAIN);
    let engine = engine();
    let (ring, top) = (engine.ring().clone(), chain.top());
    engine.run(async move {
        let node = opened(&ring, &top).await;
        let (root, layers) = (Root::new(&node, false).unwrap(), node.chain());
        let slow = SweepOptions { speed: 1, ..sweep("one") };
        let one = stream::start(&ring, &node, None, Floor::Base(layers[2].clone()), slow).await.unwrap();
        let mut clusters = (0..LEN / 65_536).rev().map(|cluster| cluster * 65_536);
        assert!(is_filled(&ring, &root, &layers, &mut clusters).await, "beside nobody");
        let below = Floor::Base(layers[4].clone());
        let two = stream::start(&ring, &node, Some(&layers[2]), below, sweep("two")).await.unwrap();
        assert_eq!(two.until_over().await, Ending::Completed);
        assert!(is_filled(&ring, &root, &layers, &mut clusters).await, "after the other one has ended");
        one.cancel(true).unwrap();
        assert_eq!(one.until_over().await, Ending::Cancelled);
        root.flush().await.unwrap();
    });
    drop(engine);
    chain.check(&chain.top(), &chain.model, &[2, 4]);
}

/// A base that is shorter than the top grows, and one that is longer does not shrink; a layer that ends early hides what
/// is below it. Each time the disk is what it was.
#[test]
fn lengths_differ() {
    // From the lowest: bytes of each of four layers in MiB; which are merged, from and to, counted from the front.
    let cases: [([u64; 4], usize, usize); 5] = [
        ([4, 8, 8, 8], 1, 3),
        ([8, 4, 8, 8], 1, 3),
        ([8, 8, 4, 8], 1, 2),
        ([8, 2, 4, 8], 1, 3),
        ([8, 6, 4, 8], 2, 3),
    ];
    for (lens, top_at, base_at) in cases {
        for stream in [false, true] {
            let scratch = Scratch::new();
            let mut names = Vec::new();
            for (i, mib) in lens.iter().enumerate() {
                let name = scratch.path(&format!("l{i}.qcow2"));
                let size = (mib * MIB).to_string();
                let below: Option<&String> = names.last();
                let mut args = vec!["create", "-q", "-f", "qcow2"];
                if let Some(below) = below {
                    args.extend(["-F", "qcow2", "-b", below]);
                }
                args.extend([name.as_str(), &size]);
                tool("qemu-img", &args);
                let write = format!("write -P {} 0 {}", 17 + i, mib * MIB - ((i as u64 * 700) << 10));
                let inner = format!("write -P {} {} 64k", 33 + i, i as u64 * MIB);
                let commands = if i == 0 { vec!["-c", &write] } else { vec!["-c", &inner] };
                tool("qemu-io", &[&["-f", "qcow2"], &commands[..], &[name.as_str()]].concat());
                names.push(name);
            }
            let front = names[3].clone();
            let before = common::qcow2::content_by_qemu(&front);
            let engine = engine();
            let (ring, path) = (engine.ring().clone(), front.clone());
            engine.run(async move {
                let driver = open(&ring, &path, &options()).await.unwrap();
                let node = driver.called("disk");
                let layers = node.chain();
                let (top, base) = (&layers[top_at], &layers[base_at]);
                let len = base.driver().len().max(top.driver().len());
                let job = if stream {
                    let floor = Floor::Base(base.clone());
                    stream::start(&ring, &node, Some(&layers[0]), floor, sweep("s")).await.unwrap()
                } else {
                    commit::start(&ring, &node, Some(top), Some(base), sweep("c")).await.unwrap()
                };
                assert_eq!(job.until_over().await, Ending::Completed);
                if !stream {
                    assert_eq!(base.driver().len(), len);
                }
            });
            drop(engine);
            assert!(common::qcow2::content_by_qemu(&front) == before, "{lens:?} {top_at} {base_at} {stream}");
            common::qcow2::check_by_qemu(&front);
        }
    }
}

/// A base on an NBD server: it was opened to be read, a commit writes to it, and users go on there.
#[test]
fn a_base_on_a_server() {
    let chain = Chain::new(14, &["", ""]);
    let server = nbd_peers::Peer::qemu_nbd(chain.path(0).as_ref(), &["--cache=none", "--discard=unmap"]);
    let engine = engine();
    let (ring, paths, uri) = (engine.ring().clone(), [chain.path(1), chain.path(2)], server.uri());
    let mut model = chain.model.clone();
    let model = engine.run(async move {
        let raw = |read_only| ImageOptions { format: Some(Format::Raw), read_only, ..options() };
        let mut driver = open(&ring, &uri, &raw(true)).await.unwrap();
        for (i, path) in paths.iter().enumerate() {
            let read_only = i == 0;
            let file = open(&ring, path, &raw(read_only)).await.unwrap();
            let with = OpenOptions { read_only, backing: Backing::Given(driver), ..OpenOptions::default() };
            driver = Node::of(&ring, Qcow2::open(&ring, &file, &NoFiles, with).await.unwrap());
        }
        let node = driver.called("disk");
        let root = Root::new(&node, false).unwrap();
        let base = node.chain()[2].clone();
        assert!(base.driver().is_read_only());
        let job = commit::start(&ring, &node, None, None, sweep("c")).await.unwrap();
        let waiter = job.clone();
        ring.spawn(async move {
            waiter.until_ready().await;
            waiter.complete().unwrap();
        });
        guest(&ring, &root, &mut model, 15, &job).await;
        assert_eq!(job.ending(), Some(Ending::Completed));
        assert!(Rc::ptr_eq(&root.node(), &base));
        assert!(all(&ring, &base).await == model);
        root.flush().await.unwrap();
        model
    });
    drop(engine);
    drop(server);
    chain.check(&chain.path(0), &model, &[]);
}

/// Nothing is opened by name.
#[derive(Debug)]
struct NoFiles;

impl OpenFiles for NoFiles {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        unreachable!("'{}' is given", wanted.name)
    }
}
