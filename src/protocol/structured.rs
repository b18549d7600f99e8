//! Disks as QEMU's programs have them described: options by name instead of a URI.
//!
//! - `json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"}}`: objects in objects and lists, or flat names with
//!   dots; the members of a list are numbered (`server.0.type`).
//! - `driver=nbd,server.type=unix,server.path=/s`: what `-blockdev` and `--image-opts` take; a comma in a value is written
//!   twice.
//!
//! Here the text becomes a flat list; each driver's own module takes out of it what it knows.

use serde_json::{Map, Value};

use crate::base::units::parse_size;

/// Options that say how a disk is used and not which it is, or that make no difference here, whatever the driver.
const IGNORED: [&str; 7] = [
    "node-name",
    "auto-read-only",
    "force-share",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
];

/// Whether a name is of these forms.
pub fn is_structured(name: &str) -> bool {
    name.starts_with("json:") || name.starts_with("driver=")
}

/// Options by their flat names, each once.
#[derive(Clone, Debug)]
pub struct Options {
    left: Vec<(String, String)>,
}

impl Options {
    /// Parses either form.
    pub fn parse(name: &str) -> Result<Options, String> {
        let left = match name.strip_prefix("json:") {
            Some(text) => flatten(text)?,
            None => split(name)?,
        };
        Options::each_once(left)
    }

    /// Parses a list of options, whichever comes first.
    pub fn parse_list(text: &str) -> Result<Options, String> {
        Options::each_once(split(text)?)
    }

    fn each_once(left: Vec<(String, String)>) -> Result<Options, String> {
        for (at, (name, _)) in left.iter().enumerate() {
            if left[..at].iter().any(|(other, _)| other == name) {
                return Err(format!("The option '{name}' is said twice."));
            }
        }
        Ok(Options { left })
    }

    /// The value of the first of these names that is there; it is gone then.
    pub fn take(&mut self, names: &[&str]) -> Option<String> {
        let at = self.left.iter().position(|(name, _)| names.contains(&name.as_str()))?;
        Some(self.left.swap_remove(at).1)
    }

    /// The value of an option, which stays there.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.left.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// The driver that is named.
    pub fn take_driver(&mut self) -> Result<String, String> {
        self.take(&["driver"]).ok_or_else(|| "The option 'driver' is missing.".into())
    }

    /// A format over a disk, as in `driver=qcow2,file.driver=nbd,file.server.type=...`: the format, and the options of the
    /// disk. `None`: these options are a disk's own.
    pub fn take_format(&mut self) -> Option<String> {
        if !self.has("file") {
            return None;
        }
        let format = self.take(&["driver"]).unwrap_or_default();
        for (name, _) in &mut self.left {
            if let Some(inner) = name.strip_prefix("file.") {
                *name = inner.to_owned();
            }
        }
        Some(format)
    }

    /// Takes a number.
    pub fn take_number(&mut self, name: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.take(&[name]) else { return Ok(None) };
        let number =
            value.parse::<u32>().map_err(|_| format!("The option '{name}' is a number, not '{value}'."))?;
        Ok(Some(number.into()))
    }

    /// Takes a number of bytes.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.take(&[name]) else { return Ok(None) };
        let size = parse_size(&value);
        size.map(Some).map_err(|error| format!("The option '{name}' is a size: {error}."))
    }

    /// Takes a switch.
    pub fn take_switch(&mut self, name: &str) -> Result<Option<bool>, String> {
        match self.take(&[name]).as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes") => Ok(Some(true)),
            Some("off" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(format!("The option '{name}' is on or off, not '{other}'.")),
        }
    }

    /// Whether an option of this name, or one below it, is left.
    pub fn has(&self, prefix: &str) -> bool {
        let below = |name: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'));
        self.left.iter().any(|(name, _)| name == prefix || below(name))
    }

    /// Options that nobody took, refused by name unless they make no difference; `ignored` adds to these.
    pub fn finish(&self, ignored: &[&str], why: impl Fn(&str) -> &'static str) -> Result<(), String> {
        let known = |name: &str| IGNORED.contains(&name) || ignored.contains(&name);
        match self.left.iter().find(|(name, _)| !known(name)) {
            Some((name, _)) => Err(format!("The option '{name}' cannot be honoured: {}.", why(name))),
            None => Ok(()),
        }
    }
}

