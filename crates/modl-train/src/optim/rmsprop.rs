//! RMSprop (Hinton, Coursera lecture 6e, 2012; centred: Graves 2013, arXiv 1308.0850), as PyTorch
//! has it.
//!
//! With gradient g, learning rate η, smoothing α, momentum μ and decay λ: g ← g + λθ;
//! v ← αv + (1−α)g²; s = √v + ε, or √(v − ḡ²) + ε with ḡ ← αḡ + (1−α)g where it is centred;
//! b ← μb + g ⁄ s; θ ← θ − ηb. ε stands outside the root.

use std::collections::BTreeMap;

use modl_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::{Optimizer, in_range, parts_by_parameter, plus, same_shape};

/// The settings of [`RmsProp`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RmsPropConfig {
    /// α: how long the means remember. Default: 0.99.
    pub alpha: f64,
    /// ε, added to the root. Default: 1e-8.
    pub eps: f64,
    /// μ. Default: 0.
    pub momentum: f64,
    /// Whether gradients are divided by their deviation instead of their size. Default: false.
    pub centered: bool,
    /// λ, added to the gradient. Default: 0.
    pub weight_decay: f64,
}

impl Default for RmsPropConfig {
    fn default() -> Self {
        RmsPropConfig { alpha: 0.99, eps: 1e-8, momentum: 0.0, centered: false, weight_decay: 0.0 }
    }
}

/// What is kept for one parameter.
#[derive(Debug)]
struct Means {
    /// v.
    square: Tensor,
    /// ḡ, where it is centred.
    mean: Option<Tensor>,
    /// b, where there is momentum.
    buffer: Option<Tensor>,
}

/// Gradients divided by the root of their mean square.
#[derive(Debug)]
pub struct RmsProp {
    config: RmsPropConfig,
    means: BTreeMap<String, Means>,
}

impl RmsProp {
    /// An optimiser that has not seen any gradient.
    ///
    /// # Errors
    /// Where α or μ is not in [0, 1), or ε or λ is negative.
    pub fn new(config: RmsPropConfig) -> Result<Self> {
        in_range("rmsprop.alpha", config.alpha, 1.0)?;
        in_range("rmsprop.eps", config.eps, f64::INFINITY)?;
        in_range("rmsprop.momentum", config.momentum, 1.0)?;
        in_range("rmsprop.weight_decay", config.weight_decay, f64::INFINITY)?;
        Ok(RmsProp { config, means: BTreeMap::new() })
    }

    /// The parts of a state that the settings want.
    fn parts(&self) -> Vec<&'static str> {
        let also = [("mean", self.config.centered), ("momentum", self.config.momentum > 0.0)];
        let also = also.into_iter().filter(|(_, wanted)| *wanted).map(|(part, _)| part);
        ["square"].into_iter().chain(also).collect()
    }
}

impl Optimizer for RmsProp {
    fn kind(&self) -> &'static str {
        "rmsprop"
    }

    fn update(&mut self, name: &str, mut theta: Tensor, grad: &Tensor, lr: f64) -> Result<()> {
        let RmsPropConfig { alpha, eps, momentum, centered, weight_decay } = self.config;
        if !self.means.contains_key(name) {
            let zeros = |wanted: bool| wanted.then(|| grad.zeros_like()).transpose();
            let (mean, buffer) = (zeros(centered)?, zeros(momentum > 0.0)?);
            self.means.insert(name.to_owned(), Means { square: grad.zeros_like()?, mean, buffer });
        }
        let Some(Means { square, mean, buffer }) = self.means.get_mut(name) else {
            return Ok(());
        };
        let mut grad = grad.clone();
        if weight_decay > 0.0 {
            grad = plus(&grad, &theta, weight_decay)?;
        }
        square.mul_scalar_in_place(alpha)?;
        square.addcmul_in_place(&grad.mul_scalar(1.0 - alpha)?, &grad)?;
        let mut below = match mean {
            Some(mean) => {
                mean.lerp_in_place(&grad, 1.0 - alpha)?;
                // Rounding can make it negative where gradients hardly vary; the root of that is
                // not a number.
                square.addcmul(&mean.neg()?, mean)?.clamp(0.0, f64::INFINITY)?.sqrt()?
            }
            None => square.sqrt()?,
        };
        below.add_scalar_in_place(eps)?;
        match buffer {
            Some(buffer) => {
                buffer.mul_scalar_in_place(momentum)?;
                buffer.addcdiv_in_place(&grad, &below)?;
                theta.add_scaled_in_place(buffer, -lr)
            }
            None => theta.addcdiv_in_place(&grad.mul_scalar(-lr)?, &below),
        }
    }

    fn forget(&mut self, name: &str) {
        self.means.remove(name);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::new();
        for (name, Means { square, mean, buffer }) in &self.means {
            let all =
                [("square", Some(square)), ("mean", mean.as_ref()), ("momentum", buffer.as_ref())];
            let kept = all.into_iter().filter_map(|(part, t)| Some((part, t?)));
            state.extend(kept.map(|(part, t)| (format!("{part}.{name}"), t.clone())));
        }
        Ok(state)
    }

    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()> {
        let mut means = BTreeMap::new();
        let RmsPropConfig { centered, momentum, .. } = self.config;
        for (name, all) in parts_by_parameter(&self.parts(), params, state)? {
            for t in &all {
                same_shape(&name, params, t)?;
            }
            let mut all = all.into_iter();
            let mut next = |wanted: bool| if wanted { all.next() } else { None };
            if let Some(square) = next(true) {
                let (mean, buffer) = (next(centered), next(momentum > 0.0));
                means.insert(name, Means { square, mean, buffer });
            }
        }
        self.means = means;
        Ok(())
    }
}
