//! Retrieval by nearest prototype: the k modules whose prototypes are most like x̄.
//!
//! Module j has a prototype cⱼ, the mean of x̄ over the rows that it was trained on. In training a row
//! goes to the module that its label names, and cⱼ follows as a running mean; in evaluation labels
//! are not looked at:
//!
//! sⱼ = cos(x̄, cⱼ) or x̄·cⱼ, K = the k largest, α = softmax_K(s ⁄ τ).
//!
//! Jang et al. 2023, arXiv 2302.03202 (retrieval of experts); means as prototypes: Snell, Swersky,
//! Zemel 2017, arXiv 1703.05175. Survey §4.2.3. Prototypes may be given instead. Modules without a
//! prototype are not chosen; equal ones are ranked by their place in the bank.
//!
//! Buffers: `prototypes` `[m, width]` and `counts` `[m]`, the number of rows behind each.
//!
//! ```toml
//! router = { type = "nearest_prototype", similarity = "cosine", label = "domain" }
//! ```

use std::collections::BTreeMap;

use modl_core::{
    Bank, Context, Device, Error, Outcome, Result, Router, RouterConfig, Routing, Scope, Signal,
    Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Input;

/// How alike x̄ and a prototype are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Similarity {
    /// The cosine of the angle between them.
    #[default]
    Cosine,
    /// Their inner product.
    Dot,
}

/// The modules with the nearest prototypes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NearestPrototype {
    /// Default: `cosine`.
    pub similarity: Similarity,
    /// How many modules are active in evaluation. Default: 1.
    pub k: usize,
    /// τ > 0. Default: 1.
    pub temperature: f64,
    /// What x̄ is: `mean` or `feature:NAME`. Default: `mean`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// The kind of label that names a row's module in training. Default: `task`.
    pub label: String,
    /// Prototypes by the names of their modules, at all sites. They stay as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prototypes: Option<BTreeMap<String, Vec<f64>>>,
}

impl Default for NearestPrototype {
    fn default() -> Self {
        NearestPrototype {
            similarity: Similarity::Cosine,
            k: 1,
            temperature: 1.0,
            input: Input::Mean,
            width: None,
            label: "task".into(),
            prototypes: None,
        }
    }
}

fn wrong<T>(key: &str, problem: impl Into<String>) -> Result<T> {
    Err(Error::invalid(format!("nearest_prototype.{key}"), problem.into()))
}

impl RouterConfig for NearestPrototype {
    fn kind(&self) -> &'static str {
        "nearest_prototype"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (m, width) = (bank.len(), self.width.unwrap_or(site.input));
        if self.k == 0 || self.k > m {
            return wrong("k", format!("is {}, there are {m} modules to choose from", self.k));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", "is to be above 0");
        }
        if width < 1 || (width != site.input && !matches!(self.input, Input::Feature(_))) {
            return wrong("width", "is to be the width of the feature; leave it out otherwise");
        }
        if self.input == Input::Tokens {
            return wrong("input", "is to be \"mean\" or \"feature:NAME\": rows have prototypes");
        }
        self.input.check(site)?;
        let (mut given, mut counts) = (BTreeMap::new(), vec![0.0; m]);
        for (name, own) in self.prototypes.iter().flatten() {
            let j = bank.position(name)?;
            if own.len() as i64 != width || !own.iter().all(|v| v.is_finite()) {
                return wrong("prototypes", format!("`{name}` is to have {width} finite numbers"));
            }
            given.insert(j, own);
            counts.iter_mut().skip(j).take(1).for_each(|c| *c = 1.0);
        }
        let kind = scope.kind();
        let buffer =
            |v: &[f64], shape: &[i64]| Tensor::from_slice(v, shape, Device::Cpu)?.to_kind(kind);
        let start = || {
            let none = vec![0.0; width as usize];
            let all: Vec<f64> =
                (0..m).flat_map(|j| given.get(&j).map_or(&none, |own| *own)).copied().collect();
            buffer(&all, &[m as i64, width])
        };
        Ok(Box::new(PrototypeRouter {
            config: self.clone(),
            prototypes: scope.buffer_drawn("prototypes", &[m as i64, width], start)?,
            counts: scope.buffer("counts", &buffer(&counts, &[m as i64])?)?,
        }))
    }
}

#[derive(Debug)]
struct PrototypeRouter {
    config: NearestPrototype,
    /// `[modules, width]`.
    prototypes: Tensor,
    /// `[modules]`.
    counts: Tensor,
}

