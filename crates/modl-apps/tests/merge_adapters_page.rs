//! The commands of `docs/merge-adapters.md`, as they stand there, with the real SmolLM2.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

const RECIPE: &str = "examples/recipes/smollm2.toml";

#[test]
#[ignore = "needs: cargo xtask assets smollm2"]
fn merged_and_unmerged_adapters_of_smollm2_agree() {
    let root = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap();
    if !root.join("assets/smollm2").exists() {
        // An optional asset, which the run of all tests does not fetch.
        eprintln!("skipped: `cargo xtask assets smollm2` fetches the model");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    fs::create_dir_all(place.path().join(RECIPE).parent().unwrap()).unwrap();
    fs::copy(root.join(RECIPE), place.path().join(RECIPE)).unwrap();
    symlink(root.join("assets"), place.path().join("assets")).unwrap();

    let page = fs::read_to_string(root.join("docs/merge-adapters.md")).unwrap();
    let commands = page.lines().filter(|l| l.starts_with("modl "));
    let modl = env!("CARGO_BIN_EXE_modl");
    let mut diffs = Vec::new();
    for command in commands {
        let script = command.replacen("modl", modl, 1);
        let done =
            Command::new("sh").args(["-c", &script]).current_dir(place.path()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(
            done.status.success(),
            "{command}\n{said}{}",
            String::from_utf8_lossy(&done.stderr)
        );
        if command.starts_with("modl diff") {
            diffs.push(relative(&said));
        }
    }
    let [merged, weights, base] = diffs.try_into().unwrap();
    assert!(merged < 1e-5 && weights < 1e-5, "{merged} {weights}");
    // The adapters do something, or the others would agree for nothing.
    assert!(base > 0.05, "{base}");
    assert!(place.path().join("runs/report/merge.html").is_file());
}

/// The last column of the row of the logits; 0 where all is equal.
fn relative(said: &str) -> f64 {
    let row = said.lines().find(|l| l.contains("logits"));
    let Some(row) = row else {
        assert!(said.contains("bit for bit"), "{said}");
        return 0.0;
    };
    let number = row.split(|c: char| c.is_whitespace() || c == '│').rfind(|p| !p.is_empty());
    number.unwrap().parse().unwrap()
}
