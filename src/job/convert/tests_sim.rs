//! Conversions in the simulated world: whatever fails whenever, and wherever the power goes, an unmarked target is a copy.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::sim::{FileModel, OpKind, World, WorldConfig};
use blockferry_ring::{Config, Errno, Ring};

use super::{ConvertOptions, TargetState, start};
use crate::base::rng::Rng;
use crate::graph::node::Node;
use crate::job::policy::OnError;
use crate::job::runner::{Ending, ErrorPolicies};
use crate::protocol::mark::{MarkInfo, TargetMark};
use crate::protocol::{OpenOptions, open};

const FROM: &str = "/from";
const TO: &str = "/to";
const MARK: &str = "user.blockferry.state";
const LEN: u64 = (3 << 20) + 512;

/// A world with a source of data, zeroes and holes, and a target that is empty or full of something else.
fn world(seed: u64, fresh: bool) -> (World, Vec<u8>) {
    let mut rng = Rng::new(seed);
    let world = World::new(WorldConfig::new(seed));
    let model = FileModel { mem_align: 512, offset_align: 512, ..FileModel::regular(LEN) };
    world.add_file(FROM, model.clone());
    world.add_file(TO, model);
    let mut content = vec![0; LEN as usize];
    for _ in 0..6 {
        let from = rng.below(LEN / 4096) * 4096;
        let to = (from + rng.below(600_000)).min(LEN);
        let bytes = &mut content[from as usize..to as usize];
        if rng.below(4) > 0 {
            rng.fill(bytes);
        }
        world.write_raw(FROM, from, bytes);
    }
    if !fresh {
        world.write_raw(TO, 0, &vec![0xAA; LEN as usize]);
    }
    (world, content)
}

fn node(ring: &Ring, path: &str, read_only: bool) -> Rc<Node> {
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    Node::new(ring, path, open(ring, Path::new(path), &options).expect("a disk"))
}

/// The target as a power cut would leave it at worst is a copy, or says that it is none.
fn check(world: &World, content: &[u8], seed: u64) -> bool {
    let marked = world.get_durable_attribute(TO, MARK).is_some();
    if !marked {
        assert!(world.read_durable(TO, 0, content.len()) == content, "seed {seed}: unmarked, and no copy");
    }
    marked
}

#[test]
fn an_unmarked_target_is_a_copy_at_every_moment() {
    let (mut failed, mut completed, mut retried) = (0, 0, 0);
    for seed in 0..150 {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let fresh = rng.below(2) == 0;
        let (world, content) = world(seed, fresh);
        let config = Config { arena_bytes: 16 << 20, ..Config::default() };
        let ring = Ring::with_backend(world.backend(), &config).expect("a ring");
        let policy = if rng.below(2) == 0 { OnError::Report } else { OnError::Ignore };
        let mut options = ConvertOptions::new("c");
        options.parallel = rng.chance(8000).then(|| 1 + rng.below(16) as usize);
        options.target_state = if fresh { TargetState::Zero } else { TargetState::Unknown };
        options.verify = rng.below(3) == 0;
        options.policies = ErrorPolicies { source: policy, target: policy };
        let r = ring.clone();
        options.salvage = rng.below(8) == 0;
        // One request fails, or none.
        if rng.below(3) > 0 {
            let (kind, path, nth) = match rng.below(5) {
                0 => (OpKind::Read, FROM, 1 + rng.below(3)),
                1 | 2 => (OpKind::Write, TO, 1 + rng.below(4)),
                // The first two are those of the marks. What a flush has lost is lost: trying again never ends.
                3 if policy == OnError::Report => (OpKind::Sync, TO, 3 + rng.below(2)),
                _ => (OpKind::PunchHole, TO, 1 + rng.below(3)),
            };
            world.fail_nth(kind, path, nth, Errno::EIO);
        }
        let job = ring.spawn_with_result(async move {
            let (source, target) = (node(&r, FROM, true), node(&r, TO, false));
            let mark = MarkInfo::incomplete("convert", FROM);
            let mark = TargetMark::new(&r, target.driver().clone(), None, mark);
            mark.set().await.expect("a mark");
            options.marker = Some(Box::new(mark));
            start(&r, &source, &target, options).await
        });
        let mut running = None;
        let mut turns = 0;
        let ending = loop {
            let _ = ring.turn_blocking();
            turns += 1;
            assert!(turns < 200_000, "seed {seed}: no end");
            if running.is_none() {
                match job.try_take() {
                    Some(Ok(started)) => running = Some(started),
                    Some(Err(error)) => panic!("seed {seed}: {error}"),
                    None => continue,
                }
            }
            let Some((job, _)) = &running else { continue };
            if turns % 8 == 0 {
                check(&world, &content, seed);
            }
            if let Some(ending) = job.ending() {
                break ending;
            }
        };
        let marked = check(&world, &content, seed);
        match ending {
            Ending::Completed => {
                let errors = running.as_ref().map_or(0, |(job, _)| job.details().errors);
                retried += u64::from(errors > 0);
                completed += 1;
                assert!(!marked, "seed {seed}");
            }
            // A failure to take the mark away may leave a whole copy with it or without.
            Ending::Failed(_) => failed += 1,
            Ending::Cancelled => panic!("seed {seed}: nobody cancelled it"),
        }
        let _ = ring.shutdown(1_000_000_000);
    }
    assert!(failed > 15 && completed > 50 && retried > 10, "{failed} {completed} {retried}");
}
