//! Whole handshakes between the two machines, cut anywhere, and a server that is fed noise.
//!
//! The pump hands each machine what the other has sent, in pieces whose sizes come from a seed: one byte at a time,
//! random cuts, or all at once. Whatever the cuts, the outcome must be the same.

use super::constants::*;
use super::error::ProtocolError;
use super::handshake_client::{
    ClientGoal, ClientHandshake, ClientNegotiated, ClientProgress, ConnectRequest, ExportDetails,
    ListedExport,
};
use super::handshake_server::{
    ExportDirectory, ExportInfo, Negotiated, ServerHandshake, ServerPolicy, ServerProgress,
};
use super::meta_context::MetaContext;
use super::wire::{
    BlockSizes, ExportListing, Greeting, InfoReply, InfoRequest, MetaContextRequest, OptionHeader,
    OptionReplyHeader, write_option, write_option_reply,
};
use crate::base::rng::Rng;

/// What cuts and noise are drawn from.
pub(super) struct Noise(Rng);

impl Noise {
    pub(super) fn new(seed: u64) -> Noise {
        Noise(Rng::new(seed))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    /// An index of a list of `count`.
    pub(super) fn index(&mut self, count: usize) -> usize {
        self.below(count as u64) as usize
    }

    pub(super) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

#[derive(Clone, Copy, Debug)]
enum Cuts {
    Whole,
    Bytes,
    Random(u64),
}

const ALL_CUTS: [Cuts; 6] =
    [Cuts::Whole, Cuts::Bytes, Cuts::Random(1), Cuts::Random(2), Cuts::Random(3), Cuts::Random(4)];

struct Exports(Vec<ExportInfo>);

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<ExportListing> {
        let listing = |export: &ExportInfo| ExportListing {
            name: export.name.clone(),
            description: export.description.clone(),
        };
        self.0.iter().map(listing).collect()
    }

    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        match name {
            "" => self.0.first().cloned(),
            _ => self.0.iter().find(|export| export.name == name).cloned(),
        }
    }
}

fn exports() -> Exports {
    let disk = ExportInfo {
        name: "disk".into(),
        description: "The root disk.".into(),
        size_bytes: 10 << 30,
        flags: TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::CAN_MULTI_CONN,
        read_only: false,
        block_sizes: BlockSizes { minimum_bytes: 512, preferred_bytes: 65536, maximum_bytes: 32 << 20 },
        meta_contexts: vec![MetaContext::BaseAllocation, MetaContext::DirtyBitmap("b0".into())],
    };
    let iso = ExportInfo {
        name: "iso".into(),
        description: String::new(),
        size_bytes: 4096,
        flags: TransmissionFlags::SEND_FAST_ZERO,
        read_only: true,
        block_sizes: BlockSizes::default(),
        meta_contexts: vec![MetaContext::BaseAllocation],
    };
    Exports(vec![disk, iso])
}

/// One direction of a connection: what has been sent, and how much of it has arrived.
struct Pipe {
    bytes: Vec<u8>,
    arrived: usize,
}

impl Pipe {
    fn new() -> Self {
        Self { bytes: Vec::new(), arrived: 0 }
    }

    /// Lets some more bytes arrive; false if there are none.
    fn arrive(&mut self, cuts: Cuts, noise: &mut Noise) -> bool {
        let waiting = self.bytes.len() - self.arrived;
        self.arrived += match cuts {
            _ if waiting == 0 => return false,
            Cuts::Whole => waiting,
            Cuts::Bytes => 1,
            Cuts::Random(_) => 1 + noise.index(waiting),
        };
        true
    }

    fn consume(&mut self, count: usize) {
        assert!(count <= self.arrived);
        self.bytes.drain(..count);
        self.arrived -= count;
    }
}

type ServerEnd = Result<Option<Negotiated>, ProtocolError>;
type ClientEnd = Result<ClientProgress, ProtocolError>;

/// Runs both machines until both have ended, or neither can go on.
fn converse(
    policy: ServerPolicy,
    exports: &Exports,
    goal: ClientGoal,
    cuts: Cuts,
) -> (Option<ServerEnd>, Option<ClientEnd>) {
    let mut noise = Noise::new(if let Cuts::Random(seed) = cuts { seed } else { 0 });
    let (mut server, mut client) = (ServerHandshake::new(policy), ClientHandshake::new(goal));
    let (mut to_server, mut to_client) = (Pipe::new(), Pipe::new());
    let (mut server_end, mut client_end) = (None, None);
    loop {
        while server_end.is_none() {
            match server.advance(&to_server.bytes[..to_server.arrived], exports, &mut to_client.bytes) {
                Ok(step) => {
                    to_server.consume(step.consumed);
                    match step.progress {
                        ServerProgress::NeedInput => break,
                        ServerProgress::Again => {}
                        ServerProgress::Ready(negotiated) => server_end = Some(Ok(Some(*negotiated))),
                        ServerProgress::Abort => server_end = Some(Ok(None)),
                    }
                }
                Err(error) => server_end = Some(Err(error)),
            }
        }
        while client_end.is_none() {
            match client.advance(&to_client.bytes[..to_client.arrived], &mut to_server.bytes) {
                Ok(step) => {
                    to_client.consume(step.consumed);
                    match step.progress {
                        ClientProgress::NeedInput => break,
                        ClientProgress::Again => {}
                        end => client_end = Some(Ok(end)),
                    }
                }
                Err(error) => client_end = Some(Err(error)),
            }
        }
        let to_server_came = to_server.arrive(cuts, &mut noise);
        let to_client_came = to_client.arrive(cuts, &mut noise);
        if !to_server_came && !to_client_came {
            // An ACK to ABORT may stay unread; nothing else may.
            if client_end.as_ref().is_some_and(|end| matches!(end, Ok(ClientProgress::Ready(_)))) {
                assert!(to_client.bytes.is_empty() && to_server.bytes.is_empty());
            }
            return (server_end, client_end);
        }
    }
}

