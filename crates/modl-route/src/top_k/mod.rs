//! Sparse routing: the modules with the largest scores (survey §4.2.3).

mod capacity;
mod deepseek;
mod expert_choice;
mod gshard;
mod hierarchical;
mod noisy;
mod plain;
mod product_key;
mod prompt_pool;
mod st_moe;
mod switch;
pub(crate) mod ties;

pub use capacity::{Capacity, Fill, Over};
pub use deepseek::{DeepSeek, Scoring};
pub use expert_choice::ExpertChoice;
pub use gshard::GShard;
pub use hierarchical::Hierarchical;
pub use noisy::{NoisyTopK, Variant};
pub use plain::TopK;
pub use product_key::ProductKey;
pub use prompt_pool::PromptPool;
pub use st_moe::StMoe;
pub use switch::Switch;

use modl_core::{Error, Init, Registry, Result, Seed, Tensor};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<TopK>("Top-k of a softmax", "Shazeer et al. 2017", "4.2.3")?;
    r.register::<NoisyTopK>("Top-k of noisy scores", "Shazeer et al. 2017", "4.2.3")?;
    r.register::<GShard>("Top-2 with capacity", "Lepikhin et al. 2020", "4.2.3")?;
    r.register::<Switch>("Top-1 with capacity", "Fedus, Zoph, Shazeer 2022", "4.2.3")?;
    r.register::<StMoe>("Top-2 with z-loss", "Zoph et al. 2022", "4.2.3")?;
    r.register::<DeepSeek>("Top-k with balancing biases", "Wang et al. 2024", "4.2.3")?;
    r.register::<ExpertChoice>("Modules choose tokens", "Zhou et al. 2022", "4.2.3")?;
    r.register::<ProductKey>("Product keys, for many modules", "Lample et al. 2019", "4.2.3")?;
    r.register::<Hierarchical>("Groups, then modules", "Shazeer et al. 2017", "4.2.3")?;
    r.register::<PromptPool>("Prompts by learned keys", "Wang et al. 2022, L2P", "4.2.3")?;
    Ok(())
}

/// Checks that of `modules` modules `k` can be chosen; `key` is what the setting is called.
pub(crate) fn check_k(key: &str, k: usize, modules: usize) -> Result<()> {
    if (1..=modules).contains(&k) {
        return Ok(());
    }
    Err(Error::invalid(key, format!("is {k}, there are {modules} modules to choose from")))
}

/// Checks that a setting is a number, 0 or above.
pub(crate) fn check_not_negative(key: &str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::invalid(key, "is to be 0 or above"))
}

/// Uniform numbers in `[0, 1)` in the shape of `like`.
pub(crate) fn uniform_like(like: &Tensor, seed: Seed) -> Result<Tensor> {
    Init::Uniform(0.5).tensor(&like.size(), seed, like.kind(), like.device())?.add_scalar(0.5)
}
