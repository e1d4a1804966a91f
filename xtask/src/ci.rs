//! `cargo xtask ci`: every check, all of them run even when one fails.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::Result;

use crate::project::Project;
use crate::totals::Totals;
use crate::{cargo, docs, machine, router_crate, setup, table, test, tidy};

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

/// The steps so far.
#[derive(Debug, Default)]
struct Report {
    rows: Vec<(&'static str, Outcome, f64)>,
    totals: Totals,
}

impl Report {
    /// Runs a step that counts by itself.
    fn counted(&mut self, name: &'static str, step: impl FnOnce() -> Result<Totals>) {
        println!("\n==== {name} ====");
        let start = Instant::now();
        let totals = Totals::of_result(step());
        let outcome = if totals.failed == 0 { Outcome::Passed } else { Outcome::Failed };
        self.rows.push((name, outcome, start.elapsed().as_secs_f64()));
        self.totals += totals;
    }

    /// Runs a step that passes or fails.
    fn step(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) {
        self.counted(name, || step().map(|()| Totals::of(true)));
    }

    /// Runs a cargo subcommand that not everyone has.
    fn optional(&mut self, project: &Project, name: &'static str, args: &[&str]) {
        if machine::first_line("cargo", &[name, "--version"]).is_none() {
            println!("\n==== {name} ====\nskipped: cargo-{name} is not installed");
            self.rows.push((name, Outcome::Skipped, 0.0));
            self.totals.skipped += 1;
            return;
        }
        self.step(name, || {
            finish(cargo::with_libtorch(project)?.arg(name).args(args), "see the report above")
        });
    }

    fn table(&self) -> String {
        let rows = self.rows.iter().map(|(name, outcome, seconds)| {
            vec![(*name).to_owned(), format!("{outcome:?}").to_lowercase(), format!("{seconds:.1}")]
        });
        table::render(&["step", "outcome", "seconds"], rows)
    }
}

/// Runs the command.
pub fn run() -> Result<ExitCode> {
    let project = Project::find()?;
    let mut report = Report::default();
    report.step("setup", || setup::ensure(&project));
    report.step("fmt", || {
        let mut fmt = cargo::command(&project);
        finish(fmt.args(["fmt", "--all", "--check"]), "run `cargo fmt --all`")?;
        router_crate::check_format(&project)
    });
    report.step("tidy", tidy::run);
    report.step("clippy", || {
        let mut clippy = cargo::with_libtorch(&project)?;
        clippy.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
        finish(&mut clippy, "mend the warnings above")
    });
    report.step("docs", || docs::run(&docs::Args::default()));
    report.counted("test", || test::totals(&project, &test::Args::default()));
    report.optional(&project, "deny", &["check"]);
    report.optional(&project, "semver-checks", &["--workspace"]);

    println!("\n{}\n{}", report.table(), report.totals);
    Ok(report.totals.exit_code())
}

fn finish(command: &mut Command, next: &str) -> Result<()> {
    cargo::run(command, "this step", next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_counts_and_the_next_one_runs() {
        let mut report = Report::default();
        report.step("one", || anyhow::bail!("no"));
        report.counted("two", || Ok(Totals { passed: 3, failed: 0, skipped: 1 }));
        assert_eq!(report.totals.to_string(), "3 passed, 1 failed, 1 skipped");
        assert!(report.table().contains("failed"));
    }
}
