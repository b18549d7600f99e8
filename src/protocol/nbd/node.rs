//! A remote disk as a driver of the block layer: any offset, any length, any memory, on a server that may want whole
//! blocks and may not know every command.
//!
//! What the server does not take as it is, is brought into a form that it takes: long requests are cut, parts of blocks
//! are read, changed and written back (in order with every other change that overlaps, `rewrite`), durable writes
//! become a write and a flush, zeroes become data. Only what was to be fast or not at all is refused. A discard that the
//! server does not know is left out: not doing so is no error.
//!
//! Answers about holes cost a round trip, and servers tell of many extents at once: what a reply told beyond the question
//! is kept for the next one (`known`).
//!
//! A server without flush promises nothing about durability, and nothing here can add it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::sync::Notify;
use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use super::client_error::{LostReason, NbdClientError, NotSentReason};
use super::connection::Connection;
use super::constants::{Command, CommandFlags, TransmissionFlags};
use super::known::Known;
use super::remote::{Facts, Remote, RemoteOptions, flush};
use super::transmission::StatusExtent;
use super::unstable::Change as Sent;
use crate::base::limits::{COPY_BYTES_REMOTE, DISK_LEN_MAX, NBD_STATUS_AHEAD_BYTES, RESERVE_BYTES};
use crate::base::range::ByteRange;
use crate::base::units::fmt_duration;
use crate::block::serial::{Claim, Serial};
use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, NoMemory, Operation, Permission,
    Permissions, Reserve, WriteFlags, ZeroFlags,
};
use crate::protocol::rewrite::{Blocks, Source, kind_of_change};

/// Bytes of one request that carries no data: a multiple of every block size, below 4 GiB.
const RANGE_BYTES_MAX: u64 = 1 << 31;

type NbdResult<T> = Result<T, NbdClientError>;

/// See the module's head.
#[derive(Debug)]
pub struct NbdNode {
    ring: Ring,
    remote: Rc<Remote>,
    facts: Facts,
    /// Bytes of one request at most, as the user wants it.
    request_max: u64,
    /// Nothing is written to it, whatever the server allows.
    read_only: Cell<bool>,
    changes: Serial,
    /// Memory for parts of blocks, where blocks are larger than a byte.
    bounce: Reserve,
    /// The server refuses longer ranges than this to be zeroed or trimmed.
    range_bytes_max: Cell<u64>,
    /// The server refuses to zero.
    zeroes_refused: Cell<bool>,
    known: RefCell<Known>,
    /// The server has failed to tell of the allocation.
    status_failed: Cell<bool>,
    /// Answers about the allocation so far, and who waits for one.
    answers: Cell<u64>,
    answered: Notify,
}

impl NbdNode {
    /// Connects to an export. With `read_only` nothing will be written to it.
    pub async fn open(
        ring: &Ring,
        options: RemoteOptions,
        read_only: bool,
    ) -> Result<Rc<NbdNode>, BlockError> {
        let name = options.uri.to_string();
        let request_max = options.request_bytes_max.map_or(u64::MAX, u64::from);
        let remote = Remote::open(ring, options).await.map_err(|error| {
            let block = BlockError::new(Operation::Open, name.as_str(), error.errno());
            match error {
                // What failed is said by the number.
                NbdClientError::Connect { .. } => block,
                NbdClientError::Resolve { reason, .. } => {
                    block.because(format!("Its host could not be looked up: {reason}."))
                }
                NbdClientError::Handshake { reason, .. } if reason.is_unknown_export() => {
                    block.because(format!(
                        "The server has no such export. `blockferry serve --list '{name}'` tells which ones it has."
                    ))
                }
                NbdClientError::Handshake { reason, .. } => block.because(reason.to_string()),
                NbdClientError::Lost { reason, .. } => {
                    block.because(format!("The connection was lost: {reason}"))
                }
                error => block.because(error.to_string()),
            }
        })?;
        let facts = remote.facts();
        let bounce = Reserve::new(ring, RESERVE_BYTES.max(facts.block_bytes as usize)).map_err(|errno| {
            remote.close();
            BlockError::new(Operation::Open, name.as_str(), errno)
                .hint("All memory for I/O is in use; give the engine more of it.")
        })?;
        if facts.size_bytes > DISK_LEN_MAX {
            remote.close();
            return Err(BlockError::new(Operation::Open, name.as_str(), Errno::EFBIG)
                .because(format!("The server says that it has {} bytes.", facts.size_bytes)));
        }
        if facts.read_only && !read_only {
            remote.close();
            return Err(BlockError::new(Operation::Open, name.as_str(), Errno::EROFS)
                .because("The server lets nobody write to this export."));
        }
        Ok(Rc::new(NbdNode {
            ring: ring.clone(),
            facts,
            request_max,
            read_only: Cell::new(read_only || facts.read_only),
            changes: Serial::new(ring),
            bounce,
            range_bytes_max: Cell::new(whole_blocks(request_max, facts.block_bytes).min(RANGE_BYTES_MAX)),
            zeroes_refused: Cell::new(false),
            known: RefCell::default(),
            status_failed: Cell::new(false),
            answers: Cell::new(0),
            answered: ring.notify(),
            remote,
        }))
    }

