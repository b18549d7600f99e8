//! The conversion's machine, fed with events by hand.

use blockferry_ring::Errno;

use super::*;
use crate::base::bucket::Limiter;
use crate::job::body::Orders;
use crate::job::policy::{ErrorAction, IoOperation};
use crate::job::progress::Progress;

const MIB: u64 = 1 << 20;

/// A machine with everything that a step needs.
struct Bench {
    machine: Convert,
    orders: Orders,
    limiter: Limiter,
    progress: Progress,
    now: u64,
    wake_at: Option<u64>,
    answer: ErrorAction,
    report: Option<Report>,
}

impl Bench {
    fn new(len: u64, change: impl FnOnce(&mut Settings)) -> Bench {
        let mut settings = Settings {
            len,
            parallel: (4, 4),
            skip_zeroes: false,
            zeroes_cost: false,
            chunk: MIB,
            share: false,
            verify: false,
        };
        change(&mut settings);
        Bench {
            machine: Convert::new(settings),
            orders: Orders::default(),
            limiter: Limiter::new(0, 0),
            progress: Progress::new(0),
            now: 0,
            wake_at: None,
            answer: ErrorAction::Report,
            report: None,
        }
    }

    fn step(&mut self, event: Event<Outcome>) -> Vec<Op> {
        let mut operations = Vec::new();
        let answer = self.answer;
        (self.report, self.wake_at) = (None, None);
        self.machine.step(
            &mut Context {
                now: self.now,
                orders: self.orders,
                limiter: &mut self.limiter,
                progress: &mut self.progress,
                operations: &mut operations,
                wake_at: &mut self.wake_at,
                report: &mut self.report,
                on_error: &mut |_, _| answer,
            },
            event,
        );
        operations
    }

    fn done(&mut self, outcome: Outcome) -> Vec<Op> {
        self.step(Event::Done(outcome))
    }

    /// Started and marked: the first question.
    fn begin(&mut self) -> Vec<Op> {
        assert_eq!(self.step(Event::Start), [Op::Mark]);
        self.done(Outcome::Marked(Ok(())))
    }
}

fn range(from: u64, to: u64) -> ByteRange {
    ByteRange::at_saturating(from * MIB, (to - from) * MIB)
}

fn copied(range: ByteRange) -> Outcome {
    let done = Copied { data: range.len(), ..Copied::default() };
    Outcome::Piece(range, What::Data, done, None)
}

fn broken(operation: IoOperation) -> Failed {
    Failed { operation, errno: Errno::EIO, text: "broken".into() }
}

#[test]
fn pieces_end_in_any_order_and_then_the_target_is_flushed_and_unmarked() {
    let mut b = Bench::new(6 * MIB, |s| s.verify = true);
    assert_eq!(b.begin(), [Op::Status(range(0, 6))]);
    let extents = vec![(range(0, 3), What::Data), (range(3, 5), What::Zero), (range(5, 6), What::Skip)];
    let ops = b.done(Outcome::Status(Ok(extents)));
    assert_eq!(
        ops,
        [Op::Copy(range(0, 1)), Op::Copy(range(1, 2)), Op::Copy(range(2, 3)), Op::Zero(range(3, 5))]
    );
    let zeroed = Copied { zeroed: 2 * MIB, ..Copied::default() };
    assert!(b.done(Outcome::Piece(range(3, 5), What::Zero, zeroed, None)).is_empty());
    for n in [1, 0] {
        assert!(b.done(copied(range(n, n + 1))).is_empty());
    }
    assert_eq!(b.done(copied(range(2, 3))), [Op::Flush]);
    assert_eq!(b.progress.remaining(), 0);
    assert_eq!(b.done(Outcome::Flushed(Ok(()))), [Op::Verify]);
    assert!(!b.machine.details().in_sync);
    assert_eq!(b.done(Outcome::Verified(Ok(()))), [Op::Unmark]);
    assert!(b.done(Outcome::Unmarked(Ok(()))).is_empty());
    assert!(matches!(b.report, Some(Report::Returned(Ok(())))));
    b.orders.finalize = true;
    b.step(Event::Wake);
    assert!(matches!(b.report, Some(Report::Prepared(Ok(())))));
    let details = b.machine.details();
    assert_eq!((details.bytes_copied, details.bytes_zeroed, details.bytes_skipped), (3 * MIB, 2 * MIB, MIB));
}

#[test]
fn no_more_than_allowed_are_in_flight_and_questions_run_ahead() {
    let mut b = Bench::new(40 * MIB, |s| s.parallel = (2, 2));
    b.begin();
    let ops = b.done(Outcome::Status(Ok(vec![(range(0, 20), What::Data)])));
    // What comes next is asked while these are copied.
    assert_eq!(ops, [Op::Status(range(20, 40)), Op::Copy(range(0, 1)), Op::Copy(range(1, 2))]);
    assert_eq!(b.done(copied(range(1, 2))), [Op::Copy(range(2, 3))]);
    assert_eq!(b.machine.in_flight(), 3);
}

