//! The transmission phase as a server sees it: requests in, replies out.
//!
//! Nothing here allocates on the path of a read or a write: a request is parsed from the bytes that have arrived, and a
//! reply is a `Head`, a header on the stack whose payload the caller sends from wherever it lies. `ReplyTo` knows which
//! kind of reply the negotiation asks for, so that the code that serves requests need not.
//!
//! A request is judged twice. `parse_request` ends the session if the stream is broken or the payload is larger than a
//! server should even read past. `RequestHeader::check` says what the document says about everything else, as the error
//! to reply with; the payload, if there is one, has to be read past first (`payload_bytes`).

use super::constants::{
    AllocationFlags, ChunkCode, ChunkFlags, Command, CommandFlags, EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC, HeaderStyle, REQUEST_MAGIC, REQUEST_PAYLOAD_BYTES_MAX, SIMPLE_REPLY_MAGIC,
    STATUS_EXTENTS_MAX, STRING_BYTES_MAX, STRUCTURED_REPLY_MAGIC, TransmissionFlags,
};
use super::cursor::{Head, Reader, clip};
use super::errno::NbdErrno;
use super::error::ProtocolError;
use crate::block::{Extent, Word};

/// The front of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// How to carry it out.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// The client's mark, to be repeated in every reply.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; 32 bits unless the headers are extended.
    pub length: u64,
}

/// Parses a request header from the front of `input`: the header and its size on the wire, or `None` if more bytes are
/// needed. A broken magic word is told as soon as it is there.
pub fn parse_request(
    input: &[u8],
    style: HeaderStyle,
) -> Result<Option<(RequestHeader, usize)>, ProtocolError> {
    let extended = style.is_extended();
    let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    let Some(found) = input.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)) else { return Ok(None) };
    if found != magic {
        return Err(ProtocolError::BadMagic { what: "request", found: found.into() });
    }
    let bytes = RequestHeader::bytes(style);
    let Some(fields) = input.get(4..bytes) else { return Ok(None) };
    let mut reader = Reader::new("request header", fields);
    let request = RequestHeader {
        flags: CommandFlags(reader.u16()?),
        command: Command::from_wire(reader.u16()?),
        cookie: reader.u64()?,
        offset: reader.u64()?,
        length: if extended { reader.u64()? } else { reader.u32()?.into() },
    };
    let payload_bytes = request.payload_bytes(style);
    if payload_bytes > REQUEST_PAYLOAD_BYTES_MAX.into() {
        return Err(ProtocolError::RequestTooLarge {
            length: payload_bytes,
            max: REQUEST_PAYLOAD_BYTES_MAX.into(),
        });
    }
    Ok(Some((request, bytes)))
}

/// What a request is measured against: the export, as it was negotiated.
#[derive(Clone, Copy, Debug)]
pub struct RequestRules {
    /// The headers in use.
    pub style: HeaderStyle,
    /// The flags that the client was told.
    pub flags: TransmissionFlags,
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Alignment that is demanded; 1 for a client that did not agree to block sizes and is served all the same.
    pub minimum_block_bytes: u32,
    /// Largest read or write.
    pub payload_bytes_max: u32,
    /// Whether any metadata context was selected.
    pub has_contexts: bool,
}

impl RequestHeader {
    /// Size on the wire.
    pub const fn bytes(style: HeaderStyle) -> usize {
        if style.is_extended() { 32 } else { 28 }
    }

    /// Bytes of payload that follow the header.
    ///
    /// An extended write should announce its payload with a flag. QEMU 10.0.2 sends the payload without the flag (and as
    /// a server takes it without), so a write always has one.
    pub fn payload_bytes(&self, style: HeaderStyle) -> u64 {
        let announced = style.is_extended() && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let has_payload = announced || self.command == Command::Write;
        if has_payload { self.length } else { 0 }
    }

