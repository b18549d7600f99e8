//! Writing a header of another length, such as one that names another backing file, so that a power cut leaves the
//! old one or the new one.
//!
//! The fixed fields share the first sector with the extensions that come first; a sector is written as a whole or
//! not at all. Everything else that the new header needs goes first, to places that the old one does not use.
//! Where the extensions would move, a filler extension leads past the old ones.

use blockferry_ring::Errno;

use super::header::{BACKING_NAME_BYTES_MAX, Extension, Header, extension};
use super::image::{Fault, Qcow2};
use crate::base::os_name;

/// The unit that is written as a whole.
const SECTOR: usize = 512;
/// An extension that nobody knows, so that everybody skips it.
const FILLER: u32 = 0x626c_6670;

/// The new first cluster, written in two steps: all but the first sector, then that.
pub(super) fn rearranged(old: &Header, new: &mut Header, cluster: &[u8]) -> Option<Vec<u8>> {
    new.extensions.retain(|e| e.kind != FILLER);
    let name = new.backing_file.clone().unwrap_or_default();
    let name = os_name::to_bytes(&name);
    let old_extensions_end = old.encode_with_extensions().len();
    let old_name = old.backing_file.as_ref().map_or(0..0, |name| {
        old.backing_offset as usize..old.backing_offset as usize + os_name::to_bytes(name).len()
    });
    let free_from = old_extensions_end.max(old_name.end).max(SECTOR).next_multiple_of(8);
    // Everything in the first sector; or extensions as they were, and the name where there was none; or
    // everything new behind the old.
    let plain = new.encode_with_extensions().len();
    if plain + name.len() <= SECTOR.min(cluster.len()) {
        return composed(new, &name, plain, cluster);
    }
    let unmoved = |bytes: &[u8]| {
        let end = plain.min(old_extensions_end).max(SECTOR);
        plain <= SECTOR || (plain == old_extensions_end && bytes[SECTOR..end] == cluster[SECTOR..end])
    };
    let before = if old_name.start >= plain + name.len() {
        Some(plain.max(SECTOR).max(old_extensions_end))
    } else {
        None
    };
    let fits_before = before.filter(|at| at + name.len() <= old_name.start);
    let at = fits_before.unwrap_or(free_from.max(plain));
    if let Some(bytes) = composed(new, &name, at, cluster).filter(|bytes| unmoved(bytes)) {
        return Some(bytes);
    }
    let first = usize::from(new.extensions.first().is_some_and(|e| e.kind == extension::BACKING_FORMAT));
    let mut head = Header { extensions: new.extensions[..first].to_vec(), ..new.clone() };
    let filler_at = head.encode_with_extensions().len() - 8;
    if filler_at + 8 > SECTOR {
        return None;
    }
    // What it covers is still in use by the old header: it stays as it is.
    let filler = Extension { kind: FILLER, data: cluster.get(filler_at + 8..free_from)?.to_vec() };
    head.extensions.push(filler);
    head.extensions.extend(new.extensions[first..].iter().cloned());
    *new = head;
    let at = new.encode_with_extensions().len();
    composed(new, &name, at, cluster)
}

/// The first cluster with the name at `at`; what is not used stays as it is.
fn composed(new: &mut Header, name: &[u8], at: usize, cluster: &[u8]) -> Option<Vec<u8>> {
    new.backing_offset = if new.backing_file.is_some() { at as u64 } else { 0 };
    let head = new.encode_with_extensions();
    let mut bytes = cluster.to_vec();
    bytes.get_mut(..head.len())?.copy_from_slice(&head);
    if new.backing_file.is_some() {
        if at < head.len() {
            return None;
        }
        bytes.get_mut(at..at + name.len())?.copy_from_slice(name);
    }
    Some(bytes)
}

impl Qcow2 {
    pub(super) async fn set_backing_name(&self, backing: Option<(&str, Option<&str>)>) -> Result<(), Fault> {
        self.check_writable()?;
        let refuse = |errno, why: &str| Err(Fault::Refused(errno, why.into()));
        if backing.is_some() && self.header.borrow().data_file_raw() {
            return refuse(Errno::EINVAL, "An image with a raw data file cannot have a backing file.");
        }
        let fits =
            |name: &str| !name.is_empty() && os_name::to_bytes(name).len() <= BACKING_NAME_BYTES_MAX as usize;
        if backing.is_some_and(|(name, _)| !fits(name)) {
            return refuse(Errno::EINVAL, "The name of a backing file has 1 to 1023 bytes.");
        }
        self.write_back().await?;
        let rearranged = self.rearrange_header(|new| {
            new.backing_file = backing.map(|(name, _)| name.to_owned());
            let format = backing.and_then(|(_, format)| format).map(|format| format.as_bytes().to_vec());
            // It comes first, with the fields that change together with it.
            new.set_extension(extension::BACKING_FORMAT, None);
            new.set_extension(extension::BACKING_FORMAT, format);
        });
        if rearranged.await? {
            return Ok(());
        }
        refuse(Errno::ENOSPC, "The header has no room for that name.")
    }

