//! The numbers of the NBD protocol: magic words, flags, codes, and the limits that both sides keep.
//!
//! Names and values are those of `doc/proto.md` in the NetworkBlockDevice/nbd repository (public domain); the
//! extended headers come from its `extension-ext-header` branch. A code that this side does not know stays visible
//! as `Unknown(code)`: an unknown option must be answered, an unknown information reply must be ignored, and neither
//! is possible once the number is lost.

/// First word of every server greeting ("NBDMAGIC").
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle greeting, and first word of every option ("IHAVEOPT").
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle greeting; recognised only in order to say so.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The TCP port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Longest string the protocol allows: export names, queries, messages.
pub const STRING_BYTES_MAX: usize = 4096;
/// Bytes of zeroes after the answer to `EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES_BYTES: usize = 124;
/// Largest option payload, and largest option reply, that either side holds in memory.
pub const OPTION_PAYLOAD_BYTES_MAX: u32 = 64 * 1024;
/// Largest option payload that a server reads past in order to answer with an error; beyond it, it hangs up.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1024 * 1024;
/// Options a client may send before the server hangs up.
pub const OPTIONS_PER_HANDSHAKE_MAX: u32 = 128;
/// Bytes a server puts into the answer to one option; what does not fit is answered with `ERR_TOO_BIG`.
pub const OPTION_ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Metadata queries in one option.
pub const META_QUERIES_MAX: u32 = 256;
/// Exports that a client accepts in answer to `LIST`.
pub const LISTED_EXPORTS_MAX: usize = 4096;
/// Bytes of names and descriptions that a client accepts in answer to `LIST`.
pub const LISTED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Replies to one `INFO` or `GO` that a client reads before it gives up on the server.
pub const INFO_REPLIES_MAX: usize = 64;
/// Payload of one read or write that every implementation is expected to take when nothing else was agreed.
pub const DEFAULT_PAYLOAD_BYTES_MAX: u32 = 32 * 1024 * 1024;
/// Payload of one request beyond which a server hangs up instead of reading past it.
pub const REQUEST_PAYLOAD_BYTES_MAX: u32 = 64 * 1024 * 1024;
/// Extents in one block status chunk.
pub const STATUS_EXTENTS_MAX: u32 = 1 << 20;
/// Length of an error chunk that a client reads: message, offset, and room for fields that a later protocol adds.
pub const ERROR_CHUNK_BYTES_MAX: u32 = 64 * 1024;
/// Pieces that the answer to one read may leave between its holes before a client gives up on the server.
pub const READ_FRAGMENTS_MAX: usize = 4096;
/// Largest export: offsets are signed 64-bit numbers in every system call behind them.
pub const EXPORT_BYTES_MAX: u64 = i64::MAX as u64;
/// Largest minimum block size that a client copes with: one piece of I/O memory. The protocol allows 64 KiB, and there are
/// servers that take no smaller pieces than those of an object store.
pub const MINIMUM_BLOCK_BYTES_MAX: u32 = 1024 * 1024;

/// Declares an enum whose variants are codes on the wire, with `Unknown` for every other code.
macro_rules! wire_enum {
    ($(#[$meta:meta])* pub enum $name:ident: $int:ty { $($(#[$vmeta:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$vmeta])* $variant,)+
            /// A code that this implementation does not know.
            Unknown($int),
        }

        impl $name {
            /// The meaning of a code.
            pub const fn from_wire(code: $int) -> Self {
                match code {
                    $($value => Self::$variant,)+
                    other => Self::Unknown(other),
                }
            }

            /// The code on the wire.
            pub const fn to_wire(self) -> $int {
                match self {
                    $(Self::$variant => $value,)+
                    Self::Unknown(code) => code,
                }
            }
        }
    };
}

wire_enum! {
    /// What a client asks for during the handshake (`NBD_OPT_*`).
    pub enum OptionCode: u32 {
        /// Choose an export and enter transmission; cannot report an error.
        ExportName = 1,
        /// End the session.
        Abort = 2,
        /// List the exports.
        List = 3,
        /// Withdrawn from the protocol; kept so that it is never reused.
        PeekExport = 4,
        /// Begin TLS.
        StartTls = 5,
        /// Describe an export.
        Info = 6,
        /// Describe an export and enter transmission.
        Go = 7,
        /// Use structured replies.
        StructuredReply = 8,
        /// List the metadata contexts of an export.
        ListMetaContext = 9,
        /// Select metadata contexts of an export.
        SetMetaContext = 10,
        /// Use 32-byte headers with 64-bit lengths.
        ExtendedHeaders = 11,
    }
}

