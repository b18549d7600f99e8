//! How other threads ask an engine for something.
//!
//! An engine, its nodes and its jobs belong to one thread. A [`Handle`] may go to any: what it is told to do is put into a
//! mailbox, and the engine is woken. A [`SharedDisk`] is the same for the requests of one disk. Nothing here waits, but for
//! [`Handle::call`].
//!
//! # Promises
//! * Every `done` is called exactly once, on the engine's thread, where it must not wait.
//! * Orders of one thread begin in the order in which they were given. Requests on a disk are independent once they have
//!   begun: who wants one after the other waits for the first.
//! * When the engine ends, whatever has not ended is answered with [`Gone`], before the engine's destructor returns; what is
//!   asked for later is answered so at once, on the thread that asks. A change that is answered so may have happened, in
//!   part, or not.
//! * Requests may be of any length; one of more than a mebibyte is done in parts, one after the other.
//! * Memory is the caller's and moves in and out; it is copied once, to or from the engine's registered memory. A guest on
//!   the engine's own thread ([`Guest`](super::guest::Guest)) does without that copy.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Completer, Errno, Ring};
use slab::Slab;

use super::Jobs;
use crate::block::{BlockError, Operation, WriteFlags, ZeroFlags};
use crate::graph::heard::Heard;
use crate::graph::node::{Features, Node, Root};
use crate::job::runner::Job;

/// The engine has ended, or does so before it could answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine has ended")]
pub struct Gone;

/// Why a request of another thread was not done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RequestError {
    /// The disk says so.
    #[error("{message}")]
    Disk {
        /// The kind of error.
        errno: Errno,
        /// What was done where, what went wrong, and the cure, as far as there is one.
        message: String,
    },
    /// The engine has ended. A change may have happened or not.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Orders that begin in one go; then the others of the engine's thread have their turn.
const ORDERS_A_TURN: usize = 64;

type Order = Box<dyn FnOnce(&Here) + Send>;

#[derive(Default)]
struct Post {
    orders: VecDeque<Order>,
    /// Wakes the task that waits for orders.
    sleeper: Option<Completer>,
    has_ended: bool,
}

/// What threads share with the engine.
#[derive(Default)]
pub(super) struct Mailbox(Mutex<Post>);

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").field("orders", &self.post().orders.len()).finish_non_exhaustive()
    }
}

impl Mailbox {
    fn post(&self) -> MutexGuard<'_, Post> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an order in; one that comes too late is dropped, which answers it.
    fn put(&self, order: Order) {
        let mut post = self.post();
        if post.has_ended {
            drop(post);
            drop(order);
            return;
        }
        post.orders.push_back(order);
        let sleeper = post.sleeper.take();
        drop(post);
        if let Some(sleeper) = sleeper {
            sleeper.complete(Ok(0));
        }
    }

    /// Wakes by `sleeper` when there are orders: at once, if there are.
    fn sleep(&self, sleeper: Completer) {
        let mut post = self.post();
        if post.orders.is_empty() && !post.has_ended {
            post.sleeper = Some(sleeper);
        } else {
            drop(post);
            sleeper.complete(Ok(0));
        }
    }

    /// Nothing is taken any more. What waits is answered.
    pub(super) fn end(&self) {
        let mut post = self.post();
        post.has_ended = true;
        let (orders, sleeper) = (std::mem::take(&mut post.orders), post.sleeper.take());
        drop(post);
        drop(orders);
        drop(sleeper);
    }

    fn has_ended(&self) -> bool {
        self.post().has_ended
    }
}

/// An answer that is owed: who drops it says that the engine has ended.
struct Owed<T, F: FnOnce(Result<T, Gone>)>(Option<F>, std::marker::PhantomData<fn(T)>);

impl<T, F: FnOnce(Result<T, Gone>)> Owed<T, F> {
    fn new(done: F) -> Owed<T, F> {
        Owed(Some(done), std::marker::PhantomData)
    }

    fn give(mut self, value: T) {
        if let Some(done) = self.0.take() {
            done(Ok(value));
        }
    }
}

impl<T, F: FnOnce(Result<T, Gone>)> Drop for Owed<T, F> {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(Gone));
        }
    }
}

/// What an order finds on the engine's thread.
#[derive(Debug)]
pub struct Here {
    ring: Ring,
    jobs: Jobs,
    disks: RefCell<Slab<Disk>>,
}

