//! Conditional normalisation: a norm with another gain and bias for each module, or each row.
//!
//! y = n(x) ⊙ (γ + Δγ) + β + Δβ, where n(x) is what the layer norm or batch norm at the site gives
//! without gain and bias, and γ, β are θ. Δγ and Δβ are the module's own parameters or, given the
//! width of a task vector z, generated for each row: Δγ = Δ₀ + Gz, Δβ = β₀ + Hz. All start at 0, so
//! that a fresh module changes nothing.
//!
//! De Vries et al. 2017, *Modulating early visual processing by language*, arXiv 1707.00683 (batch
//! norm); Chen et al. 2021, *AdaSpeech*, arXiv 2103.00993 (layer norm). Survey §3.3.

use modl_core::{
    Attachment, Context, Error, Host, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Targets, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::modulation::Modulation;

/// Configuration of conditional normalisation at `norm` and `batch-norm` sites.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConditionalNorm {
    /// The number of columns of the feature `task_vector` from which Δγ and Δβ are generated; 0,
    /// the default, where they are the same for all rows.
    pub task_vector: i64,
}

impl ModuleConfig for ConditionalNorm {
    fn kind(&self) -> &'static str {
        "conditional_norm"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-norm")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if !matches!(site.kind, SiteKind::Norm | SiteKind::BatchNorm) {
            return Err(Error::unsupported(
                format!("conditional normalisation at a site of kind {:?}", site.kind),
                "attach it to `all-norm` or `all-batch-norm`",
            ));
        }
        // A norm without a bias, as RMS norm is, stays one.
        let shifts = at.theta.get("bias").is_some();
        let what = "conditional_norm.task_vector";
        Modulation::new(what, site.output, site.kind, self.task_vector, shifts, scope)
            .map(|change| Box::new(ChangedNorm { change }) as Box<dyn Module>)
    }
}

/// A changed norm at one site.
#[derive(Debug)]
struct ChangedNorm {
    change: Modulation,
}

impl Module for ChangedNorm {
    fn kind(&self) -> &'static str {
        "conditional_norm"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if let Some(theta) = self.compose(f.theta())? {
            return f.call_with(&theta, x, cx);
        }
        // f takes one gain for all rows: theirs are multiplied onto n(x) outside.
        let y = f.call(x, cx)?;
        let mut plain = f.theta().clone();
        plain.set("weight", plain.need("weight")?.ones_like()?);
        if let Some(bias) = plain.get("bias") {
            plain.set("bias", bias.zeros_like()?);
        }
        let n = f.call_with(&plain, x, cx)?.x;
        let (gain, shift) = self.change.at(&n, cx)?;
        let changed = y.x.addcmul(&n, &gain)?;
        Ok(y.replace(match shift {
            Some(shift) => changed.add(&shift)?,
            None => changed,
        }))
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        if self.change.by_row() {
            return Ok(None);
        }
        let (gain, shift) = self.change.constants()?;
        let mut all = theta.clone();
        for (name, change) in [("weight", Some(gain)), ("bias", shift)] {
            let Some(change) = change else { continue };
            let old = theta.need(name)?;
            all.set(name, old.to_kind(change.kind())?.add(change)?.to_kind(old.kind())?);
        }
        Ok(Some(all))
    }

    fn phi(&self) -> Tensors {
        self.change.phi()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(ChangedNorm { change: self.change.with_phi(phi)? }))
    }
}
