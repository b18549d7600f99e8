//! The plain model: what each piece of a disk may hold, live and durably.
//!
//! The disk is cut into cells of a few bytes ([`Model::cell`]: guests' requests are made of whole cells, so
//! that a cell is written by one request entirely or not at all). Each write fills each of its cells with a
//! word that no other write and no other cell has, so a byte on a disk tells which request put it there.
//!
//! # What a cell may hold
//! Everything that happens is numbered. A cell knows the values that it may hold now, and the writes that are
//! under way on it. A write that ends well leaves its own value, and those of writes that ended after it
//! began, because which of two overlapping writes came last nobody can say. A write that fails adds its value
//! and takes none away: it may have arrived or not. So does one whose result was never told. A discard
//! leaves *anything*. A read that saw a value while nothing was under way settles the doubt: whatever the
//! cell holds from then on must be that.
//!
//! # What a cell may hold after a power cut
//! A value that was replaced may come back until a flush has ended well that began after the replacing write
//! had ended; or at once no longer, when that write was one to be durable (FUA). What a failed write left is
//! never durable for certain, whatever flush ends well: only a good write over it ends the doubt.

use std::collections::BTreeMap;
use std::ops::Range;

/// A value; see [`word_of`].
pub type Word = u64;

/// Any bytes at all: what a discard leaves.
pub const ANY: Word = Word::MAX;

#[derive(Clone, Copy, Debug)]
struct Value {
    word: Word,
    /// When the write that left it had ended.
    ended: u64,
    /// That write failed.
    failed: bool,
    /// When it was replaced for certain, as reads see it.
    gone: Option<u64>,
    /// When it was replaced by something that a flush from then on makes durable.
    buried: Option<u64>,
}

impl Value {
    /// It may be found after a power cut.
    fn may_come_back(&self, flushed: u64) -> bool {
        self.buried.is_none_or(|buried| buried > flushed)
    }

    fn settled(word: Word) -> Value {
        Value { word, ended: 0, failed: false, gone: None, buried: None }
    }
}

/// A cell about which there is more to know than one value.
#[derive(Clone, Debug, Default)]
struct Doubt {
    values: Vec<Value>,
    /// Writes under way: number, word.
    under_way: Vec<(u64, Word)>,
}

#[derive(Clone, Debug)]
enum Cell {
    Settled(Word),
    Doubtful(Box<Doubt>),
}

impl Cell {
    fn doubt(&mut self) -> &mut Doubt {
        if let Cell::Settled(word) = *self {
            let values = vec![Value::settled(word)];
            *self = Cell::Doubtful(Box::new(Doubt { values, under_way: Vec::new() }));
        }
        match self {
            Cell::Doubtful(doubt) => doubt,
            Cell::Settled(_) => unreachable!("it was made doubtful above"),
        }
    }
}

/// A write under way.
#[derive(Clone, Debug)]
pub struct Write {
    begun: u64,
    cells: Range<usize>,
    words: Words,
}

impl Write {
    /// The cells that it is about.
    pub fn cells(&self) -> Range<usize> {
        self.cells.clone()
    }

    /// When it began, as the model counts.
    pub fn begun(&self) -> u64 {
        self.begun
    }
}

/// What a write puts into its cells.
#[derive(Clone, Copy, Debug)]
pub enum Words {
    /// A word of its own for each cell, made from this.
    Stamp(u64),
    /// Zeroes.
    Zero,
    /// Whatever.
    Any,
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Words {
    fn word(self, cell: usize) -> Word {
        match self {
            Words::Zero => 0,
            Words::Any => ANY,
            Words::Stamp(stamp) => mix(stamp.wrapping_add(cell as u64)).clamp(1, ANY - 1),
        }
    }
}

/// The word that a cell's bytes stand for: the one that they repeat, or a hash if they repeat none.
pub fn word_of(bytes: &[u8]) -> Word {
    let (words, rest) = bytes.as_chunks::<8>();
    debug_assert!(rest.is_empty());
    let first = words[0];
    if words.iter().all(|word| *word == first) {
        return u64::from_le_bytes(first);
    }
    words.iter().fold(1, |hash, word| mix(hash ^ u64::from_le_bytes(*word))).clamp(1, ANY - 1)
}

/// A place at which the disk holds what it must not hold.
#[derive(Clone, Debug)]
pub struct Wrong {
    offset: u64,
    found: Word,
    allowed: Vec<Word>,
    cells: usize,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Wrong { offset, found, allowed, cells } = self;
        write!(f, "{cells} cells are wrong, the first at offset {offset}: {found:016x}, allowed are")?;
        allowed.iter().try_for_each(|word| write!(f, " {word:016x}"))
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Model {
    cell: usize,
    cells: Vec<Cell>,
    sequence: u64,
    /// Reads under way, by the number of their beginning.
    reads: BTreeMap<u64, u32>,
    /// What ended before this is durable.
    flushed: u64,
    /// When the last write to a cell began and ended.
    touched: Vec<(u64, u64)>,
}

impl Model {
    /// A disk of `len` bytes, all zero, seen in cells of `cell` bytes.
    pub fn new(len: u64, cell: usize) -> Model {
        assert!(len.is_multiple_of(cell as u64) && cell.is_multiple_of(8));
        let n = len as usize / cell;
        Model {
            cell,
            cells: vec![Cell::Settled(0); n],
            sequence: 1,
            reads: BTreeMap::new(),
            flushed: 0,
            touched: vec![(0, 0); n],
        }
    }

