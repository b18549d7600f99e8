//! The engine: the one owner of a ring, its nodes and its jobs. It wires the rooms together.
//!
//! Two ways to use it:
//! * a program whose whole life it is calls [`Engine::run`] with a future;
//! * an embedder keeps its own event loop: it polls [`Engine::with_fd`], calls [`Engine::turn`] when the
//!   fd is readable or [`Turn::next_deadline`] has come or [`Turn::more_work`] was said, submits requests
//!   through a [`guest::Guest`] and takes completions and job events from queues. Nothing blocks, and
//!   with [`OffloadMode::Inline`] no thread is started.

pub mod admit;
pub mod create;
pub mod guest;
pub mod handle;
pub mod marks;
pub mod named;
pub mod nodes;
pub mod open;
pub mod qcow2;
pub mod rebase;
pub mod remote;
pub mod spec;

use std::cell::{OnceCell, RefCell};
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use blockferry_ring::sync::OneShot;
use blockferry_ring::{Config, Errno, Nanos, OffloadMode, Ring, SetupError, Turn};

use crate::block::{BlockError, Operation};
use crate::graph::node::{Node, Root};
use crate::job::commit;
use crate::job::convert::{self, ConvertError, ConvertOptions, Tally};
use crate::job::error::JobError;
use crate::job::mirror::{self, MirrorError, MirrorOptions};
use crate::job::registry::Registry;
use crate::job::runner::Job;
use crate::job::status::Status;
use crate::job::stream::{self, Floor};
use crate::job::sweep::{ChainError, SweepOptions};
use guest::Guest;
use handle::{Desk, Handle, SharedDisk};
use nodes::Nodes;

pub use open::{Format, ImageOptions};
pub use spec::NodeSpec;

/// How long the end of an engine waits for operations in flight.
const SHUTDOWN_NANOS: Nanos = 10_000_000_000;

/// The owner. Dropping it ends everything: jobs are given up, operations in flight are waited for.
#[derive(Debug)]
pub struct Engine {
    ring: Ring,
    jobs: Jobs,
    nodes: Nodes,
    desk: OnceCell<Desk>,
}

/// The jobs of an engine; clones are the same list.
#[derive(Clone, Debug)]
struct Jobs {
    ring: Ring,
    list: Rc<RefCell<Registry<Job>>>,
}

