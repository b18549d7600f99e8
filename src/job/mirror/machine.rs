//! The mirror as a state machine: what to copy next, when source and target are alike, how it ends.
//!
//! # Situation
//! A disk is in use; its guests write whenever they like. A [`Tracker`] below them knows what differs
//! from the target. The target is a black box: it can be written, flushed, and asked for holes.
//!
//! # How it proceeds
//! ```text
//! Marking → [Scanning] → Copying → FlushingForReady → Following ──────────────┐ complete or soft cancel, and clean
//!                           ↑     │ dirty again                  │
//!                           └─────┘                              ├─ finalize later: Returned → pending,
//!                                                                │  following goes on until finalize
//!   Settled ← Unmarking ← [Verifying] ← FlushingLast ← Closing ← Draining ┘
//! ```
//! *Copying* takes dirty pieces in order from a cursor that wraps. Before a piece is taken the source is
//! asked for holes; the answer is a hint that decides between a copy and a zeroing, and is verified by
//! whoever zeroes. When all has been dealt with once and little is left, the target is flushed (beside guests now
//! and then before that, too, so that this takes no long time); the job is ready at the first moment at which nothing differs. Guests that never leave such a moment are made to
//! wait while the little that is left is copied (*Draining*, *Closing*, and back).
//! *Following* copies what guests dirty. To end, the source is drained, what is still dirty is copied
//! (*Closing*: no guest can add to it), the target is flushed, the mark on it removed. Then, still
//! drained, the job is [settled](Stage::Settled): the runner pivots or not, and opens the door.
//!
//! # I/O that spans a change of state
//! Copies in flight when the drain begins, when a pause is asked for, or when an error stops the job, end
//! in their own time; only then the next state is entered. Force-cancel alone does not wait.
//!
//! # Errors
//! A failed piece is dirty again. `report` ends the job once nothing is in flight; `ignore` tries again
//! after a pause that doubles; `stop` holds the job until a user resumes it. An error after the drain has
//! begun undoes the drain first: guests never wait for a target that fails.

use std::rc::Rc;

use blockferry_ring::{Errno, Nanos};

use super::conduct::Conduct;
pub use super::stage::Stage;
use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::Extent;
use crate::graph::tracker::{GuestTally, Tracker};
use crate::job::body::{Body, Context, Details, Event, Report};
use crate::job::copytime::CopyTime;
use crate::job::error::JobFailure;
use crate::job::policy::{CopyMode, Failed, IoOperation};
use crate::job::progress::Progress;
use crate::job::retry::Retries;

/// What the machine asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Put the mark of an unfinished copy on the target.
    Mark,
    /// Make dirty what the layers hold whose data is to be copied.
    Scan,
    /// Ask the source for holes and data.
    Status(ByteRange),
    /// Copy a claimed piece.
    Copy(ByteRange),
    /// Make a claimed piece zero in the target, as far as it still is a hole in the source.
    Zero(ByteRange),
    /// Flush the target.
    Flush,
    /// Flush both sides: the target is about to take the source's place, and what is left behind is to be whole.
    FlushBoth,
    /// Flush the target while it is written, so that no later flush takes long.
    FlushMeanwhile,
    /// Look whether both sides still are where they were; and note on the mark how far the job is.
    Find(Option<Progress>),
    /// Drain the source.
    Drain,
    /// Open the source's door again.
    Undrain,
    /// Compare what has yet to be compared.
    Verify,
    /// Take the mark off the target.
    Unmark,
}