impl Router for PrototypeRouter {
    fn kind(&self) -> &'static str {
        "nearest_prototype"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let x_bar = self.config.input.of(x, cx)?.0.detach()?.to_kind(self.prototypes.kind())?;
        if x_bar.len_of(-1) != self.prototypes.len_of(-1) {
            let wanted = self.prototypes.len_of(-1);
            return wrong("width", format!("prototypes have {wanted} numbers, x̄ is {x_bar:?}"));
        }
        x_bar.check_finite("x̄ of a `nearest_prototype` router")?;
        let device = x_bar.device();
        if cx.train && self.config.prototypes.is_none() {
            let names = cx.labels(&self.config.label)?;
            if names.len() as i64 != x.rows() {
                let problem = format!("{} names for {} rows", names.len(), x.rows());
                return Err(Error::invalid(format!("{}s", self.config.label), problem));
            }
            let place = |name: &std::sync::Arc<str>| Ok(bank.position(name)? as i64);
            let places: Vec<i64> = names.iter().map(place).collect::<Result<_>>()?;
            let index = Tensor::from_slice(&places, &[x.rows(), 1], device)?;
            let weight = Tensor::ones(&[x.rows(), 1], self.prototypes.kind(), device)?;
            let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
            return Ok(routing.normalised().note("x", x_bar));
        }
        let zeros = self.counts.zeros_like()?;
        let known = self.counts.to_vec::<f64>()?.iter().filter(|c| **c != 0.0).count();
        if known < self.config.k {
            let problem = format!("{known} modules have one and {} are wanted", self.config.k);
            return wrong("prototypes", format!("{problem}; train with labels, or give them"));
        }
        let scores = match self.config.similarity {
            Similarity::Cosine => unit(&x_bar)?.linear(&unit(&self.prototypes)?, None)?,
            Similarity::Dot => x_bar.linear(&self.prototypes, None)?,
        };
        scores.check_finite("similarities of a `nearest_prototype` router")?;
        let scores = scores.masked_fill(&self.counts.equal(&zeros)?, f64::NEG_INFINITY)?;
        // A stable sort leaves equal ones in the order of the bank.
        let order = Tensor::op("sort", &[&scores], |t| {
            t[0].f_sort_stable(true, -1, true).map(|(_, index)| index)
        })?;
        let index = order.narrow(-1, 0, self.config.k as i64)?;
        let kept = scores.gather(-1, &index)?.mul_scalar(1.0 / self.config.temperature)?;
        let weights = Weights::Sparse { index, weight: kept.softmax(-1)? };
        Ok(Routing::new(weights, bank.len()).normalised().note("logits", scores))
    }

    /// cⱼ ← cⱼ + Σ (x̄ − cⱼ) ⁄ nⱼ over the rows of module j, nⱼ with them.
    fn learn(&self, routing: &Routing, _: &Outcome) -> Result<()> {
        let (Weights::Sparse { index, .. }, Some(x)) = (&routing.weights, routing.noted.get("x"))
        else {
            return Ok(());
        };
        let kind = self.prototypes.kind();
        let mine = index.select(-1, 0)?.one_hot(self.counts.len_of(0))?.to_kind(kind)?;
        let new = mine.sum_dims(&[0], false)?; // [modules]
        let sums = mine.t()?.matmul(x)?; // [modules, width]
        let counts = self.counts.add(&new)?;
        let away = sums.sub(&self.prototypes.mul(&new.unsqueeze(-1)?)?)?;
        let step = away.div(&counts.clamp(1.0, f64::INFINITY)?.unsqueeze(-1)?)?;
        self.prototypes.clone().add_in_place(&step)?;
        self.counts.clone().copy_from(&counts)
    }

    /// A new module has no prototype before it is trained.
    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let new = modules as i64 - self.counts.len_of(0);
        let mut more = |name: &str, old: &Tensor, shape: &[i64]| {
            let zeros = Tensor::zeros(shape, old.kind(), old.device())?;
            scope.replace(name, &Tensor::cat(&[old.clone(), zeros], 0)?)
        };
        Ok(Box::new(PrototypeRouter {
            config: self.config.clone(),
            prototypes: more("prototypes", &self.prototypes, &[new, self.prototypes.len_of(1)])?,
            counts: more("counts", &self.counts, &[new])?,
        }))
    }
}

/// Vectors of length 1 along the last dimension; 0 stays 0.
pub(crate) fn unit(v: &Tensor) -> Result<Tensor> {
    v.div(&v.square()?.sum_dims(&[-1], true)?.clamp(1e-24, f64::INFINITY)?.sqrt()?)
}
