//! Operations under way, as futures.
//!
//! The future only watches its slot. Dropping it orphans the slot: the operation is asked to end early,
//! and its memory is given back at its terminal completion, not before.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::core::{State, user_data};
use crate::errno::Errno;
use crate::mem::Buf;
use crate::op::{Held, OpResult};
use crate::ring::Ring;

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
/// Operations that fill several buffers: they come back with the result.
#[derive(Debug)]
pub struct ReadPiecesKind;
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

impl Kind for ReadPiecesKind {
    /// The buffers and the bytes moved.
    type Output = (Vec<Buf>, OpResult);
    const NEW: ReadPiecesKind = ReadPiecesKind;

    fn finish(held: HeldOut, result: OpResult) -> Self::Output {
        match held.0 {
            Held::Bufs { bufs, .. } => (bufs, result),
            _ => unreachable!("operations of this kind are submitted with buffers"),
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
    pub(crate) ring: Ring,
    pub(crate) key: u32,
    pub(crate) sequence: u32,
    /// Refused for want of slots: the error and what was handed in.
    pub(crate) refused: Option<(Errno, Held)>,
    pub(crate) _kind: K,
}

impl<K: Kind> std::fmt::Debug for Operation<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Operation({}/{})", self.key, self.sequence)
    }
}

impl<K: Kind> Operation<K> {
    pub(crate) fn user_data(&self) -> u64 {
        user_data(self.sequence, self.key)
    }

    pub(crate) fn forget(mut self) {
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
