//! The seams carry every family of the survey on a real pretrained backbone: each stand-in of the
//! testing kit attaches at a site of MiniLM, trains, mixes per row of a batch, and is saved and
//! loaded, without a line of core that knows it.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::testing::standins::{self, BalancedHalves, Generated, Prompt, Scale, WeightMask};
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{
    Context, Device, Init, Kind, Modular, ModuleConfig, Registry, Seed, Select, Targets, Tensor,
    Tensors, no_grad,
};
use modl_models::{LoadOptions, Tokenizer, mean_pool, open};

const SEED: Seed = Seed(7);
const TEXTS: [&str; 4] = [
    "A man is eating food.",
    "The stock market fell sharply today.",
    "Yay!",
    "A cat plays with a ball.",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/all-MiniLM-L6-v2")
}

fn minilm() -> Modular {
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    Modular::from_box(open(folder(), &options).unwrap(), SEED).unwrap()
}

fn inputs() -> Tensors {
    Tokenizer::open(folder()).unwrap().encode(&TEXTS, 32).unwrap().inputs()
}

fn context() -> Context {
    let z = Init::Normal(1.0).tensor(&[4, 3], SEED, Kind::Float, Device::Cpu).unwrap();
    Context::eval().with_feature("task_vector", z)
}

/// Sentence vectors `[4, 384]`.
fn vectors(model: &Modular) -> Tensor {
    let inputs = inputs();
    let out = model.forward(&inputs, &context()).unwrap();
    let mask = out.get("attention_mask").unwrap_or(inputs.need("attention_mask").unwrap());
    mean_pool(out.need("last_hidden_state").unwrap(), mask).unwrap()
}

/// Ten steps of gradient descent that pull the sentence vectors towards given ones; the loss
/// before and after.
fn train(model: &Modular) -> (f64, f64) {
    let target = Init::Normal(0.3).tensor(&[4, 384], SEED, Kind::Float, Device::Cpu).unwrap();
    let phi = model.trainable();
    let tensors: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    let loss = || vectors(model).mse(&target).unwrap();
    let before = loss().item().unwrap();
    for _ in 0..10 {
        let grads = loss().gradients(&tensors, false).unwrap();
        let norm: f64 =
            grads.iter().flatten().map(|g| g.norm().unwrap().item().unwrap().powi(2)).sum();
        for (t, g) in tensors.iter().zip(&grads) {
            let step = g.as_ref().unwrap().mul_scalar(-0.3 / norm.sqrt().max(1e-12)).unwrap();
            no_grad(|| (*t).clone().add_in_place(&step)).unwrap();
        }
    }
    (before, loss().item().unwrap())
}

fn check(make: impl Fn() -> Box<dyn ModuleConfig>, site: &str) {
    let registry = Registry::new().with(standins::register).unwrap();
    let mut m = minilm();
    for name in ["a", "b"] {
        m.attach(name, make(), &Targets::names([site])).unwrap();
    }
    perturb(&m, &Select::new("modules.b.*"), 0.1, SEED).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();

    // It trains, and the backbone does not move.
    let print = m.backbone().fingerprint().unwrap();
    m.route(Given::only(0), false).unwrap();
    m.train_only(&Select::new("modules.a.*")).unwrap();
    let (before, after) = train(&m);
    assert!(after < before, "{site}: the loss goes down, {before} to {after}");
    assert_eq!(m.backbone().fingerprint().unwrap(), print);

    // Rows of one batch with different modules, and one with none.
    let a = vectors(&m);
    m.route(Given::only(1), false).unwrap();
    let b = vectors(&m);
    assert!(a.max_abs_diff(&b).unwrap() > 1e-4);
    m.route(Given::rows(&[Some(1), None, Some(0), Some(1)]), false).unwrap();
    let (mixed, base) =
        (m.forward(&inputs(), &context()).unwrap(), m.forward_base(&inputs(), &context()).unwrap());
    let (mixed, base) =
        (mixed.need("last_hidden_state").unwrap(), base.need("last_hidden_state").unwrap());
    let free = mixed.select(0, 1).unwrap().narrow(0, 0, base.len_of(1)).unwrap();
    assert!(
        free.all_close(&base.select(0, 1).unwrap(), 1e-4, 1e-4).unwrap(),
        "{site}: a row without module"
    );
    let rows = vectors(&m);
    for (row, alone) in [(0, &b), (2, &a), (3, &b)] {
        let (x, y) = (rows.select(0, row).unwrap(), alone.select(0, row).unwrap());
        assert!(x.all_close(&y, 1e-4, 1e-4).unwrap(), "{site}: row {row}");
    }

    // It comes back from its file, and the routing with it.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    m.save_module("a", &path).unwrap();
    let mut again = minilm();
    again.load_module(&path, None, &registry).unwrap();
    again.aggregate(Box::new(Sum::default())).unwrap();
    again.route(Given::only(0), false).unwrap();
    assert!(vectors(&again).bit_equal(&a).unwrap(), "{site}: from its file");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn input_composition_a_prompt() {
    check(|| Box::new(Prompt), "embeddings");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn parameter_composition_a_mask_on_a_weight() {
    check(|| Box::new(WeightMask), "layer.2.attention.self.value");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn function_composition_a_scale() {
    for site in
        ["layer.1.output", "layer.3.attention.output", "encoder.layer.4", "output.LayerNorm"]
    {
        check(|| Box::new(Scale), site);
    }
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn a_hypernetwork_from_a_task_vector() {
    check(|| Box::new(Generated), "layer.5.intermediate.dense");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn a_router_that_looks_at_the_whole_batch() {
    let registry = Registry::new().with(standins::register).unwrap();
    let make = || {
        let mut m = minilm();
        for name in ["a", "b"] {
            m.attach(name, Box::new(Scale), &Targets::names(["query", "value"])).unwrap();
        }
        perturb(&m, &Select::all(), 0.3, SEED).unwrap();
        m.aggregate(Box::new(Sum::default())).unwrap();
        m
    };
    let mut m = make();
    m.route(Box::new(BalancedHalves), true).unwrap();
    m.train_only(&Select::new("routers.*")).unwrap();
    let (before, after) = train(&m);
    assert!(after < before, "the loss goes down, {before} to {after}");
    let cx = context();
    m.forward(&inputs(), &cx).unwrap();
    let trace = cx.take_trace();
    let (_, routing) = &trace.routings[0];
    let load = routing.dense(Kind::Float, Device::Cpu).unwrap().gt_scalar(0.0).unwrap();
    let load = load.to_kind(Kind::Float).unwrap().sum_dims(&[0], false).unwrap();
    assert_eq!(load.to_vec::<f32>().unwrap(), [2.0, 2.0], "each module gets half of the batch");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routing.safetensors");
    m.save_routing(&path).unwrap();
    let mut again = make();
    again.load_routing(&path, &registry).unwrap();
    assert!(vectors(&again).bit_equal(&vectors(&m)).unwrap());
}
