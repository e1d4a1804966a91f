//! Mixtral and OLMoE: their sites, how experts lie on disk, and what a file may not lack. Outputs
//! and generation are tested with those of the other decoders.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Context, Device, Layers, Modular, Seed, SiteKind, Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

const BOTH: [&str; 2] = ["deterministic_mixtral", "deterministic_olmoe"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn load(dir: &Path) -> Box<dyn Backbone> {
    open(dir, &LoadOptions::default()).unwrap()
}

fn logits(model: &dyn Backbone, inputs: &Tensors) -> Tensor {
    let layers = Layers::none(model.sites().len());
    no_grad(|| model.forward(inputs, &layers, &Context::eval()))
        .unwrap()
        .need("logits")
        .unwrap()
        .clone()
}

/// A copy of a fixture with other tensors, and with some settings changed.
fn copy(name: &str, tensors: &Tensors, settings: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().join("model.safetensors");
    checkpoint::save(path, tensors.iter(), Default::default()).unwrap();
    dir
}

#[test]
fn routers_and_experts_are_sites() {
    for name in BOTH {
        let model = load(&fixture(name));
        let of = |kind| -> Vec<_> {
            let own = model.sites().iter().filter(move |s| s.kind == kind);
            own.map(|s| (s.path.as_str(), s.input, s.output)).collect()
        };
        let routers = [("model.layers.0.mlp.gate", 32, 4), ("model.layers.1.mlp.gate", 32, 4)];
        assert_eq!(of(SiteKind::Router), routers);
        let experts =
            [("model.layers.0.mlp.experts", 32, 32), ("model.layers.1.mlp.experts", 32, 32)];
        assert_eq!(of(SiteKind::Experts), experts);
        let norms = of(SiteKind::Norm).iter().filter(|(path, ..)| path.contains("_norm")).count();
        assert_eq!(norms, if name == BOTH[1] { 4 } else { 0 });
        // As PEFT has it: neither is an `nn.Linear`.
        let linear = Targets::pattern("all-linear").select(model.sites()).unwrap().len();
        assert_eq!(linear, 8);
        let site = model.sites().iter().find(|s| s.kind == SiteKind::Experts).unwrap();
        let theta = model.theta(site).unwrap();
        assert_eq!(theta.need("gate_up_proj").unwrap().size(), [4, 48, 32]);
        assert_eq!(theta.need("down_proj").unwrap().size(), [4, 32, 24]);
    }
}

#[test]
fn experts_that_lie_in_one_tensor_are_read_too() {
    for name in BOTH {
        let model = load(&fixture(name));
        let params = model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().clone()));
        let dir = copy(name, &params.collect(), json!({}));
        let again = load(dir.path());
        for (path, p) in model.params().iter() {
            assert!(again.params().get(path).unwrap().bit_equal(p.tensor()).unwrap(), "{path}");
        }
        assert_eq!(again.fingerprint().unwrap(), model.fingerprint().unwrap());
    }
}

#[test]
fn a_missing_or_misshapen_expert_is_named() {
    let all = read(fixture(BOTH[0]).join("model.safetensors"));
    let gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight";
    let rest = all.iter().filter(|(n, _)| *n != gone).map(|(n, t)| (n.to_owned(), t.clone()));
    let dir = copy(BOTH[0], &rest.collect(), json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("model.layers.1.mlp.experts.gate_up_proj"), "{e}");
    assert!(e.contains("experts.2.w1") && !e.contains("layers.0"), "{e}");
    let mut wrong = all.clone();
    wrong.set(gone, all.need(gone).unwrap().narrow(0, 0, 20).unwrap());
    let dir = copy(BOTH[0], &wrong, json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("gate_up_proj") && e.contains("44"), "{e}");
    let dir = copy(BOTH[0], &all, json!({ "num_local_experts": 5 }));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("[5, 48, 32]") && e.contains("[4, 48, 32]"), "{e}");
    for (key, value) in [("num_experts_per_tok", json!(5)), ("num_local_experts", json!("many"))] {
        let dir = copy(BOTH[0], &all, json!({ key: value }));
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(key), "{e}");
    }
}

/// OLMoE's two settings, against the formula: gates that sum to 1 make up for those that do not
/// where the router leaves no choice, and a wide limit limits nothing.
#[test]
fn settings_of_olmoe_count() {
    let name = BOTH[1];
    let all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let with = |settings| logits(&*load(copy(name, &all, settings).path()), &inputs);
    let plain = with(json!({}));
    assert!(with(json!({ "clip_qkv": 1e3 })).bit_equal(&plain).unwrap());
    assert!(with(json!({ "clip_qkv": 0.1 })).max_abs_diff(&plain).unwrap() > 1e-4);
    assert!(with(json!({ "norm_topk_prob": true })).max_abs_diff(&plain).unwrap() > 1e-3);
    // With all experts the probabilities sum to 1 as they are.
    let (free, normed) = (
        json!({ "num_experts_per_tok": 4 }),
        json!({ "num_experts_per_tok": 4, "norm_topk_prob": true }),
    );
    assert!(with(free).all_close(&with(normed), 1e-5, 1e-5).unwrap());
}

#[test]
fn rows_may_have_modules_of_their_own_at_routers_and_experts() {
    for name in BOTH {
        let inputs = read(fixture(name).join("inputs.safetensors"));
        let mut model = Modular::from_box(load(&fixture(name)), Seed(1)).unwrap();
        let targets = Targets::pattern("all-router|all-experts");
        for module in ["a", "b"] {
            model.attach(module, Box::new(Scale), &targets).unwrap();
        }
        modl_core::testing::perturb(&model, &modl_core::Select::all(), 0.3, Seed(2)).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        let mut run = |router| {
            model.route(router, false).unwrap();
            model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
        };
        let (a, b) = (run(Given::only(0)), run(Given::only(1)));
        let mixed = run(Given::rows(&[Some(1), Some(0)]));
        for (row, alone) in [(0, b), (1, a)] {
            let (found, wanted) = (mixed.select(0, row).unwrap(), alone.select(0, row).unwrap());
            assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{name} {row}");
        }
    }
}
