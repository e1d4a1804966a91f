//! Rotations made of small blocks, by Cayley's transform of skew-symmetric matrices.
//!
//! With Q = −Qᵀ, (I + Q)⁻¹(I − Q) is orthogonal. Its mirror image (I − Q)⁻¹(I + Q) is the limit of
//! I + 2Q + 2Q² + …, which saves the linear solve and is orthogonal up to the terms left out.
//!
//! Cayley 1846; Qiu et al. 2025, *Orthogonal Finetuning Made Scalable*, arXiv 2506.19847.

use modl_core::{Result, Tensor};

fn identity_like(q: &Tensor) -> Result<Tensor> {
    Tensor::eye(q.len_of(-1), q.kind(), q.device())
}

/// (I + Q)⁻¹(I − Q) for each of q `[blocks, b, b]`.
pub(super) fn cayley(q: &Tensor) -> Result<Tensor> {
    let one = identity_like(q)?;
    one.add(q)?.solve(&one.sub(q)?)
}

/// The first `terms` terms of I + 2Q + 2Q² + … for each of q `[blocks, b, b]`, where the last one
/// counts once, as in PEFT: `terms` 5 gives I + 2Q + 2Q² + 2Q³ + Q⁴.
pub(super) fn cayley_neumann(q: &Tensor, terms: i64) -> Result<Tensor> {
    let one = identity_like(q)?.expand(&q.size())?;
    if terms < 2 {
        return Ok(one);
    }
    let mut sum = one.add(&q.mul_scalar(2.0)?)?;
    if terms < 3 {
        return Ok(sum);
    }
    let mut power = q.bmm(q)?;
    sum = sum.add(&power.mul_scalar(2.0)?)?;
    for _ in 3..terms - 1 {
        power = power.bmm(q)?;
        sum = sum.add(&power.mul_scalar(2.0)?)?;
    }
    sum.add(&power.bmm(q)?)
}

/// Each `b` numbers in a row of x `[…, blocks · b]` times their block of r `[blocks, b, b]`, or
/// times the only block there is.
pub(super) fn rotate(x: &Tensor, r: &Tensor) -> Result<Tensor> {
    let (blocks, b) = (r.len_of(0), r.len_of(-1));
    let r = r.to_kind(x.kind())?;
    let y = match blocks {
        1 => x.reshape(&[-1, b])?.matmul(&r.select(0, 0)?)?,
        _ => x.reshape(&[-1, blocks, b])?.transpose(0, 1)?.bmm(&r)?.transpose(0, 1)?,
    };
    y.reshape(&x.size())
}

/// r `[…, b, b]` with the identity where `chosen` `[…, 1, 1]` is 1.
pub(super) fn stilled(r: &Tensor, chosen: &Tensor) -> Result<Tensor> {
    r.add(&identity_like(r)?.sub(r)?.mul(chosen)?)
}
