//! Adapters that AdapterHub's library made: what they compute, and folders written again.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use modl_compute::{
    Bottleneck, Dora, Ia3, Invertible, InvertibleBlock, PrefixTuning, PromptTuning, Reft, Vera,
    adapterhub, peft,
};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{Context, Device, Modular, ModuleConfig, Seed, Select, Targets, Tensors};
use modl_models::{Bert, LoadOptions};
use serde_json::{Value, json};

const ADAPTERS: &[&str] = &[
    "seq_bn",
    "double_seq_bn",
    "par_bn",
    "par_bn_learned",
    "post_add",
    "seq_bn_inv",
    "compacter",
    "compacter_pp",
    "lora",
    "lora_qkv",
    "dora",
    "ia3",
    "vera",
    "prompt",
    "prefix",
    "prefix_flat",
    "loreft",
    "loreft_first",
    "noreft_tied",
    "mam",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn model() -> Modular {
    let bert = Bert::load(fixture("base_bert"), &LoadOptions::default()).unwrap();
    Modular::new(bert, Seed(1)).unwrap()
}

fn with_adapter(dir: &Path) -> Modular {
    let mut model = model();
    assert_eq!(adapterhub::load(&mut model, dir, None).unwrap(), "own");
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

fn json_of(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn outputs_are_those_of_adapterhub() {
    let inputs = tensors(fixture("base_bert").join("inputs.safetensors"));
    for name in ADAPTERS {
        let folder = fixture(&format!("adapterhub_{name}"));
        let golden = tensors(folder.join("outputs.safetensors"));
        let model = with_adapter(&folder.join("adapter"));
        let found = model.forward(&inputs, &Context::eval()).unwrap();
        let (found, wanted) = (
            found.need("last_hidden_state").unwrap(),
            golden.need("adapted.last_hidden_state").unwrap(),
        );
        let apart = found.max_abs_diff(wanted).unwrap();
        assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {apart}");
    }
}

#[test]
fn what_is_written_again_is_what_was_read() {
    for name in ADAPTERS {
        let from = fixture(&format!("adapterhub_{name}")).join("adapter");
        let to = tempfile::tempdir().unwrap();
        adapterhub::save(&with_adapter(&from), "own", to.path()).unwrap();
        let (ours, mut theirs) = (json_of(to.path()), json_of(&from));
        // Where the model lay.
        theirs["model_name"] = ours["model_name"].clone();
        // Whether it had a head, which the backbone here has not.
        theirs["model_class"] = ours["model_class"].clone();
        assert_eq!(ours, theirs, "{name}");
        let ours = tensors(to.path().join("adapter.safetensors"));
        let theirs = tensors(from.join("adapter.safetensors"));
        let bare = |key: &str| key.strip_prefix("bert.").unwrap_or(key).to_owned();
        let names = |t: &Tensors| t.iter().map(|(n, _)| bare(n)).collect::<BTreeSet<_>>();
        assert_eq!(names(&ours), names(&theirs), "{name}");
        for (key, t) in theirs.iter() {
            // Of a unit without positions AdapterHub keeps numbers that mean nothing.
            let idle = *name == "loreft_first" && key.contains("units.1.");
            assert!(idle || ours.need(&bare(key)).unwrap().bit_equal(t).unwrap(), "{name}: {key}");
        }
    }
}

/// A copy of a folder with other settings.
fn copy_with(name: &str, to: &Path, edit: impl FnOnce(&mut Value)) {
    let from = fixture(&format!("adapterhub_{name}")).join("adapter");
    std::fs::copy(from.join("adapter.safetensors"), to.join("adapter.safetensors")).unwrap();
    let mut config = json_of(&from);
    edit(&mut config);
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn settings_that_modl_would_not_follow_are_refused_by_name() {
    for (name, setting, value) in [
        ("seq_bn", "ln_before", json!(true)),
        ("seq_bn", "use_gating", json!(true)),
        ("seq_bn", "stochastic_depth", json!(0.1)),
        ("seq_bn", "made_up", json!(3)),
        ("lora", "composition_mode", json!("product")),
        ("lora", "use_gating", json!(true)),
        ("seq_bn_inv", "inv_adapter", json!("glow")),
        ("compacter", "shared_W_phm", json!(true)),
        ("compacter", "scaling", json!(2.0)),
        ("dora", "init_weights", json!("bert")),
        ("ia3", "alpha", json!(2)),
        ("vera", "use_dora", json!(true)),
        ("prompt", "combine", json!("prefix_after_bos")),
        ("prefix", "non_linearity", json!("relu")),
        ("prefix_flat", "use_gating", json!(true)),
        ("prefix_flat", "dropout", json!(0.1)),
        ("loreft", "output_reft", json!(false)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy_with(name, dir.path(), |c| c["config"][setting] = value.clone());
        let mut model = model();
        let e = adapterhub::load(&mut model, dir.path(), None).unwrap_err().to_string();
        assert!(e.contains(setting), "{e}");
        assert!(model.modules().is_empty());
    }
    let dir = tempfile::tempdir().unwrap();
    copy_with("lora", dir.path(), |c| c["hidden_size"] = json!(48));
    let e = adapterhub::load(&mut model(), dir.path(), None).unwrap_err().to_string();
    assert!(e.contains("width 48"), "{e}");
    copy_with("lora", dir.path(), |c| c["config"]["architecture"] = json!("mtl_lora"));
    let e = adapterhub::load(&mut model(), dir.path(), None).unwrap_err().to_string();
    assert!(e.contains("mtl_lora"), "{e}");
}

#[test]
fn a_file_without_what_its_layers_share_is_refused() {
    // As adapters 1.3.0 writes it from a bare model.
    for (name, shared) in [("vera", "lora_A"), ("compacter", "phm_rule")] {
        let dir = tempfile::tempdir().unwrap();
        copy_with(name, dir.path(), |_| ());
        let path = dir.path().join("adapter.safetensors");
        let all = tensors(path.clone());
        let own = all.iter().filter(|(key, _)| !key.contains("shared_parameters"));
        checkpoint::save(path, own, Default::default()).unwrap();
        let e = adapterhub::load(&mut model(), dir.path(), None).unwrap_err().to_string();
        assert!(e.contains(&format!("shared_parameters.own.{shared}")), "{e}");
    }
}

#[test]
fn lora_of_an_old_version_has_the_scale_that_it_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    for (version, alpha) in [("adapters.1.0.1", 4.0), ("adapters.1.1.0", 6.0)] {
        copy_with("lora", dir.path(), |c| c["version"] = json!(version));
        let mut model = model();
        adapterhub::load(&mut model, dir.path(), None).unwrap();
        let (config, _) = model.recipe("own").unwrap();
        assert_eq!(config.to_json().unwrap()["alpha"], json!(alpha), "{version}");
    }
}

#[test]
fn what_adapterhub_cannot_say_is_not_written() {
    let save = |config: Box<dyn ModuleConfig>, targets: Targets| {
        let mut model = model();
        model.attach("own", config, &targets).unwrap();
        adapterhub::save(&model, "own", tempfile::tempdir().unwrap().path())
            .unwrap_err()
            .to_string()
    };
    let linear = || Targets::names(["query", "output.dense"]);
    assert!(save(Box::<Ia3>::default(), linear()).contains("on the input of"));
    assert!(save(Box::<Dora>::default(), linear()).contains("`dora`"));
    let vera = Vera { r: 2, ..Vera::default() };
    assert!(
        save(Box::new(vera), Targets::names(["query", "intermediate.dense"])).contains("VeRA at")
    );
    let direft = Targets::pattern("all-block");
    assert!(save(Box::new(Reft::direft()), direft).contains("DiReFT"));
    let (prompt, prefix) = (PromptTuning::default(), PrefixTuning::default());
    let tokens = Targets::pattern("all-tokens");
    assert!(save(Box::new(prompt), tokens.clone()).contains("before the embeddings"));
    let both = Targets::pattern("all-tokens|all-attention");
    assert!(save(Box::new(prefix), both).contains("moves the positions"));
    let glow = Invertible { block: InvertibleBlock::Glow, ..Invertible::default() };
    assert!(save(Box::new(glow), tokens).contains("GLOW"));
}

#[test]
fn modules_made_here_come_back_from_their_folders() {
    let inputs = tensors(fixture("base_bert").join("inputs.safetensors"));
    let reft = Reft { r: 2, suffix_positions: 1, ..Reft::loreft() };
    let last = Reft { prefix_positions: 0, suffix_positions: 2, ..reft.clone() };
    let qv = Targets::names(["query", "value"]);
    let blocks = Targets::pattern("all-block");
    let made: [(Box<dyn ModuleConfig>, Targets); 5] = [
        (Box::new(reft), blocks.clone()),
        (Box::new(last), blocks),
        (Box::new(Vera { r: 2, ..Vera::default() }), qv),
        (Box::new(Invertible::default()), Targets::pattern("all-tokens")),
        (Box::new(Bottleneck { reduction_factor: 4.0, ..Bottleneck::houlsby() }), {
            Bottleneck::houlsby_sites()
        }),
    ];
    for (config, targets) in made {
        let (kind, dir) = (config.kind(), tempfile::tempdir().unwrap());
        let mut here = model();
        here.attach("own", config, &targets).unwrap();
        perturb(&here, &Select::all(), 0.2, Seed(3)).unwrap();
        adapterhub::save(&here, "own", dir.path()).unwrap();
        here.aggregate(Box::new(Sum::default())).unwrap();
        here.route(Given::only(0), false).unwrap();
        let there = with_adapter(dir.path());
        let run = |m: &Modular| m.forward(&inputs, &Context::eval()).unwrap();
        let (a, b) = (run(&here), run(&there));
        let last = |t: &Tensors| t.need("last_hidden_state").unwrap().clone();
        assert!(last(&a).all_close(&last(&b), 1e-5, 1e-5).unwrap(), "{kind}");
    }
}

#[test]
fn the_two_formats_are_told_apart() {
    let theirs = fixture("adapterhub_lora").join("adapter");
    let pefts = fixture("bert_lora").join("adapter");
    assert!(adapterhub::is_folder(&theirs) && !adapterhub::is_folder(&pefts));
    let e = peft::load(&mut model(), &theirs, None).unwrap_err().to_string();
    assert!(e.contains("AdapterHub"), "{e}");
    let e = adapterhub::load(&mut model(), &pefts, None).unwrap_err().to_string();
    assert!(e.contains("PEFT"), "{e}");
}

#[test]
fn an_adapter_that_torch_saved_is_the_same() {
    let from = fixture("adapterhub_lora");
    let dir = tempfile::tempdir().unwrap();
    for name in ["adapter/adapter_config.json", "pytorch_adapter.bin"] {
        let path = from.join(name);
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let (found, wanted) = (with_adapter(dir.path()), with_adapter(&from.join("adapter")));
    for (name, p) in wanted.params().iter().filter(|(n, _)| n.starts_with("modules.")) {
        assert!(found.params().get(name).unwrap().bit_equal(p.tensor()).unwrap(), "{name}");
    }
}
