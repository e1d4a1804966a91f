//! The best product of a given rank: ΔW = U Σ Vᵀ ≈ (U_r √Σ_r)(√Σ_r V_rᵀ) = B A.
//!
//! No other product of rank r is nearer: ‖ΔW − BA‖² = Σ_{i>r} σᵢ² (Eckart and Young 1936). Of a
//! product of thin matrices B̄ Ā with R rows in Ā, only R × R matrices are decomposed: with B̄ = Q R
//! and Āᵀ = Q' R', the singular values are those of R R'ᵀ. Of a whole matrix the largest are sought
//! in a Krylov space of blocks (Golub and Kahan 1965; Musco and Musco 2015, arXiv 1504.05477), which
//! grows until they are found to 1e-8 of the largest, and where it would not pay all are computed.

use modl_core::{Device, Error, Init, Kind, LowRank, Result, Seed, Tensor};

/// A product of the asked rank, or less where the matrix has less.
#[derive(Debug, Clone)]
pub struct Truncated {
    /// A and B, in f64, with scale 1.
    pub factors: LowRank,
    /// ‖ΔW − BA‖ ⁄ ‖ΔW‖ in the Frobenius norm; 0 where nothing was lost.
    pub lost: f64,
}

/// Below this many rows or columns all singular values are computed.
const SMALL: i64 = 128;
/// Directions that are sought beside the wanted ones; equal singular values, up to so many, are
/// found all.
const BESIDE: i64 = 8;
/// How well a singular direction is to fit, relative to the largest singular value.
const FIT: f64 = 1e-8;

/// Of B̄ `[out, R]` times Ā `[R, in]`.
///
/// # Errors
/// Where they do not fit, are not finite, or `rank` is not positive.
pub fn truncate_product(up: &Tensor, down: &Tensor, rank: i64) -> Result<Truncated> {
    let (qu, ru) = wide(up, rank)?.qr()?;
    let (qd, rd) = wide(down, rank)?.t()?.qr()?;
    let (u, s, vt) = ru.matmul(&rd.t()?)?.svd()?;
    let values: Vec<f64> = s.to_vec()?;
    let kept = rank.min(s.len_of(0));
    let square = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
    let all = square(&values);
    let lost = square(values.get(kept as usize..).unwrap_or_default());
    let (thin_up, thin_down) = halves(&u, &s, &vt, kept)?;
    let factors =
        LowRank { up: qu.matmul(&thin_up)?, down: thin_down.matmul(&qd.t()?)?, scale: 1.0 };
    Ok(Truncated { factors, lost: if all > 0.0 { (lost / all).sqrt() } else { 0.0 } })
}

/// Of a matrix `[out, in]`.
///
/// # Errors
/// Where it is not finite, or `rank` is not positive.
pub fn truncate_whole(delta: &Tensor, rank: i64) -> Result<Truncated> {
    let delta = wide(delta, rank)?;
    let norm = delta.norm()?.item()?;
    let (u, s, vt) = match leading(&delta, rank)? {
        Some(found) => found,
        None => delta.svd()?,
    };
    let (up, down) = halves(&u, &s, &vt, rank.min(s.len_of(0)))?;
    let rest = delta.sub(&up.matmul(&down)?)?.norm()?.item()?;
    let factors = LowRank { up, down, scale: 1.0 };
    // Rounding of f64 is not a loss.
    let lost = if rest > 1e-14 * norm { rest / norm } else { 0.0 };
    Ok(Truncated { factors, lost })
}

/// In f64, if the numbers are such.
fn wide(t: &Tensor, rank: i64) -> Result<Tensor> {
    if rank < 1 {
        return Err(Error::invalid("rank", format!("is {rank}, wants at least 1")));
    }
    let t = t.detach()?.to_kind(Kind::Double)?;
    if !t.sum()?.item()?.is_finite() {
        return Err(Error::invalid("a change of weights", "holds NaN or infinity"));
    }
    Ok(t)
}

/// U_r √Σ_r and √Σ_r V_rᵀ.
fn halves(u: &Tensor, s: &Tensor, vt: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
    let root = s.narrow(0, 0, rank)?.sqrt()?;
    let up = u.narrow(1, 0, rank)?.mul(&root)?;
    Ok((up, vt.narrow(0, 0, rank)?.mul(&root.unsqueeze(1)?)?))
}

/// The `rank` largest singular values with their directions, as U, S, Vᵀ; none where it is faster to
/// compute all.
fn leading(m: &Tensor, rank: i64) -> Result<Option<(Tensor, Tensor, Tensor)>> {
    let (rows, columns) = (m.len_of(0), m.len_of(1));
    let block = rank + BESIDE;
    let most = rows.min(columns) / 2;
    if rows.min(columns) < SMALL || 3 * block > most {
        return Ok(None);
    }
    let transposed = m.t()?;
    // Nothing about the matrix is known, so that any directions will do.
    let start = Init::Normal(1.0).tensor(&[columns, block], Seed(0), Kind::Double, Device::Cpu)?;
    let (mut next, _) = start.qr()?;
    let (mut basis, mut images) = (next.clone(), m.matmul(&next)?); // [in, n], [out, n]
    let mut image = images.clone();
    loop {
        let grown = transposed.matmul(&image)?;
        // Twice, since what is taken off once leaves rounding of its size.
        let mut rest = grown;
        for _ in 0..2 {
            rest = rest.sub(&basis.matmul(&basis.t()?.matmul(&rest)?)?)?;
        }
        (next, _) = rest.qr()?;
        image = m.matmul(&next)?;
        basis = Tensor::cat(&[basis, next], 1)?;
        images = Tensor::cat(&[images, image.clone()], 1)?;
        // The singular values of M on the space, and how far they are from being M's.
        let (y, squares, _) = images.t()?.matmul(&images)?.svd()?;
        let y = y.narrow(1, 0, rank)?;
        let s = squares.narrow(0, 0, rank)?.clamp(0.0, f64::INFINITY)?.sqrt()?;
        let largest = s.select(0, 0)?.item()?;
        if s.select(0, rank - 1)?.item()? <= FIT * largest {
            return Ok(None); // of a lower rank than asked
        }
        let v = basis.matmul(&y)?;
        let u = images.matmul(&y)?.div(&s)?;
        let off = transposed.matmul(&u)?.sub(&v.mul(&s)?)?.abs()?.largest()?.item()?;
        if off <= FIT * largest {
            return Ok(Some((u, s, v.t()?)));
        }
        if basis.len_of(1) + block > most {
            return Ok(None);
        }
    }
}
