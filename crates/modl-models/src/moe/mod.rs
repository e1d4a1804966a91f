//! Mixtures of experts as the feed-forward part of a decoder's layers: a router sends each token to
//! the k experts that it scores highest, and their outputs are summed by its probabilities.
//!
//! p = softmax(x Wᵀ) over all experts, in f32 where x is of 16 bits; of the k largest, gateₖ = pₖ ⁄ Σ p (Mixtral) or pₖ as
//! it is (OLMoE); y = Σₖ gateₖ · expertₖ(x).
//!
//! Jiang et al. 2024, *Mixtral of Experts*, arXiv 2401.04088; Muennighoff et al. 2024, *OLMoE: Open
//! Mixture-of-Experts Language Models*, arXiv 2409.02060.

mod config;
mod experts;
mod names;

use modl_core::{Activation, HostFn, Kind, Result, ResultExt, Signal, SiteKind, Tensor, Tensors};

pub use config::MixtureConfig;
pub(crate) use experts::{DOWN, GATE_UP};
pub(crate) use names::{Fused, in_memory};

use crate::place::{Pass, Place, Surveyor};

/// A router and its experts.
#[derive(Debug)]
pub(crate) struct Mixture {
    router: Place,
    experts: Place,
    settings: MixtureConfig,
    act: Activation,
}

impl Mixture {
    /// The mixture at `path` for vectors of `width`.
    pub(crate) fn new(
        to: &mut Surveyor,
        path: &str,
        width: i64,
        settings: &MixtureConfig,
        act: Activation,
    ) -> Self {
        let router = format!("{path}.gate");
        let router = to.place(&router, SiteKind::Router, width, settings.experts);
        let experts = to.place(&format!("{path}.experts"), SiteKind::Experts, width, width);
        Mixture { router, experts, settings: settings.clone(), act }
    }

    /// x `[batch, seq, dim]`, of the same shape.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let scores = self.router.linear(x, pass)?;
        let scores = match scores.kind() {
            Kind::Half | Kind::BFloat16 => scores.to_kind(Kind::Float)?,
            _ => scores,
        };
        let (gates, index) = scores.softmax(-1)?.topk(self.settings.top_k, -1)?;
        let gates = match self.settings.normalised {
            true => gates.div(&gates.sum_dims(&[-1], true)?)?,
            false => gates,
        };
        let act = self.act;
        let host: &HostFn = &|theta, s, _| {
            let (index, gates) = (s.with.need("experts")?, s.with.need("gates")?);
            Ok(s.replace(experts::mix(theta, &s.x, index, gates, act)?))
        };
        let with = Tensors::new().with("experts", index).with("gates", gates);
        let x = Signal { x: x.clone(), with };
        Ok(self.experts.run(&x, pass, host).at(&self.experts.site.path)?.x)
    }
}