    /// Connections to the server at this moment.
    pub fn connections(&self) -> usize {
        self.remote.connections()
    }

    /// Whether several connections to the export see each other's writes, and a flush on one covers all.
    pub fn can_multi_conn(&self) -> bool {
        self.facts.multi_conn
    }

    /// Whether there has been no connection for so long that requests no longer wait for one.
    pub fn is_out_of_reach(&self) -> bool {
        self.remote.is_out_of_reach()
    }

    /// Says farewell, and waits until that is done; every later request fails.
    pub async fn disconnect(&self) {
        self.remote.disconnect().await;
    }

    fn block(&self) -> u64 {
        u64::from(self.facts.block_bytes)
    }

    /// Bytes of one read or write: what the server takes, in whole blocks.
    fn payload_max(&self) -> u64 {
        let max = u64::from(self.facts.payload_bytes_max).min(BLOCK_MAX as u64).min(self.request_max);
        whole_blocks(max, self.facts.block_bytes)
    }

    /// The whole blocks around a range; the end of the disk ends its last block.
    fn around(&self, range: ByteRange) -> ByteRange {
        let outer = range.align_outward(self.block());
        ByteRange::at_saturating(outer.start(), outer.end().min(self.facts.size_bytes) - outer.start())
    }

    fn is_whole(&self, range: ByteRange) -> bool {
        self.block() == 1 || self.around(range) == range
    }

    /// The whole blocks inside a range.
    fn inside(&self, range: ByteRange) -> Option<ByteRange> {
        let start = range.start().next_multiple_of(self.block());
        let end = match range.end() {
            end if end == self.facts.size_bytes => end,
            end => end - end % self.block(),
        };
        ByteRange::new(start, end).ok().filter(|range| !range.is_empty())
    }

