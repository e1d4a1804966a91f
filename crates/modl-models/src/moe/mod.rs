//! Mixtures of experts as the feed-forward part of a decoder's layers: a router sends each token to
//! the k experts that it scores highest, and their outputs are summed by its probabilities.
//!
//! p = softmax(x Wᵀ) over all experts, in f32 where x is of 16 bits; of the k largest, gateₖ = pₖ ⁄ Σ p (Mixtral) or pₖ as
//! it is (OLMoE); y = Σₖ gateₖ · expertₖ(x). Qwen2-MoE adds σ(x wᵀ) · shared(x), an expert that every
//! token has; DeepSeek-V3 adds shared(x) as it is, scores by σ, and chooses with a bias within groups.
//!
//! Jiang et al. 2024, *Mixtral of Experts*, arXiv 2401.04088; Muennighoff et al. 2024, *OLMoE: Open
//! Mixture-of-Experts Language Models*, arXiv 2409.02060; Yang et al. 2024, *Qwen2 Technical Report*,
//! arXiv 2407.10671; DeepSeek-AI 2024, *DeepSeek-V3 Technical Report*, arXiv 2412.19437.

mod config;
mod experts;
mod names;
mod router;
mod router_logits;
mod split;

use modl_core::{Activation, HostFn, Kind, Result, ResultExt, Signal, SiteKind, Tensor, Tensors};

pub(crate) use config::Reader;
pub use config::{MixtureConfig, RouterScores, SharedExpert, SparseLayers};
pub(crate) use experts::{DOWN, Expert, GATE_UP, Use, WI, WO, Within, mix};
pub(crate) use names::{Fused, in_memory, of_expert};
pub(crate) use router_logits::RouterLogits;
pub(crate) use split::on_disk;

pub(crate) use router::jitter;

use crate::gated::Gated;
use crate::place::{Pass, Place, Surveyor};

/// What is added to an expert's score for the choice, and is kept in f32.
pub(crate) const CHOICE_BIAS: &str = "e_score_correction_bias";

/// A router and its experts.
#[derive(Debug)]
pub(crate) struct Mixture {
    router: Place,
    experts: Place,
    /// The expert that every token has, with its gate.
    shared: Option<(Gated, Option<Place>)>,
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
        let shared = settings.shared.map(|shared| {
            let path = format!("{path}.{}", shared.name());
            let network = Gated::new(to, &path, [width, shared.width], act);
            let gate = format!("{path}_gate");
            (network, shared.gated.then(|| to.place(&gate, SiteKind::Linear, width, 1)))
        });
        Mixture { router, experts, shared, settings: settings.clone(), act }
    }

    /// x `[batch, seq, dim]`, of the same shape, and the router's logits `[batch, seq, experts]`.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass) -> Result<(Tensor, Tensor)> {
        let x = &jitter(x, self.settings.jitter, &self.router, pass)?;
        let logits = match self.settings.scores {
            RouterScores::Softmax => self.router.linear(x, pass)?,
            RouterScores::Sigmoid { .. } => self.router.wide_linear(x, pass)?,
        };
        let scores = match logits.kind() {
            Kind::Half | Kind::BFloat16 => logits.to_kind(Kind::Float)?,
            _ => logits.clone(),
        };
        let bias = self.router.theta.get(CHOICE_BIAS);
        let (index, gates) = router::choose(&scores, bias, &self.settings)?;
        let expert = Expert::Gated(self.act);
        let host: &HostFn = &|theta, s, _| {
            let (index, gates) = (s.with.need("experts")?, s.with.need("gates")?);
            Ok(s.replace(mix(theta, &s.x, index, gates, expert, None)?))
        };
        let with = Tensors::new().with("experts", index).with("gates", gates);
        let routed = Signal { x: x.clone(), with };
        let y = self.experts.run(&routed, pass, host).at(&self.experts.site.path)?.x;
        let Some((network, gate)) = &self.shared else { return Ok((y, logits)) };
        let shared = network.forward(x, pass)?;
        let shared = match gate {
            Some(gate) => gate.linear(x, pass)?.sigmoid()?.mul(&shared)?,
            None => shared,
        };
        Ok((y.add(&shared)?, logits))
    }
}