wire_enum! {
    /// What a server answers during the handshake (`NBD_REP_*`).
    pub enum ReplyCode: u32 {
        /// The option is accepted, or its list is complete.
        Ack = 1,
        /// One export of a list.
        Server = 2,
        /// One piece of information about an export.
        Info = 3,
        /// One metadata context.
        MetaContext = 4,
        /// The server does not know the option.
        ErrUnsupported = 0x8000_0001,
        /// The server's policy forbids the option.
        ErrPolicy = 0x8000_0002,
        /// The option is malformed or out of place.
        ErrInvalid = 0x8000_0003,
        /// The option cannot be had on the server's platform.
        ErrPlatform = 0x8000_0004,
        /// TLS comes first.
        ErrTlsRequired = 0x8000_0005,
        /// There is no such export.
        ErrUnknown = 0x8000_0006,
        /// The server is shutting down.
        ErrShutdown = 0x8000_0007,
        /// The client has to ask for the block sizes first.
        ErrBlockSizeRequired = 0x8000_0008,
        /// The request or its answer is too large.
        ErrTooBig = 0x8000_0009,
        /// The client has to ask for extended headers first.
        ErrExtendedHeadersRequired = 0x8000_000a,
    }
}

impl ReplyCode {
    /// Whether the reply says that the option failed.
    pub const fn is_error(self) -> bool {
        self.to_wire() & 0x8000_0000 != 0
    }
}

wire_enum! {
    /// A kind of information about an export (`NBD_INFO_*`).
    pub enum InfoCode: u16 {
        /// Size and transmission flags.
        Export = 0,
        /// The canonical name.
        Name = 1,
        /// A description for a person.
        Description = 2,
        /// Minimum block, preferred block, maximum payload.
        BlockSize = 3,
    }
}

wire_enum! {
    /// A request in the transmission phase (`NBD_CMD_*`).
    pub enum Command: u16 {
        /// Read bytes.
        Read = 0,
        /// Write bytes.
        Write = 1,
        /// End the session; there is no reply.
        Disconnect = 2,
        /// Make every write that was answered durable.
        Flush = 3,
        /// The bytes are no longer needed.
        Trim = 4,
        /// The bytes will soon be needed.
        Cache = 5,
        /// Make a range read as zeroes.
        WriteZeroes = 6,
        /// Ask for extents of the selected metadata contexts.
        BlockStatus = 7,
    }
}

wire_enum! {
    /// A kind of reply chunk (`NBD_REPLY_TYPE_*`).
    pub enum ChunkCode: u16 {
        /// Nothing more to say.
        None = 0,
        /// Bytes at an offset.
        OffsetData = 1,
        /// A range that reads as zeroes.
        OffsetHole = 2,
        /// Extents with 32-bit lengths.
        BlockStatus = 5,
        /// Extents with 64-bit lengths.
        BlockStatusExt = 6,
        /// The request failed.
        Error = 0x8001,
        /// The request failed at an offset.
        ErrorOffset = 0x8002,
    }
}

impl ChunkCode {
    /// Whether the chunk says that the request failed; true of kinds yet unknown, too.
    pub const fn is_error(self) -> bool {
        self.to_wire() & 0x8000 != 0
    }
}

