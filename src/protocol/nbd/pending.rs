//! One request that waits for its reply: does what comes answer what was asked, and when is it complete?
//!
//! A server may answer a read in chunks of any size and order, with errors between them, and answers to other requests
//! between those. `PendingReply` follows one reply: it refuses chunks that do not belong to such a request, data that
//! lies outside of it or comes twice, and a success that leaves bytes out, so that its owner can read data straight into
//! the request's buffer and believe the result. Chunks in ascending order, which is what servers send, cost no memory.
//!
//! The owner calls `header` for each reply header with the request's cookie, reads the body that it announces, hands it
//! to `data`, `hole`, `status` or `error`, and then asks `outcome`.

use super::constants::{ChunkCode, Command, CommandFlags, HeaderStyle, READ_FRAGMENTS_MAX};
use super::errno::NbdErrno;
use super::error::ProtocolError;
use super::meta_context::MetaContext;
use super::reply_reader::{BlockStatus, DATA_OFFSET_BYTES, ErrorChunk, ReplyHeader};
use super::transmission::RequestHeader;

/// What follows a reply header on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyBody {
    /// Nothing.
    Empty,
    /// The data of the whole request; already accounted for.
    WholeData {
        /// Its length.
        length: u64,
    },
    /// An offset (`parse_data_offset`, 8 bytes), then data; report it with `data` before reading the data.
    Data {
        /// Length of the data, without the offset.
        length: u32,
    },
    /// Parse with `parse_hole`, report with `hole`.
    Hole {
        /// Bytes on the stream.
        length: u32,
    },
    /// Parse with `parse_block_status`, report with `status`.
    Status {
        /// The kind of chunk.
        kind: ChunkCode,
        /// Bytes on the stream.
        length: u32,
    },
    /// Parse with `parse_error`, report with `error`.
    Error {
        /// The kind of chunk.
        kind: ChunkCode,
        /// Bytes on the stream.
        length: u32,
    },
}

/// Which bytes of a read have come.
#[derive(Debug)]
struct Coverage {
    /// All bytes from the request's start up to here.
    prefix_end: u64,
    /// Pieces beyond, as (start, end), ascending, apart from each other and from the prefix.
    scattered: Vec<(u64, u64)>,
}

impl Coverage {
    fn add(&mut self, start: u64, end: u64) -> Result<(), ProtocolError> {
        let overlaps = || ProtocolError::ChunkOverlaps { offset: start, length: end - start };
        if start < self.prefix_end {
            return Err(overlaps());
        }
        let at = self.scattered.partition_point(|piece| piece.0 < start);
        let before = at.checked_sub(1).map(|at| self.scattered[at].1);
        let after = self.scattered.get(at).map(|piece| piece.0);
        if before.is_some_and(|before| before > start) || after.is_some_and(|after| after < end) {
            return Err(overlaps());
        }
        let joins_after = after == Some(end);
        if start == self.prefix_end {
            // Nothing can lie before it, so a piece that it touches is the first one.
            self.prefix_end = if joins_after { self.scattered.remove(0).1 } else { end };
        } else if before == Some(start) {
            self.scattered[at - 1].1 = if joins_after { self.scattered.remove(at).1 } else { end };
        } else if joins_after {
            self.scattered[at].0 = start;
        } else if self.scattered.len() == READ_FRAGMENTS_MAX {
            return Err(ProtocolError::TooManyFragments { max: READ_FRAGMENTS_MAX });
        } else {
            self.scattered.insert(at, (start, end));
        }
        Ok(())
    }

    fn missing(&self, request_end: u64) -> u64 {
        let scattered: u64 = self.scattered.iter().map(|(start, end)| end - start).sum();
        request_end.saturating_sub(self.prefix_end).saturating_sub(scattered)
    }
}

/// The reply to one request, as far as it has come.
#[derive(Debug)]
pub struct PendingReply {
    request: RequestHeader,
    style: HeaderStyle,
    /// Metadata contexts of which the extents are still to come.
    contexts_selected: usize,
    contexts_seen: Vec<u32>,
    content_chunks: u64,
    coverage: Coverage,
    failure: Option<NbdErrno>,
    done: bool,
}

impl PendingReply {
    /// Waits for the reply to `request`. `contexts_selected` is the number of negotiated metadata contexts, each of
    /// which a status query must be answered for.
    pub fn new(request: &RequestHeader, style: HeaderStyle, contexts_selected: usize) -> Self {
        Self {
            request: *request,
            style,
            contexts_selected,
            contexts_seen: Vec::new(),
            content_chunks: 0,
            coverage: Coverage { prefix_end: request.offset, scattered: Vec::new() },
            failure: None,
            done: false,
        }
    }

