//! An export that stays: one connection or several, made anew when they are lost.
//!
//! Whoever uses a remote disk should not have to know of connections. [`Remote::call`] carries a request out on the
//! connection that has least to do; when that one is lost on the way, the request goes out again on another, at once or
//! when there is one.
//!
//! # When nobody answers
//! One task, the *mender*, dials again whenever there is no connection left, with pauses that grow, for as long as the
//! disk is open. Requests wait for it, but not for ever: for the reconnect delay, counted from the loss; after that they
//! fail at once until there is a connection (QEMU's `reconnect-delay`). A server that says that it shuts down is one that
//! was lost: what it did not do, whoever comes after it does. One that refuses to be connected to again is told of at
//! once, and tried until the delay is over: it may not have all its exports yet.
//!
//! # When a server hangs
//! Then there is no loss, only silence ([`super::silence`]): it is told of, and requests that are not guests' are given up
//! in the end. Their connection takes no more, and another is made. A change that was given up may still be carried out,
//! though, and nothing in the protocol fences it off: it could land on top of a newer one. So it is not sent again by
//! itself, and whoever changes the same place later waits until the old connection has answered or ended, for the
//! reconnect delay at most; then the risk is told and taken. A verification finds what landed last.
//!
//! # What is sent again
//! Reads, questions and flushes change nothing. Writes, zeroes and trims do the same when they are done twice, as long as
//! nothing else was written there between, and who has a write in flight at a place orders no other there. So all of them
//! are sent again. (A server that goes on for long with the requests of a connection that is gone could still carry an old
//! write out after a newer one; nothing in the protocol keeps it from that, and QEMU's client lives with it, too.)
//!
//! Not sent again are requests whose connection ended because the server broke the protocol (it would
//! break it again), requests that were lost many times, and all of them if the export that is found afterwards is not the
//! one that was lost: another size, read-only now, coarser blocks. Then the disk stays broken, because nobody knows what
//! the other disk holds.
//!
//! # What was acknowledged and not flushed
//! Nobody can tell whether the server kept it, if it was the server that went down and not the link. So it is kept here
//! ([`super::unstable`]). After any connection was lost, of one or of several, nothing else goes out before it was written
//! again and flushed. What ended meanwhile on another connection counts as lost, too, and is sent again after it. A flush
//! counts for what was acknowledged before it was sent, if no connection was lost until it succeeded; it goes out on the
//! oldest connection, because whoever answers there has been there ever since: a newer one may already lead to the
//! server's successor.
//!
//! Where it cannot be written again (nothing was to be kept, the server refuses, it is another disk now) this is counted
//! ([`Remote::losses_for_good`]), and those who have written have to hear of it with their next flush.
//!
//! # Several connections
//! Where the server promises that connections see each other's writes, and that a flush covers all of them, more are made
//! when those that there are have work for several. They help servers that serve each with a thread of its own, and
//! links so slow that more requests have to be under way than a server takes from one connection. An export that does not
//! promise that gets one connection, ever.

mod again;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Nanos, Ring};

use super::client_error::{LostReason, NbdClientError};
use super::connection::{ConnectOptions, Connection};
use super::constants::TransmissionFlags;
use super::keeper::Keeper;
use super::kept::Kept;
use super::silence::{Patience, Waiting};
use super::unstable::{Change, Unstable};
use super::uri::NbdUri;
use crate::base::limits::{
    NBD_CONNECTIONS_FEW, NBD_CONNECTIONS_MAX, NBD_GROW_DEPTH, NBD_GROW_DEPTH_FULL, NBD_GROW_PAUSE_NS,
    NBD_LATE_WAIT_NS_MIN, NBD_RECONNECT_PAUSE_NS_MAX, NBD_RECONNECT_PAUSE_NS_MIN, NBD_RESENDS_MAX,
    NBD_SILENCE_AGAIN_NS, NBD_SILENCE_LOOK_NS_MAX, NBD_SILENCE_LOOK_NS_MIN, NBD_SILENCE_TOLD_NS,
    NBD_SILENT_KEPT,
};
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::base::units::fmt_duration;
use crate::block::patience::is_for_job;

