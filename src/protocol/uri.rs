//! What the URIs of all protocols have in common: percent-encoding, and hosts with ports.

use std::fmt;

/// Undoes percent-encoding; `None` where a '%' has no two hexadecimal digits behind it. A plus sign is a plus sign.
pub(super) fn unescape(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            plain.push(byte);
            continue;
        }
        let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
        plain.push((high * 16 + low) as u8);
    }
    Some(plain)
}

/// Bytes, percent-encoded except for what may stand for itself in a URI, and these further ones.
pub(super) struct Escaped<'a>(pub(super) &'a [u8], pub(super) &'static [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || self.1.contains(byte) {
                write!(f, "{}", char::from(*byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

/// A host as a URI has it: IPv6 addresses wear brackets.
pub(super) struct Host<'a>(pub(super) &'a str);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.contains(':') {
            true => write!(f, "[{}]", Escaped(self.0.as_bytes(), b":")),
            false => write!(f, "{}", Escaped(self.0.as_bytes(), b"")),
        }
    }
}

/// Splits `HOST[:PORT]`, where an IPv6 host wears brackets, which are taken off. An empty port is none, as RFC 3986
/// has it. `None`: the brackets or colons make no sense.
pub(super) fn host_and_port(server: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = match server.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return None,
            }
        }
        None => server.split_once(':').map_or((server, None), |(host, port)| (host, Some(port))),
    };
    if port.is_some_and(|port| port.contains(':')) {
        return None;
    }
    Some((host, port.filter(|port| !port.is_empty())))
}

/// A port, in digits and nothing else.
pub(super) fn port_number(port: &str) -> Option<u16> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse::<u16>().ok().filter(|_| digits)
}
