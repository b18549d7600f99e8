//! What a client has asked and what has come of it, without I/O.
//!
//! A server answers in any order and in pieces, and a stream delivers the pieces cut anywhere. [`InFlight`] keeps a
//! slot for each request; its cookie is the slot's index and a number that is never used twice, so that an answer to
//! anything else is noticed. [`ReplyStream`] is fed whatever bytes have come: data goes straight to the buffer of its
//! request, whatever else there is, is small, is gathered and parsed whole. When a reply is complete its slot has an
//! outcome, and the task that waits for it is on the list of those to wake.
//!
//! Everything that a server says is checked by the codec ([`super::reply_reader`], [`super::pending`]) before it moves
//! a byte here. An error ends the connection: after it the stream means nothing.

use blockferry_ring::exec::TaskId;
use blockferry_ring::{Buf, Nanos};
use slab::Slab;

use super::client_error::LostReason;
use super::constants::{Command, HeaderStyle};
use super::errno::NbdErrno;
use super::meta_context::MetaContext;
use super::pending::{PendingReply, ReplyBody};
use super::reply_reader::{
    DATA_OFFSET_BYTES, parse_block_status, parse_data_offset, parse_error, parse_hole, parse_reply,
};
use super::silence::Waiting;
use super::transmission::{RequestHeader, StatusExtent};
use crate::base::range::ByteRange;

/// Bytes of the longest reply header.
const HEADER_BYTES_MAX: usize = 32;

/// How a request ended.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Done,
    Failed(NbdErrno, String),
    Lost,
    /// Nothing came for so long that nobody waits any more; its answer may still come.
    GivenUp,
}

/// One request.
#[derive(Debug)]
pub(super) struct Slot {
    sequence: u32,
    pending: PendingReply,
    /// Where read data goes.
    buf: Option<Buf>,
    status: Vec<(MetaContext, Vec<StatusExtent>)>,
    message: String,
    outcome: Option<Outcome>,
    waiter: Option<TaskId>,
    /// Nobody waits any more; the slot stays until the reply has come, since data may still be written to its buffer.
    abandoned: bool,
    /// The buffer is being received into; until it is back the request cannot end.
    lent: bool,
    /// The connection was lost while the buffer was lent.
    lost: bool,
    /// Since when it waits, and for how long it does while the server is silent (0: for ever).
    since: Nanos,
    patience_ns: Nanos,
    /// It waits no longer.
    given_up: bool,
}

impl Slot {
    fn is_waited_for(&self) -> bool {
        self.outcome.is_none() && !self.abandoned && !self.given_up
    }
}

fn find(slots: &mut Slab<Slot>, cookie: u64) -> Option<&mut Slot> {
    let slot = slots.get_mut(cookie as u32 as usize)?;
    (slot.sequence == (cookie >> 32) as u32).then_some(slot)
}

/// What is left of a request once it has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) request: RequestHeader,
    pub(super) buf: Option<Buf>,
    pub(super) status: Vec<(MetaContext, Vec<StatusExtent>)>,
    pub(super) outcome: Outcome,
}

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct InFlight {
    style: HeaderStyle,
    contexts: Vec<(u32, MetaContext)>,
    slots: Slab<Slot>,
    sequence: u32,
    /// Tasks whose requests have ended.
    pub(super) to_wake: Vec<TaskId>,
}

