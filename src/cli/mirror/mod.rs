//! `blockferry mirror`: copies a disk to a new image, at rest or while it is in use.

mod args;
mod report;

use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::limits::ARENA_BYTES;
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Config, Nanos, Ring};

use super::create::{open_new_backing, warn_of_refusal};
use super::exit::{Exit, Failure};
use super::image::state_dir;
use super::job::{AtReady, Watch, Watched, Words, disk, suit_bulk};
use super::print::{self, say};
use super::progress::Holes;
use super::serve::Exports;
use super::service::Service;
use super::signals::{Asked, Signals};
use super::target::{Target, TargetOptions, is_left_by, make_state_dir};
use super::tool::{asks_for_help, print_options};
use super::{Global, config, room, stats};
use crate::base::limits;
use crate::base::os_name;
use crate::base::shown::plain;
use crate::block::{Driver, place};
use crate::engine::admit::{Admission, IfThere, Refusal, Standing, Wish, is_place};
use crate::engine::create::NewImage;
use crate::engine::marks::unfinished;
use crate::engine::open::{is_memory, local_path};
use crate::engine::qcow2::{format as image_format, open_backing, qcow2, recorded_format};
use crate::engine::remote::{can_create, is_remote};
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::probe::named_as;
use crate::format::qcow2::Qcow2;
use crate::graph::node::Node;
use crate::job::mirror::verify::Verifier;
use crate::job::mirror::{MirrorOptions, SyncMode, layers};
use crate::job::runner::{Ending, Job};
use crate::job::tail::tail_of;
use crate::protocol::mark::{MarkInfo, TargetMark, identity_of};
pub use args::MirrorArgs;
use args::Settings;
use report::{Outcome, exit_of};

/// What is said where only new writes are copied.
const WORDS_NONE: Words = Words {
    ready: "what is written from now on is copied, and nothing else",
    gives_up: "Cancelling: the target stays incomplete",
    finishes: "Finishing: the target keeps what was written meanwhile; once more gives up",
};

const WORDS: Words = Words {
    ready: "source and target are alike",
    gives_up: "Cancelling: the target stays incomplete",
    finishes: "Finishing: the target becomes complete; once more gives up",
};

/// Runs the command.
pub fn main(global: &Global, args: &MirrorArgs) -> Result<Exit, Failure> {
    if asks_for_help(&args.options)? {
        let format = args.target_format.or(args.format).unwrap_or(Format::Qcow2);
        print_options(format, "Options for new images", NewImage::options(format));
        return Ok(Exit::Done);
    }
    // The arguments outlive the future in the process; the future must own them all the same.
    let args = Rc::new(Settings::new(args)?);
    let config = Config { arena_bytes: room::arena_bytes(arena_bytes(&args)), ..config(global) };
    let engine = Engine::new(&config)?;
    let signals = Signals::new(engine.ring())?.with_continue(engine.ring())?;
    let (global, engine) = (global.clone(), Rc::new(engine));
    let run = Run { global, engine: engine.clone(), signals };
    engine.run(async move { run.mirror(&args).await })
}

/// Whether a server is involved: more copies than devices need may have to be in flight.
fn is_far(settings: &Settings) -> bool {
    is_remote(&settings.source) || is_remote(&settings.target)
}

/// Memory for a job that shares it with nobody: for all copies that it may have in flight, and something to spare. More
/// would be zeroed and pinned for nothing, which is a good part of the CPU time of a short copy. Beside others a job must
/// not take what is theirs.
fn arena_bytes(settings: &Settings) -> usize {
    let granularity = settings.granularity.unwrap_or(0);
    let is_far = is_far(settings);
    let chunk = if is_far { limits::COPY_BYTES_REMOTE } else { limits::COPY_BYTES };
    let chunk = chunk.max(granularity).min(BLOCK_MAX as u64) as usize;
    let near = limits::MIRROR_OPERATIONS * chunk;
    let far = match settings.buf_size {
        0 => limits::MIRROR_BUF_SIZE,
        bytes => bytes.unsigned_abs().min(limits::MIRROR_MEMORY_BYTES_MAX),
    };
    if settings.export.is_empty() && !settings.verify {
        return if is_far { near.max(far as usize) + (8 << 20) } else { near + (4 << 20) };
    }
    ARENA_BYTES + if is_far { far as usize } else { 0 }
}

