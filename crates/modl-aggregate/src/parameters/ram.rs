//! RAM, reinforced agent merging: what one model alone has changed is kept whole, what several have
//! changed is averaged over them.
//!
//! With τᵢ = θᵢ − θ₀ and "changed" as |τᵢ| > ε: θ = θ₀ + Σᵢ λᵢ τᵢ⟨changed by i alone⟩ +
//! mean of τᵢ⟨changed by several⟩ over those that changed it. λ = 1 (`ram`), or, tensor by tensor,
//! 1 + r · clamp(ρᵢ, 0, α), where ρᵢ is the number of shared changes of i over that of its own alone
//! (`ramplus_tl`). arXiv 2601.13572.

use modl_core::Result;

use crate::merge::{Base, Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec};

/// Own changes whole, shared ones averaged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ram;

/// The same with own changes raised by how much a model shares.
#[derive(Debug, Clone, Copy, Default)]
pub struct RamPlus;

const EPSILON: Setting = Setting::number_or("epsilon", 1e-5, "what a change is larger than");

impl MergeMethod for Ram {
    fn spec(&self) -> Spec {
        Spec::new("ram", "Own changes whole, shared ones averaged", "arXiv 2601.13572")
            .settings(&[EPSILON])
            .base(Base::Required)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let others = group.others();
        let raised = vec![1.0; others.len()];
        blend(group, others, settings.number("epsilon")? as f32, raised)
    }
}

impl MergeMethod for RamPlus {
    fn spec(&self) -> Spec {
        const SETTINGS: &[Setting] = &[
            Setting::number_or("r", 0.1, "strength of the raise"),
            Setting::number_or("alpha", 0.2, "the largest ratio that counts"),
            EPSILON,
        ];
        Spec::new("ramplus_tl", "RAM with own changes raised", "arXiv 2601.13572")
            .settings(SETTINGS)
            .base(Base::Required)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let (base, others) = (group.need_base()?, group.others());
        let (epsilon, r) = (settings.number("epsilon")?, settings.number("r")?);
        let alpha = settings.number("alpha")?;
        let counts = group.sums(2 * others.len(), |chunk, counts| {
            for n in 0..chunk.len() {
                let changed: Vec<bool> = others
                    .iter()
                    .map(|i| change(chunk, *i, base, n).abs() > epsilon as f32)
                    .collect();
                let several = changed.iter().filter(|c| **c).count() > 1;
                for (pair, _) in counts.chunks_mut(2).zip(&changed).filter(|(_, c)| **c) {
                    if let [shared, own] = pair {
                        *if several { shared } else { own } += 1.0;
                    }
                }
            }
        })?;
        let raised = counts.chunks(2).map(|pair| {
            let (shared, own) = (pair.first().unwrap_or(&0.0), pair.get(1).unwrap_or(&0.0));
            (1.0 + r * (shared / own.max(epsilon)).clamp(0.0, alpha)) as f32
        });
        let raised = raised.collect();
        blend(group, others, epsilon as f32, raised)
    }
}

fn change(chunk: &Chunk, i: usize, base: usize, n: usize) -> f32 {
    match (chunk.of(i).get(n), chunk.of(base).get(n)) {
        (Some(x), Some(b)) => x - b,
        _ => 0.0,
    }
}

fn blend<'a>(
    group: &'a Group,
    others: Vec<usize>,
    epsilon: f32,
    raised: Vec<f32>,
) -> Result<Blend<'a>> {
    let base = group.need_base()?;
    Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
        for (n, (o, b)) in out.iter_mut().zip(chunk.of(base)).enumerate() {
            let (mut sum, mut own, mut count) = (0.0, 0.0, 0);
            for (i, raise) in others.iter().zip(&raised) {
                let tau = change(chunk, *i, base, n);
                if tau.abs() > epsilon {
                    sum += tau;
                    own = tau * raise;
                    count += 1;
                }
            }
            *o = b + match count {
                0 => 0.0,
                1 => own,
                _ => sum / count as f32,
            };
        }
    }))
}