/// What came of a piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes written as data.
    pub data: u64,
    /// Bytes made zero.
    pub zeroed: u64,
    /// Bytes that were alike already.
    pub skipped: u64,
    /// Bytes that both sides' files share from now on: nothing was read or written.
    pub shared: u64,
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The mark is on the target, durably.
    Marked(Result<(), Failed>),
    /// What the layers hold is dirty.
    Scanned(Result<(), Failed>),
    /// From the start of the range on, so many bytes are a hole or not.
    Status(ByteRange, Result<Extent, Failed>),
    /// A piece ended: what was done, the offset from which on it was not done, and why if it failed.
    /// (Not done without a failure: what was thought to be a hole is none any more.)
    Piece(ByteRange, Copied, Option<(u64, Option<Failed>)>),
    /// The target was flushed.
    Flushed(Result<(), Failed>),
    /// It was flushed while it was written.
    FlushedMeanwhile(Result<(), Failed>),
    /// Both sides are where they were.
    Found,
    /// Somebody has removed, replaced or cut one of the two, or the target's server has lost what was written.
    Displaced(Failed),
    /// The source is drained, or could not be.
    Drained(bool),
    /// Source and target were compared.
    Verified(Result<(), Failed>),
    /// The source's door is open.
    Undrained,
    /// The mark is gone, durably.
    Unmarked(Result<(), Failed>),
}

/// What the machine must know beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of the source.
    pub len: u64,
    /// Bytes that may be in flight.
    pub buf_size: u64,
    /// Zeroing the target costs as much as writing it: it is charged to the speed limit.
    pub zeroes_cost: bool,
    /// Settle before the body returns, because finalizing follows at once.
    pub auto_finalize: bool,
    /// Only what some of the source's layers hold is to be copied: look through them first.
    pub scans: bool,
    /// Compare source and target before the end.
    pub verify: bool,
    /// Sizes differ in a way that was not allowed: fail after the start.
    pub sizes_differ: bool,
}

#[derive(Clone, Copy, Debug)]
struct Hint {
    range: ByteRange,
    hole: bool,
}

