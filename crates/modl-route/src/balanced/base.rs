//! BASE layers: in training each module gets as many tokens of a batch as every other one, by the
//! assignment that suits them best.
//!
//! A[t, e] = xₜ·wₑ without gradient; e(t) by [`balanced_assignment`](crate::balanced_assignment) in
//! training and argmaxₑ A[t, e] in evaluation. The weight of the module is a gate, α = σ(xₜ·w_e(t)),
//! which is not normalised and through which alone w learns, so that
//!
//! y = α·E(x) + (1 − α)·f_θ(x)
//!
//! where the aggregator keeps the base function. (In the paper a layer of its own stands between two
//! others, and f_θ(x) is x; an expert whose last product starts at 0 changes nothing at first.)
//! There is no auxiliary loss. Lewis, Bhosale, Dettmers, Goyal, Zettlemoyer 2021, arXiv 2103.16716;
//! survey §4.2.2. The published code replaces scores that are NaN; here they are an error.
//!
//! ```toml
//! router = { type = "base" }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Result, Router, RouterConfig, Routing, Scope, Seed,
    Signal, Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Places, at, balanced_assignment, without_padding};
use crate::scores::{Scored, Scorer};
use crate::top_k::ties::Ties;
use crate::{Input, Scores};

/// A module for each token, all with the same load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Base {
    /// What is assigned. Default: `tokens`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// The length of each w at the start, where they are at right angles to each other (as far as
    /// there are no more modules than dimensions). Default: 0.1.
    pub gain: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
}

impl Default for Base {
    fn default() -> Self {
        Base { input: Input::Tokens, width: None, gain: 0.1, seed: 0 }
    }
}

impl RouterConfig for Base {
    fn kind(&self) -> &'static str {
        "base"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if !(self.gain > 0.0 && self.gain.is_finite()) {
            return Err(Error::invalid("base.gain", "is to be above 0"));
        }
        let width = self.width.unwrap_or(site.input).max(1);
        let scores = Scores {
            input: self.input.clone(),
            width: self.width,
            bias: false,
            // New modules start with a w of about the length of the first ones.
            init_std: self.gain / (width as f64).sqrt(),
            ..Scores::default()
        };
        let (seed, m) = (scope.seed().child("weight"), bank.len() as i64);
        let scorer = scores.over(self.kind(), site, |width| {
            scope.param_drawn("weight", &[m, width], || orthogonal(m, width, self.gain, seed))
        })?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(BaseRouter { scorer, ties, seed: self.seed }))
    }
}

/// gain · Q, where the rows of Q `[rows, cols]` are orthonormal, or its columns if there are fewer
/// (Saxe, McClelland, Ganguli 2014, arXiv 1312.6120).
fn orthogonal(rows: i64, cols: i64, gain: f64, seed: Seed) -> Result<Tensor> {
    let shape = [rows.max(cols), rows.min(cols)];
    let (q, r) = Init::Normal(1.0).tensor(&shape, seed, Kind::Double, Device::Cpu)?.qr()?;
    // With the signs of R's diagonal Q is uniformly distributed.
    let eye = Tensor::eye(shape[1], Kind::Double, Device::Cpu)?;
    let q = q.mul(&r.mul(&eye)?.sum_dims(&[0], true)?.sign()?)?.mul_scalar(gain)?;
    if rows < cols { q.t() } else { Ok(q) }
}

#[derive(Debug)]
struct BaseRouter {
    scorer: Scorer,
    ties: Ties,
    seed: u64,
}

impl Router for BaseRouter {
    fn kind(&self) -> &'static str {
        "base"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let index = match cx.train {
            true => assigned(&scored)?,
            false => self.ties.largest(&scored, 1)?,
        };
        let index = without_padding(index, &scored)?; // [batch, (seq,) 1]
        let weight = at(&scored.logits, &index)?.sigmoid()?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        Ok(routing.note("logits", scored.logits))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(BaseRouter { scorer, ties, seed: self.seed }))
    }
}

/// The balanced assignment of all real units, `[…, 1]`.
fn assigned(scored: &Scored) -> Result<Tensor> {
    let places = Places::of(scored)?;
    let affinity = places.scores.to_kind(Kind::Double)?.to_vec::<f64>()?;
    let owner = balanced_assignment(&affinity, places.scores.len_of(-1) as usize)?;
    let owner: Vec<i64> = owner.into_iter().map(|e| e as i64).collect();
    places.spread(&Tensor::from_slice(&owner, &[owner.len() as i64, 1], scored.logits.device())?)
}
