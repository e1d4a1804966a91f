//! What training has come to: φ, ρ, γ, heads, and of the backbone what was trained.

use modl_core::{Modular, ParamStore, Result, Select, Tensor};

/// All of it, with storage shared.
pub(crate) fn trained(model: &Modular) -> Result<ParamStore> {
    let mut all = own(model)?;
    for (name, p) in model.backbone().params().iter().filter(|(_, p)| p.trainable()) {
        all.insert(format!("base.{name}"), p.tensor().clone())?;
    }
    Ok(all)
}

/// Loads what [`trained`] gave before. `source` is for messages.
pub(crate) fn load(model: &mut Modular, source: &str, saved: &[(String, Tensor)]) -> Result<()> {
    let mut all = own(model)?;
    // Of the backbone there is only what was trained.
    for name in saved.iter().filter_map(|(n, _)| n.strip_prefix("base.")) {
        all.insert(format!("base.{name}"), model.backbone().params().get(name)?.clone())?;
    }
    let tensors = saved.iter().map(|(n, t)| (n.as_str(), t));
    all.load(source, tensors, &Select::all())
}

fn own(model: &Modular) -> Result<ParamStore> {
    let mut all = ParamStore::new();
    for (name, p) in model.params().iter() {
        all.insert(name, p.tensor().clone())?;
    }
    Ok(all)
}
