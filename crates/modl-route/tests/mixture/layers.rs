//! Whole layers with these routers: nothing is lost, nothing is counted twice, and the order of
//! tokens and modules does not matter.

use modl_core::testing::Sum;
use modl_core::{
    Bank, Context, Device, Host, HostFn, Kind, LowRank, ModularLayer, ParamStore, Registry, Result,
    Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors, no_grad,
};
use serde_json::{Value, json};

use super::support::*;

const M: usize = 4;
const D: usize = 6;

type Rows = Vec<Vec<f64>>;

/// A layer over f(x) = θ x with low-rank modules, whose router has had its modules put into
/// `order`; and Δ of each module, `[D][D]`, in that order.
fn layer(config: &Value, order: &[usize]) -> Result<(ModularLayer, Vec<Rows>, Site)> {
    let registry = Registry::new().with(modl_route::register)?;
    let (mut bank, mut deltas) = (Bank::new(), Vec::new());
    for j in order {
        let (down, up) =
            (normal(&[2, D as i64], 20 + *j as u64), normal(&[D as i64, 2], *j as u64));
        deltas.push(rows(&up.matmul(&down)?));
        bank.insert(format!("m{j}"), Box::new(LowRank { down, up, scale: 1.0 }))?;
    }
    let site = Site {
        path: "site".into(),
        kind: SiteKind::Linear,
        input: D as i64,
        output: D as i64,
        index: 0,
    };
    let mut store = ParamStore::new();
    let mut scope = Scope::at(&mut store, "router", Seed(1)).on(Kind::Double, Device::Cpu);
    let router = registry.routers.parse(config)?.build(&site, &bank, &mut scope)?;
    let turned: Vec<Vec<f64>> = order.iter().map(|j| weight()[*j].clone()).collect();
    let mut w = store.get("router.weight")?.clone();
    no_grad(|| w.copy_from(&t(&turned.concat(), &[M as i64, D as i64])))?;
    Ok((ModularLayer::from_boxes(bank, router, Box::new(Sum::default())), deltas, site))
}

/// W by the modules' names.
fn weight() -> Rows {
    rows(&normal(&[M as i64, D as i64], 50))
}

/// What the layer gives, and what the formula says.
fn run(config: &Value, order: &[usize], x: &Tensor) -> Result<(Rows, Rows)> {
    let (layer, deltas, site) = layer(config, order)?;
    let theta = Tensors::new().with("weight", normal(&[D as i64, D as i64], 60));
    let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
        Ok(x.replace(x.x.linear(theta.need("weight")?, None)?))
    };
    let f: &HostFn = &f;
    let cx = Context::eval();
    let y = layer.forward(&Host::new(&site, &theta, f), &Signal::from(x.clone()), &cx)?;
    let alpha = cx.take_trace().routings[0].1.dense(Kind::Double, Device::Cpu)?;
    // y = θ x + Σ α Δ x for each token.
    let base = rows(&theta.need("weight")?.copy()?);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let plain: Vec<Vec<f64>> = rows(x)
        .iter()
        .zip(rows(&alpha))
        .map(|(x, alpha)| {
            let of = |e: usize| {
                let more: f64 = alpha.iter().zip(&deltas).map(|(a, d)| a * dot(&d[e], x)).sum();
                dot(&base[e], x) + more
            };
            (0..D).map(of).collect()
        })
        .collect();
    Ok((rows(&y.x), plain))
}

fn configs() -> Vec<Value> {
    let tight = |kind: &str| json!({"type": kind, "input": "tokens", "bias": false, "eval_capacity_factor": 0.7});
    vec![
        tight("switch"),
        tight("gshard"),
        tight("st_moe"),
        json!({"type": "noisy_top_k", "input": "tokens", "bias": false}),
        json!({"type": "deepseek", "input": "tokens", "bias": false}),
        json!({"type": "expert_choice", "input": "tokens", "bias": false, "capacity_factor": 1.0}),
    ]
}

#[test]
fn layers_compute_the_sum_over_what_found_a_place() -> Result<()> {
    let x = normal(&[3, 7, D as i64], 70);
    for config in configs() {
        let (y, plain) = run(&config, &[0, 1, 2, 3], &x)?;
        y.iter().zip(&plain).for_each(|(y, plain)| close(y, plain, 1e-10));
    }
    Ok(())
}

#[test]
fn the_order_of_modules_and_of_rows_does_not_matter() -> Result<()> {
    let x = normal(&[3, 7, D as i64], 71);
    let turned = Tensor::cat(&[x.narrow(0, 2, 1)?, x.narrow(0, 0, 2)?], 0)?;
    for config in configs() {
        let (y, _) = run(&config, &[0, 1, 2, 3], &x)?;
        let (other, _) = run(&config, &[2, 0, 3, 1], &x)?;
        y.iter().zip(&other).for_each(|(y, other)| close(y, other, 1e-10));
        let (mut rows, _) = run(&config, &[0, 1, 2, 3], &turned)?;
        rows.rotate_left(7);
        y.iter().zip(&rows).for_each(|(y, rows)| close(y, rows, 1e-10));
    }
    Ok(())
}
