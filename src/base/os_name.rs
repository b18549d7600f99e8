//! Names of files as text.
//!
//! To the kernel a name is bytes, mostly UTF-8 and sometimes not (an old archive, another country's machine). Here names
//! are text all the same: they stand in messages, in JSON and beside URIs. So a byte that is not UTF-8 is written as NUL and
//! two hexadecimal digits. No name of a file has a NUL in it, so nothing else is ever written like that, and the bytes are
//! got back exactly. What an image records may have any bytes; a NUL there is written in the same way.
//!
//! Where text is turned into a path or the reverse, it is done by these functions. People are shown [`shown`].

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Stands before two digits. Nothing that the kernel takes for a name has it.
const MARK: char = '\0';

/// The name that these bytes are.
pub fn from_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let add = |byte: u8, text: &mut String| {
        // Writing into a string does not fail.
        let _ = write!(text, "{MARK}{byte:02x}");
    };
    for chunk in bytes.utf8_chunks() {
        for (n, part) in chunk.valid().split(MARK).enumerate() {
            if n > 0 {
                add(0, &mut text);
            }
            text.push_str(part);
        }
        chunk.invalid().iter().for_each(|byte| add(*byte, &mut text));
    }
    text
}

/// The name that this path is.
pub fn from_path(path: impl AsRef<Path>) -> String {
    from_bytes(path.as_ref().as_os_str().as_bytes())
}

/// The bytes of a name.
pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.contains(MARK) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for (n, part) in text.split(MARK).enumerate() {
        let rest = match escaped(part).filter(|_| n > 0) {
            Some((byte, rest)) => {
                bytes.push(byte);
                rest
            }
            None => {
                bytes.extend((n > 0).then_some(0));
                part
            }
        };
        bytes.extend(rest.as_bytes());
    }
    Cow::Owned(bytes)
}

/// The path that a name is.
pub fn to_path(text: &str) -> PathBuf {
    match to_bytes(text) {
        Cow::Borrowed(_) => PathBuf::from(text),
        Cow::Owned(bytes) => PathBuf::from(OsString::from_vec(bytes)),
    }
}

/// A word of the command line as text.
pub fn from_word(word: &OsStr) -> OsString {
    OsString::from(from_bytes(word.as_bytes()))
}

/// How JSON writes [`MARK`], and what stands there instead for a byte that is shown.
const IN_JSON: (&str, &str) = ("\\u0000", "\\\\x");

/// A name, or text or JSON with names in it, for people and programs: `\xff` for a byte that is not UTF-8.
pub fn shown(text: &str) -> Cow<'_, str> {
    if text.contains(IN_JSON.0) {
        return Cow::Owned(shown_in_json(text));
    }
    if !text.contains(MARK) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for (n, part) in text.split(MARK).enumerate() {
        match escaped(part).filter(|_| n > 0) {
            Some((byte, rest)) => {
                let _ = write!(out, "\\x{byte:02x}{rest}");
            }
            None if n > 0 => {
                out.push_str("\\x00");
                out.push_str(part);
            }
            None => out.push_str(part),
        }
    }
    Cow::Owned(out)
}

/// The same in JSON, where a backslash before it makes it a name that looks like it.
fn shown_in_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for (n, part) in text.split(IN_JSON.0).enumerate() {
        if n > 0 {
            let backslashes = out.bytes().rev().take_while(|byte| *byte == b'\\').count();
            out.push_str(if backslashes % 2 == 0 { IN_JSON.1 } else { IN_JSON.0 });
        }
        out.push_str(part);
    }
    out
}

/// The byte that two digits at the beginning are, and what follows.
fn escaped(part: &str) -> Option<(u8, &str)> {
    let (digits, rest) = part.split_at_checked(2)?;
    let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    Some((u8::from_str_radix(digits, 16).ok().filter(|_| is_hex)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn bytes_come_back_as_they_were() {
        let mut rng = Rng::new(7);
        for _ in 0..2000 {
            let len = rng.below(12) as usize;
            let bytes: Vec<u8> = (0..len)
                .map(|_| match rng.below(3) {
                    0 => b"0af/\0\xc3\xa4\xff"[rng.below(8) as usize],
                    1 => rng.below(256) as u8,
                    _ => b'x',
                })
                .collect();
            let text = from_bytes(&bytes);
            assert_eq!(&*to_bytes(&text), bytes, "{text:?}");
            assert!(!shown(&text).contains('\0'), "{text:?}");
        }
    }

    #[test]
    fn ordinary_names_are_themselves() {
        for name in ["a.img", "ü/日本", "x\\xff", "a b"] {
            assert_eq!((from_path(name), &*shown(name), to_path(name)), (name.into(), name, name.into()));
        }
        let odd = from_bytes(b"x\xff.img");
        assert_eq!((&*odd, &*shown(&odd)), ("x\0ff.img", "x\\xff.img"));
        for name in [&*odd, "\\u0000ff", "\\\\u0000", "\0zz"] {
            let json = shown(&serde_json::to_string(name).unwrap()).into_owned();
            let read: String = serde_json::from_str(&json).unwrap();
            assert_eq!(read, if name.contains('\0') { name.replace('\0', "\\x") } else { name.into() });
        }
        assert_eq!(to_path(&odd).as_os_str().as_bytes(), b"x\xff.img");
        // What is no name of a file is left as it is.
        assert_eq!((&*to_bytes("a\0"), &*to_bytes("\0zz")), (&b"a\0"[..], &b"\0zz"[..]));
    }
}
