//! The two tasks of a connection: one sends what is queued, one receives answers. Both end with the connection.

use std::collections::VecDeque;
use std::rc::Rc;

use blockferry_ring::limits::SEND_PIECES_MAX;
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Buf, SharedBuf};

use super::super::client_error::LostReason;
use super::super::in_flight::ReplyStream;
use super::super::kept::{GATHER_BYTES, Kept};
use super::{Outgoing, Shared};
use crate::base::limits::NBD_REPLY_COPY_BYTES;

/// From this many bytes on the rest of an answer is received straight into its buffer instead of being copied.
const DIRECT_BYTES_MIN: usize = 32 << 10;
/// Up to this length a payload is copied behind its header: a piece of a vectored send costs more than the copy.
const COPY_BYTES_MAX: usize = NBD_REPLY_COPY_BYTES;
// One request always fits.
const _: () = assert!(COPY_BYTES_MAX + 64 <= GATHER_BYTES);

/// Sends what is queued, as long as the connection lasts.
pub(super) async fn send(shared: Rc<Shared>, memory: Buf, kept: Kept) {
    let mut spare = Some(memory);
    let mut plan = Vec::with_capacity(SEND_PIECES_MAX);
    loop {
        let ready = || (shared.is_lost() || !shared.outbox.borrow().is_empty()).then_some(());
        shared.queued.until(ready).await;
        if shared.is_lost() {
            shared.sent_count.set(u64::MAX);
            shared.moved.notify();
            return spare.into_iter().for_each(|memory| kept.give(memory));
        }
        let memory = match spare.take() {
            Some(memory) => memory,
            // Those who hold all memory may be waiting for this task to see that the connection is lost.
            None => {
                let lost = shared.queued.until(|| shared.is_lost().then_some(()));
                match either(kept.take(&shared.ring, GATHER_BYTES), lost).await {
                    Either::First(memory) => memory,
                    Either::Second(()) => continue,
                }
            }
        };
        shared.sending.set(true);
        let before = shared.outbox.borrow().len();
        let memory = gather(memory, &mut shared.outbox.borrow_mut(), &mut plan);
        let taken = before - shared.outbox.borrow().len();
        let piece = |piece: Piece| match piece {
            Piece::Gathered { from, to } => memory.slice(from, to - from),
            Piece::Payload(payload) => payload,
        };
        let sent = match plan.len() {
            // The common case takes no list.
            1 => match plan.pop().map(piece) {
                Some(piece) => shared.ring.send(&shared.stream, piece).await,
                None => Ok(0),
            },
            _ => {
                let pieces = plan.drain(..).map(piece).collect();
                shared.ring.send_pieces(&shared.stream, pieces).await
            }
        };
        shared.sending.set(false);
        shared.sent_count.set(shared.sent_count.get() + taken as u64);
        plan.clear();
        spare = memory.try_thaw().ok();
        if let Err(errno) = sent {
            shared.lose(LostReason::Transport(errno));
        }
        shared.moved.notify();
    }
}

/// A part of what is sent at once.
enum Piece {
    /// Headers and short payloads, in the memory in which they were gathered.
    Gathered { from: usize, to: usize },
    /// A long payload, where it lies.
    Payload(SharedBuf),
}

/// Takes as much off the queue as one call can send: `plan` says what goes out, in order; the memory holds a part of it.
fn gather(mut memory: Buf, outbox: &mut VecDeque<Outgoing>, plan: &mut Vec<Piece>) -> SharedBuf {
    let mut used = 0;
    while let Some(next) = outbox.front() {
        let copied = next.payload.as_ref().map_or(0, SharedBuf::len);
        let copied = if copied <= COPY_BYTES_MAX { copied } else { 0 };
        let end = used + next.head.len() + copied;
        // One piece for what is gathered at worst, one for the payload.
        if plan.len() + 2 > SEND_PIECES_MAX || end > memory.len() {
            break;
        }
        let Some(Outgoing { head, payload }) = outbox.pop_front() else { break };
        memory.copy_from(used, &head);
        let payload = payload.filter(|payload| {
            if copied > 0 {
                payload.copy_to(0, &mut memory.as_mut_slice()[used + head.len()..end]);
            }
            copied == 0
        });
        match plan.last_mut() {
            Some(Piece::Gathered { to, .. }) => *to = end,
            _ => plan.push(Piece::Gathered { from: used, to: end }),
        }
        used = end;
        plan.extend(payload.map(Piece::Payload));
    }
    memory.freeze()
}

/// Receives answers, as long as the connection lasts. `rest` came with the handshake.
pub(super) async fn receive(shared: Rc<Shared>, rest: Vec<u8>, buf: Buf, kept: Kept) {
    kept.give(receive_all(shared, rest, buf).await);
}

/// Gives the memory back in the end.
async fn receive_all(shared: Rc<Shared>, rest: Vec<u8>, mut buf: Buf) -> Buf {
    let mut replies = ReplyStream::new(shared.style(), shared.negotiated.payload_bytes_max());
    let mut fed = replies.feed(&rest, &mut shared.requests.borrow_mut());
    loop {
        shared.wake();
        if let Err(reason) = fed {
            shared.lose(reason);
            return buf;
        }
        if shared.is_lost() {
            // It was lost while data still came: requests have ended, and their buffers go back to who waits.
            return buf;
        }
        let direct = replies.take_buf(DIRECT_BYTES_MIN, &mut shared.requests.borrow_mut());
        let received = if let Some((ahead, target)) = direct {
            let (target, received) = receive_into(&shared, target, ahead.at, ahead.left).await;
            let got = received.unwrap_or(0) as usize;
            fed = replies.give_back(ahead, target, got, &mut shared.requests.borrow_mut());
            // Fewer bytes than asked for are the end of the stream.
            received.map(|_| if got < ahead.left { 0 } else { got })
        } else {
            let received;
            (buf, received) = shared.ring.recv(&shared.stream, buf).await;
            let got = received.unwrap_or(0) as usize;
            fed = replies.feed(&buf.as_slice()[..got], &mut shared.requests.borrow_mut());
            received.map(|_| got)
        };
        if received.is_ok_and(|bytes| bytes > 0) {
            shared.heard.set(shared.ring.now());
        }
        match received {
            Ok(0) => {
                shared.lose(LostReason::ClosedByServer);
                shared.wake();
                return buf;
            }
            Ok(_) => {}
            Err(errno) => {
                shared.lose(LostReason::Transport(errno));
                shared.wake();
                return buf;
            }
        }
    }
}

/// Receives `bytes` bytes into the part of `target` from `at` on.
async fn receive_into(
    shared: &Shared,
    target: Buf,
    at: usize,
    bytes: usize,
) -> (Buf, Result<u32, blockferry_ring::Errno>) {
    let (front, rest) = target.split_at(at);
    let (middle, back) = rest.split_at(bytes);
    let (middle, received) = shared.ring.recv_all(&shared.stream, middle).await;
    let whole = front.unsplit(middle).and_then(|front| front.unsplit(back));
    match whole {
        Ok(whole) => (whole, received),
        // They were cut from one buffer a moment ago.
        Err((part, _)) => (part, Err(blockferry_ring::Errno::EIO)),
    }
}