/// What runs once everything is opened.
struct Started {
    exports: Exports,
    job: Job,
    verifier: Option<Rc<Verifier>>,
    began: Nanos,
}

struct Run {
    global: Global,
    engine: Rc<Engine>,
    signals: Signals,
}

impl Run {
    async fn mirror(&self, settings: &Settings) -> Result<Exit, Failure> {
        let ring = self.engine.ring().clone();
        let read_only = settings.export.is_empty() || settings.plan.dry_run;
        let source =
            self.engine.open(&settings.source, &settings.open.image(settings.format, read_only)).await?;
        let (mark, at_end) = self.marks(settings, &source).await;
        let Some(target) = self.open_target(settings, &source, mark, at_end.clone()).await? else {
            return Ok(Exit::Done);
        };
        let started = self.start(settings, &source, &target).await;
        let Started { exports, job, verifier, began } = match started {
            Ok(Some(started)) => started,
            Ok(None) => {
                target.undo(&self.engine).await;
                if !self.global.json {
                    say!("Cancelled: no client came, and nothing was copied");
                }
                return Ok(Exit::Cancelled);
            }
            Err(failure) => {
                target.undo(&self.engine).await;
                return Err(failure);
            }
        };
        let clients = self.service(settings, &exports);
        // With clients or servers, what one of them waits for must not wait for other things.
        if settings.export.is_empty() && !is_far(settings) {
            suit_bulk(&ring, [&*settings.source, &*settings.target].into_iter());
        }
        let tail = tail_of(source.driver().len(), target.node.driver().len());
        let tail = Some(tail).filter(|tail| *tail > 0);
        let mark = target.marker(&self.engine);
        let drivers = [source.driver().clone(), target.node.driver().clone()];
        drop(target);
        let places = drivers.to_vec();
        let watched = self.follow(settings, &job, verifier.as_ref(), &clients, places).await?;
        let (ending, mut asked) = (watched.ending, watched.asked);
        let elapsed_ns = ring.clock() - began;
        if settings.pivot && ending == Ending::Completed {
            // What clients wrote last on the disk that they have left is still being flushed where that takes long.
            let flushed = either(source.until_free_of_jobs(), self.signals.next_ending()).await;
            if let Either::Second(signal) = flushed {
                asked = Some(Asked { signal, at_ns: ring.clock() });
            }
        }
        drop(source);
        let allocated = [occupied(&ring, &drivers[0]).await, occupied(&ring, &drivers[1]).await];
        let source_incomplete = at_end.is_some_and(|mark| mark.source_incomplete);
        let result =
            Outcome { ending: &ending, elapsed_ns, tail, allocated, source_incomplete, drivers: &drivers };
        let (exit, end) = self.report(settings, &job, &result, verifier.as_ref());
        if ending != Ending::Completed {
            // A target that is gone, or cannot be written, has no mark that could say it.
            let (done, of) = (job.progress().offset(), job.progress().len());
            let _ = mark.note(done, of).await;
        }
        let is_there = place::check(&drivers[1], true).await.is_ok();
        // What cannot be told is not said.
        let is_marked = mark.is_set().await.unwrap_or(false);
        let target = disk(&settings.target, &drivers[1]);
        drop((mark, drivers));
        // At once, though clients may go on.
        let stays = ending == Ending::Completed && (settings.pivot || settings.follow);
        let outcome = exit_of(exit, ending, &target, is_there, is_marked);
        if let Some(mut end) = end {
            end["message"] = outcome.as_ref().err().map(Failure::to_string).into();
            print::ending(end, outcome.as_ref().map_or(Exit::Failed, |exit| *exit));
        }
        let exit = outcome.unwrap_or_else(|failure| {
            print::failure(self.global.json, &failure);
            Exit::Failed
        });
        if !settings.service.exit_on_done {
            clients.go_on(settings.service.persistence(stays), asked).await;
        }
        clients.end(exit).await?;
        stats::print(&self.global, &ring);
        Ok(exit)
    }

