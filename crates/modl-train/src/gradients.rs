//! Gradients of several parameters as one vector.

use modl_core::{Error, Kind, Result, Tensor, no_grad};

/// Σ a·b over the parameters that have a gradient in both, summed in f64 over parameters.
pub(crate) fn dot(a: &[Option<Tensor>], b: &[Option<Tensor>]) -> Result<f64> {
    no_grad(|| {
        let mut sum = 0.0;
        for (a, b) in a.iter().zip(b) {
            let (Some(a), Some(b)) = (a, b) else { continue };
            sum += a.mul(b)?.to_kind(Kind::Double)?.sum()?.item()?;
        }
        Ok(sum)
    })
}

/// Of gradients those of parameters that have one in `grads`, too.
pub(crate) fn where_there(
    other: Vec<Option<Tensor>>,
    grads: &[Option<Tensor>],
) -> Vec<Option<Tensor>> {
    other.into_iter().zip(grads).map(|(o, g)| o.filter(|_| g.is_some())).collect()
}

/// Adds `factor` times `other` to the gradients that there are; what has none keeps none.
pub(crate) fn add_scaled(
    grads: &mut [Option<Tensor>],
    factor: f64,
    other: &[Option<Tensor>],
) -> Result<()> {
    no_grad(|| {
        for (grad, other) in grads.iter_mut().zip(other) {
            if let (Some(own), Some(other)) = (grad.as_ref(), other) {
                *grad = Some(own.add(&other.mul_scalar(factor)?)?);
            }
        }
        Ok::<(), Error>(())
    })
}

/// Adds `factor` times `other` to sums, of which those begin that there are not yet.
pub(crate) fn accumulate(
    sums: &mut [Option<Tensor>],
    factor: f64,
    other: &[Option<Tensor>],
) -> Result<()> {
    no_grad(|| {
        for (sum, other) in sums.iter_mut().zip(other) {
            let Some(other) = other else { continue };
            let own = other.mul_scalar(factor)?;
            *sum = Some(match sum.take() {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        Ok::<(), Error>(())
    })
}
