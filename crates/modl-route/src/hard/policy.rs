//! A categorical policy π = softmax(ℓ): drawn from in training, its mode in evaluation. What
//! routers that learn by the probability of their choices have in common.

use modl_core::{Bank, Context, Outcome, Result, Routing, Scope, Signal, Site, Tensor, Weights};

use super::draws::gumbel;
use crate::Scores;
use crate::scores::{Scored, Scorer};
use crate::top_k::ties::Ties;

/// π with what it draws by.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) scorer: Scorer,
    ties: Ties,
    /// Where the draws are made.
    path: String,
    seed: u64,
}

/// What was drawn.
pub(crate) struct Drawn {
    /// What was scored.
    pub(crate) scored: Scored,
    /// ln π, `[batch, (seq,) modules]`.
    pub(crate) log_p: Tensor,
    /// G, in the same shape: the choice is argmax(ln π + G).
    pub(crate) noise: Tensor,
    /// `[batch, (seq,) 1]`.
    pub(crate) index: Tensor,
}

impl Policy {
    /// Makes the scores of the router `method` at `site`, whose ties are broken by `seed`.
    pub(crate) fn build(
        scores: &Scores,
        seed: u64,
        method: &'static str,
        site: &Site,
        bank: &Bank,
        scope: &mut Scope,
    ) -> Result<Self> {
        let scorer = scores.build(method, site, bank.len(), scope)?;
        Self::of(scorer, seed, scope.path().to_owned())
    }

    fn of(scorer: Scorer, seed: u64, path: String) -> Result<Self> {
        let ties = Ties::new(seed, &scorer, &path);
        Ok(Policy { scorer, ties, path, seed })
    }

    /// With scores for new modules.
    pub(crate) fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Self> {
        Self::of(self.scorer.grown(modules, scope)?, self.seed, self.path.clone())
    }

    /// Where the draws are made.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The most probable module of each row or token.
    pub(crate) fn mode(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        self.mode_of(&scored, bank.len())
    }

    /// The same for scores that are known.
    pub(crate) fn mode_of(&self, scored: &Scored, modules: usize) -> Result<Routing> {
        one_each(self.ties.largest(scored, 1)?, &scored.logits, modules)
    }

    /// A module for each row or token, drawn from π.
    pub(crate) fn draw(&self, x: &Signal, cx: &Context) -> Result<Drawn> {
        let scored = self.scorer.scores(x, cx)?;
        let log_p = scored.logits.log_softmax(-1)?;
        let noise = gumbel(&log_p, cx.draw(&self.path))?;
        let index = log_p.detach()?.add(&noise)?.argmax(-1)?.unsqueeze(-1)?;
        Ok(Drawn { scored, log_p, noise, index })
    }
}

impl Drawn {
    /// With the module that was kept for a row, `[batch]`, instead of the one that was drawn; −1 where
    /// there is none.
    pub(crate) fn or_kept(self, kept: Option<&Tensor>) -> Result<Self> {
        let Some(kept) = kept.filter(|_| self.index.dim() == 2) else { return Ok(self) };
        let kept = kept.unsqueeze(-1)?;
        let none = kept.lt_scalar(0.0)?;
        Ok(Drawn { index: self.index.where_else(&none, &kept)?, ..self })
    }

    /// The choice with its `log_prob`, `[batch]` or `[batch, seq]`: 0 for padding, which nobody
    /// chose for.
    pub(crate) fn routing(&self, modules: usize) -> Result<Routing> {
        let log_prob = self.real(&self.log_p.gather(-1, &self.index)?.squeeze(-1)?)?;
        Ok(one_each(self.index.clone(), &self.log_p, modules)?.note("log_prob", log_prob))
    }

    /// `[batch, (seq)]` with 0 for padding.
    pub(crate) fn real(&self, t: &Tensor) -> Result<Tensor> {
        match &self.scored.mask {
            Some(mask) => t.mul(&mask.to_kind(t.kind())?),
            None => Ok(t.clone()),
        }
    }

    /// The entropy of π, summed over what is chosen for a row, `[batch]`.
    pub(crate) fn entropy(&self) -> Result<Tensor> {
        let h = self.log_p.exp()?.mul(&self.log_p)?.sum_dims(&[-1], false)?.neg()?;
        per_row(&self.real(&h)?)
    }
}

/// The module `index` `[batch, (seq,) 1]` with weight 1 for each row or token.
pub(crate) fn one_each(index: Tensor, like: &Tensor, modules: usize) -> Result<Routing> {
    let weight = Tensor::ones(&index.size(), like.kind(), like.device())?;
    Ok(Routing::new(Weights::Sparse { index, weight }, modules).normalised())
}

/// Sums over all that belongs to a row, `[batch, …]` → `[batch]`.
pub(crate) fn per_row(t: &Tensor) -> Result<Tensor> {
    match t.size().get(1..) {
        None | Some([]) => Ok(t.clone()),
        Some(rest) => t.reshape(&[t.len_of(0), rest.iter().product()])?.sum_dims(&[-1], false),
    }
}

/// The mean over the rows of `[batch]`, where those that were not chosen of several passes are 0;
/// 0 for an empty batch.
pub(crate) fn mean_of_rows(t: &Tensor, outcome: &Outcome) -> Result<Tensor> {
    let counted = match outcome.chosen {
        Some(chosen) => t.mul(&chosen.to_kind(t.kind())?)?,
        None => t.clone(),
    };
    counted.sum()?.mul_scalar(1.0 / t.len_of(0).max(1) as f64)
}
