//! A change of the weight that is built whole: θ ⊕ φ = W + ΔW.

use modl_core::{Error, Result, Site, SiteKind, Tensor, Tensors};

/// θ with `change`, which has as many elements as the weight, added to the weight.
pub(super) fn added(theta: &Tensors, change: &Tensor) -> Result<Tensors> {
    let w = theta.need("weight")?;
    // In the module's kind (f32), then rounded once.
    let sum = w.to_kind(change.kind())?.add(&change.reshape(&w.size())?)?;
    Ok(theta.clone().with("weight", sum.to_kind(w.kind())?))
}

/// What has to agree before modules are averaged: the shapes in φ, and `settings`.
pub(super) fn signature(kind: &str, phi: &Tensors, settings: &str) -> String {
    let shapes: Vec<String> = phi.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
    format!("{kind}({}, {settings})", shapes.join(", "))
}

/// # Errors
/// Where the site is not a linear one.
pub(super) fn linear_only(method: &str, site: &Site) -> Result<()> {
    if site.kind == SiteKind::Linear {
        return Ok(());
    }
    Err(Error::unsupported(
        format!("{method} at a site of kind {:?}", site.kind),
        "attach it to linear sites, for instance `query` and `value`",
    ))
}
