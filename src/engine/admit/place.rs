//! Where bytes lie: whether two names, or two open images, lead to the same ones.
//!
//! A file is known by device and inode, whatever it is called; a block device by its number, whichever node leads to it.
//! A loop device lies on its file, a partition on its disk, a mapped device on what it is mapped to: what lies on another
//! is a part of it, but two that lie on the same one may have nothing in common. A disk of a server is known by the
//! server's address and the disk's name there, and a file that is not there yet by its folder and its name.

use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::Ring;

use crate::base::os_name;
use crate::base::planted::{Bug, is_planted};
use crate::block::Driver;
use crate::engine::remote;
use crate::protocol::nbd::{NbdAddress, NbdUri};

/// How many devices may lie on each other.
const DEPTH_MAX: usize = 16;
/// How many links the kernel follows.
const LINKS_MAX: usize = 40;
/// Set in the first half of the identity of a device ([`Driver::identity`]).
const DEVICE: u64 = 1 << 63;

/// One place where bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file or a device that is there, as [`Driver::identity`] tells it.
    Known(u64, u64),
    /// A file that is not there yet: in this folder, by this name.
    New((u64, u64), OsString),
    /// A disk on a server.
    Server(String),
}

/// A place, and what it lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    place: Place,
    below: Vec<Place>,
}

impl Ground {
    /// Whether a change of one may be a change of the other.
    pub fn overlaps(&self, other: &Ground) -> bool {
        if is_planted(Bug::SameImageNotLookedFor) {
            return false;
        }
        self.place == other.place || self.below.contains(&other.place) || other.below.contains(&self.place)
    }

    /// Whether both are the same place.
    pub fn is(&self, other: &Ground) -> bool {
        self.place == other.place
    }

    /// Of a driver that has no other below it; `None`: its bytes are nobody else's (memory).
    pub async fn of_leaf(ring: &Ring, leaf: &Rc<dyn Driver>) -> Option<Ground> {
        match leaf.identity() {
            Some((volume, n)) if volume == DEVICE => Some(of_device(ring, n).await),
            Some((volume, n)) => Some(Ground { place: Place::Known(volume, n), below: Vec::new() }),
            None => of_server(ring, leaf.name()).await,
        }
    }

    /// Of a path, whether anything is there or not. `None`: it cannot be looked at.
    pub async fn of_path(ring: &Ring, path: &Path) -> Option<Ground> {
        let path = path.to_owned();
        match ring.offload(move || place_of_path(&path)).await.ok().flatten()? {
            Place::Known(DEVICE, n) => Some(of_device(ring, n).await),
            place => Some(Ground { place, below: Vec::new() }),
        }
    }

    /// Of a name, as people and images say it.
    pub async fn of_name(ring: &Ring, name: &str) -> Option<Ground> {
        match crate::engine::open::local_path(name) {
            Some(path) => Ground::of_path(ring, &path).await,
            None => of_server(ring, name).await,
        }
    }
}

/// Where a file is made that is not there yet: a link that leads nowhere stands for what it leads to.
pub async fn leads_to(ring: &Ring, path: &Path) -> PathBuf {
    let from = path.to_owned();
    ring.offload(move || end_of_links(&from)).await.unwrap_or_else(|_| path.to_owned())
}

/// The same where nobody waits for the answer: it reads links.
pub fn end_of_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&path) {
            Ok(to) => path = folder(&path).join(to),
            Err(_) => break,
        }
    }
    path
}

fn place_of_path(path: &Path) -> Option<Place> {
    if let Ok(found) = std::fs::metadata(path) {
        return Some(known(&found));
    }
    let path = end_of_links(path);
    let parent = std::fs::metadata(folder(&path)).ok()?;
    Some(Place::New(inode(&parent), path.file_name()?.to_owned()))
}

fn known(found: &std::fs::Metadata) -> Place {
    match found.file_type().is_block_device() {
        true => {
            let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
            Place::Known(DEVICE, u64::from(major) << 32 | u64::from(minor))
        }
        false => {
            let (volume, n) = inode(found);
            Place::Known(volume, n)
        }
    }
}

/// Device and inode, as [`Driver::identity`] has them.
fn inode(found: &std::fs::Metadata) -> (u64, u64) {
    let device = found.dev();
    (u64::from(rustix::fs::major(device)) << 32 | u64::from(rustix::fs::minor(device)), found.ino())
}

