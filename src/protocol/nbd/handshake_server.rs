//! The server's half of the handshake: fixed newstyle, from the greeting to the first request.
//!
//! The owner holds the connection and the bytes that have not been consumed. It calls `advance` with all of them; the
//! machine handles at most one message, appends what must be sent to `out`, and says how many bytes it has used up. So
//! the bytes that one call can produce are bounded (`OPTION_ANSWER_BYTES_MAX` and a little), and a client that does not
//! read its answers stalls only itself. Bytes left over after `Ready` already belong to the transmission phase.
//!
//! What a client may get wrong without losing the session is answered (`ERR_UNSUP`, `ERR_INVALID`, `ERR_TOO_BIG`...),
//! with a sentence for the person at the other end. What cannot be answered, or looks like an attack, is an error, and
//! the owner hangs up: wrong magic, flags that were not offered, too many options, payloads that it would be silly to
//! read past, `EXPORT_NAME` of an export that is not there.
//!
//! The machine has no clock: a client that stalls is the owner's business. An export whose root is drained is no special
//! case either: the owner may hold back the call, or hold back the transmission phase after `Ready`, because size,
//! block sizes and flags of an export are fixed for its clients' life.

use super::constants::{
    ClientFlags, HandshakeFlags, HeaderStyle, InfoCode, META_QUERIES_MAX, OPTION_ANSWER_BYTES_MAX,
    OPTION_PAYLOAD_BYTES_MAX, OPTION_SKIP_BYTES_MAX, OPTIONS_PER_HANDSHAKE_MAX, OptionCode, ReplyCode,
    TransmissionFlags,
};
use super::cursor::text;
use super::error::ProtocolError;
use super::meta_context::{MetaContext, is_query};
use super::wire::{
    BlockSizes, ExportListing, ExportNameAnswer, Greeting, InfoReply, InfoRequest, MetaContextReply,
    MetaContextRequest, OptionHeader, OptionReplyHeader, write_option_reply,
};

/// What a server knows about one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The canonical name, at most 4096 bytes.
    pub name: String,
    /// Words for a person; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What the export can do. READ_ONLY and HAS_FLAGS need not be set, and what the negotiation rules out is cleared.
    pub flags: TransmissionFlags,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Block sizes to advertise.
    pub block_sizes: BlockSizes,
    /// The metadata contexts that can be selected.
    pub meta_contexts: Vec<MetaContext>,
}

impl ExportInfo {
    /// The flags to announce to a client that negotiated `style`.
    pub fn transmission_flags(&self, style: HeaderStyle) -> TransmissionFlags {
        let zeroes = self.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
        self.flags
            .with(TransmissionFlags::HAS_FLAGS)
            .set(
                TransmissionFlags::READ_ONLY,
                self.read_only || self.flags.contains(TransmissionFlags::READ_ONLY),
            )
            .set(
                TransmissionFlags::SEND_DF,
                style.has_chunks() && self.flags.contains(TransmissionFlags::SEND_DF),
            )
            .set(
                TransmissionFlags::SEND_FAST_ZERO,
                zeroes && self.flags.contains(TransmissionFlags::SEND_FAST_ZERO),
            )
            .without(TransmissionFlags::SEND_RESIZE | TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    }
}

/// The exports of a server, as the handshake sees them.
pub trait ExportDirectory {
    /// The exports to show in a list, in the order to show them.
    fn list(&self) -> Vec<ExportListing>;

