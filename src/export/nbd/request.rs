//! One request of one client, from the disk to its reply: a task each.
//!
//! A read or write beyond the largest buffer goes in parts. The parts of a read are chunks of the reply, in whatever
//! order they come; the one that ends last ends the reply, with the first failure if there was one. A client that did
//! not agree to chunks gets the parts one after the other, with the stream for itself; a failure in their midst can
//! only be told by ending the session.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::limits::STINT_STEPS_A_LOOK;
use blockferry_ring::{Buf, SharedBuf};

use super::client::Client;
use super::quota::{Seat, Ticket};
use super::session::{Extents, pieces};
use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::block::{BlockError, WriteFlags};
use crate::protocol::nbd::{Command, CommandFlags, NbdErrno, RequestHeader};

/// Room for the longest header of a reply (an extended chunk with its offset).
const HEAD_BYTES_MAX: usize = 48;
/// Room for the longest answer to a block status request: header, context, and extents of 16 bytes.
pub(super) const STATUS_BYTES_MAX: usize = 64 + 16 * limits::NBD_EXTENTS_PER_REPLY;

/// A request in several parts. It is answered when all of them have ended.
#[derive(Debug)]
pub(super) struct Whole {
    parts_left: Cell<u64>,
    failure: Cell<Option<NbdErrno>>,
    ticket: RefCell<Option<Ticket>>,
}

/// A part of a read or write: mostly all of it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) request: RequestHeader,
    /// Where the part begins.
    pub(super) offset: u64,
    /// The part's bytes, and the request itself if this is all of it.
    pub(super) ticket: Ticket,
    whole: Option<Rc<Whole>>,
}

impl Part {
    /// All of a request; the ticket is for its bytes as well.
    pub(super) fn all(request: RequestHeader, ticket: Ticket) -> Part {
        Part { request, offset: request.offset, ticket, whole: None }
    }

    /// A part from `offset` on; the ticket is for its bytes.
    pub(super) fn of(whole: &Rc<Whole>, request: RequestHeader, offset: u64, ticket: Ticket) -> Part {
        Part { request, offset, ticket, whole: Some(whole.clone()) }
    }
}

/// What the end of a part means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PartEnd {
    /// Other parts are under way.
    Others,
    /// The request has ended well.
    Success,
    /// The request has ended; some part of it failed.
    Failure(NbdErrno),
}

impl Whole {
    /// For a request that is cut into parts of [`BLOCK_MAX`]; the ticket is for the request itself.
    pub(super) fn new(request: &RequestHeader, ticket: Ticket) -> Rc<Whole> {
        let parts_left = Cell::new(request.length.div_ceil(BLOCK_MAX as u64));
        Rc::new(Whole { parts_left, failure: Cell::new(None), ticket: RefCell::new(Some(ticket)) })
    }

    /// Counts a part that has ended.
    fn end_part(&self, failure: Option<NbdErrno>) -> PartEnd {
        self.parts_left.set(self.parts_left.get() - 1);
        self.failure.set(self.failure.get().or(failure));
        match (self.parts_left.get(), self.failure.get()) {
            (0, None) => PartEnd::Success,
            (0, Some(errno)) => PartEnd::Failure(errno),
            _ => PartEnd::Others,
        }
    }
}

/// Counts a part that has ended, where there are several.
fn end_part(whole: Option<&Whole>, failure: Option<NbdErrno>) -> PartEnd {
    match (whole, failure) {
        (Some(whole), failure) => whole.end_part(failure),
        (None, None) => PartEnd::Success,
        (None, Some(errno)) => PartEnd::Failure(errno),
    }
}

/// What to tell a client, and the log. Names and paths stay here: the client may be a stranger.
fn explain(client: &Client, error: &BlockError) -> (NbdErrno, String) {
    // That something cannot be had is an answer, not a failure: zeroing that would not be fast, say.
    if !error.errno.is_unsupported() {
        client.note_failure(error);
    }
    (NbdErrno::from_errno(error.errno), error.errno.to_string())
}

