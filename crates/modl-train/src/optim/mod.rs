//! Optimisers: how a gradient changes a parameter, with a state that can be saved.
//!
//! A parameter without a gradient was not routed in this step. It is skipped wholly: no decay, no
//! momentum, no count of steps. An unused module therefore stays bit for bit what it was.

mod adafactor;
mod adamw;
mod lion;
pub(crate) mod lora_plus;
mod rmsprop;
mod sgd;

use std::collections::BTreeMap;
use std::fmt::Debug;

use modl_core::{Device, Error, Result, ResultExt, Tensor, no_grad};
use serde::{Deserialize, Serialize};

pub use adafactor::{Adafactor, AdafactorConfig};
pub use adamw::{AdamW, AdamWConfig};
pub use lion::{Lion, LionConfig};
pub use rmsprop::{RmsProp, RmsPropConfig};
pub use sgd::{Sgd, SgdConfig};

/// Changes parameters by their gradients.
pub trait Optimizer: Debug + Send {
    /// The name in recipes: `adamw`.
    fn kind(&self) -> &'static str;

    /// Changes one parameter in place by its gradient, without recording gradients.
    ///
    /// # Errors
    /// Where the gradient does not have the parameter's shape.
    fn update(&mut self, name: &str, theta: Tensor, grad: &Tensor, lr: f64) -> Result<()>;

    /// Forgets what it keeps of one parameter, whose next step is as its first.
    fn forget(&mut self, name: &str);

    /// One step in place. `grads` has an entry for each of `params`; where it is `None` the
    /// parameter is left alone. `lr` gives the learning rate of a parameter by its name.
    ///
    /// # Errors
    /// With the parameter's name where a gradient does not have its shape.
    fn step(
        &mut self,
        params: &[(String, Tensor)],
        grads: &[Option<Tensor>],
        lr: &dyn Fn(&str) -> f64,
    ) -> Result<()> {
        no_grad(|| {
            for ((name, theta), grad) in params.iter().zip(grads) {
                if let Some(grad) = grad {
                    self.update(name, theta.clone(), grad, lr(name)).at(name)?;
                }
            }
            Ok(())
        })
    }

    /// What has to be saved to go on later, as `PART.PARAMETER`. Parameters that never had a
    /// gradient have none.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Where it is not this optimiser's state for these parameters; then nothing has been changed.
    fn load_state(
        &mut self,
        params: &[(String, Tensor)],
        state: Vec<(String, Tensor)>,
    ) -> Result<()>;
}

/// An optimiser in a recipe: `{ type = "adamw", weight_decay = 0.01 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay.
    AdamW(AdamWConfig),
    /// Stochastic gradient descent.
    Sgd(SgdConfig),
    /// The sign of a momentum.
    Lion(LionConfig),
    /// Gradients divided by the root of their mean square.
    RmsProp(RmsPropConfig),
    /// Adam with second moments of rows and columns only.
    Adafactor(AdafactorConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig::AdamW(AdamWConfig::default())
    }
}

impl OptimizerConfig {
    /// Makes the optimiser.
    ///
    /// # Errors
    /// Where a number is out of its range.
    pub fn build(&self) -> Result<Box<dyn Optimizer>> {
        Ok(match self {
            OptimizerConfig::AdamW(c) => Box::new(AdamW::new(c.clone())?),
            OptimizerConfig::Sgd(c) => Box::new(Sgd::new(c.clone())?),
            OptimizerConfig::Lion(c) => Box::new(Lion::new(c.clone())?),
            OptimizerConfig::RmsProp(c) => Box::new(RmsProp::new(c.clone())?),
            OptimizerConfig::Adafactor(c) => Box::new(Adafactor::new(c.clone())?),
        })
    }
}

/// Refuses a number outside of `[0, below)`.
fn in_range(what: &str, value: f64, below: f64) -> Result<()> {
    if (0.0..below).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("is {value}; it is to be at least 0 and below {below}")))
}

