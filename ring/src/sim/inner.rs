//! The world's inside: the clock, the events to come, and the life of an operation.
//!
//! An operation is submitted, takes effect at one instant, and ends at a later one; both are drawn
//! when it is submitted. Events run in the order of their time, and of their making when times are
//! equal. Operations of streams have no such instants: they wait in the queue of their direction, and
//! pumping it moves bytes ([`super::stream`]).

use std::collections::BTreeMap;

use super::WorldConfig;
use super::faults::{Faults, OpKind, Verdict};
use super::flight::{Flight, OpenFile, Port, Queued, Target, What};
use super::fs::Fs;
use super::stream::Net;
use super::trace::{Entry, Trace};
use crate::Nanos;
use crate::backend::Work;
use crate::errno::Errno;
use crate::op::Op;
use crate::rng::Rng;

#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// An operation takes effect.
    Effect(u64),
    /// An operation ends.
    End(u64),
    /// A direction of a connection moves bytes: connection, side that sends.
    Pump(u64, usize),
    /// A listener hands connections over.
    Accept(u64),
}

pub(super) struct Inner {
    pub(super) config: WorldConfig,
    pub(super) now: Nanos,
    sequence: u64,
    /// Times and orders.
    pub(super) rand: Rng,
    /// What goes wrong. Apart, so that switching a rule off does not turn every other die.
    pub(super) fault_rand: Rng,
    /// What rings ask for.
    pub(super) user_rand: Rng,
    pub(super) trace: Trace,
    pub(super) faults: Faults,
    pub(super) fs: Fs,
    pub(super) net: Net,
    pub(super) files: BTreeMap<u32, OpenFile>,
    file_next: u32,
    pub(super) flights: BTreeMap<u64, Flight>,
    events: BTreeMap<(Nanos, u64), Event>,
    pub(super) ports: BTreeMap<u32, Port>,
}

impl Inner {
    pub(super) fn new(config: WorldConfig) -> Inner {
        let mut seeds = Rng::new(config.seed);
        let mut rand = || Rng::new(seeds.next_u64());
        Inner {
            now: 0,
            sequence: 0,
            rand: rand(),
            fault_rand: rand(),
            user_rand: rand(),
            trace: Trace::new(config.trace_tail_lines),
            faults: Faults::default(),
            fs: Fs::new(config.new_file.clone()),
            net: Net::default(),
            files: BTreeMap::new(),
            file_next: 0,
            flights: BTreeMap::new(),
            events: BTreeMap::new(),
            ports: BTreeMap::new(),
            config,
        }
    }

    /// The next event number: they order everything that happens.
    pub(super) fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    pub(super) fn at(&mut self, time: Nanos, event: Event) {
        let sequence = self.next();
        self.events.insert((time, sequence), event);
    }

    pub(super) fn note(&mut self, entry: Entry) {
        self.trace.add(self.now, entry);
    }

    pub(super) fn add_file(&mut self, file: OpenFile) -> u32 {
        let id = self.file_next;
        // FileIds travel as results of operations, so they stay non-negative numbers of 32 bits.
        self.file_next = (self.file_next + 1) & (i32::MAX as u32);
        self.files.insert(id, file);
        id
    }

    /// Runs every event that is due.
    pub(super) fn run_due(&mut self) {
        while self.next_event().is_some_and(|time| time <= self.now) {
            self.step();
        }
    }

    pub(super) fn next_event(&self) -> Option<Nanos> {
        self.events.first_key_value().map(|(key, _)| key.0)
    }

    /// Goes to the next event and runs it.
    pub(super) fn step(&mut self) {
        let Some(((time, _), event)) = self.events.pop_first() else { return };
        self.now = self.now.max(time);
        match event {
            Event::Effect(id) => self.effect(id),
            Event::End(id) => self.end(id),
            Event::Pump(connection, side) => self.pump(connection, side),
            Event::Accept(listener) => self.hand_over(listener),
        }
    }

    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Everything that a ring has queued goes under way.
    pub(super) fn submit_queue(&mut self, port: u32) {
        let Some(queue) = self.ports.get_mut(&port).map(|p| std::mem::take(&mut p.queue)) else { return };
        for queued in queue {
            match queued {
                Queued::Op(user_data, op) => self.submit(port, user_data, op),
                Queued::Cancel(user_data) => self.cancel(port, user_data),
            }
        }
    }

