//! The end of a target whose format or transport counts in sectors.
//!
//! A disk may have any number of bytes; qcow2, and many servers, count in sectors of 512. A target that is as long as its
//! source but for that holds it: its disk ends where the sector ends, and what lies between is zero. Whatever is longer
//! than that is another length, which somebody has to want.

use std::rc::Rc;

use crate::base::planted::{Bug, is_planted};
use crate::block::{Driver, IoResult, ZeroFlags};

const SECTOR_BYTES: u64 = 512;

/// Whether these are lengths of the same disk, the second one where lengths are counted in sectors.
pub fn is_rounded(len: u64, rounded: u64) -> bool {
    rounded > len
        && !is_planted(Bug::RoundedIsLonger)
        && len.checked_next_multiple_of(SECTOR_BYTES) == Some(rounded)
}

/// Bytes that `target` has behind a source of `len` bytes, if it is of another length.
pub fn tail_of(len: u64, target: u64) -> u64 {
    if is_rounded(len, target) { 0 } else { target.saturating_sub(len) }
}

/// Makes what a target has behind the end of its source, for being counted in sectors, read as zeroes.
pub async fn zero_rest_of_sector(target: &Rc<dyn Driver>, len: u64) -> IoResult {
    if !is_rounded(len, target.len()) {
        return Ok(());
    }
    target.write_zeroes(len, target.len() - len, ZeroFlags::default()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rest_of_a_sector_is_no_other_length() {
        for (len, target, rounded, tail) in [
            (512, 512, false, 0),
            (1000, 1024, true, 0),
            (1, 512, true, 0),
            (1000, 1000, false, 0),
            (1000, 1536, false, 536),
            (512, 1024, false, 512),
            (1000, 1023, false, 23),
            (1000, 512, false, 0),
            (0, 512, false, 512),
            (u64::MAX, u64::MAX, false, 0),
        ] {
            assert_eq!((is_rounded(len, target), tail_of(len, target)), (rounded, tail), "{len} {target}");
        }
    }
}
