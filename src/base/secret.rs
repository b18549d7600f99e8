//! Passwords in names and messages: what people read, and logs keep, must not repeat them.
//!
//! Names of disks may hold passwords, whichever driver they are for: `scheme://user:password@host`, `user%password@` as iSCSI
//! has it, parameters and options (`?password=`, `,password=`, Ceph's `:key=`), JSON (`"password": "..."`). They come in
//! from the command line, and as backing files from images that others made. Names are passed on whole and made harmless
//! where they become text for people: in errors, log lines, and what commands print.

use std::borrow::Cow;

/// What stands in the place of a password.
const HIDDEN: &str = "***";

/// Names of parameters, options and JSON members whose values are secret, in lower case.
const SECRET: [&str; 14] = [
    "password",
    "passwd",
    "passphrase",
    "pass",
    "pwd",
    "secret",
    "token",
    "access_token",
    "key",
    "apikey",
    "psk",
    "sig",
    "signature",
    "proxy-password",
];

/// Schemes whose older names have no slashes: `nbd:HOST:PORT`.
const WITHOUT_SLASHES: [&str; 8] = ["nbd", "nbds", "gluster", "iscsi", "rbd", "sheepdog", "ssh", "fat"];

/// `text` with its passwords hidden. Text without any comes back as it is.
pub fn without_secrets(text: &str) -> Cow<'_, str> {
    if !text.contains(['@', '=', ':']) {
        return Cow::Borrowed(text);
    }
    let mut hidden: Vec<(usize, usize)> = Vec::new();
    user_infos(text, &mut hidden);
    parameters(text, &mut hidden);
    members(text, &mut hidden);
    if hidden.is_empty() {
        return Cow::Borrowed(text);
    }
    hidden.sort_unstable();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    for (from, to) in hidden {
        if from >= at {
            out.push_str(&text[at..from]);
            out.push_str(HIDDEN);
        }
        at = at.max(to);
    }
    out.push_str(&text[at..]);
    Cow::Owned(out)
}

/// Whether a character ends a name within a text.
fn ends_name(character: char) -> bool {
    character.is_whitespace() || matches!(character, '"' | '\'' | '\\' | '<' | '>')
}

/// Where the name that begins at `from` ends.
fn end_of_name(text: &str, from: usize) -> usize {
    text[from..].find(ends_name).map_or(text.len(), |at| from + at)
}

/// Where the word that ends at `end` begins, if it is the scheme of a URI.
fn scheme_before(text: &str, end: usize) -> Option<usize> {
    let is_part = |character: char| character.is_ascii_alphanumeric() || matches!(character, '+' | '-' | '.');
    let word = &text[..end];
    let start = word.trim_end_matches(is_part).len();
    word[start..].starts_with(|first: char| first.is_ascii_alphabetic()).then_some(start)
}

/// Passwords before the `@` of a URI.
fn user_infos(text: &str, hidden: &mut Vec<(usize, usize)>) {
    for (colon, _) in text.match_indices(':') {
        let Some(scheme) = scheme_before(text, colon) else { continue };
        let slashes = text[colon..].starts_with("://");
        let word = text[scheme..colon].to_ascii_lowercase();
        let is_old = WITHOUT_SLASHES.contains(&word.split('+').next().unwrap_or_default());
        if !slashes && !is_old {
            continue;
        }
        let from = colon + if slashes { 3 } else { 1 };
        let name = &text[from..end_of_name(text, from)];
        let authority = &name[..name.find(['/', '?', '#']).unwrap_or(name.len())];
        let authority =
            if slashes { authority } else { authority.split(":exportname=").next().unwrap_or_default() };
        // The user's part ends with the last '@' of the authority. An authority that is none because the password has a
        // '/' in it is told from a host by what should be its port.
        let end = authority.rfind('@').or_else(|| {
            let (_, port) = authority.rsplit_once(':')?;
            let is_port = port.bytes().all(|byte| byte.is_ascii_digit()) || authority.starts_with('[');
            if is_port || !slashes { None } else { name.rfind('@') }
        });
        let Some(end) = end else { continue };
        if let Some(at) = name[..end].find([':', '%']) {
            hidden.push((from + at + 1, from + end));
        }
    }
}

/// Values of secret parameters and options: `?password=x`, `,key=x`, `:key=x`.
fn parameters(text: &str, hidden: &mut Vec<(usize, usize)>) {
    for (equals, _) in text.match_indices('=') {
        let is_part = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_');
        let key = text[..equals].trim_end_matches(is_part).len();
        let before = text[..key].chars().next_back();
        let is_option = before.is_some_and(|before| matches!(before, '?' | '&' | ',' | ';' | ':' | '.'));
        if !is_option || !SECRET.contains(&text[key..equals].to_ascii_lowercase().as_str()) {
            continue;
        }
        let from = equals + 1;
        let rest = &text[from..end_of_name(text, from)];
        // In options a comma that belongs to the value is doubled.
        let mut end = rest.len();
        let mut characters = rest.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            if character == ',' && characters.next_if(|(_, next)| *next == ',').is_some() {
                continue;
            }
            if matches!(character, '&' | ',' | ';') || (character == ':' && before == Some(':')) {
                end = at;
                break;
            }
        }
        if end > 0 {
            hidden.push((from, from + end));
        }
    }
}

