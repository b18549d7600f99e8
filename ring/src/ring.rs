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
use std::os::fd::BorrowedFd;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use slab::Slab;

use crate::Nanos;
use crate::arena::{Arena, BLOCK_MAX, Segment};
use crate::backend::{Backend, CopyRange, RemoteWaker, SocketAddress};
use crate::config::{Config, Patience, SetupError, Shutdown, Turn};
use crate::core::{Core, Slot, State, user_data};
use crate::errno::Errno;
use crate::exec::{Exec, TaskId};
use crate::external::{Completer, Keep};
use crate::limits;
use crate::mem::{Buf, Mem, Region, SharedBuf};
use crate::op::{CloseFile, CopyHow, Fallocate, File, FileId, Held, Op, Pieces};
use crate::operation::{Kind, Operation, PlainKind, ReadKind, ReadPiecesKind};
use crate::pool::{Pool, PooledFuture};
use crate::stats::{Stats, add};
use crate::sync::{Notify, OneShot, Stint, yield_now};
use crate::timer::Timers;

/// A handle of the reactor; clones are the same ring. It stays on the thread that made it.
#[derive(Clone)]
pub struct Ring(pub(crate) Rc<Core>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.0.in_flight.get())
            .field("tasks", &self.0.exec.task_count())
            .finish_non_exhaustive()
    }
}

/// One offloaded call whose owner waits for it.
struct Offloading<'a>(&'a Core);

impl Offloading<'_> {
    fn new(core: &Core) -> Offloading<'_> {
        core.offloads.set(core.offloads.get() + 1);
        Offloading(core)
    }
}