fn connected(policy: ServerPolicy, request: ConnectRequest, cuts: Cuts) -> (Negotiated, ClientNegotiated) {
    match converse(policy, &exports(), ClientGoal::Connect(request), cuts) {
        (Some(Ok(Some(server))), Some(Ok(ClientProgress::Ready(client)))) => (server, *client),
        other => panic!("no connection: {other:?}"),
    }
}

#[test]
fn both_sides_agree_however_the_bytes_are_cut() {
    for cuts in ALL_CUTS {
        let (server, client) = connected(ServerPolicy::default(), ConnectRequest::new("disk"), cuts);
        assert_eq!(server.style, HeaderStyle::Structured);
        assert_eq!(server.meta_contexts, [(1, MetaContext::BaseAllocation)]);
        assert!(server.block_sizes_agreed);
        assert!(server.flags.contains(TransmissionFlags::SEND_DF | TransmissionFlags::SEND_FAST_ZERO));
        assert_eq!(
            client,
            ClientNegotiated {
                export: "disk".into(),
                description: "The root disk.".into(),
                size_bytes: 10 << 30,
                flags: server.flags,
                style: HeaderStyle::Structured,
                block_sizes: Some(server.export.block_sizes),
                meta_contexts: server.meta_contexts.clone(),
            }
        );
        assert_eq!(client.context_id(&MetaContext::BaseAllocation), Some(1));
        assert_eq!(client.payload_bytes_max(), 32 << 20);
    }
}

#[test]
fn the_default_export_has_a_name() {
    let (server, client) = connected(ServerPolicy::default(), ConnectRequest::new(""), Cuts::Bytes);
    assert_eq!(server.export.name, "disk");
    assert_eq!(client.export, "disk");
    // The selection named the export as "", and GO did too: it is the same export.
    assert_eq!(client.meta_contexts, server.meta_contexts);
    assert_eq!(client.meta_contexts.len(), 1);
}

#[test]
fn extended_headers_come_before_structured_replies() {
    for structured_replies in [true, false] {
        let policy = ServerPolicy { extended_headers: true, structured_replies, ..ServerPolicy::default() };
        let mut request = ConnectRequest::new("disk");
        request.meta_contexts.push(MetaContext::DirtyBitmap("b0".into()));
        request.meta_contexts.push(MetaContext::AllocationDepth);
        let (server, client) = connected(policy, request, Cuts::Random(9));
        assert_eq!((server.style, client.style), (HeaderStyle::Extended, HeaderStyle::Extended));
        assert_eq!(client.meta_contexts, server.meta_contexts);
        assert_eq!(client.context_id(&MetaContext::DirtyBitmap("b0".into())), Some(2));
        assert_eq!(client.context_id(&MetaContext::AllocationDepth), None);
    }
}

#[test]
fn a_client_takes_what_it_gets() {
    let policy = ServerPolicy { structured_replies: false, ..ServerPolicy::default() };
    let (server, client) = connected(policy, ConnectRequest::new("disk"), Cuts::Whole);
    assert_eq!((server.style, client.style), (HeaderStyle::Simple, HeaderStyle::Simple));
    assert!(client.meta_contexts.is_empty());
    assert!(!client.flags.contains(TransmissionFlags::SEND_DF));

    let plain =
        ConnectRequest { structured_replies: false, extended_headers: false, ..ConnectRequest::new("iso") };
    let (server, client) = connected(ServerPolicy::default(), plain, Cuts::Whole);
    assert_eq!(client.style, HeaderStyle::Simple);
    assert_eq!(client.flags, TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY);
    assert_eq!(server.flags, client.flags);
}

#[test]
fn an_unknown_export_is_refused_and_the_client_says_goodbye() {
    for cuts in ALL_CUTS {
        let goal = ClientGoal::Connect(ConnectRequest::new("nothing"));
        let (server, client) = converse(ServerPolicy::default(), &exports(), goal, cuts);
        assert_eq!(server, Some(Ok(None)));
        let Some(Err(ProtocolError::Refused { option, reply, message })) = client else {
            panic!("{client:?}")
        };
        assert_eq!((option, reply), (OptionCode::Go, ReplyCode::ErrUnknown));
        assert_eq!(message, "The server has no export of that name.");
    }
}

