//! `examples/router-crate`: a router that lives outside the workspace, as a user's would.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cargo;
use crate::project::Project;
use crate::totals::Totals;

const DIR: &str = "examples/router-crate";

/// Its tests, and its program as one more: modl's command line has to list the router.
pub fn test(project: &Project) -> Result<Totals> {
    let mut totals = Totals::of_cargo_test(command(project, "test")?.arg("--no-fail-fast"))?;
    let mut list = command(project, "run")?;
    let output = list.args(["--quiet", "--example", "modl", "--", "list", "routers"]).output()?;
    let listed = String::from_utf8_lossy(&output.stdout).contains("prototype");
    println!("test {DIR} lists its router ... {}", if listed { "ok" } else { "FAILED" });
    totals += Totals::of(output.status.success() && listed);
    Ok(totals)
}

/// Checks its format; `cargo fmt --all` does not see it.
pub fn check_format(project: &Project) -> Result<()> {
    let mut fmt = cargo::command(project);
    fmt.args(["fmt", "--check", "--manifest-path"]).arg(manifest(project));
    let next = format!("run `cargo fmt --manifest-path {DIR}/Cargo.toml`");
    cargo::run(&mut fmt, "the format of the router crate", &next)
}

fn manifest(project: &Project) -> PathBuf {
    project.path(DIR).join("Cargo.toml")
}

/// With the workspace's target folder and profiles, so that tch is not built a second time.
fn command(project: &Project, verb: &str) -> Result<Command> {
    let mut command = cargo::with_libtorch(project)?;
    command.arg("--config").arg(project.path("Cargo.toml"));
    command.arg(verb).arg("--manifest-path").arg(manifest(project));
    command.env("CARGO_TARGET_DIR", project.target());
    Ok(command)
}
