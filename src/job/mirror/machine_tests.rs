//! The mirror's machine, fed with events by hand: no ring turns, nothing is read or written.

use blockferry_ring::sim::{World, WorldConfig};
use blockferry_ring::{Config, Ring};

use super::*;
use crate::base::bucket::Limiter;
use crate::job::body::Orders;
use crate::job::governor::GuestFirst;
use crate::job::mirror::conduct::ConductSettings;
use crate::job::mirror::converge::OnDivergence;
use crate::job::policy::ErrorAction;
use crate::job::progress::Progress;

const MIB: u64 = 1 << 20;

/// A machine with everything that a step needs.
struct Bench {
    _ring: Ring,
    machine: Mirror,
    tracker: Rc<Tracker>,
    orders: Orders,
    limiter: Limiter,
    progress: Progress,
    now: u64,
    wake_at: Option<u64>,
    answer: ErrorAction,
    errors: Vec<(IoOperation, Errno)>,
    report: Option<Report>,
}

impl Bench {
    fn new(len: u64, change: impl FnOnce(&mut Settings)) -> Bench {
        let world = World::new(WorldConfig::new(1));
        let ring = Ring::with_backend(world.backend(), &Config { arena_bytes: 1 << 20, ..Config::default() })
            .unwrap();
        let tracker = Tracker::new(&ring, len, 65_536, None, ring.notify()).unwrap();
        tracker.set_all();
        let mut settings = Settings {
            len,
            buf_size: 16 * MIB,
            zeroes_cost: false,
            auto_finalize: true,
            scans: false,
            verify: false,
            sizes_differ: false,
        };
        change(&mut settings);
        let conduct = ConductSettings {
            guest_first: GuestFirst::Off,
            on_divergence: OnDivergence::WriteBlocking,
            downtime_nanos_max: 0,
            deadline_nanos: None,
            window_max: settings.buf_size,
            piece_max: limits::COPY_BYTES,
        };
        Bench {
            _ring: ring,
            machine: Mirror::new(settings, tracker.clone(), Conduct::new(conduct, None, 0)),
            tracker,
            orders: Orders::default(),
            limiter: Limiter::new(0, 0),
            progress: Progress::new(0),
            now: 0,
            wake_at: None,
            answer: ErrorAction::Report,
            errors: Vec::new(),
            report: None,
        }
    }

    fn step(&mut self, event: Event<Outcome>) -> Vec<Op> {
        let mut operations = Vec::new();
        let (answer, errors) = (self.answer, &mut self.errors);
        self.report = None;
        self.machine.step(
            &mut Context {
                now: self.now,
                orders: self.orders,
                limiter: &mut self.limiter,
                progress: &mut self.progress,
                operations: &mut operations,
                wake_at: &mut self.wake_at,
                report: &mut self.report,
                on_error: &mut |operation, errno| {
                    errors.push((operation, errno));
                    answer
                },
            },
            event,
        );
        operations
    }

    fn done(&mut self, outcome: Outcome) -> Vec<Op> {
        self.step(Event::Done(outcome))
    }

    /// Carries out whatever is asked for, all of it data and successful, until nothing more is asked.
    fn work(&mut self, mut todo: Vec<Op>) -> Vec<Op> {
        let mut all = todo.clone();
        while !todo.is_empty() {
            let op = todo.remove(0);
            let more = match op {
                Op::Mark => self.done(Outcome::Marked(Ok(()))),
                Op::Scan => self.done(Outcome::Scanned(Ok(()))),
                Op::Status(range) => self.done(Outcome::Status(range, Ok(Extent::data(range.len())))),
                Op::Copy(range) | Op::Zero(range) => {
                    self.done(Outcome::Piece(range, Copied::default(), None))
                }
                Op::Flush | Op::FlushBoth => self.done(Outcome::Flushed(Ok(()))),
                Op::FlushMeanwhile => self.done(Outcome::FlushedMeanwhile(Ok(()))),
                Op::Find(_) => self.done(Outcome::Found),
                Op::Drain => self.done(Outcome::Drained(true)),
                Op::Undrain => self.done(Outcome::Undrained),
                Op::Verify => self.done(Outcome::Verified(Ok(()))),
                Op::Unmark => self.done(Outcome::Unmarked(Ok(()))),
            };
            all.extend(&more);
            todo.extend(more);
            if self.report.is_some() {
                break;
            }
        }
        all
    }

    fn make_ready(&mut self) {
        let first = self.step(Event::Start);
        self.work(first);
        assert!(matches!(self.report, Some(Report::Ready)), "{:?}", self.machine);
        assert_eq!(self.machine.stage(), Stage::Following);
    }
}