    /// The header as a client sends it. Extended writes carry the flag that announces their payload; a length over
    /// 32 bits cannot be expressed in a compact header.
    pub fn write(&self, style: HeaderStyle) -> Result<Head, ProtocolError> {
        let head = |magic, flags: CommandFlags| {
            Head::new().u32(magic).u16(flags.0).u16(self.command.to_wire()).u64(self.cookie).u64(self.offset)
        };
        if style.is_extended() {
            let announces = self.flags.contains(CommandFlags::PAYLOAD_LEN) || self.command == Command::Write;
            let flags = self.flags.set(CommandFlags::PAYLOAD_LEN, announces);
            return Ok(head(EXTENDED_REQUEST_MAGIC, flags).u64(self.length));
        }
        let length = u32::try_from(self.length)
            .map_err(|_| ProtocolError::NotExpressible { what: "request length over 32 bits" })?;
        Ok(head(REQUEST_MAGIC, self.flags).u32(length))
    }

    /// Whether the request makes sense, in the order of the document: the error to reply with if not.
    /// A length of 0 is let pass; it is up to the server to do nothing successfully.
    pub fn check(&self, rules: &RequestRules) -> Result<(), NbdErrno> {
        self.check_flags(rules)?;
        let offered = match self.command {
            Command::Read | Command::Write | Command::Disconnect | Command::Cache => true,
            Command::Flush => rules.flags.contains(TransmissionFlags::SEND_FLUSH),
            Command::Trim => rules.flags.contains(TransmissionFlags::SEND_TRIM),
            Command::WriteZeroes => rules.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES),
            Command::BlockStatus => rules.has_contexts,
            Command::Unknown(_) => false,
        };
        if !offered {
            return Err(NbdErrno::Invalid);
        }
        if matches!(self.command, Command::Flush | Command::Disconnect) {
            // Their ranges are reserved; clients are known to fill them carelessly.
            return Ok(());
        }
        let writes = matches!(self.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if writes && rules.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(NbdErrno::NotPermitted);
        }
        if self.offset.checked_add(self.length).is_none_or(|end| end > rules.size_bytes) {
            return Err(match self.command {
                Command::Write | Command::WriteZeroes => NbdErrno::NoSpace,
                _ => NbdErrno::Invalid,
            });
        }
        if (self.offset | self.length) & (u64::from(rules.minimum_block_bytes.max(1)) - 1) != 0 {
            return Err(NbdErrno::Invalid);
        }
        let carries_data = matches!(self.command, Command::Read | Command::Write);
        if carries_data && self.length > rules.payload_bytes_max.into() {
            return Err(NbdErrno::Invalid);
        }
        Ok(())
    }

    fn check_flags(&self, rules: &RequestRules) -> Result<(), NbdErrno> {
        let fua = rules.flags.contains(TransmissionFlags::SEND_FUA);
        let mut allowed = CommandFlags::EMPTY.set(CommandFlags::FUA, fua);
        match self.command {
            Command::Read => {
                let df = rules.flags.contains(TransmissionFlags::SEND_DF);
                allowed = allowed.set(CommandFlags::DF, df);
            }
            Command::Write if rules.style.is_extended() => {
                allowed = allowed.with(CommandFlags::PAYLOAD_LEN);
            }
            Command::WriteZeroes => {
                let fast = rules.flags.contains(TransmissionFlags::SEND_FAST_ZERO);
                allowed = allowed.with(CommandFlags::NO_HOLE).set(CommandFlags::FAST_ZERO, fast);
            }
            Command::BlockStatus => allowed = allowed.with(CommandFlags::REQ_ONE),
            _ => {}
        }
        if allowed.contains(self.flags) { Ok(()) } else { Err(NbdErrno::Invalid) }
    }

    /// What replies to this request are made with.
    pub fn reply(&self, style: HeaderStyle) -> ReplyTo {
        ReplyTo { style, cookie: self.cookie, offset: self.offset }
    }
}

/// A run of bytes with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, not 0.
    pub length: u64,
    /// What the context says about it; contexts of this codec use the lower 32 bits only.
    pub flags: u64,
}

