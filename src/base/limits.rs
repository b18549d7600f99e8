//! Every number that bounds something.
//!
//! A queue, a table, a batch or a retry that grows with what a peer, a disk or a user sends has its bound here, by name,
//! with the reason for its size. Whoever meets a bound parks, refuses or falls back; nobody allocates past it. Bounds
//! that are part of a format or a protocol name where they come from.

use std::time::Duration;

/// Bytes in a kibibyte, mebibyte and so on, to write the limits below readably.
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

// ---- Disks and images ----

/// Smallest unit in which a disk is addressed, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Longest disk, in bytes: what a signed 64-bit file offset reaches, less room to align any request up without wrapping.
pub const DISK_LEN_MAX: u64 = (i64::MAX as u64) & !((1 << 30) - 1);
/// Backing files below one node. A longer chain is a loop or a mistake.
pub const BACKING_CHAIN_MAX: usize = 200;

/// Memory for the L2 tables of one qcow2 image, in bytes: with clusters of 64 KiB they map 256 GiB.
pub const QCOW2_L2_CACHE_BYTES: u64 = 32 * MIB;
/// Memory for the refcount blocks of one qcow2 image, in bytes.
pub const QCOW2_REFCOUNT_CACHE_BYTES: u64 = 4 * MIB;

// ---- Dirty maps ----

/// Finest dirty-map granularity, in bytes (QMP `granularity`).
pub const GRANULARITY_BYTES_MIN: u64 = 512;
/// Coarsest dirty-map granularity, in bytes (QMP `granularity`).
pub const GRANULARITY_BYTES_MAX: u64 = 64 * MIB;
/// Leaves in one dirty map. Address space for the pointers to them is reserved at once (8 bytes each), memory is not.
/// At 64 KiB granularity this reaches 32 PiB.
pub const DIRTY_LEAVES_MAX: u64 = 1 << 24;
/// Emptied leaves that a dirty map keeps for its next need, so that a range that goes back and forth does not allocate.
pub const DIRTY_LEAVES_SPARE: usize = 4;

// ---- Requests inside the engine ----

/// Range locks held or awaited on one node. Each belongs to a request in flight, so exports and jobs meet their own
/// limits first; this one keeps the linear scan of a lock table short.
pub const RANGE_LOCKS_MAX: usize = 1024;
/// Requests that a drained root parks, new connections' included. The peers' queues fill behind it.
pub const PARKED_REQUESTS_PER_ROOT: usize = 1024;
/// Requests in flight at one leaf, guests' and jobs' together.
pub const IN_FLIGHT_PER_LEAF: usize = 256;
/// Largest single read or write handed to a leaf, in bytes.
pub const IO_BYTES_MAX: u64 = 32 * MIB;

// ---- Graph and jobs ----

/// Nodes in one engine, filters and implicit ones included.
pub const NODES_MAX: usize = 4096;
/// Jobs that exist at once in one engine, concluded ones not yet dismissed included.
pub const JOBS_MAX: usize = 1024;
/// Largest chunk that a job copies as one request, in bytes.
pub const JOB_CHUNK_BYTES_MAX: u64 = 8 * MIB;
/// Bytes in a node, job or export name.
pub const NAME_BYTES_MAX: usize = 255;

// ---- The process ----

/// Descriptors without which nothing is begun: the ring's, a few images and what receives signals.
pub const FILES_MIN: u64 = 32;
/// Descriptors that clients of a service never take: images with their layers, connections to servers, what receives signals.
pub const FILES_KEPT_BACK: u64 = 48;
/// Address space, beside what the program takes when it starts, without which nothing is begun, in bytes: memory for I/O,
/// tables of a few images, stacks of threads.
pub const ADDRESS_BYTES_MIN: u64 = 192 * MIB;

// ---- Printing ----

/// Text that waits to be printed, in bytes. What comes on top is left out, or waits if it is a command's product.
pub const PRINT_BYTES_MAX: usize = MIB as usize;
/// Text that waits to be printed beside which lines of progress are kept, in bytes.
pub const PRINT_PROGRESS_BYTES_MAX: usize = 16 << 10;
/// Lines that are written by one call, in bytes.
pub const PRINT_PIECE_BYTES: usize = 32 << 10;
/// How long the end of the process waits for a reader of messages that does not read.
pub const PRINT_AT_END_MAX: Duration = Duration::from_secs(2);
/// How often a process in the background looks whether it may write to its terminal.
pub const PRINT_BACKGROUND_LOOK: Duration = Duration::from_millis(200);