/// A saved state, one parameter at a time: part `n` of `parts` under the n-th place.
///
/// # Errors
/// As [`parts_by_parameter`].
fn by_parameter<const N: usize>(
    parts: [&str; N],
    params: &[(String, Tensor)],
    state: Vec<(String, Tensor)>,
) -> Result<BTreeMap<String, [Tensor; N]>> {
    let found = parts_by_parameter(&parts, params, state)?.into_iter();
    Ok(found.filter_map(|(name, all)| Some((name, all.try_into().ok()?))).collect())
}

/// A saved state, one parameter at a time: as many tensors as there are `parts`, in their order.
///
/// # Errors
/// Where a part or a parameter is unknown, or a parameter has some of the parts only.
fn parts_by_parameter(
    parts: &[&str],
    params: &[(String, Tensor)],
    state: Vec<(String, Tensor)>,
) -> Result<BTreeMap<String, Vec<Tensor>>> {
    let mut found: BTreeMap<String, Vec<Option<Tensor>>> = BTreeMap::new();
    for (key, tensor) in state {
        let (part, name) = key.split_once('.').unwrap_or((&key, ""));
        let at = parts.iter().position(|p| *p == part);
        let at = at.ok_or_else(|| Error::unknown("part of an optimiser's state", part, parts))?;
        if !params.iter().any(|(n, _)| n == name) {
            return Err(Error::unknown("trained parameter", name, params.iter().map(|(n, _)| n)));
        }
        let all = found.entry(name.to_owned()).or_insert_with(|| vec![None; parts.len()]);
        if let Some(slot) = all.get_mut(at) {
            *slot = Some(tensor);
        }
    }
    let whole = |(name, all): (String, Vec<Option<Tensor>>)| match all.into_iter().collect() {
        Some(all) => Ok((name, all)),
        None => Err(Error::invalid(
            format!("optimiser state of `{name}`"),
            format!("is not whole; wanted are {}", parts.join(", ")),
        )),
    };
    found.into_iter().map(whole).collect()
}

/// Refuses a state of another shape than its parameter's.
fn same_shape(name: &str, params: &[(String, Tensor)], state: &Tensor) -> Result<()> {
    let own = params.iter().find(|(n, _)| n == name).map(|(_, p)| p.size());
    has_shape(name, &own.unwrap_or_default(), state)
}

/// Refuses a part of a state of another shape than `wanted`.
fn has_shape(name: &str, wanted: &[i64], state: &Tensor) -> Result<()> {
    if state.size() == wanted {
        return Ok(());
    }
    Err(Error::invalid(
        format!("optimiser state of `{name}`"),
        format!("has shape {:?}, the parameter wants {wanted:?}", state.size()),
    ))
}

/// The parameters that decay would pull away from where they do nothing: biases, routers and gates, and
/// factors that start at 1 or at what a pretrained layer has.
fn usually_no_decay() -> Vec<String> {
    [
        "*bias",
        "routers.*",
        "*.gate.weight",
        "*.ia3_l",
        "*.scaling",
        "*.scale",
        "*.boft_s",
        "*.lora_magnitude_vector",
        "aggregators.*.gamma",
        "aggregators.*.value.weight",
        // Gains of normalisations, by the names that libraries have for them.
        "*norm.weight",
        "*Norm.weight",
        "*norm_after.weight",
        "*.ln_tuning_layers.weight",
        "*ln_1.weight",
        "*ln_2.weight",
        "*ln_f.weight",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// a + c·b, in memory of its own.
fn plus(a: &Tensor, b: &Tensor, c: f64) -> Result<Tensor> {
    let mut sum = a.copy()?;
    sum.add_scaled_in_place(b, c)?;
    Ok(sum)
}

/// A count as a tensor `[1]`, to be saved among the others.
fn count(n: i64) -> Result<Tensor> {
    Tensor::from_slice(&[n], &[1], Device::Cpu)
}
