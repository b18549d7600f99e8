//! Replies on their way out of one session.
//!
//! Requests end in any order and at any time; one task sends what they leave here. While a send is under way, or while
//! other requests of the same turn end, replies gather, and go out together: sixteen small reads cost one send.
//!
//! Small replies are copied behind each other into one lease of memory. A large payload is a piece of its own, sent
//! from the memory into which it was read. The order of the pieces is the order of the stream.
//!
//! # Memory
//! When no memory is to be had for small replies, a lease that was set aside at the start takes their headers, and
//! payloads go as pieces; when that is full as well, whoever ends a request waits for the send under way. So sending
//! never waits for memory that only sending would free. A client that does not read its replies stops here: what it
//! holds is bounded by its quota.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Deref;

use blockferry_ring::arena::{Arena, BLOCK_MIN};
use blockferry_ring::limits::SEND_PIECES_MAX;
use blockferry_ring::sync::Notify;
use blockferry_ring::{Buf, Errno, File, Nanos, Ring, SharedBuf};

use super::quota::Ticket;
use crate::base::limits;
use crate::block::Reserve;

/// A part of the stream, and what is given back when it has been sent.
#[derive(Debug)]
struct Piece {
    buf: SharedBuf,
    ticket: Option<Ticket>,
}

/// Memory that small replies are copied into.
#[derive(Debug)]
struct Open {
    buf: Buf,
    filled: usize,
    ticket: Option<Ticket>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Piece>,
    open: Option<Open>,
    /// The cookie of a reply that comes in several parts between which nothing else may be sent.
    turn: Option<u64>,
    ending: bool,
    broken: bool,
}

/// What one send carries.
struct Batch {
    first: SharedBuf,
    /// All pieces, the first included, when there is more than one.
    pieces: Vec<SharedBuf>,
    ticket: Option<Ticket>,
}

/// The way out of one session.
#[derive(Debug)]
pub(super) struct Output {
    ring: Ring,
    stream: File,
    state: RefCell<State>,
    /// Memory for headers when there is none else.
    reserve: Reserve,
    /// When the send under way began.
    sending_since: Cell<Option<Nanos>>,
    /// The sending task waits here.
    work: Notify,
    /// Those who have a reply wait here when there is no room for it.
    room: Notify,
}

fn absorb(into: &mut Option<Ticket>, ticket: Ticket) {
    match into {
        Some(sum) => sum.absorb(ticket),
        None => *into = Some(ticket),
    }
}

impl State {
    /// Sees to it that `bytes` more can be copied; false when there is no memory for them now.
    fn make_room(&mut self, arena: &Arena, reserve: &Reserve, bytes: usize) -> bool {
        if self.open.as_ref().is_some_and(|open| open.buf.len() - open.filled >= bytes) {
            return true;
        }
        let lease = arena.try_alloc(limits::NBD_REPLY_LEASE_BYTES.max(bytes));
        let lease = lease.or_else(|| arena.try_alloc(bytes));
        let lease = lease.or_else(|| if bytes <= reserve.bytes() { reserve.try_take() } else { None });
        let Some(buf) = lease else { return false };
        self.seal();
        self.open = Some(Open { buf, filled: 0, ticket: None });
        true
    }

    /// Appends to the open lease, which has room.
    fn put(&mut self, bytes: &[u8]) {
        if let Some(open) = &mut self.open {
            debug_assert!(open.buf.len() - open.filled >= bytes.len());
            open.buf.copy_from(open.filled, bytes);
            open.filled += bytes.len();
        }
    }

    /// What has been copied so far becomes a piece; the rest of the lease stays open.
    fn seal(&mut self) {
        let Some(open) = self.open.take_if(|open| open.filled > 0) else { return };
        let (left, right) = open.buf.split_at(open.filled);
        self.ready.push_back(Piece { buf: left.freeze(), ticket: open.ticket });
        if !right.is_empty() {
            self.open = Some(Open { buf: right, filled: 0, ticket: None });
        }
    }

    /// What is sent next.
    fn take_batch(&mut self) -> Option<Batch> {
        self.seal();
        let Piece { buf: first, mut ticket } = self.ready.pop_front()?;
        let mut bytes = first.len();
        let mut pieces = Vec::new();
        while let Some(piece) = self.ready.front() {
            bytes += piece.buf.len();
            if bytes > limits::NBD_SEND_BYTES_MAX || pieces.len() == SEND_PIECES_MAX {
                break;
            }
            if pieces.is_empty() {
                pieces.reserve_exact((self.ready.len() + 1).min(SEND_PIECES_MAX));
                pieces.push(first.clone());
            }
            let Some(piece) = self.ready.pop_front() else { break };
            pieces.push(piece.buf);
            if let Some(share) = piece.ticket {
                absorb(&mut ticket, share);
            }
        }
        Some(Batch { first, pieces, ticket })
    }
}

impl Output {
    /// The way out through `stream`; `reserve` has [`Output::RESERVE_BYTES`] for headers.
    pub(super) fn new(ring: &Ring, stream: &File, reserve: Reserve) -> Output {
        Output {
            ring: ring.clone(),
            stream: stream.clone(),
            state: RefCell::default(),
            reserve,
            sending_since: Cell::new(None),
            work: ring.notify(),
            room: ring.notify(),
        }
    }