// ---- Speed ----

/// Time whose worth of bytes an idle rate limit saves up, in nanoseconds. It makes up for a turn that came late.
pub const BURST_NS: u64 = 100_000_000;
/// Bytes that a rate limit saves up at most, however high the speed.
pub const BURST_BYTES_MAX: u64 = 64 * MIB;
/// Jobs under one shared rate limit.
pub const BUCKET_GROUP_MEMBERS_MAX: usize = 256;

/// Extents of a local file that one look at its filesystem finds, and that are remembered of it.
pub const ALLOCATION_LOOK: usize = 1024;
/// The same for a look that does not go on where the latest one ended.
pub const ALLOCATION_LOOK_FIRST: usize = 8;
/// Changes that may end while a filesystem is looked at; with more its answer is not remembered.
pub const ALLOCATION_CHANGES: usize = 256;

// ---- NBD ----

/// Largest payload of one NBD read or write, in bytes. The specification's default; larger ones end the connection.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Longest string in NBD negotiation, in bytes (the specification's limit for names and descriptions).
pub const NBD_STRING_BYTES_MAX: u32 = 4096;
/// Longest data of one NBD option, in bytes: a few strings and a list of queries. More is read past and refused.
pub const NBD_OPTION_BYTES_MAX: u32 = 64 * KIB as u32;
/// Options in one NBD handshake.
pub const NBD_OPTIONS_PER_HANDSHAKE: usize = 64;
/// Time in which an NBD handshake has to end, in nanoseconds.
pub const NBD_HANDSHAKE_NS_MAX: u64 = 10_000_000_000;
/// What stands for "for ever" where a user wants no time limit, in nanoseconds: a year.
pub const NBD_PATIENCE_NS: u64 = 365 * 24 * 3600 * 1_000_000_000;
/// Meta contexts that one NBD client selects.
pub const NBD_META_CONTEXTS_MAX: usize = 16;
/// Extents in one NBD block status reply, a context. With its header such a reply fills one block of memory.
pub const NBD_EXTENTS_PER_REPLY: usize = 2040;
/// Questions that one NBD block status request asks of the disk before it is answered with what is known by then.
pub const NBD_STATUS_QUESTIONS_PER_REQUEST: usize = 4096;
/// Block status requests of one NBD client that are worked on at the same time. Further ones stay unread in its socket:
/// each may walk over thousands of extents.
pub const NBD_WALKS_PER_CLIENT: usize = 2;
/// Discards and zeroings of one NBD client that are worked on at the same time, of those that are long. Each may change
/// the entries of thousands of clusters; further ones wait, and are dropped when their client goes.
pub const NBD_LONG_CHANGES_PER_CLIENT: usize = 4;
/// The same of all clients of one export: who reads from the disk may have to wait for all of them.
pub const NBD_LONG_CHANGES_PER_EXPORT: usize = 16;
/// Those count as long that cover more of the disk's units (a qcow2 cluster, a block of a filesystem) than this.
pub const NBD_SHORT_CHANGE_UNITS: u64 = 64;
/// No change is long that is not longer than this, in bytes.
pub const NBD_SHORT_CHANGE_BYTES: u64 = 64 * KIB;
/// A long change is made in pieces of so many units at first, and at least.
pub const NBD_CHANGE_PIECE_UNITS: u64 = 1024;
/// No such piece is shorter than this, in bytes.
pub const NBD_CHANGE_PIECE_BYTES_MIN: u64 = MIB;
/// Pieces that are made in no time grow, to so many times of what they were at first.
pub const NBD_CHANGE_PIECE_GROWTH_MAX: u64 = 64;
/// A piece that took less was made in no time, in nanoseconds; one that took twice as long was too large.
pub const NBD_CHANGE_PIECE_NANOS: u64 = 2_000_000;
/// Exports of one NBD server.
pub const NBD_EXPORTS_PER_SERVER: usize = 1024;
/// Clients connected to one NBD server, those in the handshake included. Further ones wait to be accepted.
pub const NBD_CLIENTS_PER_SERVER: usize = 256;
/// The same, as many as a user may allow: silent ones hold 8 KiB of memory each, a third of it together.
pub const NBD_CLIENTS_PER_SERVER_MAX: usize = 1024;
/// Requests in flight of one NBD client, until their replies are sent. Further ones stay unread in its socket.
pub const NBD_IN_FLIGHT_PER_CLIENT: usize = 128;
/// The same, as many as a user may allow.
pub const NBD_IN_FLIGHT_PER_CLIENT_MAX: usize = 4096;
/// Payload bytes that one NBD client holds in flight. Further requests stay unread in its socket. When memory is short
/// the bound is lower: no client holds more than what it leaves free.
pub const NBD_BYTES_IN_FLIGHT_PER_CLIENT: u64 = 16 * MIB;
/// How long clients' requests, and the last flush, may take when a service ends; then those that wait for servers are given
/// up, in nanoseconds.
pub const STOP_NANOS_MAX: u64 = 5_000_000_000;
/// Memory in which an NBD client's requests are received while little comes, in bytes.
pub const NBD_RECV_BYTES_MIN: usize = 4 << 10;
/// The same while much comes.
pub const NBD_RECV_BYTES_MAX: usize = 64 << 10;
/// How long a service that was left by its last client waits for one to come back, in nanoseconds: longer than a guest's
/// firmware and its system leave the disk alone.
pub const SERVICE_LINGER_NANOS: u64 = 4_000_000_000;
/// From this payload on, in bytes, a read's data is sent from where it was read; below, it is copied behind its header,
/// because a piece of a vectored send costs more than the copy.
pub const NBD_REPLY_COPY_BYTES: usize = 32 << 10;
/// Memory in which small replies are collected, in bytes: sixteen reads of 4 KiB with their headers fit.
pub const NBD_REPLY_LEASE_BYTES: usize = 128 << 10;
/// Bytes that one send of replies carries at most; their memory comes back when it ends.
pub const NBD_SEND_BYTES_MAX: usize = 2 << 20;
/// When memory is short, an NBD client that neither takes its replies nor sends what it announced for this long is
/// disconnected, in nanoseconds.
pub const NBD_STALL_NS_MAX: u64 = 10_000_000_000;
/// Memory is short when less than this part of it is free.
pub const NBD_STALL_FREE_DIVISOR: usize = 4;
/// Pause before connections are accepted again after that failed, in nanoseconds (no more descriptors, say).
pub const NBD_ACCEPT_PAUSE_NS: u64 = 100_000_000;
/// Requests that one NBD client connection keeps in flight. Further ones wait on this side.
pub const NBD_REQUESTS_IN_FLIGHT_MAX: usize = 1024;
/// Connections of one NBD disk, where the server allows several and nothing else is said.
pub const NBD_CONNECTIONS: usize = 8;
/// The same, as many as a user may ask for.
pub const NBD_CONNECTIONS_MAX: usize = 16;
/// A connection with so many requests in flight is reason for another one, while there are few.
pub const NBD_GROW_DEPTH: usize = 4;
/// So many connections are few: they are what helps a server that serves each with a thread of its own.
pub const NBD_CONNECTIONS_FEW: usize = 4;
/// Beyond the few, so many requests in flight are: the servers that are known (QEMU's, nbdkit) work on no more of one
/// connection at a time, so that a deep queue on a slow link needs connections, not depth.
pub const NBD_GROW_DEPTH_FULL: usize = 16;
/// Of so many bytes an NBD server is asked for extents at least, however few are asked about: the rest is remembered.
pub const NBD_STATUS_AHEAD_BYTES: u64 = 64 * MIB;
/// Extents of one NBD block status reply that are remembered.
pub const NBD_STATUS_KEPT: usize = 4096;
/// Changes that may be made while an NBD server is asked for extents; with more its answer is not remembered.
pub const NBD_STATUS_CHANGES: usize = 1024;
/// After an attempt at another connection failed, none is made for so long, in nanoseconds.
pub const NBD_GROW_PAUSE_NS: u64 = 30_000_000_000;
/// How long requests wait for a lost NBD connection to come back when nothing else is said, in nanoseconds.
pub const NBD_RECONNECT_DELAY_NS: u64 = 10_000_000_000;
/// The first pause between two attempts at connecting, in nanoseconds; doubled with every further one.
pub const NBD_RECONNECT_PAUSE_NS_MIN: u64 = 50_000_000;
/// The longest such pause.
pub const NBD_RECONNECT_PAUSE_NS_MAX: u64 = 1_000_000_000;
/// How often a request is sent again after its connection was lost.
pub const NBD_RESENDS_MAX: u32 = 16;
/// How long an NBD server may send nothing before a job's requests fail, in nanoseconds.
pub const NBD_IO_TIMEOUT_NS: u64 = 60_000_000_000;
/// How long it may take for a flush, and for zeroes and discards of ranges longer than the next number.
pub const NBD_FLUSH_TIMEOUT_NS: u64 = 600_000_000_000;
/// Zeroes and discards of longer ranges may take long.
pub const NBD_LONG_RANGE_BYTES: u64 = 32 * MIB;
/// After so long without a byte of an NBD server that is waited for, a line says so; then after every so long.
pub const NBD_SILENCE_TOLD_NS: u64 = 10_000_000_000;
/// See above.
pub const NBD_SILENCE_AGAIN_NS: u64 = 60_000_000_000;
/// How often is looked for silence, at most and at least.
pub const NBD_SILENCE_LOOK_NS_MAX: u64 = 1_000_000_000;
/// See above.
pub const NBD_SILENCE_LOOK_NS_MIN: u64 = 20_000_000;
/// What was given up of a silent NBD server is waited for this long, at least, before something newer is written there.
pub const NBD_LATE_WAIT_NS_MIN: u64 = 1_000_000_000;
/// Bytes that an NBD server has acknowledged and not flushed which are kept to be written again, when nothing else is said.
pub const NBD_UNFLUSHED_BYTES: u64 = 64 * MIB;
/// Of them, so many changes are made again at the same time.
pub const NBD_AGAIN_CHANGES: usize = 32;
/// And so many bytes, or a single change.
pub const NBD_AGAIN_BYTES: u64 = 2 * MIB;
/// Connections to an NBD server that hangs that are kept though nothing but memory hangs on them.
pub const NBD_SILENT_KEPT: usize = 4;
/// How long extents that an NBD server told of are believed, in nanoseconds: others may write there.
pub const NBD_STATUS_AGE_NS_MAX: u64 = 1_000_000_000;
/// Time in which a server has to take a client's farewell, in nanoseconds; then the connection is cut.
pub const NBD_FAREWELL_NS_MAX: u64 = 5_000_000_000;

