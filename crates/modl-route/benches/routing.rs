//! What it costs to choose for 4,096 tokens 512 wide among 64 modules, in training, without running a
//! module: the balanced routers beside top-k, and their assignment alone.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-route --bench routing`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::{
    Bank, Context, Device, Init, Kind, LowRank, ParamStore, RouterConfig, Scope, Seed, Signal,
    Site, SiteKind, Tensor, keep_freed_memory, no_grad,
};
use modl_route::{
    Arrow, Base, Input, Phase, Phatgoose, Scores, Sinkhorn, TopK, balanced_assignment,
};

const TOKENS: i64 = 4096;
const WIDTH: i64 = 512;
const MODULES: usize = 64;

fn tensor(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Float, Device::Cpu).unwrap()
}

fn top_k(k: usize) -> Box<TopK> {
    let scores = Scores { input: Input::Tokens, init_std: 0.02, ..Scores::default() };
    Box::new(TopK { k, scores, ..TopK::default() })
}

fn routing(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let path = "layer.0".to_owned();
    let site = Site { path, kind: SiteKind::Linear, input: WIDTH, output: WIDTH, index: 0 };
    let mut bank = Bank::new();
    for j in 0..MODULES {
        let (down, up) = (tensor(&[4, WIDTH], j as u64), tensor(&[WIDTH, 4], 99 + j as u64));
        bank.insert(format!("module {j}"), Box::new(LowRank { down, up, scale: 1.0 })).unwrap();
    }
    // Tokens have something in common, and so modules are not equally popular at the start.
    let x = tensor(&[1, TOKENS, WIDTH], 1).add(&tensor(&[WIDTH], 2)).unwrap();
    let x = Signal::from(x);
    let cx = Context::train(Seed(1), 0);
    let configs: [(&str, Box<dyn RouterConfig>); 6] = [
        ("top-1", top_k(1)),
        ("top-2", top_k(2)),
        ("base", Box::new(Base::default())),
        ("sinkhorn", Box::new(Sinkhorn::default())),
        ("arrow", Box::new(Arrow::default())),
        ("phatgoose", Box::new(Phatgoose { phase: Phase::Route, ..Phatgoose::default() })),
    ];
    let mut group = c.benchmark_group("route 4096 x 512, 64 modules, training");
    for (name, config) in configs {
        let mut store = ParamStore::new();
        let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(1))).unwrap();
        group.bench_function(name, |b| {
            b.iter(|| no_grad(|| router.route(&x, &bank, &cx)).unwrap());
        });
    }
    group.finish();

    let n = TOKENS as usize;
    let even = tensor(&[TOKENS, MODULES as i64], 3).to_vec::<f64>().unwrap();
    let taste = tensor(&[MODULES as i64], 4).to_vec::<f64>().unwrap();
    let skewed: Vec<f64> =
        even.iter().enumerate().map(|(i, a)| 0.1 * a + taste[i % MODULES]).collect();
    let mut repeated = even.clone();
    let first = even[..MODULES].to_vec();
    repeated.chunks_mut(MODULES).step_by(10).for_each(|row| row.copy_from_slice(&first));
    let mut group = c.benchmark_group("assignment 4096 x 64");
    for (name, affinity) in [("even", &even), ("skewed", &skewed), ("a tenth the same", &repeated)]
    {
        assert_eq!(balanced_assignment(affinity, MODULES).unwrap().len(), n);
        group.bench_function(name, |b| {
            b.iter(|| balanced_assignment(affinity, MODULES).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
