#![doc = include_str!("../README.md")]

mod balanced;
mod fixed;
mod hard;
mod losses;
mod post_hoc;
mod scores;
mod soft;
pub mod stats;
mod task;
mod top_k;

pub use balanced::*;
pub use fixed::*;
pub use hard::*;
pub use post_hoc::*;
pub use scores::{Input, Scores};
pub use soft::*;
pub use stats::{Mittal, RoutingStats};
pub use task::*;
pub use top_k::*;

use modl_core::{Registry, Result};

/// Adds the routers of this crate to a registry.
///
/// # Errors
/// Where one of their names is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    balanced::register(r)?;
    fixed::register(r)?;
    hard::register(r)?;
    post_hoc::register(r)?;
    soft::register(r)?;
    task::register(r)?;
    top_k::register(r)
}
