//! The one place that cuts bytes into fields and glues fields into bytes.
//!
//! `Reader` walks over bytes that a peer sent: it never panics, it says which structure ended too early. `Head` is the
//! opposite for the transmission phase: a header of at most 48 bytes that lives on the stack, so that a reply costs no
//! allocation and its payload can be sent from wherever it lies.

use super::constants::STRING_BYTES_MAX;
use super::error::ProtocolError;
use std::ops::Deref;

/// Reads big-endian fields from the front of a byte slice.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` as the structure `what`.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (head, rest) =
            self.rest.split_first_chunk().ok_or(ProtocolError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], ProtocolError> {
        let (head, rest) =
            self.rest.split_at_checked(count).ok_or(ProtocolError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    /// A string of `count` bytes, under the protocol's rules for strings.
    pub(super) fn text(&mut self, what: &'static str, count: u32) -> Result<&'a str, ProtocolError> {
        let count = usize::try_from(count).map_err(|_| ProtocolError::Truncated { what: self.what })?;
        text(what, self.bytes(count)?)
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), ProtocolError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(ProtocolError::TrailingBytes { what: self.what, extra }),
        }
    }
}

/// Checks the protocol's rules for strings: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn text<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, ProtocolError> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err(ProtocolError::StringTooLong { what, bytes: bytes.len() });
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(ProtocolError::NotText { what }),
    }
}

/// Shortens `text` to `bytes_max`, between characters.
pub(super) fn clip(text: &str, bytes_max: usize) -> &str {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A peer's words, made safe for a terminal and a log: bounded, UTF-8, no control characters.
pub(super) fn printable(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(STRING_BYTES_MAX)];
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

const HEAD_BYTES_MAX: usize = 48;

/// A header, ready to be sent. Dereferences to its bytes.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: u8,
}

impl Head {
    pub(super) fn new() -> Self {
        Self { bytes: [0; HEAD_BYTES_MAX], len: 0 }
    }

    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        // The longest header is 44 bytes (an extended OFFSET_HOLE chunk); no peer has a say in it.
        let at = usize::from(self.len);
        self.bytes[at..at + N].copy_from_slice(&field);
        self.len += N as u8;
        self
    }

    pub(super) fn u16(self, value: u16) -> Self {
        self.put(value.to_be_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.put(value.to_be_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.put(value.to_be_bytes())
    }
}

impl Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Head").field(&&**self).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_stops_at_the_end_and_says_where() {
        let mut reader = Reader::new("thing", &[0, 1, 0, 0, 0, 2, 9]);
        assert_eq!(reader.u16(), Ok(1));
        assert_eq!(reader.u32(), Ok(2));
        assert_eq!(reader.clone().end(), Err(ProtocolError::TrailingBytes { what: "thing", extra: 1 }));
        assert_eq!(reader.u64(), Err(ProtocolError::Truncated { what: "thing" }));
        assert_eq!(reader.bytes(usize::MAX), Err(ProtocolError::Truncated { what: "thing" }));
        assert_eq!(reader.text("name", u32::MAX), Err(ProtocolError::Truncated { what: "thing" }));
        assert_eq!(reader.rest(), &[9]);
        assert_eq!(reader.end(), Ok(()));
    }

    #[test]
    fn strings_follow_the_rules() {
        assert_eq!(text("name", "größe".as_bytes()), Ok("größe"));
        assert_eq!(text("name", b"a\0b"), Err(ProtocolError::NotText { what: "name" }));
        assert_eq!(text("name", &[0xff]), Err(ProtocolError::NotText { what: "name" }));
        assert!(text("name", &[b'a'; 4096]).is_ok());
        assert_eq!(
            text("name", &[b'a'; 4097]),
            Err(ProtocolError::StringTooLong { what: "name", bytes: 4097 })
        );
        assert_eq!(clip("aé", 2), "a");
        assert_eq!(clip("aé", 3), "aé");
        assert_eq!(printable(b"\x1b[31mno\xff\n"), "[31mno\u{fffd}");
        assert_eq!(printable(&[b'x'; 9000]).len(), 4096);
    }

    #[test]
    fn a_head_is_its_fields_in_order() {
        let head = Head::new().u16(1).u32(2).u64(3);
        assert_eq!(&*head, &[0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
    }
}
