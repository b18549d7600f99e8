//! Everything that the command prints goes through here, so that nothing that is printed can end or hold up a job.
//!
//! Whoever prints puts whole lines into a queue ([`queue`]) and goes on. A thread of its own writes them: it may stand for as
//! long as the reader likes (a full pipe, a stopped terminal), while the reactor turns. Standard output and standard error
//! have a queue each, so that one does not wait for the other; where both lead to the same place they share one, so that the
//! order of lines is kept. At the end of the process a product is waited for, anything else only for a while.
//!
//! Passwords that names hold do not get past here, nor do control characters: this is the place where text leaves the program.
//! What is printed as a line is one line, whatever names are in it; who puts several lines together shows the names in them
//! by [`shown`](crate::base::shown::shown).
//!
//! Where no thread is to be had (a limit on processes), lines are written at once by whoever prints.

mod queue;

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{LocalModes, tcgetattr, tcgetpgrp, tcgetwinsize};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use crate::base::limits::{PRINT_AT_END_MAX, PRINT_BACKGROUND_LOOK};
use crate::base::os_name;
use crate::base::secret::without_secrets;
use crate::base::shown::{plain, shown, shown_line, shown_lines};
use crate::job::event::JobEvent;
use queue::{Kind, Piece, Pushed, Queue, Stream};

/// Prints a line of what the command is for, on standard output. It may wait for the reader: not for commands that serve
/// somebody meanwhile.
macro_rules! product {
    () => { $crate::cli::print::write_product("\n") };
    ($($text:tt)*) => { $crate::cli::print::product_line(&format!($($text)*)) };
}

/// Prints a line for people, on standard error.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::print::say_line(&format!($($text)*)) };
}

/// Prints a line about what was done, on standard output.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::print::note_line(&format!($($text)*)) };
}

pub(crate) use {note, product, say};

/// Prints some of what the command is for, on standard output; ends of lines are in it.
pub fn write_product(text: &str) {
    // What is left to be done is to print it, and its reader may take his time.
    super::signals::let_go();
    PRINTER.out.print(Stream::Out, Kind::Product, &shown_lines(text));
}

/// Prints a line of what the command is for, on standard output.
pub fn product_line(text: &str) {
    super::signals::let_go();
    PRINTER.out.print(Stream::Out, Kind::Product, &format!("{}\n", shown_line(text)));
}

/// Prints what a command did, on standard output; ends of lines are in it.
pub fn write_note(text: &str) {
    PRINTER.out.print(Stream::Out, Kind::Message, &shown_lines(text));
}

/// Prints a line about what a command did, on standard output.
pub fn note_line(text: &str) {
    PRINTER.out.print(Stream::Out, Kind::Message, &format!("{}\n", shown_line(text)));
}

/// Prints what the reader of the command line has to say: help, or what is wrong with it. `text` is styled, if a terminal
/// shows it; `is_product`: it was asked for.
pub fn usage(text: &str, is_product: bool) {
    match is_product {
        true => PRINTER.out.print(Stream::Out, Kind::Product, text),
        false => PRINTER.err.print(Stream::Err, Kind::Message, text),
    }
}

/// Prints why the command failed, for people and, with JSON, for programs, unless they know it already.
pub fn failure(json: bool, failure: &Failure) {
    if json && !ENDED.load(Ordering::Relaxed) {
        ending(json!({"event": "error", "message": failure.to_string()}), exit_of(failure));
    }
    say!("blockferry: {failure}");
}

/// How a command ends that has failed so.
pub fn exit_of(failure: &Failure) -> Exit {
    match FAILURE.load(Ordering::Relaxed) {
        0 => failure.exit(),
        code => Exit::Code(code),
    }
}

/// Prints the object that tells programs how the command ended: there is one, and not two.
pub fn ending(mut value: Value, exit: Exit) {
    has_ended();
    value["exit-code"] = exit.code().into();
    event(&value);
}