impl StatusExtent {
    /// What `base:allocation` is to say of a range. A hole is told only where it reads as zeroes: clients skip holes, and a
    /// range that this layer does not hold may still read as data of a layer below.
    pub fn of(extent: Extent) -> StatusExtent {
        let zero = AllocationFlags::ZERO;
        let flags = match (extent.zero, extent.allocated) {
            (false, _) => AllocationFlags::EMPTY,
            (true, true) => zero,
            (true, false) => zero.with(AllocationFlags::HOLE),
        };
        StatusExtent { length: extent.len, flags: flags.0.into() }
    }

    /// What `base:allocation` says of a range, on the server's word.
    pub fn extent(&self) -> Extent {
        let has = |flag: AllocationFlags| self.flags & u64::from(flag.0) != 0;
        let (zero, allocated) = (has(AllocationFlags::ZERO), !has(AllocationFlags::HOLE));
        Extent { zero, allocated, ..Extent::data(self.length) }.on(Word::Claim)
    }
}

/// Makes the replies to one request in the negotiated style.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The headers in use.
    pub style: HeaderStyle,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub offset: u64,
}

impl ReplyTo {
    /// Success without data: for everything but a read and a status query whose chunks are still to come.
    pub fn success(&self) -> Head {
        match self.style {
            HeaderStyle::Extended => self.chunk(ChunkCode::None, 0, true),
            _ => self.simple(0),
        }
    }

    /// The end of a reply in chunks whose last content chunk was not marked `done`.
    pub fn end(&self) -> Result<Head, ProtocolError> {
        self.needs_chunks("final chunk")?;
        Ok(self.chunk(ChunkCode::None, 0, true))
    }

    /// Failure, with words for a person where the style can carry them. Always the last message of the reply.
    pub fn failure(&self, errno: NbdErrno, message: &str, out: &mut Vec<u8>) {
        if !self.style.has_chunks() {
            return out.extend_from_slice(&self.simple(errno.to_wire()));
        }
        let message = clip(message, STRING_BYTES_MAX);
        out.extend_from_slice(&self.chunk(ChunkCode::Error, 6 + message.len() as u64, true));
        out.extend_from_slice(&Head::new().u32(errno.to_wire()).u16(message.len() as u16));
        out.extend_from_slice(message.as_bytes());
    }

    /// Failure at `at`, an offset within the request; `done` ends the reply. In the simple style it is a plain failure.
    pub fn failure_at(&self, errno: NbdErrno, message: &str, at: u64, done: bool, out: &mut Vec<u8>) {
        if !self.style.has_chunks() {
            return out.extend_from_slice(&self.simple(errno.to_wire()));
        }
        let message = clip(message, STRING_BYTES_MAX);
        out.extend_from_slice(&self.chunk(ChunkCode::ErrorOffset, 14 + message.len() as u64, done));
        out.extend_from_slice(&Head::new().u32(errno.to_wire()).u16(message.len() as u16));
        out.extend_from_slice(message.as_bytes());
        out.extend_from_slice(&at.to_be_bytes());
    }

    /// What precedes `length` bytes of read data from `offset`; `done` ends the reply.
    ///
    /// In the simple style the data of the whole request must follow in one piece, and `offset` and `done` say nothing.
    /// `length` is not 0 and leaves room for the offset in a 32-bit field.
    pub fn data(&self, offset: u64, length: u32, done: bool) -> Head {
        if !self.style.has_chunks() {
            return self.simple(0);
        }
        debug_assert!(length > 0 && length <= u32::MAX - 8);
        self.chunk(ChunkCode::OffsetData, u64::from(length) + 8, done).u64(offset)
    }

    /// A piece of a read that is all zeroes; `done` ends the reply. `length` is not 0.
    pub fn hole(&self, offset: u64, length: u32, done: bool) -> Result<Head, ProtocolError> {
        self.needs_chunks("hole")?;
        debug_assert!(length > 0);
        Ok(self.chunk(ChunkCode::OffsetHole, 12, done).u64(offset).u32(length))
    }