impl InFlight {
    pub(super) fn new(style: HeaderStyle, contexts: Vec<(u32, MetaContext)>) -> InFlight {
        InFlight { style, contexts, slots: Slab::new(), sequence: 0, to_wake: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Takes a request in; the cookie is filled in.
    pub(super) fn insert(&mut self, request: &mut RequestHeader, buf: Option<Buf>) {
        self.sequence = self.sequence.wrapping_add(1);
        let entry = self.slots.vacant_entry();
        request.cookie = u64::from(self.sequence) << 32 | entry.key() as u64;
        entry.insert(Slot {
            sequence: self.sequence,
            pending: PendingReply::new(request, self.style, self.contexts.len()),
            buf,
            status: Vec::new(),
            message: String::new(),
            outcome: None,
            waiter: None,
            abandoned: false,
            lent: false,
            lost: false,
            since: 0,
            patience_ns: 0,
            given_up: false,
        });
    }

    /// Since when a request waits, and for how long it does while the server is silent.
    pub(super) fn waits(&mut self, cookie: u64, since: Nanos, patience_ns: Nanos) {
        if let Some(slot) = self.slot(cookie) {
            (slot.since, slot.patience_ns) = (since, patience_ns);
        }
    }

    /// What is waited for.
    pub(super) fn waiting(&self) -> Waiting {
        let mut waiting = Waiting::default();
        for (_, slot) in self.slots.iter().filter(|(_, slot)| slot.is_waited_for()) {
            waiting.add(slot.since, slot.patience_ns, slot.pending.request());
        }
        waiting
    }

    /// Gives up those that `is_overdue` names by the time since which they wait and their patience; whether there were
    /// any. One into whose buffer data is being received has to wait for the end of the connection.
    pub(super) fn give_up(&mut self, is_overdue: impl Fn(Nanos, Nanos) -> bool) -> bool {
        let mut any = false;
        for (_, slot) in &mut self.slots {
            if slot.is_waited_for() && !slot.lent && is_overdue(slot.since, slot.patience_ns) {
                slot.given_up = true;
                any = true;
                let waiter = slot.waiter.take();
                self.to_wake.extend(waiter);
            }
        }
        any
    }

    /// The ranges of changes that nobody waits for any more and that the server may still carry out.
    pub(super) fn late(&self) -> impl Iterator<Item = ByteRange> {
        let late = self.slots.iter().filter(|(_, slot)| slot.given_up && slot.outcome.is_none());
        late.filter_map(|(_, slot)| {
            let RequestHeader { command, offset, length, .. } = *slot.pending.request();
            let changes = matches!(command, Command::Write | Command::WriteZeroes | Command::Trim);
            changes.then(|| ByteRange::at_saturating(offset, length))
        })
    }

    fn slot(&mut self, cookie: u64) -> Option<&mut Slot> {
        find(&mut self.slots, cookie)
    }

    /// What came of a request, if it has ended; else `waiter` is woken when it has.
    pub(super) fn take(&mut self, cookie: u64, waiter: Option<TaskId>) -> Option<Ended> {
        let slot = self.slot(cookie)?;
        if slot.outcome.is_none() && slot.given_up && !slot.lent {
            // Its place stays taken until the answer has come, which then finds nobody.
            slot.abandoned = true;
            let (request, buf) = (*slot.pending.request(), slot.buf.take());
            return Some(Ended { request, buf, status: Vec::new(), outcome: Outcome::GivenUp });
        }
        if slot.outcome.is_none() {
            slot.waiter = waiter;
            return None;
        }
        let slot = self.slots.remove(cookie as u32 as usize);
        let outcome = slot.outcome.unwrap_or(Outcome::Lost);
        Some(Ended { request: *slot.pending.request(), buf: slot.buf, status: slot.status, outcome })
    }

    /// Nobody waits for a request any more. True if that made room.
    pub(super) fn abandon(&mut self, cookie: u64) -> bool {
        let Some(slot) = self.slot(cookie) else { return false };
        slot.abandoned = true;
        slot.waiter = None;
        let ended = slot.outcome.is_some();
        if ended {
            self.slots.remove(cookie as u32 as usize);
        }
        ended
    }

    /// Ends everything that has not ended: the connection is lost.
    pub(super) fn lose_all(&mut self) {
        let cookies: Vec<u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.outcome.is_none())
            .map(|(key, slot)| u64::from(slot.sequence) << 32 | key as u64)
            .collect();
        for cookie in cookies {
            self.end(cookie, Outcome::Lost);
        }
    }

    fn end(&mut self, cookie: u64, outcome: Outcome) {
        let Some(slot) = self.slot(cookie) else { return };
        if slot.lent {
            slot.lost = true;
            return;
        }
        if slot.abandoned {
            self.slots.remove(cookie as u32 as usize);
            return;
        }
        slot.outcome = Some(outcome);
        let waiter = slot.waiter.take();
        self.to_wake.extend(waiter);
    }

    /// Ends the request if its reply is complete.
    fn settle(&mut self, cookie: u64) -> Result<(), LostReason> {
        let Some(slot) = self.slot(cookie) else { return Ok(()) };
        match slot.pending.outcome().map_err(LostReason::Protocol)? {
            None => {}
            Some(Ok(())) => self.end(cookie, Outcome::Done),
            Some(Err(errno)) => {
                let message = std::mem::take(&mut slot.message);
                self.end(cookie, Outcome::Failed(errno, message));
            }
        }
        Ok(())
    }
}

/// Where in the stream of replies the next byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a header.
    Header,
    /// In a body that is parsed whole; it has `bytes` bytes.
    Small { cookie: u64, body: ReplyBody, bytes: usize },
    /// In data that goes to the request's buffer.
    Data { cookie: u64, at: usize, left: usize },
}

