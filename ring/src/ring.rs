//! The ring: slots, turns, and the methods with which tasks do I/O.
//!
//! # A turn
//! 1. Completions are reaped (bounded in number) and applied: a slot that is finished wakes its task,
//!    one that ended short is queued again for the rest.
//! 2. Due timers wake their tasks.
//! 3. Ready tasks run, bounded in time. What they submit is queued, not entered.
//! 4. One enter submits the queue, bounded in bytes, and waits if it may: not when work is left, and
//!    never past the next deadline.
//!
//! # Slots
//! A slot owns the memory and the file of its operation from submission to the terminal completion.
//! The future of an operation only watches it. Dropping the future orphans the slot.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use slab::Slab;

use crate::Nanos;
use crate::arena::{Arena, BLOCK_MAX, Segment};
use crate::backend::{Backend, FileInfo, FileKind, LockRange, OpenHow, RemoteWaker, SocketAddress, Wait};
use crate::errno::Errno;
use crate::exec::{Exec, TaskId};
use crate::limits;
use crate::mem::{Buf, Region, SharedBuf};
use crate::op::{CloseFile, Fallocate, File, FileId, Held, Op, OpResult, Pieces};
use crate::pool::{Pool, PooledFuture};
use crate::stats::{Stats, add, max};
use crate::sync::{Notify, OneShot, yield_now};
use crate::timer::Timers;

/// Where blocking calls run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OffloadMode {
    /// On a small pool that starts on first use.
    #[default]
    Pool,
    /// On the ring's own thread: no thread is ever started, and the call delays its turn.
    Inline,
}

/// How to set up a ring.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Where blocking calls run.
    pub offload: OffloadMode,
    /// Restrict the ring to the operations in use (seccomp does not see ring operations).
    pub restrict: bool,
    /// Bounds of a turn.
    pub budget: Budget,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            arena_bytes: limits::ARENA_BYTES,
            offload: OffloadMode::Pool,
            restrict: false,
            budget: Budget::default(),
        }
    }
}

/// Bounds of one turn.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Completions delivered.
    pub completions: usize,
    /// Time spent in tasks.
    pub nanos: Nanos,
    /// Bytes of reads and writes submitted.
    pub bytes: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { completions: limits::TURN_COMPLETIONS, nanos: limits::TURN_NANOS, bytes: limits::TURN_BYTES }
    }
}

/// What a turn leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a caller that ignores what is left may sleep too long"]
pub struct Turn {
    /// Something was delivered or run.
    pub progressed: bool,
    /// There is more to do now: turn again soon, without waiting for the fd.
    pub more_work: bool,
    /// Turn again at this time even if the fd stays silent.
    pub next_deadline: Option<Nanos>,
    /// Operations in flight: the fd will become readable. With neither these, nor more work, nor a
    /// deadline, only a [`RemoteWaker`] or a new request can cause work.
    pub in_flight: usize,
}

/// What a shutdown could not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Shutdown {
    /// Operations that were still in flight; their memory is leaked, because the kernel may still use it.
    pub leaked: usize,
}

/// Why a ring could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kernel forbids or lacks io_uring.
    #[error("io_uring is not to be had here: {reason}. {cure}")]
    Forbidden {
        /// What the kernel said.
        reason: String,
        /// What to do about it.
        cure: String,
    },
    /// Something else failed.
    #[error("Setting up the ring failed while {doing}: {errno}.")]
    Failed {
        /// The step.
        doing: &'static str,
        /// Its error.
        errno: Errno,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Queued,
    InFlight,
    Done(i32),
}

/// What becomes of an operation after a completion.
enum Onward {
    /// That was its end.
    Ended,
    /// It is queued again for the rest.
    Queued,
    /// There is a rest, and nobody wants it.
    GivenUp,
}

struct Slot {
    sequence: u32,
    /// What was asked for; `op.remainder(done)` is what is in flight.
    op: Option<Op>,
    held: Held,
    /// Keeps the file open; `None` for offloaded calls.
    _file: Option<File>,
    state: State,
    waiter: Option<TaskId>,
    /// Nobody will ask for the result.
    orphan: bool,
    /// Its owner asked to end it: what is left of it is not submitted any more.
    cancelled: bool,
    done: usize,
    retries: u32,
}

pub(crate) struct Core {
    backend: RefCell<Box<dyn Backend>>,
    slots: RefCell<Slab<Slot>>,
    queue: RefCell<VecDeque<u32>>,
    /// Slots that pause after EAGAIN, with the time at which they are queued again.
    paused: RefCell<Vec<(Nanos, u32, u32)>>,
    in_flight: Cell<usize>,
    sequence: Cell<u32>,
    exec: Exec,
    pool: Pool,
    timers: Timers,
    now: Cell<Nanos>,
    arena: Arena,
    stats: Stats,
    reaped: RefCell<Vec<(u64, i32)>>,
    /// Files whose last holder went away while the backend was busy.
    closing: RefCell<Vec<FileId>>,
    this: Weak<Core>,
    budget: Budget,
    fixed_allowed: Cell<bool>,
}

