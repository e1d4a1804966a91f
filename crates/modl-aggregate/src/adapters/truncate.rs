//! The best product of a given rank: ΔW = U Σ Vᵀ ≈ (U_r √Σ_r)(√Σ_r V_rᵀ) = B A.
//!
//! No other product of rank r is nearer: ‖ΔW − BA‖² = Σ_{i>r} σᵢ² (Eckart and Young 1936). Of a
//! product of thin matrices B̄ Ā with R rows in Ā, only R × R matrices are decomposed: with B̄ = Q R
//! and Āᵀ = Q' R', the singular values are those of R R'ᵀ. Of a whole matrix the largest are sought
//! in a Krylov space of blocks in f32 (Golub and Kahan 1965; Musco and Musco 2015, arXiv 1504.05477) and
//! then corrected in f64 until they fit to 1e-8 of the largest (Davidson 1975); where that would not pay,
//! all are computed.

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
/// Directions that a Krylov space grows by at least. There are as many as wanted ones, so that equal
/// singular values are all found.
const LEAST_BLOCK: i64 = 8;
/// Blocks of the space when it is first looked at, and then every so many.
const FIRST_LOOK: i64 = 10;
const LOOK_EVERY: i64 = 2;
/// How well a singular direction is to fit, relative to the largest singular value: in f32, and in the end.
const NEAR: f64 = 2e-5;
const FIT: f64 = 1e-8;
/// Below this share of the largest, f32 does not know a singular value from its square.
const LEAST_VALUE: f64 = 4e-3;
/// Steps from the one to the other: two or three do, where they lead there.
const REFINEMENTS: usize = 8;

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
    let kept = up.square()?.sum_dims(&[0], false)?.square()?.sum()?.item()?; // Σ σ²
    let share = 1.0 - kept / (norm * norm);
    let rest = match share > 1e-4 {
        true => share.sqrt() * norm,
        // Where nearly all is kept, the difference of squares says nothing.
        false => delta.sub(&up.matmul(&down)?)?.norm()?.item()?,
    };
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
    if rows < columns {
        let found = leading(&m.t()?.contiguous()?, rank)?;
        return found.map(|(u, s, vt)| Ok((vt.t()?, s, u.t()?))).transpose();
    }
    let block = rank.max(LEAST_BLOCK);
    let scale = m.abs()?.largest()?.item()?;
    if columns < SMALL || (FIRST_LOOK + 1) * block > columns / 2 || scale == 0.0 {
        return Ok(None);
    }
    let m = m.mul_scalar(1.0 / scale)?;
    let Some(near) = krylov(&m.to_kind(Kind::Float)?, rank, block)? else { return Ok(None) };
    let found = near.refined(&m, rank)?;
    found.map(|(u, s, v)| Ok((u.t()?, s.mul_scalar(scale)?, v))).transpose()
}

/// Approximate singular directions: those of M on a Krylov space, in f32.
struct Ritz {
    /// `[n, in]`, all of the space, from the largest value to the smallest.
    v: Tensor,
    /// The squares of the values.
    squares: Vec<f64>,
}

/// The Krylov space of MᵀM `[in, in]` from random directions, grown until the wanted singular
/// directions fit to [`NEAR`]; none where it would become half of the whole or has no such rank.
///
/// Directions are rows, here and below: a product of few rows takes a quarter of the time of one of
/// few columns.
fn krylov(m: &Tensor, rank: i64, block: i64) -> Result<Option<Ritz>> {
    let columns = m.len_of(1);
    let transposed = m.t()?;
    // Nothing about the matrix is known, so that any directions will do.
    let start = Init::Normal(1.0).tensor(&[block, columns], Seed(0), Kind::Float, Device::Cpu)?;
    let mut basis = orthonormal(&start)?; // [n, in]
    let mut image = basis.matmul(&transposed)?; // of the last block, [block, out]
    let mut images = vec![image.clone()];
    for blocks in 2..=columns / (2 * block) {
        let mut rest = image.matmul(m)?;
        // Twice, since what is taken off once leaves rounding of its size.
        for _ in 0..2 {
            rest = rest.sub(&rest.matmul(&basis.t()?)?.matmul(&basis)?)?;
        }
        let next = orthonormal(&rest)?;
        image = next.matmul(&transposed)?;
        basis = Tensor::cat(&[basis, next], 0)?;
        images.push(image.clone());
        if blocks < FIRST_LOOK || (blocks - FIRST_LOOK) % LOOK_EVERY != 0 {
            continue;
        }
        // The singular values of M on the space, and how far they are from being M's.
        let all = Tensor::cat(&images, 0)?;
        let (squares, y) = all.matmul(&all.t()?)?.symmetric_eigen()?;
        let top = roots(&squares.narrow(0, 0, rank)?)?; // [rank, 1]
        let largest = top.largest()?.item()?;
        if top.select(0, rank - 1)?.item()? <= LEAST_VALUE * largest {
            return Ok(None);
        }
        let v = y.t()?.matmul(&basis)?;
        let u = y.narrow(1, 0, rank)?.t()?.matmul(&all)?.div(&top)?;
        let off = u.matmul(m)?.sub(&v.narrow(0, 0, rank)?.mul(&top)?)?;
        if off.abs()?.largest()?.item()? <= NEAR * largest {
            return Ok(Some(Ritz { v, squares: squares.to_vec()? }));
        }
    }
    Ok(None)
}

