//! The disk as a snapshot has it, to be read: the image is opened with the tables that the snapshot keeps.

use super::image::{Fault, Qcow2};
use super::snapshot::Snapshot;
use blockferry_ring::Errno;

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhichSnapshot {
    /// The one of this id, or else the first of this name.
    Called(String),
    /// The one of this id and this name, as far as they are said.
    With {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

impl WhichSnapshot {
    /// Reads it as `qemu-img` does: an id or a name, or `snapshot.id=ID,snapshot.name=NAME`.
    pub fn parse(text: &str) -> Result<WhichSnapshot, String> {
        if !text.starts_with("snapshot.") {
            return match text {
                "" => Err("the snapshot has no name".into()),
                text => Ok(WhichSnapshot::Called(text.to_owned())),
            };
        }
        let (mut id, mut name) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("snapshot.id", value)) => id = Some(value.to_owned()),
                Some(("snapshot.name", value)) => name = Some(value.to_owned()),
                _ => return Err(format!("'{part}' is neither snapshot.id=ID nor snapshot.name=NAME")),
            }
        }
        Ok(WhichSnapshot::With { id, name })
    }

    fn find<'a>(&self, list: &'a [Snapshot]) -> Option<&'a Snapshot> {
        match self {
            WhichSnapshot::Called(text) => {
                let by_id = list.iter().find(|snapshot| snapshot.id == *text);
                by_id.or_else(|| list.iter().find(|snapshot| snapshot.name == *text))
            }
            WhichSnapshot::With { id, name } => list.iter().find(|snapshot| {
                id.as_ref().is_none_or(|id| snapshot.id == *id)
                    && name.as_ref().is_none_or(|name| snapshot.name == *name)
            }),
        }
    }
}

impl std::fmt::Display for WhichSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WhichSnapshot::Called(text) => write!(f, "snapshot '{text}'"),
            WhichSnapshot::With { id, name } => {
                f.write_str("snapshot")?;
                id.iter().try_for_each(|id| write!(f, " of the id '{id}'"))?;
                name.iter().try_for_each(|name| write!(f, " named '{name}'"))
            }
        }
    }
}

impl Qcow2 {
    /// Turns to the tables of a snapshot, before they are loaded. The image is only read.
    pub(super) async fn turn_to(&self, which: &WhichSnapshot) -> Result<(), Fault> {
        let refuse = |errno, why: String| Err(Fault::Refused(errno, why));
        if !self.read_only.get() {
            return refuse(Errno::EROFS, "Snapshots are only read: open the image read-only.".into());
        }
        let (list, _) = self.read_snapshots().await?;
        let Some(snapshot) = which.find(&list) else {
            return refuse(Errno::ENOENT, format!("There is no {which}."));
        };
        let size = snapshot.disk_size.unwrap_or(self.len.get());
        if size > self.g.disk_len_max() {
            return Err(Fault::Damage("a snapshot of an impossible length".into()));
        }
        {
            let mut header = self.header.borrow_mut();
            (header.l1_offset, header.l1_size) = (snapshot.l1_offset, snapshot.l1_size);
            header.size = size;
        }
        self.len.set(size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_called_in_two_ways() {
        let with = |id: Option<&str>, name: Option<&str>| {
            Ok(WhichSnapshot::With { id: id.map(Into::into), name: name.map(Into::into) })
        };
        assert_eq!(WhichSnapshot::parse("a=b"), Ok(WhichSnapshot::Called("a=b".into())));
        assert_eq!(WhichSnapshot::parse("snapshot.id=1"), with(Some("1"), None));
        assert_eq!(WhichSnapshot::parse("snapshot.name=x,snapshot.id=2"), with(Some("2"), Some("x")));
        for bad in ["", "snapshot.x=1", "snapshot.id", "snapshot.id=1,x"] {
            assert!(WhichSnapshot::parse(bad).is_err(), "{bad}");
        }
    }
}
