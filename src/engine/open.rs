//! From what a person types to a driver: protocol by name, format by order.
//!
//! | name | what it is |
//! |---|---|
//! | `PATH`, `file:PATH` | a regular file or a block device |
//! | `mem:SIZE` | memory, all zeroes at first, gone at the end |
//! | `null:SIZE` | reads zeroes, forgets writes |
//! | `nbd://…`, `nbd+tcp://…`, `nbd+unix://…`, `nbd:…` | an NBD server's disk |
//! | `gluster://…`, `gluster+tcp://…`, `gluster+unix://…` | an image on a GlusterFS volume |
//! | `json:{…}`, `driver=…` | any of these by QEMU's options, with a format above it or not |
//! | `delay:TIME:NAME` | any of these, with so much latency added to every request |
//!
//! What names mean is read by [`super::spec`].

use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use crate::base::limits::BACKING_CHAIN_MAX;
use crate::base::os_name;
use crate::block::{BlockError, Driver, IoFuture, Node, Operation};
use crate::format::qcow2::{self, Gate, OpenFiles, Qcow2, Role, Wanted, WhichSnapshot};
use crate::format::raw::RawDriver;
use crate::protocol::delay::DelayDriver;
use crate::protocol::mem::MemDriver;
use crate::protocol::null::NullDriver;
use crate::protocol::open::{Cache, OpenOptions};

use super::marks::{Marks, heed, heed_own};
use super::named::{self, Named};
use super::nodes::{Nodes, Way};
use super::remote::ServerOptions;
use super::spec::{NodeSpec, ProtocolSpec};
use crate::format::probe::{FormatError, HEAD_BYTES, Probed, choose_format, probe};

pub use crate::format::probe::Format;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The format as the user said it; `None`: by the safe rule (docs/decisions/0001-format-probing.md).
    pub format: Option<Format>,
    /// Without write access.
    pub read_only: bool,
    /// Past the page cache or through it.
    pub cache: Cache,
    /// Keep other programs out.
    pub lock: bool,
    /// The option by which the user could do without locks, for messages about those of others.
    pub without_locks: Option<&'static str>,
    /// The user has said that it is raw: where the first bytes are another format's header, that is told.
    pub warns_of_header: bool,
    /// Raw only: where the disk begins in the file.
    pub offset: u64,
    /// Raw only: bytes of the disk.
    pub size: Option<u64>,
    /// How servers are treated.
    pub server: ServerOptions,
    /// Which other files an image may have opened (its backing file, its data file).
    pub gate: Gate,
    /// A backing file whose format the image does not record may be what its header says, not only raw.
    pub probe_backing: bool,
    /// No backing file is opened: what the image does not hold reads as zeroes.
    pub no_backing: bool,
    /// To be checked or repaired ([`qcow2::OpenOptions::for_check`]).
    pub for_check: bool,
    /// The disk as this internal snapshot has it; read-only.
    pub snapshot: Option<WhichSnapshot>,
    /// What is done about marks of unfinished and of old disks.
    pub marks: Marks,
    /// It has a name that only this program knows: nothing is said of it.
    pub is_hidden: bool,
    /// What is open already, and is shared where images lie over the same.
    pub nodes: Nodes,
}

impl Default for ImageOptions {
    fn default() -> ImageOptions {
        ImageOptions {
            format: None,
            read_only: false,
            cache: Cache::Direct,
            lock: true,
            without_locks: None,
            warns_of_header: false,
            offset: 0,
            size: None,
            server: ServerOptions::default(),
            gate: Gate::default(),
            probe_backing: false,
            no_backing: false,
            for_check: false,
            snapshot: None,
            marks: Marks::default(),
            is_hidden: false,
            nodes: Nodes::default(),
        }
    }
}

impl ImageOptions {
    /// For reading only.
    pub fn read_only() -> ImageOptions {
        ImageOptions { read_only: true, ..ImageOptions::default() }
    }

    /// A raw image, said so.
    pub fn raw() -> ImageOptions {
        ImageOptions { format: Some(Format::Raw), ..ImageOptions::default() }
    }

    /// The same for an image that is to be overwritten, whatever its mark says.
    pub fn overwriting(self) -> ImageOptions {
        ImageOptions { marks: Marks::ignored(), ..self }
    }
}

