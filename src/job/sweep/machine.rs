//! The sweep as a state machine: what to copy next, and how it ends.
//!
//! ```text
//! Preparing → Copying → Flushing → Settled → [pending] → Relinking → Over
//!                                                            └ or, after an error: Restoring → Over
//! ```
//! *Copying* walks the chain once. A question about what comes next is on its way while there is room for answers;
//! pieces are taken off the answers in order and end in any order, as many at once as the [`Governor`] allows beside
//! the guests. What guests have just read may be wanted first ([`Wishes`]). When all is copied and flushed the body
//! returns; finalizing changes the chain (*Relinking*), which happens entirely or not at all.
//!
//! Errors go by the policies: `report` ends the job once nothing is in flight, `ignore` tries again after a pause
//! that doubles, `stop` holds the job until it is resumed. Force-cancel does not wait for copies in flight, but for a
//! chain that is being changed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use blockferry_ring::Nanos;
use blockferry_ring::sync::Notify;

use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::graph::node::Node;
use crate::job::body::{Body, Context, Details, Event, Report};
use crate::job::copytime::CopyTime;
use crate::job::error::JobFailure;
use crate::job::governor::{Governor, GuestFirst, Sight};
use crate::job::mirror::machine::Copied;
use crate::job::plan::What;
use crate::job::policy::Failed;
use crate::job::retry::Retries;

/// What the machine asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Make ready what is written to.
    Prepare,
    /// Ask what is to be done from the start of the range on.
    Status(ByteRange),
    /// Copy a piece.
    Copy(ByteRange),
    /// Make a piece zero.
    Zero(ByteRange),
    /// Do what is to be done about a range that a guest has read.
    Wish(ByteRange),
    /// Flush what was written to.
    Flush,
    /// Flush it while it is written, so that no later flush takes long.
    FlushMeanwhile,
    /// Change the chain.
    Relink,
    /// Put everything back as it was.
    Restore,
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It can be written to.
    Prepared(Result<(), Failed>),
    /// What is to be done: pieces that touch each other, from the start of the question on; at least one.
    Status(Result<Vec<(ByteRange, What)>, Failed>),
    /// A piece ended: what was done, and, if it failed, from where on and why.
    Piece(ByteRange, What, Copied, Option<(u64, Failed)>),
    /// What was done about a range that a guest has read. It comes by again, so errors are not told.
    Wished(Copied),
    /// It was flushed.
    Flushed(Result<(), Failed>),
    /// It was, and somebody has removed, replaced or cut it or another layer.
    Displaced(Failed),
    /// It was flushed while it was written.
    FlushedMeanwhile(Result<(), Failed>),
    /// The chain is changed, or as it was.
    Relinked(Result<(), Failed>),
    /// Everything is as it was.
    Restored,
}

/// Where the machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What is written to is made ready.
    Preparing,
    /// Not all is copied.
    Copying,
    /// All is copied, but for the flush.
    Flushing,
    /// Nothing is left but to change the chain.
    Settled,
    /// The chain is being changed.
    Relinking,
    /// Everything is put back.
    Restoring,
    /// The body is over.
    Over,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Preparing => "preparing",
            Stage::Copying => "copy",
            Stage::Flushing => "final-flush",
            Stage::Settled | Stage::Relinking => "relink",
            Stage::Restoring | Stage::Over => "over",
        }
    }
}

/// What guests have read, and the job has not seen to yet.
#[derive(Debug)]
pub struct Wishes {
    ranges: RefCell<VecDeque<ByteRange>>,
    waker: Notify,
}

impl Wishes {
    /// None yet; `waker` is told of each.
    pub fn new(waker: Notify) -> Wishes {
        Wishes { ranges: RefCell::default(), waker }
    }

    /// One more. When there are too many it is forgotten: its turn comes anyway.
    pub fn push(&self, range: ByteRange) {
        let mut ranges = self.ranges.borrow_mut();
        if ranges.len() < limits::SWEEP_WISHES_MAX && ranges.back() != Some(&range) {
            ranges.push_back(range);
            self.waker.notify();
        }
    }

    fn pop(&self) -> Option<ByteRange> {
        self.ranges.borrow_mut().pop_front()
    }
}

