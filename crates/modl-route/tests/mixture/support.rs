//! Routers over banks of any size, and the arithmetic that they are held to.

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
    /// The router of `config` in f64 over modules `m0`, `m1`, …
    pub fn new(config: Value, modules: usize, width: i64) -> Result<Self> {
        Self::at(config, modules, width, SiteKind::Linear)
    }

    pub fn at(config: Value, modules: usize, width: i64, kind: SiteKind) -> Result<Self> {
        let registry = Registry::new().with(modl_route::register)?;
        let mut bank = Bank::new();
        for j in 0..modules {
            let zeros = |shape: &[i64]| Tensor::zeros(shape, Kind::Double, Device::Cpu);
            let module = LowRank { down: zeros(&[1, width])?, up: zeros(&[width, 1])?, scale: 1.0 };
            bank.insert(format!("m{j}"), Box::new(module))?;
        }
        let site = Site { path: "site".into(), kind, input: width, output: width, index: 0 };
        let mut store = ParamStore::new();
        let mut scope = Scope::at(&mut store, "router", Seed(1)).on(Kind::Double, Device::Cpu);
        let router = registry.routers.parse(&config)?.build(&site, &bank, &mut scope)?;
        Ok(Made { router, bank, store })
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.store.get(&format!("router.{name}")).unwrap().clone()
    }

    pub fn set(&self, name: &str, values: &[f64]) {
        let mut to = self.get(name);
        no_grad(|| to.copy_from(&t(values, &to.size()))).unwrap();
    }

    pub fn route(&self, x: &Tensor, cx: &Context) -> Routing {
        let signal = Signal::from(x.clone());
        let routing = self.router.route(&signal, &self.bank, cx).unwrap();
        routing.check(self.bank.len(), signal.rows()).unwrap();
        routing
    }

    /// α, one vector for each unit.
    pub fn alpha(&self, x: &Tensor, cx: &Context) -> Vec<Vec<f64>> {
        rows(&self.route(x, cx).dense(Kind::Double, Device::Cpu).unwrap())
    }
}

pub fn t(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

pub fn normal(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Double, Device::Cpu).unwrap()
}

/// W that hands the first coordinates of x on as scores.
pub fn identity(modules: usize, width: usize) -> Vec<f64> {
    let one = |i: usize| f64::from(u8::from(i / width == i % width));
    (0..modules * width).map(one).collect()
}

/// Vectors along the last dimension.
pub fn rows(x: &Tensor) -> Vec<Vec<f64>> {
    let n = x.len_of(-1).max(1) as usize;
    x.to_vec::<f64>().unwrap().chunks(n).map(<[f64]>::to_vec).collect()
}

/// Indices and weights of each unit.
pub fn sparse(routing: &Routing) -> (Vec<Vec<i64>>, Vec<Vec<f64>>) {
    let Weights::Sparse { index, weight } = &routing.weights else { panic!("{routing:?}") };
    let k = index.len_of(-1) as usize;
    let index = index.to_vec::<i64>().unwrap().chunks(k).map(<[i64]>::to_vec).collect();
    (index, rows(weight))
}

pub fn loss(routing: &Routing, name: &str) -> Tensor {
    let found = routing.losses.iter().find(|(n, _)| n == name);
    found.unwrap_or_else(|| panic!("no loss `{name}`: {:?}", routing.losses)).1.clone()
}

pub fn noted(routing: &Routing, name: &str) -> Vec<f64> {
    routing.noted.need(name).unwrap().to_vec().unwrap()
}

pub fn gradient(of: &Tensor, by: &Tensor) -> Vec<f64> {
    of.gradients(&[by], false).unwrap()[0].as_ref().unwrap().to_vec().unwrap()
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
    e.iter().map(|v| v / e.iter().sum::<f64>()).collect()
}

/// The places of the k largest, the largest first.
pub fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(k);
    order
}

/// Variance over all numbers by the squared mean.
pub fn cv2(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n / mean.powi(2)
}

pub fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() < tolerance, "{found:?} is not {expected:?}");
    }
}

/// A step of training.
pub fn training(step: u64) -> Context {
    Context::train(Seed(7), step)
}