fn eio(operation: IoOperation) -> Failed {
    Failed { operation, errno: Errno::EIO, text: "EIO".into() }
}

#[test]
fn marks_before_data_and_flushes_before_ready() {
    let mut bench = Bench::new(4 * MIB, |_| {});
    let first = bench.step(Event::Start);
    assert_eq!(first, [Op::Mark]);
    let all = bench.work(first);
    let copies = all.iter().filter(|op| matches!(op, Op::Copy(_))).count();
    assert_eq!(copies, 16, "256 KiB a piece");
    assert_eq!(all.last(), Some(&Op::Flush));
    assert!(matches!(bench.report, Some(Report::Ready)));
    assert_eq!(bench.progress.offset(), bench.progress.len());
}

#[test]
fn an_empty_disk_is_ready_at_once() {
    let mut bench = Bench::new(0, |_| {});
    bench.make_ready();
}

#[test]
fn complete_drains_flushes_unmarks_and_then_returns() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.make_ready();
    bench.orders.complete = true;
    let ops = bench.step(Event::Wake);
    assert_eq!(ops, [Op::Drain]);
    let all = bench.work(ops);
    assert_eq!(all, [Op::Drain, Op::FlushBoth, Op::Unmark]);
    assert!(matches!(bench.report, Some(Report::Returned(Ok(())))));
    bench.orders.finalize = true;
    bench.step(Event::Wake);
    assert!(matches!(bench.report, Some(Report::Prepared(Ok(())))));
}

#[test]
fn what_guests_dirty_before_the_door_shuts_is_copied_behind_it() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.make_ready();
    bench.orders.soft_cancel = true;
    assert_eq!(bench.step(Event::Wake), [Op::Drain]);
    bench.tracker.set(ByteRange::at_saturating(70_000, 10));
    let ops = bench.done(Outcome::Drained(true));
    assert_eq!(ops, [Op::Copy(ByteRange::at_saturating(65_536, 65_536))]);
    assert_eq!(bench.machine.stage(), Stage::Closing);
    let all = bench.work(ops);
    assert_eq!(
        all[all.len() - 2..],
        [Op::Flush, Op::Unmark],
        "guests stay on the source: its flush is their business"
    );
    assert!(matches!(bench.report, Some(Report::Returned(Ok(())))));
}

#[test]
fn a_pending_job_follows_and_drains_only_to_finalize() {
    let mut bench = Bench::new(MIB, |settings| settings.auto_finalize = false);
    bench.make_ready();
    bench.orders.complete = true;
    assert_eq!(bench.step(Event::Wake), []);
    assert!(matches!(bench.report, Some(Report::Returned(Ok(())))));
    bench.orders.pending = true;
    bench.tracker.set(ByteRange::at_saturating(0, 1));
    let ops = bench.step(Event::Wake);
    assert_eq!(ops.len(), 1, "it follows: {ops:?}");
    bench.work(ops);
    assert!(bench.report.is_none());
    bench.orders.finalize = true;
    let ops = bench.step(Event::Wake);
    assert_eq!(bench.work(ops), [Op::Drain, Op::FlushBoth, Op::Unmark]);
    assert!(matches!(bench.report, Some(Report::Prepared(Ok(())))));
}

#[test]
fn a_pause_behind_the_shut_door_opens_it() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.make_ready();
    bench.orders.complete = true;
    bench.step(Event::Wake);
    bench.done(Outcome::Drained(true));
    assert_eq!(bench.machine.stage(), Stage::FlushingLast);
    bench.orders.hold = true;
    assert_eq!(bench.step(Event::Wake), [Op::Undrain]);
    assert_eq!(bench.done(Outcome::Flushed(Ok(()))), []);
    assert_eq!((bench.machine.stage(), bench.machine.in_flight()), (Stage::Following, 0));
    bench.orders.hold = false;
    let ops = bench.step(Event::Wake);
    assert_eq!(bench.work(ops), [Op::Drain, Op::FlushBoth, Op::Unmark]);
}

#[test]
fn a_failed_last_flush_opens_the_door_and_keeps_the_job_ready() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.make_ready();
    bench.orders.complete = true;
    bench.answer = ErrorAction::Ignore;
    bench.step(Event::Wake);
    assert_eq!(bench.done(Outcome::Drained(true)), [Op::FlushBoth]);
    assert_eq!(bench.done(Outcome::Flushed(Err(eio(IoOperation::Write)))), [Op::Undrain]);
    assert_eq!(bench.errors, [(IoOperation::Write, Errno::EIO)]);
    assert!(bench.report.is_none() && bench.wake_at.is_some(), "tried again after a pause");
    bench.now = bench.wake_at.take().unwrap();
    let ops = bench.step(Event::Wake);
    assert_eq!(bench.work(ops), [Op::Drain, Op::FlushBoth, Op::Unmark]);
}

