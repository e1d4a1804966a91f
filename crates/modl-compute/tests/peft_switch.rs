//! LoRA within the experts of Switch Transformers, whose matrices are modules of their own for PEFT.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::low_rank::extract_difference;
use modl_compute::sparse::attach_difference;
use modl_compute::{Lora, LoraInit, peft};
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{
    Backbone, Context, Device, Modular, Seed, Select, SiteKind, Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};
use modl_route::Fixed;

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../modl-models/tests/fixtures/tiny_switch")
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn backbone() -> Box<dyn Backbone> {
    open(base(), &LoadOptions::default()).unwrap()
}

fn logits(model: &Modular, inputs: &Tensors, cx: &Context) -> Tensor {
    model.forward(inputs, cx).unwrap().need("logits").unwrap().clone()
}

fn inputs() -> Tensors {
    tensors(base().join("inputs.safetensors"))
}

/// With PEFT's adapter as `a`.
fn adapted() -> Modular {
    let mut model = Modular::from_box(backbone(), Seed(1)).unwrap();
    peft::load(&mut model, base().join("lora"), Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

#[test]
fn what_is_written_again_is_what_peft_wrote() {
    let (model, dir) = (adapted(), tempfile::tempdir().unwrap());
    peft::save(&model, "a", dir.path()).unwrap();
    let file = "adapter_model.safetensors";
    let (ours, theirs) = (tensors(dir.path().join(file)), tensors(base().join("lora").join(file)));
    // Queries; the matrices of the layers without experts; those of four experts in three layers.
    assert_eq!((ours.len(), theirs.len()), (2 * (8 + 6 + 24), 2 * (8 + 6 + 24)));
    for (key, t) in theirs.iter() {
        assert!(ours.need(key).unwrap().bit_equal(t).unwrap(), "{key}");
    }
    let text = |dir: &Path| std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    let json = |dir: &Path| serde_json::from_str::<serde_json::Value>(&text(dir)).unwrap();
    assert_eq!(json(dir.path()), json(&base().join("lora")));
}

/// Each token that an expert gets has the labels of its row.
#[test]
fn rows_have_modules_of_their_own_within_experts() {
    let mut model = Modular::from_box(backbone(), Seed(1)).unwrap();
    let within = Targets::pattern(r".*\.expert_\d+\.(wi|wo)");
    let lora = || Lora { init: LoraInit::Random, ..Lora::default() };
    for name in ["a", "b"] {
        model.attach(name, Box::new(lora()), &within).unwrap();
    }
    perturb(&model, &Select::new("modules.*"), 0.1, Seed(2)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    let mut single = Vec::new();
    for j in 0..2 {
        model.route(Given::only(j), false).unwrap();
        single.push(logits(&model, &inputs(), &Context::eval()));
    }
    model.route(Box::new(Fixed::default()), false).unwrap();
    let mixed = logits(&model, &inputs(), &Context::eval().with_tasks(["b", "a"]));
    let row = |t: &Tensor, n: i64| t.narrow(0, n, 1).unwrap();
    assert!(row(&mixed, 0).all_close(&row(&single[1], 0), 1e-5, 1e-5).unwrap());
    assert!(row(&mixed, 1).all_close(&row(&single[0], 1), 1e-5, 1e-5).unwrap());
    assert!(single[0].max_abs_diff(&single[1]).unwrap() > 1e-2);
}

/// The stacked matrices have a change of their own, and the matrices of each expert another: both
/// count, as if the first had been merged.
#[test]
fn a_module_of_all_experts_and_one_within_them_add_up() {
    let wi = || Lora { target_parameters: vec!["experts.wi".into()], ..lora() };
    fn lora() -> Lora {
        Lora { init: LoraInit::Random, ..Lora::default() }
    }
    let stacks = Targets::pattern("all-experts");
    let within = Targets::pattern(r".*\.expert_\d+\.wi");
    let run = |merged: bool| {
        let mut model = Modular::from_box(backbone(), Seed(1)).unwrap();
        model.attach("stack", Box::new(wi()), &stacks).unwrap();
        if merged {
            model.merge("stack").unwrap();
            model.detach("stack").unwrap();
        }
        model.attach("each", Box::new(lora()), &within).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Given::only(0), false).unwrap();
        logits(&model, &inputs(), &Context::eval())
    };
    let (both, merged) = (run(false), run(true));
    assert!(both.all_close(&merged, 1e-5, 1e-5).unwrap());
}

#[test]
fn what_experts_have_learned_becomes_a_lora_of_each() {
    let mut tuned = adapted();
    tuned.merge("a").unwrap();
    // PEFT's ranks are 2, and 3 in `expert_1.wi`.
    let found = extract_difference(&*backbone(), tuned.backbone(), 3).unwrap();
    assert_eq!((found.sites.len(), found.left_out.len()), (8 + 6 + 24, 0));
    assert!(found.sites.iter().all(|e| e.lost < 1e-4));
    let less = extract_difference(&*backbone(), tuned.backbone(), 2).unwrap();
    let lost: Vec<_> = less.sites.iter().filter(|e| e.lost > 1e-2).map(|e| &e.path).collect();
    assert!(lost.len() == 3 && lost.iter().all(|p| p.ends_with("expert_1.wi")), "{lost:?}");
    // All that has changed, once.
    let mut model = Modular::from_box(backbone(), Seed(1)).unwrap();
    attach_difference(&mut model, tuned.backbone(), "d", 1.0).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let found = logits(&model, &inputs(), &Context::eval());
    let wanted = tuned.forward_base(&inputs(), &Context::eval()).unwrap();
    assert!(found.all_close(wanted.need("logits").unwrap(), 1e-5, 1e-5).unwrap());
}

#[test]
fn experts_learn() {
    let mut model = Modular::from_box(backbone(), Seed(1)).unwrap();
    let within = Targets::pattern(r".*\.expert_\d+\.(wi|wo)");
    model.attach("a", Box::new(Lora::default()), &within).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let experts = model.backbone().sites().iter().filter(|s| s.kind == SiteKind::Experts).count();
    assert_eq!(model.modular_sites().len(), experts * 4 * 2);
    model.train_only(&Select::new("modules.*")).unwrap();
    let wanted = tensors(base().join("lora/outputs.safetensors"));
    let wanted = wanted.need("logits").unwrap();
    let loss = |model: &Modular| {
        let found = logits(model, &inputs(), &Context::eval());
        found.sub(wanted).unwrap().square().unwrap().mean().unwrap()
    };
    let before = loss(&model).item().unwrap();
    for _ in 0..60 {
        let all = model.trainable();
        let leaves: Vec<&Tensor> = all.iter().map(|(_, t)| t).collect();
        let gradients = loss(&model).gradients(&leaves, false).unwrap();
        assert!(gradients.iter().any(Option::is_some));
        no_grad(|| {
            for ((_, t), g) in all.iter().zip(gradients) {
                let Some(g) = g else { continue };
                t.clone().add_in_place(&g.mul_scalar(-2.0).unwrap()).unwrap();
            }
        });
    }
    let after = loss(&model).item().unwrap();
    assert!(after < 0.9 * before, "{before} → {after}");
}
