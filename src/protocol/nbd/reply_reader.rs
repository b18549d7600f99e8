//! Replies as a client sees them: headers from the stream, and the payloads of chunks.
//!
//! A header is parsed from what has arrived so far. It comes out only if its kind is one that the negotiation allows and
//! its length is one that the kind can have, so the reader of the payload can trust it as a bound: at most
//! `payload_bytes_max` of data and its offset, at most `STATUS_EXTENTS_MAX` extents, at most 64 KiB of an error. Data is
//! not parsed here but read straight to where it belongs; everything else is small and parsed from its whole payload.
//! Whether a reply answers what was asked is the business of `pending`.

use super::constants::{
    ChunkCode, ChunkFlags, ERROR_CHUNK_BYTES_MAX, EXTENDED_REPLY_MAGIC, HeaderStyle, SIMPLE_REPLY_MAGIC,
    STATUS_EXTENTS_MAX, STRUCTURED_REPLY_MAGIC,
};
use super::cursor::{Reader, printable};
use super::errno::NbdErrno;
use super::error::ProtocolError;
use super::transmission::StatusExtent;

/// The front of a reply, or of one chunk of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A whole reply; after a successful read, the data of the whole request follows.
    Simple {
        /// The request's cookie.
        cookie: u64,
        /// Why the request failed, if it did.
        error: Option<NbdErrno>,
    },
    /// One chunk; its payload follows.
    Chunk {
        /// The request's cookie.
        cookie: u64,
        /// The offset that an extended chunk repeats from its request.
        request_offset: Option<u64>,
        /// What the payload is.
        kind: ChunkCode,
        /// Bytes of payload.
        length: u32,
        /// Whether it is the last chunk of its reply.
        done: bool,
    },
}

impl ReplyHeader {
    /// The cookie of the request that is answered.
    pub const fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}

/// Parses a reply header from the front of `input`: the header and its size on the wire, or `None` if more bytes are
/// needed. `payload_bytes_max` is the length of the longest read that this client sends.
pub fn parse_reply(
    input: &[u8],
    style: HeaderStyle,
    payload_bytes_max: u32,
) -> Result<Option<(ReplyHeader, usize)>, ProtocolError> {
    let Some(magic) = input.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)) else { return Ok(None) };
    let (what, bytes, allowed) = match magic {
        SIMPLE_REPLY_MAGIC => ("simple reply", 16, style != HeaderStyle::Extended),
        STRUCTURED_REPLY_MAGIC => ("structured reply chunk", 20, style == HeaderStyle::Structured),
        EXTENDED_REPLY_MAGIC => ("extended reply chunk", 32, style == HeaderStyle::Extended),
        _ => return Err(ProtocolError::BadMagic { what: "reply", found: magic.into() }),
    };
    if !allowed {
        return Err(ProtocolError::WrongStyle { what });
    }
    let Some(fields) = input.get(4..bytes) else { return Ok(None) };
    let mut reader = Reader::new(what, fields);
    if magic == SIMPLE_REPLY_MAGIC {
        let error = NbdErrno::from_wire(reader.u32()?);
        return Ok(Some((ReplyHeader::Simple { cookie: reader.u64()?, error }, bytes)));
    }
    let flags = ChunkFlags(reader.u16()?);
    let kind = ChunkCode::from_wire(reader.u16()?);
    let cookie = reader.u64()?;
    let (request_offset, length) = match style {
        HeaderStyle::Extended => (Some(reader.u64()?), reader.u64()?),
        _ => (None, reader.u32()?.into()),
    };
    let done = flags.contains(ChunkFlags::DONE);
    let length = check_chunk(kind, length, done, style, payload_bytes_max)?;
    Ok(Some((ReplyHeader::Chunk { cookie, request_offset, kind, length, done }, bytes)))
}