/// Answers with success and no data.
pub(super) async fn succeed(client: &Client, request: &RequestHeader, ticket: Ticket) {
    let style = client.rules.style;
    let reply = request.reply(style);
    let head = move || match request.command {
        // A read is answered in chunks, even a read of nothing.
        Command::Read => reply.end().unwrap_or_else(|_| reply.success()),
        _ => reply.success(),
    };
    client.output.push(None, HEAD_BYTES_MAX, head, None, ticket).await;
}

/// Answers with a failure.
pub(super) async fn fail(
    client: &Client,
    request: &RequestHeader,
    errno: NbdErrno,
    message: &str,
    ticket: Ticket,
) {
    let mut bytes = Vec::new();
    request.reply(client.rules.style).failure(errno, message, &mut bytes);
    let room = bytes.len();
    client.output.push(None, room, || std::mem::take(&mut bytes), None, ticket).await;
}

/// Answers a request without data.
pub(super) async fn answer(
    client: &Client,
    request: &RequestHeader,
    result: Result<(), BlockError>,
    ticket: Ticket,
) {
    match result {
        Ok(()) => succeed(client, request, ticket).await,
        Err(error) => {
            let (errno, message) = explain(client, &error);
            fail(client, request, errno, &message, ticket).await;
        }
    }
}

/// Reads one part.
pub(super) async fn read(client: Rc<Client>, part: Part, buf: Buf) {
    let Part { request, offset, ticket, whole } = part;
    let (buf, result) = client.root.read(offset, buf).await;
    if let Err(error) = result {
        drop(buf);
        return end_failed(&client, &request, whole.as_deref(), ticket, &error).await;
    }
    let length = buf.len() as u32;
    let reply = request.reply(client.rules.style);
    let mut end = PartEnd::Others;
    let head = || {
        end = end_part(whole.as_deref(), None);
        reply.data(offset, length, end == PartEnd::Success)
    };
    client.output.push(None, HEAD_BYTES_MAX, head, Some(buf.freeze()), ticket).await;
    if let PartEnd::Failure(errno) = end
        && let Some(ticket) = whole.and_then(|whole| whole.ticket.take())
    {
        fail(&client, &request, errno, "", ticket).await;
    }
}

/// Writes one part.
pub(super) async fn write(client: Rc<Client>, part: Part, buf: SharedBuf) {
    let Part { request, offset, ticket, whole } = part;
    let flags = WriteFlags { fua: request.flags.contains(CommandFlags::FUA) };
    client.heard.writes();
    if let Err(error) = client.root.write(offset, buf, flags).await {
        return end_failed(&client, &request, whole.as_deref(), ticket, &error).await;
    }
    let end = end_part(whole.as_deref(), None);
    // Of a request in parts, each gives its bytes back at once.
    let ticket = match whole {
        Some(whole) => whole.ticket.borrow_mut().take_if(|_| end != PartEnd::Others),
        None => Some(ticket),
    };
    match (end, ticket) {
        (PartEnd::Success, Some(ticket)) => succeed(&client, &request, ticket).await,
        (PartEnd::Failure(errno), Some(ticket)) => fail(&client, &request, errno, "", ticket).await,
        _ => {}
    }
}

/// Ends a part that failed on the disk; the last one answers for all.
async fn end_failed(
    client: &Client,
    request: &RequestHeader,
    whole: Option<&Whole>,
    ticket: Ticket,
    error: &BlockError,
) {
    let (errno, message) = explain(client, error);
    let PartEnd::Failure(first) = end_part(whole, Some(errno)) else { return };
    let ticket = match whole {
        Some(whole) => whole.ticket.take(),
        None => Some(ticket),
    };
    let Some(ticket) = ticket else { return };
    // The message belongs to this part's error.
    let message = if first == errno { message.as_str() } else { "" };
    fail(client, request, first, message, ticket).await;
}

/// Makes all answered writes durable, those of other connections included: they go to the same node.
pub(super) async fn flush(client: Rc<Client>, request: RequestHeader, ticket: Ticket) {
    let result = client.heard.flush(&client.root).await;
    answer(&client, &request, result, ticket).await;
}

