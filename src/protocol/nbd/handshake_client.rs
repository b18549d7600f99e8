//! The client's half of the handshake: from the server's greeting to the first request, or to a list of exports.
//!
//! A list can come with what the server tells of each export: it is asked about one after the other, on the same
//! connection, because some servers serve only one.
//!
//! To connect, the client asks for as much as its owner wants and takes what it gets: extended headers, else structured
//! replies; metadata contexts, if replies can carry them; then `GO` with the block sizes, and `EXPORT_NAME` for a
//! server that does not know `GO`. A refusal of anything but the export itself costs a feature, not the connection;
//! only "TLS first" and "shutting down" end it at once.
//!
//! The contract of `advance` is that of the server's machine: one message a call, the owner keeps what is left. When the
//! server refuses, `out` holds the polite `ABORT`; send it before closing.
//!
//! A server is not trusted. Replies are bounded in size and number, a context counts only if it was asked for, sizes and
//! block sizes must make sense, and words meant for a person are made printable before anyone sees them.

use super::constants::{
    ClientFlags, DEFAULT_PAYLOAD_BYTES_MAX, EXPORT_BYTES_MAX, EXPORT_NAME_ZEROES_BYTES, HandshakeFlags,
    HeaderStyle, INFO_REPLIES_MAX, InfoCode, LISTED_BYTES_MAX, LISTED_EXPORTS_MAX, OPTION_PAYLOAD_BYTES_MAX,
    OptionCode, ReplyCode, TransmissionFlags,
};
use super::cursor::{printable, text};
use super::error::ProtocolError;
use super::meta_context::MetaContext;
use super::wire::{
    BlockSizes, ExportListing, ExportNameAnswer, Greeting, InfoReply, InfoRequest, MetaContextReply,
    MetaContextRequest, OptionReplyHeader, write_option,
};

/// What a client wants from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientGoal {
    /// Open an export.
    Connect(ConnectRequest),
    /// See which exports there are, and leave.
    List,
    /// The same, and ask about each of them.
    Describe,
}

/// How a client wants to open an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The export's name; empty asks for the default export.
    pub export: String,
    /// Whether to ask for structured replies.
    pub structured_replies: bool,
    /// Whether to ask for extended headers, which include structured replies.
    pub extended_headers: bool,
    /// The metadata contexts to ask for.
    pub meta_contexts: Vec<MetaContext>,
    /// Whether to open the export with `GO`, which can be refused in words, before `EXPORT_NAME`.
    pub go: bool,
}

impl ConnectRequest {
    /// Opens `export` with all that the codec knows, and `base:allocation`.
    pub fn new(export: impl Into<String>) -> Self {
        Self {
            export: export.into(),
            structured_replies: true,
            extended_headers: true,
            meta_contexts: vec![MetaContext::BaseAllocation],
            go: true,
        }
    }
}

/// What both sides agreed on, as the client knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientNegotiated {
    /// The export's name, the server's own if it told it.
    pub export: String,
    /// The server's words about the export; may be empty.
    pub description: String,
    /// Size in bytes, at most `EXPORT_BYTES_MAX`.
    pub size_bytes: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The headers of the transmission phase.
    pub style: HeaderStyle,
    /// The block sizes that the server demands, checked; `None` if it named none.
    pub block_sizes: Option<BlockSizes>,
    /// The selected metadata contexts with their numbers.
    pub meta_contexts: Vec<(u32, MetaContext)>,
}

/// An export of a list, and what the server tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name under which it can be opened.
    pub name: String,
    /// Words for a person; may be empty.
    pub description: String,
    /// What it is; `None`: the server does not tell.
    pub details: Option<ExportDetails>,
}

/// What a server tells of an export without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportDetails {
    /// Size in bytes.
    pub size_bytes: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The headers that the server speaks.
    pub style: HeaderStyle,
    /// The block sizes that the server demands; `None` if it named none.
    pub block_sizes: Option<BlockSizes>,
    /// The names of the metadata contexts that can be asked for.
    pub meta_contexts: Vec<String>,
}

/// What is known so far of the exports of a list, in its order.
#[derive(Debug, Default)]
struct Description {
    exports: Vec<ListedExport>,
    /// Of the next one.
    contexts: Vec<String>,
}

