//! Elastic weight consolidation: what mattered for earlier tasks is held where it was.
//!
//! After each task the diagonal F of the Fisher information says how much each parameter mattered,
//! and later tasks minimise L + λ⁄2 Σ F (θ − θ*)². With a penalty for each task the sum of their
//! quadratic forms is kept as one: Ω = Σ F, and μ the mean of the θ* weighted by F, which is the
//! Laplace approximation's posterior, N(μ, 1⁄Ω). Online (γ < 1 forgets): Ω = γ Ω + F, μ = θ*.
//!
//! F is the mean over examples of squared gradients of single examples' log-likelihoods (the square of
//! a batch's mean gradient is something else).
//!
//! Kirkpatrick et al. 2017, *Overcoming catastrophic forgetting in neural networks*,
//! arXiv 1612.00796; online: Schwarz et al. 2018, *Progress & Compress*, arXiv 1805.06370. Survey
//! §6.2.

use modl_compute::sparse::fisher;
use modl_core::{Context, Error, Result, ResultExt, Seed, Tensor, Tensors};
use serde::{Deserialize, Serialize};

use super::quadratic::Quadratic;
use super::{Continual, Learner, TaskContext};
use crate::{Batch, Dataset, StepContext, StepGradients, StepRule};

/// Settings of EWC.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ewc {
    /// λ, 0 or more; default 100. What is right depends on tasks and losses: 1 to 10⁵ are in use.
    pub lambda: f64,
    /// γ in [0, 1] makes it online; default: a penalty for each task.
    pub online: Option<f64>,
    /// So many examples of a task, drawn by seed, are taken for its Fisher information; default 256.
    pub examples: usize,
    /// Whose labels; default `gold`.
    pub labels: Labels,
}

/// Of which labels the likelihood is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// Those of the data: the empirical Fisher information.
    #[default]
    Gold,
    /// One for each example, drawn from what the model says: the Fisher information itself.
    Drawn,
}

impl Default for Ewc {
    fn default() -> Self {
        Ewc { lambda: 100.0, online: None, examples: 256, labels: Labels::Gold }
    }
}

impl Continual for Ewc {
    fn kind(&self) -> &'static str {
        "ewc"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if !(self.lambda >= 0.0 && self.lambda.is_finite()) {
            return Err(Error::invalid("lambda", "is to be 0 or more"));
        }
        if self.online.is_some_and(|gamma| !(0.0..=1.0).contains(&gamma)) {
            return Err(Error::invalid("online", "is γ, between 0 and 1"));
        }
        if self.examples == 0 {
            return Err(Error::invalid("examples", "is to be 1 or more"));
        }
        Ok(Box::new(Elastic { config: self.clone(), springs: Quadratic::default() }))
    }
}

/// EWC between tasks.
#[derive(Debug)]
struct Elastic {
    config: Ewc,
    springs: Quadratic,
}

impl StepRule for Elastic {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut step = cx.gradients(batch)?;
        let held = self.springs.pull(self.config.lambda, cx.params(), &mut step.grads)?;
        step.noted.insert("ewc".into(), held);
        Ok(step)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.springs.state())
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.springs = Quadratic::default();
        state.into_iter().try_for_each(|(name, t)| self.springs.load(&name, t))
    }
}

impl Learner for Elastic {
    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        let params = cx.trained();
        let seed = cx.seed().child("fisher");
        let fisher = self.fisher(cx, &params, cx.data, seed)?;
        let Some(gamma) = self.config.online else { return self.springs.add(&fisher, &params) };
        for (name, own) in fisher.iter() {
            let before = self.springs.importance.get(name);
            let sum = match before {
                Some(old) => old.mul_scalar(gamma)?.add(own)?,
                None => own.clone(),
            };
            self.springs.importance.set(name.to_owned(), sum);
            self.springs.anchor.set(name.to_owned(), params.need(name)?.detach()?.copy()?);
        }
        Ok(())
    }
}

impl Elastic {
    /// The mean over examples of squared gradients.
    fn fisher(
        &self,
        cx: &TaskContext,
        params: &Tensors,
        data: &Dataset,
        seed: Seed,
    ) -> Result<Tensors> {
        let (model, objective) = (&*cx.job.model, cx.job.objective);
        let count = self.config.examples.min(data.len());
        let rows = rand::seq::index::sample(&mut seed.rng(), data.len(), count).into_vec();
        let mut rows = rows.into_iter();
        fisher(params, count as u64, |n| {
            let row: Vec<usize> = rows.next().into_iter().collect();
            let mut one = data.batch(&row, model.device())?;
            let predicted = objective.predict(model, &one, &one.describe(Context::eval())?)?;
            if self.config.labels == Labels::Drawn {
                one.targets = objective.draw(&predicted.detach()?, seed.nth(n))?;
            }
            objective.losses(&predicted, &one)?.sum()?.neg()
        })
        .at("Fisher information")
    }
}