    async fn enter(&self, range: ByteRange, rewrite: bool) -> Option<Claim<'_>> {
        match self.block() {
            1 => None,
            _ => Some(self.changes.enter(self.around(range), kind_of_change(rewrite)).await),
        }
    }

    /// After a change, well or badly ended, and before it is acknowledged.
    fn changed(&self, range: ByteRange) {
        self.known.borrow_mut().changed(range);
    }

    fn error(&self, operation: Operation, range: Option<ByteRange>, error: &NbdClientError) -> BlockError {
        let hint = match error {
            NbdClientError::Refused { message, .. } if message.is_empty() => None,
            NbdClientError::Refused { message, .. } => Some(format!("The server says: {message}")),
            NbdClientError::Lost { reason: LostReason::GivenUp { silent_ns }, .. } => Some(format!(
                "The server has not sent a byte for {}, and the request was given up{}.",
                fmt_duration(*silent_ns),
                if operation.is_write() { "; it may still be carried out" } else { "" }
            )),
            NbdClientError::Lost { reason, .. } => Some(format!("The connection is lost: {reason}")),
            NbdClientError::NotSent { reason, .. } => Some(format!("It was not sent: {reason}.")),
            other => Some(other.to_string()),
        };
        let place = range.map(|range| (range.start(), range.len()));
        let block =
            BlockError { place, ..BlockError::new(operation, self.remote.name().clone(), error.errno()) };
        match hint {
            Some(hint) => block.hint(hint),
            None => block,
        }
    }

    fn check_writable(&self, operation: Operation, range: ByteRange) -> IoResult {
        if !self.read_only.get() {
            return Ok(());
        }
        let name = self.remote.name().clone();
        Err(BlockError::at(operation, name, range.start(), range.len(), Errno::EROFS)
            .because("The disk was opened read-only."))
    }

    /// The export has the size that its server gives it: nothing lies behind that, and nothing is written there.
    fn check_inside(&self, operation: Operation, range: ByteRange) -> IoResult {
        let size = self.facts.size_bytes;
        if range.end() <= size {
            return Ok(());
        }
        let errno = if operation.is_write() { Errno::ENOSPC } else { Errno::EINVAL };
        let name = self.remote.name().clone();
        Err(BlockError::at(operation, name, range.start(), range.len(), errno)
            .because(format!("The export ends at {size}.")))
    }

    // Reading.

    /// Reads whole blocks, no more than the server takes at once.
    async fn get(&self, offset: u64, buf: Buf) -> (Buf, NbdResult<()>) {
        let mut memory = Some(buf);
        let result = self
            .remote
            .call(async |connection: &Connection| {
                let buf = memory.take().ok_or(NoMemory)?;
                let (buf, result) = connection.read(offset, buf).await;
                memory = Some(buf);
                result
            })
            .await;
        match memory {
            Some(buf) => (buf, result),
            None => unreachable!("a read gives its buffer back"),
        }
    }

    /// Reads whole blocks of any number.
    async fn get_all(&self, offset: u64, buf: Buf) -> (Buf, NbdResult<()>) {
        let max = self.payload_max() as usize;
        if buf.len() <= max {
            return self.get(offset, buf).await;
        }
        let (first, mut rest) = buf.split_at(max);
        let (mut done, mut result) = self.get(offset, first).await;
        let mut at = offset + max as u64;
        while !rest.is_empty() {
            let next = max.min(rest.len());
            let (part, behind) = rest.split_at(next);
            let len = part.len() as u64;
            let part = if result.is_ok() {
                let (part, got) = self.get(at, part).await;
                result = got;
                part
            } else {
                part
            };
            done = joined(done, part);
            rest = behind;
            at += len;
        }
        (joined(done, rest), result)
    }

    async fn read_any(&self, range: ByteRange, buf: Buf) -> (Buf, NbdResult<()>) {
        if range.is_empty() {
            return (buf, Ok(()));
        }
        if self.is_whole(range) {
            return self.get_all(range.start(), buf).await;
        }
        let get = async |at: u64, part: Buf| self.get(at, part).await;
        self.blocks().read(self.around(range), range, buf, get).await
    }

    fn blocks(&self) -> Blocks<'_> {
        Blocks { memory: &self.bounce, block: self.block(), bytes_max: self.payload_max() }
    }

    // Writing.

    /// Writes whole blocks, no more than the server takes at once.
    async fn put(&self, offset: u64, buf: SharedBuf, fua: bool) -> NbdResult<()> {
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        self.remote
            .change(range, Sent::Data(&buf), fua, async |connection: &Connection| {
                let has_fua = connection.flags().contains(TransmissionFlags::SEND_FUA);
                connection.write(offset, buf.clone(), fua && has_fua).await?;
                if fua && !has_fua { flush(connection).await } else { Ok(()) }
            })
            .await
    }

    /// Writes any range. The change is registered already.
    async fn put_any(&self, range: ByteRange, source: Source<'_>, fua: bool) -> NbdResult<()> {
        if range.is_empty() {
            return Ok(());
        }
        if let Source::Buf(buf) = source
            && self.is_whole(range)
        {
            for piece in range.chunks(self.payload_max()) {
                let at = (piece.start() - range.start()) as usize;
                self.put(piece.start(), buf.slice(at, piece.len() as usize), fua).await?;
            }
            return Ok(());
        }
        let get = async |at: u64, part: Buf| self.get(at, part).await;
        let put = async |at: u64, buf: SharedBuf| self.put(at, buf, fua).await;
        self.blocks().rewrite(self.around(range), range, source, get, put).await
    }

    async fn write_any(&self, range: ByteRange, buf: SharedBuf, fua: bool) -> NbdResult<()> {
        let change = self.enter(range, !self.is_whole(range)).await;
        let result = self.put_any(range, Source::Buf(&buf), fua).await;
        self.changed(range);
        drop(change);
        result
    }

    async fn flush_all(&self) -> NbdResult<()> {
        self.remote.flush().await
    }

    // Zeroes and discards.

    async fn zero_any(&self, range: ByteRange, flags: ZeroFlags) -> NbdResult<()> {
        let middle = self.inside(range);
        let change = self.enter(range, middle != Some(range)).await;
        let result = self.zero_parts(range, middle, flags).await;
        self.changed(range);
        drop(change);
        result
    }

    async fn zero_parts(
        &self,
        range: ByteRange,
        middle: Option<ByteRange>,
        flags: ZeroFlags,
    ) -> NbdResult<()> {
        let Some(middle) = middle else { return self.put_any(range, Source::Zeroes, flags.fua).await };
        // The part that may be refused comes first.
        let mut at = middle.start();
        while at < middle.end() {
            let len = self.range_bytes_max.get().min(middle.end() - at);
            let piece = ByteRange::at_saturating(at, len);
            match self.zero(piece, flags).await {
                Err(error) if is_too_long(&error) && self.shorten(len) => continue,
                Err(error) if (is_refusal(&error) || is_too_long(&error)) && !flags.no_fallback => {
                    if is_refusal(&error) && !self.zeroes_refused.replace(true) {
                        let uri = self.remote.name();
                        tracing::info!(%uri, "zeroing is not to be had here; zeroes go out as data");
                    }
                    self.put_any(piece, Source::Zeroes, flags.fua).await?;
                }
                result => result?,
            }
            at += len;
        }
        let (head, rest) = range.split_at(middle.start());
        let (_, tail) = rest.split_at(middle.end());
        self.put_any(head, Source::Zeroes, flags.fua).await?;
        self.put_any(tail, Source::Zeroes, flags.fua).await
    }

    async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> NbdResult<()> {
        let refused = self.zeroes_refused.get() && !flags.no_fallback;
        let asked = CommandFlags::EMPTY
            .set(CommandFlags::NO_HOLE, !flags.may_unmap)
            .set(CommandFlags::FAST_ZERO, flags.no_fallback);
        self.remote
            .change(range, Sent::Zeroes(asked), flags.fua, async |connection: &Connection| {
                if refused {
                    return Err(connection.not_offered(Command::WriteZeroes, range.start(), range.len()));
                }
                let has_fua = connection.flags().contains(TransmissionFlags::SEND_FUA);
                let asked = asked.set(CommandFlags::FUA, flags.fua && has_fua);
                connection.write_zeroes(range.start(), range.len(), asked).await?;
                if flags.fua && !has_fua { flush(connection).await } else { Ok(()) }
            })
            .await
    }

    /// Notes that ranges of `len` are too long; false when they cannot be made shorter.
    fn shorten(&self, len: u64) -> bool {
        let shorter = self.payload_max();
        let can = len > shorter;
        if can {
            self.range_bytes_max.set(shorter);
        }
        can
    }

    async fn trim_any(&self, range: ByteRange) -> NbdResult<()> {
        let Some(range) = self.inside(range) else { return Ok(()) };
        let change = self.enter(range, false).await;
        let mut at = range.start();
        let mut result = Ok(());
        while at < range.end() && result.is_ok() {
            let len = self.range_bytes_max.get().min(range.end() - at);
            let piece = ByteRange::at_saturating(at, len);
            let trim = async |connection: &Connection| connection.trim(at, len).await;
            result = self.remote.change(piece, Sent::Trim, false, trim).await;
            match &result {
                Err(error) if is_too_long(error) && self.shorten(len) => result = Ok(()),
                Err(error) if is_refusal(error) => {
                    // A hint that nobody takes.
                    result = Ok(());
                    break;
                }
                _ => at += len,
            }
        }
        self.changed(range);
        drop(change);
        result
    }

    // Allocation.

    async fn status(&self, range: ByteRange) -> NbdResult<Extent> {
        let get = || self.known.borrow().get(range.start(), range.len(), self.ring.now());
        let mut known = get();
        if known.is_none() && self.known.borrow().is_asked() {
            // Many ask at once, and one answer tells most of them. Who is not among those asks on his own.
            let before = self.answers.get();
            self.answered.until(|| (self.answers.get() != before).then_some(())).await;
            known = get();
        }
        if let Some(known) = known {
            return Ok(known.extent());
        }
        let outer = self.around(range);
        // Who asks of a little asks of the rest soon, and many servers tell of no more than they are asked.
        let end = outer.end().max(outer.start().saturating_add(NBD_STATUS_AHEAD_BYTES));
        let end =
            end.min(outer.start().saturating_add(whole_blocks(self.request_max, self.facts.block_bytes)));
        let asked = ByteRange::at_saturating(outer.start(), end.min(self.facts.size_bytes) - outer.start());
        self.known.borrow_mut().ask();
        let told = self
            .remote
            .call(async |connection: &Connection| {
                if !connection.has_block_status() {
                    return Ok(Vec::new());
                }
                let is_wide = connection.negotiated().style.is_extended();
                let len = if is_wide { asked.len() } else { asked.len().min(RANGE_BYTES_MAX) };
                connection.block_status(asked.start(), len).await
            })
            .await;
        // Where holes lie is a help and never a need: a server that cannot tell has data there. That is kept like an
        // answer, so that it is not asked again at once.
        let told = told.or_else(|error| self.without_status(asked, error));
        let extents = told.as_deref().unwrap_or_default();
        let first = self.known.borrow_mut().answered(outer.start(), extents, self.ring.now());
        self.answers.set(self.answers.get() + 1);
        self.answered.notify();
        told?;
        let Some(first) = first else { return Ok(Extent::data(range.len())) };
        let from = range.start() - outer.start();
        // A block that begins before the range may be told of alone: what is asked for has to move.
        match first.length.checked_sub(from).filter(|len| *len > 0) {
            Some(len) => Ok(StatusExtent { length: len.min(range.len()), ..first }.extent()),
            None => Ok(Extent::data((self.block() - from % self.block()).min(range.len()))),
        }
    }

    /// What is taken for the answer where the server failed to give one.
    fn without_status(&self, asked: ByteRange, error: NbdClientError) -> NbdResult<Vec<StatusExtent>> {
        if !matches!(error, NbdClientError::Refused { .. } | NbdClientError::NotSent { .. }) {
            return Err(error);
        }
        if !self.status_failed.replace(true) {
            let uri = self.remote.name();
            tracing::warn!(%uri, %error, "the server cannot tell where holes are; all that it does not tell is data");
        }
        Ok(vec![StatusExtent { length: asked.len(), flags: 0 }])
    }
}

