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
    /// The module that the context names for each row, where the router is to know.
    pub(super) told: Option<Vec<usize>>,
}

/// The name of module number `j`.
pub(super) fn module(j: usize) -> String {
    format!("m{j}")
}

/// `n` numbers below `bound`, each as likely as the others.
pub(super) fn below(bound: usize, n: usize, seed: Seed) -> Result<Vec<usize>> {
    let uniform = Init::Uniform(0.5).tensor(&[n as i64], seed, Kind::Double, Device::Cpu)?;
    let at = |u: f64| (((u + 0.5) * bound as f64) as usize).min(bound - 1);
    Ok(uniform.to_vec::<f64>()?.into_iter().map(at).collect())
}

impl Examples {
    fn describe(&self, cx: Context) -> Context {
        match &self.told {
            Some(told) => cx.with_tasks(told.iter().map(|j| module(*j))),
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
    /// Adam's learning rate.
    pub(super) lr: f64,
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
            for (name, own) in model.router_losses(&trace, &outcome)? {
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
            optimizer.step(&params, &grads, &|_| self.lr)?;
            model.routers_learn(&trace, &outcome)?;
            (self.tick)();
        }
        Ok(())
    }
}
