//! Planning: what a request means in terms of places, from the tables that are in memory.
//!
//! Pure functions. They are given a way to look an L2 entry up, which may say "load this first".

use super::entry::{Cluster, Raw, subclusters_touched};
use super::geometry::{Geometry, SUBCLUSTERS};
use super::meta::{Damage, Known};

/// Where bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this offset of the file with the data.
    Data(u64),
    /// They are zeroes, and this layer says so; `host`: there is a place for them.
    Zero {
        /// Where it is.
        host: Option<u64>,
    },
    /// In the layer below.
    Below,
    /// In a compressed cluster.
    Compressed {
        /// Where it begins.
        host: u64,
        /// Bytes to the end of its last sector.
        len: u64,
        /// The first byte of the piece within the cluster.
        skip: u64,
    },
}

/// Bytes of the disk that are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) len: u64,
    pub(super) place: Place,
}

/// What is said of an image that does not change while it is planned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) g: Geometry,
    /// Data lies in another file.
    pub(super) data_file: bool,
}

impl Frame {
    fn decode(&self, raw: Raw, offset: u64) -> Result<Cluster, Damage> {
        raw.decode(&self.g, self.data_file)
            .map_err(|error| Damage(format!("the L2 entry for offset {offset:#x} of the disk: {error}")))
    }

    /// The first piece of `from..to`, as long as it can be told without loading anything; `to > from`.
    /// `lookup` gives the entry of the cluster with a byte, `None` where there is no L2 table.
    pub(super) fn next_piece(
        &self,
        mut lookup: impl FnMut(u64) -> Result<Known<Option<Raw>>, Damage>,
        from: u64,
        to: u64,
    ) -> Result<Known<Piece>, Damage> {
        let mut found: Option<Piece> = None;
        let mut at = from;
        while at < to {
            let raw = match lookup(at)? {
                Known::Load(slice) if found.is_none() => return Ok(Known::Load(slice)),
                Known::Load(_) => break,
                Known::Yes(raw) => raw,
            };
            let piece = match raw {
                // Nothing is mapped up to where the next L2 table begins.
                None => {
                    let next = (self.g.l1_index(at) + 1).saturating_mul(self.g.l2_covers());
                    Piece { len: next.min(to) - at, place: Place::Below }
                }
                Some(raw) => {
                    let cluster = self.decode(raw, at)?;
                    self.piece_of(cluster, at, to.min(self.g.cluster_start(at) + self.g.cluster_size()))
                }
            };
            found = Some(match found {
                None => piece,
                Some(first) => match join(first, piece) {
                    Some(joined) => joined,
                    None => break,
                },
            });
            at += piece.len;
        }
        Ok(Known::Yes(found.unwrap_or(Piece { len: 0, place: Place::Below })))
    }

    /// The first piece of `from..to`, which lies in one cluster.
    fn piece_of(&self, cluster: Cluster, from: u64, to: u64) -> Piece {
        let skip = self.g.in_cluster(from);
        let whole = |place| Piece { len: to - from, place };
        match cluster {
            Cluster::Unallocated => whole(Place::Below),
            Cluster::Zero => whole(Place::Zero { host: None }),
            Cluster::ZeroAt { host, .. } => whole(Place::Zero { host: Some(host + skip) }),
            Cluster::Data { host, .. } => whole(Place::Data(host + skip)),
            Cluster::Compressed { host, len } => whole(Place::Compressed { host, len, skip }),
            Cluster::Sub { host, has_host, data, zero, .. } => {
                let unit = self.g.unit_size();
                let state = |index: u64| (data >> index & 1, zero >> index & 1);
                let first = skip / unit;
                let run = (first..u64::from(SUBCLUSTERS)).take_while(|i| state(*i) == state(first)).count();
                let end = self.g.cluster_start(from) + (first + run as u64) * unit;
                let place = match state(first) {
                    (1, _) => Place::Data(host + skip),
                    (_, 1) => Place::Zero { host: has_host.then_some(host + skip) },
                    _ => Place::Below,
                };
                Piece { len: end.min(to) - from, place }
            }
        }
    }

    /// What writing bytes `from..to` of the cluster that begins at `start` takes.
    pub(super) fn write(
        &self,
        raw: Option<Raw>,
        start: u64,
        from: u64,
        to: u64,
    ) -> Result<WriteStep, Damage> {
        let cluster = self.decode(raw.unwrap_or(Raw::UNALLOCATED), start)?;
        let (data, zero) = cluster.masks();
        let Some((host, true)) = cluster.host() else {
            return Ok(WriteStep::New(cluster));
        };
        let touched = if self.g.subclusters {
            subclusters_touched(&self.g, from - start, to - start)
        } else {
            u32::MAX
        };
        if data & touched == touched {
            return Ok(WriteStep::InPlace(host));
        }
        let after = if self.g.subclusters {
            Raw::sub(host, data | touched, zero & !touched)
        } else {
            Raw::data(&self.g, host)
        };
        Ok(WriteStep::Fill { host, after })
    }
}

