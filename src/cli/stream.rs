//! `blockferry stream`: fills a layer of a chain with what it shows of those below, at rest or while the disk is in use.

use std::rc::Rc;

use blockferry_ring::Ring;
use clap::Args;

use super::Global;
use super::chain::{self, ChainArgs, Manner, Started, layer, shown, shown_whole, with_mark};
use super::exit::{Exit, Failure};
use super::job::{AtReady, Words};
use crate::engine::admit::{Act, Admission};
use crate::graph::node::{Node, Role};
use crate::job::stream::{self, Floor};
use crate::job::sweep::SweepOptions;

const AFTER: &str = "\
A chain is an image with its backing files: base.img <- one.qcow2 <- two.qcow2 <- top.qcow2. IMAGE is its
active layer (top.qcow2), by which the disk is used. Layers are named by their files.

Examples:
  Make an image independent of its backing files (as `qemu-img rebase -b ''` does):
      blockferry stream top.qcow2

  Keep base.img as the backing file, and drop one and two:
      blockferry stream top.qcow2 --base base.img

  The same while clients use the disk, at 100 MiB a second:
      blockferry stream top.qcow2 --base base.img --speed 100MiB \\
          --export 'nbd+unix:///disk?socket=/run/disk.sock'

  Fill a layer in the middle, so that it needs one.qcow2 no longer:
      blockferry stream top.qcow2 --top two.qcow2 --base base.img

What clients see does not change at any moment; what they read is filled first. The files of layers that are
dropped are left alone. If the command is cancelled (exit code 3) or fails, the chain is as it was, and what has
been filled need not be filled again.";

/// Fill a layer with what it shows of those below, at rest or while the disk is in use
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct StreamArgs {
    /// The layer that is filled [default: IMAGE itself]
    #[arg(short, long, value_name = "LAYER")]
    top: Option<String>,
    /// The layer that is its backing file afterwards [default: none; all of the chain is filled in]
    #[arg(short, long, value_name = "LAYER")]
    base: Option<String>,
    /// Instead of the base: the lowest layer that is filled in
    #[arg(long, value_name = "LAYER", conflicts_with = "base")]
    bottom: Option<String>,
    /// What the layer that is filled records as its backing file afterwards [default: the base, by the name it
    /// had, or by its path]
    #[arg(long, value_name = "NAME")]
    backing_file: Option<String>,
    #[command(flatten)]
    chain: ChainArgs,
}

/// Layers, as they are named.
#[derive(Clone)]
struct Ends {
    top: Option<String>,
    base: Option<String>,
    bottom: Option<String>,
}

impl Ends {
    /// The layer that is filled, and how far down it is filled from.
    async fn find(&self, ring: &Ring, front: &Rc<Node>) -> Result<(Rc<Node>, Floor), Failure> {
        let top = match &self.top {
            Some(name) => layer(ring, front, name).await?,
            None => front.clone(),
        };
        let floor = match (&self.base, &self.bottom) {
            (Some(base), _) => Floor::Base(layer(ring, front, base).await?),
            (None, Some(bottom)) => Floor::Bottom(layer(ring, front, bottom).await?),
            (None, None) => Floor::Whole,
        };
        Ok((top, floor))
    }
}

const WORDS: Words = Words {
    ready: "the layer needs no others",
    gives_up: "Cancelling: the chain stays as it was",
    finishes: "Finishing",
};

/// Runs the command.
pub fn main(global: &Global, args: StreamArgs) -> Result<Exit, Failure> {
    let StreamArgs { top, base, bottom, backing_file, chain: args } = args;
    let manner = Manner { name: "stream", words: WORDS, at_ready: AtReady::Finish };
    let ends = Ends { top, base, bottom };
    let named = ends.clone();
    let judge = async move |front: &Rc<Node>, options: &SweepOptions, admission: &mut Admission| {
        let (top, floor) = named.find(admission.ring(), front).await?;
        let (from, to) = stream::judge(front, Some(&top), &floor, options)?;
        admission.layer("layer that is filled", Act::Change, &top, Role::JobTop("stream")).await;
        for node in front.chain().iter().take(to).skip(from + 1) {
            admission.layer("layer below", Act::Read, node, Role::JobSource("stream")).await;
        }
        admission.bytes_of(top.driver(), false).await?;
        Ok(())
    };
    chain::main(global, args, backing_file, manner, judge, async move |engine, front, options| {
        let (top, floor) = ends.find(engine.ring(), front).await?;
        let left = match &floor {
            Floor::Base(base) => Some(base.clone()),
            Floor::Bottom(bottom) => bottom.below(),
            Floor::Whole => None,
        };
        let stream = engine.stream(front, Some(&top), floor, options);
        let job = with_mark(engine, front, &top, "stream", stream).await?;
        let done = Box::new(move || match &left {
            Some(left) => format!("{} has {} as its backing file now", shown_whole(&top), shown(left)),
            None => format!("{} needs no backing file any more", shown_whole(&top)),
        });
        let undone = "The chain is as it was; what has been filled need not be filled again".into();
        Ok(Started { job, done, undone, moves_to: None, empties: false })
    })
}
