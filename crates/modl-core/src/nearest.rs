//! The known name that is most like a mistyped one.

/// The candidate nearest to `name`, or `None` where none is near enough to be meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::normalized_damerau_levenshtein(name, c), c))
        .filter(|(likeness, _)| *likeness >= 0.4)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_word_and_noise_finds_none() {
        assert_eq!(nearest("qurey", ["key", "query", "value"]), Some("query"));
        assert_eq!(nearest("zzzzzz", ["key", "query", "value"]), None);
    }
}
