//! An exponential moving average of the trained parameters (Polyak and Juditsky 1992; as a decaying
//! mean Tarvainen and Valpola 2017, arXiv 1703.01780).
//!
//! After step t with decay d: θ̄ₜ = Σₖ dᵗ⁻ᵏ θₖ ⁄ Σₖ dᵗ⁻ᵏ over k = 1 … t, so that where training started has
//! no part in it, as Adam corrects its moments. Step by step
//! θ̄ₜ = θ̄ₜ₋₁ + (1 − d) ⁄ (1 − dᵗ) · (θₜ − θ̄ₜ₋₁).

use modl_core::{Error, Result, ResultExt, Tensor, no_grad};

/// The average of some parameters.
#[derive(Debug)]
pub(crate) struct Average {
    decay: f64,
    steps: u64,
    means: Vec<(String, Tensor)>,
}

impl Average {
    pub(crate) fn new(decay: f64, params: &[(String, Tensor)]) -> Result<Self> {
        Ok(Average { decay, steps: 0, means: copies(params)? })
    }

    /// Takes in what a step has come to.
    pub(crate) fn take(&mut self, params: &[(String, Tensor)]) -> Result<()> {
        self.steps += 1;
        let weight = (1.0 - self.decay) / (1.0 - self.decay.powf(self.steps as f64));
        no_grad(|| {
            for ((name, mean), (_, theta)) in self.means.iter_mut().zip(params) {
                mean.lerp_in_place(theta, weight).at(name)?;
            }
            Ok(())
        })
    }

    /// The averages, by name; storage is shared.
    pub(crate) fn means(&self) -> &[(String, Tensor)] {
        &self.means
    }

    /// Takes up averages over `steps` steps that were saved.
    pub(crate) fn load(&mut self, steps: u64, saved: &[(String, Tensor)]) -> Result<()> {
        self.steps = steps;
        put(&self.means, saved)
    }
}

/// Copies with storage of their own.
pub(crate) fn copies(params: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
    no_grad(|| params.iter().map(|(n, t)| Ok((n.clone(), t.detach()?.copy()?))).collect())
}

/// Copies the values of `from` into the tensors of the same names.
pub(crate) fn put(to: &[(String, Tensor)], from: &[(String, Tensor)]) -> Result<()> {
    no_grad(|| {
        for (name, value) in from {
            let found = to.iter().find(|(n, _)| n == name);
            let (_, slot) = found.ok_or_else(|| {
                Error::unknown("trained parameter", name, to.iter().map(|(n, _)| n))
            })?;
            slot.clone().copy_from(value).at(name)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::{Device, Seed};
    use rand::Rng;

    #[test]
    fn the_average_is_the_weighted_mean_of_all_steps() {
        let (decay, steps) = (0.9f64, 25);
        let mut rng = Seed(4).rng();
        let values: Vec<f64> = (0..=steps).map(|_| rng.r#gen::<f64>() - 0.3).collect();
        let at = |v: f64| {
            vec![("w".to_owned(), Tensor::from_slice(&[v, 2.0 * v], &[2], Device::Cpu).unwrap())]
        };
        // Where it starts has no part.
        let mut average = Average::new(decay, &at(1e3)).unwrap();
        for t in 1..=steps {
            average.take(&at(values[t])).unwrap();
            let weight = |k: usize| decay.powi((t - k) as i32);
            let all: f64 = (1..=t).map(weight).sum();
            let mean: f64 = (1..=t).map(|k| weight(k) * values[k]).sum::<f64>() / all;
            let found = average.means()[0].1.to_vec::<f64>().unwrap();
            assert!((found[0] - mean).abs() < 1e-12 && (found[1] - 2.0 * mean).abs() < 1e-12);
        }
    }
}
