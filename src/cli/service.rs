//! What becomes of clients beside a job, and after it.
//!
//! A job may come to any end: its clients keep their disk until they leave it, or until somebody insists. Who asks for the
//! end by a signal first ends the *job*; what is left of the command then is a service that ends with its last client, or
//! after SIGTERM when the drain timeout is over, or with the second signal. A command whose job gave the clients a new disk
//! (`--pivot`), or was told to stay (`--follow`), goes on serving without clients: a guest that has yet to be started, or is
//! restarted, must find its disk.

use blockferry_ring::Ring;
use blockferry_ring::sync::{Either, either};
use clap::Args;
use serde_json::json;

use super::Global;
use super::exit::{Exit, Failure};
use super::image::duration;
use super::print::{self, say};
use super::serve::Exports;
use super::signals::{Asked, Signal, Signals};
use crate::base::limits::SERVICE_LINGER_NANOS;
use crate::base::units::fmt_duration;

/// Options about clients beside a job.
#[derive(Clone, Copy, Debug, Args)]
pub struct ServiceArgs {
    /// Go on serving without clients, until a signal. With --pivot and --follow a completed job's service goes on
    /// by itself until somebody has come, and ends some seconds after the last client has left
    #[arg(long, requires = "export", conflicts_with = "exit_on_done")]
    persistent: bool,
    /// End with the last client, with --pivot and --follow too; without a client, with the job
    #[arg(long, requires = "export", conflicts_with_all = ["persistent", "exit_on_done"])]
    no_persistent: bool,
    /// Begin the job when the first client has connected
    #[arg(long, requires = "export")]
    pub wait_client: bool,
    /// After SIGTERM, clients that stay are disconnected after this time (0: at once)
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    drain_timeout: u64,
    /// End when the job ends, even if clients are still connected
    #[arg(long, requires = "export")]
    pub exit_on_done: bool,
}

/// How long a service goes on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// As long as there are clients.
    WithClients,
    /// Until clients have been there and have stayed away for a while.
    WithVisitors,
    /// Until a signal.
    Forever,
}

impl ServiceArgs {
    /// How long clients are served after a job. `stays`: what the job was for needs a service that stays.
    pub fn persistence(&self, stays: bool) -> Persistence {
        match (self.persistent, stays && !self.no_persistent) {
            (true, _) => Persistence::Forever,
            (false, true) => Persistence::WithVisitors,
            (false, false) => Persistence::WithClients,
        }
    }
}

/// The clients of one command.
#[derive(Debug)]
pub struct Service<'a> {
    /// Options of every command.
    pub global: &'a Global,
    /// The ring.
    pub ring: &'a Ring,
    /// What ends it.
    pub signals: &'a Signals,
    /// Where they connect.
    pub exports: &'a Exports,
    /// No word unless a signal came.
    pub quiet: bool,
    /// What was said of them.
    pub args: ServiceArgs,
}

impl Service<'_> {
    /// Waits for the first client, if that is wanted. False: a signal came instead.
    pub async fn first_client(&self) -> bool {
        if !self.args.wait_client {
            return true;
        }
        if !self.quiet && !self.global.json {
            say!("Waiting for a client at {}", self.exports.places().join(" and "));
        }
        matches!(either(self.exports.until_used(), self.signals.next_ending()).await, Either::First(()))
    }

    /// Serves those who are there, and those who come if the service stays, until it is over. `asked`: a signal has asked
    /// for the end already.
    pub async fn go_on(&self, persistence: Persistence, mut asked: Option<Asked>) {
        let mut is_told = false;
        loop {
            let clients = self.exports.clients();
            let ends = asked.is_some() || persistence == Persistence::WithClients;
            if self.exports.places().is_empty() || ends && clients == 0 {
                return;
            }
            if !std::mem::replace(&mut is_told, true) {
                self.tell(persistence, asked);
            }
            let over = async {
                match (asked, persistence) {
                    (Some(asked), _) => self.until_drained(asked).await,
                    (None, Persistence::WithClients) => self.exports.until_unused().await,
                    (None, Persistence::WithVisitors) => self.until_stayed_away().await,
                    (None, Persistence::Forever) => std::future::pending().await,
                }
            };
            match either(self.signals.next(), over).await {
                Either::Second(()) => return,
                Either::First(signal) if signal.is_ending() => {
                    if asked.is_some() {
                        return;
                    }
                    asked = Some(Asked { signal, at_ns: self.ring.clock() });
                    is_told = false;
                }
                Either::First(Signal::Report) => is_told = false,
                Either::First(_) => {}
            }
        }
    }

    /// The last client has left, or it has had its time.
    async fn until_drained(&self, asked: Asked) {
        let unused = self.exports.until_unused();
        if asked.signal == Signal::Interrupt {
            return unused.await;
        }
        let end = asked.at_ns.saturating_add(self.args.drain_timeout);
        either(unused, self.ring.sleep(end.saturating_sub(self.ring.clock()))).await;
    }

    /// Clients have been there, and none has come back.
    async fn until_stayed_away(&self) {
        loop {
            self.exports.idle().await;
            let back = self.exports.until_used();
            if let Either::Second(()) = either(back, self.ring.sleep(SERVICE_LINGER_NANOS)).await {
                return;
            }
        }
    }

    fn tell(&self, persistence: Persistence, asked: Option<Asked>) {
        let (clients, places) = (self.exports.clients(), self.exports.places());
        if self.global.json {
            print::event(&json!({"event": "serving", "clients": clients, "uris": places}));
        } else if !self.quiet || asked.is_some() {
            let until = match (asked, persistence) {
                (Some(Asked { signal: Signal::Terminate, .. }), _) => format!(
                    "until the last has left, {} at most; again to end",
                    fmt_duration(self.args.drain_timeout)
                ),
                (Some(_), _) => "until the last has left; again to end".to_owned(),
                (None, Persistence::WithClients) => "until the last has left".to_owned(),
                (None, Persistence::WithVisitors) => {
                    let first = if clients == 0 { "waits for one, and " } else { "" };
                    let away = fmt_duration(SERVICE_LINGER_NANOS);
                    format!("{first}ends when the last has been away for {away}, or at a signal")
                }
                (None, Persistence::Forever) => "goes on until a signal".to_owned(),
            };
            let who = match clients {
                0 => "without a client".to_owned(),
                1 => "1 client".to_owned(),
                n => format!("{n} clients"),
            };
            say!("Still serving {who} at {}: {until}", places.join(" and "));
        }
    }

    /// Ends it. What clients have written is flushed; a signal ends it at once, with this exit code.
    pub async fn end(&self, exit: Exit) -> Result<(), Failure> {
        match either(self.exports.stop(), self.signals.next_ending()).await {
            Either::First(Ok(())) => Ok(()),
            // What does not end now would hold up the end of the process, too.
            Either::First(Err(failure)) => {
                print::failure(self.global.json, &failure);
                self.at_once(Exit::Failed)
            }
            Either::Second(_) => self.at_once(exit),
        }
    }

    /// Ends the process: for those who have asked twice.
    pub fn at_once(&self, exit: Exit) -> ! {
        self.exports.forget();
        at_once(exit)
    }
}

/// Ends the process, whatever is still in flight.
pub fn at_once(exit: Exit) -> ! {
    super::signals::let_go();
    std::process::exit(i32::from(print::finish(exit).code()))
}
