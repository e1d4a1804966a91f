//! SCE: select, calculate, erase.
//!
//! Of the task vectors τᵢ = θᵢ − θ₀ the places with the largest variance over the models are kept (a
//! share `select_topk` of those where it is not 0); a model's weight is the mean square of what it
//! keeps, over the sum of all; numbers against the sign of the sum are erased; θ = θ₀ +
//! Σ wᵢτᵢ ⁄ Σ wᵢ over what is left (Wan et al. 2024, FuseChat, arXiv 2408.07990).

use modl_core::Result;

use crate::merge::{
    Base, Blend, Chunk, Group, Largest, MergeMethod, Setting, Settings, Spec, Ties, largest,
};

/// Select, calculate, erase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sce;

const SETTINGS: &[Setting] = &[
    Setting::number_or("select_topk", 1.0, "share of the places to keep"),
    Setting::flag("int8_mask", false, "changes nothing here; mergekit saves memory with it"),
];

impl MergeMethod for Sce {
    fn spec(&self) -> Spec {
        Spec::new("sce", "Select, calculate, erase", "Wan et al. 2024")
            .settings(SETTINGS)
            .base(Base::Required)
            .selects()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let (base, others) = (group.need_base()?, group.others());
        let share = settings.number("select_topk")?;
        let ranked = others.clone();
        let rank = move |chunk: &Chunk, _: usize, out: &mut [f32]| {
            variance(chunk, base, &ranked, out);
        };
        let selected = if share < 1.0 {
            let changing = group.sums(1, |chunk, sum| {
                let mut values = vec![0.0; chunk.len()];
                rank(chunk, 0, &mut values);
                let count = values.iter().filter(|v| **v != 0.0).count();
                sum.iter_mut().for_each(|s| *s += count as f64);
            })?;
            let k = changing.first().copied().unwrap_or_default() * share.max(0.0);
            largest(group, &[k as usize], Ties::First, rank)?.pop()
        } else {
            None
        };
        let squares = group.sums(others.len(), |chunk, sums| {
            let kept = kept(chunk, base, &others, selected.as_ref());
            for (s, i) in sums.iter_mut().zip(&others) {
                let b = chunk.of(base);
                let terms = chunk.of(*i).iter().zip(b).zip(&kept).filter(|(_, k)| **k);
                *s += terms.map(|((x, b), _)| f64::from(x - b).powi(2)).sum::<f64>();
            }
        })?;
        let n = group.len().max(1) as f64;
        let total: f64 = squares.iter().map(|s| s / n).sum();
        let weights: Vec<f32> = if total < 1e-6 {
            vec![1.0 / others.len().max(1) as f32; others.len()]
        } else {
            squares.iter().map(|s| (s / n / total) as f32).collect()
        };
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            let kept = kept(chunk, base, &others, selected.as_ref());
            for (n, ((o, b), kept)) in out.iter_mut().zip(chunk.of(base)).zip(&kept).enumerate() {
                *o = *b;
                if !kept {
                    continue;
                }
                let tau = |i: &usize| chunk.of(*i).get(n).map_or(0.0, |x| x - b);
                let positive = others.iter().map(tau).sum::<f32>() >= 0.0;
                let (mut sum, mut divisor) = (0.0, 0.0);
                for (t, w) in others.iter().map(tau).zip(&weights) {
                    if (positive && t > 0.0) || (!positive && t < 0.0) {
                        sum += t * w;
                        divisor += w;
                    }
                }
                *o += sum / divisor.max(1e-6);
            }
        }))
    }
}

/// The variance over the models of each place's task vectors.
fn variance(chunk: &Chunk, base: usize, others: &[usize], out: &mut [f32]) {
    let count = others.len().max(1) as f32;
    for (n, (o, b)) in out.iter_mut().zip(chunk.of(base)).enumerate() {
        let tau = |i: &usize| chunk.of(*i).get(n).map_or(0.0, |x| x - b);
        let mean = others.iter().map(tau).sum::<f32>() / count;
        *o = others.iter().map(|i| (tau(i) - mean).powi(2)).sum::<f32>() / count;
    }
}

/// Which places of a piece are selected.
fn kept(chunk: &Chunk, base: usize, others: &[usize], selected: Option<&Largest>) -> Vec<bool> {
    let Some(selected) = selected else { return vec![true; chunk.len()] };
    let mut values = vec![0.0; chunk.len()];
    variance(chunk, base, others, &mut values);
    selected.among(chunk, &values)
}