/// Values of secret members of JSON, in text that may be a JSON string itself (`\"password\": \"x\"`).
fn members(text: &str, hidden: &mut Vec<(usize, usize)>) {
    for (quote, _) in text.match_indices('"') {
        let depth = text[..quote].bytes().rev().take_while(|byte| *byte == b'\\').count();
        let fence = &text[quote - depth..=quote];
        let Some(end) = text[quote + 1..].find(fence).map(|at| quote + 1 + at) else { continue };
        let key = text[quote + 1..end].to_ascii_lowercase();
        if !SECRET.contains(&key.rsplit('.').next().unwrap_or_default()) {
            continue;
        }
        let rest = &text[end + fence.len()..];
        let Some(value) = rest.trim_start().strip_prefix(':').map(str::trim_start) else { continue };
        let Some(value) = value.strip_prefix(fence) else { continue };
        let from = text.len() - value.len();
        // Up to the quote that is escaped as often as the one at the front.
        let mut quotes = value.match_indices('"').map(|(at, _)| at);
        let end =
            quotes.find(|at| value[..*at].bytes().rev().take_while(|byte| *byte == b'\\').count() == depth);
        let end = end.map_or(value.len(), |at| at - depth);
        if end > 0 {
            hidden.push((from, from + end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_hidden_wherever_names_have_them() {
        for (text, shown) in [
            ("nbd://user:sesame@127.0.0.1:1/x", "nbd://user:***@127.0.0.1:1/x"),
            ("NBD+tcp://user:sesame@[::1]:1/x", "NBD+tcp://user:***@[::1]:1/x"),
            ("https://me:a@b:c@host/x", "https://me:***@host/x"),
            ("https://me:se/same@host/x", "https://me:***@host/x"),
            ("https://:sesame@host/x", "https://:***@host/x"),
            ("iscsi://me%sesame@host/iqn/0", "iscsi://me%***@host/iqn/0"),
            ("nbd:user:sesame@host:10809", "nbd:user:***@host:10809"),
            ("'ssh://u:sesame@h/p' failed: no", "'ssh://u:***@h/p' failed: no"),
            ("rbd:pool/image:id=me:key=AQ==:auth=x", "rbd:pool/image:id=me:key=***:auth=x"),
            ("https://h/x?password=sesame&y=1", "https://h/x?password=***&y=1"),
            ("https://h/x?y=1&TOKEN=sesame", "https://h/x?y=1&TOKEN=***"),
            ("driver=ssh,server.password=se,,same,path=/x", "driver=ssh,server.password=***,path=/x"),
            (
                r#"json:{"driver":"x","password":"se\"same","b":1}"#,
                r#"json:{"driver":"x","password":"***","b":1}"#,
            ),
            (
                r#"{"a":"json:{\"proxy-password\": \"sesame\"}"}"#,
                r#"{"a":"json:{\"proxy-password\": \"***\"}"}"#,
            ),
            (r#"{"url":"https://u:sesame@h/"}"#, r#"{"url":"https://u:***@h/"}"#),
            ("a nbd://u:sesame@h/ and b ftp://v:open@i/", "a nbd://u:***@h/ and b ftp://v:***@i/"),
        ] {
            assert_eq!(without_secrets(text), shown);
            assert_eq!(without_secrets(shown), shown, "again");
        }
    }

    #[test]
    fn other_text_stays_as_it_is() {
        for text in [
            "",
            "/vm/disk.qcow2",
            "/a:b@c/d",
            "nbd://host:10809/a@b",
            "nbd://[::1]:1/x@y",
            "nbd://user@host/x",
            "nbd:host:10809:exportname=a@b",
            "nbd+unix:///x?socket=/run/a:b@c",
            "gluster://host/volume/a@b:c",
            "The image 'x' failed: key=value",
            "password=sesame.img",
            r#"{"key-secret": "sec0", "keys": "x"}"#,
            "grüße: ß@ü=:\"",
        ] {
            assert!(matches!(without_secrets(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn any_text_is_taken() {
        let pieces =
            ["\"", "\\", ":", "//", "@", "=", "password", "key", ",", "ä", " ", "?", "nbd", "%", "'"];
        let mut rng = crate::base::rng::Rng::new(1);
        for _ in 0..20_000 {
            let text: String =
                (0..rng.below(14)).map(|_| pieces[rng.below(pieces.len() as u64) as usize]).collect();
            let shown = without_secrets(&text).into_owned();
            assert!(shown.len() <= text.len() + 3 * text.len(), "{text}: {shown}");
        }
    }
}
