//! The log of a run: which writes were sent, and which of them the disk acknowledged.
//!
//! A test that mirrors, crashes or resumes something under load wants to ask later: is everything there that was
//! promised? So the load generator writes down each write before it sends it, and each answer when it has come, in the
//! order in which it saw them. [`AckLog::load`] replays the file into a [`Model`] of what each block may hold.
//!
//! The file is JSON lines, to be read by any program and by eye:
//!
//! ```text
//! {"log":"blockferry-bench","version":1,"seed":7,"offset":0,"block_bytes":4096,"blocks":262144}
//! ["write",18,1]        generation 1 goes to block 18 (the bytes from offset + 18 * block_bytes on)
//! ["write-fua",4,2]     generation 2 goes to block 4, to be durable when it is acknowledged
//! ["ack",1]             write 1 was acknowledged
//! ["fail",2]            write 2 was answered with an error
//! ["flush",1]           flush 1 goes out
//! ["flushed",1]         flush 1 was acknowledged
//! ["end"]               nothing is missing
//! ```
//!
//! What a block holds is told by [`super::pattern`]. A write without an answer was in flight when the connection was
//! lost. A file without its last line was cut short when the load generator itself was killed: its last record may be
//! torn, and the disk may hold writes later than it knows ([`AckLog::is_complete`]).

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::model::{Candidates, Model, Survival, WriteEnd};
use crate::base::shown::plain;

const NAME: &str = "blockferry-bench";
const VERSION: u32 = 1;
/// Longest line, in bytes: the header with all numbers at their longest is shorter.
const LINE_BYTES_MAX: usize = 512;
/// Answered writes and flushes that a log may leave open: more are in flight in no run.
const OPEN_MAX: usize = 1 << 20;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHeader {
    log: String,
    version: u32,
    /// Seed of the run, part of every pattern.
    pub seed: u64,
    /// Offset of block 0 on the disk, in bytes.
    pub offset: u64,
    /// Bytes of a block, a multiple of 512.
    pub block_bytes: u32,
    /// Blocks in the range.
    pub blocks: u64,
}

impl LogHeader {
    /// The header of a log of this version.
    pub fn new(seed: u64, offset: u64, block_bytes: u32, blocks: u64) -> LogHeader {
        LogHeader { log: NAME.to_owned(), version: VERSION, seed, offset, block_bytes, blocks }
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.log != NAME {
            return Err("it is not a log of the load generator");
        }
        if self.version != VERSION {
            return Err("it has a version that this program does not know");
        }
        let sector = super::pattern::SECTOR as u32;
        if self.block_bytes == 0 || !self.block_bytes.is_multiple_of(sector) {
            return Err("its blocks are not made of sectors");
        }
        let bytes = self.blocks.checked_mul(self.block_bytes.into());
        if bytes.and_then(|bytes| bytes.checked_add(self.offset)).is_none() {
            return Err("its range passes the end of any disk");
        }
        Ok(())
    }
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file could not be read.
    #[error("Reading the log '{path}' failed: {}.", plain(.error))]
    Io {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// A line that no load generator wrote there.
    #[error("Line {line} of the log '{path}' is wrong: {reason}.")]
    Line {
        /// The file.
        path: String,
        /// From 1.
        line: usize,
        /// What is wrong, as a part of a sentence.
        reason: String,
    },
    /// More blocks than a model covers.
    #[error("The log '{path}' covers {blocks} blocks, which is more than {max}.")]
    TooLarge {
        /// The file.
        path: String,
        /// Blocks.
        blocks: u64,
        /// The limit.
        max: u64,
    },
}

/// Writes a log. The owner of the stream buffers it; after an error nothing more is written, and the error comes out of
/// [`LogWriter::finish`].
pub struct LogWriter {
    out: Box<dyn Write>,
    result: std::io::Result<()>,
}

impl std::fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogWriter").field("result", &self.result).finish_non_exhaustive()
    }
}