    /// The request.
    pub fn request(&self) -> &RequestHeader {
        &self.request
    }

    fn end(&self) -> u64 {
        self.request.offset.saturating_add(self.request.length)
    }

    /// A reply header with this request's cookie has come: what follows it?
    pub fn header(&mut self, header: &ReplyHeader) -> Result<ReplyBody, ProtocolError> {
        if self.done {
            return Err(ProtocolError::WrongStyle { what: "reply after the end of a reply" });
        }
        let command = self.request.command;
        let (kind, length, done, request_offset) = match *header {
            ReplyHeader::Simple { error, .. } => return self.simple(error),
            ReplyHeader::Chunk { kind, length, done, request_offset, .. } => {
                (kind, length, done, request_offset)
            }
        };
        if request_offset.is_some_and(|offset| offset != self.request.offset) {
            return Err(ProtocolError::BadChunk { kind, what: "offset is not that of its request" });
        }
        self.done = done;
        let body = match kind {
            ChunkCode::None => ReplyBody::Empty,
            ChunkCode::OffsetData if command == Command::Read => {
                ReplyBody::Data { length: length.saturating_sub(DATA_OFFSET_BYTES) }
            }
            ChunkCode::OffsetHole if command == Command::Read => ReplyBody::Hole { length },
            ChunkCode::BlockStatus | ChunkCode::BlockStatusExt if command == Command::BlockStatus => {
                ReplyBody::Status { kind, length }
            }
            _ if kind.is_error() => ReplyBody::Error { kind, length },
            _ => return Err(ProtocolError::ChunkDoesNotAnswer { command, kind }),
        };
        if matches!(body, ReplyBody::Data { .. } | ReplyBody::Hole { .. }) {
            self.content_chunks += 1;
            if self.content_chunks > 1 && self.request.flags.contains(CommandFlags::DF) {
                return Err(ProtocolError::BadChunk { kind, what: "data should have come in one piece" });
            }
        }
        Ok(body)
    }

    fn simple(&mut self, error: Option<NbdErrno>) -> Result<ReplyBody, ProtocolError> {
        if self.request.command == Command::Read && self.style.has_chunks() {
            return Err(ProtocolError::WrongStyle { what: "simple reply to a read" });
        }
        self.done = true;
        self.failure = self.failure.or(error);
        if self.request.command != Command::Read || error.is_some() {
            return Ok(ReplyBody::Empty);
        }
        self.coverage.prefix_end = self.end();
        Ok(ReplyBody::WholeData { length: self.request.length })
    }

    /// `length` bytes of data from `offset` have come, or are about to: their place in the request's buffer.
    pub fn data(&mut self, offset: u64, length: u32) -> Result<u64, ProtocolError> {
        let end = offset.checked_add(length.into()).filter(|end| *end <= self.end());
        match end {
            Some(end) if offset >= self.request.offset => {
                self.coverage.add(offset, end)?;
                Ok(offset - self.request.offset)
            }
            _ => Err(ProtocolError::ChunkOutsideRequest {
                request_offset: self.request.offset,
                request_length: self.request.length,
                offset,
                length: length.into(),
            }),
        }
    }

    /// `length` bytes from `offset` read as zeroes: their place in the request's buffer, which the owner clears.
    pub fn hole(&mut self, offset: u64, length: u32) -> Result<u64, ProtocolError> {
        self.data(offset, length)
    }