#[test]
fn exports_are_listed_unless_policy_forbids_it() {
    for cuts in ALL_CUTS {
        let (server, client) = converse(ServerPolicy::default(), &exports(), ClientGoal::List, cuts);
        assert_eq!(server, Some(Ok(None)));
        assert_eq!(client, Some(Ok(ClientProgress::Listed(exports().list()))));
    }
    let policy = ServerPolicy { list: false, ..ServerPolicy::default() };
    let (_, client) = converse(policy.clone(), &exports(), ClientGoal::Describe, Cuts::Whole);
    assert!(matches!(client, Some(Err(ProtocolError::Refused { reply: ReplyCode::ErrPolicy, .. }))));
    let (_, client) = converse(policy, &exports(), ClientGoal::List, Cuts::Whole);
    assert!(matches!(client, Some(Err(ProtocolError::Refused { reply: ReplyCode::ErrPolicy, .. }))));
}

#[test]
fn each_export_of_a_list_is_asked_about() {
    for (cuts, extended_headers) in ALL_CUTS.into_iter().zip([true, false].into_iter().cycle()) {
        let policy = ServerPolicy { extended_headers, ..ServerPolicy::default() };
        let (server, client) = converse(policy, &exports(), ClientGoal::Describe, cuts);
        assert_eq!(server, Some(Ok(None)));
        let Some(Ok(ClientProgress::Described(listed))) = client else { panic!("{client:?}") };
        let style = if extended_headers { HeaderStyle::Extended } else { HeaderStyle::Structured };
        let wanted: Vec<_> = exports()
            .0
            .into_iter()
            .map(|export| ListedExport {
                details: Some(ExportDetails {
                    size_bytes: export.size_bytes,
                    flags: export.transmission_flags(style),
                    style,
                    block_sizes: Some(export.block_sizes),
                    meta_contexts: export.meta_contexts.iter().map(MetaContext::name).collect(),
                }),
                name: export.name,
                description: export.description,
            })
            .collect();
        assert_eq!(listed, wanted);
    }
}

#[test]
fn what_a_server_does_not_tell_of_an_export_is_not_known() {
    let mut listed = Vec::new();
    ExportListing { name: "x".into(), description: "d".into() }.write(&mut listed);
    let list = [(OptionCode::List, ReplyCode::Server, listed), (OptionCode::List, ReplyCode::Ack, vec![])];
    let refused = |option, reply| (option, reply, vec![]);
    let hear_list = |more: &[(OptionCode, ReplyCode, Vec<u8>)]| {
        hear(ClientGoal::Describe, &script(&[&list[..], more].concat()))
    };
    let no_styles = [
        refused(OptionCode::ExtendedHeaders, ReplyCode::ErrUnsupported),
        refused(OptionCode::StructuredReply, ReplyCode::ErrUnsupported),
    ];
    let unknown = refused(OptionCode::Info, ReplyCode::ErrUnsupported);
    let Ok(ClientProgress::Described(found)) = hear_list(&[&no_styles[..], &[unknown]].concat()) else {
        panic!()
    };
    assert_eq!(found, [ListedExport { name: "x".into(), description: "d".into(), details: None }]);
    let sized = (OptionCode::Info, info(InfoReply::Export { size_bytes: 9, flags: TransmissionFlags(3) }));
    let told = [(sized.0, sized.1.1, sized.1.2), refused(OptionCode::Info, ReplyCode::Ack)];
    let Ok(ClientProgress::Described(found)) = hear_list(&[&no_styles[..], &told].concat()) else { panic!() };
    let details = found[0].details.as_ref().unwrap();
    assert_eq!((details.size_bytes, details.style, details.block_sizes), (9, HeaderStyle::Simple, None));
    let no_size = [&no_styles[..], &told[1..]].concat();
    assert_eq!(hear_list(&no_size), Err(ProtocolError::SizeMissing));
    let many = (OptionCode::ListMetaContext, ReplyCode::MetaContext, b"0000a:b".to_vec());
    let chunks = [refused(OptionCode::ExtendedHeaders, ReplyCode::Ack)];
    let endless = [&chunks[..], &told, &vec![many; LISTED_EXPORTS_MAX + 2]].concat();
    assert_eq!(
        hear_list(&endless),
        Err(ProtocolError::TooManyReplies { option: OptionCode::ListMetaContext })
    );
    let goes = [&chunks[..], &[refused(OptionCode::Info, ReplyCode::ErrShutdown)]].concat();
    assert!(matches!(hear_list(&goes), Err(ProtocolError::Refused { .. })));
}

#[test]
fn a_list_beyond_the_limit_ends_in_an_error() {
    let mut many = exports();
    let mut long = many.0[1].clone();
    long.description = "x".repeat(5000);
    many.0 = vec![long; 400];
    let (_, client) = converse(ServerPolicy::default(), &many, ClientGoal::List, Cuts::Whole);
    assert!(matches!(client, Some(Err(ProtocolError::Refused { reply: ReplyCode::ErrTooBig, .. }))));
}

