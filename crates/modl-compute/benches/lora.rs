//! What LoRA costs on top of a linear layer in training: forward and backward of one site.
//!
//! Shapes are those of `query` in MiniLM-L6: width 384, rank 8, 16 × 128 tokens.
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_compute::Lora;
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, ModuleConfig, ParamStore, Result, Scope, Seed,
    Signal, Site, SiteKind, Tensor, Tensors,
};

const WIDTH: i64 = 384;

fn tensor(shape: &[i64], std: f64, name: &str, kind: Kind) -> Tensor {
    Init::Normal(std).tensor(shape, Seed(1).child(name), kind, Device::Cpu).unwrap()
}

/// d(y · g) for x and φ, as a step of training asks for it.
fn step(y: &Tensor, g: &Tensor, leaves: &[&Tensor]) {
    y.mul(g).unwrap().sum().unwrap().gradients(leaves, false).unwrap();
}

fn bench(c: &mut Criterion) {
    modl_core::keep_freed_memory(); // as the modl binary does
    for kind in [Kind::Float, Kind::BFloat16] {
        let path = "layer.0.query".to_owned();
        let site = Site { path, kind: SiteKind::Linear, input: WIDTH, output: WIDTH, index: 0 };
        let theta = Tensors::new()
            .with("weight", tensor(&[WIDTH, WIDTH], 0.05, "w", kind))
            .with("bias", tensor(&[WIDTH], 0.05, "b", kind));
        let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
            Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        let host = Host::new(&site, &theta, &f);
        let x = Signal::from(tensor(&[16, 128, WIDTH], 1.0, "x", kind));
        x.x.set_requires_grad(true).unwrap();
        let g = tensor(&[16, 128, WIDTH], 1.0, "g", kind);
        let mut store = ParamStore::new();
        let module = Lora::default()
            .build(&Attachment::alone(&site, &theta), &mut Scope::new(&mut store, Seed(1)))
            .unwrap();
        let phi = module.phi();
        let mut leaves: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
        leaves.push(&x.x);
        let cx = Context::train(Seed(1), 0);
        let mut group = c.benchmark_group(format!("train 2048 x 384, {kind:?}"));
        group.bench_function("linear", |b| {
            b.iter(|| step(&host.call(&x, &cx).unwrap().x, &g, &[&x.x]))
        });
        group.bench_function("lora", |b| {
            b.iter(|| step(&module.forward(&host, &x, &cx).unwrap().x, &g, &leaves));
        });
        group.bench_function("lora, base + delta", |b| {
            b.iter(|| {
                let delta = module.delta(&host, &x, &cx).unwrap().unwrap();
                step(&host.call(&x, &cx).unwrap().x.add(&delta).unwrap(), &g, &leaves);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