    fn service<'a>(&'a self, settings: &Settings, exports: &'a Exports) -> Service<'a> {
        Service {
            global: &self.global,
            ring: self.engine.ring(),
            signals: &self.signals,
            exports,
            quiet: settings.quiet,
            args: settings.service,
        }
    }

    /// What the target's mark says, and what it says in the end if the target is no whole copy then.
    async fn marks(&self, settings: &Settings, source: &Rc<Node>) -> (MarkInfo, Option<MarkInfo>) {
        let (ring, driver) = (self.engine.ring(), source.driver());
        let format = new_format(settings, source);
        let mark = MarkInfo::incomplete("mirror", &settings.source).started(ring.unix_secs()).about(
            identity_of(ring, driver),
            driver.len(),
            format.name(),
        );
        let at_end = match settings.sync {
            SyncMode::None => Some(mark.clone().partial()),
            _ if unfinished(ring, driver, &settings.open.gate.marks()).await.is_some() => {
                Some(mark.clone().of_incomplete())
            }
            _ => None,
        };
        (mark, at_end)
    }

    /// Refuses a new target that would not show what lies below the source, before it is made.
    async fn check_shown(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        new: &NewImage,
    ) -> Result<(), Failure> {
        let name = &*settings.target;
        let is_there = match local_path(name) {
            Some(path) => !matches!(self.engine.ring().lookup(&path), Ok(None)),
            None => !can_create(name),
        };
        if settings.sync != SyncMode::Top || is_there {
            // What is there is looked at when it is open.
            return Ok(());
        }
        let backing = match new {
            NewImage::Qcow2(new) => match &new.backing_file {
                Some(name) => {
                    let options = ImageOptions { lock: false, ..settings.open.image(None, true) };
                    let format = recorded_format(new.backing_fmt.as_deref(), name)?;
                    Some(open_backing(self.engine.ring(), &settings.target, name, format, &options).await?)
                }
                None => None,
            },
            NewImage::Raw { .. } => None,
        };
        Ok(layers::check_shown(
            source.driver(),
            name,
            backing.as_ref().map(|node| node.driver()),
            settings.verify,
        )?)
    }

    /// Settles what can be settled before the target is touched; then opens it, or makes it: in the format that was said, or
    /// the source's. An overlay of the source's backing file if only what lies above that is copied. `None`: it was a dry run.
    async fn open_target(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        mark: MarkInfo,
        at_end: Option<MarkInfo>,
    ) -> Result<Option<Target>, Failure> {
        let (ring, name) = (self.engine.ring(), &*settings.target);
        let format = new_format(settings, source);
        let mut new = NewImage::parse(format, &settings.target_options, Some(source.driver().len()))
            .map_err(|text| Failure::usage(format!("The target '{name}': {text}")))?;
        if let NewImage::Qcow2(new) = &mut new
            && settings.sync == SyncMode::Top
            && new.backing_file.is_none()
            && let Some(backing) = qcow2(source.driver()).and_then(Qcow2::backing)
        {
            new.backing_file = Some(whole_name(backing.driver().name())?);
            new.backing_fmt = Some(image_format(backing.driver()).name().to_owned());
        }
        let state_dir = state_dir(settings.state_dir.as_deref());
        let is_own = is_left_by(&self.engine, name, &mark, state_dir.as_deref()).await;
        // It is of the format that would be made.
        let said = settings.target_format.or(is_own.then_some(format));
        let image = settings.open.image(said, false).overwriting();
        // Of what is there nothing is guessed.
        let is_said = settings.target_format.is_some() || is_memory(name);
        let if_there = match settings.force && is_said || is_own {
            false => IfThere::Refuse,
            // There is no file to be made, only another image in what is there.
            true if settings.makes_anew() && is_place(ring, name) => IfThere::Remake,
            true => IfThere::Overwrite,
        };
        let mut admission = Admission::new(ring, "mirror").counting(settings.plan.dry_run);
        admission.source(source).await;
        if let Err(failure) = self.check_shown(settings, source, &new).await {
            admission.refuse(Refusal::Said(failure.to_string()));
        }
        if let Some(backing) = self.new_backing(settings, source, &new).await? {
            admission.reads("new backing file", backing.driver()).await;
        }
        let disk = source.driver();
        // A qcow2 image is made of whole sectors.
        let len_max = (!settings.allow_larger_target).then(|| disk.len().next_multiple_of(512));
        let say = match (settings.force, is_said) {
            (_, true) => "--force",
            (true, false) => "its format (-F raw or -F qcow2), too,",
            (false, false) => "--force and its format (-F raw or -F qcow2)",
        };
        let wish = Wish { if_there, len_max, say, ..Wish::copy(name, image.clone(), &new, source) };
        admission.target(&wish).await;
        if let Some(Standing::Missing) = admission.standing()
            && let Some(why) = misnamed(settings, format)
        {
            admission.refuse(Refusal::Said(why));
        }
        match settings.sync {
            SyncMode::None => admission.plan().bytes_max = Some(0),
            sync => admission.bytes_of(disk, sync == SyncMode::Top).await?,
        }
        let (plan, admitted) = admission.judge();
        if settings.plan.ends(&self.global, &plan)? {
            return Ok(None);
        }
        let options = TargetOptions { name, image, state_dir, mark, at_end };
        if let NewImage::Qcow2(new) = &new {
            warn_of_refusal(&self.engine, name, new.backing_file.as_deref()).await;
        }
        Target::take(&self.engine, admitted, options, &new).await.map(Some)
    }

