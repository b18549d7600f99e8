//! A small table with the same two truths as a disk: what is seen, and what a power cut leaves.
//!
//! Directory entries and extended attributes are such tables. A change may concern several keys at
//! once (a rename) and is then durable for all of them or for none.

use std::collections::BTreeMap;

use crate::rng::Rng;

/// Keys and what they are set to; `None` removes.
pub(super) type Changes<K, V> = Vec<(K, Option<V>)>;

#[derive(Clone, Debug)]
pub(super) struct Ledger<K, V> {
    live: BTreeMap<K, V>,
    durable: BTreeMap<K, V>,
    pending: Vec<(u64, Changes<K, V>)>,
}

impl<K, V> Default for Ledger<K, V> {
    fn default() -> Ledger<K, V> {
        Ledger { live: BTreeMap::new(), durable: BTreeMap::new(), pending: Vec::new() }
    }
}

fn apply<K: Ord + Clone, V: Clone>(table: &mut BTreeMap<K, V>, changes: &Changes<K, V>) {
    for (key, value) in changes {
        match value {
            Some(value) => table.insert(key.clone(), value.clone()),
            None => table.remove(key),
        };
    }
}

impl<K: Ord + Clone, V: Clone> Ledger<K, V> {
    pub(super) fn live(&self) -> &BTreeMap<K, V> {
        &self.live
    }

    pub(super) fn durable(&self) -> &BTreeMap<K, V> {
        &self.durable
    }

    /// A change at event `now`.
    pub(super) fn change(&mut self, now: u64, changes: Changes<K, V>) {
        apply(&mut self.live, &changes);
        self.pending.push((now, changes));
    }

    /// Makes the changes durable that `pick` chooses. Older ones of the same keys are gone then.
    pub(super) fn settle(&mut self, mut pick: impl FnMut(u64, &Changes<K, V>) -> bool) {
        let mut kept: Vec<(u64, Changes<K, V>)> = Vec::new();
        for (now, changes) in std::mem::take(&mut self.pending) {
            if pick(now, &changes) {
                apply(&mut self.durable, &changes);
                for (_, older) in &mut kept {
                    older.retain(|(key, _)| changes.iter().all(|(newer, _)| newer != key));
                }
                kept.retain(|(_, older)| !older.is_empty());
            } else {
                kept.push((now, changes));
            }
        }
        self.pending = kept;
    }

    /// Keeps some of what was not durable; what is left is what is seen from now on.
    pub(super) fn power_cut(&mut self, keep_chance: u32, rand: &mut Rng) {
        self.settle(|_, _| rand.chance(keep_chance));
        self.pending.clear();
        self.live = self.durable.clone();
    }

    /// Values that some view can still reach.
    pub(super) fn reachable(&self) -> impl Iterator<Item = &V> {
        let pending =
            self.pending.iter().flat_map(|(_, changes)| changes).filter_map(|(_, value)| value.as_ref());
        self.live.values().chain(self.durable.values()).chain(pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_change_that_is_durable_ends_the_older_ones() {
        let mut rand = Rng::new(1);
        let mut names: Ledger<&str, u32> = Ledger::default();
        names.change(1, vec![("a", Some(1))]);
        names.change(2, vec![("a", None), ("b", Some(1))]);
        names.settle(|now, _| now == 2);
        assert_eq!(names.durable().iter().collect::<Vec<_>>(), [(&"b", &1)]);
        names.power_cut(65_536, &mut rand);
        assert_eq!(names.live().iter().collect::<Vec<_>>(), [(&"b", &1)]);
        names.change(3, vec![("c", Some(2))]);
        assert_eq!(names.reachable().filter(|v| **v == 2).count(), 2);
        names.power_cut(0, &mut rand);
        assert!(!names.live().contains_key("c"));
    }
}
