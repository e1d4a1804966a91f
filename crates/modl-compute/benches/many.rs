//! Many modules at once, on a BERT of MiniLM's shape (6 layers, 384 wide): one batch of 64 rows
//! with 8 or 64 different LoRAs against the backbone alone, and what the 1st, the 100th and the
//! 1,000th LoRA cost to attach and to switch to. The weights are random: time does not depend on
//! them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use modl_compute::Lora;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Kind, Modular, Seed, Targets, Tensor, Tensors, no_grad};
use modl_models::Bert;
use serde_json::json;

const ROWS: i64 = 64;
const SEQ: i64 = 32;

fn model(kind: Kind) -> Modular {
    let config = json!({
        "model_type": "bert", "vocab_size": 1000, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 1536, "hidden_act": "gelu",
        "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0
    });
    let bert = Bert::untrained(config, Seed(0), kind, Device::Cpu).unwrap();
    Modular::new(bert, Seed(1)).unwrap()
}

fn attach(model: &mut Modular, i: usize) {
    let targets = Targets::names(["query", "value"]);
    model.attach(&format!("m{i}"), Box::new(Lora::default()), &targets).unwrap();
}

fn rows(c: &mut Criterion) {
    modl_core::keep_freed_memory(); // as the modl binary does
    let ids: Vec<i64> = (0..ROWS * SEQ).map(|i| i * 37 % 1000).collect();
    let ids = Tensor::from_slice(&ids, &[ROWS, SEQ], Device::Cpu).unwrap();
    let inputs = Tensors::new().with("input_ids", ids);
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut group = c.benchmark_group(format!("64 rows x {SEQ}, {kind:?}"));
        let base = model(kind);
        let run = |m: &Modular| no_grad(|| m.forward(&inputs, &Context::eval()).unwrap());
        group.bench_function("base", |b| b.iter(|| run(&base)));
        for count in [8usize, 64] {
            let mut many = model(kind);
            (0..count).for_each(|i| attach(&mut many, i));
            let table: Vec<Option<usize>> = (0..ROWS as usize).map(|r| Some(r % count)).collect();
            many.route(Given::rows(&table), false).unwrap();
            many.aggregate(Box::new(Sum::default())).unwrap();
            group.bench_function(format!("{count} LoRAs"), |b| b.iter(|| run(&many)));
        }
        group.finish();
    }
}

fn attaching(c: &mut Criterion) {
    let mut group = c.benchmark_group("attach");
    for there in [0usize, 99, 999] {
        let mut model = model(Kind::Float);
        (0..there).for_each(|i| attach(&mut model, i));
        group.bench_function(format!("LoRA number {}", there + 1), |b| {
            b.iter_custom(|n| {
                let mut spent = Duration::ZERO;
                for _ in 0..n {
                    let clock = Instant::now();
                    attach(&mut model, there);
                    spent += clock.elapsed();
                    model.detach(&format!("m{there}")).unwrap();
                }
                spent
            });
        });
        attach(&mut model, there);
        group.bench_function(format!("switch among {}", there + 1), |b| {
            b.iter(|| model.route(Given::only(there), false).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, rows, attaching);
criterion_main!(benches);
