//! A pool of prompts with learned keys: the N modules whose keys are most like what a row asks for.
//!
//! With q the query of a row, a feature that no training changes, and kⱼ the key of module j,
//!
//! K = the N modules with the least d(q, kⱼ) = 1 − cos(q, kⱼ),   α = 1 ⁄ N on K.
//!
//! α has no gradient; keys learn by a loss in training that pulls those that were chosen towards the
//! queries that chose them (counts 0.5):
//!
//! - `pull` = mean over rows of Σ_{j∈K} d(q, kⱼ).
//!
//! Each key is a parameter of its own, `keys.MODULE` `[width]`, which starts in ±1⁄√width: one that no row of a batch has chosen has no
//! gradient, and no optimiser moves it.
//!
//! - L2P (Wang et al. 2022, *Learning to Prompt for Continual Learning*, arXiv 2112.08654): prompts of the
//!   pool go one behind the other, aggregator `prompt_concat`. With `diversity` d is multiplied in training
//!   by the share of all choices that fell on j so far, so that others are tried, too; the paper counts those
//!   of the tasks before, this counts all.
//! - DualPrompt (Wang et al. 2022, arXiv 2204.04799): each task has a prefix and a key. With `label` a row
//!   goes in training to the module that its label names, and in evaluation, where labels are not looked
//!   at, to the nearest key. Prefixes that all tasks share are alone at their sites.
//!
//! ```toml
//! router = { type = "prompt_pool", k = 5, input = "feature:query", width = 384 }
//! router = { type = "prompt_pool", k = 1, label = "task", input = "feature:query", width = 384 }
//! ```
//!
//! Survey §4.2.3, §6.2.

use std::collections::BTreeSet;

use modl_core::{
    Bank, Context, Device, Error, Init, Outcome, Result, Router, RouterConfig, Routing, Scope,
    Signal, Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Input;
use crate::fixed::unit;
use crate::losses::mean_of_units;
use crate::top_k::check_k;

/// The modules with the nearest keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptPool {
    /// N, how many modules are active. Default: 5.
    pub k: usize,
    /// What q is: `mean` or `feature:NAME`. Default: `mean`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// The kind of label that names a row's module in training, for `k` = 1. Default: keys choose there,
    /// too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether modules that were chosen often are less likely in training. Default: false.
    pub diversity: bool,
}

impl Default for PromptPool {
    fn default() -> Self {
        PromptPool { k: 5, input: Input::Mean, width: None, label: None, diversity: false }
    }
}

fn wrong<T>(key: &str, problem: impl Into<String>) -> Result<T> {
    Err(Error::invalid(format!("prompt_pool.{key}"), problem.into()))
}

impl RouterConfig for PromptPool {
    fn kind(&self) -> &'static str {
        "prompt_pool"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (m, width) = (bank.len(), self.width.unwrap_or(site.input));
        check_k("prompt_pool.k", self.k, m)?;
        if self.label.is_some() && (self.k > 1 || self.diversity) {
            return wrong("label", "names one module: `k` is to be 1, without `diversity`");
        }
        if width < 1 || (width != site.input && !matches!(self.input, Input::Feature(_))) {
            return wrong("width", "is to be the width of the feature; leave it out otherwise");
        }
        if self.input == Input::Tokens {
            return wrong("input", "is to be \"mean\" or \"feature:NAME\": rows have queries");
        }
        self.input.check(site)?;
        let counts = match self.diversity {
            true => {
                let none = Tensor::zeros(&[m as i64], scope.kind(), Device::Cpu)?;
                Some(scope.buffer("counts", &none)?)
            }
            false => None,
        };
        let (mut keys, start) = (scope.sub("keys"), Init::Uniform(1.0 / (width as f64).sqrt()));
        let key = |name: &String| keys.param(name, &[width], start);
        let keys = bank.names().iter().map(key).collect::<Result<_>>()?;
        Ok(Box::new(PoolRouter { config: self.clone(), keys, counts }))
    }
}

#[derive(Debug)]
struct PoolRouter {
    config: PromptPool,
    /// `[width]` of each module.
    keys: Vec<Tensor>,
    /// `[modules]`: how often each was chosen in training, where that counts.
    counts: Option<Tensor>,
}

impl PoolRouter {
    /// d of queries `[batch, width]` to the keys of some modules, `[batch, modules]`.
    fn distance(&self, queries: &Tensor, modules: impl Iterator<Item = usize>) -> Result<Tensor> {
        let keys: Vec<Tensor> = modules.filter_map(|j| self.keys.get(j).cloned()).collect();
        let cosine = unit(queries)?.linear(&unit(&Tensor::stack(&keys, 0)?)?, None)?;
        cosine.neg()?.add_scalar(1.0)
    }

