//! Which numbers of a task vector are kept.

use modl_core::{Error, Result, Seed};

use crate::merge::{Chunk, Group, Largest, Ties, largest, largest_over, uniform};

/// What is kept of one task vector, and the factor of what is kept.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) keep: Keep,
    pub(super) scale: f32,
}

/// Which numbers are kept.
#[derive(Debug)]
pub(super) enum Keep {
    /// All.
    All,
    /// None.
    None,
    /// The largest magnitudes.
    Largest(Largest),
    /// Those that are among the first, and not among the second.
    Between(Largest, Largest),
    /// Each with this probability.
    Random { seed: Seed, density: f32 },
    /// Each with a probability that rises with the rank of its magnitude in its row, from
    /// `density − epsilon` to `density + epsilon`.
    Ranked { seed: Seed, density: f32, epsilon: f32 },
    /// Those that are not 0 in a mask that somebody else has drawn.
    #[cfg(test)]
    Given(Vec<f32>),
}

impl Keep {
    /// Whether it can only be applied to a piece as it was read: rows, or ties in their order.
    pub(super) fn needs_whole(&self, piece: usize) -> bool {
        match self {
            Keep::Ranked { .. } => true,
            Keep::Largest(found) => found.has_order(piece),
            Keep::Between(first, second) => first.has_order(piece) || second.has_order(piece),
            _ => false,
        }
    }

    /// Sets to 0 what is not kept of a piece of τ.
    pub(super) fn apply(&self, chunk: &Chunk, tau: &mut [f32]) {
        match self {
            Keep::All => {}
            Keep::None => tau.fill(0.0),
            Keep::Largest(found) => found.keep(chunk, tau),
            Keep::Between(first, second) => {
                let (first, second) = (first.among(chunk, tau), second.among(chunk, tau));
                for (x, (a, b)) in tau.iter_mut().zip(first.iter().zip(&second)) {
                    if !a || *b {
                        *x = 0.0;
                    }
                }
            }
            Keep::Random { seed, density } => {
                for (n, x) in (chunk.start as u64..).zip(tau) {
                    if uniform(*seed, n) >= *density {
                        *x = 0.0;
                    }
                }
            }
            Keep::Ranked { seed, density, epsilon } => {
                let row = chunk.row.max(1);
                for (r, tau) in tau.chunks_mut(row).enumerate() {
                    let mut order: Vec<usize> = (0..tau.len()).collect();
                    let size = |i: &usize| tau.get(*i).map_or(0.0, |x| x.abs());
                    order.sort_by(|a, b| size(a).total_cmp(&size(b)));
                    let last = tau.len().saturating_sub(1).max(1) as f32;
                    for (rank, i) in order.into_iter().enumerate() {
                        let p = (density - epsilon) + rank as f32 / last * 2.0 * epsilon;
                        let place = (chunk.start + r * row + i) as u64;
                        if let Some(x) = tau.get_mut(i).filter(|_| uniform(*seed, place) >= p) {
                            *x = 0.0;
                        }
                    }
                }
            }
            #[cfg(test)]
            Keep::Given(mask) => {
                for (x, m) in tau.iter_mut().zip(&mask[chunk.start..]) {
                    *x *= m;
                }
            }
        }
    }
}

/// Writes θᵢ − θ₀ of a piece.
pub(super) fn task_vector(chunk: &Chunk, input: usize, base: usize, tau: &mut [f32]) {
    for (t, (x, b)) in tau.iter_mut().zip(chunk.of(input).iter().zip(chunk.of(base))) {
        *t = x - b;
    }
}

/// The share of the largest magnitudes of each task vector; at least one number is kept.
pub(super) fn trimmed(group: &Group, densities: &[f64]) -> Result<Vec<Keep>> {
    let (n, places) = (group.len(), ranked(group)?);
    let k: Vec<usize> = densities.iter().map(|d| share_of(*d, n)).collect();
    let found =
        if k.iter().all(|k| *k == 0) { Vec::new() } else { rank(group, &k, Ties::First, places)? };
    Ok(shares(found, densities))
}

/// The same of the numbers of all tensors together.
pub(super) fn trimmed_over_model(group: &Group, densities: &[f64]) -> Result<Vec<Keep>> {
    let none = || {
        let problem = "keeps the largest numbers of a whole model, and this is one tensor; \
                       choose `mergekit` or `peft`";
        Error::invalid("convention paper", problem)
    };
    Ok(shares(group.among.clone().ok_or_else(none)?, densities))
}

