//! Intrinsic dimension: all sites are trained through one small vector.
//!
//! θᵢ + λᵢ·Pᵢ z with z `[D]` shared by all sites and Pᵢ a fixed random projection to the parameters
//! of site i ([`Fastfood`]). In DID λᵢ = 1; in SAID each site has a λᵢ of its own, which is taken
//! out of D. z is 0 at the start, so that a fresh module changes nothing. The least D with 90 % of
//! what full fine-tuning reaches is the intrinsic dimension d₉₀ of a task.
//!
//! Li et al. 2018, *Measuring the Intrinsic Dimension of Objective Landscapes*, arXiv 1804.08838;
//! Aghajanyan et al. 2021, *Intrinsic Dimensionality Explains the Effectiveness of Language Model
//! Fine-Tuning*, arXiv 2012.13255. Survey §3.1, parameter composition.

use modl_core::{
    Attachment, Error, Init, Module, ModuleConfig, Result, Scope, Seed, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fastfood::Fastfood;
use super::weight_change::signature;

const Z: &str = "z";
const SCALE: &str = "scale";

/// The parameters of a site that are trained; running statistics are none.
const TRAINED: [&str; 2] = ["weight", "bias"];

/// Configuration of training in a random subspace, at sites with a weight or a bias.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Intrinsic {
    /// D, the number of trained numbers of all sites together; default 20,000.
    pub dimension: i64,
    /// A scale for each site, out of D (SAID); default true.
    pub said: bool,
    /// The seed of the projections. It is kept instead of them, so that a module file holds D
    /// numbers; default 0.
    pub projection_seed: u64,
}

impl Default for Intrinsic {
    fn default() -> Self {
        Intrinsic { dimension: 20_000, said: true, projection_seed: 0 }
    }
}

impl ModuleConfig for Intrinsic {
    fn kind(&self) -> &'static str {
        "intrinsic"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let shapes: Vec<(&'static str, Vec<i64>)> = TRAINED
            .into_iter()
            .filter_map(|name| Some((name, at.theta.get(name)?.size())))
            .collect();
        if shapes.is_empty() {
            return Err(Error::unsupported(
                format!("intrinsic dimension at `{}`, which has no parameters", at.site.path),
                "attach it where there is a weight or a bias, for instance to `all-linear`",
            ));
        }
        let sites = if self.said { at.sites.len() as i64 } else { 0 };
        let d = self.dimension - sites;
        if d < 1 {
            let problem = format!("is {}, of which {sites} are scales", self.dimension);
            return Err(Error::invalid("intrinsic.dimension", problem));
        }
        let size = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        let seed = Seed(self.projection_seed).child(&at.site.path);
        Ok(Box::new(Subspace {
            projection: Fastfood::new(size, seed, scope.kind(), scope.device())?,
            z: scope.common().shared(Z, &[d], Init::Zeros)?,
            scale: if self.said { Some(scope.param(SCALE, &[1], Init::Ones)?) } else { None },
            shapes,
            seed: self.projection_seed,
        }))
    }
}

/// One site in the subspace.
#[derive(Debug, Clone)]
struct Subspace {
    z: Tensor,
    /// λ, `[1]`.
    scale: Option<Tensor>,
    projection: Fastfood,
    /// The parameters, in the order in which they share the projection.
    shapes: Vec<(&'static str, Vec<i64>)>,
    seed: u64,
}

impl Module for Subspace {
    fn kind(&self) -> &'static str {
        "intrinsic"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut change = self.projection.project(&self.z)?;
        if let Some(scale) = &self.scale {
            change = change.mul(scale)?;
        }
        let (mut theta, mut start) = (theta.clone(), 0);
        for (name, shape) in &self.shapes {
            let (old, n) = (theta.need(name)?, shape.iter().product());
            let own = change.narrow(0, start, n)?.reshape(shape)?;
            // In the module's kind (f32), then rounded once.
            let sum = old.to_kind(own.kind())?.add(&own)?.to_kind(old.kind())?;
            theta.set(*name, sum);
            start += n;
        }
        Ok(Some(theta))
    }

    fn phi(&self) -> Tensors {
        let phi = Tensors::new().with(Z, self.z.clone());
        match &self.scale {
            Some(scale) => phi.with(SCALE, scale.clone()),
            None => phi,
        }
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (z, scale) = (phi.need(Z)?.clone(), phi.get(SCALE).cloned());
        Ok(Box::new(Subspace { z, scale, ..self.clone() }))
    }

    fn signature(&self) -> String {
        signature(self.kind(), &self.phi(), &format!("projection {}", self.seed))
    }
}
