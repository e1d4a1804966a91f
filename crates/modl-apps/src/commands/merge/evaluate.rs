//! A user's own evaluation of a model.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use modl_aggregate::merge::Plan;

use crate::report::Table;

/// Runs the command for each model and for the result, and shows the last line that it prints.
pub(super) fn run(command: &str, plan: &Plan, out: &Path) -> Result<()> {
    let mut table = Table::new(["model", "evaluation"]).left();
    for source in &plan.sources {
        // There is no folder with the adapter merged in.
        let said = match source.is_adapted() {
            true => "–".to_owned(),
            false => of(command, &source.path)?,
        };
        table.row([source.name.clone(), said]);
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
