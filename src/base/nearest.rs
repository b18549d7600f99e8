//! The word that somebody may have meant: for messages about names that are not known.

/// The known word that is nearest to `word`, if it is near enough to be worth a question.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', ' '], "");
    let wanted = plain(word);
    let best = known.into_iter().map(|known| (distance(&wanted, &plain(known)), known)).min()?;
    (best.0 <= wanted.len().max(3) / 3).then_some(best.1)
}

/// How many letters have to be put in, left out or changed.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut before = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, to) in b.iter().enumerate() {
            let changed = before + usize::from(from != *to);
            before = row[j + 1];
            row[j + 1] = changed.min(before + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_is_found_and_what_is_not_is_not() {
        let known = ["cluster_size", "backing_file", "backing_fmt", "compat", "size"];
        for (word, wanted) in [
            ("clustersize", Some("cluster_size")),
            ("cluster-size", Some("cluster_size")),
            ("backing_format", Some("backing_fmt")),
            ("Size", Some("size")),
            ("compta", Some("compat")),
            ("nocow", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), wanted, "{word}");
        }
        assert_eq!((distance("", "abc"), distance("abc", ""), distance("kitten", "sitting")), (3, 3, 3));
    }
}