    fn submit(&mut self, port: u32, user_data: u64, op: Op) {
        let id = self.next();
        let file = op.file().0;
        let Some(open) = self.files.get(&file).filter(|open| open.port == port).cloned() else {
            self.post(port, user_data, -libc::EBADF);
            return;
        };
        let verdict = self.faults.decide(OpKind::of(&op), &open.label, &mut self.fault_rand);
        let flight = Flight {
            id,
            port,
            user_data,
            what: What::Op(op),
            file,
            label: open.label,
            target: open.target,
            write: open.write,
            direct: open.direct,
            verdict,
            settled: false,
            result: 0,
            moved: 0,
            changes: Vec::new(),
        };
        match open.target {
            Target::Disk(number) => self.submit_disk(flight, number),
            Target::Listener(_) => self.submit_accept(flight),
            Target::Stream(connection, side) => self.submit_stream(flight, connection, side),
            Target::Socket => self.submit_connect(flight),
            Target::Nothing => {}
        }
    }

    fn submit_disk(&mut self, mut flight: Flight, number: u64) {
        let (id, verdict) = (flight.id, flight.verdict);
        if let Some(errno) = verdict.refusal() {
            self.refuse(flight, errno);
            return;
        }
        if let Some((_, range)) = flight.written() {
            let others = self.flights.values().filter_map(Flight::written);
            let overlaps = others
                .filter(|(other, r)| *other == number && r.start < range.end && range.start < r.end)
                .count() as u64;
            if let Some(inode) = self.fs.inodes.get_mut(&number) {
                inode.overlaps += overlaps;
            }
        }
        let Some(model) = self.fs.inodes.get(&number).map(|inode| inode.model.latency) else {
            self.refuse(flight, Errno::EBADF);
            return;
        };
        let span = model.draw(&mut self.rand).saturating_add(verdict.delay_nanos);
        let effect = self.now + self.rand.below(span + 1);
        let end = self.now + span;
        // What hangs may have reached the disk all the same.
        let takes_effect = !verdict.hang || self.rand.chance(32_768);
        flight.settled = false;
        self.flights.insert(id, flight);
        if takes_effect {
            self.at(effect, Event::Effect(id));
        }
        if !verdict.hang {
            self.at(end, Event::End(id));
        }
    }

    fn submit_accept(&mut self, flight: Flight) {
        let (id, verdict) = (flight.id, flight.verdict);
        if let Some(errno) = verdict.error {
            self.refuse(flight, errno);
            return;
        }
        if !matches!(flight.op(), Some(Op::Accept { .. })) {
            self.refuse(flight, Errno::ENOTCONN);
            return;
        }
        self.flights.insert(id, flight);
        if !verdict.hang {
            let span = self.config.stream.latency.draw(&mut self.rand).saturating_add(verdict.delay_nanos);
            self.at(self.now + span, Event::Effect(id));
        }
    }

    fn submit_connect(&mut self, flight: Flight) {
        let (id, verdict) = (flight.id, flight.verdict);
        if let Some(errno) = verdict.error {
            return self.refuse(flight, errno);
        }
        if !matches!(flight.op(), Some(Op::Connect { .. })) {
            return self.refuse(flight, Errno::ENOTCONN);
        }
        self.flights.insert(id, flight);
        if !verdict.hang {
            let span = self.config.stream.latency.draw(&mut self.rand).saturating_add(verdict.delay_nanos);
            self.at(self.now + span, Event::Effect(id));
        }
    }

