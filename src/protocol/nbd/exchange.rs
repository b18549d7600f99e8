//! A client and a server exchange requests and replies, cut anywhere; and both are fed noise.
//!
//! The server answers reads in random pieces and orders, with holes and failures; the client has to end up with the
//! right bytes or the right error. A disk of bytes that are a function of their offset makes "right" easy to tell.

use super::conversation::Noise;
use super::*;

const BLOCK: u64 = 512;

/// Every third block reads as zeroes.
fn byte_at(offset: u64) -> u8 {
    if (offset / BLOCK).is_multiple_of(3) { 0 } else { (offset % 251) as u8 }
}

/// Answers a read: all at once, or block by block in any order, or with a failure.
fn serve_read(request: &RequestHeader, style: HeaderStyle, noise: &mut Noise, out: &mut Vec<u8>) {
    let reply = request.reply(style);
    let data = |from: u64, length: u64| (from..from + length).map(byte_at);
    if noise.chance(8) {
        return reply.failure(NbdErrno::Io, "The disk has gone.", out);
    }
    if !style.has_chunks() || request.flags.contains(CommandFlags::DF) {
        out.extend_from_slice(&reply.data(request.offset, request.length as u32, true));
        return out.extend(data(request.offset, request.length));
    }
    let mut blocks: Vec<u64> =
        (0..request.length / BLOCK).map(|block| request.offset + block * BLOCK).collect();
    if noise.chance(2) {
        for at in (1..blocks.len()).rev() {
            blocks.swap(at, noise.below(at as u64 + 1) as usize);
        }
    }
    let broken = noise.chance(8);
    for offset in blocks {
        if (offset / BLOCK).is_multiple_of(3) {
            out.extend_from_slice(&reply.hole(offset, BLOCK as u32, false).unwrap());
        } else {
            out.extend_from_slice(&reply.data(offset, BLOCK as u32, false));
            out.extend(data(offset, BLOCK));
        }
        if broken {
            reply.failure_at(NbdErrno::NoMemory, "", offset, false, out);
        }
    }
    out.extend_from_slice(&reply.end().unwrap());
}

struct Received {
    outcome: Result<(), NbdErrno>,
    buffer: Vec<u8>,
    /// Bytes behind the reply.
    left: usize,
}

/// What the client makes of one reply that has arrived whole.
fn receive(stream: &[u8], request: &RequestHeader, style: HeaderStyle) -> Result<Received, ProtocolError> {
    let selected = [(1, MetaContext::BaseAllocation)];
    let mut pending = PendingReply::new(request, style, selected.len());
    let mut buffer = vec![0xee; request.length.min(1 << 16) as usize];
    let mut rest = stream;
    let lost = || ProtocolError::Truncated { what: "stream" };
    loop {
        let (header, size) = parse_reply(rest, style, 1 << 16)?.ok_or_else(lost)?;
        rest = &rest[size..];
        let mut take = |length: usize| {
            let (head, tail) = rest.split_at_checked(length).ok_or_else(lost)?;
            rest = tail;
            Ok::<_, ProtocolError>(head)
        };
        match pending.header(&header)? {
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
            return Ok(Received { outcome, buffer, left: rest.len() });
        }
    }
}

fn random_request(noise: &mut Noise, command: Command) -> RequestHeader {
    RequestHeader {
        flags: CommandFlags::EMPTY.set(CommandFlags::DF, command == Command::Read && noise.chance(3)),
        command,
        cookie: noise.next(),
        offset: noise.below(1 << 40) * BLOCK,
        length: (1 + noise.below(16)) * BLOCK,
    }
}

fn random_style(noise: &mut Noise) -> HeaderStyle {
    [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended][noise.below(3) as usize]
}

