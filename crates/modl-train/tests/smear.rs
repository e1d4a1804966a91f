//! SMEAR (Muqeeth, Liu, Raffel 2023, arXiv 2306.03745) is `soft` with `average`: the modules are
//! merged by α, and what runs is one module.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use modl_aggregate::{Average, WeightedSum};
use modl_core::{
    AggregatorConfig, Bank, Context, Device, Host, Init, Kind, ModularLayer, Module, ParamStore,
    Registry, Result, Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors,
};
use serde_json::json;

const ROWS: i64 = 3;
const WIDTH: i64 = 5;
const MODULES: usize = 4;

/// y = tanh(x Wᵀ), which counts the rows that it sees. Averaging its outputs is not averaging W.
#[derive(Debug)]
struct Counted {
    weight: Tensor,
    rows: Arc<AtomicI64>,
}

impl Module for Counted {
    fn kind(&self) -> &'static str {
        "counted"
    }

    fn forward(&self, _: &Host, x: &Signal, _: &Context) -> Result<Signal> {
        self.rows.fetch_add(x.rows(), Ordering::Relaxed);
        Ok(x.replace(x.x.linear(&self.weight, None)?.tanh()?))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with("weight", self.weight.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Counted { weight: phi.need("weight")?.clone(), rows: Arc::clone(&self.rows) }))
    }
}

fn normal(shape: &[i64], seed: u64) -> Result<Tensor> {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Double, Device::Cpu)
}

/// How far the output is from that of averaged parameters, and how many rows went through modules.
fn run(aggregator: &dyn AggregatorConfig) -> Result<(f64, i64)> {
    let registry = Registry::new().with(modl_route::register)?;
    let rows = Arc::new(AtomicI64::new(0));
    let mut bank = Bank::new();
    for j in 0..MODULES {
        let weight = normal(&[WIDTH, WIDTH], j as u64)?;
        bank.insert(format!("m{j}"), Box::new(Counted { weight, rows: Arc::clone(&rows) }))?;
    }
    let path = "site".into();
    let site = Site { path, kind: SiteKind::Linear, input: WIDTH, output: WIDTH, index: 0 };
    let mut store = ParamStore::new();
    let mut scope = Scope::new(&mut store, Seed(0)).on(Kind::Double, Device::Cpu);
    let soft = registry.routers.parse(&json!({"type": "soft", "init_std": 1.0, "bias": false}))?;
    let router = soft.build(&site, &bank, &mut scope)?;
    let aggregator = aggregator.build(&site, &mut scope)?;
    let layer = ModularLayer::from_boxes(bank, router, aggregator);
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.clone());
    let (theta, x) = (Tensors::new(), Signal::from(normal(&[ROWS, 2, WIDTH], 9)?));
    let y = layer.forward(&Host::new(&site, &theta, &f), &x, &Context::eval())?;

    // The same in plain numbers: α by the mean of a row's tokens, then the mean of all W by α.
    let numbers = |t: &Tensor| t.to_vec::<f64>();
    let (x, own, w) = (numbers(&x.x)?, WIDTH as usize, numbers(store.get("weight")?)?);
    let modules: Vec<Vec<f64>> = (0..MODULES)
        .map(|j| numbers(&normal(&[WIDTH, WIDTH], j as u64)?))
        .collect::<Result<_>>()?;
    let mut merged = Vec::new();
    for row in x.chunks(2 * own) {
        let mean: Vec<f64> = (0..own).map(|c| (row[c] + row[own + c]) / 2.0).collect();
        let score = |w: &[f64]| w.iter().zip(&mean).map(|(w, x)| w * x).sum::<f64>().exp();
        let e: Vec<f64> = w.chunks(own).map(score).collect();
        let sum: f64 = e.iter().sum();
        let average = |i: usize| (0..MODULES).map(|j| e[j] / sum * modules[j][i]).sum::<f64>();
        for token in row.chunks(own) {
            let out = |o: usize| (0..own).map(|c| average(o * own + c) * token[c]).sum::<f64>();
            merged.extend((0..own).map(|o| out(o).tanh()));
        }
    }
    let y = numbers(&y.x)?;
    let apart = y.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    Ok((apart, rows.load(Ordering::Relaxed)))
}

#[test]
fn merging_by_alpha_runs_one_module_with_averaged_parameters() -> Result<()> {
    let (apart, rows) = run(&Average::default())?;
    assert!(apart < 1e-12, "{apart}");
    assert_eq!(rows, ROWS);
    // A mixture of outputs is something else, and runs all.
    let (apart, rows) = run(&WeightedSum::default())?;
    assert!(apart > 1e-3, "{apart}");
    assert_eq!(rows, ROWS * MODULES as i64);
    Ok(())
}
