//! What nbdkit's log filter wrote down: requests as they came, and when they ended.

/// A write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub at: u64,
    pub len: u64,
}

fn number(line: &str, name: &str) -> Option<u64> {
    let at = line.find(name).map(|at| at + name.len())?;
    let digits: String = line[at..].chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).ok()
}

/// The writes, in the order in which they came.
pub fn writes(log: &str) -> Vec<Entry> {
    let text = std::fs::read_to_string(log).unwrap();
    let begun = text.lines().filter(|line| line.contains(" Write ") && !line.contains("return"));
    begun
        .map(|line| match (number(line, "offset=0x"), number(line, "count=0x")) {
            (Some(at), Some(len)) => Entry { at, len },
            _ => panic!("a strange line: {line}"),
        })
        .collect()
}

/// Most writes that were under way at once.
pub fn most_at_once(log: &str) -> usize {
    let text = std::fs::read_to_string(log).unwrap();
    let (mut now, mut most) = (0usize, 0);
    for line in text.lines() {
        if line.contains("...Write ") && line.contains("return") {
            now = now.saturating_sub(1);
        } else if line.contains(" Write ") {
            now += 1;
            most = most.max(now);
        }
    }
    most
}

/// Questions about holes.
pub fn questions(log: &str) -> usize {
    let text = std::fs::read_to_string(log).unwrap();
    text.lines().filter(|line| line.contains(" Extents ")).count()
}