/// Declares a set of bits on the wire. Bits without a name survive, so that they can be reported.
macro_rules! flag_set {
    ($(#[$meta:meta])* pub struct $name:ident: $int:ty { $($(#[$fmeta:meta])* $flag:ident = $bit:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub $int);

        impl $name {
            /// No bit.
            pub const EMPTY: Self = Self(0);
            $($(#[$fmeta])* pub const $flag: Self = Self(1 << $bit);)+
            /// Every bit that has a name.
            pub const KNOWN: Self = Self(0 $(| (1 << $bit))+);

            /// Whether every bit of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// This set and the bits of `other`.
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// This set less the bits of `other`.
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// This set with the bits of `other` set or cleared.
            pub const fn set(self, other: Self, on: bool) -> Self {
                if on { self.with(other) } else { self.without(other) }
            }

            /// Whether no bit is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }
    };
}

flag_set! {
    /// What a server offers in its greeting.
    pub struct HandshakeFlags: u16 {
        /// Options have replies.
        FIXED_NEWSTYLE = 0,
        /// The zeroes after `EXPORT_NAME` may be left out.
        NO_ZEROES = 1,
    }
}

flag_set! {
    /// What a client answers to the greeting.
    pub struct ClientFlags: u32 {
        /// The client reads option replies.
        FIXED_NEWSTYLE = 0,
        /// The client does not want the zeroes after `EXPORT_NAME`.
        NO_ZEROES = 1,
    }
}

flag_set! {
    /// What an export can do.
    pub struct TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0,
        /// Writes are refused.
        READ_ONLY = 1,
        /// `Flush` works.
        SEND_FLUSH = 2,
        /// The FUA command flag works.
        SEND_FUA = 3,
        /// The medium rotates.
        ROTATIONAL = 4,
        /// `Trim` works.
        SEND_TRIM = 5,
        /// `WriteZeroes` and the NO_HOLE command flag work.
        SEND_WRITE_ZEROES = 6,
        /// The DF command flag works; needs structured replies.
        SEND_DF = 7,
        /// A flush on one connection covers what other connections wrote.
        CAN_MULTI_CONN = 8,
        /// Defined by an extension that nobody speaks.
        SEND_RESIZE = 9,
        /// `Cache` works.
        SEND_CACHE = 10,
        /// The FAST_ZERO command flag works.
        SEND_FAST_ZERO = 11,
        /// `BlockStatus` can carry a list of contexts; needs extended headers.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

flag_set! {
    /// How a request is to be carried out.
    pub struct CommandFlags: u16 {
        /// Answer only when the written data is durable.
        FUA = 0,
        /// Zeroes must be allocated.
        NO_HOLE = 1,
        /// At most one content chunk.
        DF = 2,
        /// Exactly one extent a context, no longer than the request.
        REQ_ONE = 3,
        /// Zero only if that is faster than writing zeroes; `NotSupported` otherwise.
        FAST_ZERO = 4,
        /// The length is that of a payload (extended headers).
        PAYLOAD_LEN = 5,
    }
}

flag_set! {
    /// Flags of a reply chunk.
    pub struct ChunkFlags: u16 {
        /// The last chunk of its reply.
        DONE = 0,
    }
}

flag_set! {
    /// Flags of an extent of `base:allocation`.
    pub struct AllocationFlags: u32 {
        /// Not allocated.
        HOLE = 0,
        /// Reads as zeroes.
        ZERO = 1,
    }
}

/// Which headers the transmission phase uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeaderStyle {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; replies to reads and status queries come in chunks, others may be simple.
    Structured,
    /// Extended requests; every reply comes in extended chunks.
    Extended,
}

impl HeaderStyle {
    /// Whether requests carry 64-bit lengths.
    pub const fn is_extended(self) -> bool {
        matches!(self, Self::Extended)
    }

    /// Whether replies come in chunks, so that holes, errors after data, and extents can be told.
    pub const fn has_chunks(self) -> bool {
        !matches!(self, Self::Simple)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_round_trip_known_or_not() {
        for code in (0..32).chain(0x8000_0000..0x8000_0020) {
            assert_eq!(OptionCode::from_wire(code).to_wire(), code);
            assert_eq!(ReplyCode::from_wire(code).to_wire(), code);
            assert_eq!(ReplyCode::from_wire(code).is_error(), code >= 0x8000_0000);
        }
        for code in 0..=u16::MAX {
            assert_eq!(InfoCode::from_wire(code).to_wire(), code);
            assert_eq!(Command::from_wire(code).to_wire(), code);
            assert_eq!(ChunkCode::from_wire(code).to_wire(), code);
            assert_eq!(ChunkCode::from_wire(code).is_error(), code >= 0x8000);
        }
        assert_eq!(OptionCode::from_wire(4), OptionCode::PeekExport);
        assert_eq!(OptionCode::from_wire(99), OptionCode::Unknown(99));
    }

    #[test]
    fn flags_have_the_bits_of_the_document() {
        assert_eq!(TransmissionFlags::CAN_MULTI_CONN.0, 0x100);
        assert_eq!(TransmissionFlags::SEND_FAST_ZERO.0, 0x800);
        assert_eq!(TransmissionFlags::KNOWN.0, 0x1fff);
        assert_eq!(CommandFlags::FAST_ZERO.0, 0x10);
        let set = CommandFlags::FUA | CommandFlags::DF;
        assert!(set.contains(CommandFlags::DF) && !set.contains(CommandFlags::REQ_ONE));
        assert_eq!(set.without(CommandFlags::DF), CommandFlags::FUA);
        assert_eq!(set.set(CommandFlags::DF, false).set(CommandFlags::FUA, false), CommandFlags::EMPTY);
    }

    #[test]
    fn magic_words_spell_what_the_document_says() {
        assert_eq!(&GREETING_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
        assert_eq!(OLDSTYLE_MAGIC, 0x00420281861253);
        assert_eq!(OPTION_REPLY_MAGIC, 0x3e889045565a9);
    }
}
