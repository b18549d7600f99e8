//! Byte streams: listeners, connections, and the two directions of each.
//!
//! A direction is a bounded buffer with the sends that fill it and the receives that empty it, each in
//! the order in which they were submitted. A *pump* moves bytes once at each end: the cut after which
//! a receive ends is drawn there, so every boundary between bytes is met sooner or later. Sends wait
//! when the buffer is full: a peer that does not read is felt.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use super::flight::{Flight, OpenFile, Target};
use super::inner::{Event, Inner};
use super::latency::Latency;
use super::trace::{Entry, Hash};
use crate::Nanos;
use crate::backend::SocketAddress;
use crate::errno::Errno;
use crate::mem::Mem;
use crate::op::{FileId, Op};

/// How streams behave when nothing is wrong.
#[derive(Clone, Copy, Debug)]
pub struct StreamModel {
    /// Bytes that a direction holds before sends wait.
    pub buffer_bytes: usize,
    /// How often (out of 65536) a step of a receive gets less than there is.
    pub cut_chance: u32,
    /// Of those, how often (out of 65536) it gets a single byte.
    pub one_byte_chance: u32,
    /// How often (out of 65536) a send ends short.
    pub short_send_chance: u32,
    /// How long a step takes.
    pub latency: Latency,
    /// Connections that wait to be accepted; more are refused.
    pub backlog: usize,
}

impl Default for StreamModel {
    fn default() -> StreamModel {
        StreamModel {
            buffer_bytes: 208 << 10,
            cut_chance: 16_384,
            one_byte_chance: 8_192,
            short_send_chance: 2_048,
            latency: Latency::STREAM,
            backlog: 128,
        }
    }
}

/// What flows from one side to the other.
#[derive(Debug, Default)]
struct Direction {
    bytes: VecDeque<u8>,
    sends: VecDeque<u64>,
    receives: VecDeque<u64>,
    /// Nothing more will be sent.
    ended: bool,
    /// Nobody will receive.
    unread: bool,
    /// The end is a reset instead of an orderly end.
    ends_in_reset: bool,
    /// Nothing moves before this time.
    stalled_until: Nanos,
}

#[derive(Debug)]
struct Connection {
    /// By the side that sends: 0 connected, 1 accepted.
    directions: [Direction; 2],
    labels: [Rc<str>; 2],
    held: [bool; 2],
    reset: bool,
}

#[derive(Debug)]
struct Listener {
    address: SocketAddress,
    backlog: VecDeque<u64>,
    accepts: VecDeque<u64>,
    shut: bool,
}

#[derive(Debug, Default)]
pub(super) struct Net {
    connections: BTreeMap<u64, Connection>,
    listeners: BTreeMap<u64, Listener>,
    /// Where sockets are to be connected to, by their files.
    sockets: BTreeMap<u32, SocketAddress>,
    ports_given: u16,
}

impl Net {
    pub(super) fn accepts_push(&mut self, listener: u64, id: u64) {
        if let Some(listener) = self.listeners.get_mut(&listener) {
            listener.accepts.push_back(id);
        }
    }

    pub(super) fn accepts_remove(&mut self, listener: u64, id: u64) -> bool {
        self.listeners.get_mut(&listener).is_some_and(|listener| remove(&mut listener.accepts, id))
    }

    /// Takes an operation out of the queue in which it waits.
    pub(super) fn dequeue(&mut self, connection: u64, id: u64) -> bool {
        self.connections.get_mut(&connection).is_some_and(|connection| {
            connection.directions.iter_mut().any(|d| remove(&mut d.sends, id) || remove(&mut d.receives, id))
        })
    }

    pub(super) fn forget_socket(&mut self, file: u32) {
        self.sockets.remove(&file);
    }

    fn direction(&mut self, connection: u64, side: usize) -> Option<&mut Direction> {
        self.connections.get_mut(&connection).map(|c| &mut c.directions[side])
    }

    fn listening(&mut self, address: &SocketAddress) -> Option<(u64, &mut Listener)> {
        self.listeners
            .iter_mut()
            .find(|(_, l)| !l.shut && l.address == *address)
            .map(|(number, listener)| (*number, listener))
    }
}

fn remove(queue: &mut VecDeque<u64>, id: u64) -> bool {
    let at = queue.iter().position(|other| *other == id);
    at.is_some_and(|at| queue.remove(at).is_some())
}

/// The memory of a transfer, in order.
fn pieces(op: &Op) -> Vec<Mem> {
    match op {
        Op::SendPieces { pieces, .. } => pieces.iter().collect(),
        _ => op.mem().into_iter().collect(),
    }
}

