//! Means and paired differences as tables.

use anyhow::Result;

use super::{Measure, Results};
use crate::report::Table;

/// `0.123 [0.110, 0.140]`, or `0.123` where there is one seed, or `–` where it was not measured.
pub(crate) fn interval_cell((value, ends): (f64, Option<(f64, f64)>), digits: usize) -> String {
    match ends {
        _ if value.is_nan() => "–".to_owned(),
        None => format!("{value:.digits$}"),
        Some(ends) => format!("{value:.digits$} {}", between(ends, digits)),
    }
}

/// `[0.110, 0.140]`.
fn between((low, high): (f64, f64), digits: usize) -> String {
    format!("[{low:.digits$}, {high:.digits$}]")
}

/// Rows and columns of a table of results.
#[derive(Debug)]
pub(crate) struct Columns<'a> {
    /// What the first column holds.
    pub(crate) head: &'a str,
    /// Conditions with what they are called.
    pub(crate) rows: &'a [(String, String)],
    /// What was measured.
    pub(crate) measures: &'a [Measure],
}

impl Columns<'_> {
    fn table(
        &self,
        cell: impl Fn(&str, &Measure) -> Result<String>,
        takes: impl Fn(&str) -> bool,
    ) -> Result<Table> {
        let titles = self.measures.iter().map(|m| m.title);
        let mut table = Table::new([self.head].into_iter().chain(titles));
        for (condition, title) in self.rows.iter().filter(|(c, _)| takes(c)) {
            let cells = self.measures.iter().map(|m| cell(condition, m));
            let cells: Vec<String> = cells.collect::<Result<_>>()?;
            table.row([title.clone()].into_iter().chain(cells));
        }
        Ok(table)
    }

    /// Means with intervals.
    pub(crate) fn means(&self, results: &Results) -> Result<Table> {
        let cell = |c: &str, m: &Measure| Ok(interval_cell(results.mean(c, m.key)?, m.digits));
        self.table(cell, |_| true)
    }

    /// Differences from `reference(condition)`, paired by seed; rows without one are left out.
    pub(crate) fn differences(
        &self,
        results: &Results,
        reference: impl Fn(&str) -> Option<String>,
    ) -> Result<Table> {
        let cell = |c: &str, m: &Measure| match reference(c) {
            Some(from) => Ok(interval_cell(results.difference(c, &from, m.key)?, m.digits)),
            None => Ok(String::new()),
        };
        self.table(cell, |c| reference(c).is_some())
    }
}
