//! The program as a user meets it: what it prints, what it writes, how it refuses.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;

use std::fs;
use std::path::Path;

use bench::{BERT, Bench, LORA, RECIPE, modl, refuse, run, succeed, text};
use modl_core::Device;
use modl_core::checkpoint::Checkpoint;

#[test]
fn lists_are_tables_or_objects() {
    for (axis, known) in [
        ("modules", "lora"),
        ("routers", "top_k"),
        ("aggregators", "concat"),
        ("strategies", "per_task"),
        ("experiments", "mittal"),
    ] {
        assert!(succeed(&["list", axis]).contains(known));
        let json: serde_json::Value =
            serde_json::from_str(&succeed(&["list", axis, "--json"])).unwrap();
        let entry = json.as_array().unwrap().iter().find(|e| e["name"] == known).unwrap();
        for key in ["name", "title", "citation", "section"] {
            assert!(entry[key].as_str().is_some_and(|s| !s.is_empty()), "{axis}: {key}");
        }
    }
}

#[test]
fn forward_is_what_transformers_and_peft_compute() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let golden = Checkpoint::open(Path::new(LORA).join("outputs.safetensors")).unwrap();
    let adapter = format!("{LORA}/adapter");
    let inputs = format!("{BERT}/inputs.safetensors");
    for (prefix, extra) in [
        ("base", vec![]),
        ("adapted", vec!["--adapter", adapter.as_str()]),
        ("merged", vec!["--adapter", adapter.as_str(), "--merged"]),
    ] {
        let target = out.display().to_string();
        let mut args = vec!["forward", "--model", BERT, "--inputs", &inputs, "--out", &target];
        args.extend(extra);
        succeed(&args);
        let found = Checkpoint::open(&out).unwrap();
        for name in ["last_hidden_state", "pooler_output"] {
            let wanted = golden.tensor(&format!("{prefix}.{name}"), Device::Cpu).unwrap();
            let got = found.tensor(name, Device::Cpu).unwrap();
            assert!(got.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{prefix}.{name}");
        }
    }
}

/// The scores of the data are names here; the router learns from the losses of rows.
#[test]
fn classes_are_trained_and_tested_with_a_router_that_learns_from_losses() {
    let b = Bench::new();
    let (recipe, out) = (b.arg("recipe.toml"), b.arg("run"));
    let set = ["head.type=classification", "router={ type = \"reinforce\", scope = \"global\" }"];
    let table = succeed(&["train", &recipe, "--out", &out, "--set", set[0], "--set", set[1]]);
    assert!(table.contains("accuracy") && table.contains("macro_f1"), "{table}");
    assert!(!table.contains("spearman"), "{table}");
    let first = fs::read_to_string(b.path("run/metrics.json")).unwrap();
    succeed(&["eval", &out]);
    assert_eq!(fs::read_to_string(b.path("run/metrics.json")).unwrap(), first);
    let classes = fs::read_to_string(b.path("run/classes.json")).unwrap();
    assert_eq!(classes.matches('"').count(), 4, "{classes}");
}

