//! Roots: what a user of a disk holds, whatever node it points to.
//!
//! A user (an export, an embedder) holds a [`Root`], which points to a node; a pivot lets it point to another one while the
//! user's clients go on.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::{Buf, Errno, SharedBuf};

use crate::base::planted::{Bug, is_planted};
use crate::block::{BlockError, Extent, IoResult, Operation, Resolved, WriteFlags, ZeroFlags};

pub use crate::block::child::{Child, Lenient};
pub use crate::block::filter::{Below, Filter, Mutation};
pub use crate::block::node::{Alone, Drained, Hearing, Inside, Node, ReadTold};
pub use crate::block::role::Role;

/// What clients of a root may rely on for its whole life, whatever node it points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Bytes.
    pub len: u64,
    /// The smallest request that needs no read-modify-write when the root was made; requests of any
    /// size work.
    pub preferred_block: u32,
    /// Writes are refused.
    pub read_only: bool,
}

struct RootInner {
    using: Rc<Child>,
    features: Features,
    parked: Cell<u32>,
}

/// A user's handle of a disk.
#[derive(Clone)]
pub struct Root {
    inner: Rc<RootInner>,
    /// Planted bug: this client does not see the shut door.
    ungated: bool,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("node", &self.inner.using.node().name()).finish_non_exhaustive()
    }
}

impl Root {
    /// A root on `node`. Takes the locks that its use needs.
    pub fn new(node: &Rc<Node>, read_only: bool) -> Result<Root, BlockError> {
        let using = node.attach_client(if read_only { Role::Reader } else { Role::Guest })?;
        let features = Features {
            len: node.driver().len(),
            preferred_block: node.driver().limits().request_align.max(4096),
            read_only: read_only || node.driver().is_read_only(),
        };
        Ok(Root { inner: Rc::new(RootInner { using, features, parked: Cell::new(0) }), ungated: false })
    }

    /// The handle for one client of this root.
    pub fn client(&self) -> Root {
        let ungated = is_planted(Bug::NewClientNotDrained) && self.node().is_drained();
        Root { inner: self.inner.clone(), ungated }
    }

    /// What clients may rely on.
    pub fn features(&self) -> Features {
        self.inner.features
    }

    /// The node that it points to now.
    pub fn node(&self) -> Rc<Node> {
        self.inner.using.node()
    }

    /// Requests that wait at the door.
    pub fn parked(&self) -> u32 {
        self.inner.parked.get()
    }

    /// Waits until the door is open. New connections come in through it as well.
    pub async fn admit(&self) {
        drop(self.enter().await);
    }

    async fn enter(&self) -> Inside {
        self.enter_at(self.node()).await
    }

    /// For reads and changes: how long they take, the wait at the door included, is counted.
    async fn enter_counted(&self) -> Inside {
        let node = self.node();
        let came = node.ring().clock();
        self.enter_at(node).await.counted_from(came)
    }

    async fn enter_at(&self, node: Rc<Node>) -> Inside {
        match node.enter(self.ungated) {
            Ok(inside) => inside,
            Err(node) => self.enter_parked(node).await,
        }
    }

    async fn enter_parked(&self, mut node: Rc<Node>) -> Inside {
        self.inner.parked.set(self.inner.parked.get() + 1);
        loop {
            node.until_open().await;
            // Where the root points may have changed while the door was shut.
            match self.node().enter(false) {
                Ok(inside) => {
                    self.inner.parked.set(self.inner.parked.get() - 1);
                    return inside;
                }
                Err(shut) => node = shut,
            }
        }
    }

    /// Whether such a request is allowed, and lies within the disk.
    pub fn check(&self, operation: Operation, offset: u64, len: u64) -> IoResult {
        let features = &self.inner.features;
        let fits = offset.checked_add(len).is_some_and(|end| end <= features.len);
        let errno = if operation.is_write() && features.read_only {
            Errno::EPERM
        } else if !fits {
            if operation.is_write() { Errno::ENOSPC } else { Errno::EINVAL }
        } else {
            return Ok(());
        };
        Err(BlockError::at(operation, self.node().driver().name(), offset, len, errno))
    }