/// The folder in which a path lies.
pub(super) fn folder(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

async fn of_device(ring: &Ring, number: u64) -> Ground {
    let below = ring.offload(move || {
        let mut below = Vec::new();
        lies_on(number, &mut below, DEPTH_MAX);
        below
    });
    // What cannot be asked is not known.
    Ground { place: Place::Known(DEVICE, number), below: below.await.unwrap_or_default() }
}

/// What a device lies on, as the kernel tells it.
fn lies_on(number: u64, below: &mut Vec<Place>, depth: usize) {
    if depth == 0 {
        return;
    }
    let dir = PathBuf::from(format!("/sys/dev/block/{}:{}", number >> 32, number & 0xffff_ffff));
    if let Ok(file) = std::fs::read_to_string(dir.join("loop/backing_file"))
        && let Ok(found) = std::fs::metadata(file.trim_end_matches('\n'))
    {
        let place = known(&found);
        below.push(place.clone());
        if let Place::Known(DEVICE, n) = place {
            lies_on(n, below, depth - 1);
        }
    }
    let mut devices: Vec<PathBuf> = Vec::new();
    if dir.join("partition").exists() {
        devices.push(dir.join("../dev"));
    }
    if let Ok(slaves) = std::fs::read_dir(dir.join("slaves")) {
        devices.extend(slaves.flatten().map(|entry| entry.path().join("dev")));
    }
    for device in devices {
        let Some(n) = std::fs::read_to_string(device).ok().and_then(|text| device_number(&text)) else {
            continue;
        };
        below.push(Place::Known(DEVICE, n));
        lies_on(n, below, depth - 1);
    }
}

/// `MAJOR:MINOR` as an identity has it.
fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(major.parse::<u64>().ok()? << 32 | minor.parse::<u64>().ok()?)
}

async fn of_server(ring: &Ring, name: &str) -> Option<Ground> {
    let place = match remote::nbd_disk(name) {
        Some(uri) => nbd(ring, uri).await,
        None => Place::Server(remote::gluster_image(name)?.to_string()),
    };
    Some(Ground { place, below: Vec::new() })
}

async fn nbd(ring: &Ring, uri: NbdUri) -> Place {
    let address = match uri.address {
        NbdAddress::Unix { path } => {
            let shown = os_name::from_path(&path);
            match ring.offload(move || place_of_path(&path)).await {
                Ok(Some(Place::Known(volume, n))) => format!("socket {volume} {n}"),
                _ => shown,
            }
        }
        NbdAddress::Tcp { host, port } => format!("{} {port}", host_as_compared(&host)),
    };
    Place::Server(format!("nbd {address} {}", uri.export))
}

/// The names of this machine are one.
fn host_as_compared(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    match host.as_str() {
        "localhost" | "127.0.0.1" | "::1" | "" => "localhost".into(),
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground(place: Place, below: &[Place]) -> Ground {
        Ground { place, below: below.to_vec() }
    }

    #[test]
    fn what_lies_on_another_is_a_part_of_it_and_neighbours_are_not() {
        let disk = ground(Place::Known(DEVICE, 1), &[]);
        let (one, two) = (Place::Known(DEVICE, 2), Place::Known(DEVICE, 3));
        let one = ground(one, &[Place::Known(DEVICE, 1)]);
        let two = ground(two, &[Place::Known(DEVICE, 1)]);
        assert!(one.overlaps(&disk) && disk.overlaps(&one) && one.overlaps(&one));
        assert!(!one.overlaps(&two) && !two.overlaps(&one));
    }

    #[test]
    fn one_disk_of_a_server_has_many_names() {
        assert_eq!(host_as_compared("LOCALHOST"), host_as_compared("127.0.0.1"));
        assert_eq!(device_number("259:1\n"), Some(259 << 32 | 1));
        assert_eq!(device_number("259"), None);
    }

    #[test]
    fn a_file_that_is_not_there_is_known_by_its_folder_and_a_link_by_what_it_leads_to() {
        let dir = std::env::temp_dir().join(format!("blockferry-place-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (there, link, nowhere) = (dir.join("a"), dir.join("l"), dir.join("n"));
        std::fs::write(&there, "a").unwrap();
        std::os::unix::fs::symlink("a", &link).unwrap();
        std::os::unix::fs::symlink("new", &nowhere).unwrap();
        assert_eq!(place_of_path(&there), place_of_path(&link));
        assert_eq!(place_of_path(&nowhere), place_of_path(&dir.join("new")));
        assert_ne!(place_of_path(&dir.join("other")), place_of_path(&dir.join("new")));
        assert_eq!(place_of_path(&dir.join("none/x")), None);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