/// Orthonormal rows that span those of `rows`.
fn orthonormal(rows: &Tensor) -> Result<Tensor> {
    rows.t()?.qr()?.0.t()
}

/// √λ as a column.
fn roots(squares: &Tensor) -> Result<Tensor> {
    squares.clamp(0.0, f64::INFINITY)?.sqrt()?.unsqueeze(1)
}

impl Ritz {
    /// The leading directions made exact, as Uᵀ, S, Vᵀ: what MᵀM v is off from λ v is taken off again by
    /// what MᵀM − λ is on this space, and outside of it on average (Davidson 1975). None where that
    /// does not lead to [`FIT`].
    fn refined(&self, m: &Tensor, rank: i64) -> Result<Option<(Tensor, Tensor, Tensor)>> {
        let (space, transposed) = (&self.v, m.t()?);
        let beside = (m.len_of(1) - space.len_of(0)).max(1) as f64;
        let outside =
            (m.square()?.sum()?.item()? - self.squares.iter().sum::<f64>()).max(0.0) / beside;
        let mut v = space.narrow(0, 0, rank)?.to_kind(Kind::Double)?;
        for _ in 0..REFINEMENTS {
            v = orthonormal(&v)?;
            let image = v.matmul(&transposed)?;
            let (squares, y) = image.matmul(&image.t()?)?.symmetric_eigen()?;
            let (s, y) = (roots(&squares)?, y.t()?);
            v = y.matmul(&v)?;
            let u = y.matmul(&image)?.div(&s)?;
            let off = u.matmul(m)?.sub(&v.mul(&s)?)?;
            let largest = s.largest()?.item()?;
            if off.abs()?.largest()?.item()? <= FIT * largest {
                return Ok(Some((u, s.squeeze(1)?, v)));
            }
            let off = off.mul(&s)?.to_kind(Kind::Float)?;
            let within = off.matmul(&space.t()?)?; // [rank, n]
            let rest = off.sub(&within.matmul(space)?)?;
            // Of two that are all but equal none is to be turned towards the other.
            let inverse = |l: f64, other: f64| match l - other {
                d if d.abs() > NEAR * largest * largest => (1.0 / d) as f32,
                _ => 0.0,
            };
            let values: Vec<f64> = squares.to_vec()?;
            let mut inverses = Vec::with_capacity(self.squares.len() * values.len());
            for l in &values {
                // The first turn among themselves above.
                let own = (0..rank).map(|_| 0.0);
                let others = self.squares.iter().skip(rank as usize);
                inverses.extend(own.chain(others.map(|other| inverse(*l, *other))));
            }
            let inverses = Tensor::from_slice(&inverses, &within.size(), Device::Cpu)?;
            let far: Vec<f32> = values.iter().map(|l| inverse(*l, outside)).collect();
            let far = Tensor::from_slice(&far, &[rank, 1], Device::Cpu)?;
            let turn = within.mul(&inverses)?.matmul(space)?.add(&rest.mul(&far)?)?;
            v = v.add(&turn.to_kind(Kind::Double)?)?;
        }
        Ok(None)
    }
}