/// Feeds a server that has seen the client's flags with `input`; gives its replies and how it ended.
fn serve(
    policy: ServerPolicy,
    flags: ClientFlags,
    input: &[u8],
) -> (Vec<(OptionReplyHeader, Vec<u8>)>, ServerEnd) {
    let (mut server, exports) = (ServerHandshake::new(policy), exports());
    let mut bytes = Vec::new();
    flags.write(&mut bytes);
    bytes.extend_from_slice(input);
    let (mut out, mut rest) = (Vec::new(), &bytes[..]);
    let end = loop {
        match server.advance(rest, &exports, &mut out) {
            Ok(step) => {
                rest = &rest[step.consumed..];
                match step.progress {
                    ServerProgress::NeedInput => break Ok(None),
                    ServerProgress::Again => {}
                    ServerProgress::Ready(negotiated) => break Ok(Some(*negotiated)),
                    ServerProgress::Abort => break Ok(None),
                }
            }
            Err(error) => break Err(error),
        }
    };
    let mut replies = Vec::new();
    let mut rest = &out[Greeting::BYTES..];
    while let Ok(Some(header)) = OptionReplyHeader::parse(rest) {
        let (payload, next) = rest[OptionReplyHeader::BYTES..].split_at(header.length as usize);
        replies.push((header, payload.to_vec()));
        rest = next;
    }
    (replies, end)
}

fn serve_options(options: &[(OptionCode, Vec<u8>)]) -> (Vec<(OptionReplyHeader, Vec<u8>)>, ServerEnd) {
    let mut input = Vec::new();
    for (option, payload) in options {
        write_option(&mut input, *option, payload);
    }
    serve(ServerPolicy::default(), ClientFlags::KNOWN, &input)
}

fn reply_codes(replies: &[(OptionReplyHeader, Vec<u8>)]) -> Vec<ReplyCode> {
    replies.iter().map(|(header, _)| header.reply).collect()
}

fn info_payload(export: &str, wanted: &[InfoCode]) -> Vec<u8> {
    let mut payload = Vec::new();
    InfoRequest { export, wanted: wanted.to_vec() }.write(&mut payload);
    payload
}

fn meta_payload(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut payload = Vec::new();
    MetaContextRequest { export, queries: queries.to_vec() }.write(&mut payload);
    payload
}

#[test]
fn unknown_and_malformed_options_are_answered_and_the_session_goes_on() {
    let mut trailing = info_payload("disk", &[]);
    trailing.push(0);
    let mut long_name = 5000u32.to_be_bytes().to_vec();
    long_name.extend_from_slice(&[b'a'; 5002]);
    let (replies, end) = serve_options(&[
        (OptionCode::Unknown(4711), vec![1; 100_000]),
        (OptionCode::PeekExport, vec![]),
        (OptionCode::StartTls, vec![]),
        (OptionCode::ExtendedHeaders, vec![]),
        (OptionCode::List, vec![0]),
        (OptionCode::StructuredReply, vec![0; 9]),
        (OptionCode::Info, vec![0; 70_000]),
        (OptionCode::Info, vec![0, 0, 1]),
        (OptionCode::Info, trailing),
        (OptionCode::Go, long_name),
        (OptionCode::Go, vec![0, 0, 0, 1, 0xff, 0, 0]),
        (OptionCode::Info, info_payload("nothing", &[])),
        (OptionCode::Go, info_payload("iso", &[])),
    ]);
    use ReplyCode::*;
    let expected = [
        [ErrUnsupported; 4].as_slice(),
        &[ErrInvalid, ErrInvalid, ErrTooBig],
        &[ErrInvalid; 4],
        &[ErrUnknown, Info, Ack],
    ];
    assert_eq!(reply_codes(&replies), expected.concat());
    assert_eq!(replies[0].0.option, OptionCode::Unknown(4711));
    assert!(replies.iter().all(|(header, payload)| !header.reply.is_error() || !payload.is_empty()));
    assert!(
        end.is_ok_and(
            |negotiated| negotiated.is_some_and(|n| n.export.name == "iso" && !n.block_sizes_agreed)
        )
    );
}

#[test]
fn info_tells_what_is_asked_and_stays_in_the_handshake() {
    let every = [InfoCode::BlockSize, InfoCode::Name, InfoCode::Description, InfoCode::Unknown(88)];
    let (replies, end) = serve_options(&[(OptionCode::Info, info_payload("disk", &every))]);
    assert_eq!(end, Ok(None));
    let infos: Vec<InfoReply> =
        replies[..4].iter().map(|(_, payload)| InfoReply::parse(payload).unwrap()).collect();
    let disk = &exports().0[0];
    assert_eq!(
        infos,
        [
            InfoReply::Export {
                size_bytes: disk.size_bytes,
                flags: disk.transmission_flags(HeaderStyle::Simple)
            },
            InfoReply::Name("disk".into()),
            InfoReply::Description("The root disk.".into()),
            InfoReply::BlockSize(disk.block_sizes),
        ]
    );
    assert_eq!(replies[4].0.reply, ReplyCode::Ack);
}

