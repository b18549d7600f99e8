//! Memory for a job's copies when guests hold all of it.
//!
//! Guests whose requests wait at a shut door hold the memory of those requests. If that is all there is, a
//! job that needs memory to finish what it shut the door for would wait for guests that wait for it. So a
//! job sets a little memory aside at its start. When there is no other, copies go through it one at a time,
//! in small pieces.

use std::cell::RefCell;

use blockferry_ring::{Buf, Ring};

use crate::base::limits::JOB_RESERVE_BYTES;

/// Memory of a job.
#[derive(Debug)]
pub(in crate::job) struct Memory {
    ring: Ring,
    reserve: RefCell<Option<Buf>>,
}

/// A buffer, and whether it is the reserve, or of it.
#[derive(Debug)]
pub(in crate::job) struct Lease {
    pub(in crate::job) buf: Buf,
    pub(in crate::job) of_reserve: bool,
}

impl Memory {
    /// Nothing is set aside yet.
    pub(in crate::job) fn without_reserve(ring: &Ring) -> Memory {
        Memory { ring: ring.clone(), reserve: RefCell::default() }
    }

    /// Sets the reserve aside. Waits for it: guests that are served give memory back.
    pub(in crate::job) async fn reserve(&self) {
        if self.reserve.borrow().is_none() {
            self.done(true).await;
        }
    }

    /// A buffer of `wanted` bytes, or a shorter one out of the reserve. What it was used for must be followed by
    /// [`Memory::done`].
    pub(in crate::job) async fn take(&self, wanted: usize) -> Lease {
        let arena = self.ring.arena();
        arena
            .freed()
            .until(|| {
                if let Some(buf) = arena.try_alloc(wanted) {
                    return Some(Lease { buf, of_reserve: false });
                }
                let buf = self.reserve.borrow_mut().take()?;
                Some(Lease { buf: buf.split_at(wanted).0, of_reserve: true })
            })
            .await
    }

    /// The buffer of a lease has been dropped. The reserve is filled up again before anybody else gets that memory.
    pub(in crate::job) async fn done(&self, of_reserve: bool) {
        if !of_reserve {
            return;
        }
        let arena = self.ring.arena();
        let reserve = arena.freed().until(|| arena.try_alloc(JOB_RESERVE_BYTES)).await;
        *self.reserve.borrow_mut() = Some(reserve);
        arena.freed().notify();
    }
}
