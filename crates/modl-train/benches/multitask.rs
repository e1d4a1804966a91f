//! What balancing the gradients of 8 tasks costs beside the passes that they need, on MiniLM with 4
//! rows of 64 tokens for each task: the forward passes, forward and backward passes, and what follows
//! (products, factors, combination), for LoRA of rank 8 at `query` and `value` and for all parameters
//! of the encoder's layers. Nothing is measured where the model is not there (`cargo xtask setup`).
//!
//! `OMP_NUM_THREADS=2 cargo bench -p modl-train --bench multitask`
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use modl_aggregate::WeightedSum;
use modl_compute::Lora;
use modl_core::{
    Context, Device, Init, Kind, Modular, Seed, Select, Targets, Tensor, Tensors, keep_freed_memory,
};
use modl_models::{LoadOptions, open};
use modl_route::Fixed;
use modl_train::joint::{TaskGradients, cagrad, mgda, nash_mtl, pcgrad};

const TASKS: u64 = 8;
const ROWS: i64 = 4;
const TOKENS: i64 = 64;

type Grads = Vec<Vec<Option<Tensor>>>;

fn inputs(task: u64) -> Tensors {
    let shape = [ROWS, TOKENS];
    let ids = Init::Uniform(10_000.0).tensor(&shape, Seed(task), Kind::Float, Device::Cpu).unwrap();
    let ids = ids.abs().unwrap().to_kind(Kind::Int64).unwrap();
    let mask = Tensor::ones(&shape, Kind::Int64, Device::Cpu).unwrap();
    Tensors::new().with("input_ids", ids).with("attention_mask", mask)
}

/// A loss of a task's rows: hidden states against a direction of the task's own.
fn loss(model: &Modular, task: u64) -> Tensor {
    let outputs = model.forward(&inputs(task), &Context::train(Seed(task), 0)).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    let seed = Seed(task).child("direction");
    let along = Init::Normal(1.0).tensor(&[384], seed, Kind::Float, Device::Cpu).unwrap();
    hidden.mul(&along).unwrap().mean().unwrap()
}

fn gradients(model: &Modular, leaves: &[&Tensor]) -> Grads {
    (0..TASKS).map(|task| loss(model, task).gradients(leaves, false).unwrap()).collect()
}

fn multitask(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/all-MiniLM-L6-v2");
    if !folder.exists() {
        eprintln!("multitask: nothing is measured, there is no {}", folder.display());
        return;
    }
    for (name, pattern) in [("LoRA", "modules.*"), ("layers", "base.encoder.*")] {
        let backbone = open(&folder, &LoadOptions::default()).unwrap();
        let mut model = Modular::from_box(backbone, Seed(0)).unwrap();
        let lora = Lora { r: 8, alpha: 16.0, ..Lora::default() };
        model.attach("all", Box::new(lora), &Targets::names(["query", "value"])).unwrap();
        model.route(Box::new(Fixed::modules(["all"])), false).unwrap();
        model.aggregate(Box::new(WeightedSum::default())).unwrap();
        model.train_only(&Select::new(pattern)).unwrap();
        let params = model.trainable();
        let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let numbers: usize = leaves.iter().map(|t| t.numel()).sum();
        let mut group = c.benchmark_group(format!("8 tasks, {name}, {numbers} numbers"));
        group.sample_size(10);
        group.bench_function("forward", |b| {
            b.iter(|| (0..TASKS).map(|task| loss(&model, task)).collect::<Vec<_>>());
        });
        group.bench_function("forward and backward", |b| b.iter(|| gradients(&model, &leaves)));
        let grads = gradients(&model, &leaves);
        let follows = |factors: &dyn Fn(&modl_train::joint::Gram) -> Vec<f64>| {
            let all = TaskGradients::new(grads.clone()).unwrap();
            let factors = factors(&all.gram().unwrap());
            all.combine(&factors, &[1.0; TASKS as usize]).unwrap()
        };
        group.bench_function("PCGrad", |b| b.iter(|| follows(&|g| pcgrad(g, Seed(1)))));
        group.bench_function("CAGrad", |b| b.iter(|| follows(&|g| cagrad(g, 0.5))));
        group.bench_function("MGDA", |b| b.iter(|| follows(&mgda)));
        group.bench_function("Nash-MTL", |b| b.iter(|| follows(&nash_mtl)));
        group.finish();
    }
}

criterion_group!(benches, multitask);
criterion_main!(benches);
