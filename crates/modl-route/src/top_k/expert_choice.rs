//! Expert choice: modules choose tokens, instead of tokens modules.
//!
//! s = softmax(ℓ) over the modules, and each module takes the C = ⌊cf · N ⁄ m⌋ (at least 1) of the N
//! tokens with the largest s for it, with the weights αⱼ = sⱼ: the load is exactly C, and there is
//! no loss for balance. A token has as many modules as choose it: all, several or none. How many
//! have none is noted as `unrouted`.
//!
//! Who is chosen depends on all the N tokens, later ones included, so the router is refused in
//! decoders, where it would let the future leak into the past. The N tokens are those of a row, or
//! with `over = "batch"` of the batch, as in the paper; then a row's output depends on the others
//! it comes with. Padding is never chosen.
//!
//! Zhou et al. 2022, arXiv 2202.09368, §3.2 (cf = 2); survey §4.2.3.

use modl_core::{
    Bank, Context, Device, Error, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site,
    Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::scores::Scorer;
use crate::top_k::capacity::{places, real_units, units_of_group};
use crate::top_k::ties::{Ties, largest};
use crate::{Over, Scores};

/// Each module takes its best tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertChoice {
    /// cf, the mean number of modules for a token. Default: 2.
    pub capacity_factor: f64,
    /// Which tokens modules choose from. Default: those of a row, or where each row has one α the
    /// rows of the batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<Over>,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for ExpertChoice {
    fn default() -> Self {
        ExpertChoice { capacity_factor: 2.0, over: None, seed: 0, scores: Scores::default() }
    }
}

impl RouterConfig for ExpertChoice {
    fn kind(&self) -> &'static str {
        "expert_choice"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let cf = self.capacity_factor;
        if !(cf > 0.0 && cf <= bank.len() as f64) {
            let most = bank.len();
            let problem = format!("is {cf}, and is to be above 0 and at most {most}, the modules");
            return Err(Error::invalid("expert_choice.capacity_factor", problem));
        }
        let scorer = self.scores.build("expert_choice", site, bank.len(), scope)?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(ExpertChoiceRouter { config: self.clone(), scorer, ties }))
    }
}

#[derive(Debug)]
struct ExpertChoiceRouter {
    config: ExpertChoice,
    scorer: Scorer,
    ties: Ties,
}

impl Router for ExpertChoiceRouter {
    fn kind(&self) -> &'static str {
        "expert_choice"
    }

    fn looks_ahead(&self) -> bool {
        true
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let s = scored.logits.softmax(-1)?; // [batch, (seq,) modules]
        let (size, m) = (s.size(), bank.len());
        let units = s.numel() / m.max(1);
        let group = units_of_group(self.config.over, &size).max(1) as usize;
        let real = real_units(scored.mask.as_ref(), units)?;
        let flags: Vec<f64> = real.iter().map(|r| f64::from(u8::from(*r))).collect();
        let room = |members: &[bool]| {
            let n = members.iter().filter(|real| **real).count();
            places(self.config.capacity_factor, n, m)
        };
        let room: Vec<i64> = real.chunks(group).map(room).collect(); // C of each group
        let most = room.iter().copied().max().unwrap_or(0);
        let groups = room.len() as i64;

        // [groups, modules, tokens]
        let shape = [groups, group as i64, m as i64];
        let by_module = |t: &Tensor| t.reshape(&shape)?.transpose(1, 2)?.contiguous();
        let padding = Tensor::from_slice(&flags, &[groups, 1, group as i64], Device::Cpu)?;
        let padding = padding.to_device(s.device())?.eq_scalar(0.0)?;
        let by = by_module(&s.detach()?)?.masked_fill(&padding, -1.0)?;
        let best = largest(&by, || by_module(&self.ties.second(&scored.x)?), most as usize)?;
        let room =
            Tensor::from_slice(&room, &[groups, 1, 1], Device::Cpu)?.to_device(s.device())?;
        let fits = room.greater(&Tensor::arange(most, s.device())?)?.to_kind(s.kind())?;
        let chosen = by.zeros_like()?.scatter_add(-1, &best, &fits.expand(&best.size())?)?;
        // [batch, (seq,) modules] of 0 and 1
        let chosen = chosen.transpose(1, 2)?.reshape(&size)?;

        let of_unit = chosen.sum_dims(&[-1], false)?.to_kind(Kind::Int64)?.to_vec::<i64>()?;
        let width = of_unit.iter().copied().max().unwrap_or(0).max(1);
        // Numbers that are all different: those of chosen modules first, in the order of the bank.
        let places = Tensor::arange(m as i64, s.device())?.to_kind(s.kind())?;
        let (_, index) = chosen.mul_scalar(m as f64)?.sub(&places)?.topk(width, -1)?;
        let none = chosen.gather(-1, &index)?.eq_scalar(0.0)?;
        let weight = s.gather(-1, &index)?.masked_fill(&none, 0.0)?;
        let nobody = Tensor::full(&index.size(), -1.0, Kind::Int64, index.device())?;
        let alpha = Weights::Sparse { index: nobody.where_else(&none, &index)?, weight };
        let unrouted = of_unit.iter().zip(&real).filter(|(n, real)| **n == 0 && **real).count();
        let unrouted = Tensor::full(&[], unrouted as f64, Kind::Float, Device::Cpu)?;
        Ok(Routing::new(alpha, m).note("unrouted", unrouted))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        Ok(Box::new(ExpertChoiceRouter { config: self.config.clone(), scorer, ties }))
    }
}
