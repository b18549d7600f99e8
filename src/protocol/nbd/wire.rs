//! The structures of the handshake, one parse function and one mirror write function each.
//!
//! Structures that open a message on the stream (`Greeting`, `OptionHeader`, `OptionReplyHeader`,
//! `ExportNameAnswer`) are parsed from whatever has arrived so far: `Ok(None)` means that more bytes are needed, and
//! a wrong magic word is told as soon as it is there. Structures that travel as the payload of an option or of an
//! option reply are parsed from exactly their payload: a byte too few or too many is an error.

use super::constants::{
    ClientFlags, EXPORT_NAME_ZEROES_BYTES, GREETING_MAGIC, HandshakeFlags, InfoCode, MINIMUM_BLOCK_BYTES_MAX,
    OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode, ReplyCode, STRING_BYTES_MAX,
    TransmissionFlags,
};
use super::cursor::{Reader, clip, printable, text};
use super::error::ProtocolError;

/// Fails if the bytes so far cannot become `magic`; says whether all of it is there.
fn expect_magic(what: &'static str, input: &[u8], magic: u64) -> Result<bool, ProtocolError> {
    match input.first_chunk() {
        None => Ok(false),
        Some(found) if u64::from_be_bytes(*found) == magic => Ok(true),
        Some(found) => Err(ProtocolError::BadMagic { what, found: u64::from_be_bytes(*found) }),
    }
}

/// A length that this side has itself bounded by the protocol's limits.
fn length(bytes: usize) -> u32 {
    debug_assert!(bytes <= u32::MAX as usize);
    bytes as u32
}

/// What a server says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What it offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Size on the wire.
    pub const BYTES: usize = 18;

    /// Parses a greeting from the front of `input`.
    pub fn parse(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        if !expect_magic("server greeting", input, GREETING_MAGIC)? {
            return Ok(None);
        }
        match expect_magic("second word of the server greeting", &input[8..], OPTION_MAGIC) {
            Err(ProtocolError::BadMagic { found: OLDSTYLE_MAGIC, .. }) => {
                return Err(ProtocolError::Oldstyle);
            }
            other => other?,
        };
        let Some(bytes) = input.get(16..Self::BYTES) else { return Ok(None) };
        let mut reader = Reader::new("server greeting", bytes);
        Ok(Some(Self { flags: HandshakeFlags(reader.u16()?) }))
    }

    /// Appends the greeting.
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
    }
}

impl ClientFlags {
    /// Size on the wire.
    pub const BYTES: usize = 4;

    /// Parses the client's answer to the greeting.
    pub fn parse(input: &[u8]) -> Option<Self> {
        input.first_chunk().map(|bytes| Self(u32::from_be_bytes(*bytes)))
    }

    /// Appends the flags.
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.to_be_bytes());
    }
}

/// The front of every option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// What the client asks for.
    pub option: OptionCode,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Size on the wire.
    pub const BYTES: usize = 16;

    /// Parses an option header from the front of `input`.
    pub fn parse(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        if !expect_magic("option", input, OPTION_MAGIC)? {
            return Ok(None);
        }
        let Some(bytes) = input.get(8..Self::BYTES) else { return Ok(None) };
        let mut reader = Reader::new("option header", bytes);
        Ok(Some(Self { option: OptionCode::from_wire(reader.u32()?), length: reader.u32()? }))
    }

    /// Appends the header.
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.to_wire().to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// Appends an option with its payload.
pub fn write_option(out: &mut Vec<u8>, option: OptionCode, payload: &[u8]) {
    OptionHeader { option, length: length(payload.len()) }.write(out);
    out.extend_from_slice(payload);
}

/// The front of every option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    /// What the answer is.
    pub reply: ReplyCode,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Size on the wire.
    pub const BYTES: usize = 20;

    /// Parses an option reply header from the front of `input`.
    pub fn parse(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        if !expect_magic("option reply", input, OPTION_REPLY_MAGIC)? {
            return Ok(None);
        }
        let Some(bytes) = input.get(8..Self::BYTES) else { return Ok(None) };
        let mut reader = Reader::new("option reply header", bytes);
        Ok(Some(Self {
            option: OptionCode::from_wire(reader.u32()?),
            reply: ReplyCode::from_wire(reader.u32()?),
            length: reader.u32()?,
        }))
    }

    /// Appends the header.
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.to_wire().to_be_bytes());
        out.extend_from_slice(&self.reply.to_wire().to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// Appends an option reply with its payload.
pub fn write_option_reply(out: &mut Vec<u8>, option: OptionCode, reply: ReplyCode, payload: &[u8]) {
    OptionReplyHeader { option, reply, length: length(payload.len()) }.write(out);
    out.extend_from_slice(payload);
}

/// The answer to `EXPORT_NAME`, the only one without a reply header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameAnswer {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl ExportNameAnswer {
    /// Parses the answer from the front of `input`; `no_zeroes` says whether the padding was negotiated away.
    /// Returns the answer and its size on the wire.
    pub fn parse(input: &[u8], no_zeroes: bool) -> Result<Option<(Self, usize)>, ProtocolError> {
        let bytes = if no_zeroes { 10 } else { 10 + EXPORT_NAME_ZEROES_BYTES };
        if input.len() < bytes {
            return Ok(None);
        }
        let mut reader = Reader::new("answer to EXPORT_NAME", input);
        let answer = Self { size_bytes: reader.u64()?, flags: TransmissionFlags(reader.u16()?) };
        Ok(Some((answer, bytes)))
    }

    /// Appends the answer.
    pub fn write(self, no_zeroes: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size_bytes.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        if !no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_ZEROES_BYTES]);
        }
    }
}