    /// Numbers what happens next.
    pub fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn cells_of(&self, offset: u64, len: u64) -> Range<usize> {
        let cell = self.cell as u64;
        debug_assert!(offset.is_multiple_of(cell) && len.is_multiple_of(cell));
        (offset / cell) as usize..((offset + len) / cell) as usize
    }

    /// The bytes that a write of `words` at `offset` has.
    pub fn fill(&self, offset: u64, words: Words, bytes: &mut [u8]) {
        let first = offset as usize / self.cell;
        for (i, cell) in bytes.chunks_exact_mut(self.cell).enumerate() {
            let word = words.word(first + i).to_le_bytes();
            cell.as_chunks_mut::<8>().0.fill(word);
        }
    }

    /// Puts down what is on the disk from the start.
    pub fn prepare(&mut self, offset: u64, bytes: &[u8]) {
        for (at, cell) in self.cells_of(offset, bytes.len() as u64).zip(bytes.chunks_exact(self.cell)) {
            self.cells[at] = Cell::Settled(word_of(cell));
        }
    }

    // Writes.

    /// A write begins.
    pub fn begin_write(&mut self, offset: u64, len: u64, words: Words) -> Write {
        let begun = self.next();
        let cells = self.cells_of(offset, len);
        for at in cells.clone() {
            self.cells[at].doubt().under_way.push((begun, words.word(at)));
        }
        Write { begun, cells, words }
    }

    /// A write has ended, well or badly.
    pub fn end_write(&mut self, write: Write, well: bool, durable: bool) {
        let now = self.next();
        for at in write.cells.clone() {
            let doubt = self.cells[at].doubt();
            doubt.under_way.retain(|(begun, _)| *begun != write.begun);
            let word = write.words.word(at);
            if well {
                for value in doubt.values.iter_mut().filter(|v| v.ended < write.begun) {
                    value.gone.get_or_insert(now);
                    // What is durable at once needs no flush.
                    let buried = if durable { 0 } else { now };
                    value.buried = Some(value.buried.map_or(buried, |before| before.min(buried)));
                }
            }
            doubt.values.push(Value { ended: now, failed: !well, ..Value::settled(word) });
            self.touched[at] = (write.begun, now);
            self.tidy(at);
        }
    }

    /// No write to the cell is under way.
    pub fn is_quiet(&self, cell: usize) -> bool {
        match &self.cells[cell] {
            Cell::Settled(_) => true,
            Cell::Doubtful(doubt) => doubt.under_way.is_empty(),
        }
    }

    /// Forgets what can no longer matter in a cell.
    fn tidy(&mut self, at: usize) {
        let oldest_read = self.reads.first_key_value().map_or(u64::MAX, |(begun, _)| *begun);
        let flushed = self.flushed;
        let Cell::Doubtful(doubt) = &mut self.cells[at] else { return };
        doubt.values.retain(|value| match value.gone {
            None => true,
            Some(gone) => gone > oldest_read || value.may_come_back(flushed),
        });
        if let ([value], true) = (&doubt.values[..], doubt.under_way.is_empty()) {
            self.cells[at] = Cell::Settled(value.word);
        }
    }

    // Reads.

    /// A read begins.
    pub fn begin_read(&mut self) -> u64 {
        let begun = self.next();
        *self.reads.entry(begun).or_default() += 1;
        begun
    }

    /// A read that failed has ended.
    pub fn end_read_failed(&mut self, begun: u64) {
        if let Some(n) = self.reads.get_mut(&begun) {
            *n -= 1;
            if *n == 0 {
                self.reads.remove(&begun);
            }
        }
    }

    /// A read has ended; what it saw must be what a moment since its beginning allowed.
    pub fn end_read(&mut self, begun: u64, offset: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let result = self.check(offset, bytes, |value| value.gone.is_none_or(|gone| gone > begun), begun);
        self.end_read_failed(begun);
        result
    }

    /// What reads would see now, with nothing under way that has not yet begun to matter.
    pub fn check_live(&mut self, bytes: &[u8]) -> Result<(), Wrong> {
        let begun = self.next();
        self.check(0, bytes, |value| value.gone.is_none(), begun)
    }

