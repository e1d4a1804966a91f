//! The diagonal of the Fisher information of a classifier's parameters.

use modl_core::{Error, Kind, Result, ResultExt, Tensor, Tensors, no_grad, with_grad};

/// F = E over examples of Σ_c p(c | x) (∂ ln p(c | x) ⁄ ∂θ)², number by number, for the parameters that
/// are given: the expectation over labels is exact, the one over inputs is the mean of `examples`
/// examples, each of which has gradients of its own.
///
/// `log_probs` gives ln p(· | x) `[classes]` of one example by its number, from the very tensors that
/// are given; they have gradients while it runs. One backward pass for each class and example is made.
/// In f32, or f64 for parameters of f64. A parameter that no example depends on has 0.
///
/// Matena and Raffel 2022, arXiv 2111.09832.
///
/// ```
/// # use modl_core::{Device, Result, Tensor, Tensors};
/// # fn main() -> Result<()> {
/// // One input, two classes, p(0) = σ(θx) with θ = 0: F = x² p (1 − p).
/// let theta = Tensors::new().with("theta", Tensor::from_slice(&[0f64], &[], Device::Cpu)?);
/// let xs = [2.0, 4.0];
/// let fisher = modl_aggregate::statistics::diagonal_fisher(&theta, xs.len(), |i| {
///     let logit = theta.need("theta")?.mul_scalar(xs[i])?;
///     Tensor::stack(&[logit.clone(), logit.zeros_like()?], 0)?.log_softmax(0)
/// })?;
/// assert!((fisher.need("theta")?.item()? - 2.5).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Where `log_probs` does not give one dimension, or what it gives fails.
pub fn diagonal_fisher(
    parameters: &Tensors,
    examples: usize,
    log_probs: impl Fn(usize) -> Result<Tensor>,
) -> Result<Tensors> {
    if examples == 0 || parameters.is_empty() {
        return Err(Error::invalid("Fisher information", "needs parameters, and examples"));
    }
    let before: Vec<bool> = parameters.iter().map(|(_, p)| p.requires_grad()).collect();
    let found = with_grad(|| {
        for (name, p) in parameters.iter() {
            p.set_requires_grad(true).at(name)?;
        }
        mean(parameters, examples, log_probs)
    });
    for ((_, p), on) in parameters.iter().zip(before) {
        p.set_requires_grad(on)?;
    }
    found
}

fn mean(
    parameters: &Tensors,
    examples: usize,
    log_probs: impl Fn(usize) -> Result<Tensor>,
) -> Result<Tensors> {
    let leaves: Vec<&Tensor> = parameters.iter().map(|(_, p)| p).collect();
    let wide = |p: &Tensor| if p.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let mut sums: Vec<Tensor> = leaves
        .iter()
        .map(|p| Tensor::zeros(&p.size(), wide(p), p.device()))
        .collect::<Result<_>>()?;
    for example in 0..examples {
        let logs = log_probs(example)?;
        let [classes] = logs.size()[..] else {
            let problem = format!("of example {example} are {:?} and not [classes]", logs.size());
            return Err(Error::invalid("log probabilities", problem));
        };
        for class in 0..classes {
            let one = logs.select(0, class)?;
            let p = one.item()?.exp();
            // The graph is used once more for each class but the last.
            let gradients = one.gradients(&leaves, class + 1 < classes)?;
            no_grad(|| {
                for (sum, g) in sums.iter_mut().zip(gradients) {
                    if let Some(g) = g {
                        let square = g.detach()?.to_kind(sum.kind())?.square()?;
                        sum.add_in_place(&square.mul_scalar(p / examples as f64)?)?;
                    }
                }
                Ok::<(), Error>(())
            })?;
        }
    }
    Ok(parameters.iter().zip(sums).map(|((name, _), s)| (name.to_owned(), s)).collect())
}

/// Each model's Fisher information divided by its norm over all tensors, so that no model counts more
/// for the size of its gradients alone: the reference implementation's default.
///
/// # Errors
/// Where it is 0 everywhere, or not finite.
pub fn normalized(fisher: &Tensors) -> Result<Tensors> {
    let mut square = 0.0;
    for (_, f) in fisher.iter() {
        square += f.to_kind(Kind::Double)?.square()?.sum()?.item()?;
    }
    if !(square.is_finite() && square > 0.0) {
        return Err(Error::invalid("Fisher information", format!("has norm {}", square.sqrt())));
    }
    fisher.map(|_, f| f.mul_scalar(1.0 / square.sqrt()))
}
