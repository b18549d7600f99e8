//! The NBD codec under input that was bred to be strange: both handshakes, requests, and replies.
//!
//! Each target starts from conversations that make sense and changes them: bits, numbers that sit at limits, pieces that
//! go, come twice, or come from another conversation. An input that makes the codec end in a way not seen before is kept
//! and bred from. There is no instrumentation: a way to end is the list of what the codec said on the way.
//!
//! What must hold whatever comes: no panic, no loop without progress, no byte consumed that did not come, no reply longer
//! than a few messages, no buffer left. A failure prints the input. `FUZZ_SECONDS` is the time a target takes (half a
//! second if it is not set; `tests/run` sets 20).

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use blockferry::base::rng::Rng;
use blockferry::protocol::nbd::{
    BlockSizes, ClientGoal, ClientHandshake, ClientProgress, Command, CommandFlags, ConnectRequest,
    DATA_OFFSET_BYTES, ExportDirectory, ExportInfo, ExportListing, HeaderStyle, MetaContext, PendingReply,
    ProtocolError, ReplyBody, RequestHeader, RequestRules, ServerHandshake, ServerPolicy, ServerProgress,
    StatusExtent, TransmissionFlags, parse_block_status, parse_data_offset, parse_error, parse_hole,
    parse_reply, parse_request,
};

/// Inputs that are kept at most.
const CORPUS_MAX: usize = 4000;
/// Bytes of one input at most.
const INPUT_BYTES_MAX: usize = 4096;
const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

fn span() -> Duration {
    let said = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(said.unwrap_or(0.5))
}

