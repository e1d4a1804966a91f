//! The program under test, and a folder with a model, data and a recipe for it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The tiny BERT of the golden files, and the LoRA that PEFT made on it.
pub const BERT: &str = "../modl-models/tests/fixtures/base_bert";
pub const LORA: &str = "../modl-compute/tests/fixtures/bert_lora";

pub fn modl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_modl"));
    command.args(["--threads", "1"]).env("RUST_BACKTRACE", "1");
    command
}

pub fn run(args: &[&str]) -> Output {
    modl().args(args).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Runs what has to fail: with exit code 1 and an error that holds all of `parts`, in plain words.
pub fn refuse(args: &[&str], parts: &[&str]) {
    let out = run(args);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{args:?} lacks `{part}`: {error}");
    }
    for noise in ["panicked", "C++", "frame #", "stack backtrace"] {
        assert!(!error.contains(noise), "{args:?}: {error}");
    }
}

/// A folder with a model that has a tokenizer, data of two tasks, and a recipe.
pub struct Bench {
    pub dir: tempfile::TempDir,
}

const WORDS: [&str; 6] = ["good", "bad", "film", "news", "very", "not"];

pub const RECIPE: &str = r#"
seed = 3

[backbone]
path = "model"
dropout = 0.1

[data]
tasks = { a = "a.tsv", b = "b.tsv" }
test = 0.25

[modules.a]
type = "lora"
targets = ["query", "value"]
r = 2

[modules.b]
type = "lora"
targets = ["query", "value"]
r = 2

[router]
type = "soft"
scope = "global"
init_std = 0.1

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "fit"
strategy = "per_task"
train = ["modules.{module}.*", "heads.*"]
epochs = 2
lr = 1e-2
checkpoint_every = 2

[[phases]]
name = "router"
strategy = "routing"
epochs = 1
lr = 1e-2
checkpoint_every = 2
"#;

impl Bench {
    pub fn new() -> Self {
        let bench = Bench { dir: tempfile::tempdir().unwrap() };
        let model = bench.path("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(BERT).join(name), model.join(name)).unwrap();
        }
        let vocab: Vec<String> =
            WORDS.iter().enumerate().map(|(i, w)| format!("\"{w}\": {}", i + 3)).collect();
        let tokenizer = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null,
            "decoder": null, "model": {{"type": "WordLevel", "vocab": {{"[UNK]": 1, {}}},
            "unk_token": "[UNK]"}}}}"#,
            vocab.join(", ")
        );
        fs::write(model.join("tokenizer.json"), tokenizer).unwrap();
        for (task, shift) in [("a", 0), ("b", 3)] {
            let line = |i: usize| {
                let word = |k: usize| WORDS[(i * k + shift + k) % WORDS.len()];
                let score = if (i + shift).is_multiple_of(2) { 1.5 } else { -1.0 };
                format!("{i}\t{score}\t{} {} {}\n", word(1), word(2), word(5))
            };
            let lines: String = (0..240).map(line).collect();
            fs::write(bench.path(&format!("{task}.tsv")), lines).unwrap();
        }
        fs::write(bench.path("recipe.toml"), RECIPE).unwrap();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The recipe with a part replaced, under another name.
    pub fn recipe(&self, name: &str, from: &str, to: &str) -> String {
        assert!(RECIPE.contains(from), "{from}");
        fs::write(self.path(name), RECIPE.replace(from, to)).unwrap();
        self.arg(name)
    }
}
