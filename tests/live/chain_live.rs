//! A filesystem in use whose chain is merged away under it: five qcow2 layers, made by QEMU over an ext4 image, each with
//! files of its own; four connections that write into the blocks of one large file, and check what they read.
//!
//! While they write, two layers are committed into the one below them and, at the same time, the layer above is streamed
//! into the active one; then what is left is mirrored to a raw image, with a pivot. QEMU compares what came of it with a
//! plain model: the same filesystem, made without any layers, with every acknowledged write.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};

use blockferry::engine::{Engine, ImageOptions};
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::job::mirror::MirrorOptions;
use blockferry::job::runner::Ending;
use blockferry::job::stream::Floor;
use blockferry::job::sweep::SweepOptions;
use blockferry_ring::{Config, Ring, SocketAddress};

use common::ext4::{BLOCK_BYTES, IMAGE_BYTES, assert_whole, make};
use common::image::{Dice, MIB, Scratch, content, pattern};
use common::writer::{Plan, Writer};
use common::{assert_same, tool};

const LAYERS: u64 = 5;
/// Slowly enough that clients write a lot meanwhile.
const SPEED: i64 = 24 << 20;

/// The chain, and the model of what it shows.
struct Lab {
    scratch: Scratch,
    blocks: Vec<u64>,
    model: String,
}

impl Lab {
    fn new() -> Lab {
        let scratch = Scratch::new();
        let (base, model) = (scratch.path("base.raw"), scratch.path("model.raw"));
        let blocks = make(&scratch, &base);
        tool("cp", &["--sparse=always", &base, &model]);
        let mut dice = Dice::new(3);
        for layer in 0..LAYERS {
            change(&scratch, &model, &blocks, layer, &mut dice);
            // Over the model it holds nothing; over the layer below, after a rebase, all that makes the difference.
            let path = scratch.path(&format!("l{layer}.qcow2"));
            let (below, format) = match layer {
                0 => ("base.raw".to_owned(), "raw"),
                _ => (format!("l{}.qcow2", layer - 1), "qcow2"),
            };
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "model.raw", &path]);
            tool("qemu-img", &["rebase", "-q", "-F", format, "-b", &below, &path]);
        }
        assert_whole(&model);
        let last = tool("debugfs", &["-R", "stat /added4", &model]);
        assert!(last.contains("EXTENTS:"), "{last}");
        Lab { scratch, blocks, model }
    }

    fn layer(&self, layer: u64) -> String {
        self.scratch.path(&format!("l{layer}.qcow2"))
    }
}

/// What happens to the filesystem between two layers: a new file, some that are removed, a part of the large one.
fn change(scratch: &Scratch, image: &str, blocks: &[u64], layer: u64, dice: &mut Dice) {
    let mut bytes = vec![0; (3 * MIB + 777) as usize];
    pattern(layer, 9, &mut bytes);
    let (file, script) = (scratch.path("file"), scratch.path("script"));
    std::fs::write(&file, bytes).unwrap();
    let mut commands = format!("write {file} added{layer}\n");
    for i in 0..100 {
        let number = layer * 100 + i;
        commands.push_str(&format!("rm folder{}/file{number}\n", number % 50));
    }
    std::fs::write(&script, commands).unwrap();
    tool("debugfs", &["-w", "-f", &script, image]);
    let image = std::fs::OpenOptions::new().write(true).open(image).unwrap();
    let mut block = vec![0; BLOCK_BYTES as usize];
    for _ in 0..blocks.len() / 4 {
        let offset = blocks[dice.below(blocks.len() as u64) as usize];
        pattern(offset, 100 + layer, &mut block);
        image.write_all_at(&block, offset).unwrap();
    }
}

/// The engine's side: serves the chain, and does one thing after the other when told to.
struct Host {
    top: String,
    target: String,
    socket: PathBuf,
    did: Sender<&'static str>,
    go: Receiver<()>,
}

impl Host {
    fn run(self) {
        let engine = Rc::new(Engine::new(&Config::default()).unwrap());
        let e = engine.clone();
        engine.run(async move { self.serve(&e).await });
    }

    /// Tells what has been done, and waits for the word to go on.
    async fn done(&mut self, ring: &Ring, what: &'static str) {
        self.did.send(what).unwrap();
        let go = std::mem::replace(&mut self.go, channel().1);
        self.go = ring
            .offload(move || {
                go.recv().unwrap();
                go
            })
            .await
            .unwrap();
    }

