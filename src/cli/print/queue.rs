//! What waits to be printed, as a machine without I/O: texts go in, pieces to write come out, and what became of them is
//! told.
//!
//! Three kinds of text are told apart, because a reader that has stopped reading must cost nobody more than the text:
//! * a **product** is why somebody ran the command (`info`, `map`). All of it is written, in order; when the queue is full,
//!   whoever prints waits. It is for commands that serve nobody.
//! * a **message** is kept until the queue is full. What does not fit is counted, and the count is told when there is room.
//! * **progress** is kept only while hardly anything waits: the next one says more.
//!
//! Beside them stands one **status line**, on a terminal: only the newest text of it is kept. It is taken away before a line
//! is written, and drawn again afterwards.
//!
//! A reader that has gone (EPIPE) ends printing to its stream without a word. After any other error the next text is tried
//! again, because a full disk has room again some day; it begins with a new line if the last one was torn, so that a reader
//! of lines loses those that failed and no others. A product is not gone on with: one with a gap is none.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind};

use crate::base::limits::{PRINT_BYTES_MAX, PRINT_PIECE_BYTES, PRINT_PROGRESS_BYTES_MAX};
use crate::base::planted::{Bug, is_planted};

/// Where something is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the command is for.
    Product,
    /// What somebody should know.
    Message,
    /// What the next one replaces.
    Progress,
}

/// What became of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It will be written, or is not wanted any more.
    Taken,
    /// There is no room; it may be tried again.
    Full,
}

/// Something to write in one go.
#[derive(Debug)]
pub struct Piece {
    /// Where.
    pub stream: Stream,
    /// What.
    pub bytes: Vec<u8>,
    is_product: bool,
}

#[derive(Debug)]
struct Chunk {
    stream: Stream,
    is_product: bool,
    text: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    /// Nobody reads it.
    is_gone: bool,
    /// The last line was written in part.
    is_torn: bool,
    /// A product could not be written.
    has_failed: bool,
    /// An error has been told.
    is_told: bool,
    /// Lines for which there was no room.
    lost: u64,
}

/// What waits.
#[derive(Debug, Default)]
pub struct Queue {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    /// A piece is being written; whether it is a product.
    in_hand: Option<bool>,
    /// An error was handed out, and is not yet among what waits somewhere.
    is_telling: bool,
    /// The status line as it should be, and as it stands on the terminal.
    wanted: Option<String>,
    shown: Option<String>,
    out: State,
    err: State,
}

/// Takes a status line away.
const CLEAR: &str = "\r\x1b[K";

impl Queue {
    fn state(&mut self, stream: Stream) -> &mut State {
        match stream {
            Stream::Out => &mut self.out,
            Stream::Err => &mut self.err,
        }
    }

    /// Adds whole lines.
    pub fn push(&mut self, stream: Stream, kind: Kind, text: &str) -> Pushed {
        let (waiting, room) = (self.bytes, self.bytes + text.len() <= PRINT_BYTES_MAX);
        let state = self.state(stream);
        if state.is_gone {
            return Pushed::Taken;
        }
        match kind {
            Kind::Product if state.has_failed => return Pushed::Taken,
            // A text that is longer than all of the queue has to be taken at some time.
            Kind::Product if !room && waiting > 0 => return Pushed::Full,
            Kind::Progress if waiting > PRINT_PROGRESS_BYTES_MAX => return Pushed::Taken,
            Kind::Message | Kind::Progress if !room && is_planted(Bug::PrintingWaits) => return Pushed::Full,
            Kind::Message | Kind::Progress if !room => {
                state.lost += text.lines().count() as u64;
                return Pushed::Taken;
            }
            _ => {}
        }
        let is_product = kind == Kind::Product;
        // What was left out stood here.
        let left_out = std::mem::take(&mut state.lost);
        let text = if left_out > 0 { &(notice(stream, left_out) + text) } else { text };
        self.bytes += text.len();
        match self.chunks.back_mut() {
            Some(last)
                if last.stream == stream
                    && last.is_product == is_product
                    && last.text.len() + text.len() <= PRINT_PIECE_BYTES =>
            {
                last.text.extend_from_slice(text.as_bytes());
            }
            _ => self.chunks.push_back(Chunk { stream, is_product, text: text.into() }),
        }
        Pushed::Taken
    }