impl ClientNegotiated {
    /// Nothing is agreed on yet.
    fn of(export: String) -> ClientNegotiated {
        ClientNegotiated {
            export,
            description: String::new(),
            size_bytes: 0,
            flags: TransmissionFlags::EMPTY,
            style: HeaderStyle::Simple,
            block_sizes: None,
            meta_contexts: Vec::new(),
        }
    }

    /// Largest payload of a request that is certain to be welcome, in bytes.
    pub fn payload_bytes_max(&self) -> u32 {
        let demanded = self.block_sizes.unwrap_or_default().maximum_bytes;
        demanded.min(DEFAULT_PAYLOAD_BYTES_MAX)
    }

    /// The number that stands for `context` in status replies, if the server selected it.
    pub fn context_id(&self, context: &MetaContext) -> Option<u32> {
        self.meta_contexts.iter().find(|(_, selected)| selected == context).map(|(id, _)| *id)
    }
}

/// How far a call to `advance` came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientProgress {
    /// The message at the front of the input is incomplete: call again with more bytes behind what is left.
    NeedInput,
    /// A message was handled: send `out`, then call again with what is left of the input.
    Again,
    /// The handshake is over; the transmission phase begins, and what is left of the input belongs to it.
    Ready(Box<ClientNegotiated>),
    /// The list is complete: send `out`, then close.
    Listed(Vec<ExportListing>),
    /// The same, with what the server tells of each export.
    Described(Vec<ListedExport>),
}

/// The outcome of one call to `advance`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStep {
    /// Bytes of the input that are used up.
    pub consumed: usize,
    /// What to do next.
    pub progress: ClientProgress,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// The server speaks first.
    Greeting,
    /// An option is open; `replies` of its replies have come.
    Option { option: OptionCode, replies: usize },
    /// `EXPORT_NAME` is open, which has its own kind of answer.
    ExportName,
    /// Ready, listed or failed.
    Over,
}

/// The client's handshake machine.
#[derive(Debug)]
pub struct ClientHandshake {
    listing: bool,
    /// Of each export that was listed what there is to be known.
    described: Option<Description>,
    request: ConnectRequest,
    state: State,
    no_zeroes: bool,
    /// What the replies so far say; `size_bytes` is meaningless until `size_known`.
    so_far: ClientNegotiated,
    size_known: bool,
    listed: Vec<ExportListing>,
    listed_bytes: usize,
}

impl ClientHandshake {
    /// A machine for one new connection.
    pub fn new(goal: ClientGoal) -> Self {
        let described = matches!(goal, ClientGoal::Describe).then(Description::default);
        let (listing, request) = match goal {
            ClientGoal::Connect(request) => (false, request),
            ClientGoal::List | ClientGoal::Describe => (true, ConnectRequest::new("")),
        };
        let export = request.export.clone();
        Self {
            listing,
            described,
            request,
            state: State::Greeting,
            no_zeroes: false,
            so_far: ClientNegotiated::of(export),
            size_known: false,
            listed: Vec::new(),
            listed_bytes: 0,
        }
    }

    /// The option that the server has not said a word about yet.
    pub fn unanswered(&self) -> Option<OptionCode> {
        match self.state {
            State::Option { option, replies: 0 } => Some(option),
            State::ExportName => Some(OptionCode::ExportName),
            _ => None,
        }
    }

    /// Bytes of input that always suffice for the next message; a caller's buffer need not be larger.
    pub const fn input_bytes_max() -> usize {
        OptionReplyHeader::BYTES + OPTION_PAYLOAD_BYTES_MAX as usize
    }