    async fn serve(mut self, engine: &Engine) {
        let ring = engine.ring();
        let disk = engine.open(&self.top, &ImageOptions::default()).await.unwrap();
        let server = NbdServer::new(ring, ServerConfig::default());
        server.listen(&SocketAddress::Unix(self.socket.clone())).unwrap();
        let root = Root::new(&disk, false).unwrap();
        let export = Export { root, description: String::new(), writable: true, default: true };
        server.add_export("disk", export).unwrap();
        self.done(ring, "serving").await;
        self.merge(engine, &disk).await;
        self.done(ring, "merged").await;
        let target = engine.open_as_said(&self.target, &ImageOptions::raw()).unwrap();
        let options = MirrorOptions { speed: 2 * SPEED, ..MirrorOptions::new("mirror") };
        let mirror = engine.mirror(&disk, &target, options).await.unwrap();
        mirror.until_ready().await;
        mirror.complete().unwrap();
        assert_eq!(mirror.until_over().await, Ending::Completed);
        assert_eq!((disk.client_count(), target.client_count()), (0, 1));
        self.done(ring, "pivoted").await;
        server.stop().await;
        target.driver().flush().await.unwrap();
        disk.driver().flush().await.unwrap();
    }

    /// base.raw ← l0 ← l1 ← l2 ← l3 ← l4: l2 and l1 go down into l0, and l3 goes up into l4, at the same time. The layer
    /// on which l4 lies in the end is not the one that was below l3 when its stream began.
    async fn merge(&self, engine: &Engine, disk: &Rc<Node>) {
        let layers = disk.chain();
        let options = |id: &str| SweepOptions { speed: SPEED / 4, ..SweepOptions::new(id) };
        let commit =
            engine.commit(disk, Some(&layers[2]), Some(&layers[4]), options("commit")).await.unwrap();
        let floor = Floor::Bottom(layers[1].clone());
        let stream = engine.stream(disk, None, floor, options("stream")).await.unwrap();
        assert_eq!(commit.until_over().await, Ending::Completed);
        assert_eq!(stream.until_over().await, Ending::Completed);
        // Each layer holds a new file and a part of the large one.
        let copied = [&commit, &stream].map(|job| job.details().bytes_copied);
        assert!(copied[0] > 6 * MIB && copied[1] > 3 * MIB, "{copied:?}");
        let left = disk.chain();
        assert_eq!(left.len(), 3);
        assert!(Rc::ptr_eq(&left[1], &layers[4]) && Rc::ptr_eq(&left[2], &layers[5]));
        assert!(left[1].driver().is_read_only());
    }
}

#[test]
fn a_chain_is_merged_away_under_a_filesystem_in_use() {
    let lab = Lab::new();
    let (target, socket) = (lab.scratch.path("target.raw"), lab.scratch.dir().join("socket"));
    std::fs::File::create(&target).unwrap().set_len(IMAGE_BYTES).unwrap();
    let ((did, done), (go, may_go)) = (channel(), channel());
    let host =
        Host { top: lab.layer(LAYERS - 1), target: target.clone(), socket: socket.clone(), did, go: may_go };
    let host = std::thread::spawn(move || host.run());
    assert_eq!(done.recv(), Ok("serving"));
    let plan = Plan { socket, export: "disk".into(), blocks: lab.blocks.clone(), lanes: 4, seed: 5 };
    let writer = Writer::start(&plan, false);
    writer.wait_more(300);
    for step in ["merged", "pivoted"] {
        go.send(()).unwrap();
        assert_eq!(done.recv(), Ok(step));
        writer.wait_more(300);
    }
    let history = writer.stop();
    go.send(()).unwrap();
    host.join().unwrap();
    println!("{} acknowledged writes", history.acked());

    // What was left at the pivot is the filesystem at one instant, and every file of the chain is sound.
    for layer in 0..LAYERS {
        tool("qemu-img", &["check", "-q", "-f", "qcow2", &lab.layer(layer)]);
    }
    let text = tool("qemu-img", &["info", "--output=json", "--backing-chain", &lab.layer(LAYERS - 1)]);
    let chain: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let names = chain.iter().filter_map(|image| Path::new(image["filename"].as_str()?).file_name()?.to_str());
    assert_eq!(names.collect::<Vec<_>>(), ["l4.qcow2", "l0.qcow2", "base.raw"]);
    let left = lab.scratch.path("left.raw");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &lab.layer(LAYERS - 1), &left]);
    assert_whole(&left);
    history.check_left(&content(&lab.model), &content(&left)).unwrap();
    // Where clients went on: the filesystem is whole, and holds what they wrote, byte for byte.
    history.apply_to_file(&lab.model);
    assert_whole(&target);
    assert_same(&target, &lab.model);
}