impl CloseFile for Core {
    fn close_file(&self, id: FileId) {
        match self.backend.try_borrow_mut() {
            Ok(mut backend) => backend.close(id),
            Err(_) => self.closing.borrow_mut().push(id),
        }
    }
}

/// A handle of the reactor; clones are the same ring. It stays on the thread that made it.
#[derive(Clone)]
pub struct Ring(Rc<Core>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.0.in_flight.get())
            .field("tasks", &self.0.exec.task_count())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring on the kernel's io_uring.
    pub fn new(config: &Config) -> Result<Ring, SetupError> {
        let backend = crate::uring::Uring::new(config)?;
        Ring::with_backend(Box::new(backend), config)
    }

    /// A ring on any backend.
    pub fn with_backend(backend: Box<dyn Backend>, config: &Config) -> Result<Ring, SetupError> {
        let pool = Pool::default();
        let exec = Exec::new(pool.clone(), backend.remote_waker());
        let arena = Arena::new(Notify::new(exec.clone()));
        let stats = Stats::default();
        stats.allocations_at_start.set(crate::alloc::allocations());
        let now = backend.now();
        let core = Rc::new_cyclic(|this| Core {
            backend: RefCell::new(backend),
            slots: RefCell::new(Slab::with_capacity(limits::CQ_ENTRIES as usize)),
            queue: RefCell::new(VecDeque::with_capacity(limits::CQ_ENTRIES as usize)),
            paused: RefCell::new(Vec::new()),
            in_flight: Cell::new(0),
            sequence: Cell::new(0),
            exec,
            pool,
            timers: Timers::new(),
            now: Cell::new(now),
            arena,
            stats,
            reaped: RefCell::new(Vec::with_capacity(limits::CQ_ENTRIES as usize)),
            closing: RefCell::default(),
            this: this.clone(),
            budget: config.budget,
            fixed_allowed: Cell::new(true),
        });
        let ring = Ring(core);
        ring.grow_arena(config.arena_bytes)
            .map_err(|errno| SetupError::Failed { doing: "mapping the arena", errno })?;
        Ok(ring)
    }

    /// Maps and registers more memory. Where registering is refused, smaller pieces are tried, then
    /// the rest stays plain; each is said once.
    pub fn grow_arena(&self, bytes: usize) -> Result<(), Errno> {
        let mut left = bytes.next_multiple_of(BLOCK_MAX);
        let mut piece = left;
        while left > 0 {
            piece = piece.min(left);
            let segment = Rc::new(Segment::map(piece, self.0.arena.freed().clone())?);
            if self.0.fixed_allowed.get() {
                let registered = self.0.backend.borrow_mut().register_memory(segment.base(), segment.bytes());
                match registered {
                    Ok(index) => segment.fixed.set(Some(index)),
                    Err(errno) if piece > limits::ARENA_BYTES_FIXED_MIN => {
                        tracing::debug!(bytes = piece, %errno, "registering memory was refused; trying half");
                        piece = (piece / 2).next_multiple_of(BLOCK_MAX);
                        continue;
                    }
                    Err(errno) => {
                        self.0.fixed_allowed.set(false);
                        tracing::warn!(
                            %errno,
                            bytes_registered = self.0.arena.bytes_fixed(),
                            bytes_plain = left,
                            "the kernel registers no more memory (RLIMIT_MEMLOCK, see `ulimit -l`); \
                             plain buffers are used for the rest"
                        );
                        piece = left;
                        continue;
                    }
                }
            }
            left -= piece;
            self.0.arena.add(segment);
        }
        Ok(())
    }

    /// Registers an embedder's memory for fixed operations. Refusal is no error: plain ones are used.
    pub fn register_region(&self, region: &Region) -> Result<(), Errno> {
        let (base, bytes) = region.parts();
        let index = self.0.backend.borrow_mut().register_memory(base, bytes)?;
        region.set_fixed(Some(index));
        Ok(())
    }

    /// What was set up and why, a line each.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = self.0.backend.borrow().describe();
        let arena = &self.0.arena;
        lines.push(format!(
            "arena: {} MiB, {} MiB of it registered",
            arena.bytes() >> 20,
            arena.bytes_fixed() >> 20
        ));
        lines
    }

    /// The memory for I/O.
    pub fn arena(&self) -> &Arena {
        &self.0.arena
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// Memory for futures.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Puts a future into pooled memory: the form in which drivers return theirs.
    pub fn boxed<'a, T>(&self, future: impl Future<Output = T> + 'a) -> PooledFuture<'a, T> {
        PooledFuture::new(&self.0.pool, future)
    }

    /// The time, as of the latest look at the clock in this turn.
    pub fn now(&self) -> Nanos {
        self.0.now.get()
    }

    /// The time now, looked at afresh: for measuring latency.
    pub fn clock(&self) -> Nanos {
        let now = self.0.backend.borrow().now();
        self.0.now.set(now);
        now
    }

    /// 64 random bits.
    pub fn random(&self) -> u64 {
        self.0.backend.borrow_mut().random()
    }

    /// Wakes this ring from any thread.
    pub fn remote_waker(&self) -> RemoteWaker {
        self.0.backend.borrow().remote_waker()
    }

    /// Runs `f` with the fd that polls readable when there is work (none in the simulator).
    pub fn with_fd<T>(&self, f: impl FnOnce(Option<BorrowedFd<'_>>) -> T) -> T {
        f(self.0.backend.borrow().fd())
    }

    /// Starts a task.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) -> TaskId {
        add(&self.0.stats.tasks, 1);
        self.0.exec.spawn(future)
    }

    /// Starts a task and gives its result.
    pub fn spawn_with_result<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> OneShot<T> {
        let result = self.one_shot();
        let end = result.clone();
        self.spawn(async move { end.give(future.await) });
        result
    }

    /// Tasks that have not ended.
    pub fn task_count(&self) -> usize {
        self.0.exec.task_count()
    }

    /// The executor.
    pub fn exec(&self) -> &Exec {
        &self.0.exec
    }

    /// A list of waiting tasks.
    pub fn notify(&self) -> Notify {
        Notify::new(self.0.exec.clone())
    }

    /// A value that is given once.
    pub fn one_shot<T>(&self) -> OneShot<T> {
        OneShot::new(self.0.exec.clone())
    }

    /// Lets other ready tasks run first.
    pub async fn yield_now(&self) {
        yield_now(&self.0.exec).await;
    }

    /// Waits until the clock shows `deadline`.
    pub async fn sleep_until(&self, deadline: Nanos) {
        let mut armed = false;
        std::future::poll_fn(|_| {
            if self.now() >= deadline {
                return Poll::Ready(());
            }
            if !armed {
                armed = true;
                if let Some(task) = self.0.exec.current() {
                    self.0.timers.add(deadline, task);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Waits for `span`.
    pub async fn sleep(&self, span: Nanos) {
        self.sleep_until(self.clock().saturating_add(span)).await;
    }

    /// A buffer of `len` bytes, waiting for memory if none is free.
    ///
    /// `len` is 1 to [`BLOCK_MAX`]; beyond that no such buffer ever comes, which is a bug of the caller.
    pub async fn alloc(&self, len: usize) -> Buf {
        assert!(len > 0 && len <= BLOCK_MAX, "a buffer of {len} bytes is out of range");
        self.0.arena.freed().until(|| self.0.arena.try_alloc(len)).await
    }

    // Operations.

    /// Reads `buf.len()` bytes at `offset`. Fewer come only at the end of the file.
    pub fn read(&self, file: &File, offset: u64, buf: Buf) -> Operation<ReadKind> {
        let op = Op::Read { file: file.id(), offset, mem: buf.mem() };
        self.submit(op, Held::Buf(buf), Some(file))
    }

    /// Writes all of `buf` at `offset`.
    pub fn write(&self, file: &File, offset: u64, buf: SharedBuf, fua: bool) -> Operation<PlainKind> {
        let op = Op::Write { file: file.id(), offset, mem: buf.mem(), fua };
        self.submit(op, Held::Shared { _buf: buf }, Some(file))
    }

    /// Makes what was written durable.
    pub fn sync(&self, file: &File, data_only: bool) -> Operation<PlainKind> {
        self.submit(Op::Sync { file: file.id(), data_only }, Held::None, Some(file))
    }

    /// Changes the allocation of a range.
    pub fn fallocate(&self, file: &File, mode: Fallocate, offset: u64, len: u64) -> Operation<PlainKind> {
        self.submit(Op::Fallocate { file: file.id(), mode, offset, len }, Held::None, Some(file))
    }

    /// Discards a range of a block device.
    pub fn discard(&self, file: &File, offset: u64, len: u64) -> Operation<PlainKind> {
        self.submit(Op::Discard { file: file.id(), offset, len }, Held::None, Some(file))
    }

    /// Waits for a connection on a listening socket.
    pub async fn accept(&self, listener: &File) -> Result<File, Errno> {
        let id =
            self.submit::<PlainKind>(Op::Accept { file: listener.id() }, Held::None, Some(listener)).await?;
        Ok(self.wrap(FileId(id)))
    }

    /// Receives what has come, up to `buf.len()` bytes; 0 is the end of the stream.
    pub fn recv(&self, stream: &File, buf: Buf) -> Operation<ReadKind> {
        let op = Op::Recv { file: stream.id(), mem: buf.mem() };
        self.submit(op, Held::Buf(buf), Some(stream))
    }

    /// Receives until `buf` is full; fewer bytes mean that the stream ended.
    pub fn recv_all(&self, stream: &File, buf: Buf) -> Operation<ReadKind> {
        let op = Op::RecvAll { file: stream.id(), mem: buf.mem() };
        self.submit(op, Held::Buf(buf), Some(stream))
    }

    /// Sends all of `buf`.
    pub fn send(&self, stream: &File, buf: SharedBuf) -> Operation<PlainKind> {
        let op = Op::Send { file: stream.id(), mem: buf.mem() };
        self.submit(op, Held::Shared { _buf: buf }, Some(stream))
    }

    /// Sends all pieces in order; at most [`limits::SEND_PIECES_MAX`] of them.
    pub fn send_pieces(&self, stream: &File, bufs: Vec<SharedBuf>) -> Operation<PlainKind> {
        assert!(bufs.len() <= limits::SEND_PIECES_MAX, "too many pieces for one send");
        let mems: Vec<_> = bufs.iter().map(SharedBuf::mem).collect();
        // The vector's storage moves with the slot, its heap memory does not.
        let op = Op::SendPieces { file: stream.id(), pieces: Pieces::new(&mems) };
        self.submit(op, Held::Pieces { _bufs: bufs, mems }, Some(stream))
    }

    /// Runs a blocking call elsewhere and waits for it.
    pub async fn offload<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        let place = Arc::new(Mutex::new(None));
        let there = place.clone();
        let operation = self
            .insert_slot::<PlainKind>(None, Held::None, None, State::InFlight)
            .map_err(|(errno, _)| errno)?;
        let user_data = operation.user_data();
        let started = self.0.backend.borrow_mut().offload(
            user_data,
            Box::new(move || {
                let value = work();
                if let Ok(mut place) = there.lock() {
                    *place = Some(value);
                }
            }),
        );
        if let Err(errno) = started {
            self.0.slots.borrow_mut().remove(operation.key as usize);
            operation.forget();
            return Err(errno);
        }
        add(&self.0.stats.offloaded, 1);
        self.0.in_flight.set(self.0.in_flight.get() + 1);
        operation.await?;
        let value = place.lock().ok().and_then(|mut place| place.take());
        value.ok_or(Errno::EIO)
    }

    fn submit<K: Kind>(&self, op: Op, held: Held, file: Option<&File>) -> Operation<K> {
        match self.insert_slot(Some(op), held, file, State::Queued) {
            Ok(operation) => {
                self.0.queue.borrow_mut().push_back(operation.key);
                operation
            }
            // Beyond the limit: the operation ends at once with EAGAIN; its memory goes back.
            Err((errno, held)) => Operation {
                ring: self.clone(),
                key: u32::MAX,
                sequence: 0,
                refused: Some((errno, held)),
                _kind: K::NEW,
            },
        }
    }

    fn insert_slot<K: Kind>(
        &self,
        op: Option<Op>,
        held: Held,
        file: Option<&File>,
        state: State,
    ) -> Result<Operation<K>, (Errno, Held)> {
        let mut slots = self.0.slots.borrow_mut();
        if slots.len() >= limits::SLOTS_MAX {
            return Err((Errno::EAGAIN, held));
        }
        // 0 is reserved for the backend's own operations.
        let sequence = self.0.sequence.get().wrapping_add(1).max(1);
        self.0.sequence.set(sequence);
        let key = slots.insert(Slot {
            sequence,
            op,
            held,
            _file: file.cloned(),
            state,
            waiter: None,
            orphan: false,
            cancelled: false,
            done: 0,
            retries: 0,
        }) as u32;
        Ok(Operation { ring: self.clone(), key, sequence, refused: None, _kind: K::NEW })
    }

    fn wrap(&self, id: FileId) -> File {
        let closer: Weak<dyn CloseFile> = self.0.this.clone();
        File::new(id, closer)
    }

    // Control calls.

    /// Opens a file or block device.
    pub fn open(&self, path: &Path, how: &OpenHow) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().open(path, how)?;
        Ok(self.wrap(id))
    }

    /// Adopts a descriptor that somebody else opened.
    pub fn adopt(&self, fd: OwnedFd) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().adopt(fd)?;
        Ok(self.wrap(id))
    }

    /// Facts about an open file.
    pub fn info(&self, file: &File) -> Result<FileInfo, Errno> {
        self.0.backend.borrow_mut().info(file.id())
    }

    /// Sets the length of a regular file.
    pub fn set_len(&self, file: &File, len: u64) -> Result<(), Errno> {
        self.0.backend.borrow_mut().set_len(file.id(), len)
    }

    /// The first offset at or after `offset` with data (`data`) or with a hole; `ENXIO` past the end.
    pub fn seek(&self, file: &File, offset: u64, data: bool) -> Result<u64, Errno> {
        self.0.backend.borrow_mut().seek(file.id(), offset, data)
    }

    /// Takes a shared lock on a range.
    pub fn lock_shared(&self, file: &File, range: LockRange) -> Result<(), Errno> {
        self.0.backend.borrow_mut().lock_shared(file.id(), range)
    }

    /// Gives a lock back.
    pub fn unlock(&self, file: &File, range: LockRange) -> Result<(), Errno> {
        self.0.backend.borrow_mut().unlock(file.id(), range)
    }

    /// Whether somebody else holds a lock in the range.
    pub fn lock_conflict(&self, file: &File, range: LockRange) -> Result<bool, Errno> {
        self.0.backend.borrow_mut().lock_conflict(file.id(), range)
    }

    /// Who holds locks in the range, as far as can be known (pid, program).
    pub fn lock_holders(&self, file: &File, range: LockRange) -> Vec<(u32, String)> {
        self.0.backend.borrow_mut().lock_holders(file.id(), range)
    }

    /// Reads an extended attribute.
    pub fn get_attribute(&self, file: &File, name: &str) -> Result<Option<Vec<u8>>, Errno> {
        self.0.backend.borrow_mut().get_attribute(file.id(), name)
    }

    /// Sets or removes an extended attribute.
    pub fn set_attribute(&self, file: &File, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        self.0.backend.borrow_mut().set_attribute(file.id(), name, value)
    }

    /// Removes a directory entry.
    pub fn unlink(&self, path: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().unlink(path)
    }

    /// Renames, replacing what is there.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().rename(from, to)
    }

    /// Makes the entries of a directory durable.
    pub fn sync_directory(&self, path: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().sync_directory(path)
    }

    /// Whether a path exists, and what it is.
    pub fn lookup(&self, path: &Path) -> Result<Option<FileKind>, Errno> {
        self.0.backend.borrow_mut().lookup(path)
    }

    /// Listens; gives the address in use.
    pub fn listen(&self, address: &SocketAddress) -> Result<(File, SocketAddress), Errno> {
        let (id, address) = self.0.backend.borrow_mut().listen(address)?;
        Ok((self.wrap(id), address))
    }

    /// Connects.
    pub fn connect(&self, address: &SocketAddress) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().connect(address)?;
        Ok(self.wrap(id))
    }

    /// Ends both directions of a stream; operations in flight on it complete.
    pub fn shutdown_stream(&self, stream: &File) {
        self.0.backend.borrow_mut().shutdown_stream(stream.id());
    }

    // Turning.

    /// One turn that never blocks.
    pub fn turn(&self) -> Turn {
        self.turn_with(false)
    }

    /// One turn that may sleep until there is work.
    pub fn turn_blocking(&self) -> Turn {
        self.turn_with(true)
    }

    /// Turns until `future` is done and gives its result. For programs whose whole life is this ring.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = self.spawn_with_result(future);
        loop {
            if let Some(value) = result.try_take() {
                return value;
            }
            let _ = self.turn_blocking();
        }
    }

    fn turn_with(&self, may_block: bool) -> Turn {
        let core = &self.0;
        add(&core.stats.turns, 1);
        let mut progressed = core.reap();
        let now = self.clock();
        progressed |= core.unpause(now);
        progressed |= core.timers.fire(now, &core.exec);
        let end = now.saturating_add(core.budget.nanos);
        let mut ran = 0u32;
        while core.exec.run_one() {
            progressed = true;
            ran += 1;
            // Looking at the clock costs as much as a small task.
            if ran.is_multiple_of(16) && self.clock() > end {
                break;
            }
        }
        core.close_late();
        let left = core.push_queue();
        let more_work = left || core.exec.has_ready();
        let next_deadline = core.next_deadline();
        core.enter(may_block && !more_work, next_deadline);
        let more_work = more_work || core.backend.borrow_mut().has_completions();
        Turn { progressed, more_work, next_deadline, in_flight: core.in_flight.get() }
    }

    /// Ends the ring: waits up to `deadline` (a span) for operations in flight, then drops all tasks.
    /// Memory of operations that do not end is leaked on purpose.
    pub fn shutdown(&self, deadline: Nanos) -> Shutdown {
        let end = self.clock().saturating_add(deadline);
        self.0.exec.clear();
        self.0.timers.clear();
        {
            // Queued operations never reached the kernel: forget them.
            let queue = std::mem::take(&mut *self.0.queue.borrow_mut());
            let mut dropped = Vec::new();
            let mut slots = self.0.slots.borrow_mut();
            for key in queue {
                dropped.push(slots.remove(key as usize));
            }
            for (_, key, _) in self.0.paused.borrow_mut().drain(..) {
                dropped.push(slots.remove(key as usize));
            }
            let mut backend = self.0.backend.borrow_mut();
            for (key, slot) in slots.iter_mut() {
                slot.orphan = true;
                slot.waiter = None;
                if slot.state == State::InFlight {
                    backend.cancel(user_data(slot.sequence, key as u32));
                }
            }
            drop((slots, backend));
        }
        Shutdown { leaked: self.0.drain(end) }
    }
}

