//! Prototype routing: αⱼ = softmax_j(cos(x̄, cⱼ) ⁄ τ), where x̄ is the mean of a row's real tokens
//! and cⱼ `[width]` the learned prototype of module j.
//!
//! Snell, Swersky, Zemel 2017, arXiv 1703.05175; survey §4.2.3.

use modl_core::{
    Bank, Context, Error, Init, Registry, Result, Router, RouterConfig, Routing, Scope, Signal,
    Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Adds the router to a registry, under the name that recipes use.
pub fn register(r: &mut Registry) -> Result<()> {
    r.routers.register::<Prototype>("Nearest prototype by cosine", "Snell et al. 2017", "4.2.3")
}

/// The configuration: `router = { type = "prototype", temperature = 0.1 }`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prototype {
    /// τ > 0: how sharply the nearest prototype wins. Default: 0.1.
    pub temperature: f64,
}

impl Default for Prototype {
    fn default() -> Self {
        Prototype { temperature: 0.1 }
    }
}

impl RouterConfig for Prototype {
    fn kind(&self) -> &'static str {
        "prototype"
    }
    fn to_json(&self) -> Result<Value> {
        Ok(json!({ "temperature": self.temperature }))
    }
    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if self.temperature <= 0.0 {
            return Err(Error::invalid("prototype.temperature", "is to be above 0"));
        }
        let shape = [bank.len() as i64, site.input];
        let prototypes = scope.param("prototypes", &shape, Init::Normal(1.0))?;
        Ok(Box::new(PrototypeRouter { prototypes, temperature: self.temperature }))
    }
}

#[derive(Debug)]
struct PrototypeRouter {
    prototypes: Tensor, // [modules, width]
    temperature: f64,
}

impl Router for PrototypeRouter {
    fn kind(&self) -> &'static str {
        "prototype"
    }
    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let mut tokens = x.x.to_kind(self.prototypes.kind())?; // [batch, seq, width]
        if let Some(mask) = cx.find("mask") {
            tokens = tokens.mul(&mask.to_kind(tokens.kind())?.unsqueeze(-1)?)?;
        }
        let sum = tokens.sum_dims(&[1], false)?; // points where the mean points
        let cosine = unit(&sum)?.linear(&unit(&self.prototypes)?, None)?; // [batch, modules]
        cosine.check_finite("cosines with the prototypes")?;
        let alpha = cosine.mul_scalar(1.0 / self.temperature)?.softmax(-1)?;
        Ok(Routing::new(Weights::Dense(alpha), bank.len()).normalised())
    }
}

fn unit(v: &Tensor) -> Result<Tensor> {
    v.div(&v.square()?.sum_dims(&[-1], true)?.clamp(1e-12, f64::INFINITY)?.sqrt()?)
}
