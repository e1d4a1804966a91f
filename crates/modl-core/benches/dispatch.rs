//! One linear site of MiniLM's width, 16 × 128 tokens and 8 low-rank modules of rank 8: what the
//! forward pass costs without modules, with one, with one for each row, and with a mixture of all,
//! by the fast way and by the plain formula. Also dropout masks of the size of MiniLM's attention.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-core`
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::testing::{Given, PlainSum, Sum};
use modl_core::{
    Aggregator, Bank, Base, Context, Device, Host, Init, Kind, LowRank, ModularLayer, Result, Seed,
    Signal, Site, SiteKind, Tensor, Tensors, Weights, dropout_mask, keep_freed_memory, no_grad,
};

const WIDTH: i64 = 384;
const MODULES: usize = 8;

fn tensor(shape: &[i64], std: f64, name: &str) -> Tensor {
    Init::Normal(std).tensor(shape, Seed(1).child(name), Kind::Float, Device::Cpu).unwrap()
}

fn layer(weights: Weights, aggregator: impl Aggregator + 'static) -> ModularLayer {
    let mut bank = Bank::new();
    for j in 0..MODULES {
        let down = tensor(&[8, WIDTH], 0.05, &format!("down {j}"));
        let up = tensor(&[WIDTH, 8], 0.05, &format!("up {j}"));
        bank.insert(format!("{j}"), Box::new(LowRank { down, up, scale: 2.0 })).unwrap();
    }
    ModularLayer::new(bank, Given(weights), aggregator)
}

fn dispatch(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let path = "layer.0.query".to_owned();
    let site = Site { path, kind: SiteKind::Linear, input: WIDTH, output: WIDTH, index: 0 };
    let theta = Tensors::new()
        .with("weight", tensor(&[WIDTH, WIDTH], 0.05, "w"))
        .with("bias", tensor(&[WIDTH], 0.05, "b"));
    let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
        Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
    };
    let host = Host::new(&site, &theta, &f);
    let x = Signal::from(tensor(&[16, 128, WIDTH], 1.0, "x"));
    let rows = Weights::Rows((0..16).map(|r| vec![(r % MODULES, 1.0)]).collect());
    let mixture = Weights::Dense(tensor(&[16, MODULES as i64], 1.0, "alpha").softmax(-1).unwrap());
    let (fast, plain) = (Sum(Base::Kept), PlainSum(Base::Kept));
    let layers = [
        ("one module", layer(Weights::Fixed(vec![(0, 1.0)]), fast)),
        ("a module for each row", layer(rows.clone(), fast)),
        ("a module for each row, plain", layer(rows, plain)),
        ("mixture", layer(mixture.clone(), fast)),
        ("mixture, plain", layer(mixture, plain)),
    ];
    let mut group = c.benchmark_group("forward 2048 x 384, 8 modules");
    group.bench_function("no module", |b| {
        b.iter(|| no_grad(|| host.call(&x, &Context::eval())).unwrap());
    });
    for (name, layer) in &layers {
        group.bench_function(*name, |b| {
            b.iter(|| no_grad(|| layer.forward(&host, &x, &Context::eval())).unwrap());
        });
    }
    group.finish();
}

fn dropout(c: &mut Criterion) {
    let mut group = c.benchmark_group("dropout mask 16 x 12 x 128 x 128");
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let mask = || dropout_mask(&[16, 12, 128, 128], 0.1, Seed(1), kind, Device::Cpu);
        group.bench_function(name, |b| b.iter(|| black_box(mask().unwrap())));
    }
    group.finish();
}

criterion_group!(benches, dispatch, dropout);
criterion_main!(benches);