/// The payload of `INFO` and `GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export; empty is the default export.
    pub export: &'a str,
    /// The information that the client wants; each kind once.
    pub wanted: Vec<InfoCode>,
}

impl<'a> InfoRequest<'a> {
    /// Parses the payload of an `INFO` or `GO` option.
    pub fn parse(payload: &'a [u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new("request for export information", payload);
        let name_bytes = reader.u32()?;
        let export = reader.text("export name", name_bytes)?;
        let count = reader.u16()?;
        let mut wanted = Vec::new();
        for _ in 0..count {
            wanted.push(InfoCode::from_wire(reader.u16()?));
        }
        reader.end()?;
        Ok(Self { export, wanted })
    }

    /// Appends the payload.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&length(self.export.len()).to_be_bytes());
        out.extend_from_slice(self.export.as_bytes());
        out.extend_from_slice(&(self.wanted.len() as u16).to_be_bytes());
        for code in &self.wanted {
            out.extend_from_slice(&code.to_wire().to_be_bytes());
        }
    }
}

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// The export; empty is the default export.
    pub export: &'a str,
    /// Names of contexts, or wildcards.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    /// Parses the payload of either option. The number of queries is bounded by the payload only.
    pub fn parse(payload: &'a [u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new("request for metadata contexts", payload);
        let name_bytes = reader.u32()?;
        let export = reader.text("export name", name_bytes)?;
        let count = reader.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let query_bytes = reader.u32()?;
            queries.push(reader.text("metadata query", query_bytes)?);
        }
        reader.end()?;
        Ok(Self { export, queries })
    }

    /// Appends the payload.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&length(self.export.len()).to_be_bytes());
        out.extend_from_slice(self.export.as_bytes());
        out.extend_from_slice(&length(self.queries.len()).to_be_bytes());
        for query in &self.queries {
            out.extend_from_slice(&length(query.len()).to_be_bytes());
            out.extend_from_slice(query.as_bytes());
        }
    }
}

/// One export of a list: the payload of a `Server` reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportListing {
    /// The name under which it can be opened.
    pub name: String,
    /// Words for a person; may be empty.
    pub description: String,
}

impl ExportListing {
    /// Parses the payload of a `Server` reply. What follows the name is meant for a person and is made printable.
    pub fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new("listed export", payload);
        let name_bytes = reader.u32()?;
        let name = reader.text("export name", name_bytes)?.to_owned();
        Ok(Self { name, description: printable(reader.rest()) })
    }

    /// Appends the payload. A description over the protocol's limit is cut.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&length(self.name.len()).to_be_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.extend_from_slice(clip(&self.description, STRING_BYTES_MAX).as_bytes());
    }
}

/// The block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Alignment of every offset and length; a power of two, at most 64 KiB.
    pub minimum_bytes: u32,
    /// Alignment below which requests are slow; a power of two.
    pub preferred_bytes: u32,
    /// Largest payload of one request; `u32::MAX` is no limit.
    pub maximum_bytes: u32,
}

impl Default for BlockSizes {
    /// What holds when nothing was negotiated, as a server has to take it.
    fn default() -> Self {
        Self { minimum_bytes: 1, preferred_bytes: 4096, maximum_bytes: super::DEFAULT_PAYLOAD_BYTES_MAX }
    }
}

impl BlockSizes {
    /// The sizes as this side uses them. Only what cannot be worked with is refused: a preferred size is advice, and is
    /// brought between the two others.
    pub fn check(self) -> Result<Self, ProtocolError> {
        let Self { minimum_bytes, preferred_bytes, maximum_bytes } = self;
        if !minimum_bytes.is_power_of_two() || maximum_bytes < minimum_bytes {
            return Err(ProtocolError::ImpossibleBlockSizes {
                minimum_bytes,
                preferred_bytes,
                maximum_bytes,
            });
        }
        if minimum_bytes > MINIMUM_BLOCK_BYTES_MAX {
            return Err(ProtocolError::BlocksTooLarge { minimum_bytes, max: MINIMUM_BLOCK_BYTES_MAX });
        }
        Ok(Self { preferred_bytes: preferred_bytes.clamp(minimum_bytes, maximum_bytes), ..self })
    }
}

