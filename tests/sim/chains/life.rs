//! A life: the chain is made, guests and jobs do what the story says, and everything is looked at.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::block::{BlockError, Driver, WriteFlags, ZeroFlags};
use blockferry::engine::marks::Marks;
use blockferry::engine::open::{open, open_qcow2};
use blockferry::engine::{Format, ImageOptions};
use blockferry::format::qcow2::{Qcow2, Repair};
use blockferry::graph::node::{Node, Root};
use blockferry::job::runner::{Ending, Job};
use blockferry::job::status::Status;
use blockferry::job::stream::Floor;
use blockferry::job::sweep::{ChainError, SweepOptions};
use blockferry::job::{commit, stream};
use blockferry_ring::sim::{Fault, FaultRule, FileModel, OpKind, World, WorldConfig};
use blockferry_ring::sync::OneShot;
use blockferry_ring::{Config, Errno, Ring};

use super::story::{JobPlan, Kind, LayerPlan, Story, Verb};
use crate::counts::Counts;
use common::ledger::{Model, SECTOR, stamp};

/// How long what a job had in flight may go on.
const SETTLE_MILLIS_MAX: u64 = 3000;
/// A life that takes more turns hangs.
const TURNS_MAX: u64 = 2_000_000;

fn ring(world: &World) -> Ring {
    let config = Config { arena_bytes: 4 << 20, ..Config::default() };
    Ring::with_backend(world.backend(), &config).expect("a simulated ring")
}

fn options(path: &str, read_only: bool) -> ImageOptions {
    let format = if path == "/base" { Format::Raw } else { Format::Qcow2 };
    // Which layers clients have left, this harness knows better.
    ImageOptions { format: Some(format), read_only, marks: Marks::ignored(), ..ImageOptions::default() }
}

async fn change(
    ring: &Ring,
    driver: &dyn Driver,
    first: usize,
    len: usize,
    version: u32,
) -> Result<(), BlockError> {
    let mut buf = ring.alloc(len * SECTOR).await;
    stamp(buf.as_mut_slice(), version);
    driver.write((first * SECTOR) as u64, buf.freeze(), WriteFlags::default()).await
}

