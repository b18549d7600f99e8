//! The conversion as a state machine: what to copy next, and how it ends.
//!
//! ```text
//! Marking → Copying → Flushing → [Verifying] → Unmarking → Settled → Over
//! ```
//! *Copying* walks the source once. A question about what comes next (a batch of extents) is on its way while there
//! is room for its answers, so that copies seldom wait for it; pieces are taken off the answers in order and end in
//! any order. What could not be shared is put back, to be read and written; what failed and is to be tried again is
//! put back too.
//!
//! Errors go by the policies: `report` ends the job once nothing is in flight, `ignore` tries again after a pause
//! that doubles, `stop` holds the job until it is resumed. Force-cancel does not wait for what is in flight.

use std::collections::VecDeque;

use blockferry_ring::Nanos;

use crate::base::limits;
use crate::base::range::ByteRange;
use crate::job::body::{Body, Context, Details, Event, Report};
use crate::job::copytime::CopyTime;
use crate::job::depth::Depth;
use crate::job::error::JobFailure;
use crate::job::mirror::machine::Copied;
use crate::job::plan::What;
use crate::job::policy::Failed;
use crate::job::retry::Retries;

/// What the machine asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Put the mark of an unfinished copy on the target.
    Mark,
    /// Ask what is in the source from the start of the range on.
    Status(ByteRange),
    /// Copy a piece without reading it, as far as that is possible.
    Share(ByteRange),
    /// Copy a piece.
    Copy(ByteRange),
    /// Make a piece zero in the target.
    Zero(ByteRange),
    /// Look whether both sides still are where they were.
    Find,
    /// Flush the target.
    Flush,
    /// Compare source and target.
    Verify,
    /// Take the mark off the target.
    Unmark,
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The mark is on the target, durably.
    Marked(Result<(), Failed>),
    /// What is in the source: pieces that touch each other, from the start of the question on; at least one.
    Status(Result<Vec<(ByteRange, What)>, Failed>),
    /// A piece was shared up to this offset; from there on it has to be copied.
    Shared(ByteRange, Result<u64, Failed>),
    /// A piece ended: what was done, and, if it failed, from where on and why.
    Piece(ByteRange, What, Copied, Option<(u64, Failed)>),
    /// The target was flushed.
    Flushed(Result<(), Failed>),
    /// Both sides are where they were.
    Found,
    /// It was flushed, or looked for, and somebody has removed, replaced or cut it or the source, or its server has lost
    /// what was written.
    Displaced(Failed),
    /// Source and target were compared.
    Verified(Result<(), Failed>),
    /// The mark is gone, durably.
    Unmarked(Result<(), Failed>),
}

/// Where the machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The target is being marked.
    Marking,
    /// Not yet alike.
    Copying,
    /// Alike, but for the flush.
    Flushing,
    /// Comparing.
    Verifying,
    /// Removing the mark.
    Unmarking,
    /// Nothing left to do.
    Settled,
    /// The body is over.
    Over,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Marking => "marking",
            Stage::Copying => "copy",
            Stage::Flushing | Stage::Unmarking => "final-flush",
            Stage::Verifying => "verify",
            Stage::Settled | Stage::Over => "over",
        }
    }
}

/// What the machine must know beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of the source.
    pub len: u64,
    /// Copies in flight, at least and at most.
    pub parallel: (usize, usize),
    /// Zeroes need not be written: the target holds them already.
    pub skip_zeroes: bool,
    /// Zeroing costs as much as writing: it is charged to the speed limit.
    pub zeroes_cost: bool,
    /// Bytes of one copy.
    pub chunk: u64,
    /// Try to copy without reading.
    pub share: bool,
    /// Compare before the end.
    pub verify: bool,
}

/// A piece that has yet to be dealt with.
#[derive(Clone, Copy, Debug)]
struct Due {
    range: ByteRange,
    what: What,
    /// It was tried without reading, to no avail.
    by_reading: bool,
}

/// A piece that is under way.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    /// When it was asked for.
    began: Nanos,
    /// Bytes that it may hold in memory.
    weight: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Convert {
    settings: Settings,
    depth: Depth,
    stage: Stage,
    /// From here on nothing was asked yet.
    asked_to: u64,
    asking: bool,
    due: VecDeque<Due>,
    pieces: Vec<Piece>,
    bytes_in_flight: u64,
    others: usize,
    /// The operation of this stage has been asked for.
    asked_stage: bool,
    returned: bool,
    retries: Retries,
    done: Copied,
    shared: u64,
    copy_time: CopyTime,
    /// When the job last looked where both sides are.
    found_at: Nanos,
}

