//! How the changes of adapters stand to one another, and what became of them.
//!
//! Inner products of products need no whole matrices: ⟨sB A, s'B'A'⟩ = ss' Σ (BᵀB') ⊙ (A A'ᵀ).

use modl_core::{Error, Kind, LowRank, Result, ResultExt, Tensor, no_grad, on_threads};

use super::merge::{joined, whole_sum};
use super::{Change, Delta, MergedSite, SiteChanges};

/// What a merge is at one site.
#[derive(Debug, Clone)]
pub struct SiteReport {
    /// The site's path.
    pub path: String,
    /// ⟨ΔWᵢ, ΔWⱼ⟩ of all adapters, `k · k` numbers; 0 where one does not stand here.
    pub products: Vec<f64>,
    /// The share of the numbers of ΔW that two adapters, at least, would move in opposite directions
    /// (weights counted in), among those that any would move.
    pub conflicts: f64,
    /// ‖BA‖ of the merged change.
    pub norm: f64,
    /// The effective rank of the merged change.
    pub effective_rank: f64,
    /// Its rank in the file.
    pub rank: i64,
    /// ‖M − BA‖ ⁄ ‖M‖ where M is what the way gives before it is cut.
    pub lost: f64,
    /// ‖BA − Σ wⱼΔWⱼ‖ ⁄ ‖Σ wⱼΔWⱼ‖: how far the merge is from the exact sum.
    pub from_sum: f64,
}

/// Cosines between what the adapters change, over all sites.
#[derive(Debug, Clone, PartialEq)]
pub struct Cosines {
    /// ‖ΔWⱼ‖ over all sites.
    pub norms: Vec<f64>,
    /// `k · k` numbers; NaN where a change is 0.
    pub cosines: Vec<f64>,
}

impl Cosines {
    /// Of all sites together.
    pub fn of<'a>(sites: impl IntoIterator<Item = &'a SiteReport>, adapters: usize) -> Self {
        let mut sums = vec![0.0; adapters * adapters];
        for site in sites {
            sums.iter_mut().zip(&site.products).for_each(|(s, p)| *s += p);
        }
        let square = |j: usize| sums.get(j * adapters + j).copied().unwrap_or_default();
        let norms: Vec<f64> = (0..adapters).map(|j| square(j).max(0.0).sqrt()).collect();
        let pairs = norms.iter().flat_map(|a| norms.iter().map(move |b| a * b));
        let cosines = sums.iter().zip(pairs).map(|(s, n)| s / n).collect();
        Cosines { norms, cosines }
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
    let k = site.changes.len();
    let mut products = vec![0.0; k * k];
    for (i, a) in site.present() {
        for (j, b) in site.present().filter(|(j, _)| *j <= i) {
            let product = inner(&a.weight, &b.weight)?;
            for place in [i * k + j, j * k + i] {
                if let Some(p) = products.get_mut(place) {
                    *p = product;
                }
            }
        }
    }
    let weight = |j: usize| weights.get(j).copied().unwrap_or_default();
    let parts: Vec<(f64, &Change)> = site.present().map(|(j, c)| (weight(j), c)).collect();
    let own = joined(&[(1.0, &made.factors)])?;
    let values = spectrum(&own)?;
    let norm = values.iter().map(|s| s * s).sum::<f64>().sqrt();
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
        path: site.path.clone(),
        products,
        conflicts: conflicts(&parts)?,
        norm,
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

/// The share of numbers that are pulled both ways, among those that are moved.
fn conflicts(parts: &[(f64, &Change)]) -> Result<f64> {
    const UP: u8 = 1;
    const DOWN: u8 = 2;
    let mut pulls: Vec<u8> = Vec::new();
    for (w, change) in parts.iter().filter(|(w, _)| *w != 0.0) {
        let numbers: Vec<f32> = change.weight.whole()?.to_kind(Kind::Float)?.to_vec()?;
        pulls.resize(numbers.len(), 0);
        let (above, below) = if *w > 0.0 { (UP, DOWN) } else { (DOWN, UP) };
        for (pull, x) in pulls.iter_mut().zip(numbers) {
            *pull |= u8::from(x > 0.0) * above + u8::from(x < 0.0) * below;
        }
    }
    let moved = pulls.iter().filter(|p| **p != 0).count();
    let both = pulls.iter().filter(|p| **p == UP + DOWN).count();
    Ok(if moved == 0 { 0.0 } else { both as f64 / moved as f64 })
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
