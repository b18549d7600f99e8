//! What each sector of a disk may hold after a power cut at this moment, and what a reader must see.
//!
//! Each write puts a version of its own into all words of its sectors, so that a sector tells which write it is of.

/// The unit that is written as a whole.
pub const SECTOR: usize = 512;
/// Sectors of a backing file say so.
pub const OF_BASE: u32 = 1 << 30;

/// Fills bytes with a version.
pub fn stamp(bytes: &mut [u8], version: u32) {
    bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&version.to_be_bytes()));
}

/// What each sector may hold after a cut at this moment.
#[derive(Clone, Debug, Default)]
pub struct Model {
    sectors: Vec<Vec<Write>>,
    /// All that ended before a flush began that has ended.
    pub clock: u64,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    version: u32,
    /// When it was acknowledged.
    acked: Option<u64>,
    /// It may be ignored (a discard).
    optional: bool,
}

impl Model {
    /// A disk of zeroes, or over a base whose sectors say so.
    pub fn over_base(size: u64, backed: bool) -> Model {
        let version = |i| if backed { OF_BASE + i as u32 } else { 0 };
        Model::of((0..size as usize / SECTOR).map(version))
    }

    /// A disk with these versions, durably.
    pub fn of(versions: impl Iterator<Item = u32>) -> Model {
        let first = |version| vec![Write { version, acked: Some(0), optional: false }];
        Model { sectors: versions.map(first).collect(), clock: 1 }
    }

    /// Bytes of the disk.
    pub fn len(&self) -> usize {
        self.sectors.len() * SECTOR
    }

    /// A write began.
    pub fn issue(&mut self, sectors: std::ops::Range<usize>, version: u32, optional: bool) {
        sectors.for_each(|i| self.sectors[i].push(Write { version, acked: None, optional }));
    }

    /// It was acknowledged.
    pub fn ack(&mut self, sectors: std::ops::Range<usize>) {
        self.clock += 1;
        for i in sectors {
            if let Some(write) = self.sectors[i].last_mut() {
                write.acked = Some(self.clock);
            }
        }
    }

    /// It failed: it may have happened, or not, or in part.
    pub fn failed(&mut self, sectors: std::ops::Range<usize>) {
        for i in sectors {
            if let Some(write) = self.sectors[i].last_mut() {
                write.optional = true;
            }
        }
    }

    /// What a reader of these sectors may see now, where nothing is under way on them.
    pub fn check_range(&self, first: usize, bytes: &[u8]) -> Result<(), String> {
        let sectors = self.sectors[first..first + bytes.len() / SECTOR].to_vec();
        Model { sectors, clock: self.clock }.check_live(bytes)
    }

    /// A flush that began at `began` has ended.
    pub fn flushed(&mut self, began: u64) {
        for writes in &mut self.sectors {
            let floor = writes.iter().rposition(|w| !w.optional && w.acked.is_some_and(|at| at <= began));
            writes.drain(..floor.unwrap_or(0));
        }
    }

    /// After a power cut.
    pub fn check(&self, bytes: &[u8]) -> Result<(), String> {
        for (i, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let mut word = [0; 4];
            word.copy_from_slice(&sector[..4]);
            let found = u32::from_be_bytes(word);
            let mut wanted = vec![0; SECTOR];
            stamp(&mut wanted, found);
            if sector != wanted {
                return Err(format!("sector {i} is mixed ({found})"));
            }
            if !self.sectors[i].iter().any(|w| w.version == found) {
                return Err(format!("sector {i} holds {found} and may hold {:?}", self.sectors[i]));
            }
        }
        Ok(())
    }

    /// What a reader must see now, where nothing is under way: the last write, or what a discard left.
    pub fn check_live(&self, bytes: &[u8]) -> Result<(), String> {
        for (i, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let mut word = [0; 4];
            word.copy_from_slice(&sector[..4]);
            let found = u32::from_be_bytes(word);
            let writes = &self.sectors[i];
            let first = writes.iter().rposition(|w| !w.optional).unwrap_or(0);
            if !writes[first..].iter().any(|w| w.version == found) {
                return Err(format!("sector {i} reads as {found} and was {writes:?}"));
            }
        }
        Ok(())
    }
}