    /// The export with that name. An empty name asks for the default export; answer with its real name, or `None`.
    fn lookup(&self, name: &str) -> Option<ExportInfo>;
}

/// What a server lets its clients negotiate, and how long it puts up with them.
#[derive(Clone, Debug)]
pub struct ServerPolicy {
    /// Whether structured replies are offered. Without them there are no metadata contexts either.
    pub structured_replies: bool,
    /// Whether extended headers are offered; the transmission side must then speak them.
    pub extended_headers: bool,
    /// Whether exports may be listed.
    pub list: bool,
    /// Largest option payload that is looked at.
    pub option_payload_bytes_max: u32,
    /// Largest option payload that is read past; beyond it the server hangs up.
    pub option_skip_bytes_max: u32,
    /// Options before the server hangs up.
    pub options_max: u32,
}

impl Default for ServerPolicy {
    fn default() -> Self {
        Self {
            structured_replies: true,
            extended_headers: false,
            list: true,
            option_payload_bytes_max: OPTION_PAYLOAD_BYTES_MAX,
            option_skip_bytes_max: OPTION_SKIP_BYTES_MAX,
            options_max: OPTIONS_PER_HANDSHAKE_MAX,
        }
    }
}

impl ServerPolicy {
    fn offers_chunks(&self) -> bool {
        self.structured_replies || self.extended_headers
    }
}

/// What both sides agreed on: all that the transmission phase needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export, as it was when the client chose it.
    pub export: ExportInfo,
    /// The flags that the client was told.
    pub flags: TransmissionFlags,
    /// The headers of the transmission phase.
    pub style: HeaderStyle,
    /// The selected metadata contexts with their numbers; empty means that status queries are invalid.
    pub meta_contexts: Vec<(u32, MetaContext)>,
    /// Whether the client asked for the block sizes and so must keep to them; if not, expect any alignment.
    pub block_sizes_agreed: bool,
    /// What the client answered to the greeting.
    pub client_flags: ClientFlags,
}

/// How far a call to `advance` came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerProgress {
    /// The message at the front of the input is incomplete: call again with more bytes behind what is left.
    NeedInput,
    /// A message was handled: send `out`, then call again with what is left of the input.
    Again,
    /// The handshake is over: send `out`, then begin the transmission phase.
    Ready(Box<Negotiated>),
    /// The client ends the session: send `out`, then close.
    Abort,
}

/// The outcome of one call to `advance`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerStep {
    /// Bytes of the input that are used up.
    pub consumed: usize,
    /// What to do next.
    pub progress: ServerProgress,
}

/// An option reply that ends its option.
#[derive(Clone, Copy, Debug)]
struct Verdict {
    reply: ReplyCode,
    message: &'static str,
}

const ACK: Verdict = Verdict { reply: ReplyCode::Ack, message: "" };
const UNSUPPORTED: Verdict =
    Verdict { reply: ReplyCode::ErrUnsupported, message: "The server does not know this option." };
const TOO_BIG: Verdict =
    Verdict { reply: ReplyCode::ErrTooBig, message: "The option is larger than the server accepts." };
const UNKNOWN_EXPORT: Verdict =
    Verdict { reply: ReplyCode::ErrUnknown, message: "The server has no export of that name." };
const SHUTTING_DOWN: Verdict =
    Verdict { reply: ReplyCode::ErrShutdown, message: "The server is shutting down." };

const fn invalid(message: &'static str) -> Verdict {
    Verdict { reply: ReplyCode::ErrInvalid, message }
}

#[derive(Debug)]
enum State {
    /// The greeting has not been sent.
    Start,
    /// The greeting is out; the client's flags come next.
    ClientFlags,
    /// An option comes next.
    Option,
    /// The payload of an option is read past; the verdict is fixed.
    Skip { left: u32, option: OptionCode, verdict: Verdict },
    /// Ready, aborted or failed.
    Over,
}

/// The contexts that the last `SET_META_CONTEXT` selected, and for which export.
#[derive(Debug)]
struct Selection {
    export: String,
    contexts: Vec<(u32, MetaContext)>,
}

/// The server's handshake machine.
#[derive(Debug)]
pub struct ServerHandshake {
    policy: ServerPolicy,
    state: State,
    options: u32,
    shutting_down: bool,
    client_flags: ClientFlags,
    style: HeaderStyle,
    selection: Option<Selection>,
}

impl ServerHandshake {
    /// A machine for one new connection.
    pub fn new(policy: ServerPolicy) -> Self {
        Self {
            policy,
            state: State::Start,
            options: 0,
            shutting_down: false,
            client_flags: ClientFlags::EMPTY,
            style: HeaderStyle::Simple,
            selection: None,
        }
    }

    /// Bytes of input that always suffice for the next message; a caller's buffer need not be larger.
    pub fn input_bytes_max(&self) -> usize {
        OptionHeader::BYTES + self.policy.option_payload_bytes_max as usize
    }