impl LogWriter {
    /// Starts a log with its header.
    pub fn new(out: Box<dyn Write>, header: &LogHeader) -> LogWriter {
        let mut writer = LogWriter { out, result: Ok(()) };
        let line = serde_json::to_string(header).unwrap_or_default();
        writer.line(format_args!("{line}"));
        writer
    }

    /// A write goes out.
    pub fn write(&mut self, block: u64, generation: u64, fua: bool) {
        let word = if fua { "write-fua" } else { "write" };
        self.line(format_args!("[\"{word}\",{block},{generation}]"));
    }

    /// A write was answered; one that was not leaves no trace.
    pub fn answer(&mut self, generation: u64, end: WriteEnd) {
        match end {
            WriteEnd::Acknowledged { .. } => self.line(format_args!("[\"ack\",{generation}]")),
            WriteEnd::Failed => self.line(format_args!("[\"fail\",{generation}]")),
            WriteEnd::Unanswered => {}
        }
    }

    /// A flush goes out.
    pub fn flush(&mut self, number: u64) {
        self.line(format_args!("[\"flush\",{number}]"));
    }

    /// A flush was acknowledged.
    pub fn flushed(&mut self, number: u64) {
        self.line(format_args!("[\"flushed\",{number}]"));
    }

    /// Writes the last line and everything that is still buffered.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.line(format_args!("[\"end\"]"));
        self.result?;
        self.out.flush()
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.result = self.out.write_fmt(line).and_then(|()| self.out.write_all(b"\n"));
        }
    }
}

/// One line after the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Write { block: u64, generation: u64, fua: bool },
    Answer { generation: u64, acknowledged: bool },
    Flush { number: u64 },
    Flushed { number: u64 },
    End,
}

fn parse(line: &str) -> Option<Record> {
    let inner = line.trim().strip_prefix('[')?.strip_suffix(']')?;
    let mut fields = inner.split(',').map(str::trim);
    let word = fields.next()?.strip_prefix('"')?.strip_suffix('"')?;
    let mut number = || fields.next()?.parse::<u64>().ok();
    let record = match word {
        "write" | "write-fua" => {
            Record::Write { block: number()?, generation: number()?, fua: word == "write-fua" }
        }
        "ack" | "fail" => Record::Answer { generation: number()?, acknowledged: word == "ack" },
        "flush" => Record::Flush { number: number()? },
        "flushed" => Record::Flushed { number: number()? },
        "end" => Record::End,
        _ => return None,
    };
    fields.next().is_none().then_some(record)
}

/// A log, replayed.
#[derive(Clone, Debug)]
pub struct AckLog {
    header: LogHeader,
    model: Model,
    complete: bool,
    acknowledged: u64,
    unanswered: u64,
}

impl AckLog {
    /// Reads a log and works out what each block may hold, given what the disk has been through.
    pub fn load(path: &Path, survival: Survival) -> Result<AckLog, LogError> {
        let name = path.display().to_string();
        let file = std::fs::File::open(path).map_err(|error| LogError::Io { path: name.clone(), error })?;
        AckLog::read(std::io::BufReader::with_capacity(1 << 16, file), &name, survival)
    }

    /// The same from any stream; `name` is what errors call it.
    pub fn read(mut input: impl BufRead, name: &str, survival: Survival) -> Result<AckLog, LogError> {
        let mut replay: Option<Replay> = None;
        let mut text = String::new();
        for line in 1.. {
            let wrong =
                |reason: &str| LogError::Line { path: name.to_owned(), line, reason: reason.to_owned() };
            text.clear();
            let mut bounded = std::io::Read::take(&mut input, LINE_BYTES_MAX as u64);
            let bytes = bounded
                .read_line(&mut text)
                .map_err(|error| LogError::Io { path: name.to_owned(), error })?;
            if bytes == 0 {
                break;
            }
            // The last record of a load generator that was killed.
            let torn = !text.ends_with('\n');
            if torn && bytes == LINE_BYTES_MAX {
                return Err(wrong("it is too long"));
            }
            match &mut replay {
                None => {
                    let header: LogHeader = serde_json::from_str(&text)
                        .map_err(|_| wrong("it is not the header of a log of the load generator"))?;
                    header.check().map_err(wrong)?;
                    let blocks = header.blocks;
                    let too_large = || LogError::TooLarge {
                        path: name.to_owned(),
                        blocks,
                        max: super::model::MODEL_BLOCKS_MAX,
                    };
                    let model = Model::new(blocks, survival).ok_or_else(too_large)?;
                    replay = Some(Replay::new(header, model));
                }
                Some(_) if torn => break,
                Some(replay) => {
                    let record = parse(&text).ok_or_else(|| wrong("it is not a record"))?;
                    replay.apply(record).map_err(wrong)?;
                }
            }
        }
        match replay {
            Some(replay) => Ok(replay.end()),
            None => {
                Err(LogError::Line { path: name.to_owned(), line: 1, reason: "the file is empty".to_owned() })
            }
        }
    }