// ---- Saved measurements ----

/// Longest saved latency histogram that is read back, in bytes: every counter at its longest encoding fits.
pub const HISTOGRAM_BYTES_MAX: usize = 512 << 10;

/// Events of one job that nobody has taken; the oldest go first.
pub const JOB_EVENTS_KEPT_MAX: usize = 1024;
/// Memory that a leaf, an image or a job sets aside for when guests hold all the rest.
pub const RESERVE_BYTES: usize = 64 << 10;
/// Copies of one mirror in flight, where a path holds no more.
pub const MIRROR_OPERATIONS: usize = 16;
/// Copies of one mirror in flight at most: 64 KiB each, they are a mirror's `buf-size`.
pub const MIRROR_OPERATIONS_MAX: usize = 256;
/// While fewer bytes than this are in flight, a job's copies count as small.
pub const DEPTH_SMALL_BYTES: u64 = 2 * MIB;
/// After so long, in nanoseconds, what one copy takes on a path without a queue is measured anew.
pub const DEPTH_PROBE_NANOS: u64 = 10_000_000_000;
/// Bytes of one copy of a mirror from and to what is near by, unless its granularity is larger: what stays in a
/// processor's cache on its way.
pub const COPY_BYTES: u64 = 256 * 1024;
/// The same where a server is involved, which wakes up for each.
pub const COPY_BYTES_REMOTE: u64 = MIB;
/// A mirror's `buf-size` when none is given (as QEMU has it).
pub const MIRROR_BUF_SIZE: u64 = 16 << 20;
/// Memory that the command sets aside for a mirror's copies to or from a server, however large its `buf-size` is.
pub const MIRROR_MEMORY_BYTES_MAX: u64 = 64 << 20;
/// The largest range that one zeroing operation of a mirror covers.
pub const MIRROR_ZERO_BYTES_MAX: u64 = 1 << 30;
/// How far ahead a mirror asks for holes and data at once.
pub const MIRROR_STATUS_BYTES_MAX: u64 = 1 << 40;
/// Copies of one conversion in flight when nothing is said: what fills a device's queue on two processors.
pub const CONVERT_OPERATIONS: usize = 8;
/// Copies of one conversion in flight at most, when it finds out by itself how many a path holds.
pub const CONVERT_OPERATIONS_MAX: usize = 256;
/// The same when a user says how many (`-m`): each may hold a buffer of [`CONVERT_CHUNK_BYTES`].
pub const CONVERT_PARALLEL_MAX: usize = 16;
/// Bytes that one conversion has in flight at most.
pub const CONVERT_BYTES_IN_FLIGHT: u64 = 16 * MIB;
/// Bytes of one copy of a conversion.
pub const CONVERT_CHUNK_BYTES: u64 = MIB;
/// The largest range that one zeroing operation of a conversion covers.
pub const CONVERT_ZERO_BYTES_MAX: u64 = 1 << 30;
/// The largest range whose blocks are shared by one call: a cancelled conversion waits for it.
pub const CONVERT_SHARE_BYTES_MAX: u64 = 256 * MIB;
/// Extents that one question about the source's holes gives at most.
pub const CONVERT_EXTENTS_PER_QUESTION: usize = 64;
/// Pieces known and not yet begun from which on a conversion asks no further.
pub const CONVERT_EXTENTS_AHEAD_MAX: usize = 64;
/// Bytes of one step of a comparison.
pub const COMPARE_CHUNK_BYTES: u64 = MIB;
/// Steps of one comparison at once; each holds two buffers.
pub const COMPARE_WORKERS: usize = 8;
/// Bytes that are read one by one when a damaged disk is salvaged: what is lost around a bad place.
pub const SALVAGE_BYTES: u64 = 4 * KIB;
/// Copies of a commit or a stream in flight.
pub const SWEEP_OPERATIONS_MAX: usize = 128;
/// Bytes of one such copy.
pub const SWEEP_CHUNK_BYTES: u64 = MIB;
/// Bytes that such a job has in flight when nobody waits for it.
pub const SWEEP_BYTES_IN_FLIGHT: u64 = 16 * MIB;
/// The largest piece that it makes zero at once.
pub const SWEEP_ZERO_BYTES_MAX: u64 = 64 * MIB;
/// Extents that it asks for at once, and that it knows ahead.
pub const SWEEP_EXTENTS_PER_QUESTION: usize = 256;
/// See [`SWEEP_EXTENTS_PER_QUESTION`].
pub const SWEEP_EXTENTS_AHEAD_MAX: usize = 512;
/// Reads of guests that a stream remembers, to fill what they read first; what comes on top is filled in its turn.
pub const SWEEP_WISHES_MAX: usize = 64;
/// Such ranges that are filled at the same time.
pub const SWEEP_WISHES_IN_FLIGHT: usize = 8;
/// A server that was lost so often without a flush between that succeeded ends the job that writes to it.
pub const LAPSES_MAX: u32 = 3;
/// The first pause of a job that ignores errors; doubled with every further one.
pub const ERROR_PAUSE_NANOS_MIN: u64 = 10_000_000;
/// The longest such pause.
pub const ERROR_PAUSE_NANOS_MAX: u64 = 2_000_000_000;
/// Failures of the target that met guests' writes and that the job has not looked at; more are dropped, their ranges
/// are dirty all the same.
pub const TRACKER_FAILURES_MAX: usize = 16;
/// How long a drain may take before it is given up.
pub const DRAIN_NANOS_MAX: u64 = 60_000_000_000;
/// So much may differ when a mirror shuts the door at its first opportunity; doubled after each step of waiting.
pub const CLOSING_BYTES_FIRST: u64 = 128 << 10;
/// Such a step.
pub const CLOSING_STEP_NANOS: u64 = 20_000_000;
/// The longest pause between two attempts to shut the door for no longer than guests are to wait.
pub const DOWNTIME_PAUSE_NANOS_MAX: u64 = 10_000_000_000;
/// The longest time for which a mirror's guests stand at a shut door, unless something else is said.
pub const DOWNTIME_NANOS_DEFAULT: u64 = 300_000_000;
/// How long whoever holds a lock is looked for, in all processes of the machine.
pub const LOCK_HOLDERS_NANOS_MAX: u64 = 300_000_000;
/// How long a lock is waited for that no living process is seen to hold.
pub const ORPHANED_LOCK_NANOS_MAX: u64 = 5_000_000_000;
/// How often it is looked at.
pub const ORPHANED_LOCK_PAUSE_NANOS: u64 = 100_000_000;
/// How long guests at a shut door wait for the flush of the disk that they are about to leave.
pub const OLD_DISK_FLUSH_NANOS_MAX: u64 = 200_000_000;
/// How long the end of a job waits, when the door is open again, until a mark on that disk says that it is old.
pub const OLD_DISK_MARK_NANOS_MAX: u64 = 200_000_000;
/// The largest range that one zeroing operation of a mirror covers while guests' writes have to wait for it.
pub const MIRROR_ZERO_BYTES_MAX_BLOCKING: u64 = 32 << 20;
/// Bytes of one copy of a mirror while source and target share blocks: nothing is read or written.
pub const MIRROR_SHARED_BYTES: u64 = 64 << 20;
/// So much may still differ when a mirror shuts the door for a moment and copies the rest, to become ready or to end.
pub const MIRROR_CLOSING_BYTES_MAX: u64 = 8 << 20;
/// So much may be left to compare when a verifying pass beside the guests is content: the rest is compared
/// while they wait.
pub const VERIFY_LEFT_BYTES: u64 = 32 << 20;
/// Ranges of changes that failed and may still land which are remembered one by one; of more, all that lies between.
pub const DOUBTS_MAX: usize = 64;

