//! The engine: the one owner of a ring, its nodes and its jobs. It wires the rooms together.
//!
//! Two ways to use it:
//! * a program whose whole life it is calls [`Engine::run`] with a future;
//! * an embedder keeps its own event loop: it polls [`Engine::with_fd`], calls [`Engine::turn`] when the
//!   fd is readable or [`Turn::next_deadline`] has come or [`Turn::more_work`] was said, submits requests
//!   through a [`guest::Guest`] and takes completions and job events from queues. Nothing blocks, and
//!   with [`OffloadMode::Inline`] no thread is started.

pub mod create;
pub mod guest;
pub mod open;
pub mod remote;

use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use blockferry_ring::sync::OneShot;
use blockferry_ring::{Config, Nanos, OffloadMode, Ring, SetupError, Turn};

use crate::block::BlockError;
use crate::graph::node::{Node, Root};
use crate::job::convert::{self, ConvertError, ConvertOptions, Tally};
use crate::job::error::JobError;
use crate::job::mirror::{self, MirrorError, MirrorOptions};
use crate::job::registry::Registry;
use crate::job::runner::Job;
use crate::job::status::Status;
use guest::Guest;

pub use open::{Format, ImageOptions};

/// How long the end of an engine waits for operations in flight.
const SHUTDOWN_NANOS: Nanos = 10_000_000_000;

/// The owner. Dropping it ends everything: jobs are given up, operations in flight are waited for.
#[derive(Debug)]
pub struct Engine {
    ring: Ring,
    jobs: Jobs,
}

/// The jobs of an engine; clones are the same list.
#[derive(Clone, Debug)]
struct Jobs {
    ring: Ring,
    list: Rc<RefCell<Registry<Job>>>,
}

impl Jobs {
    async fn mirror(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: MirrorOptions,
    ) -> Result<Job, MirrorError> {
        let id = options.id.clone();
        self.list.borrow().check_new_id(&id)?;
        let job = mirror::start(&self.ring, source, target, options).await?;
        self.add(&id, &job)?;
        Ok(job)
    }

    async fn convert(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: ConvertOptions,
    ) -> Result<(Job, Rc<Tally>), ConvertError> {
        let id = options.id.clone();
        self.list.borrow().check_new_id(&id)?;
        let (job, tally) = convert::start(&self.ring, source, target, options).await?;
        self.add(&id, &job)?;
        Ok((job, tally))
    }

    fn add(&self, id: &str, job: &Job) -> Result<(), JobError> {
        self.list.borrow_mut().insert(id, job.clone())?;
        let (list, id, job) = (self.list.clone(), id.to_owned(), job.clone());
        self.ring.spawn(async move {
            // Forgotten when dismissed.
            job.until(|| (job.status() == Status::Null).then_some(())).await;
            list.borrow_mut().remove(&id);
        });
        Ok(())
    }
}

impl Engine {
    /// An engine on the kernel's io_uring.
    pub fn new(config: &Config) -> Result<Engine, SetupError> {
        Ok(Engine::with_ring(Ring::new(config)?))
    }

    /// An engine that never starts a thread: for embedders that own theirs.
    pub fn without_threads() -> Result<Engine, SetupError> {
        Engine::new(&Config { offload: OffloadMode::Inline, ..Config::default() })
    }

    /// An engine on any ring, the simulator's too.
    pub fn with_ring(ring: Ring) -> Engine {
        let list = Rc::new(RefCell::new(Registry::new()));
        Engine { ring: ring.clone(), jobs: Jobs { ring, list } }
    }

    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Opens an image as a node. Its format is the one that was said, or what its header says.
    pub async fn open(&self, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        let driver = open::open(&self.ring, name, options).await?;
        Ok(Node::new(&self.ring, name, driver))
    }

    /// Opens an image as a node, from outside a task. Nothing is read: its format has to be said.
    pub fn open_as_said(&self, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        let driver = open::open_as_said(&self.ring, name, options)?;
        Ok(Node::new(&self.ring, name, driver))
    }

    /// A guest of a node: submits requests by token and takes completions from a queue.
    pub fn guest(&self, node: &Rc<Node>, read_only: bool) -> Result<Guest, BlockError> {
        Ok(Guest::new(&self.ring, Root::new(node, read_only)?))
    }

    /// Starts a mirror. It counts as a job of this engine.
    pub async fn mirror(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: MirrorOptions,
    ) -> Result<Job, MirrorError> {
        self.jobs.mirror(source, target, options).await
    }

    /// Starts a conversion. It counts as a job of this engine. The tally says what was copied by which means.
    pub async fn convert(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: ConvertOptions,
    ) -> Result<(Job, Rc<Tally>), ConvertError> {
        self.jobs.convert(source, target, options).await
    }

    /// Starts a mirror from outside a task: the result comes as the engine turns.
    pub fn start_mirror(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: MirrorOptions,
    ) -> OneShot<Result<Job, MirrorError>> {
        let (jobs, source, target) = (self.jobs.clone(), source.clone(), target.clone());
        self.ring.spawn_with_result(async move { jobs.mirror(&source, &target, options).await })
    }

    /// The job with this id.
    pub fn job(&self, id: &str) -> Option<Job> {
        self.jobs.list.borrow().get(id).cloned()
    }

    /// All jobs, newest first.
    pub fn jobs(&self) -> Vec<Job> {
        self.jobs.list.borrow().iter().map(|(_, job)| job.clone()).collect()
    }

    /// One turn that never blocks.
    pub fn turn(&self) -> Turn {
        self.ring.turn()
    }

    /// Runs `f` with the fd that polls readable when there is work.
    pub fn with_fd<T>(&self, f: impl FnOnce(Option<BorrowedFd<'_>>) -> T) -> T {
        self.ring.with_fd(f)
    }

    /// Turns until `future` is done.
    pub fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.ring.block_on(future)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for job in self.jobs() {
            job.give_up();
        }
        // The jobs' tasks need a few turns to undo what they made.
        for _ in 0..64 {
            if !self.ring.turn().more_work {
                break;
            }
        }
        let _ = self.ring.shutdown(SHUTDOWN_NANOS);
    }
}
