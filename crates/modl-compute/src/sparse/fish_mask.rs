//! FISH mask: θ' = θ + m ⊙ δ where m takes the weights with the largest Fisher information.
//!
//! F_j = (1 ⁄ N) Σₙ (∂ log p(yₙ | xₙ) ⁄ ∂θ_j)²: squares of each example's own gradient, which is
//! not the square of a batch's. With y drawn from the model it is the Fisher information, with the
//! given y its empirical stand-in; the caller chooses by the y that it uses.
//!
//! Sung, Nair and Raffel 2021, *Training Neural Networks with Fixed Sparse Masks*, arXiv
//! 2111.09839. Survey §3.1, parameter composition.

use modl_core::{
    Attachment, Error, Modular, Module, ModuleConfig, Result, Scope, Tensor, Tensors, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::masked::{DELTA, Masked, choose, part};
use super::top_k::check_share;

/// Configuration of a FISH mask at sites that have parameters. Until [`choose_fish_mask`] has been
/// called nothing is masked out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FishMask {
    /// The share of the parameters of all its sites that is trained, in (0, 1], rounded down to
    /// whole ones; default 0.005.
    pub density: f64,
}

impl Default for FishMask {
    fn default() -> Self {
        FishMask { density: 0.005 }
    }
}

impl ModuleConfig for FishMask {
    fn kind(&self) -> &'static str {
        "fish_mask"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check_share("fish_mask.density", self.density)?;
        Ok(Box::new(Masked::new("fish_mask", 0.0, at, scope)?))
    }
}

/// Diagonal of the Fisher information of `params`, in their shapes: the mean over examples
/// `0..examples` of the squared gradient of `log_p` of one example. 256 to 1024 examples are usual.
///
/// # Errors
/// Where there is no example, or what `log_p` gives.
pub fn fisher(
    params: &Tensors,
    examples: u64,
    mut log_p: impl FnMut(u64) -> Result<Tensor>,
) -> Result<Tensors> {
    if examples == 0 {
        return Err(Error::invalid("examples", "there are none to measure the gradients of"));
    }
    let sums = params.map(|_, t| t.detach()?.zeros_like())?;
    let inputs: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    for n in 0..examples {
        let gradients = log_p(n)?.gradients(&inputs, false)?;
        no_grad(|| {
            sums.iter().zip(gradients).try_for_each(|((_, sum), g)| match g {
                Some(g) => sum.clone().addcmul_in_place(&g, &g),
                None => Ok(()),
            })
        })?;
    }
    sums.map(|_, sum| sum.mul_scalar(1.0 / examples as f64))
}

/// Measures the Fisher information of the module `name` of kind `fish_mask` where it stands, lets
/// its mask take the largest, and sets δ to 0. `log_p` is log p(y | x) of one example by the model.
///
/// # Errors
/// Where there is no such module or it is of another kind, its parameters are frozen, or what
/// `log_p` gives.
pub fn choose_fish_mask(
    model: &Modular,
    name: &str,
    examples: u64,
    log_p: impl FnMut(u64) -> Result<Tensor>,
) -> Result<()> {
    let (recipe, _) = model.recipe(name)?;
    if recipe.kind() != "fish_mask" {
        let problem = format!("is of kind `{}`, wants `fish_mask`", recipe.kind());
        return Err(Error::invalid(format!("module `{name}`"), problem));
    }
    let config: FishMask = serde_json::from_value(recipe.to_json()?)
        .map_err(|e| Error::invalid("fish_mask", e.to_string()))?;
    let params = model.params().below(&format!("modules.{name}."));
    let deltas = part(&params, DELTA);
    if deltas.iter().any(|(_, t)| !t.requires_grad()) {
        let problem = "has frozen parameters; make them trainable with Modular::train_only";
        return Err(Error::invalid(format!("module `{name}`"), problem));
    }
    let scores = fisher(&deltas, examples, log_p)?;
    no_grad(|| choose(&params, config.density, &scores)).map(drop)
}