    /// The backing file that a user names for the new image.
    async fn new_backing(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        new: &NewImage,
    ) -> Result<Option<Rc<Node>>, Failure> {
        let of_source = settings.sync == SyncMode::Top && source.driver().has_backing();
        match new.has_backing() && !of_source {
            true => {
                open_new_backing(
                    &self.engine,
                    &settings.target,
                    &settings.target_options,
                    settings.open.gate.marks(),
                )
                .await
            }
            false => Ok(None),
        }
    }

    /// Opens the exports and starts the job; `None` if a signal came before its first client.
    async fn start(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        target: &Target,
    ) -> Result<Option<Started>, Failure> {
        let ring = self.engine.ring();
        let mut exports = Exports::with_limits(ring, &settings.clients);
        for uri in &settings.export {
            exports.add(&self.engine, source, uri, false, &self.global).await?;
        }
        if !self.service(settings, &exports).first_client().await {
            exports.stop().await?;
            return Ok(None);
        }
        let mut options = MirrorOptions::new("mirror0");
        options.sync = settings.sync;
        options.granularity = settings.granularity;
        options.buf_size = settings.buf_size;
        options.speed = settings.speed;
        options.policies = settings.policies;
        options.copy_mode = settings.copy_mode;
        options.on_divergence = settings.on_divergence;
        options.guest_first = settings.guest_first;
        options.downtime_nanos_max = settings.max_downtime;
        options.deadline_nanos = settings.deadline;
        options.detect_zeroes = settings.detect_zeroes;
        options.may_unmap = settings.may_unmap;
        options.target_is_zero = settings.target_is_zero;
        options.offload = settings.offload;
        options.allow_larger_target = settings.allow_larger_target;
        options.marker = Some(Box::new(target.marker(&self.engine)));
        if settings.pivot {
            options.old_marker = Some(self.old_marker(settings, source)?);
        }
        let verifier = if settings.verify {
            let verifier = Verifier::new(ring, source.driver(), target.node.driver());
            let verifier = verifier.map_err(super::image::failed)?;
            if settings.trust_holes {
                verifier.trust_holes();
            }
            Some(verifier)
        } else {
            None
        };
        options.verifier = verifier.clone();
        let began = ring.clock();
        let job = self.engine.mirror(source, &target.node, options).await?;
        Ok(Some(Started { exports, job, verifier, began }))
    }

