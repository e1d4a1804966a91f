//! Stochastic gradient descent with momentum (Polyak 1964; Nesterov's form: Sutskever et al. 2013).
//!
//! With gradient g, learning rate η, momentum μ and decay λ, as PyTorch has it:
//! g ← g + λθ; b ← μb + g (b = g at first); θ ← θ − η·b, or θ − η·(g + μb) by Nesterov.

use std::collections::BTreeMap;

use modl_core::{Error, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::{Optimizer, by_parameter, in_range, plus, same_shape};

/// The settings of [`Sgd`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// μ.
    pub momentum: f64,
    /// Whether the gradient is taken ahead of the momentum.
    pub nesterov: bool,
    /// λ, added to the gradient.
    pub weight_decay: f64,
}

/// Stochastic gradient descent.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    /// b by parameter; none without momentum.
    buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    /// An optimiser that has not seen any gradient.
    ///
    /// # Errors
    /// Where μ is not in [0, 1), λ is negative, or Nesterov's form is wanted without momentum.
    pub fn new(config: SgdConfig) -> Result<Self> {
        in_range("sgd.momentum", config.momentum, 1.0)?;
        in_range("sgd.weight_decay", config.weight_decay, f64::INFINITY)?;
        if config.nesterov && config.momentum == 0.0 {
            return Err(Error::invalid("sgd.nesterov", "needs momentum; set momentum = 0.9"));
        }
        Ok(Sgd { config, buffers: BTreeMap::new() })
    }
}

impl Optimizer for Sgd {
    fn kind(&self) -> &'static str {
        "sgd"
    }

    fn update(&mut self, name: &str, mut theta: Tensor, grad: &Tensor, lr: f64) -> Result<()> {
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        let mut direction = grad.clone();
        if weight_decay > 0.0 {
            direction = plus(&direction, &theta, weight_decay)?;
        }
        if momentum > 0.0 {
            let buffer = match self.buffers.get_mut(name) {
                Some(b) => {
                    b.mul_scalar_in_place(momentum)?;
                    b.add_in_place(&direction)?;
                    b.clone()
                }
                None => {
                    // The gradient may share its storage with another one.
                    let b = direction.copy()?;
                    self.buffers.insert(name.to_owned(), b.clone());
                    b
                }
            };
            direction = if nesterov { plus(&direction, &buffer, momentum)? } else { buffer };
        }
        theta.add_scaled_in_place(&direction, -lr)
    }

    fn forget(&mut self, name: &str) {
        self.buffers.remove(name);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.buffers.iter().map(|(n, b)| (format!("momentum.{n}"), b.clone())).collect())
    }

    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()> {
        let mut buffers = BTreeMap::new();
        for (name, [buffer]) in by_parameter(["momentum"], params, state)? {
            same_shape(&name, params, &buffer)?;
            buffers.insert(name, buffer);
        }
        self.buffers = buffers;
        Ok(())
    }
}