impl Convert {
    /// A machine that has done nothing yet.
    pub fn new(settings: Settings) -> Convert {
        Convert {
            settings,
            depth: Depth::new(settings.parallel.0, settings.parallel.1),
            stage: Stage::Marking,
            asked_to: 0,
            asking: false,
            due: VecDeque::new(),
            pieces: Vec::with_capacity(settings.parallel.0),
            bytes_in_flight: 0,
            others: 0,
            asked_stage: false,
            returned: false,
            retries: Retries::new(),
            done: Copied::default(),
            shared: 0,
            copy_time: CopyTime::default(),
            found_at: 0,
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
            Outcome::Status(result) => {
                self.asking = false;
                match result {
                    Ok(pieces) => {
                        for (range, what) in pieces {
                            self.asked_to = range.end();
                            self.due.push_back(Due { range, what, by_reading: !self.settings.share });
                        }
                    }
                    Err(failed) => self.retries.failed(cx, failed),
                }
            }
            Outcome::Shared(range, result) => {
                self.take_off(range);
                match result {
                    Ok(up_to) => {
                        let (shared, rest) = range.split_at(up_to);
                        self.shared += shared.len();
                        self.done.data += shared.len();
                        cx.progress.done(shared.len());
                        if shared.is_empty() {
                            // Whoever turned it off knows: asking for each piece would only cost.
                            self.settings.share = false;
                            self.due.iter_mut().for_each(|due| due.by_reading = true);
                        }
                        self.put_back(rest, What::Data);
                    }
                    Err(failed) => {
                        self.put_back(range, What::Data);
                        self.retries.failed(cx, failed);
                    }
                }
            }
            Outcome::Piece(range, what, copied, failed) => {
                let piece = self.take_off(range);
                if let Some(piece) = piece.filter(|_| copied.data > 0) {
                    self.depth.ended(piece.began, cx.now);
                }
                self.done.data += copied.data;
                self.done.zeroed += copied.zeroed;
                self.done.skipped += copied.skipped;
                let done_to = failed.as_ref().map_or(range.end(), |(at, _)| *at);
                let (done, rest) = range.split_at(done_to);
                cx.progress.done(done.len());
                match failed {
                    Some((_, failed)) => {
                        self.put_back(rest, what);
                        self.retries.failed(cx, failed);
                    }
                    None => self.retries.went_well(),
                }
            }
            Outcome::Marked(result) => {
                self.found_at = cx.now;
                self.stage_ended(cx, result, Stage::Marking, Stage::Copying);
            }
            Outcome::Flushed(result) => {
                let next = if self.settings.verify { Stage::Verifying } else { Stage::Unmarking };
                self.stage_ended(cx, result, Stage::Flushing, next);
            }
            Outcome::Found => self.others -= 1,
            Outcome::Displaced(failed) => {
                self.others -= 1;
                self.retries.fatal(failed);
            }
            Outcome::Verified(Err(failed)) => {
                self.others -= 1;
                // No policy forgives a copy that differs.
                self.retries.fail(failed.into());
            }
            Outcome::Verified(Ok(())) => self.stage_ended(cx, Ok(()), Stage::Verifying, Stage::Unmarking),
            Outcome::Unmarked(result) => self.stage_ended(cx, result, Stage::Unmarking, Stage::Settled),
        }
    }

    /// A piece is no longer under way.
    fn take_off(&mut self, range: ByteRange) -> Option<Piece> {
        let at = self.pieces.iter().position(|piece| piece.start == range.start())?;
        let piece = self.pieces.swap_remove(at);
        self.bytes_in_flight -= piece.weight;
        Some(piece)
    }

