//! A module that can stand at every site, and a router that always takes the first one and lets
//! others come.

use modl_core::{
    Attachment, Bank, Context, Host, Init, Module, ModuleConfig, Result, Router, RouterConfig,
    Routing, Scope, Signal, Site, Tensor, Weights,
};
use serde_json::{Value, json};

/// φ·f_θ(x) with one number for all.
#[derive(Debug)]
pub struct Everywhere;

#[derive(Debug)]
struct Factor(Tensor);

impl ModuleConfig for Everywhere {
    fn kind(&self) -> &'static str {
        "everywhere"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(Factor(scope.param("factor", &[1], Init::Ones)?)))
    }
}

impl Module for Factor {
    fn kind(&self) -> &'static str {
        "everywhere"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        Ok(y.replace(y.x.mul(&self.0)?))
    }
}

/// α = (1, 0, 0, …).
#[derive(Debug, Clone, Copy)]
pub struct First;

impl RouterConfig for First {
    fn kind(&self) -> &'static str {
        "first"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(First))
    }
}

impl Router for First {
    fn kind(&self) -> &'static str {
        "first"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(0, 1.0)]), bank.len()))
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(First))
    }
}
