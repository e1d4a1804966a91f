//! Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): second moments of a matrix from the means
//! of its rows and columns, `n + m` numbers instead of `n · m`. In the conventions of transformers'
//! `Adafactor`, whose defaults here are those of its `Trainer` (`--optim adafactor`).
//!
//! With gradient G of shape `[…, n, m]`, step t *of this parameter*, β̂ = 1 − tᶜ (c = `decay_rate`):
//! R ← β̂R + (1−β̂) mean_m(G² + ε₁); C ← β̂C + (1−β̂) mean_n(G² + ε₁); V = R Cᵀ ⁄ mean(R);
//! U = G ⁄ √V; U ← U ⁄ max(1, RMS(U) ⁄ d); θ ← (1 − αλ) θ − αU. A vector has its whole V.
//!
//! α = η; times ρ = min(10⁻², 1⁄√t) with `relative_step`, or min(10⁻⁶t, 1⁄√t) with `warmup_init`;
//! times max(ε₂, RMS(θ)) with `scale_parameter`. So η, its schedule and its factors always count:
//! **with `relative_step`, α is the paper's where `lr = 1`** (transformers takes no `lr` there). Other
//! than `torch.optim.Adafactor`, which has ε₁ at another place and no such switches.

use std::collections::BTreeMap;

use modl_core::{Error, Result, ResultExt, Select, Tensor};
use serde::{Deserialize, Serialize};

use super::{Optimizer, count, has_shape, in_range, parts_by_parameter, usually_no_decay};

/// The settings of [`Adafactor`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdafactorConfig {
    /// ε₁, added to squared gradients, and ε₂, the smallest RMS of a parameter that scales its
    /// steps. Default: 1e-30 and 1e-3.
    pub eps: (f64, f64),
    /// d, the largest RMS of an update before the learning rate. Default: 1.
    pub clip_threshold: f64,
    /// c, the power by which the means remember longer and longer; not above 0. Default: −0.8.
    pub decay_rate: f64,
    /// β₁, where updates are averaged by β₁ and 1−β₁: as much memory again as the parameter.
    /// Default: they are not.
    pub beta1: Option<f64>,
    /// λ. Default: 0.
    pub weight_decay: f64,
    /// Whether steps are as large as the parameter's RMS says. Default: false.
    pub scale_parameter: bool,
    /// Whether `lr` is a factor of ρ, which falls with the steps. Default: false.
    pub relative_step: bool,
    /// Whether ρ begins at 10⁻⁶; only with `relative_step`. Default: false.
    pub warmup_init: bool,
    /// Parameters that never decay. Default: as of [`super::AdamWConfig`].
    pub no_decay: Vec<String>,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        AdafactorConfig {
            eps: (1e-30, 1e-3),
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: false,
            relative_step: false,
            warmup_init: false,
            no_decay: usually_no_decay(),
        }
    }
}

/// Mean squares of gradients.
#[derive(Debug)]
enum Squares {
    /// R `[…, n]` and C `[…, m]`.
    Factored { row: Tensor, column: Tensor },
    /// V of a vector or a scalar.
    Whole(Tensor),
}

/// What is kept for one parameter.
#[derive(Debug)]
struct Moments {
    steps: i64,
    squares: Squares,
    /// The mean of updates, with β₁.
    first: Option<Tensor>,
}

/// Adam with second moments of rows and columns only.
#[derive(Debug)]
pub struct Adafactor {
    config: AdafactorConfig,
    no_decay: Select,
    moments: BTreeMap<String, Moments>,
}

