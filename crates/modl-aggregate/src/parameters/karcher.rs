//! The Karcher mean: the point of the sphere with the least squared distance along arcs to all
//! models' directions, with the mean of their norms.
//!
//! From m = Σ uᵢ ⁄ ‖·‖, at most `max_iter` times: v = (1⁄n) Σ θᵢ⁄sin θᵢ (uᵢ − ⟨uᵢ, m⟩ m) with
//! θᵢ = arccos ⟨uᵢ, m⟩, then m ← m cos ‖v‖ + v sin ‖v‖ ⁄ ‖v‖, until ‖v‖ < `tol` (Karcher 1977;
//! arXiv 2603.04972). All of it lies in the span of the models, and so comes from their inner products.

use modl_core::Result;

use super::combination::combination;
use crate::merge::{Blend, Group, MergeMethod, Setting, Settings, Spec};

/// The mean on the sphere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Karcher;

const SETTINGS: &[Setting] = &[
    Setting::number_or("max_iter", 10.0, "steps at most"),
    Setting::number_or("tol", 1e-5, "the length of a step that is small enough"),
];

impl MergeMethod for Karcher {
    fn spec(&self) -> Spec {
        Spec::new("karcher", "Mean on the sphere", "Karcher 1977").settings(SETTINGS)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let k = group.inputs.len();
        if k == 1 {
            return Ok(combination(&[1.0], 1.0));
        }
        let (steps, tol) = (settings.number("max_iter")?, settings.number("tol")?);
        let gram = group.gram(false)?;
        let size = (0..k).map(|i| gram.norm(i)).sum::<f64>() / k as f64;
        let valid: Vec<usize> = (0..k).filter(|i| gram.norm(*i) > tol).collect();
        let Some(first) = valid.first() else { return Ok(combination(&[], 1.0)) };
        let share = 1.0 / valid.len() as f64;
        let unit = |i: usize| -> Vec<f64> {
            (0..k).map(|j| if i == j { 1.0 / gram.norm(i) } else { 0.0 }).collect()
        };
        let length = |c: &[f64]| gram.dot_of(c, c).max(0.0).sqrt();
        let mut mean = vec![0.0; k];
        valid.iter().for_each(|i| add(&mut mean, share, &unit(*i)));
        match length(&mean) {
            n if n < tol => mean = unit(*first),
            n => mean.iter_mut().for_each(|m| *m /= n),
        }
        for _ in 0..steps.max(0.0) as u64 {
            let mut tangent = vec![0.0; k];
            for i in &valid {
                let unit = unit(*i);
                let cosine = gram.dot_of(&mean, &unit).clamp(-1.0, 1.0);
                let angle = cosine.acos();
                if angle >= tol {
                    let factor = share * angle / angle.sin();
                    add(&mut tangent, factor, &unit);
                    add(&mut tangent, -factor * cosine, &mean);
                }
            }
            let step = length(&tangent);
            if step < tol {
                break;
            }
            mean.iter_mut().for_each(|m| *m *= step.cos());
            add(&mut mean, step.sin() / step, &tangent);
            let n = length(&mean);
            if n > tol {
                mean.iter_mut().for_each(|m| *m /= n);
            }
        }
        mean.iter_mut().for_each(|m| *m *= size);
        Ok(combination(&mean, 1.0))
    }
}

/// a ← a + s b.
fn add(a: &mut [f64], s: f64, b: &[f64]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += s * b);
}