/// Whether a chunk of this kind may have this length, and may come at all.
fn check_chunk(
    kind: ChunkCode,
    length: u64,
    done: bool,
    style: HeaderStyle,
    payload_bytes_max: u32,
) -> Result<u32, ProtocolError> {
    let extents = |head: u64, each: u64| {
        length > head
            && (length - head).is_multiple_of(each)
            && (length - head) / each <= STATUS_EXTENTS_MAX.into()
    };
    let error = |least: u64| length >= least && length <= ERROR_CHUNK_BYTES_MAX.into();
    let sound = match kind {
        ChunkCode::None if !done => {
            return Err(ProtocolError::BadChunk { kind, what: "end is not marked as one" });
        }
        ChunkCode::None => length == 0,
        ChunkCode::OffsetData => length > 8 && length - 8 <= payload_bytes_max.into(),
        ChunkCode::OffsetHole => length == 12,
        ChunkCode::BlockStatus if !style.is_extended() => extents(4, 8),
        ChunkCode::BlockStatusExt if style.is_extended() => extents(8, 16),
        ChunkCode::Error => error(6),
        ChunkCode::ErrorOffset => error(14),
        ChunkCode::Unknown(_) if kind.is_error() => error(6),
        ChunkCode::BlockStatus | ChunkCode::BlockStatusExt | ChunkCode::Unknown(_) => {
            return Err(ProtocolError::UnknownChunk { code: kind.to_wire() });
        }
    };
    match u32::try_from(length) {
        Ok(length) if sound => Ok(length),
        _ => Err(ProtocolError::BadChunkLength { kind, length }),
    }
}

/// Parses the offset at the head of the payload of an `OffsetData` chunk. It has `DATA_OFFSET_BYTES` bytes; the rest of
/// the payload is data.
pub fn parse_data_offset(input: &[u8]) -> Option<u64> {
    input.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// Bytes of an `OffsetData` payload that are not data.
pub const DATA_OFFSET_BYTES: u32 = 8;

/// Parses the payload of an `OffsetHole` chunk: offset and length, which is not 0.
pub fn parse_hole(payload: &[u8]) -> Result<(u64, u32), ProtocolError> {
    let mut reader = Reader::new("hole chunk", payload);
    let (offset, length) = (reader.u64()?, reader.u32()?);
    reader.end()?;
    match length {
        0 => Err(ProtocolError::BadChunk { kind: ChunkCode::OffsetHole, what: "hole is empty" }),
        _ => Ok((offset, length)),
    }
}

/// What an error chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Why the request failed.
    pub errno: NbdErrno,
    /// The server's words, made safe to print; may be empty.
    pub message: String,
    /// Where it failed, if the server told.
    pub offset: Option<u64>,
}

/// Parses the payload of an error chunk of any kind. Fields that a later protocol may have put at the end are ignored.
pub fn parse_error(kind: ChunkCode, payload: &[u8]) -> Result<ErrorChunk, ProtocolError> {
    let mut reader = Reader::new("error chunk", payload);
    let errno = reader.u32()?;
    let message_bytes = reader.u16()?;
    let message = printable(reader.bytes(message_bytes.into())?);
    let offset = match kind {
        ChunkCode::ErrorOffset => Some(reader.u64()?),
        _ => None,
    };
    if matches!(kind, ChunkCode::Error | ChunkCode::ErrorOffset) {
        reader.end()?;
    }
    let Some(errno) = NbdErrno::from_wire(errno) else {
        return Err(ProtocolError::BadChunk { kind, what: "error number is 0" });
    };
    Ok(ErrorChunk { errno, message, offset })
}

/// What a block status chunk says about one metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus<'a> {
    /// The number of the context.
    pub context_id: u32,
    extended: bool,
    descriptors: &'a [u8],
}