/// As many bytes as are whole blocks, and no fewer than one.
fn whole_blocks(bytes: u64, block_bytes: u32) -> u64 {
    let block = u64::from(block_bytes);
    (bytes - bytes % block).max(block)
}

fn joined(left: Buf, right: Buf) -> Buf {
    match left.unsplit(right) {
        Ok(buf) => buf,
        Err(_) => unreachable!("the parts of one buffer join again"),
    }
}

/// Whether the server does not do this at all.
fn is_refusal(error: &NbdClientError) -> bool {
    match error {
        NbdClientError::NotSent { reason, .. } => *reason == NotSentReason::NotOffered,
        NbdClientError::Refused { .. } => error.errno().is_unsupported(),
        _ => false,
    }
}

/// Whether a shorter range might be taken.
fn is_too_long(error: &NbdClientError) -> bool {
    match error {
        NbdClientError::Refused { .. } => matches!(error.errno(), Errno::EINVAL | Errno::EOVERFLOW),
        NbdClientError::NotSent { reason, .. } => matches!(reason, NotSentReason::TooLong { .. }),
        _ => false,
    }
}

impl Driver for NbdNode {
    fn kind(&self) -> &'static str {
        "nbd"
    }

    fn name(&self) -> &str {
        self.remote.name()
    }

    fn len(&self) -> u64 {
        self.facts.size_bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn limits(&self) -> Limits {
        let (block, payload_max) = (self.facts.block_bytes, self.payload_max() as u32);
        Limits {
            request_align: block,
            zero_align: block,
            discard_align: block,
            transfer_max: payload_max,
            transfer_best: payload_max.min(COPY_BYTES_REMOTE as u32),
            ..Limits::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        let can = |flag| !self.read_only.get() && self.remote.offers(flag);
        let zeroes = can(TransmissionFlags::SEND_WRITE_ZEROES) && !self.zeroes_refused.get();
        Capabilities {
            fua: can(TransmissionFlags::SEND_FUA),
            discard: can(TransmissionFlags::SEND_TRIM),
            zero_fast: zeroes && can(TransmissionFlags::SEND_FAST_ZERO),
            zero_unmap: zeroes,
            status: self.remote.has_block_status(),
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            if let Err(error) = self.check_inside(Operation::Read, range) {
                return (buf, Err(error));
            }
            let (buf, result) = self.read_any(range, buf).await;
            (buf, result.map_err(|error| self.error(Operation::Read, Some(range), &error)))
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            self.check_writable(Operation::Write, range)?;
            self.check_inside(Operation::Write, range)?;
            let result = self.write_any(range, buf, flags.fua).await;
            result.map_err(|error| self.error(Operation::Write, Some(range), &error))
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            if self.read_only.get() {
                return Ok(());
            }
            self.flush_all().await.map_err(|error| self.error(Operation::Flush, None, &error))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.check_writable(Operation::Discard, range)?;
            let (range, _) = range.split_at(self.facts.size_bytes);
            let result = self.trim_any(range).await;
            result.map_err(|error| self.error(Operation::Discard, Some(range), &error))
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.check_writable(Operation::WriteZeroes, range)?;
            self.check_inside(Operation::WriteZeroes, range)?;
            if range.is_empty() {
                return Ok(());
            }
            let result = self.zero_any(range, flags).await;
            result.map_err(|error| self.error(Operation::WriteZeroes, Some(range), &error))
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.check_inside(Operation::BlockStatus, range)?;
            let result = self.status(range).await;
            result.map_err(|error| self.error(Operation::BlockStatus, Some(range), &error))
        })
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.ring.boxed(async move {
            if self.facts.read_only && !read_only {
                return Err(BlockError::new(Operation::Open, self.name(), Errno::EROFS)
                    .because("The server lets nobody write to this export."));
            }
            self.read_only.set(read_only);
            Ok(())
        }))
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        // The protocol has no locks; all there is to say is whether writing makes sense at all.
        if permissions.uses(Permission::Write) && self.facts.read_only {
            return Err(BlockError::new(Operation::Lock, self.name(), Errno::EROFS));
        }
        Ok(())
    }

    fn set_len(&self, _len: u64) -> IoFuture<'_, IoResult> {
        let error = BlockError::new(Operation::Resize, self.name(), Errno::EOPNOTSUPP);
        self.ring
            .boxed(async move { Err(error.because("An NBD export has the size that its server gives it.")) })
    }

    fn losses_for_good(&self) -> u64 {
        self.remote.losses_for_good()
    }

    fn set_writing_job(&self, is_there: bool) {
        self.remote.set_writing_job(is_there);
    }

    fn set_lapses_max(&self, lapses_max: Option<u32>) {
        self.remote.set_lapses_max(lapses_max);
    }

    fn fail_in_flight(&self) {
        self.remote.fail_in_flight();
    }

    fn is_away(&self) -> bool {
        self.remote.is_down()
    }
}

impl Drop for NbdNode {
    fn drop(&mut self) {
        self.remote.close();
    }
}
