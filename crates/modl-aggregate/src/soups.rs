//! Model soups: averages of models that were fine-tuned from one start (Wortsman et al. 2022,
//! arXiv 2203.05482; survey §5.1). The uniform soup is [`Linear`](crate::parameters::Linear) with equal
//! weights.

use modl_core::{Error, Result, Tensors};

/// When a model is taken into a greedy soup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Convention {
    /// Where the score does not fall (≥), as the paper's Recipe 1 says.
    #[default]
    Paper,
    /// Where the score rises (>), as the authors' program does.
    Reference,
}

/// A greedy soup.
#[derive(Debug, Clone, PartialEq)]
pub struct Soup {
    /// The models in it, in the order in which they were taken.
    pub members: Vec<usize>,
    /// The score of their average.
    pub score: f64,
    /// The models in the order in which they were tried, each with the score of the soup with it.
    pub tried: Vec<(usize, f64)>,
}

/// Puts models into a soup one by one, the best alone first, and keeps those with which the average
/// scores well. `scores` are those of the models alone, higher is better; of equal ones the model
/// that is named first is tried first. `validate` scores the average of some models, on the same
/// held-out data. The soup's score is never below that of the best model.
///
/// ```
/// # use modl_aggregate::soups::{Convention, greedy};
/// // Models on a line, to be near 0: the average of −1 and 2 is better than either.
/// let at = [-1.0, 2.0, 9.0];
/// let score = |members: &[usize]| {
///     -(members.iter().map(|m| at[*m]).sum::<f64>() / members.len() as f64).abs()
/// };
/// let alone: Vec<f64> = (0..3).map(|m| score(&[m])).collect();
/// let soup = greedy(&alone, Convention::Paper, |members| Ok(score(members)))?;
/// assert_eq!((soup.members, soup.score), (vec![0, 1], -0.5));
/// # Ok::<(), modl_core::Error>(())
/// ```
///
/// # Errors
/// Where there is no model, or a score is no number; what `validate` gives.
pub fn greedy(
    scores: &[f64],
    convention: Convention,
    mut validate: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<Soup> {
    let number = |model: usize, score: f64| match score.is_nan() {
        true => Err(Error::invalid(format!("score with model {model}"), "is no number")),
        false => Ok(score),
    };
    for (model, score) in scores.iter().enumerate() {
        number(model, *score)?;
    }
    let mut order: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
    // A stable sort leaves equal ones in their order.
    order.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let Some((&(best, score), rest)) = order.split_first() else {
        return Err(Error::invalid("soup", "there is no model"));
    };
    let mut soup = Soup { members: vec![best], score, tried: vec![(best, score)] };
    for (model, _) in rest {
        soup.members.push(*model);
        let score = number(*model, validate(&soup.members)?)?;
        soup.tried.push((*model, score));
        let taken = match convention {
            Convention::Paper => score >= soup.score,
            Convention::Reference => score > soup.score,
        };
        match taken {
            true => soup.score = score,
            false => drop(soup.members.pop()),
        }
    }
    Ok(soup)
}

/// Σ wᵢθᵢ of models in memory, tensor by tensor: with weights 1⁄n the uniform soup.
///
/// # Errors
/// Where the models have not the same tensors, or there is none.
pub fn weighted(models: &[(&Tensors, f64)]) -> Result<Tensors> {
    let Some((first, _)) = models.first() else {
        return Err(Error::invalid("soup", "there is no model"));
    };
    first.map(|name, t| {
        let mut sum = t.zeros_like()?;
        for (model, w) in models {
            sum = sum.add(&model.need(name)?.mul_scalar(*w)?)?;
        }
        Ok(sum)
    })
}
