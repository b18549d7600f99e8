//! One connection to an NBD server, with many requests in flight.
//!
//! Each request gets a slot and a cookie ([`super::in_flight`]), is queued, and waits. One task sends: whatever was
//! queued in a turn leaves in one call, headers and short payloads gathered in one piece of memory, long payloads from
//! where they lie. One task receives: it takes whatever has come, and the codec tells to whom it belongs; the rest of a
//! long answer is received straight into the buffer of its request. Neither task waits for a request, so a slow answer
//! holds up no other.
//!
//! When the connection is lost, by either side or because the server broke the protocol, everything in flight fails with
//! one reason, and everything later fails with the same one at once. Connecting anew is the business of whoever owns the
//! connection; nothing here retries.
//!
//! A request whose future is dropped stays on its way: its buffer goes back when its answer has come. Dropping the
//! [`Connection`] cuts it; [`Connection::disconnect`] says farewell first.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Poll;

use blockferry_ring::sync::{Notify, either};
use blockferry_ring::{Buf, File, Nanos, Ring, SharedBuf};

use super::client_error::{LostReason, NbdClientError, NotSentReason};
use super::constants::{Command, CommandFlags, OptionCode, TransmissionFlags};
use super::cursor::Head;
use super::dial::{HandshakeEnd, dial};
use super::errno::NbdErrno;
use super::handshake_client::{ClientGoal, ClientNegotiated, ConnectRequest, ListedExport};
use super::in_flight::{Ended, InFlight, Outcome};
use super::keeper::Keeper;
use super::kept::{GATHER_BYTES, Kept, RECEIVE_BYTES};
use super::meta_context::MetaContext;
use super::silence::{Patience, Waiting};
use super::transmission::{RequestHeader, StatusExtent};
use super::uri::NbdUri;
use super::wire::{BlockSizes, ExportListing};
use crate::base::limits::{NBD_FAREWELL_NS_MAX, NBD_HANDSHAKE_NS_MAX, NBD_REQUESTS_IN_FLIGHT_MAX};
use crate::base::range::ByteRange;
use crate::block::patience::is_for_job;

mod traffic;

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Ask for structured replies, and so for holes and extents.
    pub structured_replies: bool,
    /// Ask for 64-bit lengths.
    pub extended_headers: bool,
    /// The metadata contexts to ask for.
    pub meta_contexts: Vec<MetaContext>,
    /// Open the export with `GO`, which can be refused in words, before `EXPORT_NAME`.
    pub go: bool,
    /// Span within which connecting and negotiating have to end.
    pub deadline: Nanos,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            structured_replies: true,
            extended_headers: true,
            meta_contexts: vec![MetaContext::BaseAllocation],
            go: true,
            deadline: NBD_HANDSHAKE_NS_MAX,
        }
    }
}

impl ConnectOptions {
    /// The same without an option at which a server hangs up; `None` where nothing is left to do without.
    fn without(&self, option: OptionCode) -> Option<ConnectOptions> {
        let mut fewer = self.clone();
        match option {
            OptionCode::ExtendedHeaders => fewer.extended_headers = false,
            OptionCode::StructuredReply => {
                (fewer.extended_headers, fewer.structured_replies) = (false, false)
            }
            OptionCode::SetMetaContext => fewer.meta_contexts.clear(),
            // Not together with `EXPORT_NAME`.
            OptionCode::Go => (fewer.extended_headers, fewer.go) = (false, false),
            _ => return None,
        }
        Some(fewer)
    }
}

/// A connection. See the module's head.
#[derive(Debug)]
pub struct Connection {
    shared: Rc<Shared>,
}

/// A request that was queued.
#[derive(Debug)]
struct Outgoing {
    head: Head,
    payload: Option<SharedBuf>,
}