/// What was printed tells programs how the command ended.
pub fn has_ended() {
    ENDED.store(true, Ordering::Relaxed);
}

/// The exit code of a failure is this, for the rest of the process: 1 may mean something else.
pub fn failure_has(code: u8) {
    FAILURE.store(code, Ordering::Relaxed);
}

/// Prints an event for programs, on standard output.
pub fn event(value: &Value) {
    PRINTER.out.print(Stream::Out, Kind::Message, &format!("{}\n", shown(&value.to_string())));
}

/// Prints what a job has told, as QMP has it: with the time of day.
pub fn job_event(event_of_job: &JobEvent) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    event(&json!({
        "event": event_of_job.name(),
        "data": event_of_job,
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
    }));
}

/// Prints an event that may be left out when nobody reads.
pub fn progress(value: &Value) {
    PRINTER.out.print(Stream::Out, Kind::Progress, &format!("{}\n", shown(&value.to_string())));
}

/// Prints a line for people, on standard error.
pub fn say_line(text: &str) {
    PRINTER.err.print(Stream::Err, Kind::Message, &format!("{}\n", shown_line(text)));
}

/// Prints a warning, quiet or not, in the form that those of the log have.
pub fn warning(text: &str) {
    say_line(&format!(" WARN {text}"));
}

/// Columns that a status line may take; in the last column of a terminal some begin a new line.
pub fn status_columns() -> usize {
    tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col)).max(2) - 1
}

/// Shows a line that is always the last one of the terminal, or takes it away. Nothing happens where there is no terminal
/// that can do that.
pub fn status(text: Option<&str>) {
    if PRINTER.has_status {
        let text = text.map(|text| without_secrets(text).chars().take(status_columns()).collect());
        PRINTER.err.with(|queue| queue.set_status(text));
    }
}

/// Whether what is printed may be coloured: a product, or what is said of a mistake.
pub fn has_colours(is_product: bool) -> bool {
    // https://no-color.org: set, and not empty.
    let is_unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_terminal = if is_product { io::stdout().is_terminal() } else { io::stderr().is_terminal() };
    is_terminal && !is_unwanted && !is_dumb()
}

/// Whether the terminal can do no more than to print.
fn is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb")
}

/// Whether there is a terminal that can show a status line.
pub fn has_status() -> bool {
    PRINTER.has_status
}

/// The end of the process: everything is printed, as far as somebody reads it. A command whose product could not be written
/// has failed.
pub fn finish(exit: Exit) -> Exit {
    status(None);
    if WANTS_ENDING.load(Ordering::Relaxed) && !ENDED.load(Ordering::Relaxed) {
        ending(json!({"event": "end"}), exit);
    }
    PRINTER.out.settle();
    PRINTER.err.settle();
    let has_failed = PRINTER.out.shared.queue().has_failed(Stream::Out);
    if has_failed && exit == Exit::Done { Exit::Code(FAILURE.load(Ordering::Relaxed).max(1)) } else { exit }
}

/// From now on a command that says nothing of its end to programs has that said for it.
pub fn wants_ending() {
    WANTS_ENDING.store(true, Ordering::Relaxed);
}

static WANTS_ENDING: AtomicBool = AtomicBool::new(false);
static ENDED: AtomicBool = AtomicBool::new(false);

/// The exit code of every failure of a command; 0: as the failure is.
static FAILURE: AtomicU8 = AtomicU8::new(0);

static PRINTER: LazyLock<Printer> = LazyLock::new(Printer::new);

struct Printer {
    out: Lane,
    err: Lane,
    has_status: bool,
}

impl Printer {
    fn new() -> Printer {
        let same = |a: rustix::fs::Stat, b: rustix::fs::Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
        let [out, err] = [rustix::fs::fstat(io::stdout()), rustix::fs::fstat(io::stderr())];
        let is_shared = matches!((out, err), (Ok(out), Ok(err)) if same(out, err));
        let err = Lane::start();
        let out = if is_shared { err.clone() } else { Lane::start() };
        Printer { out, err, has_status: io::stderr().is_terminal() && !is_dumb() }
    }
}