/// What the machine must know beforehand.
#[derive(Debug)]
pub struct Settings {
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes that may be in flight.
    pub window_max: u64,
    /// Zeroing costs as much as writing: it is charged to the speed limit.
    pub zeroes_cost: bool,
    /// How much the guests' latency counts.
    pub guest_first: GuestFirst,
    /// The node whose guests it is about.
    pub front: Option<Rc<Node>>,
    /// What guests read.
    pub wishes: Option<Rc<Wishes>>,
}

/// A copy under way.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    began: Nanos,
    weight: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Sweep {
    settings: Settings,
    governor: Governor,
    stage: Stage,
    /// From here on nothing was asked yet.
    asked_to: u64,
    asking: bool,
    due: VecDeque<(ByteRange, What)>,
    pieces: Vec<Piece>,
    bytes_in_flight: u64,
    wishes: usize,
    others: usize,
    /// The operation of this stage has been asked for.
    asked_stage: bool,
    returned: bool,
    retries: Retries,
    done: Copied,
    copy_time: CopyTime,
    /// For the speed that is shown: since when, and what had been done by then.
    since: Option<(Nanos, u64)>,
    speed_bytes_per_sec: u64,
}

impl Sweep {
    /// A machine that has done nothing yet.
    pub fn new(settings: Settings, now: Nanos) -> Sweep {
        let before = settings.front.as_ref().map(|node| node.load().recent(now)).unwrap_or_default();
        Sweep {
            governor: Governor::new(settings.guest_first, settings.window_max, &before),
            settings,
            stage: Stage::Preparing,
            asked_to: 0,
            asking: false,
            due: VecDeque::new(),
            pieces: Vec::with_capacity(limits::SWEEP_OPERATIONS_MAX),
            bytes_in_flight: 0,
            wishes: 0,
            others: 0,
            asked_stage: false,
            returned: false,
            retries: Retries::new(),
            done: Copied::default(),
            copy_time: CopyTime::default(),
            since: None,
            speed_bytes_per_sec: 0,
        }
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.asked_stage = false;
        self.retries.went_well();
    }

    fn ended(&mut self, cx: &mut Context<'_, Op>, outcome: Outcome) {
        match outcome {
            Outcome::Prepared(result) => self.stage_ended(cx, result, Stage::Preparing, Stage::Copying),
            Outcome::Status(result) => {
                self.asking = false;
                match result {
                    Ok(pieces) => {
                        self.asked_to = pieces.last().map_or(self.asked_to, |(range, _)| range.end());
                        self.due.extend(pieces);
                    }
                    Err(failed) => self.retries.failed(cx, failed),
                }
            }
            Outcome::Piece(range, what, copied, failed) => self.piece_ended(cx, range, what, copied, failed),
            Outcome::Wished(copied) => {
                self.wishes -= 1;
                self.note(copied);
                // Guests are not made to wait for the limit: the sweep makes room for them.
                cx.limiter.charge_debt(cx.now, copied.data);
            }
            Outcome::Flushed(result) => self.stage_ended(cx, result, Stage::Flushing, Stage::Settled),
            Outcome::Displaced(failed) => {
                self.others -= 1;
                self.retries.fatal(failed);
            }
            Outcome::FlushedMeanwhile(result) => {
                self.others -= 1;
                self.governor.flush_ended(cx.now);
                if let Err(failed) = result {
                    self.retries.failed(cx, failed);
                }
            }
            Outcome::Relinked(result) => {
                self.others -= 1;
                match result {
                    Ok(()) => {
                        self.stage = Stage::Over;
                        *cx.report = Some(Report::Prepared(Ok(())));
                    }
                    Err(failed) => {
                        self.retries.fatal(failed);
                        self.stage = Stage::Settled;
                    }
                }
            }
            Outcome::Restored => {
                self.others -= 1;
                if let Some(failure) = self.retries.take_failure() {
                    self.give_up(cx, failure);
                }
            }
        }
    }

    fn piece_ended(
        &mut self,
        cx: &mut Context<'_, Op>,
        range: ByteRange,
        what: What,
        copied: Copied,
        failed: Option<(u64, Failed)>,
    ) {
        if let Some(at) = self.pieces.iter().position(|piece| piece.start == range.start()) {
            let piece = self.pieces.swap_remove(at);
            self.bytes_in_flight -= piece.weight;
            if what == What::Data && failed.is_none() {
                self.governor.own(range.len(), cx.now.saturating_sub(piece.began));
            }
        }
        self.note(copied);
        self.governor.wrote(copied.data);
        let done_to = failed.as_ref().map_or(range.end(), |(at, _)| *at);
        let (done, rest) = range.split_at(done_to);
        cx.progress.done(done.len());
        match failed {
            Some((_, failed)) => {
                if !rest.is_empty() {
                    self.due.push_front((rest, what));
                }
                self.retries.failed(cx, failed);
            }
            None => self.retries.went_well(),
        }
    }