struct Shared {
    ring: Ring,
    stream: File,
    uri: Rc<str>,
    negotiated: ClientNegotiated,
    requests: RefCell<InFlight>,
    outbox: RefCell<VecDeque<Outgoing>>,
    /// Bytes on their way that were taken off the outbox.
    sending: Cell<bool>,
    /// Requests that were queued so far, and how many of them nobody sends any more.
    queued_count: Cell<u64>,
    sent_count: Cell<u64>,
    lost: RefCell<Option<LostReason>>,
    /// No new requests: a farewell is under way.
    closing: Cell<bool>,
    /// No new requests: the server said that it shuts down. What it has been asked it may answer still.
    leaving: Cell<bool>,
    /// No new requests: the server was silent for this long, and requests were given up.
    given_up: Cell<Option<Nanos>>,
    /// When something came for the last time.
    heard: Cell<Nanos>,
    patience: Cell<Patience>,
    /// Told when there is something to send, and when the connection is lost.
    queued: Notify,
    /// Told when the connection is lost, besides `moved`: whoever makes it anew.
    keeper: RefCell<Option<Rc<Keeper>>>,
    /// Its number among its keeper's, and whether the keeper counts it as lost.
    number: Cell<u64>,
    counted: Cell<bool>,
    /// Told when a request has ended or something was sent, and when the connection is lost.
    moved: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("uri", &self.uri)
            .field("in_flight", &self.requests.borrow().len())
            .field("lost", &self.lost.borrow())
            .finish_non_exhaustive()
    }
}

/// The exports that a server lists.
pub async fn list_exports(
    ring: &Ring,
    uri: &NbdUri,
    deadline: Nanos,
) -> Result<Vec<ExportListing>, NbdClientError> {
    let dialled = dial(ring, uri, ClientGoal::List, deadline, &Kept::default()).await?;
    match dialled.end {
        HandshakeEnd::Listed(listed) => Ok(listed),
        HandshakeEnd::Ready(_) | HandshakeEnd::Described(_) => Ok(Vec::new()),
    }
}

/// The exports that a server lists, and what it tells of each. One that hangs up when it is asked is asked no more than what
/// it has.
pub async fn describe_exports(
    ring: &Ring,
    uri: &NbdUri,
    deadline: Nanos,
) -> Result<Vec<ListedExport>, NbdClientError> {
    let dialled = dial(ring, uri, ClientGoal::Describe, deadline, &Kept::default()).await;
    match dialled.map(|dialled| dialled.end) {
        Ok(HandshakeEnd::Described(listed)) => Ok(listed),
        Ok(_) => Ok(Vec::new()),
        Err(NbdClientError::Lost { reason: LostReason::HungUp { option }, .. })
            if option != OptionCode::List =>
        {
            let listed = list_exports(ring, uri, deadline).await?.into_iter();
            let plain =
                |ExportListing { name, description }| ListedExport { name, description, details: None };
            Ok(listed.map(plain).collect())
        }
        Err(error) => Err(error),
    }
}

impl Connection {
    /// Connects to a server and opens an export.
    pub async fn connect(
        ring: &Ring,
        uri: &NbdUri,
        options: &ConnectOptions,
    ) -> Result<Rc<Connection>, NbdClientError> {
        Ok(Connection::learn(ring, uri, options, &Kept::default()).await?.0)
    }

    /// The same with a server that may hang up at an option that it does not know: it is asked again without. Tells what
    /// it takes.
    pub(super) async fn learn(
        ring: &Ring,
        uri: &NbdUri,
        options: &ConnectOptions,
        kept: &Kept,
    ) -> Result<(Rc<Connection>, ConnectOptions), NbdClientError> {
        let mut options = options.clone();
        loop {
            let error = match Connection::connect_with(ring, uri, &options, kept).await {
                Ok(connection) => return Ok((connection, options)),
                Err(error) => error,
            };
            let NbdClientError::Lost { reason: LostReason::HungUp { option }, .. } = &error else {
                return Err(error);
            };
            let Some(fewer) = options.without(*option) else { return Err(error) };
            tracing::info!(uri = %uri, ?option, "the server hangs up when it is asked this; it is asked without");
            options = fewer;
        }
    }

