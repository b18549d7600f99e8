//! Every queue, table, retry and batch of the reactor has its limit here.

/// Entries of the submission queue.
pub const SQ_ENTRIES: u32 = 256;
/// How long whoever holds a lock is looked for among all processes. Who waits for the answer waits a little longer, so that
/// those who were found are told.
pub const LOCK_HOLDERS_NANOS: u64 = 250_000_000;
/// Entries of the completion queue; operations in flight never exceed it, so it cannot overflow.
pub const CQ_ENTRIES: u32 = 1024;
/// Operations handed to the backend and not yet complete.
pub const IN_FLIGHT_MAX: usize = CQ_ENTRIES as usize - 16;
/// Operation slots, queued ones included. Beyond it submitting fails with `EAGAIN`.
pub const SLOTS_MAX: usize = 65_536;
/// Entries of the registered file table.
pub const FIXED_FILES: u32 = 1024;
/// Entries of the registered buffer table: arena segments and embedders' regions.
pub const FIXED_BUFFERS: u32 = 64;
/// Completions that one turn delivers before it reports more work.
pub const TURN_COMPLETIONS: usize = 256;
/// Time that one turn spends in tasks before it reports more work.
pub const TURN_NANOS: u64 = 500_000;
/// Steps that a loop makes in one go before others run, however short they are.
pub const STINT_STEPS: u32 = 512;
/// The same in time.
pub const STINT_NANOS: u64 = 100_000;
/// Steps of such a loop from one look at the clock to the next.
pub const STINT_STEPS_A_LOOK: u32 = 16;
/// Bytes of reads and writes that one enter submits: some devices do the I/O inside the enter.
pub const TURN_BYTES: u64 = 8 << 20;
/// How often one operation is tried again after `EAGAIN` before its owner gets the error.
pub const EAGAIN_RETRIES: u32 = 64;
/// From this retry on the ring pauses before it tries again.
pub const EAGAIN_RETRIES_EAGER: u32 = 4;
/// That pause.
pub const EAGAIN_PAUSE_NANOS: u64 = 1_000_000;
/// A blocking wait ends after this long even if nothing came: a lost wake-up becomes a log line, not a hang.
pub const SAFETY_BACKSTOP_NANOS: u64 = 1_000_000_000;
/// Threads of the offload pool, started on first use, when nothing else is asked for.
pub const OFFLOAD_THREADS: usize = 4;
/// Threads of the offload pool at most.
pub const OFFLOAD_THREADS_MAX: usize = 64;
/// Extents of a file that one call for the pool looks for.
pub const EXTENTS_A_CALL: usize = 1024;
/// It ends after so long, however few it has found.
pub const EXTENTS_CALL_NANOS: u64 = 1_000_000;
/// Calls that wait for an offload thread.
pub const OFFLOAD_QUEUE: usize = 256;
/// Bounded io-wq workers: devices without RWF_NOWAIT are served by them.
pub const IOWQ_BOUNDED_WORKERS: u32 = 8;
/// Unbounded io-wq workers (sockets and the like that had to be punted).
pub const IOWQ_UNBOUNDED_WORKERS: u32 = 4;
/// Bytes of the arena when nothing else is asked for.
pub const ARENA_BYTES: usize = 24 << 20;
/// The smallest arena that a refused registration is halved down to before plain buffers are used.
pub const ARENA_BYTES_FIXED_MIN: usize = 1 << 20;
/// Pieces of one vectored send.
pub const SEND_PIECES_MAX: usize = 64;
/// Pieces of one vectored read.
pub const READ_PIECES_MAX: usize = 64;
/// After so many idle seconds the kernel asks whether the peer of a TCP connection is still there.
pub const KEEPALIVE_IDLE_SECS: u64 = 30;
/// It asks again after so many seconds without an answer.
pub const KEEPALIVE_INTERVAL_SECS: u64 = 10;
/// After so many questions without an answer the connection is over.
pub const KEEPALIVE_PROBES: u32 = 6;