    /// Reads `buf.len()` bytes at `offset`.
    pub async fn read(&self, offset: u64, buf: Buf) -> (Buf, IoResult) {
        if let Err(error) = self.check(Operation::Read, offset, buf.len() as u64) {
            return (buf, Err(error));
        }
        let inside = self.enter_counted().await;
        inside.node().was_read(offset, buf.len() as u64);
        match inside.node().driver().resolve(offset, buf.len() as u64) {
            Resolved::Zero => {
                let mut buf = buf;
                buf.fill_zero();
                (buf, Ok(()))
            }
            Resolved::File { file, offset: at, pin }
                if buf.is_aligned(inside.node().driver().limits().mem_align as usize) =>
            {
                let wanted = buf.len();
                let (buf, result) = inside.node().ring().read(&file, at, buf).await;
                drop(pin);
                match result {
                    Ok(n) if n as usize == wanted => (buf, Ok(())),
                    // Short or failed: the driver knows what that means.
                    _ => inside.node().driver().read(offset, buf).await,
                }
            }
            _ => inside.node().driver().read(offset, buf).await,
        }
    }

    /// Writes all of `buf` at `offset`.
    pub async fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoResult {
        self.check(Operation::Write, offset, buf.len() as u64)?;
        let inside = self.enter_counted().await;
        inside.node().mutate(Mutation::Write { offset, buf, flags }).await
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.check(Operation::WriteZeroes, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let inside = self.enter_counted().await;
        inside.node().mutate(Mutation::Zeroes { offset, len, flags }).await
    }

    /// Gives space back; contents are undefined afterwards.
    pub async fn discard(&self, offset: u64, len: u64) -> IoResult {
        self.check(Operation::Discard, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let inside = self.enter().await;
        inside.node().mutate(Mutation::Discard { offset, len }).await
    }

    /// Makes acknowledged writes durable.
    pub async fn flush(&self) -> IoResult {
        let inside = self.enter().await;
        inside.node().driver().flush().await
    }

    /// What is known of the range from `offset` on: extents that follow each other, at most `extents_max`, added to `out`.
    pub async fn extents(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &mut Vec<Extent>,
    ) -> IoResult {
        self.check(Operation::BlockStatus, offset, len)?;
        let inside = self.enter().await;
        inside.node().extents_of(offset, len, extents_max, out).await
    }

    /// What is known of the range from `offset` on.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Extent, BlockError> {
        self.check(Operation::BlockStatus, offset, len)?;
        let inside = self.enter().await;
        inside.node().driver().block_status(offset, len).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Permissions;
    use crate::format::qcow2::{Backing, CreateOptions, OpenFiles, OpenOptions, Qcow2, Wanted};
    use crate::protocol::mem::MemDriver;
    use blockferry_ring::{Config, Ring};

    const MIB: u64 = 1 << 20;

    #[derive(Debug)]
    struct NoFiles;

    impl OpenFiles for NoFiles {
        fn open<'a>(&'a self, _: Wanted<'a>) -> crate::block::IoFuture<'a, Result<Rc<Node>, BlockError>> {
            unreachable!("what lies below is given")
        }
    }

    fn memory(ring: &Ring, name: &str) -> Rc<Node> {
        Node::of(ring, Rc::new(MemDriver::new(ring, name, 4 * MIB, false)))
    }

    /// An image over `base`.
    async fn overlay(ring: &Ring, name: &str, base: &Rc<Node>) -> Rc<Node> {
        let file = memory(ring, name);
        let options = CreateOptions { size: MIB, ..CreateOptions::default() };
        Qcow2::create(ring, &file, None, &options).await.expect("an image");
        let options = OpenOptions { backing: Backing::Given(base.clone()), ..OpenOptions::default() };
        Node::of(ring, Qcow2::open(ring, &file, &NoFiles, options).await.expect("an image"))
    }

    fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Ring) -> F) {
        let ring = Ring::new(&Config { arena_bytes: 8 << 20, ..Config::default() }).expect("a ring");
        ring.block_on(test(ring.clone()));
    }

    fn refused<T>(result: Result<T, BlockError>) -> String {
        result.err().expect("a refusal").to_string()
    }

    #[test]
    fn two_overlays_share_a_base_that_nobody_changes_under_them() {
        run(|ring| async move {
            let base = memory(&ring, "base");
            let (one, two) = (overlay(&ring, "one", &base).await, overlay(&ring, "two", &base).await);
            assert!(Rc::ptr_eq(&one.below().unwrap(), &two.below().unwrap()));
            let guests = [Root::new(&one, false).unwrap(), Root::new(&two, false).unwrap()];
            assert_eq!((base.users().len(), base.client_count()), (2, 0));
            // Whoever writes the base is told who needs it, and which permission that is about.
            for role in [Role::Guest, Role::JobBase("commit"), Role::JobTarget("mirror")] {
                let why = refused(base.attach(role));
                assert!(why.contains("the image 'one', as its backing file"), "{why}");
                assert!(why.contains(&role.to_string()) && why.contains("'write'"), "{why}");
            }
            assert!(base.attach(Role::Reader).is_ok() && base.attach(Role::JobSource("mirror")).is_ok());
            // A job that sees to it that one overlay shows the same does not know of the other.
            let why = refused(base.attach_in_chain(Role::JobBase("commit"), &one).await);
            assert!(why.contains("the image 'two'"), "{why}");
            // One that nobody uses needs nothing.
            let [first, second] = guests;
            drop(second);
            let job = base.attach_in_chain(Role::JobBase("commit"), &one).await.expect("nobody minds");
            let why = refused(Root::new(&two, true));
            assert!(why.contains("block job: commit"), "{why}");
            drop(job);
            let again = Root::new(&two, true).expect("nobody minds");
            assert!(base.attach(Role::Guest).is_err());
            drop((first, again));
            assert!(base.attach(Role::Guest).is_ok());
        });
    }

