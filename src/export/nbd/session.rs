//! The parts of a session that need no I/O: cutting a stream into requests, how much of it to ask for, how much a
//! client may hold, how a large request is cut, and extents on their way into a reply.

use crate::base::limits;
use crate::block::Extent;
use crate::protocol::nbd::{HeaderStyle, ProtocolError, RequestHeader, StatusExtent, parse_request};

/// The longest request header.
const HEADER_BYTES_MAX: usize = 32;

/// Cuts a stream into request headers. Payloads are taken out by the caller.
#[derive(Debug)]
pub(super) struct RequestStream {
    style: HeaderStyle,
    /// The front of a header whose end has not come yet.
    front: [u8; HEADER_BYTES_MAX],
    front_len: usize,
}

impl RequestStream {
    pub(super) fn new(style: HeaderStyle) -> RequestStream {
        RequestStream { style, front: [0; HEADER_BYTES_MAX], front_len: 0 }
    }

    /// Nothing of a further request has come.
    pub(super) fn is_between_requests(&self) -> bool {
        self.front_len == 0
    }

    /// The next request, and how many bytes of `input` it took. `None`: all of `input` is taken, more is needed.
    pub(super) fn next(&mut self, input: &[u8]) -> Result<Option<(RequestHeader, usize)>, ProtocolError> {
        if self.front_len == 0 {
            if let Some(found) = parse_request(input, self.style)? {
                return Ok(Some(found));
            }
            // What is not enough for a header is shorter than one.
            self.front_len = input.len().min(HEADER_BYTES_MAX);
            self.front[..self.front_len].copy_from_slice(&input[..self.front_len]);
            return Ok(None);
        }
        let missing = RequestHeader::bytes(self.style) - self.front_len;
        let taken = missing.min(input.len());
        self.front[self.front_len..self.front_len + taken].copy_from_slice(&input[..taken]);
        self.front_len += taken;
        let parsed = parse_request(&self.front[..self.front_len], self.style)?;
        Ok(parsed.map(|(request, _)| {
            self.front_len = 0;
            (request, taken)
        }))
    }
}

/// How many bytes to ask for with the next receive.
///
/// Much at once saves calls while small writes come; a payload that lands in this memory must be copied out of it,
/// so when large writes come it is little; and idle clients should not sit on memory.
#[derive(Debug)]
pub(super) struct Window {
    bytes: usize,
    scanty: u32,
}

/// Receives in a row that used little of the window until it shrinks.
const SCANTY_MAX: u32 = 64;