/// How long a ring that is dropped without [`Ring::shutdown`] waits for operations in flight.
const DROP_DEADLINE_NANOS: Nanos = 5_000_000_000;

impl Drop for Core {
    fn drop(&mut self) {
        let end = self.backend.borrow().now().saturating_add(DROP_DEADLINE_NANOS);
        self.drain(end);
    }
}

fn user_data(sequence: u32, key: u32) -> u64 {
    u64::from(sequence) << 32 | u64::from(key)
}

impl Core {
    /// Waits for operations in flight; gives the number of those whose memory had to be leaked.
    fn drain(&self, end: Nanos) -> usize {
        while self.in_flight.get() > 0 {
            // The wait is bounded from `now` on: with an old one it would not wait at all.
            let now = self.backend.borrow().now();
            self.now.set(now);
            if now >= end {
                break;
            }
            self.enter(true, Some(end));
            self.reap();
            // What ended short is not continued.
            let queue = std::mem::take(&mut *self.queue.borrow_mut());
            for key in queue {
                let slot = self.slots.borrow_mut().try_remove(key as usize);
                drop(slot);
            }
        }
        self.close_late();
        let leaked = self.in_flight.get();
        if leaked > 0 {
            tracing::error!(leaked, "operations did not end at shutdown; their memory is leaked");
            std::mem::forget(self.slots.take());
            self.in_flight.set(0);
        }
        leaked
    }

