//! Discards and zeroings: requests of a few bytes that may change the entries of a hundred thousand clusters.
//!
//! A long one is made in pieces. Between two of them its client is looked at, and what one that has left had asked is
//! dropped there: each piece is a change of its own, which the disk has made whole. So many of a client and of an export
//! are worked on at a time; the others wait and cost nothing, however many there are. Pieces end at multiples of the
//! disk's units, so that a discard gives back what it would have in one go.

use std::rc::Rc;

use super::client::Client;
use super::quota::Ticket;
use super::request::answer;
use crate::base::limits::{
    NBD_CHANGE_PIECE_BYTES_MIN, NBD_CHANGE_PIECE_GROWTH_MAX, NBD_CHANGE_PIECE_NANOS, NBD_CHANGE_PIECE_UNITS,
    NBD_SHORT_CHANGE_BYTES, NBD_SHORT_CHANGE_UNITS,
};
use crate::block::{IoResult, ZeroFlags};
use crate::protocol::nbd::{CommandFlags, RequestHeader};

/// How long the pieces of a change are.
#[derive(Debug)]
struct Pieces {
    at: u64,
    end: u64,
    bytes_min: u64,
    bytes: u64,
}

impl Pieces {
    /// `None`: it is short.
    fn of(request: &RequestHeader, unit: u64) -> Option<Pieces> {
        if request.length <= (NBD_SHORT_CHANGE_UNITS * unit).max(NBD_SHORT_CHANGE_BYTES) {
            return None;
        }
        let bytes_min = (NBD_CHANGE_PIECE_UNITS * unit).max(NBD_CHANGE_PIECE_BYTES_MIN);
        // Of both the larger one is a multiple of the other, unless the unit is none of the usual ones.
        let bytes_min = bytes_min.next_multiple_of(unit);
        let end = request.offset.saturating_add(request.length);
        Some(Pieces { at: request.offset, end, bytes_min, bytes: bytes_min })
    }

    /// The next piece: offset and length.
    fn next(&mut self) -> Option<(u64, u64)> {
        let at = self.at;
        let limit = (at / self.bytes + 1).saturating_mul(self.bytes);
        self.at = self.end.min(limit);
        (self.at > at).then(|| (at, self.at - at))
    }

    /// Learns from how long the last one took.
    fn learn(&mut self, nanos: u64) {
        if nanos < NBD_CHANGE_PIECE_NANOS {
            self.bytes = (self.bytes * 2).min(self.bytes_min * NBD_CHANGE_PIECE_GROWTH_MAX);
        } else if nanos > 2 * NBD_CHANGE_PIECE_NANOS {
            self.bytes = (self.bytes / 2).max(self.bytes_min);
        }
    }
}

/// Makes a change, which `make` passes on for a part of its range, durable or not, and makes it durable if that was asked
/// for. `None`: its client has left, and nobody waits for an answer.
async fn make_change(
    client: &Client,
    request: &RequestHeader,
    make: impl AsyncFn(u64, u64, bool) -> IoResult,
) -> Option<IoResult> {
    let fua = request.flags.contains(CommandFlags::FUA);
    let limits = client.root.node().driver().limits();
    let unit = u64::from(limits.discard_align.max(limits.zero_align).max(1));
    let Some(mut pieces) = Pieces::of(request, unit) else {
        return Some(make(request.offset, request.length, fua).await);
    };
    // Given back in this order: whoever waits for the export is before those of one client who wait for it.
    let _one_of_client = client.quota.changes.take().await;
    let _one_of_export = client.quota.limits.changes_of_export.take().await;
    let mut is_durable = false;
    loop {
        if client.has_left() {
            return None;
        }
        let Some((at, len)) = pieces.next() else { break };
        // One flush for all pieces.
        is_durable = fua && len == request.length;
        let began = client.ring.clock();
        if let Err(error) = make(at, len, is_durable).await {
            return Some(Err(error));
        }
        pieces.learn(client.ring.clock() - began);
    }
    Some(if fua && !is_durable { client.heard.flush(&client.root).await } else { Ok(()) })
}

/// Gives space back.
pub(super) async fn trim(client: Rc<Client>, request: RequestHeader, ticket: Ticket) {
    client.heard.writes();
    let discard = async |at, len, fua| {
        client.root.discard(at, len).await?;
        if fua { client.heard.flush(&client.root).await } else { Ok(()) }
    };
    if let Some(result) = make_change(&client, &request, discard).await {
        answer(&client, &request, result, ticket).await;
    }
}

/// Makes a range read as zeroes.
pub(super) async fn write_zeroes(client: Rc<Client>, request: RequestHeader, ticket: Ticket) {
    let flags = ZeroFlags {
        fua: false,
        may_unmap: !request.flags.contains(CommandFlags::NO_HOLE),
        no_fallback: request.flags.contains(CommandFlags::FAST_ZERO),
    };
    client.heard.writes();
    let zero = async |at, len, fua| client.root.write_zeroes(at, len, ZeroFlags { fua, ..flags }).await;
    if let Some(result) = make_change(&client, &request, zero).await {
        answer(&client, &request, result, ticket).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::nbd::Command;

    fn request(offset: u64, length: u64) -> RequestHeader {
        RequestHeader { flags: CommandFlags::EMPTY, command: Command::Trim, cookie: 0, offset, length }
    }

    #[test]
    fn pieces_end_at_units_and_cover_the_request() {
        for unit in [1u64, 512, 4096, 65_536, 2 << 20, 3000] {
            let (offset, length) = (5_000, (1 << 33) + 77);
            let mut pieces = Pieces::of(&request(offset, length), unit).unwrap();
            let mut times = [1, NBD_CHANGE_PIECE_NANOS, 9 * NBD_CHANGE_PIECE_NANOS].iter().cycle();
            let mut end = offset;
            while let Some((at, len)) = pieces.next() {
                assert_eq!(at, end);
                end += len;
                assert!(end.is_multiple_of(unit) || end == offset + length, "{end} of {unit}");
                assert!(len <= pieces.bytes_min * NBD_CHANGE_PIECE_GROWTH_MAX);
                pieces.learn(*times.next().unwrap());
            }
            assert_eq!(end, offset + length);
        }
    }

    #[test]
    fn short_changes_are_made_at_once_and_quick_pieces_grow() {
        assert!(Pieces::of(&request(0, 64 << 10), 512).is_none());
        assert!(Pieces::of(&request(0, 4 << 20), 65_536).is_none());
        let mut pieces = Pieces::of(&request(0, 1 << 50), 65_536).unwrap();
        assert_eq!(pieces.next(), Some((0, 64 << 20)));
        (0..20).for_each(|_| pieces.learn(1));
        assert_eq!(pieces.next(), Some((64 << 20, (4 << 30) - (64 << 20))));
        (0..20).for_each(|_| pieces.learn(u64::MAX));
        assert_eq!(pieces.next(), Some((4 << 30, 64 << 20)));
    }
}
