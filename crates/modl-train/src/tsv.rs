//! Tab-separated examples: `id`, `score`, `text`, one a line, without a header.

use std::path::Path;

use modl_core::{Error, Result};

/// A line of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The first column.
    pub id: String,
    /// The second column.
    pub score: f32,
    /// The rest of the line.
    pub text: String,
}

/// Reads the first `limit` lines of a file, or all of them. Empty lines are passed over.
///
/// # Errors
/// With file and line where a column is missing or a score is not a finite number.
pub fn read_tsv(path: impl AsRef<Path>, limit: Option<usize>) -> Result<Vec<Row>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let row = |(n, line): (usize, &str)| {
        let wrong = |what: &str| {
            let place = format!("{}:{}", path.display(), n + 1);
            Error::invalid(place, format!("{what}; a line is `id<TAB>score<TAB>text`"))
        };
        let mut columns = line.splitn(3, '\t');
        let (id, score, text) = match (columns.next(), columns.next(), columns.next()) {
            (Some(id), Some(score), Some(text)) => (id, score, text),
            _ => return Err(wrong("has fewer than three columns")),
        };
        let score = score.trim().parse::<f32>().ok().filter(|s| s.is_finite());
        let score = score.ok_or_else(|| wrong("its score is not a number"))?;
        Ok(Row { id: id.to_owned(), score, text: text.to_owned() })
    };
    lines.take(limit.unwrap_or(usize::MAX)).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tsv");
        std::fs::write(&path, "1\t-0.5\ta\tb\n\n2\tnan\tc\n").unwrap();
        let first = read_tsv(&path, Some(1)).unwrap();
        assert_eq!(first, [Row { id: "1".into(), score: -0.5, text: "a\tb".into() }]);
        let e = read_tsv(&path, None).unwrap_err().to_string();
        assert!(e.contains("x.tsv:3: its score"), "{e}");
        std::fs::write(&path, "1\t2\n").unwrap();
        assert!(read_tsv(&path, None).unwrap_err().to_string().contains("x.tsv:1"));
    }

    #[test]
    #[ignore = "needs: cargo xtask assets"]
    fn the_sentiment_files_are_read_whole() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/sentiment");
        for task in ["amazon", "movies", "nyt", "tweets"] {
            let path = format!("{folder}/{task}.tsv");
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            let rows = read_tsv(&path, None).unwrap();
            assert_eq!(rows.len(), lines, "{task}");
            assert!(rows.iter().all(|r| r.score.abs() <= 4.0 && !r.text.is_empty()), "{task}");
        }
    }
}
