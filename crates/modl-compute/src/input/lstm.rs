//! A bidirectional LSTM over a short sequence (Hochreiter and Schmidhuber 1997; Schuster and Paliwal
//! 1997), with PyTorch's names and order of gates.
//!
//! i, f, g, o = W_ih xₜ + b_ih + W_hh hₜ₋₁ + b_hh; cₜ = σ(f) ⊙ cₜ₋₁ + σ(i) ⊙ tanh g;
//! hₜ = σ(o) ⊙ tanh cₜ, with h and c of 0 before the first step.

use modl_core::{Error, Result, Tensor, Tensors};

/// The four tensors of each layer and direction.
const PARTS: [&str; 4] = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];

/// The second direction's ending.
const REVERSE: &str = "_reverse";

/// Names and shapes of an LSTM of `layers` from `input` to `hidden` in each direction.
pub(super) fn shapes(layers: i64, input: i64, hidden: i64) -> Vec<(String, Vec<i64>)> {
    let mut all = Vec::new();
    let gates = hidden.saturating_mul(4);
    for layer in 0..layers {
        let input = if layer == 0 { input } else { hidden.saturating_mul(2) };
        for direction in ["", REVERSE] {
            for part in PARTS {
                let shape = match part {
                    "weight_ih" => vec![gates, input],
                    "weight_hh" => vec![gates, hidden],
                    _ => vec![gates],
                };
                all.push((format!("{part}_l{layer}{direction}"), shape));
            }
        }
    }
    all
}

/// x `[seq, input]` → `[seq, 2 · hidden]` by the tensors whose names start with `prefix`; `between`
/// is applied to what one layer gives to the next.
pub(super) fn bidirectional(
    x: &Tensor,
    phi: &Tensors,
    prefix: &str,
    between: impl Fn(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut x = x.clone();
    let mut layer = 0;
    while phi.get(&format!("{prefix}weight_ih_l{layer}")).is_some() {
        if layer > 0 {
            x = between(&x, layer)?;
        }
        let part = |direction: &str| {
            let get = |part: &str| phi.need(&format!("{prefix}{part}_l{layer}{direction}"));
            let [ih, hh, b_ih, b_hh] = PARTS;
            one_way(&x, [get(ih)?, get(hh)?, get(b_ih)?, get(b_hh)?], direction == REVERSE)
        };
        x = Tensor::cat(&[part("")?, part(REVERSE)?], 1)?;
        layer += 1;
    }
    match layer {
        0 => Err(Error::unknown("tensor", format!("{prefix}weight_ih_l0").as_str(), phi.names())),
        _ => Ok(x),
    }
}

fn one_way(x: &Tensor, [ih, hh, b_ih, b_hh]: [&Tensor; 4], reverse: bool) -> Result<Tensor> {
    let (steps, hidden) = (x.len_of(0), hh.len_of(1));
    let inputs = x.linear(ih, Some(b_ih))?;
    let mut h = Tensor::zeros(&[1, hidden], x.kind(), x.device())?;
    let mut c = h.clone();
    let mut states = Vec::with_capacity(steps as usize);
    for step in 0..steps {
        let at = if reverse { steps - 1 - step } else { step };
        let gates = inputs.narrow(0, at, 1)?.add(&h.linear(hh, Some(b_hh))?)?;
        let gate = |n: i64| gates.narrow(1, n * hidden, hidden);
        let kept = gate(1)?.sigmoid()?.mul(&c)?;
        c = kept.add(&gate(0)?.sigmoid()?.mul(&gate(2)?.tanh()?)?)?;
        h = gate(3)?.sigmoid()?.mul(&c.tanh()?)?;
        states.push(h.clone());
    }
    if reverse {
        states.reverse();
    }
    Tensor::cat(&states, 0)
}
