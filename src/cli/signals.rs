//! SIGINT, SIGTERM, SIGHUP, SIGCONT and SIGUSR1 as things that a task can wait for.
//!
//! The handler writes a byte into a socket pair, whose other end a task receives from through the ring:
//! no thread, no lost signal, no work in the handler. A SIGHUP that was ignored when the program started stays ignored:
//! that is what `nohup` is for. Once a command has done its work and only its reader is waited for, signals end the process
//! as they end any other.
//!
//! Before a command has begun to change anything, or to serve anybody, nothing has to be undone: it is asking servers, or
//! looks what speaks against it. A signal ends it there and then, with a word. A thread sees to that ([`watch`]), because the
//! reactor may be busy with just what is being waited for.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use blockferry_ring::sync::Notify;
use blockferry_ring::{Nanos, Ring};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;

use serde_json::json;

use super::exit::{Exit, Failure};
use super::print;

/// A signal that a command heeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// From the keyboard, or a polite supervisor.
    Interrupt,
    /// From a supervisor (SIGTERM, SIGHUP).
    Terminate,
    /// Go on with what an error has stopped (SIGCONT).
    Continue,
    /// Say how far it is (SIGUSR1).
    Report,
}

impl Signal {
    /// Whether it asks the command to end.
    pub fn is_ending(self) -> bool {
        matches!(self, Signal::Interrupt | Signal::Terminate)
    }
}

/// A signal that has asked the command to end, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which.
    pub signal: Signal,
    /// When, by the ring's clock, in nanoseconds.
    pub at_ns: Nanos,
}

/// The command's work is done: signals end the process.
static DONE: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// A command receives signals itself ([`Signals`]).
static LISTENS: AtomicBool = AtomicBool::new(false);

/// The command has begun: a signal is no longer answered by ending at once.
static BEGUN: Mutex<bool> = Mutex::new(false);

/// From now on something is changed, or somebody is served: the command heeds signals itself, or the kernel does what it
/// does of itself.
pub fn begin() {
    *BEGUN.lock().unwrap_or_else(PoisonError::into_inner) = true;
    if !LISTENS.load(Ordering::Relaxed) {
        DONE.store(true, Ordering::Relaxed);
    }
}

/// Until the command begins, signals end it with a word; `exit` is how. Where no thread is to be had they do what they do
/// by themselves.
pub fn watch(json: bool, exit: Exit) -> Result<(), Failure> {
    let (mut from, to) = UnixStream::pair().map_err(|error| failed(&error))?;
    let thread = std::thread::Builder::new().name("signals".into()).stack_size(256 << 10);
    let watching = thread.spawn(move || {
        let mut byte = [0];
        while from.read_exact(&mut byte).is_ok() {
            // While this is held nothing begins.
            let begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
            if !*begun {
                cancelled(json, exit);
            }
        }
    });
    if watching.is_err() {
        return Ok(());
    }
    for number in ending_signals() {
        ends_when_done(number)?;
        let to = to.try_clone().map_err(|error| failed(&error))?;
        signal_hook::low_level::pipe::register(number, to).map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// Has a signal end the process once [`DONE`]. Registered once, before all that is told of the signal: what is told of it
/// may set that, and the same signal must not end what its first listener has begun to end.
fn ends_when_done(number: i32) -> Result<(), Failure> {
    static ALL: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    if !all.contains(&number) {
        flag::register_conditional_default(number, DONE.clone()).map_err(|error| failed(&error))?;
        all.push(number);
    }
    Ok(())
}

/// Ends a command that has not begun.
fn cancelled(json: bool, exit: Exit) -> ! {
    const WORD: &str = "Cancelled before it began";
    // A second one does not wait for whoever reads this.
    DONE.store(true, Ordering::Relaxed);
    if json {
        print::ending(json!({"event": "end", "ending": "cancelled", "message": WORD}), exit);
    }
    print::say_line(WORD);
    std::process::exit(i32::from(print::finish(exit).code()))
}

/// Signals that ask for the end; one that was ignored when the program started stays ignored.
fn ending_signals() -> impl Iterator<Item = i32> {
    let ignored = ignored_signals(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
    let is_heeded = move |number: &i32| *number != SIGHUP || ignored & (1 << (SIGHUP - 1)) == 0;
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(is_heeded)
}

/// Signals that would end the process and mean nothing of the kind: a limit on the size of files is an error of the
/// request that meets it, and SIGUSR1 is a question, also to commands that have no answer.
pub fn defuse() -> Result<(), Failure> {
    for number in [SIGXFSZ, SIGUSR1] {
        flag::register(number, Arc::default()).map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// From now on signals end the process, as if nobody listened to them.
pub fn let_go() {
    *BEGUN.lock().unwrap_or_else(PoisonError::into_inner) = true;
    DONE.store(true, Ordering::Relaxed);
}

fn failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::text(format!("Signals cannot be received: {error}"))
}

/// Receives signals.
#[derive(Clone, Debug)]
pub struct Signals {
    queue: Rc<RefCell<VecDeque<Signal>>>,
    came: Notify,
}

impl Signals {
    /// Once the command has [begun](begin) the signals end nothing by themselves.
    pub fn new(ring: &Ring) -> Result<Signals, Failure> {
        let signals = Signals { queue: Rc::default(), came: ring.notify() };
        for number in ending_signals() {
            let signal = if number == SIGINT { Signal::Interrupt } else { Signal::Terminate };
            ends_when_done(number)?;
            signals.listen(ring, number, signal)?;
        }
        signals.listen(ring, SIGUSR1, Signal::Report)?;
        LISTENS.store(true, Ordering::Relaxed);
        Ok(signals)
    }

    /// SIGCONT is told as well: for commands that can be stopped by an error.
    pub fn with_continue(self, ring: &Ring) -> Result<Signals, Failure> {
        self.listen(ring, SIGCONT, Signal::Continue)?;
        Ok(self)
    }

    fn listen(&self, ring: &Ring, number: i32, signal: Signal) -> Result<(), Failure> {
        let (to, from) = UnixStream::pair().map_err(|error| failed(&error))?;
        signal_hook::low_level::pipe::register(number, to).map_err(|error| failed(&error))?;
        let from = ring.adopt(from.into()).map_err(|errno| failed(&errno))?;
        let (queue, came, r) = (self.queue.clone(), self.came.clone(), ring.clone());
        ring.spawn(async move {
            loop {
                let (_, result) = r.recv(&from, r.alloc(16).await).await;
                match result {
                    Ok(n) if n > 0 => {
                        queue.borrow_mut().push_back(signal);
                        came.notify();
                    }
                    _ => break,
                }
            }
        });
        Ok(())
    }

    /// The next one, if one has come.
    pub fn try_next(&self) -> Option<Signal> {
        self.queue.borrow_mut().pop_front()
    }

    /// Waits for one that asks to end.
    pub async fn next_ending(&self) -> Signal {
        loop {
            let signal = self.next().await;
            if signal.is_ending() {
                return signal;
            }
        }
    }

    /// Waits for the next one.
    pub async fn next(&self) -> Signal {
        self.came.until(|| self.try_next()).await
    }
}

/// The signals that are ignored, a bit each, as the kernel tells it of a process.
fn ignored_signals(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_mask_is_read() {
        assert_eq!(ignored_signals("SigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\n"), 0x1001);
        assert_eq!(ignored_signals("Name:\tx\n"), 0);
        assert_eq!(ignored_signals("SigIgn:\tstrange\n"), 0);
    }
}
