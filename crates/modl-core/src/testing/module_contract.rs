//! T1–T8: what every module keeps to.

use std::path::Path;

use super::{Findings, Given, Sum, TinyBackbone, noise_like, perturb};
use crate::{
    Context, Device, Kind, Modular, ModuleConfig, Registry, Result, Seed, Select, Targets, Tensor,
    Tensors, no_grad,
};

/// What a module is at the start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Identity {
    /// f' = f_θ, bit for bit.
    Exact,
    /// f' = f_θ within this.
    Within(f64),
    /// It changes f_θ from the start.
    No,
}

/// What a module claims, and [`check_module`] puts to the test.
#[derive(Debug, Clone)]
pub struct ModuleClaims {
    /// T1.
    pub identity: Identity,
    /// T3: the number of parameters at the sites that the test attaches it to, buffers not counted.
    pub parameters: usize,
    /// T4: whether it can be merged into θ.
    pub merges: bool,
    /// T7: whether the loss is differentiable in φ (a straight-through estimate is not).
    pub smooth: bool,
    /// The number of columns of the feature `task_vector` that it looks at, 0 for none.
    pub task_vector: i64,
}

const SEED: Seed = Seed(20230222);
const ROWS: i64 = 4;

/// Puts a module through the contract of every module, at the sites of [`TinyBackbone`] that
/// `targets` takes:
///
/// | | |
/// |---|---|
/// | T1 | identity at the start, as claimed |
/// | T2 | one step of training changes φ and leaves θ as it was, bit for bit |
/// | T3 | as many parameters as claimed |
/// | T4 | merged = attached within 1e-5; unmerging restores θ bit for bit |
/// | T5 | a batch with different modules for its rows = each module alone |
/// | T6 | a file holds φ and its buffers alone, comes back bit for bit, and is refused by another backbone |
/// | T7 | gradients = finite differences in f64 |
/// | T8 | without the module everything is as before, bit for bit |
///
/// The rows are of the tasks `one` and `two` by turns.
///
/// # Panics
/// With all that does not hold.
pub fn check_module(
    make: &dyn Fn() -> Box<dyn ModuleConfig>,
    targets: &Targets,
    claims: &ModuleClaims,
    registry: &Registry,
) {
    let kind = make().kind();
    let t = Contract { make, targets, claims, registry };
    let mut findings = Findings::default();
    findings.expect("T1 identity at the start", t.identity());
    findings.expect("T2 θ frozen, φ trained", t.frozen_base());
    findings.expect("T3 number of parameters", t.count());
    findings.expect("T4 merge and unmerge", t.merge());
    findings.expect("T5 mixed rows = each alone", t.mixed_rows());
    findings.expect("T6 save and load", t.save_and_load());
    findings.expect("T7 gradients = finite differences", t.gradients());
    findings.expect("T8 removal", t.removal());
    findings.conclude(&format!("module `{kind}`"));
}

struct Contract<'a> {
    make: &'a dyn Fn() -> Box<dyn ModuleConfig>,
    targets: &'a Targets,
    claims: &'a ModuleClaims,
    registry: &'a Registry,
}

