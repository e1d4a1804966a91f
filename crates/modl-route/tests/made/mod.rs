//! A router over low-rank modules at one site, for the tests of a family.

#![allow(dead_code)]

use modl_core::{
    Bank, Context, Device, Init, Kind, LowRank, ParamStore, Registry, Result, Router, Routing,
    Scope, Seed, Signal, Site, SiteKind, Tensor, Weights, no_grad,
};
use serde_json::Value;

pub struct Made {
    pub router: Box<dyn Router>,
    pub bank: Bank,
    pub store: ParamStore,
}

impl Made {
    /// Over modules `m0`, `m1`, … of rank 1 at a site of this width.
    pub fn new(config: Value, modules: usize, width: i64) -> Result<Self> {
        let module = |j: usize| {
            let draw = |part: &str, shape: &[i64]| {
                let seed = Seed(j as u64).child(part);
                Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu)
            };
            let (down, up) = (draw("down", &[1, width])?, draw("up", &[width, 1])?);
            Ok(LowRank { down, up, scale: 1.0 })
        };
        Self::over(config, (0..modules).map(module).collect::<Result<_>>()?, width)
    }

    pub fn over(config: Value, modules: Vec<LowRank>, width: i64) -> Result<Self> {
        let mut bank = Bank::new();
        for (j, module) in modules.into_iter().enumerate() {
            bank.insert(format!("m{j}"), Box::new(module))?;
        }
        Self::with_bank(config, bank, width)
    }

    pub fn with_bank(config: Value, bank: Bank, width: i64) -> Result<Self> {
        let registry = Registry::new().with(modl_route::register)?;
        let path = "site".into();
        let site = Site { path, kind: SiteKind::Linear, input: width, output: width, index: 0 };
        let mut store = ParamStore::new();
        let mut scope = Scope::at(&mut store, "router", Seed(1)).on(Kind::Double, Device::Cpu);
        let router = registry.routers.parse(&config)?.build(&site, &bank, &mut scope)?;
        Ok(Made { router, bank, store })
    }

    pub fn set(&self, name: &str, values: &[f64]) -> Result<()> {
        let mut own = self.store.get(name)?.clone();
        let values = t(values, &own.size());
        no_grad(|| own.copy_from(&values))
    }

    pub fn get(&self, name: &str) -> Result<Vec<f64>> {
        self.store.get(name)?.to_vec()
    }

    pub fn route(&self, x: &Tensor, cx: &Context) -> Result<Routing> {
        let signal = Signal::from(x.clone());
        let routing = self.router.route(&signal, &self.bank, cx)?;
        routing.check(self.bank.len(), signal.rows())?;
        Ok(routing)
    }

    pub fn alpha(&self, x: &Tensor, cx: &Context) -> Result<Vec<f64>> {
        self.route(x, cx)?.dense(Kind::Double, Device::Cpu)?.to_vec()
    }

    /// One step down the gradient of a loss by these parameters.
    pub fn descend(&self, names: &[&str], loss: &Tensor, rate: f64) -> Result<()> {
        let own: Vec<&Tensor> = names.iter().map(|n| self.store.get(n)).collect::<Result<_>>()?;
        for (own, gradient) in own.iter().zip(loss.gradients(&own, false)?) {
            let Some(gradient) = gradient else { panic!("{names:?}: no gradient") };
            no_grad(|| (*own).clone().add_in_place(&gradient.mul_scalar(-rate)?))?;
        }
        Ok(())
    }
}

pub fn t(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

pub fn normal(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Double, Device::Cpu).unwrap()
}

/// The indices and weights of a sparse routing.
pub fn sparse(routing: &Routing) -> (Vec<i64>, Vec<f64>) {
    let Weights::Sparse { index, weight } = &routing.weights else { panic!("{routing:?}") };
    (index.to_vec().unwrap(), weight.to_vec().unwrap())
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
    e.iter().map(|v| v / e.iter().sum::<f64>()).collect()
}

/// The k largest, the largest first.
pub fn top(scores: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(k);
    order
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() < tolerance, "{f} is not {e}");
    }
}

/// Tokens of `rules` rules in turn, `[1, n, width]`: a centre for each rule, and noise around it.
pub fn rule_data(rules: usize, n: usize, width: usize, seed: u64) -> (Tensor, Vec<usize>) {
    let rule: Vec<usize> = (0..n).map(|i| i % rules).collect();
    let noise = normal(&[n as i64, width as i64], seed).to_vec::<f64>().unwrap();
    let centres = normal(&[rules as i64, width as i64], 77).to_vec::<f64>().unwrap();
    let value = |i: usize| {
        let (token, c) = (i / width, i % width);
        centres[rule[token] * width + c] + 0.3 * noise[i]
    };
    let x: Vec<f64> = (0..n * width).map(value).collect();
    (t(&x, &[1, n as i64, width as i64]), rule)
}
