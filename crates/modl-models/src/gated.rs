//! The gated feed-forward network of Llama and of experts that all tokens share.

use modl_core::{Activation, Result, SiteKind, Tensor};

use crate::place::{Pass, Place, Surveyor};

/// down(σ(gate x) · up x).
#[derive(Debug)]
pub(crate) struct Gated {
    gate: Place,
    up: Place,
    down: Place,
    act: Activation,
}

impl Gated {
    /// The network at `path`, `inner` wide within.
    pub(crate) fn new(
        to: &mut Surveyor,
        path: &str,
        [width, inner]: [i64; 2],
        act: Activation,
    ) -> Self {
        let mut place = |name: &str, input, output| {
            to.place(&format!("{path}.{name}"), SiteKind::Linear, input, output)
        };
        Gated {
            gate: place("gate_proj", width, inner),
            up: place("up_proj", width, inner),
            down: place("down_proj", inner, width),
            act,
        }
    }

    /// x `[…, width]`, of the same shape.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let gate = self.gate.linear_then(x, pass, self.act)?;
        self.down.linear(&gate.mul(&self.up.linear(x, pass)?)?, pass)
    }
}