/// How a remote disk is reached.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// Where it is.
    pub uri: NbdUri,
    /// Connections at most, where the server allows several; at least one.
    pub connections_max: usize,
    /// How long requests wait for a lost connection to come back. 0: they fail at once.
    pub reconnect_delay_ns: Nanos,
    /// How long opening tries again. 0: it tries once.
    pub open_timeout_ns: Nanos,
    /// How long a silent server is waited for.
    pub patience: Patience,
    /// Bytes of one request at most, data or not; `None`: what the server takes.
    pub request_bytes_max: Option<u32>,
    /// Bytes that were acknowledged and not flushed which are kept at most. 0: none are.
    pub unflushed_bytes_max: u64,
    /// What to ask of the server, and how long a connection may take to come about.
    pub connect: ConnectOptions,
}

impl RemoteOptions {
    /// The usual: a few connections, QEMU's `open-timeout` of 0, and some patience with a link that is cut.
    pub fn new(uri: NbdUri) -> RemoteOptions {
        RemoteOptions {
            uri,
            connections_max: crate::base::limits::NBD_CONNECTIONS,
            reconnect_delay_ns: crate::base::limits::NBD_RECONNECT_DELAY_NS,
            open_timeout_ns: 0,
            patience: Patience::default(),
            request_bytes_max: None,
            unflushed_bytes_max: crate::base::limits::NBD_UNFLUSHED_BYTES,
            connect: ConnectOptions::default(),
        }
    }
}

/// What of an export has to stay as it was when the disk was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
    /// Multiples of this are what the server takes; a power of two.
    pub(super) block_bytes: u32,
    /// What one request may carry.
    pub(super) payload_bytes_max: u32,
    pub(super) multi_conn: bool,
}

impl Facts {
    fn of(connection: &Connection) -> Facts {
        Facts {
            size_bytes: connection.size(),
            read_only: connection.is_read_only(),
            block_bytes: connection.block_sizes().minimum_bytes.max(1),
            payload_bytes_max: connection.payload_bytes_max(),
            multi_conn: connection.can_multi_conn(),
        }
    }

    /// Whether what holds for `self` holds for `other`, too.
    fn hold_for(&self, other: &Facts) -> bool {
        self.size_bytes == other.size_bytes
            && (self.read_only || !other.read_only)
            && self.block_bytes >= other.block_bytes
            && self.payload_bytes_max <= other.payload_bytes_max
    }
}

/// How a request has fared so far.
#[derive(Debug)]
struct Attempts {
    /// Requests of earlier generations are given up.
    generation: u64,
    resends: u32,
    /// Since when the server says that it shuts down, and the pause before the next attempt.
    refused_since: Option<Nanos>,
    pause: Nanos,
}

