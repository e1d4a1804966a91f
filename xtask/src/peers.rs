//! The Python environment with the libraries that modl is compared with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::project::Project;
use crate::python::Venv;
use crate::{cargo, disk};

const PACKAGES: [&str; 9] = [
    "torch==2.13.0",
    "transformers==5.24.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "avalanche-lib==0.6.0",
    "mergekit==0.1.5",
    "safetensors",
    "numpy",
    "scipy",
];

/// What torch takes with the CUDA parts that its wheel asks for.
const BYTES: u64 = 8_000_000_000;

/// Makes the environment unless it is there; its interpreter.
pub fn ensure(project: &Project) -> Result<PathBuf> {
    let venv = Venv {
        dir: project.path(".peers"),
        packages: &PACKAGES,
        made_by: "cargo xtask test --peers",
    };
    if !venv.ready() {
        let next = "free some, or leave --peers out";
        disk::require(project.root(), BYTES, "the Python environment .peers", next)?;
    }
    venv.ensure()?;
    Ok(venv.python())
}

/// Builds the `modl` program for the test scripts; its path.
pub fn build_modl(project: &Project) -> Result<PathBuf> {
    build(project, &["--bin", "modl"])?;
    Ok(project.target().join("debug/modl"))
}

/// Builds the `modl` program for measurements, optimised; its path.
pub fn build_fast_modl(project: &Project) -> Result<PathBuf> {
    build(project, &["--release", "--bin", "modl"])?;
    Ok(project.target().join("release/modl"))
}

/// Builds modl's side of the comparison, optimised; its path.
pub fn build_peer_step(project: &Project) -> Result<PathBuf> {
    build(project, &["--release", "--example", "peer_step"])?;
    Ok(project.target().join("release/examples/peer_step"))
}

fn build(project: &Project, what: &[&str]) -> Result<()> {
    let mut build = cargo::with_libtorch(project)?;
    build.args(["build", "--package", "modl-apps"]).args(what);
    cargo::run(&mut build, "building modl", "mend the errors above")
}

/// A Python program in the environment, with libtorch where it finds it, and a program of modl's in
/// the variable `name`.
pub fn script(project: &Project, python: &Path, name: &str, program: &Path) -> Result<Command> {
    let mut command = cargo::loader_env(project, Command::new(python))?;
    command.current_dir(project.root());
    command.env(name, program).env("MODL_ROOT", project.root()).env("HF_HUB_OFFLINE", "1");
    Ok(command)
}
