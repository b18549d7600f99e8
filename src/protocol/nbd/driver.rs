//! A connection as a driver of the block layer.
//!
//! One connection, no second attempt: when it is lost every request fails, and it is for the owner to open another. What
//! the server does not offer is replaced where that is sound: FUA by a write and a flush, zeroes by an error that says
//! so, a discard by nothing. A server without flush promises nothing about durability, and nothing here can add it.

use std::rc::Rc;

use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use super::client_error::{NbdClientError, NotSentReason};
use super::connection::Connection;
use super::constants::{CommandFlags, TransmissionFlags};
use super::transmission::StatusExtent;
use crate::base::limits::COPY_BYTES_REMOTE;
use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permission, Permissions,
    WriteFlags, ZeroFlags,
};

/// Bytes of one request that carries no data: a multiple of every block size, below 4 GiB.
const RANGE_BYTES_MAX: u64 = 1 << 31;

/// See the module's head.
#[derive(Debug)]
pub struct NbdDriver {
    ring: Ring,
    connection: Rc<Connection>,
}

impl NbdDriver {
    /// A driver that uses `connection`.
    pub fn new(ring: &Ring, connection: Rc<Connection>) -> Rc<NbdDriver> {
        Rc::new(NbdDriver { ring: ring.clone(), connection })
    }

    /// The connection.
    pub fn connection(&self) -> &Rc<Connection> {
        &self.connection
    }

    fn offers(&self, flag: TransmissionFlags) -> bool {
        self.connection.flags().contains(flag)
    }

    fn error(&self, operation: Operation, place: Option<(u64, u64)>, error: &NbdClientError) -> BlockError {
        let hint = match error {
            NbdClientError::Lost { reason, .. } => Some(format!("The connection is lost: {reason}")),
            NbdClientError::Refused { message, .. } if !message.is_empty() => {
                Some(format!("The server says: {message}"))
            }
            NbdClientError::NotSent { reason, .. } => Some(format!("It was not sent: {reason}.")),
            _ => None,
        };
        let name = self.connection.uri();
        let block = BlockError { place, ..BlockError::new(operation, name, error.errno()) };
        match hint {
            Some(hint) => block.hint(hint),
            None => block,
        }
    }

    async fn flush_offered(&self) -> Result<(), NbdClientError> {
        if self.offers(TransmissionFlags::SEND_FLUSH) { self.connection.flush().await } else { Ok(()) }
    }

    async fn write_maybe_fua(&self, offset: u64, buf: SharedBuf, fua: bool) -> Result<(), NbdClientError> {
        let by_flush = fua && !self.offers(TransmissionFlags::SEND_FUA);
        self.connection.write(offset, buf, fua && !by_flush).await?;
        if by_flush { self.flush_offered().await } else { Ok(()) }
    }

    async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), NbdClientError> {
        let by_flush = flags.fua && !self.offers(TransmissionFlags::SEND_FUA);
        let asked = CommandFlags::EMPTY
            .set(CommandFlags::FUA, flags.fua && !by_flush)
            .set(CommandFlags::NO_HOLE, !flags.may_unmap)
            .set(CommandFlags::FAST_ZERO, flags.no_fallback);
        for (offset, len) in pieces(offset, len) {
            self.connection.write_zeroes(offset, len, asked).await?;
        }
        if by_flush { self.flush_offered().await } else { Ok(()) }
    }
}

/// Cuts a range into what one request can express with 32 bits.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let starts = (0..len).step_by(RANGE_BYTES_MAX as usize);
    starts.map(move |at| (offset + at, RANGE_BYTES_MAX.min(len - at)))
}

impl Driver for NbdDriver {
    fn kind(&self) -> &'static str {
        "nbd"
    }

    fn name(&self) -> &str {
        self.connection.uri()
    }

    fn len(&self) -> u64 {
        self.connection.size()
    }

    fn is_read_only(&self) -> bool {
        self.connection.is_read_only()
    }

    fn limits(&self) -> Limits {
        let sizes = self.connection.block_sizes();
        let transfer_max = Limits::default().transfer_max.min(self.connection.payload_bytes_max());
        Limits {
            request_align: sizes.minimum_bytes,
            zero_align: sizes.minimum_bytes,
            discard_align: sizes.minimum_bytes,
            transfer_max,
            transfer_best: transfer_max.min(COPY_BYTES_REMOTE as u32),
            ..Limits::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        let zeroes = self.offers(TransmissionFlags::SEND_WRITE_ZEROES);
        Capabilities {
            fua: self.offers(TransmissionFlags::SEND_FUA),
            discard: self.offers(TransmissionFlags::SEND_TRIM),
            zero_fast: zeroes && self.offers(TransmissionFlags::SEND_FAST_ZERO),
            zero_unmap: zeroes,
            status: self.connection.has_block_status(),
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            let len = buf.len() as u64;
            let (buf, result) = self.connection.read(offset, buf).await;
            (buf, result.map_err(|error| self.error(Operation::Read, Some((offset, len)), &error)))
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let len = buf.len() as u64;
            let result = self.write_maybe_fua(offset, buf, flags.fua).await;
            result.map_err(|error| self.error(Operation::Write, Some((offset, len)), &error))
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.flush_offered().await.map_err(|error| self.error(Operation::Flush, None, &error))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            match self.connection.trim(offset, len).await {
                Err(NbdClientError::NotSent { reason: NotSentReason::NotOffered, .. }) => Ok(()),
                result => result.map_err(|error| self.error(Operation::Discard, Some((offset, len)), &error)),
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let result = self.zero(offset, len, flags).await;
            result.map_err(|error| self.error(Operation::WriteZeroes, Some((offset, len)), &error))
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            if !self.connection.has_block_status() {
                return Ok(Extent::data(len));
            }
            let place = Some((offset, len));
            let extents = self.connection.block_status(offset, len.min(RANGE_BYTES_MAX)).await;
            let extents = match extents {
                // Where holes lie is a help and never a need.
                Err(NbdClientError::Refused { .. }) => return Ok(Extent::data(len)),
                extents => extents.map_err(|error| self.error(Operation::BlockStatus, place, &error))?,
            };
            let Some(first) = extents.first() else { return Ok(Extent::data(len)) };
            // Neighbours with the same flags are one extent to who asks.
            let same = extents.iter().take_while(|extent| extent.flags == first.flags);
            let length = same.map(|extent| extent.length).sum();
            Ok(StatusExtent { length, ..*first }.extent())
        })
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        // The protocol has no locks; all there is to say is whether writing makes sense at all.
        if permissions.uses(Permission::Write) && self.is_read_only() {
            return Err(BlockError::new(Operation::Lock, self.name(), Errno::EROFS));
        }
        Ok(())
    }

    fn set_len(&self, _len: u64) -> IoFuture<'_, IoResult> {
        let error = BlockError::new(Operation::Resize, self.name(), Errno::EOPNOTSUPP);
        self.ring
            .boxed(async move { Err(error.because("An NBD export has the size that its server gives it.")) })
    }

    fn fail_in_flight(&self) {
        self.connection.cut();
    }
}