impl Window {
    pub(super) fn new() -> Window {
        Window { bytes: limits::NBD_RECV_BYTES_MIN, scanty: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Learns from a receive: what it gave, and the largest payload among its requests.
    pub(super) fn learn(&mut self, received: usize, payload_bytes_max: u64) {
        if payload_bytes_max >= limits::NBD_REPLY_COPY_BYTES as u64 {
            *self = Window::new();
        } else if received >= self.bytes {
            *self = Window { bytes: limits::NBD_RECV_BYTES_MAX, scanty: 0 };
        } else if received > limits::NBD_RECV_BYTES_MIN {
            self.scanty = 0;
        } else {
            self.scanty += 1;
            if self.scanty >= SCANTY_MAX {
                *self = Window::new();
            }
        }
    }
}

/// Whether a client that holds `held_bytes` may take `bytes` more while `free_bytes` of the engine's memory are free.
///
/// The bound shrinks with the memory: nobody may hold more than is left free, so that `n` clients that all take what
/// they can, even stalled ones that never give it back, leave `1 / (n + 1)` of it to the next one. A client that holds
/// nothing may always take a piece.
pub(super) fn may_hold(held_bytes: u64, bytes: u64, bytes_max: u64, free_bytes: u64) -> bool {
    held_bytes == 0 || held_bytes + bytes <= bytes_max.min(free_bytes)
}

/// Cuts `length` bytes from `offset` on into pieces of at most `piece_bytes_max`: (offset, length).
pub(super) fn pieces(offset: u64, length: u64, piece_bytes_max: usize) -> impl Iterator<Item = (u64, usize)> {
    let max = piece_bytes_max as u64;
    (0..length.div_ceil(max)).map(move |i| (offset + i * max, (length - i * max).min(max) as usize))
}

/// Extents of `base:allocation` on their way into a reply.
#[derive(Debug)]
pub(super) struct Extents {
    list: Vec<StatusExtent>,
    list_max: usize,
    /// Bytes that are described.
    covered: u64,
}

impl Extents {
    /// `spare` lends its memory.
    pub(super) fn new(mut spare: Vec<StatusExtent>, list_max: usize) -> Extents {
        spare.clear();
        Extents { list: spare, list_max, covered: 0 }
    }

    pub(super) fn covered(&self) -> u64 {
        self.covered
    }

    /// Adds what follows; false when there was no room for it, and the list is complete.
    pub(super) fn add(&mut self, extent: Extent) -> bool {
        let told = StatusExtent::of(extent);
        let is_full = self.list.len() == self.list_max;
        match self.list.last_mut() {
            Some(last) if last.flags == told.flags => last.length += told.length,
            _ if is_full => return false,
            _ => self.list.push(told),
        }
        self.covered += extent.len;
        true
    }

    /// The same for an extent that may be as long as it likes, where `length` bytes are described in all.
    pub(super) fn add_within(&mut self, extent: Extent, length: u64) -> bool {
        let left = length - self.covered;
        left > 0 && self.add(Extent { len: extent.len.clamp(1, left), ..extent })
    }

    pub(super) fn list(&self) -> &[StatusExtent] {
        &self.list
    }

    pub(super) fn into_spare(self) -> Vec<StatusExtent> {
        self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::nbd::{Command, CommandFlags};

    fn header(cookie: u64) -> RequestHeader {
        RequestHeader {
            flags: CommandFlags::EMPTY,
            command: Command::Read,
            cookie,
            offset: 4096 * cookie,
            length: 512,
        }
    }

    #[test]
    fn any_cut_of_the_stream_gives_the_same_requests() {
        for style in [HeaderStyle::Structured, HeaderStyle::Extended] {
            let bytes: Vec<u8> =
                (0..3).flat_map(|cookie| header(cookie).write(style).unwrap().to_vec()).collect();
            for chunk in 1..=bytes.len() {
                let mut stream = RequestStream::new(style);
                let mut got = Vec::new();
                for part in bytes.chunks(chunk) {
                    let mut at = 0;
                    while let Some((request, taken)) = stream.next(&part[at..]).unwrap() {
                        at += taken;
                        got.push(request.cookie);
                    }
                }
                assert_eq!(got, [0, 1, 2], "pieces of {chunk} bytes");
                assert!(stream.is_between_requests());
            }
        }
    }

    #[test]
    fn rubbish_is_told_as_soon_as_its_magic_is_there() {
        let mut stream = RequestStream::new(HeaderStyle::Structured);
        assert_eq!(stream.next(b"GE"), Ok(None));
        assert!(!stream.is_between_requests());
        assert!(stream.next(b"T / HTTP/1.1").is_err());
    }

    #[test]
    fn the_window_follows_the_traffic() {
        let mut window = Window::new();
        window.learn(100, 0);
        assert_eq!(window.bytes(), limits::NBD_RECV_BYTES_MIN);
        window.learn(limits::NBD_RECV_BYTES_MIN, 4096);
        assert_eq!(window.bytes(), limits::NBD_RECV_BYTES_MAX);
        for _ in 0..SCANTY_MAX - 1 {
            window.learn(28, 0);
        }
        assert_eq!(window.bytes(), limits::NBD_RECV_BYTES_MAX);
        window.learn(28, 0);
        assert_eq!(window.bytes(), limits::NBD_RECV_BYTES_MIN);
        window.learn(limits::NBD_RECV_BYTES_MIN, 4096);
        window.learn(limits::NBD_RECV_BYTES_MAX, 1 << 20);
        assert_eq!(window.bytes(), limits::NBD_RECV_BYTES_MIN, "large payloads are not received in it");
    }

    #[test]
    fn greedy_clients_leave_room_for_the_next_one() {
        let (arena, piece) = (24u64 << 20, 64u64 << 10);
        for clients in 1..20 {
            let mut held = vec![0u64; clients];
            loop {
                let mut grown = false;
                for i in 0..clients {
                    let free = arena - held.iter().sum::<u64>();
                    if may_hold(held[i], piece, 16 << 20, free) {
                        held[i] += piece;
                        grown = true;
                    }
                }
                if !grown {
                    break;
                }
            }
            let free = arena - held.iter().sum::<u64>();
            assert!(free >= arena / (clients as u64 + 1) - piece, "{clients} clients left {free} bytes");
        }
        assert!(may_hold(0, 1 << 20, 1, 0) && !may_hold(1, 1 << 20, 1 << 20, 1 << 30));
    }

    #[test]
    fn pieces_cover_a_request() {
        let cut: Vec<_> = pieces(100, 2500, 1000).collect();
        assert_eq!(cut, [(100, 1000), (1100, 1000), (2100, 500)]);
        assert_eq!(pieces(7, 1000, 1000).collect::<Vec<_>>(), [(7, 1000)]);
        assert_eq!(pieces(7, 0, 1000).count(), 0);
    }

    #[test]
    fn equal_neighbours_become_one_extent() {
        let mut extents = Extents::new(Vec::new(), 2);
        assert!(extents.add(Extent::data(10)) && extents.add(Extent::data(20)));
        // Held by no layer, as far as this one knows: data for a client.
        assert!(extents.add(Extent { allocated: false, ..Extent::data(5) }));
        assert!(extents.add(Extent::hole(5)) && extents.add(Extent::hole(5)));
        assert!(!extents.add(Extent { allocated: true, ..Extent::hole(1) }), "a third extent has no room");
        assert_eq!(extents.covered(), 45);
        let list = extents.list();
        assert_eq!(list, [StatusExtent { length: 35, flags: 0 }, StatusExtent { length: 10, flags: 3 }]);
    }
}
