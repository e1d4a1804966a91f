//! Non-linearities by the names that transformers gives them.

use serde::{Deserialize, Serialize};

use crate::{Result, Tensor};

/// An element-wise non-linearity σ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// x Φ(x) by the error function.
    Gelu,
    /// x Φ(x) approximated by tanh.
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluNew,
    /// x·σ(x); also called `silu`.
    #[serde(alias = "silu")]
    Swish,
    /// tanh x.
    Tanh,
    /// 1 ⁄ (1 + e⁻ˣ).
    Sigmoid,
}

impl Activation {
    /// σ(x).
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Relu => x.relu(),
            Activation::Gelu => x.gelu(),
            Activation::GeluNew => x.gelu_tanh(),
            Activation::Swish => x.silu(),
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => x.sigmoid(),
        }
    }
}