impl Inner {
    pub(super) fn listen(
        &mut self,
        port: u32,
        address: &SocketAddress,
    ) -> Result<(FileId, SocketAddress), Errno> {
        let mut address = address.clone();
        if let SocketAddress::Tcp(tcp) = &mut address
            && tcp.port() == 0
        {
            tcp.set_port(40_000 + self.net.ports_given);
            self.net.ports_given += 1;
        }
        if self.net.listening(&address).is_some() {
            return Err(Errno::EADDRINUSE);
        }
        let number = self.next();
        let label = address.to_string().into();
        let listener = Listener {
            address: address.clone(),
            backlog: VecDeque::new(),
            accepts: VecDeque::new(),
            shut: false,
        };
        self.net.listeners.insert(number, listener);
        Ok((self.add_stream(port, label, Target::Listener(number)), address))
    }

    fn add_stream(&mut self, port: u32, label: Rc<str>, target: Target) -> FileId {
        FileId(self.add_file(OpenFile { port, label, target, write: true, direct: false, exclusive: false }))
    }

    /// A socket that is to be connected to `address`. Fault rules know it by the address.
    pub(super) fn socket(&mut self, port: u32, address: &SocketAddress) -> FileId {
        let file = self.add_stream(port, address.to_string().into(), Target::Socket);
        self.net.sockets.insert(file.0, address.clone());
        file
    }

    /// Connects a socket.
    pub(super) fn connect_socket(&mut self, file: u32) -> Result<(), Errno> {
        let address = self.net.sockets.get(&file).cloned().ok_or(Errno::EBADF)?;
        let (target, label) = self.make_connection(&address)?;
        self.net.forget_socket(file);
        if let Some(open) = self.files.get_mut(&file) {
            (open.target, open.label) = (target, label);
        }
        Ok(())
    }

    pub(super) fn connect(&mut self, port: u32, address: &SocketAddress) -> Result<FileId, Errno> {
        let (target, label) = self.make_connection(address)?;
        Ok(self.add_stream(port, label, target))
    }

    /// A connection that waits to be accepted; what its near end is, and is called.
    fn make_connection(&mut self, address: &SocketAddress) -> Result<(Target, Rc<str>), Errno> {
        let number = self.next();
        let backlog_max = self.config.stream.backlog;
        let Some((listening, listener)) = self.net.listening(address) else {
            return Err(Errno::ECONNREFUSED);
        };
        if listener.backlog.len() >= backlog_max {
            return Err(Errno::EAGAIN);
        }
        listener.backlog.push_back(number);
        let labels = ["client", "server"].map(|end| Rc::from(format!("{address}#{end}")));
        let connection =
            Connection { directions: Default::default(), labels, held: [true, true], reset: false };
        let label = connection.labels[0].clone();
        self.net.connections.insert(number, connection);
        let span = self.config.stream.latency.draw(&mut self.rand);
        self.at(self.now + span, Event::Accept(listening));
        Ok((Target::Stream(number, 0), label))
    }

    /// Accepts that wait get connections that wait.
    pub(super) fn hand_over(&mut self, number: u64) {
        while let Some(listener) = self.net.listeners.get_mut(&number) {
            let shut = listener.shut;
            if listener.accepts.is_empty() || (listener.backlog.is_empty() && !shut) {
                return;
            }
            let flight = listener.accepts.pop_front().and_then(|id| self.flights.remove(&id));
            if shut {
                flight.into_iter().for_each(|flight| self.finish(flight, -libc::EINVAL, 0));
                continue;
            }
            let connection = listener.backlog.pop_front();
            let (Some(flight), Some(connection)) = (flight, connection) else { continue };
            let label = self.net.connections.get(&connection).map(|c| c.labels[1].clone());
            let file =
                self.add_stream(flight.port, label.unwrap_or("".into()), Target::Stream(connection, 1));
            self.finish(flight, file.0 as i32, 0);
        }
    }

    pub(super) fn close_listener(&mut self, number: u64) {
        self.shut_listener(number);
        self.net.listeners.remove(&number);
    }

    fn shut_listener(&mut self, number: u64) {
        let Some(listener) = self.net.listeners.get_mut(&number) else { return };
        listener.shut = true;
        for connection in std::mem::take(&mut listener.backlog) {
            self.reset(connection);
            self.close_end(connection, 1);
        }
        self.hand_over(number);
    }

