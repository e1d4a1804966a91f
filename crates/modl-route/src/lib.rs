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

use modl_core::{Registry, Result};

/// Adds the routers of this crate to a registry.
///
/// # Errors
/// Where one of their names is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Fixed>("By task, or a fixed set", "Pfeiffer et al. 2020, MAD-X", "4.1")?;
    r.register::<Uniform>("All modules alike", "a control", "4.1")?;
    r.register::<Soft>("Softmax over all modules", "Jacobs et al. 1991", "4.2.3")?;
    r.register::<TopK>("Top-k of a softmax", "Shazeer et al. 2017", "4.2.3")
}