    /// The extents of one metadata context, from the request's offset on; `done` ends the reply.
    ///
    /// What does not fit is left off at the end, as the protocol allows: extents beyond `STATUS_EXTENTS_MAX`, and,
    /// with 32-bit lengths, all that follows an extent of 4 GiB or more, which is itself cut to a multiple of 64 KiB.
    /// Whether the client wants only one extent is the caller's business.
    pub fn block_status(
        &self,
        context_id: u32,
        extents: &[StatusExtent],
        done: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), ProtocolError> {
        self.needs_chunks("block status")?;
        let extents = &extents[..extents.len().min(STATUS_EXTENTS_MAX as usize)];
        if extents.is_empty() {
            return Err(ProtocolError::NotExpressible { what: "block status without extents" });
        }
        if self.style.is_extended() {
            let length = 8 + 16 * extents.len() as u64;
            out.extend_from_slice(&self.chunk(ChunkCode::BlockStatusExt, length, done));
            out.extend_from_slice(&Head::new().u32(context_id).u32(extents.len() as u32));
            for extent in extents {
                out.extend_from_slice(&Head::new().u64(extent.length).u64(extent.flags));
            }
            return Ok(());
        }
        const CUT: u32 = 0xffff_0000;
        let short = extents.iter().take_while(|extent| extent.length <= u32::MAX.into()).count();
        let count = extents.len().min(short + 1);
        let length = 4 + 8 * count as u64;
        out.extend_from_slice(&self.chunk(ChunkCode::BlockStatus, length, done));
        out.extend_from_slice(&context_id.to_be_bytes());
        for extent in &extents[..count] {
            let length = u32::try_from(extent.length).unwrap_or(CUT);
            out.extend_from_slice(&Head::new().u32(length).u32(extent.flags as u32));
        }
        Ok(())
    }

    fn simple(&self, error: u32) -> Head {
        Head::new().u32(SIMPLE_REPLY_MAGIC).u32(error).u64(self.cookie)
    }

    fn chunk(&self, kind: ChunkCode, length: u64, done: bool) -> Head {
        let flags = ChunkFlags::EMPTY.set(ChunkFlags::DONE, done).0;
        let kind = kind.to_wire();
        match self.style {
            HeaderStyle::Extended => Head::new()
                .u32(EXTENDED_REPLY_MAGIC)
                .u16(flags)
                .u16(kind)
                .u64(self.cookie)
                .u64(self.offset)
                .u64(length),
            _ => Head::new()
                .u32(STRUCTURED_REPLY_MAGIC)
                .u16(flags)
                .u16(kind)
                .u64(self.cookie)
                .u32(length as u32),
        }
    }

