//! What one side says when the other breaks the protocol, or when the two cannot agree.
//!
//! Every value ends the session. On the server, what can still be answered (an unknown option, a malformed payload)
//! is answered with an option reply and never becomes one of these. On the client, `Refused` is the server's own no;
//! all the rest are faults.

use super::constants::{ChunkCode, Command, OptionCode, ReplyCode};

/// A reason to end an NBD session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A length field promises more than there is.
    #[error("The {what} ends before its last field.")]
    Truncated {
        /// The structure.
        what: &'static str,
    },
    /// There is more than the fields account for.
    #[error("The {what} is {extra} bytes longer than its fields.")]
    TrailingBytes {
        /// The structure.
        what: &'static str,
        /// How many bytes are left.
        extra: usize,
    },
    /// The stream is not, or no longer, an NBD stream.
    #[error("The {what} begins with {found:#x}, which is not an NBD magic number that belongs there.")]
    BadMagic {
        /// The structure.
        what: &'static str,
        /// What was read.
        found: u64,
    },
    /// The server speaks the negotiation that was given up in 2011.
    #[error("The server speaks the oldstyle negotiation, which is not supported.")]
    Oldstyle,
    /// A string over the protocol's limit.
    #[error("The {what} is {bytes} bytes long; NBD allows 4096.")]
    StringTooLong {
        /// Which string.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A string that is not UTF-8, or contains NUL.
    #[error("The {what} is not UTF-8 text without NUL characters.")]
    NotText {
        /// Which string.
        what: &'static str,
    },

    /// The client set flags that the server did not offer.
    #[error("The client set flags {flags:#x}, of which some were not offered.")]
    UnknownClientFlags {
        /// All that it set.
        flags: u32,
    },
    /// An option payload beyond what is read past.
    #[error("The client sent an option {option:?} of {length} bytes; {max} is the limit.")]
    OptionTooLarge {
        /// The option.
        option: OptionCode,
        /// Its announced length.
        length: u32,
        /// The limit.
        max: u32,
    },
    /// The client keeps haggling.
    #[error("The client sent more than {max} options.")]
    TooManyOptions {
        /// The limit.
        max: u32,
    },
    /// An option with a reply, from a client that said that it does not read replies.
    #[error("The client sent option {option:?} without having agreed to the fixed newstyle negotiation.")]
    NotFixedNewstyle {
        /// The option.
        option: OptionCode,
    },
    /// `EXPORT_NAME` cannot be answered with an error.
    #[error("The client asked for export {name:?}, which does not exist.")]
    UnknownExport {
        /// The name.
        name: String,
    },
    /// `EXPORT_NAME` is forbidden once extended headers are agreed.
    #[error("The client used EXPORT_NAME after extended headers were agreed.")]
    ExportNameAfterExtendedHeaders,
    /// `EXPORT_NAME` while the server shuts down.
    #[error("The server is shutting down.")]
    ShuttingDown,
    /// The machine was called again after it ended.
    #[error("The handshake is already over.")]
    AlreadyOver,

    /// The server can only serve exports, not describe them.
    #[error("The server does not speak the fixed newstyle negotiation, so it cannot list its exports.")]
    CannotList,
    /// The server answers something that was not asked.
    #[error("The server answered option {found:?} while {expected:?} was open.")]
    WrongOption {
        /// What was asked.
        expected: OptionCode,
        /// What was answered.
        found: OptionCode,
    },
    /// A reply that has no meaning for the option.
    #[error("The server answered option {option:?} with {reply:?}, which has no meaning there.")]
    UnexpectedReply {
        /// The option.
        option: OptionCode,
        /// The reply.
        reply: ReplyCode,
    },
    /// The server says no.
    #[error("{}{}{message}", refusal(*option, *reply), match message.is_empty() {
        true => ".",
        false => ". It says: ",
    })]
    Refused {
        /// The option.
        option: OptionCode,
        /// The kind of refusal.
        reply: ReplyCode,
        /// The server's words, made safe to print; may be empty.
        message: String,
    },
    /// A reply that is larger than any sensible one.
    #[error("The server sent a {what} of {length} bytes; {max} is the limit.")]
    ReplyTooLarge {
        /// The structure.
        what: &'static str,
        /// Its announced length.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// Replies without end.
    #[error("The server keeps answering option {option:?} and does not come to an end.")]
    TooManyReplies {
        /// The option.
        option: OptionCode,
    },
    /// `GO` was accepted without the one mandatory piece of information.
    #[error("The server accepted the export without telling its size.")]
    SizeMissing,
    /// A size that no device has.
    #[error(
        "The server says that the export has {size_bytes} bytes, which is more than any device can have."
    )]
    ImpossibleSize {
        /// The claim.
        size_bytes: u64,
    },
    /// Block sizes that break the protocol's rules.
    #[error(
        "The server's block sizes make no sense: the minimum of {minimum_bytes} bytes has to be a power of two, and \
         the maximum of {maximum_bytes} bytes may not be below it (preferred: {preferred_bytes})."
    )]
    ImpossibleBlockSizes {
        /// Claimed minimum.
        minimum_bytes: u32,
        /// Claimed preferred size.
        preferred_bytes: u32,
        /// Claimed maximum payload.
        maximum_bytes: u32,
    },
    /// Blocks that are larger than a piece of memory for I/O.
    #[error("The server takes multiples of {minimum_bytes} bytes only; {max} is the most that is supported.")]
    BlocksTooLarge {
        /// Claimed minimum.
        minimum_bytes: u32,
        /// The limit.
        max: u32,
    },
    /// A metadata context that was not asked for, or one that came twice.
    #[error("The server selected the metadata context {name:?}, which was not asked for or came twice.")]
    UnexpectedContext {
        /// Its name.
        name: String,
    },

    /// A request payload beyond what is read past.
    #[error("The client sent a request with {length} bytes of payload; {max} is the limit.")]
    RequestTooLarge {
        /// The announced length.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// Chunks, or simple replies, where negotiation ruled them out.
    #[error("The server sent a {what} although the negotiation rules it out.")]
    WrongStyle {
        /// The kind of reply.
        what: &'static str,
    },
    /// A chunk that is no error and has no known meaning.
    #[error("The server sent a reply chunk of the unknown kind {code}.")]
    UnknownChunk {
        /// Its code.
        code: u16,
    },
    /// A chunk whose length contradicts its kind.
    #[error("The server sent a {kind:?} chunk of {length} bytes, which cannot be.")]
    BadChunkLength {
        /// The kind.
        kind: ChunkCode,
        /// The announced length.
        length: u64,
    },
    /// A chunk that is no answer to the request.
    #[error("The server answered a {command:?} request with a {kind:?} chunk.")]
    ChunkDoesNotAnswer {
        /// The request.
        command: Command,
        /// The chunk.
        kind: ChunkCode,
    },
    /// A field of a chunk that the protocol forbids.
    #[error("The server sent a {kind:?} chunk whose {what}.")]
    BadChunk {
        /// The chunk.
        kind: ChunkCode,
        /// What is wrong with it, as the end of a sentence.
        what: &'static str,
    },
    /// Data outside the request.
    #[error(
        "The server answered a read at {request_offset} (+{request_length}) with bytes at {offset} (+{length})."
    )]
    ChunkOutsideRequest {
        /// Start of the request.
        request_offset: u64,
        /// Length of the request.
        request_length: u64,
        /// Start of the chunk.
        offset: u64,
        /// Length of the chunk.
        length: u64,
    },
    /// The same bytes twice.
    #[error("The server sent the bytes at {offset} (+{length}) of a read twice.")]
    ChunkOverlaps {
        /// Start of the chunk.
        offset: u64,
        /// Length of the chunk.
        length: u64,
    },
    /// A read in too many pieces.
    #[error("The server answered a read in more than {max} scattered pieces.")]
    TooManyFragments {
        /// The limit.
        max: usize,
    },
    /// Success without all of the data.
    #[error("The server ended a reply with success, but {missing} {what} are missing.")]
    Incomplete {
        /// How many.
        missing: u64,
        /// Of what.
        what: &'static str,
    },
    /// This side's caller asked for a reply that the negotiated headers cannot express.
    #[error("A {what} cannot be expressed with the negotiated replies.")]
    NotExpressible {
        /// What.
        what: &'static str,
    },
}

impl ProtocolError {
    /// Whether the server has answered that it has no export of that name.
    pub fn is_unknown_export(&self) -> bool {
        matches!(self, ProtocolError::Refused { reply: ReplyCode::ErrUnknown, .. })
    }
}

/// What a refusal means.
fn refusal(option: OptionCode, reply: ReplyCode) -> String {
    match reply {
        ReplyCode::ErrUnknown => "The server has no such export".into(),
        ReplyCode::ErrPolicy => format!("The server's policy forbids it ({option:?})"),
        ReplyCode::ErrTlsRequired => {
            "The server demands TLS, which is not supported; reach it through a tunnel".into()
        }
        ReplyCode::ErrShutdown => "The server is shutting down".into(),
        reply => format!("The server refused option {option:?} with {reply:?}"),
    }
}
