//! What a mark says: one line of JSON, which other versions and people may read, too.

use blockferry_ring::{DeviceIdentity, Ring};

use crate::base::process::{Process, boot};
use crate::base::secret::without_secrets;
use crate::base::units::fmt_bytes;

/// Bytes of a name in a mark; more is cut off.
const NAME_BYTES_MAX: usize = 1024;

/// What kind of mark it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkState {
    /// The target of a job that has not completed: it may hold anything.
    Incomplete,
    /// The target of a job that copied only what was written meanwhile: it is no copy.
    Partial,
    /// Its clients have gone on, on another disk: it is old.
    Superseded,
    /// It cannot be read, or a later version has put it there.
    Unknown,
}

impl MarkState {
    /// Whether the disk must not be taken for a whole one. What is not understood is taken so.
    pub fn is_unfinished(self) -> bool {
        self != MarkState::Superseded
    }

    /// As JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            MarkState::Incomplete | MarkState::Unknown => "incomplete",
            MarkState::Partial => "partial",
            MarkState::Superseded => "superseded",
        }
    }
}

/// A block device, as it was when the mark was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MarkedDevice {
    /// Counts the disks that the kernel has seen since `boot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The boot of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// What it says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

impl MarkedDevice {
    pub(super) fn new(identity: DeviceIdentity) -> MarkedDevice {
        let DeviceIdentity { sequence, serial } = identity;
        MarkedDevice { sequence, boot: boot().map(str::to_owned), serial }
    }

    /// Both are one disk for certain.
    pub(super) fn is(&self, other: &MarkedDevice) -> bool {
        match (&self.serial, &other.serial) {
            (Some(one), Some(two)) => one == two,
            _ => self.sequence.is_some() && self.sequence == other.sequence && self.boot == other.boot,
        }
    }
}

/// What a mark says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MarkInfo {
    /// `incomplete`, `partial`, `superseded`; other words may come from later versions.
    pub state: String,
    /// What kind of job: `mirror`, ….
    pub job: String,
    /// What was copied, as the user named it; of a superseded disk its own name.
    pub source: String,
    /// Which disk that is, whatever it is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_identity: Option<String>,
    /// Bytes of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_bytes: Option<u64>,
    /// The format of the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// When it began, in seconds since 1970 (UTC); of a superseded disk, when its clients left it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// Who did it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// How far it was when that was last noted: bytes dealt with, and of how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<(u64, u64)>,
    /// What was copied to, where the mark does not stand on the target itself; of a superseded disk, what it is superseded by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The device that the mark is about, where it does not stand on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<MarkedDevice>,
    /// The source was no whole disk itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub source_incomplete: bool,
    /// It was found under a name that may mean another disk by now.
    #[serde(default, skip_serializing)]
    pub doubtful: bool,
}

impl MarkInfo {
    /// The mark of an unfinished target of a `job`.
    pub fn incomplete(job: &str, source: &str) -> MarkInfo {
        MarkInfo {
            state: MarkState::Incomplete.name().into(),
            job: job.into(),
            source: cut(source),
            source_identity: None,
            source_bytes: None,
            format: None,
            started: None,
            process: Process::own().cloned(),
            done: None,
            target: None,
            device: None,
            source_incomplete: false,
            doubtful: false,
        }
    }

    /// The mark of a disk called `name` whose clients have gone on, on the disk `by`.
    pub fn superseded(ring: &Ring, job: &str, name: &str, by: &str) -> MarkInfo {
        MarkInfo {
            state: MarkState::Superseded.name().into(),
            target: Some(cut(by)),
            ..MarkInfo::incomplete(job, name).started(ring.unix_secs())
        }
    }

    /// The same of a target that holds only what was written meanwhile.
    pub fn partial(self) -> MarkInfo {
        MarkInfo { state: MarkState::Partial.name().into(), ..self }
    }

    /// The same of a target whose source was no whole disk itself.
    pub fn of_incomplete(self) -> MarkInfo {
        MarkInfo { source_incomplete: true, ..self }
    }

    /// With the time at which it began, in seconds since 1970 (UTC).
    pub fn started(mut self, unix_secs: u64) -> MarkInfo {
        self.started = Some(unix_secs);
        self
    }

    /// With what tells whether another run is about the same copy.
    pub fn about(mut self, source_identity: Option<String>, source_bytes: u64, format: &str) -> MarkInfo {
        self.source_identity = source_identity;
        self.source_bytes = Some(source_bytes);
        self.format = Some(format.into());
        self
    }

    /// What kind of mark it is.
    pub fn kind(&self) -> MarkState {
        match self.state.as_str() {
            "incomplete" => MarkState::Incomplete,
            "partial" => MarkState::Partial,
            "superseded" => MarkState::Superseded,
            _ => MarkState::Unknown,
        }
    }