impl Attempts {
    fn new(generation: u64) -> Attempts {
        Attempts { generation, resends: 0, refused_since: None, pause: NBD_RECONNECT_PAUSE_NS_MIN }
    }
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Remote {
    ring: Ring,
    options: RemoteOptions,
    name: Rc<str>,
    facts: Facts,
    /// Memory for one connection at least.
    kept: Kept,
    connections: RefCell<Vec<Rc<Connection>>>,
    /// What the latest connection can do.
    flags: Cell<TransmissionFlags>,
    has_block_status: Cell<bool>,
    /// Since when there is no connection.
    down_since: Cell<Option<Nanos>>,
    /// Why the latest one was lost, or could not be made.
    reason: RefCell<NbdClientError>,
    /// The export is another one now: nothing will ever succeed.
    changed_export: Cell<bool>,
    closed: Cell<bool>,
    /// Requests of an earlier generation have been given up.
    generation: Cell<u64>,
    /// Another connection is being made, or should not be tried before this time.
    growing: Cell<bool>,
    grow_after: Cell<Nanos>,
    /// Calls that have not ended.
    calls: Cell<usize>,
    /// Somebody keeps watch over them.
    watched: Cell<bool>,
    /// What was acknowledged and not flushed.
    unstable: Unstable,
    /// Connections were lost so often when it was last written again.
    mended: Cell<u64>,
    /// How often in a row there was something to write again, without a flush between that succeeded; the outages when
    /// that was counted; and how often is too often.
    lapses: Cell<u32>,
    lapsed_at: Cell<u64>,
    lapses_max: Cell<Option<u32>>,
    /// How often what was acknowledged could not be written again.
    losses_for_good: Cell<u64>,
    /// A flush is under way that nobody asked for.
    flushing: Cell<bool>,
    /// Told when a connection comes or goes, and at the end.
    keeper: Rc<Keeper>,
}

/// A call that has not ended.
struct Call<'a>(&'a Cell<usize>);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Remote {
    /// Connects; tries again for as long as the options say.
    pub(super) async fn open(ring: &Ring, options: RemoteOptions) -> Result<Rc<Remote>, NbdClientError> {
        let no_memory = |errno| NbdClientError::Connect { uri: options.uri.to_string().into(), errno };
        let kept = Kept::new(ring).map_err(no_memory)?;
        let unstable = Unstable::new(ring, options.unflushed_bytes_max).map_err(no_memory)?;
        let (connection, connect) = Remote::first(ring, &options, &kept).await?;
        let options = RemoteOptions { connect, ..options };
        let name: Rc<str> = options.uri.to_string().into();
        let reason = NbdClientError::Lost { uri: name.clone(), reason: LostReason::ClosedHere };
        let remote = Rc::new(Remote {
            ring: ring.clone(),
            name,
            facts: Facts::of(&connection),
            kept,
            connections: RefCell::default(),
            flags: Cell::new(connection.flags()),
            has_block_status: Cell::new(connection.has_block_status()),
            down_since: Cell::new(None),
            reason: RefCell::new(reason),
            changed_export: Cell::new(false),
            closed: Cell::new(false),
            generation: Cell::new(0),
            growing: Cell::new(false),
            grow_after: Cell::new(0),
            calls: Cell::new(0),
            watched: Cell::new(false),
            unstable,
            mended: Cell::new(0),
            lapses: Cell::new(0),
            lapsed_at: Cell::new(0),
            lapses_max: Cell::new(None),
            losses_for_good: Cell::new(0),
            flushing: Cell::new(false),
            keeper: Keeper::new(ring),
            options,
        });
        remote.add(connection);
        ring.spawn(remote.clone().mend());
        Ok(remote)
    }

    /// The first connection, and what the server takes. Who does not answer, or shuts down, may still be getting ready;
    /// who answers with a refusal means it.
    async fn first(
        ring: &Ring,
        options: &RemoteOptions,
        kept: &Kept,
    ) -> Result<(Rc<Connection>, ConnectOptions), NbdClientError> {
        let begin = ring.clock();
        let end = begin.saturating_add(options.open_timeout_ns);
        let mut tell_at = begin.saturating_add(NBD_SILENCE_TOLD_NS);
        let mut pause = NBD_RECONNECT_PAUSE_NS_MIN;
        let mut connect = options.connect.clone();
        let mut said = None;
        loop {
            let left = end.saturating_sub(ring.clock()).max(1);
            let is_cut_short = options.open_timeout_ns > 0 && left < options.connect.deadline;
            connect.deadline = if is_cut_short { left } else { options.connect.deadline };
            let error = match Connection::learn(ring, &options.uri, &connect, kept).await {
                Ok((connection, learned)) => {
                    return Ok((
                        connection,
                        ConnectOptions { deadline: options.connect.deadline, ..learned },
                    ));
                }
                Err(error) => error,
            };
            let now = ring.clock();
            if error.is_definite() || options.open_timeout_ns == 0 {
                return Err(error);
            }
            // That the last attempt was cut short says less than what those before it were told.
            let said = match (is_cut_short && error.is_timed_out(), said.take()) {
                (true, Some(before)) => said.insert(before),
                _ => said.insert(error),
            };
            if now >= end {
                return Err(said.clone());
            }
            if now >= tell_at {
                tell_at = now.saturating_add(NBD_SILENCE_AGAIN_NS);
                let waited = fmt_duration(now - begin);
                tracing::warn!(uri = %options.uri, "waiting for the server for {waited}: {said}");
            }
            ring.sleep(pause.min(end - now)).await;
            pause = (pause * 2).min(NBD_RECONNECT_PAUSE_NS_MAX);
        }
    }

    /// The export's URI.
    pub(super) fn name(&self) -> &Rc<str> {
        &self.name
    }

    /// What holds for the disk's whole life.
    pub(super) fn facts(&self) -> Facts {
        self.facts
    }

    /// What the latest connection offers, whether it is there still or not.
    pub(super) fn offers(&self, flag: TransmissionFlags) -> bool {
        self.flags.get().contains(flag)
    }