impl Jobs {
    async fn adopt<T, E: From<JobError>>(
        &self,
        id: &str,
        start: impl Future<Output = Result<T, E>>,
        job: impl FnOnce(&T) -> &Job,
    ) -> Result<T, E> {
        self.list.borrow().check_new_id(id)?;
        let started = start.await?;
        self.add(id, job(&started))?;
        Ok(started)
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

impl Jobs {
    fn get(&self, id: &str) -> Option<Job> {
        self.list.borrow().get(id).cloned()
    }

    fn ids(&self) -> Vec<String> {
        self.list.borrow().iter().map(|(id, _)| id.to_owned()).collect()
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
        Engine {
            ring: ring.clone(),
            jobs: Jobs { ring, list },
            nodes: Nodes::default(),
            desk: OnceCell::new(),
        }
    }

    fn desk(&self) -> &Desk {
        self.desk.get_or_init(|| Desk::open(&self.ring, &self.jobs))
    }

    /// A handle for other threads: what they ask for is done as the engine turns.
    pub fn handle(&self) -> Handle {
        self.desk().handle()
    }

    /// The disk of a node for other threads: requests with a callback each, on their own memory.
    pub fn share(&self, node: &Rc<Node>, read_only: bool) -> Result<SharedDisk, BlockError> {
        self.desk().share(node, read_only)
    }

    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Opens an image as a node. Its format is the one that was said, or what its header says.
    pub async fn open(&self, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        let spec = NodeSpec::parse(name)?;
        self.open_called(name, &spec, options).await
    }

    /// Opens an image as a node from what was said of it, read already or put together by a program.
    pub async fn open_spec(&self, spec: &NodeSpec, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        self.open_called(&spec.shown(), spec, options).await
    }

    async fn open_called(
        &self,
        shown: &str,
        spec: &NodeSpec,
        options: &ImageOptions,
    ) -> Result<Rc<Node>, BlockError> {
        if let Some(name) = &spec.node_name
            && self.node(name).is_some()
        {
            let why = format!("Its node is to be called '{name}', and another one is called so.");
            return Err(BlockError::new(Operation::Open, shown, Errno::EEXIST).because(why));
        }
        let options = self.nodes.with(options);
        let node = open::open_spec(&self.ring, shown, spec, &options).await?;
        let node = node.called(spec.node_name.as_deref().unwrap_or(shown));
        self.nodes.add(&node);
        Ok(node)
    }

    /// All nodes that are open: what was opened, and what that is built on (files, backing files, data files).
    pub fn nodes(&self) -> Vec<Rc<Node>> {
        self.nodes.all()
    }

    /// The node that is called so: by the name that it was given, or by [`Node::unique_name`].
    pub fn node(&self, name: &str) -> Option<Rc<Node>> {
        self.nodes.find(name)
    }

    /// Opens an image as a node, from outside a task. Nothing is read: its format has to be said.
    pub fn open_as_said(&self, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        let node = open::open_as_said(&self.ring, name, options)?.called(name);
        self.nodes.add(&node);
        Ok(node)
    }

    /// Opens an image as a node, from outside a task: the result comes as the engine turns.
    pub fn start_open(&self, name: &str, options: &ImageOptions) -> OneShot<Result<Rc<Node>, BlockError>> {
        let (ring, name, nodes) = (self.ring.clone(), name.to_owned(), self.nodes.clone());
        let options = nodes.with(options);
        self.ring.spawn_with_result(async move {
            let node = open::open(&ring, &name, &options).await?.called(name);
            nodes.add(&node);
            Ok(node)
        })
    }

    /// A guest of a node: submits requests by token and takes completions from a queue.
    pub fn guest(&self, node: &Rc<Node>, read_only: bool) -> Result<Guest, BlockError> {
        Ok(Guest::new(&self.ring, Root::new(node, read_only)?))
    }

    /// Starts a job of any kind: it counts as a job of this engine under `id`, if `start` gives one. Nothing is started
    /// if the id is no good.
    pub async fn adopt<E: From<JobError>>(
        &self,
        id: &str,
        start: impl Future<Output = Result<Job, E>>,
    ) -> Result<Job, E> {
        self.jobs.adopt(id, start, |job| job).await
    }

    /// The same from outside a task: the result comes as the engine turns.
    pub fn adopt_later<E: From<JobError> + 'static>(
        &self,
        id: &str,
        start: impl Future<Output = Result<Job, E>> + 'static,
    ) -> OneShot<Result<Job, E>> {
        let (jobs, id) = (self.jobs.clone(), id.to_owned());
        self.ring.spawn_with_result(async move { jobs.adopt(&id, start, |job| job).await })
    }

    /// Starts a [mirror].
    pub async fn mirror(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: MirrorOptions,
    ) -> Result<Job, MirrorError> {
        let id = options.id.clone();
        let start = async {
            admit::nodes(&self.ring, source, target).await?;
            mirror::start(&self.ring, source, target, options).await
        };
        self.adopt(&id, start).await
    }

    /// Starts a [commit]: layers of the chain below `front` are merged down, from `top` (`None`: `front`) to `base`
    /// (`None`: the lowest).
    pub async fn commit(
        &self,
        front: &Rc<Node>,
        top: Option<&Rc<Node>>,
        base: Option<&Rc<Node>>,
        options: SweepOptions,
    ) -> Result<Job, ChainError> {
        let id = options.id.clone();
        self.adopt(&id, commit::start(&self.ring, front, top, base, options)).await
    }

    /// Starts a [stream] into `top` (`None`: `front`), a layer of the chain below `front`.
    pub async fn stream(
        &self,
        front: &Rc<Node>,
        top: Option<&Rc<Node>>,
        floor: Floor,
        options: SweepOptions,
    ) -> Result<Job, ChainError> {
        let id = options.id.clone();
        self.adopt(&id, stream::start(&self.ring, front, top, floor, options)).await
    }

    /// Starts a conversion. It counts as a job of this engine. The tally says what was copied by which means.
    pub async fn convert(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: ConvertOptions,
    ) -> Result<(Job, Rc<Tally>), ConvertError> {
        let id = options.id.clone();
        let start = async {
            admit::nodes(&self.ring, source, target).await?;
            convert::start(&self.ring, source, target, options).await
        };
        self.jobs.adopt(&id, start, |(job, _)| job).await
    }

    /// Starts a mirror from outside a task: the result comes as the engine turns.
    pub fn start_mirror(
        &self,
        source: &Rc<Node>,
        target: &Rc<Node>,
        options: MirrorOptions,
    ) -> OneShot<Result<Job, MirrorError>> {
        let (ring, source, target) = (self.ring.clone(), source.clone(), target.clone());
        let id = options.id.clone();
        self.adopt_later(&id, async move {
            admit::nodes(&ring, &source, &target).await?;
            mirror::start(&ring, &source, &target, options).await
        })
    }

    /// Starts a commit from outside a task: the result comes as the engine turns.
    pub fn start_commit(
        &self,
        front: &Rc<Node>,
        top: Option<&Rc<Node>>,
        base: Option<&Rc<Node>>,
        options: SweepOptions,
    ) -> OneShot<Result<Job, ChainError>> {
        let (ring, front, top, base) = (self.ring.clone(), front.clone(), top.cloned(), base.cloned());
        let id = options.id.clone();
        self.adopt_later(&id, async move {
            commit::start(&ring, &front, top.as_ref(), base.as_ref(), options).await
        })
    }

    /// Starts a stream from outside a task: the result comes as the engine turns.
    pub fn start_stream(
        &self,
        front: &Rc<Node>,
        top: Option<&Rc<Node>>,
        floor: Floor,
        options: SweepOptions,
    ) -> OneShot<Result<Job, ChainError>> {
        let (ring, front, top) = (self.ring.clone(), front.clone(), top.cloned());
        let id = options.id.clone();
        self.adopt_later(&id, async move { stream::start(&ring, &front, top.as_ref(), floor, options).await })
    }

    /// The job with this id.
    pub fn job(&self, id: &str) -> Option<Job> {
        self.jobs.get(id)
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
        if let Some(desk) = self.desk.get() {
            desk.end();
        }
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
        if let Some(desk) = self.desk.get() {
            desk.leave_disks();
        }
    }
}
