//! Four LoRAs made into one, as a PEFT folder.

use std::path::Path;

use anyhow::{Context as _, Result};
use modl_aggregate::merge_low_rank;
use modl_compute::{Lora, peft};
use modl_core::{Aggregator, Modular, ParamStore, Targets};

/// Merges the modules `names` of `model` with equal weights, and saves the result in `folder` as an
/// adapter called `merged`. `blank` makes a model without modules.
pub(crate) fn merge(
    model: &Modular,
    names: &[&str],
    aggregator: &dyn Aggregator,
    blank: impl FnOnce() -> Result<Modular>,
    folder: &Path,
) -> Result<()> {
    let weight = 1.0 / names.len() as f64;
    let weights: Vec<(&str, f64)> = names.iter().map(|n| (*n, weight)).collect();
    let merged = merge_low_rank(model, &weights, aggregator)?;
    let rank =
        merged.first().map(|(_, m)| m.down.len_of(0)).context("there is nothing to merge")?;
    let mut target = blank()?;
    let lora = Lora { r: rank, alpha: rank as f64, ..Lora::default() };
    let sites = Targets::names(merged.iter().map(|(path, _)| path.as_str()));
    let mut params = ParamStore::new();
    for (site, m) in merged {
        params.insert(format!("{site}.lora_A.weight"), m.down)?;
        params.insert(format!("{site}.lora_B.weight"), m.up.mul_scalar(m.scale)?)?;
    }
    target.attach_with("merged", Box::new(lora), &sites, &params)?;
    peft::save(&target, "merged", folder)?;
    Ok(())
}
