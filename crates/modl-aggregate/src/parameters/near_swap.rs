//! NearSwap: takes the other model's number where both are near, and moves towards it elsewhere.
//!
//! θ = w θ₁ + (1 − w) θ₀ with w = clamp(t ⁄ |θ₁ − θ₀|, 0, 1): no number moves by more than t
//! (mergekit's `nearswap`, by alchemonaut).

use modl_core::Result;

use crate::merge::{Base, Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec};

/// Moves by t at most.
#[derive(Debug, Clone, Copy, Default)]
pub struct NearSwap;

const SETTINGS: &[Setting] = &[Setting::number("t", "how far a number may move")];

impl MergeMethod for NearSwap {
    fn spec(&self) -> Spec {
        Spec::new("nearswap", "Moves no number by more than t", "mergekit")
            .settings(SETTINGS)
            .base(Base::Required)
            .models(1..=1)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let (base, t) = (group.need_base()?, settings.number("t")? as f32);
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            for (o, (a, b)) in out.iter_mut().zip(chunk.of(base).iter().zip(chunk.of(1 - base))) {
                let w = (t / (a - b).abs().max(1e-6)).clamp(0.0, 1.0);
                *o = w * b + (1.0 - w) * a;
            }
        }))
    }
}
