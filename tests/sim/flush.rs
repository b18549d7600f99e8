//! A device whose flush takes as long as keeping what was written since the last one, and which does nothing else
//! meanwhile, as many virtual disks do; in virtual time. A guest's disk and its mirror lie on it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, WriteFlags,
    ZeroFlags,
};
use blockferry::graph::node::{Node, Root};
use blockferry::job::governor::GuestFirst;
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::runner::Ending;
use blockferry::protocol::mem::MemDriver;
use blockferry_ring::sim::{World, WorldConfig};
use blockferry_ring::sync::Notify;
use blockferry_ring::{Buf, Config, Errno, Ring, SharedBuf};

const MIB: u64 = 1 << 20;
const MILLISECOND: u64 = 1_000_000;
const LEN: u64 = 128 * MIB;
/// A gigabyte a second goes in, half of one is kept.
const WRITE_NANOS_PER_BYTE: u64 = 1;
const KEEP_NANOS_PER_BYTE: u64 = 2;

/// The device.
#[derive(Debug)]
struct Device {
    ring: Ring,
    unflushed: Cell<u64>,
    is_flushing: Cell<bool>,
    changed: Notify,
    /// Bytes of each flush.
    flushes: RefCell<Vec<u64>>,
    /// The flush that will fail.
    fails_at: Option<usize>,
}

impl Device {
    async fn ready(&self) {
        self.changed.until(|| (!self.is_flushing.get()).then_some(())).await;
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.ready().await;
        self.is_flushing.set(true);
        let bytes = self.unflushed.take();
        self.flushes.borrow_mut().push(bytes);
        let number = self.flushes.borrow().len() - 1;
        self.ring.sleep(bytes * KEEP_NANOS_PER_BYTE).await;
        self.is_flushing.set(false);
        self.changed.notify();
        if self.fails_at == Some(number) { Err(Errno::EIO) } else { Ok(()) }
    }
}

/// A disk on it.
#[derive(Debug)]
struct Disk {
    device: Rc<Device>,
    memory: MemDriver,
}

impl Driver for Disk {
    fn kind(&self) -> &'static str {
        "slow-to-keep"
    }

    fn name(&self) -> &str {
        self.memory.name()
    }

    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        self.memory.limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.device.ring.boxed(async move {
            self.device.ready().await;
            self.memory.read(offset, buf).await
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.device.ring.boxed(async move {
            self.device.ready().await;
            let len = buf.len() as u64;
            self.device.unflushed.set(self.device.unflushed.get() + len);
            self.device.ring.sleep(len * WRITE_NANOS_PER_BYTE).await;
            self.memory.write(offset, buf, flags).await
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.device.ring.boxed(async move {
            let flushed = self.device.flush().await;
            flushed.map_err(|errno| BlockError::new(Operation::Flush, self.name(), errno))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.memory.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.memory.write_zeroes(offset, len, flags)
    }

    fn block_status(&self, _offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        // Data, all of it: it is to be copied.
        self.device.ring.boxed(async move { Ok(Extent::data(len)) })
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        self.memory.set_permissions(permissions)
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.memory.set_len(len)
    }
}

/// What a mirror did.
struct Told {
    ending: Ending,
    /// Bytes of the flushes until it was ready or over.
    flushes: Vec<u64>,
    /// The longest that the guest waited, in nanoseconds.
    waited: u64,
}

/// Mirrors beside a guest that writes a block each millisecond, or beside none.
fn mirror_beside(guest: bool, guest_first: GuestFirst, fails_at: Option<usize>) -> Told {
    let world = World::new(WorldConfig::new(1));
    let config = Config { arena_bytes: 24 << 20, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).expect("a simulated ring");
    let device = Rc::new(Device {
        ring: ring.clone(),
        unflushed: Cell::default(),
        is_flushing: Cell::default(),
        changed: ring.notify(),
        flushes: RefCell::default(),
        fails_at,
    });
    let disk = |name: &str| {
        let memory = MemDriver::new(&ring, name, LEN, false);
        Node::new(&ring, name, Rc::new(Disk { device: device.clone(), memory }))
    };
    let (source, target) = (disk("source"), disk("target"));
    let (stop, waited) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
    if guest {
        let root = Root::new(&source, false).expect("a root");
        let (ring, stop, waited) = (ring.clone(), stop.clone(), waited.clone());
        ring.clone().spawn(async move {
            let mut rng = Rng::new(7);
            while !stop.get() {
                let mut buf = ring.alloc(4096).await;
                buf.as_mut_slice().fill(rng.next_u64() as u8 | 1);
                let (began, at) = (ring.clock(), rng.below(LEN / 4096) * 4096);
                root.write(at, buf.freeze(), WriteFlags::default()).await.expect("a write");
                waited.set(waited.get().max(ring.clock() - began));
                ring.sleep(MILLISECOND).await;
            }
        });
    }
    let device_there = device.clone();
    let (ending, flushes) = ring.clone().block_on(async move {
        ring.sleep(2000 * MILLISECOND).await;
        let mut options = MirrorOptions::new("m");
        options.detect_zeroes = false;
        options.guest_first = guest_first;
        let job = mirror::start(&ring, &source, &target, options).await.expect("a mirror");
        job.until_ready().await;
        let flushes = device_there.flushes.borrow().clone();
        // In an instant of its own: the guest's latest change may be on its way.
        if job.status().is_ready() {
            job.cancel(false).expect("a job that can be cancelled");
        }
        let ending = job.until_over().await;
        stop.set(true);
        ring.sleep(100 * MILLISECOND).await;
        (ending, flushes)
    });
    Told { ending, flushes, waited: waited.get() }
}

#[test]
fn guests_never_wait_for_the_flush_of_a_whole_disk() {
    let told = mirror_beside(true, GuestFirst::Auto, None);
    assert_eq!(told.ending, Ending::Completed);
    assert!(told.flushes.len() > 8, "{:?}", told.flushes);
    // The first one, whose length nobody knew, and which has what the guest wrote before the job in it.
    assert!(told.waited <= 60 * MILLISECOND, "{} ns, {:?}", told.waited, told.flushes);
    let later = told.flushes.iter().skip(3).max();
    assert!(later.is_some_and(|bytes| bytes * KEEP_NANOS_PER_BYTE < 15 * MILLISECOND), "{:?}", told.flushes);
}

#[test]
fn who_comes_first_or_is_alone_flushes_once() {
    let told = mirror_beside(true, GuestFirst::Off, None);
    assert_eq!((told.ending, told.flushes.len()), (Ending::Completed, 1), "{:?}", told.flushes);
    // What the other test is about.
    assert!(told.waited > 200 * MILLISECOND, "{} ns", told.waited);
    let told = mirror_beside(false, GuestFirst::Auto, None);
    assert_eq!((told.ending, told.flushes.len()), (Ending::Completed, 1), "{:?}", told.flushes);
}

#[test]
fn a_flush_that_fails_while_the_job_copies_is_an_error_like_any_other() {
    let told = mirror_beside(true, GuestFirst::Auto, Some(2));
    assert!(matches!(&told.ending, Ending::Failed(text) if text.contains("Flushing")), "{:?}", told.ending);
    assert_eq!(told.flushes.len(), 3, "{:?}", told.flushes);
}
