//! DeepSeek's routing: sigmoid scores, balance by biases that only choose, groups, shared modules.
//!
//! s = σ(ℓ) (or softmax), K = the k modules with the largest sⱼ + bⱼ, and for j ∈ K
//! αⱼ = `routed_scaling_factor` · sⱼ ⁄ Σ_K s: the bias decides who is chosen, not with which weight.
//!
//! - **Balance without a loss**: b is no parameter but a buffer. After each training step, from the
//!   loads of that step, bⱼ ← bⱼ + u · sign(mean load − loadⱼ). With static scores the largest load
//!   falls in about max |Δs| ⁄ u steps to what chance leaves,
//!   MaxVio ≈ √(2 ln m) · √(m ⁄ (N k)) for N units; a large u keeps it trembling.
//! - **Groups**: the modules in order are `n_group` groups of equal size; a group's score is the sum
//!   of its two largest s + b, and only modules of the `topk_group` best groups can be chosen.
//!   (Others are out of reach, as −∞; transformers has 0 for them, which differs where s + b < 0.)
//! - **Shared modules** are named, always active with weight 1, and not among the k.
//! - **`sequence_balance`**: Σⱼ fⱼ Pⱼ of each row, the mean over rows, with fⱼ = m ⁄ (k T) · how often
//!   j was chosen by the row's T tokens, Pⱼ = the mean over them of sⱼ ⁄ Σ s. It counts 0.0001 unless
//!   a recipe says otherwise, as in the paper.
//!
//! Noted in training: `load` `[m]`, how often each module was chosen; shared ones are left out.
//!
//! Wang et al. 2024, arXiv 2408.15664 (biases; u = 0.001); DeepSeek-V3, arXiv 2412.19437, §2.1.2
//! (k = 8 of 256, 8 groups of which 4, factor 2.5, one shared module); DeepSeekMoE, arXiv 2401.06066
//! (shared modules). Survey §4.2.3.

use modl_core::{
    Bank, Context, Device, Error, Outcome, Result, Router, RouterConfig, Routing, Scope, Signal,
    Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::losses::mean_of_units;
use crate::scores::{Scored, Scorer};
use crate::top_k::ties::{Ties, largest};
use crate::top_k::{check_k, check_not_negative};
use crate::{Input, Scores};

/// Top-k balanced by biases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeepSeek {
    /// How many modules are active besides the shared ones. Default: 2.
    pub k: usize,
    /// What makes scores of ℓ. Default: `sigmoid`.
    pub scoring: Scoring,
    /// The number of groups. Default: 1.
    pub n_group: usize,
    /// How many groups can be chosen from. Default: 1.
    pub topk_group: usize,
    /// Whether the weights are divided by their sum. Default: true.
    pub renormalise: bool,
    /// What the weights are multiplied by. Default: 1.
    pub routed_scaling_factor: f64,
    /// u, by how much a bias changes in a step; 0: not at all. Default: 0.001.
    pub bias_update: f64,
    /// The names of the modules that are always active. Default: none.
    pub shared: Vec<String>,
    /// Whether there is the loss of that name; needs `input = "tokens"`. Default: false.
    pub sequence_balance: bool,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how; DeepSeek has `bias = false`. In recipes its keys stand beside
    /// `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

/// What makes scores of ℓ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Each by itself (DeepSeek-V3).
    #[default]
    Sigmoid,
    /// Of all together (DeepSeek-V2).
    Softmax,
}

impl Default for DeepSeek {
    fn default() -> Self {
        DeepSeek {
            k: 2,
            scoring: Scoring::Sigmoid,
            n_group: 1,
            topk_group: 1,
            renormalise: true,
            routed_scaling_factor: 1.0,
            bias_update: 0.001,
            shared: Vec::new(),
            sequence_balance: false,
            seed: 0,
            scores: Scores::default(),
        }
    }
}

impl DeepSeek {
    /// The places of the modules that are routed, and of the shared ones.
    fn places(&self, bank: &Bank) -> Result<(Vec<i64>, Vec<i64>)> {
        let mut shared = Vec::new();
        for name in &self.shared {
            let at = bank.position(name)? as i64;
            if shared.contains(&at) {
                let problem = format!("names `{name}` twice");
                return Err(Error::invalid("deepseek.shared", problem));
            }
            shared.push(at);
        }
        Ok(((0..bank.len() as i64).filter(|j| !shared.contains(j)).collect(), shared))
    }

