//! Guests: clients of the disk, each with several requests in flight, each answer compared with the model.

use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::block::{Driver, IoResult, WriteFlags, ZeroFlags};
use blockferry::graph::node::Root;
use blockferry::protocol::nbd::NbdDriver;
use blockferry_ring::{Buf, Errno, SharedBuf};

use super::model::{Words, Write};
use super::nbd::Remote;
use super::plan::{Guest, Join};
use super::rig::Rig;
use super::watch;

/// How a client reaches the disk.
#[derive(Clone)]
pub enum Client {
    /// A handle in the same program.
    Root(Root),
    /// Over NBD.
    Remote(Rc<Remote>),
}

/// One request's way to the disk.
enum Way {
    Root(Root),
    Remote(Rc<NbdDriver>),
}

impl Client {
    /// The way for the next request; `None`: the client is cut off for good.
    async fn way(&self, rig: &Rig) -> Option<Way> {
        match self {
            Client::Root(root) => Some(Way::Root(root.clone())),
            Client::Remote(remote) => remote.driver(rig).await.map(Way::Remote),
        }
    }
}

impl Way {
    async fn read(&self, offset: u64, buf: Buf) -> (Buf, IoResult) {
        match self {
            Way::Root(root) => root.read(offset, buf).await,
            Way::Remote(driver) => driver.read(offset, buf).await,
        }
    }

