//! AdaMix: one module by lot for each batch, and one average of all once training is done.
//!
//! In training each site draws a module for the batch; in evaluation all m modules have the weight
//! 1⁄m. With the aggregator `average` that is one module with the mean of the parameters, at the cost
//! of one; `merge_low_rank` of modl-aggregate makes it once and for all. Wang et al. 2022,
//! arXiv 2205.12410, add a loss that holds two passes together:
//! `passes = { count = 2, combine = { consistent = 1.0 } }`. Survey §4.2.2, §5.1.
//!
//! With `independent` the part of a module that takes in is drawn by itself, and so is the part that
//! puts out, as in the paper: α has two heads, one for each, which the aggregator `factors` reads.
//!
//! ```toml
//! router = { type = "adamix", independent = true }
//! aggregator = { type = "factors" }
//! ```

use modl_core::{
    Bank, Context, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::random::draw;

/// One module by lot for each batch, all of them in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaMix {
    /// Whether what takes in and what puts out are drawn independently of one another, for low-rank
    /// modules and the aggregator `factors`. Default: false.
    pub independent: bool,
}

impl RouterConfig for AdaMix {
    fn kind(&self) -> &'static str {
        "adamix"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, _: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let path = scope.path().to_owned();
        Ok(Box::new(AdaMixRouter { independent: self.independent, path }))
    }
}

#[derive(Debug, Clone)]
struct AdaMixRouter {
    independent: bool,
    /// Where this router's draws are.
    path: String,
}

impl Router for AdaMixRouter {
    fn kind(&self) -> &'static str {
        "adamix"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let m = bank.len();
        if !cx.train {
            let all = (0..m).map(|j| (j, 1.0 / m as f64)).collect();
            return Ok(Routing::new(Weights::Fixed(all), m).normalised());
        }
        // Two lots: what takes in, and what puts out.
        let lots = draw(2, m, 1, cx.draw(&self.path))?; // [2, 1]
        let lots = if self.independent { lots } else { lots.narrow(0, 0, 1)? };
        let mut chosen: Vec<usize> =
            lots.to_vec::<i64>()?.into_iter().flat_map(usize::try_from).collect();
        chosen.dedup();
        let share = 1.0 / chosen.len().max(1) as f64;
        let weights = Weights::Fixed(chosen.into_iter().map(|j| (j, share)).collect());
        let routing = Routing::new(weights, m).normalised();
        if !self.independent {
            return Ok(routing);
        }
        let heads: Tensor = lots.squeeze(-1)?.one_hot(m as i64)?.to_kind(Kind::Float)?;
        Ok(routing.with_heads(heads.to_device(x.x.device())?))
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}