    fn reap(&self) -> bool {
        let mut reaped = self.reaped.take();
        self.backend.borrow_mut().reap(self.budget.completions, &mut reaped);
        let n = reaped.len() as u64;
        add(&self.stats.completions, n);
        max(&self.stats.completions_a_turn_max, n);
        for (user_data, result) in reaped.drain(..) {
            self.apply((user_data >> 32) as u32, user_data as u32, result);
        }
        self.reaped.replace(reaped);
        n > 0
    }

    fn apply(&self, sequence: u32, key: u32, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let slot = match slots.get_mut(key as usize) {
            Some(slot) if slot.sequence == sequence && slot.state == State::InFlight => slot,
            _ => {
                add(&self.stats.stale_completions, 1);
                debug_assert!(false, "a completion came for no operation in flight");
                return;
            }
        };
        self.in_flight.set(self.in_flight.get() - 1);
        let mut result = result;
        if let Some(op) = slot.op {
            match self.goes_on(slot, &op, key, result) {
                Onward::Queued => return,
                // Part of a transfer is no result: the owner asked for its end and gets that.
                Onward::GivenUp => result = -libc::ECANCELED,
                Onward::Ended => {}
            }
            match op {
                Op::Read { .. } => add(&self.stats.bytes_read, slot.done as u64),
                Op::Write { .. } => add(&self.stats.bytes_written, slot.done as u64),
                _ => {}
            }
        }
        let total = if result < 0 { result } else { i32::try_from(slot.done).unwrap_or(i32::MAX) };
        let total = match slot.op {
            Some(Op::Accept { .. }) | None => result,
            // Nothing went out though something was left: there is no progress to be had.
            Some(Op::Write { .. } | Op::Send { .. } | Op::SendPieces { .. }) if result == 0 => -libc::EIO,
            _ => total,
        };
        slot.state = State::Done(total);
        if slot.orphan {
            let slot = slots.remove(key as usize);
            drop(slots);
            self.drop_unseen(slot);
        } else if let Some(task) = slot.waiter {
            self.exec.wake(task);
        }
    }