#[test]
fn a_target_whose_mark_may_be_gone_is_marked_again_before_more_data() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.make_ready();
    bench.orders.complete = true;
    bench.answer = ErrorAction::Ignore;
    bench.step(Event::Wake);
    bench.done(Outcome::Drained(true));
    assert_eq!(bench.done(Outcome::Flushed(Ok(()))), [Op::Unmark]);
    assert_eq!(bench.done(Outcome::Unmarked(Err(eio(IoOperation::Write)))), [Op::Undrain]);
    bench.tracker.set(ByteRange::at_saturating(0, 1));
    bench.now = bench.wake_at.take().unwrap();
    assert_eq!(bench.step(Event::Wake), [Op::Mark]);
}

#[test]
fn a_failed_piece_is_dirty_again_and_report_waits_for_what_is_in_flight() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.step(Event::Start);
    let ops = bench.done(Outcome::Marked(Ok(())));
    let [Op::Status(range)] = ops[..] else { panic!("{ops:?}") };
    let copies = bench.done(Outcome::Status(range, Ok(Extent::data(range.len()))));
    assert_eq!(copies.len(), 4);
    let piece = |op: &Op| match op {
        Op::Copy(range) => *range,
        other => panic!("{other:?}"),
    };
    let (first, second) = (piece(&copies[0]), piece(&copies[1]));
    let failed = Some((first.start() + 65_536, Some(eio(IoOperation::Read))));
    assert_eq!(bench.done(Outcome::Piece(first, Copied::default(), failed)), []);
    assert_eq!(bench.tracker.dirty_bytes(), first.len() - 65_536);
    assert!(bench.report.is_none());
    bench.done(Outcome::Piece(second, Copied::default(), None));
    for op in &copies[2..] {
        bench.done(Outcome::Piece(piece(op), Copied::default(), None));
    }
    assert!(matches!(&bench.report, Some(Report::Returned(Err(failure))) if failure.errno == Errno::EIO));
}

#[test]
fn force_cancel_does_not_wait() {
    let mut bench = Bench::new(MIB, |_| {});
    bench.step(Event::Start);
    let ops = bench.done(Outcome::Marked(Ok(())));
    let [Op::Status(range)] = ops[..] else { panic!("{ops:?}") };
    assert!(!bench.done(Outcome::Status(range, Ok(Extent::data(range.len())))).is_empty());
    bench.orders.force_cancel = true;
    bench.step(Event::Wake);
    assert!(matches!(&bench.report, Some(Report::Returned(Err(_)))));
}

#[test]
fn holes_go_in_one_piece_until_guests_write() {
    let mut bench = Bench::new(64 * MIB, |_| {});
    bench.step(Event::Start);
    let ops = bench.done(Outcome::Marked(Ok(())));
    let [Op::Status(range)] = ops[..] else { panic!("{ops:?}") };
    let ops = bench.done(Outcome::Status(range, Ok(Extent::hole(range.len()))));
    assert_eq!(ops, [Op::Zero(ByteRange::at_saturating(0, 64 * MIB))]);
    // It turned out to hold data from 1 MiB on: that is dirty again, and asked about anew.
    let Op::Zero(piece) = ops[0] else { unreachable!() };
    let ops = bench.done(Outcome::Piece(piece, Copied::default(), Some((MIB, None))));
    assert!(matches!(ops[..], [Op::Status(again)] if again.start() == MIB), "{ops:?}");
    assert!(bench.errors.is_empty());
}

#[test]
fn the_speed_limit_holds_back_and_names_its_time() {
    let mut bench = Bench::new(64 * MIB, |_| {});
    bench.limiter = Limiter::new(0, MIB);
    bench.step(Event::Start);
    let ops = bench.done(Outcome::Marked(Ok(())));
    let [Op::Status(range)] = ops[..] else { panic!("{ops:?}") };
    let ops = bench.done(Outcome::Status(range, Ok(Extent::data(range.len()))));
    assert_eq!(ops.len(), 1, "one request may overshoot, a second may not start");
    assert!(bench.wake_at.is_some());
}

#[test]
fn different_sizes_fail_after_the_start_and_touch_nothing() {
    let mut bench = Bench::new(MIB, |settings| settings.sizes_differ = true);
    assert_eq!(bench.step(Event::Start), []);
    let Some(Report::Returned(Err(failure))) = &bench.report else { panic!("{:?}", bench.report) };
    assert_eq!(failure.to_string(), "Source and target image have different sizes");
}
