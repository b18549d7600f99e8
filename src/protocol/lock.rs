//! Keeping out of each other's way: the lock bytes that programs on one machine agree on.
//!
//! QEMU's numbers (block/file-posix.c; see also docs/system/images of its manual): who uses permission
//! `n` holds a shared lock on byte `100 + n` of the image file, who does not let others use it on byte
//! `200 + n`. Nobody takes exclusive locks: whether the others' bytes are locked is looked at.
//!
//! A change of permissions first takes what is new, then looks whether others object, and gives back
//! what it has just taken if so; only then it gives back what is no longer needed. At no moment is less
//! locked than either the old or the new permissions need, and of two programs that start at the same
//! time at most one wins.
//!
//! The locks belong to the open file, not to the process: two nodes of one engine keep each other out too.
//!
//! # Those who died
//! What a program that was killed had in flight still changes the image until the kernel has ended it, and so long its
//! locks rightly stand. No process has them open by then. Whoever meets such a lock waits for a while ([`conflict::in_time`])
//! before it takes no for an answer.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::{Errno, File, LockRange, Ring};

use crate::block::conflict;
use crate::block::error::LockConflict;
use crate::block::{BlockError, IoResult, Operation, Permission, Permissions};

const USED: u64 = 100;
const DENIED: u64 = 200;

/// The lock bytes of one open file.
#[derive(Debug)]
pub struct Locks {
    ring: Ring,
    file: RefCell<File>,
    name: Rc<str>,
    /// The option by which the user could do without.
    without: Option<&'static str>,
    held: Cell<Permissions>,
}

fn byte(start: u64) -> LockRange {
    LockRange { start, len: 1 }
}

/// The bytes that go with `permissions`.
fn bytes(permissions: Permissions) -> impl Iterator<Item = u64> {
    Permission::ALL.into_iter().flat_map(move |permission| {
        let used = permissions.uses(permission).then_some(USED + permission as u64);
        let denied = (!permissions.shares(permission)).then_some(DENIED + permission as u64);
        used.into_iter().chain(denied)
    })
}

impl Locks {
    /// No locks yet. `name` is what errors call the file, `without` the option by which the user could do without locks.
    pub fn new(ring: &Ring, file: &File, name: Rc<str>, without: Option<&'static str>) -> Locks {
        Locks {
            ring: ring.clone(),
            file: RefCell::new(file.clone()),
            name,
            without,
            held: Cell::new(Permissions::NONE),
        }
    }

    /// What is locked.
    pub fn held(&self) -> Permissions {
        self.held.get()
    }

    /// Goes over to `permissions`. On an error the old ones are still held, and nothing else.
    pub fn set(&self, permissions: Permissions) -> IoResult {
        let old: Vec<u64> = bytes(self.held.get()).collect();
        let mut taken = Vec::new();
        let result = self.take(permissions, &old, &mut taken);
        let needed: Vec<u64> = match &result {
            Ok(()) => bytes(permissions).collect(),
            Err(_) => old.clone(),
        };
        for start in old.into_iter().chain(taken) {
            if !needed.contains(&start)
                && let Err(errno) = self.ring.unlock(&self.file.borrow(), byte(start))
            {
                // More is locked than need be: safe, and over when the file is closed.
                tracing::warn!(image = %self.name, %errno, byte = start, "a lock could not be given back");
            }
        }
        if result.is_ok() {
            self.held.set(permissions);
        }
        result
    }

    /// Another handle of the same file takes the place of the one that holds the locks: it has them too from then on.
    /// That others do not object was settled when they were taken, so nobody is asked.
    pub fn move_to(&self, file: &File) -> IoResult {
        for start in bytes(self.held.get()) {
            self.ring.lock_shared(file, byte(start)).map_err(|errno| self.failed(errno))?;
        }
        // A read under way may keep the old handle open for a while. It must not be in our own way.
        let old = self.file.replace(file.clone());
        for start in bytes(self.held.get()) {
            if let Err(errno) = self.ring.unlock(&old, byte(start)) {
                tracing::warn!(image = %self.name, %errno, byte = start, "a lock could not be given back");
            }
        }
        Ok(())
    }

    fn take(&self, permissions: Permissions, old: &[u64], taken: &mut Vec<u64>) -> IoResult {
        for start in bytes(permissions) {
            if old.contains(&start) {
                continue;
            }
            match self.ring.lock_shared(&self.file.borrow(), byte(start)) {
                Ok(()) => taken.push(start),
                // An exclusive lock, which no program that follows the convention takes.
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(self.refused(start, "the lock is held")),
                Err(errno) => return Err(self.failed(errno)),
            }
        }
        for permission in Permission::ALL {
            let n = permission as u64;
            if permissions.uses(permission) && self.is_locked(DENIED + n)? {
                let what = format!("the '{}' permission is denied", permission.name());
                return Err(self.refused(DENIED + n, &what));
            }
            if !permissions.shares(permission) && self.is_locked(USED + n)? {
                let what =
                    format!("the '{}' permission cannot be denied to others: it is used", permission.name());
                return Err(self.refused(USED + n, &what));
            }
        }
        Ok(())
    }

    fn is_locked(&self, start: u64) -> Result<bool, BlockError> {
        self.ring.lock_conflict(&self.file.borrow(), byte(start)).map_err(|errno| self.failed(errno))
    }

    /// Looking through all processes for whoever holds the lock takes a while. Where somebody is served, that is left to
    /// [`conflict::in_time`], which does not keep them waiting.
    fn refused(&self, start: u64, what: &str) -> BlockError {
        let file = self.file.borrow().clone();
        if !self.ring.is_serving() {
            let holders = self.ring.lock_holders(&file, byte(start));
            return conflict::refusal(self.name.clone(), what, holders.as_deref(), self.without);
        }
        let error = BlockError::new(Operation::Lock, self.name.clone(), Errno::EBUSY).hint(format!(
            "The image is in use: {what} by another program, or by this one. {}",
            conflict::cure(self.without)
        ));
        let (range, what, without) = (byte(start), what.to_owned(), self.without);
        BlockError { conflict: Some(Box::new(LockConflict { file, range, what, without })), ..error }
    }

    fn failed(&self, errno: Errno) -> BlockError {
        let more = self.without.map_or_else(String::new, |option| {
            format!(" If nobody else uses the image, go on without ({option}).")
        });
        BlockError::new(Operation::Lock, self.name.clone(), errno)
            .hint(format!("The filesystem does not keep locks.{more}"))
    }
}
