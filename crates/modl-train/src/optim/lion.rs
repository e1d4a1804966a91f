//! Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum, with decoupled weight decay.
//!
//! With gradient g, learning rate η and decay λ: c = β₁m + (1−β₁)g; θ ← (1 − ηλ) θ − η · sign(c);
//! m ← β₂m + (1−β₂)g. Each element moves by η whatever the size of its gradient, so that η wants to
//! be 3 to 10 times smaller, and λ as much larger, than with AdamW (§5 there).

use std::collections::BTreeMap;

use modl_core::{Result, Select, Tensor};
use serde::{Deserialize, Serialize};

use super::{Optimizer, by_parameter, in_range, same_shape, usually_no_decay};

/// The settings of [`Lion`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LionConfig {
    /// β₁, by which momentum and gradient are mixed for a step, and β₂, by which the momentum
    /// remembers. Default: 0.9 and 0.99.
    pub betas: (f64, f64),
    /// λ. Default: 0.
    pub weight_decay: f64,
    /// Parameters that never decay. Default: as of [`super::AdamWConfig`].
    pub no_decay: Vec<String>,
}

impl Default for LionConfig {
    fn default() -> Self {
        LionConfig { betas: (0.9, 0.99), weight_decay: 0.0, no_decay: usually_no_decay() }
    }
}

/// The sign of a momentum.
#[derive(Debug)]
pub struct Lion {
    config: LionConfig,
    no_decay: Select,
    /// m by parameter.
    momentum: BTreeMap<String, Tensor>,
}

impl Lion {
    /// An optimiser that has not seen any gradient.
    ///
    /// # Errors
    /// Where a β is not in [0, 1), or λ is negative.
    pub fn new(config: LionConfig) -> Result<Self> {
        in_range("lion.betas", config.betas.0, 1.0)?;
        in_range("lion.betas", config.betas.1, 1.0)?;
        in_range("lion.weight_decay", config.weight_decay, f64::INFINITY)?;
        let no_decay = Select::any(config.no_decay.clone());
        Ok(Lion { config, no_decay, momentum: BTreeMap::new() })
    }
}

impl Optimizer for Lion {
    fn kind(&self) -> &'static str {
        "lion"
    }

    fn update(&mut self, name: &str, mut theta: Tensor, grad: &Tensor, lr: f64) -> Result<()> {
        let LionConfig { betas: (beta1, beta2), weight_decay, .. } = self.config;
        if !self.momentum.contains_key(name) {
            self.momentum.insert(name.to_owned(), grad.zeros_like()?);
        }
        let Some(momentum) = self.momentum.get_mut(name) else { return Ok(()) };
        let mut mixed = momentum.copy()?;
        mixed.lerp_in_place(grad, 1.0 - beta1)?;
        momentum.lerp_in_place(grad, 1.0 - beta2)?;
        if weight_decay > 0.0 && !self.no_decay.matches(name) {
            theta.mul_scalar_in_place(1.0 - lr * weight_decay)?;
        }
        theta.add_scaled_in_place(&mixed.sign()?, -lr)
    }

    fn forget(&mut self, name: &str) {
        self.momentum.remove(name);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.momentum.iter().map(|(n, m)| (format!("momentum.{n}"), m.clone())).collect())
    }

    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()> {
        let mut all = BTreeMap::new();
        for (name, [momentum]) in by_parameter(["momentum"], params, state)? {
            same_shape(&name, params, &momentum)?;
            all.insert(name, momentum);
        }
        self.momentum = all;
        Ok(())
    }
}