    fn check(&self, routed: usize) -> Result<()> {
        check_k("deepseek.k", self.k, routed)?;
        check_not_negative("deepseek.bias_update", self.bias_update)?;
        check_not_negative("deepseek.routed_scaling_factor", self.routed_scaling_factor)?;
        if !routed.is_multiple_of(self.n_group) {
            let problem = format!("is {}, there are {routed} modules to divide", self.n_group);
            return Err(Error::invalid("deepseek.n_group", problem));
        }
        if !(1..=self.n_group).contains(&self.topk_group) {
            let problem = format!("is {}, there are {} groups", self.topk_group, self.n_group);
            return Err(Error::invalid("deepseek.topk_group", problem));
        }
        let reach = self.topk_group * (routed / self.n_group);
        if self.k > reach {
            let problem = format!("is {}, the groups that are chosen hold {reach}", self.k);
            return Err(Error::invalid("deepseek.k", problem));
        }
        if self.sequence_balance && self.scores.input != Input::Tokens {
            let problem = "counts the tokens of a row; set input = \"tokens\"";
            return Err(Error::invalid("deepseek.sequence_balance", problem));
        }
        Ok(())
    }
}

impl RouterConfig for DeepSeek {
    fn kind(&self) -> &'static str {
        "deepseek"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (routed, shared) = self.places(bank)?;
        self.check(routed.len())?;
        let scorer = self.scores.build("deepseek", site, routed.len(), scope)?;
        let (kind, device) = (scope.kind(), scope.device());
        let zeros = Tensor::zeros(&[routed.len() as i64], kind, device)?;
        let bias = scope.buffer("selection_bias", &zeros)?;
        let path = scope.path().to_owned();
        let ties = Ties::new(self.seed, &scorer, &path);
        Ok(Box::new(DeepSeekRouter { config: self.clone(), scorer, bias, ties, routed, shared }))
    }
}

#[derive(Debug)]
struct DeepSeekRouter {
    config: DeepSeek,
    scorer: Scorer,
    /// b, `[routed]`.
    bias: Tensor,
    ties: Ties,
    /// Where the modules that are routed stand in the bank.
    routed: Vec<i64>,
    /// Where the shared ones stand.
    shared: Vec<i64>,
}

impl Router for DeepSeekRouter {
    fn kind(&self) -> &'static str {
        "deepseek"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        if self.config.sequence_balance { &[("sequence_balance", 1e-4)] } else { &[] }
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let s = match self.config.scoring {
            Scoring::Sigmoid => scored.logits.sigmoid()?,
            Scoring::Softmax => scored.logits.softmax(-1)?,
        };
        let index = self.choose(&s, &scored)?; // [batch, (seq,) k] of the routed ones
        let mut weight = s.gather(-1, &index)?;
        if self.config.renormalise {
            weight = weight.div(&weight.sum_dims(&[-1], true)?.add_scalar(1e-20)?)?;
        }
        let weight = weight.mul_scalar(self.config.routed_scaling_factor)?;
        let alpha = self.with_shared(&index, weight)?;
        let mut routing = Routing::new(alpha, bank.len());
        let whole = self.config.renormalise && self.config.routed_scaling_factor == 1.0;
        if whole && self.shared.is_empty() {
            routing = routing.normalised();
        }
        if !cx.train {
            return Ok(routing);
        }
        let m = self.routed.len() as i64;
        let chosen = index.one_hot(m)?.to_kind(s.kind())?.sum_dims(&[-2], false)?;
        if self.config.sequence_balance {
            let loss = self.sequence_balance(&s, &chosen, scored.mask.as_ref())?;
            routing = routing.with_loss("sequence_balance", loss);
        }
        let real = match &scored.mask {
            Some(mask) => chosen.mul(&mask.to_kind(s.kind())?.unsqueeze(-1)?)?,
            None => chosen,
        };
        let units = real.numel() as i64 / m;
        Ok(routing.note("load", real.reshape(&[units, m])?.sum_dims(&[0], false)?))
    }

    fn learn(&self, routing: &Routing, _outcome: &Outcome) -> Result<()> {
        let Some(load) = routing.noted.get("load") else { return Ok(()) };
        let step = load.mean()?.sub(load)?.sign()?.mul_scalar(self.config.bias_update)?;
        self.bias.clone().add_in_place(&step.to_kind(self.bias.kind())?)
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let first = self.routed.len() + self.shared.len();
        let routed = [self.routed.clone(), (first as i64..modules as i64).collect()].concat();
        if let Err(e) = self.config.check(routed.len()) {
            return Err(Error::unsupported(
                format!("adding a module under a `deepseek` router of {modules}: {e}"),
                "attach all modules before the router is made",
            ));
        }
        let scorer = self.scorer.grown(routed.len(), scope)?;
        let new = (routed.len() - self.routed.len()) as i64;
        let zeros = Tensor::zeros(&[new], self.bias.kind(), self.bias.device())?;
        let bias =
            scope.replace("selection_bias", &Tensor::cat(&[self.bias.clone(), zeros], 0)?)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        let (config, shared) = (self.config.clone(), self.shared.clone());
        Ok(Box::new(DeepSeekRouter { config, scorer, bias, ties, routed, shared }))
    }
}

