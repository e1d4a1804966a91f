//! SupSup: supermasks in superposition. Each task has a mask on the same frozen weights,
//! θ' = θ ⊙ 1[s > 0]; which task a batch is of is read off the gradient.
//!
//! With p(α) the output under θ ⊙ Σᵢ αᵢ mᵢ, at αᵢ = 1⁄k the task is argmaxᵢ −∂H(p) ⁄ ∂αᵢ: the mask
//! that would lower the entropy most. One shot, or halving the candidates until one is left.
//!
//! Wortsman et al. 2020, *Supermasks in Superposition*, arXiv 2006.14769. Survey §3.1, parameter
//! composition.

use modl_core::{
    Attachment, Bank, Context, Device, Error, Init, Kind, Modular, Module, ModuleConfig, Order,
    Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor, Tensors, Weights as Alpha,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::straight_through::{Rule, StraightThrough, Weights};

/// Configuration of one task's supermask at sites with a `weight`. Scores start uniform in
/// ±1⁄√fan_in, so that half of the weights are on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SupSup {
    /// What is masked; default [`Weights::SignedConstant`].
    pub weights: Weights,
}

impl Default for SupSup {
    fn default() -> Self {
        SupSup { weights: Weights::SignedConstant }
    }
}

impl ModuleConfig for SupSup {
    fn kind(&self) -> &'static str {
        "sup_sup"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let rule = Rule::Above(0.0);
        let module = StraightThrough::new("sup_sup", rule, self.weights, Init::Kaiming, at, scope)?;
        Ok(Box::new(module))
    }
}

/// How the task of a batch is searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskSearch {
    /// One gradient over all modules.
    OneShot,
    /// Log₂ k gradients: the better half of the candidates stays each time.
    Binary,
}

/// [`infer_task_by`] the logits that the model's outputs have under the name `output`.
///
/// # Errors
/// As [`infer_task_by`], or where there is no such output.
pub fn infer_task(
    model: &mut Modular,
    inputs: &Tensors,
    output: &str,
    search: TaskSearch,
) -> Result<String> {
    let logits = |model: &Modular| {
        let outputs = model.forward(inputs, &Context::eval())?;
        Ok(outputs.need(output)?.clone())
    };
    infer_task_by(model, &logits, search)
}

/// Finds the module that a batch belongs to, routes everything to it, and returns its name. Masks
/// of the frozen weights are mixed by mixing the outputs of sites, which is the same where sites
/// are linear. `logits` computes what the model says of the batch, `[…, classes]`; the entropy is its
/// mean. It takes more classes than a task uses, and a batch rather than one row, to be right.
///
/// # Errors
/// Where sites have different modules, an aggregator merges parameters (their scores, then), or
/// the logits do not depend on modules.
pub fn infer_task_by(
    model: &mut Modular,
    logits: &dyn Fn(&Modular) -> Result<Tensor>,
    search: TaskSearch,
) -> Result<String> {
    let names = modules_everywhere(model)?;
    let mut left: Vec<usize> = (0..names.len()).collect();
    while left.len() > 1 {
        let gain = entropy_gain(model, logits, &left, names.len())?;
        // Sorting is stable: of equal gains the module that was attached first wins.
        let value = |j: &usize| gain.get(*j).copied().unwrap_or(f64::NEG_INFINITY);
        left.sort_by(|a, b| value(b).total_cmp(&value(a)));
        left.truncate(match search {
            TaskSearch::OneShot => 1,
            TaskSearch::Binary => left.len().div_ceil(2),
        });
    }
    let best = left.first().copied().unwrap_or(0);
    model.route(Box::new(Mixture(Alpha::Fixed(vec![(best, 1.0)]))), false)?;
    let name = names.get(best).cloned();
    name.ok_or_else(|| Error::invalid("task inference", "there is no module; attach one first"))
}

/// The names of the modules, which all modular sites have in common.
fn modules_everywhere(model: &Modular) -> Result<Vec<String>> {
    let mut names: Option<Vec<String>> = None;
    for site in model.modular_sites() {
        let Some(layer) = model.layer(&site) else { continue };
        if layer.aggregator().order() != Order::Outputs {
            return Err(Error::unsupported(
                format!("task inference with aggregator `{}`", layer.aggregator().kind()),
                "choose an aggregator of outputs, a weighted sum",
            ));
        }
        let own = layer.bank.names();
        match &names {
            Some(known) if known != own => {
                let problem = format!("has modules {own:?}, where a site before has {known:?}");
                return Err(Error::invalid(&site.path, problem));
            }
            _ => names = Some(own.to_vec()),
        }
    }
    names.ok_or_else(|| Error::invalid("task inference", "there is no module; attach one first"))
}

/// −∂H ⁄ ∂α at α uniform over the candidates, `[modules]`.
fn entropy_gain(
    model: &mut Modular,
    logits: &dyn Fn(&Modular) -> Result<Tensor>,
    candidates: &[usize],
    modules: usize,
) -> Result<Vec<f64>> {
    let mut alpha = vec![0.0; modules];
    for j in candidates {
        if let Some(a) = alpha.get_mut(*j) {
            *a = 1.0 / candidates.len() as f64;
        }
    }
    let alpha = Tensor::from_slice(&alpha, &[modules as i64], Device::Cpu)?
        .to_kind(Kind::Float)?
        .to_device(model.device())?;
    alpha.set_requires_grad(true)?;
    model.route(Box::new(Mixture(Alpha::Dense(alpha.clone()))), false)?;
    let log_p = logits(model)?.log_softmax(-1)?;
    let entropy = log_p.exp()?.mul(&log_p)?.sum_dims(&[-1], false)?.mean()?.neg()?;
    match entropy.gradients(&[&alpha], false)?.pop().flatten() {
        Some(g) => g.neg()?.to_vec::<f64>(),
        None => Err(Error::invalid("logits", "do not depend on the modules")),
    }
}

/// A given α, which sums to 1, for everything.
#[derive(Debug, Clone)]
struct Mixture(Alpha);

impl Router for Mixture {
    fn kind(&self) -> &'static str {
        "mixture"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(self.0.clone(), bank.len()).normalised())
    }
}

impl RouterConfig for Mixture {
    fn kind(&self) -> &'static str {
        "mixture"
    }

    fn to_json(&self) -> Result<Value> {
        Err(Error::unsupported(
            "saving the routing that task inference made",
            "give the model a router of its own before it is saved",
        ))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}
