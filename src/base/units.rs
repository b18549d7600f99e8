//! Sizes, speeds and times as people write and read them.
//!
//! What comes in is a word from a command line or an option: `200MiB`, `1G`, `1.5T`, `500ms`. Size suffixes are binary,
//! as disk tools have them: `K` is 1024 bytes and `KiB` the same; `KB` is refused, since half its readers mean 1000. All
//! arithmetic is exact on integers, and what cannot be represented is an error that quotes the word: in particular
//! nothing above zero ever becomes 0, because a speed of 0 means unlimited.
//!
//! What goes out is for eyes: three significant digits and a unit, never read back by a program.

/// Digits kept after the decimal point: the last place is below one byte even for `E`.
const FRACTION_DIGITS_MAX: usize = 18;

/// Nanoseconds in a second.
pub const NS_PER_SEC: u64 = 1_000_000_000;

/// Why a word is no size, speed or duration. Each carries the word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Nothing but white space.
    #[error("a {what} is missing")]
    Empty {
        /// `size`, `speed` or `duration`.
        what: &'static str,
    },
    /// A number below zero.
    #[error("'{text}' is negative; a {what} is not")]
    Negative {
        /// The word.
        text: String,
        /// `size`, `speed` or `duration`.
        what: &'static str,
    },
    /// It does not start with a decimal number, or the number has more digits than anything measured.
    #[error("'{text}' is not a {what}: expected a number such as {example}")]
    NotANumber {
        /// The word.
        text: String,
        /// `size`, `speed` or `duration`.
        what: &'static str,
        /// A good word.
        example: &'static str,
    },
    /// Nothing follows the number, and one means this to some and that to others.
    #[error("'{text}' has no unit: say which it is, such as {text}ms or {text}s (there are {expected})")]
    NoUnit {
        /// The word.
        text: String,
        /// The units there are.
        expected: &'static str,
    },
    /// What follows the number is no unit.
    #[error("'{text}' has the unknown unit '{unit}': expected {expected}")]
    UnknownUnit {
        /// The word.
        text: String,
        /// Its end.
        unit: String,
        /// The units there are.
        expected: &'static str,
    },
    /// More than 64 bits hold.
    #[error("'{text}' is too large for a {what}")]
    TooLarge {
        /// The word.
        text: String,
        /// `size`, `speed` or `duration`.
        what: &'static str,
    },
    /// Less than one whole byte or nanosecond.
    #[error("'{text}' is less than one {smallest}")]
    TooSmall {
        /// The word.
        text: String,
        /// `byte` or `nanosecond`.
        smallest: &'static str,
    },
}

/// What a word is parsed as: the names for its errors and the factor of each unit.
struct Quantity {
    what: &'static str,
    example: &'static str,
    smallest: &'static str,
    units: &'static str,
    factor: fn(&str) -> Option<u64>,
}

const SIZE: Quantity = Quantity {
    what: "size",
    example: "200MiB",
    smallest: "byte",
    units: "B, K, M, G, T, P or E, or KiB to EiB (powers of 1024)",
    factor: size_factor,
};
const SPEED: Quantity = Quantity { what: "speed", example: "200MiB/s", ..SIZE };
const DURATION: Quantity = Quantity {
    what: "duration",
    example: "500ms",
    smallest: "nanosecond",
    units: "ns, us, ms, s, m, h or d",
    factor: duration_factor,
};

fn size_factor(unit: &str) -> Option<u64> {
    if matches!(unit, "" | "b" | "B") {
        return Some(1);
    }
    let mut chars = unit.chars();
    let prefix = chars.next()?;
    let power = "kmgtpe".find(prefix.to_ascii_lowercase())? as u32 + 1;
    matches!(chars.as_str(), "" | "iB" | "ib" | "i").then(|| 1 << (10 * power))
}

fn duration_factor(unit: &str) -> Option<u64> {
    Some(match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" | "sec" => NS_PER_SEC,
        "m" | "min" => 60 * NS_PER_SEC,
        "h" => 3600 * NS_PER_SEC,
        "d" => 86_400 * NS_PER_SEC,
        _ => return None,
    })
}

/// A size in bytes: a decimal number, maybe with a fraction, and one of `B K M G T P E` or `KiB` to `EiB` in either case.
/// A fraction is rounded to the nearest whole byte.
///
/// Hexadecimal numbers (`0x10000`) are bytes: letters behind them are digits, not units.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    match text.trim().strip_prefix("0x").or_else(|| text.trim().strip_prefix("0X")) {
        Some(digits) => parse_hex(text.trim(), digits),
        None => parse(text, text.trim(), &SIZE),
    }
}

