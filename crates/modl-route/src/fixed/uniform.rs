//! Uniform routing: αⱼ = 1⁄m for all m modules, whatever the input.
//!
//! Nothing is learned: it is the control that a learned router has to beat (survey §4.2.1 names
//! routers that do not), and an ensemble of all modules.

use modl_core::{
    Bank, Context, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Every module with the same weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uniform {}

impl RouterConfig for Uniform {
    fn kind(&self) -> &'static str {
        "uniform"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("uniform", self)
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(*self))
    }
}

impl Router for Uniform {
    fn kind(&self) -> &'static str {
        "uniform"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        let m = bank.len();
        Ok(Routing::new(Weights::Fixed((0..m).map(|j| (j, 1.0 / m as f64)).collect()), m))
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(*self))
    }
}