/// Changes an input; `other` is where pieces may come from.
fn mutate(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8]) {
    const NUMBERS: [u64; 12] = [
        0,
        1,
        0xff,
        0x1000,
        0x7fff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        0x1_0000_0000,
        u64::MAX >> 1,
        (u64::MAX >> 1) + 1,
        u64::MAX,
    ];
    for _ in 0..1 + rng.below(4) {
        let len = input.len();
        let at = rng.below(len as u64 + 1) as usize;
        let end = (at + 1 + rng.below(24) as usize).min(len);
        match rng.below(9) {
            0 if at < len => input[at] ^= 1 << rng.below(8),
            1 if at < len => input[at] = rng.next_u64() as u8,
            2 => drop(input.drain(at.min(end)..end)),
            3 => {
                let piece = input[at.min(end)..end].to_vec();
                input.splice(at..at, piece);
            }
            4 if !other.is_empty() => {
                let from = rng.below(other.len() as u64) as usize;
                let to = (from + 1 + rng.below(80) as usize).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
            5 => input.truncate(at),
            _ => {
                let number = NUMBERS[rng.below(NUMBERS.len() as u64) as usize];
                let number = number.wrapping_add(rng.below(3)).wrapping_sub(1).to_be_bytes();
                let width = [1, 2, 4, 8][rng.below(4) as usize].min(len - at.min(len));
                let at = at.min(len);
                input[at..at + width].copy_from_slice(&number[8 - width..]);
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

/// Breeds inputs for `target`, which gives a number for the way in which it ended. Gives how many ways there were.
fn fuzz(name: &str, seeds: Vec<Vec<u8>>, target: impl Fn(&[u8], &mut Rng) -> u64) -> usize {
    let end = Instant::now() + span();
    let mut corpus = seeds;
    let (mut ways, mut runs) = (BTreeSet::new(), 0u64);
    let mut rng = Rng::new(0x5eed);
    while Instant::now() < end {
        for _ in 0..64 {
            let one = rng.below(corpus.len() as u64) as usize;
            let other = rng.below(corpus.len() as u64) as usize;
            let mut input = corpus[one].clone();
            if runs >= corpus.len() as u64 {
                mutate(&mut rng, &mut input, &corpus[other]);
            }
            let seed = rng.next_u64();
            let way = catch_unwind(AssertUnwindSafe(|| target(&input, &mut Rng::new(seed))));
            let Ok(way) = way else { panic!("{name}, run {runs}, seed {seed:#x}, input {input:02x?}") };
            runs += 1;
            if ways.insert(way) && corpus.len() < CORPUS_MAX {
                corpus.push(input);
            }
        }
    }
    println!("{name}: {runs} runs, {} ways to end", ways.len());
    ways.len()
}

/// What was said on the way, as a number. Errors count by their kind, not by the numbers in them.
#[derive(Default)]
struct Way(DefaultHasher, u32);

impl Way {
    fn said(&mut self, what: impl std::fmt::Debug) {
        // The first words are enough, and a way is cut off before it has more shapes than there is memory.
        if self.1 < 12 {
            let text = format!("{what:?}");
            let word = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            word.hash(&mut self.0);
            self.1 += 1;
        }
    }

    fn number(&self) -> u64 {
        self.0.finish()
    }
}

struct Exports;

fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: "A disk.".into(),
        size_bytes: 10 << 30,
        flags: TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_DF | TransmissionFlags::CAN_MULTI_CONN,
        read_only: false,
        block_sizes: BlockSizes { minimum_bytes: 512, preferred_bytes: 65536, maximum_bytes: 32 << 20 },
        meta_contexts: vec![MetaContext::BaseAllocation, MetaContext::DirtyBitmap("b0".into())],
    }
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<ExportListing> {
        vec![ExportListing { name: "disk".into(), description: "A disk.".into() }]
    }

    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        (name == "disk" || name.is_empty()).then(export)
    }
}

fn policy(extended_headers: bool) -> ServerPolicy {
    ServerPolicy { extended_headers, ..ServerPolicy::default() }
}

fn goals() -> [ClientGoal; 5] {
    let plain =
        ConnectRequest { structured_replies: false, extended_headers: false, ..ConnectRequest::new("disk") };
    let mut many = ConnectRequest::new("disk");
    many.meta_contexts.push(MetaContext::DirtyBitmap("b0".into()));
    [
        ClientGoal::Connect(ConnectRequest::new("disk")),
        ClientGoal::Connect(plain),
        ClientGoal::Connect(many),
        ClientGoal::List,
        ClientGoal::Describe,
    ]
}

/// Whole handshakes that go well: what the client sent, what the server sent.
fn handshakes() -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all = Vec::new();
    for (goal, extended) in goals().into_iter().flat_map(|goal| [(goal.clone(), false), (goal, true)]) {
        let (mut server, mut client) = (ServerHandshake::new(policy(extended)), ClientHandshake::new(goal));
        let (mut sent, mut answered) = (Vec::new(), Vec::new());
        let (mut heard, mut read) = (0, 0);
        for _ in 0..200 {
            if let Ok(step) = server.advance(&sent[heard..], &Exports, &mut answered) {
                heard += step.consumed;
            }
            match client.advance(&answered[read..], &mut sent) {
                Ok(step) => {
                    read += step.consumed;
                    if !matches!(step.progress, ClientProgress::NeedInput | ClientProgress::Again) {
                        break;
                    }
                }
                Err(error) => panic!("a handshake that makes sense fails: {error}"),
            }
        }
        all.push((sent, answered));
    }
    all
}

/// More of the input arrives; false if all of it has.
fn arrive(rng: &mut Rng, arrived: &mut usize, all: usize) -> bool {
    let left = all - *arrived;
    *arrived += if left == 0 { 0 } else { 1 + rng.below(left as u64) as usize };
    left > 0
}

fn hear_client(input: &[u8], rng: &mut Rng) -> u64 {
    let mut server = ServerHandshake::new(policy(rng.below(2) == 0));
    let (mut at, mut arrived, mut way) = (0, 0, Way::default());
    for calls in 0.. {
        assert!(calls < 20_000, "it comes to no end");
        let mut out = Vec::new();
        let result = server.advance(&input[at..arrived], &Exports, &mut out);
        assert!(out.len() < 16 << 10, "{} bytes for one message", out.len());
        match result {
            Err(error) => {
                way.said(error);
                break;
            }
            Ok(step) => {
                at += step.consumed;
                assert!(at <= arrived);
                way.said(&step.progress);
                match step.progress {
                    ServerProgress::Ready(negotiated) => {
                        way.said(negotiated.style);
                        break;
                    }
                    ServerProgress::Abort => break,
                    ServerProgress::Again => {}
                    ServerProgress::NeedInput => {
                        assert!(arrived - at < server.input_bytes_max(), "more is kept than may be");
                        if !arrive(rng, &mut arrived, input.len()) {
                            break;
                        }
                    }
                }
            }
        }
    }
    way.number()
}

fn hear_server(input: &[u8], rng: &mut Rng) -> u64 {
    let goals = goals();
    let mut client = ClientHandshake::new(goals[rng.below(goals.len() as u64) as usize].clone());
    let (mut at, mut arrived, mut way, mut out) = (0, 0, Way::default(), Vec::new());
    for calls in 0.. {
        assert!(calls < 20_000, "it comes to no end");
        match client.advance(&input[at..arrived], &mut out) {
            Err(error) => {
                way.said(error);
                break;
            }
            Ok(step) => {
                at += step.consumed;
                assert!(at <= arrived);
                way.said(&step.progress);
                match step.progress {
                    ClientProgress::Ready(negotiated) => {
                        assert!(negotiated.payload_bytes_max() > 0);
                        break;
                    }
                    ClientProgress::Listed(_) | ClientProgress::Described(_) => break,
                    ClientProgress::Again => {}
                    ClientProgress::NeedInput if !arrive(rng, &mut arrived, input.len()) => break,
                    ClientProgress::NeedInput => {}
                }
            }
        }
        assert!(out.len() < 64 << 10, "a client talks and talks");
    }
    way.number()
}

fn cut_requests(input: &[u8], rng: &mut Rng) -> u64 {
    let style = STYLES[rng.below(3) as usize];
    let rules = RequestRules {
        style,
        flags: TransmissionFlags(rng.next_u64() as u16),
        size_bytes: rng.next_u64() >> (1 + rng.below(50)),
        minimum_block_bytes: 1 << rng.below(17),
        payload_bytes_max: rng.next_u64() as u32,
        has_contexts: rng.below(2) == 0,
    };
    let (mut rest, mut way) = (input, Way::default());
    way.said(style);
    loop {
        match parse_request(rest, style) {
            Err(error) => {
                way.said(error);
                break;
            }
            Ok(None) => {
                assert!(rest.len() < RequestHeader::bytes(style));
                break;
            }
            Ok(Some((request, bytes))) => {
                assert_eq!(bytes, RequestHeader::bytes(style));
                let verdict = request.check(&rules);
                way.said(request.command);
                way.said(verdict);
                let ranged = [Command::Read, Command::Write, Command::Trim, Command::WriteZeroes];
                if verdict.is_ok() && ranged.contains(&request.command) {
                    let end = request.offset.checked_add(request.length);
                    assert!(end.is_some_and(|end| end <= rules.size_bytes), "{request:?} of {rules:?}");
                }
                let payload = request.payload_bytes(style);
                assert!(payload <= 64 << 20);
                // Written again it is what was read, as far as the style can say it.
                if let (Ok(head), false) =
                    (request.write(style), matches!(request.command, Command::Unknown(_)))
                {
                    let again = parse_request(&head, style);
                    assert!(matches!(again, Ok(Some((other, _))) if other.cookie == request.cookie));
                }
                rest = &rest[bytes..];
                rest = rest.get(payload as usize..).unwrap_or_default();
            }
        }
    }
    way.number()
}

/// Takes one reply in, as a client does; bytes beyond its end are left.
fn take_reply(
    input: &[u8],
    request: &RequestHeader,
    style: HeaderStyle,
    way: &mut Way,
) -> Result<(), ProtocolError> {
    let selected = [(1, MetaContext::BaseAllocation)];
    let mut pending = PendingReply::new(request, style, selected.len());
    let mut buffer = vec![0; request.length as usize];
    let mut rest = input;
    let lost = || ProtocolError::Truncated { what: "stream" };
    loop {
        let (header, bytes) = parse_reply(rest, style, 1 << 16)?.ok_or_else(lost)?;
        rest = &rest[bytes..];
        let body = pending.header(&header)?;
        way.said(body);
        let mut take = |length: usize| {
            let (head, tail) = rest.split_at_checked(length).ok_or_else(lost)?;
            rest = tail;
            Ok::<_, ProtocolError>(head)
        };
        match body {
            ReplyBody::Empty => {}
            ReplyBody::WholeData { length } => buffer.copy_from_slice(take(length as usize)?),
            ReplyBody::Data { length } => {
                let offset = parse_data_offset(take(DATA_OFFSET_BYTES as usize)?).ok_or_else(lost)?;
                let at = pending.data(offset, length)? as usize;
                buffer[at..at + length as usize].copy_from_slice(take(length as usize)?);
            }
            ReplyBody::Hole { length } => {
                let (offset, length) = parse_hole(take(length as usize)?)?;
                let at = pending.hole(offset, length)? as usize;
                buffer[at..at + length as usize].fill(0);
            }
            ReplyBody::Status { kind, length } => {
                pending.status(&parse_block_status(kind, take(length as usize)?)?, &selected)?;
            }
            ReplyBody::Error { kind, length } => {
                pending.error(kind, &parse_error(kind, take(length as usize)?)?)?;
            }
        }
        if let Some(outcome) = pending.outcome()? {
            way.said(outcome);
            return Ok(());
        }
    }
}

const COOKIE: u64 = 0x0102_0304_0506_0708;

fn asked(command: Command) -> RequestHeader {
    RequestHeader { flags: CommandFlags::EMPTY, command, cookie: COOKIE, offset: 8192, length: 1024 }
}

const COMMANDS: [Command; 3] = [Command::Read, Command::BlockStatus, Command::Write];

/// Replies that make sense, each behind a byte that tells its style and one that tells its request.
fn replies() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (s, style) in STYLES.into_iter().enumerate() {
        for (c, command) in COMMANDS.into_iter().enumerate() {
            let request = asked(command);
            let reply = request.reply(style);
            let mut bytes = vec![s as u8, c as u8];
            match command {
                Command::Read => {
                    let half = if style.has_chunks() { 512 } else { 1024 };
                    bytes.extend_from_slice(&reply.data(8192, half, false));
                    bytes.extend(vec![7; half as usize]);
                    bytes.extend(reply.hole(8704, 512, true).iter().flat_map(|head| head.to_vec()));
                }
                Command::BlockStatus => {
                    let extents =
                        [StatusExtent { length: 512, flags: 3 }, StatusExtent { length: 512, flags: 0 }];
                    let _ = reply.block_status(1, &extents, true, &mut bytes);
                }
                _ => bytes.extend_from_slice(&reply.success()),
            }
            all.push(bytes);
            let mut failed = vec![s as u8, c as u8];
            reply.failure_at(blockferry::protocol::nbd::NbdErrno::Io, "Gone.", 8192, false, &mut failed);
            reply.failure(blockferry::protocol::nbd::NbdErrno::NoSpace, "No room.", &mut failed);
            all.push(failed);
        }
    }
    all
}