fn parse_hex(text: &str, digits: &str) -> Result<u64, UnitError> {
    let (what, example) = (SIZE.what, "0x10000");
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(UnitError::NotANumber { text: text.to_owned(), what, example });
    }
    u64::from_str_radix(digits, 16).map_err(|_| UnitError::TooLarge { text: text.to_owned(), what })
}

/// A speed in bytes per second, 0 for no limit: a size, `/s` after it or not, or the word `unlimited`.
pub fn parse_speed(text: &str) -> Result<u64, UnitError> {
    let word = text.trim();
    if word == "unlimited" {
        return Ok(0);
    }
    parse(text, word.strip_suffix("/s").unwrap_or(word), &SPEED)
}

/// A duration in nanoseconds: a decimal number, maybe with a fraction, and one of `ns us ms s m h d`. Only a plain `0`
/// does without a unit: a bare number means seconds to some and milliseconds to others.
pub fn parse_duration(text: &str) -> Result<u64, UnitError> {
    if text.trim() == "0" {
        return Ok(0);
    }
    parse(text, text.trim(), &DURATION)
}

fn parse(text: &str, word: &str, quantity: &Quantity) -> Result<u64, UnitError> {
    let what = quantity.what;
    if word.is_empty() {
        return Err(UnitError::Empty { what });
    }
    let owned = || text.trim().to_owned();
    if word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit() || c == '.')) {
        return Err(UnitError::Negative { text: owned(), what });
    }
    let not_a_number = || UnitError::NotANumber { text: owned(), what, example: quantity.example };
    let number_len = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
    let (number, unit) = word.split_at(number_len);
    let unit = unit.trim_start();
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return Err(not_a_number()),
        None => (number, ""),
    };
    if whole.is_empty() || fraction.contains('.') || fraction.len() > FRACTION_DIGITS_MAX {
        return Err(not_a_number());
    }
    let factor = (quantity.factor)(unit).ok_or_else(|| match unit {
        "" => UnitError::NoUnit { text: owned(), expected: quantity.units },
        unit => UnitError::UnknownUnit { text: owned(), unit: unit.to_owned(), expected: quantity.units },
    })?;
    let too_large = || UnitError::TooLarge { text: owned(), what };
    // Only digits are left, so the one way to fail is to have too many of them.
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let fraction_value: u64 =
        if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| too_large())? };
    let places = 10u128.pow(fraction.len() as u32);
    // 10^18 times a factor of at most 2^60 stays below 2^120.
    let part = (u128::from(fraction_value) * u128::from(factor) * 2 + places) / (2 * places);
    let value = u128::from(whole) * u128::from(factor) + part;
    if value == 0 && (whole != 0 || fraction_value != 0) {
        return Err(UnitError::TooSmall { text: owned(), smallest: quantity.smallest });
    }
    u64::try_from(value).map_err(|_| too_large())
}

