//! Spherical linear interpolation between a base and another model, tensor by tensor.
//!
//! θ = sin((1−t)Ω)⁄sin Ω · θ₀ + sin(tΩ)⁄sin Ω · θ₁, where cos Ω is the cosine of the whole tensors
//! (Shoemake 1985); θ₀ is the base. Linear where |cos Ω| > 0.9995. t = 0 and t = 1 give the models bit
//! for bit.

use modl_core::Result;

use super::combination::combination;
use crate::merge::{Base, Blend, Gram, Group, MergeMethod, Setting, Settings, Spec};

/// Interpolation along the arc.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slerp;

const SETTINGS: &[Setting] = &[Setting::number("t", "0 gives the base, 1 the other model")];

impl MergeMethod for Slerp {
    fn spec(&self) -> Spec {
        Spec::new("slerp", "Along the arc between two models", "Shoemake 1985")
            .settings(SETTINGS)
            .base(Base::Required)
            .models(1..=1)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let base = group.need_base()?;
        let (a, b) = on_arc(settings.number("t")?, &group.gram(false)?, base, 1 - base);
        let mut coefficients = vec![0.0; 2];
        for (i, c) in [(base, a), (1 - base, b)] {
            if let Some(place) = coefficients.get_mut(i) {
                *place = c;
            }
        }
        Ok(combination(&coefficients, 1.0))
    }
}

/// The coefficients of both ends.
fn on_arc(t: f64, gram: &Gram, from: usize, to: usize) -> (f64, f64) {
    if t == 0.0 || t == 1.0 {
        return (1.0 - t, t);
    }
    let norm = |i: usize| Some(gram.norm(i)).filter(|n| *n > 1e-8).unwrap_or(1.0);
    let cosine = (gram.dot(from, to) / (norm(from) * norm(to))).clamp(-1.0, 1.0);
    if cosine.abs() > 0.9995 {
        return (1.0 - t, t);
    }
    let angle = cosine.acos();
    (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin())
}