/// Data of which more is to come: `left` bytes for the request's buffer from `at` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DataAhead {
    cookie: u64,
    pub(super) at: usize,
    pub(super) left: usize,
}

/// The stream of replies.
#[derive(Debug)]
pub(super) struct ReplyStream {
    style: HeaderStyle,
    payload_bytes_max: u32,
    place: Place,
    /// The part of a header or small body that has come.
    gathered: Vec<u8>,
}

impl ReplyStream {
    pub(super) fn new(style: HeaderStyle, payload_bytes_max: u32) -> ReplyStream {
        ReplyStream { style, payload_bytes_max, place: Place::Header, gathered: Vec::with_capacity(256) }
    }

    /// Takes in what has come.
    pub(super) fn feed(&mut self, mut input: &[u8], requests: &mut InFlight) -> Result<(), LostReason> {
        while !input.is_empty() {
            let taken = match self.place {
                Place::Header => self.header(input, requests)?,
                Place::Small { cookie, body, bytes } => {
                    let taken = input.len().min(bytes - self.gathered.len());
                    self.gathered.extend_from_slice(&input[..taken]);
                    if self.gathered.len() == bytes {
                        self.small(cookie, body, requests)?;
                    }
                    taken
                }
                Place::Data { cookie, at, left } => {
                    let taken = input.len().min(left);
                    if let Some(buf) = requests.slot(cookie).and_then(|slot| slot.buf.as_mut()) {
                        buf.copy_from(at, &input[..taken]);
                    }
                    self.data_came(cookie, at + taken, left - taken, requests)?;
                    taken
                }
            };
            input = &input[taken..];
        }
        Ok(())
    }

    /// Takes the buffer of the request whose data comes next, if that is at least `least` bytes: they may be received
    /// straight into it. It has to come back with [`ReplyStream::give_back`].
    pub(super) fn take_buf(&mut self, least: usize, requests: &mut InFlight) -> Option<(DataAhead, Buf)> {
        match self.place {
            Place::Data { cookie, at, left } if left >= least => {
                let slot = requests.slot(cookie)?;
                let buf = slot.buf.take()?;
                slot.lent = true;
                Some((DataAhead { cookie, at, left }, buf))
            }
            _ => None,
        }
    }

    /// Gives a buffer back into which `received` bytes of the data ahead were received.
    pub(super) fn give_back(
        &mut self,
        ahead: DataAhead,
        buf: Buf,
        received: usize,
        requests: &mut InFlight,
    ) -> Result<(), LostReason> {
        let DataAhead { cookie, at, left } = ahead;
        if let Some(slot) = requests.slot(cookie) {
            slot.buf = Some(buf);
            slot.lent = false;
            if slot.lost {
                requests.end(cookie, Outcome::Lost);
                return Ok(());
            }
        }
        let received = received.min(left);
        self.data_came(cookie, at + received, left - received, requests)
    }

    fn data_came(
        &mut self,
        cookie: u64,
        at: usize,
        left: usize,
        requests: &mut InFlight,
    ) -> Result<(), LostReason> {
        if left > 0 {
            self.place = Place::Data { cookie, at, left };
            return Ok(());
        }
        self.place = Place::Header;
        requests.settle(cookie)
    }