    /// The same, with the memory that `kept` has for it.
    pub(super) async fn connect_with(
        ring: &Ring,
        uri: &NbdUri,
        options: &ConnectOptions,
        kept: &Kept,
    ) -> Result<Rc<Connection>, NbdClientError> {
        let request = ConnectRequest {
            export: uri.export.clone(),
            structured_replies: options.structured_replies,
            extended_headers: options.extended_headers,
            meta_contexts: options.meta_contexts.clone(),
            go: options.go,
        };
        // First the memory: requests that hold all there is may be waiting for this connection to take them.
        let received_into = kept.take(ring, RECEIVE_BYTES).await;
        let gathered_in = kept.take(ring, GATHER_BYTES).await;
        let name: Rc<str> = uri.to_string().into();
        let dialled = dial(ring, uri, ClientGoal::Connect(request), options.deadline, kept).await;
        let ready = dialled.and_then(|dialled| match dialled.end {
            HandshakeEnd::Ready(negotiated) => Ok((negotiated, dialled.stream, dialled.rest)),
            HandshakeEnd::Listed(_) | HandshakeEnd::Described(_) => {
                Err(NbdClientError::Lost { uri: name.clone(), reason: LostReason::ClosedByServer })
            }
        });
        let (negotiated, stream, rest) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                kept.give(received_into);
                kept.give(gathered_in);
                return Err(error);
            }
        };
        let shared = Rc::new(Shared {
            ring: ring.clone(),
            stream,
            uri: name,
            requests: RefCell::new(InFlight::new(negotiated.style, negotiated.meta_contexts.clone())),
            outbox: RefCell::default(),
            sending: Cell::new(false),
            queued_count: Cell::new(0),
            sent_count: Cell::new(0),
            lost: RefCell::default(),
            closing: Cell::new(false),
            leaving: Cell::new(false),
            given_up: Cell::new(None),
            heard: Cell::new(ring.now()),
            // Who keeps no watch over it waits for ever.
            patience: Cell::new(Patience { job_ns: 0, guest_ns: 0, flush_ns: 0 }),
            queued: ring.notify(),
            keeper: RefCell::default(),
            number: Cell::new(0),
            counted: Cell::new(false),
            moved: ring.notify(),
            negotiated: *negotiated,
        });
        ring.spawn(traffic::send(shared.clone(), gathered_in, kept.clone()));
        ring.spawn(traffic::receive(shared.clone(), rest, received_into, kept.clone()));
        Ok(Rc::new(Connection { shared }))
    }

    /// The export's URI, as errors name it.
    pub fn uri(&self) -> &str {
        &self.shared.uri
    }

    /// All that was negotiated.
    pub fn negotiated(&self) -> &ClientNegotiated {
        &self.shared.negotiated
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.shared.negotiated.size_bytes
    }

    /// What the export can do.
    pub fn flags(&self) -> TransmissionFlags {
        self.shared.negotiated.flags
    }

    /// The block sizes that hold: the server's, or those of the protocol if it named none.
    pub fn block_sizes(&self) -> BlockSizes {
        self.shared.negotiated.block_sizes.unwrap_or(BlockSizes { minimum_bytes: 1, ..Default::default() })
    }

    /// Bytes that one read or write may have.
    pub fn payload_bytes_max(&self) -> u32 {
        self.shared.negotiated.payload_bytes_max()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.flags().contains(TransmissionFlags::READ_ONLY)
    }

    /// Whether several connections to the export see each other's writes, and a flush on one covers all.
    pub fn can_multi_conn(&self) -> bool {
        self.flags().contains(TransmissionFlags::CAN_MULTI_CONN)
    }

    /// Whether [`Connection::block_status`] can be asked.
    pub fn has_block_status(&self) -> bool {
        self.shared.negotiated.context_id(&MetaContext::BaseAllocation).is_some()
    }

    /// Requests sent or queued that have not ended.
    pub fn in_flight(&self) -> usize {
        self.shared.requests.borrow().len()
    }

    /// Why nothing can be asked of the connection any more, if that is so.
    pub fn lost(&self) -> Option<NbdClientError> {
        let lost = self.shared.lost.borrow().clone();
        let lost = lost.or_else(|| self.shared.going());
        lost.map(|reason| self.shared.lost_error(reason))
    }

    /// Whether nothing can be asked of the connection any more.
    pub fn is_lost(&self) -> bool {
        self.shared.is_lost() || self.shared.going().is_some()
    }

    /// From now on requests wait for a silent server as long as this says.
    pub(super) fn set_patience(&self, patience: Patience) {
        self.shared.patience.set(patience);
    }

    /// What is waited for.
    pub(super) fn waiting(&self) -> Waiting {
        self.shared.requests.borrow().waiting()
    }

    /// When something came for the last time.
    pub(super) fn heard(&self) -> Nanos {
        self.shared.heard.get()
    }

    /// Gives up the requests that `is_overdue` names; with any of them the connection takes no more. Guests' requests go
    /// on waiting for their answers.
    pub(super) fn give_up(&self, silent_ns: Nanos, is_overdue: impl Fn(Nanos, Nanos) -> bool) -> bool {
        let any = self.shared.requests.borrow_mut().give_up(is_overdue);
        if any {
            self.shared.given_up.set(Some(silent_ns));
            self.shared.wake();
            self.shared.tell_keeper();
        }
        any
    }

    /// The server is silent on other connections, too: nothing more is asked on this one.
    pub(super) fn take_no_more(&self, silent_ns: Nanos) {
        if !self.is_lost() {
            self.shared.given_up.set(Some(silent_ns));
            self.shared.end_if_done();
            self.shared.tell_keeper();
        }
    }

    /// Requests on it were given up, and it has not ended.
    pub(super) fn is_silent(&self) -> bool {
        self.shared.given_up.get().is_some() && !self.shared.is_lost()
    }

    /// The ranges of changes that were given up and that the server may still carry out.
    pub(super) fn late(&self) -> Vec<ByteRange> {
        if self.shared.is_lost() { Vec::new() } else { self.shared.requests.borrow().late().collect() }
    }

    /// Whether nothing is in flight any more, either.
    pub(super) fn is_over(&self) -> bool {
        self.shared.is_lost()
    }

    /// Has `keeper` told when the connection is over.
    pub(super) fn tell_when_lost(&self, keeper: &Rc<Keeper>) {
        self.shared.number.set(keeper.count_made());
        *self.shared.keeper.borrow_mut() = Some(keeper.clone());
    }

    /// Reads `buf.len()` bytes at `offset`. After an error the buffer's content means nothing.
    pub async fn read(&self, offset: u64, buf: Buf) -> (Buf, Result<(), NbdClientError>) {
        let length = buf.len() as u64;
        let request = header(Command::Read, CommandFlags::EMPTY, offset, length);
        match self.shared.ask(request, Asset::Buf(buf)).await {
            (Some(buf), _, result) => (buf, result),
            (None, _, _) => unreachable!("a read gives its buffer back"),
        }
    }

    /// Writes all of `buf` at `offset`; with `fua` it is durable when acknowledged.
    pub async fn write(&self, offset: u64, buf: SharedBuf, fua: bool) -> Result<(), NbdClientError> {
        let flags = CommandFlags::EMPTY.set(CommandFlags::FUA, fua);
        let request = header(Command::Write, flags, offset, buf.len() as u64);
        self.shared.ask(request, Asset::Payload(buf)).await.2
    }

    /// Makes all acknowledged writes durable: of this connection, and of the others too if the export can multi-conn.
    pub async fn flush(&self) -> Result<(), NbdClientError> {
        self.shared.ask(header(Command::Flush, CommandFlags::EMPTY, 0, 0), Asset::None).await.2
    }

    /// Gives the space of a range back; what is there afterwards is undefined.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), NbdClientError> {
        self.shared.ask(header(Command::Trim, CommandFlags::EMPTY, offset, length), Asset::None).await.2
    }

    /// Suggests that a range will be read soon.
    pub async fn cache(&self, offset: u64, length: u64) -> Result<(), NbdClientError> {
        self.shared.ask(header(Command::Cache, CommandFlags::EMPTY, offset, length), Asset::None).await.2
    }

    /// The error for a request that the server cannot be asked for.
    pub(super) fn not_offered(&self, command: Command, offset: u64, length: u64) -> NbdClientError {
        self.shared.not_sent(&header(command, CommandFlags::EMPTY, offset, length), NotSentReason::NotOffered)
    }

    /// Makes a range read as zeroes. `flags` may be `FUA`, `NO_HOLE` and `FAST_ZERO`.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        flags: CommandFlags,
    ) -> Result<(), NbdClientError> {
        self.shared.ask(header(Command::WriteZeroes, flags, offset, length), Asset::None).await.2
    }

    /// What `base:allocation` says about a range, as [`super::AllocationFlags`]: extents from `offset` on, together at
    /// least one byte and at most `length` long; ask again for what is missing.
    pub async fn block_status(&self, offset: u64, length: u64) -> Result<Vec<StatusExtent>, NbdClientError> {
        self.block_status_of(&MetaContext::BaseAllocation, offset, length).await
    }

    /// The same of any context that was negotiated.
    pub async fn block_status_of(
        &self,
        context: &MetaContext,
        offset: u64,
        length: u64,
    ) -> Result<Vec<StatusExtent>, NbdClientError> {
        let request = header(Command::BlockStatus, CommandFlags::EMPTY, offset, length);
        if self.shared.negotiated.context_id(context).is_none() {
            return Err(self.shared.not_sent(&request, NotSentReason::NotOffered));
        }
        let (_, status, result) = self.shared.ask(request, Asset::None).await;
        result?;
        let found = status.into_iter().find(|(of, _)| of == context);
        Ok(found.map(|(_, extents)| extents).unwrap_or_default())
    }

    /// Waits for what is in flight, says farewell and closes. A server that does not take it in time is cut off.
    pub async fn disconnect(&self) {
        let shared = &self.shared;
        shared.closing.set(true);
        let farewell = async {
            shared.until(|| shared.requests.borrow().len() == 0).await;
            if let Ok(head) = header(Command::Disconnect, CommandFlags::EMPTY, 0, 0).write(shared.style()) {
                shared.push(Outgoing { head, payload: None });
            }
            shared.until(|| shared.outbox.borrow().is_empty() && !shared.sending.get()).await;
        };
        either(farewell, shared.ring.sleep(NBD_FAREWELL_NS_MAX)).await;
        shared.lose(LostReason::ClosedHere);
    }

    /// Cuts the connection: everything in flight fails.
    pub fn cut(&self) {
        self.shared.lose(LostReason::ClosedHere);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.lose(LostReason::ClosedHere);
    }
}