#[derive(Clone, Debug)]
struct Disk {
    root: Root,
    heard: Rc<Heard>,
}

impl Here {
    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The job with this id.
    pub fn job(&self, id: &str) -> Option<Job> {
        self.jobs.get(id)
    }

    /// The ids of all jobs, newest first.
    pub fn job_ids(&self) -> Vec<String> {
        self.jobs.ids()
    }
}

/// A handle of an engine for any thread. Clones lead to the same one; none keeps it alive.
#[derive(Clone, Debug)]
pub struct Handle {
    mailbox: Arc<Mailbox>,
}

impl Handle {
    /// Has `work` begin on the engine's thread, where its future runs to its end; `done` gets what came of it.
    pub fn order<T, W>(
        &self,
        work: impl FnOnce(&Here) -> W + Send + 'static,
        done: impl FnOnce(Result<T, Gone>) + Send + 'static,
    ) where
        T: 'static,
        W: Future<Output = T> + 'static,
    {
        let owed = Owed::new(done);
        self.mailbox.put(Box::new(move |here| {
            let work = work(here);
            here.ring.spawn(async move { owed.give(work.await) });
        }));
    }

    /// The same, and waits for it. Never on the engine's own thread: it would wait for itself.
    pub fn call<T, W>(&self, work: impl FnOnce(&Here) -> W + Send + 'static) -> Result<T, Gone>
    where
        T: Send + 'static,
        W: Future<Output = T> + 'static,
    {
        let (tell, told) = channel();
        self.order(work, move |result| {
            // Whoever waited may be gone.
            let _ = tell.send(result);
        });
        told.recv().unwrap_or(Err(Gone))
    }

    /// Has the engine turn, where it sleeps.
    pub fn wake(&self) {
        self.mailbox.put(Box::new(|_| ()));
    }

    /// Whether the engine has ended.
    pub fn has_ended(&self) -> bool {
        self.mailbox.has_ended()
    }
}

/// A disk of an engine for any thread. The disk is in use as long as there is a clone.
#[derive(Clone, Debug)]
pub struct SharedDisk {
    handle: Handle,
    lease: Arc<Lease>,
    features: Features,
}

/// The use of the disk, which ends with the last clone.
#[derive(Debug)]
struct Lease {
    mailbox: Arc<Mailbox>,
    key: usize,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let key = self.key;
        self.mailbox.put(Box::new(move |here| {
            let disk = here.disks.borrow_mut().try_remove(key);
            drop(disk);
        }));
    }
}

impl SharedDisk {
    /// What can be relied on as long as it is in use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Reads `memory.len()` bytes from `offset` on. The memory comes back in any case in which there still is an engine.
    pub fn read(
        &self,
        offset: u64,
        mut memory: Vec<u8>,
        done: impl FnOnce(Result<Vec<u8>, RequestError>) + Send + 'static,
    ) {
        let work = move |here: &Here, disk: Disk| {
            let ring = here.ring.clone();
            async move {
                for (at, part) in parts(&disk.root, Operation::Read, offset, memory.len())? {
                    let buf = ring.alloc(part.len()).await;
                    let (buf, result) = disk.root.read(at, buf).await;
                    result?;
                    buf.copy_to(0, &mut memory[part]);
                }
                Ok(memory)
            }
        };
        self.request(work, done);
    }

    /// Writes all of `memory` at `offset`.
    pub fn write(
        &self,
        offset: u64,
        memory: Vec<u8>,
        flags: WriteFlags,
        done: impl FnOnce(Result<(), RequestError>) + Send + 'static,
    ) {
        let work = move |here: &Here, disk: Disk| {
            let ring = here.ring.clone();
            disk.heard.writes();
            async move {
                for (at, part) in parts(&disk.root, Operation::Write, offset, memory.len())? {
                    let mut buf = ring.alloc(part.len()).await;
                    buf.copy_from(0, &memory[part]);
                    disk.root.write(at, buf.freeze(), flags).await?;
                }
                Ok(())
            }
        };
        self.request(work, done);
    }

    /// Makes acknowledged writes durable.
    pub fn flush(&self, done: impl FnOnce(Result<(), RequestError>) + Send + 'static) {
        self.request(|_, disk| async move { disk.heard.flush(&disk.root).await }, done);
    }