/// A name as people say it: without `file:` where the same file is meant without it.
pub fn plain_name(name: &str) -> &str {
    let path = name.strip_prefix("file:").filter(|path| local_path(path) == local_path(name));
    path.unwrap_or(name)
}

/// The path that a name leads to, through `delay:` too; `None` if it leads to none.
pub fn local_path(name: &str) -> Option<PathBuf> {
    NodeSpec::parse(name).ok()?.local_path().map(Path::to_owned)
}

/// Whether a name leads to a disk that is made by naming it and is gone at the end, through `delay:` too: nothing of it can
/// be lost.
pub fn is_memory(name: &str) -> bool {
    NodeSpec::parse(name).is_ok_and(|spec| spec.is_memory())
}

/// A name that leads to this path and to nothing else, whatever the file is called.
pub fn name_of(path: &Path) -> String {
    let text = os_name::from_path(path);
    // `nbd:x`, `file:x` and the like are good names of files, too.
    let is_it = NodeSpec::parse(&text).is_ok_and(|spec| spec == NodeSpec::file(path));
    if is_it { text } else { format!("./{text}") }
}

/// Opens what `name` means. The format is the one that was said, or what the image's own header says by
/// the safe rule.
pub async fn open(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
    open_spec(ring, name, &NodeSpec::parse(name)?, options).await
}

/// [`open`] of a name that was read. `shown` is what messages call it.
pub async fn open_spec(
    ring: &Ring,
    shown: &str,
    spec: &NodeSpec,
    options: &ImageOptions,
) -> Result<Rc<Node>, BlockError> {
    let options = &spec.over(options);
    let file = open_child(ring, shown, spec, options).await?;
    let shown = plain_name(shown);
    heed(ring, file.driver(), shown, options).await?;
    let node = open_on(ring, &file, shown, spec, options).await?;
    if options.is_hidden {
        return Ok(node);
    }
    tracing::info!(
        "'{shown}' is open, {}: {}, {} bytes, {}",
        if options.read_only { "to be read" } else { "to be written" },
        node.format(),
        node.len(),
        if options.lock { "locked while it is used" } else { "without locks" },
    );
    Ok(node)
}

/// Opens the file or device at `path`, whatever it is called.
pub async fn open_file(ring: &Ring, path: &Path, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
    let spec = NodeSpec::file(path);
    open_spec(ring, &spec.shown(), &spec, options).await
}

/// Opens the image that the bytes of `child` are, which were opened as `spec` says.
pub(super) async fn open_on(
    ring: &Ring,
    child: &Rc<Node>,
    shown: &str,
    spec: &NodeSpec,
    options: &ImageOptions,
) -> Result<Rc<Node>, BlockError> {
    let format = match said_format(shown, spec, options)? {
        Some(format) => format,
        None if spec.is_memory() => Format::Raw,
        None => choose_format(None, &head(ring, child).await?, !options.read_only)
            .map_err(|error| error.of(shown))?,
    };
    // Nothing is read late that need not be.
    let is_file = matches!(spec.protocol, ProtocolSpec::File { .. });
    if format == Format::Raw && options.warns_of_header && is_file {
        warn_of_header(ring, child, shown).await;
    }
    let files = Files::new(ring, options, child, &[]);
    with_format(ring, child, format, &windowed(spec, options), &files).await
}

/// The format that was said, by an option or in the name. Both have to say the same.
fn said_format(shown: &str, spec: &NodeSpec, options: &ImageOptions) -> Result<Option<Format>, BlockError> {
    match (options.format, spec.format()) {
        (Some(said), Some(named)) if said != named => {
            let why = format!("Its name says that its format is {named}, and an option says {said}.");
            Err(BlockError::new(Operation::Open, shown, Errno::EINVAL).hint(why))
        }
        (said, named) => Ok(said.or(named)),
    }
}

/// The options of a raw disk that is a part of its file, where its name says so.
fn windowed(spec: &NodeSpec, options: &ImageOptions) -> ImageOptions {
    match spec.window() {
        Some((offset, size)) => ImageOptions { offset, size, ..options.clone() },
        None => options.clone(),
    }
}