    fn needs_chunks(&self, what: &'static str) -> Result<(), ProtocolError> {
        if self.style.has_chunks() { Ok(()) } else { Err(ProtocolError::NotExpressible { what }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

    fn request(command: Command, flags: CommandFlags, offset: u64, length: u64) -> RequestHeader {
        RequestHeader { flags, command, cookie: 0x0102_0304_0506_0708, offset, length }
    }

    #[test]
    fn a_client_believes_no_more_of_an_extent_than_a_server_knows() {
        let told = [Extent::data(8), Extent::zero(8), Extent::hole(8), Extent::nothing(8)];
        let heard = told.map(|extent| StatusExtent::of(extent).extent());
        // What the layer does not hold may be data of a layer below.
        let wanted = [Extent::data(8), Extent::zero(8), Extent::hole(8), Extent::data(8)];
        assert_eq!(heard, wanted.map(|extent| extent.on(Word::Claim)));
        // A server may tell of holes that do not read as zeroes.
        let hole = StatusExtent { length: 8, flags: AllocationFlags::HOLE.0.into() };
        assert_eq!(hole.extent(), Extent::nothing(8).on(Word::Claim));
    }

    #[test]
    fn requests_survive_the_round_trip() {
        let commands = (0..12).map(Command::from_wire);
        for (command, style) in commands.flat_map(|command| STYLES.map(|style| (command, style))) {
            let mut sent = request(command, CommandFlags::FUA, 1 << 40, 4096);
            let bytes = sent.write(style).unwrap();
            assert_eq!(bytes.len(), RequestHeader::bytes(style));
            if style.is_extended() && command == Command::Write {
                sent.flags = sent.flags | CommandFlags::PAYLOAD_LEN;
            }
            for cut in 0..bytes.len() {
                assert_eq!(parse_request(&bytes[..cut], style), Ok(None));
            }
            assert_eq!(parse_request(&bytes, style), Ok(Some((sent, bytes.len()))));
            let payload = if command == Command::Write { 4096 } else { 0 };
            assert_eq!(sent.payload_bytes(style), payload);
        }
    }

    #[test]
    fn a_compact_request_has_the_bytes_of_the_document() {
        let bytes = request(Command::WriteZeroes, CommandFlags::NO_HOLE, 512, 1024)
            .write(HeaderStyle::Simple)
            .unwrap();
        let expected = [
            &[0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6][..],
            &[1, 2, 3, 4, 5, 6, 7, 8],
            &[0, 0, 0, 0, 0, 0, 2, 0],
            &[0, 0, 4, 0],
        ];
        assert_eq!(*bytes, *expected.concat());
    }

    #[test]
    fn broken_streams_and_giant_payloads_end_the_session() {
        let style = HeaderStyle::Simple;
        assert!(matches!(parse_request(b"GET ", style), Err(ProtocolError::BadMagic { .. })));
        let extended =
            request(Command::Read, CommandFlags::EMPTY, 0, 1).write(HeaderStyle::Extended).unwrap();
        assert!(matches!(parse_request(&extended, style), Err(ProtocolError::BadMagic { .. })));
        let long = u64::from(REQUEST_PAYLOAD_BYTES_MAX) + 1;
        for style in STYLES {
            let write = request(Command::Write, CommandFlags::EMPTY, 0, long).write(style).unwrap();
            assert!(matches!(parse_request(&write, style), Err(ProtocolError::RequestTooLarge { .. })));
            let trim = request(Command::Trim, CommandFlags::EMPTY, 0, long).write(style).unwrap();
            assert!(parse_request(&trim, style).is_ok());
        }
        let wide = request(Command::Trim, CommandFlags::EMPTY, 0, 1 << 32);
        assert!(matches!(wide.write(style), Err(ProtocolError::NotExpressible { .. })));
        assert!(wide.write(HeaderStyle::Extended).is_ok());
    }

    #[test]
    fn requests_are_judged_as_the_document_says() {
        use NbdErrno::{Invalid, NoSpace, NotPermitted};
        let none = CommandFlags::EMPTY;
        let all = TransmissionFlags::KNOWN.without(TransmissionFlags::READ_ONLY);
        let rules = RequestRules {
            style: HeaderStyle::Structured,
            flags: all,
            size_bytes: 1 << 20,
            minimum_block_bytes: 512,
            payload_bytes_max: 65536,
            has_contexts: true,
        };
        let verdict = |command, flags, offset, length| request(command, flags, offset, length).check(&rules);
        for command in [Command::Read, Command::Write, Command::WriteZeroes, Command::Trim, Command::Cache] {
            assert_eq!(verdict(command, CommandFlags::FUA, 512, 65536), Ok(()));
            assert_eq!(verdict(command, none, 1 << 20, 0), Ok(()));
            let beyond = matches!(command, Command::Write | Command::WriteZeroes);
            let beyond = Err(if beyond { NoSpace } else { Invalid });
            assert_eq!(verdict(command, none, (1 << 20) - 512, 1024), beyond);
            assert_eq!(verdict(command, none, u64::MAX - 511, 1024), beyond);
            assert_eq!(verdict(command, none, 1, 512), Err(Invalid));
            assert_eq!(verdict(command, none, 512, 511), Err(Invalid));
            assert_eq!(verdict(command, CommandFlags::REQ_ONE, 0, 512), Err(Invalid));
            assert_eq!(verdict(command, CommandFlags(0x100), 0, 512), Err(Invalid));
        }
        assert_eq!(verdict(Command::Read, CommandFlags::DF, 0, 66048), Err(Invalid));
        assert_eq!(verdict(Command::Write, none, 0, 66048), Err(Invalid));
        assert_eq!(verdict(Command::Trim, none, 0, 1 << 20), Ok(()));
        assert_eq!(
            verdict(Command::WriteZeroes, CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE, 0, 512),
            Ok(())
        );
        assert_eq!(verdict(Command::BlockStatus, CommandFlags::REQ_ONE, 0, 512), Ok(()));
        assert_eq!(verdict(Command::Flush, none, 77, 77), Ok(()));
        assert_eq!(verdict(Command::Disconnect, none, 0, 0), Ok(()));
        assert_eq!(verdict(Command::Unknown(9), none, 0, 512), Err(Invalid));

        let read_only = RequestRules { flags: all | TransmissionFlags::READ_ONLY, ..rules };
        assert_eq!(request(Command::Write, none, 0, 512).check(&read_only), Err(NotPermitted));
        assert_eq!(request(Command::Read, none, 0, 512).check(&read_only), Ok(()));
        let bare = RequestRules { flags: TransmissionFlags::HAS_FLAGS, has_contexts: false, ..rules };
        for command in [Command::Flush, Command::Trim, Command::WriteZeroes, Command::BlockStatus] {
            assert_eq!(request(command, none, 0, 512).check(&bare), Err(Invalid));
        }
        assert_eq!(request(Command::Read, CommandFlags::DF, 0, 512).check(&bare), Err(Invalid));
        assert_eq!(request(Command::Write, CommandFlags::FUA, 0, 512).check(&bare), Err(Invalid));

        let extended = RequestRules { style: HeaderStyle::Extended, ..rules };
        assert_eq!(request(Command::Write, none, 0, 512).check(&extended), Ok(()));
        assert_eq!(request(Command::Write, none, 0, 512).payload_bytes(HeaderStyle::Extended), 512);
        assert_eq!(request(Command::Write, CommandFlags::PAYLOAD_LEN, 0, 512).check(&extended), Ok(()));
        assert_eq!(request(Command::Read, CommandFlags::PAYLOAD_LEN, 0, 512).check(&extended), Err(Invalid));
        assert_eq!(request(Command::Write, CommandFlags::PAYLOAD_LEN, 0, 512).check(&rules), Err(Invalid));
    }

    #[test]
    fn replies_have_the_bytes_of_the_document() {
        let request = request(Command::Read, CommandFlags::EMPTY, 0x1000, 0x800);
        let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
        let simple = request.reply(HeaderStyle::Simple);
        let structured = request.reply(HeaderStyle::Structured);
        let extended = request.reply(HeaderStyle::Extended);

        let ok = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie].concat();
        assert_eq!(*simple.success(), *ok);
        assert_eq!(*structured.success(), *ok);
        assert_eq!(*simple.data(0x1000, 0x800, true), *ok);

        let data =
            [&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1][..], &cookie, &[0, 0, 4, 8], &[0, 0, 0, 0, 0, 0, 0x10, 0]];
        assert_eq!(*structured.data(0x1000, 0x400, true), *data.concat());
        let hole = [
            &[0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 2][..],
            &cookie,
            &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 12],
            &[0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 4, 0],
        ];
        assert_eq!(*extended.hole(0x1400, 0x400, false).unwrap(), *hole.concat());

        let mut out = Vec::new();
        structured.failure_at(NbdErrno::Io, "bad", 0x1200, true, &mut out);
        let failure = [
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2][..],
            &cookie,
            &[0, 0, 0, 17, 0, 0, 0, 5, 0, 3],
            b"bad",
            &[0, 0, 0, 0, 0, 0, 0x12, 0],
        ];
        assert_eq!(out, failure.concat());
        out.clear();
        simple.failure(NbdErrno::NoSpace, "no room", &mut out);
        assert_eq!(out, [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28][..], &cookie].concat());

        assert!(simple.hole(0, 1, true).is_err() && simple.end().is_err());
        let extents = [StatusExtent { length: 512, flags: 3 }];
        assert!(simple.block_status(1, &extents, true, &mut out).is_err());
        assert!(structured.block_status(1, &[], true, &mut out).is_err());
        assert_eq!(out.len(), 16);
    }
}
