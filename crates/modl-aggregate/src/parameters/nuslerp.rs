//! SLERP by weights, of models or of what they changed.
//!
//! t = w₂ ⁄ (w₁ + w₂) (0.5 where the sum is 0), on the whole tensors, or on rows or columns by
//! themselves; with a base model on task vectors: θ₀ + slerp(t, θ₁ − θ₀, θ₂ − θ₀). mergekit's
//! `nuslerp`: `nuslerp_flatten` takes the whole tensor, and without it rows, or columns with
//! `nuslerp_row_wise`.

use modl_core::Result;

use super::combination::{around, combination};
use crate::merge::{Base, Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec};

/// SLERP by weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct NuSlerp;

const SETTINGS: &[Setting] = &[
    Setting::each("weight", "share of the model"),
    Setting::flag("nuslerp_row_wise", false, "along columns, where it is not flattened"),
    Setting::flag("nuslerp_flatten", true, "along the whole tensor"),
];

impl MergeMethod for NuSlerp {
    fn spec(&self) -> Spec {
        Spec::new("nuslerp", "SLERP by weights", "mergekit")
            .settings(SETTINGS)
            .base(Base::Optional)
            .models(2..=2)
            .by_rows()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let weights = settings.each("weight")?;
        let total: f64 = weights.iter().sum();
        let second = weights.get(1).copied().unwrap_or_default();
        let t = if total.abs() < 1e-6 { 0.5 } else { second / total };
        let others = group.others();
        let [a, b] = others.as_slice() else { return Ok(combination(&[], 1.0)) };
        let (a, b, base) = (*a, *b, group.base);
        if settings.flag("nuslerp_flatten")? {
            let gram = group.gram(true)?;
            let (x, y) = on_arc(t, gram.norm(a), gram.norm(b), gram.dot(a, b));
            let mut c = vec![0.0; group.inputs.len()];
            for (i, value) in [(a, x), (b, y)] {
                if let Some(place) = c.get_mut(i) {
                    *place = value;
                }
            }
            return Ok(combination(&base.map_or_else(|| c.clone(), |base| around(base, &c)), 1.0));
        }
        if settings.flag("nuslerp_row_wise")? && group.shape.len() > 1 {
            return columns(group, t, a, b);
        }
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            let less = base.map(|base| chunk.of(base));
            for (n, out) in out.chunks_mut(chunk.row).enumerate() {
                let at = n * chunk.row;
                let part = |x: &[f32]| -> Vec<f64> {
                    let row = x.get(at..at + out.len()).unwrap_or_default();
                    let low = less.and_then(|b| b.get(at..at + out.len()));
                    let low = |i: usize| low.and_then(|b| b.get(i)).copied().unwrap_or_default();
                    row.iter().enumerate().map(|(i, x)| f64::from(x - low(i))).collect()
                };
                let (p, q) = (part(chunk.of(a)), part(chunk.of(b)));
                let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
                let (x, y) = on_arc(t, dot(&p, &p).sqrt(), dot(&q, &q).sqrt(), dot(&p, &q));
                for (i, (o, (p, q))) in out.iter_mut().zip(p.iter().zip(&q)).enumerate() {
                    let low = less.and_then(|b| b.get(at + i)).copied().unwrap_or_default();
                    *o = low + (x * p + y * q) as f32;
                }
            }
        }))
    }
}

/// Each column by itself.
fn columns<'a>(group: &'a Group, t: f64, a: usize, b: usize) -> Result<Blend<'a>> {
    let row = group.shape.last().copied().unwrap_or(1);
    let base = group.base;
    let difference = move |chunk: &Chunk, i: usize, n: usize| {
        let low = base.and_then(|base| chunk.of(base).get(n)).copied().unwrap_or_default();
        chunk.of(i).get(n).map_or(0.0, |x| f64::from(x - low))
    };
    let sums = group.sums(3 * row, |chunk, sums| {
        for n in 0..chunk.len() {
            let (p, q) = (difference(chunk, a, n), difference(chunk, b, n));
            if let Some([pp, qq, pq]) = sums.get_mut(3 * (n % row)..3 * (n % row) + 3) {
                *pp += p * p;
                *qq += q * q;
                *pq += p * q;
            }
        }
    })?;
    let ends: Vec<(f64, f64)> = sums
        .chunks(3)
        .map(|s| match s {
            [pp, qq, pq] => on_arc(t, pp.sqrt(), qq.sqrt(), *pq),
            _ => (1.0 - t, t),
        })
        .collect();
    Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
        for (n, o) in out.iter_mut().enumerate() {
            let low = base.and_then(|base| chunk.of(base).get(n)).copied().unwrap_or_default();
            let (x, y) = ends.get(n % row).copied().unwrap_or_default();
            let mixed = x * difference(chunk, a, n) + y * difference(chunk, b, n);
            *o = low + mixed as f32;
        }
    }))
}

/// The coefficients of both ends; linear where they are on one line.
fn on_arc(t: f64, from: f64, to: f64, dot: f64) -> (f64, f64) {
    let cosine = (dot / (from.max(1e-7) * to.max(1e-7))).clamp(-1.0, 1.0);
    // What mergekit's (1 − cos²) ≤ 1e-16 comes to in f32, in which it computes.
    if 1.0 - cosine * cosine <= f64::from(f32::EPSILON) {
        return (1.0 - t, t);
    }
    let angle = cosine.acos();
    (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin())
}