impl Drop for Offloading<'_> {
    fn drop(&mut self) {
        self.0.offloads.set(self.0.offloads.get() - 1);
        self.0.offload_ended.notify();
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
        let offload_ended = Notify::new(exec.clone());
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
            patience: Cell::new(None),
            serving: Cell::new(0),
            offloads: Cell::new(0),
            offload_ended,
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
                        // Costs some speed; nothing that the user of a command could act on while it runs.
                        tracing::info!(
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

    /// From now on the ring waits for several completions at once, where more are in flight; `None` for one.
    pub fn set_patience(&self, patience: Option<Patience>) {
        self.0.patience.set(patience);
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

    /// Lets all tasks run first that are ready, and those that they wake.
    pub async fn yield_now(&self) {
        yield_now(&self.0.exec).await;
    }

    /// A share of the turn for a loop that may be long.
    pub fn stint(&self) -> Stint {
        Stint::new(self)
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

    /// Fills all of `bufs`, in their order, with the bytes from `offset` on; at most [`limits::READ_PIECES_MAX`] of
    /// them. Fewer bytes come only at the end of the file.
    pub fn read_pieces(&self, file: &File, offset: u64, bufs: Vec<Buf>) -> Operation<ReadPiecesKind> {
        assert!(bufs.len() <= limits::READ_PIECES_MAX, "too many pieces for one read");
        let mems: Vec<_> = bufs.iter().map(Buf::mem).collect();
        // The vector's storage moves with the slot, its heap memory does not.
        let op = Op::ReadPieces { file: file.id(), offset, pieces: Pieces::new(&mems) };
        self.submit(op, Held::Bufs { bufs, mems }, Some(file))
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

    /// Connects, however long the way is. Dropping the future gives the attempt up.
    pub async fn dial(&self, address: &SocketAddress) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().socket(address)?;
        let stream = self.wrap(id);
        self.submit::<PlainKind>(Op::Connect { file: stream.id() }, Held::None, Some(&stream)).await?;
        Ok(stream)
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

    /// Runs a blocking call elsewhere and waits for it. When the pool's queue is full, it waits for room there first.
    pub async fn offload<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        let core = &self.0;
        let has_room = || (core.offloads.get() < limits::OFFLOAD_QUEUE).then_some(());
        core.offload_ended.until(has_room).await;
        let _waiting = Offloading::new(core);
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

    /// A read that somebody else carries out: `start` is called at once, with the memory to fill and what ends the
    /// operation, from any thread. Until then the operation keeps the memory, and `keep`.
    pub fn external_read(
        &self,
        buf: Buf,
        keep: Keep,
        start: impl FnOnce(Mem, Completer),
    ) -> Operation<ReadKind> {
        let mem = buf.mem();
        self.submit_external(Held::Buf(buf), keep, |completer| start(mem, completer))
    }

    /// A write that somebody else carries out, as [`Ring::external_read`]; the memory is only read.
    pub fn external_write(
        &self,
        buf: SharedBuf,
        keep: Keep,
        start: impl FnOnce(Mem, Completer),
    ) -> Operation<PlainKind> {
        let mem = buf.mem();
        self.submit_external(Held::Shared { _buf: buf }, keep, |completer| start(mem, completer))
    }

    /// Something without memory that somebody else carries out, as [`Ring::external_read`].
    pub fn external(&self, keep: Keep, start: impl FnOnce(Completer)) -> Operation<PlainKind> {
        self.submit_external(Held::None, keep, start)
    }

    fn submit_external<K: Kind>(
        &self,
        held: Held,
        keep: Keep,
        start: impl FnOnce(Completer),
    ) -> Operation<K> {
        match self.insert_slot::<K>(None, held, None, State::InFlight) {
            Ok(operation) => {
                self.0.slots.borrow_mut()[operation.key as usize].keep = Some(keep);
                self.0.in_flight.set(self.0.in_flight.get() + 1);
                add(&self.0.stats.external, 1);
                let completer = self.0.backend.borrow_mut().completer(operation.user_data());
                start(completer);
                operation
            }
            Err((errno, held)) => self.refused(errno, held),
        }
    }

    /// Copies a range from one file to another without reading it: see [`CopyHow`]. Gives the bytes copied; fewer than
    /// asked for only at the end of `from`. Which files can do this is found out by asking: `EOPNOTSUPP`, `EXDEV`,
    /// `EINVAL` (the range is not aligned to the filesystem's blocks, or there is no such call), `ENOTTY`.
    ///
    /// Not ordered with other operations on the range, and not cancelled when the future is dropped.
    pub async fn copy_range(
        &self,
        from: &File,
        to: &File,
        range: CopyRange,
        how: CopyHow,
    ) -> Result<u64, Errno> {
        let work = self.0.backend.borrow_mut().copy_work(from.id(), to.id(), range, how)?;
        self.offload(work).await?
    }

    fn submit<K: Kind>(&self, op: Op, held: Held, file: Option<&File>) -> Operation<K> {
        match self.insert_slot(Some(op), held, file, State::Queued) {
            Ok(operation) => {
                self.0.queue.borrow_mut().push_back(operation.key);
                operation
            }
            Err((errno, held)) => self.refused(errno, held),
        }
    }

    /// Beyond the limit: the operation ends at once with EAGAIN; its memory goes back.
    fn refused<K: Kind>(&self, errno: Errno, held: Held) -> Operation<K> {
        Operation {
            ring: self.clone(),
            key: u32::MAX,
            sequence: 0,
            refused: Some((errno, held)),
            _kind: K::NEW,
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
            keep: None,
            state,
            waiter: None,
            orphan: false,
            cancelled: false,
            done: 0,
            retries: 0,
        }) as u32;
        Ok(Operation { ring: self.clone(), key, sequence, refused: None, _kind: K::NEW })
    }

    pub(crate) fn wrap(&self, id: FileId) -> File {
        let closer: Weak<dyn CloseFile> = self.0.this.clone();
        File::new(id, closer)
    }

    // Turning.

    /// One turn that never blocks.
    pub fn turn(&self) -> Turn {
        self.turn_with(|| false)
    }

    /// One turn that may sleep until there is work.
    pub fn turn_blocking(&self) -> Turn {
        self.turn_with(|| true)
    }

    /// Turns until `future` is done and gives its result. For programs whose whole life is this ring.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = self.spawn_with_result(future);
        loop {
            if let Some(value) = result.try_take() {
                return value;
            }
            // The task that gives the value may be the last one: then nothing would end a sleep.
            let _ = self.turn_with(|| !result.is_given());
        }
    }

    /// `may_block` is asked after the tasks have run.
    fn turn_with(&self, may_block: impl FnOnce() -> bool) -> Turn {
        let core = &self.0;
        add(&core.stats.turns, 1);
        let mut progressed = core.reap();
        let now = self.clock();
        progressed |= core.unpause(now);
        progressed |= core.timers.fire(now, &core.exec);
        let end = now.saturating_add(core.budget.nanos);
        let mut ran = 0u32;
        // One of those that have yielded gets on in each turn, however many were woken.
        progressed |= core.exec.run_yielded();
        loop {
            let is_long = !core.exec.has_woken();
            if !core.exec.run_one() {
                break;
            }
            progressed = true;
            ran += 1;
            // Looking at the clock costs as much as a small task.
            if (is_long || ran.is_multiple_of(16)) && self.clock() > end {
                break;
            }
        }
        core.close_late();
        let left = core.push_queue();
        let more_work = left || core.exec.has_ready();
        let next_deadline = core.next_deadline();
        core.enter(!more_work && may_block(), next_deadline);
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
