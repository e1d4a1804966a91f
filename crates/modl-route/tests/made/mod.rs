//! Routers made from what a recipe says, over banks of low-rank modules at one site, and the
//! arithmetic that they are held to.
#![allow(dead_code, reason = "each test binary uses a part")]

use modl_core::testing::{RouterClaims, check_router};
use modl_core::{
    Bank, Context, Device, Init, Kind, LowRank, ParamStore, Registry, Result, Router, Routing,
    Scope, Seed, Signal, Site, SiteKind, Tensor, Weights, no_grad,
};
use serde_json::Value;

pub fn registry() -> Registry {
    Registry::new().with(modl_route::register).unwrap()
}

/// Puts a router through the laws of routing.
pub fn check(config: Value, claims: RouterClaims) {
    let registry = registry();
    registry.routers.parse(&config).unwrap();
    check_router(&|| registry.routers.parse(&config).unwrap(), &claims, &registry);
}

pub fn site(width: i64) -> Site {
    Site { path: "site".into(), kind: SiteKind::Linear, input: width, output: width, index: 0 }
}

/// Random modules of rank 1 in f64 under these names.
pub fn bank<S: AsRef<str>>(names: &[S], width: i64) -> Bank {
    let mut bank = Bank::new();
    for name in names.iter().map(AsRef::as_ref) {
        let draw = |part: &str, shape: &[i64]| {
            let seed = Seed(11).child(name).child(part);
            Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu).unwrap()
        };
        let (down, up) = (draw("down", &[1, width]), draw("up", &[width, 1]));
        bank.insert(name, Box::new(LowRank { down, up, scale: 1.0 })).unwrap();
    }
    bank
}

/// `m0`, `m1`, …
pub fn numbered(modules: usize) -> Vec<String> {
    (0..modules).map(|j| format!("m{j}")).collect()
}

#[derive(Debug)]
pub struct Made {
    pub router: Box<dyn Router>,
    pub bank: Bank,
    pub store: ParamStore,
}

impl Made {
    /// In f64 over random modules `m0`, `m1`, … at a site of this width.
    pub fn new(config: Value, modules: usize, width: i64) -> Result<Self> {
        Self::with_bank(config, bank(&numbered(modules), width), width)
    }

    /// [`Made::new`] over modules of these names.
    pub fn named(config: Value, names: &[&str], width: i64) -> Result<Self> {
        Self::with_bank(config, bank(names, width), width)
    }

    /// [`Made::new`] over these modules.
    pub fn over(config: Value, modules: Vec<LowRank>, width: i64) -> Result<Self> {
        let mut bank = Bank::new();
        for (j, module) in modules.into_iter().enumerate() {
            bank.insert(format!("m{j}"), Box::new(module))?;
        }
        Self::with_bank(config, bank, width)
    }

    pub fn with_bank(config: Value, bank: Bank, width: i64) -> Result<Self> {
        Self::build(config, bank, &site(width), "router", Kind::Double)
    }

    /// At a site, with its parameters under `path`.
    pub fn build(config: Value, bank: Bank, site: &Site, path: &str, kind: Kind) -> Result<Self> {
        modl_core::set_threads(1); // all tensors are small
        let mut store = ParamStore::new();
        let mut scope = Scope::at(&mut store, path, Seed(1)).on(kind, Device::Cpu);
        let router = registry().routers.parse(&config)?.build(site, &bank, &mut scope)?;
        Ok(Made { router, bank, store })
    }

    pub fn param(&self, name: &str) -> Tensor {
        self.store.get(name).unwrap().clone()
    }

    pub fn set(&self, name: &str, values: &[f64]) {
        let mut own = self.param(name);
        no_grad(|| own.copy_from(&t(values, &own.size()))).unwrap();
    }

    pub fn get(&self, name: &str) -> Vec<f64> {
        self.param(name).to_vec().unwrap()
    }

    pub fn route(&self, x: &Tensor, cx: &Context) -> Result<Routing> {
        let signal = Signal::from(x.clone());
        let routing = self.router.route(&signal, &self.bank, cx)?;
        routing.check(self.bank.len(), signal.rows())?;
        Ok(routing)
    }

    /// α in the graph, `[…, modules]`.
    pub fn dense(&self, x: &Tensor, cx: &Context) -> Result<Tensor> {
        self.route(x, cx)?.dense(Kind::Double, Device::Cpu)
    }

    pub fn alpha(&self, x: &Tensor, cx: &Context) -> Result<Vec<f64>> {
        self.dense(x, cx)?.to_vec()
    }

    /// The modules that are chosen, unit by unit.
    pub fn chosen(&self, x: &Tensor, cx: &Context) -> Result<Vec<i64>> {
        Ok(sparse(&self.route(x, cx)?).0)
    }

    /// A step of plain gradient descent on all parameters.
    pub fn descend(&self, loss: &Tensor, rate: f64) -> Result<()> {
        let all: Vec<&Tensor> = self.store.trainable().map(|(_, t)| t).collect();
        for (t, g) in all.iter().zip(loss.gradients(&all, false)?) {
            if let Some(g) = g {
                no_grad(|| (*t).clone().add_in_place(&g.mul_scalar(-rate)?))?;
            }
        }
        Ok(())
    }

    /// A step of plain gradient descent on these parameters, each of which has a gradient.
    pub fn descend_by(&self, names: &[&str], loss: &Tensor, rate: f64) -> Result<()> {
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
        assert!((f - e).abs() < tolerance, "{found:?} is not {expected:?}");
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