/// Parses JSON as QEMU's programs take it: strings may be in single quotes, too.
pub fn parse_json(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(&in_double_quotes(text))
}

/// Single quotes around strings become double ones. What is no JSON stays none.
fn in_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(open), c) if c == open => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                Some(next) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            (_, c) => out.push(c),
        }
    }
    out
}

fn flatten(text: &str) -> Result<Vec<(String, String)>, String> {
    let value: Value =
        parse_json(text).map_err(|error| format!("What follows `json:` is no JSON: {error}."))?;
    let Value::Object(object) = value else { return Err("What follows `json:` is no JSON object.".into()) };
    let mut flat = Vec::new();
    add_object("", object, &mut flat);
    Ok(flat)
}

fn add_object(prefix: &str, object: Map<String, Value>, flat: &mut Vec<(String, String)>) {
    for (key, value) in object {
        let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        add(name, value, flat);
    }
}

fn add(name: String, value: Value, flat: &mut Vec<(String, String)>) {
    match value {
        Value::Object(inner) => add_object(&name, inner, flat),
        Value::Array(list) => {
            for (index, value) in list.into_iter().enumerate() {
                add(format!("{name}.{index}"), value, flat);
            }
        }
        Value::String(text) => flat.push((name, text)),
        Value::Number(number) => flat.push((name, number.to_string())),
        Value::Bool(true) => flat.push((name, "on".into())),
        Value::Bool(false) => flat.push((name, "off".into())),
        // Says that there is to be no backing file: not nothing.
        Value::Null if name == "backing" => flat.push((name, "null".into())),
        Value::Null => {}
    }
}

fn split(text: &str) -> Result<Vec<(String, String)>, String> {
    // A comma that is written twice belongs to the value.
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, parts.last_mut()) {
            (',', Some(last)) if rest.peek() == Some(&',') => {
                rest.next();
                last.push(',');
            }
            (',', _) => parts.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    let pair = |part: &String| match part.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(format!("'{part}' is no option: write NAME=VALUE.")),
    };
    parts.iter().filter(|part| !part.is_empty()).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_over_a_disk_is_told_from_a_disk() {
        for text in [
            r#"json:{"driver":"qcow2","file":{"driver":"gluster","server":[{"type":"unix"}]}}"#,
            "driver=qcow2,file.driver=gluster,file.server.0.type=unix",
        ] {
            let mut options = Options::parse(text).unwrap();
            assert_eq!(options.take_format().as_deref(), Some("qcow2"), "{text}");
            assert_eq!(options.take_driver().as_deref(), Ok("gluster"));
            assert!(options.has("server.0") && options.has("server") && !options.has("server.1"));
            assert_eq!(options.take(&["server.0.type"]).as_deref(), Some("unix"));
            assert_eq!(options.finish(&[], |_| "no"), Ok(()));
        }
        let mut plain = Options::parse("driver=nbd,path=/s,more=1").unwrap();
        assert_eq!(plain.take_format(), None);
        let _ = (plain.take_driver(), plain.take(&["path"]));
        let refused = plain.finish(&[], |_| "it is not known").unwrap_err();
        assert_eq!(refused, "The option 'more' cannot be honoured: it is not known.");
    }

    #[test]
    fn what_is_no_list_of_options_is_refused() {
        for (text, word) in [
            ("json:[]", "object"),
            ("json:{", "JSON"),
            ("driver=nbd,host=h,host=i", "twice"),
            (r#"json:{"driver":"nbd","a.b":"1","a":{"b":"2"}}"#, "twice"),
            ("driver=nbd,nonsense", "nonsense"),
        ] {
            assert!(Options::parse(text).unwrap_err().contains(word), "{text}");
        }
    }
}
