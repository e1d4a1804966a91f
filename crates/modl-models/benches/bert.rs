//! BERT of MiniLM's shape (6 layers, 384 wide, 12 heads) on 16 × 128 tokens: the forward pass, and
//! forward and backward with low-rank changes of rank 8 at query and value, as in a step of
//! training. The weights are random: time does not depend on them.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-models`

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Attachment, Base, Context, Device, Init, Kind, LowRank, Modular, Module, ModuleConfig, Result,
    Scope, Seed, Select, Targets, Tensor, Tensors, checkpoint, no_grad,
};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

const BATCH: i64 = 16;
const SEQ: i64 = 128;

/// A low-rank change of rank 8: LoRA without its settings.
#[derive(Debug)]
struct Rank8;

impl ModuleConfig for Rank8 {
    fn kind(&self) -> &'static str {
        "rank8"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        let down = scope.param("down", &[8, site.input], Init::Kaiming)?;
        let up = scope.param("up", &[site.output, 8], Init::Normal(0.02))?;
        Ok(Box::new(LowRank { down, up, scale: 1.0 }))
    }
}

/// Writes a folder with random weights.
fn write_model(dir: &Path) -> Result<()> {
    let (width, inner) = (384, 1536);
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![1000, width]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![512, width]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, width]),
    ];
    let mut pair = |path: String, weight: Vec<i64>| {
        shapes.push((format!("{path}.bias"), vec![weight[0]]));
        shapes.push((format!("{path}.weight"), weight));
    };
    pair("embeddings.LayerNorm".to_owned(), vec![width]);
    for i in 0..6 {
        for (name, shape) in [
            ("attention.self.query", vec![width, width]),
            ("attention.self.key", vec![width, width]),
            ("attention.self.value", vec![width, width]),
            ("attention.output.dense", vec![width, width]),
            ("attention.output.LayerNorm", vec![width]),
            ("intermediate.dense", vec![inner, width]),
            ("output.dense", vec![width, inner]),
            ("output.LayerNorm", vec![width]),
        ] {
            pair(format!("encoder.layer.{i}.{name}"), shape);
        }
    }
    let draw = |(name, shape): (String, Vec<i64>)| {
        let init = if name.ends_with("Norm.weight") { Init::Ones } else { Init::Normal(0.02) };
        Ok((name.clone(), init.tensor(&shape, Seed(1).child(&name), Kind::Float, Device::Cpu)?))
    };
    let tensors = shapes.into_iter().map(draw).collect::<Result<Vec<_>>>()?;
    let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
    checkpoint::save(dir.join("model.safetensors"), named, HashMap::new())?;
    let config = json!({
        "model_type": "bert", "vocab_size": 1000, "hidden_size": width, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": inner,
    });
    checkpoint::write_whole(dir.join("config.json"), config.to_string().as_bytes())
}

fn inputs(padded: bool) -> Result<Tensors> {
    let ids: Vec<i64> = (0..BATCH * SEQ).map(|i| i * 37 % 1000).collect();
    let real = |i: i64| i64::from(!padded || i % SEQ < SEQ - i / SEQ);
    let mask: Vec<i64> = (0..BATCH * SEQ).map(real).collect();
    Ok(Tensors::new()
        .with("input_ids", Tensor::from_slice(&ids, &[BATCH, SEQ], Device::Cpu)?)
        .with("attention_mask", Tensor::from_slice(&mask, &[BATCH, SEQ], Device::Cpu)?))
}

fn model(dir: &Path, kind: Kind, dropout: f64) -> Result<Modular> {
    let options =
        LoadOptions { kind: Some(kind), dropout: Some(dropout), ..LoadOptions::default() };
    let mut model = Modular::from_box(open(dir, &options)?, Seed(1))?;
    model.attach("delta", Box::new(Rank8), &Targets::names(["query", "value"]))?;
    model.route(Given::only(0), false)?;
    model.aggregate(Box::new(Sum(Base::Kept)))?;
    model.train_only(&Select::new("modules.*"))?;
    Ok(model)
}

fn step(model: &Modular, inputs: &Tensors, n: u64) -> Result<()> {
    let y = model.forward(inputs, &Context::train(Seed(2), n))?;
    let loss = y.need("last_hidden_state")?.to_kind(Kind::Float)?.square()?.mean()?;
    let trainable = model.trainable();
    let wanted: Vec<&Tensor> = trainable.iter().map(|(_, t)| t).collect();
    black_box(loss.gradients(&wanted, false)?);
    Ok(())
}

fn bert(c: &mut Criterion) {
    modl_core::keep_freed_memory(); // as the modl binary does
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path()).unwrap();
    let mut group = c.benchmark_group("bert 16x128");
    group.sample_size(10);
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let plain = model(dir.path(), kind, 0.0).unwrap();
        for (what, padded) in [("forward", false), ("forward padded", true)] {
            let inputs = inputs(padded).unwrap();
            group.bench_function(format!("{what} {name}"), |b| {
                b.iter(|| no_grad(|| plain.forward_base(&inputs, &Context::eval())).unwrap());
            });
        }
        let inputs = inputs(false).unwrap();
        for dropout in [0.0, 0.1] {
            let model = model(dir.path(), kind, dropout).unwrap();
            let mut n = 0;
            group.bench_function(format!("step dropout {dropout} {name}"), |b| {
                b.iter(|| {
                    n += 1;
                    step(&model, &inputs, n).unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bert);
criterion_main!(benches);
