//! Text from elsewhere as people may see it: names in images, what servers say, words of a command line.
//!
//! A terminal obeys control characters: a name that holds some could colour what follows, move the cursor and overwrite what
//! was said, or begin a line that this program never wrote. So they are shown as what they are, in the form of JSON, which
//! makes the same text right in both kinds of output. Characters that only turn the direction of what is shown are treated
//! alike.

use std::borrow::Cow;
use std::fmt::Write;

use super::os_name;

/// What a terminal would obey, or show as something that is not there.
fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, is_kept: fn(char) -> bool) -> Cow<'_, str> {
    // Bytes of names that are no characters have a form of their own.
    let named = os_name::shown(text);
    if !named.contains(|character| is_harmful(character) && !is_kept(character)) {
        return named;
    }
    let text = &*named;
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            harmful if is_harmful(harmful) && !is_kept(harmful) => match harmful {
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                '\r' => out.push_str("\\r"),
                // Writing to a string does not fail.
                other => drop(write!(out, "\\u{:04x}", u32::from(other))),
            },
            other => out.push(other),
        }
    }
    Cow::Owned(out)
}

/// A piece of text within a line: nothing in it ends the line.
pub fn shown(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// Lines that were put together here: their ends stay, and whatever was put into them has been shown before.
pub fn shown_lines(text: &str) -> Cow<'_, str> {
    escape(text, |character| character == '\n')
}

/// One line with its end, or with empty lines around it: what would begin another within it is shown.
pub fn shown_line(text: &str) -> Cow<'_, str> {
    let inner = text.trim_matches('\n');
    match shown(inner) {
        Cow::Borrowed(_) => Cow::Borrowed(text),
        Cow::Owned(clean) => {
            let before = text.len() - text.trim_start_matches('\n').len();
            let after = text.len() - before - inner.len();
            Cow::Owned("\n".repeat(before) + &clean + &"\n".repeat(after))
        }
    }
}

/// An error of the system in its own words, without the number that the standard library puts behind them.
pub fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" (os error ").map_or(text.as_str(), |(words, _)| words).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_system_is_told_in_words() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(plain(&error), "No such file or directory");
        assert_eq!(plain(&std::io::Error::other("it (os error) x")), "it (os error) x");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        let evil = "x\u{1b}[31mred\nblockferry: all is well\r\t\u{9b}\u{7f}\u{202e}ü";
        let clean = "x\\u001b[31mred\\nblockferry: all is well\\r\\t\\u009b\\u007f\\u202eü";
        assert_eq!(shown(evil), clean);
        assert_eq!(shown_line(&format!("\n{evil}\n\n")), format!("\n{clean}\n\n"));
        assert_eq!(shown_lines(&format!("{}\nb\n", shown(evil))), format!("{clean}\nb\n"));
        for plain in ["", "a b", "ü 漢", "\n", "a\n"] {
            assert!(matches!(shown_line(plain), Cow::Borrowed(_)), "{plain:?}");
        }
    }

    /// In JSON the same text means the same characters.
    #[test]
    fn json_stays_json() {
        let value = serde_json::json!({"name": "a\u{9b}\u{7f}\u{2028}\n\u{1b}"});
        for text in [value.to_string(), format!("{value:#}")] {
            let clean = shown_lines(&text);
            assert!(!clean.contains(|c| is_harmful(c) && c != '\n'), "{clean}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&clean).ok(), Some(value.clone()));
        }
    }
}