    fn note(&mut self, copied: Copied) {
        self.done.data += copied.data;
        self.done.zeroed += copied.zeroed;
        self.done.skipped += copied.skipped;
    }

    fn stage_ended(&mut self, cx: &mut Context<'_, Op>, result: Result<(), Failed>, from: Stage, to: Stage) {
        self.others -= 1;
        if self.stage != from {
            return;
        }
        match result {
            Ok(()) => self.enter(to),
            Err(failed) => {
                self.asked_stage = false;
                self.retries.failed(cx, failed);
            }
        }
    }

    fn has_guests(&self) -> bool {
        self.settings.front.as_ref().is_some_and(|node| node.client_count() > 0)
    }

    /// Looks at what guests met with lately.
    fn look(&mut self, cx: &Context<'_, Op>) {
        let Some(front) = &self.settings.front else { return };
        if self.governor.is_due(cx.now) {
            let all = front.load().all();
            let has_guests = front.client_count() > 0;
            self.governor.look(Sight { now: cx.now, all: &all, has_guests, is_late: false });
        }
    }

    fn window(&self) -> u64 {
        let window = if self.has_guests() { self.governor.window() } else { self.settings.window_max };
        window.min(self.settings.window_max)
    }

    /// Starts copies as long as there is something to copy and room for it.
    fn copy_on(&mut self, cx: &mut Context<'_, Op>) {
        self.grant(cx);
        if self.governor.waits_for_flush() {
            return;
        }
        let window = self.window();
        let chunk = if self.has_guests() {
            self.governor.piece(limits::SWEEP_CHUNK_BYTES)
        } else {
            limits::SWEEP_CHUNK_BYTES
        };
        loop {
            if !self.asking
                && self.asked_to < self.settings.len
                && self.due.len() < limits::SWEEP_EXTENTS_AHEAD_MAX
            {
                self.asking = true;
                let len = self.settings.len - self.asked_to;
                cx.operations.push(Op::Status(ByteRange::at_saturating(self.asked_to, len)));
            }
            let Some(&(range, what)) = self.due.front() else { return };
            if what == What::Skip || what == What::Zero && is_planted(Bug::SweepZeroesSkipped) {
                self.done.skipped += range.len();
                cx.progress.done(range.len());
                self.due.pop_front();
                continue;
            }
            if self.pieces.len() >= limits::SWEEP_OPERATIONS_MAX {
                return;
            }
            let len = if what == What::Zero { limits::SWEEP_ZERO_BYTES_MAX } else { chunk };
            // Pieces end where a chunk of the disk ends, whatever they begin with.
            let end = (range.start() / len + 1).saturating_mul(len);
            let (piece, rest) = range.split_at(end);
            let weight = if what == What::Zero { 0 } else { piece.len() };
            if weight > 0 && self.bytes_in_flight > 0 && self.bytes_in_flight + weight > window {
                return;
            }
            if what == What::Data || self.settings.zeroes_cost {
                let cost = piece.len().min(limits::SWEEP_CHUNK_BYTES);
                if let Err(until) = cx.limiter.try_take(cx.now, cost) {
                    cx.wake_by(until);
                    return;
                }
            }
            match self.due.front_mut() {
                Some(front) if !rest.is_empty() => front.0 = rest,
                _ => drop(self.due.pop_front()),
            }
            self.pieces.push(Piece { start: piece.start(), began: cx.now, weight });
            self.bytes_in_flight += weight;
            cx.operations.push(if what == What::Zero { Op::Zero(piece) } else { Op::Copy(piece) });
        }
    }

    /// What guests have just read comes first.
    fn grant(&mut self, cx: &mut Context<'_, Op>) {
        let Some(wishes) = &self.settings.wishes else { return };
        while self.wishes < limits::SWEEP_WISHES_IN_FLIGHT {
            let Some(range) = wishes.pop() else { return };
            self.wishes += 1;
            cx.operations.push(Op::Wish(range));
        }
    }

