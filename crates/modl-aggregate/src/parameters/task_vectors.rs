//! What the methods over task vectors τᵢ = θᵢ − θ₀ share: θ = θ₀ + λ · mix of the kept wᵢτᵢ.

use modl_core::{Error, Result};

use super::sparsity::{Keep, Sparse, task_vector};
use crate::merge::{Blend, Chunk, Group, Setting, Settings};

pub(super) const WEIGHT: Setting = Setting::each("weight", "factor of the task vector");
pub(super) const DENSITY: Setting =
    Setting::each_or("density", 1.0, "share of its numbers that is kept");
pub(super) const LAMBDA: Setting = Setting::number_or("lambda", 1.0, "factor of the merged change");
pub(super) const INT8_MASK: Setting =
    Setting::flag("int8_mask", false, "changes nothing here; mergekit saves memory with it");

/// The settings `normalize` and `rescale`.
pub(super) const fn normalize(default: bool) -> Setting {
    Setting::flag("normalize", default, "divide by the sum of the weights that take part")
}

/// The setting `rescale`.
pub(super) const fn rescale(default: bool) -> Setting {
    Setting::flag("rescale", default, "give what is kept the size of the whole")
}

/// Whose reading of a paper it is, where they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Convention {
    /// What the paper says.
    Paper,
    /// What mergekit computes.
    Mergekit,
    /// What PEFT's `add_weighted_adapter` computes.
    Peft,
}

pub(super) const CONVENTION: Setting =
    Setting::word("convention", "mergekit", "whose reading: mergekit, peft or paper");

/// The setting `convention`.
pub(super) fn convention(settings: &Settings) -> Result<Convention> {
    Ok(match settings.word("convention", &["mergekit", "peft", "paper"])? {
        "peft" => Convention::Peft,
        "paper" => Convention::Paper,
        _ => Convention::Mergekit,
    })
}

/// How signs are elected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Election {
    /// They are not: all numbers count.
    None,
    /// By the sum of the weighted numbers; a sum of 0 is positive.
    Weighted,
    /// By the sum of the numbers as they are.
    Total,
    /// By the number of models.
    Frequency,
}

/// What the sum is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Divisor {
    /// Nothing.
    One,
    /// The weights of those that take part.
    Weights,
    /// The number of those that take part.
    Count,
}

/// θ₀ + λ Σ wᵢτᵢ ⁄ divisor over what is kept and agrees with the elected sign.
#[derive(Debug)]
pub(super) struct TaskVectors {
    pub(super) kept: Vec<Sparse>,
    pub(super) weights: Vec<f64>,
    pub(super) election: Election,
    pub(super) divisor: Divisor,
    pub(super) lambda: f64,
}

/// Numbers that are mixed together: all task vectors of so many stay in a core's nearest cache.
const BLOCK: usize = 1 << 11;

/// How what is kept gets the size of the whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rescale {
    /// It does not.
    No,
    /// By ‖τ‖₁ ⁄ ‖kept τ‖₁ of the tensor.
    L1,
    /// By 1 ⁄ density, so that the expected value is τ.
    Density,
}

impl Divisor {
    /// What the setting `normalize` says.
    pub(super) fn of(settings: &Settings) -> Result<Self> {
        Ok(if settings.flag("normalize")? { Divisor::Weights } else { Divisor::One })
    }
}

impl Rescale {
    /// What the setting `rescale` says, as mergekit means it.
    pub(super) fn of(settings: &Settings) -> Result<Self> {
        Ok(if settings.flag("rescale")? { Rescale::L1 } else { Rescale::No })
    }
}

/// What is kept of each task vector, with its factor.
pub(super) fn sparse(
    group: &Group,
    keep: Vec<Keep>,
    rescale: Rescale,
    densities: &[f64],
) -> Result<Vec<Sparse>> {
    let base = group.need_base()?;
    let mut scales = vec![1.0; keep.len()];
    if rescale == Rescale::L1 && keep.iter().any(|k| !matches!(k, Keep::All)) {
        let others = group.others();
        let sums = group.sums(2 * keep.len(), |chunk, sums| {
            let mut tau = vec![0.0; chunk.len()];
            for ((input, keep), sums) in others.iter().zip(&keep).zip(sums.chunks_mut(2)) {
                task_vector(chunk, *input, base, &mut tau);
                let whole = absolute(&tau);
                keep.apply(chunk, &mut tau);
                for (s, more) in sums.iter_mut().zip([whole, absolute(&tau)]) {
                    *s += more;
                }
            }
        })?;
        for (scale, pair) in scales.iter_mut().zip(sums.chunks(2)) {
            if let [whole, kept] = pair
                && *whole >= 1e-7
                && *kept >= 1e-7
            {
                *scale = whole / kept;
            }
        }
    }
    if rescale == Rescale::Density {
        for (scale, d) in scales.iter_mut().zip(densities).filter(|(_, d)| **d > 0.0 && **d < 1.0) {
            *scale = 1.0 / d;
        }
    }
    let all = keep.into_iter().zip(scales);
    Ok(all.map(|(keep, scale)| Sparse { keep, scale: scale as f32 }).collect())
}

