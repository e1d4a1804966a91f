//! Child cargo commands, with libtorch where the loader finds it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::libtorch::{self, Libtorch, Source};
use crate::project::Project;

/// A cargo command at the root of the checkout.
pub fn command(project: &Project) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(project.root());
    // What `cargo run` says about xtask would look like news to other packages' build scripts.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// A cargo command that builds or runs something with libtorch.
pub fn with_libtorch(project: &Project) -> Result<Command> {
    let found = in_force(project)?;
    let mut command = command(project);
    let cuda = found.lib.join("libtorch_cuda.so");
    if cuda.exists() {
        // No symbol of it is used by name, so linkers drop it, and torch then sees no GPU.
        command.arg("--config").arg(preload(&cuda));
    }
    loader_env(project, command)
}

/// Adds to a command what programs built with libtorch need to start.
pub fn loader_env(project: &Project, mut command: Command) -> Result<Command> {
    let found = in_force(project)?;
    if found.source == Source::Setup {
        // Comes from .cargo/config.toml again, as in a plain `cargo build`: one fingerprint.
        command.env_remove("LIBTORCH");
    }
    if needs_loader_path(project, &found) {
        let name = loader_variable();
        command.env(name, prepend(&found.lib, env::var_os(name))?);
    }
    Ok(command)
}

/// What cargo knows about the packages of the workspace.
pub fn metadata(project: &Project) -> Result<Value> {
    let output = command(project)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("`cargo metadata` cannot be run")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("`cargo metadata` gave no JSON")
}

/// Runs a command to its end; its failure is an error that names `what` and the next step.
pub fn run(command: &mut Command, what: &str, next: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?} cannot be run"))?;
    if !status.success() {
        bail!("{what} failed ({status}): {next}");
    }
    Ok(())
}

fn in_force(project: &Project) -> Result<Libtorch> {
    libtorch::in_force(project, &libtorch::process_vars)?
        .context("there is no libtorch yet: run `cargo xtask setup`")
}

/// A cargo setting that loads a library into the programs that cargo runs, and no others.
fn preload(library: &Path) -> String {
    let setting = Value::from(format!("LD_PRELOAD={}", library.display()));
    format!("target.'cfg(target_os = \"linux\")'.runner = [\"env\", {setting}]")
}

/// The rpaths of .cargo/config.toml lead from `target/` to `.libtorch` and nowhere else, and
/// flags from the environment take their place.
fn needs_loader_path(project: &Project, found: &Libtorch) -> bool {
    let flags = ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTDOCFLAGS"];
    found.source != Source::Setup
        || !cfg!(target_os = "linux")
        || !project.target().starts_with(project.path("target"))
        || flags.iter().any(|name| env::var_os(name).is_some())
}

fn loader_variable() -> &'static str {
    if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" }
}

fn prepend(dir: &Path, rest: Option<OsString>) -> Result<OsString> {
    let mut dirs = vec![dir.to_path_buf()];
    if let Some(rest) = rest {
        dirs.extend(env::split_paths(&rest).filter(|dir| dir != &PathBuf::new()));
    }
    env::join_paths(dirs)
        .with_context(|| format!("{} cannot be in a path list: move it", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libtorch_folder_comes_first_and_empty_entries_go() {
        let dir = Path::new("/lib/torch");
        assert_eq!(prepend(dir, None).unwrap(), "/lib/torch");
        assert_eq!(prepend(dir, Some("/a::/b".into())).unwrap(), "/lib/torch:/a:/b");
        assert!(prepend(Path::new("/a:b"), None).is_err());
    }

    #[test]
    fn a_preload_is_a_quoted_setting() {
        let setting = preload(Path::new("/a b/\"c.so"));
        assert!(setting.ends_with(r#"= ["env", "LD_PRELOAD=/a b/\"c.so"]"#), "{setting}");
    }

    #[test]
    fn a_failure_names_the_next_step() {
        let error = run(&mut Command::new("false"), "the thing", "mend it").unwrap_err();
        assert!(error.to_string().starts_with("the thing failed"), "{error}");
        assert!(error.to_string().ends_with("mend it"), "{error}");
    }
}