/// Makes the layers, the lowest first.
async fn build(ring: Ring, world: World, layers: Vec<LayerPlan>) {
    let mut below: Option<(String, &'static str)> = None;
    for plan in layers {
        let LayerPlan { path, create, sectors, writes } = plan;
        let len = if create.is_none() { (sectors * SECTOR) as u64 } else { 0 };
        world.add_file(&path, FileModel::regular(len));
        let format = if create.is_some() { "qcow2" } else { "raw" };
        if let Some(mut create) = create {
            (create.backing_file, create.backing_fmt) = match below.take() {
                Some((name, format)) => (Some(name), Some(format.to_owned())),
                None => (None, None),
            };
            let raw = ImageOptions { format: Some(Format::Raw), ..ImageOptions::default() };
            let file = open(&ring, &path, &raw).await.expect("a file");
            Qcow2::create(&ring, &file, None, &create).await.expect("a new image");
        }
        let driver = open(&ring, &path, &options(&path, false)).await.expect("a new layer opens");
        for (first, len, version) in writes {
            if version == 0 {
                let (at, len) = ((first * SECTOR) as u64, (len * SECTOR) as u64);
                driver.write_zeroes(at, len, ZeroFlags::default()).await.expect("zeroes");
            } else {
                change(&ring, &**driver.driver(), first, len, version).await.expect("a write");
            }
        }
        driver.flush().await.expect("a flush");
        below = Some((path, format));
    }
}

/// Whether a job uses a layer. (What lies over a base that clients write now could not be read by a job any more.)
fn has_job(node: &Rc<Node>) -> bool {
    node.users().iter().any(|user| user.role().job().is_some())
}

async fn bytes_of(ring: &Ring, driver: &Rc<dyn Driver>, len: u64) -> Result<Vec<u8>, BlockError> {
    let mut bytes = vec![0; len.min(driver.len()) as usize];
    for (i, piece) in bytes.chunks_mut(64 << 10).enumerate() {
        let (buf, result) = driver.read((i as u64) << 16, ring.alloc(piece.len()).await).await;
        result?;
        buf.copy_to(0, piece);
    }
    Ok(bytes)
}

/// What the world of one life has in common.
struct Life {
    ring: Ring,
    front: Rc<Node>,
    root: Root,
    model: RefCell<Model>,
    counts: RefCell<Counts>,
    over: Cell<bool>,
    /// The first thing that was found to be wrong.
    wrong: RefCell<Option<String>>,
    /// The chain has changed.
    changed: Cell<bool>,
    /// Requests fail: tables that cannot be written back keep their image open.
    faulty: bool,
}

impl Life {
    fn count(&self, what: &'static str) {
        self.counts.borrow_mut().add(what);
    }

    fn wrong(&self, why: impl Into<String>) {
        self.wrong.borrow_mut().get_or_insert(why.into());
    }

    /// One guest: a request at a time in its own part of the disk.
    async fn guest(self: Rc<Life>, part: std::ops::Range<usize>, mut rng: Rng, versions: u32, pause: u64) {
        let mut version = versions;
        while !self.over.get() {
            version += 1;
            self.request(&part, &mut rng, version).await;
            self.ring.sleep(1 + rng.below(1 + pause)).await;
        }
    }

    async fn request(&self, part: &std::ops::Range<usize>, rng: &mut Rng, version: u32) {
        let first = part.start + rng.below(part.len() as u64) as usize;
        let n = 1 + rng.below((part.end - first).min(40) as u64) as usize;
        let (at, len) = ((first * SECTOR) as u64, (n * SECTOR) as u64);
        let sectors = first..first + n;
        let kind = rng.below(12);
        match kind {
            0..4 => {
                self.count("guests: reads");
                let (buf, result) = self.root.read(at, self.ring.alloc(len as usize).await).await;
                match result {
                    Ok(()) => {
                        let told = self.model.borrow().check_range(first, buf.as_slice());
                        told.unwrap_or_else(|why| {
                            self.wrong(format!("a guest's read from {first} on: {why}"))
                        });
                    }
                    Err(_) => self.count("guests: errors"),
                }
            }
            4 => {
                self.count("guests: flushes");
                let began = self.model.borrow().clock;
                if self.root.flush().await.is_ok() {
                    self.model.borrow_mut().flushed(began);
                }
            }
            _ => {
                let zero = kind >= 9;
                self.model.borrow_mut().issue(sectors.clone(), if zero { 0 } else { version }, kind == 11);
                let result = match kind {
                    5..9 => {
                        self.count("guests: writes");
                        let mut buf = self.ring.alloc(len as usize).await;
                        stamp(buf.as_mut_slice(), version);
                        self.root.write(at, buf.freeze(), WriteFlags::default()).await
                    }
                    9 | 10 => {
                        self.count("guests: zeroes");
                        let flags = ZeroFlags { may_unmap: kind == 9, ..ZeroFlags::default() };
                        self.root.write_zeroes(at, len, flags).await
                    }
                    _ => {
                        self.count("guests: discards");
                        self.root.discard(at, len).await
                    }
                };
                match result {
                    Ok(()) => self.model.borrow_mut().ack(sectors),
                    Err(_) => {
                        self.count("guests: errors");
                        self.model.borrow_mut().failed(sectors);
                    }
                }
            }
        }
    }

    /// Starts a job on the chain as it is, and sees it through. Gives when the next may start.
    async fn job(self: Rc<Life>, plan: JobPlan, id: String) {
        let Some(aim) = Aim::take(&self.front, plan) else { return };
        let shape = |life: &Life| life.front.chain().iter().map(Rc::as_ptr).collect::<Vec<_>>();
        let before = shape(&self);
        let busy = aim.nodes.iter().any(has_job);
        let started = aim.start(&self.ring, &self.front, &plan, &id).await;
        let job = match started {
            Ok(job) => job,
            Err(ChainError::Block(error)) if error.errno == Errno::EBUSY && busy => {
                self.count("jobs refused");
                return;
            }
            Err(ChainError::Block(error))
                if [Errno::EIO, Errno::ENOSPC].contains(&error.errno) && self.faulty =>
            {
                self.count("starts that failed");
                return;
            }
            // Another job was faster.
            Err(_) if shape(&self) != before => return self.count("jobs whose chain had changed"),
            Err(error) => return self.wrong(format!("{id} did not start: {error}")),
        };
        if busy {
            self.wrong(format!("{id} was started on a layer in use"));
        }
        self.count(aim.name);
        // From here on nobody else changes these layers, and no job changes what its uppermost shows. (Before, another one
        // may be merging into one of them.)
        let top = aim.nodes.first().filter(|top| !Rc::ptr_eq(top, &self.front));
        let view = top.map(|top| self.view_of(top));
        let commits = self.commits();
        self.users(&job, &plan, aim.active).await;
        let ending = job.until_over().await;
        // What is on its way ends.
        for _ in 0..SETTLE_MILLIS_MAX {
            self.ring.sleep(1_000_000).await;
            let in_use =
                |node: &Rc<Node>| Rc::ptr_eq(node, &self.root.node()) || Rc::ptr_eq(node, &self.front);
            if aim
                .nodes
                .iter()
                .all(|node| !has_job(node) && (in_use(node) || self.faulty || node.driver().is_read_only()))
            {
                break;
            }
        }
        let view = match view {
            Some(view) => view.take().await,
            None => None,
        };
        self.judge(&aim, &plan, &job, ending, (view, commits), &before).await;
    }

    /// What a layer shows, as far as it can be read, while other things happen.
    fn view_of(&self, node: &Rc<Node>) -> OneShot<Option<Vec<u8>>> {
        let (ring, driver) = (self.ring.clone(), node.driver().clone());
        self.ring.spawn_with_result(async move { bytes_of(&ring, &driver, u64::MAX).await.ok() })
    }

    /// Commits that were started so far.
    fn commits(&self) -> u64 {
        let counts = self.counts.borrow();
        counts.get("commits, active") + counts.get("commits, intermediate")
    }

    /// What users do to a job.
    async fn users(self: &Rc<Life>, job: &Job, plan: &JobPlan, active: bool) {
        let (life, job, plan) = (self.clone(), job.clone(), *plan);
        self.ring.clone().spawn(async move {
            life.ring.sleep(plan.verb_after).await;
            match plan.verb {
                Verb::Pause if job.pause().is_ok() => {
                    life.count("pauses");
                    life.ring.sleep(300_000).await;
                    let _ = job.resume();
                }
                Verb::Speed if job.set_speed(1 << 20).is_ok() => life.count("speed changes"),
                Verb::ForceCancel => {
                    let _ = job.cancel(true);
                }
                _ => {}
            }
            while job.ending().is_none() {
                life.ring.sleep(2_000_000).await;
                // A job that an error has stopped goes on.
                if job.info().io_status != blockferry::job::policy::IoStatus::Ok && job.resume().is_ok() {
                    life.count("stops by an error");
                }
                if active && job.status() == Status::Ready {
                    if plan.verb == Verb::SoftCancel && job.cancel(false).is_ok() {
                        life.count("soft cancels of ready jobs");
                    } else {
                        let _ = job.complete();
                    }
                }
                if plan.speed > 0 {
                    let _ = job.set_speed(0);
                }
            }
        });
    }

    /// The promise of a job that is over.
    async fn judge(
        &self,
        aim: &Aim,
        plan: &JobPlan,
        job: &Job,
        ending: Ending,
        (view, commits): (Option<Vec<u8>>, u64),
        before: &[*const Node],
    ) {
        let id = job.id();
        let chain = self.front.chain();
        let has = |node: &Rc<Node>| chain.iter().any(|other| Rc::ptr_eq(node, other));
        match &ending {
            Ending::Completed => {
                self.count("endings: completed");
                if job.progress().offset() != job.progress().len() {
                    self.wrong(format!("{id} completed at {:?}", job.progress()));
                }
                let pivoted = !Rc::ptr_eq(&self.root.node(), &self.front);
                if pivoted {
                    self.count("pivots");
                } else if !aim.active && aim.dropped().iter().any(has) {
                    self.wrong(format!("{id} completed and left layers in the chain"));
                }
                self.changed.set(self.changed.get() || !aim.active || pivoted);
            }
            Ending::Cancelled => self.count("endings: cancelled"),
            Ending::Failed(_) => self.count("endings: failed"),
        }
        if let Some(view) = view {
            let completed_commit = ending == Ending::Completed && plan.kind == Kind::Commit;
            let base = aim.base.as_ref().filter(|_| completed_commit);
            self.judge_view(&aim.top, base, &format!("{id} ({ending:?})"), &view, commits).await;
        }
        let now: Vec<_> = chain.iter().map(Rc::as_ptr).collect();
        let alone = self.counts.borrow().get("two jobs at once") == 0;
        if ending != Ending::Completed && alone && now != before {
            self.wrong(format!("{id} ended with {ending:?} and changed the chain"));
        }
        // Nothing of it is left.
        if self.front.filter_count() > 0 && alone {
            self.wrong(format!("{id} left a filter"));
        }
        for node in &aim.nodes {
            let is_front = Rc::ptr_eq(node, &self.front) || Rc::ptr_eq(node, &self.root.node());
            if !is_front && alone && !self.faulty && !node.driver().is_read_only() {
                self.wrong(format!("{id} ({ending:?}) left {} open to be written", node.name()));
            }
            if alone && has_job(node) {
                self.wrong(format!("{id} ({ending:?}) still uses {}", node.name()));
            }
        }
    }

    /// What the uppermost layer of a job showed when it began, it shows now; and so does the base of a commit that completed.
    async fn judge_view(&self, top: &Rc<Node>, base: Option<&Rc<Node>>, id: &str, view: &[u8], commits: u64) {
        let shown = self.view_of(top).take().await;
        let merged = match base {
            Some(base) => bytes_of(&self.ring, base.driver(), view.len() as u64).await.ok(),
            None => None,
        };
        if self.commits() != commits {
            // Another commit may have changed the base since.
            return self.count("views that another commit may have changed");
        }
        if shown.is_some_and(|shown| shown != view) {
            self.wrong(format!("{id}: its uppermost layer shows something else"));
        }
        if let Some(merged) = merged {
            self.count("bases compared with what was merged");
            if merged != view {
                self.wrong(format!("{id}: the base does not hold the top"));
            }
        }
    }
}

/// The layers that a job is about, as nodes.
struct Aim {
    name: &'static str,
    top: Rc<Node>,
    /// What a commit merges into, or a stream leaves as backing file.
    base: Option<Rc<Node>>,
    /// All that it uses, from above.
    nodes: Vec<Rc<Node>>,
    active: bool,
}

impl Aim {
    fn take(front: &Rc<Node>, plan: JobPlan) -> Option<Aim> {
        let chain = front.chain();
        let count = chain.len() as u64;
        if count < 2 {
            return None;
        }
        let top = (plan.top * (count - 1) / 10) as usize;
        let base = top + 1 + (plan.base * (count - 1 - top as u64) / 10) as usize;
        let active = plan.kind == Kind::Commit && top == 0;
        let (name, base_node, end) = match plan.kind {
            Kind::Commit if active => ("commits, active", Some(chain[base].clone()), base + 1),
            Kind::Commit => ("commits, intermediate", Some(chain[base].clone()), base + 1),
            Kind::Stream { whole: true } => ("streams, whole", None, chain.len()),
            Kind::Stream { whole: false } => ("streams, part", Some(chain[base].clone()), base),
        };
        let nodes = chain[top..end].to_vec();
        Some(Aim { name, top: chain[top].clone(), base: base_node, nodes, active })
    }

    /// The layers that are not in the chain afterwards.
    fn dropped(&self) -> &[Rc<Node>] {
        match self.name {
            "commits, intermediate" => &self.nodes[..self.nodes.len() - 1],
            _ => &self.nodes[1..],
        }
    }

    async fn start(
        &self,
        ring: &Ring,
        front: &Rc<Node>,
        plan: &JobPlan,
        id: &str,
    ) -> Result<Job, ChainError> {
        let options = SweepOptions {
            on_error: plan.on_error,
            speed: plan.speed,
            auto_dismiss: false,
            ..SweepOptions::new(id)
        };
        match plan.kind {
            Kind::Commit => commit::start(ring, front, Some(&self.top), self.base.as_ref(), options).await,
            Kind::Stream { .. } => {
                let floor = self.base.clone().map_or(Floor::Whole, Floor::Base);
                stream::start(ring, front, Some(&self.top), floor, options).await
            }
        }
    }
}

/// What is found in a world after everything has stopped there; now and then a job is run again in it.
fn inspect(world: &World, path: &str, model: &Model, again: Option<JobPlan>) -> Result<bool, String> {
    let ring = ring(world);
    let (r, path, model) = (ring.clone(), path.to_owned(), model.clone());
    ring.block_on(async move {
        let told = |what: &str, error: BlockError| format!("{what}: {error}");
        let mut next = Some(path.clone()).filter(|path| path != "/base");
        while let Some(path) = next.take() {
            let check = ImageOptions { for_check: true, no_backing: true, ..options(&path, true) };
            let image = open_qcow2(&r, &path, &check).await.map_err(|e| told("opening", e))?;
            let report = image.check(Repair::None).await.map_err(|e| told("checking", e))?;
            if report.corruptions + report.check_errors > 0 {
                return Err(format!("{path}: {:?}", report.messages));
            }
            let named = blockferry::block::Layer::recorded_backing(&*image);
            next = named.filter(|(_, format)| format.as_deref() == Some("qcow2")).map(|(name, _)| name);
        }
        let driver =
            open(&r, &path, &options(&path, false)).await.map_err(|e| told("opening to write", e))?;
        let front = driver.called("again");
        let len = model.len() as u64;
        let bytes = bytes_of(&r, front.driver(), len).await.map_err(|e| told("reading", e))?;
        model.check(&bytes)?;
        let Some((plan, aim)) = again.and_then(|plan| Some((plan, Aim::take(&front, plan)?))) else {
            return Ok(false);
        };
        let _root = Root::new(&front, false).map_err(|e| told("a root", e))?;
        let plan = JobPlan { speed: 0, ..plan };
        let job = aim.start(&r, &front, &plan, "again").await.map_err(|e| format!("again: {e}"))?;
        if aim.active {
            job.until_ready().await;
            job.complete().map_err(|e| e.to_string())?;
        }
        let ending = job.until_over().await;
        if ending != Ending::Completed {
            return Err(format!("run again: {ending:?}"));
        }
        let after = if aim.active { aim.nodes.last().unwrap_or(&front).clone() } else { front };
        let again = bytes_of(&r, after.driver(), len).await.map_err(|e| told("reading again", e))?;
        if again != bytes { Err("the job, run again, changed the disk".into()) } else { Ok(true) }
    })
}

async fn live(life: Rc<Life>, story: Story, world: World) {
    let mut rng = Rng::new(story.seed ^ 0x11fe);
    let sectors = life.model.borrow().len() / SECTOR;
    let half = sectors / 2;
    for (i, part) in [0..half, half..sectors].into_iter().enumerate() {
        if !part.is_empty() {
            let versions = (i as u32 + 1) << 24;
            life.ring.spawn(life.clone().guest(part, rng.fork(), versions, story.guest_pause));
        }
    }
    if story.faults > 0 {
        for kind in [OpKind::Read, OpKind::Write] {
            let errno = if rng.below(2) == 0 { Errno::EIO } else { Errno::ENOSPC };
            let errno = if kind == OpKind::Read { Errno::EIO } else { errno };
            world.add_fault(FaultRule::new(kind, "/", story.faults, Fault::Error(errno)));
        }
        let (healer, ring) = (world.clone(), life.ring.clone());
        life.ring.spawn(async move {
            ring.sleep(story.heals_after).await;
            healer.heal();
        });
    }
    let mut running = Vec::new();
    for (i, plan) in story.jobs.iter().enumerate() {
        if !Rc::ptr_eq(&life.root.node(), &life.front) {
            break;
        }
        let done = life.ring.spawn_with_result(life.clone().job(*plan, format!("job{i}")));
        if plan.beside && i + 1 < story.jobs.len() {
            life.count("two jobs at once");
            life.ring.sleep(rng.below(300_000)).await;
            running.push(done);
        } else {
            done.take().await;
        }
    }
    for done in running {
        done.take().await;
    }
    life.over.set(true);
    life.ring.sleep(50_000_000).await;
}

/// Lives the story.
pub fn run(story: &Story) -> Result<Counts, String> {
    let world = World::new(WorldConfig::new(story.seed));
    let ring = ring(&world);
    ring.block_on(build(ring.clone(), world.clone(), story.layers.clone()));
    let top = story.layers[story.layers.len() - 1].path.clone();
    let view = story.view(story.layers.len());
    let (r, path) = (ring.clone(), top.clone());
    let front = ring.block_on(async move {
        let driver = open(&r, &path, &options(&path, false)).await.expect("the chain opens");
        driver.called("disk")
    });
    let base_paths: Vec<(Rc<Node>, String)> =
        front.chain().into_iter().map(|node| (node.clone(), node.driver().name().to_owned())).collect();
    let life = Rc::new(Life {
        root: Root::new(&front, false).map_err(|error| error.to_string())?,
        ring: ring.clone(),
        front,
        model: RefCell::new(Model::of(view.into_iter())),
        counts: RefCell::default(),
        over: Cell::new(false),
        wrong: RefCell::default(),
        changed: Cell::new(false),
        faulty: story.faults > 0,
    });
    let done = ring.spawn_with_result(live(life.clone(), story.clone(), world.clone()));
    let mut rng = Rng::new(story.seed ^ 0xc07);
    let (mut seen, mut turns) = (world.events(), 0);
    while !done.is_given() {
        let _ = ring.turn_blocking();
        turns += 1;
        if turns > TURNS_MAX {
            return Err(format!("it hangs: {:?}", world.in_flight_lines()));
        }
        if let Some(why) = life.wrong.borrow_mut().take() {
            return Err(why);
        }
        if world.events() == seen || !rng.chance(story.cuts) {
            continue;
        }
        seen = world.events();
        // Where the disk is now.
        let node = life.root.node();
        let path =
            base_paths.iter().find(|(other, _)| Rc::ptr_eq(other, &node)).map_or(&top, |(_, path)| path);
        life.count("power cuts looked at");
        if life.changed.get() {
            life.count("power cuts after a chain had changed");
        }
        let again = (rng.below(4) == 0).then(|| story.jobs[0]);
        let after = world.fork_after_power_cut(rng.next_u64());
        let model = life.model.borrow().clone();
        match inspect(&after, path, &model, again) {
            Ok(true) => life.count("jobs run again after a cut"),
            Ok(false) => {}
            Err(why) => return Err(format!("a power cut at event {seen}: {why}")),
        }
    }
    if let Some(why) = life.wrong.borrow_mut().take() {
        return Err(why);
    }
    let (node, r, len) = (life.root.node(), ring.clone(), life.model.borrow().len() as u64);
    let bytes = ring.block_on(async move { bytes_of(&r, node.driver(), len).await });
    life.model.borrow().check_live(&bytes.map_err(|error| error.to_string())?)?;
    let counts = life.counts.borrow().clone();
    Ok(counts)
}
