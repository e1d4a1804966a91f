//! Hierarchical routing: first groups of modules, then modules within them.
//!
//! The m modules in order are g groups of m ⁄ g. p = softmax of the groups' scores, of which the
//! `k_groups` largest are kept; in each of those q = softmax of its modules' scores, of which the k
//! largest are kept; α of module j in group i is pᵢ qᵢⱼ. W has a row for each group and one for each
//! module, and a unit is compared with g + `k_groups` · m ⁄ g of them where others would be with m
//! (here all are computed by one product).
//!
//! Loss in training: `balance` = m · Σ f P over all modules, with P the mean of the p q before any is
//! left out. It counts 0.01 unless a recipe says otherwise, as in Switch Transformers.
//!
//! Shazeer et al. 2017, arXiv 1701.06538, appendix B (2 groups and 2 modules, with noise); Jordan,
//! Jacobs 1994, Neural Computation 6(2), "Hierarchical mixtures of experts and the EM algorithm";
//! survey §4.2.3.

use modl_core::{
    Bank, Context, Error, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Scores;
use crate::losses::balance;
use crate::scores::Scorer;
use crate::top_k::check_k;
use crate::top_k::ties::{Ties, largest};

/// Top-k of groups, then top-k within them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hierarchical {
    /// g, which divides the number of modules. Default: 1.
    pub groups: usize,
    /// How many groups are active. Default: 1.
    pub k_groups: usize,
    /// How many modules are active in each of them. Default: 1.
    pub k: usize,
    /// Whether the p that are kept, and the q, are made to sum to 1. Default: each where more than
    /// one is kept; a single one that is made to be 1 lets no gradient through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renormalise: Option<bool>,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for Hierarchical {
    fn default() -> Self {
        let scores = Scores::default();
        Hierarchical { groups: 1, k_groups: 1, k: 1, renormalise: None, seed: 0, scores }
    }
}

impl RouterConfig for Hierarchical {
    fn kind(&self) -> &'static str {
        "hierarchical"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let m = bank.len();
        if m == 0 || !m.is_multiple_of(self.groups) {
            let problem = format!("is {}, which does not divide {m} modules", self.groups);
            return Err(Error::invalid("hierarchical.groups", problem));
        }
        if !(1..=self.groups).contains(&self.k_groups) {
            let problem = format!("is {}, there are {} groups", self.k_groups, self.groups);
            return Err(Error::invalid("hierarchical.k_groups", problem));
        }
        check_k("hierarchical.k", self.k, m / self.groups)?;
        let scorer = self.scores.build("hierarchical", site, self.groups + m, scope)?;
        let ties = Ties::new(self.seed, &scorer, scope.path());
        Ok(Box::new(HierarchicalRouter { config: self.clone(), scorer, ties }))
    }
}

#[derive(Debug)]
struct HierarchicalRouter {
    config: Hierarchical,
    /// The groups' scores, then the modules'.
    scorer: Scorer,
    ties: Ties,
}

impl HierarchicalRouter {
    fn renormalises(&self, k: usize) -> bool {
        self.config.renormalise.unwrap_or(k > 1)
    }

    /// The weights that are kept.
    fn kept(&self, p: &Tensor, index: &Tensor, k: usize) -> Result<Tensor> {
        let kept = p.gather(-1, index)?;
        if self.renormalises(k) { kept.div(&kept.sum_dims(&[-1], true)?) } else { Ok(kept) }
    }
}

impl Router for HierarchicalRouter {
    fn kind(&self) -> &'static str {
        "hierarchical"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("balance", 0.01)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let Hierarchical { groups, k_groups, k, .. } = self.config;
        let (g, m) = (groups as i64, bank.len() as i64);
        let each = m / g;
        let of_unit = |last: &[i64]| {
            let mut shape = scored.logits.size();
            shape.pop();
            shape.extend(last);
            shape
        };
        let parts = |t: &Tensor| -> Result<(Tensor, Tensor)> {
            let modules = t.narrow(-1, g, m)?.reshape(&of_unit(&[g, each]))?;
            Ok((t.narrow(-1, 0, g)?, modules))
        };
        let (l_groups, l_modules) = parts(&scored.logits)?;
        let ties = || parts(&self.ties.second(&scored.x)?);
        let p = l_groups.softmax(-1)?; // […, g]
        let q = l_modules.softmax(-1)?; // […, g, m ⁄ g]
        let best = largest(&l_groups, || Ok(ties()?.0), k_groups)?; // […, k_groups]
        let within = largest(&l_modules, || Ok(ties()?.1), k)?; // […, g, k]
        let rows = best.unsqueeze(-1)?;
        let of_best = |t: &Tensor, n: usize| {
            t.gather(-2, &rows.expand(&of_unit(&[k_groups as i64, n as i64]))?)
        };
        let p_kept = self.kept(&p, &best, k_groups)?.unsqueeze(-1)?;
        let q_kept = of_best(&self.kept(&q, &within, k)?, k)?;
        let start = Tensor::op("mul", &[&rows], |t| t[0].f_mul_scalar(each))?;
        let last = of_unit(&[(k_groups * k) as i64]);
        let index = of_best(&within, k)?.add(&start)?.reshape(&last)?;
        let weight = p_kept.mul(&q_kept)?.reshape(&last)?;
        let alpha = Weights::Sparse { index: index.clone(), weight };
        let mut routing = Routing::new(alpha, bank.len());
        if cx.train {
            let joint = p.unsqueeze(-1)?.mul(&q)?.reshape(&of_unit(&[m]))?;
            routing = routing.with_loss("balance", balance(&joint, &index, scored.mask.as_ref())?);
        }
        let whole = self.renormalises(k_groups) && self.renormalises(k);
        Ok(if whole { routing.normalised() } else { routing })
    }
}
