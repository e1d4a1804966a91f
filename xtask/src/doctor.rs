//! `cargo xtask doctor`: what building and running needs, and how to mend what is missing.

use std::env;
use std::path::Path;
use std::thread;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::project::Project;
use crate::{assets, disk, libtorch, machine, progress, python, table};

const MIN_RUST: (u32, u32) = (1, 88);
const MIN_GCC: u32 = 9;

/// What `setup` and a build take.
const SPACE: u64 = 4_000_000_000;

/// What `doctor` can be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    found: String,
    /// What mends it, or nothing.
    next: String,
}

/// How a finding is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// It is there.
    Ok,
    /// It is not there, and something needs it.
    Missing,
    /// It is good to know.
    Note,
}

impl Finding {
    fn new(what: &'static str, ok: bool, found: impl Into<String>, next: &str) -> Self {
        let state = if ok { State::Ok } else { State::Missing };
        let next = if ok { String::new() } else { next.to_owned() };
        Self { what, state, found: found.into(), next }
    }

    fn note(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, state: State::Note, found: found.into(), next: String::new() }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let findings = examine(&Project::find()?);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print!("{}", render(&findings));
    }
    let missing = findings.iter().filter(|finding| finding.state == State::Missing).count();
    if missing > 0 {
        bail!("{missing} missing: the last column says what to do");
    }
    Ok(())
}

fn examine(project: &Project) -> Vec<Finding> {
    vec![
        rust("rustc"),
        rust("cargo"),
        compiler(),
        python(),
        libtorch(project),
        assets(project),
        space(project),
        Finding::note("processor", machine::cpu()),
        threads(),
        bf16(),
    ]
}

fn rust(program: &'static str) -> Finding {
    let line = machine::first_line(program, &["--version"]).unwrap_or_default();
    let found = version(&line);
    let next = format!("install Rust {}.{} or newer (`rustup update`)", MIN_RUST.0, MIN_RUST.1);
    Finding::new(program, found.is_some_and(|found| found >= MIN_RUST), line, &next)
}

fn compiler() -> Finding {
    // The one that the `cc` crate takes.
    let chosen = env::var("CXX").ok().filter(|cxx| !cxx.is_empty());
    let name = chosen.as_deref().unwrap_or("c++");
    let line = machine::first_line(name, &["--version"]).unwrap_or_default();
    // Clang has had the needed C++17 since before it counted like this.
    let fit = version(&line).is_some_and(|found| found.0 >= MIN_GCC || line.contains("clang"));
    let found = if line.is_empty() { format!("no `{name}`") } else { line };
    let next = format!("install g++ {MIN_GCC} or newer, or set CXX to one");
    Finding::new("C++ compiler", fit, found, &next)
}

fn python() -> Finding {
    let ask = "import platform; print(platform.python_version())";
    let interpreter = python::interpreter();
    let answer = python::ask(Path::new(interpreter), ask).and_then(|version| {
        let pip = python::pip_version()?;
        Ok(format!("{interpreter} {version}, pip {pip}"))
    });
    match answer {
        Ok(found) => Finding::new("Python", true, found, ""),
        Err(error) => Finding::new("Python", false, "", &error.to_string()),
    }
}

fn libtorch(project: &Project) -> Finding {
    match libtorch::in_force(project, &libtorch::process_vars) {
        Ok(Some(found)) => Finding::new("libtorch", true, found.describe(), ""),
        Ok(None) => Finding::new("libtorch", false, "none", "cargo xtask setup"),
        Err(error) => Finding::new("libtorch", false, "unusable", &format!("{error:#}")),
    }
}

fn assets(project: &Project) -> Finding {
    let missing = assets::missing(project);
    if missing.is_empty() {
        return Finding::new("assets", true, "all", "");
    }
    // Building does without; tests and the demo fetch them by themselves.
    let next = "cargo xtask assets".to_owned();
    Finding { next, ..Finding::note("assets", format!("no {}", missing.join(", no "))) }
}

fn space(project: &Project) -> Finding {
    match disk::free(project.root()) {
        Ok(free) => {
            let next = format!("free some: libtorch and a build take {}", progress::size(SPACE));
            let found = format!("{} free", progress::size(free));
            Finding::new("disk", free >= SPACE, found, &next)
        }
        Err(error) => Finding::note("disk", format!("unknown: {error:#}")),
    }
}

fn threads() -> Finding {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let omp = env::var("OMP_NUM_THREADS").unwrap_or_else(|_| "not set".to_owned());
    Finding::note("threads", format!("{cores} usable, OMP_NUM_THREADS {omp}"))
}

fn bf16() -> Finding {
    let found = machine::bf16();
    let text =
        if found.is_empty() { "no instructions: f32 is faster".into() } else { found.join(", ") };
    Finding::note("bf16", text)
}

fn render(findings: &[Finding]) -> String {
    let rows = findings.iter().map(|finding| {
        let state = match finding.state {
            State::Ok => "ok",
            State::Missing => "MISSING",
            State::Note => "-",
        };
        let Finding { what, found, next, .. } = finding;
        vec![(*what).to_owned(), state.to_owned(), found.clone(), next.clone()]
    });
    table::render(&["what", "state", "found", "next step"], rows)
}

/// The first `MAJOR.MINOR` in a line.
fn version(line: &str) -> Option<(u32, u32)> {
    line.split([' ', '-', '(', ')']).find_map(|word| {
        let mut numbers = word.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("rustc 1.95.0-nightly (abc 2026-01-01)"), Some((1, 95)));
        assert_eq!(version("c++ (Debian 12.2.0-14) 12.2.0"), Some((12, 2)));
        assert_eq!(version("Apple clang version 17.0.0 (clang-1700.0.13)"), Some((17, 0)));
        assert_eq!(version(""), None);
    }

    #[test]
    fn a_bare_checkout_is_told_to_run_setup_and_assets() {
        let root = tempfile::tempdir().unwrap();
        let project = Project::at(root.path());
        let assets = assets(&project);
        assert_eq!((assets.state, assets.next.as_str()), (State::Note, "cargo xtask assets"));
        let lost = Finding::new("libtorch", false, "none", "cargo xtask setup");
        assert!(render(&[assets, lost]).contains("MISSING"));
    }
}
