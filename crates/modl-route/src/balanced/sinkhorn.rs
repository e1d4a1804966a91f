//! S-BASE: in training modules are chosen by a plan that shares the tokens of a batch out evenly.
//!
//! The plan is π = diag(u) exp(ℓ ⁄ τ) diag(v), with u and v such that each of its n rows sums to 1 and
//! each of its m columns to n ⁄ m: of all balanced plans the one with the largest Σ π·ℓ + τ·H(π). For
//! τ → 0 it is the balanced assignment. u and v are found by scaling columns and rows in turn, in
//! logarithms and f64 (Sinkhorn 1967; Cuturi 2013, arXiv 1306.0895). Then
//!
//! - in training a token goes to the k modules with the largest π, in evaluation, where there is no
//!   batch to balance, to those with the largest ℓ;
//! - the weights are p = softmax(ℓ) as they are, and not π, through which no gradient flows.
//!
//! The shares are balanced in the plan, and only about so in the choices. Clark et al. 2022, *Unified
//! scaling laws for routed language models*, arXiv 2202.01169, §3.1; survey §4.2.2.
//!
//! ```toml
//! router = { type = "sinkhorn", k = 1, temperature = 1.0 }
//! ```

use modl_core::{
    Bank, Context, Error, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Places, at, without_padding};
use crate::scores::Scorer;
use crate::top_k::check_k;
use crate::top_k::ties::{Ties, largest};
use crate::{Input, Scores};

/// The k modules with the largest shares of a balanced plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sinkhorn {
    /// How many modules are active. Default: 1.
    pub k: usize,
    /// What is routed. Default: `tokens`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Standard deviation of the normal numbers with which W starts. Default: 0.02.
    pub init_std: f64,
    /// τ of the plan: small is near to the balanced assignment, and takes more iterations.
    /// Default: 1.
    pub temperature: f64,
    /// How far a row of the plan may be from its sum when the iteration ends; its columns are exact.
    /// Default: 0.001.
    pub tolerance: f64,
    /// The iteration ends after so many rounds in any case. Default: 200.
    pub iterations: usize,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
}

impl Default for Sinkhorn {
    fn default() -> Self {
        Sinkhorn {
            k: 1,
            input: Input::Tokens,
            width: None,
            init_std: 0.02,
            temperature: 1.0,
            tolerance: 1e-3,
            iterations: 200,
            seed: 0,
        }
    }
}

impl RouterConfig for Sinkhorn {
    fn kind(&self) -> &'static str {
        "sinkhorn"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let wrong = |key: &str, problem: &str| Err(Error::invalid(key, problem));
        check_k("sinkhorn.k", self.k, bank.len())?;
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return wrong("sinkhorn.temperature", "is to be above 0");
        }
        if !(self.tolerance > 0.0 && self.tolerance.is_finite()) {
            return wrong("sinkhorn.tolerance", "is to be above 0");
        }
        if self.iterations == 0 {
            return wrong("sinkhorn.iterations", "is to be 1 or more");
        }
        let scores = Scores {
            input: self.input.clone(),
            width: self.width,
            init_std: self.init_std,
            bias: false,
            ..Scores::default()
        };
        let scorer = scores.build(self.kind(), site, bank.len(), scope)?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(SinkhornRouter { config: self.clone(), scorer, ties }))
    }
}

#[derive(Debug)]
struct SinkhornRouter {
    config: Sinkhorn,
    scorer: Scorer,
    ties: Ties,
}

impl Router for SinkhornRouter {
    fn kind(&self) -> &'static str {
        "sinkhorn"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let p = scored.logits.softmax(-1)?; // [batch, (seq,) modules]
        let (index, plan) = match cx.train {
            false => (self.ties.largest(&scored, self.config.k)?, None),
            true => {
                let places = Places::of(&scored)?;
                let plan = self.config.plan(&places.scores)?; // [n, modules]
                let width = scored.x.len_of(-1);
                let units = scored.x.reshape(&[-1, width.max(1)])?;
                let x =
                    places.real.as_ref().map_or(Ok(units.clone()), |r| units.index_select(0, r))?;
                let index = largest(&plan, || self.ties.second(&x), self.config.k)?;
                (places.spread(&index)?, Some(plan))
            }
        };
        let index = without_padding(index, &scored)?; // [batch, (seq,) k]
        let weight = at(&p, &index)?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        let routing = routing.note("logits", scored.logits);
        Ok(match plan {
            Some(plan) => routing.note("plan", plan),
            None => routing,
        })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        Ok(Box::new(SinkhornRouter { config: self.config.clone(), scorer, ties }))
    }
}

impl Sinkhorn {
    /// π for ℓ `[n, modules]`, in f64.
    fn plan(&self, logits: &Tensor) -> Result<Tensor> {
        let kernel = logits.to_kind(Kind::Double)?.mul_scalar(1.0 / self.temperature)?;
        let (n, m) = (kernel.len_of(0), kernel.len_of(1));
        if n == 0 {
            return Ok(kernel);
        }
        let share = (n as f64 / m as f64).ln();
        let mut rows = kernel.logsumexp(1)?.neg()?.unsqueeze(1)?; // ln u, [n, 1]
        let mut columns = Tensor::zeros(&[1, m], Kind::Double, kernel.device())?; // ln v
        for _ in 0..self.iterations {
            columns = kernel.add(&rows)?.logsumexp(0)?.neg()?.add_scalar(share)?.unsqueeze(0)?;
            let next = kernel.add(&columns)?.logsumexp(1)?.neg()?.unsqueeze(1)?;
            // The sums of the rows are u ⁄ u of the next round.
            let sums = rows.sub(&next)?.exp()?;
            if sums.add_scalar(-1.0)?.abs()?.largest()?.item()? <= self.tolerance {
                break;
            }
            rows = next;
        }
        kernel.add(&rows)?.add(&columns)?.exp()
    }
}
