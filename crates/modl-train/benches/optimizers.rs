//! What follows the backward pass in a step of training, over two sets of parameters: the 24
//! tensors of LoRA with rank 8 at `query` and `value` of MiniLM (74 thousand numbers, where the
//! number of operations counts) and 6 dense layers 1536 × 384 (3.5 million, where memory counts).
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-train`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::{Device, Init, Kind, Seed, Tensor, keep_freed_memory};
use modl_train::optim::{AdafactorConfig, AdamWConfig, LionConfig, RmsPropConfig, SgdConfig};
use modl_train::{OptimizerConfig, clip_grad_norm};

fn tensors(shapes: &[[i64; 2]], seed: Seed) -> impl Iterator<Item = Tensor> {
    (0..).zip(shapes).map(move |(n, shape)| {
        Init::Normal(0.05).tensor(shape, seed.nth(n), Kind::Float, Device::Cpu).unwrap()
    })
}

fn optimizers(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let lora = [[8, 384], [384, 8]].repeat(12);
    let dense = [[1536, 384]].repeat(6);
    let decay = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() };
    let momentum = SgdConfig { momentum: 0.9, ..SgdConfig::default() };
    for (set, shapes) in [("24 LoRA tensors", lora), ("6 dense layers", dense)] {
        let params: Vec<(String, Tensor)> = (0u64..)
            .zip(tensors(&shapes, Seed(1)))
            .map(|(n, t)| (format!("modules.{n}"), t))
            .collect();
        let grads: Vec<Option<Tensor>> = tensors(&shapes, Seed(2)).map(Some).collect();
        let mut group = c.benchmark_group(set);
        for (name, config) in [
            ("AdamW", OptimizerConfig::AdamW(decay.clone())),
            ("SGD", OptimizerConfig::Sgd(SgdConfig::default())),
            ("SGD, momentum", OptimizerConfig::Sgd(momentum.clone())),
            ("Lion", OptimizerConfig::Lion(LionConfig::default())),
            ("RMSprop", OptimizerConfig::RmsProp(RmsPropConfig::default())),
            ("Adafactor", OptimizerConfig::Adafactor(AdafactorConfig::default())),
        ] {
            let mut optimizer = config.build().unwrap();
            group.bench_function(name, |b| {
                b.iter(|| optimizer.step(&params, &grads, &|_| 1e-6).unwrap());
            });
        }
        group.bench_function("clipping", |b| {
            // Clipped gradients take the place of these in the copy alone.
            b.iter(|| clip_grad_norm(&mut grads.clone(), Some(1.0)).unwrap());
        });
        group.finish();
    }
}

criterion_group!(benches, optimizers);
criterion_main!(benches);