/// Tells what is taken as raw because that was said, and looks like something else.
async fn warn_of_header(ring: &Ring, child: &Rc<Node>, name: &str) {
    // What cannot be read is an error of whoever needs it.
    let Ok(head) = head(ring, child).await else { return };
    let found = probe(&head);
    if found != Probed::Raw {
        tracing::warn!(
            "'{name}' is taken as raw, as you said; its first bytes are the header of a {} image",
            found.name()
        );
    }
}

/// Opens what bytes come from: the disk without its format.
pub(super) async fn open_child(
    ring: &Ring,
    shown: &str,
    spec: &NodeSpec,
    options: &ImageOptions,
) -> Result<Rc<Node>, BlockError> {
    let options = &spec.over(options);
    let leaf = match spec.protocol.leaf() {
        ProtocolSpec::File { path } => open_path_aside(ring, path, options).await?,
        leaf @ (ProtocolSpec::Nbd(_) | ProtocolSpec::Gluster { .. }) => {
            super::remote::open(ring, leaf, options).await?
        }
        leaf => open_here(ring, shown, spec, leaf, options)?,
    };
    Ok(delayed(ring, spec, Node::of(ring, leaf)))
}

/// With the latency of its name; the innermost is the first to be told of a request's end.
fn delayed(ring: &Ring, spec: &NodeSpec, leaf: Rc<Node>) -> Rc<Node> {
    let delays = spec.protocol.delays().into_iter().rev();
    delays.fold(leaf, |node, latency_ns| Node::of(ring, Rc::new(DelayDriver::new(ring, &node, latency_ns))))
}

/// What the header of an image says of its format: raw without one. For readers, and for those who have nothing to lose.
pub async fn said_by_header(ring: &Ring, name: &str, look: &ImageOptions) -> Result<Format, BlockError> {
    let spec = NodeSpec::parse(name)?;
    let child = open_child(ring, name, &spec, look).await?;
    match spec.format() {
        Some(format) => Ok(format),
        None => choose_format(None, &head(ring, &child).await?, false).map_err(|error| error.of(name)),
    }
}