#[test]
fn a_recipe_is_trained_tested_and_looked_at() {
    let b = Bench::new();
    let (recipe, out) = (b.arg("recipe.toml"), b.arg("run"));
    let table = succeed(&["train", &recipe, "--out", &out]);
    assert!(table.contains("spearman") && table.contains("all"), "{table}");
    let first = fs::read_to_string(b.path("run/metrics.json")).unwrap();
    let again = succeed(&["eval", &out]);
    assert!(again.contains("spearman"));
    assert_eq!(fs::read_to_string(b.path("run/metrics.json")).unwrap(), first);
    let text = succeed(&["inspect", &out]);
    let line = |name: &str| {
        let own = |l: &&str| l.trim_start_matches(['│', ' ']).starts_with(name);
        text.lines().find(own).unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert!(line("router").contains("soft") && line("router").contains("init_std = 0.1"));
    assert!(line("router").contains("one for all sites"), "{text}");
    assert!(line("router").contains("each example"), "{text}");
    assert!(line("aggregator").contains("weighted_sum"));
    assert!(line("b ").contains("r = 2") && line("b ").contains("query, value"), "{text}");
    let phase = succeed(&["inspect", &b.arg("run/phases/1-fit")]);
    assert!(phase.contains("aggregator") && phase.contains("weighted_sum"), "{phase}");
    let adapter = b.arg("run/phases/1-fit/modules/a");
    assert!(succeed(&["inspect", &adapter]).contains("LORA"));
    assert!(succeed(&["inspect", &b.arg("model")]).contains("attention.self.query"));
    // A run is not overwritten, and not gone on with by another recipe.
    refuse(&["train", &recipe, "--out", &out], &["run: holds a run already", "--resume"]);
    let other = b.recipe("other.toml", "seed = 3", "seed = 4");
    let resumed = ["train", &other, "--out", &out, "--resume"];
    refuse(&resumed, &["another recipe", "seed 3, now 4"]);
}

#[test]
fn modules_may_stand_at_different_sites() {
    let b = Bench::new();
    let apart = RECIPE.replacen("[\"query\", \"value\"]", "[\"key\"]", 1);
    let soft = "type = \"soft\"\nscope = \"global\"\ninit_std = 0.1";
    let routing = apart.rfind("[[phases]]").unwrap();
    let apart = apart[..routing].replace(soft, "type = \"fixed\"");
    fs::write(b.path("apart.toml"), &apart).unwrap();
    let (recipe, out) = (b.arg("apart.toml"), b.arg("run"));
    assert!(succeed(&["train", &recipe, "--out", &out]).contains("spearman"));
    assert!(succeed(&["eval", &out]).contains("spearman"));
    // A name that no module has is none the less refused.
    let other = "router={ type = \"fixed\", table = { a = \"a\", b = \"bb\" } }";
    let refused = ["train", &recipe, "--out", &b.arg("other"), "--set", other];
    refuse(&refused, &["unknown module of the router `bb`", "did you mean `b`"]);
    let strict = "router={ type = \"fixed\", skip_absent = false }";
    let refused = ["train", &recipe, "--out", &b.arg("strict"), "--set", strict];
    refuse(&refused, &["unknown module"]);
}

#[test]
fn a_mistake_in_a_recipe_is_named_with_its_line() {
    let b = Bench::new();
    let out = b.arg("run");
    for (from, to, parts) in [
        ("epochs = 2", "epoch = 2", vec!["epoch", "did you mean `epochs`"]),
        ("type = \"soft\"", "type = \"sofft\"", vec!["did you mean `soft`"]),
        ("r = 2\n\n[router]", "rank = 2\n\n[router]", vec!["rank", "allowed"]),
        ("seed = 3", "seed = ", vec![]),
    ] {
        let recipe = b.recipe("typo.toml", from, to);
        let line = 1 + RECIPE[..RECIPE.find(from).unwrap()].lines().count();
        let place = format!("typo.toml:{line}:");
        refuse(&["train", &recipe, "--out", &out], &[&[place.as_str()], &parts[..]].concat());
    }
    let recipe = b.recipe("typo.toml", "[\"query\", \"value\"]", "[\"qurey\", \"value\"]");
    refuse(&["train", &recipe, "--out", &out], &["qurey", "did you mean `query`"]);
    refuse(&["train", &b.arg("none.toml"), "--out", &out], &["none.toml"]);
    let set = ["train", &b.arg("recipe.toml"), "--out", &out, "--set", "phases.0.lrr=1"];
    refuse(&set, &["lrr", "lr"]);
}

#[test]
fn bad_data_is_refused_in_words() {
    let b = Bench::new();
    let (recipe, out) = (b.arg("recipe.toml"), b.arg("run"));
    fs::write(b.path("a.tsv"), "").unwrap();
    refuse(&["train", &recipe, "--out", &out], &["a.tsv", "no examples"]);
    fs::write(b.path("a.tsv"), "1\tbad\ttext\n").unwrap();
    refuse(&["train", &recipe, "--out", &out], &["a.tsv:1", "score"]);
    fs::remove_file(b.path("a.tsv")).unwrap();
    refuse(&["train", &recipe, "--out", &out], &["a.tsv"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state() {
    let b = Bench::new();
    let recipe = b.recipe(
        "steep.toml",
        "lr = 1e-2\ncheckpoint_every = 2",
        "lr = 1e30\nclip = 1e30\ncheckpoint_every = 1",
    );
    let out = b.arg("run");
    refuse(&["train", &recipe, "--out", &out], &["lower lr", "step", "state of step"]);
    assert!(b.path("run/phases/1-fit/a/state.json").is_file());
}

#[test]
fn broken_models_and_adapters_are_refused_whole() {
    let b = Bench::new();
    let inputs = format!("{BERT}/inputs.safetensors");
    let out = b.arg("out.safetensors");
    let model = b.arg("model");
    let forward = |extra: &[&str], parts: &[&str]| {
        let mut args = vec!["forward", "--model", &model, "--inputs", &inputs, "--out", &out];
        args.extend(extra);
        refuse(&args, parts);
        assert!(!b.path("out.safetensors").exists());
    };
    // An adapter for other names: all offenders, with the nearest.
    let adapter = b.path("adapter");
    fs::create_dir(&adapter).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(Path::new(LORA).join("adapter").join(name), adapter.join(name)).unwrap();
    }
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let arg = b.arg("adapter");
    fs::write(adapter.join("adapter_config.json"), config.replace("\"query\"", "\"key\"")).unwrap();
    forward(&["--adapter", &arg], &["4 missing, 4 unexpected", "nearest", "self.key.lora_A"]);
    fs::write(adapter.join("adapter_config.json"), config.replace("\"r\": 4", "\"r\": 5")).unwrap();
    forward(&["--adapter", &arg], &["of another shape", "wanted [5, 32], found [4, 32]"]);
    fs::write(
        adapter.join("adapter_config.json"),
        config.replace("\"use_qalora\": false", "\"use_qalora\": true"),
    )
    .unwrap();
    forward(&["--adapter", &arg], &["use_qalora"]);
    // A model that is cut off, of an unknown architecture, or not there.
    let weights = b.path("model/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    forward(&[], &["model.safetensors", "not a whole safetensors file"]);
    fs::write(&weights, &whole).unwrap();
    let path = b.path("model/config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("\"model_type\": \"bert\"", "\"model_type\": \"bart\""))
        .unwrap();
    forward(&[], &["unknown architecture `bart`", "did you mean `bert`"]);
    fs::remove_file(&path).unwrap();
    forward(&[], &["config.json"]);
}

#[test]
fn wrong_arguments_end_with_code_2_and_the_way_to_the_help() {
    for args in [vec!["lisst"], vec!["list", "routes"], vec!["train"], vec![]] {
        let out = run(&args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(text(&out.stderr).contains("help"), "{args:?}: {}", text(&out.stderr));
    }
}

/// As after `| head`: whoever reads has left.
#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut command = modl();
    command.args(["list", "modules"]).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", text(&out.stderr));
}
