//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): Adam with decoupled weight decay.
//!
//! With gradient g, step t *of this parameter*, learning rate η and decay λ:
//! θ ← (1 − ηλ) θ; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²;
//! θ ← θ − η · m⁄(1−β₁ᵗ) ⁄ (√(v⁄(1−β₂ᵗ)) + ε).

use std::collections::BTreeMap;

use modl_core::{AdamWStep, Result, ResultExt, Select, Tensor};
use serde::{Deserialize, Serialize};

use super::{Optimizer, by_parameter, count, in_range, same_shape, usually_no_decay};

/// The settings of [`AdamW`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// β₁ and β₂: how long the two means remember.
    pub betas: (f64, f64),
    /// ε, which keeps the step finite where the gradients are zero.
    pub eps: f64,
    /// λ. Where a module is a change to a pretrained function, decay pulls towards that function.
    pub weight_decay: f64,
    /// Patterns of parameters that never decay. Default: biases, routers and gates, and factors that
    /// start at 1, gains of normalisations among them, which decay would pull to 0.
    pub no_decay: Vec<String>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        let no_decay = usually_no_decay();
        AdamWConfig { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, no_decay }
    }
}

/// What is kept for one parameter.
#[derive(Debug)]
struct Moments {
    steps: i64,
    /// m.
    mean: Tensor,
    /// v.
    square: Tensor,
}

/// Adam with decoupled weight decay.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    no_decay: Select,
    moments: BTreeMap<String, Moments>,
}

const PARTS: [&str; 3] = ["mean", "square", "steps"];

impl AdamW {
    /// An optimiser that has not seen any gradient.
    ///
    /// # Errors
    /// Where a β is not in [0, 1), or ε or λ is negative.
    pub fn new(config: AdamWConfig) -> Result<Self> {
        in_range("adamw.betas", config.betas.0, 1.0)?;
        in_range("adamw.betas", config.betas.1, 1.0)?;
        in_range("adamw.eps", config.eps, f64::INFINITY)?;
        in_range("adamw.weight_decay", config.weight_decay, f64::INFINITY)?;
        let no_decay = Select::any(config.no_decay.clone());
        Ok(AdamW { config, no_decay, moments: BTreeMap::new() })
    }
}

impl Optimizer for AdamW {
    fn kind(&self) -> &'static str {
        "adamw"
    }

    fn update(&mut self, name: &str, mut theta: Tensor, grad: &Tensor, lr: f64) -> Result<()> {
        let AdamWConfig { betas, eps, weight_decay, .. } = self.config;
        if !self.moments.contains_key(name) {
            let zeros = || Tensor::zeros(&theta.size(), theta.kind(), theta.device());
            let new = Moments { steps: 0, mean: zeros()?, square: zeros()? };
            self.moments.insert(name.to_owned(), new);
        }
        let Some(Moments { steps, mean, square }) = self.moments.get_mut(name) else {
            return Ok(());
        };
        *steps += 1;
        let decays = weight_decay > 0.0 && !self.no_decay.matches(name);
        let weight_decay = if decays { weight_decay } else { 0.0 };
        let by = AdamWStep { step: *steps, lr, betas, weight_decay, eps };
        theta.adamw_in_place(grad, mean, square, by)
    }

    fn forget(&mut self, name: &str) {
        self.moments.remove(name);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::with_capacity(3 * self.moments.len());
        for (name, m) in &self.moments {
            let tensors = [m.mean.clone(), m.square.clone(), count(m.steps)?];
            state.extend(PARTS.iter().zip(tensors).map(|(part, t)| (format!("{part}.{name}"), t)));
        }
        Ok(state)
    }

    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()> {
        let mut moments = BTreeMap::new();
        for (name, [mean, square, steps]) in by_parameter(PARTS, params, state)? {
            same_shape(&name, params, &mean)?;
            same_shape(&name, params, &square)?;
            let steps = steps.item().at(&name)? as i64;
            moments.insert(name, Moments { steps, mean, square });
        }
        self.moments = moments;
        Ok(())
    }
}
