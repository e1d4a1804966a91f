//! The reward of a choice, from the loss that came of it.

use modl_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// What a router that learns from rewards is to have more of.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reward {
    /// `neg_loss`: R = −loss.
    #[default]
    NegLoss,
    /// `{ below = c }`: R = 1 where the loss is below c and −1 elsewhere. With the cross entropy and
    /// c = ln 2 a row with R = 1 is classified correctly.
    Below(f64),
}

impl Reward {
    /// R of each row, of its loss.
    pub(crate) fn of(self, loss: &Tensor) -> Result<Tensor> {
        match self {
            Reward::NegLoss => loss.neg(),
            Reward::Below(c) => {
                loss.lt_scalar(c)?.to_kind(loss.kind())?.mul_scalar(2.0)?.add_scalar(-1.0)
            }
        }
    }
}