impl DeepSeekRouter {
    /// The k largest s + b of the best groups.
    fn choose(&self, s: &Tensor, scored: &Scored) -> Result<Tensor> {
        let by = s.detach()?.add(&self.bias.to_kind(s.kind())?)?;
        let second = || self.ties.second(&scored.x);
        let (groups, kept) = (self.config.n_group as i64, self.config.topk_group);
        if kept as i64 == groups {
            return largest(&by, second, self.config.k);
        }
        let size = by.size();
        let each = self.routed.len() as i64 / groups;
        let mut split = size.clone();
        split.pop();
        split.extend([groups, each]);
        let by_group = by.reshape(&split)?;
        let two = by_group.topk(each.min(2), -1)?.0.sum_dims(&[-1], false)?; // […, groups]
        let tie = || second()?.reshape(&split)?.sum_dims(&[-1], false);
        let best = largest(&two, tie, kept)?.one_hot(groups)?.sum_dims(&[-2], false)?;
        let out = best.eq_scalar(0.0)?.unsqueeze(-1)?;
        let within = by_group.masked_fill(&out, f64::NEG_INFINITY)?.reshape(&size)?;
        largest(&within, second, self.config.k)
    }

    /// α over the bank: the shared modules with weight 1, then those that were chosen.
    fn with_shared(&self, index: &Tensor, weight: Tensor) -> Result<Weights> {
        if self.shared.is_empty() {
            return Ok(Weights::Sparse { index: index.clone(), weight });
        }
        let ids = |of: &[i64]| -> Result<Tensor> {
            Tensor::from_slice(of, &[of.len() as i64], Device::Cpu)?.to_device(index.device())
        };
        let routed =
            ids(&self.routed)?.index_select(0, &index.reshape(&[index.numel() as i64])?)?;
        let mut always = index.size();
        if let Some(last) = always.last_mut() {
            *last = self.shared.len() as i64;
        }
        let index = [ids(&self.shared)?.expand(&always)?, routed.reshape(&index.size())?];
        let ones = Tensor::ones(&always, weight.kind(), weight.device())?;
        Ok(Weights::Sparse {
            index: Tensor::cat(&index, -1)?,
            weight: Tensor::cat(&[ones, weight], -1)?,
        })
    }

    /// Σ f P of each row, the mean over rows with any real token.
    fn sequence_balance(
        &self,
        s: &Tensor,
        chosen: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, seq) = (s.len_of(0), s.len_of(1));
        let mask = match mask {
            Some(mask) => mask.to_kind(s.kind())?,
            None => Tensor::ones(&[rows, seq], s.kind(), s.device())?,
        };
        let share = s.div(&s.sum_dims(&[-1], true)?.add_scalar(1e-20)?)?;
        let p = share.masked_mean(&mask)?; // [batch, modules]
        let scale = self.routed.len() as f64 / self.config.k as f64;
        let f = chosen.masked_mean(&mask)?.mul_scalar(scale)?;
        let of_row = f.mul(&p)?.sum_dims(&[-1], true)?; // [batch, 1]
        let any = mask.sum_dims(&[-1], false)?.gt_scalar(0.0)?;
        mean_of_units(&of_row, Some(&any))?.sum()
    }
}
