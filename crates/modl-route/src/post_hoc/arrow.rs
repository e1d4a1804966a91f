//! Arrow: a library of low-rank modules routes by itself, without training and without data.
//!
//! The prototype vⱼ of a module is the top right singular vector of its ΔWⱼ = BⱼAⱼ, the direction
//! of the input that it changes most. With K = the k modules with the largest |x·vⱼ|,
//!
//! αⱼ = softmax_K(|x·v| ⁄ τ), and 0 outside K.
//!
//! |·| because v and −v are the same singular vector. With Aᵀ = QₐRₐ and B = QᵦRᵦ only the r × r
//! matrix RᵦRₐᵀ = U S Vᵀ is taken apart, and v = Qₐ V₁. Ostapenko et al. 2024, *Towards modular LLMs
//! by building and reusing a library of LoRAs*, arXiv 2405.11157, §4; survey §4.2.3.
//!
//! As PEFT's `ArrowConfig` has it (0.21: `top_k`, `router_temperature`): x is not normalised, a
//! module that changes nothing has v = 0 and so the score 0, and outputs of modules are added with
//! LoRA's own scaling. PEFT takes 15 steps of a power iteration, which is close where the first
//! singular value stands out; this is exact. Its subtraction of general modules (GenKnowSub) is a
//! change of the modules, and not done here.
//!
//! v is found when the router is made, and kept with its parameters: make it anew for modules that
//! were trained, loaded or added after that.
//!
//! ```toml
//! router = { type = "arrow", k = 3, temperature = 1.0 }
//! ```

use modl_core::{
    Bank, Context, Error, Kind, LowRank, Module, Result, Router, RouterConfig, Routing, Scope,
    Signal, Site, Tensor, Weights, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::scores::Scorer;
use crate::top_k::check_k;
use crate::top_k::ties::{Ties, largest};
use crate::{Input, Scores};

/// The k modules whose singular vectors are nearest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Arrow {
    /// How many modules are active. Default: 3.
    pub k: usize,
    /// τ > 0. Default: 1.
    pub temperature: f64,
    /// What is routed: `tokens` or the `mean` of a row. Default: `tokens`.
    pub input: Input,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
}

impl Default for Arrow {
    fn default() -> Self {
        Arrow { k: 3, temperature: 1.0, input: Input::Tokens, seed: 0 }
    }
}

impl RouterConfig for Arrow {
    fn kind(&self) -> &'static str {
        "arrow"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_k("arrow.k", self.k, bank.len())?;
        let scores = Scores {
            input: self.input.clone(),
            temperature: self.temperature,
            bias: false,
            ..Scores::default()
        };
        let scorer = scores.over(self.kind(), site, |width| {
            let all: Vec<Tensor> = (0..bank.len())
                .map(|j| no_grad(|| prototype(bank, j, width)))
                .collect::<Result<_>>()?;
            let kind = if scope.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            scope.buffer("prototypes", &Tensor::stack(&all, 0)?.to_kind(kind)?)
        })?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(ArrowRouter { k: self.k, scorer, ties }))
    }
}

/// v of module j, `[width]` in f64.
fn prototype(bank: &Bank, j: usize, width: i64) -> Result<Tensor> {
    let name = bank.names().get(j).map_or("", String::as_str);
    let low = bank.module(j).and_then(|m| m.low_rank(&Context::eval())).ok_or_else(|| {
        let kind = bank.module(j).map_or("", Module::kind);
        Error::unsupported(
            format!("`arrow` over module `{name}` of kind `{kind}`, which is no low-rank product"),
            "choose modules such as `lora`, or another router",
        )
    })?;
    if low.down.len_of(-1) != width {
        let problem = format!("has {:?} for inputs of width {width}", low.down);
        return Err(Error::invalid(format!("module `{name}`"), problem));
    }
    low.down.check_finite(&format!("factors of module `{name}`"))?;
    low.up.check_finite(&format!("factors of module `{name}`"))?;
    top_right_singular_vector(&low)
}

/// The right singular vector of up·down `[out, in]` that belongs to the largest singular value,
/// `[in]` in f64 with its largest component above 0; 0 where the product is.
fn top_right_singular_vector(low: &LowRank) -> Result<Tensor> {
    let (qa, ra) = low.down.to_kind(Kind::Double)?.t()?.qr()?; // [in, r], [r, r]
    let (_, rb) = low.up.to_kind(Kind::Double)?.qr()?;
    let (_, s, vt) = rb.matmul(&ra.t()?)?.svd()?;
    let v = qa.matmul(&vt.select(0, 0)?)?; // [in]
    if s.largest()?.item()? == 0.0 {
        return v.zeros_like();
    }
    let at = v.abs()?.argmax(0)?.item()? as i64;
    v.mul_scalar(v.select(0, at)?.item()?.signum())
}

#[derive(Debug)]
struct ArrowRouter {
    k: usize,
    /// Whose W are the prototypes.
    scorer: Scorer,
    ties: Ties,
}

impl Router for ArrowRouter {
    fn kind(&self) -> &'static str {
        "arrow"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let scores = scored.logits.abs()?; // [batch, (seq,) modules]
        let index = largest(&scores, || self.ties.second(&scored.x), self.k)?; // [batch, (seq,) k]
        let weight = scores.gather(-1, &index)?.softmax(-1)?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        Ok(routing.normalised().note("logits", scores))
    }
}
