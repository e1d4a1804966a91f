//! What it costs to decide: α over 8 modules for 16 × 128 tokens 384 wide, as at a site of MiniLM,
//! without running a module. Learned routers look at the mean of a row, or at each token.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-route`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::{
    Bank, Context, Device, Init, Kind, LowRank, ParamStore, RouterConfig, Scope, Seed, Signal,
    Site, SiteKind, Tensor, keep_freed_memory, no_grad,
};
use modl_route::{Fixed, Input, Scores, Soft, TopK, Uniform};

const WIDTH: i64 = 384;
const MODULES: usize = 8;

fn tensor(shape: &[i64]) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(1), Kind::Float, Device::Cpu).unwrap()
}

fn scores(input: Input) -> Scores {
    Scores { input, init_std: 0.02, ..Scores::default() }
}

fn top_k(input: Input) -> Box<TopK> {
    Box::new(TopK { k: 2, scores: scores(input), ..TopK::default() })
}

fn routers(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let path = "layer.0.query".to_owned();
    let site = Site { path, kind: SiteKind::Linear, input: WIDTH, output: WIDTH, index: 0 };
    let mut bank = Bank::new();
    for j in 0..MODULES {
        let (down, up) = (tensor(&[1, WIDTH]), tensor(&[WIDTH, 1]));
        bank.insert(format!("task {j}"), Box::new(LowRank { down, up, scale: 1.0 })).unwrap();
    }
    let x = Signal::from(tensor(&[16, 128, WIDTH]));
    let mask = Tensor::ones(&[16, 128], Kind::Float, Device::Cpu).unwrap();
    let cx = Context::eval()
        .with_tasks((0..16).map(|r| format!("task {}", r % MODULES)))
        .with_feature("mask", mask);
    let configs: [(&str, Box<dyn RouterConfig>); 6] = [
        ("fixed", Box::new(Fixed::default())),
        ("uniform", Box::new(Uniform::default())),
        ("soft, mean", Box::new(Soft { scores: scores(Input::Mean) })),
        ("soft, tokens", Box::new(Soft { scores: scores(Input::Tokens) })),
        ("top-2, mean", top_k(Input::Mean)),
        ("top-2, tokens", top_k(Input::Tokens)),
    ];
    let mut group = c.benchmark_group("route 16 x 128 x 384, 8 modules");
    for (name, config) in configs {
        let mut store = ParamStore::new();
        let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(1))).unwrap();
        group.bench_function(name, |b| {
            b.iter(|| no_grad(|| router.route(&x, &bank, &cx)).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, routers);
criterion_main!(benches);
