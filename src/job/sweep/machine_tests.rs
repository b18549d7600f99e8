//! The sweep's machine, fed with events by hand.

use blockferry_ring::Errno;

use super::*;
use crate::base::bucket::Limiter;
use crate::job::body::Orders;
use crate::job::policy::{ErrorAction, IoOperation};
use crate::job::progress::Progress;

const MIB: u64 = 1 << 20;

/// A machine with everything that a step needs.
struct Bench {
    machine: Sweep,
    orders: Orders,
    limiter: Limiter,
    progress: Progress,
    now: u64,
    wake_at: Option<u64>,
    answer: ErrorAction,
    report: Option<Report>,
}

fn range(from: u64, to: u64) -> ByteRange {
    ByteRange::at_saturating(from, to - from)
}

fn failed(operation: IoOperation, errno: Errno) -> Failed {
    Failed { operation, errno, text: "told".into() }
}

impl Bench {
    fn new(len: u64) -> Bench {
        let settings = Settings {
            len,
            window_max: 4 * MIB,
            zeroes_cost: false,
            guest_first: GuestFirst::Auto,
            front: None,
            wishes: None,
        };
        Bench {
            machine: Sweep::new(settings, 0),
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

    /// Prepared, and told what is to be done.
    fn begun(len: u64, pieces: Vec<(ByteRange, What)>) -> (Bench, Vec<Op>) {
        let mut bench = Bench::new(len);
        assert_eq!(bench.step(Event::Start), [Op::Prepare]);
        assert_eq!(bench.done(Outcome::Prepared(Ok(()))), [Op::Status(range(0, len))]);
        let operations = bench.done(Outcome::Status(Ok(pieces)));
        (bench, operations)
    }

    fn copied(&mut self, range: ByteRange) -> Vec<Op> {
        let copied = Copied { data: range.len(), ..Copied::default() };
        self.done(Outcome::Piece(range, What::Data, copied, None))
    }
}

#[test]
fn from_the_first_question_to_the_new_chain() {
    let pieces = vec![
        (range(0, MIB), What::Data),
        (range(MIB, 3 * MIB), What::Skip),
        (range(3 * MIB, 4 * MIB), What::Zero),
    ];
    let (mut bench, operations) = Bench::begun(4 * MIB, pieces);
    assert_eq!(operations, [Op::Copy(range(0, MIB)), Op::Zero(range(3 * MIB, 4 * MIB))]);
    assert_eq!(bench.progress.offset(), 2 * MIB);
    assert_eq!(bench.copied(range(0, MIB)), []);
    let zeroed = Copied { zeroed: MIB, ..Copied::default() };
    let last = Outcome::Piece(range(3 * MIB, 4 * MIB), What::Zero, zeroed, None);
    assert_eq!(bench.done(last), [Op::Flush]);
    assert_eq!(bench.done(Outcome::Flushed(Ok(()))), []);
    assert!(matches!(bench.report, Some(Report::Returned(Ok(())))));
    // Nothing happens before it is finalized.
    assert_eq!(bench.step(Event::Wake), []);
    bench.orders.finalize = true;
    assert_eq!(bench.step(Event::Wake), [Op::Relink]);
    assert_eq!(bench.done(Outcome::Relinked(Ok(()))), []);
    assert!(matches!(bench.report, Some(Report::Prepared(Ok(())))));
    assert_eq!((bench.progress.offset(), bench.progress.len()), (4 * MIB, 4 * MIB));
    let details = bench.machine.details();
    assert_eq!((details.bytes_copied, details.bytes_zeroed, details.bytes_skipped), (MIB, MIB, 2 * MIB));
}

/// Beside guests, a copy of so many MiB at once.
fn beside_guests(mib: u64) -> (Bench, Vec<Op>) {
    let (mut bench, mut operations) = Bench::begun(mib * MIB, vec![(range(0, mib * MIB), What::Data)]);
    let all = crate::block::load::Counts::default();
    for _ in 0..2 {
        bench.now += crate::job::governor::LOOK_NANOS;
        let sight = Sight { now: bench.now, all: &all, has_guests: true, is_late: false };
        bench.machine.governor.look(sight);
    }
    // All copies but the last one.
    while bench.progress.offset() + limits::SWEEP_CHUNK_BYTES < mib * MIB {
        let Op::Copy(piece) = operations.remove(0) else { panic!("{operations:?}") };
        operations.extend(bench.copied(piece));
    }
    (bench, operations)
}

#[test]
fn what_was_written_is_flushed_meanwhile_and_all_of_it_in_the_end() {
    let (mut bench, mut operations) = beside_guests(20);
    let at = operations.iter().position(|op| *op == Op::FlushMeanwhile).expect("more than 16 MiB");
    operations.remove(at);
    let [Op::Copy(last)] = operations[..] else { panic!("{operations:?}") };
    assert_eq!(bench.copied(last), [], "a flush that began earlier is not the last one");
    assert_eq!(bench.done(Outcome::FlushedMeanwhile(Ok(()))), [Op::Flush]);
}

#[test]
fn a_flush_that_fails_meanwhile_ends_the_job() {
    let (mut bench, operations) = beside_guests(20);
    assert!(operations.contains(&Op::FlushMeanwhile), "{operations:?}");
    let error = failed(IoOperation::Write, Errno::EIO);
    assert_eq!(bench.done(Outcome::FlushedMeanwhile(Err(error))), [], "what is in flight is waited for");
    let Some(Op::Copy(last)) = operations.iter().find(|op| matches!(op, Op::Copy(_))).copied() else {
        panic!("{operations:?}")
    };
    assert_eq!(bench.copied(last), [Op::Restore]);
}

#[test]
fn a_chain_that_cannot_be_changed_is_given_back_before_the_job_fails() {
    let (mut bench, _) = Bench::begun(MIB, vec![(range(0, MIB), What::Skip)]);
    assert_eq!(bench.done(Outcome::Flushed(Ok(()))), []);
    bench.orders.finalize = true;
    assert_eq!(bench.step(Event::Wake), [Op::Relink]);
    // A cancel comes too late to leave it half done.
    bench.orders.force_cancel = true;
    assert_eq!(bench.step(Event::Wake), []);
    assert!(bench.report.is_none());
    bench.orders.force_cancel = false;
    assert_eq!(bench.done(Outcome::Relinked(Err(failed(IoOperation::Write, Errno::EIO)))), [Op::Restore]);
    assert!(bench.report.is_none());
    assert_eq!(bench.done(Outcome::Restored), []);
    assert!(matches!(&bench.report, Some(Report::Prepared(Err(failure))) if failure.errno == Errno::EIO));
}

#[test]
fn what_is_in_flight_stays_within_the_window() {
    let (mut bench, operations) = Bench::begun(16 * MIB, vec![(range(0, 16 * MIB), What::Data)]);
    let whole = |n: u64| Op::Copy(range(n * MIB, (n + 1) * MIB));
    assert_eq!(operations, [whole(0), whole(1), whole(2), whole(3)]);
    assert_eq!(bench.copied(range(2 * MIB, 3 * MIB)), [whole(4)]);
    assert_eq!(bench.machine.in_flight(), 4);
}

#[test]
fn a_failed_piece_is_tried_again_after_a_pause_that_doubles() {
    let (mut bench, _) = Bench::begun(MIB, vec![(range(0, MIB), What::Data)]);
    bench.answer = ErrorAction::Ignore;
    for pause in [1, 2, 4] {
        let error = Some((MIB / 2, failed(IoOperation::Write, Errno::ENOSPC)));
        let half = Copied { data: MIB / 2, ..Copied::default() };
        let from = if pause == 1 { 0 } else { MIB / 2 };
        assert_eq!(bench.done(Outcome::Piece(range(from, MIB), What::Data, half, error)), []);
        let at = bench.now + pause * limits::ERROR_PAUSE_NANOS_MIN;
        assert_eq!(bench.wake_at, Some(at));
        bench.now = at;
        assert_eq!(bench.step(Event::Wake), [Op::Copy(range(MIB / 2, MIB))]);
    }
    assert_eq!(bench.progress.offset(), MIB / 2);
}

#[test]
fn an_error_that_stops_the_job_holds_it_until_it_is_resumed() {
    let (mut bench, _) = Bench::begun(MIB, vec![(range(0, MIB), What::Data)]);
    bench.answer = ErrorAction::Stop;
    let error = Some((0, failed(IoOperation::Write, Errno::ENOSPC)));
    assert_eq!(bench.done(Outcome::Piece(range(0, MIB), What::Data, Copied::default(), error)), []);
    bench.orders.hold = true;
    assert_eq!(bench.step(Event::Wake), []);
    bench.orders.hold = false;
    assert_eq!(bench.step(Event::Wake), [Op::Copy(range(0, MIB))]);
}

#[test]
fn an_error_that_is_reported_waits_for_what_is_in_flight_and_gives_everything_back() {
    let (mut bench, _) = Bench::begun(2 * MIB, vec![(range(0, 2 * MIB), What::Data)]);
    let error = Some((0, failed(IoOperation::Read, Errno::EIO)));
    assert_eq!(bench.done(Outcome::Piece(range(0, MIB), What::Data, Copied::default(), error)), []);
    assert!(bench.report.is_none());
    assert_eq!(bench.copied(range(MIB, 2 * MIB)), [Op::Restore]);
    assert_eq!(bench.done(Outcome::Restored), []);
    assert!(matches!(&bench.report, Some(Report::Returned(Err(failure))) if failure.errno == Errno::EIO));
}

#[test]
fn force_cancel_does_not_wait_for_copies() {
    let (mut bench, _) = Bench::begun(MIB, vec![(range(0, MIB), What::Data)]);
    bench.orders.force_cancel = true;
    assert_eq!(bench.step(Event::Wake), []);
    assert!(matches!(bench.report, Some(Report::Returned(Err(_)))));
}

#[test]
fn the_limit_holds_back_what_is_copied_and_nothing_else() {
    let mut bench = Bench::new(64 * MIB);
    bench.limiter = Limiter::new(0, MIB);
    bench.step(Event::Start);
    bench.done(Outcome::Prepared(Ok(())));
    let pieces = vec![(range(0, 2 * MIB), What::Data), (range(2 * MIB, 64 * MIB), What::Skip)];
    assert_eq!(bench.done(Outcome::Status(Ok(pieces))), [Op::Copy(range(0, MIB))]);
    let at = bench.wake_at.expect("a time to ask again");
    assert!(at > 0 && at <= 2_000_000_000, "{at}");
    bench.now = at;
    assert_eq!(bench.step(Event::Wake), [Op::Copy(range(MIB, 2 * MIB))]);
    assert_eq!(bench.progress.offset(), 62 * MIB);
}

#[test]
fn what_guests_read_comes_first_and_is_bounded() {
    let world = blockferry_ring::sim::World::new(blockferry_ring::sim::WorldConfig::new(1));
    let ring =
        blockferry_ring::Ring::with_backend(world.backend(), &blockferry_ring::Config::default()).unwrap();
    let wishes = Rc::new(Wishes::new(ring.notify()));
    let mut bench = Bench::new(64 * MIB);
    bench.machine.settings.wishes = Some(wishes.clone());
    bench.step(Event::Start);
    for n in 0..limits::SWEEP_WISHES_MAX as u64 + 9 {
        wishes.push(range(n * 4096, n * 4096 + 4096));
    }
    assert_eq!(wishes.ranges.borrow().len(), limits::SWEEP_WISHES_MAX);
    let operations = bench.done(Outcome::Prepared(Ok(())));
    let granted = operations.iter().filter(|op| matches!(op, Op::Wish(_))).count();
    assert_eq!(granted, limits::SWEEP_WISHES_IN_FLIGHT);
    assert_eq!(operations[0], Op::Wish(range(0, 4096)));
    let next = bench.done(Outcome::Wished(Copied::default()));
    assert_eq!(next.len(), 1);
}
