//! One client in the transmission phase: what all its tasks share, and the reader that starts them.
//!
//! The reader receives into its own memory, cuts many requests out of one receive, and starts a task for each
//! (`request.rs`). It stops reading when the client holds as much as it may, so what is too much stays in the client's
//! socket. A payload that came along with its header is copied into memory fit for direct I/O; the rest of it is
//! received straight into that memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, Errno, File, Nanos, Ring};

use super::change;
use super::output::Output;
use super::pace::Pace;
use super::quota::{Quota, QuotaLimits};
use super::request::{self, Part, Whole};
use super::session::{RequestStream, Window, pieces};
use crate::base::limits;
use crate::block::{BlockError, Reserve};
use crate::graph::heard::Heard;
use crate::graph::node::Root;
use crate::protocol::nbd::{
    Command, CommandFlags, MetaContext, NbdErrno, Negotiated, ProtocolError, RequestHeader, RequestRules,
    StatusExtent,
};

/// What the tasks of one session share.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) ring: Ring,
    /// Names the client in the log.
    pub(super) id: u64,
    pub(super) stream: File,
    pub(super) root: Root,
    /// What it knows of losses of the disk.
    pub(super) heard: Heard,
    pub(super) rules: RequestRules,
    /// The number of `base:allocation`, if it was selected.
    pub(super) allocation_context: Option<u32>,
    pub(super) quota: Rc<Quota>,
    /// How fast it may ask, where that is limited.
    pace: Option<Pace>,
    pub(super) output: Output,
    /// Memory for the next block status request.
    pub(super) spare_extents: RefCell<Vec<StatusExtent>>,
    /// Requests that failed on the disk.
    failures: Cell<u64>,
    /// Since when the rest of a payload is waited for.
    payload_since: Cell<Option<Nanos>>,
    /// It has been shown the door.
    hung_up: Cell<bool>,
}

/// Why a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// The client said so.
    Disconnected,
    /// The stream ended, in the middle of a request or between two.
    Vanished { mid_request: bool },
    /// The client broke the protocol.
    Protocol(ProtocolError),
    /// The stream failed.
    Stream(Errno),
    /// Nobody takes its replies any more, or it was shown the door: what it had asked for is dropped.
    Gone,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Disconnected => f.write_str("it disconnected"),
            End::Vanished { mid_request: true } => f.write_str("it vanished in the middle of a request"),
            End::Vanished { mid_request: false } => f.write_str("it vanished"),
            End::Protocol(error) => error.fmt(f),
            End::Stream(errno) => errno.fmt(f),
            End::Gone => f.write_str("it is gone"),
        }
    }
}

impl From<ProtocolError> for End {
    fn from(error: ProtocolError) -> End {
        End::Protocol(error)
    }
}

impl Client {
    /// A client that has chosen its export. `reserve` is the memory that its output sets aside.
    pub(super) fn new(
        ring: &Ring,
        id: u64,
        stream: &File,
        root: Root,
        negotiated: &Negotiated,
        quota: QuotaLimits,
        reserve: Reserve,
    ) -> Rc<Client> {
        let contexts = &negotiated.meta_contexts;
        let allocation = contexts.iter().find(|(_, context)| *context == MetaContext::BaseAllocation);
        let rules = RequestRules {
            style: negotiated.style,
            flags: negotiated.flags,
            size_bytes: negotiated.export.size_bytes,
            minimum_block_bytes: negotiated.export.block_sizes.minimum_bytes,
            payload_bytes_max: negotiated.export.block_sizes.maximum_bytes,
            has_contexts: allocation.is_some(),
        };
        Rc::new(Client {
            ring: ring.clone(),
            id,
            stream: stream.clone(),
            heard: Heard::new(&root),
            root,
            rules,
            allocation_context: allocation.map(|(number, _)| *number),
            pace: Pace::new(ring, quota.pace),
            quota: Quota::new(ring, quota),
            output: Output::new(ring, stream, reserve),
            spare_extents: RefCell::default(),
            failures: Cell::new(0),
            payload_since: Cell::new(None),
            hung_up: Cell::new(false),
        })
    }

    /// Serves the client until its end; `early` has been received already.
    pub(super) async fn serve(self: &Rc<Client>, early: &[u8]) -> End {
        let writer = self.clone();
        let written = self.ring.spawn_with_result(async move {
            let sent = writer.output.send_all().await;
            // The reader must not wait for the client's turn any more.
            writer.pace.iter().filter(|_| sent.is_err()).for_each(Pace::end);
            sent
        });
        let mut reader = Reader {
            client: self.clone(),
            requests: RequestStream::new(self.rules.style),
            window: Window::new(),
            buf: None,
        };
        let end = reader.read_all(early).await;
        drop(reader);
        if let End::Protocol(_) = end {
            // Whoever sends rubbish is not waited for to read its replies.
            self.output.break_off();
        }
        // What is in flight ends as it would have, and is answered if somebody listens still.
        self.quota.empty().await;
        self.output.finish();
        match (written.take().await, end) {
            // The reader saw only the consequence.
            (Err(errno), End::Vanished { .. } | End::Stream(_) | End::Gone) => End::Stream(errno),
            (_, end) => end,
        }
    }