    /// Gives space back.
    pub fn discard(
        &self,
        offset: u64,
        len: u64,
        done: impl FnOnce(Result<(), RequestError>) + Send + 'static,
    ) {
        let work = move |_: &Here, disk: Disk| {
            disk.heard.writes();
            async move { disk.root.discard(offset, len).await }
        };
        self.request(work, done);
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        done: impl FnOnce(Result<(), RequestError>) + Send + 'static,
    ) {
        let work = move |_: &Here, disk: Disk| {
            disk.heard.writes();
            async move { disk.root.write_zeroes(offset, len, flags).await }
        };
        self.request(work, done);
    }

    fn request<T: 'static, W>(
        &self,
        work: impl FnOnce(&Here, Disk) -> W + Send + 'static,
        done: impl FnOnce(Result<T, RequestError>) + Send + 'static,
    ) where
        W: Future<Output = Result<T, BlockError>> + 'static,
    {
        let owed = Owed::new(move |result: Result<Result<T, BlockError>, Gone>| {
            done(match result {
                Ok(result) => result
                    .map_err(|error| RequestError::Disk { errno: error.errno, message: error.to_string() }),
                Err(gone) => Err(gone.into()),
            });
        });
        // Held until it has begun: the disk is in use.
        let lease = self.lease.clone();
        self.handle.mailbox.put(Box::new(move |here| {
            let disk = here.disks.borrow().get(lease.key).cloned();
            if let Some(disk) = disk {
                let work = work(here, disk);
                here.ring.spawn(async move { owed.give(work.await) });
            }
        }));
    }
}

/// A request of any length in parts that a buffer can hold: where each is on the disk, and in the memory. What does not fit
/// on the disk is refused as a whole.
fn parts(
    root: &Root,
    operation: Operation,
    offset: u64,
    len: usize,
) -> Result<impl Iterator<Item = (u64, Range<usize>)> + use<>, BlockError> {
    root.check(operation, offset, len as u64)?;
    let starts = (0..len).step_by(BLOCK_MAX);
    Ok(starts.map(move |start| (offset + start as u64, start..len.min(start + BLOCK_MAX))))
}

/// The engine's end of the mailbox: carries out what comes, as long as the engine lives.
#[derive(Debug)]
pub(super) struct Desk {
    mailbox: Arc<Mailbox>,
    here: Rc<Here>,
}

impl Desk {
    pub(super) fn open(ring: &Ring, jobs: &Jobs) -> Desk {
        let here = Rc::new(Here { ring: ring.clone(), jobs: jobs.clone(), disks: RefCell::default() });
        let mailbox = Arc::new(Mailbox::default());
        let desk = Desk { mailbox: mailbox.clone(), here: here.clone() };
        ring.spawn(async move {
            while !mailbox.has_ended() {
                let orders: Vec<Order> = {
                    let mut post = mailbox.post();
                    let count = post.orders.len().min(ORDERS_A_TURN);
                    post.orders.drain(..count).collect()
                };
                if orders.is_empty() {
                    let waiting = here.ring.external(mailbox.clone(), |sleeper| mailbox.sleep(sleeper));
                    // An error only says that the engine ends.
                    let _ = waiting.await;
                    continue;
                }
                orders.into_iter().for_each(|order| order(&here));
                here.ring.yield_now().await;
            }
        });
        desk
    }

    pub(super) fn handle(&self) -> Handle {
        Handle { mailbox: self.mailbox.clone() }
    }

    pub(super) fn share(&self, node: &Rc<Node>, read_only: bool) -> Result<SharedDisk, BlockError> {
        let root = Root::new(node, read_only)?;
        let (features, heard) = (root.features(), Rc::new(Heard::new(&root)));
        let key = self.here.disks.borrow_mut().insert(Disk { root, heard });
        let lease = Arc::new(Lease { mailbox: self.mailbox.clone(), key });
        Ok(SharedDisk { handle: self.handle(), lease, features })
    }

    /// Nothing is taken any more.
    pub(super) fn end(&self) {
        self.mailbox.end();
    }

    /// Nobody uses the disks any more: the tasks that did are gone.
    pub(super) fn leave_disks(&self) {
        let disks = std::mem::take(&mut *self.here.disks.borrow_mut());
        drop(disks);
    }
}
