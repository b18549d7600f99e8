//! What only qcow2 images have, for those who hold an image as a driver.

use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::ImageOptions;
use super::named::{self, Named};
use super::open::{open, open_file};
use crate::block::{BlockError, Driver, IoFuture, IoResult, Node, Operation};
use crate::format::probe::Format;
use crate::format::qcow2::{Gate, Qcow2, Reach};
use crate::job::convert::Compressor;

/// The image as what it is, if it is one of this format.
pub fn qcow2(driver: &Rc<dyn Driver>) -> Option<&Qcow2> {
    driver.as_any()?.downcast_ref()
}

/// The format of an open image.
pub fn format(driver: &Rc<dyn Driver>) -> Format {
    if qcow2(driver).is_some() { Format::Qcow2 } else { Format::Raw }
}

/// The format that an image records for another file. One that is not known here is an error, not a guess.
pub fn recorded_format(name: Option<&str>, file: &str) -> Result<Option<Format>, BlockError> {
    match name {
        // QEMU writes the name of the protocol for a raw file, too.
        Some("file" | "host_device" | "nbd" | "gluster") => Ok(Some(Format::Raw)),
        Some(name) => Format::parse(name).map(Some).ok_or_else(|| {
            BlockError::new(Operation::Open, file, Errno::EOPNOTSUPP).because(format!(
                "An image says that this file has the format '{name}', which is not supported."
            ))
        }),
        None => Ok(None),
    }
}

/// Opens a backing file that a user named for an image.
pub async fn open_backing(
    ring: &Ring,
    image: &str,
    name: &str,
    format: Option<Format>,
    options: &ImageOptions,
) -> Result<Rc<Node>, BlockError> {
    let options = ImageOptions {
        format,
        read_only: true,
        gate: Gate { files: Reach::Anything, ..options.gate },
        no_backing: false,
        for_check: false,
        snapshot: None,
        ..options.clone()
    };
    let named = named::by_user(image, name).map_err(|error| named::failed(name, &error))?;
    let shown = named.name();
    let format = recorded_format(named.format(), &shown)?.or(format);
    let options = ImageOptions { format, ..options };
    match named {
        Named::Server(name) => open(ring, &name, &options).await,
        Named::File(file) => open_file(ring, &file.path, &options).await,
    }
}

/// Compresses the clusters of an image.
#[derive(Debug)]
pub struct Qcow2Compressor {
    ring: Ring,
    driver: Rc<dyn Driver>,
    cluster_bytes: u64,
}

impl Qcow2Compressor {
    /// For this image; `None` if it is of another format.
    pub async fn new(ring: &Ring, driver: &Rc<dyn Driver>) -> Result<Option<Qcow2Compressor>, BlockError> {
        let Some(image) = qcow2(driver) else { return Ok(None) };
        let cluster_bytes = image.info().await?.cluster_size.into();
        Ok(Some(Qcow2Compressor { ring: ring.clone(), driver: driver.clone(), cluster_bytes }))
    }
}

impl Compressor for Qcow2Compressor {
    fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    fn write(&self, offset: u64, bytes: Vec<u8>) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            match qcow2(&self.driver) {
                Some(image) => image.write_compressed_bytes(offset, bytes).await,
                None => Err(BlockError::new(Operation::Write, self.driver.name(), Errno::EOPNOTSUPP)),
            }
        })
    }
}
