//! SPoT: which source prompt a new task's prompt is to start from.
//!
//! A task is known by the mean of its prompt's vectors, after a short training; sources are ranked by
//! the cosine of theirs with it, and the nearest one, trained to the end, is the start.
//!
//! Vu, Lester, Constant, Al-Rfou, Cer 2022, *SPoT: Better Frozen Model Adaptation through Soft Prompt
//! Transfer*, arXiv 2110.07904, §3; survey §5.2.3 and §6.

use modl_core::{Context, Error, Kind, Modular, Result, Select, Tensor, no_grad};

use super::tokens;

/// The sources by the cosine of their mean vectors with the target's, the nearest first; of equal ones
/// the one that was named first. All are attached prompts.
///
/// # Errors
/// Where a module is unknown, is no prompt, or its mean vector is 0; where widths differ.
pub fn nearest_prompts(
    model: &Modular,
    target: &str,
    sources: &[&str],
) -> Result<Vec<(String, f64)>> {
    let wanted = mean(model, target)?;
    let mut all = Vec::with_capacity(sources.len());
    for source in sources {
        let own = mean(model, source)?;
        if own.len() != wanted.len() {
            let problem = format!("is {} wide, `{target}` {}", own.len(), wanted.len());
            return Err(Error::invalid(format!("prompt `{source}`"), problem));
        }
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let lengths = (dot(&own, &own) * dot(&wanted, &wanted)).sqrt();
        if lengths == 0.0 {
            let problem = format!("the mean vector of it or of `{target}` is 0, without direction");
            return Err(Error::invalid(format!("prompt `{source}`"), problem));
        }
        all.push(((*source).to_owned(), dot(&own, &wanted) / lengths));
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(all)
}

/// Gives an attached prompt the parameters of another one of the same kind and shape.
///
/// # Errors
/// Where a module is unknown, or the two do not have the same parameters; then nothing has changed.
pub fn start_from_prompt(model: &Modular, target: &str, source: &str) -> Result<()> {
    model.recipe(target)?;
    model.recipe(source)?;
    let of = |name: &str| model.params().below(&format!("modules.{name}."));
    let from = of(source);
    of(target).load(source, from.iter().map(|(n, p)| (n, p.tensor())), &Select::all())
}

/// The mean of a prompt's vectors, in f64.
fn mean(model: &Modular, name: &str) -> Result<Vec<f64>> {
    model.recipe(name)?;
    for site in model.modular_sites() {
        let Some(layer) = model.layer(&site) else { continue };
        let Some(module) = layer.bank.position(name).ok().and_then(|j| layer.bank.module(j)) else {
            continue;
        };
        let vectors: Tensor = no_grad(|| tokens("SPoT", name, module, &Context::eval()))?;
        return vectors.to_kind(Kind::Double)?.mean_dims(&[0], false)?.to_vec();
    }
    Err(Error::invalid(format!("prompt `{name}`"), "stands at no site"))
}