fn hear_reply(input: &[u8], _: &mut Rng) -> u64 {
    let [style, command, rest @ ..] = input else { return 0 };
    let style = STYLES[usize::from(*style) % STYLES.len()];
    let request = asked(COMMANDS[usize::from(*command) % COMMANDS.len()]);
    let mut way = Way::default();
    way.said(style);
    if let Err(error) = take_reply(rest, &request, style, &mut way) {
        way.said(error);
    }
    way.number()
}

#[test]
fn a_server_survives_its_clients_handshakes() {
    let seeds = handshakes().into_iter().map(|(sent, _)| sent).collect();
    assert!(fuzz("client to server", seeds, hear_client) > 20);
}

#[test]
fn a_client_survives_its_servers_handshakes() {
    let seeds = handshakes().into_iter().map(|(_, answered)| answered).collect();
    assert!(fuzz("server to client", seeds, hear_server) > 20);
}

#[test]
fn a_server_survives_requests() {
    let mut seeds = Vec::new();
    for style in STYLES {
        let mut bytes = Vec::new();
        for command in (0..8).map(Command::from_wire) {
            let request = RequestHeader { length: 8, ..asked(command) };
            bytes.extend(request.write(style).iter().flat_map(|head| head.to_vec()));
            bytes.extend(vec![1; request.payload_bytes(style) as usize]);
        }
        seeds.push(bytes);
    }
    assert!(fuzz("requests", seeds, cut_requests) > 50);
}

#[test]
fn a_client_survives_replies() {
    assert!(fuzz("replies", replies(), hear_reply) > 50);
}
