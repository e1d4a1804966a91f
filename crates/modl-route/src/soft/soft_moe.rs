//! Soft MoE: every module sees mixtures of all tokens of a row, and every token gets a mixture of
//! what the modules make of them.
//!
//! With tokens X `[N, d]` of a row, m modules of p slots each and Φ `[m · p, d]`:
//!
//! - L = `scale` · X̂ Φ̂ᵀ, where each token and each row of Φ is divided by its length;
//! - dispatch D = softmax of L over the *tokens*: slot s of module j is Σₜ Dₜ,ⱼₛ xₜ;
//! - combine C = softmax of L over the *slots*: yₜ = Σⱼₛ Cₜ,ⱼₛ hⱼ(slotⱼₛ).
//!
//! All is differentiable, each module has the same number of slots, and no token is dropped; there
//! is no loss for balance. Exchanging tokens exchanges the outputs. Padding gets no share in D. A
//! token's output depends on later ones, so the router is refused in decoders.
//!
//! Φ starts with normal numbers of variance 1 ⁄ d and `scale` with 1. The authors have p = N ⁄ m,
//! so as to cost what one module would on all tokens; p is fixed here, since Φ is.
//!
//! Puigcerver et al. 2023, arXiv 2308.00951, §2 and §2.3; survey §4.2.3.
//!
//! ```toml
//! router = { type = "soft_moe", slots = 16 }
//! ```

use modl_core::{
    Bank, Context, Error, Init, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site,
    SiteKind, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::scores::mask;

/// Mixtures of tokens for every module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SoftMoe {
    /// p, the slots of each module. Default: 1.
    pub slots: usize,
    /// Whether tokens and Φ are divided by their lengths, and there is a `scale`. Default: true.
    pub normalise: bool,
}

impl Default for SoftMoe {
    fn default() -> Self {
        SoftMoe { slots: 1, normalise: true }
    }
}

impl RouterConfig for SoftMoe {
    fn kind(&self) -> &'static str {
        "soft_moe"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if self.slots == 0 {
            return Err(Error::invalid("soft_moe.slots", "is to be 1 or more"));
        }
        if !site.kind.token_wise() || site.kind == SiteKind::Embedding {
            return Err(Error::unsupported(
                format!("mixing tokens at a site of kind {:?}", site.kind),
                "choose sites that take each token by itself: linear layers, sub-layers",
            ));
        }
        let rows = (bank.len() * self.slots) as i64;
        let init = Init::Normal(1.0 / (site.input.max(1) as f64).sqrt());
        let phi = scope.param("phi", &[rows, site.input], init)?;
        let scale = self.normalise.then(|| scope.param("scale", &[1], Init::Ones)).transpose()?;
        Ok(Box::new(SoftMoeRouter { slots: self.slots as i64, phi, scale }))
    }
}

#[derive(Debug)]
struct SoftMoeRouter {
    slots: i64,
    /// Φ, `[modules · slots, width]`.
    phi: Tensor,
    /// `[1]`.
    scale: Option<Tensor>,
}

impl Router for SoftMoeRouter {
    fn kind(&self) -> &'static str {
        "soft_moe"
    }

    fn looks_ahead(&self) -> bool {
        true
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let &[batch, seq, width] = x.x.size().as_slice() else {
            let problem = format!("mixes tokens [batch, seq, dim], x is {:?}", x.x);
            return Err(Error::invalid("a `soft_moe` router", problem));
        };
        if width != self.phi.len_of(1) {
            let wanted = self.phi.len_of(1);
            let problem = format!("was made for tokens of width {wanted}, x is {:?}", x.x);
            return Err(Error::invalid("a `soft_moe` router", problem));
        }
        let kind = match (x.x.kind(), self.phi.kind()) {
            (Kind::Double, _) | (_, Kind::Double) => Kind::Double,
            _ => Kind::Float,
        };
        let (tokens, phi) = (x.x.to_kind(kind)?, self.phi.to_kind(kind)?);
        let logits = match &self.scale {
            Some(scale) => unit(&tokens)?.linear(&unit(&phi)?, None)?.mul(&scale.to_kind(kind)?)?,
            None => tokens.linear(&phi, None)?,
        }; // [batch, seq, modules · slots]
        logits.check_finite("scores of a `soft_moe` router")?;
        let over_tokens = match mask(&x.x, cx)? {
            // Not −∞, which would be no number for a row of nothing but padding.
            Some(mask) => logits.masked_fill(&mask.eq_scalar(0.0)?.unsqueeze(-1)?, -1e30)?,
            None => logits.clone(),
        };
        let shape = [batch, seq, bank.len() as i64, self.slots];
        let dispatch = over_tokens.softmax(1)?.reshape(&shape)?;
        let combine = logits.softmax(-1)?.reshape(&shape)?;
        Ok(Routing::new(Weights::Slots { dispatch, combine }, bank.len()).normalised())
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (old, width) = (self.phi.len_of(0), self.phi.len_of(1));
        let (shape, seed) =
            ([modules as i64 * self.slots - old, width], scope.seed().nth(modules as u64));
        let init = Init::Normal(1.0 / (width.max(1) as f64).sqrt());
        let new = init.tensor(&shape, seed, self.phi.kind(), self.phi.device())?;
        let phi = scope.replace("phi", &Tensor::cat(&[self.phi.detach()?, new], 0)?)?;
        Ok(Box::new(SoftMoeRouter { slots: self.slots, phi, scale: self.scale.clone() }))
    }
}

/// Vectors along the last dimension divided by their lengths (√(Σ x² + 10⁻⁶), as the authors do).
fn unit(v: &Tensor) -> Result<Tensor> {
    v.div(&v.square()?.sum_dims(&[-1], true)?.add_scalar(1e-6)?.sqrt()?)
}