/// Parses the payload of a `BlockStatus` or `BlockStatusExt` chunk. There is at least one extent, and none is empty.
pub fn parse_block_status(kind: ChunkCode, payload: &[u8]) -> Result<BlockStatus<'_>, ProtocolError> {
    let extended = kind == ChunkCode::BlockStatusExt;
    let mut reader = Reader::new("block status chunk", payload);
    let context_id = reader.u32()?;
    let count = if extended { Some(reader.u32()?) } else { None };
    let descriptors = reader.rest();
    let size = if extended { 16 } else { 8 };
    if descriptors.is_empty() || !descriptors.len().is_multiple_of(size) {
        return Err(ProtocolError::BadChunkLength { kind, length: payload.len() as u64 });
    }
    if count.is_some_and(|count| descriptors.len() / size != count as usize) {
        return Err(ProtocolError::BadChunk { kind, what: "number of extents contradicts its length" });
    }
    let status = BlockStatus { context_id, extended, descriptors };
    match status.extents().all(|extent| extent.length > 0) {
        true => Ok(status),
        false => Err(ProtocolError::BadChunk { kind, what: "extents are empty in part" }),
    }
}

impl<'a> BlockStatus<'a> {
    /// The extents, one after the other from the request's offset on. They may end before the end of the request, or
    /// lie beyond it, or beyond the export: the server need not be exact, so the caller cuts them to what it knows.
    pub fn extents(&self) -> impl Iterator<Item = StatusExtent> + 'a {
        let extended = self.extended;
        self.descriptors.chunks_exact(if extended { 16 } else { 8 }).map(move |bytes| {
            let (length, flags) = bytes.split_at(bytes.len() / 2);
            StatusExtent { length: number(length), flags: number(flags) }
        })
    }
}

