//! The training loop of the experiments: fresh examples in each step, Adam, and whatever routers
//! add to the loss or learn after a step.

use anyhow::{Context as _, Result};
use modl_core::{
    Context, Device, Init, Kind, Modular, Outcome, Seed, Select, Tensor, Tensors, Trace, no_grad,
};
use modl_train::OptimizerConfig;

/// Some examples.
#[derive(Debug)]
pub(super) struct Examples {
    /// What the network gets.
    pub(super) inputs: Tensors,
    /// What is right, in the shape of the prediction.
    pub(super) target: Tensor,
    /// The rule, the domain or the cluster that each row is from.
    pub(super) origin: Vec<usize>,
    /// What the context names as the task of each row, where a router or a module is to know.
    pub(super) tasks: Option<Vec<String>>,
}

/// The name of module number `j`.
pub(super) fn module(j: usize) -> String {
    format!("m{j}")
}

/// The names of the modules that rows are told to take.
pub(super) fn told(modules: &[usize]) -> Option<Vec<String>> {
    Some(modules.iter().map(|j| module(*j)).collect())
}

/// `n` numbers below `bound`, each as likely as the others.
pub(super) fn below(bound: usize, n: usize, seed: Seed) -> Result<Vec<usize>> {
    let uniform = Init::Uniform(0.5).tensor(&[n as i64], seed, Kind::Double, Device::Cpu)?;
    let at = |u: f64| (((u + 0.5) * bound as f64) as usize).min(bound - 1);
    Ok(uniform.to_vec::<f64>()?.into_iter().map(at).collect())
}

/// Normal numbers with mean 0: both of each pair of Box and Muller's, tensor by tensor, where
/// [`Init::Normal`] draws them one by one. For data that are made anew in each step.
pub(super) fn noise(std: f64, shape: &[i64], seed: Seed) -> Result<Tensor> {
    let n = shape.iter().product::<i64>();
    let pairs = [2, (n + 1) / 2];
    let uniform = Init::Uniform(0.5).tensor(&pairs, seed, Kind::Double, Device::Cpu)?;
    let above_0 = uniform.select(0, 0)?.neg()?.add_scalar(0.5)?;
    let radius = above_0.log()?.mul_scalar(-2.0 * std * std)?.sqrt()?;
    let angle = uniform.select(0, 1)?.mul_scalar(std::f64::consts::TAU)?;
    let both = [radius.mul(&angle.cos()?)?, radius.mul(&angle.sin()?)?];
    Ok(Tensor::cat(&both, 0)?.narrow(0, 0, n)?.reshape(shape)?.to_kind(Kind::Float)?)
}

impl Examples {
    fn describe(&self, cx: Context) -> Context {
        match &self.tasks {
            Some(tasks) => cx.with_tasks(tasks),
            None => cx,
        }
    }

    /// What a model predicts without training, and how it was routed.
    pub(super) fn predict(&self, model: &Modular) -> Result<(Tensor, Trace)> {
        let cx = self.describe(Context::eval());
        let outputs = no_grad(|| model.forward(&self.inputs, &cx))?;
        Ok((outputs.need("predicted")?.clone(), cx.take_trace()))
    }
}

/// What is added to the loss beside what the routers give.
pub(super) type More<'a> = &'a dyn Fn(&Trace) -> modl_core::Result<Option<Tensor>>;

/// How a model is trained.
pub(super) struct Fit<'a> {
    /// Steps.
    pub(super) steps: u64,
    /// Adam's learning rate of each parameter by its name.
    pub(super) lr: &'a dyn Fn(&str) -> f64,
    /// Where the examples and the draws of the routers come from.
    pub(super) seed: Seed,
    /// What the routers' losses count, by name; the others are left out.
    pub(super) weights: &'a [(&'a str, f64)],
    /// What else is added.
    pub(super) more: More<'a>,
    /// Called after each step.
    pub(super) tick: &'a dyn Fn(),
}

impl Fit<'_> {
    /// Trains all parameters on what `draw` gives; `cost` makes the loss of each row, `[batch]`, of
    /// prediction and target.
    pub(super) fn run(
        &self,
        model: &Modular,
        draw: &dyn Fn(Seed) -> Result<Examples>,
        cost: fn(&Tensor, &Tensor) -> modl_core::Result<Tensor>,
    ) -> Result<()> {
        model.train_only(&Select::all())?;
        let params = model.trainable();
        let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let mut optimizer = OptimizerConfig::default().build()?;
        for step in 0..self.steps {
            let examples = draw(self.seed.child("examples").nth(step))?;
            let cx = examples.describe(Context::train(self.seed, step));
            let outputs = model.forward(&examples.inputs, &cx)?;
            let rows = cost(outputs.need("predicted")?, &examples.target)?;
            let known = rows.detach()?;
            let (trace, outcome) = (cx.take_trace(), Outcome::new(&known, &cx));
            let mut loss = rows.mean()?;
            let losses = model.router_losses(&trace, &outcome)?;
            for (name, _) in self.weights {
                // A name that is spelt wrongly would be a condition without its loss.
                anyhow::ensure!(losses.contains_key(*name), "no router gives a loss `{name}`");
            }
            for (name, own) in losses {
                let weight = self.weights.iter().find(|(n, _)| *n == name).map_or(0.0, |(_, w)| *w);
                if weight != 0.0 {
                    loss = loss.add(&own.mul_scalar(weight)?)?;
                }
            }
            if let Some(more) = (self.more)(&trace)? {
                loss = loss.add(&more)?;
            }
            let value = loss.item()?;
            anyhow::ensure!(value.is_finite(), "the loss of step {} is {value}", step + 1);
            let grads = loss.gradients(&leaves, false).context("gradients")?;
            optimizer.step(&params, &grads, self.lr)?;
            model.routers_learn(&trace, &outcome)?;
            (self.tick)();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_normal_and_its_numbers_are_independent() {
        let (n, std) = (40_001, 0.5);
        let x = noise(std, &[n], Seed(1)).unwrap().to_vec::<f32>().unwrap();
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x) / std).collect();
        let mean = |of: &dyn Fn(f64) -> f64| x.iter().map(|x| of(*x)).sum::<f64>() / n as f64;
        // Moments 0, 1, 0, 3 of the normal distribution, each within 4.5 standard errors: the
        // variances of x, x², x³ and x⁴ are 1, 2, 15 and 96.
        for (power, right, variance) in
            [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
        {
            let error = 4.5 * (variance / n as f64).sqrt();
            let found = mean(&|x| x.powi(power));
            assert!((found - right).abs() < error, "{power}: {found}");
        }
        // The two of a pair, and neighbours.
        for lag in [1, n as usize / 2 + 1] {
            let both: Vec<f64> = x.iter().zip(&x[lag..]).map(|(a, b)| a * b).collect();
            let found = both.iter().sum::<f64>() / both.len() as f64;
            assert!(found.abs() < 4.5 / (both.len() as f64).sqrt(), "{lag}: {found}");
        }
    }
}
