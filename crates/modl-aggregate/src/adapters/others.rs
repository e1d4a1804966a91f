//! Adapters that are no changes of weights: scalings, prompts and prefixes, networks between layers.

use modl_core::{Error, Kind, Result, Tensor, no_grad};

/// 1 + Σ wⱼ(lⱼ − 1): the scalings of (IA)³ as changes of the identity, so that a weight of 0 is no
/// scaling at all and one adapter of weight 1 is itself. An adapter that does not stand here has
/// l = 1.
///
/// # Errors
/// Where shapes or numbers of weights do not fit.
pub fn scalings_around_one(scalings: &[Option<Tensor>], weights: &[f64]) -> Result<Tensor> {
    let (present, first) = present(scalings, weights)?;
    if let [(w, only)] = present.as_slice()
        && *w == 1.0
    {
        return Ok((*only).clone());
    }
    let terms = present.iter().map(|(w, l)| Ok((*w, wide(l)?.add_scalar(-1.0)?)));
    sum(terms.collect::<Result<Vec<_>>>()?, first)?.add_scalar(1.0)?.to_kind(kept(&present))
}

/// Π lⱼ^wⱼ: one scaling after the other, where weights are 1.
///
/// # Errors
/// As [`scalings_around_one`], and where a number that is not positive is to have a power that is
/// not whole.
pub fn product_of_scalings(scalings: &[Option<Tensor>], weights: &[f64]) -> Result<Tensor> {
    let (present, first) = present(scalings, weights)?;
    let mut product = wide(first)?.ones_like()?;
    for (w, l) in &present {
        let power = wide(l)?.pow(*w)?;
        if !power.sum()?.item()?.is_finite() {
            return Err(Error::unsupported(
                format!("a scaling with numbers that are not positive to the power {w}"),
                "merge with `concat`, 1 + Σ w (l − 1), or with whole weights",
            ));
        }
        product = product.mul(&power)?;
    }
    product.to_kind(kept(&present))
}

/// Σ wⱼφⱼ of tensors of one shape: what PEFT's convention is for scalings, and a plain sum of prompts.
///
/// # Errors
/// Where shapes or numbers of weights do not fit.
pub fn weighted_sum(tensors: &[Option<Tensor>], weights: &[f64]) -> Result<Tensor> {
    let (present, first) = present(tensors, weights)?;
    let terms = present.iter().map(|(w, t)| Ok((*w, wide(t)?)));
    sum(terms.collect::<Result<Vec<_>>>()?, first)?.to_kind(kept(&present))
}

/// Σ wⱼφⱼ ⁄ Σ wⱼ of tensors of one shape that all have.
///
/// # Errors
/// Where shapes or numbers of weights do not fit, one has no such tensor, or the weights sum to 0.
pub fn average(tensors: &[Option<Tensor>], weights: &[f64]) -> Result<Tensor> {
    let total: f64 = weights.iter().sum();
    if total == 0.0 {
        return Err(Error::invalid("weights", "sum to 0, and an average is divided by their sum"));
    }
    if tensors.iter().any(Option::is_none) {
        return Err(Error::invalid("adapters", "not all have it; an average is of what all have"));
    }
    let shares: Vec<f64> = weights.iter().map(|w| w / total).collect();
    weighted_sum(tensors, &shares)
}

/// The tokens of all prompts `[tokens · stacks, …]`, one prompt behind the other in each stack.
/// Their number is the sum; nothing is mixed.
///
/// # Errors
/// Where a weight is not 1, widths do not fit, or tokens are no multiple of the stacks.
pub fn joined_prompts(prompts: &[Tensor], weights: &[f64], stacks: i64) -> Result<Tensor> {
    if weights.len() != prompts.len() || weights.iter().any(|w| *w != 1.0) {
        return Err(Error::invalid(
            "weights",
            format!("are {weights:?}, and prompts that are joined have none; use `average`"),
        ));
    }
    let stacks = stacks.max(1);
    let mut parts = Vec::new();
    for stack in 0..stacks {
        for prompt in prompts {
            let tokens = prompt.len_of(0);
            if tokens % stacks != 0 {
                let problem = format!("{tokens} rows for {stacks} stacks");
                return Err(Error::invalid("prompt", problem));
            }
            let each = tokens / stacks;
            parts.push(prompt.narrow(0, stack * each, each)?);
        }
    }
    let widths: Vec<Vec<i64>> = parts.iter().map(|p| p.size().split_off(1)).collect();
    if widths.windows(2).any(|w| w.first() != w.last()) {
        let problem = format!("have the widths {widths:?}; they are of different models");
        return Err(Error::invalid("prompts", problem));
    }
    Tensor::cat(&parts, 0)
}

type Present<'a> = (Vec<(f64, &'a Tensor)>, &'a Tensor);

/// What is there, and has a weight, of one shape.
fn present<'a>(tensors: &'a [Option<Tensor>], weights: &[f64]) -> Result<Present<'a>> {
    if tensors.len() != weights.len() {
        let problem = format!("there are {} for {} adapters", weights.len(), tensors.len());
        return Err(Error::invalid("weights", problem));
    }
    let all: Vec<&Tensor> = tensors.iter().flatten().collect();
    let first = all.first().ok_or_else(|| Error::invalid("adapters", "none has it"))?;
    if let Some(other) = all.iter().find(|t| t.size() != first.size()) {
        let problem = format!("have the shapes {:?} and {:?}", first.size(), other.size());
        return Err(Error::invalid("adapters", problem));
    }
    let weighted = weights.iter().zip(tensors).filter(|(w, _)| **w != 0.0);
    Ok((weighted.filter_map(|(w, t)| Some((*w, t.as_ref()?))).collect(), first))
}

fn wide(t: &Tensor) -> Result<Tensor> {
    t.detach()?.to_kind(Kind::Double)
}

/// f64 where one is, else f32.
fn kept(all: &[(f64, &Tensor)]) -> Kind {
    if all.iter().any(|(_, t)| t.kind() == Kind::Double) { Kind::Double } else { Kind::Float }
}

fn sum(terms: Vec<(f64, Tensor)>, like: &Tensor) -> Result<Tensor> {
    no_grad(|| {
        let zero = wide(like)?.zeros_like()?;
        terms.into_iter().try_fold(zero, |sum, (w, t)| sum.add(&t.mul_scalar(w)?))
    })
}