// ---- GlusterFS ----

/// How long a look for an image on its volume is waited for; a brick that hangs keeps it for 42 s.
pub const GLUSTER_LOOK_NS_MAX: u64 = 5_000_000_000;
/// Servers that one image on GlusterFS names: a volume of a large cluster has more, and its list comes from any of them.
pub const GLUSTER_SERVERS_MAX: usize = 64;
/// Calls of libgfapi in flight for one image. Its own threads carry them out; further ones wait here.
pub const GLUSTER_IN_FLIGHT_MAX: usize = 128;
/// The largest range that one call of libgfapi zeroes or gives back, in bytes: a brick may have to write the zeroes, and
/// its client takes it for dead when no answer comes for long.
pub const GLUSTER_RANGE_BYTES_MAX: u64 = 256 * MIB;
/// How long an extent that GlusterFS told of is believed, in nanoseconds: others may write there.
pub const GLUSTER_STATUS_AGE_NS_MAX: u64 = 1_000_000_000;
/// Ranges written here that are told apart; what lies between two of them counts as written beyond that.
pub const GLUSTER_WRITTEN_RANGES_MAX: usize = 64;
/// How long opening an image on GlusterFS may take, in nanoseconds, when nothing is said: libgfapi tries each server for
/// some seconds.
pub const GLUSTER_OPEN_NS_MAX: u64 = 120_000_000_000;
/// After so long a line says that it is waited for.
pub const GLUSTER_OPEN_TOLD_NS: u64 = 8_000_000_000;

/// How often a job that follows looks whether its target is where it was; and how often any job notes on the mark how far
/// it is.
pub const FIND_NANOS: u64 = 60_000_000_000;
/// How often a job that copies looks: a file that was cut gets its length back with the last piece that is written, but not
/// what was in it.
pub const FIND_COPYING_NANOS: u64 = 1_000_000_000;
