//! A user's own evaluation of the models, or adapters, before and of the result after.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::report::Table;

/// Runs the command for each model and for the result, and shows the last line that it prints.
pub(super) fn run<'a>(
    command: &str,
    models: impl Iterator<Item = (&'a str, &'a Path)>,
    out: &'a Path,
) -> Result<()> {
    let mut table = Table::new(["model", "evaluation"]).left();
    for (name, path) in models.chain([("result", out)]) {
        table.row([name.to_owned(), of(command, path)?]);
    }
    println!("{}", table.text());
    Ok(())
}

/// What the command says of one folder, which it finds in `$MODEL`.
fn of(command: &str, model: &Path) -> Result<String> {
    let output = Command::new("sh")
        .args(["-c", command])
        .env("MODEL", model)
        .output()
        .with_context(|| format!("--eval {command}"))?;
    anyhow::ensure!(
        output.status.success(),
        "--eval {command}: for {} it ended with {}: {}",
        model.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or_default().trim().to_owned())
}
