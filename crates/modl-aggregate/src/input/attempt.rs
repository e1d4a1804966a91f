//! ATTEMPT: attention of the text over source prompts and the prompt of the task.
//!
//! With x̂ the largest value of each dimension over a row's real tokens, P̂ⱼ the same over a prompt's
//! vectors, and H = LN(W_up SiLU(W_down x̂)):
//!
//! aⱼ ∝ αⱼ exp(P̂ⱼ·H ⁄ T) over sources and target,   P = P_target + Σⱼ aⱼ Pⱼ,   f_θ(\[P; x\])
//!
//! Each row has its own P. The published code leaves out the first summand: the form is named.
//! T = e·dim where nobody says another (2087 in the published settings of width 768). Without sources
//! it is prompt tuning, with 2·P_target in the paper's form. It looks at all tokens of a row.
//!
//! Asai, Salehi, Peters, Hajishirzi 2022, *ATTEMPT: Parameter-Efficient Multi-task Tuning via
//! Attentional Mixtures of Soft Prompts*, arXiv 2205.11961; survey §5.2.3.

use modl_core::{
    Aggregator, AggregatorConfig, Error, Init, Kind, Order, Outputs, Result, Routing, Scope,
    Signal, Site, SiteKind, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tokens;
use crate::changes::{attend, score_kind};

/// What P is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptForm {
    /// P_target + Σ aⱼ Pⱼ.
    #[default]
    Paper,
    /// Σ aⱼ Pⱼ.
    Code,
}

/// Attention over prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Attempt {
    /// The module that is the prompt of the task, which is to be active like the sources; without one
    /// P = Σ aⱼ Pⱼ.
    pub target: Option<String>,
    /// What P is. Default: `paper`.
    pub form: AttemptForm,
    /// The width of W_down x̂, at least 1. Default: 100.
    pub rank: i64,
    /// T, above 0. Default: e·dim.
    pub temperature: Option<f64>,
}

impl Default for Attempt {
    fn default() -> Self {
        Attempt { target: None, form: AttemptForm::Paper, rank: 100, temperature: None }
    }
}

/// The ε of the norm, PyTorch's default.
const NORM_EPS: f64 = 1e-5;

impl AggregatorConfig for Attempt {
    fn kind(&self) -> &'static str {
        "attempt"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("attempt", self)
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        if site.kind != SiteKind::Tokens {
            return Err(Error::unsupported(
                format!("`attempt` at a site of kind {:?}", site.kind),
                "attach prompts to the site of the embeddings, `all-tokens`",
            ));
        }
        if self.rank < 1 {
            let problem = format!("is {}, wants 1 or more", self.rank);
            return Err(Error::invalid("attempt.rank", problem));
        }
        let d = site.input;
        let temperature = self.temperature.unwrap_or(std::f64::consts::E * d as f64);
        if !(temperature.is_finite() && temperature > 0.0) {
            let problem = format!("is {temperature}, wants a number above 0");
            return Err(Error::invalid("attempt.temperature", problem));
        }
        Ok(Box::new(Attentive {
            config: self.clone(),
            temperature,
            down: scope.param("down.weight", &[self.rank, d], Init::Kaiming)?,
            up: scope.param("up.weight", &[d, self.rank], Init::Kaiming)?,
            gain: scope.param("norm.weight", &[d], Init::Ones)?,
            shift: scope.param("norm.bias", &[d], Init::Zeros)?,
        }))
    }
}

#[derive(Debug)]
struct Attentive {
    config: Attempt,
    temperature: f64,
    /// `[rank, dim]` and `[dim, rank]`.
    down: Tensor,
    up: Tensor,
    /// `[dim]`.
    gain: Tensor,
    shift: Tensor,
}

impl Attentive {
    /// H `[batch, dim]` in the kind of scores.
    fn asks(&self, x: &Signal, kind: Kind) -> Result<Tensor> {
        let vectors = x.x.to_kind(kind)?;
        let vectors = match x.with.get("mask") {
            None => vectors,
            Some(mask) => {
                let none = mask.to_kind(kind)?.eq_scalar(0.0)?.unsqueeze(-1)?;
                // A row without a token would be all −∞.
                vectors.masked_fill(&none, -1e30)?
            }
        };
        let x = vectors.max_dim(1)?.0;
        let own = |t: &Tensor| t.to_kind(kind);
        let inner = x.linear(&own(&self.down)?, None)?.silu()?;
        let up = inner.linear(&own(&self.up)?, None)?;
        up.layer_norm(&own(&self.gain)?, &own(&self.shift)?, NORM_EPS)
    }
}

impl Aggregator for Attentive {
    fn kind(&self) -> &'static str {
        "attempt"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn looks_ahead(&self) -> bool {
        true
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        let (f, x, cx) = (h.host(), h.input(), h.context());
        let kind = score_kind(x.x.kind());
        let (mut prompts, mut support) = (Vec::new(), Vec::new());
        let (mut target, mut any) = (None, None);
        for (j, name, module) in h.active().modules() {
            if self.config.target.as_deref() == Some(name) {
                target = Some(prompts.len() as i64);
            }
            any = any.or(Some(module));
            prompts.push(tokens("attempt", name, module, cx)?.to_kind(kind)?);
            support.push(j as i64);
        }
        let Some(any) = any else { return f.call(x, cx) };
        if let (Some(name), None) = (&self.config.target, target) {
            let names = h.active().modules().map(|(_, name, _)| name);
            return Err(Error::unknown("active module (the target of `attempt`)", name, names));
        }
        if let Some(other) = prompts.iter().find(|p| p.size() != prompts[0].size()) {
            let (a, b) = (prompts[0].size(), other.size());
            let problem = format!("are {a:?} and {b:?}, and have to be of one shape to be summed");
            return Err(Error::invalid("attempt: prompts", problem));
        }
        let prompts = Tensor::stack(&prompts, 0)?; // [k, p, dim]
        let index = Tensor::from_slice(&support, &[support.len() as i64], x.x.device())?;
        let alpha = h.active().routing().dense(kind, x.x.device())?.index_select(-1, &index)?;
        if alpha.dim() > 2 {
            return Err(Error::unsupported(
                "`attempt` with an α for each token",
                "route per example: a prompt is that of a row",
            ));
        }
        let s = self.asks(x, kind)?.linear(&prompts.max_dim(1)?.0, None)?; // [batch, k]
        let a = attend(&s.mul_scalar(1.0 / self.temperature)?, &alpha)?;
        if a.detach()?.sum_dims(&[-1], false)?.lt_scalar(0.5)?.to_kind(kind)?.sum()?.item()? > 0.0 {
            return Err(Error::unsupported(
                "`attempt` where a row has no module",
                "all rows of a batch get a prompt, or none: route them apart",
            ));
        }
        let mut mixed = Tensor::einsum("bk,kpd->bpd", &[&a, &prompts])?;
        if let (Some(target), AttemptForm::Paper) = (target, self.config.form) {
            mixed = mixed.add(&prompts.select(0, target)?)?;
        }
        any.with_virtual_tokens(mixed)?.forward(f, x, cx)
    }
}
