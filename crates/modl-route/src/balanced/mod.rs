//! Balanced routing: in training the tokens of a batch are shared out evenly, without a loss that has
//! to be weighed (survey §4.2.2). In evaluation each token goes where it wants to.
//!
//! Who gets a place depends on the whole batch, later tokens included. That is so in training alone,
//! and so these routers do not [look ahead](modl_core::Router::looks_ahead) in the sense of refusing
//! decoders: BASE and S-BASE were made for language models.

mod assignment;
mod base;
mod sinkhorn;

pub use assignment::balanced_assignment;
pub use base::Base;
pub use sinkhorn::Sinkhorn;

use modl_core::{Kind, Registry, Result, Tensor};

use crate::scores::Scored;

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Base>("BASE: balanced assignment", "Lewis et al. 2021", "4.2.2")?;
    r.register::<Sinkhorn>("S-BASE: Sinkhorn's balanced plan", "Clark et al. 2022", "4.2.2")?;
    Ok(())
}

/// The scores of what is real, without their graph: padding takes no places.
struct Places {
    /// `[n, modules]`.
    scores: Tensor,
    /// Which units they are of, `[n]`; `None` where all are real.
    real: Option<Tensor>,
    /// The shape of all scores.
    shape: Vec<i64>,
}

impl Places {
    fn of(scored: &Scored) -> Result<Places> {
        let shape = scored.logits.size();
        let m = scored.logits.len_of(-1);
        let units = scored.logits.numel() as i64 / m.max(1);
        let scores = scored.logits.detach()?.reshape(&[units, m])?;
        let Some(mask) = &scored.mask else { return Ok(Places { scores, real: None, shape }) };
        let mask = mask.to_kind(Kind::Double)?.to_vec::<f64>()?;
        let real: Vec<i64> =
            (0..).zip(&mask).filter(|(_, real)| **real != 0.0).map(|(unit, _)| unit).collect();
        let real = Tensor::from_slice(&real, &[real.len() as i64], scores.device())?;
        Ok(Places { scores: scores.index_select(0, &real)?, real: Some(real), shape })
    }

    /// Choices for what is real, `[n, k]`, as choices for all units, `[…, k]`.
    fn spread(&self, index: &Tensor) -> Result<Tensor> {
        let k = index.len_of(-1);
        let mut shape = self.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = k;
        }
        match &self.real {
            None => index.reshape(&shape),
            Some(real) => Tensor::zeros(&shape, Kind::Int64, index.device())?
                .reshape(&[-1, k])?
                .index_copy(0, real, index)?
                .reshape(&shape),
        }
    }
}

/// Choices `[…, k]` without those for padding, which are −1.
fn without_padding(index: Tensor, scored: &Scored) -> Result<Tensor> {
    match &scored.mask {
        None => Ok(index),
        Some(mask) => index.masked_fill(&mask.eq_scalar(0.0)?.unsqueeze(-1)?, -1.0),
    }
}

/// Numbers `[…, modules]` at choices `[…, k]`, of which some are −1.
fn at(numbers: &Tensor, index: &Tensor) -> Result<Tensor> {
    let first = Tensor::zeros(&[1], Kind::Int64, index.device())?;
    numbers.gather(-1, &index.maximum(&first)?)
}
