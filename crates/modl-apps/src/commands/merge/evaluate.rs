//! A user's own evaluation of models or adapters.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::report::Table;

/// Runs the command for each model that has a folder and for the result, and shows the last line that it
/// prints.
pub(super) fn run<'a>(
    command: &str,
    models: impl Iterator<Item = (&'a str, Option<&'a Path>)>,
    out: &Path,
) -> Result<()> {
    let mut table = Table::new(["model", "evaluation"]).left();
    for (name, path) in models {
        let said = path.map_or_else(|| Ok("–".to_owned()), |path| of(command, path))?;
        table.row([name.to_owned(), said]);
    }
    table.row(["result".to_owned(), of(command, out)?]);
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

/// The number that the command says of one folder.
pub(super) fn number(command: &str, model: &Path) -> Result<f64> {
    let line = of(command, model)?;
    line.parse().map_err(|_| {
        anyhow::anyhow!(
            "--eval {command}: for {} its last line is to be a number and nothing else, not {line:?}",
            model.display()
        )
    })
}
