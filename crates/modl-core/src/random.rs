//! Seeds, initial values and dropout.
//!
//! Every random number comes from a [`Seed`] that the caller gives, and from the path of the
//! place that draws: the same seed gives the same parameters and the same dropout masks, whatever
//! the order of construction or the number of threads. libtorch's global generator is never used.

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_xoshiro::Xoshiro256PlusPlus;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Device, Kind, Result, Tensor};

/// The start of a stream of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(pub u64);

impl Seed {
    /// An independent seed for a named place: `Seed(7).child("encoder.layer.3.router")`.
    pub fn child(self, path: &str) -> Seed {
        let mut hash = Sha256::new();
        hash.update(self.0.to_le_bytes());
        hash.update(path.as_bytes());
        let digest = hash.finalize();
        Seed(digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte)))
    }

    /// An independent seed for a number: a step, an epoch, a row.
    pub fn nth(self, n: u64) -> Seed {
        // SplitMix64's finaliser: cheap enough to be called for every dropout of every step.
        let mut z =
            self.0 ^ n.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0xD1B5_4A32_D192_ED03);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Seed(z ^ (z >> 31))
    }

    /// A generator whose stream is fixed by the algorithm (ChaCha with 8 rounds).
    pub fn rng(self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.0)
    }
}

/// How a new parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// 0 everywhere.
    Zeros,
    /// 1 everywhere.
    Ones,
    /// One value everywhere.
    Constant(f64),
    /// Uniform in ±bound.
    Uniform(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in ±1⁄√fan_in with fan_in = product of all but the first dimension: what PyTorch's
    /// `kaiming_uniform_(a=√5)` and `nn.Linear` do.
    Kaiming,
}