/// Memory that a request brings along.
enum Asset {
    None,
    Buf(Buf),
    Payload(SharedBuf),
}

type Answered = (Option<Buf>, Vec<(MetaContext, Vec<StatusExtent>)>, Result<(), NbdClientError>);

fn header(command: Command, flags: CommandFlags, offset: u64, length: u64) -> RequestHeader {
    RequestHeader { flags, command, cookie: 0, offset, length }
}

/// A request that waits for its answer; gives its slot up when it is dropped.
struct Asked<'a> {
    shared: &'a Shared,
    cookie: u64,
    ended: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.ended && self.shared.requests.borrow_mut().abandon(self.cookie) {
            self.shared.moved.notify();
        }
    }
}

impl Shared {
    fn style(&self) -> super::constants::HeaderStyle {
        self.negotiated.style
    }

    fn lost_error(&self, reason: LostReason) -> NbdClientError {
        NbdClientError::Lost { uri: self.uri.clone(), reason }
    }

    fn not_sent(&self, request: &RequestHeader, reason: NotSentReason) -> NbdClientError {
        NbdClientError::NotSent {
            uri: self.uri.clone(),
            command: request.command,
            offset: request.offset,
            length: request.length,
            reason,
        }
    }

    /// Why no request can be made now.
    fn over(&self) -> Option<NbdClientError> {
        let lost = self.lost.borrow().clone();
        let lost = lost.or_else(|| self.going());
        let lost = lost.or_else(|| self.closing.get().then_some(LostReason::ClosedHere));
        lost.map(|reason| self.lost_error(reason))
    }