#[test]
fn contexts_hold_for_the_export_they_were_selected_for() {
    let select = |export: &str, queries: &[&str]| (OptionCode::SetMetaContext, meta_payload(export, queries));
    let go = |export: &str| (OptionCode::Go, info_payload(export, &[]));
    let structured = (OptionCode::StructuredReply, vec![]);
    let contexts =
        |options: &[(OptionCode, Vec<u8>)]| serve_options(options).1.unwrap().unwrap().meta_contexts;

    let both = ["base:allocation", "qemu:dirty-bitmap:b0", "base:allocation"];
    let selected = contexts(&[structured.clone(), select("disk", &both), go("disk")]);
    assert_eq!(selected, [(1, MetaContext::BaseAllocation), (2, MetaContext::DirtyBitmap("b0".into()))]);

    // Another export; a wildcard; a selection that replaces; one that fails; one without structured replies.
    let allocation = select("disk", &["base:allocation"]);
    assert_eq!(contexts(&[structured.clone(), allocation.clone(), go("iso")]), []);
    assert_eq!(contexts(&[structured.clone(), select("disk", &["base:"]), go("disk")]), []);
    assert_eq!(contexts(&[structured.clone(), allocation.clone(), select("disk", &[]), go("disk")]), []);
    let fails = select("nothing", &["base:allocation"]);
    assert_eq!(contexts(&[structured.clone(), allocation.clone(), fails, go("disk")]), []);
    let (replies, _) = serve_options(&[allocation.clone(), structured.clone()]);
    assert_eq!(reply_codes(&replies), [ReplyCode::ErrInvalid, ReplyCode::Ack]);
    assert_eq!(contexts(&[allocation, structured, go("disk")]), []);
}

