//! Gradients of several parameters as one vector.

use modl_core::{Kind, Result, Tensor, no_grad};

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

/// The sums of gradients, parameter by parameter; `None` where none of the two had a part.
pub(crate) fn added(a: Vec<Option<Tensor>>, b: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
    no_grad(|| a.into_iter().zip(b).map(|(a, b)| plus(a, b)).collect())
}

/// Adds `factor` times `other` to sums, of which those begin that there are not yet.
pub(crate) fn accumulate(
    sums: &mut [Option<Tensor>],
    factor: f64,
    other: &[Option<Tensor>],
) -> Result<()> {
    no_grad(|| {
        for (sum, other) in sums.iter_mut().zip(other) {
            let own = other.as_ref().map(|t| t.mul_scalar(factor)).transpose()?;
            *sum = plus(sum.take(), own)?;
        }
        Ok(())
    })
}

fn plus(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => a.add(&b).map(Some),
        (a, b) => Ok(a.or(b)),
    }
}