fn absolute(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(x.abs())).sum()
}

impl TaskVectors {
    /// What is kept, mixed as the settings `weight` and `lambda` say.
    pub(super) fn of(
        settings: &Settings,
        kept: Vec<Sparse>,
        (election, divisor): (Election, Divisor),
    ) -> Result<Self> {
        let (weights, lambda) = (settings.each("weight")?, settings.number("lambda")?);
        Ok(TaskVectors { kept, weights, election, divisor, lambda })
    }

    /// The formula for the pieces of a group.
    pub(super) fn blend<'a>(self, group: &'a Group) -> Result<Blend<'a>> {
        let (base, others) = (group.need_base()?, group.others());
        if self.kept.len() != others.len() || self.weights.len() != others.len() {
            return Err(Error::invalid(group.name, "has not as many settings as models"));
        }
        let total: f64 = self.weights.iter().sum();
        // A sum of weights of 0 divides nothing.
        let total = if total.abs() < 1e-8 { 1.0 } else { total };
        let lambda = self.lambda as f32;
        let weights: Vec<f32> = self.weights.iter().map(|w| *w as f32).collect();
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            let whole = self.kept.iter().any(|s| s.keep.needs_whole(chunk.index));
            let block = if whole { chunk.len() } else { BLOCK.min(chunk.len()) };
            let mut taus = vec![0.0; block * others.len()];
            for (n, out) in out.chunks_mut(block.max(1)).enumerate() {
                let part = chunk.part(n * block, out.len());
                let taus = taus.get_mut(..others.len() * out.len()).unwrap_or_default();
                for (tau, (input, sparse)) in
                    taus.chunks_mut(out.len()).zip(others.iter().zip(&self.kept))
                {
                    task_vector(&part, *input, base, tau);
                    sparse.keep.apply(&part, tau);
                    if sparse.scale != 1.0 {
                        tau.iter_mut().for_each(|t| *t *= sparse.scale);
                    }
                }
                out.fill(0.0);
                if self.election == Election::None {
                    for (tau, w) in taus.chunks(out.len()).zip(&weights) {
                        out.iter_mut().zip(tau).for_each(|(o, t)| *o += w * t);
                    }
                    if self.divisor == Divisor::Weights {
                        out.iter_mut().for_each(|o| *o /= total as f32);
                    }
                } else {
                    self.agreeing(taus, &weights, out);
                }
                if lambda != 1.0 {
                    out.iter_mut().for_each(|o| *o *= lambda);
                }
                out.iter_mut().zip(part.of(base)).for_each(|(o, b)| *o += b);
            }
        }))
    }

    /// Σ wᵢτᵢ over those that have the elected sign, divided.
    fn agreeing(&self, taus: &[f32], weights: &[f32], out: &mut [f32]) {
        let n = out.len().max(1);
        // The sums that elect: their sign counts.
        let mut votes = vec![0f32; n];
        for (tau, w) in taus.chunks(n).zip(weights) {
            let ballots = votes.iter_mut().zip(tau);
            match self.election {
                Election::Weighted => ballots.for_each(|(v, t)| *v += w * t),
                Election::Frequency => ballots.for_each(|(v, t)| {
                    *v += f32::from(i8::from(*t > 0.0) - i8::from(*t < 0.0));
                }),
                _ => ballots.for_each(|(v, t)| *v += t),
            }
        }
        let mut divisors = vec![0f32; n];
        for (tau, w) in taus.chunks(n).zip(weights) {
            // Weighted numbers are what is compared where the weighted sum elects: a negative
            // weight turns a number round.
            let turned = if self.election == Election::Weighted && *w < 0.0 { -1.0 } else { 1.0 };
            let counted = if self.divisor == Divisor::Count { 1.0 } else { *w };
            let none = if self.election == Election::Weighted && *w == 0.0 { 0.0 } else { 1.0 };
            for ((o, d), (t, v)) in
                out.iter_mut().zip(divisors.iter_mut()).zip(tau.iter().zip(&votes))
            {
                let sign = if *v >= 0.0 { turned } else { -turned };
                let agrees = if t * sign > 0.0 { none } else { 0.0 };
                *o += agrees * w * t;
                *d += agrees * counted;
            }
        }
        if self.divisor != Divisor::One {
            for (o, d) in out.iter_mut().zip(&divisors) {
                *o /= if *d == 0.0 { 1.0 } else { *d };
            }
        }
    }
}