#[test]
fn reads_end_with_the_right_bytes_or_the_right_error() {
    let (mut good, mut bad) = (0, 0);
    for seed in 0..2000 {
        let mut noise = Noise::new(seed);
        let style = random_style(&mut noise);
        let sent = random_request(&mut noise, Command::Read);
        let bytes = sent.write(style).unwrap();
        let (request, _) = parse_request(&bytes, style).unwrap().unwrap();
        assert_eq!(request, sent);
        let mut stream = Vec::new();
        serve_read(&request, style, &mut noise, &mut stream);
        let Received { outcome, buffer, left } = receive(&stream, &sent, style).unwrap();
        assert_eq!(left, 0);
        match outcome {
            Ok(()) => {
                let right: Vec<u8> = (sent.offset..sent.offset + sent.length).map(byte_at).collect();
                assert!(buffer == right, "seed {seed}");
                good += 1;
            }
            Err(errno) => {
                assert!(matches!(errno, NbdErrno::Io | NbdErrno::NoMemory));
                bad += 1;
            }
        }
        for cut in [0, stream.len() / 3, stream.len() / 2, stream.len() - 1] {
            assert!(receive(&stream[..cut], &sent, style).is_err(), "seed {seed}: a cut reply is no reply");
        }
    }
    assert!(good > 1000 && bad > 200, "{good} {bad}");
}

#[test]
fn a_damaged_reply_never_panics_and_never_leaves_the_buffer() {
    let mut refused = 0;
    for seed in 0..20_000 {
        let mut noise = Noise::new(seed);
        let style = random_style(&mut noise);
        let command = [Command::Read, Command::BlockStatus, Command::Write][noise.below(3) as usize];
        let request = random_request(&mut noise, command);
        let mut stream = Vec::new();
        let extents =
            [StatusExtent { length: BLOCK, flags: 3 }, StatusExtent { length: 5 * BLOCK, flags: 0 }];
        match command {
            Command::Read => serve_read(&request, style, &mut noise, &mut stream),
            Command::BlockStatus if style.has_chunks() => {
                request.reply(style).block_status(1, &extents, true, &mut stream).unwrap();
            }
            _ => stream.extend_from_slice(&request.reply(style).success()),
        }
        // Damage where the headers are, most of the time.
        for _ in 0..1 + noise.below(3) {
            let reach = if noise.chance(4) { stream.len() } else { stream.len().min(48) };
            let at = noise.below(reach as u64) as usize;
            stream[at] =
                if noise.chance(2) { noise.next() as u8 } else { stream[at] ^ (1 << noise.below(8)) };
        }
        refused += usize::from(receive(&stream, &request, style).is_err());
    }
    assert!(refused > 5000, "{refused}");
}

#[test]
fn noise_never_panics_the_parsers() {
    for seed in 0..20_000 {
        let mut noise = Noise::new(seed);
        let style = random_style(&mut noise);
        let magic = [
            REQUEST_MAGIC,
            EXTENDED_REQUEST_MAGIC,
            SIMPLE_REPLY_MAGIC,
            STRUCTURED_REPLY_MAGIC,
            EXTENDED_REPLY_MAGIC,
        ][noise.below(5) as usize];
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend((0..noise.below(60)).map(|_| if noise.chance(2) { 0 } else { noise.next() as u8 }));
        if let Ok(Some((request, size))) = parse_request(&bytes, style) {
            assert_eq!(size, RequestHeader::bytes(style));
            assert!(request.payload_bytes(style) <= REQUEST_PAYLOAD_BYTES_MAX.into());
            let rules = RequestRules {
                style,
                flags: TransmissionFlags(noise.next() as u16),
                size_bytes: noise.next() >> 1,
                minimum_block_bytes: 1 << noise.below(17),
                payload_bytes_max: noise.next() as u32,
                has_contexts: noise.chance(2),
            };
            if request.check(&rules).is_ok() && request.command == Command::Read {
                assert!(request.offset + request.length <= rules.size_bytes);
            }
        }
        if let Ok(Some((ReplyHeader::Chunk { kind, length, .. }, _))) = parse_reply(&bytes, style, 1 << 16) {
            assert!(length <= 8 + 16 * STATUS_EXTENTS_MAX, "{kind:?} {length}");
        }
        let payload = &bytes[4..];
        let kind = ChunkCode::from_wire(noise.next() as u16);
        let _ = (parse_hole(payload), parse_error(kind, payload), parse_data_offset(payload));
        let _ = parse_error(ChunkCode::ErrorOffset, payload);
        for kind in [ChunkCode::BlockStatus, ChunkCode::BlockStatusExt] {
            let _ = parse_block_status(kind, payload).map(|status| status.extents().count());
        }
    }
}
