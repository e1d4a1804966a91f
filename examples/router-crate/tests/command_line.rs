//! `modl` with the router in it: listed, trained, tested, reported and compared like modl's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const RECIPE: &str = r#"
[backbone]
path = "model"

[data]
tasks = { up = "up.tsv", down = "down.tsv" }
test = 0.25

[modules.up]
type = "lora"
targets = ["query"]

[modules.down]
type = "lora"
targets = ["query"]

[router]
type = "prototype"

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "all"
strategy = "joint"
steps = 4
lr = 1e-2
"#;

/// Runs `modl` and gives what it says.
fn modl(args: &[&str], at: &Path) -> String {
    // Beside the folder of the tests' programs.
    let tests = std::env::current_exe().unwrap();
    let program: PathBuf = tests.ancestors().nth(2).unwrap().join("examples/modl");
    let mut command = Command::new(program);
    let out = command.args(["--threads", "1"]).args(args).current_dir(at).output().unwrap();
    let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    assert!(out.status.success(), "{args:?}: {said}");
    said
}

/// A tiny BERT with a tokenizer of six words, and texts of two tasks.
fn bench(at: &Path) {
    let words = ["good", "bad", "film", "news", "very", "not"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let from = root.join("../../crates/modl-models/tests/fixtures/base_bert");
    fs::create_dir(at.join("model")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), at.join("model").join(name)).unwrap();
    }
    let vocab = ["[UNK]"].iter().chain(&words).zip(1..);
    let vocab: serde_json::Map<_, _> = vocab.map(|(w, i)| (w.to_string(), i.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
    });
    fs::write(at.join("model/tokenizer.json"), tokenizer.to_string()).unwrap();
    for (task, sign) in [("up", 1.0), ("down", -1.0)] {
        let text = |i: usize| [1, 2, 5].map(|k| words[i * k % 6]).join(" ");
        let line = |i: usize| format!("{i}\t{}\t{}\n", sign * (i % 2) as f64, text(i));
        fs::write(at.join(format!("{task}.tsv")), (0..60).map(line).collect::<String>()).unwrap();
    }
    fs::write(at.join("recipe.toml"), RECIPE).unwrap();
}

#[test]
fn every_command_knows_the_router() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    bench(at);
    let listed = modl(&["list", "routers"], at);
    let line = listed.lines().find(|l| l.contains("prototype ") && l.contains("Snell")).unwrap();
    assert!(line.contains("Nearest prototype by cosine"), "{line}");

    modl(&["train", "recipe.toml", "--out", "run"], at);
    let saved = at.join("run/phases/1-all/routing.safetensors");
    let header = String::from_utf8_lossy(&fs::read(saved).unwrap()).into_owned();
    for part in [r#"\"type\":\"prototype\""#, ".query.prototypes"] {
        assert!(header.contains(part), "a checkpoint has {part}");
    }
    let tested = modl(&["eval", "run"], at);
    assert!(tested.contains("up") && tested.contains("down"), "{tested}");
    let report = modl(&["route-report", "run"], at);
    assert!(report.contains("query") && at.join("run/routing/report.html").is_file(), "{report}");

    let routers = r#"prototype{"temperature":2.0},soft"#;
    let words = ["compare", "recipe.toml", "--routers", routers, "--seeds", "1", "--out", "all"];
    let compared = modl(&words, at);
    for part in [r#"prototype{"temperature":2.0}"#, "soft", "oracle", "less prototype"] {
        assert!(compared.contains(part), "lacks {part}: {compared}");
    }
}
