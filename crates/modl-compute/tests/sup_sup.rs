//! Task inference of SupSup against finite differences of the entropy under mixed masks.
#![allow(clippy::unwrap_used)]

use modl_compute::sparse::{TaskSearch, infer_task};
use modl_compute::{Form, Full, SupSup};
use modl_core::testing::{Given, Sum, TinyBackbone};
use modl_core::{Context, Device, Kind, Modular, Seed, Targets, Tensor, Tensors, no_grad};

const TASKS: [&str; 4] = ["a", "b", "c", "d"];

fn model(seed: u64) -> Modular {
    let backbone = TinyBackbone::new(Seed(seed), Kind::Double).unwrap();
    let mut model = Modular::new(backbone, Seed(seed).nth(1)).unwrap();
    for name in TASKS {
        model.attach(name, Box::new(SupSup::default()), &Targets::names(["head"])).unwrap();
    }
    model.aggregate(Box::new(Sum::default())).unwrap();
    model
}

/// The head's weights under each mask.
fn masked(model: &Modular) -> Vec<Tensor> {
    let site = model.modular_sites().remove(0);
    let theta = model.backbone().theta(&site).unwrap();
    let bank = &model.layer(&site).unwrap().bank;
    let weight = |j: usize| {
        let all = no_grad(|| bank.module(j).unwrap().compose(&theta)).unwrap().unwrap();
        all.need("weight").unwrap().clone()
    };
    (0..TASKS.len()).map(weight).collect()
}

/// H of the head with Σ αⱼ Wⱼ written into it.
fn entropy(seed: u64, weights: &[Tensor], alpha: &[f64], inputs: &Tensors) -> f64 {
    let backbone = TinyBackbone::new(Seed(seed), Kind::Double).unwrap();
    let mut model = Modular::new(backbone, Seed(1)).unwrap();
    model.attach("mix", Box::new(Full { form: Form::Copy }), &Targets::names(["head"])).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let mut sum = weights[0].zeros_like().unwrap();
    for (w, a) in weights.iter().zip(alpha) {
        sum = sum.add(&w.mul_scalar(*a).unwrap()).unwrap();
    }
    let own = model.params().get("modules.mix.head.weight").unwrap().clone();
    no_grad(|| own.clone().copy_from(&sum)).unwrap();
    let out = no_grad(|| model.forward(inputs, &Context::eval())).unwrap();
    let logits: Vec<f64> = out.need("logits").unwrap().to_vec().unwrap();
    let rows = logits.chunks(5).map(|row| {
        let total: f64 = row.iter().map(|x| x.exp()).sum();
        row.iter().map(|x| -(x.exp() / total) * (x - total.ln())).sum::<f64>()
    });
    rows.sum::<f64>() / (logits.len() / 5) as f64
}

fn by_differences(seed: u64, weights: &[Tensor], inputs: &Tensors, search: TaskSearch) -> usize {
    let mut left: Vec<usize> = (0..weights.len()).collect();
    while left.len() > 1 {
        let gain = |j: usize| {
            let at = |by: f64| {
                let mut alpha = vec![0.0; weights.len()];
                left.iter().for_each(|i| alpha[*i] = 1.0 / left.len() as f64);
                alpha[j] += by;
                entropy(seed, weights, &alpha, inputs)
            };
            (at(-1e-5) - at(1e-5)) / 2e-5
        };
        let mut ranked: Vec<(f64, usize)> = left.iter().map(|j| (gain(*j), *j)).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        let keep = if search == TaskSearch::OneShot { 1 } else { left.len().div_ceil(2) };
        left = ranked.into_iter().take(keep).map(|(_, j)| j).collect();
    }
    left[0]
}

#[test]
fn the_task_is_the_steepest_descent_of_entropy_and_its_mask_is_routed_to() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 1..=6 {
        let inputs = TinyBackbone::inputs(4, 6, Seed(seed).nth(2)).unwrap();
        for search in [TaskSearch::OneShot, TaskSearch::Binary] {
            let mut model = model(seed);
            let weights = masked(&model);
            let found = infer_task(&mut model, &inputs, "logits", search).unwrap();
            let expected = by_differences(seed, &weights, &inputs, search);
            assert_eq!(found, TASKS[expected], "{seed} {search:?}");
            let routed = model.forward(&inputs, &Context::eval()).unwrap();
            model.route(Given::only(expected), false).unwrap();
            let alone = model.forward(&inputs, &Context::eval()).unwrap();
            let alone = alone.need("logits").unwrap();
            assert!(routed.need("logits").unwrap().bit_equal(alone).unwrap());
            seen.insert(found);
        }
    }
    assert!(seen.len() > 1, "a constant answer would not do: {seen:?}");
}

#[test]
fn a_further_task_leaves_the_others_as_they_were() {
    let mut model = model(3);
    let before = masked(&model);
    model.attach("e", Box::new(SupSup::default()), &Targets::names(["head"])).unwrap();
    let scores = model.params().get("modules.e.head.scores").unwrap().clone();
    let ones = Tensor::ones(&scores.size(), Kind::Double, Device::Cpu).unwrap();
    no_grad(|| scores.clone().add_in_place(&ones)).unwrap();
    for (old, new) in before.iter().zip(masked(&model)) {
        assert!(old.bit_equal(&new).unwrap());
    }
}

#[test]
fn sites_with_different_modules_are_refused() {
    let mut model = model(1);
    model.attach("e", Box::new(SupSup::default()), &Targets::names(["query"])).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    let inputs = TinyBackbone::inputs(2, 4, Seed(1)).unwrap();
    let e = infer_task(&mut model, &inputs, "logits", TaskSearch::OneShot).unwrap_err();
    assert!(e.to_string().contains("modules"), "{e}");
}
