//! The sub-network of a task: the modules that its rows use at each site, and nothing else.
//!
//! Kudugunta et al. 2021, arXiv 2110.03742: a mixture that is routed by task is served task by task,
//! at the size of the few experts that the task uses. [`SubNetwork::of`] asks the routers of a model
//! what rows with the labels of a context use. As a router it answers just that, in a model that holds
//! these modules or more, and batches of the task have the same output bit for bit.

use std::collections::{BTreeMap, BTreeSet};

use modl_core::{
    Bank, Context, Device, Error, Kind, Modular, Result, ResultExt, Router, RouterConfig, Routing,
    Scope, Signal, Site, Tensor, Weights, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The modules that one task uses, by site.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubNetwork {
    /// By the path of the site.
    pub sites: BTreeMap<String, Part>,
}

/// The modules that one task uses at one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Names and weights.
    pub modules: Vec<(String, f64)>,
    /// Whether the router declared that weights sum to 1.
    pub normalised: bool,
}

impl SubNetwork {
    /// What rows with the labels of `cx` use. `cx` has the labels of one row and, for routers that
    /// read features, these.
    ///
    /// # Errors
    /// Where a router looks at x or at heads of modules, or does not know the label.
    pub fn of(model: &Modular, cx: &Context) -> Result<SubNetwork> {
        // Two inputs that have nothing in common, each in a pass of its own.
        let (first, second) = (cx.select_rows(&[0])?, cx.select_rows(&[0])?);
        let mut sites = BTreeMap::new();
        for site in model.modular_sites() {
            let Some(layer) = model.layer(&site) else { continue };
            let routed = |value: f64, cx: &Context| {
                let x = Tensor::full(&[1, 1, site.input], value, Kind::Float, model.device())?;
                no_grad(|| layer.router().route(&Signal::from(x), &layer.bank, cx)).at(&site.path)
            };
            let (one, other) = (routed(1.0, &first)?, routed(-2.0, &second)?);
            let dense = |r: &Routing| r.dense(Kind::Double, Device::Cpu)?.detach();
            let (alpha, same) = (dense(&one)?, dense(&other)?);
            if alpha.numel() != layer.bank.len() || !alpha.bit_equal(&same)? || one.heads.is_some()
            {
                return Err(Error::unsupported(
                    format!(
                        "taking a task's modules out under a `{}` router",
                        layer.router().kind()
                    ),
                    "route by labels alone, for instance with `task_moe`",
                ));
            }
            let weights = alpha.to_vec::<f64>()?;
            let named = layer.bank.names().iter().cloned().zip(weights);
            let modules = named.filter(|(_, w)| *w != 0.0).collect();
            sites.insert(site.path.clone(), Part { modules, normalised: one.normalised });
        }
        Ok(SubNetwork { sites })
    }

    /// The modules that are used anywhere.
    pub fn modules(&self) -> BTreeSet<&str> {
        self.sites.values().flat_map(|p| &p.modules).map(|(name, _)| name.as_str()).collect()
    }
}

impl RouterConfig for SubNetwork {
    fn kind(&self) -> &'static str {
        "sub_network"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        let unknown = || Error::unknown("site of the sub-network", &site.path, self.sites.keys());
        let part = self.sites.get(&site.path).ok_or_else(unknown)?.clone();
        for (name, _) in &part.modules {
            bank.position(name)?;
        }
        Ok(Box::new(PartRouter(part)))
    }
}

/// The names are looked up anew in each pass, so that a bank may grow.
#[derive(Debug, Clone)]
struct PartRouter(Part);

impl Router for PartRouter {
    fn kind(&self) -> &'static str {
        "sub_network"
    }

    fn route(&self, x: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        let (mut index, mut weight) = (Vec::new(), Vec::new());
        for (name, w) in &self.0.modules {
            index.push(bank.position(name)? as i64);
            weight.push(*w);
        }
        // The form that a learned router gives, so that the same sums are made.
        let (k, rows, device) = (index.len() as i64, x.rows(), x.x.device());
        let index =
            Tensor::from_slice(&index, &[1, k], device)?.expand(&[rows, k])?.contiguous()?;
        let weight = Tensor::from_slice(&weight, &[1, k], Device::Cpu)?.to_kind(Kind::Float)?;
        let weight = weight.to_device(device)?.expand(&[rows, k])?.contiguous()?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        Ok(if self.0.normalised { routing.normalised() } else { routing })
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}