/// One piece of information about an export: the payload of an `Info` reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoReply {
    /// Size and flags.
    Export {
        /// Size of the export in bytes.
        size_bytes: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(String),
    /// Words for a person.
    Description(String),
    /// Block sizes, unchecked.
    BlockSize(BlockSizes),
    /// A kind that this side does not know, and ignores.
    Other(u16),
}

impl InfoReply {
    /// Parses the payload of an `Info` reply.
    pub fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new("export information", payload);
        let info = match InfoCode::from_wire(reader.u16()?) {
            InfoCode::Export => {
                Self::Export { size_bytes: reader.u64()?, flags: TransmissionFlags(reader.u16()?) }
            }
            InfoCode::Name => Self::Name(text("export name", reader.rest())?.to_owned()),
            InfoCode::Description => Self::Description(printable(reader.rest())),
            InfoCode::BlockSize => Self::BlockSize(BlockSizes {
                minimum_bytes: reader.u32()?,
                preferred_bytes: reader.u32()?,
                maximum_bytes: reader.u32()?,
            }),
            InfoCode::Unknown(code) => {
                reader.rest();
                Self::Other(code)
            }
        };
        reader.end()?;
        Ok(info)
    }

    /// Appends the payload.
    pub fn write(&self, out: &mut Vec<u8>) {
        let code = match self {
            Self::Export { .. } => InfoCode::Export,
            Self::Name(_) => InfoCode::Name,
            Self::Description(_) => InfoCode::Description,
            Self::BlockSize(_) => InfoCode::BlockSize,
            Self::Other(code) => InfoCode::Unknown(*code),
        };
        out.extend_from_slice(&code.to_wire().to_be_bytes());
        match self {
            Self::Export { size_bytes, flags } => {
                out.extend_from_slice(&size_bytes.to_be_bytes());
                out.extend_from_slice(&flags.0.to_be_bytes());
            }
            Self::Name(text) | Self::Description(text) => {
                out.extend_from_slice(clip(text, STRING_BYTES_MAX).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend_from_slice(&sizes.minimum_bytes.to_be_bytes());
                out.extend_from_slice(&sizes.preferred_bytes.to_be_bytes());
                out.extend_from_slice(&sizes.maximum_bytes.to_be_bytes());
            }
            Self::Other(_) => {}
        }
    }
}

/// One metadata context: the payload of a `MetaContext` reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextReply {
    /// The number that stands for the context in status replies; meaningless in a list.
    pub id: u32,
    /// Namespace, colon, leaf name.
    pub name: String,
}