    pub(super) fn submit_stream(&mut self, flight: Flight, connection: u64, side: usize) {
        let (id, verdict) = (flight.id, flight.verdict);
        if let Some(errno) = verdict.error {
            self.refuse(flight, errno);
            return;
        }
        let sends = match flight.op() {
            Some(Op::Send { .. } | Op::SendPieces { .. }) => true,
            Some(Op::Recv { .. } | Op::RecvAll { .. }) => false,
            _ => return self.refuse(flight, Errno::EINVAL),
        };
        let memory =
            flight.op().iter().flat_map(pieces).try_for_each(|mem| self.check_memory(flight.port, mem));
        if let Err(errno) = memory {
            return self.refuse(flight, errno);
        }
        if verdict.reset {
            self.faults.counts.resets += 1;
            self.reset(connection);
        }
        let now = self.now;
        let from = if sends { side } else { 1 - side };
        let Some(direction) = self.net.direction(connection, from) else {
            return self.refuse(flight, Errno::EBADF);
        };
        if verdict.half_close && sends && !direction.ended {
            direction.ended = true;
            self.faults.counts.half_closes += 1;
        }
        if verdict.hang {
            direction.stalled_until = Nanos::MAX;
        } else if verdict.delay_nanos > 0 {
            direction.stalled_until = direction.stalled_until.max(now.saturating_add(verdict.delay_nanos));
        }
        if sends {
            direction.sends.push_back(id);
        } else {
            direction.receives.push_back(id);
        }
        self.flights.insert(id, flight);
        self.pump_soon(connection, from);
    }

    fn pump_soon(&mut self, connection: u64, side: usize) {
        let span = self.config.stream.latency.draw(&mut self.rand);
        self.at(self.now + span, Event::Pump(connection, side));
    }

    pub(super) fn pump(&mut self, connection: u64, side: usize) {
        let Some(direction) = self.net.direction(connection, side) else { return };
        if direction.stalled_until > self.now {
            let until = direction.stalled_until;
            if until < Nanos::MAX {
                self.at(until, Event::Pump(connection, side));
            }
            return;
        }
        let received = self.receive(connection, side);
        let sent = self.send(connection, side);
        if received || sent {
            self.pump_soon(connection, side);
        }
    }

    /// One step of the first receive; true when anything happened.
    fn receive(&mut self, number: u64, side: usize) -> bool {
        let model = self.config.stream;
        let Some(connection) = self.net.connections.get_mut(&number) else { return false };
        let reset = connection.reset;
        let direction = &mut connection.directions[side];
        let Some(mut flight) = direction.receives.front().and_then(|id| self.flights.remove(id)) else {
            return false;
        };
        let Some(mem) = flight.op().and_then(|op| op.mem()) else { return false };
        let there = direction.bytes.len();
        let over = reset || there == 0 && (direction.ended || direction.unread);
        if there == 0 && !over && !mem.is_empty() {
            self.flights.insert(flight.id, flight);
            return false;
        }
        if over || mem.is_empty() {
            direction.receives.pop_front();
            let fails = (reset || direction.ends_in_reset) && flight.moved == 0;
            let result = if fails { -libc::ECONNRESET } else { flight.moved as i32 };
            self.finish(flight, result, 0);
            return true;
        }
        let mut n = there.min(mem.len() - flight.moved);
        if flight.verdict.short || self.rand.chance(model.cut_chance) {
            self.faults.counts.shorts += u64::from(flight.verdict.short);
            let one = self.rand.chance(model.one_byte_chance);
            n = if one { 1 } else { self.rand.range(1..n as u64 + 1) as usize };
        }
        let mut hash = Hash::new();
        let (first, second) = direction.bytes.as_slices();
        let first = &first[..n.min(first.len())];
        let second = &second[..n - first.len()];
        for part in [first, second] {
            mem.fill_from(flight.moved, part);
            hash.bytes(part);
            flight.moved += part.len();
        }
        direction.bytes.drain(..n);
        let waits_for_all = matches!(flight.op(), Some(Op::RecvAll { .. }));
        if waits_for_all && flight.moved < mem.len() && !flight.verdict.short {
            self.note(Entry {
                what: "recv goes on",
                file: u64::from(flight.file),
                offset: flight.id,
                len: flight.moved as u64,
                result: n as i64,
                content: hash.value(),
            });
            self.flights.insert(flight.id, flight);
        } else {
            direction.receives.pop_front();
            let moved = flight.moved as i32;
            self.finish(flight, moved, hash.value());
        }
        true
    }

