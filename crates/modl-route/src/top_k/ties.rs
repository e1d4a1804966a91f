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
    let (first, k) = (first.detach()?, k as i64);
    // One more than is wanted, which may be as large as the last.
    let (top, index) = first.topk((k + 1).min(first.len_of(-1)), -1)?;
    let pairs = (top.len_of(-1) - 1).max(0);
    let equal =
        top.narrow(-1, 0, pairs)?.equal(&top.narrow(-1, top.len_of(-1) - pairs, pairs)?)?;
    if equal.to_kind(Kind::Int64)?.sum()?.item()? == 0.0 {
        return index.narrow(-1, 0, k);
    }
    let (_, order) = second()?.sort(-1, true)?;
    // A stable sort by `first` leaves equal ones in the order of `second`.
    let ranked = first.gather(-1, &order)?.argsort(-1, true)?;
    order.gather(-1, &ranked)?.narrow(-1, 0, k)
}

#[cfg(test)]
mod tests {
    use modl_core::Device;

    use super::*;

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