/// A claimed piece.
#[derive(Clone, Copy, Debug)]
struct Piece {
    range: ByteRange,
    /// When it was asked for.
    began: Nanos,
    /// What it counts against the window.
    weight: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Mirror {
    settings: Settings,
    tracker: Rc<Tracker>,
    stage: Stage,
    cursor: u64,
    /// How it treats its guests.
    conduct: Conduct,
    /// What the source said of a range: a hole or not. Whoever acts on it asks again.
    hint: Option<Hint>,
    /// What is to be copied has yet to be looked for.
    scans: bool,
    /// Bytes that were to be copied at first.
    first_bytes: u64,
    /// The mark is on the target: data may be written.
    marked: bool,
    marking: bool,
    asking: bool,
    pieces: Vec<Piece>,
    bytes_in_flight: u64,
    /// What guests' changes did on the target, as far as it has been seen to, and when that was.
    seen: GuestTally,
    heeded_at: Nanos,
    others: usize,
    ready_told: bool,
    /// The last piece was shared, not copied.
    shares: bool,
    /// The door is shut to become ready, not to end.
    for_ready: bool,
    /// The door is shut since then.
    shut_at: Option<Nanos>,
    /// Since then the job waits for a moment at which little differs.
    waits_since: Option<Nanos>,
    /// Attempts in a row to end behind a shut door that took too long, and when the next one may begin.
    late_attempts: u32,
    shut_again_at: Nanos,
    downtime_nanos: Nanos,
    /// The target was flushed since the job began to wait for its end.
    preflushed: bool,
    /// The body has returned; it follows until it is finalized.
    pending: bool,
    retries: Retries,
    done: Copied,
    copy_time: CopyTime,
    /// When the job last looked where both sides are, and when it noted on the mark how far it was.
    found_at: Nanos,
    noted_at: Nanos,
}

impl Mirror {
    /// A machine for what `tracker` says.
    pub fn new(settings: Settings, tracker: Rc<Tracker>, conduct: Conduct) -> Mirror {
        Mirror {
            settings,
            tracker,
            stage: Stage::Marking,
            cursor: 0,
            conduct,
            hint: None,
            scans: settings.scans,
            first_bytes: settings.len,
            marked: false,
            marking: false,
            asking: false,
            pieces: Vec::with_capacity(limits::MIRROR_OPERATIONS),
            bytes_in_flight: 0,
            seen: GuestTally::default(),
            heeded_at: 0,
            others: 0,
            ready_told: false,
            shares: false,
            for_ready: false,
            shut_at: None,
            waits_since: None,
            late_attempts: 0,
            shut_again_at: 0,
            downtime_nanos: 0,
            preflushed: false,
            pending: false,
            retries: Retries::new(),
            done: Copied::default(),
            copy_time: CopyTime::default(),
            found_at: 0,
            noted_at: 0,
        }
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    fn apply(&mut self, cx: &mut Context<'_, Op>, event: Event<Outcome>) {
        match event {
            Event::Start => {
                if self.settings.sizes_differ {
                    let text = "Source and target image have different sizes";
                    self.retries.fail(JobFailure::with_text(Errno::EINVAL, text));
                }
            }
            Event::Wake => {}
            Event::Done(outcome) => self.ended(cx, outcome),
        }
    }

    fn ended(&mut self, cx: &mut Context<'_, Op>, outcome: Outcome) {
        match outcome {
            Outcome::Piece(range, copied, failed) => self.piece_ended(cx, range, copied, failed),
            Outcome::Status(range, result) => {
                self.asking = false;
                match result {
                    Ok(Extent { len, zero, .. }) => {
                        let range = ByteRange::at_saturating(range.start(), len.max(1));
                        self.hint = Some(Hint { range, hole: zero });
                    }
                    Err(failed) => self.error(cx, failed),
                }
            }
            Outcome::Marked(result) => {
                self.others -= 1;
                self.marking = false;
                match result {
                    Ok(()) => {
                        self.marked = true;
                        (self.found_at, self.noted_at) = (cx.now, cx.now);
                        let next = if self.scans { Stage::Scanning } else { Stage::Copying };
                        self.advance(Stage::Marking, next);
                    }
                    Err(failed) => self.error(cx, failed),
                }
            }
            Outcome::Scanned(result) => {
                self.others -= 1;
                match result {
                    Ok(()) => {
                        self.scans = false;
                        self.first_bytes = self.tracker.dirty_bytes();
                        self.advance(Stage::Scanning, Stage::Copying);
                    }
                    Err(failed) => self.error(cx, failed),
                }
            }
            Outcome::Flushed(result) => {
                self.others -= 1;
                match result {
                    Ok(()) => {
                        self.preflushed = true;
                        self.waits_since.get_or_insert(cx.now);
                        if self.stage == Stage::FlushingForReady {
                            self.flushed_for_ready(cx);
                        } else if self.settings.verify && self.advance(Stage::FlushingLast, Stage::Verifying)
                        {
                            self.ask(cx, Op::Verify);
                        } else if self.advance(Stage::FlushingLast, Stage::Unmarking) {
                            self.marked = false;
                            self.ask(cx, Op::Unmark);
                        }
                    }
                    Err(failed) => self.error(cx, failed),
                }
            }
            Outcome::FlushedMeanwhile(result) => {
                self.others -= 1;
                self.conduct.flush_ended(cx.now);
                if let Err(failed) = result {
                    self.error(cx, failed);
                }
            }
            Outcome::Verified(result) => {
                self.others -= 1;
                match result {
                    Ok(()) => {
                        if self.advance(Stage::Verifying, Stage::Unmarking) {
                            self.marked = false;
                            self.ask(cx, Op::Unmark);
                        }
                    }
                    // No policy forgives a copy that differs.
                    Err(failed) => self.retries.fail(failed.into()),
                }
            }
            Outcome::Unmarked(result) => {
                self.others -= 1;
                match result {
                    Ok(()) => {
                        self.advance(Stage::Unmarking, Stage::Settled);
                    }
                    Err(failed) => self.error(cx, failed),
                }
            }
            Outcome::Found => self.others -= 1,
            Outcome::Displaced(failed) => {
                self.others -= 1;
                // No policy forgives a target that nobody will find, or a source that was cut.
                self.retries.fatal(failed);
            }
            Outcome::Undrained => {}
            Outcome::Drained(drained) => {
                self.others -= 1;
                if self.stage != Stage::Draining {
                    // Given up meanwhile, or it took too long.
                    if drained {
                        cx.operations.push(Op::Undrain);
                    }
                } else if drained {
                    self.stage = Stage::Closing;
                } else {
                    let text = "Draining the source timed out: a guest's request does not end";
                    let failed =
                        Failed { operation: IoOperation::Read, errno: Errno::ETIMEDOUT, text: text.into() };
                    self.error(cx, failed);
                }
            }
        }
    }

    fn ask(&mut self, cx: &mut Context<'_, Op>, op: Op) {
        self.others += 1;
        cx.operations.push(op);
    }

    /// Goes from one stage to the next, if it still stands at the first.
    fn advance(&mut self, from: Stage, to: Stage) -> bool {
        if self.stage != from {
            return false;
        }
        self.stage = to;
        self.retries.went_well();
        true
    }

    fn piece_ended(
        &mut self,
        cx: &mut Context<'_, Op>,
        range: ByteRange,
        copied: Copied,
        undone: Option<(u64, Option<Failed>)>,
    ) {
        if let Some(at) = self.pieces.iter().position(|piece| piece.range == range) {
            let piece = self.pieces.swap_remove(at);
            self.bytes_in_flight -= piece.weight;
            if copied.data > 0 {
                self.conduct.piece_ended(copied.data, piece.began, cx.now);
            }
        }
        self.done.data += copied.data;
        self.done.zeroed += copied.zeroed;
        self.done.skipped += copied.skipped;
        self.done.shared += copied.shared;
        // Blocks are shared by the thousand as quickly as one by one.
        self.shares = copied.shared == range.len() || self.shares && copied.data == 0;
        let rest = undone.as_ref().map(|(from, _)| range.split_at(*from).1).filter(|rest| !rest.is_empty());
        cx.progress.done(range.len() - rest.map_or(0, |rest| rest.len()));
        self.tracker.release(range, rest);
        match undone {
            Some((_, Some(failed))) => self.error(cx, failed),
            Some((_, None)) => self.hint = None,
            None => self.retries.went_well(),
        }
    }

    fn error(&mut self, cx: &mut Context<'_, Op>, failed: Failed) {
        let fails_already = self.retries.is_failing();
        let closing = self.stage.is_closing();
        if closing && self.pending {
            // Finalizing: there is no way back.
            self.retries.fatal(failed);
            return;
        }
        self.retries.failed(cx, failed);
        if fails_already {
            return;
        }
        if closing {
            self.reopen(cx);
        } else if self.stage == Stage::FlushingForReady {
            self.stage = Stage::Copying;
        }
        if self.stage == Stage::Copying {
            // What failed may have been dirty when the target was flushed.
            self.waits_since = None;
        }
    }

    /// Gives the guests their disk back and goes on following.
    fn reopen(&mut self, cx: &mut Context<'_, Op>) {
        if self.stage != Stage::Draining {
            cx.operations.push(Op::Undrain);
        }
        self.door_opened(cx.now);
        self.for_ready = false;
        (self.waits_since, self.preflushed) = (None, false);
        self.stage = if self.ready_told { Stage::Following } else { Stage::Copying };
    }

    /// The target is flushed; guests may have gone on meanwhile. Ready means alike at one moment: if that
    /// does not come by itself, the door is shut until the little that is left has been copied.
    fn flushed_for_ready(&mut self, cx: &mut Context<'_, Op>) {
        if self.tracker.is_clean() {
            self.tell_ready(cx);
        } else {
            // From now on the job waits for a good moment.
            self.stage = Stage::Copying;
        }
    }

    fn tell_ready(&mut self, cx: &mut Context<'_, Op>) {
        self.stage = Stage::Following;
        self.retries.went_well();
        self.ready_told = true;
        (self.waits_since, self.preflushed) = (None, false);
        self.late_attempts = 0;
        self.conduct.caught_up(cx.now, &self.tracker);
        *cx.report = Some(Report::Ready);
    }

    /// Bytes that differ, or are being copied.
    fn left(&self) -> u64 {
        self.tracker.dirty_bytes() + self.tracker.copying_bytes()
    }

    /// So little is left that guests can wait for it. The longer the job has waited for such a moment, the more that is.
    fn is_little(&self, cx: &mut Context<'_, Op>) -> bool {
        let left = self.left();
        let late = self.late_attempts.min(16);
        let Some(since) = self.waits_since else { return left <= self.conduct.closing_bytes_max() >> late };
        cx.wake_by(cx.now + limits::CLOSING_STEP_NANOS);
        left <= self.conduct.closing_bytes(cx.now.saturating_sub(since)) >> late
    }

    fn door_opened(&mut self, now: Nanos) {
        if let Some(since) = self.shut_at.take() {
            self.downtime_nanos = self.downtime_nanos.max(now.saturating_sub(since));
        }
    }

    /// Opens a door that has been shut for as long as it may be.
    fn keep_downtime(&mut self, cx: &mut Context<'_, Op>) {
        let Some(by) = self.shut_at.and_then(|since| self.conduct.open_by(since)) else { return };
        if self.stage.may_reopen() && cx.now < by {
            cx.wake_by(by);
        } else if self.stage.may_reopen() {
            tracing::info!(
                attempts = self.late_attempts,
                "the mirror's end takes too long for its guests; later again"
            );
            self.reopen(cx);
            self.late_attempts += 1;
            self.shut_again_at = cx.now + self.conduct.shut_again_after(self.late_attempts);
        }
    }

    /// Starts copies as long as there is something to copy and room for it.
    fn copy_on(&mut self, cx: &mut Context<'_, Op>) {
        let shared = if self.shares && !self.conduct.has_guests() { limits::MIRROR_SHARED_BYTES } else { 0 };
        let chunk = self.conduct.piece().max(self.tracker.granularity()).max(shared);
        let window = self.conduct.window().min(self.settings.buf_size).max(shared);
        let run_max = if self.tracker.is_blocking() {
            limits::MIRROR_ZERO_BYTES_MAX_BLOCKING
        } else {
            limits::MIRROR_ZERO_BYTES_MAX
        };
        if self.conduct.waits_for_flush() {
            return;
        }
        while self.conduct.has_room(self.pieces.len(), self.bytes_in_flight) {
            let Some(run) = self.tracker.peek(self.cursor, run_max.max(chunk)) else {
                return;
            };
            let hole = match self.hint {
                Some(hint) if hint.range.contains(run.start()) => hint.hole.then_some(hint.range),
                _ => {
                    if !self.asking {
                        self.asking = true;
                        let len = (self.settings.len - run.start()).min(limits::MIRROR_STATUS_BYTES_MAX);
                        cx.operations.push(Op::Status(ByteRange::at_saturating(run.start(), len)));
                    }
                    return;
                }
            };
            let piece = match hole {
                Some(known) => {
                    // Whole chunks only: a chunk that is partly a hole is copied.
                    let inside = run.intersect(known).unwrap_or(run);
                    let end = if inside.end() == run.end() {
                        inside.end()
                    } else {
                        inside.end() / self.tracker.granularity() * self.tracker.granularity()
                    };
                    if end > run.start() { (run.split_at(end).0, true) } else { (first(run, chunk), false) }
                }
                None => (first(run, chunk), false),
            };
            let (piece, zero) = piece;
            if !zero && self.bytes_in_flight > 0 && self.bytes_in_flight + piece.len() > window {
                return;
            }
            if !zero || self.settings.zeroes_cost {
                let cost = if zero { piece.len().min(chunk) } else { piece.len() };
                if let Err(until) = cx.limiter.try_take(cx.now, cost) {
                    cx.wake_by(until);
                    return;
                }
            }
            if !self.tracker.claim(piece) {
                return;
            }
            let weight = if zero { 0 } else { piece.len() };
            self.pieces.push(Piece { range: piece, began: cx.now, weight });
            self.bytes_in_flight += weight;
            self.cursor = piece.end();
            cx.operations.push(if zero { Op::Zero(piece) } else { Op::Copy(piece) });
        }
    }

    /// Takes note of what guests' changes did on the target meanwhile.
    fn heed_guests(&mut self, cx: &mut Context<'_, Op>) {
        let tally = self.tracker.tally();
        let mirrored = tally.mirrored_bytes - self.seen.mirrored_bytes;
        cx.progress.done(tally.cleaned_bytes - self.seen.cleaned_bytes);
        let span = cx.now.saturating_sub(self.heeded_at);
        if mirrored > 0 {
            // Guests are not made to wait for the limit: the copying makes room for them. It keeps a part of the limit
            // all the same, or guests who write as fast as that would keep it from ever coming to an end.
            let most = match cx.limiter.speed() {
                0 => mirrored,
                speed => share(speed, span),
            };
            cx.limiter.charge_debt(cx.now, mirrored.min(most));
        }
        self.heeded_at = cx.now;
        self.seen = tally;
        while let Some(error) = self.tracker.pop_failure() {
            self.error(cx, Failed::write(error));
        }
    }

    /// Decides how guests' changes are treated, and how much is in flight.
    fn conduct(&mut self, cx: &mut Context<'_, Op>) {
        let left = self.left();
        let copies = self.marked && !cx.orders.hold && self.stage.copies() && left > 0;
        let (tracker, len) = (&self.tracker, self.settings.len);
        self.conduct.look(cx.now, tracker, cx.progress.offset(), left, len, copies);
        let stands = self.retries.is_pausing() || self.retries.is_failing();
        self.copy_time.look(cx.now, copies && !stands);
        // An unmarked target is not touched, and one that fails is left alone until the job goes on.
        let may_block = self.marked
            && !cx.orders.hold
            && !self.retries.is_pausing()
            && !self.retries.is_failing()
            && self.stage != Stage::Over;
        tracker.set_blocking(may_block && self.conduct.wants_blocking(cx.orders.copy_mode));
    }

    /// What follows from the state as it now is.
    fn upkeep(&mut self, cx: &mut Context<'_, Op>) {
        let idle = self.pieces.is_empty() && self.others == 0 && !self.asking;
        // Before the body has returned, and while it prepares; between the two the life cycle ends it by itself. This
        // comes before a failure that waits for what is in flight: that may be stuck.
        if cx.orders.force_cancel && (!self.pending || cx.orders.finalize) {
            self.give_up(cx, JobFailure::cancelled());
            return;
        }
        if self.retries.is_failing() {
            if let Some(failure) = idle.then(|| self.retries.take_failure()).flatten() {
                self.give_up(cx, failure);
            }
            return;
        }
        if cx.orders.hold && !self.pending && self.stage.may_reopen() {
            // A paused job keeps no guest waiting.
            self.reopen(cx);
        }
        self.keep_downtime(cx);
        if self.retries.waits(cx) {
            return;
        }
        // Too late for a pause: the end is a few steps away, and to stand still here would keep guests at the door.
        let is_ending = matches!(self.stage, Stage::Verifying | Stage::Unmarking | Stage::Settled);
        if cx.orders.hold && !is_ending {
            return;
        }
        if !self.marked
            && !self.marking
            && matches!(self.stage, Stage::Marking | Stage::Copying | Stage::Following)
        {
            self.marking = true;
            self.ask(cx, Op::Mark);
        }
        if self.stage == Stage::Scanning && self.others == 0 {
            self.ask(cx, Op::Scan);
        }
        if self.marked && matches!(self.stage, Stage::Copying | Stage::Following) {
            self.find(cx);
        }
        if self.marked && self.stage.copies() {
            self.copy_on(cx);
            // The flush that ready, or the end, waits for is asked for elsewhere.
            let awaits_end =
                self.waits_since.is_some() || cx.orders.complete || cx.orders.soft_cancel || self.pending;
            let writes = matches!(self.stage, Stage::Copying | Stage::Following);
            if writes && !awaits_end && self.conduct.wants_flush() {
                self.conduct.flush_began(cx.now);
                self.ask(cx, Op::FlushMeanwhile);
            }
        }
        if cx.report.is_none() && self.marked {
            self.end_on(cx);
        }
        if cx.report.is_none() && self.stage == Stage::Settled {
            self.settled(cx);
        }
    }

    /// Looks now and then whether both sides still are where they were; with every flush that something is said after,
    /// that is done anyway.
    fn find(&mut self, cx: &mut Context<'_, Op>) {
        let span = match self.stage {
            Stage::Following => limits::FIND_NANOS,
            _ => limits::FIND_COPYING_NANOS,
        };
        if cx.now < self.found_at + span {
            cx.wake_by(self.found_at + span);
        } else if self.others == 0 {
            self.found_at = cx.now;
            let is_due = cx.now >= self.noted_at + limits::FIND_NANOS;
            if is_due {
                self.noted_at = cx.now;
            }
            self.ask(cx, Op::Find(is_due.then_some(*cx.progress)));
        }
    }

    /// Goes towards the end as far as the state allows.
    fn end_on(&mut self, cx: &mut Context<'_, Op>) {
        let ending = cx.orders.complete || cx.orders.soft_cancel;
        let left = self.left();
        // All has been dealt with once: what is left is what guests changed since.
        let passed = cx.progress.offset() >= self.first_bytes;
        let alike = left == 0 && self.pieces.is_empty() && self.others == 0 && !self.asking;
        let may_shut = cx.now >= self.shut_again_at && self.others == 0;
        if cx.now < self.shut_again_at {
            cx.wake_by(self.shut_again_at);
        }
        match self.stage {
            Stage::Copying if alike && self.waits_since.is_some() => self.tell_ready(cx),
            Stage::Copying if alike || passed && may_shut && self.is_little(cx) => {
                if self.waits_since.is_none() {
                    self.stage = Stage::FlushingForReady;
                    self.ask(cx, Op::Flush);
                } else {
                    self.for_ready = true;
                    self.shut(cx);
                }
            }
            // So little is left that the guests can wait for it.
            Stage::Following if may_shut && (ending || self.pending) && self.is_little(cx) => {
                if self.pending && cx.orders.finalize
                    || !self.pending && ending && self.settings.auto_finalize
                {
                    if self.preflushed || !self.conduct.has_guests() {
                        self.shut(cx);
                    } else {
                        // Most of the flush is not done behind the shut door.
                        self.ask(cx, last_flush(cx));
                    }
                } else if !self.pending && ending {
                    self.pending = true;
                    *cx.report = Some(Report::Returned(Ok(())));
                }
            }
            Stage::Closing if alike && self.for_ready => {
                self.for_ready = false;
                cx.operations.push(Op::Undrain);
                self.door_opened(cx.now);
                self.tell_ready(cx);
            }
            Stage::Closing if alike && is_planted(Bug::FlushSkipped) => {
                self.stage = Stage::Unmarking;
                self.marked = false;
                self.ask(cx, Op::Unmark);
            }
            Stage::Closing if alike => {
                self.stage = Stage::FlushingLast;
                self.ask(cx, last_flush(cx));
            }
            _ => {}
        }
    }

    fn settled(&mut self, cx: &mut Context<'_, Op>) {
        self.door_opened(cx.now);
        if !self.pending {
            self.pending = true;
            *cx.report = Some(Report::Returned(Ok(())));
        } else if cx.orders.finalize {
            self.stage = Stage::Over;
            *cx.report = Some(Report::Prepared(Ok(())));
        }
    }

    fn shut(&mut self, cx: &mut Context<'_, Op>) {
        self.shut_at = Some(cx.now);
        if is_planted(Bug::NoDrainBeforePivot) && !self.for_ready {
            self.stage = Stage::Closing;
            return;
        }
        self.stage = Stage::Draining;
        self.ask(cx, Op::Drain);
    }

    fn give_up(&mut self, cx: &mut Context<'_, Op>, failure: JobFailure) {
        if self.stage == Stage::Over {
            return;
        }
        // From `finalize` on, whether the stage shows it yet or not.
        let preparing = self.pending && cx.orders.finalize;
        if self.stage.is_closing() && self.stage != Stage::Draining {
            cx.operations.push(Op::Undrain);
        }
        self.door_opened(cx.now);
        self.stage = Stage::Over;
        *cx.report = Some(if preparing {
            Report::Prepared(Err(failure))
        } else if self.pending {
            Report::FailedPending(failure)
        } else {
            Report::Returned(Err(failure))
        });
    }
}

/// The flush before the end: of the source, too, if nobody will write it any more.
fn last_flush(cx: &Context<'_, Op>) -> Op {
    if cx.orders.complete && !cx.orders.soft_cancel && !is_planted(Bug::OldDiskUnflushed) {
        Op::FlushBoth
    } else {
        Op::Flush
    }
}

/// What guests may take of a limit in so many nanoseconds, in bytes.
fn share(speed_bytes_per_sec: u64, span: Nanos) -> u64 {
    let most = u128::from(speed_bytes_per_sec) * u128::from(span) * 3 / 4 / 1_000_000_000;
    most.min(u128::from(u64::MAX)) as u64
}

fn first(run: ByteRange, len: u64) -> ByteRange {
    run.split_at(run.start().saturating_add(len)).0
}

impl Body for Mirror {
    type Op = Op;
    type Outcome = Outcome;

