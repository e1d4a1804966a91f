//! ½ Σ Ω (θ − μ)²: parameters are held by springs, each as strong as it has mattered. EWC and
//! Synaptic Intelligence differ in Ω.

use modl_core::{Error, Result, ResultExt, Tensor, Tensors, no_grad};

/// Springs by parameter.
#[derive(Debug, Default)]
pub(super) struct Quadratic {
    /// Ω, in the parameters' shapes.
    pub(super) importance: Tensors,
    /// μ.
    pub(super) anchor: Tensors,
}

impl Quadratic {
    /// Adds `strength` · Ω (θ − μ) to the gradients, and gives `strength` · ½ Σ Ω (θ − μ)². A
    /// parameter without a gradient had no part in the step and stays where it is.
    pub(super) fn pull(
        &self,
        strength: f64,
        params: &[(String, Tensor)],
        grads: &mut [Option<Tensor>],
    ) -> Result<f64> {
        no_grad(|| {
            let mut value = 0.0;
            for ((name, theta), grad) in params.iter().zip(grads) {
                let (Some(importance), Some(anchor)) =
                    (self.importance.get(name), self.anchor.get(name))
                else {
                    continue;
                };
                let Some(grad) = grad else { continue };
                let away = theta.detach()?.sub(anchor).at(name)?;
                let force = away.mul(importance)?;
                value += 0.5 * strength * force.mul(&away)?.sum()?.item()?;
                *grad = grad.add(&force.mul_scalar(strength)?)?;
            }
            Ok(value)
        })
    }

    /// More importance, and the anchor at the mean of both that is weighted by importance: the sum of
    /// the two quadratic forms but for a constant.
    pub(super) fn add(&mut self, importance: &Tensors, at: &Tensors) -> Result<()> {
        for (name, more) in importance.iter() {
            let here = at.need(name)?.detach()?;
            let Some((old, anchor)) = self.importance.get(name).zip(self.anchor.get(name)) else {
                self.importance.set(name.to_owned(), more.copy()?);
                self.anchor.set(name.to_owned(), here.copy()?);
                continue;
            };
            let sum = old.add(more)?;
            // Where nothing matters, the anchor may be anywhere.
            let some = sum.gt_scalar(0.0)?;
            let share = more.div(&sum)?.where_else(&some, &sum.zeros_like()?)?;
            let mean = anchor.add(&here.sub(anchor)?.mul(&share)?)?;
            self.importance.set(name.to_owned(), sum);
            self.anchor.set(name.to_owned(), mean);
        }
        Ok(())
    }

    /// Ω as `importance.NAME` and μ as `anchor.NAME`.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let named = |part: &str, all: &Tensors| -> Vec<(String, Tensor)> {
            all.iter().map(|(n, t)| (format!("{part}.{n}"), t.clone())).collect()
        };
        [named("importance", &self.importance), named("anchor", &self.anchor)].concat()
    }

    /// Takes up one tensor of a saved state.
    pub(super) fn load(&mut self, name: &str, t: Tensor) -> Result<()> {
        match name.split_once('.') {
            Some(("importance", rest)) => self.importance.set(rest.to_owned(), t),
            Some(("anchor", rest)) => self.anchor.set(rest.to_owned(), t),
            _ => {
                let problem = format!("holds `{name}`, which is neither importance nor anchor");
                return Err(Error::invalid("saved state", problem));
            }
        }
        Ok(())
    }
}