    /// The status line is this from now on.
    pub fn set_status(&mut self, text: Option<String>) {
        if !self.err.is_gone {
            self.wanted = text;
        }
    }

    /// The next piece to write; what becomes of it has to be told.
    pub fn take(&mut self) -> Option<Piece> {
        if self.in_hand.is_some() {
            return None;
        }
        let piece = self.next_piece()?;
        self.in_hand = Some(piece.is_product);
        Some(piece)
    }

    fn next_piece(&mut self) -> Option<Piece> {
        let status = |text: &str| Piece { stream: Stream::Err, bytes: text.into(), is_product: false };
        let Some(stream) = self.chunks.front().map(|chunk| chunk.stream) else {
            if let Some(stream) = [Stream::Out, Stream::Err].into_iter().find(|s| self.state(*s).lost > 0) {
                self.push(stream, Kind::Message, "");
                return self.next_piece();
            }
            if self.wanted == self.shown {
                return None;
            }
            self.shown.clone_from(&self.wanted);
            return Some(match &self.wanted {
                Some(text) => status(&format!("\r{text}\x1b[K")),
                None => status(CLEAR),
            });
        };
        if self.shown.take().is_some() {
            return Some(status(CLEAR));
        }
        let Chunk { is_product, text, .. } = self.chunks.pop_front()?;
        self.bytes -= text.len();
        let mut bytes = Vec::new();
        let state = self.state(stream);
        if state.is_torn && !is_planted(Bug::TornLineGoesOn) {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(&text);
        Some(Piece { stream, bytes, is_product })
    }

    /// All of the piece was written, or some bytes of it and then there was an error. An error that a person should know
    /// of comes back, once a stream: nothing is settled until [`Queue::told`] says that it was passed on.
    pub fn done(&mut self, piece: &Piece, result: Result<(), (usize, Error)>) -> Option<Error> {
        self.in_hand = None;
        let stream = piece.stream;
        let (written, error) = match result {
            Ok(()) => {
                self.state(stream).is_torn = false;
                return None;
            }
            Err(failed) => failed,
        };
        let state = self.state(stream);
        if written > 0 {
            state.is_torn = piece.bytes.get(written - 1) != Some(&b'\n');
        }
        let is_gone = error.kind() == ErrorKind::BrokenPipe;
        state.is_gone = is_gone;
        state.lost = if is_gone { 0 } else { state.lost };
        state.has_failed |= piece.is_product && !is_gone;
        let is_new = !is_gone && !std::mem::replace(&mut state.is_told, true);
        self.forget(stream, |chunk| is_gone || chunk.is_product);
        if stream == Stream::Err {
            // What stands on the terminal, if there is one, is not known.
            (self.wanted, self.shown) = (self.wanted.take().filter(|_| !is_gone), None);
        }
        self.is_telling |= is_new;
        is_new.then_some(error)
    }

    /// The error that came back waits to be printed now, here or in another queue.
    pub fn told(&mut self) {
        self.is_telling = false;
    }

    fn forget(&mut self, stream: Stream, which: impl Fn(&Chunk) -> bool) {
        self.chunks.retain(|chunk| chunk.stream != stream || !which(chunk));
        self.bytes = self.chunks.iter().map(|chunk| chunk.text.len()).sum();
    }

    /// Nothing waits, and nothing is being written.
    pub fn is_settled(&self) -> bool {
        let nothing_waits = self.chunks.is_empty() && self.out.lost == 0 && self.err.lost == 0;
        nothing_waits && self.in_hand.is_none() && !self.is_telling && self.wanted == self.shown
    }

    /// Some of a product is not written yet.
    pub fn has_product(&self) -> bool {
        self.in_hand == Some(true) || self.chunks.iter().any(|chunk| chunk.is_product)
    }

    /// Whether some of a product could not be written, and that is no reader's wish.
    pub fn has_failed(&self, stream: Stream) -> bool {
        match stream {
            Stream::Out => self.out.has_failed,
            Stream::Err => self.err.has_failed,
        }
    }

    #[cfg(test)]
    fn is_gone(&self, stream: Stream) -> bool {
        match stream {
            Stream::Out => self.out.is_gone,
            Stream::Err => self.err.is_gone,
        }
    }
}

/// What is said of lines that were not printed. Messages on standard output are JSON.
fn notice(stream: Stream, lost: u64) -> String {
    match stream {
        Stream::Out => format!("{}\n", serde_json::json!({"event": "lost", "lines": lost})),
        Stream::Err => format!("blockferry: {lost} lines were left out here, because nobody read them\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::planted::plant;

    /// A reader of the output: what it got, and when it fails.
    #[derive(Default)]
    struct Reader {
        got: Vec<u8>,
        /// Calls, and bytes of one call, after which there is an error instead.
        fails_at_call: Option<(usize, usize, ErrorKind)>,
        calls: usize,
    }

    impl Reader {
        fn read(&mut self, queue: &mut Queue) -> Option<bool> {
            let piece = queue.take()?;
            let call = self.calls;
            self.calls += 1;
            let result = match self.fails_at_call {
                Some((at, bytes, kind)) if at == call => {
                    let written = bytes.min(piece.bytes.len().saturating_sub(1));
                    self.got.extend_from_slice(&piece.bytes[..written]);
                    Err((written, Error::from(kind)))
                }
                _ => {
                    self.got.extend_from_slice(&piece.bytes);
                    Ok(())
                }
            };
            let is_told = queue.done(&piece, result).is_some();
            assert!(!is_told || !queue.is_settled(), "whoever waits for the end must hear of the error");
            queue.told();
            Some(is_told)
        }
    }

    fn line(i: usize) -> String {
        format!("{{\"event\": \"line\", \"i\": {i}}}\n")
    }

    /// Ten lines to a reader that fails once, at every call and every byte of it: the others arrive, whole and in order.
    fn a_reader_that_fails_once() -> Result<(), String> {
        for call in 0..10 {
            for byte in 0..line(0).len() {
                let (mut queue, mut reader) = (Queue::default(), Reader::default());
                reader.fails_at_call = Some((call, byte, ErrorKind::StorageFull));
                let mut told = 0;
                for i in 0..10 {
                    assert_eq!(queue.push(Stream::Out, Kind::Message, &line(i)), Pushed::Taken);
                    told += usize::from(reader.read(&mut queue) == Some(true));
                }
                assert_eq!(told, 1, "the error is told once");
                let text = String::from_utf8(reader.got).unwrap();
                let whole: Vec<usize> = text
                    .lines()
                    .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                    .map(|value| value["i"].as_u64().unwrap() as usize)
                    .collect();
                // All bytes but the line's end may have been written: then it counts.
                let complete = byte == line(0).len() - 1;
                let expected: Vec<usize> = (0..10).filter(|i| *i != call || complete).collect();
                if whole != expected {
                    return Err(format!("call {call}, byte {byte}: {whole:?}"));
                }
            }
        }
        Ok(())
    }

    /// A reader that stops reading: whoever prints goes on at once, memory is bounded, and what is lost is told.
    fn a_reader_that_stalls() -> Result<(), String> {
        let mut queue = Queue::default();
        let stuck = {
            queue.push(Stream::Err, Kind::Message, "first\n");
            queue.take().unwrap()
        };
        let (text, mut kept) = ("m".repeat(999) + "\n", 0);
        for _ in 0..3 * PRINT_BYTES_MAX / 1000 {
            for kind in [Kind::Message, Kind::Progress] {
                let before = queue.bytes;
                if queue.push(Stream::Err, kind, &text) == Pushed::Full {
                    return Err(format!("{kind:?} has to wait for the reader"));
                }
                kept += usize::from(kind == Kind::Message && queue.bytes > before);
                assert!(queue.take().is_none() && queue.bytes <= PRINT_BYTES_MAX);
            }
        }
        queue.set_status(Some("50 %".into()));
        queue.set_status(Some("60 %".into()));
        assert!(!queue.is_settled() && !queue.has_product());
        // It reads again.
        let mut reader = Reader::default();
        queue.done(&stuck, Ok(()));
        while reader.read(&mut queue).is_some() {}
        queue.push(Stream::Err, Kind::Message, "last\n");
        while reader.read(&mut queue).is_some() {}
        let text = String::from_utf8(reader.got).unwrap();
        let lost = 3 * PRINT_BYTES_MAX / 1000 - kept;
        let end = format!(
            "{}blockferry: {lost} lines were left out here, because nobody read them\n\r60 %\x1b[K{CLEAR}last\n\r60 %\x1b[K",
            "m".repeat(9) + "\n",
        );
        assert!(text.ends_with(&end), "{}", &text[text.len() - 200..]);
        assert!(queue.is_settled());
        Ok(())
    }

    #[test]
    fn a_reader_may_fail_or_stall_at_any_place() {
        assert_eq!(a_reader_that_fails_once(), Ok(()));
        assert_eq!(a_reader_that_stalls(), Ok(()));
    }

    #[test]
    fn planted_bugs_of_printing_are_found() {
        for bug in Bug::PRINTING {
            plant(Some(bug));
            let found = a_reader_that_fails_once().and_then(|()| a_reader_that_stalls());
            plant(None);
            assert!(found.is_err(), "{bug:?} was not found");
        }
    }

    #[test]
    fn a_reader_that_has_gone_ends_printing_quietly() {
        for kind in [Kind::Product, Kind::Message] {
            let (mut queue, mut reader) = (Queue::default(), Reader::default());
            reader.fails_at_call = Some((1, 3, ErrorKind::BrokenPipe));
            for i in 0..5 {
                queue.push(Stream::Out, kind, &line(i));
                assert_ne!(reader.read(&mut queue), Some(true), "nothing is told");
            }
            assert_eq!(reader.calls, 2);
            assert!(queue.is_settled() && queue.is_gone(Stream::Out) && !queue.has_failed(Stream::Out));
            // The other stream is as it was.
            queue.push(Stream::Err, Kind::Message, "here\n");
            reader.read(&mut queue);
            assert!(reader.got.ends_with(b"here\n"));
        }
    }

    #[test]
    fn a_product_is_whole_or_has_failed() {
        let (mut queue, mut reader) = (Queue::default(), Reader::default());
        let text = "p".repeat(PRINT_PIECE_BYTES - 1) + "\n";
        let mut pushed = 0;
        while queue.push(Stream::Out, Kind::Product, &text) == Pushed::Taken {
            pushed += 1;
        }
        assert_eq!(pushed, PRINT_BYTES_MAX / PRINT_PIECE_BYTES);
        assert!(queue.has_product());
        while reader.read(&mut queue).is_some() {}
        assert!(reader.got == text.repeat(pushed).as_bytes() && queue.is_settled());
        // One that is longer than the queue.
        assert_eq!(queue.push(Stream::Out, Kind::Product, &text.repeat(pushed + 1)), Pushed::Taken);
        while reader.read(&mut queue).is_some() {}
        assert_eq!(reader.got.len(), text.len() * (2 * pushed + 1));
        // Behind a gap nothing of it is written; messages are.
        reader.fails_at_call = Some((reader.calls, 0, ErrorKind::StorageFull));
        for _ in 0..3 {
            queue.push(Stream::Out, Kind::Product, &text);
        }
        let before = reader.got.len();
        assert_eq!(reader.read(&mut queue), Some(true));
        assert_eq!(reader.read(&mut queue), None);
        assert!(queue.has_failed(Stream::Out) && !queue.has_product());
        queue.push(Stream::Out, Kind::Product, &text);
        queue.push(Stream::Out, Kind::Message, "m\n");
        while reader.read(&mut queue).is_some() {}
        assert_eq!(reader.got.len(), before + 2);
    }

    #[test]
    fn a_status_line_makes_way() {
        let (mut queue, mut reader) = (Queue::default(), Reader::default());
        queue.set_status(Some("10 %".into()));
        while reader.read(&mut queue).is_some() {}
        queue.push(Stream::Out, Kind::Message, "out\n");
        queue.push(Stream::Err, Kind::Message, "err\n");
        queue.set_status(Some("20 %".into()));
        while reader.read(&mut queue).is_some() {}
        queue.set_status(None);
        while reader.read(&mut queue).is_some() {}
        let text = String::from_utf8(reader.got).unwrap();
        assert_eq!(text, format!("\r10 %\x1b[K{CLEAR}out\nerr\n\r20 %\x1b[K{CLEAR}"));
    }
}
