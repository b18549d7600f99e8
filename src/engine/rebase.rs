//! What an image needs to get before another backing file takes the place of the one it has, so that it goes on showing
//! the same bytes (a safe `rebase`).
//!
//! Where the image holds nothing itself and the two backing files differ, it has to hold what it shows: bytes, or zeroes
//! that it says itself. Nothing here may rest on what lies below *now*: that the old backing file is zero somewhere, ends
//! before that, or is not there at all, hides nothing of the new one. So everything goes by [`Layer::populate`], which
//! asks the image alone; the rest of a cluster that becomes data is filled with what the image shows, which is what the
//! old backing file has.
//!
//! [`Layer::populate`]: crate::block::Layer::populate

use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, Errno, Ring};

use super::qcow2::qcow2;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::base::zero::is_zero;
use crate::block::extent::status_of;
use crate::block::{BlockError, Driver, Extent, Fill, Holds, IoResult, Layer, Node, Operation, ZeroFlags};

/// Bytes looked at in one step.
const STEP_BYTES: u64 = BLOCK_MAX as u64;

/// An image between two backing files.
#[derive(Debug)]
pub struct Rebase {
    ring: Ring,
    image: Rc<dyn Driver>,
    old: Option<Rc<Node>>,
    new: Option<Rc<Node>>,
    /// What the image is given is compressed.
    compress: bool,
}

impl Rebase {
    /// `image` is open for writing, over the backing file that it has had so far.
    pub fn new(ring: &Ring, image: Rc<dyn Driver>, new: Option<Rc<Node>>) -> Rebase {
        let old = image.as_layer().and_then(Layer::backing).map(|below| below.node());
        Rebase { ring: ring.clone(), image, old, new, compress: false }
    }

    /// Whole clusters that the image is given are compressed, where they can be looked at in one step.
    pub fn compressing(self, compress: bool) -> Rebase {
        Rebase { compress, ..self }
    }

    /// Sees to what lies from `at` on: up to where, and how many bytes the image has been given. When the end of the
    /// disk is reached and the image was flushed, the new backing file may take its place.
    ///
    /// # Errors
    /// What reading and writing say. The image shows what it showed, over the old backing file.
    pub async fn step(&self, at: u64) -> Result<(u64, u64), BlockError> {
        let len = self.image.len();
        let held = self.layer()?.holds(at, len - at).await?;
        let end = at + held.len.clamp(1, len - at);
        // What the image holds itself hides every backing file.
        if held.holds() != Holds::Nothing {
            return Ok((end, 0));
        }
        let (old, new) = (status(&self.old, at, end - at).await?, status(&self.new, at, end - at).await?);
        let cluster = self.unit();
        if old.zero && new.zero {
            let to = at + old.len.min(new.len).max(1);
            // A cluster that differs farther on is seen to as a whole.
            let whole = if to < end { to - to % cluster } else { to };
            if whole > at {
                return Ok((whole, 0));
            }
        }
        let end = end.min(at + STEP_BYTES - at % STEP_BYTES);
        let range = ByteRange::at_saturating(at, end - at);
        let (was, is) = (self.read(&self.old, range).await?.freeze(), self.read(&self.new, range).await?);
        let mut written = 0;
        // A cluster that is given bytes gets them as a whole: it is compared as a whole.
        let mut from = range.start();
        while from < range.end() {
            let to = (from - from % cluster + cluster).min(range.end());
            let (skip, n) = ((from - at) as usize, (to - from) as usize);
            let old = was.slice(skip, n);
            if old.as_slice() != &is.as_slice()[skip..skip + n] {
                let zero = is_zero(old.as_slice());
                let is_whole = from.is_multiple_of(cluster) && (to - from == cluster || to == len);
                match qcow2(&self.image).filter(|_| self.compress && is_whole && !zero) {
                    Some(image) => image.write_compressed_bytes(from, old.as_slice().to_vec()).await?,
                    None => {
                        self.hold(from, if zero { Fill::Zeroes(to - from) } else { Fill::Data(old) }).await?;
                    }
                }
                written += to - from;
            }
            from = to;
        }
        Ok((end, written))
    }

    /// What is compared as a whole: what is compressed as a whole, or becomes data as a whole.
    fn unit(&self) -> u64 {
        match qcow2(&self.image).filter(|_| self.compress) {
            Some(image) => image.cluster_size(),
            None => u64::from(self.image.limits().cluster_size.unwrap_or(65_536)),
        }
    }

    fn layer(&self) -> Result<&dyn Layer, BlockError> {
        self.image.as_layer().ok_or_else(|| {
            BlockError::new(Operation::Write, self.image.name(), Errno::EOPNOTSUPP)
                .because("An image of this format has no backing file.")
        })
    }

    async fn hold(&self, at: u64, fill: Fill) -> IoResult {
        match fill {
            Fill::Zeroes(len) if is_planted(Bug::ZeroesRestOnBelow) => {
                self.image.write_zeroes(at, len, ZeroFlags::default()).await
            }
            fill => self.layer()?.populate(at, fill).await,
        }
    }

    async fn read(&self, disk: &Option<Rc<Node>>, range: ByteRange) -> Result<Buf, BlockError> {
        let mut buf = self.ring.alloc(range.len() as usize).await;
        // Beyond its end, or where there is none, a backing file is zero.
        let inside =
            disk.as_ref().map_or(0, |disk| disk.len().saturating_sub(range.start()).min(range.len()));
        if inside < range.len() {
            buf.as_mut_slice().fill(0);
        }
        let Some(disk) = disk.as_ref().filter(|_| inside > 0) else { return Ok(buf) };
        let (front, back) = buf.split_at(inside as usize);
        let (front, result) = disk.read(range.start(), front).await;
        result?;
        match front.unsplit(back) {
            Ok(buf) => Ok(buf),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
    }
}

/// Bytes from `at` on of which the second answer is true: they are zero for certain.
async fn status(disk: &Option<Rc<Node>>, at: u64, len: u64) -> Result<Extent, BlockError> {
    match disk {
        Some(disk) => status_of(&**disk.driver(), at, len).await,
        None => Ok(Extent::hole(len)),
    }
}