impl MetaContextReply {
    /// Parses the payload of a `MetaContext` reply.
    pub fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new("metadata context", payload);
        Ok(Self { id: reader.u32()?, name: text("name of a metadata context", reader.rest())?.to_owned() })
    }

    /// Appends the payload.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(self.name.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    /// Every proper prefix asks for more; the whole gives the value.
    fn check_stream<T: PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        value: T,
        parse: impl Fn(&[u8]) -> Result<Option<T>, ProtocolError>,
    ) {
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]), Ok(None), "{cut} bytes");
        }
        assert_eq!(parse(bytes), Ok(Some(value)));
    }

    /// Every proper prefix is an error; the whole gives the value.
    fn check_payload<T: PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        value: T,
        parse: impl Fn(&[u8]) -> Result<T, ProtocolError>,
    ) {
        for cut in 0..bytes.len() {
            assert!(matches!(parse(&bytes[..cut]), Err(ProtocolError::Truncated { .. })), "{cut} bytes");
        }
        assert_eq!(parse(bytes), Ok(value));
    }

    #[test]
    fn stream_structures_survive_the_round_trip() {
        let greeting = Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE };
        let bytes = written(|out| greeting.write(out));
        assert_eq!(bytes.len(), Greeting::BYTES);
        check_stream(&bytes, greeting, Greeting::parse);

        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        check_stream(&written(|out| flags.write(out)), flags, |input| Ok(ClientFlags::parse(input)));

        let option = OptionHeader { option: OptionCode::Go, length: 77 };
        let bytes = written(|out| option.write(out));
        assert_eq!(bytes.len(), OptionHeader::BYTES);
        check_stream(&bytes, option, OptionHeader::parse);

        let reply = OptionReplyHeader {
            option: OptionCode::Unknown(70),
            reply: ReplyCode::ErrUnsupported,
            length: 5,
        };
        let bytes = written(|out| reply.write(out));
        assert_eq!(bytes.len(), OptionReplyHeader::BYTES);
        check_stream(&bytes, reply, OptionReplyHeader::parse);

        let answer = ExportNameAnswer { size_bytes: 1 << 40, flags: TransmissionFlags::HAS_FLAGS };
        for no_zeroes in [true, false] {
            let bytes = written(|out| answer.write(no_zeroes, out));
            check_stream(&bytes, (answer, bytes.len()), |input| ExportNameAnswer::parse(input, no_zeroes));
        }
    }

    #[test]
    fn payloads_survive_the_round_trip() {
        let info = InfoRequest { export: "disk", wanted: vec![InfoCode::BlockSize, InfoCode::Unknown(9)] };
        let bytes = written(|out| info.write(out));
        assert_eq!(InfoRequest::parse(&bytes), Ok(info));
        for cut in 0..bytes.len() {
            assert!(InfoRequest::parse(&bytes[..cut]).is_err());
        }

        let request = MetaContextRequest { export: "", queries: vec!["base:", "base:allocation"] };
        let bytes = written(|out| request.write(out));
        assert_eq!(MetaContextRequest::parse(&bytes), Ok(request));
        for cut in 0..bytes.len() {
            assert!(MetaContextRequest::parse(&bytes[..cut]).is_err());
        }

        let listing = ExportListing { name: "a".into(), description: "A disk.".into() };
        let bytes = written(|out| listing.write(out));
        assert_eq!(ExportListing::parse(&bytes), Ok(listing));

        let sizes = BlockSizes { minimum_bytes: 512, preferred_bytes: 65536, maximum_bytes: u32::MAX };
        for info in [
            InfoReply::Export { size_bytes: 5, flags: TransmissionFlags::KNOWN },
            InfoReply::BlockSize(sizes),
            InfoReply::Name("n".into()),
            InfoReply::Description("two words".into()),
            InfoReply::Other(1000),
        ] {
            assert_eq!(InfoReply::parse(&written(|out| info.write(out))), Ok(info));
        }
        let sized = InfoReply::BlockSize(sizes);
        check_payload(&written(|out| sized.write(out)), sized, InfoReply::parse);

        let context = MetaContextReply { id: 7, name: "base:allocation".into() };
        assert_eq!(MetaContextReply::parse(&written(|out| context.write(out))), Ok(context));
    }

    #[test]
    fn wrong_magic_is_told_at_once_and_oldstyle_by_name() {
        assert_eq!(
            Greeting::parse(b"SSH-2.0-"),
            Err(ProtocolError::BadMagic { what: "server greeting", found: u64::from_be_bytes(*b"SSH-2.0-") })
        );
        let mut oldstyle = GREETING_MAGIC.to_be_bytes().to_vec();
        oldstyle.extend_from_slice(&OLDSTYLE_MAGIC.to_be_bytes());
        assert_eq!(Greeting::parse(&oldstyle), Err(ProtocolError::Oldstyle));
        assert!(matches!(OptionHeader::parse(&[0; 8]), Err(ProtocolError::BadMagic { .. })));
        assert!(matches!(OptionReplyHeader::parse(&[0; 8]), Err(ProtocolError::BadMagic { .. })));
    }

    #[test]
    fn a_count_that_lies_does_not_reserve_memory() {
        let mut bytes = 0u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(MetaContextRequest::parse(&bytes), Err(ProtocolError::Truncated { .. })));
        bytes.truncate(4);
        bytes.extend_from_slice(&u16::MAX.to_be_bytes());
        assert!(matches!(InfoRequest::parse(&bytes), Err(ProtocolError::Truncated { .. })));
    }

    #[test]
    fn block_sizes_have_rules() {
        // The preferred size as this side uses it, where these sizes can be worked with.
        let preferred = |minimum_bytes, preferred_bytes, maximum_bytes| {
            let sizes = BlockSizes { minimum_bytes, preferred_bytes, maximum_bytes }.check();
            sizes.ok().map(|sizes| sizes.preferred_bytes)
        };
        assert!(BlockSizes::default().check().is_ok());
        assert_eq!(preferred(1, 1, 1), Some(1));
        assert_eq!(preferred(1 << 20, 1 << 20, u32::MAX), Some(1 << 20));
        assert_eq!(preferred(512, 4096, 1_000_001), Some(4096));
        assert_eq!([preferred(512, 256, 8192), preferred(512, 4096, 512)], [Some(512); 2]);
        let refused = [preferred(0, 4096, 8192), preferred(3, 4096, 8192), preferred(512, 512, 256)];
        assert_eq!(refused, [None; 3]);
        assert_eq!(preferred(2 * MINIMUM_BLOCK_BYTES_MAX, 1 << 22, u32::MAX), None);
    }
}