#[test]
fn a_target_that_is_zero_is_not_zeroed() {
    let mut b = Bench::new(8 * MIB, |s| s.skip_zeroes = true);
    b.begin();
    assert_eq!(b.done(Outcome::Status(Ok(vec![(range(0, 8), What::Zero)]))), [Op::Flush]);
    assert_eq!(b.machine.details().bytes_skipped, 8 * MIB);
}

#[test]
fn what_cannot_be_shared_is_read() {
    let mut b = Bench::new(8 * MIB, |s| s.share = true);
    b.begin();
    assert_eq!(b.done(Outcome::Status(Ok(vec![(range(0, 8), What::Data)]))), [Op::Share(range(0, 8))]);
    // Part of it was shared: the rest of this piece is read.
    let ops = b.done(Outcome::Shared(range(0, 8), Ok(6 * MIB)));
    assert_eq!(ops, [Op::Copy(range(6, 7)), Op::Copy(range(7, 8))]);
    let mut b = Bench::new(1024 * MIB, |s| s.share = true);
    b.begin();
    let ops = b.done(Outcome::Status(Ok(vec![(range(0, 1024), What::Data)])));
    assert_eq!(ops.len(), 4);
    // Nothing of it: nothing else is tried.
    let ops = b.done(Outcome::Shared(range(256, 512), Ok(256 * MIB)));
    assert_eq!(ops, [Op::Copy(range(256, 257))]);
    assert!(!b.machine.settings.share);
}

#[test]
fn a_write_that_fails_ends_the_job_when_all_is_quiet() {
    let mut b = Bench::new(2 * MIB, |_| {});
    b.begin();
    b.done(Outcome::Status(Ok(vec![(range(0, 2), What::Data)])));
    let failed = Some((0, broken(IoOperation::Write)));
    assert!(b.done(Outcome::Piece(range(0, 1), What::Data, Copied::default(), failed)).is_empty());
    assert!(b.report.is_none());
    b.done(copied(range(1, 2)));
    assert!(matches!(&b.report, Some(Report::Returned(Err(failure))) if failure.to_string() == "broken"));
}

#[test]
fn ignored_errors_are_tried_again_after_a_pause() {
    let mut b = Bench::new(2 * MIB, |_| {});
    b.answer = ErrorAction::Ignore;
    b.begin();
    b.done(Outcome::Status(Ok(vec![(range(0, 2), What::Zero)])));
    let half = Copied { zeroed: MIB, ..Copied::default() };
    let failed = Some((MIB, broken(IoOperation::Write)));
    assert!(b.done(Outcome::Piece(range(0, 2), What::Zero, half, failed)).is_empty());
    b.now = b.wake_at.expect("a time to try again");
    // As what it was, from where it failed.
    assert_eq!(b.step(Event::Wake), [Op::Zero(range(1, 2))]);
}

#[test]
fn a_stopped_job_goes_on_where_it_stopped() {
    let mut b = Bench::new(MIB, |_| {});
    b.answer = ErrorAction::Stop;
    b.begin();
    b.done(Outcome::Status(Ok(vec![(range(0, 1), What::Data)])));
    assert_eq!(b.done(copied(range(0, 1))), [Op::Flush]);
    assert!(b.done(Outcome::Flushed(Err(broken(IoOperation::Write)))).is_empty());
    assert_eq!(b.step(Event::Wake), [Op::Flush]);
}

#[test]
fn a_difference_is_never_forgiven_and_a_cancel_does_not_wait() {
    let mut b = Bench::new(0, |s| s.verify = true);
    b.answer = ErrorAction::Ignore;
    assert_eq!(b.begin(), [Op::Flush]);
    b.done(Outcome::Flushed(Ok(())));
    assert!(b.done(Outcome::Verified(Err(broken(IoOperation::Write)))).is_empty());
    assert!(matches!(b.report, Some(Report::Returned(Err(_)))));

    let mut b = Bench::new(2 * MIB, |_| {});
    b.begin();
    b.done(Outcome::Status(Ok(vec![(range(0, 2), What::Data)])));
    b.orders.force_cancel = true;
    assert!(b.step(Event::Wake).is_empty());
    assert!(matches!(&b.report, Some(Report::Returned(Err(failure))) if failure.errno == Errno::ECANCELED));
    // What still ends is nobody's business.
    assert!(b.done(copied(range(0, 1))).is_empty() && b.report.is_none());
}

#[test]
fn a_speed_limit_holds_pieces_back() {
    let mut b = Bench::new(64 * MIB, |s| s.parallel = (16, 16));
    b.limiter.set_speed(0, MIB);
    b.begin();
    let ops = b.done(Outcome::Status(Ok(vec![(range(0, 64), What::Data)])));
    assert!(ops.len() < 4 && b.wake_at.is_some(), "{ops:?}");
}