    /// One step of the first send; true when anything happened.
    fn send(&mut self, number: u64, side: usize) -> bool {
        let model = self.config.stream;
        let Some(connection) = self.net.connections.get_mut(&number) else { return false };
        let reset = connection.reset;
        let direction = &mut connection.directions[side];
        let Some(mut flight) = direction.sends.front().and_then(|id| self.flights.remove(id)) else {
            return false;
        };
        let pieces = flight.op().map(|op| pieces(&op)).unwrap_or_default();
        let total: usize = pieces.iter().map(Mem::len).sum();
        if reset || direction.ended || direction.unread {
            direction.sends.pop_front();
            let errno = if reset { libc::ECONNRESET } else { libc::EPIPE };
            let result = if flight.moved > 0 { flight.moved as i32 } else { -errno };
            self.finish(flight, result, 0);
            return true;
        }
        let room = model.buffer_bytes.saturating_sub(direction.bytes.len());
        let mut n = room.min(total - flight.moved);
        if n == 0 && total > 0 {
            self.flights.insert(flight.id, flight);
            return false;
        }
        let short = n > 1 && (flight.verdict.short || self.rand.chance(model.short_send_chance));
        if short {
            self.faults.counts.shorts += 1;
            n = self.rand.range(1..n as u64) as usize;
        }
        let mut bytes = vec![0; n];
        let (mut skip, mut done) = (flight.moved, 0);
        for mem in pieces {
            let from = skip.min(mem.len());
            skip -= from;
            let part = (mem.len() - from).min(n - done);
            mem.copy_to(from, &mut bytes[done..done + part]);
            done += part;
        }
        direction.bytes.extend(&bytes);
        flight.moved += n;
        if flight.moved == total || short {
            direction.sends.pop_front();
            let moved = flight.moved as i32;
            self.finish(flight, moved, Hash::of(&bytes));
        } else {
            self.flights.insert(flight.id, flight);
        }
        true
    }

    /// Both ends learn that the connection broke; bytes under way are gone.
    pub(super) fn reset(&mut self, number: u64) {
        let Some(connection) = self.net.connections.get_mut(&number) else { return };
        connection.reset = true;
        for direction in &mut connection.directions {
            direction.bytes.clear();
            direction.stalled_until = 0;
        }
        for side in 0..2 {
            self.pump_soon(number, side);
        }
    }

    /// Resets every connection one of whose ends has a name that begins with `prefix`.
    pub(super) fn reset_streams(&mut self, prefix: &str) -> usize {
        let found = self.connections_named(prefix);
        for number in &found {
            self.reset(*number);
        }
        found.len()
    }

    fn connections_named(&self, prefix: &str) -> Vec<u64> {
        let named = |c: &Connection| c.labels.iter().any(|label| label.starts_with(prefix));
        self.net.connections.iter().filter(|(_, c)| named(c) && !c.reset).map(|(n, _)| *n).collect()
    }

    pub(super) fn release_streams(&mut self, prefix: &str) {
        for number in self.connections_named(prefix) {
            for side in 0..2 {
                if let Some(direction) = self.net.direction(number, side)
                    && direction.stalled_until > 0
                {
                    direction.stalled_until = 0;
                    self.pump_soon(number, side);
                }
            }
        }
    }

    /// What is sent is read by nobody any more.
    pub(super) fn is_peer_gone(&self, target: Target) -> bool {
        match target {
            Target::Stream(number, side) => {
                self.net.connections.get(&number).is_none_or(|connection| connection.directions[side].unread)
            }
            _ => false,
        }
    }

    pub(super) fn shutdown(&mut self, target: Target) {
        match target {
            Target::Stream(number, side) => {
                let Some(connection) = self.net.connections.get_mut(&number) else { return };
                connection.directions[side].ended = true;
                connection.directions[1 - side].unread = true;
                for side in 0..2 {
                    // What hangs ends too: a socket can always be given up.
                    connection.directions[side].stalled_until = 0;
                }
                for side in 0..2 {
                    self.pump_soon(number, side);
                }
            }
            Target::Listener(listener) => self.shut_listener(listener),
            Target::Disk(_) | Target::Socket | Target::Nothing => {}
        }
    }

    /// An end is gone. Bytes that it never read turn the peer's end of stream into a reset.
    pub(super) fn close_end(&mut self, number: u64, side: usize) {
        let Some(connection) = self.net.connections.get_mut(&number) else { return };
        connection.held[side] = false;
        let incoming = &mut connection.directions[1 - side];
        incoming.unread = true;
        let unread_bytes = !incoming.bytes.is_empty();
        incoming.bytes.clear();
        let outgoing = &mut connection.directions[side];
        outgoing.ended = true;
        outgoing.ends_in_reset |= unread_bytes;
        if connection.held == [false, false] {
            self.net.connections.remove(&number);
            return;
        }
        for side in 0..2 {
            self.pump_soon(number, side);
        }
    }
}
