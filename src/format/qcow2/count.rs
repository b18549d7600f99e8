//! References counted: how often each cluster of the file is referred to. Sparse, and bounded.

use std::collections::BTreeMap;

/// Clusters of a chunk. No refcount block has fewer.
pub(super) const CHUNK: u64 = 64;
/// The most chunks: 4 GiB of memory for an image that is scattered on purpose, much less for all others.
const CHUNKS_MAX: usize = 1 << 24;

/// Counts by the number of the cluster.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
}

impl Counts {
    /// One more reference. False: there is no room to count it.
    pub(super) fn add(&mut self, cluster: u64) -> bool {
        self.add_many(cluster, 1)
    }

    /// So many more references.
    pub(super) fn add_many(&mut self, cluster: u64, times: u64) -> bool {
        let number = cluster / CHUNK;
        if !self.chunks.contains_key(&number) && self.chunks.len() >= CHUNKS_MAX {
            return false;
        }
        let chunk = self.chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK as usize]));
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(times.min(u32::MAX.into()) as u32);
        true
    }

    /// One less.
    pub(super) fn remove(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK)) {
            let count = &mut chunk[(cluster % CHUNK) as usize];
            *count = count.saturating_sub(1);
        }
    }

    /// All references to a cluster; they are forgotten.
    pub(super) fn take(&mut self, cluster: u64) -> u64 {
        let chunk = self.chunks.get_mut(&(cluster / CHUNK));
        chunk.map_or(0, |chunk| std::mem::take(&mut chunk[(cluster % CHUNK) as usize]).into())
    }

    /// References to this cluster and those behind it in its chunk, which it begins.
    pub(super) fn chunk(&self, first: u64) -> [u32; CHUNK as usize] {
        self.chunks.get(&(first / CHUNK)).map_or([0; CHUNK as usize], |chunk| **chunk)
    }

    /// References to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.chunks.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK) as usize].into())
    }

    /// Clusters with references, and how many each has.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().flat_map(|(number, chunk)| {
            let counted = chunk.iter().enumerate().filter(|(_, count)| **count > 0);
            counted.map(move |(at, count)| (number * CHUNK + at as u64, u64::from(*count)))
        })
    }

    /// The last cluster before `bound` with a reference.
    pub(super) fn last_before(&self, bound: u64) -> Option<u64> {
        let at_most = self.chunks.range(..bound.div_ceil(CHUNK)).rev();
        at_most
            .flat_map(|(number, chunk)| {
                (0..CHUNK).rev().filter(|at| chunk[*at as usize] > 0).map(move |at| number * CHUNK + at)
            })
            .find(|cluster| *cluster < bound)
    }

    /// One past the last cluster with a reference.
    pub(super) fn end(&self) -> u64 {
        for (number, chunk) in self.chunks.iter().rev() {
            if let Some(at) = chunk.iter().rposition(|count| *count > 0) {
                return number * CHUNK + at as u64 + 1;
            }
        }
        0
    }

    /// Numbers of blocks of `per_block` clusters with any reference.
    pub(super) fn blocks(&self, per_block: u64) -> Vec<u64> {
        let mut found: Vec<u64> = Vec::new();
        for (number, chunk) in &self.chunks {
            for at in (0..CHUNK).filter(|at| chunk[*at as usize] > 0) {
                let block = (number * CHUNK + at) / per_block;
                if found.last() != Some(&block) {
                    found.push(block);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_scattered_clusters() {
        let mut counts = Counts::default();
        assert_eq!((counts.end(), counts.get(5)), (0, 0));
        for cluster in [0, 0, 63, 64, 1_000_000] {
            assert!(counts.add(cluster));
        }
        assert_eq!((counts.get(0), counts.get(63), counts.get(64), counts.end()), (2, 1, 1, 1_000_001));
        assert_eq!((counts.last_before(0), counts.last_before(64)), (None, Some(63)));
        assert_eq!((counts.last_before(65), counts.last_before(1_000_000)), (Some(64), Some(64)));
        assert_eq!(counts.last_before(u64::MAX), Some(1_000_000));
        assert_eq!(counts.blocks(64), [0, 1, 15_625]);
        assert_eq!(counts.blocks(8), [0, 7, 8, 125_000]);
        assert!(counts.add_many(70, 3));
        assert_eq!((counts.chunk(64)[0], counts.chunk(64)[6], counts.chunk(128)[0]), (1, 3, 0));
        assert_eq!((counts.take(70), counts.take(70), counts.take(9999)), (3, 0, 0));
        counts.remove(1_000_000);
        assert_eq!(counts.end(), 65);
    }
}
