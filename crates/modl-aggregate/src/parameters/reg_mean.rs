//! RegMean: the weight W of a linear layer whose outputs are nearest to those of each model on that
//! model's inputs (Jin et al. 2023, arXiv 2212.09849; survey §5.1).
//!
//! With Gᵢ = XᵢᵀXᵢ of the inputs Xᵢ `[n, in]` and Wᵢ `[in, out]`, Σ wᵢ‖XᵢW − XᵢWᵢ‖² is least at
//! W = (Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ. What is off the diagonal of Gᵢ is multiplied by `nondiagonal`: the paper
//! takes 0.9, and 0.1 for DeBERTa; 1 is the optimum itself. Each Gᵢ is read from a file that
//! [`gram`](crate::statistics::gram) makes. All else becomes the average.
//!
//! The system is solved in f64 by libtorch, with a ridge that draws W towards the average, so that
//! inputs that no model has ever seen have the average's answer. Rounding of the last bit may depend
//! on the number of libtorch's threads.

use modl_core::{Device, Error, Kind, Result, Tensor};

use super::combination::combination;
use super::fisher::positive;
use crate::merge::{
    Blend, Chunk, Elements, Group, MergeMethod, Setting, Settings, Spec, Statistics,
};

/// (Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ.
#[derive(Debug, Clone, Copy, Default)]
pub struct RegMean;

const SETTINGS: &[Setting] = &[
    Setting::each_or("weight", 1.0, "share of the model"),
    Setting::number_or("nondiagonal", 0.9, "factor of the products of different inputs"),
    Setting::number_or("ridge", 1e-6, "pull to the average, as a share of the mean diagonal"),
];

impl MergeMethod for RegMean {
    fn spec(&self) -> Spec {
        Spec::new("reg_mean", "Least squares of linear layers' outputs", "Jin et al. 2023")
            .settings(SETTINGS)
            .statistics(Statistics::Gram)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let weights = positive(settings.each("weight")?)?;
        let (share, ridge) = (settings.number("nondiagonal")?, settings.number("ridge")?);
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::invalid(
                "parameter `nondiagonal`",
                format!("is {share}, not 0 to 1"),
            ));
        }
        if !(ridge.is_finite() && ridge >= 0.0) {
            return Err(Error::invalid("parameter `ridge`", format!("is {ridge}, not ≥ 0")));
        }
        let known: Vec<&dyn Elements> = group.inputs.iter().filter_map(|i| i.statistics).collect();
        let [rows, columns] = match (known.len(), group.shape) {
            (0, _) => return Ok(combination(&weights, weights.iter().sum())),
            (n, _) if n < group.inputs.len() => {
                let problem = format!("are known of {n} of {} models", group.inputs.len());
                return Err(Error::invalid("products of inputs", problem));
            }
            (_, [rows, columns]) => [*rows, *columns],
            _ => {
                return Err(Error::invalid(group.name, "is no matrix, and has products of inputs"));
            }
        };
        let solved = solve(group, &known, &weights, [rows, columns], share, ridge)?;
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            let end = chunk.start + out.len();
            out.copy_from_slice(solved.get(chunk.start..end).unwrap_or_default());
        }))
    }
}

/// The merged weight `[out, in]`, row by row.
fn solve(
    group: &Group,
    grams: &[&dyn Elements],
    weights: &[f64],
    [rows, columns]: [usize; 2],
    share: f64,
    ridge: f64,
) -> Result<Vec<f32>> {
    let total: f64 = weights.iter().sum();
    let matrix = |elements: &dyn Elements, n: usize, m: usize| -> Result<Tensor> {
        let mut values = vec![0f32; n * m];
        elements.read(0, &mut values)?;
        Tensor::from_slice(&values, &[n as i64, m as i64], Device::Cpu)?.to_kind(Kind::Double)
    };
    let eye = Tensor::eye(columns as i64, Kind::Double, Device::Cpu)?;
    // 1 on the diagonal and `share` elsewhere.
    let kept = eye.mul_scalar(1.0 - share)?.add_scalar(share)?;
    let square = [columns as i64, columns as i64];
    let wide = [columns as i64, rows as i64];
    let mut sum = Tensor::zeros(&square, Kind::Double, Device::Cpu)?;
    let mut right = Tensor::zeros(&wide, Kind::Double, Device::Cpu)?;
    let mut mean = Tensor::zeros(&wide, Kind::Double, Device::Cpu)?;
    for ((input, gram), w) in group.inputs.iter().zip(grams).zip(weights) {
        let gram = matrix(*gram, columns, columns)?;
        gram.check_finite(&format!("products of inputs of model {}", input.model))?;
        let gram = gram.mul(&kept)?.mul_scalar(*w)?;
        let weight = matrix(input.elements, rows, columns)?.t()?;
        sum = sum.add(&gram)?;
        right = right.add(&gram.matmul(&weight)?)?;
        mean = mean.add(&weight.mul_scalar(w / total)?)?;
    }
    let diagonal = sum.mul(&eye)?.sum()?.item()? / columns.max(1) as f64;
    // Where all inputs were 0, the average is left.
    let pull = if diagonal > 0.0 { ridge * diagonal } else { 1.0 };
    let left = sum.add(&eye.mul_scalar(pull)?)?;
    let right = right.add(&mean.mul_scalar(pull)?)?;
    let solved = left.solve(&right).map_err(|_| {
        let problem = "have no inverse: too few inputs were seen; set a larger `ridge`";
        Error::invalid("products of inputs", problem)
    })?;
    solved.t()?.contiguous()?.to_kind(Kind::Float)?.reshape(&[-1])?.to_vec::<f32>()
}