/// Tells data from holes and zeroes. `buf` has room for the longest answer. Others get their turn meanwhile, and when
/// nobody waits for the answer any more, it is not given.
pub(super) async fn block_status(
    client: Rc<Client>,
    request: RequestHeader,
    mut buf: Buf,
    ticket: Ticket,
    walk: Seat,
) {
    let is_one = request.flags.contains(CommandFlags::REQ_ONE);
    let list_max = if is_one { 1 } else { limits::NBD_EXTENTS_PER_REPLY };
    let mut extents = Extents::new(client.spare_extents.take(), list_max);
    let mut failure = None;
    let mut found = Vec::new();
    let (mut questions, mut complete) = (0, false);
    let mut stint = client.ring.stint();
    while !complete && questions < limits::NBD_STATUS_QUESTIONS_PER_REQUEST {
        let left = request.length - extents.covered();
        if left == 0 {
            break;
        }
        if client.is_gone() && !is_planted(Bug::StatusWalkKeepsTurn) {
            return;
        }
        found.clear();
        let room = list_max + 1 - extents.list().len();
        match client.root.extents(request.offset + extents.covered(), left, room, &mut found).await {
            Ok(()) => {
                questions += found.len().max(1);
                for extent in found.drain(..) {
                    if !extents.add_within(extent, request.length) {
                        complete = true;
                        break;
                    }
                    if is_planted(Bug::StatusWalkKeepsTurn) {
                        // It takes the same time.
                        if extents.list().len().is_multiple_of(STINT_STEPS_A_LOOK as usize) {
                            client.ring.clock();
                        }
                    } else {
                        stint.step().await;
                    }
                }
            }
            // What is known so far is an answer; the client comes back for the rest and meets the error then.
            Err(_) if extents.covered() > 0 => break,
            Err(error) => {
                failure = Some(explain(&client, &error));
                break;
            }
        }
    }
    drop(walk);
    let mut bytes = Vec::with_capacity(64 + 16 * extents.list().len());
    let reply = request.reply(client.rules.style);
    let context = client.allocation_context.unwrap_or_default();
    if failure.is_none() && reply.block_status(context, extents.list(), true, &mut bytes).is_err() {
        // Nothing was asked for: a request of no bytes.
        failure = Some((NbdErrno::Invalid, String::new()));
    }
    client.spare_extents.replace(extents.into_spare());
    if let Some((errno, message)) = failure {
        drop(buf);
        return fail(&client, &request, errno, &message, ticket).await;
    }
    buf.copy_from(0, &bytes);
    buf.truncate(bytes.len());
    let nothing: &[u8] = &[];
    client.output.push(None, HEAD_BYTES_MAX, || nothing, Some(buf.freeze()), ticket).await;
}

/// A large read of a client without chunks: one header, then all the data. `buf` is of the largest size.
///
/// The one buffer is read into and sent again and again, so that no memory is waited for while the stream is held.
pub(super) async fn read_in_turn(client: Rc<Client>, request: RequestHeader, buf: Buf, ticket: Ticket) {
    let mut ticket = Some(ticket);
    let mut memory = Some(buf);
    let mut turn = None;
    for (offset, length) in pieces(request.offset, request.length, BLOCK_MAX) {
        let Some(mut buf) = memory.take() else { return };
        buf.truncate(length);
        let (buf, result) = client.root.read(offset, buf).await;
        if let Err(error) = result {
            let (errno, message) = explain(&client, &error);
            drop(buf);
            return match ticket.take_if(|_| turn.is_none()) {
                Some(ticket) => fail(&client, &request, errno, &message, ticket).await,
                None => client.output.break_off(),
            };
        }
        let is_first = turn.is_none();
        if is_first {
            turn = Some(client.output.turn(request.cookie).await);
        }
        let head = request.reply(client.rules.style).data(offset, length as u32, true);
        let head = || if is_first { &*head } else { &[] };
        let shared = buf.freeze();
        let share = client.quota.nothing();
        client.output.push(Some(request.cookie), HEAD_BYTES_MAX, head, Some(shared.clone()), share).await;
        memory = Some(client.output.sent(shared).await);
    }
}
