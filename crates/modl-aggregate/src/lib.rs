#![doc = include_str!("../README.md")]

mod average;
mod concat;
mod offline;
mod unchanged;
mod weighted_sum;

pub use average::Average;
pub use concat::Concat;
pub use offline::merge_low_rank;
pub use weighted_sum::WeightedSum;

use modl_core::{AggregatorConfig, Entry, Registry, Result};
use serde::de::DeserializeOwned;

/// Adds the aggregators of this crate to a registry.
///
/// # Errors
/// Where one of their names is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    r.aggregators.add(entry::<WeightedSum>("Sum of outputs", "Shazeer et al. 2017", "5.2"))?;
    r.aggregators.add(entry::<Average>("Average of parameters", "Wortsman et al. 2022", "5.1"))?;
    r.aggregators.add(entry::<Concat>("Exact sum of low-rank changes", "PEFT's `cat`", "5.1"))
}

fn entry<C>(
    title: &'static str,
    citation: &'static str,
    section: &'static str,
) -> Entry<dyn AggregatorConfig>
where
    C: AggregatorConfig + DeserializeOwned + Default + 'static,
{
    Entry {
        name: C::default().kind(),
        title,
        citation,
        section,
        parse: |config| {
            let method = C::default().kind();
            Ok(Box::new(Entry::<dyn AggregatorConfig>::read::<C>(method, config)?))
        },
    }
}

/// A configuration as in recipes.
fn to_json(config: &(impl AggregatorConfig + serde::Serialize)) -> Result<serde_json::Value> {
    serde_json::to_value(config)
        .map_err(|e| modl_core::Error::invalid(config.kind(), e.to_string()))
}
