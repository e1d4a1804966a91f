//! Several seeds of several conditions: what was measured is kept, paired by seed, and reported with
//! intervals.

mod results;
mod runs;
mod tables;

pub(crate) use results::{Results, View};
pub(crate) use runs::{Run, Runs, commit, fingerprint, peak_rss_mb};
pub(crate) use tables::{Columns, interval_cell};

/// A number that is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measure {
    /// Its key in the runs: `l1`.
    pub(crate) key: &'static str,
    /// Its head in tables.
    pub(crate) title: &'static str,
    /// Digits after the point.
    pub(crate) digits: usize,
}
