//! Adapters on the command line: many in a batch, conversion, comparison, inspection.

#![allow(clippy::unwrap_used)]

mod modl;
mod place;

use std::fs;
use std::path::{Path, PathBuf};

use modl_core::Device;
use modl_core::checkpoint::{self, Checkpoint};

use modl::{refuse, succeed};
use place::Place;

const BERT: &str = "../modl-models/tests/fixtures/base_bert";
const FIXTURES: &str = "../modl-compute/tests/fixtures";

fn adapter(name: &str) -> String {
    format!("{FIXTURES}/{name}/adapter")
}

fn golden(name: &str, key: &str) -> modl_core::Tensor {
    let file = Checkpoint::open(Path::new(FIXTURES).join(name).join("outputs.safetensors"));
    file.unwrap().tensor(key, Device::Cpu).unwrap()
}

impl Place {
    /// The hidden states that `modl forward` writes.
    fn forward(&self, extra: &[&str]) -> modl_core::Tensor {
        let (inputs, out) = (format!("{BERT}/inputs.safetensors"), self.arg("out.safetensors"));
        let mut args = vec!["forward", "--model", BERT, "--inputs", &inputs, "--out", &out];
        args.extend(extra);
        succeed(&args);
        let file = Checkpoint::open(self.path("out.safetensors")).unwrap();
        file.tensor("last_hidden_state", Device::Cpu).unwrap()
    }
}

#[test]
fn each_row_gets_the_adapters_that_its_line_names() {
    let place = Place::new();
    let rows = golden("bert_lora", "base.last_hidden_state").len_of(0);
    let names = ["a", "__base__", "b"];
    let lines: Vec<&str> = (0..rows as usize).map(|r| names[r % 3]).collect();
    fs::write(place.path("rows.txt"), lines.join("\n")).unwrap();
    let (a, b) = (format!("a={}", adapter("bert_lora")), format!("b={}", adapter("bert_rslora")));
    let rows_file = place.arg("rows.txt");
    let mixed = place.forward(&["--adapter", &a, "--adapter", &b, "--rows", &rows_file]);
    for (r, name) in lines.iter().enumerate() {
        let wanted = match *name {
            "a" => golden("bert_lora", "adapted.last_hidden_state"),
            "b" => golden("bert_rslora", "adapted.last_hidden_state"),
            _ => golden("bert_lora", "base.last_hidden_state"),
        };
        let row = |t: &modl_core::Tensor| t.select(0, r as i64).unwrap();
        assert!(row(&mixed).all_close(&row(&wanted), 1e-5, 1e-5).unwrap(), "row {r}: {name}");
    }
    let (inputs, out) = (format!("{BERT}/inputs.safetensors"), place.arg("out.safetensors"));
    let args = ["forward", "--model", BERT, "--inputs", &inputs, "--out", &out, "--adapter", &a];
    let with = |rows: &str| {
        fs::write(place.path("rows.txt"), rows).unwrap();
        [&args[..], &["--rows", &rows_file]].concat()
    };
    refuse(&with("c\n"), "no adapter is called `c`");
    refuse(&with("a\n"), "lines for a batch of");
}

#[test]
fn a_lora_is_converted_to_itself_and_a_smaller_rank_says_what_it_loses() {
    let place = Place::new();
    let (source, out) = (adapter("bert_rslora"), place.arg("whole"));
    let text = succeed(&["convert", "--model", BERT, &source, "--rank", "8", "--out", &out]);
    assert!(text.contains("0.00 %"), "{text}");
    let found = place.forward(&["--adapter", &out]);
    let wanted = golden("bert_rslora", "adapted.last_hidden_state");
    assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap());
    let small = place.arg("small");
    let text = succeed(&["convert", "--model", BERT, &source, "--rank", "1", "--out", &small]);
    let all = text.lines().find(|l| l.contains("│ all")).unwrap();
    assert!(!all.contains("0.00 %"), "{text}");
    refuse(&["convert", "--model", BERT, &source, "--out", &small], "is there already");
}

#[test]
fn a_fine_tuned_model_becomes_a_lora_and_says_what_it_leaves_out() {
    let place = Place::new();
    fs::create_dir(place.path("tuned")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(BERT).join(file), place.path("tuned").join(file)).unwrap();
    }
    let weights = place.path("tuned/model.safetensors");
    let merged = Path::new(FIXTURES).join("bert_lora/merged_changed_weights.safetensors");
    let merged = Checkpoint::open(merged).unwrap();
    let base = Checkpoint::open(&weights).unwrap();
    let mut all = base.tensors(Device::Cpu).unwrap();
    let metadata = base.metadata();
    for (name, t) in &mut all {
        if let Ok(changed) = merged.tensor(name, Device::Cpu) {
            *t = changed;
        } else if name.ends_with("embeddings.LayerNorm.bias") {
            *t = t.add_scalar(0.25).unwrap();
        }
    }
    drop(base);
    checkpoint::save(&weights, all.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
    let (tuned, out) = (place.arg("tuned"), place.arg("lora"));
    let text = succeed(&["convert", "--model", BERT, &tuned, "--rank", "8", "--out", &out]);
    assert!(text.contains("left out: embeddings.LayerNorm.bias"), "{text}");
    let found = place.forward(&["--adapter", &out]);
    let wanted = golden("bert_lora", "adapted.last_hidden_state");
    assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap());
}