    /// The modules of each row, the nearest first.
    fn nearest(&self, queries: &Tensor, train: bool) -> Result<Vec<Vec<usize>>> {
        let all = self.distance(queries, 0..self.keys.len())?.detach()?;
        all.check_finite("distances of a `prompt_pool` router")?;
        let all = match &self.counts {
            Some(counts) if train && counts.sum()?.item()? > 0.0 => {
                let share = counts.to_kind(all.kind())?.div(&counts.sum()?)?;
                all.mul(&share.to_device(all.device())?)?
            }
            _ => all,
        };
        let m = self.keys.len();
        let flat = all.to_vec::<f64>()?;
        let row = |distances: &[f64]| {
            let mut order: Vec<usize> = (0..m).collect();
            // A stable sort leaves equal ones in the order of the bank.
            order.sort_by(|a, b| match (distances.get(*a), distances.get(*b)) {
                (Some(a), Some(b)) => a.total_cmp(b),
                _ => std::cmp::Ordering::Equal,
            });
            order.truncate(self.config.k);
            order
        };
        Ok(flat.chunks(m.max(1)).map(row).collect())
    }

    /// The module that each row's label names; where there is one alone, it is that.
    fn named(&self, label: &str, rows: i64, bank: &Bank, cx: &Context) -> Result<Vec<Vec<usize>>> {
        if bank.len() == 1 {
            return Ok(vec![vec![0]; rows as usize]);
        }
        let names = cx.labels(label)?;
        if names.len() as i64 != rows {
            let problem = format!("{} names for {rows} rows", names.len());
            return Err(Error::invalid(format!("{label}s"), problem));
        }
        names.iter().map(|name| Ok(vec![bank.position(name)?])).collect()
    }

    /// The mean over rows of Σ d to the keys that each has chosen, through which these learn.
    fn pull(&self, queries: &Tensor, chosen: &[Vec<usize>]) -> Result<Tensor> {
        let some: BTreeSet<usize> = chosen.iter().flatten().copied().collect();
        let mine =
            chosen.iter().flat_map(|row| some.iter().map(|j| f64::from(u8::from(row.contains(j)))));
        let shape = [chosen.len() as i64, some.len() as i64];
        let mine = Tensor::from_slice(&mine.collect::<Vec<_>>(), &shape, queries.device())?;
        let distance = self.distance(queries, some.iter().copied())?;
        let own = distance.mul(&mine.to_kind(queries.kind())?)?;
        mean_of_units(&own.sum_dims(&[-1], true)?, None)?.sum()
    }
}

impl Router for PoolRouter {
    fn kind(&self) -> &'static str {
        "prompt_pool"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("pull", 0.5)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let Some(key) = self.keys.first() else {
            return wrong("k", "there are no modules to choose from");
        };
        let q = self.config.input.of(x, cx)?.0.detach()?.to_kind(key.kind())?;
        if q.len_of(-1) != key.len_of(-1) {
            let wanted = key.len_of(-1);
            return wrong("width", format!("keys have {wanted} numbers, the query is {q:?}"));
        }
        q.check_finite("the query of a `prompt_pool` router")?;
        let chosen = match &self.config.label {
            Some(label) if cx.train => self.named(label, x.rows(), bank, cx)?,
            _ => self.nearest(&q, cx.train)?,
        };
        let pull = match cx.train && !chosen.is_empty() {
            true => Some(self.pull(&q, &chosen)?),
            false => None,
        };
        let share = 1.0 / self.config.k as f64;
        let alpha = |row: Vec<usize>| row.into_iter().map(|j| (j, share)).collect();
        let weights = Weights::Rows(chosen.into_iter().map(alpha).collect());
        let routing = Routing::new(weights, bank.len()).normalised();
        Ok(match pull {
            Some(pull) => routing.with_loss("pull", pull),
            None => routing,
        })
    }

    fn learn(&self, routing: &Routing, _: &Outcome) -> Result<()> {
        let (Some(counts), Weights::Rows(rows)) = (&self.counts, &routing.weights) else {
            return Ok(());
        };
        let mut new = vec![0.0; self.keys.len()];
        for (j, _) in rows.iter().flatten() {
            if let Some(n) = new.get_mut(*j) {
                *n += 1.0;
            }
        }
        let new = Tensor::from_slice(&new, &[new.len() as i64], counts.device())?;
        counts.clone().add_in_place(&new.to_kind(counts.kind())?)
    }
}
