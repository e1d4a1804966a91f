//! Dropout where a backbone has it, with its probability and the seed of its draw.

use modl_core::{Result, Seed, Tensor};

/// Dropout with a probability and the seed of its draw; `None` for none.
pub(crate) type Drop = Option<(f64, Seed)>;

/// x after dropout.
pub(crate) fn dropout(x: Tensor, drop: Drop) -> Result<Tensor> {
    match drop {
        Some((p, seed)) => modl_core::dropout(&x, p, seed),
        None => Ok(x),
    }
}
