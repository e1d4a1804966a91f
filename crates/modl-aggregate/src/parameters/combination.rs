//! Σ cᵢ xᵢ: what many methods come to once they know the inner products of the tensors.

use crate::merge::{Blend, Chunk};

/// Σ cᵢ xᵢ ⁄ d over the inputs, in f32. A single input with c = d = 1 comes out bit for bit.
pub(super) fn combination<'a>(coefficients: &[f64], divisor: f64) -> Blend<'a> {
    let terms: Vec<(usize, f32)> = coefficients
        .iter()
        .enumerate()
        .filter(|(_, c)| **c != 0.0)
        .map(|(i, c)| (i, *c as f32))
        .collect();
    let divisor = divisor as f32;
    Box::new(move |chunk: &Chunk, out: &mut [f32]| {
        out.fill(0.0);
        let mut first = true;
        for (i, c) in &terms {
            let x = chunk.of(*i);
            if first {
                out.iter_mut().zip(x).for_each(|(o, x)| *o = c * x);
                first = false;
            } else {
                out.iter_mut().zip(x).for_each(|(o, x)| *o += c * x);
            }
        }
        if divisor != 1.0 {
            out.iter_mut().for_each(|o| *o /= divisor);
        }
    })
}

/// Σ cᵢ (xᵢ − b) + b as coefficients of the inputs.
pub(super) fn around(base: usize, coefficients: &[f64]) -> Vec<f64> {
    let mut all = coefficients.to_vec();
    let others: f64 = all.iter().enumerate().filter(|(i, _)| *i != base).map(|(_, c)| c).sum();
    if let Some(b) = all.get_mut(base) {
        *b = 1.0 - others;
    }
    all
}