    /// Drops a slot whose result nobody will look at.
    fn drop_unseen(&self, slot: Slot) {
        if let (Some(Op::Accept { .. }), State::Done(result)) = (slot.op, slot.state)
            && let Ok(id) = u32::try_from(result)
        {
            // Nobody will use the connection: close it.
            self.close_file(FileId(id));
        }
    }

    /// Finishes short transfers and passing errors inside.
    fn goes_on(&self, slot: &mut Slot, op: &Op, key: u32, result: i32) -> Onward {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            add(&self.stats.retries, 1);
            slot.retries += 1;
            if slot.retries > limits::EAGAIN_RETRIES {
                return Onward::Ended;
            }
            let pauses = slot.retries > limits::EAGAIN_RETRIES_EAGER;
            return self.queue_again(slot, key, pauses);
        }
        if result <= 0 {
            return Onward::Ended;
        }
        slot.done += result as usize;
        // Only refusals in a row count.
        slot.retries = 0;
        if let (Op::SendPieces { .. }, Held::Pieces { mems, .. }) = (op, &mut slot.held) {
            let total: usize = mems.iter().map(|m| m.len()).sum();
            // `mems` is cut in place, so it holds what was in flight.
            if (result as usize) >= total {
                return Onward::Ended;
            }
            let mut gone = result as usize;
            mems.retain_mut(|mem| {
                let n = gone.min(mem.len());
                *mem = mem.tail(n);
                gone -= n;
                !mem.is_empty()
            });
            let file = op.file();
            slot.op = Some(Op::SendPieces { file, pieces: Pieces::new(mems) });
        } else if op.remainder(slot.done).is_none() {
            return Onward::Ended;
        }
        add(&self.stats.short_transfers, 1);
        self.queue_again(slot, key, false)
    }

    /// The rest of an operation, unless nobody wants it any more.
    fn queue_again(&self, slot: &mut Slot, key: u32, pauses: bool) -> Onward {
        if slot.orphan || slot.cancelled {
            return Onward::GivenUp;
        }
        slot.state = State::Queued;
        if pauses {
            let at = self.now.get() + limits::EAGAIN_PAUSE_NANOS;
            self.paused.borrow_mut().push((at, key, slot.sequence));
        } else {
            self.queue.borrow_mut().push_back(key);
        }
        Onward::Queued
    }

    fn unpause(&self, now: Nanos) -> bool {
        let mut paused = self.paused.borrow_mut();
        if paused.is_empty() {
            return false;
        }
        let before = paused.len();
        let mut queue = self.queue.borrow_mut();
        paused.retain(|&(at, key, _)| {
            if at <= now {
                queue.push_back(key);
            }
            at > now
        });
        paused.len() < before
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let paused = self.paused.borrow().iter().map(|p| p.0).min();
        match (self.timers.next(), paused) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn close_late(&self) {
        let closing = std::mem::take(&mut *self.closing.borrow_mut());
        for id in closing {
            self.backend.borrow_mut().close(id);
        }
    }

    /// Hands queued operations to the backend; true when some had to stay.
    fn push_queue(&self) -> bool {
        let mut queue = self.queue.borrow_mut();
        if queue.is_empty() {
            return false;
        }
        let mut slots = self.slots.borrow_mut();
        let mut backend = self.backend.borrow_mut();
        let (mut bytes, mut batch) = (0u64, 0u64);
        // Dropped at the end: closing a file needs the backend.
        let mut unwanted = Vec::new();
        while let Some(&key) = queue.front() {
            if self.in_flight.get() >= limits::IN_FLIGHT_MAX || bytes >= self.budget.bytes {
                break;
            }
            let Some(slot) = slots.get_mut(key as usize) else {
                queue.pop_front();
                continue;
            };
            // A request to cancel reaches only what is in flight; what has not left stays here.
            if slot.orphan {
                queue.pop_front();
                unwanted.push(slots.remove(key as usize));
                continue;
            }
            if slot.cancelled {
                queue.pop_front();
                slot.state = State::Done(-libc::ECANCELED);
                slot.waiter.into_iter().for_each(|task| self.exec.wake(task));
                continue;
            }
            let Some(op) = slot
                .op
                .and_then(|op| if slot.done > 0 { op.remainder(slot.done).or(slot.op) } else { Some(op) })
            else {
                queue.pop_front();
                continue;
            };
            if !backend.push(user_data(slot.sequence, key), &op) {
                break;
            }
            queue.pop_front();
            slot.state = State::InFlight;
            self.in_flight.set(self.in_flight.get() + 1);
            bytes += op.bytes();
            batch += 1;
            if let Op::Read { file, mem, .. } | Op::Write { file, mem, .. } = op {
                let fixed = mem.fixed.is_some() && backend.is_fixed_file(file);
                add(if fixed { &self.stats.transfers_fixed } else { &self.stats.transfers_plain }, 1);
            }
        }
        add(&self.stats.operations, batch);
        max(&self.stats.batch_max, batch);
        // Waiting for completions is what makes room when the limit of operations in flight was met.
        let left = !queue.is_empty() && self.in_flight.get() < limits::IN_FLIGHT_MAX;
        drop((queue, slots, backend));
        drop(unwanted);
        left
    }

    fn enter(&self, may_block: bool, deadline: Option<Nanos>) {
        let in_flight = self.in_flight.get();
        let mut wait = Wait::default();
        if may_block {
            let backstop = self.now.get() + limits::SAFETY_BACKSTOP_NANOS;
            wait.deadline = Some(deadline.map_or(backstop, |d| d.min(backstop)));
            if in_flight >= limits::DEEP_QUEUE {
                wait.want = in_flight.min(limits::DEEP_WANT);
                wait.min_wait_usec = limits::DEEP_MIN_WAIT_USEC;
            } else {
                wait.want = 1;
            }
        }
        let result = self.backend.borrow_mut().enter(wait);
        match result {
            Ok(entered) => add(&self.stats.enters, u64::from(entered)),
            Err(errno) => tracing::error!(%errno, "entering the ring failed; trying again"),
        }
    }
}