    /// Handles the message at the front of `input`. See the module's head for the contract.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        let result = match self.state {
            State::Greeting => self.greeting(input, out),
            State::Option { option, replies } => self.option_reply(option, replies, input, out),
            State::ExportName => self.export_name_answer(input),
            State::Over => Err(ProtocolError::AlreadyOver),
        };
        let over = match &result {
            Err(_) => true,
            Ok(step) => !matches!(step.progress, ClientProgress::NeedInput | ClientProgress::Again),
        };
        if over {
            self.state = State::Over;
        }
        result
    }

    fn greeting(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        text("export name", self.so_far.export.as_bytes())?;
        let Some(Greeting { flags }) = Greeting::parse(input)? else { return Ok(need_input()) };
        let fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        ClientFlags::EMPTY
            .set(ClientFlags::FIXED_NEWSTYLE, fixed)
            .set(ClientFlags::NO_ZEROES, self.no_zeroes)
            .write(out);
        match (self.listing, fixed) {
            (true, false) => return Err(ProtocolError::CannotList),
            (true, true) => self.ask(OptionCode::List, &[], out),
            (false, false) => self.ask_by_export_name(out),
            (false, true) if self.request.extended_headers => self.ask(OptionCode::ExtendedHeaders, &[], out),
            (false, true) => self.ask_for_structured_replies(out),
        }
        Ok(again(Greeting::BYTES))
    }

    fn ask(&mut self, option: OptionCode, payload: &[u8], out: &mut Vec<u8>) {
        write_option(out, option, payload);
        self.state = State::Option { option, replies: 0 };
    }

    fn ask_for_structured_replies(&mut self, out: &mut Vec<u8>) {
        if self.request.structured_replies {
            self.ask(OptionCode::StructuredReply, &[], out);
        } else {
            self.ask_to_go(out);
        }
    }

    fn ask_for_contexts(&mut self, out: &mut Vec<u8>) {
        let wants_none = self.request.meta_contexts.is_empty() || self.described.is_some();
        if wants_none || !self.so_far.style.has_chunks() {
            return self.ask_to_go(out);
        }
        let names: Vec<String> = self.request.meta_contexts.iter().map(MetaContext::name).collect();
        let queries = names.iter().map(String::as_str).collect();
        let mut payload = Vec::new();
        MetaContextRequest { export: &self.request.export, queries }.write(&mut payload);
        self.ask(OptionCode::SetMetaContext, &payload, out);
    }

    fn ask_to_go(&mut self, out: &mut Vec<u8>) {
        if self.described.is_some() {
            return self.ask_about_next(out);
        }
        if !self.request.go {
            return self.ask_by_export_name(out);
        }
        let export = self.request.export.clone();
        self.ask_about(OptionCode::Go, &export, out);
    }

    fn ask_about(&mut self, option: OptionCode, export: &str, out: &mut Vec<u8>) {
        let wanted = vec![InfoCode::BlockSize, InfoCode::Name, InfoCode::Description];
        let mut payload = Vec::new();
        InfoRequest { export, wanted }.write(&mut payload);
        self.ask(option, &payload, out);
    }

    /// Asks about the next export of the list; behind the last one, says goodbye.
    fn ask_about_next(&mut self, out: &mut Vec<u8>) {
        let n = self.described.as_ref().map_or(0, |described| described.exports.len());
        let Some(ExportListing { name, .. }) = self.listed.get(n).cloned() else {
            write_option(out, OptionCode::Abort, &[]);
            self.state = State::Over;
            return;
        };
        let style = self.so_far.style;
        self.so_far = ClientNegotiated { style, ..ClientNegotiated::of(name.clone()) };
        self.size_known = false;
        self.ask_about(OptionCode::Info, &name, out);
    }

    /// The server has told what it tells of an export: its metadata contexts come next, if replies can carry any.
    fn ask_for_list_of_contexts(&mut self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        if !self.size_known {
            return Err(ProtocolError::SizeMissing);
        }
        if !self.so_far.style.has_chunks() {
            self.keep_details(out);
            return Ok(());
        }
        let name = self.listed_now();
        let mut payload = Vec::new();
        MetaContextRequest { export: &name, queries: Vec::new() }.write(&mut payload);
        self.ask(OptionCode::ListMetaContext, &payload, out);
        Ok(())
    }

    /// The name of the export that is asked about, as the list has it.
    fn listed_now(&self) -> String {
        let n = self.described.as_ref().map_or(0, |described| described.exports.len());
        self.listed.get(n).map(|listing| listing.name.clone()).unwrap_or_default()
    }

    /// All that the server tells of an export is known, which is nothing if the size is not.
    fn keep_details(&mut self, out: &mut Vec<u8>) {
        if let Some(described) = &mut self.described {
            let contexts = std::mem::take(&mut described.contexts);
            let details = self.size_known.then_some(ExportDetails {
                size_bytes: self.so_far.size_bytes,
                flags: self.so_far.flags,
                style: self.so_far.style,
                block_sizes: self.so_far.block_sizes,
                meta_contexts: contexts,
            });
            if let Some(ExportListing { name, description }) =
                self.listed.get(described.exports.len()).cloned()
            {
                described.exports.push(ListedExport { name, description, details });
            }
        }
        self.ask_about_next(out);
    }

    fn ask_by_export_name(&mut self, out: &mut Vec<u8>) {
        write_option(out, OptionCode::ExportName, self.request.export.as_bytes());
        self.state = State::ExportName;
    }

    fn export_name_answer(&mut self, input: &[u8]) -> Result<ClientStep, ProtocolError> {
        let Some((answer, consumed)) = ExportNameAnswer::parse(input, self.no_zeroes)? else {
            return Ok(need_input());
        };
        self.size(answer.size_bytes, answer.flags)?;
        Ok(ClientStep { consumed, progress: self.ready()? })
    }

    fn option_reply(
        &mut self,
        option: OptionCode,
        replies: usize,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ClientStep, ProtocolError> {
        let Some(header) = OptionReplyHeader::parse(input)? else { return Ok(need_input()) };
        if header.option != option {
            return Err(ProtocolError::WrongOption { expected: option, found: header.option });
        }
        if header.length > OPTION_PAYLOAD_BYTES_MAX {
            return Err(ProtocolError::ReplyTooLarge {
                what: "option reply",
                length: header.length.into(),
                max: OPTION_PAYLOAD_BYTES_MAX.into(),
            });
        }
        let consumed = OptionReplyHeader::BYTES + header.length as usize;
        let Some(payload) = input.get(OptionReplyHeader::BYTES..consumed) else { return Ok(need_input()) };
        let is_list = matches!(option, OptionCode::List | OptionCode::ListMetaContext);
        let replies_max = if is_list { LISTED_EXPORTS_MAX } else { INFO_REPLIES_MAX };
        if replies > replies_max {
            return Err(ProtocolError::TooManyReplies { option });
        }
        self.state = State::Option { option, replies: replies + 1 };

        if header.reply == ReplyCode::Ack && !payload.is_empty() {
            return Err(ProtocolError::TrailingBytes { what: "acknowledgement", extra: payload.len() });
        }
        let progress = if header.reply.is_error() {
            self.refused(option, header.reply, payload, out)?
        } else {
            self.accepted(option, header.reply, payload, out)?
        };
        let progress = match (&mut self.described, self.state) {
            (Some(described), State::Over) => {
                ClientProgress::Described(std::mem::take(&mut described.exports))
            }
            _ => progress,
        };
        Ok(ClientStep { consumed, progress })
    }

    /// A reply that is no error.
    fn accepted(
        &mut self,
        option: OptionCode,
        reply: ReplyCode,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ClientProgress, ProtocolError> {
        match (option, reply) {
            (OptionCode::ExtendedHeaders, ReplyCode::Ack) => {
                self.so_far.style = HeaderStyle::Extended;
                self.ask_for_contexts(out);
            }
            (OptionCode::StructuredReply, ReplyCode::Ack) => {
                self.so_far.style = HeaderStyle::Structured;
                self.ask_for_contexts(out);
            }
            (OptionCode::SetMetaContext, ReplyCode::MetaContext) => self.context(payload)?,
            (OptionCode::SetMetaContext, ReplyCode::Ack) => self.ask_to_go(out),
            (OptionCode::Go, ReplyCode::Info) => self.info(payload)?,
            (OptionCode::Go, ReplyCode::Ack) => return self.ready(),
            (OptionCode::List, ReplyCode::Server) => self.listed(payload)?,
            (OptionCode::List, ReplyCode::Ack) if self.described.is_some() => {
                self.ask(OptionCode::ExtendedHeaders, &[], out);
            }
            (OptionCode::Info, ReplyCode::Info) => self.info(payload)?,
            (OptionCode::Info, ReplyCode::Ack) => self.ask_for_list_of_contexts(out)?,
            (OptionCode::ListMetaContext, ReplyCode::MetaContext) => self.listed_context(payload)?,
            (OptionCode::ListMetaContext, ReplyCode::Ack) => self.keep_details(out),
            (OptionCode::List, ReplyCode::Ack) => {
                write_option(out, OptionCode::Abort, &[]);
                return Ok(ClientProgress::Listed(std::mem::take(&mut self.listed)));
            }
            _ => return Err(ProtocolError::UnexpectedReply { option, reply }),
        }
        Ok(ClientProgress::Again)
    }

    /// An error reply: go on without the feature where that is possible.
    fn refused(
        &mut self,
        option: OptionCode,
        reply: ReplyCode,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ClientProgress, ProtocolError> {
        let final_word = matches!(reply, ReplyCode::ErrTlsRequired | ReplyCode::ErrShutdown);
        match option {
            OptionCode::ExtendedHeaders if !final_word => self.ask_for_structured_replies(out),
            OptionCode::StructuredReply if !final_word => self.ask_to_go(out),
            OptionCode::SetMetaContext if !final_word => {
                self.so_far.meta_contexts.clear();
                self.ask_to_go(out);
            }
            OptionCode::Info if !final_word => {
                self.size_known = false;
                self.keep_details(out);
            }
            OptionCode::ListMetaContext if !final_word => self.keep_details(out),
            OptionCode::Go if reply == ReplyCode::ErrUnsupported && !self.so_far.style.is_extended() => {
                self.so_far.block_sizes = None;
                self.ask_by_export_name(out);
            }
            _ => {
                write_option(out, OptionCode::Abort, &[]);
                return Err(ProtocolError::Refused { option, reply, message: printable(payload) });
            }
        }
        Ok(ClientProgress::Again)
    }

    fn context(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        let MetaContextReply { id, name } = MetaContextReply::parse(payload)?;
        let asked = self.request.meta_contexts.iter().find(|context| context.is_selected_by(&name));
        let taken =
            self.so_far.meta_contexts.iter().any(|(other, context)| *other == id || Some(context) == asked);
        match asked {
            Some(context) if !taken => {
                self.so_far.meta_contexts.push((id, context.clone()));
                Ok(())
            }
            _ => Err(ProtocolError::UnexpectedContext { name: printable(name.as_bytes()) }),
        }
    }

    fn info(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        match InfoReply::parse(payload)? {
            InfoReply::Export { size_bytes, flags } => self.size(size_bytes, flags)?,
            InfoReply::Name(name) => self.so_far.export = name,
            InfoReply::Description(description) => self.so_far.description = description,
            InfoReply::BlockSize(sizes) => self.so_far.block_sizes = Some(sizes.check()?),
            InfoReply::Other(_) => {}
        }
        Ok(())
    }

    fn size(&mut self, size_bytes: u64, flags: TransmissionFlags) -> Result<(), ProtocolError> {
        if size_bytes > EXPORT_BYTES_MAX {
            return Err(ProtocolError::ImpossibleSize { size_bytes });
        }
        // Flags without their mark are from a server that has none; DF is meaningless without chunks.
        let flags =
            if flags.contains(TransmissionFlags::HAS_FLAGS) { flags } else { TransmissionFlags::EMPTY };
        let df = self.so_far.style.has_chunks() && flags.contains(TransmissionFlags::SEND_DF);
        self.so_far.size_bytes = size_bytes;
        self.so_far.flags = flags.set(TransmissionFlags::SEND_DF, df);
        self.size_known = true;
        Ok(())
    }

    fn listed(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        self.has_room(OptionCode::List, payload)?;
        self.listed.push(ExportListing::parse(payload)?);
        Ok(())
    }

    fn listed_context(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        self.has_room(OptionCode::ListMetaContext, payload)?;
        let MetaContextReply { name, .. } = MetaContextReply::parse(payload)?;
        if let Some(described) = &mut self.described {
            described.contexts.push(printable(name.as_bytes()));
        }
        Ok(())
    }

    /// All lists together have a limit.
    fn has_room(&mut self, option: OptionCode, payload: &[u8]) -> Result<(), ProtocolError> {
        self.listed_bytes += payload.len();
        match self.listed_bytes > LISTED_BYTES_MAX {
            true => Err(ProtocolError::TooManyReplies { option }),
            false => Ok(()),
        }
    }

    fn ready(&mut self) -> Result<ClientProgress, ProtocolError> {
        if !self.size_known {
            return Err(ProtocolError::SizeMissing);
        }
        Ok(ClientProgress::Ready(Box::new(self.so_far.clone())))
    }
}

const fn need_input() -> ClientStep {
    ClientStep { consumed: 0, progress: ClientProgress::NeedInput }
}

const fn again(consumed: usize) -> ClientStep {
    ClientStep { consumed, progress: ClientProgress::Again }
}

// The one answer without a header is smaller than any option reply may be, so that one buffer size serves for both.
const _: () = assert!(10 + EXPORT_NAME_ZEROES_BYTES <= ClientHandshake::input_bytes_max());
