//! What it costs to decide, without running a module: α over 8 modules for 16 × 128 tokens 384 wide, as
//! at a site of MiniLM, where learned routers look at the mean of a row, or at each token; and, in
//! training, over 64 modules for 4,096 tokens 512 wide, the balanced routers beside top-k, and their
//! assignment alone, and every router of the registry there.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-route`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_core::{
    Bank, Context, Device, Init, Kind, LowRank, ParamStore, Registry, RouterConfig, Scope, Seed,
    Signal, Site, SiteKind, Tensor, keep_freed_memory, no_grad,
};
use modl_route::{
    Arrow, Base, Fixed, Input, Phase, Phatgoose, Scores, Sinkhorn, Soft, TopK, Uniform,
    balanced_assignment,
};
use serde_json::{Value, json};

type Configs = Vec<(&'static str, Box<dyn RouterConfig>)>;

fn tensor(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Float, Device::Cpu).unwrap()
}

fn scores(input: Input) -> Scores {
    Scores { input, init_std: 0.02, ..Scores::default() }
}

fn top_k(k: usize, input: Input) -> Box<TopK> {
    Box::new(TopK { k, scores: scores(input), ..TopK::default() })
}

/// Low-rank modules named `task 0`, `task 1`, …
fn bank(modules: usize, rank: i64, width: i64) -> Bank {
    let mut bank = Bank::new();
    for j in 0..modules {
        let (down, up) = (tensor(&[rank, width], j as u64), tensor(&[width, rank], 99 + j as u64));
        bank.insert(format!("task {j}"), Box::new(LowRank { down, up, scale: 1.0 })).unwrap();
    }
    bank
}

/// α of each router over `modules` modules of this rank, named `task 0`, `task 1`, …, for x.
fn decide(
    c: &mut Criterion,
    group: &str,
    (modules, rank): (usize, i64),
    x: &Tensor,
    cx: &Context,
    configs: Configs,
) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let (path, width) = ("layer.0.query".to_owned(), x.len_of(-1));
    let site = Site { path, kind: SiteKind::Linear, input: width, output: width, index: 0 };
    let bank = bank(modules, rank, width);
    let x = Signal::from(x.clone());
    let mut group = c.benchmark_group(group);
    for (name, config) in configs {
        let mut store = ParamStore::new();
        let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(1))).unwrap();
        group.bench_function(name, |b| {
            b.iter(|| no_grad(|| router.route(&x, &bank, cx)).unwrap());
        });
    }
    group.finish();
}

fn at_a_site_of_minilm(c: &mut Criterion) {
    let modules = 8;
    let mask = Tensor::ones(&[16, 128], Kind::Float, Device::Cpu).unwrap();
    let cx = Context::eval()
        .with_tasks((0..16).map(|r| format!("task {}", r % modules)))
        .with_feature("mask", mask);
    let configs: Configs = vec![
        ("fixed", Box::new(Fixed::default())),
        ("uniform", Box::new(Uniform::default())),
        ("soft, mean", Box::new(Soft { scores: scores(Input::Mean) })),
        ("soft, tokens", Box::new(Soft { scores: scores(Input::Tokens) })),
        ("top-2, mean", top_k(2, Input::Mean)),
        ("top-2, tokens", top_k(2, Input::Tokens)),
    ];
    let x = tensor(&[16, 128, 384], 1);
    decide(c, "route 16 x 128 x 384, 8 modules", (modules, 1), &x, &cx, configs);
}

const TOKENS: i64 = 4096;
const MODULES: usize = 64;

fn many_modules(c: &mut Criterion) {
    // Tokens have something in common, and so modules are not equally popular at the start.
    let x = tensor(&[1, TOKENS, 512], 1).add(&tensor(&[512], 2)).unwrap();
    let configs: Configs = vec![
        ("top-1", top_k(1, Input::Tokens)),
        ("top-2", top_k(2, Input::Tokens)),
        ("base", Box::new(Base::default())),
        ("sinkhorn", Box::new(Sinkhorn::default())),
        ("arrow", Box::new(Arrow::default())),
        ("phatgoose", Box::new(Phatgoose { phase: Phase::Route, ..Phatgoose::default() })),
    ];
    let cx = Context::train(Seed(1), 0);
    let group = "route 4096 x 512, 64 modules, training";
    decide(c, group, (MODULES, 4), &x, &cx, configs);
}

/// Every router of the registry, at each token with 2 modules where it can be told so, else as it comes.
fn all_routers(c: &mut Criterion) {
    let x = tensor(&[1, TOKENS, 512], 1).add(&tensor(&[512], 2)).unwrap();
    let ids: Vec<i64> = (0..TOKENS).collect();
    let ids = Tensor::from_slice(&ids, &[1, TOKENS], Device::Cpu).unwrap();
    let mask = Tensor::ones(&[1, TOKENS], Kind::Float, Device::Cpu).unwrap();
    let cx = Context::train(Seed(1), 0)
        .with_tasks(["task 0"])
        .with_feature("input_ids", ids)
        .with_feature("mask", mask);
    let registry = Registry::new().with(modl_route::register).unwrap();
    let site = Site { path: "0".into(), kind: SiteKind::Linear, input: 512, output: 512, index: 0 };
    let bank = bank(MODULES, 4, 512);
    let works = |config: &dyn RouterConfig| {
        let mut store = ParamStore::new();
        let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(1)))?;
        no_grad(|| router.route(&Signal::from(x.clone()), &bank, &cx)).map(|_| ())
    };
    let configure = |name: &str, mut settings: Value| {
        settings["type"] = json!(name);
        let config = registry.routers.parse(&settings)?;
        works(&*config).map(|()| config)
    };
    let mut configs: Configs = Vec::new();
    for name in registry.routers.entries().iter().map(|e| e.name) {
        let made = configure(name, json!({"input": "tokens", "k": 2}))
            .or_else(|_| configure(name, json!({"input": "tokens"})))
            .or_else(|_| configure(name, json!({})));
        match made {
            Ok(config) => configs.push((name, config)),
            Err(e) => eprintln!("{name} is left out: {e}"),
        }
    }
    decide(c, "route 4096 x 512, 64 modules, all routers", (MODULES, 4), &x, &cx, configs);
}

fn assignment(c: &mut Criterion) {
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
        assert_eq!(balanced_assignment(affinity, MODULES).unwrap().len(), TOKENS as usize);
        group.bench_function(name, |b| {
            b.iter(|| balanced_assignment(affinity, MODULES).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, at_a_site_of_minilm, many_modules, all_routers, assignment);
criterion_main!(benches);
