//! Routers made from what a recipe says, over banks of plain modules, for tests.
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

pub fn t(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

pub fn site(width: i64) -> Site {
    Site { path: "site".into(), kind: SiteKind::Linear, input: width, output: width, index: 0 }
}

/// Random low-rank modules in f64 under these names.
pub fn bank(names: &[&str], width: i64) -> Bank {
    let mut bank = Bank::new();
    for name in names {
        let draw = |part: &str, shape: &[i64]| {
            let seed = Seed(11).child(name).child(part);
            Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu).unwrap()
        };
        let (down, up) = (draw("down", &[2, width]), draw("up", &[width, 2]));
        bank.insert(*name, Box::new(LowRank { down, up, scale: 0.5 })).unwrap();
    }
    bank
}

#[derive(Debug)]
pub struct Made {
    pub router: Box<dyn Router>,
    pub bank: Bank,
    pub store: ParamStore,
}

impl Made {
    pub fn new(config: Value, names: &[&str], width: i64) -> Result<Self> {
        let (bank, mut store) = (bank(names, width), ParamStore::new());
        let mut scope = Scope::at(&mut store, "router", Seed(1)).on(Kind::Double, Device::Cpu);
        let router = registry().routers.parse(&config)?.build(&site(width), &bank, &mut scope)?;
        Ok(Made { router, bank, store })
    }

    pub fn set(&self, name: &str, values: &[f64]) {
        let mut t = self.store.get(name).unwrap().clone();
        let values = Tensor::from_slice(values, &t.size(), Device::Cpu).unwrap();
        no_grad(|| t.copy_from(&values)).unwrap();
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

    /// The modules that are chosen, unit by unit.
    pub fn chosen(&self, x: &Tensor, cx: &Context) -> Result<Vec<i64>> {
        let routing = self.route(x, cx)?;
        let Weights::Sparse { index, .. } = &routing.weights else { panic!("{routing:?}") };
        index.to_vec()
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
}

pub fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() < tolerance, "{f} is not {e}");
    }
}

pub fn noise(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Double, Device::Cpu).unwrap()
}
