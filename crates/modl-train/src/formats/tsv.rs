//! Tab-separated examples: `id`, `score` (or a class, or a prompt), `text`, one a line, without a
//! header.

use std::path::Path;

use modl_core::Result;

use super::numbers::finite;
use super::packed::Unpacked;
use super::{Form, Line, Take, Wanted, chosen};

/// A line of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row<T = f32> {
    /// The first column.
    pub id: String,
    /// The second column.
    pub score: T,
    /// The rest of the line.
    pub text: String,
}

/// Reads a file. Empty lines are passed over.
///
/// # Errors
/// With file and line where a column is missing or a score is not a finite number.
pub fn read_tsv(path: impl AsRef<Path>) -> Result<Vec<Row>> {
    let wanted = Wanted { columns: &Default::default(), label: "score", optional: false };
    let mut rows = Vec::new();
    read(path.as_ref(), wanted, &mut |form, line, _| {
        let wrong = || form.wrong(&line, "its score is not a number");
        let score = finite(&line.label).ok_or_else(wrong)?;
        rows.push(Row { id: line.id, score, text: line.text });
        Ok(())
    })?;
    Ok(rows)
}

/// Hands out the lines of a file whose second column is what is right.
pub(super) fn read(path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    let form = Form::new(path, format!("a line is `id<TAB>{}<TAB>text`", wanted.label));
    Unpacked::open(path)?.lines(|number, line| {
        let mut columns = line.splitn(3, '\t').map(str::to_owned);
        let (Some(id), Some(label), Some(text)) = (columns.next(), columns.next(), columns.next())
        else {
            return Err(form.wrong_at(number, "has fewer than three columns"));
        };
        take(&form, Line { number, id, label, text }, None)
    })
}

/// `n` of the rows, chosen by seed and id and left in their order; all where there are no more. The
/// first ones of a file would be no fair choice: many files are sorted.
pub fn sample<T>(rows: Vec<Row<T>>, n: usize, seed: u64) -> Vec<Row<T>> {
    let chosen = chosen(rows.iter().map(|row| row.id.as_str()), n, seed);
    rows.into_iter().enumerate().filter(|(i, _)| chosen.contains(i)).map(|(_, r)| r).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tsv");
        std::fs::write(&path, "1\t-0.5\ta\tb\n\n2\tnan\tc\n").unwrap();
        let e = read_tsv(&path).unwrap_err().to_string();
        assert!(e.contains("x.tsv:3: its score"), "{e}");
        std::fs::write(&path, "1\t-0.5\ta\tb\n").unwrap();
        let row = Row { id: "1".into(), score: -0.5, text: "a\tb".into() };
        assert_eq!(read_tsv(&path).unwrap(), [row]);
        std::fs::write(&path, "1\t2\n").unwrap();
        assert!(read_tsv(&path).unwrap_err().to_string().contains("x.tsv:1"));
    }

    #[test]
    fn a_sample_is_of_that_size_in_order_and_by_seed() {
        let row = |i: usize| Row { id: i.to_string(), score: i as f32, text: String::new() };
        let all: Vec<Row> = (0..1000).map(row).collect();
        let chosen = sample(all.clone(), 400, 7);
        assert_eq!(chosen.len(), 400);
        assert!(chosen.is_sorted_by_key(|r| r.score));
        // As many from either half, within four standard deviations of a hypergeometric draw.
        let first = chosen.iter().filter(|r| r.score < 500.0).count();
        assert!((169..=231).contains(&first), "{first}");
        assert_eq!(chosen, sample(all.clone(), 400, 7));
        assert_ne!(chosen, sample(all.clone(), 400, 8));
        assert_eq!(sample(all.clone(), 1000, 7), all);
    }

    #[test]
    #[ignore = "needs: cargo xtask assets"]
    fn the_sentiment_files_are_read_whole() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/sentiment");
        for task in ["amazon", "movies", "nyt", "tweets"] {
            let path = format!("{folder}/{task}.tsv");
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            let rows = read_tsv(&path).unwrap();
            assert_eq!(rows.len(), lines, "{task}");
            assert!(rows.iter().all(|r| r.score.abs() <= 4.0 && !r.text.is_empty()), "{task}");
        }
    }
}
