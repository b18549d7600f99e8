//! Opening what images name: backing files and data files, through the gate.
//!
//! Every layer is opened read-only but the top one, with the cache mode and the locking of the top one. A file that
//! is in the chain already is a loop, whatever name leads to it; a chain that is too long is refused.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::open::{Image, ImageOptions, open_layer};
use crate::base::limits::BACKING_CHAIN_MAX;
use crate::block::{BlockError, Driver, IoFuture, Operation};
use crate::format::probe::Format;
use crate::format::qcow2::gate::resolve;
use crate::format::qcow2::{Gate, OpenFiles, Role, Wanted};

/// The layers above the one that asks, innermost first.
#[derive(Debug)]
struct Above {
    identity: Option<(u64, u64)>,
    next: Option<Rc<Above>>,
}

/// Opens files for one layer of a chain.
#[derive(Clone, Debug)]
pub(super) struct Files {
    ring: Ring,
    options: ImageOptions,
    above: Option<Rc<Above>>,
}

impl Files {
    /// For the top layer.
    pub(super) fn new(ring: &Ring, options: &ImageOptions) -> Files {
        Files { ring: ring.clone(), options: options.clone(), above: None }
    }

    /// For the layer in `file`: an error if that is a layer already.
    pub(super) fn enter(&self, file: &Rc<dyn Driver>) -> Result<Files, BlockError> {
        let identity = file.identity();
        let (mut depth, mut above) = (1, self.above.as_ref());
        while let Some(layer) = above {
            if identity.is_some() && layer.identity == identity {
                return Err(BlockError::new(Operation::Open, file.name(), Errno::ELOOP)
                    .hint("The chain of backing files comes back to this file."));
            }
            depth += 1;
            above = layer.next.as_ref();
        }
        if depth > BACKING_CHAIN_MAX {
            return Err(BlockError::new(Operation::Open, file.name(), Errno::ELOOP)
                .hint(format!("The chain of backing files has more than {BACKING_CHAIN_MAX} layers.")));
        }
        let above = Some(Rc::new(Above { identity, next: self.above.clone() }));
        Ok(Files { above, ..self.clone() })
    }

    async fn open_named(&self, wanted: Named) -> Result<Rc<dyn Driver>, BlockError> {
        let Named { role, path, format, read_only } = wanted;
        let name = format!("file:{}", path.display());
        let options = ImageOptions {
            read_only,
            format: Some(Format::Raw),
            no_backing: false,
            for_check: false,
            offset: 0,
            size: None,
            ..self.options.clone()
        };
        match role {
            // The guest's bytes as they are; nothing is looked for in them.
            Role::DataFile => Ok(open_layer(&self.ring, &name, &options, self).await?.driver),
            Role::Backing => {
                let options = ImageOptions { format, guess_raw: true, ..options };
                Ok(open_layer(&self.ring, &name, &options, self).await?.driver)
            }
        }
    }
}

/// A judged request.
struct Named {
    role: Role,
    path: std::path::PathBuf,
    format: Option<Format>,
    read_only: bool,
}

/// The format that an image records for another file. One that is not known here is an error, not a guess.
pub fn recorded_format(name: Option<&str>, file: &str) -> Result<Option<Format>, BlockError> {
    let unknown = |name: &str| {
        BlockError::new(Operation::Open, file, Errno::EOPNOTSUPP)
            .hint(format!("An image says that this file has the format '{name}', which is not supported."))
    };
    match name {
        // QEMU writes the name of the protocol for a raw file, too.
        Some("file" | "host_device") => Ok(Some(Format::Raw)),
        Some(name) => Format::parse(name).map(Some).ok_or_else(|| unknown(name)),
        None => Ok(None),
    }
}

impl OpenFiles for Files {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<dyn Driver>, BlockError>> {
        let judged = resolve(&self.options.gate, Path::new(wanted.image), wanted.name)
            .map_err(|error| {
                BlockError::new(Operation::Open, wanted.image, Errno::EACCES).hint(error.to_string())
            })
            .and_then(|reference| {
                let name = reference.path.display().to_string();
                let format = reference.format.as_deref().or(wanted.format);
                let format = recorded_format(format, &name)?;
                Ok(Named { role: wanted.role, path: reference.path, format, read_only: wanted.read_only })
            });
        self.ring.boxed(async move { self.open_named(judged?).await })
    }
}

/// Opens the backing file of an image as a user named it on a command line: relative to the image, and through no
/// gate, because no image asks for it.
pub async fn open_backing(
    ring: &Ring,
    image: &str,
    name: &str,
    format: Option<Format>,
    options: &ImageOptions,
) -> Result<Image, BlockError> {
    let reference = resolve(&Gate::Anything, Path::new(image), name)
        .map_err(|error| BlockError::new(Operation::Open, name, Errno::EINVAL).hint(error.to_string()))?;
    let path = reference.path.display().to_string();
    let format = recorded_format(reference.format.as_deref(), &path)?.or(format);
    let options = ImageOptions { format, read_only: true, guess_raw: true, ..options.clone() };
    open_layer(ring, &format!("file:{path}"), &options, &Files::new(ring, &options)).await
}
