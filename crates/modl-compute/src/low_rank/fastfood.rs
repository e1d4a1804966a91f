//! Fastfood: a random projection from d to N ≥ d dimensions without its matrix.
//!
//! P z = (H G Π H B z̃)₁…N ⁄ √(ΣG² · N), where z̃ is z filled up with zeros to n = 2^⌈log₂ N⌉, B are random
//! signs, Π is a random permutation, G are standard normal numbers, and H is the Walsh–Hadamard
//! matrix with entries ±1. On average ‖P z‖² = ‖z‖². It takes 3 n numbers and O(n log n) time where
//! the matrix would take N·d.
//!
//! Le et al. 2013, *Fastfood: Approximate Kernel Expansions in Loglinear Time*, arXiv 1408.3060, in
//! the form of Aghajanyan et al. 2021, arXiv 2012.13255. Survey §3.1.

use modl_core::{Device, Error, Init, Kind, Result, Seed, Tensor};

use super::permutation::permutation;

/// One such projection.
#[derive(Debug, Clone)]
pub struct Fastfood {
    /// B, `[n]`.
    signs: Tensor,
    /// Π, `[n]` i64.
    order: Tensor,
    /// G ⁄ √(ΣG² · N), `[n]`.
    gauss: Tensor,
    /// N.
    output: i64,
    /// n.
    padded: i64,
}

impl Fastfood {
    /// The projection to `output` = N dimensions that belongs to the seed.
    ///
    /// # Errors
    /// Where N is not positive or too large (2³² ⁄ 20).
    pub fn new(output: i64, seed: Seed, kind: Kind, device: Device) -> Result<Self> {
        let n =
            u64::try_from(output).ok().filter(|n| *n > 0).and_then(u64::checked_next_power_of_two);
        let Some(n) = n.and_then(|n| i64::try_from(n).ok()) else {
            return Err(Error::invalid("fastfood", format!("to {output} dimensions")));
        };
        let order = permutation(n, n, seed.child("order").0)?;
        let draw = |init: Init, of: &str| init.tensor(&[n], seed.child(of), Kind::Double, device);
        let gauss = draw(Init::Normal(1.0), "gauss")?;
        let scale = (gauss.square()?.sum()?.item()? * output as f64).sqrt().recip();
        let signs = draw(Init::Uniform(1.0), "signs")?.ge_scalar(0.0)?.to_kind(kind)?;
        Ok(Fastfood {
            signs: signs.mul_scalar(2.0)?.add_scalar(-1.0)?,
            order: Tensor::from_slice(&order, &[n], device)?,
            gauss: gauss.mul_scalar(scale)?.to_kind(kind)?,
            output,
            padded: n,
        })
    }

    /// P z, `[N]`, for z `[d]`. Of a z longer than n, the first n numbers count, as in the reference
    /// code.
    pub fn project(&self, z: &Tensor) -> Result<Tensor> {
        let d = z.len_of(0).min(self.padded);
        let z = z.narrow(0, 0, d)?.pad(&[0, self.padded - d])?;
        let mixed = walsh_hadamard(&z.mul(&self.signs)?)?;
        let mixed = mixed.index_select(0, &self.order)?.mul(&self.gauss)?;
        walsh_hadamard(&mixed)?.narrow(0, 0, self.output)
    }
}

/// The largest matrix that the transform is put together from.
const RADIX: i64 = 64;

/// H x for x `[n]`, n a power of 2, with Sylvester's H: entries ±1, H H = n·I.
///
/// # Errors
/// Where n is not a power of 2.
pub fn walsh_hadamard(x: &Tensor) -> Result<Tensor> {
    let n = x.len_of(0);
    if n < 1 || n & (n - 1) != 0 || x.dim() != 1 {
        let problem = format!("of {:?}, wants one dimension and a power of 2", x.size());
        return Err(Error::invalid("walsh_hadamard", problem));
    }
    // H of size n is the Kronecker product of smaller ones. Each step transforms the last digit of
    // the index and makes it the first.
    let (mut y, mut left) = (x.clone(), n);
    while left > 1 {
        let radix = left.min(RADIX);
        y = y.reshape(&[-1, radix])?.matmul(&hadamard(radix, x)?)?.t()?;
        left /= radix;
    }
    y.reshape(&[n])
}

/// H `[n, n]`.
fn hadamard(n: i64, like: &Tensor) -> Result<Tensor> {
    let mut h = Tensor::ones(&[1, 1], like.kind(), like.device())?;
    while h.len_of(0) < n {
        let top = Tensor::cat(&[h.clone(), h.clone()], 1)?;
        let bottom = Tensor::cat(&[h.clone(), h.neg()?], 1)?;
        h = Tensor::cat(&[top, bottom], 0)?;
    }
    Ok(h)
}