    /// It ends soon, and nothing else happens.
    pub(super) fn refuse(&mut self, mut flight: Flight, errno: Errno) {
        let id = flight.id;
        flight.settled = true;
        flight.verdict.hang = false;
        flight.result = -errno.0;
        self.flights.insert(id, flight);
        let span = self.rand.range(100..2_001);
        self.at(self.now + span, Event::End(id));
    }

    /// A call for the offload pool; it runs here, when it takes effect.
    pub(super) fn offload(&mut self, port: u32, user_data: u64, work: Work) {
        let id = self.next();
        let flight = Flight {
            id,
            port,
            user_data,
            what: What::Work(Some(work)),
            file: u32::MAX,
            label: "offload".into(),
            target: Target::Nothing,
            write: false,
            direct: false,
            verdict: Verdict::default(),
            settled: false,
            result: 0,
            moved: 0,
            changes: Vec::new(),
        };
        self.flights.insert(id, flight);
        let span = self.config.offload.draw(&mut self.rand);
        let effect = self.now + self.rand.below(span + 1);
        self.at(effect, Event::Effect(id));
        self.at(self.now + span, Event::End(id));
    }

    fn effect(&mut self, id: u64) {
        let Some(mut flight) = self.flights.remove(&id) else { return };
        if flight.settled {
            self.flights.insert(id, flight);
            return;
        }
        flight.settled = true;
        match (&mut flight.what, flight.target) {
            (What::Work(work), _) => {
                if let Some(work) = work.take() {
                    work();
                }
                self.flights.insert(id, flight);
            }
            (_, Target::Disk(number)) => {
                flight.result = self.disk_effect(&mut flight, number);
                self.flights.insert(id, flight);
            }
            (_, Target::Listener(listener)) => {
                self.flights.insert(id, flight);
                self.net.accepts_push(listener, id);
                self.hand_over(listener);
            }
            (_, Target::Socket) => {
                let result = self.connect_socket(flight.file).map_or_else(|errno| -errno.0, |()| 0);
                self.finish(flight, result, 0);
            }
            _ => {
                self.flights.insert(id, flight);
            }
        }
    }

    fn end(&mut self, id: u64) {
        let Some(flight) = self.flights.remove(&id) else { return };
        if let Target::Disk(number) = flight.target {
            self.end_changes(&flight, number);
        }
        let result = flight.result;
        self.finish(flight, result, 0);
    }

    /// The changes that a successful operation made count as completed from now on, and are durable
    /// if that was asked for. Those of a failed one stay in doubt for good.
    fn end_changes(&mut self, flight: &Flight, number: u64) {
        if flight.result < 0 {
            return;
        }
        let now = self.next();
        let Some(inode) = self.fs.inodes.get_mut(&number) else { return };
        let durable = inode.model.write_through || matches!(flight.op(), Some(Op::Write { fua: true, .. }));
        for change in &flight.changes {
            if durable {
                inode.disk.settle_one(*change);
            } else {
                inode.disk.complete(*change, now);
            }
        }
    }

    /// The ring is told.
    pub(super) fn finish(&mut self, flight: Flight, result: i32, content: u64) {
        self.note(Entry {
            what: flight.name(),
            file: u64::from(flight.file),
            offset: flight.id,
            len: flight.moved as u64,
            result: result.into(),
            content,
        });
        self.post(flight.port, flight.user_data, result);
    }

    pub(super) fn post(&mut self, port: u32, user_data: u64, result: i32) {
        if let Some(port) = self.ports.get_mut(&port) {
            port.ended.push_back((user_data, result));
        }
    }

    fn cancel(&mut self, port: u32, user_data: u64) {
        let found = self.flights.values().find(|f| f.port == port && f.user_data == user_data);
        let Some((id, target, settled)) = found.map(|f| (f.id, f.target, f.settled)) else { return };
        match target {
            Target::Disk(number) => self.cancel_disk(id, number),
            Target::Stream(connection, _) if self.net.dequeue(connection, id) => {
                let Some(flight) = self.flights.remove(&id) else { return };
                let moved = i32::try_from(flight.moved).unwrap_or(i32::MAX);
                self.end_cancelled(flight, if moved > 0 { moved } else { -libc::ECANCELED });
            }
            Target::Listener(listener) if self.net.accepts_remove(listener, id) || !settled => {
                let Some(flight) = self.flights.remove(&id) else { return };
                self.end_cancelled(flight, -libc::ECANCELED);
            }
            Target::Socket if !settled => {
                let Some(flight) = self.flights.remove(&id) else { return };
                self.end_cancelled(flight, -libc::ECANCELED);
            }
            // Refused already, or a call that runs on a thread: it ends by itself.
            _ => {}
        }
    }