    #[test]
    fn a_refused_switch_changes_nothing() {
        run(|ring| async move {
            let (base, other) = (memory(&ring, "base"), memory(&ring, "other"));
            let disk = overlay(&ring, "disk", &base).await;
            let _guest = Root::new(&disk, false).unwrap();
            let job = other.attach(Role::JobTarget("mirror")).unwrap();
            let why = refused(disk.set_below(Some(&other)));
            assert!(why.contains("block job: mirror") && why.contains("the image 'disk'"), "{why}");
            assert!(Rc::ptr_eq(&disk.below().unwrap(), &base));
            assert_eq!((base.users().len(), other.users().len()), (1, 1));
            assert!(base.attach(Role::Guest).is_err());
            drop(job);
            disk.set_below(Some(&other)).unwrap();
            assert!(base.users().is_empty() && base.attach(Role::Guest).is_ok());
            assert!(other.attach(Role::Guest).is_err());
            disk.set_below(None).unwrap();
            assert!(disk.below().is_none() && other.users().is_empty());
            // Where there was none, its use begins with what the image needs already.
            disk.set_below(Some(&base)).unwrap();
            assert!(base.attach(Role::Guest).is_err());
        });
    }

    #[test]
    fn a_pivot_moves_all_clients_or_none() {
        run(|ring| async move {
            let (old, new) = (memory(&ring, "old"), memory(&ring, "new"));
            let roots = [Root::new(&old, false).unwrap(), Root::new(&old, true).unwrap()];
            let by_itself = old.attach(Role::Reader).unwrap();
            let job = new.attach(Role::JobTarget("mirror")).unwrap();
            // Somebody else has it open in a way that does not go with clients.
            let stranger = Child::inner(&new, Role::File, "stranger");
            stranger.set_permissions(Permissions::READER).unwrap_err();
            let drained = old.drain(1_000_000).await.unwrap();
            let taken = Child::inner(&new, Role::File, "stranger");
            let lenient = taken.lenient();
            taken.set_permissions(Permissions::JOB_BASE).unwrap();
            drop(lenient);
            let why = refused(old.pivot_to(&new, &job, &drained));
            assert!(why.contains("the image 'stranger', as its file"), "{why}");
            assert!(roots.iter().all(|root| Rc::ptr_eq(&root.node(), &old)));
            assert_eq!(
                (old.client_count(), new.client_count(), job.role()),
                (2, 0, Role::JobTarget("mirror"))
            );
            drop((taken, stranger));
            old.pivot_to(&new, &job, &drained).unwrap();
            assert!(roots.iter().all(|root| Rc::ptr_eq(&root.node(), &new)));
            assert!(Rc::ptr_eq(&by_itself.node(), &old));
            assert_eq!((old.client_count(), new.client_count(), job.role()), (0, 2, Role::Leaving));
            // What has left stands in nobody's way.
            assert!(new.attach(Role::JobSource("mirror")).is_ok());
        });
    }

    #[test]
    fn a_file_below_a_format_has_users_like_any_other() {
        run(|ring| async move {
            let base = memory(&ring, "base");
            let disk = overlay(&ring, "disk", &base).await;
            let file = disk.driver().children()[0].node();
            assert_eq!((file.name(), file.users()[0].role()), ("disk", Role::File));
            let guest = Root::new(&disk, false).unwrap();
            let why = refused(file.attach(Role::Guest));
            assert!(why.contains("the image 'disk', as its file") && why.contains("a client"), "{why}");
            // A promise is made before the image is opened in it.
            let promise = file.attach(Role::PromisedTarget);
            drop((guest, promise));
            disk.driver().set_permissions(Permissions::NONE).unwrap();
            assert!(file.attach(Role::Guest).is_ok());
        });
    }
}
