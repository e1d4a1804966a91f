//! The k largest, by rank.
//!
//! Reference code compares with the k-th largest value, and keeps more than k where values are
//! equal: all of them where a layer is all zero. Here elements are ranked: of equal ones the one
//! with the lowest index wins (row-major; across tensors, in their order), so that there are
//! exactly k. Survey §3.1.

use modl_core::{Device, Error, Kind, Result, Tensor, Tensors};

/// A mask (bool, the shape of `scores`) of the `k` largest; of all where there are fewer.
///
/// # Errors
/// Where a score is NaN or infinite.
pub fn top_k(scores: &Tensor, k: usize) -> Result<Tensor> {
    let flat = scores.detach()?.reshape(&[-1])?;
    if flat.is_finite()?.all()?.item()? == 0.0 {
        return Err(Error::invalid("scores to rank", "are not all finite numbers"));
    }
    let n = flat.len_of(0);
    let k = (k as i64).min(n);
    let chosen = flat.argsort(0, true)?.narrow(0, 0, k)?;
    let bools = |of: i64, on: bool| Tensor::full(&[of], f64::from(on), Kind::Bool, flat.device());
    bools(n, false)?.index_copy(0, &chosen, &bools(k, true)?)?.reshape(&scores.size())
}

/// [`top_k`] among all elements of several tensors: a mask for each.
///
/// # Errors
/// Where a score is NaN or infinite.
pub fn top_k_across(scores: &Tensors, k: usize) -> Result<Tensors> {
    let flat: Result<Vec<Tensor>> =
        scores.iter().map(|(_, t)| t.detach()?.reshape(&[-1])?.to_device(Device::Cpu)).collect();
    let flat = flat?;
    if flat.is_empty() {
        return Ok(Tensors::new());
    }
    let mask = top_k(&Tensor::cat(&flat, 0)?, k)?;
    let mut start = 0;
    scores.map(|_, t| {
        let own = mask.narrow(0, start, t.numel() as i64)?;
        start += t.numel() as i64;
        own.reshape(&t.size())?.to_device(t.device())
    })
}

/// ⌊fraction · n⌋, where 0.1 · 30 is 3 although it is a little less in binary.
pub(super) fn share(fraction: f64, n: usize) -> usize {
    (fraction * n as f64 + 1e-6).floor().clamp(0.0, n as f64) as usize
}

/// Checks a share of weights or steps.
///
/// # Errors
/// Where it is not in (0, 1].
pub(super) fn check_share(what: &str, value: f64) -> Result<()> {
    if value > 0.0 && value <= 1.0 {
        return Ok(());
    }
    Err(Error::invalid(what, format!("is {value}, wants a share above 0 and at most 1")))
}

/// The step, counted from 1, at which the share `at` of `total` steps is done.
pub(super) fn step_at(at: f64, total: u64) -> u64 {
    ((at * total as f64).round() as u64).clamp(1, total.max(1))
}