/// Two neighbours as one, if they are in one place.
fn join(first: Piece, second: Piece) -> Option<Piece> {
    let place = match (first.place, second.place) {
        (Place::Data(a), Place::Data(b)) if a.checked_add(first.len) == Some(b) => first.place,
        (Place::Zero { host: None }, Place::Zero { host: None }) => first.place,
        (Place::Zero { host: Some(a) }, Place::Zero { host: Some(b) }) if a + first.len == b => first.place,
        (Place::Below, Place::Below) => first.place,
        _ => return None,
    };
    Some(Piece { len: first.len + second.len, place })
}

/// What writing to a cluster takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteStep {
    /// The bytes go to their place in the cluster of the file at this offset.
    InPlace(u64),
    /// There is a place; the bytes and what they do not cover of their units go there, then this is published.
    Fill {
        /// The cluster of the file.
        host: u64,
        /// The entry afterwards.
        after: Raw,
    },
    /// A new place is needed. What the cluster held is given.
    New(Cluster),
}

#[cfg(test)]
mod tests {
    use super::super::entry::Raw;
    use super::*;
    use crate::base::rng::Rng;

    fn frame(subclusters: bool) -> Frame {
        let g = Geometry { cluster_bits: 14, refcount_order: 4, subclusters };
        Frame { g, data_file: false }
    }

    /// A random entry, and the place of each of its units by definition.
    fn entry(g: &Geometry, rng: &mut Rng, hosts: &mut u64) -> Raw {
        // Some clusters follow their predecessor in the file.
        *hosts += g.cluster_size() * (1 + rng.below(2));
        match rng.below(if g.subclusters { 7 } else { 5 }) {
            0 => Raw::UNALLOCATED,
            1 => Raw::zero(g),
            2 => Raw::zero_at(g, *hosts),
            3 => Raw::data(g, *hosts),
            4 => Raw::compressed(g, *hosts + 77, 500).unwrap(),
            _ => {
                let data = rng.next_u64() as u32 & rng.next_u64() as u32;
                Raw::sub(*hosts, data, rng.next_u64() as u32 & !data)
            }
        }
    }

    #[test]
    fn pieces_agree_with_each_byte_by_itself() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let frame = frame(seed % 2 == 0);
            let (g, mut hosts) = (frame.g, 1 << 20);
            let table: Vec<Raw> = (0..16).map(|_| entry(&g, &mut rng, &mut hosts)).collect();
            let len = 16 * g.cluster_size();
            let missing = rng.below(20);
            let lookup = |at: u64| {
                let index = at >> g.cluster_bits;
                Ok(if index == missing {
                    Known::Load(index)
                } else {
                    Known::Yes(Some(table[index as usize]))
                })
            };
            let single = |at: u64| match frame.next_piece(lookup, at, at + 1) {
                Ok(Known::Yes(piece)) => Some(piece.place),
                _ => None,
            };
            for _ in 0..50 {
                let from = rng.below(len - 1);
                let to = from + 1 + rng.below(len - from);
                let Known::Yes(piece) = frame.next_piece(lookup, from, to).unwrap() else {
                    assert_eq!(from >> g.cluster_bits, missing);
                    continue;
                };
                assert!(piece.len > 0 && from + piece.len <= to);
                for at in [from, from + piece.len / 2, from + piece.len - 1] {
                    let wanted = match piece.place {
                        Place::Data(host) => Place::Data(host + at - from),
                        Place::Zero { host: Some(host) } => Place::Zero { host: Some(host + at - from) },
                        Place::Compressed { host, len, skip } => {
                            Place::Compressed { host, len, skip: skip + at - from }
                        }
                        other => other,
                    };
                    assert_eq!(single(at), Some(wanted), "seed {seed} at {at}");
                }
                // It is as long as it can be.
                let end = from + piece.len;
                if end < to && end >> g.cluster_bits != missing {
                    let next = Piece { len: 1, place: single(end).unwrap() };
                    assert_eq!(join(piece, next), None, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn a_write_goes_in_place_only_where_all_of_it_is_data_of_its_own() {
        let (plain, sub) = (frame(false), frame(true));
        let (start, host) = (1 << 14, 1 << 20);
        let step =
            |f: &Frame, raw: Raw, from, to| f.write(Some(raw), start, start + from, start + to).unwrap();
        assert_eq!(step(&plain, Raw::data(&plain.g, host), 1, 2), WriteStep::InPlace(host));
        let shared = Raw { entry: host, bitmap: 0 };
        assert_eq!(step(&plain, shared, 1, 2), WriteStep::New(Cluster::Data { host, copied: false }));
        let after = Raw::data(&plain.g, host);
        assert_eq!(step(&plain, Raw::zero_at(&plain.g, host), 1, 2), WriteStep::Fill { host, after });
        assert_eq!(step(&plain, Raw::zero(&plain.g), 1, 2), WriteStep::New(Cluster::Zero));
        assert_eq!(step(&sub, Raw::sub(host, 0b11, 0b100), 0, 1024), WriteStep::InPlace(host));
        let after = Raw::sub(host, 0b111, 0);
        assert_eq!(step(&sub, Raw::sub(host, 0b11, 0b100), 600, 1025), WriteStep::Fill { host, after });
        assert_eq!(plain.write(None, start, start, start + 1), Ok(WriteStep::New(Cluster::Unallocated)));
    }
}
