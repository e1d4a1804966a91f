//! Full fine-tuning of a site: φ is as large as θ.
//!
//! θ' = θ + φ with φ = 0 at the start, or θ' = φ with φ = θ at the start. The first is the task
//! vector of the site, whatever its fine-tuning; the second is what a file with whole tensors
//! (PEFT's `modules_to_save`) holds. BitFit and layer-norm tuning are the same for a part of θ.
//!
//! Ilharco et al. 2023, *Editing Models with Task Arithmetic*, arXiv 2212.04089. Survey §3.1,
//! parameter composition.

use modl_core::{Attachment, Error, Init, Module, ModuleConfig, Result, Scope, Tensor, Tensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Configuration of full fine-tuning at sites that have parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Full {
    /// What φ is.
    pub form: Form,
}

/// What φ is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// θ' − θ.
    #[default]
    Delta,
    /// θ' itself.
    Copy,
}

impl ModuleConfig for Full {
    fn kind(&self) -> &'static str {
        "full"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(Change::new("full", self.form, &learned(at, |_| true)?, scope)?))
    }
}

/// The parameters of θ that gradients change (running averages are not) and `takes` takes.
///
/// # Errors
/// Where there are none.
pub(super) fn learned(at: &Attachment, takes: impl Fn(&str) -> bool) -> Result<Tensors> {
    let own = at.theta.iter().filter(|(n, _)| !n.starts_with("running_") && takes(n));
    let own: Tensors = own.map(|(n, t)| (n.to_owned(), t.clone())).collect();
    if own.is_empty() {
        let has: Vec<&str> = at.theta.names().collect();
        return Err(Error::unsupported(
            format!(
                "a site of kind {:?} with parameters [{}], none of which this method trains",
                at.site.kind,
                has.join(", ")
            ),
            format!("leave `{}` out of the targets", at.site.path),
        ));
    }
    Ok(own)
}

/// Some of θ's parameters, changed freely.
#[derive(Debug)]
pub(super) struct Change {
    kind: &'static str,
    form: Form,
    /// By θ's names.
    phi: Tensors,
}

impl Change {
    /// A change of `part`, that of θ which is trained; parameters have θ's names.
    pub(super) fn new(
        kind: &'static str,
        form: Form,
        part: &Tensors,
        scope: &mut Scope,
    ) -> Result<Self> {
        let phi = part.map(|name, t| match form {
            Form::Delta => scope.param(name, &t.size(), Init::Zeros),
            Form::Copy => scope.param_from(name, t),
        })?;
        Ok(Change { kind, form, phi })
    }
}

/// What an aggregator that works on parameters makes of masked modules: their effective changes,
/// whose masks may differ, are averaged as they are. `names` are those that φ has to have.
pub(super) fn effective(
    kind: &'static str,
    form: Form,
    names: &Tensors,
    phi: &Tensors,
) -> Result<Box<dyn Module>> {
    Ok(Box::new(Change { kind, form, phi: names.map(|name, _| phi.need(name).cloned())? }))
}

impl Module for Change {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut all = theta.clone();
        for (name, own) in self.phi.iter() {
            let t = theta.need(name)?;
            let new = match self.form {
                Form::Delta => t.to_kind(own.kind())?.add(own)?,
                Form::Copy => own.clone(),
            };
            all.set(name.to_owned(), new.to_kind(t.kind())?);
        }
        Ok(Some(all))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| phi.need(name).cloned())?;
        Ok(Box::new(Change { kind: self.kind, form: self.form, phi }))
    }

    fn signature(&self) -> String {
        let sizes = |(n, t): (&str, &Tensor)| format!("{n}{:?}", t.size());
        let sizes: Vec<String> = self.phi.iter().map(sizes).collect();
        format!("{}({:?}, {})", self.kind, self.form, sizes.join(", "))
    }
}
