#![doc = include_str!("../README.md")]

mod dropout;
pub mod function;
pub mod hyper;
pub mod input;
pub mod low_rank;
mod patterns;
pub mod peft;
pub mod sparse;

use modl_core::{Registry, Result};

pub use function::{Bottleneck, BottleneckInit, Residual, Scaling};
pub use low_rank::{Boft, FourierFt, Intrinsic, Loha, Lokr, LokrInit, Lora, LoraInit, Oft};
pub use patterns::Patterns;

/// Adds the modules of this crate.
///
/// # Errors
/// Where a name is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.modules;
    low_rank::register(r)?;
    sparse::register(r)?;
    input::register(r)?;
    function::register(r)?;
    hyper::register(r)
}
