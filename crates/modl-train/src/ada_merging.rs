//! AdaMerging: the factors of task vectors, learned without labels (Yang et al. 2023,
//! arXiv 2310.02575; survey §5.1).
//!
//! θ(λ) = θ₀ + Σₜ λₜ τₜ, with a factor for each task, or for each task and tensor. What is minimised is
//! the entropy of what the merged model predicts on examples of all tasks. Only λ is trained: the
//! gradient comes to it through θ(λ), which is made anew in each step. AdaMerging++ does the same with
//! task vectors that are [`trimmed`] first.
//!
//! The entropy is least where all examples are of one class, whichever it is; what is sure and wrong
//! stays so. The result is to be tested on labels.

use modl_core::{Device, Error, Kind, Result, Tensor, Tensors};

use crate::OptimizerConfig;

/// What has a factor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Factors {
    /// Each task.
    Tasks,
    /// Each tensor of each task: "layer-wise".
    #[default]
    Layers,
}

/// How factors are learned. The defaults are the authors'.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaMerging {
    /// What has a factor of its own.
    pub factors: Factors,
    /// What all factors start from: 0.3.
    pub start: f64,
    /// What factors are clamped to: 0 to 1. One that has left the bounds has no gradient any more.
    pub bounds: (f64, f64),
    /// Adam's learning rate: 0.001.
    pub lr: f64,
    /// Steps: 500.
    pub steps: u64,
}

impl Default for AdaMerging {
    fn default() -> Self {
        let factors = Factors::default();
        AdaMerging { factors, start: 0.3, bounds: (0.0, 1.0), lr: 1e-3, steps: 500 }
    }
}

/// What was learned.
#[derive(Debug)]
pub struct AdaMerged {
    /// For each task the factor of each tensor, in the order of the base's tensors; one where
    /// [`Factors::Tasks`] was asked for.
    pub factors: Vec<Vec<f64>>,
    /// θ(λ).
    pub model: Tensors,
    /// The loss before each step.
    pub curve: Vec<f64>,
}

impl AdaMerging {
    /// Learns the factors of `vectors` on `base`. `loss` gets the number of the step and θ(λ), and is
    /// usually the sum over tasks of the [`entropy`] of the logits that the model of those tensors
    /// gives on a fresh batch. θ(λ) is in the graph, and is to be used as it is.
    ///
    /// # Errors
    /// Where the vectors have not the base's tensors; where a loss is no number or does not depend on
    /// θ(λ).
    pub fn run(
        &self,
        base: &Tensors,
        vectors: &[Tensors],
        mut loss: impl FnMut(u64, &Tensors) -> Result<Tensor>,
    ) -> Result<AdaMerged> {
        let stacked = stacked(base, vectors)?;
        let (tasks, layers) = (vectors.len() as i64, base.len() as i64);
        let columns = if self.factors == Factors::Tasks { 1 } else { layers };
        let lambda = Tensor::full(&[tasks, columns], self.start, Kind::Float, Device::Cpu)?;
        lambda.set_requires_grad(true)?;
        let params = [("lambda".to_owned(), lambda.clone())];
        let mut optimizer = OptimizerConfig::default().build()?;
        let mut curve = Vec::new();
        for step in 0..self.steps {
            let loss = loss(step, &self.model(base, &stacked, &lambda)?)?;
            if !loss.requires_grad() {
                let problem = "does not depend on the merged tensors; make the logits from them";
                return Err(Error::invalid("loss of AdaMerging", problem));
            }
            let value = loss.item()?;
            if !value.is_finite() {
                let problem = format!("of step {} is {value}", step + 1);
                return Err(Error::invalid("loss of AdaMerging", problem));
            }
            curve.push(value);
            let gradients = loss.gradients(&[&lambda], false)?;
            optimizer.step(&params, &gradients, &|_| self.lr)?;
        }
        let lambda = lambda.detach()?;
        let model = self.model(base, &stacked, &lambda)?;
        let found = lambda.clamp(self.bounds.0, self.bounds.1)?.to_kind(Kind::Double)?;
        let found = found.reshape(&[-1])?.to_vec::<f64>()?;
        let factors = found.chunks(columns.max(1) as usize).map(<[f64]>::to_vec).collect();
        Ok(AdaMerged { factors, model, curve })
    }