impl Adafactor {
    /// An optimiser that has not seen any gradient.
    ///
    /// # Errors
    /// Where ε₁ or d is not above 0, ε₂ or λ is negative, c is above 0, β₁ is not in [0, 1), or
    /// `warmup_init` is wanted without `relative_step`.
    pub fn new(config: AdafactorConfig) -> Result<Self> {
        in_range("adafactor.eps", config.eps.0, f64::INFINITY)?;
        in_range("adafactor.eps", config.eps.1, f64::INFINITY)?;
        in_range("adafactor.clip_threshold", config.clip_threshold, f64::INFINITY)?;
        in_range("adafactor.beta1", config.beta1.unwrap_or(0.0), 1.0)?;
        in_range("adafactor.weight_decay", config.weight_decay, f64::INFINITY)?;
        for (key, value) in [("eps", config.eps.0), ("clip_threshold", config.clip_threshold)] {
            if value == 0.0 {
                return Err(Error::invalid(
                    format!("adafactor.{key}"),
                    "is 0; it is to be above 0",
                ));
            }
        }
        if !(config.decay_rate <= 0.0 && config.decay_rate.is_finite()) {
            let problem = format!("is {}; it is to be 0 or below, such as -0.8", config.decay_rate);
            return Err(Error::invalid("adafactor.decay_rate", problem));
        }
        if config.warmup_init && !config.relative_step {
            let problem = "needs relative_step = true; else use the schedule's warmup";
            return Err(Error::invalid("adafactor.warmup_init", problem));
        }
        let no_decay = Select::any(config.no_decay.clone());
        Ok(Adafactor { config, no_decay, moments: BTreeMap::new() })
    }

    /// α, a scalar.
    fn rate(&self, theta: &Tensor, steps: i64, lr: f64) -> Result<Tensor> {
        let t = steps as f64;
        let highest = if self.config.warmup_init { 1e-6 * t } else { 1e-2 };
        let rho = if self.config.relative_step { highest.min(1.0 / t.sqrt()) } else { 1.0 };
        if !self.config.scale_parameter {
            return Tensor::full(&[], lr * rho, theta.kind(), theta.device());
        }
        rms(theta)?.clamp(self.config.eps.1, f64::INFINITY)?.mul_scalar(lr * rho)
    }

    /// The parts of a state that the settings want.
    fn parts(&self, factored: bool) -> Vec<&'static str> {
        let squares: &[_] =
            if factored { &["steps", "row", "column"] } else { &["steps", "square"] };
        let first = self.config.beta1.is_some().then_some("first");
        squares.iter().copied().chain(first).collect()
    }
}

/// √mean x², `[]`.
fn rms(x: &Tensor) -> Result<Tensor> {
    x.norm()?.mul_scalar(1.0 / (x.numel() as f64).sqrt())
}

/// The shapes of R and C; none for what is not factored.
fn factors(shape: &[i64]) -> Option<(Vec<i64>, Vec<i64>)> {
    match shape {
        [outer @ .., n, m] => Some(([outer, &[*n]].concat(), [outer, &[*m]].concat())),
        _ => None,
    }
}

/// mean ← β̂ mean + (1−β̂) value.
fn average(mean: &mut Tensor, value: &Tensor, beta: f64) -> Result<()> {
    mean.mul_scalar_in_place(beta)?;
    mean.add_scaled_in_place(value, 1.0 - beta)
}

impl Squares {
    fn new(grad: &Tensor) -> Result<Self> {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, grad.kind(), grad.device());
        Ok(match factors(&grad.size()) {
            Some((n, m)) => Squares::Factored { row: zeros(&n)?, column: zeros(&m)? },
            None => Squares::Whole(grad.zeros_like()?),
        })
    }

    /// Takes in a gradient; U.
    fn divide(&mut self, grad: &Tensor, beta: f64, eps: f64) -> Result<Tensor> {
        let mut square = grad.square()?;
        square.add_scalar_in_place(eps)?;
        match self {
            Squares::Factored { row, column } => {
                average(row, &square.mean_dims(&[-1], false)?, beta)?;
                average(column, &square.mean_dims(&[-2], false)?, beta)?;
                let of_rows = row.div(&row.mean_dims(&[-1], true)?)?.pow(-0.5)?.unsqueeze(-1)?;
                of_rows.mul(&column.pow(-0.5)?.unsqueeze(-2)?)?.mul(grad)
            }
            Squares::Whole(whole) => {
                average(whole, &square, beta)?;
                whole.pow(-0.5)?.mul(grad)
            }
        }
    }
}