#[test]
fn a_difference_is_found_and_equal_files_are_equal() {
    let a = adapter("bert_lora");
    let same = succeed(&["diff", &a, &a]);
    assert!(same.contains("equal, bit for bit"), "{same}");
    let place = Place::new();
    let file = Checkpoint::open(Path::new(&a).join("adapter_model.safetensors")).unwrap();
    let mut all = file.tensors(Device::Cpu).unwrap();
    all[2].1 = all[2].1.add_scalar(0.5).unwrap();
    let name = all[2].0.clone();
    let tensors = all.iter().map(|(n, t)| (n.as_str(), t));
    checkpoint::save(place.path("b.safetensors"), tensors, Default::default()).unwrap();
    let text = succeed(&["diff", &a, &place.arg("b.safetensors")]);
    let row = text.lines().find(|l| l.contains(&name)).unwrap();
    assert!(row.contains("5.000e-1") && text.contains("1 tensors differ, 7 are equal"), "{text}");
    let all = adapter("bert_lora_all");
    let text = succeed(&["diff", &a, &all]);
    assert!(text.contains("only in") || text.contains("in the other"), "{text}");
    refuse(&["diff", "tests", &a], "has no .safetensors file");
}

#[test]
fn inspection_shows_ranks_and_what_is_suspicious() {
    let place = Place::new();
    let text = succeed(&["inspect", &adapter("bert_lora")]);
    assert!(text.contains("effective rank") && !text.contains("suspicious"), "{text}");
    fs::create_dir(place.path("sick")).unwrap();
    let from = PathBuf::from(adapter("bert_lora"));
    fs::copy(from.join("adapter_config.json"), place.path("sick/adapter_config.json")).unwrap();
    let file = Checkpoint::open(from.join("adapter_model.safetensors")).unwrap();
    let mut all = file.tensors(Device::Cpu).unwrap();
    all[0].1 = all[0].1.mul_scalar(0.0).unwrap();
    all[1].1 = all[1].1.mul_scalar(f64::NAN).unwrap();
    let to = place.path("sick/adapter_model.safetensors");
    let tensors = all.iter().map(|(n, t)| (n.as_str(), t));
    checkpoint::save(to, tensors, Default::default()).unwrap();
    let text = succeed(&["inspect", &place.arg("sick")]);
    assert!(text.contains("all zero") && text.contains("NaN"), "{text}");
}

/// The tensors of the only file of them in a folder.
fn weights(dir: &Path) -> Vec<(String, modl_core::Tensor)> {
    let mut files = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let file = files.find(|f| f.extension().is_some_and(|e| e == "safetensors")).unwrap();
    Checkpoint::open(file).unwrap().tensors(Device::Cpu).unwrap()
}

#[test]
fn pefts_adapters_become_adapterhubs_and_come_back() {
    for name in ["bert_lora", "bert_vera", "bert_ia3"] {
        let place = Place::new();
        let pefts = match name {
            "bert_ia3" => {
                // One that scales outputs only.
                let from = PathBuf::from(format!("{FIXTURES}/bert_ia3/adapter"));
                let to = place.path("ia3");
                fs::create_dir(&to).unwrap();
                let text = fs::read_to_string(from.join("adapter_config.json")).unwrap();
                let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
                config["target_modules"] = serde_json::json!(["key", "value"]);
                config["feedforward_modules"] = serde_json::json!([]);
                fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
                let own = weights(&from).into_iter().filter(|(key, _)| !key.contains("dense"));
                let own: Vec<_> = own.collect();
                let own = own.iter().map(|(key, t)| (key.as_str(), t));
                let file = to.join("adapter_model.safetensors");
                checkpoint::save(file, own, Default::default()).unwrap();
                to.display().to_string()
            }
            _ => adapter(name),
        };
        let (hub, back) = (place.arg("hub"), place.arg("back"));
        let to = |to: &str, from: &str, out: &str| {
            succeed(&["convert", "--model", BERT, from, "--to", to, "--out", out])
        };
        to("adapterhub", &pefts, &hub);
        to("peft", &hub, &back);
        let wanted = place.forward(&["--adapter", &pefts]);
        for folder in [&hub, &back] {
            let found = place.forward(&["--adapter", folder]);
            assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{folder}");
        }
        let (before, after) = (weights(Path::new(&pefts)), weights(Path::new(&back)));
        assert_eq!(before.len(), after.len(), "{name}");
        for ((key, a), (other, b)) in before.iter().zip(&after) {
            assert!(key == other && a.bit_equal(b).unwrap(), "{name}: {key}, {other}");
        }
    }
}

