//! FiLM: feature-wise linear modulation of what a site gives.
//!
//! y = (1 + Δ) ⊙ f_θ(x) + β, one Δ and one β for each channel. They are the module's own parameters
//! or, given the width of a task vector z, generated for each row: Δ = Δ₀ + Gz, β = β₀ + Hz. All
//! start at 0, so that a fresh module changes nothing.
//!
//! Perez et al. 2018, *FiLM: Visual Reasoning with a General Conditioning Layer*, arXiv 1709.07871.
//! Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::modulation::Modulation;

/// Configuration of FiLM at sites of any kind but `attention`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Film {
    /// The number of columns of the feature `task_vector` from which Δ and β are generated; 0, the
    /// default, where they are the same for all rows.
    pub task_vector: i64,
}

impl ModuleConfig for Film {
    fn kind(&self) -> &'static str {
        "film"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind == SiteKind::Attention {
            return Err(Error::unsupported(
                "FiLM at an attention site, whose channels are split into heads",
                "attach it to the linear site behind",
            ));
        }
        let what = "film.task_vector";
        Modulation::new(what, site.output, site.kind, self.task_vector, true, scope)
            .map(|modulation| Box::new(Modulated { modulation }) as Box<dyn Module>)
    }
}

/// FiLM at one site.
#[derive(Debug)]
struct Modulated {
    modulation: Modulation,
}

impl Module for Modulated {
    fn kind(&self) -> &'static str {
        "film"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        let (delta, shift) = self.modulation.at(&h.x, cx)?;
        let scaled = h.x.mul(&delta.add_scalar(1.0)?)?;
        Ok(h.replace(match shift {
            Some(shift) => scaled.add(&shift)?,
            None => scaled,
        }))
    }

    /// Where f is affine with a bias, its output's channels are the rows of `weight`.
    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let (Some(w), Some(b)) = (theta.get("weight"), theta.get("bias")) else { return Ok(None) };
        let (delta, Some(shift)) = self.modulation.constants()? else { return Ok(None) };
        if self.modulation.by_row() {
            return Ok(None);
        }
        let gain = delta.add_scalar(1.0)?;
        let mut rows = vec![1; w.dim()];
        if let Some(n) = rows.first_mut() {
            *n = gain.len_of(0);
        }
        // In the module's kind (f32), then rounded once.
        let wide = |t: &Tensor| t.to_kind(gain.kind());
        let weight = wide(w)?.mul(&gain.reshape(&rows)?)?.to_kind(w.kind())?;
        let bias = wide(b)?.mul(&gain)?.add(shift)?.to_kind(b.kind())?;
        Ok(Some(theta.clone().with("weight", weight).with("bias", bias)))
    }

    fn phi(&self) -> Tensors {
        self.modulation.phi()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Modulated { modulation: self.modulation.with_phi(phi)? }))
    }
}