fn shares(found: Vec<Largest>, densities: &[f64]) -> Vec<Keep> {
    let mut found = found.into_iter();
    let one = |d: &f64| match found.next() {
        _ if *d >= 1.0 => Keep::All,
        Some(largest) if *d > 0.0 => Keep::Largest(largest),
        _ => Keep::None,
    };
    densities.iter().map(one).collect()
}

/// The share of the largest magnitudes of each task vector over all these tensors, at least one number:
/// for each tensor what is among them.
pub(super) fn largest_of_model(groups: &[&Group], densities: &[f64]) -> Result<Vec<Vec<Largest>>> {
    let n = groups.iter().map(|g| g.len()).sum();
    let k: Vec<usize> = densities.iter().map(|d| share_of(*d, n)).collect();
    largest_over(
        groups,
        &k,
        Ties::First,
        |group: &Group, chunk: &Chunk, r: usize, out: &mut [f32]| {
            if let (Some(base), Some(input)) = (group.base, group.others().get(r)) {
                task_vector(chunk, *input, base, out);
            }
        },
    )
}

/// How many numbers a share of so many is that is neither all nor none of them.
fn share_of(density: f64, of: usize) -> usize {
    if density >= 1.0 || density <= 0.0 { 0 } else { ((density * of as f64) as usize).max(1) }
}

/// What is left without the share `gamma` of the largest magnitudes and without the smallest ones,
/// so that the share `density` is kept.
pub(super) fn without_outliers(
    group: &Group,
    densities: &[f64],
    gammas: &[f64],
) -> Result<Vec<Keep>> {
    let (n, places) = (group.len(), ranked(group)?);
    let target = |d: &f64| (d.clamp(0.0, 1.0) * n as f64) as usize;
    let above: Vec<usize> = densities
        .iter()
        .zip(gammas)
        .map(|(d, g)| n - n.saturating_sub(target(d) + (g.clamp(0.0, 1.0) * n as f64) as usize))
        .collect();
    let outliers: Vec<usize> =
        densities.iter().zip(&above).map(|(d, above)| above - target(d).min(*above)).collect();
    let kept = rank(group, &above, Ties::Last, places.clone())?;
    let outliers = rank(group, &outliers, Ties::Last, places)?;
    let both = kept.into_iter().zip(outliers).zip(densities);
    Ok(both
        .map(|((kept, out), d)| if *d >= 1.0 { Keep::All } else { Keep::Between(kept, out) })
        .collect())
}

/// The base and the others.
fn ranked(group: &Group) -> Result<(usize, Vec<usize>)> {
    Ok((group.need_base()?, group.others()))
}

fn rank(
    group: &Group,
    k: &[usize],
    ties: Ties,
    (base, others): (usize, Vec<usize>),
) -> Result<Vec<Largest>> {
    largest(group, k, ties, move |chunk: &Chunk, r: usize, out: &mut [f32]| {
        if let Some(input) = others.get(r) {
            task_vector(chunk, *input, base, out);
        }
    })
}

/// Each number with the probability `density`.
pub(super) fn random(group: &Group, densities: &[f64]) -> Vec<Keep> {
    let drawn = |(input, d): (usize, &f64)| {
        let seed = group.seed_of(input);
        if *d >= 1.0 { Keep::All } else { Keep::Random { seed, density: *d as f32 } }
    };
    group.others().into_iter().zip(densities).map(drawn).collect()
}

/// Each number with a probability around `density` that rises with its rank in its row.
pub(super) fn by_rank(group: &Group, densities: &[f64], epsilons: &[f64]) -> Result<Vec<Keep>> {
    let each = group.others().into_iter().zip(densities.iter().zip(epsilons));
    each.map(|(input, (d, e))| {
        if *d >= 1.0 {
            return Ok(Keep::All);
        }
        if *d <= 0.0 {
            return Ok(Keep::None);
        }
        if d + e >= 1.0 || d - e <= 0.0 {
            let problem =
                format!("density ± epsilon is to lie between 0 and 1, not {} to {}", d - e, d + e);
            return Err(Error::invalid("parameter `epsilon`", problem));
        }
        let (density, epsilon) = (*d as f32, *e as f32);
        Ok(Keep::Ranked { seed: group.seed_of(input), density, epsilon })
    })
    .collect()
}
