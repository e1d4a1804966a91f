//! `cargo xtask test`: every test there is, with one line of totals at the end.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result};

use crate::project::Project;
use crate::totals::Totals;
use crate::{assets, cargo, peers, router_crate, setup};

/// What `test` can be told.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Also compare with the Python libraries, in an environment of their own
    #[arg(long)]
    peers: bool,
    /// Test this crate alone
    #[arg(long, short, value_name = "CRATE")]
    package: Option<String>,
    /// Arguments for the test programs
    #[arg(last = true)]
    args: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let totals = Totals::of_result(totals(&Project::find()?, args));
    println!("{totals}");
    Ok(totals.exit_code())
}

/// Runs the tests and counts them.
pub fn totals(project: &Project, args: &Args) -> Result<Totals> {
    setup::ensure(project)?;
    assets::ensure(project)?;
    let mut totals = Totals::default();
    match &args.package {
        Some(package) => totals += packages(project, &["--package", package], &args.args)?,
        None => {
            // On its own, because building it among the others would give it other features.
            let mut own = cargo::command(project);
            own.args(["test", "--package", "xtask", "--"]).args(&args.args);
            totals += Totals::of_cargo_test(&mut own)?;
            totals += packages(project, &["--workspace", "--exclude", "xtask"], &args.args)?;
            totals += router_crate::test(project)?;
        }
    }
    if args.peers {
        totals += Totals::of_result(python(project));
    }
    Ok(totals)
}

fn packages(project: &Project, which: &[&str], args: &[String]) -> Result<Totals> {
    let mut code = command(project, which)?;
    // Needs-assets tests are #[ignore]d for plain `cargo test`; doc tests marked `ignore` are
    // never meant to run, hence the second command.
    code.args(["--lib", "--bins", "--tests", "--examples", "--", "--include-ignored"]).args(args);
    let mut totals = Totals::of_cargo_test(&mut code)?;
    totals += Totals::of_cargo_test(command(project, which)?.args(["--doc", "--"]).args(args))?;
    Ok(totals)
}

fn command(project: &Project, which: &[&str]) -> Result<Command> {
    let mut command = cargo::with_libtorch(project)?;
    command.args(["test", "--no-fail-fast"]).args(which);
    // Tests run side by side; torch's threads on top of that make them wait for each other.
    if env::var_os("OMP_NUM_THREADS").is_none() {
        command.env("OMP_NUM_THREADS", "1");
    }
    if env::var_os("RUST_TEST_THREADS").is_none() {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        command.env("RUST_TEST_THREADS", cores.to_string());
    }
    Ok(command)
}

fn python(project: &Project) -> Result<Totals> {
    let interpreter = peers::ensure(project)?;
    let modl = peers::build_modl(project)?;
    let mut totals = Totals::default();
    for script in scripts(project)? {
        let name = project.show(&script);
        let mut command = peers::script(project, &interpreter, "MODL_BIN", &modl)?;
        let status =
            command.arg(&script).status().with_context(|| format!("{name} cannot be run"))?;
        println!("test {name} ... {}", if status.success() { "ok" } else { "FAILED" });
        totals += Totals::of(status.success());
    }
    Ok(totals)
}

fn scripts(project: &Project) -> Result<Vec<PathBuf>> {
    let dir = project.path("tests/python");
    let entries =
        fs::read_dir(&dir).with_context(|| format!("{} cannot be read", dir.display()))?;
    let mut scripts = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("test_") && name.ends_with(".py") {
            scripts.push(path);
        }
    }
    scripts.sort();
    Ok(scripts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_scripts_are_found_in_order() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tests/python");
        fs::create_dir_all(&dir).unwrap();
        for name in ["test_b.py", "shared.py", "test_a.py", "test_c.txt"] {
            fs::write(dir.join(name), "").unwrap();
        }
        let found = scripts(&Project::at(root.path())).unwrap();
        assert_eq!(found, [dir.join("test_a.py"), dir.join("test_b.py")]);
    }
}
