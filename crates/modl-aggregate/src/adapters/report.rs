//! How the changes of adapters stand to one another, and what became of them.
//!
//! Inner products of products need no whole matrices: ⟨sB A, s'B'A'⟩ = ss' Σ (BᵀB') ⊙ (A A'ᵀ).

use modl_core::{Error, Kind, LowRank, Result, ResultExt, Tensor, no_grad, on_threads};

use super::merge::{joined, whole_sum};
use super::{Change, Delta, MergedSite, SiteChanges};
use crate::merge::TensorDiagnosis;

/// What a merge is at one site.
#[derive(Debug, Clone)]
pub struct SiteReport {
    /// The site's path, and how the changes ΔWⱼ and the merged one stand to one another; an adapter
    /// that does not stand here changes nothing. Signs are compared with the weights counted in.
    pub compared: TensorDiagnosis,
    /// The effective rank of the merged change.
    pub effective_rank: f64,
    /// Its rank in the file.
    pub rank: i64,
    /// ‖M − BA‖ ⁄ ‖M‖ where M is what the way gives before it is cut.
    pub lost: f64,
    /// ‖BA − Σ wⱼΔWⱼ‖ ⁄ ‖Σ wⱼΔWⱼ‖: how far the merge is from the exact sum.
    pub from_sum: f64,
}

impl SiteReport {
    /// ‖BA‖ of the merged change.
    pub fn norm(&self) -> f64 {
        self.compared.norm(self.compared.gram.len().saturating_sub(1))
    }
}

/// Compares what the adapters change with what was made of it, for the sites that were merged.
///
/// # Errors
/// Where the two do not belong together.
pub fn report(
    sites: Vec<SiteChanges>,
    weights: &[f64],
    merged: &[MergedSite],
) -> Result<Vec<SiteReport>> {
    let mut pairs = Vec::with_capacity(merged.len());
    let mut left = sites.into_iter();
    for made in merged {
        let own = left.find(|s| s.path == made.path);
        let own = own.ok_or_else(|| Error::invalid(&made.path, "was not merged from these"))?;
        pairs.push((own, made.clone()));
    }
    no_grad(|| {
        on_threads(pairs, |(site, made): (SiteChanges, MergedSite)| {
            of_site(&site, weights, &made).at(&made.path)
        })
    })
}

fn of_site(site: &SiteChanges, weights: &[f64], made: &MergedSite) -> Result<SiteReport> {
    let merged = Delta::Product(made.factors.clone());
    let changes = site.changes.iter().map(|c| c.as_ref().map(|c| &c.weight));
    let all: Vec<Option<&Delta>> = changes.chain([Some(&merged)]).collect();
    let mut gram = vec![vec![0.0; all.len()]; all.len()];
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate().take(i + 1) {
            let (Some(a), Some(b)) = (a, b) else { continue };
            let product = inner(a, b)?;
            for (row, column) in [(i, j), (j, i)] {
                if let Some(p) = gram.get_mut(row).and_then(|r| r.get_mut(column)) {
                    *p = product;
                }
            }
        }
    }
    let ranks = site.changes.iter().map(|change| match change.as_ref().map(|c| &c.weight) {
        Some(Delta::Product(p)) => Ok(effective_rank(&spectrum(p)?)),
        Some(Delta::Whole(t)) => Ok(effective_rank(&t.to_kind(Kind::Double)?.svd()?.1.to_vec()?)),
        None => Ok(0.0),
    });
    let ranks = ranks.collect::<Result<_>>()?;
    let [rows, columns] = merged.shape();
    let weight = |j: usize| weights.get(j).copied().unwrap_or_default();
    let parts: Vec<(f64, &Change)> = site.present().map(|(j, c)| (weight(j), c)).collect();
    let own = joined(&[(1.0, &made.factors)])?;
    let values = spectrum(&own)?;
    // Thin matrices where all are; else the whole sum.
    let thin: Option<Vec<(f64, &LowRank)>> = parts
        .iter()
        .map(|(w, c)| match &c.weight {
            Delta::Product(p) => Some((*w, p)),
            Delta::Whole(_) => None,
        })
        .collect();
    let norm_of =
        |p: &LowRank| -> Result<f64> { Ok(spectrum(p)?.iter().map(|s| s * s).sum::<f64>().sqrt()) };
    let (apart, sum) = match thin {
        Some(mut thin) => {
            let sum = norm_of(&joined(&thin)?)?;
            thin.push((-1.0, &made.factors));
            (norm_of(&joined(&thin)?)?, sum)
        }
        None => {
            let sum = whole_sum(&parts)?;
            (own.weight()?.sub(&sum)?.norm()?.item()?, sum.norm()?.item()?)
        }
    };
    Ok(SiteReport {
        compared: TensorDiagnosis {
            name: site.path.clone(),
            numbers: (rows * columns) as usize,
            gram,
            conflicts: conflicts(&parts)?,
            ranks: Some(ranks),
        },
        effective_rank: effective_rank(&values),
        rank: made.factors.down.len_of(0),
        lost: made.lost,
        from_sum: if sum > 0.0 { apart / sum } else { 0.0 },
    })
}

