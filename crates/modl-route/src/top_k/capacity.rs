//! Capacity: a module takes at most C = max(1, ⌊cf · N · k ⁄ m⌋) of N units (rows or real tokens),
//! which choose k of m modules each.
//!
//! All first choices are placed before any second one. A choice that finds no place is dropped: its
//! index is −1 and its weight 0, so that the unit passes by what is left of it; the other weights
//! stay as they are. Padding takes no place. How many choices were dropped is noted as `overflow`.
//!
//! GShard: Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1; Switch: Fedus, Zoph, Shazeer 2022,
//! arXiv 2101.03961, eq. 3. Placing by score is the batch prioritised routing of V-MoE (Riquelme et
//! al. 2021, arXiv 2106.05974, §4). The papers differ in the rounding of C, and Mesh TensorFlow has
//! C ≥ 4.
//!
//! Where two modules are chosen, a later token's first choice may take the place of an earlier
//! one's second, and by a random order or by score any token that of any other: such routers look
//! ahead, and are refused in decoders unless `capacity_factor` and `eval_capacity_factor` are 0.

use modl_core::{Context, Device, Kind, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::{check_not_negative, uniform_like};

/// How much a module takes: a part of the configuration of routers that may drop choices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capacity {
    /// cf in training; 0 stands for no limit. Default: 1.25.
    pub capacity_factor: f64,
    /// cf in evaluation; 0 stands for no limit. Default: 2.
    pub eval_capacity_factor: f64,
    /// Who shares the places. Default: the tokens of a row, or where each row has one α the rows of
    /// the batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<Over>,
    /// Who comes first. Default: `order`.
    pub fill: Fill,
}

/// Who shares the places of the modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    /// The tokens of a row.
    Row,
    /// All rows, or the tokens of all rows.
    Batch,
}

/// Who comes first among those with the same choice in their order of choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Who stands first.
    #[default]
    Order,
    /// Random in training, by the seed and the step; in evaluation who stands first.
    Random,
    /// Who has the largest weight on the first choice.
    Score,
}

impl Default for Capacity {
    fn default() -> Self {
        Capacity { capacity_factor: 1.25, eval_capacity_factor: 2.0, over: None, fill: Fill::Order }
    }
}

/// Indices (−1 for none) and weights, both `[…, k]`.
pub(crate) struct Chosen {
    pub(crate) index: Tensor,
    pub(crate) weight: Tensor,
}

/// The number of units in a group, for α `[batch, …]` or `[batch, seq, …]`.
pub(crate) fn units_of_group(over: Option<Over>, size: &[i64]) -> i64 {
    match (over, size) {
        (None | Some(Over::Row), [_, seq, _]) => *seq,
        (Some(Over::Row), _) => 1,
        _ => size.iter().rev().skip(1).product(),
    }
}

/// ⌊cf · choices ⁄ m⌋, at least 1, and 0 where there is no choice.
pub(crate) fn places(factor: f64, choices: usize, modules: usize) -> i64 {
    let share = factor * choices as f64 / modules.max(1) as f64;
    // A hair more, for factors like 1.1 that are no binary fractions.
    ((share + 1e-9).floor() as i64).max(1).min(choices as i64)
}

/// Which units are real, by a mask `[batch, seq]`.
pub(crate) fn real_units(mask: Option<&Tensor>, units: usize) -> Result<Vec<bool>> {
    match mask {
        None => Ok(vec![true; units]),
        Some(mask) => Ok(mask.to_vec::<f64>()?.into_iter().map(|m| m != 0.0).collect()),
    }
}

impl Capacity {
    /// Checks the numbers of router `method`.
    pub(crate) fn check(&self, method: &str) -> Result<()> {
        check_not_negative(&format!("{method}.capacity_factor"), self.capacity_factor)?;
        check_not_negative(&format!("{method}.eval_capacity_factor"), self.eval_capacity_factor)
    }

    /// Whether the places that are left for a token may depend on later ones.
    pub(crate) fn looks_ahead(&self, k: usize) -> bool {
        let limited = self.capacity_factor > 0.0 || self.eval_capacity_factor > 0.0;
        limited && (k > 1 || self.fill != Fill::Order)
    }

    /// Whether there is a limit.
    pub(crate) fn limits(&self, cx: &Context) -> bool {
        self.factor(cx) > 0.0
    }

    fn factor(&self, cx: &Context) -> f64 {
        if cx.train { self.capacity_factor } else { self.eval_capacity_factor }
    }

    /// The choices that find a place, and the number of those that do not, `[]`. Without a limit
    /// all do.
    pub(crate) fn limit(
        &self,
        chosen: Chosen,
        mask: Option<&Tensor>,
        modules: usize,
        cx: &Context,
        path: &str,
    ) -> Result<(Chosen, Tensor)> {
        let device = chosen.index.device();
        let note = |n: i64| Tensor::full(&[], n as f64, Kind::Float, Device::Cpu);
        if !self.limits(cx) {
            return Ok((chosen, note(0)?));
        }
        let size = chosen.index.size();
        let k = chosen.index.len_of(-1).max(1) as usize;
        let ids = chosen.index.to_vec::<i64>()?;
        let units = ids.len() / k;
        let group = units_of_group(self.over, &size).max(1) as usize;
        let real = real_units(mask, units)?;
        let mut room = Vec::with_capacity(units.div_ceil(group) * modules);
        for members in real.chunks(group) {
            let choices = k * members.iter().filter(|real| **real).count();
            room.extend(std::iter::repeat_n(places(self.factor(cx), choices, modules), modules));
        }
        let mut kept = vec![-1; ids.len()];
        let mut overflow = 0;
        let order = self.order(&chosen, cx, path)?;
        for choice in 0..k {
            for unit in order.iter().map(|u| *u as usize).filter(|u| real[*u]) {
                let at = unit * k + choice;
                let Ok(module) = usize::try_from(ids[at]) else { continue };
                let left = &mut room[unit / group * modules + module];
                if *left > 0 {
                    *left -= 1;
                    kept[at] = ids[at];
                } else {
                    overflow += 1;
                }
            }
        }
        let index = Tensor::from_slice(&kept, &size, device)?;
        let dropped = index.lt_scalar(0.0)?;
        let weight = chosen.weight.masked_fill(&dropped, 0.0)?;
        Ok((Chosen { index, weight }, note(overflow)?))
    }

    /// The units in the order in which they are placed.
    fn order(&self, chosen: &Chosen, cx: &Context, path: &str) -> Result<Vec<i64>> {
        let first = chosen.weight.detach()?.narrow(-1, 0, 1)?.reshape(&[-1])?;
        let by = match self.fill {
            Fill::Score => first,
            Fill::Random if cx.train => uniform_like(&first, cx.draw(path).child("places"))?,
            Fill::Order | Fill::Random => return Ok((0..first.len_of(0)).collect()),
        };
        by.argsort(0, true)?.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_rounded_down_but_there_is_one() {
        assert_eq!(places(1.25, 20, 8), 3); // 3.125
        assert_eq!(places(1.1, 10, 11), 1);
        assert_eq!(places(1.0, 3, 8), 1); // more modules than choices
        assert_eq!(places(2.0, 4, 1), 4); // never more than there are
        assert_eq!(places(2.0, 0, 4), 0);
    }
}
