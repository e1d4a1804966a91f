//! Model stock: between the base and the average of the models, as far as their directions agree.
//!
//! θ = t θ̄ + (1 − t) θ₀ with t = N cos θ ⁄ (1 + (N − 1) cos θ), where cos θ is the mean cosine of the
//! pairs of task vectors (Jang, Yun, Han 2024, arXiv 2403.19522): for whole tensors, or row by row with
//! `filter_wise`.

use modl_core::Result;

use super::combination::combination;
use crate::merge::{Base, Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec};

/// Between the base and the average.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelStock;

const SETTINGS: &[Setting] = &[Setting::flag("filter_wise", false, "each row by itself")];

impl MergeMethod for ModelStock {
    fn spec(&self) -> Spec {
        Spec::new("model_stock", "Towards the average, as far as models agree", "Jang et al. 2024")
            .settings(SETTINGS)
            .base(Base::Required)
            .models(2..=usize::MAX)
            .by_rows()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let (base, others) = (group.need_base()?, group.others());
        if !settings.flag("filter_wise")? {
            let gram = group.gram(true)?;
            let t = ratio(&others, |i, j| gram.dot(i, j));
            let share = t / others.len() as f64;
            let all = 0..group.inputs.len();
            let c: Vec<f64> = all.map(|i| if i == base { 1.0 - t } else { share }).collect();
            return Ok(combination(&c, 1.0));
        }
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            for (n, out) in out.chunks_mut(chunk.row).enumerate() {
                let at = n * chunk.row..n * chunk.row + out.len();
                let row = |i: usize| chunk.of(i).get(at.clone()).unwrap_or_default();
                let less = row(base);
                let t = ratio(&others, |i, j| crate::merge::inner(row(i), row(j), Some(less)));
                for (x, o) in out.iter_mut().enumerate() {
                    let value = |i: usize| row(i).get(x).map_or(0.0, |v| f64::from(*v));
                    let mean = others.iter().map(|i| value(*i)).sum::<f64>() / others.len() as f64;
                    *o = (t * mean + (1.0 - t) * value(base)) as f32;
                }
            }
        }))
    }
}

/// t of the inner products of task vectors.
fn ratio(others: &[usize], dot: impl Fn(usize, usize) -> f64) -> f64 {
    let norms: Vec<f64> = others.iter().map(|i| dot(*i, *i).max(0.0).sqrt()).collect();
    let (mut sum, mut pairs) = (0.0, 0.0);
    for (n, (i, a)) in others.iter().zip(&norms).enumerate() {
        for (j, b) in others.iter().zip(&norms).skip(n + 1) {
            sum += (dot(*i, *j) / (a * b).max(1e-6)).clamp(-1.0, 1.0);
            pairs += 1.0;
        }
    }
    let (cosine, count) = (sum / pairs, others.len() as f64);
    let denominator = 1.0 + (count - 1.0) * cosine;
    // Opposing models say nothing about a direction: the base stays.
    if denominator.abs() < 1e-6 { 0.0 } else { count * cosine / denominator }
}
