//! Barycentric interpolation on the sphere of any number of models (mergekit's `multislerp`).
//!
//! With uᵢ = xᵢ ⁄ ‖xᵢ‖ and the normalised mean m of Σ wᵢuᵢ: the uᵢ are projected on the tangent
//! space at m, averaged there, v = Σ wᵢ(uᵢ − ⟨uᵢ, m⟩m), brought back by m cos ‖v‖ + v sin ‖v‖ ⁄ ‖v‖,
//! and scaled with Σ wᵢ‖xᵢ‖. With a base, xᵢ = θᵢ − θ₀ and the base is added. All of it lies in the
//! span of the xᵢ, and so comes from their inner products.

use modl_core::{Error, Result};

use super::combination::{around, combination};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Barycentric interpolation on the sphere.
#[derive(Debug, Clone, Copy, Default)]
pub struct MultiSlerp;

const SETTINGS: &[Setting] = &[
    Setting::each("weight", "share of the model"),
    Setting::flag("normalize_weights", true, "divide the weights by their sum"),
    Setting::number_or("eps", 1e-8, "added to norms"),
];

impl MergeMethod for MultiSlerp {
    fn spec(&self) -> Spec {
        Spec::new("multislerp", "Barycentre on the sphere", "mergekit")
            .settings(SETTINGS)
            .base(Base::Optional)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let others = group.others();
        let mut weights = settings.each("weight")?;
        let eps = settings.number("eps")?;
        if settings.flag("normalize_weights")? {
            let total: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= total);
        }
        let k = group.inputs.len();
        let over = |values: &dyn Fn(usize) -> f64| {
            let mut all = vec![0.0; k];
            for (n, i) in others.iter().enumerate() {
                if let Some(place) = all.get_mut(*i) {
                    *place = values(n);
                }
            }
            all
        };
        let weight = |n: usize| weights.get(n).copied().unwrap_or_default();
        if others.len() == 1 {
            return Ok(combination(&over(&|_| 1.0), 1.0));
        }
        let gram = group.gram(true)?;
        let norm = |n: usize| others.get(n).map_or(0.0, |i| gram.norm(*i));
        let finish = |c: Vec<f64>| match group.base {
            Some(base) => combination(&around(base, &c), 1.0),
            None => combination(&c, 1.0),
        };
        let mut mean = over(&|n| weight(n) / (norm(n) + eps));
        let mean_norm = gram.dot_of(&mean, &mean).max(0.0).sqrt();
        if mean_norm < eps {
            // Tensors of zeros, or that no model has changed, have no direction to cancel out.
            let none = (0..others.len()).all(|n| norm(n) < eps);
            if others.len() == 2 || none {
                return Ok(finish(over(&weight)));
            }
            return Err(Error::invalid(
                "parameter `weight`",
                "the directions cancel out with these weights; choose others",
            ));
        }
        mean.iter_mut().for_each(|m| *m /= mean_norm);
        // Σ wᵢ⟨uᵢ, m⟩, the part of the average that lies along m.
        let along: f64 = (0..others.len())
            .map(|n| {
                let unit = over(&|other| if other == n { 1.0 / (norm(n) + eps) } else { 0.0 });
                weight(n) * gram.dot_of(&unit, &mean)
            })
            .sum();
        let mut tangent = over(&|n| weight(n) / (norm(n) + eps));
        tangent.iter_mut().zip(&mean).for_each(|(t, m)| *t -= along * m);
        let angle = gram.dot_of(&tangent, &tangent).max(0.0).sqrt() + eps;
        let size: f64 = (0..others.len()).map(|n| weight(n) * norm(n)).sum();
        let result = mean.iter().zip(&tangent);
        let result = result.map(|(m, t)| size * (m * angle.cos() + t * angle.sin() / angle));
        Ok(finish(result.collect()))
    }
}
