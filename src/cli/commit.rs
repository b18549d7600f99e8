//! `blockferry commit`: merges layers of a chain down into one of them, at rest or while the disk is in use.

use std::rc::Rc;

use blockferry_ring::Ring;
use clap::Args;

use super::Global;
use super::chain::{self, ChainArgs, Manner, Started, layer, shown, shown_whole, with_mark};
use super::exit::{Exit, Failure};
use super::image::{CacheMode, NamingArgs};
use super::job::{AtReady, Words};
use super::tool::cache;
use crate::engine::admit::{Act, Admission};
use crate::engine::marks::refusal;
use crate::graph::node::{Node, Role};
use crate::job::commit;
use crate::job::sweep::{ChainError, SweepOptions};
use crate::protocol::mark::TargetMark;

const AFTER: &str = "\
A chain is an image with its backing files: base.img <- one.qcow2 <- two.qcow2 <- top.qcow2. IMAGE is its
active layer (top.qcow2), by which the disk is used. Layers are named by their files.

Examples:
  Write what the active layer holds into its backing file, and empty it (with -d, leave it as it is):
      blockferry commit top.qcow2

  Merge all of the chain into its lowest image:
      blockferry commit top.qcow2 --base base.img

  Drop two intermediate layers: what one and two hold goes into base.img, and top.qcow2 then records
  base.img as its backing file:
      blockferry commit top.qcow2 --top two.qcow2 --base base.img

  The same while clients use the disk:
      blockferry commit top.qcow2 --top two.qcow2 --base base.img \\
          --export 'nbd+unix:///disk?socket=/run/disk.sock'

  Clients go on, on the base, once it holds everything:
      blockferry commit top.qcow2 --export 'nbd+unix:///disk?socket=/run/disk.sock' --pivot

What clients see does not change at any moment. The files of layers that are merged are left alone. If the
command is cancelled (exit code 3) or fails, the chain is as it was; but the base, and the layers between, by
themselves make no sense any more, because the base may hold newer data than they were made over.";

/// Merge layers of a chain down into one of them, at rest or while the disk is in use
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct CommitArgs {
    /// The uppermost layer that is merged [default: IMAGE itself]
    #[arg(long, value_name = "LAYER")]
    top: Option<String>,
    /// The layer that receives it [default: the backing file of the uppermost]; IMAGE is left as it is then
    #[arg(short, long, value_name = "LAYER")]
    base: Option<String>,
    /// What the layer above records as its backing file afterwards [default: the base, by the name it had, or by
    /// its path]
    #[arg(long, value_name = "NAME")]
    backing_file: Option<String>,
    /// When the base holds all that IMAGE shows, let the clients go on, on the base
    #[arg(long, requires = "export", conflicts_with_all = ["follow", "top"])]
    pivot: bool,
    /// Keep the base in step until SIGINT or SIGTERM, which end the commit and leave the clients where they are
    #[arg(long, conflicts_with = "top")]
    follow: bool,
    /// Leave IMAGE as it is, instead of taking out of it what its backing file holds now. So it is left under clients, too
    #[arg(short, long)]
    drop: bool,
    /// Cache mode: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 't', long = "cache-mode", value_name = "CACHE", value_parser = cache)]
    cache_mode: Option<CacheMode>,
    #[command(flatten)]
    naming: NamingArgs,
    #[command(flatten)]
    chain: ChainArgs,
}

const WORDS: Words = Words {
    ready: "the base holds what the active layer shows",
    gives_up: "Cancelling: the chain stays as it was",
    finishes: "Finishing: the base becomes complete; once more gives up",
};

/// The uppermost layer that is merged, and the one that receives it.
async fn ends(
    ring: &Ring,
    front: &Rc<Node>,
    (top, base): &(Option<String>, Option<String>),
) -> Result<(Rc<Node>, Rc<Node>), Failure> {
    let top = match top {
        Some(name) => layer(ring, front, name).await?,
        None => front.clone(),
    };
    let base = match base {
        Some(name) => layer(ring, front, name).await?,
        None => top.below().ok_or_else(|| ChainError::NoBacking(top.name().to_owned()))?,
    };
    Ok((top, base))
}

/// Runs the command.
pub fn main(global: &Global, args: CommitArgs) -> Result<Exit, Failure> {
    let CommitArgs { top, base, backing_file, pivot, follow, drop, cache_mode, naming, chain: mut args } =
        args;
    args.image = naming.read(&args.image, args.format)?;
    if let Some(mode) = cache_mode {
        args.open.cache = mode;
    }
    let empties = !drop && !follow && top.is_none() && base.is_none() && !args.is_served();
    let at_ready = match (follow, pivot) {
        (true, _) => AtReady::Follow,
        (false, true) => AtReady::Pivot,
        (false, false) => AtReady::Finish,
    };
    let manner = Manner { name: "commit", words: WORDS, at_ready };
    let said = (top, base);
    let named = said.clone();
    let writable = args.open.image(None, false);
    let judge = async move |front: &Rc<Node>, options: &SweepOptions, admission: &mut Admission| {
        let (top, base) = ends(admission.ring(), front, &named).await?;
        let merge = commit::judge(front, Some(&top), Some(&base), options)?;
        for (n, node) in merge.layers.iter().enumerate() {
            let is_active = merge.at == 0 && n == 0;
            let kind = if is_active { Role::JobSource("commit") } else { Role::JobLayer("commit") };
            let act = if is_active && empties { Act::Change } else { Act::Read };
            admission.layer_of(Some(front), "merged layer", act, node, kind).await;
        }
        admission.layer_of(Some(front), "base", Act::Change, &base, Role::JobBase("commit")).await;
        // It was opened to be read.
        let state_dir = writable.marks.state_dir.as_deref();
        if let Ok(Some(mark)) = TargetMark::read(admission.ring(), base.driver(), state_dir).await
            && let Some(error) = refusal(&mark, base.name(), &writable)
        {
            admission.refuse(error);
        }
        if let Some(above) = merge.at.checked_sub(1).and_then(|at| front.chain().into_iter().nth(at)) {
            admission.layer("layer above", Act::Change, &above, Role::Editor).await;
        }
        if base.driver().len() < top.driver().len() {
            admission.grows(&base, top.driver().len());
        }
        admission.bytes_of(top.driver(), merge.layers.len() == 1).await?;
        Ok(())
    };
    chain::main(global, args, backing_file, manner, judge, async move |engine, front, options| {
        let (top, base) = ends(engine.ring(), front, &said).await?;
        let is_above = |node: &Rc<Node>| node.below().is_some_and(|below| Rc::ptr_eq(&below, &top));
        let above = front.chain().into_iter().find(is_above);
        let commit = engine.commit(front, Some(&top), Some(&base), options);
        let job = with_mark(engine, front, &base, "commit", commit).await?;
        let (base_name, top_name) = (shown(&base), shown(&top));
        let now = above
            .map_or_else(String::new, |above| format!(", and is the backing file of {} now", shown(&above)));
        let merged = base.clone();
        let done = Box::new(move || format!("{} holds what {top_name} showed{now}", shown_whole(&merged)));
        let undone = format!(
            "The chain is as it was. {base_name} by itself may hold some of what lies above it: do not use it alone"
        );
        Ok(Started { job, done, undone, moves_to: pivot.then_some(base), empties })
    })
}
