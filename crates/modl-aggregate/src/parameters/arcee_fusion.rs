//! Arcee fusion: takes from the other model the numbers that matter most, and leaves the rest.
//!
//! Importance = |θ₁ − θ₀| · KL(softmax(θ₁) ‖ softmax(θ₀)), the divergence row by row (the last
//! dimension); what lies at median + 1.5 (q₃ − q₁) of the tensor or above is taken (Tukey's fence;
//! mergekit's `arcee_fusion`). mergekit estimates the quartiles of tensors of more than a million
//! numbers from a random sample; here they are exact.

use modl_core::{Error, Result};

use crate::merge::{Base, Blend, Chunk, Group, MergeMethod, Settings, Spec, Ties, largest};

/// Takes what matters most.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArceeFusion;

impl MergeMethod for ArceeFusion {
    fn spec(&self) -> Spec {
        Spec::new("arcee_fusion", "Takes the changes that matter most", "arcee.ai")
            .base(Base::Required)
            .models(1..=1)
            .selects()
            .by_rows()
    }

    fn prepare<'a>(&self, group: &'a Group, _: &Settings) -> Result<Blend<'a>> {
        let (base, n) = (group.need_base()?, group.len());
        if n == 0 {
            return Ok(Box::new(|_, _| {}));
        }
        // The number at place q (n − 1), rounded down, of those in order.
        let from_top = [0.25, 0.5, 0.75].map(|q| n - (q * (n - 1) as f64) as usize);
        let rank = move |chunk: &Chunk, _: usize, out: &mut [f32]| importance(chunk, base, out);
        let found = largest(group, &from_top, Ties::First, rank)?;
        let [q1, median, q3] = found.as_slice() else {
            return Err(Error::invalid(group.name, "has no quartiles"));
        };
        let (q1, median, q3) = (q1.least(), median.least(), q3.least());
        let fence = median + 1.5 * (q3 - q1);
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            importance(chunk, base, out);
            for (o, (a, b)) in out.iter_mut().zip(chunk.of(base).iter().zip(chunk.of(1 - base))) {
                *o = if *o >= fence { a + (b - a) } else { *a };
            }
        }))
    }
}

/// Σ p log(p ⁄ q) of a row, times |difference|.
fn importance(chunk: &Chunk, base: usize, out: &mut [f32]) {
    const EPS: f64 = 1e-8;
    for (n, out) in out.chunks_mut(chunk.row.max(1)).enumerate() {
        let at = n * chunk.row..n * chunk.row + out.len();
        let row = |i: usize| chunk.of(i).get(at.clone()).unwrap_or_default();
        let (base, other) = (row(base), row(1 - base));
        let (p, q) = (softmax(other), softmax(base));
        let terms = p.iter().zip(&q).map(|(p, q)| (p + EPS) * ((p + EPS) / (q + EPS)).ln());
        let divergence = terms.sum::<f64>() as f32;
        for (o, (a, b)) in out.iter_mut().zip(base.iter().zip(other)) {
            *o = (b - a).abs() * divergence;
        }
    }
}

fn softmax(x: &[f32]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = x.iter().map(|x| f64::from(x - largest).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}
