//! Merging attached modules into one new low-rank module, once and for all.
//!
//! The aggregator's φ̄ = g(α, {φⱼ}) with constant weights, at every site: PEFT's
//! `add_weighted_adapter`. Survey §5.1.

use modl_core::{
    Aggregator, Context, Error, LowRank, Modular, Result, ResultExt, Routing, Site, Weights,
    no_grad,
};

use crate::Concat;

/// Merges the named modules with these weights at every site where any of them stands, and gives
/// the site's path and the factors of the merged change. The model is not touched; the factors
/// have no gradient.
///
/// Modules may stand at different sites. For [`Concat`], a sum, a module that is absent adds
/// nothing; any other aggregator refuses, since nothing is not a set of parameters to average.
///
/// # Errors
/// Where a name is unknown, no weight is different from 0, a module is absent from a site of
/// another, or what comes out is not low-rank.
pub fn merge_low_rank(
    model: &Modular,
    names: &[(&str, f64)],
    aggregator: &dyn Aggregator,
) -> Result<Vec<(String, LowRank)>> {
    for (name, _) in names {
        model.recipe(name)?;
    }
    if names.iter().all(|(_, w)| *w == 0.0) {
        return Err(Error::invalid(
            "merge",
            "at least one module is to have a weight other than 0",
        ));
    }
    let mut merged = Vec::new();
    for site in model.modular_sites() {
        let found = no_grad(|| merge_at(model, &site, names, aggregator)).at(&site.path)?;
        merged.extend(found.map(|m| (site.path, m)));
    }
    Ok(merged)
}

/// The merged change at one site, if any of the modules stands there.
fn merge_at(
    model: &Modular,
    site: &Site,
    names: &[(&str, f64)],
    aggregator: &dyn Aggregator,
) -> Result<Option<LowRank>> {
    let Some(layer) = model.layer(site) else { return Ok(None) };
    let mut weights = Vec::with_capacity(names.len());
    let mut absent = None;
    for (name, weight) in names.iter().filter(|(_, w)| *w != 0.0) {
        match layer.bank.position(name) {
            Ok(j) => weights.push((j, *weight)),
            Err(_) => absent = Some(name),
        }
    }
    if weights.is_empty() {
        return Ok(None);
    }
    if let Some(name) = absent
        && aggregator.kind() != Concat::default().kind()
    {
        return Err(Error::unsupported(
            format!("`{}` without module `{name}`, which does not stand here", aggregator.kind()),
            "merge with `concat`, or attach all modules to the same sites",
        ));
    }
    let routing = Routing::new(Weights::Fixed(weights), layer.bank.len());
    let active = layer.bank.select(&routing, 0)?;
    let module = aggregator.parameters(&active, &model.backbone().theta(site)?)?;
    match module.low_rank(&Context::eval()) {
        Some(merged) => Ok(Some(merged)),
        None => Err(Error::unsupported(
            format!("a low-rank merge of modules of kind `{}`", module.kind()),
            "merge low-rank modules such as LoRA",
        )),
    }
}