#[test]
fn adapterhubs_adapters_become_pefts_where_peft_computes_the_same() {
    let place = Place::new();
    for name in ["adapterhub_lora", "adapterhub_lora_qkv", "adapterhub_ia3"] {
        let (source, out) = (adapter(name), place.arg(name));
        let args = ["convert", "--model", BERT, &source, "--to", "peft", "--out", &out];
        let text = succeed(&args);
        assert!(text.contains("sites"), "{text}");
        let found = place.forward(&["--adapter", &out]);
        let wanted = golden(name, "adapted.last_hidden_state");
        assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{name}");
    }
    let refused = |source: &str, to: &str, part: &str| {
        let (source, out) = (adapter(source), place.arg("none"));
        refuse(&["convert", "--model", BERT, &source, "--to", to, "--out", &out], part);
        assert!(!place.path("none").exists());
    };
    // The two libraries compute these in different ways.
    refused("adapterhub_dora", "peft", "adapterhub_dora");
    refused("adapterhub_prompt", "peft", "behind the embeddings");
    refused("adapterhub_vera", "peft", "beside the diagonal");
    refused("bert_dora", "adapterhub", "`dora`");
    refused("bert_prompt_tuning", "adapterhub", "before the embeddings");
    refused("bert_prefix_tuning", "adapterhub", "moves the positions");
    refused("bert_ia3", "adapterhub", "on the input of");
}

#[test]
fn a_fine_tuned_model_becomes_a_sparse_difference_that_says_what_it_loses() {
    let place = Place::new();
    fs::create_dir(place.path("tuned")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(BERT).join(file), place.path("tuned").join(file)).unwrap();
    }
    let file = place.path("tuned/model.safetensors");
    let base = Checkpoint::open(&file).unwrap();
    let (mut all, metadata) = (base.tensors(Device::Cpu).unwrap(), base.metadata());
    drop(base);
    // 1024 numbers and 32 of a linear layer change by 1 and 0.5: the larger ones are a share of
    // 1024 ⁄ 1056 of it.
    for (name, t) in &mut all {
        match name.strip_prefix("encoder.layer.1.attention.self.query.") {
            Some("weight") => *t = t.add_scalar(1.0).unwrap(),
            Some("bias") => *t = t.add_scalar(0.5).unwrap(),
            _ if name.ends_with("position_embeddings.weight") => *t = t.add_scalar(2.0).unwrap(),
            _ => {}
        }
    }
    checkpoint::save(&file, all.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
    let tuned = place.arg("tuned");
    let convert = |density: &str, out: &str| {
        let to = ["--to", "delta", "--density", density, "--out", out];
        succeed(&[&["convert", "--model", BERT, &tuned][..], &to].concat())
    };
    let (part, whole) = (place.arg("part.safetensors"), place.arg("whole.safetensors"));
    let text = convert(&format!("{}", 1024.0 / 1056.0), &part);
    // √(32 · 0.25 ⁄ (1024 + 8)) of the norm.
    let wanted = 100.0 * (8.0f64 / 1032.0).sqrt();
    assert!(text.contains(&format!("lost {wanted:.2} %")), "{text}");
    assert!(text.contains("left out: embeddings.position_embeddings.weight"), "{text}");
    assert!(convert("1.0", &whole).contains("lost 0.00 %"));
    // Without what no site holds, the whole difference is the fine-tuned model.
    for (name, t) in &mut all {
        if name.ends_with("position_embeddings.weight") {
            *t = t.add_scalar(-2.0).unwrap();
        }
    }
    checkpoint::save(&file, all.iter().map(|(n, t)| (n.as_str(), t)), Default::default()).unwrap();
    let found = place.forward(&["--adapter", &whole]);
    let (inputs, out) = (format!("{BERT}/inputs.safetensors"), place.arg("tuned.safetensors"));
    succeed(&["forward", "--model", &tuned, "--inputs", &inputs, "--out", &out]);
    let wanted = Checkpoint::open(place.path("tuned.safetensors")).unwrap();
    let wanted = wanted.tensor("last_hidden_state", Device::Cpu).unwrap();
    assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap());
    refuse(&["convert", "--model", BERT, &adapter("bert_lora"), "--to", "delta", "--out", "x"], {
        "is no fine-tuned model"
    });
}