/// Opens `name` as a qcow2 image, for what only that format has.
pub async fn open_qcow2(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<Qcow2>, BlockError> {
    let spec = NodeSpec::parse(name)?;
    let options = &spec.over(options);
    let child = open_child(ring, name, &spec, options).await?;
    heed(ring, child.driver(), name, options).await?;
    let files = Files::new(ring, options, &child, &[]);
    as_qcow2(ring, &child, options, &files).await
}

/// Opens what `name` means, without looking into it: the format has to be said, and be one that needs no
/// reading to be opened.
pub fn open_as_said(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
    let spec = NodeSpec::parse(name)?;
    let options = &windowed(&spec, &spec.over(options));
    let fresh = spec.is_memory().then_some(Format::Raw);
    let Some(format) = said_format(name, &spec, options)?.or(fresh) else {
        return Err(FormatError::Unsaid.of(name));
    };
    let leaf = open_here(ring, name, &spec, spec.protocol.leaf(), options)?;
    let child = delayed(ring, &spec, Node::of(ring, leaf));
    heed_own(ring, child.driver(), name, options)?;
    match format {
        Format::Raw => as_raw(ring, &child, options),
        Format::Qcow2 => Err(BlockError::new(Operation::Open, name, Errno::EINVAL)
            .hint("A qcow2 image is read to be opened: open it from within a task.")),
    }
}

/// The first bytes of an image.
async fn head(ring: &Ring, child: &Rc<Node>) -> Result<Vec<u8>, BlockError> {
    let len = child.len().min(HEAD_BYTES as u64) as usize;
    let mut head = vec![0u8; HEAD_BYTES];
    if len > 0 {
        let (buf, result) = child.read(0, ring.alloc(len).await).await;
        result?;
        buf.copy_to(0, &mut head[..len]);
    }
    Ok(head)
}

fn as_raw(ring: &Ring, child: &Rc<Node>, options: &ImageOptions) -> Result<Rc<Node>, BlockError> {
    if options.offset == 0 && options.size.is_none() {
        // Nothing of the raw format is needed to take all bytes as they are.
        return Ok(child.clone());
    }
    Ok(Node::of(ring, Rc::new(RawDriver::open(ring, child, options.offset, options.size)?)))
}

async fn as_qcow2(
    ring: &Ring,
    child: &Rc<Node>,
    options: &ImageOptions,
    files: &Files,
) -> Result<Rc<Qcow2>, BlockError> {
    let backing = if options.no_backing { qcow2::Backing::None } else { qcow2::Backing::Named };
    let open = qcow2::OpenOptions {
        read_only: options.read_only,
        backing,
        data_file: None,
        for_check: options.for_check,
        snapshot: options.snapshot.clone(),
    };
    Qcow2::open(ring, child, files, open).await
}

async fn with_format(
    ring: &Ring,
    child: &Rc<Node>,
    format: Format,
    options: &ImageOptions,
    files: &Files,
) -> Result<Rc<Node>, BlockError> {
    match format {
        Format::Raw if options.snapshot.is_some() => {
            Err(BlockError::new(Operation::Open, child.driver().name(), Errno::EOPNOTSUPP)
                .because("A raw image has no snapshots."))
        }
        Format::Raw => as_raw(ring, child, options),
        Format::Qcow2 if options.offset != 0 || options.size.is_some() => {
            Err(BlockError::new(Operation::Open, child.driver().name(), Errno::EINVAL)
                .hint("The options 'offset' and 'size' are for raw images."))
        }
        Format::Qcow2 => Ok(Node::of(ring, as_qcow2(ring, child, options, files).await?)),
    }
}

/// Words of an error that says already whose file it is about.
const IS_OF: &str = " file of '";

/// Opens other files for an image: through the gate, in a chain that is bounded and without loops.
#[derive(Debug)]
struct Files {
    ring: Ring,
    options: ImageOptions,
    /// The files of the images above, that of the one that asks included.
    above: Vec<Option<(u64, u64)>>,
}

impl Files {
    fn new(ring: &Ring, options: &ImageOptions, child: &Rc<Node>, above: &[Option<(u64, u64)>]) -> Files {
        let above = above.iter().copied().chain([child.identity()]).collect();
        Files { ring: ring.clone(), options: options.clone(), above }
    }

    /// What goes wrong with another file is of use only with the name of the image that has it.
    async fn open_named(&self, wanted: Wanted<'_>) -> Result<Rc<Node>, BlockError> {
        let opened = self.open_judged(&wanted).await;
        opened.map_err(|error| {
            if *error.name == *wanted.image || error.hint.as_ref().is_some_and(|hint| hint.contains(IS_OF)) {
                return error;
            }
            let role = match wanted.role {
                Role::Backing => "backing",
                Role::DataFile => "data",
            };
            let hint = error.hint.as_ref().map_or_else(String::new, |hint| format!("{hint} "));
            let hint = format!("{hint}It is the {role}{IS_OF}{}'.", wanted.image);
            error.hint(hint)
        })
    }

    async fn open_judged(&self, wanted: &Wanted<'_>) -> Result<Rc<Node>, BlockError> {
        let refuse = |why: String| BlockError::new(Operation::Open, wanted.image, Errno::EPERM).because(why);
        let options = ImageOptions {
            format: None,
            read_only: wanted.read_only,
            offset: 0,
            size: None,
            for_check: false,
            snapshot: None,
            warns_of_header: false,
            ..self.options.clone()
        };
        let named = named::followed(&self.ring, &options.gate, wanted).await;
        let named = named.map_err(|error| refuse(error.to_string()))?;
        self.check_length(wanted)?;
        let shown = named.name();
        let (child, named_format) = match named {
            Named::Server(name) => {
                let spec = NodeSpec::parse(&name)?;
                let child = open_child(&self.ring, &name, &spec, &options).await?;
                (child, spec.format().map(|format| format.to_string()))
            }
            Named::File(file) => {
                let leaf = open_path_aside(&self.ring, &file.path, &options).await?;
                (Node::of(&self.ring, leaf), file.format)
            }
        };
        if child.identity().is_some() && self.above.contains(&child.identity()) {
            return Err(refuse(format!("The chain of images leads back to '{shown}'.")));
        }
        // One that clients have left may lie below another: it is only read there.
        heed(&self.ring, child.driver(), &shown, &options).await?;
        let said = named_format.as_deref().or(wanted.format);
        let format = match (said, wanted.role) {
            (_, Role::DataFile) => Format::Raw,
            // What the image calls a file, a device or a server's disk is raw.
            (Some("file" | "host_device" | "nbd" | "gluster"), _) => Format::Raw,
            (Some(said), _) => choose_format(Some(said), &[], false).map_err(|error| error.of(&shown))?,
            (None, _) => {
                let found = choose_format(None, &head(&self.ring, &child).await?, false)
                    .map_err(|error| error.of(&shown))?;
                if found != Format::Raw && !self.options.probe_backing {
                    return Err(refuse(format!(
                        "The image does not record the format of its backing file '{shown}', which looks like \
                         {found}. A guest may have written that. If you know that it is {found}, record it \
                         (`blockferry rebase -u -F {found} -b ...`), or allow guessing (--probe-backing)."
                    )));
                }
                found
            }
        };
        let way = Way::of(&child, format, &options).filter(|_| wanted.role == Role::Backing);
        if let Some(there) = way.as_ref().and_then(|way| options.nodes.below(way)) {
            self.check_chain(&there, &shown, wanted)?;
            return Ok(there);
        }
        let files = Files::new(&self.ring, &options, &child, &self.above);
        let node = with_format(&self.ring, &child, format, &options, &files).await?;
        if let Some(way) = way {
            options.nodes.add_below(way, &node);
        }
        Ok(node)
    }

    /// Something that is open already may lie below this: not if the chain becomes too long by it, or has no end.
    fn check_chain(&self, below: &Rc<Node>, shown: &str, wanted: &Wanted<'_>) -> Result<(), BlockError> {
        let chain = below.chain();
        if chain.iter().any(|layer| layer.identity().is_some() && self.above.contains(&layer.identity())) {
            let why = format!("The chain of images leads back to a file above '{shown}'.");
            return Err(BlockError::new(Operation::Open, wanted.image, Errno::EPERM).because(why));
        }
        self.check_count(self.above.len() + chain.len() - 1, wanted)
    }

    fn check_length(&self, wanted: &Wanted<'_>) -> Result<(), BlockError> {
        self.check_count(self.above.len(), wanted)
    }

    fn check_count(&self, count: usize, wanted: &Wanted<'_>) -> Result<(), BlockError> {
        if count <= BACKING_CHAIN_MAX {
            return Ok(());
        }
        let why = format!("There are more than {BACKING_CHAIN_MAX} backing files.");
        Err(BlockError::new(Operation::Open, wanted.image, Errno::EPERM).because(why))
    }
}

impl OpenFiles for Files {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        self.ring.boxed(self.open_named(wanted))
    }
}

