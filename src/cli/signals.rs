//! SIGINT, SIGTERM and SIGHUP as things that a task can wait for.
//!
//! The handler writes a byte into a socket pair, whose other end is received from through the ring: no
//! thread, no lost signal, no work in the handler.

use std::os::unix::net::UnixStream;

use blockferry_ring::{File, Ring};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::exit::Failure;

/// A signal that asks a command to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// From the keyboard, or a polite supervisor.
    Interrupt,
    /// From a supervisor.
    Terminate,
}

/// Receives signals.
#[derive(Debug)]
pub struct Signals {
    ring: Ring,
    interrupt: File,
    terminate: File,
}

impl Signals {
    /// From now on the signals end nothing by themselves.
    pub fn new(ring: &Ring) -> Result<Signals, Failure> {
        let failed = |error: std::io::Error| Failure::text(format!("Signals cannot be received: {error}"));
        let (interrupt_in, interrupt) = UnixStream::pair().map_err(failed)?;
        let (terminate_in, terminate) = UnixStream::pair().map_err(failed)?;
        let hangup_in = terminate_in.try_clone().map_err(failed)?;
        signal_hook::low_level::pipe::register(SIGINT, interrupt_in).map_err(failed)?;
        signal_hook::low_level::pipe::register(SIGTERM, terminate_in).map_err(failed)?;
        signal_hook::low_level::pipe::register(SIGHUP, hangup_in).map_err(failed)?;
        let adopt = |stream: UnixStream| {
            ring.adopt(stream.into()).map_err(|errno| Failure::text(format!("Signals cannot be received: {errno}")))
        };
        Ok(Signals { ring: ring.clone(), interrupt: adopt(interrupt)?, terminate: adopt(terminate)? })
    }

    /// Waits for the next one.
    pub async fn next(&self) -> Signal {
        use blockferry_ring::sync::{Either, either};
        let one = |file: File| {
            let ring = self.ring.clone();
            async move {
                let buf = ring.alloc(64).await;
                // An error ends the wait too: a command that cannot be ended politely should say so by ending.
                let _ = ring.recv(&file, buf).await;
            }
        };
        match either(one(self.interrupt.clone()), one(self.terminate.clone())).await {
            Either::First(()) => Signal::Interrupt,
            Either::Second(()) => Signal::Terminate,
        }
    }
}