    /// Where the blocks lie, and the seed of their patterns.
    pub fn header(&self) -> &LogHeader {
        &self.header
    }

    /// Whether the log has its last line. If not, the disk may hold writes that the log does not know; they are of
    /// generations above [`Model::last_generation`], or of those that the log leaves unanswered.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Writes that were acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Writes whose answer is not in the log.
    pub fn unanswered(&self) -> u64 {
        self.unanswered
    }

    /// What each block may hold.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What a block may hold: the generation acknowledged last, and those that may have replaced it.
    pub fn expected(&self, block: u64) -> Candidates {
        self.model.candidates(block)
    }
}

/// A log under replay.
struct Replay {
    log: AckLog,
    /// Blocks of the writes that are not answered yet, by generation, and whether they carry FUA.
    writes: BTreeMap<u64, (u64, bool)>,
    /// Moments of the flushes that are not answered yet, by number.
    flushes: BTreeMap<u64, u64>,
}

impl Replay {
    fn new(header: LogHeader, model: Model) -> Replay {
        let log = AckLog { header, model, complete: false, acknowledged: 0, unanswered: 0 };
        Replay { log, writes: BTreeMap::new(), flushes: BTreeMap::new() }
    }

    fn apply(&mut self, record: Record) -> Result<(), &'static str> {
        if self.log.complete {
            return Err("it stands behind the end of the log");
        }
        match record {
            Record::Write { block, generation, fua } => {
                if block >= self.log.header.blocks {
                    return Err("its block lies outside of the range");
                }
                if generation <= self.log.model.last_generation() {
                    return Err("its generation is not above those before it");
                }
                if self.writes.len() >= OPEN_MAX {
                    return Err("more writes are unanswered than can have been in flight");
                }
                self.log.model.begin_write_as(block, generation);
                self.writes.insert(generation, (block, fua));
            }
            Record::Answer { generation, acknowledged } => {
                let (block, fua) =
                    self.writes.remove(&generation).ok_or("it answers a write that was not sent")?;
                let end = if acknowledged { WriteEnd::Acknowledged { fua } } else { WriteEnd::Failed };
                self.log.acknowledged += u64::from(acknowledged);
                self.log.model.end_write(block, generation, end);
            }
            Record::Flush { number } => {
                if self.flushes.len() >= OPEN_MAX {
                    return Err("more flushes are unanswered than can have been in flight");
                }
                self.flushes.insert(number, self.log.model.begin_flush());
            }
            Record::Flushed { number } => {
                let begun = self.flushes.remove(&number).ok_or("it answers a flush that was not sent")?;
                self.log.model.end_flush(begun);
            }
            Record::End => self.log.complete = true,
        }
        Ok(())
    }

    fn end(mut self) -> AckLog {
        self.log.unanswered = self.writes.len() as u64;
        self.log
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone, Default)]
    struct Shared(Rc<RefCell<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const HEADER: &str =
        r#"{"log":"blockferry-bench","version":1,"seed":7,"offset":1048576,"block_bytes":4096,"blocks":100}"#;

    fn read(body: &str) -> Result<AckLog, LogError> {
        AckLog::read(format!("{HEADER}\n{body}").as_bytes(), "the log", Survival::Everything)
    }

    fn sorted(log: &AckLog, block: u64) -> Vec<u64> {
        let mut generations = log.expected(block).generations().to_vec();
        generations.sort_unstable();
        generations
    }

    #[test]
    fn what_is_written_is_replayed() {
        let ack = WriteEnd::Acknowledged { fua: false };
        let out = Shared::default();
        let mut writer = LogWriter::new(Box::new(out.clone()), &LogHeader::new(7, 1 << 20, 4096, 100));
        writer.write(18, 1, false);
        writer.write(4, 2, true);
        writer.answer(1, ack);
        writer.answer(2, WriteEnd::Failed);
        writer.flush(1);
        writer.flushed(1);
        writer.write(18, 3, false);
        writer.answer(3, WriteEnd::Unanswered);
        writer.finish().unwrap();
        let text = String::from_utf8(out.0.take()).unwrap();
        let expected = "[\"write\",18,1]\n[\"write-fua\",4,2]\n[\"ack\",1]\n[\"fail\",2]\n[\"flush\",1]\n\
                        [\"flushed\",1]\n[\"write\",18,3]\n[\"end\"]\n";
        assert_eq!(text, format!("{HEADER}\n{expected}"));
        let log = AckLog::read(text.as_bytes(), "the log", Survival::Everything).unwrap();
        assert!(log.is_complete());
        assert_eq!((log.acknowledged(), log.unanswered(), log.header().seed), (1, 1, 7));
        assert_eq!(sorted(&log, 18), [1, 3]);
        assert_eq!(sorted(&log, 4), [0, 2]);
        assert_eq!(log.model().written().collect::<Vec<_>>(), [4, 18]);
    }

    #[test]
    fn a_log_cut_anywhere_is_read_up_to_the_cut() {
        let body = "[\"write\",1,1]\n[\"ack\",1]\n[\"write\",1,12]\n[\"ack\",12]\n[\"end\"]\n";
        for cut in 0..=body.len() {
            let log = read(&body[..cut]).unwrap();
            assert_eq!(log.is_complete(), cut == body.len(), "{cut}");
        }
        assert_eq!(sorted(&read(&body[..body.len() - 9]).unwrap(), 1), [1, 12]);
        assert_eq!(sorted(&read(body).unwrap(), 1), [12]);
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        let message = |result: Result<AckLog, LogError>| result.map(|_| ()).unwrap_err().to_string();
        let of = |body: &str| message(read(body));
        assert_eq!(of("hello\n"), "Line 2 of the log 'the log' is wrong: it is not a record.");
        assert!(of("[\"write\",100,1]\n").contains("outside of the range"));
        assert!(of("[\"write\",1,1]\n[\"write\",2,1]\n").contains("Line 3"));
        assert!(of("[\"ack\",1]\n").contains("not sent"));
        assert!(of("[\"flushed\",1]\n").contains("not sent"));
        assert!(of("[\"end\"]\n[\"end\"]\n").contains("behind the end"));
        for bad in ["[\"write\",1]\n", "[\"write\",1,1,1]\n", "[\"ack\",-1]\n", "[]\n", "[\"ack\"]\n"] {
            assert!(of(bad).contains("not a record"), "{bad}");
        }
        assert!(of(&"x".repeat(2000)).contains("too long"));
        let read_all = |text: &str| message(AckLog::read(text.as_bytes(), "x", Survival::Everything));
        assert!(read_all("").contains("empty"));
        assert!(read_all("{}\n").contains("Line 1"));
        assert!(read_all(&HEADER.replace("4096", "1000")).contains("sectors"));
        assert!(read_all(&HEADER.replace("\"version\":1", "\"version\":2")).contains("version"));
        assert!(read_all(&HEADER.replace(":100}", ":18446744073709551615}")).contains("passes the end"));
        assert!(read_all(&HEADER.replace(":100}", ":900000000}")).contains("more than"));
    }
}
