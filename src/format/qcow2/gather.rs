//! Reading what lies in many places, of this layer and of those below it.
//!
//! First all of the read is planned: which bytes of which file are where in the buffer. What follows each other in
//! a file becomes one operation, wherever in the disk it belongs; then all operations are under way at once, without
//! a task of their own. What is not simply in a file (compressed clusters, layers of other kinds, memory that does not
//! fit) is read by those who know how, beside the others.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin as Pinned;
use std::rc::Rc;
use std::task::{Context, Poll};

use blockferry_ring::limits::READ_PIECES_MAX;
use blockferry_ring::{Buf, File, Operation, PooledFuture, ReadKind, ReadPiecesKind};

use super::image::{Fault, Qcow2};
use super::plan::Place;
use crate::base::range::ByteRange;
use crate::block::pin::Pin;
use crate::block::{Driver, Node, Operation as What, Resolved};

/// Whom to ask.
#[derive(Clone)]
enum Layer {
    /// The image that is read.
    This,
    /// One below it.
    Below(Rc<Node>),
    /// There is no layer: zeroes.
    Nothing,
}

/// Bytes of the buffer, in order, and where they come from.
struct Part {
    len: u64,
    source: Source,
}

enum Source {
    /// Bytes of a file that stay there.
    File { file: File, offset: u64, _pin: Option<Pin> },
    /// Zeroes.
    Zero,
    /// This place of this layer, by whoever knows how.
    Slow(Layer, Place),
}

/// A part of the read that is under way, and which parts it fills.
enum Running<'a> {
    One(usize, Operation<ReadKind>),
    /// The parts with these places in the order of files.
    Row(Range<usize>, Operation<ReadPiecesKind>),
    Slow(usize, PooledFuture<'a, (Buf, Result<(), Fault>)>),
    Ended,
}

/// How it went with all of them.
struct Outcome {
    bufs: Vec<Option<Buf>>,
    result: Result<(), Fault>,
    /// An operation of a file failed or came short: its driver knows what that means.
    again: bool,
}

impl Running<'_> {
    /// Looks whether it has ended; true if it has.
    fn look(&mut self, cx: &mut Context<'_>, order: &[usize], out: &mut Outcome) -> bool {
        let whole = |wanted: usize, came| came == Ok(wanted as u32);
        match self {
            Running::One(part, operation) => {
                let Poll::Ready((buf, came)) = Pinned::new(operation).poll(cx) else { return false };
                out.again |= !whole(buf.len(), came);
                out.bufs[*part] = Some(buf);
            }
            Running::Row(places, operation) => {
                let Poll::Ready((bufs, came)) = Pinned::new(operation).poll(cx) else { return false };
                out.again |= !whole(bufs.iter().map(Buf::len).sum(), came);
                for (place, buf) in places.clone().zip(bufs) {
                    out.bufs[order[place]] = Some(buf);
                }
            }
            Running::Slow(part, future) => {
                let Poll::Ready((buf, result)) = Pinned::new(future).poll(cx) else { return false };
                out.bufs[*part] = Some(buf);
                if out.result.is_ok() {
                    out.result = result;
                }
            }
            Running::Ended => return true,
        }
        *self = Running::Ended;
        true
    }
}

impl Qcow2 {
    /// Reads guest bytes, wherever they are.
    pub(super) async fn read_scattered(&self, offset: u64, buf: Buf) -> (Buf, Result<(), Fault>) {
        let fits = buf.is_aligned(self.limits().mem_align.max(1) as usize);
        let (buf, result, again) = self.read_parts(offset, buf, fits).await;
        if !again {
            return (buf, result);
        }
        let (buf, result, _) = self.read_parts(offset, buf, false).await;
        (buf, result)
    }

