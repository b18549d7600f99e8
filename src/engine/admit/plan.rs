//! What a command is going to do, in words: the rows that `--dry-run` prints, and what is refused.

use serde_json::{Value, json};

use crate::base::shown::shown;
use crate::base::units::fmt_bytes;
use crate::block::BlockError;

/// Why a command does not begin.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// Something of this name is there already.
    #[error("'{name}' exists and is left alone. Name a new file, or say {say} to overwrite it")]
    Exists {
        /// As it was named.
        name: String,
        /// All that has to be said.
        say: &'static str,
    },
    /// A data file that a new image would take is there already.
    #[error(
        "'{name}' exists and is left alone: a new image would take it as its data file, and what is in it would be \
         lost. Name a new file, or say --force to empty it"
    )]
    DataFileExists {
        /// As it was named.
        name: String,
    },
    /// What is to be changed is a part of what has to stay.
    #[error("'{changed}' {relation}: what is needed would be destroyed. Name another target")]
    Part {
        /// As it was named.
        changed: String,
        /// What it is.
        relation: String,
    },
    /// An image.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Anything else, said in full.
    #[error("{0}")]
    Said(String),
}

impl Refusal {
    /// The kind, for scripts.
    pub fn kind(&self) -> &'static str {
        match self {
            Refusal::Exists { .. } | Refusal::DataFileExists { .. } => "exists",
            Refusal::Part { .. } => "same-image",
            Refusal::Block(error) if error.operation == crate::block::Operation::Lock => "in-use",
            Refusal::Block(_) => "image",
            Refusal::Said(_) => "request",
        }
    }
}

/// What is done with an image or a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Read; nobody may change it meanwhile.
    Read,
    /// Made; nothing of this name is there.
    Make,
    /// Emptied, and made anew.
    Remake,
    /// Written as it is there, all of it.
    Overwrite,
    /// Changed in part.
    Change,
}

impl Act {
    /// The word of JSON.
    pub fn word(self) -> &'static str {
        match self {
            Act::Read => "read",
            Act::Make => "make",
            Act::Remake => "make-anew",
            Act::Overwrite => "overwrite",
            Act::Change => "change",
        }
    }

    fn shown(self) -> &'static str {
        match self {
            Act::Read => "read",
            Act::Make => "make",
            Act::Remake => "empty",
            Act::Overwrite => "overwrite",
            Act::Change => "change",
        }
    }
}

/// One image or file that a command has to do with.
#[derive(Clone, Debug)]
pub struct Planned {
    /// As it is named.
    pub name: String,
    /// What it is to the command: `source`, `target`, `backing file`, …
    pub role: &'static str,
    /// What is done with it.
    pub act: Act,
    /// The format.
    pub format: Option<&'static str>,
    /// Bytes of the disk.
    pub len: Option<u64>,
    /// It would be locked.
    pub locked: bool,
    /// Permission bits of a file that is made.
    pub mode: Option<u32>,
}

/// What a command is going to do.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The command.
    pub command: &'static str,
    /// All that it has to do with, in the order in which it comes to it.
    pub images: Vec<Planned>,
    /// Bytes that are copied or written, at most.
    pub bytes_max: Option<u64>,
    /// Bytes that are free where the target lies.
    pub room: Option<u64>,
    /// Why it does not begin; empty: it would.
    pub refusals: Vec<Refusal>,
}

impl Plan {
    /// As JSON.
    pub fn to_json(&self) -> Value {
        let images: Vec<_> = self.images.iter().map(Planned::to_json).collect();
        let refusals: Vec<_> = self
            .refusals
            .iter()
            .map(|refusal| json!({"kind": refusal.kind(), "message": refusal.to_string()}))
            .collect();
        json!({
            "event": "plan",
            "command": self.command,
            "dry-run": true,
            "images": images,
            "bytes-max": self.bytes_max,
            "room-bytes": self.room,
            "refusals": refusals,
            "would-begin": self.refusals.is_empty(),
        })
    }
}

impl Planned {
    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "role": self.role,
            "does": self.act.word(),
            "format": self.format,
            "virtual-size": self.len,
            "locked": self.locked,
            "mode": self.mode.map(|mode| format!("{mode:04o}")),
        })
    }
}

impl Planned {
    /// As a sentence; `does` is `Will` or `Would`.
    fn sentence(&self, does: &str) -> String {
        let format = self.format.map_or_else(String::new, |format| format!(", {format}"));
        let len = self.len.map_or_else(String::new, |len| format!(", {}", fmt_bytes(len)));
        let mode = self.mode.map_or_else(String::new, |mode| format!(", mode {mode:04o}"));
        let locked = if self.locked { ", locked" } else { "" };
        let (act, name) = (self.act.shown(), shown(&self.name));
        format!("{does} {act} '{name}' ({}{format}{len}{mode}{locked})", self.role)
    }
}

impl Plan {
    /// What is done, a sentence a line; `does` is `Will` where it is going to be done, or `Would`.
    pub fn sentences(&self, does: &str) -> Vec<String> {
        let mut lines: Vec<_> = self.images.iter().map(|image| image.sentence(does)).collect();
        if let Some(bytes) = self.bytes_max {
            let room = self.room.map(|room| format!("; {} are free there", fmt_bytes(room)));
            lines.push(format!("{does} write at most {}{}", fmt_bytes(bytes), room.unwrap_or_default()));
        }
        lines
    }
}

/// As a dry run shows it.
impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in self.sentences("Would") {
            writeln!(f, "{line}")?;
        }
        match self.refusals.is_empty() {
            true => writeln!(f, "Nothing speaks against it; nothing was changed"),
            false => writeln!(f, "It would be refused; nothing was changed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_going_to_be_done_is_not_said_as_if_it_were_not() {
        let image = Planned {
            name: "a.img".into(),
            role: "target",
            act: Act::Make,
            format: Some("raw"),
            len: Some(1 << 20),
            locked: false,
            mode: Some(0o644),
        };
        let plan = Plan { images: vec![image], bytes_max: Some(512), ..Plan::default() };
        let real = ["Will make 'a.img' (target, raw, 1 MiB, mode 0644)", "Will write at most 512 B"];
        assert_eq!(plan.sentences("Will"), real);
        let dry = plan.to_string();
        assert!(dry.starts_with("Would make 'a.img'") && dry.ends_with("nothing was changed\n"), "{dry}");
    }
}