    fn push(&self, outgoing: Outgoing) {
        self.queued_count.set(self.queued_count.get() + 1);
        self.outbox.borrow_mut().push_back(outgoing);
        self.queued.notify();
    }

    /// Waits until `condition` holds, or the connection is lost.
    async fn until(&self, condition: impl Fn() -> bool) {
        self.moved.until(|| (self.lost.borrow().is_some() || condition()).then_some(())).await;
    }

    /// Whether the server may be asked this.
    fn check(&self, request: &RequestHeader) -> Result<(), NotSentReason> {
        let flags = self.negotiated.flags;
        let (needed, writes) = match request.command {
            Command::Flush => (TransmissionFlags::SEND_FLUSH, false),
            Command::Cache => (TransmissionFlags::SEND_CACHE, false),
            Command::Trim => (TransmissionFlags::SEND_TRIM, true),
            Command::WriteZeroes => (TransmissionFlags::SEND_WRITE_ZEROES, true),
            Command::Write => (TransmissionFlags::EMPTY, true),
            _ => (TransmissionFlags::EMPTY, false),
        };
        let needed = needed.set(TransmissionFlags::SEND_FUA, request.flags.contains(CommandFlags::FUA)).with(
            if request.flags.contains(CommandFlags::FAST_ZERO) {
                TransmissionFlags::SEND_FAST_ZERO
            } else {
                TransmissionFlags::EMPTY
            },
        );
        if writes && flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(NotSentReason::ReadOnly);
        }
        if !flags.contains(needed) {
            return Err(NotSentReason::NotOffered);
        }
        if request.command == Command::Flush {
            return Ok(());
        }
        let size_bytes = self.negotiated.size_bytes;
        let end = request.offset.checked_add(request.length);
        if request.length == 0 || end.is_none_or(|end| end > size_bytes) {
            return Err(NotSentReason::OutOfRange { size_bytes });
        }
        let bytes_max = match request.command {
            Command::Read | Command::Write => self.negotiated.payload_bytes_max().into(),
            _ if self.style().is_extended() => u64::MAX,
            _ => u32::MAX.into(),
        };
        if request.length > bytes_max {
            return Err(NotSentReason::TooLong { bytes_max });
        }
        let block_bytes = self.negotiated.block_sizes.map_or(1, |sizes| sizes.minimum_bytes.max(1));
        // The end of the export need not be a multiple.
        let unaligned = |at: u64| !at.is_multiple_of(block_bytes.into()) && at != size_bytes;
        if unaligned(request.offset) || unaligned(request.offset + request.length) {
            return Err(NotSentReason::Unaligned { block_bytes });
        }
        Ok(())
    }

    /// Sends a request and waits for its answer.
    async fn ask(&self, mut request: RequestHeader, asset: Asset) -> Answered {
        let fail = |asset, error| match asset {
            Asset::Buf(buf) => (Some(buf), Vec::new(), Err(error)),
            _ => (None, Vec::new(), Err(error)),
        };
        if let Err(reason) = self.check(&request) {
            return fail(asset, self.not_sent(&request, reason));
        }
        let room = || self.requests.borrow().len() < NBD_REQUESTS_IN_FLIGHT_MAX;
        if !room() {
            self.until(room).await;
        }
        if let Some(error) = self.over() {
            return fail(asset, error);
        }
        let (buf, payload) = match asset {
            Asset::None => (None, None),
            Asset::Buf(buf) => (Some(buf), None),
            Asset::Payload(payload) => (None, Some(payload)),
        };
        let patience_ns = self.patience.get().of(&request, is_for_job());
        {
            let mut requests = self.requests.borrow_mut();
            requests.insert(&mut request, buf);
            requests.waits(request.cookie, self.ring.now(), patience_ns);
        }
        let mut waiting = Asked { shared: self, cookie: request.cookie, ended: false };
        match request.write(self.style()) {
            Ok(head) => self.push(Outgoing { head, payload }),
            // The length was checked, so this is a contradiction on this side; it must not hang.
            Err(reason) => self.lose(LostReason::Protocol(reason)),
        }
        let number = self.queued_count.get();
        let ended = std::future::poll_fn(|_| {
            let task = self.ring.exec().current();
            match self.requests.borrow_mut().take(request.cookie, task) {
                Some(ended) => Poll::Ready(ended),
                None => Poll::Pending,
            }
        })
        .await;
        waiting.ended = true;
        self.moved.notify();
        // An answer may be seen before the end of the send, and a connection be lost during it: whoever asked has the
        // memory for himself only after that.
        let is_given_up = matches!(ended.outcome, Outcome::GivenUp);
        if self.sent_count.get() < number && !is_given_up {
            self.moved.until(|| (self.sent_count.get() >= number).then_some(())).await;
        }
        self.answered(ended)
    }

    fn answered(&self, ended: Ended) -> Answered {
        let Ended { request, buf, status, outcome } = ended;
        if self.leaving.get() {
            self.leave();
        }
        self.end_if_done();
        let result = match outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed(NbdErrno::Shutdown, _) => {
                self.leave();
                Err(self.lost_error(LostReason::ShuttingDown))
            }
            Outcome::Failed(errno, message) => Err(NbdClientError::Refused {
                uri: self.uri.clone(),
                command: request.command,
                offset: request.offset,
                length: request.length,
                errno,
                message: message.into(),
            }),
            Outcome::GivenUp => {
                let silent_ns = self.given_up.get().unwrap_or_default();
                Err(self.lost_error(LostReason::GivenUp { silent_ns }))
            }
            Outcome::Lost => {
                let reason = self.lost.borrow().clone().unwrap_or(LostReason::ClosedHere);
                Err(self.lost_error(reason))
            }
        };
        (buf, status, result)
    }

    /// Why it takes no more, though it is not over.
    fn going(&self) -> Option<LostReason> {
        if self.leaving.get() {
            return Some(LostReason::ShuttingDown);
        }
        self.given_up.get().map(|silent_ns| LostReason::GivenUp { silent_ns })
    }

    /// The server goes: it did not do what it was asked last, and is asked no more. What it has in hand it may end.
    fn leave(&self) {
        if !self.leaving.replace(true) {
            tracing::debug!(uri = %self.uri, "the server says that it is shutting down");
            self.tell_keeper();
        }
        if self.requests.borrow().len() == 0 {
            self.lose(LostReason::ShuttingDown);
        }
    }

    /// A connection that was given up ends when nothing of it can be late any more.
    fn end_if_done(&self) {
        if let Some(silent_ns) = self.given_up.get()
            && self.requests.borrow().len() == 0
        {
            self.lose(LostReason::GivenUp { silent_ns });
        }
    }

    fn tell_keeper(&self) {
        let Some(keeper) = self.keeper.borrow().clone() else { return };
        // One that only takes no more counts at once: what it still answers may not outlive its server.
        if !self.counted.replace(true) {
            keeper.count_lost(self.number.get());
        }
        keeper.changed.notify();
    }

    /// The connection is over; the first reason counts.
    fn lose(&self, reason: LostReason) {
        if self.lost.borrow().is_some() {
            return;
        }
        if !matches!(reason, LostReason::ClosedHere) {
            tracing::debug!(uri = %self.uri, %reason, "an NBD connection is lost");
        }
        *self.lost.borrow_mut() = Some(reason);
        self.outbox.borrow_mut().clear();
        self.requests.borrow_mut().lose_all();
        self.wake();
        self.queued.notify();
        if let Some(keeper) = &*self.keeper.borrow() {
            keeper.ended_at.set(self.ring.clock());
        }
        self.tell_keeper();
        self.ring.shutdown_stream(&self.stream);
    }

    fn is_lost(&self) -> bool {
        self.lost.borrow().is_some()
    }

    /// Wakes those whose requests have ended.
    fn wake(&self) {
        let mut requests = self.requests.borrow_mut();
        for task in requests.to_wake.drain(..) {
            self.ring.exec().wake(task);
        }
        drop(requests);
        self.end_if_done();
        // Abandoned requests leave room, too, and nobody else tells.
        self.moved.notify();
    }
}