/// How the result of an operation reaches its owner.
pub trait Kind: Unpin {
    /// What the owner gets.
    type Output;
    /// The kind.
    const NEW: Self;
    /// From the slot's content and result.
    #[doc(hidden)]
    fn finish(held: HeldOut, result: OpResult) -> Self::Output;
}

/// What a slot held, given back (opaque).
#[derive(Debug)]
pub struct HeldOut(pub(crate) Held);

/// Operations that fill a buffer: the buffer comes back with the result.
#[derive(Debug)]
pub struct ReadKind;
/// Operations whose result is a number or nothing.
#[derive(Debug)]
pub struct PlainKind;

impl Kind for ReadKind {
    /// The buffer and the bytes moved.
    type Output = (Buf, OpResult);
    const NEW: ReadKind = ReadKind;

    fn finish(held: HeldOut, result: OpResult) -> Self::Output {
        match held.0 {
            Held::Buf(buf) => (buf, result),
            _ => unreachable!("operations of this kind are submitted with a buffer"),
        }
    }
}

impl Kind for PlainKind {
    type Output = OpResult;
    const NEW: PlainKind = PlainKind;

    fn finish(_: HeldOut, result: OpResult) -> OpResult {
        result
    }
}

/// An operation under way. Awaiting it gives the result; dropping it orphans it.
#[must_use = "an operation that nobody waits for ends unseen"]
pub struct Operation<K: Kind> {
    ring: Ring,
    key: u32,
    sequence: u32,
    /// Refused for want of slots: the error and what was handed in.
    refused: Option<(Errno, Held)>,
    _kind: K,
}