    /// The extents of one metadata context have come: which of the `selected` it is.
    pub fn status<'a>(
        &mut self,
        status: &BlockStatus<'_>,
        selected: &'a [(u32, MetaContext)],
    ) -> Result<&'a MetaContext, ProtocolError> {
        let id = status.context_id;
        match selected.iter().find(|(selected, _)| *selected == id) {
            Some((_, context)) if !self.contexts_seen.contains(&id) => {
                self.contexts_seen.push(id);
                Ok(context)
            }
            context => {
                let name = context.map_or_else(|| format!("number {id}"), |(_, context)| context.name());
                Err(ProtocolError::UnexpectedContext { name })
            }
        }
    }

    /// An error chunk has come. The first one decides what the request failed with.
    pub fn error(&mut self, kind: ChunkCode, error: &ErrorChunk) -> Result<(), ProtocolError> {
        if error.offset.is_some_and(|offset| offset < self.request.offset || offset >= self.end()) {
            return Err(ProtocolError::BadChunk { kind, what: "error lies outside of the request" });
        }
        self.failure = self.failure.or(Some(error.errno));
        Ok(())
    }

    /// How the request ended, once its last body has been read; `None` while chunks are missing.
    pub fn outcome(&self) -> Result<Option<Result<(), NbdErrno>>, ProtocolError> {
        if !self.done {
            return Ok(None);
        }
        if let Some(errno) = self.failure {
            return Ok(Some(Err(errno)));
        }
        let (missing, what) = match self.request.command {
            Command::Read => (self.coverage.missing(self.end()), "bytes of data"),
            Command::BlockStatus => {
                (self.contexts_selected.saturating_sub(self.contexts_seen.len()) as u64, "metadata contexts")
            }
            _ => (0, "parts"),
        };
        match missing {
            0 => Ok(Some(Ok(()))),
            _ => Err(ProtocolError::Incomplete { missing, what }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reply_reader::{parse_block_status, parse_reply};
    use super::super::transmission::StatusExtent;
    use super::*;

    fn request(command: Command, flags: CommandFlags) -> RequestHeader {
        RequestHeader { flags, command, cookie: 5, offset: 1000, length: 400 }
    }

    fn read() -> PendingReply {
        PendingReply::new(&request(Command::Read, CommandFlags::EMPTY), HeaderStyle::Structured, 0)
    }

    fn chunk(kind: ChunkCode, length: u32, done: bool) -> ReplyHeader {
        ReplyHeader::Chunk { cookie: 5, request_offset: None, kind, length, done }
    }

    const END: ReplyHeader =
        ReplyHeader::Chunk { cookie: 5, request_offset: None, kind: ChunkCode::None, length: 0, done: true };

    #[test]
    fn a_read_is_complete_in_any_order() {
        let pieces: [(u64, u32); 4] = [(1000, 100), (1100, 50), (1150, 150), (1300, 100)];
        let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [3, 0, 2, 1], [1, 2, 3, 0]];
        for order in orders {
            let mut pending = read();
            for (step, piece) in order.into_iter().enumerate() {
                let (offset, length) = pieces[piece];
                let body = pending.header(&chunk(ChunkCode::OffsetData, length + 8, step == 3)).unwrap();
                assert_eq!(body, ReplyBody::Data { length });
                assert_eq!(pending.data(offset, length), Ok(offset - 1000));
                let outcome = if step == 3 { Some(Ok(())) } else { None };
                assert_eq!(pending.outcome(), Ok(outcome), "{order:?} {step}");
            }
            assert!(pending.coverage.scattered.is_empty());
            assert!(pending.header(&END).is_err(), "nothing comes after the end");
        }
    }

    #[test]
    fn a_success_with_a_gap_is_a_lie() {
        let mut pending = read();
        pending.data(1000, 100).unwrap();
        pending.hole(1200, 150).unwrap();
        assert_eq!(pending.header(&END), Ok(ReplyBody::Empty));
        assert_eq!(pending.outcome(), Err(ProtocolError::Incomplete { missing: 150, what: "bytes of data" }));
    }

    #[test]
    fn data_outside_the_request_or_twice_is_refused() {
        for (offset, length) in
            [(999, 1), (999, 2), (1400, 1), (1399, 2), (u64::MAX, 1), (u64::MAX - 5, u32::MAX)]
        {
            let result = read().data(offset, length);
            assert!(matches!(result, Err(ProtocolError::ChunkOutsideRequest { .. })), "{offset} {length}");
        }
        for first in [(1000, 100), (1050, 100), (1300, 100)] {
            for (offset, length) in [(first.0, 1), (first.0 + 99, 1), (first.0 + 50, 10), (1000, 400)] {
                let mut pending = read();
                pending.data(first.0, first.1).unwrap();
                let result = pending.data(offset, length);
                assert!(
                    matches!(result, Err(ProtocolError::ChunkOverlaps { .. })),
                    "{first:?} {offset} {length}"
                );
            }
        }
    }

    #[test]
    fn crumbs_are_bounded() {
        let mut request = request(Command::Read, CommandFlags::EMPTY);
        request.length = 1 << 20;
        let mut pending = PendingReply::new(&request, HeaderStyle::Structured, 0);
        for crumb in 1..=READ_FRAGMENTS_MAX as u64 {
            pending.data(1000 + 2 * crumb, 1).unwrap();
        }
        let result = pending.data(1000 + 2 * (READ_FRAGMENTS_MAX as u64 + 1), 1);
        assert_eq!(result, Err(ProtocolError::TooManyFragments { max: READ_FRAGMENTS_MAX }));
        assert!(pending.data(1003, 1).is_ok(), "what joins two pieces needs no room");
    }

    #[test]
    fn an_error_decides_but_does_not_end_a_reply() {
        let mut pending = read();
        assert_eq!(
            pending.header(&chunk(ChunkCode::ErrorOffset, 14, false)),
            Ok(ReplyBody::Error { kind: ChunkCode::ErrorOffset, length: 14 })
        );
        let error = |offset| ErrorChunk { errno: NbdErrno::Io, message: String::new(), offset: Some(offset) };
        assert!(pending.error(ChunkCode::ErrorOffset, &error(1400)).is_err());
        pending.error(ChunkCode::ErrorOffset, &error(1399)).unwrap();
        assert_eq!(pending.outcome(), Ok(None));
        pending.header(&END).unwrap();
        assert_eq!(pending.outcome(), Ok(Some(Err(NbdErrno::Io))));
    }

    #[test]
    fn only_chunks_that_answer_are_taken() {
        let data = chunk(ChunkCode::OffsetData, 9, false);
        let mut write =
            PendingReply::new(&request(Command::Write, CommandFlags::EMPTY), HeaderStyle::Structured, 0);
        assert!(matches!(write.header(&data), Err(ProtocolError::ChunkDoesNotAnswer { .. })));
        assert!(read().header(&chunk(ChunkCode::BlockStatus, 12, false)).is_err());
        let simple = ReplyHeader::Simple { cookie: 5, error: None };
        assert!(matches!(read().header(&simple), Err(ProtocolError::WrongStyle { .. })));

        let mut whole =
            PendingReply::new(&request(Command::Read, CommandFlags::DF), HeaderStyle::Structured, 0);
        whole.header(&data).unwrap();
        assert!(whole.header(&data).is_err());

        let extended = request(Command::Read, CommandFlags::EMPTY);
        let mut astray = PendingReply::new(&extended, HeaderStyle::Extended, 0);
        let elsewhere = RequestHeader { offset: 7, ..extended };
        let bytes = elsewhere.reply(HeaderStyle::Extended).success();
        let (header, _) = parse_reply(&bytes, HeaderStyle::Extended, 512).unwrap().unwrap();
        assert!(matches!(astray.header(&header), Err(ProtocolError::BadChunk { .. })));
    }

    #[test]
    fn simple_replies_carry_the_whole_data_or_an_error() {
        let pending =
            || PendingReply::new(&request(Command::Read, CommandFlags::EMPTY), HeaderStyle::Simple, 0);
        let mut good = pending();
        let body = good.header(&ReplyHeader::Simple { cookie: 5, error: None });
        assert_eq!(body, Ok(ReplyBody::WholeData { length: 400 }));
        assert_eq!(good.outcome(), Ok(Some(Ok(()))));
        let mut bad = pending();
        let body = bad.header(&ReplyHeader::Simple { cookie: 5, error: Some(NbdErrno::NoMemory) });
        assert_eq!(body, Ok(ReplyBody::Empty));
        assert_eq!(bad.outcome(), Ok(Some(Err(NbdErrno::NoMemory))));
    }

    #[test]
    fn a_status_query_is_answered_for_each_context() {
        let style = HeaderStyle::Structured;
        let query = request(Command::BlockStatus, CommandFlags::EMPTY);
        let selected = [(3, MetaContext::BaseAllocation), (4, MetaContext::AllocationDepth)];
        let mut pending = PendingReply::new(&query, style, selected.len());
        for (id, done) in [(4, false), (3, true)] {
            let mut out = Vec::new();
            query
                .reply(style)
                .block_status(id, &[StatusExtent { length: 9, flags: 1 }], done, &mut out)
                .unwrap();
            let (header, size) = parse_reply(&out, style, 512).unwrap().unwrap();
            let Ok(ReplyBody::Status { kind, length }) = pending.header(&header) else {
                panic!("{header:?}")
            };
            assert_eq!(out.len(), size + length as usize);
            let status = parse_block_status(kind, &out[size..]).unwrap();
            let context = &selected[id as usize - 3].1;
            assert_eq!(pending.status(&status, &selected), Ok(context));
            assert!(pending.status(&status, &selected).is_err(), "twice");
            assert!(pending.status(&status, &[]).is_err(), "never selected");
        }
        assert_eq!(pending.outcome(), Ok(Some(Ok(()))));

        let mut short = PendingReply::new(&query, style, 2);
        short.header(&END).unwrap();
        assert_eq!(short.outcome(), Err(ProtocolError::Incomplete { missing: 2, what: "metadata contexts" }));
    }
}