/// A queue, and who writes it.
#[derive(Clone)]
struct Lane {
    shared: Arc<Shared>,
    has_thread: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what became of a piece, and people of an error.
    fn done(&self, piece: &Piece, result: Result<(), (usize, io::Error)>) {
        let error = self.queue().done(piece, result);
        if let Some(error) = error
            && piece.stream == Stream::Out
        {
            say!("blockferry: Writing to standard output failed: {}", plain(&error));
        }
        self.queue().told();
        self.changed.notify_all();
    }
}

impl Lane {
    fn start() -> Lane {
        let shared = Arc::new(Shared::default());
        let writer = shared.clone();
        let thread = std::thread::Builder::new().name("printing".into()).stack_size(64 << 10);
        let thread = thread.spawn(move || {
            let mut queue = writer.queue();
            loop {
                match queue.take() {
                    Some(piece) => {
                        drop(queue);
                        let result = write(&piece);
                        writer.done(&piece, result);
                        queue = writer.queue();
                    }
                    None => queue = writer.wait(queue),
                }
            }
        });
        Lane { shared, has_thread: thread.is_ok() }
    }

    fn print(&self, stream: Stream, kind: Kind, text: &str) {
        let text = without_secrets(text);
        let text = os_name::shown(&text);
        let mut queue = self.shared.queue();
        while queue.push(stream, kind, &text) == Pushed::Full {
            queue = self.shared.wait(queue);
        }
        self.told(queue);
    }

    fn with(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = self.shared.queue();
        change(&mut queue);
        self.told(queue);
    }

    /// Something is there to be written.
    fn told<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) {
        while !self.has_thread
            && let Some(piece) = queue.take()
        {
            drop(queue);
            let result = write(&piece);
            self.shared.done(&piece, result);
            queue = self.shared.queue();
        }
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written: for a product as long as that takes, for the rest a while.
    fn settle(&self) {
        let mut queue = self.shared.queue();
        while queue.has_product() {
            queue = self.shared.wait(queue);
        }
        let waited =
            self.shared.changed.wait_timeout_while(queue, PRINT_AT_END_MAX, |queue| !queue.is_settled());
        drop(waited);
    }
}

/// Writes a piece, however long its reader takes. An error comes with the bytes that were written before it.
fn write(piece: &Piece) -> Result<(), (usize, io::Error)> {
    let (out, err) = (io::stdout(), io::stderr());
    let fd = match piece.stream {
        Stream::Out => out.as_fd(),
        Stream::Err => err.as_fd(),
    };
    let mut written = 0;
    while let Some(rest) = piece.bytes.get(written..).filter(|rest| !rest.is_empty()) {
        await_foreground(fd);
        match rustix::io::write(fd, rest) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(n) => written += n,
            Err(Errno::INTR) => {}
            // Somebody who shares the pipe or terminal has made it so.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None);
            }
            Err(errno) => return Err((written, errno.into())),
        }
    }
    Ok(())
}

/// A terminal may be set to stop whoever writes to it from the background: all of the process, its clients' disks too.
fn await_foreground(fd: BorrowedFd<'_>) {
    let is_barred = || {
        let stops = tcgetattr(fd).is_ok_and(|modes| modes.local_modes.contains(LocalModes::TOSTOP));
        stops && tcgetpgrp(fd).is_ok_and(|group| group != rustix::process::getpgrp())
    };
    while is_barred() {
        std::thread::sleep(PRINT_BACKGROUND_LOOK);
    }
}

/// Where the log writes: a message for each of its lines.
#[derive(Debug, Default)]
pub struct LogLine(Vec<u8>);

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogLine {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.0);
        PRINTER.err.print(Stream::Err, Kind::Message, &shown_line(&text));
    }
}