    /// Compares with what is allowed; a value seen in peace settles the cell's doubt.
    fn check(
        &mut self,
        offset: u64,
        bytes: &[u8],
        is_allowed: impl Fn(&Value) -> bool,
        begun: u64,
    ) -> Result<(), Wrong> {
        let mut wrong: Option<Wrong> = None;
        let now = self.next();
        for (at, cell) in self.cells_of(offset, bytes.len() as u64).zip(bytes.chunks_exact(self.cell)) {
            let found = word_of(cell);
            let doubt = match &mut self.cells[at] {
                Cell::Settled(word) if *word == found => continue,
                Cell::Settled(word) if *word == ANY => {
                    *word = found;
                    continue;
                }
                Cell::Settled(word) => {
                    note(&mut wrong, at * self.cell, found, vec![*word]);
                    continue;
                }
                Cell::Doubtful(doubt) => doubt,
            };
            let matches = |word: Word| word == found || word == ANY;
            let values = doubt.values.iter().filter(|v| is_allowed(v)).map(|v| v.word);
            let mut allowed = values.chain(doubt.under_way.iter().map(|(_, word)| *word));
            if !allowed.any(matches) {
                let values = doubt.values.iter().filter(|v| is_allowed(v)).map(|v| v.word);
                let allowed = values.chain(doubt.under_way.iter().map(|(_, word)| *word)).collect();
                note(&mut wrong, at * self.cell, found, allowed);
                continue;
            }
            let peace = doubt.under_way.is_empty() && doubt.values.iter().all(|value| value.ended < begun);
            if peace {
                // One of the values that may be current is the one that is; the others are gone since before the read.
                let current = |v: &Value, word: Word| v.gone.is_none() && v.word == word;
                let same = doubt.values.iter().position(|v| current(v, found));
                let index = same.or_else(|| {
                    // Of anything it became this; another part of anything may still come back.
                    let any = *doubt.values.iter().find(|v| current(v, ANY))?;
                    doubt.values.push(Value { word: found, ..any });
                    Some(doubt.values.len() - 1)
                });
                if let Some(index) = index {
                    let buried = (!doubt.values[index].failed).then_some(now);
                    for (i, value) in doubt.values.iter_mut().enumerate() {
                        if i != index && value.gone.is_none() {
                            value.gone = Some(now);
                            value.buried = value.buried.or(buried);
                        }
                    }
                }
                self.tidy(at);
            }
        }
        wrong.map_or(Ok(()), Err)
    }

    // Flushes and power cuts.

    /// A flush begins.
    pub fn begin_flush(&mut self) -> u64 {
        self.next()
    }

    /// A flush that began at `begun` has ended well.
    pub fn end_flush(&mut self, begun: u64) {
        self.flushed = self.flushed.max(begun);
    }

    /// All that the disk holds now is durable.
    pub fn all_durable(&mut self) {
        self.flushed = self.next();
        for cell in &mut self.cells {
            let Cell::Doubtful(doubt) = cell else { continue };
            for value in doubt.values.iter_mut().filter(|value| value.gone.is_some()) {
                value.buried = Some(0);
            }
        }
    }

    /// What may be found after a power cut now.
    pub fn check_durable(&self, bytes: &[u8]) -> Result<(), Wrong> {
        let mut wrong = None;
        for (at, cell) in bytes.chunks_exact(self.cell).enumerate() {
            let found = word_of(cell);
            let matches = |word: Word| word == found || word == ANY;
            match &self.cells[at] {
                Cell::Settled(word) if matches(*word) => {}
                Cell::Settled(word) => note(&mut wrong, at * self.cell, found, vec![*word]),
                Cell::Doubtful(doubt) => {
                    let possible = doubt.values.iter().filter(|value| value.may_come_back(self.flushed));
                    let values = possible.map(|value| value.word);
                    let allowed: Vec<Word> =
                        values.chain(doubt.under_way.iter().map(|(_, word)| *word)).collect();
                    if !allowed.iter().any(|word| matches(*word)) {
                        note(&mut wrong, at * self.cell, found, allowed);
                    }
                }
            }
        }
        wrong.map_or(Ok(()), Err)
    }

    /// After a power cut: the disk holds this, durably, and nothing is under way.
    pub fn restart(&mut self, bytes: &[u8]) {
        self.reads.clear();
        self.prepare(0, bytes);
        self.all_durable();
    }

    /// For each cell: whether the last write to it began and ended in this span of events.
    pub fn touched(&self, span: Range<u64>) -> impl Iterator<Item = bool> {
        self.touched.iter().map(move |(begun, ended)| *begun > span.start && *ended < span.end)
    }
}

fn note(wrong: &mut Option<Wrong>, offset: usize, found: Word, allowed: Vec<Word>) {
    match wrong {
        Some(wrong) => wrong.cells += 1,
        None => *wrong = Some(Wrong { offset: offset as u64, found, allowed, cells: 1 }),
    }
}
