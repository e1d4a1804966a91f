//! `cargo xtask ci`: every check, all of them run even when one fails.

use std::path::Path;
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

    /// Says why a step is not run.
    fn skip(&mut self, name: &'static str, why: &str) {
        println!("\n==== {name} ====\nskipped: {why}");
        self.rows.push((name, Outcome::Skipped, 0.0));
        self.totals.skipped += 1;
    }

    /// Runs a cargo subcommand that not everyone has; `args` are its arguments, or why there is
    /// nothing for it to do.
    fn optional(&mut self, project: &Project, name: &'static str, args: Result<Vec<String>, &str>) {
        if machine::first_line("cargo", &[name, "--version"]).is_none() {
            return self.skip(name, &format!("cargo-{name} is not installed"));
        }
        match args {
            Err(why) => self.skip(name, why),
            Ok(args) => self.step(name, || {
                finish(cargo::with_libtorch(project)?.arg(name).args(args), "see the report above")
            }),
        }
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
    report.optional(&project, "deny", Ok(vec!["check".to_owned()]));
    report.optional(&project, "semver-checks", semver_args(last_release(project.root())));

    println!("\n{}\n{}", report.table(), report.totals);
    Ok(report.totals.exit_code())
}

/// The tag of the last release before HEAD.
fn last_release(root: &Path) -> Option<String> {
    let root = root.display().to_string();
    let ask = ["-C", &root, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"];
    machine::first_line("git", &ask).filter(|tag| !tag.is_empty())
}

/// Compares what third parties build on with the last release. All features are on, and with
/// `doc-only` nothing of libtorch is compiled.
fn semver_args(release: Option<String>) -> Result<Vec<String>, &'static str> {
    let Some(tag) = release else {
        return Err("there is no tag v… of a release to compare with yet");
    };
    let args = ["--package", "modl-core", "--all-features", "--baseline-rev", &tag];
    Ok(args.map(str::to_owned).to_vec())
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
    #[test]
    fn the_last_release_is_what_is_compared_with() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let known = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "tag.gpgSign=false"];
            let mut git = Command::new("git");
            git.arg("-C").arg(dir.path()).args(known).args(args);
            assert!(git.output().unwrap().status.success(), "{args:?}");
        };
        git(&["init", "-q"]);
        let commit = |tag: Option<&str>| {
            git(&["-c", "commit.gpgSign=false", "commit", "-q", "--allow-empty", "-m", "a"]);
            tag.inspect(|tag| git(&["tag", tag]));
        };
        commit(Some("nightly"));
        assert_eq!(last_release(dir.path()), None, "not a release");
        assert!(semver_args(None).unwrap_err().contains("no tag"));
        commit(Some("v0.1.0"));
        commit(Some("v0.2.0"));
        commit(None);
        let args = semver_args(last_release(dir.path())).unwrap();
        assert_eq!(args.last().map(String::as_str), Some("v0.2.0"));
    }

    #[test]
    fn a_step_that_cannot_run_says_so_and_counts_as_skipped() {
        let mut report = Report::default();
        report.skip("semver-checks", "cargo-semver-checks is not installed");
        assert_eq!(report.totals.to_string(), "0 passed, 0 failed, 1 skipped");
        assert!(report.table().contains("skipped"));
        assert_eq!(report.totals.exit_code(), Totals::of(true).exit_code());
    }
}
