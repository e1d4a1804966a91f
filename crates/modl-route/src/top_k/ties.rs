//! Who comes first where scores are equal, which they all are where W starts at 0.
//!
//! Ties are broken by vⱼ·x̄ with fixed random directions vⱼ from a seed and the router's path: the
//! same input goes to the same module, different inputs to different ones.

use std::sync::OnceLock;

use modl_core::{Device, Init, Kind, Result, Seed, Tensor};

use crate::scores::{Scored, Scorer};

/// v, `[scores, width]`. It is drawn when it is first asked for: a router of which only the shapes
/// are wanted has none.
#[derive(Debug)]
pub(crate) struct Ties {
    seed: Seed,
    shape: Vec<i64>,
    kind: Kind,
    device: Device,
    drawn: OnceLock<Tensor>,
}

impl Ties {
    /// Directions for each score of `scorer`.
    pub(crate) fn new(seed: u64, scorer: &Scorer, path: &str) -> Self {
        Self::over(seed, &scorer.weight, path)
    }

    /// Directions in the shape of a W `[scores, width]`.
    pub(crate) fn over(seed: u64, w: &Tensor, path: &str) -> Self {
        Ties {
            seed: Seed(seed).child(path),
            shape: w.size(),
            kind: w.kind(),
            device: w.device(),
            drawn: OnceLock::new(),
        }
    }

    fn directions(&self) -> Result<&Tensor> {
        if let Some(v) = self.drawn.get() {
            return Ok(v);
        }
        let v = Init::Normal(1.0).tensor(&self.shape, self.seed, self.kind, self.device)?;
        Ok(self.drawn.get_or_init(|| v))
    }

    /// v·x̄, `[…, scores]`.
    pub(crate) fn second(&self, x: &Tensor) -> Result<Tensor> {
        x.detach()?.linear(&self.directions()?.to_kind(x.kind())?, None)
    }

    /// The `k` modules with the largest ℓ, `[…, k]`, and among equal ones the largest v·x̄.
    pub(crate) fn largest(&self, scored: &Scored, k: usize) -> Result<Tensor> {
        largest(&scored.logits, || self.second(&scored.x), k)
    }
}

/// The indices of the `k` largest `first` along the last dimension, the largest first, and among
/// equal ones of the largest `second`, which is not asked where no two are equal.
pub(crate) fn largest(
    first: &Tensor,
    second: impl FnOnce() -> Result<Tensor>,
    k: usize,
) -> Result<Tensor> {
    let first = first.detach()?;
    // One more than is wanted, which may be as large as the last.
    match places(&first, k + 1)? {
        Some(Places { index, equal: false }) => index.narrow(-1, 0, k as i64),
        Some(_) => by_sorting(&first, &second()?, k),
        None => by_topk(&first, second, k),
    }
}

/// [`largest`] in libtorch's operations, for accelerators, many places, and NaN.
fn by_topk(first: &Tensor, second: impl FnOnce() -> Result<Tensor>, k: usize) -> Result<Tensor> {
    let (top, index) = first.topk((k as i64 + 1).min(first.len_of(-1)), -1)?;
    let pairs = (top.len_of(-1) - 1).max(0);
    let equal =
        top.narrow(-1, 0, pairs)?.equal(&top.narrow(-1, top.len_of(-1) - pairs, pairs)?)?;
    if equal.to_kind(Kind::Int64)?.sum()?.item()? == 0.0 {
        return index.narrow(-1, 0, k as i64);
    }
    by_sorting(first, &second()?, k)
}

fn by_sorting(first: &Tensor, second: &Tensor, k: usize) -> Result<Tensor> {
    let (_, order) = second.sort(-1, true)?;
    // A stable sort by `first` leaves equal ones in the order of `second`.
    let ranked = first.gather(-1, &order)?.argsort(-1, true)?;
    order.gather(-1, &ranked)?.narrow(-1, 0, k as i64)
}

/// The `n` largest values along the last dimension, the largest first.
pub(crate) fn largest_values(of: &Tensor, n: usize) -> Result<Tensor> {
    match places(&of.detach()?, n)? {
        Some(Places { index, .. }) => of.gather(-1, &index),
        None => Ok(of.topk(n as i64, -1)?.0),
    }
}

/// Where the largest are.
struct Places {
    /// `[…, n]`, the largest first.
    index: Tensor,
    /// Whether two of them are equal anywhere.
    equal: bool,
}

