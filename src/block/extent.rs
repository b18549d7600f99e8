//! What is known of a range of a disk without reading it.
//!
//! Every answer of this kind is an [`Extent`]: what a file's holes say, the tables of an image, a server. It says how a
//! range reads (zeroes for certain, or bytes), whether the layer that was asked has it, which layer decides, and on whose
//! word. `map` and `measure`, the jobs, comparing and what an export tells its clients all go by it.

use super::{BlockError, Driver};

/// On whose word a range reads as zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Word {
    /// This program's own: tables of an image say so, or the end of a disk.
    #[default]
    Own,
    /// A filesystem of this machine keeps a hole there.
    Filesystem,
    /// Another party's: a server, or a filesystem that lies on one. Whoever must be certain reads.
    Claim,
}

/// What is known of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the offset that was asked for; never 0, never more than was asked for.
    pub len: u64,
    /// Reads as zeroes for certain.
    pub zero: bool,
    /// Occupies space in this layer (for a layer with a backing file: hides what is below).
    pub allocated: bool,
    /// Who says that it is zero, if it is.
    pub word: Word,
    /// The layer that decides how it reads: 0 is the disk that was asked, 1 its backing file, and so on.
    pub depth: u32,
}

/// What a layer says of a range itself, whatever lies below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// It holds data.
    Data,
    /// It says that there are zeroes.
    Zero,
    /// Nothing: what lies below shows.
    Nothing,
}

impl Extent {
    /// Data, as far as is known.
    pub fn data(len: u64) -> Extent {
        Extent { len, zero: false, allocated: true, word: Word::Own, depth: 0 }
    }

    /// A hole that reads as zeroes.
    pub fn hole(len: u64) -> Extent {
        Extent { zero: true, allocated: false, ..Extent::data(len) }
    }

    /// Zeroes that the layer holds: they hide what is below.
    pub fn zero(len: u64) -> Extent {
        Extent { zero: true, ..Extent::data(len) }
    }

    /// The layer holds nothing there: what is below shows, and nobody has looked at it.
    pub fn nothing(len: u64) -> Extent {
        Extent { allocated: false, ..Extent::data(len) }
    }

    /// Whether it reads as zeroes, and not only because another party says so: nothing needs to be zeroed there.
    pub fn is_surely_zero(&self) -> bool {
        self.zero && self.word != Word::Claim
    }

    /// The same on somebody else's word.
    pub fn on(self, word: Word) -> Extent {
        Extent { word, ..self }
    }

    /// What a layer knows of its backing file, as the layer's own answer: it does not hold it itself.
    pub fn seen_from_above(self) -> Extent {
        Extent { allocated: false, depth: self.depth.saturating_add(1), ..self }
    }

    /// What the layer that was asked holds.
    pub fn holds(&self) -> Holds {
        match (self.allocated, self.zero) {
            (false, _) => Holds::Nothing,
            (true, true) => Holds::Zero,
            (true, false) => Holds::Data,
        }
    }
}

/// What a disk says of a range (not empty) that may lie beyond its end: there are zeroes.
pub async fn status_of(disk: &dyn Driver, offset: u64, len: u64) -> Result<Extent, BlockError> {
    match disk.len().checked_sub(offset).filter(|rest| *rest > 0) {
        Some(rest) => disk.block_status(offset, len.min(rest)).await,
        None => Ok(Extent::hole(len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_holds_what_hides_those_below() {
        let table = [
            (Extent::data(8), Holds::Data, false),
            (Extent::zero(8), Holds::Zero, true),
            (Extent::hole(8), Holds::Nothing, true),
            (Extent::nothing(8), Holds::Nothing, false),
            (Extent::data(8).seen_from_above(), Holds::Nothing, false),
            (Extent::hole(8).on(Word::Claim), Holds::Nothing, false),
        ];
        for (extent, holds, is_surely_zero) in table {
            assert_eq!((extent.holds(), extent.is_surely_zero()), (holds, is_surely_zero), "{extent:?}");
        }
        assert_eq!(Extent::hole(8).seen_from_above().seen_from_above().depth, 2);
    }
}