impl Optimizer for Adafactor {
    fn kind(&self) -> &'static str {
        "adafactor"
    }

    fn update(&mut self, name: &str, mut theta: Tensor, grad: &Tensor, lr: f64) -> Result<()> {
        if !self.moments.contains_key(name) {
            let first = self.config.beta1.map(|_| grad.zeros_like()).transpose()?;
            let fresh = Moments { steps: 0, squares: Squares::new(grad)?, first };
            self.moments.insert(name.to_owned(), fresh);
        }
        let steps = self.moments.get(name).map_or(1, |m| m.steps + 1);
        let rate = self.rate(&theta, steps, lr)?;
        let AdafactorConfig { eps, clip_threshold, decay_rate, beta1, weight_decay, .. } =
            self.config;
        let Some(moments) = self.moments.get_mut(name) else { return Ok(()) };
        moments.steps = steps;
        let beta = 1.0 - (steps as f64).powf(decay_rate);
        let mut update = moments.squares.divide(grad, beta, eps.0)?;
        let over = rms(&update)?.mul_scalar(1.0 / clip_threshold)?.clamp(1.0, f64::INFINITY)?;
        update = update.div(&over)?.mul(&rate)?;
        if let (Some(first), Some(beta1)) = (&mut moments.first, beta1) {
            average(first, &update, beta1)?;
            update = first.clone();
        }
        if weight_decay > 0.0 && !self.no_decay.matches(name) {
            let decayed = theta.copy()?;
            theta.addcmul_in_place(&decayed, &rate.mul_scalar(-weight_decay)?)?;
        }
        theta.add_in_place(&update.neg()?)
    }

    fn forget(&mut self, name: &str) {
        self.moments.remove(name);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::new();
        for (name, Moments { steps, squares, first }) in &self.moments {
            let mut put =
                |part: &str, t: &Tensor| state.push((format!("{part}.{name}"), t.clone()));
            put("steps", &count(*steps)?);
            match squares {
                Squares::Factored { row, column } => {
                    put("row", row);
                    put("column", column);
                }
                Squares::Whole(whole) => put("square", whole),
            }
            if let Some(first) = first {
                put("first", first);
            }
        }
        Ok(state)
    }

    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()> {
        let shapes: BTreeMap<&str, Vec<i64>> =
            params.iter().map(|(n, t)| (n.as_str(), t.size())).collect();
        let factored = |key: &str| {
            let shape = key.split_once('.').and_then(|(_, name)| shapes.get(name));
            shape.is_some_and(|s| factors(s).is_some())
        };
        let (matrices, vectors) = state.into_iter().partition(|(key, _)| factored(key));
        let mut moments = BTreeMap::new();
        for (factored, state) in [(true, matrices), (false, vectors)] {
            for (name, all) in parts_by_parameter(&self.parts(factored), params, state)? {
                let shape = shapes.get(name.as_str()).cloned().unwrap_or_default();
                let mut all = all.into_iter();
                // As many as there are parts, in their order.
                let mut next = |wanted: &[i64]| -> Result<Option<Tensor>> {
                    let part = all.next();
                    part.map(|t| has_shape(&name, wanted, &t).map(|()| t)).transpose()
                };
                let steps = next(&[1])?;
                let squares = match factors(&shape) {
                    Some((n, m)) => next(&n)?
                        .zip(next(&m)?)
                        .map(|(row, column)| Squares::Factored { row, column }),
                    None => next(&shape)?.map(Squares::Whole),
                };
                let first = next(&shape)?;
                if let (Some(steps), Some(squares)) = (steps, squares) {
                    let steps = steps.item().at(&name)? as i64;
                    moments.insert(name, Moments { steps, squares, first });
                }
            }
        }
        self.moments = moments;
        Ok(())
    }
}