    /// The mark of the source once clients have left it.
    fn old_marker(&self, settings: &Settings, source: &Rc<Node>) -> Result<TargetMark, Failure> {
        let (ring, driver) = (self.engine.ring(), source.driver().clone());
        let dir = state_dir(settings.state_dir.as_deref());
        if let Err(failure) = make_state_dir(&self.engine, &driver, dir.as_deref()) {
            tracing::warn!(
                "after the pivot nothing will say of '{}' that it is old: {failure}",
                settings.source
            );
        }
        let (old, new) = (whole_name(&settings.source)?, whole_name(&settings.target)?);
        let info = MarkInfo::superseded(ring, "mirror", &old, &new);
        Ok(TargetMark::new(ring, driver, dir, info))
    }

    /// Watches the job to its end.
    async fn follow(
        &self,
        settings: &Settings,
        job: &Job,
        verifier: Option<&Rc<Verifier>>,
        clients: &Service<'_>,
        places: Vec<Rc<dyn Driver>>,
    ) -> Result<Watched, Failure> {
        let ring = self.engine.ring();
        let at_ready = match (settings.follow, settings.pivot) {
            (true, _) => AtReady::Follow,
            (false, true) => AtReady::Pivot,
            (false, false) => AtReady::Finish,
        };
        let (signals, quiet) = (&self.signals, settings.quiet);
        let words = if settings.sync == SyncMode::None { WORDS_NONE } else { WORDS };
        let compared = || verifier.map(|verifier| verifier.progress());
        let compared: &dyn Fn() -> Option<(u64, u64)> = &compared;
        let holes = match (settings.sync, places.first()) {
            (SyncMode::None, _) | (_, None) => Rc::default(),
            (sync, Some(source)) => Holes::count(ring, source, sync == SyncMode::Top),
        };
        let global = &self.global;
        let watch = Watch { global, ring, signals, quiet, words, at_ready, places, compared, holes };
        let mut pass = None;
        // A long pass of comparing comes before the end; the job follows meanwhile.
        let passed = || {
            let Some(verifier) = verifier.cloned() else { return true };
            let pass =
                pass.get_or_insert_with(|| ring.spawn_with_result(async move { verifier.pass().await }));
            pass.try_take().is_some()
        };
        watch.follow(job, passed, || clients.at_once(Exit::Cancelled)).await
    }
}

/// The format of a target that is made: as said, or the source's, because that is what a copy is taken for.
fn new_format(settings: &Settings, source: &Rc<Node>) -> Format {
    match settings.target_format {
        Some(format) => format,
        None if is_memory(&settings.target) => Format::Raw,
        None => image_format(source.driver()),
    }
}

/// Why a new image of `format` must not be called so, if its name tells another format and nobody has said which it is.
fn misnamed(settings: &Settings, format: Format) -> Option<String> {
    let name = &*settings.target;
    let file = local_path(name).or_else(|| Some(name.split('?').next()?.into()))?;
    let told =
        named_as(&file).filter(|told| told.format() != Some(format) && settings.target_format.is_none())?;
    let cure = match told.format() {
        Some(told) => format!("Say -F {told} for an image of that format"),
        None => "No image of that format can be made here: name it otherwise".to_owned(),
    };
    Some(format!(
        "The new target '{name}' is named as a {} image, and would be {format}, as the source is. {cure}, or say -F {format} \
         if the name is meant",
        told.name()
    ))
}

/// A name that means the same from everywhere.
fn whole_name(name: &str) -> Result<String, Failure> {
    match local_path(name) {
        Some(path) => std::path::absolute(path)
            .map(os_name::from_path)
            .map_err(|error| Failure::text(format!("The file '{name}': {}", plain(&error)))),
        None => Ok(name.to_owned()),
    }
}

/// How long a server is asked what an image occupies; what was known before is told then.
const OCCUPIED_NANOS_MAX: u64 = 2_000_000_000;

/// Bytes that an image occupies, where that can be told; clients do not wait for it, and nobody for a server that hangs.
async fn occupied(ring: &Ring, disk: &Rc<dyn Driver>) -> Option<u64> {
    match disk.local_file() {
        Some(file) => ring.aside().info(&file).await.ok().map(|info| info.allocated),
        None => {
            if let Some(asked) = disk.ask_allocated() {
                either(asked, ring.sleep(OCCUPIED_NANOS_MAX)).await;
            }
            disk.allocated_bytes()
        }
    }
}
