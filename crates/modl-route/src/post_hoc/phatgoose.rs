//! PHATGOOSE: a gate for each module, trained after the module and without the others, serves as its
//! prototype.
//!
//! - Phase `gate`: of each row the module that is named as its task is active, and nothing but its
//!   gate vector vⱼ is trained: α = σ(x·vⱼ), y = f_θ(x) + α·(hⱼ − f_θ(x)). No module has to know of
//!   another one, so gates can be trained where the modules' data are.
//! - Phase `route`: with x̂ and v̂ⱼ standardised (mean 0 and variance 1 over their d components),
//!   K = the k modules with the largest x̂·v̂ⱼ, and α = softmax_K(x̂·v̂ ⁄ √d).
//!
//! vⱼ starts at 0. Muqeeth, Liu, Liu, Raffel 2024, *Learning to route among specialized experts for
//! zero-shot generalization*, arXiv 2402.05859, §3; survey §4.2.3.
//!
//! ```toml
//! router = { type = "phatgoose", phase = "auto", k = 2 }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Result, Router, RouterConfig, Routing, Scope, Signal, Site,
    Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::scores::{Scored, Scorer};
use crate::top_k::check_k;
use crate::top_k::ties::{Ties, largest};
use crate::{Input, Scores};

/// Which of the two phases it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// `gate` in training, and `route` in evaluation.
    #[default]
    Auto,
    /// The module of the row's task, weighed by its gate.
    Gate,
    /// The k modules whose gates are nearest.
    Route,
}

/// Gates that become prototypes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Phatgoose {
    /// What is done. Default: `auto`.
    pub phase: Phase,
    /// How many modules are active in phase `route`. Default: 2.
    pub k: usize,
    /// What is gated and routed. Default: `tokens`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
}

impl Default for Phatgoose {
    fn default() -> Self {
        Phatgoose { phase: Phase::Auto, k: 2, input: Input::Tokens, width: None, seed: 0 }
    }
}

impl RouterConfig for Phatgoose {
    fn kind(&self) -> &'static str {
        "phatgoose"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if self.phase != Phase::Gate {
            check_k("phatgoose.k", self.k, bank.len())?;
        }
        let scores = Scores {
            input: self.input.clone(),
            width: self.width,
            bias: false,
            ..Scores::default()
        };
        let scorer = scores.build(self.kind(), site, bank.len(), scope)?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(PhatgooseRouter { config: self.clone(), scorer, ties }))
    }
}

#[derive(Debug)]
struct PhatgooseRouter {
    config: Phatgoose,
    /// Whose W are the gates.
    scorer: Scorer,
    ties: Ties,
}

impl Router for PhatgooseRouter {
    fn kind(&self) -> &'static str {
        "phatgoose"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        match (self.config.phase, cx.train) {
            (Phase::Gate, _) | (Phase::Auto, true) => gated(&scored, bank, cx),
            (Phase::Route, _) | (Phase::Auto, false) => self.routed(&scored, bank),
        }
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        Ok(Box::new(PhatgooseRouter { config: self.config.clone(), scorer, ties }))
    }
}

/// α = σ(x·v) of the module of the row's task.
fn gated(scored: &Scored, bank: &Bank, cx: &Context) -> Result<Routing> {
    let places: Vec<i64> =
        cx.tasks()?.iter().map(|task| Ok(bank.position(task)? as i64)).collect::<Result<_>>()?;
    let logits = &scored.logits; // [batch, (seq,) modules]
    let mut shape = logits.size();
    if places.len() as i64 != logits.len_of(0) {
        let problem = format!("{} names for {} rows", places.len(), logits.len_of(0));
        return Err(Error::invalid("tasks", problem));
    }
    let mut index = Tensor::from_slice(&places, &[places.len() as i64, 1], logits.device())?;
    if let [_, _, last] = shape.as_mut_slice() {
        *last = 1;
        index = index.unsqueeze(1)?.expand(&shape)?;
    }
    let weight = logits.gather(-1, &index)?.sigmoid()?;
    Ok(Routing::new(Weights::Sparse { index, weight }, bank.len()))
}

impl PhatgooseRouter {
    /// α = softmax_K(x̂·v̂ ⁄ √d).
    fn routed(&self, scored: &Scored, bank: &Bank) -> Result<Routing> {
        let x = &scored.x;
        let width = x.len_of(-1).max(1) as f64;
        let gates = standardised(&self.scorer.weight.to_kind(x.kind())?)?;
        let logits = standardised(x)?.linear(&gates, None)?.mul_scalar(1.0 / width.sqrt())?;
        let index = largest(&logits, || self.ties.second(x), self.config.k)?; // [batch, (seq,) k]
        let weight = logits.gather(-1, &index)?.softmax(-1)?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        Ok(routing.normalised().note("logits", logits))
    }
}

/// (x − mean) ⁄ √(variance + 1e-5) over the last dimension, as layer normalisation does.
fn standardised(x: &Tensor) -> Result<Tensor> {
    let like = |value: f64| Tensor::full(&[x.len_of(-1)], value, x.kind(), Device::Cpu);
    x.layer_norm(&like(1.0)?.to_device(x.device())?, &like(0.0)?.to_device(x.device())?, 1e-5)
}