impl Init {
    /// Draws a tensor of `shape`.
    pub fn tensor(self, shape: &[i64], seed: Seed, kind: Kind, device: Device) -> Result<Tensor> {
        let n = shape.iter().product::<i64>().max(0) as usize;
        let uniform =
            |bound: f64| drawn(n, seed, 1, |rng| bound * (2.0 * rng.r#gen::<f64>() - 1.0));
        let values: Vec<f64> = match self {
            Init::Zeros => return Tensor::zeros(shape, kind, device),
            Init::Ones => return Tensor::ones(shape, kind, device),
            Init::Constant(c) => return Tensor::full(shape, c, kind, device),
            Init::Uniform(bound) => uniform(bound),
            Init::Kaiming => {
                let fan_in = shape.iter().skip(1).product::<i64>().max(1);
                uniform(1.0 / (fan_in as f64).sqrt())
            }
            Init::Normal(std) => drawn(n, seed, 2, |rng| std * normal(rng)),
        };
        Tensor::from_slice(&values, shape, Device::Cpu)?.to_kind(kind)?.to_device(device)
    }
}

/// `n` numbers of one stream, each made of `each` numbers of 64 bits. Threads start where their part
/// of the stream does, so that it is the same for any number of them.
fn drawn(
    n: usize,
    seed: Seed,
    each: u128,
    one: impl Fn(&mut ChaCha8Rng) -> f64 + Sync,
) -> Vec<f64> {
    const PART: usize = 1 << 12;
    let mut values = vec![0.0; n];
    values.par_chunks_mut(PART).enumerate().for_each(|(part, values)| {
        let mut rng = seed.rng();
        rng.set_word_pos(2 * each * (part * PART) as u128); // A word has 32 bits.
        values.iter_mut().for_each(|value| *value = one(&mut rng));
    });
    values
}

/// One standard normal number (Box and Muller's first).
fn normal(rng: &mut impl Rng) -> f64 {
    let u: f64 = 1.0 - rng.r#gen::<f64>();
    let v: f64 = rng.r#gen();
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// The share of 256 that dropout with probability `p` drops, and the factor that keeps the mean.
fn quantise(p: f64) -> (u8, f64) {
    let dropped = (p * 256.0).round().clamp(0.0, 255.0);
    (dropped as u8, 256.0 / (256.0 - dropped))
}

/// A mask of `shape` and of a floating `kind` for a product: 0 where an element is dropped, and
/// where it is kept the factor that keeps the mean. `p` is rounded to 1⁄256; the factor is exact
/// for the rounded probability up to the precision of `kind`.
pub fn dropout_mask(
    shape: &[i64],
    p: f64,
    seed: Seed,
    kind: Kind,
    device: Device,
) -> Result<Tensor> {
    let (threshold, scale) = quantise(p);
    match kind {
        // Written straight into the tensor: masks are as large as activations, and each further
        // pass over memory costs more than the random numbers.
        Kind::Float => crate::ffi::filled(shape, kind, |out: &mut [f32]| {
            draw(out, threshold, seed, 0.0, scale as f32);
        })?,
        Kind::BFloat16 => crate::ffi::filled(shape, kind, |out: &mut [half::bf16]| {
            draw(out, threshold, seed, half::bf16::ZERO, half::bf16::from_f64(scale));
        })?,
        _ => crate::ffi::filled(shape, Kind::Double, |out: &mut [f64]| {
            draw(out, threshold, seed, 0.0, scale);
        })?
        .to_kind(kind)?,
    }
    .to_device(device)
}

/// Elements that are drawn by one generator. The blocks do not depend on the number of threads.
const BLOCK: usize = 1 << 16;

fn draw<T: Copy + Send + Sync>(out: &mut [T], threshold: u8, seed: Seed, dropped: T, kept: T) {
    let block = |(n, part): (usize, &mut [T])| {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed.nth(n as u64).0);
        let mut bytes = [0u8; 256];
        for elements in part.chunks_mut(bytes.len()) {
            rng.fill_bytes(&mut bytes);
            for (x, byte) in elements.iter_mut().zip(&bytes) {
                *x = if *byte < threshold { dropped } else { kept };
            }
        }
    };
    out.par_chunks_mut(BLOCK).enumerate().for_each(block);
}

/// Each element of `x` is zero with probability `p` (rounded to 1⁄256) and rescaled otherwise, so
/// that the mean stays (Srivastava et al. 2014); `x` itself where `p` is 0.
pub fn dropout(x: &Tensor, p: f64, seed: Seed) -> Result<Tensor> {
    if p <= 0.0 {
        return Ok(x.clone());
    }
    x.mul(&dropout_mask(&x.size(), p, seed, x.kind(), x.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_differ_by_path_and_repeat() {
        assert_eq!(Seed(1).child("a"), Seed(1).child("a"));
        assert_ne!(Seed(1).child("a"), Seed(1).child("b"));
        assert_ne!(Seed(1).child("a"), Seed(2).child("a"));
        assert_ne!(Seed(1).nth(0), Seed(1).nth(1));
    }

    #[test]
    fn the_stream_is_that_of_one_thread() {
        let mut rng = Seed(9).rng();
        let expected: Vec<f64> = (0..10_000).map(|_| 2.0 * normal(&mut rng)).collect();
        let t = Init::Normal(2.0).tensor(&[10_000], Seed(9), Kind::Double, Device::Cpu).unwrap();
        assert_eq!(t.to_vec::<f64>().unwrap(), expected);
        let mut rng = Seed(9).rng();
        let expected: Vec<f64> = (0..10_000).map(|_| 2.0 * rng.r#gen::<f64>() - 1.0).collect();
        let t = Init::Uniform(1.0).tensor(&[10_000], Seed(9), Kind::Double, Device::Cpu).unwrap();
        assert_eq!(t.to_vec::<f64>().unwrap(), expected);
    }

    #[test]
    fn initial_values_have_the_moments_they_claim() {
        let moments = |init: Init| {
            let v = init.tensor(&[200, 100], Seed(3), Kind::Double, Device::Cpu).unwrap();
            let v = v.to_vec::<f64>().unwrap();
            let mean = v.iter().sum::<f64>() / v.len() as f64;
            let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64;
            (mean, var, v.iter().fold(0f64, |m, x| m.max(x.abs())))
        };
        let (mean, var, _) = moments(Init::Normal(0.5));
        assert!(mean.abs() < 0.015 && (var - 0.25).abs() < 0.01, "{mean} {var}");
        let (mean, var, largest) = moments(Init::Kaiming);
        assert!(mean.abs() < 0.003 && (var - 0.01 / 3.0).abs() < 2e-4 && largest <= 0.1);
    }

    #[test]
    fn dropout_keeps_the_mean_and_drops_the_share() {
        let x = Tensor::ones(&[400, 500], Kind::Float, Device::Cpu).unwrap();
        let y = dropout(&x, 0.1, Seed(5)).unwrap().to_vec::<f64>().unwrap();
        let dropped = y.iter().filter(|v| **v == 0.0).count() as f64 / y.len() as f64;
        let mean = y.iter().sum::<f64>() / y.len() as f64;
        // 26/256 = 0.1016; three standard errors of a share of 200,000 are 0.002.
        assert!((dropped - 26.0 / 256.0).abs() < 0.002, "{dropped}");
        assert!((mean - 1.0).abs() < 0.0025, "{mean}");
        let again = dropout(&x, 0.1, Seed(5)).unwrap().to_vec::<f64>().unwrap();
        assert_eq!(y, again);
        // The same elements are dropped in every kind.
        for kind in [Kind::BFloat16, Kind::Double] {
            let other = dropout(&x.to_kind(kind).unwrap(), 0.1, Seed(5)).unwrap();
            let zeros = |v: &[f64]| v.iter().map(|v| *v == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros(&other.to_vec::<f64>().unwrap()), zeros(&y));
        }
    }
}