    fn put_back(&mut self, range: ByteRange, what: What) {
        if !range.is_empty() {
            self.due.push_front(Due { range, what, by_reading: true });
        }
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

    /// Starts copies as long as there is something to copy and room for it.
    fn copy_on(&mut self, cx: &mut Context<'_, Op>) {
        loop {
            if !self.asking
                && self.asked_to < self.settings.len
                && self.due.len() < limits::CONVERT_EXTENTS_AHEAD_MAX
            {
                self.asking = true;
                let len = self.settings.len - self.asked_to;
                cx.operations.push(Op::Status(ByteRange::at_saturating(self.asked_to, len)));
            }
            let Some(&due) = self.due.front() else { return };
            if due.what == What::Skip || due.what == What::Zero && self.settings.skip_zeroes {
                self.done.skipped += due.range.len();
                cx.progress.done(due.range.len());
                self.due.pop_front();
                continue;
            }
            if !self.depth.has_room(self.pieces.len(), self.bytes_in_flight) {
                return;
            }
            let share = due.what == What::Data && !due.by_reading;
            let len = match due.what {
                What::Zero => limits::CONVERT_ZERO_BYTES_MAX,
                _ if share => limits::CONVERT_SHARE_BYTES_MAX,
                _ => self.settings.chunk,
            };
            // Pieces end where a chunk of the disk ends, whatever they begin with.
            let end = (due.range.start() / len + 1).saturating_mul(len);
            let (piece, rest) = due.range.split_at(end);
            let weight =
                if due.what == What::Data { piece.len().min(limits::CONVERT_CHUNK_BYTES) } else { 0 };
            if self.bytes_in_flight > 0 && self.bytes_in_flight + weight > limits::CONVERT_BYTES_IN_FLIGHT {
                return;
            }
            let costs =
                due.what == What::Data && !share || due.what == What::Zero && self.settings.zeroes_cost;
            let cost = piece.len().min(self.settings.chunk);
            if costs && let Err(until) = cx.limiter.try_take(cx.now, cost) {
                cx.wake_by(until);
                return;
            }
            match self.due.front_mut() {
                Some(front) if !rest.is_empty() => front.range = rest,
                _ => drop(self.due.pop_front()),
            }
            self.pieces.push(Piece { start: piece.start(), began: cx.now, weight });
            self.bytes_in_flight += weight;
            cx.operations.push(match due.what {
                What::Zero => Op::Zero(piece),
                _ if share => Op::Share(piece),
                _ => Op::Copy(piece),
            });
        }
    }

    fn ask(&mut self, cx: &mut Context<'_, Op>, op: Op) {
        if !self.asked_stage {
            self.asked_stage = true;
            self.others += 1;
            cx.operations.push(op);
        }
    }

    fn upkeep(&mut self, cx: &mut Context<'_, Op>) {
        if cx.orders.force_cancel || cx.orders.soft_cancel {
            self.give_up(cx, JobFailure::cancelled());
            return;
        }
        let idle = self.pieces.is_empty() && self.others == 0 && !self.asking;
        if self.retries.is_failing() {
            if let Some(failure) = idle.then(|| self.retries.take_failure()).flatten() {
                self.give_up(cx, failure);
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
            if self.others == 0 && cx.now >= self.found_at + limits::FIND_COPYING_NANOS {
                self.found_at = cx.now;
                self.others += 1;
                cx.operations.push(Op::Find);
            }
            let all = self.asked_to >= self.settings.len && self.due.is_empty();
            if all && self.pieces.is_empty() && !self.asking {
                self.enter(Stage::Flushing);
            }
        }
        match self.stage {
            Stage::Marking => self.ask(cx, Op::Mark),
            Stage::Flushing => self.ask(cx, Op::Flush),
            Stage::Verifying => self.ask(cx, Op::Verify),
            Stage::Unmarking => self.ask(cx, Op::Unmark),
            Stage::Settled if !self.returned => {
                self.returned = true;
                *cx.report = Some(Report::Returned(Ok(())));
            }
            Stage::Settled if cx.orders.finalize => {
                self.stage = Stage::Over;
                *cx.report = Some(Report::Prepared(Ok(())));
            }
            _ => {}
        }
    }

    fn give_up(&mut self, cx: &mut Context<'_, Op>, failure: JobFailure) {
        let result = Err(failure);
        *cx.report = Some(if self.returned { Report::Prepared(result) } else { Report::Returned(result) });
        self.stage = Stage::Over;
    }
}

impl Body for Convert {
    type Op = Op;
    type Outcome = Outcome;

    fn step(&mut self, cx: &mut Context<'_, Op>, event: Event<Outcome>) {
        if let Event::Done(outcome) = event {
            self.ended(cx, outcome);
        }
        if self.stage != Stage::Over {
            self.upkeep(cx);
        }
        cx.progress.set_remaining(self.settings.len.saturating_sub(cx.progress.offset()));
        let stands = cx.orders.hold || self.retries.is_pausing() || self.retries.is_failing();
        self.copy_time.look(cx.now, self.stage == Stage::Copying && !stands);
    }

    fn in_flight(&self) -> usize {
        self.pieces.len() + self.others + usize::from(self.asking)
    }

    fn details(&self) -> Details {
        Details {
            phase: self.stage.name(),
            bytes_copied: self.done.data,
            bytes_zeroed: self.done.zeroed,
            bytes_skipped: self.done.skipped,
            copy_nanos: self.copy_time.total(),
            errors: self.retries.count(),
            last_error: self.retries.last(),
            in_sync: matches!(self.stage, Stage::Unmarking | Stage::Settled | Stage::Over),
            ..Details::default()
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