    /// Whether the latest connection can be asked for block status.
    pub(super) fn has_block_status(&self) -> bool {
        self.has_block_status.get()
    }

    /// Connections that are there.
    pub(super) fn connections(&self) -> usize {
        self.connections.borrow().iter().filter(|connection| !connection.is_lost()).count()
    }

    /// A call begins; somebody keeps watch over its server.
    fn begin(self: &Rc<Remote>) -> Call<'_> {
        self.calls.set(self.calls.get() + 1);
        if !self.watched.replace(true) {
            self.ring.spawn(self.clone().watch());
        }
        Call(&self.calls)
    }

    /// Carries a request out, on as many connections after each other as it takes.
    pub(super) async fn call<T>(
        self: &Rc<Remote>,
        mut request: impl AsyncFnMut(&Connection) -> Result<T, NbdClientError>,
    ) -> Result<T, NbdClientError> {
        let _call = self.begin();
        let mut attempts = Attempts::new(self.generation.get());
        loop {
            let connection = self.connection(attempts.generation).await?;
            let error = match request(&connection).await {
                Err(error) if error.is_lost() => error,
                result => return result,
            };
            self.lost_on(&mut attempts, &connection, error).await?;
        }
    }

    /// A request was lost with its connection, or its success with another one: returns when it is to go out again.
    async fn lost_on(
        &self,
        attempts: &mut Attempts,
        connection: &Rc<Connection>,
        error: NbdClientError,
    ) -> Result<(), NbdClientError> {
        self.note_lost(connection, &error);
        let is_ours = self.generation.get() == attempts.generation && !self.closed.get();
        let is_over = error.is_broken_protocol() || error.is_given_up() || !is_ours;
        if is_over || attempts.resends == NBD_RESENDS_MAX {
            return Err(error);
        }
        if error.is_shutting_down() {
            // It did not do it, and whoever comes after it is waited for as for one that was lost.
            let since = *attempts.refused_since.get_or_insert(self.ring.clock());
            let end = since.saturating_add(self.options.reconnect_delay_ns);
            if self.ring.clock() >= end {
                return Err(error);
            }
            self.ring.sleep(attempts.pause).await;
            attempts.pause = (attempts.pause * 2).min(NBD_RECONNECT_PAUSE_NS_MAX);
            return Ok(());
        }
        attempts.resends += 1;
        tracing::debug!(uri = %self.name, attempts.resends, "a request was lost with its connection and goes out again");
        Ok(())
    }

    /// A change in this range that was given up and may still be carried out.
    fn late_at(&self, range: ByteRange) -> Option<ByteRange> {
        let connections = self.connections.borrow();
        let late = connections.iter().filter(|connection| connection.is_lost()).flat_map(|c| c.late());
        late.into_iter().find(|late| late.intersect(range).is_some_and(|both| !both.is_empty()))
    }

    /// Waits until nothing that was given up in this range can be carried out any more, or for the reconnect delay.
    async fn settle(&self, range: ByteRange) {
        let end = self.ring.clock().saturating_add(self.options.reconnect_delay_ns.max(NBD_LATE_WAIT_NS_MIN));
        tracing::info!(uri = %self.name, %range, "waiting for the end of a connection on which changes were given up");
        while let Some(late) = self.late_at(range) {
            if self.closed.get() {
                return;
            }
            if self.ring.clock() >= end {
                tracing::warn!(
                    uri = %self.name,
                    range = %late,
                    "a change that was given up may still be carried out, after newer ones; --verify would find it"
                );
                // Told once: nothing is known of them from here on.
                let connections = self.connections.borrow().clone();
                let silent = connections.iter().filter(|c| !c.late().is_empty() && c.waiting().count == 0);
                silent.for_each(|connection| connection.cut());
                return;
            }
            let pause = NBD_SILENCE_LOOK_NS_MAX.min(end - self.ring.clock()).max(NBD_SILENCE_LOOK_NS_MIN);
            either(self.changed().until(|| self.closed.get().then_some(())), self.ring.sleep(pause / 4))
                .await;
        }
    }

    /// Keeps watch over a server that may fall silent, while it is asked anything: tells of it, and gives up what does not
    /// wait for ever.
    async fn watch(self: Rc<Remote>) {
        let patience = self.options.patience;
        let shortest =
            [patience.job_ns, patience.guest_ns, NBD_SILENCE_TOLD_NS].into_iter().filter(|ns| *ns > 0);
        let look = shortest.min().unwrap_or(NBD_SILENCE_TOLD_NS) / 8;
        let look = look.clamp(NBD_SILENCE_LOOK_NS_MIN, NBD_SILENCE_LOOK_NS_MAX);
        let mut tell_at = None;
        let mut down_told = None;
        while !self.closed.get() && self.calls.get() > 0 {
            either(self.changed().until(|| self.closed.get().then_some(())), self.ring.sleep(look)).await;
            let now = self.ring.clock();
            self.tell_of_loss(now, &mut down_told);
            let connections = self.connections.borrow().clone();
            let mut waiting = Waiting::default();
            connections.iter().for_each(|connection| waiting.join(connection.waiting()));
            let heard = connections.iter().map(|connection| connection.heard()).max().unwrap_or_default();
            let Some((since, _)) = waiting.oldest else { continue };
            let silent_since = since.max(heard);
            if now < silent_since.saturating_add(NBD_SILENCE_TOLD_NS) {
                if tell_at.take().is_some() {
                    tracing::warn!(uri = %self.name, "the server answers again");
                }
            } else if tell_at.is_none_or(|at| now >= at) {
                tracing::warn!(uri = %self.name, "{}", waiting.tell(now, heard));
                tell_at = Some(now.saturating_add(NBD_SILENCE_AGAIN_NS));
            }
            let silent_ns = now - silent_since.min(now);
            let overdue = |since, patience_ns| waiting.is_overdue(now, heard, since, patience_ns);
            let given_up =
                connections.iter().filter(|connection| connection.give_up(silent_ns, overdue)).count();
            if given_up > 0 {
                // Nothing came over any of them: whoever asks next should not try those that are left.
                connections.iter().for_each(|connection| connection.take_no_more(silent_ns));
            }
            self.spare(&connections);
        }
        self.watched.set(false);
    }

    /// Connections that were given up stay for as long as they may answer; of those that hold nothing but memory, a few.
    fn spare(&self, connections: &[Rc<Connection>]) {
        let idle = |c: &&Rc<Connection>| c.is_silent() && c.waiting().count == 0 && c.late().is_empty();
        let idle: Vec<_> = connections.iter().filter(idle).collect();
        let surplus = idle.len().saturating_sub(NBD_SILENT_KEPT);
        idle.iter().take(surplus).for_each(|connection| connection.cut());
    }

    /// Whether the server hangs on a connection that was given up for others: it is not lost, and who waits for ever does.
    fn is_silent(&self) -> bool {
        self.connections.borrow().iter().any(|connection| connection.is_silent())
    }

    /// Says what requests wait for while there is no connection.
    fn tell_of_loss(&self, now: Nanos, told: &mut Option<Nanos>) {
        let Some(since) = self.down_since.get().filter(|_| self.connections() == 0) else {
            *told = None;
            return;
        };
        let due = told.unwrap_or(since.saturating_add(NBD_SILENCE_TOLD_NS));
        if now >= due {
            let (lost_for, reason) = (fmt_duration(now - since), self.reason.borrow().to_string());
            tracing::warn!(uri = %self.name, "waiting for a connection for {lost_for}: {reason}");
            *told = Some(now.saturating_add(NBD_SILENCE_AGAIN_NS));
        }
    }

    /// Carries a change of a range out. It is kept until it has been flushed, unless it is durable when acknowledged and
    /// nothing older is kept that would have to be written before it.
    pub(super) async fn change(
        self: &Rc<Remote>,
        range: ByteRange,
        change: Change<'_>,
        is_durable: bool,
        mut request: impl AsyncFnMut(&Connection) -> Result<(), NbdClientError>,
    ) -> Result<(), NbdClientError> {
        let _call = self.begin();
        // What was given up there comes first, or its connection ends.
        if self.late_at(range).is_some() && !is_planted(Bug::LateWriteNotAwaited) {
            self.settle(range).await;
        }
        let unstable = &self.unstable;
        let data_bytes = if let Change::Data(buf) = change { buf.len() as u64 } else { 0 };
        let mut attempts = Attempts::new(self.generation.get());
        let generation = attempts.generation;
        loop {
            let connection = self.connection(generation).await?;
            let Some(room) = unstable.take_room(data_bytes) else {
                self.room(generation, data_bytes).await;
                continue;
            };
            let lost = self.keeper.lost.get();
            let is_same = || self.keeper.lost.get() == lost;
            let error = match request(&connection).await {
                // Nothing is to be done about servers that promise no durability.
                Ok(()) if is_same() && !self.offers(TransmissionFlags::SEND_FLUSH) => return Ok(()),
                Ok(()) if is_same() && is_durable && needs_no_repeat(unstable) => return Ok(()),
                Ok(()) if is_same() && (unstable.can_keep(data_bytes) || unstable.keeps_nothing()) => {
                    if !(is_durable && unstable.keeps_nothing()) {
                        unstable.keep(room, range, change);
                        self.flush_soon();
                    }
                    return Ok(());
                }
                Ok(()) if is_same() => {
                    self.flush_of(generation).await?;
                    if is_same() {
                        return Ok(());
                    }
                    self.lost_error()
                }
                Ok(()) => self.lost_error(),
                Err(error) if error.is_lost() => error,
                result => return result,
            };
            drop(room);
            self.lost_on(&mut attempts, &connection, error).await?;
        }
    }

    /// Makes durable what was acknowledged so far.
    pub(super) async fn flush(self: &Rc<Remote>) -> Result<(), NbdClientError> {
        self.flush_of(self.generation.get()).await
    }

    async fn flush_of(self: &Rc<Remote>, generation: u64) -> Result<(), NbdClientError> {
        let _call = self.begin();
        let mut attempts = Attempts::new(generation);
        loop {
            let any = self.connection(generation).await?;
            let connection = self.oldest().unwrap_or(any);
            let (lost, mark) = (self.keeper.lost.get(), self.unstable.mark());
            let error = match flush(&connection).await {
                Ok(()) if self.keeper.lost.get() == lost => {
                    let later = is_planted(Bug::FlushCoversLater);
                    self.unstable.flushed(if later { self.unstable.mark() } else { mark });
                    self.lapses.set(0);
                    return Ok(());
                }
                Ok(()) => self.lost_error(),
                Err(error) if error.is_lost() => error,
                result => return result,
            };
            self.lost_on(&mut attempts, &connection, error).await?;
        }
    }

    fn changed(&self) -> &Notify {
        &self.keeper.changed
    }

    fn lost_error(&self) -> NbdClientError {
        NbdClientError::Lost { uri: self.name.clone(), reason: LostReason::ClosedByServer }
    }

    /// Whether there is no connection.
    pub(super) fn is_down(&self) -> bool {
        self.down_since.get().is_some()
    }

    /// Makes all requests that wait or are in flight fail; later ones find a new connection.
    pub(super) fn fail_in_flight(&self) {
        self.generation.set(self.generation.get() + 1);
        let connections = std::mem::take(&mut *self.connections.borrow_mut());
        connections.iter().for_each(|connection| connection.cut());
        self.changed().notify();
    }

    /// Whether there has been no connection for longer than requests wait, or will never be one again.
    pub(super) fn is_out_of_reach(&self) -> bool {
        let is_late = self
            .down_since
            .get()
            .is_some_and(|since| self.ring.clock() >= since.saturating_add(self.options.reconnect_delay_ns));
        self.changed_export.get() || is_late
    }

    /// Says farewell, and waits for that.
    pub(super) async fn disconnect(&self) {
        self.closed.set(true);
        let connections = std::mem::take(&mut *self.connections.borrow_mut());
        self.changed().notify();
        for connection in connections {
            connection.disconnect().await;
        }
    }

    /// Nobody uses the disk any more: says farewell, in the background.
    pub(super) fn close(&self) {
        self.closed.set(true);
        let connections = std::mem::take(&mut *self.connections.borrow_mut());
        for connection in connections {
            self.ring.spawn(async move { connection.disconnect().await });
        }
        self.changed().notify();
    }

    /// The connection for the next request, waiting for one if there is none and that is wanted.
    async fn connection(self: &Rc<Remote>, generation: u64) -> Result<Rc<Connection>, NbdClientError> {
        // A guest for whom a server that hangs is waited for has lost nothing as long as it hangs.
        let waits_for_ever = !is_for_job() && self.options.patience.guest_ns == 0;
        let is_moved = |remote: &Remote| {
            let is_over = remote.closed.get() || remote.changed_export.get();
            is_over || remote.generation.get() != generation || remote.connections() > 0
        };
        loop {
            if self.closed.get() || self.generation.get() != generation {
                return Err(NbdClientError::Lost { uri: self.name.clone(), reason: LostReason::ClosedHere });
            }
            if self.is_lost_too_often() {
                return Err(NbdClientError::LostTooOften {
                    uri: self.name.clone(),
                    times: self.lapses.get(),
                });
            }
            if let Some(connection) = self.best() {
                if self.is_whole() {
                    self.grow(&connection);
                    return Ok(connection);
                }
                // The mender may sleep still, if this is the first to notice.
                self.changed().notify();
                let moved = || {
                    let is_over = self.closed.get() || self.generation.get() != generation;
                    let is_moved = self.is_whole() || self.connections() == 0 || self.is_lost_too_often();
                    (is_over || is_moved).then_some(())
                };
                self.changed().until(moved).await;
                continue;
            }
            let since = self.down_since.get().unwrap_or(self.ring.clock());
            self.down_since.set(Some(since));
            // The mender may sleep still, if this is the first to notice.
            self.changed().notify();
            let hangs = waits_for_ever && self.is_silent() && !self.changed_export.get();
            if hangs {
                self.changed().until(|| (!self.is_silent() || is_moved(self)).then_some(())).await;
                continue;
            }
            // And then lost it only when the last of its connections ended, however long ago that was given up.
            let lost_at = if waits_for_ever { since.max(self.keeper.ended_at.get()) } else { since };
            let end = lost_at.saturating_add(self.options.reconnect_delay_ns);
            if self.changed_export.get() || self.ring.clock() >= end {
                return Err(self.reason.borrow().clone());
            }
            let moved = self.changed().until(|| is_moved(self).then_some(()));
            either(moved, self.ring.sleep_until(end)).await;
        }
    }

    /// The one that has been there for longest.
    fn oldest(&self) -> Option<Rc<Connection>> {
        self.connections.borrow().iter().find(|connection| !connection.is_lost()).cloned()
    }

    /// The one with least to do; among equals the first, so that few requests share one and leave together.
    fn best(&self) -> Option<Rc<Connection>> {
        let connections = self.connections.borrow();
        let there = connections.iter().filter(|connection| !connection.is_lost());
        there.min_by_key(|connection| connection.in_flight() / NBD_GROW_DEPTH).cloned()
    }

    /// Makes another connection in the background, where that is allowed and this one has enough to do.
    fn grow(self: &Rc<Remote>, busy: &Connection) {
        let there = self.connections();
        let enough = if there < NBD_CONNECTIONS_FEW { NBD_GROW_DEPTH } else { NBD_GROW_DEPTH_FULL };
        let wanted = busy.in_flight() >= enough && self.facts.multi_conn && !self.growing.get();
        let max = self.options.connections_max.min(NBD_CONNECTIONS_MAX);
        if !wanted || there >= max || self.ring.now() < self.grow_after.get() {
            return;
        }
        self.growing.set(true);
        let remote = self.clone();
        self.ring.spawn(async move {
            let closed = remote.changed().until(|| remote.closed.get().then_some(()));
            let made = either(remote.dial(), closed).await;
            remote.growing.set(false);
            match made {
                Either::First(Ok(connection)) if !remote.closed.get() => {
                    remote.add(connection);
                }
                Either::First(Err(error)) => {
                    // Some servers take one client at a time whatever they say.
                    tracing::debug!(uri = %remote.name, %error, "no further connection");
                    remote.grow_after.set(remote.ring.clock().saturating_add(NBD_GROW_PAUSE_NS));
                }
                _ => {}
            }
        });
    }

    /// A further connection to the same export.
    async fn dial(&self) -> Result<Rc<Connection>, NbdClientError> {
        let options = &self.options;
        let connection =
            Connection::connect_with(&self.ring, &options.uri, &options.connect, &self.kept).await?;
        if !self.facts.hold_for(&Facts::of(&connection)) {
            return Err(NbdClientError::ChangedExport { uri: self.name.clone() });
        }
        if !connection.can_multi_conn() && self.connections() > 0 {
            return Err(NbdClientError::ChangedExport { uri: self.name.clone() });
        }
        Ok(connection)
    }

    fn add(&self, connection: Rc<Connection>) {
        connection.tell_when_lost(&self.keeper);
        connection.set_patience(self.options.patience);
        self.flags.set(connection.flags());
        self.has_block_status.set(connection.has_block_status());
        let mut connections = self.connections.borrow_mut();
        connections.retain(|connection| !connection.is_over());
        connections.push(connection);
        drop(connections);
        self.down_since.set(None);
        self.changed().notify();
    }

    fn note_lost(&self, connection: &Rc<Connection>, error: &NbdClientError) {
        if !connection.is_lost() {
            // What came over it counts as lost because another one was.
            return;
        }
        let mut connections = self.connections.borrow_mut();
        // One that only takes no more is kept until what it has in hand has ended.
        connections.retain(|other| !Rc::ptr_eq(other, connection) || !other.is_over());
        if connection.is_lost() {
            *self.reason.borrow_mut() = error.clone();
        }
    }

    /// Dials whenever there is no connection, until the disk is closed.
    async fn mend(self: Rc<Remote>) {
        let closed = || self.closed.get().then_some(());
        loop {
            let is_needed = || {
                let is_work = self.connections() == 0 || !self.is_whole();
                (self.closed.get() || is_work && !self.changed_export.get()).then_some(())
            };
            self.changed().until(is_needed).await;
            if self.closed.get() {
                return;
            }
            if self.connections() > 0 {
                either(self.write_again(), self.changed().until(closed)).await;
                continue;
            }
            self.forget_lost();
            let mut refusal_told = false;
            let mut pause = NBD_RECONNECT_PAUSE_NS_MIN;
            while self.connections() == 0 {
                match either(self.dial(), self.changed().until(closed)).await {
                    Either::Second(()) => return,
                    Either::First(Ok(connection)) => {
                        tracing::info!(uri = %self.name, "connected again");
                        self.add(connection);
                        break;
                    }
                    Either::First(Err(error)) => {
                        tracing::debug!(uri = %self.name, %error, "connecting again failed");
                        // It may not have all its exports yet; but nobody should have to guess what is waited for.
                        if error.is_definite() && !std::mem::replace(&mut refusal_told, true) {
                            tracing::warn!(uri = %self.name, %error, "the server refuses to be connected to again");
                        }
                        let is_another = matches!(error, NbdClientError::ChangedExport { .. });
                        *self.reason.borrow_mut() = error;
                        if is_another {
                            tracing::error!(uri = %self.name, "the export is not the one that it was: given up");
                            self.changed_export.set(true);
                            self.lose_for_good("the export is another one");
                            self.changed().notify();
                            break;
                        }
                    }
                }
                either(self.ring.sleep(pause), self.changed().until(closed)).await;
                pause = (pause * 2).min(NBD_RECONNECT_PAUSE_NS_MAX);
            }
        }
    }

    /// Notes that there is no connection any more, and why.
    fn forget_lost(&self) {
        if let Some(error) = self.connections.borrow().iter().find_map(|connection| connection.lost()) {
            *self.reason.borrow_mut() = error;
        }
        self.connections.borrow_mut().retain(|connection| !connection.is_over());
        let since = self.down_since.get().unwrap_or(self.ring.clock());
        self.down_since.set(Some(since));
        let error = self.reason.borrow().clone();
        let what = match error.is_given_up() {
            true => "the server hangs: its connections are asked nothing more",
            false => "there is no connection any more",
        };
        // Whoever gave up may have been the last one who used it.
        tracing::info!(uri = %self.name, reason = %error, "{what}; for as long as the disk is in use, another one is tried");
    }
}

/// Whether a durable write can be forgotten: nothing older is there that would be written over it.
fn needs_no_repeat(unstable: &Unstable) -> bool {
    unstable.is_empty() || is_planted(Bug::DurableNotKept)
}

/// A flush, where there is such a thing.
pub(super) async fn flush(connection: &Connection) -> Result<(), NbdClientError> {
    if connection.flags().contains(TransmissionFlags::SEND_FLUSH) { connection.flush().await } else { Ok(()) }
}
