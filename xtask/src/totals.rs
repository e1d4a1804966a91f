//! Counts of tests, added up over many test programs.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::ops::AddAssign;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::failure;

/// How many tests passed, failed and were left out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed, and programs that could not be built or did not finish.
    pub failed: usize,
    /// Tests that were ignored.
    pub skipped: usize,
}

impl Totals {
    /// One check that passed or failed.
    pub fn of(passed: bool) -> Self {
        Self { passed: passed.into(), failed: (!passed).into(), skipped: 0 }
    }

    /// The totals of something that may not have got as far as counting, which is a failure.
    pub fn of_result(result: Result<Self>) -> Self {
        result.unwrap_or_else(|error| {
            eprintln!("{}", failure::text(&error));
            Self::of(false)
        })
    }

    /// What the process says to whoever started it; the totals are its last line.
    pub fn exit_code(self) -> ExitCode {
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Runs a `cargo test`, showing what it prints, and counts its results.
    pub fn of_cargo_test(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{command:?} cannot be run"))?;
        let mut totals = Self::default();
        let stdout = child.stdout.take().context("the output of cargo cannot be read")?;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("the output of cargo cannot be read")?;
            println!("{line}");
            if let Some(part) = parse(&line) {
                totals += part;
            }
        }
        let status = child.wait()?;
        // Nothing is counted for what does not compile or dies half-way.
        if !status.success() && totals.failed == 0 {
            totals.failed = 1;
        }
        Ok(totals)
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; ...`.
fn parse(line: &str) -> Option<Totals> {
    let result = line.strip_prefix("test result: ")?;
    let (_, counts) = result.split_once(". ")?;
    let count = |word: &str| {
        let part = counts.split("; ").find(|part| part.ends_with(word))?;
        part.split(' ').next()?.parse().ok()
    };
    Some(Totals { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_read_and_others_are_not() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; \
                    4 filtered out; finished in 0.01s";
        assert_eq!(parse(line), Some(Totals { passed: 3, failed: 1, skipped: 2 }));
        assert_eq!(parse("test a::result: ... ok"), None);
        assert_eq!(parse("test result: who knows"), None);
    }

    #[test]
    fn what_dies_without_a_count_is_a_failure() {
        let count = |script: &str| {
            Totals::of_cargo_test(Command::new("sh").args(["-c", script])).unwrap().to_string()
        };
        let ok = "echo 'test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered'";
        assert_eq!(count(ok), "2 passed, 0 failed, 1 skipped");
        assert_eq!(count(&format!("{ok}; exit 101")), "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn totals_add_up() {
        let mut totals = Totals::of(true);
        totals += Totals::of(false);
        assert_eq!(totals.to_string(), "1 passed, 1 failed, 0 skipped");
    }
}