/// Opens a leaf in place, where that takes no conversation.
fn open_here(
    ring: &Ring,
    shown: &str,
    spec: &NodeSpec,
    leaf: &ProtocolSpec,
    options: &ImageOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    // What lies behind a delay has a name of its own.
    let own = || match spec.protocol {
        ProtocolSpec::Delay { .. } => NodeSpec::from(leaf.clone()).shown(),
        _ => shown.to_owned(),
    };
    match leaf {
        ProtocolSpec::Mem { len } => Ok(Rc::new(MemDriver::new(ring, own(), *len, options.read_only))),
        ProtocolSpec::Null { len } => Ok(Rc::new(NullDriver::new(ring, own(), *len, options.read_only))),
        ProtocolSpec::File { path } => open_path(ring, path, options),
        _ => Err(BlockError::new(Operation::Open, shown, Errno::EINVAL)
            .hint("A disk on a server is opened in a task, because its server has to be asked.")),
    }
}

fn leaf_options(options: &ImageOptions) -> OpenOptions {
    OpenOptions {
        read_only: options.read_only,
        cache: options.cache,
        lock: options.lock,
        without_locks: options.without_locks,
    }
}

fn open_path(ring: &Ring, path: &Path, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    // The path becomes the image's name, and names in it are relative to what that says.
    crate::protocol::open::open(ring, &os_name::to_path(&name_of(path)), &leaf_options(options))
}

/// The same, without keeping whoever is served waiting.
async fn open_path_aside(
    ring: &Ring,
    path: &Path,
    options: &ImageOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    crate::protocol::open::open_aside(ring, &os_name::to_path(&name_of(path)), &leaf_options(options)).await
}