    /// Takes in (a part of) a header; gives the bytes used.
    fn header(&mut self, input: &[u8], requests: &mut InFlight) -> Result<usize, LostReason> {
        let before = self.gathered.len();
        let parse = |bytes: &[u8]| {
            parse_reply(bytes, self.style, self.payload_bytes_max).map_err(LostReason::Protocol)
        };
        let parsed = if before == 0 {
            parse(input)?
        } else {
            // No header is longer, so either it is whole now or the input is used up.
            let more = input.len().min(HEADER_BYTES_MAX - before);
            self.gathered.extend_from_slice(&input[..more]);
            parse(&self.gathered)?
        };
        let Some((header, bytes)) = parsed else {
            if before == 0 {
                self.gathered.extend_from_slice(input);
            }
            return Ok(input.len());
        };
        self.gathered.clear();
        let cookie = header.cookie();
        let unknown = LostReason::UnknownCookie { cookie };
        let slot = requests.slot(cookie).filter(|slot| slot.outcome.is_none()).ok_or(unknown)?;
        let body = slot.pending.header(&header).map_err(LostReason::Protocol)?;
        let gather = |bytes: u32| Place::Small { cookie, body, bytes: bytes as usize };
        self.place = match body {
            ReplyBody::Empty => Place::Header,
            ReplyBody::WholeData { length: 0 } => Place::Header,
            // The length is that of the request, and so that of its buffer.
            ReplyBody::WholeData { length } => Place::Data { cookie, at: 0, left: length as usize },
            ReplyBody::Data { .. } => gather(DATA_OFFSET_BYTES),
            ReplyBody::Hole { length }
            | ReplyBody::Status { length, .. }
            | ReplyBody::Error { length, .. } => gather(length),
        };
        if self.place == Place::Header {
            requests.settle(cookie)?;
        }
        Ok(bytes - before)
    }

    /// A small body is whole.
    fn small(&mut self, cookie: u64, body: ReplyBody, requests: &mut InFlight) -> Result<(), LostReason> {
        let protocol = LostReason::Protocol;
        self.place = Place::Header;
        let slot = find(&mut requests.slots, cookie).ok_or(LostReason::UnknownCookie { cookie })?;
        let bytes = &self.gathered[..];
        match body {
            ReplyBody::Data { length } => {
                let offset = parse_data_offset(bytes).unwrap_or(u64::MAX);
                let at = slot.pending.data(offset, length).map_err(protocol)? as usize;
                self.place = Place::Data { cookie, at, left: length as usize };
            }
            ReplyBody::Hole { .. } => {
                let (offset, length) = parse_hole(bytes).map_err(protocol)?;
                let at = slot.pending.hole(offset, length).map_err(protocol)? as usize;
                if let Some(buf) = &mut slot.buf {
                    clear(buf, at, length as usize);
                }
            }
            ReplyBody::Status { kind, .. } => {
                let status = parse_block_status(kind, bytes).map_err(protocol)?;
                let context = slot.pending.status(&status, &requests.contexts).map_err(protocol)?.clone();
                let extents = cut(status.extents(), slot.pending.request().length);
                slot.status.push((context, extents));
            }
            ReplyBody::Error { kind, .. } => {
                let error = parse_error(kind, bytes).map_err(protocol)?;
                slot.pending.error(kind, &error).map_err(protocol)?;
                if slot.message.is_empty() {
                    slot.message = error.message;
                }
            }
            ReplyBody::Empty | ReplyBody::WholeData { .. } => {}
        }
        self.gathered.clear();
        if self.place == Place::Header { requests.settle(cookie) } else { Ok(()) }
    }
}

/// Makes a part of a buffer read as zeroes.
fn clear(buf: &mut Buf, mut at: usize, mut bytes: usize) {
    const ZEROES: [u8; 4096] = [0; 4096];
    while bytes > 0 {
        let part = bytes.min(ZEROES.len());
        buf.copy_from(at, &ZEROES[..part]);
        (at, bytes) = (at + part, bytes - part);
    }
}