    /// From now on every option except `ABORT` is answered with `ERR_SHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Handles the message at the front of `input`. See the module's head for the contract. After an error the
    /// session is over: send `out` if anything was appended, and close.
    pub fn advance(
        &mut self,
        input: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
        let result = match self.state {
            State::Start => {
                Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES }.write(out);
                self.state = State::ClientFlags;
                Ok(ServerStep { consumed: 0, progress: ServerProgress::Again })
            }
            State::ClientFlags => self.client_flags(input),
            State::Option => self.option(input, exports, out),
            State::Skip { left, option, verdict } => Ok(self.skip(input.len(), left, option, verdict, out)),
            State::Over => Err(ProtocolError::AlreadyOver),
        };
        let over = match &result {
            Err(_) => true,
            Ok(step) => matches!(step.progress, ServerProgress::Ready(_) | ServerProgress::Abort),
        };
        if over {
            self.state = State::Over;
        }
        result
    }

    fn client_flags(&mut self, input: &[u8]) -> Result<ServerStep, ProtocolError> {
        let Some(flags) = ClientFlags::parse(input) else { return Ok(need_input()) };
        if !ClientFlags::KNOWN.contains(flags) {
            return Err(ProtocolError::UnknownClientFlags { flags: flags.0 });
        }
        self.client_flags = flags;
        self.state = State::Option;
        Ok(again(ClientFlags::BYTES))
    }

    /// Discards what is there of a payload; the verdict is given when all of it has passed.
    fn skip(
        &mut self,
        available: usize,
        left: u32,
        option: OptionCode,
        verdict: Verdict,
        out: &mut Vec<u8>,
    ) -> ServerStep {
        let consumed = available.min(left as usize);
        let left = left - consumed as u32;
        if left > 0 {
            self.state = State::Skip { left, option, verdict };
            return ServerStep { consumed, progress: ServerProgress::NeedInput };
        }
        self.state = State::Option;
        conclude(out, option, verdict);
        let progress =
            if option == OptionCode::Abort { ServerProgress::Abort } else { ServerProgress::Again };
        ServerStep { consumed, progress }
    }

    fn option(
        &mut self,
        input: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
        let Some(OptionHeader { option, length }) = OptionHeader::parse(input)? else {
            return Ok(need_input());
        };
        if self.options >= self.policy.options_max {
            return Err(ProtocolError::TooManyOptions { max: self.policy.options_max });
        }
        if option != OptionCode::ExportName && !self.client_flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(ProtocolError::NotFixedNewstyle { option });
        }
        if length > self.policy.option_skip_bytes_max {
            return Err(ProtocolError::OptionTooLarge {
                option,
                length,
                max: self.policy.option_skip_bytes_max,
            });
        }
        if let Some(verdict) = self.verdict_without_payload(option, length) {
            self.options += 1;
            let mut step = self.skip(input.len() - OptionHeader::BYTES, length, option, verdict, out);
            step.consumed += OptionHeader::BYTES;
            return Ok(step);
        }
        if length > self.policy.option_payload_bytes_max {
            // Only EXPORT_NAME comes here: it has no reply that could say so.
            return Err(ProtocolError::OptionTooLarge {
                option,
                length,
                max: self.policy.option_payload_bytes_max,
            });
        }
        let total = OptionHeader::BYTES + length as usize;
        let Some(payload) = input.get(OptionHeader::BYTES..total) else { return Ok(need_input()) };
        self.options += 1;
        let progress = match option {
            OptionCode::ExportName => {
                ServerProgress::Ready(Box::new(self.export_name(payload, exports, out)?))
            }
            OptionCode::Info | OptionCode::Go => match self.describe(option, payload, exports, out) {
                Ok(negotiated) => {
                    conclude(out, option, ACK);
                    match option {
                        OptionCode::Go => ServerProgress::Ready(Box::new(negotiated)),
                        _ => ServerProgress::Again,
                    }
                }
                Err(verdict) => {
                    conclude(out, option, verdict);
                    ServerProgress::Again
                }
            },
            OptionCode::List => {
                let verdict = list(exports, out);
                conclude(out, option, verdict);
                ServerProgress::Again
            }
            _ => {
                let verdict = self.meta_contexts(option, payload, exports, out);
                conclude(out, option, verdict.err().unwrap_or(ACK));
                ServerProgress::Again
            }
        };
        Ok(ServerStep { consumed: total, progress })
    }

    /// The answer to an option that needs no look at its payload; `None` if it does.
    fn verdict_without_payload(&mut self, option: OptionCode, length: u32) -> Option<Verdict> {
        let unwanted_payload = length > 0;
        let too_big = length > self.policy.option_payload_bytes_max;
        match option {
            OptionCode::Abort => Some(ACK),
            OptionCode::ExportName => None,
            _ if self.shutting_down => Some(SHUTTING_DOWN),
            OptionCode::List | OptionCode::StructuredReply | OptionCode::ExtendedHeaders
                if unwanted_payload =>
            {
                Some(invalid("This option takes no data."))
            }
            OptionCode::List if self.policy.list => None,
            OptionCode::List => Some(Verdict {
                reply: ReplyCode::ErrPolicy,
                message: "This server does not list its exports.",
            }),
            OptionCode::StructuredReply if self.style.is_extended() => Some(Verdict {
                reply: ReplyCode::ErrExtendedHeadersRequired,
                message: "Extended headers are already agreed.",
            }),
            OptionCode::StructuredReply if self.policy.structured_replies => {
                self.style = HeaderStyle::Structured;
                Some(ACK)
            }
            OptionCode::ExtendedHeaders if self.policy.extended_headers => {
                self.style = HeaderStyle::Extended;
                Some(ACK)
            }
            OptionCode::Info | OptionCode::Go if too_big => Some(TOO_BIG),
            OptionCode::Info | OptionCode::Go => None,
            OptionCode::ListMetaContext | OptionCode::SetMetaContext if self.policy.offers_chunks() => {
                // A new selection replaces the old one even if it fails.
                if option == OptionCode::SetMetaContext {
                    self.selection = None;
                }
                if !self.style.has_chunks() {
                    Some(invalid("Metadata contexts need structured replies, which were not agreed."))
                } else {
                    too_big.then_some(TOO_BIG)
                }
            }
            _ => Some(UNSUPPORTED),
        }
    }

    fn export_name(
        &mut self,
        payload: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> Result<Negotiated, ProtocolError> {
        if self.shutting_down {
            return Err(ProtocolError::ShuttingDown);
        }
        if self.style.is_extended() {
            return Err(ProtocolError::ExportNameAfterExtendedHeaders);
        }
        let name = text("export name", payload)?;
        let Some(export) = exports.lookup(name) else {
            return Err(ProtocolError::UnknownExport { name: name.to_owned() });
        };
        let negotiated = self.negotiated(export, false);
        let no_zeroes = self.client_flags.contains(ClientFlags::NO_ZEROES);
        ExportNameAnswer { size_bytes: negotiated.export.size_bytes, flags: negotiated.flags }
            .write(no_zeroes, out);
        Ok(negotiated)
    }

    /// Answers `INFO` and `GO` up to, but not including, the last reply.
    fn describe(
        &mut self,
        option: OptionCode,
        payload: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> Result<Negotiated, Verdict> {
        let request = InfoRequest::parse(payload).map_err(malformed)?;
        let export = exports.lookup(request.export).ok_or(UNKNOWN_EXPORT)?;
        let wants = |code| request.wanted.contains(&code);
        let block_sizes_agreed = wants(InfoCode::BlockSize);
        let negotiated = self.negotiated(export, block_sizes_agreed);
        let export = &negotiated.export;

        let mut tell = |info: InfoReply| {
            write_payload(out, option, ReplyCode::Info, |out| info.write(out));
        };
        tell(InfoReply::Export { size_bytes: export.size_bytes, flags: negotiated.flags });
        if wants(InfoCode::Name) || export.name != request.export {
            tell(InfoReply::Name(export.name.clone()));
        }
        if wants(InfoCode::Description) && !export.description.is_empty() {
            tell(InfoReply::Description(export.description.clone()));
        }
        if block_sizes_agreed {
            tell(InfoReply::BlockSize(export.block_sizes));
        }
        Ok(negotiated)
    }

    /// Answers `LIST_META_CONTEXT` and `SET_META_CONTEXT` up to, but not including, the last reply.
    fn meta_contexts(
        &mut self,
        option: OptionCode,
        payload: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> Result<(), Verdict> {
        let request = MetaContextRequest::parse(payload).map_err(malformed)?;
        if request.queries.len() > META_QUERIES_MAX as usize {
            return Err(Verdict { reply: ReplyCode::ErrTooBig, message: "There are too many queries." });
        }
        if !request.queries.iter().all(|query| is_query(query)) {
            return Err(invalid("A metadata query lacks its namespace."));
        }
        let export = exports.lookup(request.export).ok_or(UNKNOWN_EXPORT)?;
        let listing = option == OptionCode::ListMetaContext;
        let everything = listing && request.queries.is_empty();
        let mut contexts = Vec::new();
        for (id, context) in (1..).zip(export.meta_contexts) {
            let asked = everything
                || request.queries.iter().any(|query| match listing {
                    true => context.is_listed_by(query),
                    false => context.is_selected_by(query),
                });
            if asked {
                contexts.push((id, context));
            }
        }
        let begin = out.len();
        for (id, context) in &contexts {
            if out.len() - begin > OPTION_ANSWER_BYTES_MAX {
                return Err(Verdict { reply: ReplyCode::ErrTooBig, message: "There are too many contexts." });
            }
            let reply = MetaContextReply { id: if listing { 0 } else { *id }, name: context.name() };
            write_payload(out, option, ReplyCode::MetaContext, |out| reply.write(out));
        }
        if !listing {
            self.selection = Some(Selection { export: export.name, contexts });
        }
        Ok(())
    }

    fn negotiated(&self, export: ExportInfo, block_sizes_agreed: bool) -> Negotiated {
        let meta_contexts = match &self.selection {
            Some(selection) if selection.export == export.name => selection.contexts.clone(),
            _ => Vec::new(),
        };
        Negotiated {
            flags: export.transmission_flags(self.style),
            style: self.style,
            meta_contexts,
            block_sizes_agreed,
            client_flags: self.client_flags,
            export,
        }
    }
}

const fn need_input() -> ServerStep {
    ServerStep { consumed: 0, progress: ServerProgress::NeedInput }
}

const fn again(consumed: usize) -> ServerStep {
    ServerStep { consumed, progress: ServerProgress::Again }
}

fn conclude(out: &mut Vec<u8>, option: OptionCode, verdict: Verdict) {
    write_option_reply(out, option, verdict.reply, verdict.message.as_bytes());
}

/// What to answer to a payload that cannot be parsed.
fn malformed(error: ProtocolError) -> Verdict {
    invalid(match error {
        ProtocolError::Truncated { .. } => "The option ends before its last field.",
        ProtocolError::TrailingBytes { .. } => "The option is longer than its fields.",
        ProtocolError::StringTooLong { .. } => "A string is longer than 4096 bytes.",
        _ => "A string is not UTF-8 text without NUL characters.",
    })
}

/// Appends a reply whose payload is written in place; its length is filled in afterwards.
fn write_payload(
    out: &mut Vec<u8>,
    option: OptionCode,
    reply: ReplyCode,
    payload: impl FnOnce(&mut Vec<u8>),
) {
    OptionReplyHeader { option, reply, length: 0 }.write(out);
    let begin = out.len();
    payload(out);
    let length = (out.len() - begin) as u32;
    out[begin - 4..begin].copy_from_slice(&length.to_be_bytes());
}

/// Lists the exports as far as an answer may go, up to, but not including, the last reply.
fn list(exports: &dyn ExportDirectory, out: &mut Vec<u8>) -> Verdict {
    let begin = out.len();
    for listing in exports.list() {
        if out.len() - begin > OPTION_ANSWER_BYTES_MAX {
            return Verdict {
                reply: ReplyCode::ErrTooBig,
                message: "There are more exports than fit a list.",
            };
        }
        write_payload(out, OptionCode::List, ReplyCode::Server, |out| listing.write(out));
    }
    ACK
}