    async fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoResult {
        match self {
            Way::Root(root) => root.write(offset, buf, flags).await,
            Way::Remote(driver) => driver.write(offset, buf, flags).await,
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoResult {
        match self {
            Way::Root(root) => root.write_zeroes(offset, len, flags).await,
            Way::Remote(driver) => driver.write_zeroes(offset, len, flags).await,
        }
    }

    async fn discard(&self, offset: u64, len: u64) -> IoResult {
        match self {
            Way::Root(root) => root.discard(offset, len).await,
            Way::Remote(driver) => driver.discard(offset, len).await,
        }
    }

    async fn flush(&self) -> IoResult {
        match self {
            Way::Root(root) => root.flush().await,
            Way::Remote(driver) => driver.flush().await,
        }
    }

    /// A request has ended; false when nobody knows how, because the connection is lost.
    fn judge(&self, rig: &Rig, result: &IoResult) -> bool {
        let Err(error) = result else { return true };
        if let Way::Remote(driver) = self
            && Remote::is_lost(driver)
        {
            rig.count("requests lost with a connection");
            if rig.plan.stream.is_empty() && !rig.is_stopped() {
                rig.fail(format!("a connection was lost in a healthy world: {error}"));
            }
            return false;
        }
        if !rig.guests_may_fail() {
            rig.fail(format!("a guest's request failed in a healthy world: {error}"));
        }
        true
    }

    /// The end of a write.
    fn end_write(&self, rig: &Rig, write: Write, result: &IoResult, durable: bool) {
        if self.judge(rig, result) {
            let (cells, begun) = (write.cells(), write.begun());
            rig.model.borrow_mut().end_write(write, result.is_ok(), durable);
            watch::check_synced(rig, cells, begun);
        } else {
            rig.lost.add(write);
        }
    }
}

/// Starts the clients that the plan has.
pub fn start_all(rig: &Rc<Rig>) {
    for (index, plan) in rig.plan.guests.clone().into_iter().enumerate() {
        let rng = rig.fork_rng();
        rig.guests.set(rig.guests.get() + 1);
        rig.ring.spawn(connect(rig.clone(), index, plan, rng));
    }
}

/// A client connects when its time has come, works, and goes.
async fn connect(rig: Rc<Rig>, index: usize, plan: Guest, mut rng: Rng) {
    match plan.join {
        Join::Start => {}
        Join::At(nanos) => {
            rig.ring.sleep(nanos).await;
            rig.count("clients that came in the middle");
        }
        Join::WhenDrained => {
            let is_shut = || {
                let shut = rig.current.borrow().node.is_drained();
                (shut || rig.is_stopped()).then_some(shut)
            };
            if rig.shut.until(is_shut).await {
                rig.count("clients that came while the door was shut");
                rig.grant(8);
            }
        }
    }
    let roots = rig.roots();
    let client = match roots.get(index % roots.len().max(1)) {
        Some(_) if plan.remote => Client::Remote(Remote::new(&rig, &mut rng)),
        Some(root) => Client::Root(root.client()),
        None => return leave(&rig),
    };
    drop(roots);
    for _ in 0..plan.depth {
        rig.guests.set(rig.guests.get() + 1);
        rig.ring.spawn(work(rig.clone(), client.clone(), plan.clone(), rng.fork()));
    }
    leave(&rig);
}

fn leave(rig: &Rig) {
    rig.guests.set(rig.guests.get() - 1);
    rig.go.notify();
}

/// One request after the other.
async fn work(rig: Rc<Rig>, client: Client, plan: Guest, mut rng: Rng) {
    while rig.take_grant().await {
        let Some(way) = client.way(&rig).await else { break };
        request(&rig, &way, &plan, &mut rng).await;
        rig.answered.set(rig.answered.get() + 1);
        if plan.think_nanos > 0 {
            rig.ring.sleep(rng.below(2 * plan.think_nanos)).await;
        }
    }
    if let Client::Remote(remote) = &client {
        remote.leave().await;
    }
    leave(&rig);
}

fn draw_range(rig: &Rig, plan: &Guest, rng: &mut Rng) -> (u64, u64) {
    let cell = rig.plan.cell as u64;
    let (start, bytes) = if rng.below(2) == 0 { rig.plan.hot } else { (0, rig.plan.len) };
    let cells_max = (plan.request_bytes_max.min(bytes) / cell).max(1);
    // Small requests are as frequent as large ones.
    let cells = 1 + rng.below(1 + rng.clone().below(cells_max));
    let cells = cells.min(cells_max);
    let mut offset = start / cell + rng.below(bytes / cell - cells + 1);
    let mut cells = cells;
    if rng.below(3) == 0 {
        // Whole pages, as a filesystem has them.
        let page = 4096 / cell;
        offset -= offset % page;
        cells = cells.next_multiple_of(page).min(rig.plan.len / cell - offset);
    }
    (offset * cell, cells * cell)
}

async fn request(rig: &Rig, way: &Way, plan: &Guest, rng: &mut Rng) {
    const NAMES: [&str; 6] = ["read", "write", "durable write", "zeroes", "discard", "flush"];
    const COUNTS: [&str; 6] = [
        "guests: reads",
        "guests: writes",
        "guests: durable writes",
        "guests: zeroes",
        "guests: discards",
        "guests: flushes",
    ];
    let (offset, len) = draw_range(rig, plan, rng);
    let mut choice = rng.below(plan.mix.iter().sum());
    let mut kind = 0;
    while choice >= plan.mix[kind] {
        choice -= plan.mix[kind];
        kind += 1;
    }
    rig.count(COUNTS[kind]);
    if matches!(way, Way::Remote(_)) {
        rig.count("guests: requests over NBD");
    }
    let number = rig.model.borrow_mut().next();
    rig.say(|| format!("guest {number}: {} at {offset}, {len} bytes", NAMES[kind]));
    match kind {
        0 => read(rig, way, offset, len, rng).await,
        1 | 2 => write(rig, way, offset, len, kind == 2, rng).await,
        3 => zeroes(rig, way, offset, len, rng).await,
        4 => {
            let write = rig.model.borrow_mut().begin_write(offset, len, Words::Any);
            let result = way.discard(offset, len).await;
            way.end_write(rig, write, &result, false);
        }
        _ => {
            let flush = rig.model.borrow_mut().begin_flush();
            let result = way.flush().await;
            if way.judge(rig, &result) && result.is_ok() {
                rig.model.borrow_mut().end_flush(flush);
            }
        }
    }
    rig.say(|| format!("guest {number}: answered"));
}

async fn zeroes(rig: &Rig, way: &Way, offset: u64, len: u64, rng: &mut Rng) {
    let flags =
        ZeroFlags { fua: rng.below(4) == 0, may_unmap: rng.below(2) == 0, no_fallback: rng.below(8) == 0 };
    let write = rig.model.borrow_mut().begin_write(offset, len, Words::Zero);
    let result = way.write_zeroes(offset, len, flags).await;
    if flags.no_fallback && result.as_ref().is_err_and(|error| error.errno == Errno::EOPNOTSUPP) {
        // As was asked for. It may have been done in part.
        rig.model.borrow_mut().end_write(write, false, false);
        return;
    }
    way.end_write(rig, write, &result, flags.fua);
}

async fn write(rig: &Rig, way: &Way, offset: u64, len: u64, fua: bool, rng: &mut Rng) {
    let words = Words::Stamp(rng.next_u64());
    let mut buf = rig.ring.alloc(len as usize).await;
    rig.model.borrow().fill(offset, words, buf.as_mut_slice());
    let write = rig.model.borrow_mut().begin_write(offset, len, words);
    let result = way.write(offset, buf.freeze(), WriteFlags { fua }).await;
    way.end_write(rig, write, &result, fua);
}

async fn read(rig: &Rig, way: &Way, offset: u64, len: u64, rng: &mut Rng) {
    // Memory at odd addresses as well: the driver must bounce then.
    let shift = if rng.below(8) == 0 { 8 } else { 0 };
    let buf = rig.ring.alloc(len as usize + shift).await.split_at(shift).1;
    let begun = rig.model.borrow_mut().begin_read();
    let (buf, result) = way.read(offset, buf).await;
    way.judge(rig, &result);
    if result.is_err() {
        rig.model.borrow_mut().end_read_failed(begun);
    } else if let Err(wrong) = rig.model.borrow_mut().end_read(begun, offset, buf.as_slice()) {
        rig.fail(format!("a guest read what nobody wrote: {wrong}"));
    }
}

/// Reads the whole disk as a guest would.
pub async fn read_all(rig: &Rig, root: &Root) {
    let mut at = 0;
    while at < rig.plan.len {
        let len = (rig.plan.len - at).min(64 << 10);
        let buf = rig.ring.alloc(len as usize).await;
        let begun = rig.model.borrow_mut().begin_read();
        let (buf, result) = root.read(at, buf).await;
        if let Err(error) = result {
            return rig.fail(format!("the last read of all failed: {error}"));
        }
        if let Err(wrong) = rig.model.borrow_mut().end_read(begun, at, buf.as_slice()) {
            return rig.fail(format!("the last read of all found what nobody wrote: {wrong}"));
        }
        at += len;
    }
}
