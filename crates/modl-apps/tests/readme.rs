//! What the README shows is what the code is.

#![allow(clippy::unwrap_used)]

use std::path::Path;

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read_to_string(root.join(path)).unwrap()
}

/// The text from `start` up to the line `end`, without the indentation of its first line.
fn part(text: &str, start: &str, end: &str) -> String {
    let lines = text.lines().skip_while(|l| !l.trim_start().starts_with(start));
    let body: Vec<&str> = lines.take_while(|l| !l.starts_with(end)).collect();
    let indent = body[0].len() - body[0].trim_start().len();
    let strip = |l: &&str| l.get(indent..).unwrap_or("").to_owned();
    body.iter().map(strip).collect::<Vec<_>>().join("\n").trim_end().to_owned()
}

#[test]
fn it_shows_algorithm_1_as_it_stands_and_the_example_as_it_runs() {
    let readme = read("README.md");
    let algorithm = part(&read("crates/modl-core/src/layer.rs"), "pub fn forward", "}");
    assert!(algorithm.lines().count() <= 40 && algorithm.contains("α ← r(x, t)"));
    assert!(readme.contains(&algorithm), "README.md lacks:\n{algorithm}");
    let example = read("crates/modl-apps/examples/four_domains.rs");
    let main = part(&example, "fn main()", "fn texts");
    assert!(readme.contains(&main), "README.md lacks:\n{main}");
}

#[test]
fn the_tables_of_methods_are_what_the_registry_says() {
    for (axis, least) in [("modules", 30), ("routers", 5), ("aggregators", 5), ("strategies", 20)] {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_modl"))
            .args(["list", axis, "--markdown"])
            .output()
            .unwrap();
        let table = String::from_utf8(out.stdout).unwrap();
        assert!(table.lines().count() > least, "{}", String::from_utf8_lossy(&out.stderr));
        assert!(
            read(&format!("docs/{axis}.md")).contains(table.trim_end()),
            "docs/{axis}.md is to hold what `modl list {axis} --markdown` prints:\n{table}"
        );
    }
}

#[test]
fn every_command_that_it_names_exists() {
    let readme = read("README.md");
    let cli = read("crates/modl-apps/src/cli.rs");
    for (command, variant) in [
        ("demo", "Demo"),
        ("train", "Train"),
        ("plan", "Plan"),
        ("sweep", "Sweep"),
        ("eval", "Eval"),
        ("forward", "Forward"),
        ("convert", "Convert"),
        ("upcycle", "Upcycle"),
        ("align", "Align"),
        ("barrier", "Barrier"),
        ("diff", "Diff"),
        ("inspect", "Inspect"),
        ("route-report", "RouteReport"),
        ("compare", "Compare"),
        ("reproduce", "Reproduce"),
        ("list", "List"),
    ] {
        assert!(readme.contains(&format!("modl {command}")), "{command}");
        assert!(cli.contains(&format!("    {variant}(")), "{command}");
    }
}