    /// Whether a run whose mark is `new` goes on with what this one has left: a copy of the same source to the same format.
    /// The rest may differ.
    pub fn is_continued_by(&self, new: &MarkInfo) -> bool {
        self.kind() == MarkState::Incomplete
            && !self.doubtful
            && self.source_identity.is_some()
            && self.source_identity == new.source_identity
            && self.source_bytes == new.source_bytes
            && self.format == new.format
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> MarkInfo {
        serde_json::from_slice(bytes).unwrap_or_else(|_| MarkInfo {
            state: "unreadable".into(),
            process: None,
            ..MarkInfo::incomplete("an unknown job", "an unknown source")
        })
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // Strings and numbers: there is nothing that could fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl std::fmt::Display for MarkInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let MarkInfo { job, source, .. } = self;
        match self.kind() {
            MarkState::Superseded => {
                let by = self.target.as_deref().unwrap_or("another disk");
                write!(f, "superseded by '{by}'")?;
            }
            MarkState::Partial => write!(f, "holds only what was written to '{source}' during a {job}")?,
            MarkState::Incomplete if self.source_incomplete => {
                write!(f, "incomplete: {job} of '{source}', which was incomplete itself")?;
            }
            MarkState::Incomplete => write!(f, "incomplete: {job} of '{source}'")?,
            MarkState::Unknown => write!(f, "marked in a way that this version does not understand")?,
        }
        if let Some(secs) = self.started {
            let when = std::time::UNIX_EPOCH + std::time::Duration::from_secs(secs.min(1 << 36));
            write!(
                f,
                ", {} {}",
                if self.kind() == MarkState::Superseded { "at" } else { "begun at" },
                humantime::format_rfc3339_seconds(when)
            )?;
        }
        if let Some((done, of)) = self.done {
            write!(f, ", {} of {} dealt with", fmt_bytes(done), fmt_bytes(of))?;
        }
        Ok(())
    }
}

/// A name as a mark has it: not too long, and without passwords.
pub(super) fn cut(name: &str) -> String {
    let name = without_secrets(name);
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(identity: Option<&str>, bytes: u64, format: &str) -> MarkInfo {
        MarkInfo::incomplete("mirror", "/s").about(identity.map(str::to_owned), bytes, format)
    }

    #[test]
    fn a_run_knows_its_own() {
        let old = mark(Some("a"), 512, "raw");
        let renamed = MarkInfo { source: "/another/name".into(), job: "convert".into(), ..old.clone() };
        assert!(old.is_continued_by(&renamed));
        for other in
            [mark(Some("b"), 512, "raw"), mark(Some("a"), 1024, "raw"), mark(Some("a"), 512, "qcow2")]
        {
            assert!(!old.is_continued_by(&other), "{other:?}");
        }
        // What is not known of both, or may be about another disk, is nobody's.
        assert!(!mark(None, 512, "raw").is_continued_by(&mark(None, 512, "raw")));
        assert!(!MarkInfo { doubtful: true, ..old.clone() }.is_continued_by(&old));
        assert!(!old.clone().partial().is_continued_by(&old));
    }

    #[test]
    fn marks_of_other_versions_are_read() {
        let old = MarkInfo::from_bytes(br#"{"state":"incomplete","job":"mirror","source":"/s","more":1}"#);
        assert_eq!((old.kind(), old.source.as_str()), (MarkState::Incomplete, "/s"));
        for strange in [&b""[..], b"{", br#"{"state":"later","job":"j","source":"s"}"#] {
            let info = MarkInfo::from_bytes(strange);
            assert!(info.kind() == MarkState::Unknown && info.kind().is_unfinished(), "{info:?}");
        }
    }

    #[test]
    fn devices_are_known_by_serial_or_by_sequence_within_a_boot() {
        let device = |sequence, boot: &str, serial: Option<&str>| MarkedDevice {
            sequence,
            boot: Some(boot.into()),
            serial: serial.map(str::to_owned),
        };
        assert!(device(Some(1), "a", Some("x")).is(&device(Some(9), "b", Some("x"))));
        assert!(!device(Some(1), "a", Some("x")).is(&device(Some(1), "a", Some("y"))));
        assert!(device(Some(1), "a", None).is(&device(Some(1), "a", None)));
        assert!(!device(Some(1), "a", None).is(&device(Some(2), "a", None)));
        assert!(!device(Some(1), "a", None).is(&device(Some(1), "b", None)));
        assert!(!device(None, "a", None).is(&device(None, "a", None)));
    }
}
