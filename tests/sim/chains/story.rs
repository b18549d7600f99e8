//! What a seed draws: a chain, and what happens to it.

use blockferry::base::rng::Rng;
use blockferry::format::qcow2::{Compat, CreateOptions};
use blockferry::job::policy::OnError;

use common::ledger::SECTOR;

/// A layer of the chain, from the lowest up.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    pub path: String,
    /// `None`: a raw file.
    pub create: Option<CreateOptions>,
    pub sectors: usize,
    /// First sector, sectors, version (0: zeroes).
    pub writes: Vec<(usize, usize, u32)>,
}

/// What kind of job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Commit,
    /// Down to a base, or everything.
    Stream {
        whole: bool,
    },
}

/// A job: layers are counted from the front.
#[derive(Clone, Copy, Debug)]
pub struct JobPlan {
    pub kind: Kind,
    /// In tenths of the chain that is there when it starts.
    pub top: u64,
    pub base: u64,
    pub on_error: OnError,
    pub speed: i64,
    pub verb: Verb,
    /// When the verb comes, after the start.
    pub verb_after: u64,
    /// The next job starts beside this one.
    pub beside: bool,
}

/// What a user does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Nothing,
    Pause,
    Speed,
    ForceCancel,
    /// An active commit, once it is ready.
    SoftCancel,
}

#[derive(Clone, Debug)]
pub struct Story {
    pub seed: u64,
    pub layers: Vec<LayerPlan>,
    pub jobs: Vec<JobPlan>,
    /// Requests fail so often (of 65536) until the world is healed.
    pub faults: u32,
    pub heals_after: u64,
    /// The power is cut in a copy of the world so often (of 65536 turns in which something happened).
    pub cuts: u32,
    pub guest_pause: u64,
}

fn layer(rng: &mut Rng, index: usize, sectors: usize, raw: bool) -> LayerPlan {
    let mut one = |of: &[u32]| of[rng.below(of.len() as u64) as usize];
    let cluster_size = one(&[512, 1024, 4096, 16_384, 65_536]);
    let extended_l2 = cluster_size >= 16_384 && one(&[0, 0, 1]) == 1;
    let compat = if !extended_l2 && one(&[0, 0, 0, 1]) == 1 { Compat::V2 } else { Compat::V3 };
    let refcount_bits = if compat == Compat::V2 { 16 } else { one(&[1, 8, 16, 64]) };
    let size = (sectors * SECTOR) as u64;
    let create =
        CreateOptions { size, cluster_size, extended_l2, compat, refcount_bits, ..CreateOptions::default() };
    let writes = (0..1 + rng.below(6))
        .map(|n| {
            let first = rng.below(sectors as u64) as usize;
            let len = 1 + rng.below((sectors - first).min(64) as u64) as usize;
            let version = if rng.below(4) == 0 { 0 } else { ((index as u32 + 1) << 20) + n as u32 };
            (first, len, version)
        })
        .collect();
    let path = if raw { "/base".to_owned() } else { format!("/l{index}") };
    LayerPlan { path, create: (!raw).then_some(create), sectors, writes }
}

impl Story {
    pub fn draw(seed: u64) -> Story {
        let mut rng = Rng::new(seed ^ 0xc4a1);
        let usual = 16 + rng.below(200) as usize;
        let depth = 2 + rng.below(4) as usize;
        let layers = (0..depth)
            .map(|index| {
                let odd = rng.below(4) == 0;
                let sectors = if odd { 8 + rng.below(240) as usize } else { usual };
                let raw = index == 0 && rng.below(3) > 0;
                layer(&mut rng, index, sectors, raw)
            })
            .collect();
        let jobs = (0..1 + rng.below(3))
            .map(|_| JobPlan {
                kind: match rng.below(4) {
                    0 | 1 => Kind::Commit,
                    n => Kind::Stream { whole: n == 2 },
                },
                top: if rng.below(3) == 0 { 0 } else { rng.below(10) },
                base: rng.below(10),
                on_error: [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc]
                    [rng.below(4) as usize],
                speed: [0, 0, 0, 200_000][rng.below(4) as usize],
                verb: [
                    Verb::Nothing,
                    Verb::Nothing,
                    Verb::Pause,
                    Verb::Speed,
                    Verb::ForceCancel,
                    Verb::SoftCancel,
                ][rng.below(6) as usize],
                verb_after: rng.below(2_000_000),
                beside: rng.below(2) == 0,
            })
            .collect();
        Story {
            seed,
            layers,
            jobs,
            faults: if rng.below(3) == 0 { 1 << rng.range(6..12) } else { 0 },
            heals_after: rng.below(40_000_000),
            cuts: if rng.below(2) == 0 { 0 } else { 1 << rng.range(7..11) },
            guest_pause: rng.below(200_000),
        }
    }

    /// What is seen through the lowest `count` layers.
    pub fn view(&self, count: usize) -> Vec<u32> {
        let mut view: Vec<u32> = Vec::new();
        for plan in &self.layers[..count] {
            view.resize(plan.sectors, 0);
            for &(first, len, version) in &plan.writes {
                view[first..first + len].fill(version);
            }
        }
        view
    }
}