    /// What is set aside for headers.
    pub(super) const RESERVE_BYTES: usize = BLOCK_MIN;

    /// Appends a reply: a header of at most `head_bytes_max`, which is made when its place in the stream is certain, and
    /// its payload. `turn` is the cookie of a reply that has the stream for itself. On a broken stream the reply is
    /// dropped.
    pub(super) async fn push<H: Deref<Target = [u8]>>(
        &self,
        turn: Option<u64>,
        head_bytes_max: usize,
        mut head: impl FnMut() -> H,
        payload: Option<SharedBuf>,
        ticket: Ticket,
    ) {
        debug_assert!(head_bytes_max <= Output::RESERVE_BYTES);
        let mut reply = Some((payload, ticket));
        self.room
            .until(|| {
                let mut state = self.state.borrow_mut();
                if state.broken {
                    // Heads count parts of a reply: each is asked for once.
                    head();
                    reply = None;
                    return Some(());
                }
                if state.turn.is_some() && state.turn != turn {
                    return None;
                }
                let arena = self.ring.arena();
                let copied = match &reply {
                    Some((Some(payload), _)) if payload.len() < limits::NBD_REPLY_COPY_BYTES => payload.len(),
                    _ => 0,
                };
                let is_copied = copied > 0 && state.make_room(arena, &self.reserve, head_bytes_max + copied);
                if !is_copied && !state.make_room(arena, &self.reserve, head_bytes_max) {
                    return None;
                }
                let (payload, mut ticket) = reply.take()?;
                state.put(&head());
                match payload {
                    Some(payload) if !is_copied => {
                        state.seal();
                        state.ready.push_back(Piece { buf: payload, ticket: Some(ticket) });
                    }
                    other => {
                        if let Some(payload) = other {
                            state.put(payload.as_slice());
                            drop(payload);
                            ticket.give_bytes_back();
                        }
                        if let Some(open) = &mut state.open {
                            absorb(&mut open.ticket, ticket);
                        }
                    }
                }
                Some(())
            })
            .await;
        self.work.notify();
    }

    /// Waits until the reply to `cookie` may have the stream for itself, until what is given is dropped.
    pub(super) async fn turn(&self, cookie: u64) -> Turn<'_> {
        self.room
            .until(|| {
                let mut state = self.state.borrow_mut();
                state.turn.is_none().then(|| state.turn = Some(cookie))
            })
            .await;
        Turn(self)
    }

    /// Waits until `buf`, which was pushed, has been sent, and gives its memory back.
    pub(super) async fn sent(&self, buf: SharedBuf) -> Buf {
        let mut shared = Some(buf);
        self.room
            .until(|| match shared.take()?.try_thaw() {
                Ok(buf) => Some(buf),
                Err(still) => {
                    shared = Some(still);
                    None
                }
            })
            .await
    }

    /// Sends what is pushed until [`Output::finish`] or an error.
    pub(super) async fn send_all(&self) -> Result<(), Errno> {
        loop {
            let batch = self.work.until(|| {
                let mut state = self.state.borrow_mut();
                match state.take_batch() {
                    None if !state.ending && !state.broken => None,
                    batch => Some(batch),
                }
            });
            let Some(Batch { first, pieces, ticket }) = batch.await else { return Ok(()) };
            self.sending_since.set(Some(self.ring.now()));
            let sent = if pieces.is_empty() {
                self.ring.send(&self.stream, first).await
            } else {
                // The pieces hold it: what is kept here would be free one send later.
                drop(first);
                self.ring.send_pieces(&self.stream, pieces).await
            };
            self.sending_since.set(None);
            if let Err(errno) = sent {
                self.break_off();
                return Err(errno);
            }
            drop(ticket);
            self.keep_reserve();
            self.room.notify();
        }
    }

    /// Nobody reads any more.
    pub(super) fn is_broken(&self) -> bool {
        self.state.borrow().broken
    }

    /// When the send under way began.
    pub(super) fn sending_since(&self) -> Option<Nanos> {
        self.sending_since.get()
    }

    /// After a send: what it held is free again, so the reserve can be had before anybody else takes it.
    fn keep_reserve(&self) {
        let mut state = self.state.borrow_mut();
        if state.ready.is_empty() {
            // Idle sessions hold no memory but the reserve.
            state.open.take_if(|open| open.filled == 0);
        }
        self.reserve.try_fill();
    }

    /// No more replies come: sending ends when all of them are out.
    pub(super) fn finish(&self) {
        self.state.borrow_mut().ending = true;
        self.work.notify();
    }

    /// Nobody reads any more: drops what waits, and both directions of the stream end.
    pub(super) fn break_off(&self) {
        let dropped = {
            let mut state = self.state.borrow_mut();
            state.broken = true;
            (std::mem::take(&mut state.ready), state.open.take())
        };
        drop(dropped);
        self.ring.shutdown_stream(&self.stream);
        self.work.notify();
        self.room.notify();
    }
}

/// The stream belongs to one reply while this lives.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Output);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().turn = None;
        self.0.room.notify();
    }
}
