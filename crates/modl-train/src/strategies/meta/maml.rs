//! Model-agnostic meta-learning: a start θ from which some steps of gradient descent on a task's
//! support make the loss on its query small.
//!
//! ```text
//! θ_{k+1} = θ_k − α ∇L_support(θ_k),   k = 0 … K − 1,   θ_0 = θ
//! meta-gradient = mean over tasks of d L_query(θ_K) ⁄ dθ
//!               = (I − α H_0) … (I − α H_{K−1}) ∇L_query(θ_K),   H_k = ∇²L_support(θ_k)
//! ```
//!
//! The first order leaves the H out. The second is exact: each H_k v is the gradient of
//! ∇L_support(θ_k)·v, taken at θ_k, from the last step back to the first, so that one step's graph is
//! in memory at a time.
//!
//! Finn, Abbeel, Levine 2017, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*,
//! arXiv 1703.03400. Survey §6.2.

use modl_core::{Error, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::adaptation::{self, Descent, copies, put_back};
use super::episodes::{Episode, Episodes};
use super::{Job, Strategy};
use crate::gradients::accumulate;
use crate::{Batch, StepContext, StepGradients, StepLoss, StepRule, TrainConfig};

/// Settings of MAML.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Maml {
    /// α, 0 or more; default 0.01.
    pub inner_lr: f64,
    /// K, 1 or more; default 1.
    pub inner_steps: usize,
    /// Whether H counts; default `second`.
    pub order: Order,
    /// Tasks in a step; default 4.
    pub tasks: usize,
    /// Rows to learn from; default 5.
    pub support: usize,
    /// Rows to be tested on; default 15.
    pub query: usize,
}

/// Whether the inner steps are differentiated through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// No: the gradient at θ_K is taken for that at θ.
    First,
    /// Yes.
    #[default]
    Second,
}

impl Default for Maml {
    fn default() -> Self {
        Maml {
            inner_lr: 0.01,
            inner_steps: 1,
            order: Order::Second,
            tasks: 4,
            support: 5,
            query: 15,
        }
    }
}

impl Strategy for Maml {
    fn kind(&self) -> &'static str {
        "maml"
    }

    fn trains(&self) -> Vec<String> {
        TrainConfig::default().train
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        let inner = Descent { lr: self.inner_lr, steps: self.inner_steps };
        inner.check()?;
        if self.tasks == 0 {
            return Err(Error::invalid("tasks", "is to be 1 or more"));
        }
        let config = job.phase.train.clone();
        if config.activation_checkpointing && self.order == Order::Second {
            let problem =
                "keeps no graph that can be differentiated twice; use `order = \"first\"`";
            return Err(Error::invalid("activation_checkpointing", problem));
        }
        let episodes = Episodes::new(job.data, self.support, self.query)?;
        let mut rule = Meta { config: self.clone(), inner, episodes };
        job.train_by(&mut rule, None, config, job.data)?;
        adaptation::measure(job, inner, self.support)
    }
}

#[derive(Debug)]
struct Meta {
    config: Maml,
    inner: Descent,
    episodes: Episodes,
}

impl StepRule for Meta {
    fn gradients(&mut self, cx: &StepContext, _: &Batch) -> Result<StepGradients> {
        let drawn = self.episodes.draw(self.config.tasks, cx.seed(), cx.model().device())?;
        let share = 1.0 / drawn.len().max(1) as f64;
        let start = copies(cx.params())?;
        let mut sums: Vec<Option<Tensor>> = vec![None; start.len()];
        let mut whole: Option<StepLoss> = None;
        for (n, episode) in drawn.iter().enumerate() {
            let made = self.episode(cx, n, episode);
            put_back(cx.params(), &start)?;
            let (loss, gradient) = made?;
            accumulate(&mut sums, share, &gradient)?;
            let loss = loss.times(share)?;
            whole = Some(loss.after(whole)?);
        }
        let loss = whole.ok_or_else(|| Error::invalid("episodes", "there are none"))?;
        Ok(StepGradients { loss, grads: sums, noted: Default::default() })
    }
}

impl Meta {
    /// The loss of the query after the inner steps, and its gradient at the start. The parameters are
    /// left anywhere.
    fn episode(
        &self,
        cx: &StepContext,
        n: usize,
        Episode { support, query }: &Episode,
    ) -> Result<(StepLoss, Vec<Option<Tensor>>)> {
        // Each pass draws dropout of its own; the same again where a step is looked at again.
        let part = |k: usize| (n * (self.inner.steps + 1) + k) as u64;
        let mut way = Vec::new();
        for k in 0..self.inner.steps {
            way.push(copies(cx.params())?);
            let grads = cx.gradients_of(&cx.loss_of_part(support, part(k))?)?;
            self.inner.step(cx.params(), &grads)?;
        }
        let loss = cx.loss_of_part(query, part(self.inner.steps))?;
        let mut v = cx.gradients_of(&loss)?;
        if self.config.order == Order::First {
            return Ok((loss, v));
        }
        for (k, theta) in way.iter().enumerate().rev() {
            put_back(cx.params(), theta)?;
            let bent = curvature(cx, &cx.loss_of_part(support, part(k))?, &v)?;
            accumulate(&mut v, -self.inner.lr, &bent)?;
        }
        Ok((loss, v))
    }
}

/// H v: the gradient of ∇L·v.
fn curvature(
    cx: &StepContext,
    loss: &StepLoss,
    v: &[Option<Tensor>],
) -> Result<Vec<Option<Tensor>>> {
    let leaves: Vec<&Tensor> = cx.params().iter().map(|(_, t)| t).collect();
    let nothing = || vec![None; leaves.len()];
    if !loss.total().requires_grad() {
        return Ok(nothing());
    }
    let grads = loss.total().gradients(&leaves, true)?;
    let mut product: Option<Tensor> = None;
    for (grad, v) in grads.iter().zip(v) {
        let (Some(grad), Some(v)) = (grad, v) else { continue };
        let own = grad.mul(&v.detach()?)?.sum()?;
        product = Some(match product {
            Some(sum) => sum.add(&own)?,
            None => own,
        });
    }
    match product {
        // A loss that is linear has a gradient that depends on nothing.
        Some(product) if product.requires_grad() => product.gradients(&leaves, false),
        _ => Ok(nothing()),
    }
}
