#![doc = include_str!("../README.md")]

mod fixed;
mod scores;
mod soft;
mod stats;
mod top_k;
mod uniform;

pub use fixed::{Choice, Fixed};
pub use scores::{Input, Scores};
pub use soft::Soft;
pub use stats::RoutingStats;
pub use top_k::TopK;
pub use uniform::Uniform;

use modl_core::{Entry, Registry, Result, RouterConfig};
use serde::de::DeserializeOwned;

/// Adds the routers of this crate to a registry.
///
/// # Errors
/// Where one of their names is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    r.routers.add(entry::<Fixed>(
        "By task, or a fixed set",
        "Pfeiffer et al. 2020, MAD-X",
        "4.1",
    ))?;
    r.routers.add(entry::<Uniform>("All modules alike", "a control", "4.1"))?;
    r.routers.add(entry::<Soft>("Softmax over all modules", "Jacobs et al. 1991", "4.2.3"))?;
    r.routers.add(entry::<TopK>("Top-k of a softmax", "Shazeer et al. 2017", "4.2.2"))
}

fn entry<C>(
    title: &'static str,
    citation: &'static str,
    section: &'static str,
) -> Entry<dyn RouterConfig>
where
    C: RouterConfig + DeserializeOwned + Default + 'static,
{
    Entry {
        name: C::default().kind(),
        title,
        citation,
        section,
        parse: |config| {
            let method = C::default().kind();
            Ok(Box::new(Entry::<dyn RouterConfig>::read::<C>(method, config)?))
        },
    }
}

/// A configuration as in recipes.
fn to_json(config: &(impl RouterConfig + serde::Serialize)) -> Result<serde_json::Value> {
    serde_json::to_value(config)
        .map_err(|e| modl_core::Error::invalid(config.kind(), e.to_string()))
}