    /// `fast`: what is known to be in a file is read from there. Gives whether that did not work.
    async fn read_parts(&self, offset: u64, buf: Buf, fast: bool) -> (Buf, Result<(), Fault>, bool) {
        let parts = match self.plan_parts(offset, buf.len() as u64, fast).await {
            Ok(parts) => parts,
            Err(fault) => return (buf, Err(fault), false),
        };
        let mut out = Outcome { bufs: Vec::with_capacity(parts.len()), result: Ok(()), again: false };
        let mut rest = buf;
        for part in &parts {
            let (mut this, after) = rest.split_at(part.len as usize);
            if let Source::Zero = part.source {
                this.fill_zero();
            }
            out.bufs.push(Some(this));
            rest = after;
        }
        let order = in_order_of_files(&parts);
        let mut running = self.start(offset, &parts, &order, &mut out.bufs);
        if !running.iter().any(|one| matches!(one, Running::Slow(..))) {
            self.counters.gathered.set(self.counters.gathered.get() + 1);
        }
        std::future::poll_fn(|cx| {
            let mut ended = true;
            running.iter_mut().for_each(|one| ended &= one.look(cx, &order, &mut out));
            if ended { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        drop(running);
        let whole =
            out.bufs.into_iter().flatten().chain([rest]).reduce(|left, right| match left.unsplit(right) {
                Ok(joined) => joined,
                Err(_) => unreachable!("the parts of one buffer join again"),
            });
        match whole {
            Some(buf) => (buf, out.result, out.again),
            None => unreachable!("there is the end of the buffer at least"),
        }
    }

    /// Where all of it is. Tables are loaded layer by layer, by one loop: a chain may be deep.
    async fn plan_parts(&self, offset: u64, len: u64, fast: bool) -> Result<Vec<Part>, Fault> {
        let mut parts: Vec<Part> = Vec::with_capacity(16);
        let mut left: Vec<(Layer, ByteRange)> = Vec::with_capacity(8);
        left.push((Layer::This, ByteRange::at_saturating(offset, len)));
        while let Some((layer, range)) = left.pop() {
            if range.is_empty() {
                continue;
            }
            let image = match &layer {
                Layer::This => self,
                Layer::Below(driver) => match as_qcow2(driver) {
                    Some(image) => image,
                    None => {
                        parts.push(plan_other(driver, range, fast));
                        continue;
                    }
                },
                Layer::Nothing => {
                    parts.push(Part { len: range.len(), source: Source::Zero });
                    continue;
                }
            };
            let piece = match image.piece(range.start(), range.end()).await {
                Ok(piece) => piece,
                Err(fault) => match layer {
                    Layer::This => return Err(fault),
                    // The damage is that of the other image.
                    _ => return Err(image.tell(What::Read, range, fault).await.into()),
                },
            };
            let (this, rest) = range.split_at(range.start() + piece.len);
            if let Place::Below = piece.place {
                let below = image.below();
                let (there, beyond) = this.split_at(below.as_ref().map_or(0, |below| below.len()));
                left.push((layer, rest));
                left.push((Layer::Nothing, beyond));
                left.push((below.map_or(Layer::Nothing, Layer::Below), there));
            } else {
                let source = match piece.place {
                    Place::Zero { .. } => Some(Source::Zero),
                    Place::Data(host) if fast => image.source_at(host, piece.len),
                    _ => None,
                };
                let slow = || Source::Slow(layer.clone(), piece.place);
                parts.push(Part { len: piece.len, source: source.unwrap_or_else(slow) });
                left.push((layer, rest));
            }
        }
        Ok(parts)
    }

    /// Data at this place, if that is in a file as it is.
    fn source_at(&self, host: u64, len: u64) -> Option<Source> {
        let data = self.data();
        if host.checked_add(len).is_none_or(|end| end > data.len()) {
            return None;
        }
        match data.resolve(host, len) {
            Resolved::File { file, offset, pin: None } => {
                // An image that is only read may be written before this read ends.
                Some(Source::File { file, offset, _pin: Some(self.epochs.enter()) })
            }
            _ => None,
        }
    }

    /// Begins to read all parts but zeroes.
    fn start<'a>(
        &'a self,
        offset: u64,
        parts: &[Part],
        order: &[usize],
        bufs: &mut [Option<Buf>],
    ) -> Vec<Running<'a>> {
        let mut running = Vec::with_capacity(parts.len());
        let mut from = 0;
        while from < order.len() {
            let to = row_end(parts, order, from);
            let Source::File { file, offset, .. } = &parts[order[from]].source else {
                unreachable!("only parts in files have an order");
            };
            if to - from == 1 {
                if let Some(buf) = bufs[order[from]].take() {
                    running.push(Running::One(order[from], self.ring.read(file, *offset, buf)));
                }
            } else {
                let row = order[from..to].iter().filter_map(|part| bufs[*part].take()).collect();
                running.push(Running::Row(from..to, self.ring.read_pieces(file, *offset, row)));
            }
            from = to;
        }
        let mut at = offset;
        for (number, part) in parts.iter().enumerate() {
            if let Source::Slow(layer, place) = &part.source
                && let Some(buf) = bufs[number].take()
            {
                let (from, layer, place) = (at, layer.clone(), *place);
                let read = self.ring.boxed(async move {
                    match layer {
                        Layer::Below(driver) => Qcow2::get(&driver, from, buf).await,
                        _ => self.read_piece(from, place, buf).await,
                    }
                });
                running.push(Running::Slow(number, read));
            }
            at += part.len;
        }
        running
    }
}

fn as_qcow2(driver: &Rc<Node>) -> Option<&Qcow2> {
    driver.driver().as_any()?.downcast_ref()
}

/// A layer of another format: it has all of the range, or knows best how to read it.
fn plan_other(driver: &Rc<Node>, range: ByteRange, fast: bool) -> Part {
    let resolved = if fast { driver.resolve(range.start(), range.len()) } else { Resolved::Ask };
    let source = match resolved {
        Resolved::File { file, offset, pin } => Source::File { file, offset, _pin: pin },
        Resolved::Zero => Source::Zero,
        Resolved::Ask => Source::Slow(Layer::Below(driver.clone()), Place::Below),
    };
    Part { len: range.len(), source }
}

/// The numbers of the parts that are in files, by file and place.
fn in_order_of_files(parts: &[Part]) -> Vec<usize> {
    let key = |number: &usize| match &parts[*number].source {
        Source::File { file, offset, .. } => Some((file.id(), *offset)),
        _ => None,
    };
    let mut order: Vec<usize> = (0..parts.len()).filter(|number| key(number).is_some()).collect();
    order.sort_unstable_by_key(key);
    order
}

/// Where the parts end that follow each other in one file, from `from` on.
fn row_end(parts: &[Part], order: &[usize], from: usize) -> usize {
    let place = |at: usize| match &parts[order[at]].source {
        Source::File { file, offset, .. } => (file.id(), *offset, *offset + parts[order[at]].len),
        _ => unreachable!("only parts in files have an order"),
    };
    let mut to = from + 1;
    while to < order.len() && to - from < READ_PIECES_MAX {
        let ((file, _, end), (next_file, next, _)) = (place(to - 1), place(to));
        if file != next_file || end != next {
            break;
        }
        to += 1;
    }
    to
}
