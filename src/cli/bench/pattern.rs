//! What the load generator writes, so that whatever it reads back says where it came from.
//!
//! A disk that answers quickly may still answer wrongly: it loses a write, keeps an older one, puts it at another
//! offset, or mixes two. To tell these apart, every 512-byte sector of a written block describes itself, and the rest
//! of it is noise that belongs to that description and to nothing else:
//!
//! | bytes | content (little-endian) |
//! |---|---|
//! | 0..8 | the letters `BFRYLOAD` |
//! | 8..16 | seed of the run |
//! | 16..24 | offset of the sector on the disk, in bytes |
//! | 24..32 | generation: the number of the write within the run, from 1 |
//! | 32..512 | noise from the project's generator, seeded with the three numbers |
//!
//! A sector is the unit because disks promise no more: of two writes of one block that are in flight together, some
//! sectors of either may stay. Noise does not compress and does not look like zeroes, so no layer can cheat.

use crate::base::limits::SECTOR_BYTES;
use crate::base::rng::Rng;

/// Bytes that describe themselves.
pub const SECTOR: usize = SECTOR_BYTES as usize;
const MAGIC: [u8; 8] = *b"BFRYLOAD";
const HEADER: usize = 32;

/// Which write a sector belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Seed of the run.
    pub seed: u64,
    /// Offset of the sector on the disk, in bytes.
    pub offset: u64,
    /// Number of the write within the run, from 1.
    pub generation: u64,
}

/// What a sector turns out to be when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A whole sector that some run wrote, maybe elsewhere.
    Stamped(Stamp),
    /// It begins like a sector of that write, and its noise is not that of it.
    Damaged(Stamp),
    /// Nothing but zeroes.
    Zeroes,
    /// Something that no load generator wrote.
    Foreign,
}

impl Stamp {
    /// The generator of the noise: each of the numbers moves all of it.
    fn noise(self) -> Rng {
        let far = |n: u64, odd: u64| n.wrapping_mul(odd).rotate_left(29);
        Rng::new(
            self.seed
                ^ far(self.offset / SECTOR_BYTES, 0x9e6c_63d0_876a_9a7b)
                ^ far(self.generation, 0xd6e8_feb8_6659_fd93),
        )
    }

    fn write(self, sector: &mut [u8]) {
        sector[..8].copy_from_slice(&MAGIC);
        sector[8..16].copy_from_slice(&self.seed.to_le_bytes());
        sector[16..24].copy_from_slice(&self.offset.to_le_bytes());
        sector[24..HEADER].copy_from_slice(&self.generation.to_le_bytes());
        self.noise().fill(&mut sector[HEADER..]);
    }
}

/// Fills `block`, a whole number of sectors, with the write `generation` to the disk's bytes from `offset` on.
pub fn fill(block: &mut [u8], seed: u64, offset: u64, generation: u64) {
    for (sector, offset) in block.chunks_exact_mut(SECTOR).zip((offset..).step_by(SECTOR)) {
        Stamp { seed, offset, generation }.write(sector);
    }
}

/// Tells what one sector is. Anything shorter than a sector is foreign.
pub fn identify(sector: &[u8]) -> Content {
    let Some(head) = sector.first_chunk::<HEADER>().filter(|_| sector.len() == SECTOR) else {
        return Content::Foreign;
    };
    if head[..8] != MAGIC {
        return if crate::base::zero::is_zero(sector) { Content::Zeroes } else { Content::Foreign };
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let stamp = Stamp { seed: number(8), offset: number(16), generation: number(24) };
    let mut noise = stamp.noise();
    let mut words = sector[HEADER..].chunks_exact(8);
    if words.all(|word| word == noise.next_u64().to_le_bytes()) {
        Content::Stamped(stamp)
    } else {
        Content::Damaged(stamp)
    }
}

/// The first sector of `block` that should not be there: its offset on the disk, and what it is. Good is a sector of
/// this run, at its place, of a generation that `allowed` accepts.
pub fn find_stranger(
    block: &[u8],
    seed: u64,
    offset: u64,
    mut allowed: impl FnMut(u64) -> bool,
) -> Option<(u64, Content)> {
    let sectors = block.chunks(SECTOR).zip((offset..).step_by(SECTOR));
    sectors.map(|(sector, offset)| (offset, identify(sector))).find(|&(offset, content)| match content {
        Content::Stamped(stamp) => stamp.seed != seed || stamp.offset != offset || !allowed(stamp.generation),
        _ => true,
    })
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Content::Stamped(stamp) => write!(
                f,
                "write {} of the run with seed {} to offset {}",
                stamp.generation, stamp.seed, stamp.offset
            ),
            Content::Damaged(stamp) => write!(
                f,
                "the damaged remains of write {} of the run with seed {} to offset {}",
                stamp.generation, stamp.seed, stamp.offset
            ),
            Content::Zeroes => f.write_str("zeroes"),
            Content::Foreign => f.write_str("bytes that no load generator wrote"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sector_of_a_block_says_where_it_belongs() {
        let mut block = vec![0; 4096];
        fill(&mut block, 7, 8192, 3);
        for (i, sector) in block.chunks(SECTOR).enumerate() {
            let stamp = Stamp { seed: 7, offset: 8192 + 512 * i as u64, generation: 3 };
            assert_eq!(identify(sector), Content::Stamped(stamp));
        }
        assert_eq!(find_stranger(&block, 7, 8192, |generation| generation == 3), None);
    }

    #[test]
    fn no_lone_bit_goes_unseen() {
        let mut block = vec![0; SECTOR];
        fill(&mut block, 1, 0, 1);
        for bit in 0..SECTOR * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(find_stranger(&block, 1, 0, |generation| generation == 1).is_some(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn strangers_are_told_by_kind_and_place() {
        let mut block = vec![0; 2048];
        let find = |block: &[u8]| find_stranger(block, 1, 4096, |generation| generation >= 5);
        fill(&mut block, 1, 4096, 5);
        fill(&mut block[512..1024], 1, 4608, 6);
        assert_eq!(find(&block), None, "sectors of two writes that raced");
        let stale = Stamp { seed: 1, offset: 5120, generation: 4 };
        fill(&mut block[1024..1536], 1, 5120, 4);
        assert_eq!(find(&block), Some((5120, Content::Stamped(stale))));
        fill(&mut block[1024..1536], 1, 0, 9);
        assert_eq!(find(&block), Some((5120, Content::Stamped(Stamp { seed: 1, offset: 0, generation: 9 }))));
        fill(&mut block[1024..1536], 2, 5120, 5);
        assert!(matches!(find(&block), Some((5120, Content::Stamped(Stamp { seed: 2, .. })))));
        block[1024..1536].fill(0);
        assert_eq!(find(&block), Some((5120, Content::Zeroes)));
        block[1100] = 1;
        assert_eq!(find(&block), Some((5120, Content::Foreign)));
        assert_eq!(find(&block[..700]), Some((4608, Content::Foreign)), "a cut sector");
    }

    /// A saved image must be checkable by a later version.
    #[test]
    fn the_pattern_is_frozen() {
        let mut sector = [0; SECTOR];
        fill(&mut sector, 0x1122_3344_5566_7788, 512, 42);
        assert_eq!(
            &sector[..32],
            b"BFRYLOAD\x88\x77\x66\x55\x44\x33\x22\x11\0\x02\0\0\0\0\0\0\x2a\0\0\0\0\0\0\0"
        );
        assert_eq!(blake3::hash(&sector).to_hex()[..16], *"126bd33b81719690");
    }
}