/// `value / unit` with three significant digits at most and no trailing zeroes: `1.5`, `12.3`, `200`.
fn three_digits(value: u64, unit: u64) -> String {
    let (value, unit) = (u128::from(value), u128::from(unit));
    let scaled = |scale: u128| (value * scale * 2 + unit) / (2 * unit);
    // In hundredths, of which only as many places stay as three digits leave room for.
    let hundredths = match scaled(100) {
        fine if fine < 1000 => fine,
        _ => match scaled(10) {
            tenths if tenths < 1000 => tenths * 10,
            _ => scaled(1) * 100,
        },
    };
    let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A size for people: `0 B`, `512 B`, `1.5 KiB`, `200 MiB`.
pub fn fmt_bytes(bytes: u64) -> String {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut power = 0;
    // The next unit takes over where rounding would print 1024 of this one.
    while power < 6 && u128::from(bytes) * 2 >= 2047 << (10 * power) && bytes >= 1024 {
        power += 1;
    }
    format!("{} {}", three_digits(bytes, 1 << (10 * power)), NAMES[power])
}

/// A speed for people: `1.5 GiB/s`.
pub fn fmt_rate(bytes_per_sec: u64) -> String {
    format!("{}/s", fmt_bytes(bytes_per_sec))
}

/// A duration for people: `850 ns`, `12.5 ms`, `2.5 s`, then `1m 05s`, `2h 03m`, `3d 04h` with the last place cut off.
pub fn fmt_duration(ns: u64) -> String {
    let secs = ns / NS_PER_SEC;
    match ns {
        0 => "0 s".to_owned(),
        1..1_000 => format!("{ns} ns"),
        // The borders are where three digits would print 1000 of the smaller unit.
        1_000..999_500 => format!("{} us", three_digits(ns, 1_000)),
        999_500..999_500_000 => format!("{} ms", three_digits(ns, 1_000_000)),
        _ if ns < 59_950_000_000 => format!("{} s", three_digits(ns, NS_PER_SEC)),
        _ if secs < 60 => "1m 00s".to_owned(),
        _ if secs < 3600 => format!("{}m {:02}s", secs / 60, secs % 60),
        _ if secs < 86_400 => format!("{}h {:02}m", secs / 3600, secs / 60 % 60),
        _ => format!("{}d {:02}h", secs / 86_400, secs / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_sizes_are_bytes() {
        for (text, bytes) in
            [("0x0", 0), ("0x10000", 65_536), (" 0XfB ", 251), ("0xffffffffffffffff", u64::MAX)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["0x", "0x10000K", "0x1.5", "0x-1", "-0x1", "0x+1", "0x10000000000000000"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_that_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("1k", 1024),
            ("64K", 65536),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("200MiB", 200 << 20),
            ("200 MiB", 200 << 20),
            (" 1G ", 1 << 30),
            ("1.5G", 3 << 29),
            ("1.50G", 3 << 29),
            ("0.1K", 102),
            ("0.5K", 512),
            ("2T", 2 << 40),
            ("3P", 3 << 50),
            ("15E", 15 << 60),
            ("15.999999999999999999E", u64::MAX),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let message = |result: Result<u64, UnitError>| result.expect_err("must be refused").to_string();
        assert_eq!(message(parse_size("  ")), "a size is missing");
        assert_eq!(message(parse_size("-5M")), "'-5M' is negative; a size is not");
        assert_eq!(message(parse_size("-0")), "'-0' is negative; a size is not");
        assert_eq!(message(parse_size("many")), "'many' is not a size: expected a number such as 200MiB");
        assert_eq!(message(parse_size("16E")), "'16E' is too large for a size");
        assert_eq!(
            message(parse_size("18446744073709551616")),
            "'18446744073709551616' is too large for a size"
        );
        assert_eq!(message(parse_size("0.0001K")), "'0.0001K' is less than one byte");
        assert_eq!(
            message(parse_size("5KB")),
            "'5KB' has the unknown unit 'KB': expected B, K, M, G, T, P or E, or KiB to EiB (powers of 1024)"
        );
        assert_eq!(
            message(parse_duration("5")),
            "'5' has no unit: say which it is, such as 5ms or 5s (there are ns, us, ms, s, m, h or d)"
        );
        assert_eq!(message(parse_duration("")), "a duration is missing");
        assert_eq!(message(parse_duration("0.1ns")), "'0.1ns' is less than one nanosecond");
        assert_eq!(message(parse_speed("0.1/s")), "'0.1/s' is less than one byte");
        assert_eq!(message(parse_speed("/s")), "a speed is missing");
        for text in
            [".5G", "5.G", "1.2.3G", "1e3", "+5", "1,5G", "1.0000000000000000000G", "1_000", "½", "5µ"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn speeds_and_durations() {
        assert_eq!(parse_speed("unlimited"), Ok(0));
        assert_eq!(parse_speed("0"), Ok(0));
        assert_eq!(parse_speed("10M/s"), Ok(10 << 20));
        assert_eq!(parse_speed("1.5MiB"), Ok(3 << 19));
        for (text, ns) in [
            ("0", 0),
            ("0s", 0),
            ("7ns", 7),
            ("3us", 3_000),
            ("3µs", 3_000),
            ("500ms", 500_000_000),
            ("2s", 2_000_000_000),
            ("1.5s", 1_500_000_000),
            ("2m", 120_000_000_000),
            ("1h", 3_600_000_000_000),
            ("1d", 86_400_000_000_000),
        ] {
            assert_eq!(parse_duration(text), Ok(ns), "{text}");
        }
    }

    #[test]
    fn human_sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 * 1024 + 51, "10 KiB"),
            (10 * 1024 + 52, "10.1 KiB"),
            (200 << 20, "200 MiB"),
            (1023 << 10, "1023 KiB"),
            ((1 << 20) - 512, "1 MiB"),
            ((1 << 20) - 513, "1023 KiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(fmt_bytes(bytes), text);
        }
        assert_eq!(fmt_rate(3 << 29), "1.5 GiB/s");
    }

    #[test]
    fn human_durations() {
        for (ns, text) in [
            (0, "0 s"),
            (999, "999 ns"),
            (1_000, "1 us"),
            (999_499, "999 us"),
            (999_500, "1 ms"),
            (12_500_000, "12.5 ms"),
            (999_500_000, "1 s"),
            (2_500_000_000, "2.5 s"),
            (59_949_999_999, "59.9 s"),
            (59_950_000_000, "1m 00s"),
            (65_000_000_000, "1m 05s"),
            (7_380_000_000_000, "2h 03m"),
            (273_600_000_000_000, "3d 04h"),
        ] {
            assert_eq!(fmt_duration(ns), text);
        }
    }
}