#[test]
fn inspection_of_adapterhubs_folders_says_method_sites_and_parameters() {
    for (name, said) in [
        ("adapterhub_mam", "prefix_tuning + bottleneck at 4 sites, 3656 parameters"),
        ("adapterhub_seq_bn_inv", "invertible + bottleneck at 3 sites"),
        ("adapterhub_compacter", "compacter at 4 sites"),
        ("adapterhub_dora", "adapterhub_dora at 4 sites, 1152 parameters"),
        ("adapterhub_prompt", "prompt_tuning at 1 sites, 96 parameters"),
        ("adapterhub_loreft", "reft at 2 sites"),
        ("adapterhub_vera", "vera at 4 sites"),
    ] {
        let text = succeed(&["inspect", &adapter(name)]);
        assert!(text.contains(said), "{name}: {text}");
    }
}

const MODELS: &str = "../modl-models/tests/fixtures";

/// The names of the tensors of a folder, and what it computes for `base_llama`'s inputs.
fn model(place: &Place, dir: &str) -> (Vec<String>, modl_core::Tensor) {
    let names = Checkpoint::open(Path::new(dir).join("model.safetensors")).unwrap().names();
    let inputs = format!("{MODELS}/base_llama/inputs.safetensors");
    let out = place.arg("out.safetensors");
    succeed(&["forward", "--model", dir, "--inputs", &inputs, "--out", &out]);
    (names, Checkpoint::open(&out).unwrap().tensor("logits", Device::Cpu).unwrap())
}

#[test]
fn an_adapter_is_merged_into_a_folder_with_the_names_of_the_base() {
    let place = Place::new();
    let (base, out) = (format!("{FIXTURES}/base_llama"), place.arg("merged"));
    let lora = adapter("llama_lora");
    succeed(&["convert", "--model", &base, &lora, "--to", "model", "--out", &out]);
    let (names, logits) = model(&place, &out);
    assert_eq!(names, model(&place, &base).0);
    let wanted = golden("llama_lora", "merged.logits");
    assert!(logits.all_close(&wanted, 1e-5, 1e-5).unwrap());
    let again = ["convert", "--model", &base, &out, "--to", "model", "--out", "x"];
    refuse(&again, "is a fine-tuned model and no adapter");
}

#[test]
fn a_dense_model_becomes_a_mixture_of_its_copies() {
    let place = Place::new();
    let (base, out) = (format!("{MODELS}/base_llama"), place.arg("moe"));
    let text = succeed(&["upcycle", &base, "--experts", "4", "--top-k", "3", "--out", &out]);
    assert!(text.contains("2 layers with 4 experts each, 3 of them"), "{text}");
    assert!(text.contains("all experts are copies"), "{text}");
    let (names, logits) = model(&place, &out);
    let name = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    assert!(names.iter().any(|n| n == name) && !names.iter().any(|n| n.contains("experts.4")));
    assert!(logits.all_close(&model(&place, &base).1, 1e-5, 1e-5).unwrap());
    refuse(&["upcycle", &base, "--out", &out], "is there already");
}

/// A file of mergekit-moe, whose gates transformers and torch have worked out, too.
#[test]
fn a_file_of_mergekit_moe_is_followed() {
    let place = Place::new();
    let base = place.path("base");
    fs::create_dir(&base).unwrap();
    let golden = Path::new(MODELS).join("upcycled_llama");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(MODELS).join("base_llama").join(file), base.join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden.join(file), base.join(file)).unwrap();
    }
    let mut text = fs::read_to_string(golden.join("mixture.yml")).unwrap();
    for name in ["BASE", "EXPERT0", "EXPERT1", "EXPERT2"] {
        text = text.replace(name, &place.arg("base"));
    }
    let file = place.arg("mixture.yml");
    let out = place.arg("moe");
    fs::write(&file, &text).unwrap();
    let said = succeed(&["upcycle", &file, "--out", &out]);
    assert!(said.contains("2 layers with 3 experts each, 2 of them"), "{said}");
    let wanted = Checkpoint::open(golden.join("gates.safetensors")).unwrap();
    let wanted = wanted.tensor("hidden", Device::Cpu).unwrap().select(0, 1).unwrap();
    let found = Checkpoint::open(place.path("moe").join("model.safetensors")).unwrap();
    let found = found.tensor("model.layers.1.block_sparse_moe.gate.weight", Device::Cpu).unwrap();
    assert!(found.max_abs_diff(&wanted).unwrap() < 1e-5);
    refuse(&["upcycle", &file, "--top-k", "1", "--out", "x"], "experts_per_token");
    for (more, words) in [("shared_experts: 3", "shared_experts"), ("tokens: 3", "tokens")] {
        fs::write(&file, format!("{text}{more}\n")).unwrap();
        refuse(&["upcycle", &file, "--out", "x"], words);
    }
}
