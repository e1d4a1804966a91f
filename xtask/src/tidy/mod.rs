//! `cargo xtask tidy`: the house rules that neither rustc nor clippy checks.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::project::Project;

mod code;
mod files;
mod layers;
mod lexer;

/// A breach of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offence {
    path: String,
    /// Counted from 1.
    line: usize,
    message: String,
}

impl Offence {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// Runs the command.
pub fn run() -> Result<()> {
    let offences = check(&Project::find()?)?;
    for offence in &offences {
        println!("{offence}");
    }
    if !offences.is_empty() {
        bail!("{} offences against the house rules: see above", offences.len());
    }
    println!("tidy");
    Ok(())
}

fn check(project: &Project) -> Result<Vec<Offence>> {
    let mut offences = layers::check(&cargo::metadata(project)?, project.root());
    let paths = tracked(project.root())?;
    offences.extend(files::readmes(&paths));
    for path in &paths {
        let name = path.to_string_lossy();
        // Text only: fixtures may hold tensors.
        let Ok(text) = fs::read_to_string(project.path(path)) else { continue };
        offences.extend(files::check(&name, &text));
        if name.ends_with(".rs") {
            offences.extend(code::check(&name, &text));
        }
    }
    Ok(offences)
}

/// What git tracks or would track.
fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("`git ls-files` cannot be run: install git")?;
    if !output.status.success() {
        bail!("`git ls-files` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}
