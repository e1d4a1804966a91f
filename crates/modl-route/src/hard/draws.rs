//! Random numbers of hard routers, from seeds: uniform, Gumbel and logistic noise.
//!
//! U is kept inside (0, 1), so that no logarithm is infinite. All is drawn in f64.

use modl_core::{Device, Init, Kind, Result, Seed, Tensor};

/// The nearest that U comes to 0 and to 1.
const MARGIN: f64 = 1e-15;

/// U in (0, 1), f64 on the CPU.
pub(crate) fn uniform(shape: &[i64], seed: Seed) -> Result<Tensor> {
    let centred = Init::Uniform(0.5).tensor(shape, seed, Kind::Double, Device::Cpu)?;
    centred.add_scalar(0.5)?.clamp(MARGIN, 1.0 - MARGIN)
}

/// G = −ln(−ln U) in the shape, kind and device of `like`: argmax(ℓ + G) is a draw from softmax(ℓ).
pub(crate) fn gumbel(like: &Tensor, seed: Seed) -> Result<Tensor> {
    let g = uniform(&like.size(), seed)?.log()?.neg()?.log()?.neg()?;
    g.to_kind(like.kind())?.to_device(like.device())
}

/// ln U − ln(1 − U) in the shape, kind and device of `like`: ℓ + it is above 0 with probability
/// σ(ℓ).
pub(crate) fn logistic(like: &Tensor, seed: Seed) -> Result<Tensor> {
    let u = uniform(&like.size(), seed)?;
    let l = u.log()?.sub(&u.neg()?.add_scalar(1.0)?.log()?)?;
    l.to_kind(like.kind())?.to_device(like.device())
}