/// The extents up to `length` bytes; a server may say more.
fn cut(extents: impl Iterator<Item = StatusExtent>, length: u64) -> Vec<StatusExtent> {
    let mut left = length;
    let mut kept = Vec::new();
    for extent in extents {
        if left == 0 {
            break;
        }
        let length = extent.length.min(left);
        left -= length;
        kept.push(StatusExtent { length, ..extent });
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;
    use crate::protocol::nbd::constants::{AllocationFlags, CommandFlags};
    use blockferry_ring::{Config, Ring};

    const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];
    const PAYLOAD_MAX: u32 = 1 << 20;

    fn byte_at(offset: u64) -> u8 {
        if (offset / 512).is_multiple_of(3) { 0 } else { (offset % 251) as u8 }
    }

    fn ring() -> Ring {
        Ring::new(&Config { arena_bytes: 4 << 20, ..Config::default() }).unwrap()
    }

    fn contexts() -> Vec<(u32, MetaContext)> {
        vec![(4, MetaContext::BaseAllocation)]
    }

    fn request(command: Command, offset: u64, length: u64) -> RequestHeader {
        RequestHeader { flags: CommandFlags::EMPTY, command, cookie: 0, offset, length }
    }

    /// The chunks that answer a request, or the one message that does.
    fn answer(request: &RequestHeader, style: HeaderStyle, rng: &mut Rng) -> Vec<Vec<u8>> {
        let reply = request.reply(style);
        let mut out = Vec::new();
        let fails = rng.chance(6000);
        if fails {
            reply.failure(NbdErrno::NoSpace, "full", &mut out);
            return vec![out];
        }
        let data = |from: u64, length: u64| (from..from + length).map(byte_at);
        match request.command {
            Command::Read if !style.has_chunks() => {
                out.extend_from_slice(&reply.data(request.offset, request.length as u32, true));
                out.extend(data(request.offset, request.length));
                vec![out]
            }
            Command::Read => {
                let piece = 512 * (1 + rng.below(100));
                let mut chunks = Vec::new();
                let (mut at, end) = (request.offset, request.offset + request.length);
                while at < end {
                    let hole = (at / 512).is_multiple_of(3);
                    let length = if hole { 512 } else { piece.min(1024).min(end - at) };
                    let length = if (at / 512) % 3 == 2 { 512 } else { length };
                    let mut chunk = Vec::new();
                    if hole {
                        chunk.extend_from_slice(&reply.hole(at, length as u32, false).unwrap());
                    } else {
                        chunk.extend_from_slice(&reply.data(at, length as u32, false));
                        chunk.extend(data(at, length));
                    }
                    chunks.push(chunk);
                    at += length;
                }
                rng.shuffle(&mut chunks);
                chunks.push(reply.end().unwrap().to_vec());
                chunks
            }
            Command::BlockStatus => {
                let hole = u64::from(AllocationFlags::HOLE.0);
                let extents = [
                    StatusExtent { length: 512, flags: hole },
                    StatusExtent { length: 1 << 30, flags: 0 },
                    StatusExtent { length: 512, flags: hole },
                ];
                reply.block_status(4, &extents, true, &mut out).unwrap();
                vec![out]
            }
            _ => vec![reply.success().to_vec()],
        }
    }

    /// Many requests, answers interleaved chunk by chunk, the stream cut anywhere, long data sometimes received into
    /// lent buffers: everybody gets what was meant for them.
    #[test]
    fn everybody_gets_the_right_answer_however_the_stream_is_cut() {
        let ring = ring();
        for seed in 0..400 {
            let mut rng = Rng::new(seed);
            let style = STYLES[rng.below(3) as usize];
            let contexts = if style.has_chunks() { contexts() } else { Vec::new() };
            let mut requests = InFlight::new(style, contexts);
            let mut stream = ReplyStream::new(style, PAYLOAD_MAX);
            let mut asked = Vec::new();
            let mut queues: Vec<std::collections::VecDeque<Vec<u8>>> = Vec::new();
            for _ in 0..1 + rng.below(8) {
                let command = match rng.below(4) {
                    0 if style.has_chunks() => Command::BlockStatus,
                    1 => Command::Write,
                    _ => Command::Read,
                };
                let sectors = if rng.chance(8000) { 200 } else { 12 };
                let length = 512 * (1 + rng.below(sectors));
                let mut header = request(command, 512 * rng.below(1000), length);
                let buf = (command == Command::Read).then(|| {
                    let mut buf = ring.arena().try_alloc(length as usize).unwrap();
                    buf.as_mut_slice().fill(0xee);
                    buf
                });
                requests.insert(&mut header, buf);
                queues.push(answer(&header, style, &mut rng).into());
                asked.push(header);
            }
            let mut bytes = Vec::new();
            while !queues.is_empty() {
                let at = rng.below(queues.len() as u64) as usize;
                bytes.extend(queues[at].pop_front().unwrap());
                if queues[at].is_empty() {
                    queues.swap_remove(at);
                }
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                if rng.chance(20_000)
                    && let Some((ahead, mut buf)) = stream.take_buf(1, &mut requests)
                {
                    let got = rest.len().min(ahead.left);
                    buf.copy_from(ahead.at, &rest[..got]);
                    stream.give_back(ahead, buf, got, &mut requests).unwrap();
                    rest = &rest[got..];
                    continue;
                }
                let longest = rng.range(1..3000);
                let cut = (1 + rng.below(longest)).min(rest.len() as u64) as usize;
                stream.feed(&rest[..cut], &mut requests).unwrap();
                rest = &rest[cut..];
            }
            for header in asked {
                let ended = requests.take(header.cookie, None).expect("answered");
                assert_eq!(ended.request, header);
                match ended.outcome {
                    Outcome::Failed(errno, message) => {
                        assert_eq!(errno, NbdErrno::NoSpace);
                        assert_eq!(message, if style.has_chunks() { "full" } else { "" });
                    }
                    Outcome::Done if header.command == Command::Read => {
                        let buf = ended.buf.unwrap();
                        let right = (header.offset..).map(byte_at).take(buf.len());
                        assert!(buf.as_slice().iter().copied().eq(right), "seed {seed}");
                    }
                    Outcome::Done if header.command == Command::BlockStatus => {
                        let [(MetaContext::BaseAllocation, extents)] = &ended.status[..] else { panic!() };
                        assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), header.length);
                    }
                    Outcome::Done => {}
                    Outcome::Lost | Outcome::GivenUp => panic!("nothing was lost"),
                }
            }
            assert_eq!(requests.len(), 0);
        }
    }

    #[test]
    fn answers_to_nobody_end_the_stream() {
        let ring = ring();
        let mut requests = InFlight::new(HeaderStyle::Simple, Vec::new());
        let mut first = request(Command::Flush, 0, 0);
        requests.insert(&mut first, None);
        let success = first.reply(HeaderStyle::Simple).success().to_vec();
        let mut stream = ReplyStream::new(HeaderStyle::Simple, PAYLOAD_MAX);
        stream.feed(&success, &mut requests).unwrap();
        let again = stream.feed(&success, &mut requests);
        assert_eq!(again, Err(LostReason::UnknownCookie { cookie: first.cookie }), "answered twice");
        assert!(requests.take(first.cookie, None).is_some());
        // The next request has the same slot, and yet another cookie.
        let mut second = request(Command::Read, 0, 512);
        requests.insert(&mut second, ring.arena().try_alloc(512));
        assert_eq!(first.cookie as u32, second.cookie as u32);
        let mut stream = ReplyStream::new(HeaderStyle::Simple, PAYLOAD_MAX);
        assert!(matches!(stream.feed(&success, &mut requests), Err(LostReason::UnknownCookie { .. })));
        let noise = ReplyStream::new(HeaderStyle::Simple, PAYLOAD_MAX).feed(b"HTTP", &mut requests);
        assert!(matches!(noise, Err(LostReason::Protocol(_))));
    }

    #[test]
    fn a_lost_connection_gives_every_buffer_back() {
        let ring = ring();
        let style = HeaderStyle::Simple;
        let mut requests = InFlight::new(style, Vec::new());
        let mut headers: Vec<_> = (0..3).map(|i| request(Command::Read, 4096 * i, 4096)).collect();
        for header in &mut headers {
            requests.insert(header, ring.arena().try_alloc(4096));
        }
        let mut stream = ReplyStream::new(style, PAYLOAD_MAX);
        stream.feed(&headers[1].reply(style).data(4096, 4096, true), &mut requests).unwrap();
        let (ahead, buf) = stream.take_buf(4096, &mut requests).unwrap();
        assert!(stream.take_buf(1, &mut requests).is_none(), "it is lent already");
        requests.abandon(headers[2].cookie);
        requests.lose_all();
        assert_eq!(requests.len(), 2, "the abandoned one is gone");
        assert!(requests.take(headers[1].cookie, None).is_none(), "its buffer is still lent");
        stream.give_back(ahead, buf, 0, &mut requests).unwrap();
        for header in &headers[..2] {
            let ended = requests.take(header.cookie, None).unwrap();
            assert!(ended.buf.is_some() && matches!(ended.outcome, Outcome::Lost));
        }
        assert_eq!((requests.len(), ring.arena().bytes_used()), (0, 0));
    }

    #[test]
    fn who_is_given_up_has_the_memory_back_and_the_answer_finds_nobody() {
        let ring = ring();
        let style = HeaderStyle::Simple;
        let mut requests = InFlight::new(style, Vec::new());
        let mut headers: Vec<_> = [Command::Read, Command::Write, Command::Read]
            .into_iter()
            .map(|command| request(command, 4096, 4096))
            .collect();
        for (i, header) in headers.iter_mut().enumerate() {
            let buf = (header.command == Command::Read).then(|| ring.arena().try_alloc(4096).unwrap());
            requests.insert(header, buf);
            // The last one waits for ever.
            requests.waits(header.cookie, i as u64, [5, 5, 0][i]);
        }
        assert!(!requests.give_up(|since, _| since > 7));
        assert!(requests.give_up(|_, patience_ns| patience_ns > 0));
        for header in &headers[..2] {
            let ended = requests.take(header.cookie, None).unwrap();
            assert!(matches!(ended.outcome, Outcome::GivenUp), "{ended:?}");
            assert_eq!(ended.buf.is_some(), header.command == Command::Read);
        }
        assert_eq!((requests.waiting().count, requests.len()), (1, 3));
        assert_eq!(requests.late().collect::<Vec<_>>(), [ByteRange::at_saturating(4096, 4096)]);
        // The answers come after all.
        let mut stream = ReplyStream::new(style, PAYLOAD_MAX);
        let mut answers = headers[0].reply(style).data(4096, 4096, true).to_vec();
        answers.extend([7; 4096]);
        answers.extend_from_slice(&headers[1].reply(style).success());
        stream.feed(&answers[..100], &mut requests).unwrap();
        assert!(stream.take_buf(1, &mut requests).is_none());
        stream.feed(&answers[100..], &mut requests).unwrap();
        assert_eq!((requests.late().count(), requests.len()), (0, 1));
    }

    #[test]
    fn noise_never_panics() {
        let ring = ring();
        for seed in 0..3000 {
            let mut rng = Rng::new(seed);
            let style = STYLES[rng.below(3) as usize];
            let mut requests = InFlight::new(style, contexts());
            let mut stream = ReplyStream::new(style, PAYLOAD_MAX);
            let mut bytes = Vec::new();
            for _ in 0..4 {
                let mut header = request(Command::Read, 0, 4096);
                requests.insert(&mut header, ring.arena().try_alloc(4096));
                bytes.extend(answer(&header, style, &mut rng).concat());
            }
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << rng.below(8);
            }
            // Any outcome will do; that there is one is the point.
            for piece in bytes.chunks(1 + rng.below(500) as usize) {
                if stream.feed(piece, &mut requests).is_err() {
                    break;
                }
            }
        }
    }
}
