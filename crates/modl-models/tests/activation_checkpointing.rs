//! Gradients with activation checkpointing are those without it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale, WeightMask};
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{
    ActivationCheckpoints, Context, Device, Kind, Modular, Seed, Select, Targets, Tensor, Tensors,
};
use modl_models::{LoadOptions, open};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A backbone with dropout and a module of each kind: at the tokens, at weights, at hidden states.
fn model(base: &str, query: &str, hidden: &str) -> (Modular, Tensors) {
    let dir = fixture(base);
    let options = LoadOptions { dropout: Some(0.2), ..LoadOptions::default() };
    let mut model = Modular::from_box(open(&dir, &options).unwrap(), Seed(1)).unwrap();
    let tokens = model.backbone().sites()[1].path.clone();
    model.attach("prompt", Box::new(Prompt), &Targets::names([tokens])).unwrap();
    model.attach("mask", Box::new(WeightMask), &Targets::names([query])).unwrap();
    model.attach("scale", Box::new(Scale), &Targets::names([hidden])).unwrap();
    perturb(&model, &Select::all(), 0.1, Seed(2)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
        .train_only(&Select::any(["modules.*", "base.*norm*", "base.*ln_*", "base.*LayerNorm*"]))
        .unwrap();
    let file = Checkpoint::open(dir.join("inputs.safetensors")).unwrap();
    (model, file.tensors(Device::Cpu).unwrap().into_iter().collect())
}

fn loss(model: &Modular, inputs: &Tensors, cx: &Context) -> Tensor {
    let outputs = model.forward(inputs, cx).unwrap();
    outputs.need("last_hidden_state").unwrap().tanh().unwrap().square().unwrap().mean().unwrap()
}

fn same_gradients(base: &str, query: &str, hidden: &str) {
    let (model, inputs) = model(base, query, hidden);
    let trained = model.trainable();
    let leaves: Vec<&Tensor> = trained.iter().map(|(_, t)| t).collect();
    let cx = || Context::train(Seed(5), 3);

    // Two passes in one loss, as a batch in two parts has them.
    let whole = loss(&model, &inputs, &cx());
    let total = whole.add(&loss(&model, &inputs, &Context::train(Seed(6), 3))).unwrap();
    let wanted = total.gradients(&leaves, false).unwrap();

    let kept = ActivationCheckpoints::new();
    let with = |cx: Context| cx.with_activation_checkpoints(kept.clone());
    let own = loss(&model, &inputs, &with(cx()));
    assert!(own.bit_equal(&whole).unwrap(), "{base}: the pass itself is the same");
    let own = own.add(&loss(&model, &inputs, &with(Context::train(Seed(6), 3)))).unwrap();
    let found = kept.gradients(&model, &own, &leaves).unwrap();

    let mut kinds = 0;
    for (((name, _), wanted), found) in trained.iter().zip(&wanted).zip(&found) {
        match (wanted, found) {
            (Some(a), Some(b)) => {
                let size = a.norm().unwrap().item().unwrap();
                assert!(size > 1e-9, "{base}: {name} has no influence");
                let apart = a.sub(b).unwrap().norm().unwrap().item().unwrap();
                assert!(apart < 1e-5 * size, "{base}: {name}: {apart} of {size}");
                kinds += usize::from(name.starts_with("modules."));
            }
            (None, None) => {}
            _ => panic!("{base}: {name}: {} and {}", wanted.is_some(), found.is_some()),
        }
    }
    assert!(kinds >= 3, "{base}: {kinds} modules' parameters have gradients");
}

#[test]
fn bert() {
    same_gradients("deterministic_bert", "query", "output.dense");
}

#[test]
fn gpt2() {
    same_gradients("deterministic_gpt2", "c_attn", "c_proj");
}

#[test]
fn llama() {
    same_gradients("deterministic_llama", "q_proj", "down_proj");
}

#[test]
fn vit() {
    same_gradients("deterministic_vit", "q_proj", "fc2");
}

#[test]
fn what_cannot_be_done_is_refused() {
    let (mut model, inputs) = model("deterministic_bert", "query", "output.dense");
    let cx = || Context::eval().with_activation_checkpoints(ActivationCheckpoints::new());
    model.forward(&inputs, &cx()).unwrap();
    model.route(Given::only(0), true).unwrap();
    let error = model.forward(&inputs, &cx()).unwrap_err().to_string();
    assert!(error.contains("one router for all sites"), "{error}");

    let tiny = Modular::new(TinyBackbone::new(Seed(0), Kind::Float).unwrap(), Seed(1)).unwrap();
    let error = tiny.forward(&Tensors::new(), &cx()).unwrap_err().to_string();
    assert!(error.contains("activation_checkpointing"), "{error}");
}
