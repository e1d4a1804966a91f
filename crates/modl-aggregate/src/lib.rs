#![doc = include_str!("../README.md")]

pub mod adapters;
mod attention;
mod average;
mod changes;
mod concat;
pub mod connectivity;
pub mod exchangeable;
mod factors;
mod function;
mod input;
pub mod merge;
pub mod mergekit;
mod multi_head;
mod offline;
mod outputs;
pub mod parameters;
mod per_module;
pub mod rebasin;
pub mod search;
pub mod soups;
mod stack;
pub mod statistics;
mod unchanged;
mod weighted_sum;

pub use attention::{
    Asks, Falling, Fusion, ModuleAttention, QuerySource, Temperature, ValueStart, load_fusion,
    save_fusion,
};
pub use average::Average;
pub use concat::Concat;
pub use factors::Factors;
pub use function::{Compose, Composition, Graph, Join, Node, Tree, run_trees};
pub use input::{Attempt, AttemptForm, PromptConcat, nearest_prompts, start_from_prompt};
pub use multi_head::MultiHead;
pub use offline::merge_low_rank;
pub use outputs::{
    AdapterSoup, BayesianMixture, Ensemble, EnsembleOf, Gate, Gated, Prior, ScalarMix, scalar_mix,
};
pub use stack::Stack;
pub use weighted_sum::WeightedSum;

use modl_core::{Registry, Result};

/// Adds the aggregators of this crate to a registry.
///
/// # Errors
/// Where one of their names is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.aggregators;
    r.register::<WeightedSum>("Sum of outputs", "Shazeer et al. 2017", "5.2")?;
    r.register::<Average>("Average of parameters", "Wortsman et al. 2022", "5.1")?;
    r.register::<Concat>("Exact sum of low-rank changes", "PEFT's `cat`", "5.1")?;
    r.register::<MultiHead>("Average part by part", "Page-Caccia et al. 2023", "5.1")?;
    r.register::<Factors>("Average factor by factor", "Wang et al. 2022, AdaMix", "5.1")?;
    r.register::<Stack>("One module on the other", "Pfeiffer et al. 2020, MAD-X", "5.3")?;
    outputs::register(r)?;
    attention::register(r)?;
    input::register(r)?;
    function::register(r)
}