    fn ask(&mut self, cx: &mut Context<'_, Op>, op: Op) {
        if !self.asked_stage {
            self.asked_stage = true;
            self.others += 1;
            cx.operations.push(op);
        }
    }

    fn is_idle(&self) -> bool {
        self.pieces.is_empty() && self.wishes == 0 && self.others == 0 && !self.asking
    }

    fn upkeep(&mut self, cx: &mut Context<'_, Op>) {
        // A chain that is being changed is waited for.
        if matches!(self.stage, Stage::Relinking | Stage::Restoring) {
            return;
        }
        let cancelled = cx.orders.force_cancel || cx.orders.soft_cancel;
        if cancelled && (!self.returned || cx.orders.finalize) {
            self.give_up(cx, JobFailure::cancelled());
            return;
        }
        if self.retries.is_failing() {
            if self.is_idle() {
                self.enter(Stage::Restoring);
                self.ask(cx, Op::Restore);
            }
            return;
        }
        if self.retries.waits(cx) {
            return;
        }
        if cx.orders.hold {
            return;
        }
        if self.stage == Stage::Copying {
            self.copy_on(cx);
            if self.governor.wants_flush() {
                self.governor.flush_began(cx.now);
                self.others += 1;
                cx.operations.push(Op::FlushMeanwhile);
            }
            let all = self.asked_to >= self.settings.len && self.due.is_empty();
            if all && self.is_idle() {
                let skips = is_planted(Bug::SweepFlushSkipped);
                self.enter(if skips { Stage::Settled } else { Stage::Flushing });
            }
        }
        match self.stage {
            Stage::Preparing => self.ask(cx, Op::Prepare),
            Stage::Flushing => self.ask(cx, Op::Flush),
            Stage::Settled if !self.returned => {
                self.returned = true;
                *cx.report = Some(Report::Returned(Ok(())));
            }
            Stage::Settled if cx.orders.finalize => {
                self.enter(Stage::Relinking);
                self.ask(cx, Op::Relink);
            }
            _ => {}
        }
    }

    fn give_up(&mut self, cx: &mut Context<'_, Op>, failure: JobFailure) {
        let result = Err(failure);
        *cx.report = Some(if self.returned { Report::Prepared(result) } else { Report::Returned(result) });
        self.stage = Stage::Over;
    }

    /// The speed of the last second or so.
    fn measure(&mut self, now: Nanos, offset: u64) {
        const SECOND: Nanos = 1_000_000_000;
        let (since, before) = *self.since.get_or_insert((now, offset));
        let span = now.saturating_sub(since);
        if span >= SECOND {
            let bytes = u128::from(offset - before) * u128::from(SECOND) / u128::from(span);
            self.speed_bytes_per_sec = bytes.min(u128::from(u64::MAX)) as u64;
            self.since = Some((now, offset));
        }
    }
}

impl Body for Sweep {
    type Op = Op;
    type Outcome = Outcome;

    fn step(&mut self, cx: &mut Context<'_, Op>, event: Event<Outcome>) {
        if let Event::Done(outcome) = event {
            self.ended(cx, outcome);
        }
        if self.stage != Stage::Over && cx.report.is_none() {
            self.look(cx);
            self.upkeep(cx);
        }
        self.measure(cx.now, cx.progress.offset());
        let stands = cx.orders.hold || self.retries.is_pausing() || self.retries.is_failing();
        self.copy_time.look(cx.now, self.stage == Stage::Copying && !stands);
        cx.progress.set_remaining(self.settings.len.saturating_sub(cx.progress.offset()));
    }

    fn in_flight(&self) -> usize {
        self.pieces.len() + self.wishes + self.others + usize::from(self.asking)
    }

    fn details(&self) -> Details {
        Details {
            phase: self.stage.name(),
            bytes_copied: self.done.data,
            bytes_zeroed: self.done.zeroed,
            bytes_skipped: self.done.skipped,
            errors: self.retries.count(),
            last_error: self.retries.last(),
            in_sync: matches!(self.stage, Stage::Settled | Stage::Relinking | Stage::Over),
            copy_nanos: self.copy_time.total(),
            copy_bytes_per_sec: self.speed_bytes_per_sec,
            window_bytes: self.window(),
            goal_nanos: self.governor.goal(),
            ..Details::default()
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