    /// Writes the header, durably, as it is after a change of its version, its features, its extensions or the name
    /// of its backing file. False, and nothing has changed: it has no room for that.
    pub(super) async fn rearrange_header(&self, change: impl FnOnce(&mut Header)) -> Result<bool, Fault> {
        let _turn = self.heading.take().await;
        let cluster = self.read_bytes(0, self.g.cluster_size()).await?;
        let old = self.header.borrow().clone();
        let mut new = old.clone();
        change(&mut new);
        let Some(bytes) = rearranged(&old, &mut new, &cluster) else { return Ok(false) };
        if bytes.len() > SECTOR && bytes[SECTOR..] != cluster[SECTOR..] {
            self.write_bytes(SECTOR as u64, &bytes[SECTOR..]).await?;
        }
        self.flush_files().await?;
        self.write_bytes(0, &bytes[..SECTOR]).await?;
        {
            let mut head = self.head.borrow_mut();
            let len = head.len();
            head.copy_from_slice(&bytes[..len]);
            // Others may have changed the other fields meanwhile, and wait for their turn to write them.
            let mut header = self.header.borrow_mut();
            header.version = new.version;
            header.header_length = new.header_length;
            header.incompatible = new.incompatible;
            (header.compatible, header.autoclear) = (new.compatible, new.autoclear);
            header.extensions = new.extensions;
            header.backing_file = new.backing_file;
            header.backing_offset = new.backing_offset;
        }
        self.flush_files().await?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::create::first_cluster;
    use super::super::header::feature_names;
    use super::*;
    use crate::base::rng::Rng;

    fn name(rng: &mut Rng, len_max: u64) -> String {
        (0..1 + rng.below(len_max)).map(|_| char::from(b'a' + rng.below(26) as u8)).collect()
    }

    /// However often it is renamed: before the first sector is written the old header is whole, and after it
    /// the new one.
    #[test]
    fn the_old_header_or_the_new_one() {
        let mut done = 0;
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let mut header = crate::format::qcow2::header::tests::sample();
            header.extensions.clear();
            header.cluster_bits = [9, 12, 16][rng.below(3) as usize];
            (header.size, header.l1_size) = (512, 1);
            header.more.clear();
            header.header_length = 112;
            for (kind, data) in [
                (extension::BACKING_FORMAT, b"raw".to_vec()),
                (0x1111_1111, vec![7; rng.below(900) as usize]),
                (extension::FEATURE_NAMES, feature_names()),
            ] {
                if rng.chance(40_000) && header.cluster_bits > 9 {
                    header.set_extension(kind, Some(data));
                }
            }
            header.backing_file = rng.chance(40_000).then(|| name(&mut rng, 300));
            header.backing_offset = 0;
            let Some(mut cluster) = first_cluster(&mut header) else { continue };
            assert_eq!(Header::parse(&cluster).unwrap(), header);
            for _ in 0..6 {
                let mut new = header.clone();
                new.backing_file = rng.chance(50_000).then(|| name(&mut rng, 600));
                new.set_extension(extension::BACKING_FORMAT, None);
                let format = if rng.chance(32_768) { &b"raw"[..] } else { b"a-long-name" };
                let format = (rng.chance(45_000) && new.backing_file.is_some()).then(|| format.to_vec());
                new.set_extension(extension::BACKING_FORMAT, format.clone());
                let Some(bytes) = rearranged(&header, &mut new, &cluster) else { continue };
                let mut between = cluster.clone();
                between[SECTOR..].copy_from_slice(&bytes[SECTOR..]);
                // What an old filler covers is nobody's.
                let bare = |mut header: Header| {
                    header.extensions.retain(|e| e.kind != FILLER);
                    header
                };
                let before = bare(Header::parse(&between).unwrap());
                assert_eq!(before, bare(header.clone()), "seed {seed}");
                let parsed = Header::parse(&bytes).unwrap();
                assert_eq!(parsed, new, "seed {seed}");
                assert_eq!(parsed.extension(extension::BACKING_FORMAT), format.as_deref());
                assert_eq!(parsed.extension(0x1111_1111), header.extension(0x1111_1111));
                (header, cluster, done) = (parsed, bytes, done + 1);
            }
        }
        assert!(done > 800, "{done}");
    }
}