    /// Shows the client the door: both directions of its stream end, and with them its session.
    pub(super) fn hang_up(&self) {
        self.hung_up.set(true);
        self.pace.iter().for_each(Pace::end);
        self.ring.shutdown_stream(&self.stream);
    }

    /// Nobody waits for its replies: what it has asked for and is not begun need not be done, and a walk may stop.
    pub(super) fn is_gone(&self) -> bool {
        self.hung_up.get() || self.output.is_broken()
    }

    /// The same, looked at more closely: a client that has closed its end may be told before anything is sent to it.
    pub(super) fn has_left(&self) -> bool {
        self.is_gone() || self.ring.is_peer_gone(&self.stream)
    }

    /// Since when the client has kept the server waiting while it holds memory.
    pub(super) fn stalled_since(&self) -> Option<Nanos> {
        match (self.payload_since.get(), self.output.sending_since()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Tells the log that the disk failed a request; the first time loudly.
    pub(super) fn note_failure(&self, error: &BlockError) {
        let failures = self.failures.get() + 1;
        self.failures.set(failures);
        let id = self.id;
        if failures == 1 {
            tracing::warn!("a request of NBD client {id} failed: {error}");
        } else {
            tracing::debug!("request {failures} of NBD client {id} that failed: {error}");
        }
    }
}

/// Reads one client's requests.
struct Reader {
    client: Rc<Client>,
    requests: RequestStream,
    window: Window,
    /// Memory for the next receive.
    buf: Option<Buf>,
}

impl Reader {
    async fn read_all(&mut self, early: &[u8]) -> End {
        if let Err(end) = self.take(early).await {
            return end;
        }
        loop {
            let buf = self.memory().await;
            let (buf, received) = self.client.ring.recv(&self.client.stream, buf).await;
            let received = match received {
                Ok(0) => return End::Vanished { mid_request: !self.requests.is_between_requests() },
                Ok(n) => n as usize,
                Err(errno) => return End::Stream(errno),
            };
            let taken = self.take(&buf.as_slice()[..received]).await;
            match taken {
                Ok(payload_bytes_max) => self.window.learn(received, payload_bytes_max),
                Err(end) => return end,
            }
            self.buf = Some(buf);
        }
    }

    /// Memory of the size that is called for, or of another size when there is none.
    async fn memory(&mut self) -> Buf {
        let wanted = self.window.bytes();
        let ring = &self.client.ring;
        match self.buf.take() {
            Some(buf) if buf.len() == wanted => buf,
            // Many clients that fell silent just now would sit on all the memory.
            Some(buf) if wanted > buf.len() && ring.arena().bytes_used() > ring.arena().bytes() / 2 => buf,
            Some(buf) => ring.arena().try_alloc(wanted).unwrap_or(buf),
            None => ring.alloc(limits::NBD_RECV_BYTES_MIN).await,
        }
    }

    /// Starts the requests in `input`; gives the largest payload among them.
    async fn take(&mut self, input: &[u8]) -> Result<u64, End> {
        let mut rest = input;
        let mut payload_bytes_max = 0;
        while let Some((request, header_bytes)) = self.requests.next(rest)? {
            rest = &rest[header_bytes..];
            let payload = request.payload_bytes(self.client.rules.style);
            payload_bytes_max = payload_bytes_max.max(payload);
            let taken = self.start(request, payload, rest).await?;
            rest = &rest[taken..];
        }
        Ok(payload_bytes_max)
    }

    /// Starts one request; gives the bytes of its payload that were taken from `rest`.
    async fn start(&mut self, request: RequestHeader, payload: u64, rest: &[u8]) -> Result<usize, End> {
        if request.command == Command::Disconnect {
            return Err(End::Disconnected);
        }
        let client = &self.client;
        if let Err(errno) = request.check(&client.rules) {
            tracing::debug!(client = client.id, ?request, ?errno, "an NBD request was refused");
            let taken = self.skip(payload, rest).await?;
            let ticket = client.quota.request().await;
            request::fail(client, &request, errno, "", ticket).await;
            return Ok(taken);
        }
        if let Some(pace) = &client.pace {
            let is_data = matches!(request.command, Command::Read | Command::Write);
            pace.admit(if is_data { request.length } else { 0 }).await;
        }
        if client.is_gone() {
            return Err(End::Gone);
        }
        match request.command {
            Command::Read if request.length > 0 => self.start_read(request).await,
            Command::Write if request.length > 0 => return self.start_write(request, rest).await,
            Command::BlockStatus => self.start_status(request).await,
            Command::Flush => {
                let ticket = client.quota.request().await;
                client.ring.spawn(request::flush(client.clone(), request, ticket));
            }
            Command::Trim => {
                let ticket = client.quota.request().await;
                client.ring.spawn(change::trim(client.clone(), request, ticket));
            }
            Command::WriteZeroes => {
                let ticket = client.quota.request().await;
                client.ring.spawn(change::write_zeroes(client.clone(), request, ticket));
            }
            // A hint that is taken note of, and transfers of nothing.
            _ => {
                let ticket = client.quota.request().await;
                request::succeed(client, &request, ticket).await;
            }
        }
        Ok(0)
    }

    async fn start_read(&mut self, request: RequestHeader) {
        let client = &self.client;
        let ticket = client.quota.request().await;
        let is_large = request.length > BLOCK_MAX as u64;
        if is_large && !client.rules.style.has_chunks() {
            let mut ticket = ticket;
            ticket.absorb(client.quota.bytes(BLOCK_MAX).await);
            let buf = client.ring.alloc(BLOCK_MAX).await;
            client.ring.spawn(request::read_in_turn(client.clone(), request, buf, ticket));
            return;
        }
        if is_large && request.flags.contains(CommandFlags::DF) {
            // The one error that the protocol has for this.
            return request::fail(client, &request, NbdErrno::Overflow, "", ticket).await;
        }
        if !is_large {
            let length = request.length as usize;
            let mut ticket = ticket;
            ticket.absorb(client.quota.bytes(length).await);
            let buf = client.ring.alloc(length).await;
            client.ring.spawn(request::read(client.clone(), Part::all(request, ticket), buf));
            return;
        }
        let whole = Whole::new(&request, ticket);
        for (offset, length) in pieces(request.offset, request.length, BLOCK_MAX) {
            let ticket = client.quota.bytes(length).await;
            let buf = client.ring.alloc(length).await;
            let part = Part::of(&whole, request, offset, ticket);
            client.ring.spawn(request::read(client.clone(), part, buf));
        }
    }

    async fn start_write(&mut self, request: RequestHeader, input: &[u8]) -> Result<usize, End> {
        let mut ticket = self.client.quota.request().await;
        if request.length <= BLOCK_MAX as u64 {
            let length = request.length as usize;
            ticket.absorb(self.client.quota.bytes(length).await);
            let buf = self.client.ring.alloc(length).await;
            let (buf, taken) = self.fill(buf, input).await?;
            let part = Part::all(request, ticket);
            self.client.ring.spawn(request::write(self.client.clone(), part, buf.freeze()));
            return Ok(taken);
        }
        let whole = Whole::new(&request, ticket);
        let mut rest = input;
        for (offset, length) in pieces(request.offset, request.length, BLOCK_MAX) {
            let ticket = self.client.quota.bytes(length).await;
            let buf = self.client.ring.alloc(length).await;
            let (buf, taken) = self.fill(buf, rest).await?;
            rest = &rest[taken..];
            let part = Part::of(&whole, request, offset, ticket);
            self.client.ring.spawn(request::write(self.client.clone(), part, buf.freeze()));
        }
        Ok(input.len() - rest.len())
    }

    async fn start_status(&mut self, request: RequestHeader) {
        let client = &self.client;
        let mut ticket = client.quota.request().await;
        let walk = client.quota.walks.take().await;
        ticket.absorb(client.quota.bytes(request::STATUS_BYTES_MAX).await);
        let buf = client.ring.alloc(request::STATUS_BYTES_MAX).await;
        client.ring.spawn(request::block_status(client.clone(), request, buf, ticket, walk));
    }

    /// Fills `buf` with what comes next: from `input`, then from the stream. Gives what was taken from `input`.
    async fn fill(&self, mut buf: Buf, input: &[u8]) -> Result<(Buf, usize), End> {
        let taken = buf.len().min(input.len());
        buf.copy_from(0, &input[..taken]);
        if taken == buf.len() {
            return Ok((buf, taken));
        }
        let (left, right) = buf.split_at(taken);
        let wanted = right.len();
        self.client.payload_since.set(Some(self.client.ring.now()));
        let (right, received) = self.client.ring.recv_all(&self.client.stream, right).await;
        self.client.payload_since.set(None);
        match received {
            Ok(n) if n as usize == wanted => {}
            Ok(_) => return Err(End::Vanished { mid_request: true }),
            Err(errno) => return Err(End::Stream(errno)),
        }
        if left.is_empty() {
            return Ok((right, taken));
        }
        // The parts of one buffer always fit together.
        left.unsplit(right).map(|buf| (buf, taken)).map_err(|_| End::Stream(Errno::EIO))
    }

    /// Reads past `payload` bytes; gives what was taken from `input`.
    async fn skip(&self, payload: u64, input: &[u8]) -> Result<usize, End> {
        let taken = payload.min(input.len() as u64) as usize;
        let mut left = payload - taken as u64;
        let mut spare = None;
        while left > 0 {
            let buf = match spare.take() {
                Some(buf) => buf,
                None => self.client.ring.alloc(limits::NBD_RECV_BYTES_MAX).await,
            };
            let (now, later) = buf.split_at(left.min(limits::NBD_RECV_BYTES_MAX as u64) as usize);
            let (now, _) = self.fill(now, &[]).await?;
            left -= now.len() as u64;
            spare = now.unsplit(later).ok();
        }
        Ok(taken)
    }
}
