//! Going over from reading to writing and back, while others go on reading.
//!
//! A layer that a job writes into (the base of a commit, the top of a stream, an overlay whose header changes) was
//! opened to be read only, and is so again when the job is over.

use blockferry_ring::Errno;

use super::header::incompatible;
use super::image::{Fault, Qcow2};
use super::open::{plain, refuse};
use crate::base::limits::RESERVE_BYTES;
use crate::block::{IoResult, Node, Reserve};

impl Qcow2 {
    /// See [`Driver::reopen`].
    pub(super) async fn reopen_image(&self, read_only: bool) -> IoResult {
        if read_only == self.read_only.get() {
            return Ok(());
        }
        if read_only {
            // Tables that are not written back now never will be.
            self.write_back().await.map_err(|fault| plain(&self.name, fault))?;
            self.read_only.set(true);
            let result = self.reopen_files(true).await;
            if result.is_err() {
                self.read_only.set(false);
            }
            return result;
        }
        if self.header.borrow().incompatible & incompatible::CORRUPT != 0 || self.corrupt.get() {
            return Err(refuse(
                &self.name,
                Errno::EROFS,
                "The image is marked as damaged: it can be read, and repaired (`blockferry check --repair all`), \
                 but not written.",
            ));
        }
        if self.copy_memory.get().is_none() {
            let memory = Reserve::new(&self.ring, RESERVE_BYTES).map_err(|errno| {
                refuse(&self.name, errno, "All memory for I/O is in use; give the engine more of it.")
            })?;
            let _ = self.copy_memory.set(memory);
        }
        self.reopen_files(false).await?;
        self.read_only.set(false);
        if let Err(fault) = self.become_writable().await {
            self.read_only.set(true);
            if let Err(error) = self.reopen_files(true).await {
                tracing::warn!(%error, "an image stays open to be written");
            }
            return Err(plain(&self.name, fault));
        }
        Ok(())
    }

    /// Who only reads has no use for refcounts.
    async fn become_writable(&self) -> Result<(), Fault> {
        self.load_tables(true).await?;
        self.make_writable().await
    }

    async fn reopen_files(&self, read_only: bool) -> IoResult {
        reopen(&self.file(), read_only).await?;
        if let Some(data_file) = &self.data_file
            && let Err(error) = reopen(&data_file.node(), read_only).await
        {
            if let Err(error) = reopen(&self.file(), !read_only).await {
                tracing::warn!(%error, "the access to an image could not be changed back");
            }
            return Err(error);
        }
        Ok(())
    }
}

async fn reopen(file: &Node, read_only: bool) -> IoResult {
    if file.is_read_only() == read_only {
        return Ok(());
    }
    match file.reopen(read_only) {
        Some(reopening) => reopening.await,
        None => Err(refuse(
            file.driver().name(),
            Errno::EROFS,
            "It was opened to be read only, and this kind of place cannot be opened otherwise meanwhile.",
        )),
    }
}
