//! The laws of aggregation.

use super::{Findings, Given, TinyBackbone, noise_like};
use crate::{
    AggregatorConfig, Context, Device, Kind, Modular, ModuleConfig, Result, Seed, Select, Targets,
    Tensor, Weights,
};

/// What an aggregator claims, and [`check_aggregator`] puts to the test.
#[derive(Debug, Clone, Copy)]
pub struct AggregatorClaims {
    /// A single module with weight 1 is that module.
    pub single_is_identity: bool,
    /// The order of the modules does not matter.
    pub symmetric: bool,
    /// Modules with the same parameters and weights that sum to 1 are one such module.
    pub idempotent: bool,
    /// Gradients reach φ and α.
    pub differentiable: bool,
}

impl Default for AggregatorClaims {
    /// All of them, as weighted means have it.
    fn default() -> Self {
        AggregatorClaims {
            single_is_identity: true,
            symmetric: true,
            idempotent: true,
            differentiable: true,
        }
    }
}

const SEED: Seed = Seed(303);

/// Puts an aggregator through the laws of aggregation, over modules that `module` makes at the
/// linear sites named `query` and `value` of [`TinyBackbone`].
///
/// # Panics
/// With all that does not hold.
pub fn check_aggregator(
    make: &dyn Fn() -> Box<dyn AggregatorConfig>,
    module: &dyn Fn() -> Box<dyn ModuleConfig>,
    claims: AggregatorClaims,
) {
    let kind = make().kind();
    let t = Laws { make, module, claims };
    let mut findings = Findings::default();
    findings.expect("one module of weight 1 is itself", t.single());
    findings.expect("the order of modules does not matter", t.symmetric());
    findings.expect("equal modules are one of them", t.idempotent());
    findings.expect("rows of their own α = each α alone", t.rows());
    findings.expect("gradients reach φ and α", t.gradients());
    findings.conclude(&format!("aggregator `{kind}`"));
}

struct Laws<'a> {
    make: &'a dyn Fn() -> Box<dyn AggregatorConfig>,
    module: &'a dyn Fn() -> Box<dyn ModuleConfig>,
    claims: AggregatorClaims,
}

impl Laws<'_> {
    /// Modules attached in this order; the values depend on the name alone.
    fn model(&self, names: &[&str]) -> Result<Modular> {
        let mut model = Modular::new(TinyBackbone::new(SEED, Kind::Float)?, SEED)?;
        for name in names {
            model.attach(name, (self.module)(), &Targets::names(["query", "value"]))?;
        }
        super::perturb(&model, &Select::new("modules.*"), 0.4, SEED)?;
        model.aggregate((self.make)())?;
        Ok(model)
    }

    fn output(&self, model: &mut Modular, weights: Weights) -> Result<Tensor> {
        model.route(Box::new(Given(weights)), false)?;
        let inputs = TinyBackbone::inputs(4, 5, SEED)?;
        model.forward(&inputs, &Context::eval())?.need("logits").cloned()
    }

    fn close(a: &Tensor, b: &Tensor) -> Result<bool> {
        a.all_close(b, 2e-5, 1e-5)
    }

    fn single(&self) -> Result<bool> {
        if !self.claims.single_is_identity {
            return Ok(true);
        }
        let alone = self.output(&mut self.model(&["b"])?, Weights::Fixed(vec![(0, 1.0)]))?;
        let among = self.output(&mut self.model(&["a", "b"])?, Weights::Fixed(vec![(1, 1.0)]))?;
        let dense = Tensor::from_slice(&[0f32, 1.0], &[2], Device::Cpu)?;
        let weighed = self.output(&mut self.model(&["a", "b"])?, Weights::Dense(dense))?;
        Ok(Self::close(&alone, &among)? && Self::close(&alone, &weighed)?)
    }

    fn symmetric(&self) -> Result<bool> {
        if !self.claims.symmetric {
            return Ok(true);
        }
        let ab = Weights::Fixed(vec![(0, 0.3), (1, 0.7)]);
        let ba = Weights::Fixed(vec![(0, 0.7), (1, 0.3)]);
        let (x, y) = (
            self.output(&mut self.model(&["a", "b"])?, ab)?,
            self.output(&mut self.model(&["b", "a"])?, ba)?,
        );
        Self::close(&x, &y)
    }

    fn idempotent(&self) -> Result<bool> {
        if !self.claims.idempotent {
            return Ok(true);
        }
        let mut twins = self.model(&["a", "b"])?;
        for (name, t) in twins.params().select(&Select::new("modules.a.*")) {
            let mut twin =
                twins.params().get(&name.replacen("modules.a.", "modules.b.", 1))?.clone();
            crate::no_grad(|| twin.copy_from(t))?;
        }
        let both = self.output(&mut twins, Weights::Fixed(vec![(0, 0.4), (1, 0.6)]))?;
        let one = self.output(&mut self.model(&["a"])?, Weights::Fixed(vec![(0, 1.0)]))?;
        Self::close(&both, &one)
    }

    fn rows(&self) -> Result<bool> {
        let mut model = self.model(&["a", "b"])?;
        let alphas =
            [vec![(0, 0.2), (1, 0.8)], vec![(1, 1.0)], vec![(0, 0.2), (1, 0.8)], vec![(0, 1.0)]];
        let mixed = self.output(&mut model, Weights::Rows(alphas.to_vec()))?;
        for (r, alpha) in (0..).zip(alphas) {
            let alone = self.output(&mut model, Weights::Fixed(alpha))?;
            if !Self::close(&mixed.select(0, r)?, &alone.select(0, r)?)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn gradients(&self) -> Result<bool> {
        if !self.claims.differentiable {
            return Ok(true);
        }
        let mut model = self.model(&["a", "b"])?;
        model.train_only(&Select::new("modules.*"))?;
        let alpha = Tensor::from_slice(&[0.3f32, 0.7], &[2], Device::Cpu)?;
        alpha.set_requires_grad(true)?;
        let y = self.output(&mut model, Weights::Dense(alpha.clone()))?;
        let loss = y.mul(&noise_like(&y.size(), &y, SEED)?)?.sum()?;
        let phi = model.trainable();
        let wanted: Vec<&Tensor> = [&alpha].into_iter().chain(phi.iter().map(|(_, t)| t)).collect();
        let grads = loss.gradients(&wanted, false)?;
        let mut all = true;
        for g in grads {
            all &= g.is_some_and(|g| g.abs().and_then(|g| g.sum()?.item()).is_ok_and(|s| s > 0.0));
        }
        Ok(all)
    }
}
