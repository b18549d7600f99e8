//! Ending early without leaving anything behind.
//!
//! Everything that a run makes (processes, mounts, devices, files) is owned by a value whose drop removes it, so an
//! error on the way cleans up by itself. A signal has to become such an error: a thread waits for it, sets a flag and
//! asks the processes that were started to end, by their ids; whoever waits for one of them comes back, sees the flag,
//! and returns.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::Fallible;
use crate::sys::{Usage, reap};

static STOPPED: AtomicBool = AtomicBool::new(false);
static LIVE: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn live() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    LIVE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// From now on SIGINT, SIGTERM and SIGHUP end what runs, and clean up.
pub fn listen() -> Fallible<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            STOPPED.store(true, Ordering::SeqCst);
            for pid in live().iter() {
                signal(*pid, Signal::TERM);
            }
        }
    })?;
    Ok(())
}

/// An error if a signal came.
pub fn check() -> Fallible<()> {
    if STOPPED.load(Ordering::SeqCst) { Err("stopped by a signal".into()) } else { Ok(()) }
}

/// Remembers a child until [`wait`] has taken leave of it.
pub fn remember(pid: i32) {
    live().insert(pid);
}

/// Sends a signal to a process that was started here and has not been waited for.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

/// Waits for a child's end, without taking leave of it; false if it has not ended and `block` is not set.
pub fn has_ended(pid: i32, block: bool) -> Fallible<bool> {
    let id = Pid::from_raw(pid).ok_or("no process")?;
    let mut options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    if !block {
        options |= WaitIdOptions::NOHANG;
    }
    loop {
        match waitid(WaitId::Pid(id), options) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?.is_some()),
        }
    }
}

/// Waits for a child and takes leave of it. Its id may belong to another process afterwards, so it is forgotten first.
pub fn wait(pid: i32) -> Fallible<(std::process::ExitStatus, Usage)> {
    has_ended(pid, true)?;
    let mut live = live();
    live.remove(&pid);
    Ok(reap(pid)?)
}