/// A big-endian number of 4 or 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::constants::{Command, CommandFlags, REQUEST_MAGIC};
    use super::super::transmission::{ReplyTo, RequestHeader};
    use super::*;

    const MAX: u32 = 1 << 20;
    const CHUNKED: [HeaderStyle; 2] = [HeaderStyle::Structured, HeaderStyle::Extended];

    fn reply(style: HeaderStyle) -> ReplyTo {
        let request = RequestHeader {
            flags: CommandFlags::EMPTY,
            command: Command::Read,
            cookie: 77,
            offset: 0x5000,
            length: 0x3000,
        };
        request.reply(style)
    }

    /// Parses a message that is whole, and checks that no prefix of its header parses.
    fn parse(bytes: &[u8], style: HeaderStyle) -> (ReplyHeader, &[u8]) {
        let (header, size) = parse_reply(bytes, style, MAX).unwrap().unwrap();
        for cut in 0..size {
            assert_eq!(parse_reply(&bytes[..cut], style, MAX), Ok(None));
        }
        (header, &bytes[size..])
    }

    fn chunk(style: HeaderStyle, kind: ChunkCode, length: u32, done: bool) -> ReplyHeader {
        let request_offset = style.is_extended().then_some(0x5000);
        ReplyHeader::Chunk { cookie: 77, request_offset, kind, length, done }
    }

    #[test]
    fn simple_replies_survive_the_round_trip() {
        for style in [HeaderStyle::Simple, HeaderStyle::Structured] {
            let bytes = reply(style).success();
            assert_eq!(parse(&bytes, style), (ReplyHeader::Simple { cookie: 77, error: None }, &[][..]));
        }
        let mut out = Vec::new();
        reply(HeaderStyle::Simple).failure(NbdErrno::NoSpace, "lost", &mut out);
        let (header, rest) = parse(&out, HeaderStyle::Simple);
        assert_eq!(header, ReplyHeader::Simple { cookie: 77, error: Some(NbdErrno::NoSpace) });
        assert_eq!((header.cookie(), rest.len()), (77, 0));
    }

    #[test]
    fn chunks_survive_the_round_trip() {
        for style in CHUNKED {
            let end = reply(style).end().unwrap();
            assert_eq!(parse(&end, style).0, chunk(style, ChunkCode::None, 0, true));

            let data = reply(style).data(0x6000, 0x1000, false);
            let (header, payload) = parse(&data, style);
            assert_eq!(header, chunk(style, ChunkCode::OffsetData, 0x1008, false));
            assert_eq!(parse_data_offset(payload), Some(0x6000));
            assert_eq!(payload.len(), DATA_OFFSET_BYTES as usize);

            let hole = reply(style).hole(0x7000, 0x1000, true).unwrap();
            let (header, payload) = parse(&hole, style);
            assert_eq!(header, chunk(style, ChunkCode::OffsetHole, 12, true));
            assert_eq!(parse_hole(payload), Ok((0x7000, 0x1000)));

            let mut out = Vec::new();
            reply(style).failure(NbdErrno::Io, "It broke.", &mut out);
            let (header, payload) = parse(&out, style);
            assert_eq!(header, chunk(style, ChunkCode::Error, 15, true));
            let error = ErrorChunk { errno: NbdErrno::Io, message: "It broke.".into(), offset: None };
            assert_eq!(parse_error(ChunkCode::Error, payload), Ok(error.clone()));

            out.clear();
            reply(style).failure_at(NbdErrno::Io, "It broke.", 0x6200, false, &mut out);
            let (header, payload) = parse(&out, style);
            assert_eq!(header, chunk(style, ChunkCode::ErrorOffset, 23, false));
            let error = ErrorChunk { offset: Some(0x6200), ..error };
            assert_eq!(parse_error(ChunkCode::ErrorOffset, payload), Ok(error));
        }
    }

    #[test]
    fn extents_survive_the_round_trip_and_long_ones_end_a_compact_reply() {
        let extents = [(512, 0), (1 << 20, 3), (u64::from(u32::MAX), 2), (5 << 32, 3), (512, 0)]
            .map(|(length, flags)| StatusExtent { length, flags });
        for style in CHUNKED {
            let mut out = Vec::new();
            reply(style).block_status(9, &extents, true, &mut out).unwrap();
            let (header, payload) = parse(&out, style);
            let ReplyHeader::Chunk { kind, length, done: true, .. } = header else { panic!("{header:?}") };
            assert_eq!(length as usize, payload.len());
            let status = parse_block_status(kind, payload).unwrap();
            assert_eq!(status.context_id, 9);
            let parsed: Vec<StatusExtent> = status.extents().collect();
            if style.is_extended() {
                assert_eq!(parsed, extents);
            } else {
                assert_eq!(parsed[..3], extents[..3]);
                assert_eq!(parsed[3..], [StatusExtent { length: 0xffff_0000, flags: 3 }]);
            }
        }
    }

    #[test]
    fn more_extents_than_fit_are_left_off() {
        let extents = vec![StatusExtent { length: 512, flags: 0 }; STATUS_EXTENTS_MAX as usize + 5];
        for style in CHUNKED {
            let mut out = Vec::new();
            reply(style).block_status(9, &extents, true, &mut out).unwrap();
            let (header, payload) = parse(&out, style);
            let ReplyHeader::Chunk { kind, .. } = header else { panic!("{header:?}") };
            let count = parse_block_status(kind, payload).unwrap().extents().count();
            assert_eq!(count, STATUS_EXTENTS_MAX as usize);
        }
    }

    #[test]
    fn only_negotiated_headers_are_taken() {
        let simple = reply(HeaderStyle::Simple).success();
        let structured = reply(HeaderStyle::Structured).end().unwrap();
        let extended = reply(HeaderStyle::Extended).end().unwrap();
        let wrong = |bytes: &[u8], style| {
            matches!(parse_reply(bytes, style, MAX), Err(ProtocolError::WrongStyle { .. }))
        };
        assert!(wrong(&structured, HeaderStyle::Simple) && wrong(&extended, HeaderStyle::Simple));
        assert!(wrong(&extended, HeaderStyle::Structured));
        assert!(wrong(&simple, HeaderStyle::Extended) && wrong(&structured, HeaderStyle::Extended));
        let request = REQUEST_MAGIC.to_be_bytes();
        let result = parse_reply(&request, HeaderStyle::Structured, MAX);
        assert_eq!(result, Err(ProtocolError::BadMagic { what: "reply", found: REQUEST_MAGIC.into() }));
    }

    /// A structured chunk header by hand.
    fn by_hand(kind: u16, flags: u16, length: u32) -> Result<Option<(ReplyHeader, usize)>, ProtocolError> {
        let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&77u64.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        parse_reply(&bytes, HeaderStyle::Structured, MAX)
    }

    #[test]
    fn lengths_that_cannot_be_are_refused_before_the_payload() {
        for (kind, good, bad) in [
            (0, vec![0], vec![1, u32::MAX]),
            (1, vec![9, 8 + MAX], vec![0, 8, 9 + MAX, u32::MAX]),
            (2, vec![12], vec![0, 11, 13]),
            (5, vec![12, 4 + (8 << 20)], vec![0, 4, 11, 13, 12 + (8 << 20), u32::MAX]),
            (0x8001, vec![6, 4102], vec![0, 5, 65537, u32::MAX]),
            (0x8002, vec![14], vec![6, 13, u32::MAX]),
            (0x9999, vec![6, 99], vec![5, u32::MAX]),
        ] {
            for length in good {
                assert!(matches!(by_hand(kind, 1, length), Ok(Some(_))), "{kind} {length}");
            }
            for length in bad {
                let result = by_hand(kind, 1, length);
                assert!(matches!(result, Err(ProtocolError::BadChunkLength { .. })), "{kind} {length}");
            }
        }
        assert_eq!(by_hand(6, 1, 24), Err(ProtocolError::UnknownChunk { code: 6 }));
        assert_eq!(by_hand(3, 1, 0), Err(ProtocolError::UnknownChunk { code: 3 }));
        assert!(matches!(by_hand(0, 0, 0), Err(ProtocolError::BadChunk { .. })));
        let Ok(Some((ReplyHeader::Chunk { done, .. }, _))) = by_hand(0, 0xffff, 0) else { panic!() };
        assert!(done, "unknown flags are ignored");
    }

    #[test]
    fn payloads_that_lie_are_refused() {
        assert!(
            parse_hole(&[0; 12]).is_err() && parse_hole(&[1; 11]).is_err() && parse_hole(&[1; 13]).is_err()
        );
        let error = |bytes: &[u8]| parse_error(ChunkCode::Error, bytes);
        assert!(error(&[0, 0, 0, 5, 0, 1]).is_err(), "message beyond the end");
        assert!(error(&[0, 0, 0, 0, 0, 0]).is_err(), "no error");
        assert!(error(&[0, 0, 0, 5, 0, 0, 9]).is_err(), "bytes after the end");
        assert_eq!(error(&[0, 0, 0, 99, 0, 0]).unwrap().errno, NbdErrno::Invalid);
        assert!(parse_error(ChunkCode::Unknown(0x9000), &[0, 0, 0, 5, 0, 0, 9]).is_ok());
        let status = |bytes: &[u8]| parse_block_status(ChunkCode::BlockStatus, bytes).map(|_| ());
        assert!(status(&[0, 0, 0, 1]).is_err() && status(&[0, 0, 0, 1, 0, 0, 2, 0]).is_err());
        assert!(status(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]).is_err(), "empty extent");
        let mut wide = vec![0, 0, 0, 1, 0, 0, 0, 2];
        wide.extend_from_slice(&[1; 16]);
        assert!(parse_block_status(ChunkCode::BlockStatusExt, &wide).is_err(), "count");
        wide[7] = 1;
        assert!(parse_block_status(ChunkCode::BlockStatusExt, &wide).is_ok());
    }
}
