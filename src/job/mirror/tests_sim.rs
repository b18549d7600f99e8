//! Mirrors in a simulated world in which somebody takes away what they work on.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::backend::OpenHow;
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Config, Ring};

use super::{MirrorOptions, start};
use crate::base::limits::FIND_NANOS;
use crate::base::planted::{Bug, plant};
use crate::graph::node::{Node, Root};
use crate::job::runner::Ending;
use crate::protocol::mark::{MarkState, TargetMark};
use crate::protocol::{OpenOptions, open};

const FROM: &str = "/from";
const TO: &str = "/to";
const LEN: u64 = 1 << 20;

/// What somebody does, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    None,
    Removed,
    Renamed,
    Replaced,
    TargetCut,
    SourceCut,
}

fn node(ring: &Ring, path: &str) -> Rc<Node> {
    Node::new(ring, path, open(ring, Path::new(path), &OpenOptions::default()).expect("a disk"))
}

fn cut(ring: &Ring, path: &str) {
    let file = ring.open(Path::new(path), &OpenHow { write: true, ..OpenHow::default() }).expect("a file");
    ring.set_len(&file, LEN - 512).expect("another length");
}

fn harm(ring: &Ring, harm: Harm) {
    let to = Path::new(TO);
    match harm {
        Harm::None => {}
        Harm::Removed => ring.unlink(to).expect("it was there"),
        Harm::Renamed => ring.rename(to, Path::new("/elsewhere")).expect("it was there"),
        Harm::Replaced => ring.rename(Path::new("/other"), to).expect("another file"),
        Harm::TargetCut => cut(ring, TO),
        Harm::SourceCut => cut(ring, FROM),
    }
}

/// A mirror that is harmed before it is ready, or while it follows.
fn run(seed: u64, harmed: Harm, is_ready: bool) -> (Ending, Option<MarkState>, u64) {
    let world = World::new(WorldConfig::new(seed));
    for path in [FROM, TO, "/other"] {
        world.add_file(path, FileModel::regular(LEN));
    }
    world.write_raw(FROM, 0, &[7; 300_000]);
    let config = Config { arena_bytes: 16 << 20, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).expect("a ring");
    let r = ring.clone();
    let came = ring.block_on(async move {
        let (source, target) = (node(&r, FROM), node(&r, TO));
        let _guest = Root::new(&source, false).expect("a guest");
        let job = start(&r, &source, &target, MirrorOptions::new("m")).await.expect("a job");
        if is_ready {
            assert!(job.until_ready().await.is_ready());
        }
        let began = r.clock();
        harm(&r, harmed);
        if is_ready && harmed != Harm::None {
            job.until_over().await;
        } else {
            job.until_ready().await;
            let _ = job.cancel(false);
        }
        let ending = job.until_over().await;
        (ending, TargetMark::read_own(&r, target.driver()).map(|mark| mark.kind()), r.clock() - began)
    });
    let _ = ring.shutdown(1_000_000_000);
    came
}

#[test]
fn what_is_taken_away_is_noticed_before_ready_and_while_the_job_follows() {
    for seed in 0..8 {
        assert_eq!(run(seed, Harm::None, true).0, Ending::Completed);
        for harmed in [Harm::Removed, Harm::Renamed, Harm::Replaced, Harm::TargetCut, Harm::SourceCut] {
            for is_ready in [false, true] {
                let (ending, mark, span) = run(seed, harmed, is_ready);
                let what = format!("seed {seed}, {harmed:?}, ready {is_ready}");
                assert!(matches!(ending, Ending::Failed(_)), "{what}: {ending:?}");
                assert_eq!(mark, Some(MarkState::Incomplete), "{what}");
                assert!(span < 2 * FIND_NANOS, "{what}: noticed after {span} ns");
            }
        }
    }
    // Without the look, it ends as if there were a copy.
    plant(Some(Bug::TargetNotLookedFor));
    let (ending, ..) = run(0, Harm::Removed, false);
    plant(None);
    assert_eq!(ending, Ending::Completed, "the planted bug is found by this test");
}