    fn end_cancelled(&mut self, flight: Flight, result: i32) {
        self.faults.counts.cancelled += 1;
        self.finish(flight, result, 0);
    }

    /// I/O on files is seldom cancelled in time, and what was cancelled may have happened.
    fn cancel_disk(&mut self, id: u64, number: u64) {
        let hangs = self.flights.get(&id).is_none_or(|flight| flight.verdict.hang);
        if hangs || self.rand.chance(32_768) {
            return;
        }
        let Some(mut flight) = self.flights.remove(&id) else { return };
        if !flight.settled && self.rand.chance(16_384) {
            flight.settled = true;
            flight.result = self.disk_effect(&mut flight, number);
        }
        if flight.result < 0 {
            self.flights.insert(id, flight);
            return;
        }
        flight.settled = true;
        flight.result = -libc::ECANCELED;
        self.end_cancelled(flight, -libc::ECANCELED);
    }

    /// Ends what hangs on paths that begin with `prefix`.
    pub(super) fn release(&mut self, prefix: &str) {
        self.faults.end_hang(prefix);
        let hung: Vec<u64> = self
            .flights
            .values_mut()
            .filter(|flight| flight.verdict.hang && flight.label.starts_with(prefix))
            .map(|flight| {
                flight.verdict.hang = false;
                flight.id
            })
            .collect();
        for id in hung {
            let effect = self.now + self.rand.range(1..100_001);
            let end = effect + self.rand.range(1..100_001);
            match self.flights.get(&id).map(|flight| flight.target) {
                Some(Target::Disk(_)) => {
                    self.at(effect, Event::Effect(id));
                    self.at(end, Event::End(id));
                }
                Some(Target::Listener(_)) => self.at(effect, Event::Effect(id)),
                _ => {}
            }
        }
        self.release_streams(prefix);
    }

    pub(super) fn close(&mut self, id: u32) {
        let Some(file) = self.files.remove(&id) else { return };
        match file.target {
            Target::Disk(number) => {
                if let Some(inode) = self.fs.inodes.get_mut(&number) {
                    inode.unlock_all(id);
                }
                let files = &self.files;
                self.fs.forget_unreachable(|n| files.values().any(|open| open.target == Target::Disk(n)));
            }
            Target::Listener(listener) => self.close_listener(listener),
            Target::Stream(connection, side) => self.close_end(connection, side),
            Target::Socket => self.net.forget_socket(id),
            Target::Nothing => {}
        }
    }

    /// A ring is gone, as when a process dies: what it had under way may have happened, its files close.
    pub(super) fn end_port(&mut self, port: u32) {
        self.ports.remove(&port);
        let ids: Vec<u64> = self.flights.values().filter(|f| f.port == port).map(|f| f.id).collect();
        for id in ids {
            let Some(mut flight) = self.flights.remove(&id) else { continue };
            match flight.target {
                // The memory is still there: the backend goes before the slots do.
                Target::Disk(number) if !flight.settled && self.rand.chance(32_768) => {
                    self.disk_effect(&mut flight, number);
                }
                Target::Stream(connection, _) => {
                    self.net.dequeue(connection, id);
                }
                Target::Listener(listener) => {
                    self.net.accepts_remove(listener, id);
                }
                _ => {}
            }
        }
        let open: Vec<u32> =
            self.files.iter().filter(|(_, file)| file.port == port).map(|(id, _)| *id).collect();
        for id in open {
            self.close(id);
        }
    }
}
