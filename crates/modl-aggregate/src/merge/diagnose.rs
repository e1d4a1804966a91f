//! How models that are merged get on with each other, and what the result keeps of each.

use std::path::Path;

use modl_core::{Device, Kind, Result, ResultExt, Tensor};

use crate::adapters::effective_rank;

use super::{Group, Input, Plan, Source};

/// Matrices with at most so many numbers have their effective rank worked out.
const RANKED: usize = 1 << 21;

/// What is known of a merge.
#[derive(Debug, Clone, Default)]
pub struct Diagnosis {
    /// The models that are compared: all but the base.
    pub models: Vec<String>,
    /// Each tensor.
    pub tensors: Vec<TensorDiagnosis>,
}

/// What is known of one tensor. Differences are from the base, or, without one, from 0.
#[derive(Debug, Clone)]
pub struct TensorDiagnosis {
    /// Its name.
    pub name: String,
    /// Numbers in it.
    pub numbers: usize,
    /// Inner products of the differences of all models and, last, of the result.
    pub gram: Vec<Vec<f64>>,
    /// Of the numbers that two models or more have changed, the share where they disagree on the sign.
    pub conflicts: f64,
    /// The [`effective_rank`] of each model's difference; `None` for what is no matrix or is a large one.
    pub ranks: Option<Vec<f64>>,
}

impl TensorDiagnosis {
    /// ‖τᵢ‖; the result's for the number after the last model.
    pub fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).max(0.0).sqrt()
    }

    /// cos(τᵢ, τⱼ); 0 where one of them is 0.
    pub fn cosine(&self, i: usize, j: usize) -> f64 {
        let norms = self.norm(i) * self.norm(j);
        if norms > 0.0 { self.dot(i, j) / norms } else { 0.0 }
    }

    /// How much of what a model alone would have changed is in the result, along its own direction:
    /// ⟨τᵢ, τ⟩ ⁄ ‖τᵢ‖²; 1 where it is there as a whole.
    pub fn kept(&self, i: usize) -> f64 {
        let (own, result) = (self.dot(i, i), self.gram.len().saturating_sub(1));
        if own > 0.0 { self.dot(i, result) / own } else { 0.0 }
    }

    fn dot(&self, i: usize, j: usize) -> f64 {
        self.gram.get(i).and_then(|row| row.get(j)).copied().unwrap_or_default()
    }
}

impl Diagnosis {
    /// The whole models as one tensor.
    pub fn whole(&self) -> TensorDiagnosis {
        let n = self.models.len() + 1;
        let numbers: usize = self.tensors.iter().map(|t| t.numbers).sum();
        let sum = |i, j| self.tensors.iter().map(|t| t.dot(i, j)).sum();
        let gram = (0..n).map(|i| (0..n).map(|j| sum(i, j)).collect()).collect();
        let weighed = |t: &TensorDiagnosis| t.conflicts * t.numbers as f64;
        let conflicts = self.tensors.iter().map(weighed).sum::<f64>() / numbers.max(1) as f64;
        TensorDiagnosis { name: "all".into(), numbers, gram, conflicts, ranks: None }
    }
}

/// Reads the models of a plan and its result once more and compares them.
///
/// # Errors
/// Where one cannot be read.
pub fn diagnose(plan: &Plan, result: &Path) -> Result<Diagnosis> {
    let result = Source::open("result", result)?;
    let mut found = Diagnosis::default();
    for output in plan.outputs.iter().filter(|o| o.settings.is_some() && o.vocabulary.is_none()) {
        let mut stored = Vec::new();
        for (source, name) in &output.inputs {
            let source = plan.source(*source)?;
            stored.push((source.name.as_str(), source.elements(name, output.rounded)?));
        }
        let models: Vec<String> = stored
            .iter()
            .enumerate()
            .filter(|(i, _)| Some(*i) != output.base)
            .map(|(_, (model, _))| (*model).to_owned())
            .collect();
        // Slices of several models have not all the same: those are compared that the first tensor has.
        if found.models.is_empty() {
            found.models = models;
        } else if found.models != models {
            continue;
        }
        stored.push(("result", result.elements(&output.name, None)?));
        let inputs = stored.iter().map(|(model, elements)| Input::new(model, elements)).collect();
        let group =
            Group::new(&output.name, &output.shape, inputs, plan.seed).with_base(output.base);
        let others = group.others();
        let gram = group.gram(true)?;
        let row = |i: &usize| others.iter().map(|j| gram.dot(*i, *j)).collect();
        let compared = others.get(..others.len() - 1).unwrap_or_default();
        found.tensors.push(TensorDiagnosis {
            name: output.name.clone(),
            numbers: group.len(),
            gram: others.iter().map(row).collect(),
            conflicts: conflicts(&group, compared)?,
            ranks: ranks(&group, compared).at(&output.name)?,
        });
    }
    Ok(found)
}

/// The share of disagreement.
fn conflicts(group: &Group, compared: &[usize]) -> Result<f64> {
    let sums = group.sums(2, |chunk, sums| {
        let base = group.base.map(|b| chunk.of(b));
        let (mut shared, mut disagree) = (0u32, 0u32);
        for n in 0..chunk.len() {
            let low = base.and_then(|b| b.get(n)).copied().unwrap_or_default();
            let (mut plus, mut minus) = (0, 0);
            for i in compared {
                let tau = chunk.of(*i).get(n).map_or(0.0, |x| x - low);
                plus += u32::from(tau > 0.0);
                minus += u32::from(tau < 0.0);
            }
            shared += u32::from(plus + minus > 1);
            disagree += u32::from(plus > 0 && minus > 0);
        }
        if let [all, conflicting] = sums {
            *all += f64::from(shared);
            *conflicting += f64::from(disagree);
        }
    })?;
    Ok(match sums.as_slice() {
        [all, conflicting] if *all > 0.0 => conflicting / all,
        _ => 0.0,
    })
}

/// The effective rank of each model's difference.
fn ranks(group: &Group, compared: &[usize]) -> Result<Option<Vec<f64>>> {
    let [rows, columns] = group.shape else { return Ok(None) };
    if group.len() > RANKED {
        return Ok(None);
    }
    let read = |i: usize| -> Result<Vec<f32>> {
        let mut values = vec![0.0; group.len()];
        if let Some(input) = group.inputs.get(i) {
            input.elements.read(0, &mut values)?;
        }
        Ok(values)
    };
    let base = group.base.map(read).transpose()?;
    let mut all = Vec::new();
    for i in compared {
        let mut values = read(*i)?;
        for (x, b) in values.iter_mut().zip(base.iter().flatten()) {
            *x -= b;
        }
        let matrix = Tensor::from_slice(&values, &[*rows as i64, *columns as i64], Device::Cpu)?;
        let singular: Vec<f64> = matrix.svd()?.1.to_kind(Kind::Double)?.to_vec()?;
        all.push(effective_rank(&singular));
    }
    Ok(Some(all))
}
