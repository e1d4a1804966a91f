//! `cargo xtask setup --gpu`: torch with all its CUDA parts, in a Python environment.

use anyhow::{Context, Result, bail};

use crate::disk;
use crate::libtorch::VERSION;
use crate::project::Project;
use crate::python::{self, Venv};

/// torch.utils.cpp_extension, which torch-sys asks for paths, imports setuptools.
const PACKAGES: [&str; 2] = ["torch==2.13.0", "setuptools<82"];

/// What they take, with room for the downloads.
const BYTES: u64 = 9_000_000_000;

/// What torch-sys asks, so that a gap shows now and not in a build script.
const ASK: &str = "import torch; from torch.utils import cpp_extension as c; \
    c.include_paths(); print(c.library_paths()[0], torch.cuda.is_available(), sep='|')";

/// Makes the environment and prints what selects it.
pub fn run(project: &Project, force: bool) -> Result<()> {
    if std::env::consts::OS != "linux" {
        bail!(
            "--gpu is for Linux: elsewhere install torch {VERSION} and set LIBTORCH_USE_PYTORCH=1"
        );
    }
    let dir = project.path(".libtorch-gpu");
    if force && dir.exists() {
        std::fs::remove_dir_all(&dir)
            .with_context(|| format!("{} cannot be removed", dir.display()))?;
    }
    if !dir.exists() {
        let next = "free some, then run `cargo xtask setup --gpu` again";
        disk::require(project.root(), BYTES, "torch with its CUDA parts", next)?;
    }
    let venv = Venv { dir, packages: &PACKAGES, made_by: "cargo xtask setup --gpu" };
    venv.ensure()?;
    let answer = python::ask(&venv.python(), ASK).with_context(|| {
        format!("{} is not whole: run `cargo xtask setup --gpu --force`", venv.dir.display())
    })?;
    let (lib, cuda) = answer.split_once('|').unwrap_or((&answer, "False"));
    if cuda != "True" {
        eprintln!("note: this torch sees no GPU here; it will compute on the CPU");
    }
    println!("To build and run with it through `cargo xtask`, in each shell:");
    println!("  export PATH=\"{}:$PATH\"", venv.dir.join("bin").display());
    println!("  export LIBTORCH_USE_PYTORCH=1");
    println!("A program started in another way also needs, for itself alone:");
    println!("  LD_LIBRARY_PATH={lib} LD_PRELOAD=libtorch_cuda.so target/release/modl ...");
    Ok(())
}