    fn step(&mut self, cx: &mut Context<'_, Op>, event: Event<Outcome>) {
        self.heed_guests(cx);
        self.apply(cx, event);
        if cx.report.is_none() && self.stage != Stage::Over {
            self.upkeep(cx);
        }
        self.conduct(cx);
        cx.progress.set_remaining(self.left());
    }

    fn in_flight(&self) -> usize {
        self.pieces.len() + self.others + usize::from(self.asking)
    }

    fn details(&self) -> Details {
        let rates = self.conduct.rates();
        Details {
            phase: self.stage.name(),
            bytes_copied: self.done.data,
            bytes_zeroed: self.done.zeroed,
            bytes_skipped: self.done.skipped,
            bytes_shared: self.done.shared,
            bytes_dirty: self.left(),
            bytes_guest: self.seen.bytes,
            errors: self.retries.count(),
            last_error: self.retries.last(),
            in_sync: self.tracker.is_clean(),
            actively_synced: self.tracker.is_actively_synced(),
            copy_mode: if self.tracker.is_blocking() {
                CopyMode::WriteBlocking
            } else {
                CopyMode::Background
            },
            bytes_mirrored: self.seen.mirrored_bytes,
            copy_nanos: self.copy_time.total(),
            copy_bytes_per_sec: rates.copied,
            dirty_bytes_per_sec: rates.dirtied,
            converges: self.conduct.verdict(),
            eta_nanos: rates.eta_nanos(self.left()),
            window_bytes: self.conduct.window(),
            goal_nanos: self.conduct.goal(),
            pace_bytes_per_sec: self.tracker.pace(),
            downtime_nanos: self.downtime_nanos,
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