#[test]
fn contexts_are_listed_with_wildcards() {
    let names = |queries: &[&str]| {
        let (replies, _) = serve_options(&[
            (OptionCode::StructuredReply, vec![]),
            (OptionCode::ListMetaContext, meta_payload("disk", queries)),
        ]);
        assert_eq!(replies.last().map(|(header, _)| header.reply), Some(ReplyCode::Ack));
        replies[1..replies.len() - 1]
            .iter()
            .map(|(header, payload)| {
                assert_eq!(header.reply, ReplyCode::MetaContext);
                assert_eq!(payload[..4], [0; 4]);
                String::from_utf8(payload[4..].to_vec()).unwrap()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&[]), ["base:allocation", "qemu:dirty-bitmap:b0"]);
    assert_eq!(names(&["base:"]), ["base:allocation"]);
    assert_eq!(names(&["qemu:", "base:allocation"]), ["base:allocation", "qemu:dirty-bitmap:b0"]);
    assert!(names(&["x-other:thing", "base:else"]).is_empty());

    let many: Vec<&str> = vec!["base:"; 300];
    let (replies, _) = serve_options(&[
        (OptionCode::StructuredReply, vec![]),
        (OptionCode::ListMetaContext, meta_payload("disk", &many)),
        (OptionCode::ListMetaContext, meta_payload("disk", &["nonsense"])),
        (OptionCode::ListMetaContext, meta_payload("nothing", &[])),
    ]);
    assert_eq!(
        reply_codes(&replies)[1..],
        [ReplyCode::ErrTooBig, ReplyCode::ErrInvalid, ReplyCode::ErrUnknown]
    );
}

#[test]
fn export_name_ends_the_handshake_with_or_without_zeroes() {
    for (flags, zeroes) in [(ClientFlags::KNOWN, 0), (ClientFlags::EMPTY, 124)] {
        let (mut server, mut out) = (ServerHandshake::new(ServerPolicy::default()), Vec::new());
        let mut input = Vec::new();
        flags.write(&mut input);
        write_option(&mut input, OptionCode::ExportName, b"disk");
        input.extend_from_slice(b"first request");
        let mut at = 0;
        let negotiated = loop {
            let step = server.advance(&input[at..], &exports(), &mut out).unwrap();
            at += step.consumed;
            if let ServerProgress::Ready(negotiated) = step.progress {
                break negotiated;
            }
        };
        assert_eq!(&input[at..], b"first request");
        assert_eq!(out.len(), Greeting::BYTES + 10 + zeroes);
        assert_eq!(negotiated.export.name, "disk");
        assert_eq!(server.advance(&[], &exports(), &mut out), Err(ProtocolError::AlreadyOver));
    }
}

#[test]
fn what_cannot_be_answered_ends_the_session() {
    let end = |flags, input: &[u8]| serve(ServerPolicy::default(), flags, input).1.unwrap_err();
    let option = |code, payload: &[u8]| {
        let mut input = Vec::new();
        write_option(&mut input, code, payload);
        input
    };
    assert_eq!(end(ClientFlags(4), &[]), ProtocolError::UnknownClientFlags { flags: 4 });
    assert!(matches!(end(ClientFlags::KNOWN, &[7; 16]), ProtocolError::BadMagic { .. }));
    assert_eq!(
        end(ClientFlags::KNOWN, &option(OptionCode::ExportName, b"nothing")),
        ProtocolError::UnknownExport { name: "nothing".into() }
    );
    assert_eq!(
        end(ClientFlags::KNOWN, &option(OptionCode::ExportName, &[b'a'; 4097])),
        ProtocolError::StringTooLong { what: "export name", bytes: 4097 }
    );
    assert_eq!(
        end(ClientFlags::EMPTY, &option(OptionCode::List, &[])),
        ProtocolError::NotFixedNewstyle { option: OptionCode::List }
    );
    let mut huge = Vec::new();
    OptionHeader { option: OptionCode::Unknown(5000), length: u32::MAX }.write(&mut huge);
    assert!(matches!(end(ClientFlags::KNOWN, &huge), ProtocolError::OptionTooLarge { length: u32::MAX, .. }));
    let mut huge = Vec::new();
    OptionHeader { option: OptionCode::ExportName, length: 70_000 }.write(&mut huge);
    assert!(matches!(end(ClientFlags::KNOWN, &huge), ProtocolError::OptionTooLarge { length: 70_000, .. }));

    let policy = ServerPolicy { extended_headers: true, ..ServerPolicy::default() };
    let mut input = option(OptionCode::ExtendedHeaders, &[]);
    input.extend(option(OptionCode::StructuredReply, &[]));
    input.extend(option(OptionCode::ExportName, b"disk"));
    let (replies, end) = serve(policy, ClientFlags::KNOWN, &input);
    assert_eq!(reply_codes(&replies), [ReplyCode::Ack, ReplyCode::ErrExtendedHeadersRequired]);
    assert_eq!(end, Err(ProtocolError::ExportNameAfterExtendedHeaders));
}

#[test]
fn haggling_has_an_end() {
    let many = |count: usize| vec![(OptionCode::Unknown(99), vec![]); count];
    let max = OPTIONS_PER_HANDSHAKE_MAX;
    let (replies, end) = serve_options(&many(max as usize));
    assert_eq!((replies.len(), end), (max as usize, Ok(None)));
    let (replies, end) = serve_options(&many(max as usize + 1));
    assert_eq!((replies.len(), end), (max as usize, Err(ProtocolError::TooManyOptions { max })));
}

#[test]
fn a_server_that_shuts_down_says_so() {
    let (mut server, mut out) = (ServerHandshake::new(ServerPolicy::default()), Vec::new());
    server.shut_down();
    let mut input = Vec::new();
    ClientFlags::KNOWN.write(&mut input);
    write_option(&mut input, OptionCode::Go, &info_payload("disk", &[]));
    write_option(&mut input, OptionCode::Abort, b"ignored");
    let mut at = 0;
    loop {
        let step = server.advance(&input[at..], &exports(), &mut out).unwrap();
        at += step.consumed;
        match step.progress {
            ServerProgress::Abort => break,
            progress => assert_eq!(progress, ServerProgress::Again),
        }
    }
    assert_eq!(at, input.len());
    let refusal = OptionReplyHeader::parse(&out[Greeting::BYTES..]).unwrap().unwrap();
    assert_eq!(refusal.reply, ReplyCode::ErrShutdown);
}

/// Noise with enough structure to reach deep: real magic words, real and unreal options, lengths that lie.
fn noisy_input(noise: &mut Noise) -> Vec<u8> {
    let mut input = Vec::new();
    ClientFlags(if noise.index(8) == 0 { noise.next() as u32 } else { 3 }).write(&mut input);
    for _ in 0..noise.index(40) {
        let option = OptionCode::from_wire(noise.below(14) as u32);
        let mut payload = match noise.index(5) {
            0 => info_payload(
                ["disk", "iso", "", "no"][noise.index(4)],
                &[InfoCode::Name, InfoCode::BlockSize],
            ),
            1 => meta_payload(["disk", "", "no"][noise.index(3)], &["base:", "base:allocation", "qemu:"]),
            2 => vec![],
            _ => (0..noise.index(300)).map(|_| noise.next() as u8).collect(),
        };
        if !payload.is_empty() && noise.index(4) == 0 {
            let at = noise.index(payload.len());
            payload[at] ^= 1 << noise.index(8);
        }
        let mut lie = payload.len() as u32;
        match noise.index(30) {
            0 => lie = noise.next() as u32,
            1 => lie = lie.wrapping_add(1 + noise.below(70_000) as u32),
            _ => {}
        }
        OptionHeader { option, length: lie }.write(&mut input);
        input.extend_from_slice(&payload);
    }
    if noise.index(3) == 0 {
        input.extend((0..noise.index(200)).map(|_| noise.next() as u8));
    }
    input
}

#[test]
fn noise_never_panics_a_server_and_never_makes_it_verbose() {
    let exports = exports();
    let mut outcomes = [0; 4];
    for seed in 0..3000 {
        let mut noise = Noise::new(seed);
        let input = if seed % 10 == 0 {
            (0..noise.index(400)).map(|_| noise.next() as u8).collect()
        } else {
            noisy_input(&mut noise)
        };
        let policy = ServerPolicy { extended_headers: seed % 2 == 0, ..ServerPolicy::default() };
        let mut server = ServerHandshake::new(policy);
        let (mut at, mut arrived, mut calls) = (0, 0, 0);
        let outcome = loop {
            calls += 1;
            assert!(calls < 10_000, "seed {seed} does not come to an end");
            let mut out = Vec::new();
            let result = server.advance(&input[at..arrived], &exports, &mut out);
            assert!(out.len() < 2048, "seed {seed}: {} bytes for one message", out.len());
            match result {
                Err(_) => break 0,
                Ok(step) => {
                    at += step.consumed;
                    assert!(at <= arrived);
                    match step.progress {
                        ServerProgress::Ready(_) => break 1,
                        ServerProgress::Abort => break 2,
                        ServerProgress::Again => {}
                        ServerProgress::NeedInput => {
                            assert!(arrived - at < server.input_bytes_max());
                            if arrived == input.len() {
                                break 3;
                            }
                            arrived += 1 + noise.index(input.len() - arrived);
                        }
                    }
                }
            }
        };
        outcomes[outcome] += 1;
    }
    assert!(outcomes.iter().all(|count| *count > 50), "the noise does not reach every end: {outcomes:?}");
}

/// A server script for the client: greeting, then whatever is given.
fn hear(goal: ClientGoal, script: &[u8]) -> ClientEnd {
    let mut client = ClientHandshake::new(goal);
    let mut input = Vec::new();
    Greeting { flags: HandshakeFlags::KNOWN }.write(&mut input);
    input.extend_from_slice(script);
    let (mut at, mut out) = (0, Vec::new());
    loop {
        let step = client.advance(&input[at..], &mut out)?;
        at += step.consumed;
        match step.progress {
            ClientProgress::NeedInput => return Ok(ClientProgress::NeedInput),
            ClientProgress::Again => {}
            end => return Ok(end),
        }
    }
}

fn plain_goal() -> ClientGoal {
    ClientGoal::Connect(ConnectRequest {
        structured_replies: false,
        extended_headers: false,
        ..ConnectRequest::new("disk")
    })
}

fn script(replies: &[(OptionCode, ReplyCode, Vec<u8>)]) -> Vec<u8> {
    let mut script = Vec::new();
    for (option, reply, payload) in replies {
        write_option_reply(&mut script, *option, *reply, payload);
    }
    script
}

fn info(info: InfoReply) -> (OptionCode, ReplyCode, Vec<u8>) {
    let mut payload = Vec::new();
    info.write(&mut payload);
    (OptionCode::Go, ReplyCode::Info, payload)
}

const GO_ACK: (OptionCode, ReplyCode, Vec<u8>) = (OptionCode::Go, ReplyCode::Ack, Vec::new());

#[test]
fn a_client_falls_back_to_export_name() {
    let mut bytes = script(&[
        (OptionCode::ExtendedHeaders, ReplyCode::ErrUnsupported, vec![]),
        (OptionCode::StructuredReply, ReplyCode::ErrUnsupported, b"too old".to_vec()),
        (OptionCode::Go, ReplyCode::ErrUnsupported, vec![]),
    ]);
    bytes.extend_from_slice(&77u64.to_be_bytes());
    bytes.extend_from_slice(&3u16.to_be_bytes());
    let end = hear(ClientGoal::Connect(ConnectRequest::new("disk")), &bytes);
    let Ok(ClientProgress::Ready(negotiated)) = end else { panic!("{end:?}") };
    assert_eq!((negotiated.size_bytes, negotiated.flags), (77, TransmissionFlags(3)));
    assert_eq!((negotiated.style, negotiated.block_sizes), (HeaderStyle::Simple, None));
    assert_eq!(negotiated.payload_bytes_max(), 32 << 20);
}

#[test]
fn a_client_opens_an_export_of_a_server_without_options() {
    let mut client = ClientHandshake::new(plain_goal());
    let (mut input, mut out) = (Vec::new(), Vec::new());
    Greeting { flags: HandshakeFlags::EMPTY }.write(&mut input);
    input.extend_from_slice(&4096u64.to_be_bytes());
    input.extend_from_slice(&[0, 1]);
    input.extend_from_slice(&[0; 124]);
    let step = client.advance(&input, &mut out).unwrap();
    assert_eq!(out[..4], [0; 4], "no flags that were not offered");
    assert_eq!(OptionHeader::parse(&out[4..]).unwrap().unwrap().option, OptionCode::ExportName);
    let early = client.advance(&input[step.consumed..input.len() - 1], &mut out).unwrap();
    assert_eq!(early.progress, ClientProgress::NeedInput);
    let step = client.advance(&input[step.consumed..], &mut out).unwrap();
    assert_eq!(step.consumed, 134);
    assert!(matches!(step.progress, ClientProgress::Ready(negotiated) if negotiated.size_bytes == 4096));

    let mut client = ClientHandshake::new(ClientGoal::List);
    assert_eq!(client.advance(&input, &mut out), Err(ProtocolError::CannotList));
}

#[test]
fn a_client_does_not_believe_everything() {
    let export = |size_bytes| info(InfoReply::Export { size_bytes, flags: TransmissionFlags::HAS_FLAGS });
    let sizes = |minimum_bytes, preferred_bytes, maximum_bytes| {
        info(InfoReply::BlockSize(BlockSizes { minimum_bytes, preferred_bytes, maximum_bytes }))
    };
    let hear_go = |replies: &[(OptionCode, ReplyCode, Vec<u8>)]| hear(plain_goal(), &script(replies));

    assert!(matches!(hear_go(&[export(5), info(InfoReply::Other(9)), GO_ACK]), Ok(ClientProgress::Ready(_))));
    assert_eq!(hear_go(&[GO_ACK]), Err(ProtocolError::SizeMissing));
    assert_eq!(hear_go(&[export(1 << 63)]), Err(ProtocolError::ImpossibleSize { size_bytes: 1 << 63 }));
    assert!(matches!(hear_go(&[sizes(3, 4096, 8192)]), Err(ProtocolError::ImpossibleBlockSizes { .. })));
    assert!(matches!(
        hear_go(&[(OptionCode::List, ReplyCode::Ack, vec![])]),
        Err(ProtocolError::WrongOption { expected: OptionCode::Go, found: OptionCode::List })
    ));
    assert!(matches!(
        hear_go(&[(OptionCode::Go, ReplyCode::Server, vec![])]),
        Err(ProtocolError::UnexpectedReply { .. })
    ));
    assert!(matches!(
        hear_go(&[(OptionCode::Go, ReplyCode::Ack, vec![0])]),
        Err(ProtocolError::TrailingBytes { .. })
    ));
    assert_eq!(
        hear_go(&vec![info(InfoReply::Other(9)); INFO_REPLIES_MAX + 2]),
        Err(ProtocolError::TooManyReplies { option: OptionCode::Go })
    );
    let mut huge = Vec::new();
    OptionReplyHeader { option: OptionCode::Go, reply: ReplyCode::Info, length: u32::MAX }.write(&mut huge);
    assert!(matches!(hear(plain_goal(), &huge), Err(ProtocolError::ReplyTooLarge { .. })));

    let refusal = [(OptionCode::Go, ReplyCode::ErrPolicy, b"\x1b[2Jgo away".to_vec())];
    let Err(error @ ProtocolError::Refused { .. }) = hear_go(&refusal) else { panic!() };
    assert_eq!(error.to_string(), "The server's policy forbids it (Go). It says: [2Jgo away");
    let first = [(OptionCode::ExtendedHeaders, ReplyCode::ErrTlsRequired, vec![])];
    let end = hear(ClientGoal::Connect(ConnectRequest::new("disk")), &script(&first));
    assert!(matches!(end, Err(ProtocolError::Refused { reply: ReplyCode::ErrTlsRequired, .. })));

    let mut endless = Vec::new();
    ExportListing { name: "x".into(), description: String::new() }.write(&mut endless);
    let list = vec![(OptionCode::List, ReplyCode::Server, endless); LISTED_EXPORTS_MAX + 2];
    assert_eq!(
        hear(ClientGoal::List, &script(&list)),
        Err(ProtocolError::TooManyReplies { option: OptionCode::List })
    );
    let wordy = vec![(OptionCode::List, ReplyCode::Server, vec![0; 60_000]); 100];
    assert_eq!(
        hear(ClientGoal::List, &script(&wordy)),
        Err(ProtocolError::TooManyReplies { option: OptionCode::List })
    );
}

#[test]
fn a_client_takes_only_contexts_that_it_asked_for_and_each_once() {
    let context = |id: u32, name: &str| {
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend_from_slice(name.as_bytes());
        (OptionCode::SetMetaContext, ReplyCode::MetaContext, payload)
    };
    let hear_contexts = |contexts: &[(OptionCode, ReplyCode, Vec<u8>)]| {
        let mut replies = vec![(OptionCode::ExtendedHeaders, ReplyCode::Ack, vec![])];
        replies.extend_from_slice(contexts);
        let mut request = ConnectRequest::new("disk");
        request.meta_contexts.push(MetaContext::AllocationDepth);
        hear(ClientGoal::Connect(request), &script(&replies))
    };
    let base = context(5, "base:allocation");
    assert_eq!(
        hear_contexts(&[base.clone(), context(6, "qemu:allocation-depth")]),
        Ok(ClientProgress::NeedInput)
    );
    for wrong in [
        context(6, "base:allocation"),
        context(5, "qemu:allocation-depth"),
        context(7, "qemu:dirty-bitmap:x"),
    ] {
        assert!(matches!(
            hear_contexts(&[base.clone(), wrong]),
            Err(ProtocolError::UnexpectedContext { .. })
        ));
    }
}

#[test]
fn noise_never_panics_a_client() {
    for seed in 0..3000 {
        let mut noise = Noise::new(seed);
        let mut bytes = Vec::new();
        for _ in 0..noise.index(12) {
            let option = OptionCode::from_wire([3, 6, 7, 8, 9, 10, 11][noise.index(7)]);
            let reply = noise.below(11) as u32 | if noise.index(4) == 0 { 0x8000_0000 } else { 0 };
            let payload: Vec<u8> = (0..noise.index(40)).map(|_| (noise.next() % 4) as u8).collect();
            write_option_reply(&mut bytes, option, ReplyCode::from_wire(reply), &payload);
        }
        bytes.extend((0..noise.index(100)).map(|_| noise.next() as u8));
        let connect = ClientGoal::Connect(ConnectRequest::new("disk"));
        let goal = [plain_goal(), ClientGoal::List, ClientGoal::Describe, connect];
        // Any outcome will do; that there is one is the point.
        let _ = hear(goal[noise.index(4)].clone(), &bytes);
    }
}
