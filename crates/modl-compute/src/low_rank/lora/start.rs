//! Starts from the weight itself: PiSSA and OLoRA.
//!
//! The first factors B₀ A₀ carry the most of W, and training goes on from there while the rest
//! W − s·B₀ A₀ stays frozen. Here W is shared with other modules, so that the start is kept beside
//! the module and taken off again: f' has W + s·(B A − B₀ A₀), which is f at first, and is a change
//! of rank 2r. In a PEFT folder it is written as such, a plain LoRA of rank 2r that fits the
//! untouched backbone; PEFT's own files of this kind fit only the backbone whose W was changed, and
//! are refused.
//!
//! - PiSSA: with W = U Σ Vᵀ, B₀ = U_r √(Σ_r ⁄ s) and A₀ = √(Σ_r ⁄ s) V_rᵀ, the r largest singular
//!   values. Meng et al. 2024, arXiv 2404.02948.
//! - OLoRA: with W = Q R, B₀ = Q_r and A₀ = R_r, the first r columns and rows. Büyükakyüz 2024,
//!   arXiv 2406.01775.

use modl_core::{Error, Result, Tensor};

use super::LoraInit;

/// A₀ `[r, in]` and B₀ `[out, r]` for a weight `[out, in]`; none where `init` does not look at it.
///
/// # Errors
/// Where the weight has no r such factors, or PiSSA's scale is not positive.
pub(super) fn from_weight(
    init: LoraInit,
    weight: &Tensor,
    r: i64,
    scale: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let most = weight.len_of(0).min(weight.len_of(1));
    let in_range = || match r <= most {
        true => Ok(()),
        false => Err(Error::invalid(
            "lora.r",
            format!("is {r}, and a start from this weight has at most {most} directions"),
        )),
    };
    let (a, b) = match init {
        LoraInit::Pissa if scale <= 0.0 => {
            return Err(Error::invalid("lora.alpha", "is to be positive for PiSSA"));
        }
        LoraInit::Pissa => {
            in_range()?;
            let (u, s, vt) = weight.svd()?;
            let root = s.narrow(0, 0, r)?.mul_scalar(1.0 / scale)?.sqrt()?;
            let a = vt.narrow(0, 0, r)?.mul(&root.unsqueeze(1)?)?;
            (a, u.narrow(1, 0, r)?.mul(&root)?)
        }
        LoraInit::Olora => {
            in_range()?;
            let (q, upper) = weight.qr()?;
            (upper.narrow(0, 0, r)?, q.narrow(1, 0, r)?)
        }
        LoraInit::Kaiming | LoraInit::Gaussian | LoraInit::Random => return Ok(None),
    };
    Ok(Some((a.contiguous()?, b.contiguous()?)))
}
