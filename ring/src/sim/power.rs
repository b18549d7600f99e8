//! Power cuts: what is left of a world when everything stops at one instant.
//!
//! A cut keeps what was durable. Of everything else (changes in caches, writes in flight, new entries,
//! attributes) it keeps a part, whose size is drawn first: now nothing, now everything, mostly
//! something between. So one place in a program is met with many kinds of ruin.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::World;
use super::disk::{Cut, CutCounts};
use super::flight::Flight;
use super::fs::Fs;
use super::inner::Inner;
use super::stream::Net;
use super::trace::Entry;
use crate::op::Op;
use crate::rng::Rng;

/// What is to be kept of what was not durable, each out of 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerCut {
    /// Changes kept.
    pub keep_chance: u32,
    /// Of those, changes of contents that are torn at sectors.
    pub torn_chance: u32,
}

impl PowerCut {
    /// All that was not durable is lost.
    pub const NOTHING_KEPT: PowerCut = PowerCut { keep_chance: 0, torn_chance: 0 };
    /// Everything is kept, as after a crash of the program alone.
    pub const ALL_KEPT: PowerCut = PowerCut { keep_chance: 65_536, torn_chance: 0 };

    fn draw(rand: &mut Rng) -> PowerCut {
        let levels = [0, 6_554, 32_768, 32_768, 58_982, 65_536];
        PowerCut {
            keep_chance: levels[rand.below(levels.len() as u64) as usize],
            torn_chance: [0, 8_192, 32_768][rand.below(3) as usize],
        }
    }
}

/// Writes that have not reached their disk, by its number.
type InFlight = BTreeMap<u64, Vec<(u64, Rc<[u8]>)>>;

impl Fs {
    fn power_cut(&mut self, how: PowerCut, mut in_flight: InFlight, rand: &mut Rng) -> CutCounts {
        let mut total = CutCounts::default();
        for (number, inode) in &mut self.inodes {
            let sector_bytes = u64::from(inode.model.sector_bytes);
            let cut = Cut { keep_chance: how.keep_chance, torn_chance: how.torn_chance, sector_bytes };
            let mut writes = in_flight.remove(number).unwrap_or_default();
            rand.shuffle(&mut writes);
            let counts = inode.disk.power_cut(cut, writes, rand);
            total.torn += counts.torn;
            total.lost += counts.lost;
            inode.attributes.power_cut(how.keep_chance, rand);
            inode.locks.clear();
            inode.zero_range_seen = false;
        }
        self.names.power_cut(how.keep_chance, rand);
        self.forget_unreachable(|_| false);
        total
    }
}

impl Inner {
    fn writes_under_way(&self) -> InFlight {
        let mut in_flight = InFlight::new();
        for flight in self.flights.values().filter(|flight| !flight.settled && flight.write) {
            let (Some(Op::Write { mem, .. }), Some((number, mut range))) = (flight.op(), flight.written())
            else {
                continue;
            };
            // A write past the end of a device never gets further than its end.
            if let Some(inode) = self.fs.inodes.get(&number).filter(|inode| inode.is_block()) {
                range.end = range.end.min(inode.disk.len()).max(range.start);
            }
            let mut data = vec![0; (range.end - range.start) as usize];
            mem.copy_to(0, &mut data);
            if !data.is_empty() {
                in_flight.entry(number).or_default().push((range.start, data.into()));
            }
        }
        in_flight
    }

    fn power_cut(&mut self, how: PowerCut, rand: &mut Rng) {
        let in_flight = self.writes_under_way();
        let counts = self.fs.power_cut(how, in_flight, rand);
        self.faults.counts.torn += counts.torn;
        self.faults.counts.lost += counts.lost;
        let now = self.now;
        for flight in std::mem::take(&mut self.flights).into_values() {
            let Flight { port, user_data, .. } = flight;
            self.post(port, user_data, -libc::EIO);
        }
        for port in self.ports.values_mut() {
            port.dead.get_or_insert(now);
        }
        self.forget_events();
        self.files.clear();
        self.net = Net::default();
        self.note(Entry {
            what: "power cut",
            file: 0,
            offset: counts.torn,
            len: counts.lost,
            result: how.keep_chance.into(),
            content: u64::from(how.torn_chance),
        });
    }
}

impl World {
    /// The power goes now, and comes back. How much of what was not durable is left is drawn from the
    /// world's own seed.
    pub fn power_cut(&self) {
        let seed = self.0.borrow_mut().fault_rand.next_u64();
        self.power_cut_seeded(seed);
    }

    /// The same with a seed of its own: all that the cut decides follows from it.
    pub fn power_cut_seeded(&self, seed: u64) {
        let mut rand = Rng::new(seed);
        let how = PowerCut::draw(&mut rand);
        self.0.borrow_mut().power_cut(how, &mut rand);
    }

    /// The same with a given severity.
    pub fn power_cut_with(&self, how: PowerCut) {
        let mut inner = self.0.borrow_mut();
        let mut rand = Rng::new(inner.fault_rand.next_u64());
        inner.power_cut(how, &mut rand);
    }

    /// What would be found if the power went now, as a world of its own without rings, faults and
    /// streams. This one goes on: many cuts can be looked at from one instant.
    pub fn fork_after_power_cut(&self, seed: u64) -> World {
        let inner = self.0.borrow();
        let mut config = inner.config.clone();
        config.seed = seed;
        let mut forked = Inner::new(config);
        let mut rand = Rng::new(seed);
        let how = PowerCut::draw(&mut rand);
        forked.fs = inner.fs.clone();
        let counts = forked.fs.power_cut(how, inner.writes_under_way(), &mut rand);
        forked.faults.counts.torn = counts.torn;
        forked.faults.counts.lost = counts.lost;
        forked.now = inner.now;
        World(Rc::new(RefCell::new(forked)))
    }
}
