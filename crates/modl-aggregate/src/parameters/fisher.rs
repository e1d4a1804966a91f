//! Fisher merging: θ = Σ wᵢFᵢθᵢ ⁄ Σ wᵢFᵢ, number by number, where Fᵢ is the diagonal of model i's
//! Fisher information (Matena and Raffel 2022, arXiv 2111.09832; survey §5.1).
//!
//! It is the most likely θ where each model's posterior is a normal distribution around θᵢ with
//! precision Fᵢ: the exact optimum of a sum of losses that are quadratic with diagonal Hessians Fᵢ.
//! Each Fᵢ is read from a file that [`diagonal_fisher`](crate::statistics::diagonal_fisher) makes.
//! A tensor of which no file has a Fisher information becomes the average with the weights alone.
//!
//! The reference implementation keeps the `floor` to the first model, and divides each Fᵢ by its norm
//! over the whole model, which [`normalized`](crate::statistics::normalized) does before the file is
//! written; `normalize` here takes the norm of each tensor.

use modl_core::{Error, Result};

use super::combination::combination;
use crate::merge::{Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec, Statistics, inner};

/// Σ wᵢFᵢθᵢ ⁄ Σ wᵢFᵢ.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fisher;

const SETTINGS: &[Setting] = &[
    Setting::each_or("weight", 1.0, "share of the model"),
    Setting::number_or("floor", 1e-6, "the least that a Fisher information counts"),
    Setting::flag("normalize", false, "divide each model's by its norm over the tensor"),
];

impl MergeMethod for Fisher {
    fn spec(&self) -> Spec {
        Spec::new("fisher", "Average weighted by Fisher information", "Matena & Raffel 2022")
            .settings(SETTINGS)
            .statistics(Statistics::Fisher)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let weights = positive(settings.each("weight")?)?;
        let floor = settings.number("floor")?;
        if !(floor.is_finite() && floor >= 0.0) {
            return Err(Error::invalid("parameter `floor`", format!("is {floor}, not ≥ 0")));
        }
        let total: f64 = weights.iter().sum();
        let known = group.inputs.iter().filter(|i| i.statistics.is_some()).count();
        match known {
            0 => return Ok(combination(&weights, total)),
            n if n < group.inputs.len() => {
                let problem = format!("is known of {n} of {} models", group.inputs.len());
                return Err(Error::invalid("Fisher information", problem));
            }
            _ => {}
        }
        let norms = norms(group)?;
        let mut scales = weights.clone();
        if settings.flag("normalize")? {
            for (scale, norm) in scales.iter_mut().zip(&norms).filter(|(_, n)| **n > 0.0) {
                *scale /= norm;
            }
        }
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            for (n, o) in out.iter_mut().enumerate() {
                let (mut sum, mut mass) = (0.0, 0.0);
                // Where nobody has information, the weights are what is left.
                let (mut plain, at) =
                    (0.0, |x: &[f32]| f64::from(x.get(n).copied().unwrap_or(0.0)));
                for (i, (scale, w)) in scales.iter().zip(&weights).enumerate() {
                    let theta = at(chunk.of(i));
                    // The floor is in the unit of the file, whatever the norm.
                    let f = scale * at(chunk.statistics(i)).max(floor);
                    sum += f * theta;
                    mass += f;
                    plain += w * theta;
                }
                *o = (if mass > 0.0 { sum / mass } else { plain / total }) as f32;
            }
        }))
    }
}

/// Weights of an average in which no model counts against another.
pub(super) fn positive(weights: Vec<f64>) -> Result<Vec<f64>> {
    if weights.iter().all(|w| w.is_finite() && *w >= 0.0) && weights.iter().sum::<f64>() > 0.0 {
        return Ok(weights);
    }
    let problem = format!("{weights:?} are to be ≥ 0, and one of them more");
    Err(Error::invalid("parameter `weight`", problem))
}

/// ‖Fᵢ‖ of each model.
fn norms(group: &Group) -> Result<Vec<f64>> {
    let k = group.inputs.len();
    let sums = group.sums(2 * k, |chunk, sums| {
        for (i, pair) in sums.chunks_mut(2).enumerate() {
            let f = chunk.statistics(i);
            let wrong = f.iter().filter(|f| !(f.is_finite() && **f >= 0.0)).count();
            for (s, more) in pair.iter_mut().zip([inner(f, f, None), wrong as f64]) {
                *s += more;
            }
        }
    })?;
    let one = |(pair, input): (&[f64], &crate::merge::Input)| match pair {
        [square, wrong] if *wrong == 0.0 => Ok(square.sqrt()),
        _ => Err(Error::invalid(
            format!("Fisher information of model {}", input.model),
            "has numbers that are below 0 or not finite; make the file anew",
        )),
    };
    sums.chunks(2).zip(&group.inputs).map(one).collect()
}