fn inner(a: &Delta, b: &Delta) -> Result<f64> {
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    if let (Delta::Product(a), Delta::Product(b)) = (a, b) {
        let ups = wide(&a.up)?.t()?.matmul(&wide(&b.up)?)?; // [r, r']
        let downs = wide(&a.down)?.matmul(&wide(&b.down)?.t()?)?;
        return Ok(a.scale * b.scale * ups.mul(&downs)?.sum()?.item()?);
    }
    wide(&a.whole()?)?.mul(&wide(&b.whole()?)?)?.sum()?.item()
}

/// The singular values of a product, from small matrices.
fn spectrum(p: &LowRank) -> Result<Vec<f64>> {
    let (_, up) = p.up.qr()?;
    let (_, down) = p.down.t()?.qr()?;
    let (_, s, _) = up.matmul(&down.t()?)?.svd()?;
    Ok(s.to_vec::<f64>()?.into_iter().map(|s| s * p.scale.abs()).collect())
}

/// exp of the entropy of the normalised singular values (Roy and Vetterli 2007): n where n are
/// equal and the others 0.
pub fn effective_rank(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    let p = values.iter().map(|s| s / sum).filter(|p| *p > 0.0);
    p.map(|p| -p * p.ln()).sum::<f64>().exp()
}

/// The share of numbers that are pulled both ways, among those that several adapters pull.
fn conflicts(parts: &[(f64, &Change)]) -> Result<f64> {
    const UP: u8 = 1;
    const DOWN: u8 = 2;
    const SEVERAL: u8 = 4;
    let mut pulls: Vec<u8> = Vec::new();
    for (w, change) in parts.iter().filter(|(w, _)| *w != 0.0) {
        let numbers: Vec<f32> = change.weight.whole()?.to_kind(Kind::Float)?.to_vec()?;
        pulls.resize(numbers.len(), 0);
        let (above, below) = if *w > 0.0 { (UP, DOWN) } else { (DOWN, UP) };
        for (pull, x) in pulls.iter_mut().zip(numbers) {
            let own = u8::from(x > 0.0) * above + u8::from(x < 0.0) * below;
            *pull |= own | (u8::from(own != 0 && *pull != 0) * SEVERAL);
        }
    }
    let several = pulls.iter().filter(|p| **p & SEVERAL != 0).count();
    let both = pulls.iter().filter(|p| **p & (UP | DOWN) == UP | DOWN).count();
    Ok(if several == 0 { 0.0 } else { both as f64 / several as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_rank_counts_equal_values() {
        assert!((effective_rank(&[2.0, 2.0, 2.0, 0.0]) - 3.0).abs() < 1e-12);
        assert!((effective_rank(&[5.0, 0.0]) - 1.0).abs() < 1e-12);
        assert_eq!(effective_rank(&[0.0, 0.0]), 0.0);
    }
}