impl Contract<'_> {
    fn model(&self, kind: Kind, names: &[&str]) -> Result<Modular> {
        let mut model = Modular::new(TinyBackbone::new(SEED, kind)?, SEED.child("modules"))?;
        for name in names {
            model.attach(name, (self.make)(), self.targets)?;
        }
        model.aggregate(Box::new(Sum::default()))?;
        model.route(Given::only(0), false)?;
        Ok(model)
    }

    /// A model whose modules are not at their start.
    fn trained(&self, kind: Kind, names: &[&str]) -> Result<Modular> {
        let model = self.model(kind, names)?;
        perturb(&model, &Select::new("modules.*"), 0.3, SEED.child("perturb"))?;
        Ok(model)
    }

    fn inputs(&self) -> Result<Tensors> {
        TinyBackbone::inputs(ROWS, 6, SEED.child("inputs"))
    }

    fn context(&self, like: &Tensor) -> Result<Context> {
        let cx = Context::eval().with_tasks((0..ROWS).map(|r| ["one", "two"][r as usize % 2]));
        Ok(match self.claims.task_vector {
            0 => cx,
            n => cx.with_feature("task_vector", noise_like(&[ROWS, n], like, SEED.child("task"))?),
        })
    }

    fn output(&self, model: &Modular) -> Result<Tensor> {
        let like = Tensor::zeros(&[1], model.kind(), Device::Cpu)?;
        self.output_in(model, &self.context(&like)?)
    }

    fn output_in(&self, model: &Modular, cx: &Context) -> Result<Tensor> {
        model.forward(&self.inputs()?, cx)?.need("logits").cloned()
    }

    /// A loss that looks at every output with a different weight.
    fn loss(&self, model: &Modular) -> Result<Tensor> {
        let y = self.output(model)?;
        let weights = noise_like(&y.size(), &y, SEED.child("loss"))?;
        y.mul(&weights)?.sum()
    }

    fn base(&self, kind: Kind) -> Result<Tensor> {
        let model = Modular::new(TinyBackbone::new(SEED, kind)?, SEED)?;
        model.forward_base(&self.inputs()?, &Context::eval())?.need("logits").cloned()
    }

    fn identity(&self) -> Result<bool> {
        let (y, base) = (self.output(&self.model(Kind::Float, &["a"])?)?, self.base(Kind::Float)?);
        match self.claims.identity {
            Identity::Exact => y.bit_equal(&base),
            Identity::Within(bound) => Ok(y.max_abs_diff(&base)? <= bound),
            Identity::No => Ok(y.max_abs_diff(&base)? > 1e-6),
        }
    }

    fn frozen_base(&self) -> Result<bool> {
        let model = self.model(Kind::Float, &["a"])?;
        let copies = |model: &Modular| -> Result<Vec<Vec<u8>>> {
            model.backbone().params().iter().map(|(_, p)| p.tensor().to_bytes()).collect()
        };
        let before = copies(&model)?;
        model.train_only(&Select::new("modules.*"))?;
        let phi = model.trainable();
        let tensors: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
        let grads = self.loss(&model)?.gradients(&tensors, false)?;
        let mut changed = false;
        for ((_, t), g) in phi.iter().zip(grads) {
            let Some(g) = g else { continue };
            let old = t.detach()?.copy()?;
            no_grad(|| t.clone().add_in_place(&g.mul_scalar(-0.01)?))?;
            changed |= !t.detach()?.bit_equal(&old)?;
        }
        let base_free = model.backbone().params().iter().all(|(_, p)| !p.trainable());
        Ok(changed && base_free && before == copies(&model)?)
    }

    fn count(&self) -> Result<bool> {
        let model = self.model(Kind::Float, &["a"])?;
        let own = model.params().iter().filter(|(_, p)| !p.is_buffer());
        let n: usize = own.map(|(_, p)| p.tensor().numel()).sum();
        if n != self.claims.parameters {
            let problem = format!("{n} where {} were claimed", self.claims.parameters);
            return Err(crate::Error::invalid("parameters", problem));
        }
        Ok(true)
    }

    fn merge(&self) -> Result<bool> {
        let mut model = self.trained(Kind::Float, &["a"])?;
        let before = self.base(Kind::Float)?;
        let attached = self.output(&model)?;
        if !self.claims.merges {
            return Ok(model.merge("a").is_err() && self.output(&model)?.bit_equal(&attached)?);
        }
        model.merge("a")?;
        let merged = model.forward_base(&self.inputs()?, &Context::eval())?;
        let same = merged.need("logits")?.all_close(&attached, 1e-5, 1e-5)?;
        model.unmerge()?;
        let after = model.forward_base(&self.inputs()?, &Context::eval())?;
        Ok(same && after.need("logits")?.bit_equal(&before)?)
    }

    fn mixed_rows(&self) -> Result<bool> {
        let mut model = self.trained(Kind::Float, &["a", "b"])?;
        let alone = [0, 1].map(|j| {
            model.route(Given::only(j), false)?;
            self.output(&model)
        });
        let [a, b] = alone;
        let (a, b, base) = (a?, b?, self.base(Kind::Float)?);
        let table = [Some(1), None, Some(0), Some(1)];
        model.route(Given::rows(&table), false)?;
        let mixed = self.output(&model)?;
        for (row, choice) in table.iter().enumerate() {
            let expected = match choice {
                Some(0) => &a,
                Some(_) => &b,
                None => &base,
            };
            // A module may lengthen the sequence; shorter rows are padded at the end then.
            let (r, n) = (row as i64, expected.len_of(1));
            let found = mixed.select(0, r)?.narrow(0, 0, n)?;
            if !found.all_close(&expected.select(0, r)?, 1e-5, 1e-5)? {
                return Ok(false);
            }
        }
        Ok(a.max_abs_diff(&b)? > 1e-4)
    }

    fn save_and_load(&self) -> Result<bool> {
        let folder = std::env::temp_dir().join(format!("modl-contract-{}", std::process::id()));
        let path = folder.join(format!("{}-{:p}.safetensors", (self.make)().kind(), self));
        let result = self.round_trip(&path);
        let _ = std::fs::remove_file(&path);
        result
    }

    fn round_trip(&self, path: &Path) -> Result<bool> {
        let model = self.trained(Kind::Float, &["a"])?;
        model.save_module("a", path)?;
        let stored: usize = crate::checkpoint::Checkpoint::open(path)?
            .tensors(Device::Cpu)?
            .iter()
            .map(|(_, t)| t.numel())
            .sum();
        let mut again = Modular::new(TinyBackbone::new(SEED, Kind::Float)?, Seed(1))?;
        again.load_module(path, None, self.registry)?;
        again.aggregate(Box::new(Sum::default()))?;
        again.route(Given::only(0), false)?;
        let same = self.output(&again)?.bit_equal(&self.output(&model)?)?;
        let kept: usize = model.params().iter().map(|(_, p)| p.tensor().numel()).sum();
        let mut other = Modular::new(TinyBackbone::new(Seed(2), Kind::Float)?, Seed(1))?;
        let refused = other.load_module(path, None, self.registry).is_err();
        Ok(same && refused && other.modules().is_empty() && stored == kept)
    }

    fn gradients(&self) -> Result<bool> {
        if !self.claims.smooth {
            return Ok(true);
        }
        let model = self.trained(Kind::Double, &["a"])?;
        model.train_only(&Select::new("modules.*"))?;
        let phi = model.trainable();
        let tensors: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
        let grads = self.loss(&model)?.gradients(&tensors, false)?;
        let step = 1e-5;
        for ((name, t), g) in phi.iter().zip(grads) {
            let n = t.numel();
            // Along a random direction: one derivative tests all elements of a parameter.
            let direction = noise_like(&t.size(), t, SEED.child(name))?;
            let analytic = match g {
                Some(g) => g.mul(&direction)?.sum()?.item()?,
                None => 0.0,
            };
            let at = |by: f64| -> Result<f64> {
                let shift = direction.mul_scalar(by)?;
                no_grad(|| {
                    t.clone().add_in_place(&shift)?;
                    let loss = self.loss(&model)?.item();
                    t.clone().add_in_place(&shift.neg()?)?;
                    loss
                })
            };
            let numeric = (at(step)? - at(-step)?) / (2.0 * step);
            if (analytic - numeric).abs() > 1e-6 * (1.0 + numeric.abs()) {
                let problem =
                    format!("{analytic} by autograd, {numeric} by differences ({n} values)");
                return Err(crate::Error::invalid(name, problem));
            }
        }
        Ok(true)
    }

    fn removal(&self) -> Result<bool> {
        let mut model = self.trained(Kind::Float, &["a"])?;
        model.detach("a")?;
        let y = model.forward(&self.inputs()?, &Context::eval())?;
        Ok(y.need("logits")?.bit_equal(&self.base(Kind::Float)?)?
            && model.params().iter().next().is_none())
    }
}