/// The places of the up to `n` largest along the last dimension, in one pass over each row. None where
/// it is left to libtorch.
fn places(of: &Tensor, n: usize) -> Result<Option<Places>> {
    const FEW: usize = 16;
    let width = of.len_of(-1).max(0) as usize;
    let n = n.min(width);
    if n == 0 || n > FEW || of.device() != Device::Cpu {
        return Ok(None);
    }
    let found = match of.kind() {
        Kind::Float => places_in(&of.to_vec::<f32>()?, width, n),
        _ => places_in(&of.to_vec::<f64>()?, width, n),
    };
    let Some((index, equal)) = found else { return Ok(None) };
    let mut shape = of.size();
    shape.iter_mut().next_back().into_iter().for_each(|last| *last = n as i64);
    Ok(Some(Places { index: Tensor::from_slice(&index, &shape, Device::Cpu)?, equal }))
}

/// The places of the `n` largest of each row, and whether any two of these are equal; none where
/// there is a NaN, which has no place.
fn places_in<T: PartialOrd + Copy>(all: &[T], width: usize, n: usize) -> Option<(Vec<i64>, bool)> {
    let mut index = Vec::with_capacity(all.len() / width * n);
    let (mut equal, mut nan) = (false, false);
    let mut top: Vec<(T, i64)> = Vec::with_capacity(n + 1);
    for row in all.chunks_exact(width) {
        top.clear();
        let mut least = None;
        for (place, value) in (0..).zip(row) {
            nan |= value.partial_cmp(value).is_none();
            if least.is_some_and(|least| *value <= least) {
                continue;
            }
            top.insert(top.partition_point(|(other, _)| other >= value), (*value, place));
            top.truncate(n);
            if top.len() == n {
                least = top.last().map(|(value, _)| *value);
            }
        }
        equal |= top.iter().zip(top.iter().skip(1)).any(|((a, _), (b, _))| a == b);
        index.extend(top.iter().map(|(_, place)| place));
    }
    (!nan).then_some((index, equal))
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Also where many are equal, or have no number, or there are many places.
        #[test]
        fn one_pass_finds_what_libtorch_finds(
            seed: u64,
            rows in 0i64..9,
            width in 1i64..40,
            k in 1usize..20,
            steps in proptest::option::of(1.0f64..9.0),
            kind in proptest::sample::select(vec![Kind::Float, Kind::Double, Kind::BFloat16]),
            nan: bool,
        ) {
            let k = k.min(width as usize);
            let draw = |name: &str| {
                let seed = Seed(seed).child(name);
                Init::Normal(1.0).tensor(&[rows, 2, width], seed, kind, Device::Cpu).unwrap()
            };
            let mut first = draw("first");
            if let Some(steps) = steps {
                let coarse = first.to_vec::<f64>().unwrap();
                let mut coarse: Vec<f64> = coarse.iter().map(|v| (v * steps).round() + 0.0).collect();
                if nan && let Some(one) = coarse.first_mut() {
                    *one = f64::NAN;
                }
                let shape = [rows, 2, width];
                first = Tensor::from_slice(&coarse, &shape, Device::Cpu).unwrap();
                first = first.to_kind(kind).unwrap();
            }
            let second = draw("second");
            let own = largest(&first, || Ok(second.clone()), k).unwrap();
            let expected = by_topk(&first, || Ok(second.clone()), k).unwrap();
            assert!(own.bit_equal(&expected).unwrap(), "{first:?}: {own:?} {expected:?}");
            let own = largest_values(&first, k).unwrap();
            let expected = first.topk(k as i64, -1).unwrap().0;
            assert!(own.bit_equal(&expected).unwrap());
        }
    }

    #[test]
    fn the_second_decides_among_equal_ones_alone() {
        let tensor =
            |v: &[f64]| Tensor::from_slice(v, &[v.len() as i64 / 4, 4], Device::Cpu).unwrap();
        let second = tensor(&[1.0, 4.0, 2.0, 3.0, 1.0, 4.0, 2.0, 3.0]);
        let choose = |first: &[f64], k| {
            largest(&tensor(first), || Ok(second.clone()), k).unwrap().to_vec::<i64>().unwrap()
        };
        let mixed = [5.0, 0.0, 5.0, 5.0, 9.0, 7.0, 8.0, 6.0];
        assert_eq!(choose(&mixed, 2), [3, 2, 0, 2]);
        assert_eq!(choose(&mixed, 4), [3, 2, 0, 1, 0, 2, 1, 3]);
        // The two that could be third are equal, the two that are chosen are not.
        assert_eq!(choose(&[3.0, 1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0], 2), [0, 2, 0, 3]);
        assert_eq!(choose(&[3.0, 1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0], 3), [0, 2, 1, 0, 3, 1]);
        // Without equal ones it is not asked.
        let not_asked = || Err(modl_core::Error::invalid("second", "was asked"));
        let found = largest(&tensor(&[1.0, 4.0, 3.0, 2.0]), not_asked, 2).unwrap();
        assert_eq!(found.to_vec::<i64>().unwrap(), [1, 2]);
    }
}