    /// θ(λ), in the graph of λ.
    fn model(&self, base: &Tensors, stacked: &[Tensor], lambda: &Tensor) -> Result<Tensors> {
        let bounded = lambda.clamp(self.bounds.0, self.bounds.1)?;
        let mut all = Tensors::new();
        for (n, ((name, theta), taus)) in base.iter().zip(stacked).enumerate() {
            let column = if self.factors == Factors::Tasks { 0 } else { n as i64 };
            let factors = bounded.narrow(1, column, 1)?.t()?.to_kind(taus.kind())?;
            let change = factors.to_device(taus.device())?.matmul(taus)?;
            let sum = theta.detach()?.add(&change.reshape(&theta.size())?)?;
            all.set(name.to_owned(), sum);
        }
        Ok(all)
    }
}

/// The tasks' vectors of each tensor `[tasks, numbers]`.
fn stacked(base: &Tensors, vectors: &[Tensors]) -> Result<Vec<Tensor>> {
    if vectors.is_empty() || base.is_empty() {
        return Err(Error::invalid("AdaMerging", "needs a base with tensors, and task vectors"));
    }
    let one = |(name, theta): (&str, &Tensor)| {
        let of = |v: &Tensors| {
            let tau = v.need(name)?;
            if tau.size() != theta.size() {
                let problem = format!("is {:?} in the base and {:?}", theta.size(), tau.size());
                return Err(Error::invalid(name, problem));
            }
            tau.detach()?.reshape(&[-1])
        };
        Tensor::stack(&vectors.iter().map(of).collect::<Result<Vec<_>>>()?, 0)
    };
    base.iter().map(one).collect()
}

/// The mean over rows of −Σ p ln p with p = softmax of `logits` `[rows, classes]`.
///
/// # Errors
/// Where libtorch refuses.
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    let logs = logits.log_softmax(-1)?;
    logs.exp()?.mul(&logs)?.sum_dims(&[-1], false)?.mean()?.neg()
}

/// τ = θ − θ₀ of each model.
///
/// # Errors
/// Where a model has not the base's tensors.
pub fn task_vectors(base: &Tensors, models: &[Tensors]) -> Result<Vec<Tensors>> {
    models.iter().map(|m| base.map(|name, t| m.need(name)?.sub(t)?.detach())).collect()
}

/// What TIES leaves of task vectors (Yadav et al. 2023, arXiv 2306.01708, its authors' "dis-sum"): of
/// each the `density` of its numbers that are largest in magnitude, over all tensors; of those what
/// has the sign of the sum over tasks. Where that sum is 0, the sign that most places have counts.
///
/// # Errors
/// Where vectors have not the same tensors, or `density` is not above 0 and at most 1.
pub fn trimmed(vectors: &[Tensors], density: f64) -> Result<Vec<Tensors>> {
    let Some(first) = vectors.first() else { return Ok(Vec::new()) };
    if !(density > 0.0 && density <= 1.0) {
        return Err(Error::invalid("density", format!("is {density}, not above 0 and at most 1")));
    }
    let flat = |v: &Tensors| -> Result<Tensor> {
        let parts = first.iter().map(|(name, _)| v.need(name)?.reshape(&[-1]));
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    };
    let mut kept = Vec::new();
    for vector in vectors {
        let tau = flat(vector)?;
        let k = (tau.numel() as f64 * density).round().max(1.0) as i64;
        let (_, places) = tau.abs()?.topk(k, 0)?;
        let ones = Tensor::ones(&[k], tau.kind(), tau.device())?;
        kept.push(tau.mul(&tau.zeros_like()?.scatter_add(0, &places, &ones)?)?);
    }
    let elected = Tensor::stack(&kept, 0)?.sum_dims(&[0], false)?.sign()?;
    let most = if elected.sum()?.item()? < 0.0 { -1.0 } else { 1.0 };
    let undecided = elected.eq_scalar(0.0)?.to_kind(elected.kind())?;
    let elected = elected.add(&undecided.mul_scalar(most)?)?;
    let unflat = |tau: Tensor| -> Result<Tensors> {
        let agrees = tau.mul(&elected)?.gt_scalar(0.0)?.to_kind(tau.kind())?;
        let tau = tau.mul(&agrees)?;
        let lengths: Vec<i64> = first.iter().map(|(_, t)| t.numel() as i64).collect();
        let parts = tau.split(&lengths, 0)?;
        let shaped = first
            .iter()
            .zip(parts)
            .map(|((name, t), p)| Ok((name.to_owned(), p.reshape(&t.size())?)));
        Ok(shaped.collect::<Result<Vec<_>>>()?.into_iter().collect())
    };
    kept.into_iter().map(unflat).collect()
}
