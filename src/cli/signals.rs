//! SIGINT, SIGTERM, SIGHUP and SIGCONT as things that a task can wait for.
//!
//! The handler writes a byte into a socket pair, whose other end a task receives from through the ring:
//! no thread, no lost signal, no work in the handler.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM};

use super::exit::Failure;

/// A signal that asks a command to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// From the keyboard, or a polite supervisor.
    Interrupt,
    /// From a supervisor (SIGTERM, SIGHUP).
    Terminate,
    /// Go on with what an error has stopped (SIGCONT).
    Continue,
}

/// Receives signals.
#[derive(Clone, Debug)]
pub struct Signals {
    queue: Rc<RefCell<VecDeque<Signal>>>,
    came: Notify,
}

impl Signals {
    /// From now on the signals end nothing by themselves.
    pub fn new(ring: &Ring) -> Result<Signals, Failure> {
        let signals = Signals { queue: Rc::default(), came: ring.notify() };
        for (number, signal) in
            [(SIGINT, Signal::Interrupt), (SIGTERM, Signal::Terminate), (SIGHUP, Signal::Terminate)]
        {
            signals.listen(ring, number, signal)?;
        }
        Ok(signals)
    }

    /// SIGCONT is told as well: for commands that can be stopped by an error.
    pub fn with_continue(self, ring: &Ring) -> Result<Signals, Failure> {
        self.listen(ring, SIGCONT, Signal::Continue)?;
        Ok(self)
    }

    fn listen(&self, ring: &Ring, number: i32, signal: Signal) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::text(format!("Signals cannot be received: {error}"));
        let (to, from) = UnixStream::pair().map_err(failed)?;
        signal_hook::low_level::pipe::register(number, to).map_err(failed)?;
        let from = ring
            .adopt(from.into())
            .map_err(|errno| Failure::text(format!("Signals cannot be received: {errno}")))?;
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
            if signal != Signal::Continue {
                return signal;
            }
        }
    }

    /// Waits for the next one.
    pub async fn next(&self) -> Signal {
        self.came.until(|| self.try_next()).await
    }
}