impl<K: Kind> std::fmt::Debug for Operation<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Operation({}/{})", self.key, self.sequence)
    }
}

impl<K: Kind> Operation<K> {
    fn user_data(&self) -> u64 {
        user_data(self.sequence, self.key)
    }

    fn forget(mut self) {
        self.key = u32::MAX;
    }

    /// Asks the kernel to end it early. It still completes, one way or the other.
    pub fn cancel(&self) {
        let core = &self.ring.0;
        let mut slots = core.slots.borrow_mut();
        if let Some(slot) = slots.get_mut(self.key as usize)
            && slot.sequence == self.sequence
        {
            slot.cancelled = true;
            if slot.state == State::InFlight {
                core.backend.borrow_mut().cancel(self.user_data());
            }
        }
    }
}

impl<K: Kind> Future for Operation<K> {
    type Output = K::Output;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<K::Output> {
        let this = self.get_mut();
        if let Some((errno, held)) = this.refused.take() {
            return Poll::Ready(K::finish(HeldOut(held), Err(errno)));
        }
        let core = &this.ring.0;
        let mut slots = core.slots.borrow_mut();
        let Some(slot) = slots.get_mut(this.key as usize).filter(|s| s.sequence == this.sequence) else {
            unreachable!("an operation was polled after it had ended");
        };
        let State::Done(result) = slot.state else {
            slot.waiter = core.exec.current();
            return Poll::Pending;
        };
        let slot = slots.remove(this.key as usize);
        drop(slots);
        this.key = u32::MAX;
        let result = u32::try_from(result).map_err(|_| Errno(-result));
        Poll::Ready(K::finish(HeldOut(slot.held), result))
    }
}

impl<K: Kind> Drop for Operation<K> {
    fn drop(&mut self) {
        if self.key == u32::MAX {
            return;
        }
        let mut removed = None;
        let mut slots = self.ring.0.slots.borrow_mut();
        if let Some(slot) = slots.get_mut(self.key as usize)
            && slot.sequence == self.sequence
        {
            if let State::Done(_) = slot.state {
                removed = Some(slots.remove(self.key as usize));
            } else {
                slot.orphan = true;
                slot.waiter = None;
                if slot.state == State::InFlight {
                    self.ring.0.backend.borrow_mut().cancel(user_data(self.sequence, self.key));
                }
            }
        }
        drop(slots);
        if let Some(slot) = removed {
            self.ring.0.drop_unseen(slot);
        }
    }
}
